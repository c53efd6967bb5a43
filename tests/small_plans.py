"""A run file and a base so small that their plans can be made with a pencil."""

from typing import Any

from peftscale import configio, facts
from peftscale.config import RunConfig
from peftscale.facts import BaseFacts, TensorFacts, UnitFacts


def cfg(*, adapters: dict[str, int], **changes: dict[str, Any]) -> RunConfig:
    """A run of labels 'ab' and 'c' (at most 3 target tokens), 12 examples a step."""
    data: dict[str, Any] = {
        "name": "x",
        "seed": 0,
        "base": {
            "model": "m",
            "quantization": "nf4",
            "compute_dtype": "bfloat16",
            "sharding": "world",
            "checkpoint_activations": False,
        },
        "adapters": {name: {"kind": "prompt", "length": n, "init": "random"} for name, n in adapters.items()},
        "task": {
            "name": "t",
            "files": {"train": "a.jsonl", "validation": "b.jsonl"},
            "input": "i",
            "target": "t",
            "labels": {"p": "ab", "q": "c"},
            "metrics": ["accuracy"],
        },
        "train": {
            "steps": 5,
            "examples_per_step": 12,
            "microbatch_tokens": 100,
            "optimizer": "adamw",
            "learning_rate": 0.1,
            "evaluate_every": 5,
            "checkpoint_every": 5,
        },
        "cluster": {"workers": 3, "storage": "runs"},
    }
    for section, values in changes.items():
        data[section] |= values
    return configio.from_dict(data)


def base() -> BaseFacts:
    """Hidden 8, feed-forward 24, 2 blocks of one 24 x 8 and one 8 x 24 linear and a norm, 50 tokens, tied."""
    blocks = tuple(
        UnitFacts(
            f"b.{i}",
            "block",
            (facts.LinearFacts(f"b.{i}.up", 24, 8, False), facts.LinearFacts(f"b.{i}.down", 8, 24, False)),
            (TensorFacts(f"b.{i}.norm.weight", (8,)),),
        )
        for i in range(2)
    )
    table = TensorFacts("e.weight", (50, 8))
    norm = UnitFacts("n", "norm", (), (TensorFacts("n.weight", (8,)),))
    units = (UnitFacts("e", "embedding", (), (table,)), *blocks, norm, UnitFacts("h", "head", (), (table,)))
    return BaseFacts("m", "tiny", 8, 2, 2, 2, 4, "silu", 50, 64, True, False, units)
