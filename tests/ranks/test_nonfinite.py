"""A loss or gradient that is not finite changes nothing, on any rank, and ends the run when it happens too often."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale import adapters, records
from peftscale.base import load
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import Cursor, training_items
from peftscale.errors import TrainingError
from peftscale.records import StepRecord
from peftscale.train import comm, departures, step, worker
from peftscale.train.checkpoint import AdapterProgress, State
from peftscale.train.optim import AdapterOptimizer

pytestmark = pytest.mark.ranks


def _step_that_is_too_large(cfg: RunConfig) -> dict[str, Any]:
    """One step at the run's rate, then one at a rate whose values have squares that no float32 holds."""
    base = load.load(cfg.base, sharding="world", device=torch.device("cpu"))
    cohort = adapters.build(cfg, base)
    items = training_items("mood", 5, tasks.load(cfg.task, base.tokenizer, max_tokens=100).train)
    optimizer = AdapterOptimizer.of(cohort["mood"], cfg.train)
    first = step.run(base, cohort, {"mood": optimizer}, items, step=0, microbatch_tokens=64)
    stood = {name: value.clone() for name, value in {**optimizer.state(), "rows": cohort["mood"].rows_PH}.items()}
    optimizer.cfg = cfg.train.model_copy(update={"learning_rate": 1e30})
    second = step.run(base, cohort, {"mood": optimizer}, items, step=1, microbatch_tokens=64)
    stands = {**optimizer.state(), "rows": cohort["mood"].rows_PH}
    return {
        "rates": [first.rates, second.rates],
        "skipped": [first.skipped, second.skipped],
        "changed": [name for name, value in stands.items() if not torch.equal(value, stood[name])],
    }


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_step_that_is_too_large_has_not_been_not_in_the_moments_and_not_in_the_rates(
    tmp_path: Path, kind: str
) -> None:
    cfg = tiny.run_config(tmp_path, **{"train.optimizer": kind})
    for result in run_ranks(_step_that_is_too_large, 2, tmp_path / "ranks", cfg):
        assert result["skipped"] == [(), ("mood",)]
        assert result["rates"] == [{"mood": 0.01}, {}]
        assert result["changed"] == []


def _step_with_one_bad_rank(cfg: RunConfig, factor: float) -> dict[str, Any]:
    """One rank's gradient is spoiled before the reduction; the next step is healthy."""
    base = load.load(cfg.base, sharding="world", device=torch.device("cpu"))
    cohort = adapters.build(cfg, base)
    optimizers = {name: AdapterOptimizer(a.parameters(), cfg.train) for name, a in cohort.items()}
    items = training_items("mood", 5, tasks.load(cfg.task, base.tokenizer, max_tokens=100).train)
    rows_PH = cohort["mood"].rows_PH
    before = rows_PH.detach().clone()
    is_bad = [True]

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return grad * factor if is_bad[0] and comm.rank() == 1 else grad

    rows_PH.register_hook(spoil)
    first = step.run(base, cohort, optimizers, items, step=0, microbatch_tokens=64)
    same = bool(torch.equal(rows_PH, before))
    is_bad[0] = False
    second = step.run(base, cohort, optimizers, items, step=1, microbatch_tokens=64)
    return {
        "skipped": [first.skipped, second.skipped],
        "same": same,
        "rows": rows_PH.detach().clone(),
        "before": before,
    }


# Of a finite gradient with infinite squares moments keep those; of 1e21 each square is finite and the clip norm is not.
@pytest.mark.parametrize("factor", [math.inf, 1e26, 1e21])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_the_update_on_every_rank(
    tmp_path: Path, factor: float
) -> None:
    results = run_ranks(_step_with_one_bad_rank, 2, tmp_path / "ranks", tiny.run_config(tmp_path), factor)
    for result in results:
        assert result["skipped"] == [("mood",), ()]
        assert result["same"]
        assert not torch.equal(result["rows"], result["before"])
        assert torch.equal(result["rows"], results[0]["rows"])


def _train_into_overflow(cfg: RunConfig) -> str:
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        worker.main(cfg)
    except TrainingError as error:
        return str(error)
    return "nothing was raised"


def test_so_many_steps_in_a_row_end_the_run_with_a_clear_error_on_every_rank(tmp_path: Path) -> None:
    """A rate of 1e30 drives the rows to overflow after the first update."""
    changes = {
        "train.steps": 30,
        "train.optimizer": "adafactor",
        "train.learning_rate": 1e30,
        "train.max_nonfinite_steps": 3,
    }
    cfg = tiny.run_config(tmp_path, **{**changes, "train.evaluate_every": 30, "train.checkpoint_every": 1})
    messages = run_ranks(_train_into_overflow, 2, tmp_path / "ranks", cfg)
    assert messages[0] == messages[1]
    assert "adapter mood: its values, loss or gradient were not finite in 3 steps in a row" in messages[0]
    assert "Lower train.learning_rate=1e+30" in messages[0]
    rows = [row for row in records.read(cfg.run_dir / "metrics.jsonl") if isinstance(row, StepRecord)]
    assert [row.skipped for row in rows][-3:] == [True, True, True]
    assert not any(row.skipped for row in rows[:-3])
    assert json.loads((cfg.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] is True


@pytest.mark.parametrize(
    ("changes", "steps", "kept"),
    [
        ({"train.steps": 5, "train.checkpoint_every": 5}, 5, "no checkpoint had been written."),
        (
            {"train.steps": 30, "train.checkpoint_every": 4, "train.early_stop": 2},
            10,
            "last checkpoint is {}/step-8.",
        ),
    ],
)
def test_neither_the_last_step_nor_an_early_stop_makes_a_success_of_an_adapter_that_fails(
    tmp_path: Path, changes: dict[str, Any], steps: int, kept: str
) -> None:
    rate = {"train.optimizer": "adafactor", "train.learning_rate": 1e30, "train.evaluate_every": 1}
    cfg = tiny.run_config(tmp_path, **rate, **changes)
    message = _train_into_overflow(cfg)
    assert f"not finite in {steps} steps in a row, the last one step {steps}." in message
    assert message.endswith(kept.format(cfg.checkpoints_dir))
    assert not cfg.summary_path.exists()


def test_one_bad_batch_at_the_end_is_no_failure_and_two_are(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{"train.steps": 4})
    for row, outcome in ((1, "finished"), (2, "failed")):
        healthy, bad = (AdapterProgress(Cursor(0), steps=4, nonfinite_steps=num) for num in (0, row))
        two = cfg.model_copy(update={"adapters": dict.fromkeys(("healthy", "bad"), cfg.adapters["mood"])})
        departures.mark_done_(two, State({}, {}, {}, {"healthy": healthy, "bad": bad}, step=4), ["healthy", "bad"])
        assert (healthy.outcome, bad.outcome) == ("finished", outcome)
