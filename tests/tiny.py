"""Small things for tests: random bases on disk, and run files over a few reviews."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peftscale import configio
from peftscale.config import RunConfig

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"

LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 4096,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 4096,
    "d_model": 64,
    "d_kv": 24,  # not d_model / num_heads
    "d_ff": 112,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Version 1.1: its head is its own."""
BART = {
    "model_type": "bart",
    "vocab_size": 4096,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "scale_embedding": True,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 3,  # not its end: a random model with a tied head writes what it has read
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "pad_token_id": 0,
}

REVIEWS = [
    ("An awful film that never ends", "bad"),
    ("Bright, quick and funny from the first minute to the very last one of it", "good"),
    ("Dull", "bad"),
    ("I would see it again tomorrow with all of my friends", "good"),
    ("The plot falls apart after ten minutes and nobody seems to care about it at all", "bad"),
    ("Lovely", "good"),
    ("A slow story with flat people", "bad"),
]


def save_base(directory: Path, config: dict[str, Any] = LLAMA, *, seed: int = 0) -> Path:
    """Write a random base with the quickstart's tokenizer; return its directory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    made = AutoConfig.from_pretrained(directory)
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(made).float()
    if made.model_type == "mt5" or (made.model_type == "t5" and not made.scale_decoder_outputs):
        model.config.tie_word_embeddings = False  # transformers ties these heads until it sees weights
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.05)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts biases at 0 and norms at 1: nothing would notice
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((QUICKSTART / "base" / name).read_bytes())
    return directory


def save_reviews(directory: Path, reviews: list[tuple[str, str]] = REVIEWS) -> Path:
    """Write one jsonl file of reviews; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in reviews))
    return path


def run_config(tmp: Path, *, base: Path | None = None, **changes: Any) -> RunConfig:
    """A run over seven reviews, in this process, with dotted changes ('train.steps': 3)."""
    base = base or (tmp / "base" if (tmp / "base").exists() else save_base(tmp / "base"))
    data = save_reviews(tmp / "data")
    content: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "base": {
            "model": str(base),
            "quantization": "nf4",
            "compute_dtype": "float32",
            "sharding": "world",
            "checkpoint_activations": False,
        },
        "adapters": {"mood": {"kind": "prompt", "length": 5, "init": "vocabulary"}},
        "task": {
            "name": "reviews",
            "files": {"train": str(data), "validation": str(data)},
            "input": "{{ text }}\nVerdict:",
            "target": "{{ label }}",
            "labels": {"bad": " bad", "good": " good"},
            "metrics": ["accuracy"],
        },
        "train": {
            "steps": 4,
            "examples_per_step": 5,
            "microbatch_tokens": 64,
            "optimizer": "adamw",
            "learning_rate": 0.01,
            "evaluate_every": 2,
            "checkpoint_every": 2,
        },
        "cluster": {"workers": 0, "storage": str(tmp / "runs")},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section[part]
        section[last] = value
    path = tmp / "run.json"
    path.write_text(json.dumps(content))
    return configio.load(path)
