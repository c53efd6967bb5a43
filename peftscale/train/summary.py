"""The summary of a run: figures of all its steps, also those before a restart, beside what was predicted.

Adapters and scores are handed in; the steps are read from the run's own metrics file.
"""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from peftscale import records
from peftscale.config import RunConfig
from peftscale.records import AdapterSummary, RunSummary, StepRecord
from peftscale.train import comm
from peftscale.train.journal import Journal


class Prediction(Protocol):
    """What was said before the run: a `plan.Plan`, or what another kind of run has in its place."""

    @property
    def world_size(self) -> int: ...
    @property
    def sharding(self) -> str: ...
    @property
    def reduced_bytes_per_step(self) -> int: ...
    @property
    def gathered_bytes_per_step(self) -> int: ...
    @property
    def gathered_between_nodes_bytes_per_step(self) -> int: ...
    @property
    def control_bytes_per_step(self) -> int: ...
    @property
    def peak_rank_bytes(self) -> int: ...
    @property
    def step_s(self) -> float | None: ...


def steps_of(metrics: Path, *, passed_over: Callable[[str], None] | None = None) -> list[StepRecord]:
    """The steps of a run in their order; of a step that was repeated after a restart, the last record.

    Args:
        metrics: the run's file; none yet, no steps.
        passed_over: as of `records.read`.
    """
    read = records.read(metrics, passed_over=passed_over) if metrics.exists() else ()
    rows = {row.step: row for row in read if isinstance(row, StepRecord)}
    return [rows[step] for step in sorted(rows)]


def steps_of_rank_0(cfg: RunConfig, journal: Journal, *, step: int) -> list[StepRecord]:
    """The same on every rank: the file is rank 0's own, and it holds the steps before a restart too.

    A line that is no record is noted and left out: a run that has trained does not fail over its figures. So are steps
    behind `step`, the last one: of an earlier attempt that went further.
    """

    def local() -> list[StepRecord]:
        if comm.rank() != 0:
            return []
        found = steps_of(cfg.metrics_path, passed_over=lambda text: journal.note(step, text))
        return [row for row in found if row.step <= step]

    return comm.from_rank_0(comm.together(local))


def make(
    steps: Iterable[StepRecord],
    planned: Prediction,
    *,
    name: str,
    is_packed: bool,
    seconds: float,
    peak_rank_bytes: int,
    adapters: dict[str, AdapterSummary],
) -> RunSummary:
    """Put the summary together. Byte figures are low medians over the steps: those of a step that was."""
    rows = list(steps)

    def median(key: str) -> int:
        return statistics.median_low(getattr(row, key) for row in rows) if rows else 0

    trained_s = sum(row.seconds for row in rows)
    return RunSummary(
        name=name,
        world_size=planned.world_size,
        sharding=planned.sharding,
        packing="packed" if is_packed else "padded",
        steps=rows[-1].step if rows else 0,
        seconds=seconds,
        tokens_per_s=sum(row.tokens for row in rows) / trained_s if trained_s else 0.0,
        reduced_bytes_per_step=median("reduced_bytes"),
        gathered_bytes_per_step=median("gathered_bytes"),
        control_bytes_per_step=median("control_bytes"),
        peak_rank_bytes=peak_rank_bytes,
        gathered_between_nodes_bytes_per_step=median("gathered_between_nodes_bytes"),
        step_s=statistics.median(row.seconds for row in rows) if rows else None,
        predicted=records.Predicted(
            reduced_bytes_per_step=planned.reduced_bytes_per_step,
            gathered_bytes_per_step=planned.gathered_bytes_per_step,
            control_bytes_per_step=planned.control_bytes_per_step,
            peak_rank_bytes=planned.peak_rank_bytes,
            gathered_between_nodes_bytes_per_step=planned.gathered_between_nodes_bytes_per_step,
            step_s=planned.step_s,
        ),
        adapters=adapters,
    )
