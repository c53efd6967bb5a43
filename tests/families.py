"""Which model families take packed passes, and how exact those are: a small random model of each.

python tests/families.py
"""

import sys

import transformers
from transformers import PretrainedConfig

from peftscale.base import exactness

_SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_WIDE = {key: _SMALL[key] for key in _SMALL if key not in ("intermediate_size", "num_key_value_heads")}


def configs() -> dict[str, PretrainedConfig]:
    """Family -> a small config with what makes the family special: windows, caps, sinks, experts."""
    t, window = transformers, {"head_dim": 16, "sliding_window": 64}
    return {
        "llama": t.LlamaConfig(**_SMALL),
        "qwen2": t.Qwen2Config(**_SMALL),
        "qwen2 with window": t.Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "qwen3": t.Qwen3Config(**_SMALL, head_dim=16),
        "mistral with window": t.MistralConfig(**_SMALL, sliding_window=64),
        "gemma2": t.Gemma2Config(**_SMALL, **window),
        "gemma3": t.Gemma3TextConfig(**_SMALL, **window),
        "phi3": t.Phi3Config(**_SMALL, pad_token_id=0),
        "olmo2": t.Olmo2Config(**_SMALL),
        "mixtral": t.MixtralConfig(**_SMALL, num_local_experts=4),
        "opt": t.OPTConfig(**_WIDE, ffn_dim=128, word_embed_proj_dim=64),
        "gpt_neox": t.GPTNeoXConfig(**_WIDE, intermediate_size=128),
        "gpt2": t.GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=256),
        "gpt_oss": t.GptOssConfig(**_SMALL, **window, num_local_experts=4),
        "falcon": t.FalconConfig(**_WIDE),
        "bloom": t.BloomConfig(vocab_size=300, hidden_size=64, n_layer=3, n_head=4),
    }


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    print("| family | pass | relative error, or why padded |\n|---|---|---|")
    for name, config in configs().items():
        reason = exactness.small_copy_differs(config)
        if reason is None:
            error = exactness.gradient_error(exactness.small_copy(config))
            print(f"| {name} | packed | {error:.1e} |")
        else:
            print(f"| {name} | padded | {reason} |")


if __name__ == "__main__":
    sys.exit(main())
