"""Status: how runs stand, from the files that they write. Nobody is asked: a run elsewhere needs its storage alone."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from peftscale import configio, logs, records
from peftscale.config import RunConfig
from peftscale.errors import CheckpointError
from peftscale.records import EvaluationRecord, Row, StepRecord

log = logging.getLogger(__name__)

_STORE_S = 60.0
"""Files that are written one after the other reach an object store in any order within it."""
_SILENT_S = 60.0
"""A run that has written nothing for so long, and for five of its own steps, may have died."""


class RunStatus(Row):
    """How one run stands."""

    name: str
    dir: str
    state: str
    """ended, failed (it was given up), restarting (a rank failed, and its group is started again), going on, or silent:
    it has not ended and writes nothing."""
    step: int
    num_steps: int
    training: tuple[str, ...]
    """Adapters that took part in the last step."""
    losses: dict[str, float]
    """Of the last step, by adapter."""
    scores: dict[str, dict[str, float]]
    """Of each adapter's last evaluation on the validation split."""
    tokens_per_s: float | None
    """Of the last step."""
    seconds_left: float | None
    """At the pace of the last steps, evaluations left out; None where it does not go on."""
    silent_seconds: float
    """Since it wrote something."""
    checkpoint: str | None
    """The newest one."""
    error: str | None
    """What ended the ranks that began the last time (`logs.cause`), or why the run was given up."""


def find(where: Path, *, called: str | None = None) -> list[Path]:
    """The directories of runs: of a run file, a run's directory, or a storage of runs, newest first.

    Args:
        where: to look.
        called: what the user calls it, where that is something else.

    Raises:
        CheckpointError: there is none.
    """
    if where.is_file():
        directory = configio.load(where).run_dir
        found = [directory] if (directory / "run.json").exists() else []
    elif (where / "run.json").exists():
        found = [where]
    else:
        found = sorted((path.parent for path in where.glob("*/run.json")), key=_last_sign, reverse=True)
    if not found:
        raise CheckpointError(
            f"{called or where}: no run there. Name a run file, a run's directory, or a storage of runs."
        )
    return found


def one(where: Path, *, called: str | None = None) -> Path:
    """The directory of one run, of a run file or as it is. Arguments as of `find`.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = find(where, called=called)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(
            f"{called or where}: {len(found)} runs are there ({names}{', ...' if len(found) > 4 else ''}); name one."
        )
    return found[0]


def ending(directory: Path, *, refresh: Callable[[], None] = lambda: None) -> Callable[[], bool]:
    """Whether the run has ended or failed, to be asked again and again. `refresh` brings its files up to date."""

    def has_ended() -> bool:
        refresh()
        return of(directory).state in ("ended", "failed")

    return has_ended


def of(directory: Path) -> RunStatus:
    """How the run in a directory stands.

    Raises:
        ConfigError: its run.json is not ours.
    """
    cfg = configio.from_dict(json.loads((directory / "run.json").read_text()))
    metrics = directory / "metrics.jsonl"
    rows = list(records.read(metrics, passed_over=log.warning)) if metrics.exists() else []
    steps = [row for row in rows if isinstance(row, StepRecord)]
    last = steps[-1] if steps else None
    pace = sorted(row.seconds for row in steps[-20:])[len(steps[-20:]) // 2] if steps else 0.0
    silent = time.time() - _last_sign(directory)
    has_ended = records.read_summary(directory / "summary.json") is not None
    is_going = not has_ended and silent < max(_SILENT_S, 5 * pace)
    failure = None if has_ended else logs.cause(directory / "logs")
    given_up = None if has_ended else _given_up(directory, cfg)
    if has_ended:
        state = "ended"
    elif given_up or (failure and cfg.cluster.max_workers == 0):  # nobody starts ranks of torchrun again
        state = "failed"
    elif is_going:
        state = "restarting" if failure else "going on"
    else:
        state = "silent"
    return RunStatus(
        name=cfg.name,
        dir=str(directory),
        state=state,
        step=last.step if last else 0,
        num_steps=cfg.num_steps,
        training=() if has_ended or last is None else tuple(last.adapters),
        losses={} if last is None else last.adapters,
        scores={
            row.adapter: row.metrics for row in rows if isinstance(row, EvaluationRecord) and row.split == "validation"
        },
        tokens_per_s=last.tokens_per_s if last else None,
        seconds_left=pace * (cfg.num_steps - last.step) if last and is_going else None,
        silent_seconds=silent,
        checkpoint=_newest_checkpoint(directory),
        error=failure or given_up,
    )


def _given_up(directory: Path, cfg: RunConfig) -> str | None:
    """Why, if nothing was written since: a store keeps the word of a run that was gone on with."""
    path = directory / cfg.failure_path.name
    if not path.exists() or path.stat().st_mtime < _last_sign(directory) - _STORE_S:
        return None
    return path.read_text()


def _newest_checkpoint(directory: Path) -> str | None:
    steps = [path.name.removeprefix("step-") for path in directory.glob("checkpoints/step-*")]
    newest = max((int(step) for step in steps if step.isdigit()), default=None)
    return None if newest is None else f"step-{newest}"


def _last_sign(directory: Path) -> float:
    """When a run wrote something, in seconds since the epoch."""
    files = [directory / "run.json", directory / "metrics.jsonl", *directory.glob("logs/*.jsonl")]
    return max(path.stat().st_mtime for path in files if path.exists())
