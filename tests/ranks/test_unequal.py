"""Promise 13: ranks with unequal shares end together, and with the results of one rank.

Seven examples on three ranks, from one token to nearly all positions of the base, so that passes are short on some
ranks and empty on others; five to classify; five to continue, where some rows end after a token and others after forty.
A rank that made one gather too few or too many would let the others wait until the harness's time-out.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale import adapters
from peftscale.base import load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import plan_passes, training_items
from peftscale.train import evaluate, step

pytestmark = pytest.mark.ranks

TWO = {
    "mood": {"kind": "prompt", "length": 5, "init": "vocabulary"},
    "tone": {"kind": "prompt", "length": 3, "init": "random"},
}
MICROBATCH_TOKENS = 64
_LONG = "The plot falls apart after ten minutes and nobody seems to care about it at all"
SEVEN = [
    ("Dull", "bad"),
    (" and ".join([_LONG] * 5), "bad"),
    ("Lovely", "good"),
    ("Bright, quick and funny from the first minute to the very last one of it", "good"),
    (" and ".join([_LONG] * 2), "bad"),
    ("A slow story with flat people", "bad"),
    ("Again", "good"),
]
FIVE = SEVEN[:5]


def _run_config(tmp: Path, config: dict[str, Any], **changes: Any) -> RunConfig:
    base = tmp / "base" if (tmp / "base").exists() else tiny.save_base(tmp / "base", config)
    files = {
        "train": str(tiny.save_reviews(tmp / "seven", SEVEN)),
        "validation": str(tiny.save_reviews(tmp / "five", FIVE)),
    }
    return tiny.run_config(tmp, base=base, adapters=TWO, **{"task.files": files, **changes})


def _all(cfgs: list[RunConfig], sharding: str) -> list[dict[str, Any]]:
    """Gradient, then predictions, then the gradient again, of every run file."""
    return [_one(cfg, load.load(cfg.base, sharding=sharding, device=torch.device("cpu"))) for cfg in cfgs]  # type: ignore[arg-type]


def _one(cfg: RunConfig, base: Base) -> dict[str, Any]:
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=123)
    if not task.labels:
        longest = max(len(example.input_ids) for example in task.validation)
        task = dataclasses.replace(task, max_tokens=longest + 1)
    items = [i for name, adapter in cohort.items() for i in training_items(name, adapter.length, task.train)]
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for _ in range(2):
        for adapter in cohort.values():
            adapter.rows_PH.grad = None
        losses = step.gradient(base, cohort, items, microbatch_tokens=MICROBATCH_TOKENS)
        found["losses"].append({name: float(loss) for name, loss in losses.items()})
        found["gradients"].append({name: adapter.rows_PH.grad for name, adapter in cohort.items()})
        results = evaluate.run(
            base,
            cohort,
            task,
            task.validation,
            metrics=cfg.task.metrics,
            microbatch_tokens=MICROBATCH_TOKENS,
            with_base_alone=True,
        )
        found["predictions"] = {name: result.predictions for name, result in results.items()}
        found["metrics"] = {name: result.metrics for name, result in results.items()}
    shares = plan_passes(items, world=3, microbatch_tokens=MICROBATCH_TOKENS)
    found["rows of passes"] = [[len(rows) for rows in passes] for passes in shares]
    found["new tokens"] = [task.num_new_tokens(example) for example in task.validation]
    return found


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_three_ranks_with_unequal_shares_end_and_give_the_results_of_one(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    cfgs = [
        _run_config(tmp_path, config),
        _run_config(tmp_path, config, **{"task.labels": {"bad": " not good at all", "good": " good"}}),
        _run_config(
            tmp_path,
            config,
            **{"task.labels": None, "task.metrics": ["exact_match"], "task.max_target_tokens": 40},
        ),
    ]
    one = _all(cfgs, "replicated")
    print(one[2])
    for rank in run_ranks(_all, 3, tmp_path / "ranks", cfgs, "world"):
        for got, want in zip(rank, one, strict=True):
            assert got["predictions"] == want["predictions"]
            assert got["metrics"] == want["metrics"]
            for mine, alone in zip(got["losses"], want["losses"], strict=True):
                assert mine == pytest.approx(alone, rel=1e-6)
            for mine, alone in zip(got["gradients"], want["gradients"], strict=True):
                for name in TWO:
                    error = float((mine[name] - alone[name]).norm() / alone[name].norm())
                    print("ERR", error)
                    assert error < 2e-6, error
