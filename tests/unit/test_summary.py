"""A run's figures are those of steps that were, over the whole run."""

from pathlib import Path

from peftscale import records
from peftscale.records import StepRecord
from peftscale.train import summary


def _row(step: int, gathered: int) -> StepRecord:
    return StepRecord(
        step=step,
        adapters={"a": 1.0},
        learning_rate=0.1,
        tokens=7,
        seconds=0.5,
        tokens_per_s=14.0,
        reduced_bytes=20,
        gathered_bytes=gathered,
        control_bytes=8,
        skipped=False,
    )


def test_a_step_that_was_repeated_after_a_restart_counts_once_and_as_it_was_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, gathered in ((1, 100), (2, 999), (2, 200), (3, 100)):
        records.append(path, _row(step, gathered))
    assert [(row.step, row.gathered_bytes) for row in summary.steps_of(path)] == [(1, 100), (2, 200), (3, 100)]
    assert summary.steps_of(tmp_path / "nothing") == []
