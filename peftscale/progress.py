"""Live view of a run: follows its metrics file and shows or forwards each record as it is written.

The workers only write `metrics.jsonl`; whoever started the run reads it here, so that the view is the same with and
without Ray. On a terminal a progress bar, otherwise plain lines at most every two seconds. Everything goes to
standard error. Trackers are accelerate's.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.records import EvaluationRecord, NoteRecord, Record, StepRecord, parse

_POLL_S = 0.1
_LINE_EVERY_S = 2.0

Sink = Callable[[Record], None]


@contextmanager
def followed(path: Path, cfg: RunConfig, *, show: bool, refresh: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Follow `path` from its present end until the block ends, then read what is left.

    Args:
        path: the run's metrics file, which need not exist yet.
        cfg: says how many steps there are and which trackers are fed.
        show: print progress to standard error.
        refresh: called again and again: whatever makes the file grow, where that is no process of this machine.

    Raises:
        ConfigError: a tracker is not installed.
    """
    sinks, close = _sinks(cfg, path.parent, show=show)
    start = path.stat().st_size if path.exists() else 0
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, start, sinks, stop, refresh), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for end in close:
            end()


def _follow(path: Path, at: int, sinks: list[Sink], stop: threading.Event, refresh: Callable[[], None]) -> None:
    is_last = False
    while not is_last:
        is_last = stop.wait(_POLL_S)
        refresh()
        if not path.exists():
            continue
        with path.open("rb") as file:
            file.seek(at)
            whole, newline, _ = file.read().rpartition(b"\n")
        at += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                record = parse(line.decode())
            except ValidationError:
                continue  # not ours to judge: `records.read` does
            for sink in sinks:
                sink(record)


def _sinks(cfg: RunConfig, run_dir: Path, *, show: bool) -> tuple[list[Sink], list[Callable[[], None]]]:
    sinks: list[Sink] = []
    close: list[Callable[[], None]] = []
    for name in cfg.track:
        tracker = _tracker(name, cfg, run_dir)
        sinks.append(_feeding(tracker))
        close.append(tracker.finish)
    if show:  # last, because a bar takes the terminal over until it is closed
        console = Console(stderr=True)
        view = _Bar(cfg, console) if console.is_terminal else _Lines(cfg)
        sinks.append(view.show)
        close.append(view.close)
    return sinks, close


def _feeding(tracker: Any) -> Sink:
    def feed(record: Record) -> None:
        if values := _values(record):
            tracker.log(values, step=getattr(record, "step", 0))

    return feed


def _tracker(name: str, cfg: RunConfig, run_dir: Path) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # accelerate's trackers ask it which process they are in. Under torchrun it would join a process group of its own.
    ranks = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    PartialState(cpu=True)
    os.environ.update(ranks)
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    try:
        tracker = (
            tracker_class(name, logging_dir=str(run_dir))  # into <run>/<tracker>
            if tracker_class.requires_logging_directory
            else tracker_class(cfg.name)
        )
        tracker.start()
        tracker.store_init_configuration(_flat(cfg.model_dump(mode="json")))
    except (ImportError, NameError) as error:
        raise ConfigError(
            f"track: {name} is not installed ({error}). Install the extra: pip install 'peftscale[track]', "
            f"or take {name} out of track."
        ) from error
    return tracker


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {where: value if isinstance(value, int | float | str | bool) else str(value)}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{where}.{key}" if where else key).items()}


def _values(record: Record) -> dict[str, float]:
    match record:
        case StepRecord():
            losses = {f"loss/{name}": loss for name, loss in record.adapters.items()}
            rates = {f"learning_rate/{name}": rate for name, rate in record.learning_rates.items()}
            return {**losses, "learning_rate": record.learning_rate, **rates, "tokens_per_s": record.tokens_per_s}
        case EvaluationRecord():
            return {f"{record.split}/{record.adapter}/{name}": value for name, value in record.metrics.items()}
        case _:
            return {}


class _Lines:
    """Plain lines."""

    def __init__(self, cfg: RunConfig) -> None:
        self._steps = cfg.num_steps
        self._last_s = 0.0
        self._first: tuple[int, float] | None = None

    def show(self, record: Record) -> None:
        now = time.monotonic()
        if isinstance(record, EvaluationRecord | NoteRecord):
            self._print(_line(record))
        elif isinstance(record, StepRecord):
            first_step, first_s = self._first = self._first or (record.step, now)
            if record.step == self._steps or now - self._last_s >= _LINE_EVERY_S or record.skipped:
                self._last_s = now
                done = record.step - first_step
                seconds = (now - first_s) / done * (self._steps - record.step) if done else None
                left = "" if seconds is None else f"  {timedelta(seconds=round(seconds))} left"
                self._print(f"step {record.step}/{self._steps}  {_step_words(record)}{left}")

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Bar(Progress):
    """A bar, and a line of figures below it: side by side they would not fit 80 columns."""

    def __init__(self, cfg: RunConfig, console: Console) -> None:
        self._words = "starting"
        super().__init__(
            TextColumn("{task.description}  step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self.add_task(cfg.name, total=cfg.num_steps)
        self.start()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self._words)

    def show(self, record: Record) -> None:
        if isinstance(record, EvaluationRecord | NoteRecord):
            self.console.print(Text(_line(record)), soft_wrap=True)
        elif isinstance(record, StepRecord):
            self._words = _step_words(record)
            self.update(self._task, completed=record.step)

    def close(self) -> None:
        self.stop()


def _step_words(record: StepRecord) -> str:
    losses = list(record.adapters.values())
    loss = f"loss {losses[0]:.4f}"
    if len(losses) > 1:
        finite = [loss for loss in losses if math.isfinite(loss)] or losses
        loss = f"{len(losses)} adapters  loss {min(finite):.4f}..{max(finite):.4f}"
    skipped = "  NOT FINITE, skipped" if record.skipped else ""
    if len(losses) > 1 and record.skipped:
        skipped += f": {', '.join(record.skipped_adapters)}"
    return (
        f"{loss}  rate {record.learning_rate:.3g}  {record.tokens_per_s:,.0f} tokens/s  "
        f"{record.reduced_bytes:,} B reduced{skipped}"
    )


def _line(record: EvaluationRecord | NoteRecord) -> str:
    if isinstance(record, NoteRecord):
        return f"note at step {record.step}: {record.text}"
    scores = "  ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
    return f"evaluation at step {record.step}  {record.adapter}  {record.split}  {scores}  ({record.seconds:.1f} s)"
