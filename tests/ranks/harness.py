"""Real ranks for tests: gloo processes of the training loop's own session, results handed back as files."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from peftscale.train import comm

TIMEOUT_S = 60


def run_ranks(
    work: Callable[..., Any],
    world: int,
    tmp: Path,
    *args: Any,
    start_method: str = "forkserver",
    timeout_s: float = TIMEOUT_S,
    node_ranks: int | None = None,
) -> list[Any]:
    """Call `work(*args)` on every rank of a process group; return what each rank returned, in rank order.

    `work` is a function of a test module; its result must be picklable. A rank that raises fails the test with its
    traceback; a rank that hangs is ended by the collectives' time-out, `timeout_s`. A benchmark of memory asks for
    `start_method` 'spawn': a forked process starts with its parent's pages. With `node_ranks` so many ranks are taken
    for those of a node.
    """
    tmp.mkdir(parents=True, exist_ok=True)
    # A fork server imports torch, transformers and DeepSpeed once: a rank starts in a tenth of a second, not in five.
    multiprocessing.set_forkserver_preload(["peftscale.train.worker", "peftscale.base.shard"])
    context = mp.start_processes(
        _rank, args=(world, tmp, timeout_s, node_ranks, work, args), nprocs=world, join=False, start_method=start_method
    )
    failed = None
    try:
        while not context.join(timeout=timeout_s * 2):
            pass
    except Exception as error:
        failed = error
    for rank in range(world):
        if (tmp / f"error-{rank}").exists():
            raise AssertionError(f"rank {rank} of {world}:\n{(tmp / f'error-{rank}').read_text()}")
    if failed is not None:
        raise failed
    return [torch.load(tmp / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(
    rank: int,
    world: int,
    tmp: Path,
    timeout_s: float,
    node_ranks: int | None,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    place: dict[str, Any] = {"rank": rank, "world": world, "store": tmp / "store", "node_ranks": node_ranks}
    try:
        with comm.session(backend="gloo", timeout_s=timeout_s, **place):
            torch.save(work(*args), tmp / f"result-{rank}.pt")
            comm.leave(0)
    except Exception:
        (tmp / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
