"""Which model families take packed passes, and how exact passes are: a small random model of each.

python tests/families.py
"""

import sys
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from peftscale.base import encoder_decoder, exactness, skeleton, slots_exactness
from peftscale.base.padded import Row, logits_at
from peftscale.errors import ModelError

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
        "phi3 with longrope": longrope(),
        "olmo2": t.Olmo2Config(**_SMALL),
        "mixtral": t.MixtralConfig(**_SMALL, num_local_experts=4),
        "opt": t.OPTConfig(**_WIDE, ffn_dim=128, word_embed_proj_dim=64),
        "gpt_neox": t.GPTNeoXConfig(**_WIDE, intermediate_size=128),
        "gpt2": t.GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=256),
        "gpt_oss": t.GptOssConfig(**_SMALL, **window, num_local_experts=4),
        "granite": t.GraniteConfig(**_SMALL, attention_multiplier=0.25, residual_multiplier=0.5, logits_scaling=2.0),
        "smollm3": t.SmolLM3Config(**_SMALL, pad_token_id=0, no_rope_layers=[1, 0, 1]),
        "starcoder2": t.Starcoder2Config(**_SMALL, sliding_window=64),
        "falcon": t.FalconConfig(**_WIDE),
        "bloom": t.BloomConfig(vocab_size=300, hidden_size=64, n_layer=3, n_head=4),
    }


def longrope() -> PretrainedConfig:
    """Phi-3 as its models of 128k tokens are: other frequencies for texts beyond the first positions, here 64."""
    factors = {"short_factor": [1 + n / 8 for n in range(48)], "long_factor": [2 + n for n in range(48)]}
    sizes = _SMALL | {"hidden_size": 384, "original_max_position_embeddings": 64}  # heads of 96, as there
    return transformers.Phi3Config(**sizes, pad_token_id=0, rope_parameters={"rope_type": "longrope", **factors})


def encoder_decoders() -> dict[str, PretrainedConfig]:
    """Family -> a small config: the original T5 scales its outputs and ties its head, its version 1.1 does neither."""
    sizes = {"vocab_size": 300, "d_model": 64, "d_kv": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    gated = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    return {
        "t5": transformers.T5Config(**sizes, d_ff=112, decoder_start_token_id=0),
        "t5 v1.1": transformers.T5Config(**sizes, d_ff=112, **gated, tie_word_embeddings=False),
        "mt5": transformers.MT5Config(**sizes, d_ff=112),
    }


def prompted_rows(hidden_size: int, *, seed: int) -> tuple[list[Row], list[nn.Parameter]]:
    """Five rows of different length for an encoder-decoder: two share a prompt, one has a prompt for the decoder too,
    one for the decoder alone, one none."""
    draw = torch.Generator().manual_seed(seed)
    first, second, ahead = (nn.Parameter(torch.randn(n, hidden_size, generator=draw) * 0.3) for n in (6, 3, 2))
    lengths = ((14, 3), (9, 1), (20, 6), (11, 2), (7, 4))
    ids = [torch.randint(3, 200, (length,), generator=draw).tolist() for length, _ in lengths]
    in_front = [(first, None), (first, None), (second, ahead), (None, ahead), (None, None)]
    rows = [
        Row(prompt, text, num_targets, decoder_prompt_QH=of_decoder)
        for (prompt, of_decoder), text, (_, num_targets) in zip(in_front, ids, lengths, strict=True)
    ]
    return rows, [first, second, ahead]


def transformers_logits(model: PreTrainedModel, row: Row) -> Tensor:
    """(M, V) by transformers' own forward of one row, on embeddings that are put together here."""
    num_read, sides = len(row.ids) - row.num_targets, []
    read = [model.config.decoder_start_token_id, *row.ids[num_read:-1]]
    for ids, prompt_PH in ((row.ids[:num_read], row.prompt_PH), (read, row.decoder_prompt_QH)):
        embedded_TH = model.get_input_embeddings()(torch.tensor(ids))
        sides.append(torch.cat([*(() if prompt_PH is None else (prompt_PH,)), embedded_TH])[None])
    out = model(inputs_embeds=sides[0], decoder_inputs_embeds=sides[1], use_cache=False)
    logits_MV: Tensor = out.logits[0, -row.num_targets :]
    return logits_MV


def largest_error(got_MV: Tensor, want_MV: Tensor, rows: Sequence[Row], prompts: Sequence[nn.Parameter]) -> float:
    """Relative, of logits and of the gradient of their likelihood in each prompt."""
    targets = torch.tensor([token for row in rows for token in row.ids[len(row.ids) - row.num_targets :]])
    found = []
    for logits_MV in (got_MV, want_MV):
        gradients = torch.autograd.grad(cross_entropy(logits_MV, targets), prompts)
        found.append([logits_MV.detach(), *gradients])
    return exactness.largest_error(*found)


def prompt_error(config: PretrainedConfig) -> float:
    """Of prompts in the padded pass of an encoder-decoder, against transformers' own forward row by row."""
    torch.manual_seed(0)
    model = slots_exactness.small_copy(config, "sdpa")
    rows, prompts = prompted_rows(model.get_input_embeddings().embedding_dim, seed=0)
    embeds, at_M, arguments = encoder_decoder.join(rows, model, torch.float32, torch.device("cpu"))
    want_MV = torch.cat([transformers_logits(model, row) for row in rows])
    return largest_error(logits_at(model, embeds, at_M, **arguments), want_MV, rows, prompts)


def prefix_error(config: PretrainedConfig) -> float:
    """Of prefixes in an encoder-decoder, against keys and values that are hooked in."""
    torch.manual_seed(0)
    return slots_exactness.prefix_error(slots_exactness.small_copy(config, "sdpa"))


def base_of(config: PretrainedConfig) -> str:
    """Whether such a base can be loaded at all, or only its attention is shown to be exact."""
    try:
        skeleton.build(config, quantization="nf4", compute_dtype=torch.float32, where="here")
    except ModelError as error:
        if "Fused experts" not in str(error):
            raise
        return "attention only: refused for fused experts"
    return "loads"


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    print("| family | base | pass | relative error, or why padded |\n|---|---|---|---|")
    num_exact = num_loaded = 0
    for name, config in configs().items():
        base, reason = base_of(config), exactness.small_copy_differs(config)
        if reason is None:
            error = exactness.gradient_error(exactness.small_copy(config))
            print(f"| {name} | {base} | packed | {error:.1e} |")
            num_exact, num_loaded = num_exact + 1, num_loaded + (base == "loads")
        else:
            print(f"| {name} | {base} | padded | {reason} |")
    for name, config in encoder_decoders().items():
        reason = exactness.small_copy_differs(config)
        errors = f"prompts {prompt_error(config):.1e}, prefixes {prefix_error(config):.1e}"
        print(f"| {name} | {base_of(config)} | padded | {errors}; {reason} |")
    print(f"\npacked and exact: {num_exact}; of those, bases that load: {num_loaded}")


if __name__ == "__main__":
    sys.exit(main())
