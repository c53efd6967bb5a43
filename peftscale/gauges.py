"""Live figures of a run for Prometheus: each rank hands its own to Ray, which serves them as `ray_NAME`.

What is written down for good is `records`. cluster/monitoring has a Grafana dashboard of exactly these.
"""

from dataclasses import dataclass
from typing import Any, Literal

from peftscale.records import EvaluationRecord, Record, StepRecord


@dataclass(frozen=True, slots=True)
class Figure:
    """A name that Prometheus knows, behind Ray's `ray_`. Counters end in `_total` there."""

    name: str
    kind: Literal["gauge", "counter"]
    of: tuple[str, ...]
    """What there is one of each: tags beside `run`."""
    description: str


FIGURES = (
    Figure("peftscale_step", "gauge", (), "Steps taken."),
    Figure("peftscale_step_seconds", "gauge", ("rank",), "Seconds of the last step."),
    Figure("peftscale_tokens_per_second", "gauge", (), "Input and target tokens of the last step, by its seconds."),
    Figure("peftscale_tokens", "counter", (), "Input and target tokens so far."),
    Figure("peftscale_reduced_bytes", "counter", ("rank",), "Bytes of gradients that the rank reduced."),
    Figure("peftscale_gathered_bytes", "counter", ("rank",), "Bytes of the base that the rank gathered."),
    Figure("peftscale_peak_rank_bytes", "gauge", ("rank",), "Highest memory of the rank so far."),
    Figure("peftscale_loss", "gauge", ("adapter",), "Training loss of the last step in nats a target token."),
    Figure("peftscale_skipped_steps", "counter", ("adapter",), "Steps that were not finite and changed nothing."),
    Figure("peftscale_score", "gauge", ("adapter", "split", "metric"), "Metric at the last evaluation."),
)


class Gauges:
    """The figures of one rank of one run."""

    def __init__(self, run: str, rank: int) -> None:
        from ray.util import metrics

        self._run, self._rank = run, str(rank)
        kinds: dict[str, Any] = {"gauge": metrics.Gauge, "counter": metrics.Counter}
        self._figures = {
            figure.name.removeprefix("peftscale_"): kinds[figure.kind](
                figure.name, description=figure.description, tag_keys=("run", *figure.of)
            )
            for figure in FIGURES
        }

    def show(self, record: Record) -> None:
        """Take over a row, on the rank that made it. What all ranks know the first one tells."""
        if isinstance(record, StepRecord):
            self._set("step_seconds", record.seconds, rank=self._rank)
            self._set("peak_rank_bytes", record.peak_rank_bytes, rank=self._rank)
            self._add("reduced_bytes", record.reduced_bytes, rank=self._rank)
            self._add("gathered_bytes", record.gathered_bytes, rank=self._rank)
        if self._rank != "0":
            return
        match record:
            case StepRecord():
                self._set("step", record.step)
                self._set("tokens_per_second", record.tokens_per_s)
                self._add("tokens", record.tokens)
                for adapter, loss in record.adapters.items():
                    self._set("loss", loss, adapter=adapter)
                for adapter in record.skipped_adapters:
                    self._add("skipped_steps", 1, adapter=adapter)
            case EvaluationRecord():
                for metric, value in record.metrics.items():
                    self._set("score", value, adapter=record.adapter, split=record.split, metric=metric)

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._figures[name].set(value, {"run": self._run, **tags})

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses an increment of zero
            self._figures[name].inc(value, {"run": self._run, **tags})
