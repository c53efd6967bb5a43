"""Trained adapters at work: scored on a split, or asked about single rows. The base is loaded once for all of them.

Training is `train.worker`; serving requests for days is another thing altogether.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftscale.adapters import Folded, Prefix, files, refuse_prefix_on
from peftscale.base import prefixed
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.rows import Split
from peftscale.data.tasks import TaskData
from peftscale.errors import AdapterError
from peftscale.train import comm, evaluate, setup


@dataclass
class Opened:
    """A base with adapters that fit it."""

    base: Base
    adapters: dict[str, Folded]
    notes: list[str]
    """What the user should know: 'base not verified'."""


def scores(cfg: RunConfig, directories: Sequence[Path], split: Split) -> dict[str, Any]:
    """Evaluate adapters, and the base without a prompt, on a split of the run file's task.

    Returns:
        {"split", "examples", "base": metrics, "adapters": {directory: {"metrics", "predictions"}},
        "notes"}; `predictions` are labels or texts in the split's order.
    """
    with _session(cfg) as device:
        opened = _open(cfg, directories, device)
        task = _task(cfg, opened, splits=(split,))
        examples = task.split(split)
        results = evaluate.run(
            opened.base,
            opened.adapters,
            task,
            examples,
            metrics=cfg.task.metrics,
            microbatch_tokens=cfg.train.microbatch_tokens,
            with_base_alone=True,
        )
        alone = results.pop(evaluate.BASE_ALONE)
        return {
            "split": split,
            "examples": len(examples),
            "base": alone.metrics,
            "adapters": {
                name: {"metrics": r.metrics, "predictions": _readable(r.predictions, task)}
                for name, r in results.items()
            },
            "notes": opened.notes,
        }


def answers(cfg: RunConfig, directories: Sequence[Path], rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What each adapter says to each row: the likeliest label, or a greedy continuation.

    Args:
        rows: the columns that task.input names.

    Returns:
        {"adapters": {directory: [answer, ...]}, "notes"}
    """
    with _session(cfg) as device:
        opened = _open(cfg, directories, device)
        task = tasks.from_rows(cfg.task, opened.base.tokenizer, rows, max_tokens=_room(opened))
        results = evaluate.run(
            opened.base,
            opened.adapters,
            task,
            task.test,
            metrics=(),
            microbatch_tokens=cfg.train.microbatch_tokens,
        )
        found = {name: _readable(result.predictions, task) for name, result in results.items()}
        return {"adapters": found, "notes": opened.notes}


@contextmanager
def _session(cfg: RunConfig) -> Iterator[torch.device]:
    """A process group for the length of the block, and this rank's device."""
    device = setup.pick_device(cfg)
    with comm.session(backend=comm.backend_for(device), timeout_s=setup.COLLECTIVE_TIMEOUT_S):
        yield device


def _open(cfg: RunConfig, directories: Sequence[Path], device: torch.device) -> Opened:
    if not directories:
        raise AdapterError("no adapter given: name at least one directory with --adapter.")
    comm.together(lambda: [files.verify(directory) for directory in directories])  # before a base is packed for them
    base = setup.load_base(cfg, setup.make_plan(cfg, device), device)
    why_padded = setup.choose_packing(cfg, base)
    adapters: dict[str, Folded] = {}
    notes = [f"passes are padded: {why_padded}"] if why_padded else []
    for directory in directories:
        adapter, info = files.load(
            directory,
            base_digest=base.digest,
            hidden_size=base.hidden_size,
            prefix_shape=prefixed.shape_of(base.model.config),
        )
        if isinstance(adapter, Prefix):
            refuse_prefix_on(base, f"adapter {directory}")
        adapters[str(directory)] = adapter.to(device)
        if not info.base_is_verified:
            notes.append(f"{directory}: base not verified (no peftscale.json beside the adapter)")
    return Opened(base, adapters, notes)


def _room(opened: Opened) -> int | None:
    positions = opened.base.max_positions
    return None if positions is None else positions - max(a.length for a in opened.adapters.values())


def _task(cfg: RunConfig, opened: Opened, *, splits: tuple[Split, ...]) -> TaskData:
    return tasks.load(cfg.task, opened.base.tokenizer, max_tokens=_room(opened), splits=splits)


def _readable(predictions: Sequence[int] | Sequence[str], task: TaskData) -> list[str]:
    return [task.labels[p] if isinstance(p, int) else p for p in predictions]
