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
from peftscale.config import RunConfig, TaskConfig
from peftscale.data import tasks
from peftscale.data.tasks import TaskData
from peftscale.task_config import Split
from peftscale.train import comm, evaluate, setup
from peftscale.train.evaluate import BASE_ALONE, Cell, Evaluation


@dataclass
class Opened:
    """A base with adapters that fit it."""

    base: Base
    adapters: dict[str, Folded]
    notes: list[str]
    """What the user should know: 'base not verified'."""


@dataclass(frozen=True)
class Evaluated:
    """Adapters, and the base without one, on tasks."""

    tasks: list[list[tuple[Cell, Evaluation]]]
    """Of each task the base alone, then the adapters in their order, named by their directories. Of a baseline, the
    base as that has made it, alone."""
    notes: list[str]
    """What the user should know."""


def evaluated(
    cfg: RunConfig, directories: Sequence[Path], task_configs: Sequence[TaskConfig], split: Split | None
) -> Evaluated:
    """Evaluate every adapter, and the base without a prompt, on a split of every task, all in the same passes.

    Args:
        cfg: of the base and the passes; the run's own tasks do not count.
        directories: of the adapters.
        task_configs: what to evaluate on.
        split: of each task; None for what each reports on.

    Raises:
        AdapterError: an adapter that cannot be used.
        DataError: a task has no such split, or its data cannot be used.
    """
    with session(cfg) as device:
        opened = open_(cfg, directories, device)
        of_tasks = on_tasks(
            opened.base,
            opened.adapters,
            [BASE_ALONE, *opened.adapters],
            task_configs,
            split,
            max_tokens=_room(opened),
            microbatch_tokens=cfg.train.microbatch_tokens,
        )
        return Evaluated(of_tasks, opened.notes)


def on_tasks(
    base: Base,
    adapters: Mapping[str, Folded],
    names: Sequence[str],
    task_configs: Sequence[TaskConfig],
    split: Split | None,
    *,
    max_tokens: int | None,
    microbatch_tokens: int,
) -> list[list[tuple[Cell, Evaluation]]]:
    """Each of `names` on each task, in the same passes. The result is a list for each task, in the order of names.

    Args:
        names: of adapters, and BASE_ALONE for the base as it is.
        max_tokens: that have to fit: behind the longest prompt.
    """
    cells: list[Cell] = []
    for of_task in task_configs:
        of_split = split or of_task.reported_split
        task = tasks.load(
            of_task,
            base.tokenizer,
            max_tokens=max_tokens,
            splits=(of_split,),
            is_encoder_decoder=base.is_encoder_decoder,
        )
        cells += [Cell(name, task, task.split(of_split), of_task.metrics) for name in names]
    results = evaluate.run_cells(base, adapters, cells, microbatch_tokens=microbatch_tokens)
    found = list(zip(cells, results, strict=True))
    return [found[start : start + len(names)] for start in range(0, len(found), len(names))]


def answers(cfg: RunConfig, directories: Sequence[Path], rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What each adapter says to each row: the likeliest label, or a greedy continuation.

    Args:
        rows: the columns that task.input names.

    Returns:
        {"adapters": {directory: [answer, ...]}, "notes"}
    """
    with session(cfg) as device:
        opened = open_(cfg, directories, device)
        base = opened.base
        task = tasks.from_rows(
            cfg.task,
            base.tokenizer,
            rows,
            max_tokens=_room(opened),
            is_encoder_decoder=base.is_encoder_decoder,
        )
        results = evaluate.run(
            opened.base,
            opened.adapters,
            task,
            task.test,
            metrics=(),
            microbatch_tokens=cfg.train.microbatch_tokens,
        )
        found = {name: readable(result.predictions, task) for name, result in results.items()}
        return {"adapters": found, "notes": opened.notes}


@contextmanager
def session(cfg: RunConfig) -> Iterator[torch.device]:
    """A process group for the length of the block, and this rank's device."""
    device = setup.pick_device(cfg)
    with comm.session(backend=comm.backend_for(device), timeout_s=cfg.cluster.collective_timeout_s):
        yield device


def open_(cfg: RunConfig, directories: Sequence[Path], device: torch.device) -> Opened:
    """The base of a run file on this rank with these adapters, or with none. Every rank calls it, in a `session`.

    Raises:
        AdapterError: an adapter that cannot be used.
    """
    comm.together(lambda: [files.verify(directory) for directory in directories])  # before a base is packed for them
    base = setup.load_base(cfg.base, setup.make_plan(cfg, device), device)
    chosen = setup.choose_packing(cfg, base)
    adapters: dict[str, Folded] = {}
    notes = [chosen] if chosen else []
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
        notes += [f"{directory}: {note}" for note in info.notes]
    return Opened(base, adapters, notes)


def _room(opened: Opened) -> int | None:
    """What has to fit behind every adapter."""
    return opened.base.room(max((adapter.length for adapter in opened.adapters.values()), default=0))


def readable(predictions: Sequence[int] | Sequence[str], task: TaskData) -> list[str]:
    """Texts as they are, labels by their names."""
    return [task.labels[p] if isinstance(p, int) else p for p in predictions]
