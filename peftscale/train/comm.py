"""Collectives of the training loop, and a byte counter over every collective of the process.

The one gradient all-reduce lives here. The counter taps torch.distributed itself, before DeepSpeed caches its
functions, so that nothing crosses ranks uncounted: weight gathers, our reduction, our control messages, and
DeepSpeed's own trace checks are told apart, and what stays inside a node from what does not (`nodes`). Parameter
sharding is `base.shard`.
"""

import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from peftscale import errors
from peftscale.train import nodes

Kind = Literal["reduced", "gathered", "control", "checks"]
T = TypeVar("T")

_TAPPED = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "gather",
    "scatter",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all",
    "all_to_all_single",
    "send",
    "isend",
    "recv",
    "irecv",
)
_GATHERS = ("all_gather_into_tensor", "_all_gather_base")


@dataclass(frozen=True)
class Call:
    """One collective as this rank saw it."""

    op: str
    kind: Kind
    num_bytes: int
    between_bytes: int
    """Of them, those of other nodes: slices of a gather that lie there; all of another collective of several nodes."""
    tensor: Tensor
    """The larger side: the output of a gather, the tensor of a reduction."""


@dataclass
class Traffic:
    """Bytes by kind since the process began; subtract two snapshots."""

    reduced: int = 0
    gathered: int = 0
    control: int = 0
    checks: int = 0
    """DeepSpeed's comparison of module traces between ranks, after the kind of pass changed."""
    gathered_between: int = 0
    """Of `gathered`: slices that lie on other nodes."""

    def since(self, earlier: "Traffic") -> "Traffic":
        """The bytes between two snapshots."""
        return Traffic(**{key: now - getattr(earlier, key) for key, now in vars(self).items()})


@dataclass
class _Tap:
    traffic: Traffic = field(default_factory=Traffic)
    label: Kind | None = None
    watchers: list[Callable[[Call], None]] = field(default_factory=list)
    is_installed: bool = False
    timeout: timedelta | None = None
    """Of groups that are made without one: DeepSpeed gathers in a group of its own."""


_tap = _Tap()  # one a process, as torch.distributed itself


def tap() -> None:
    """Start counting. Must run before DeepSpeed is initialised; a second call does nothing."""
    if _tap.is_installed:
        return
    _tap.is_installed = True
    for name in _TAPPED:
        original = getattr(dist, name, None)
        if original is not None:
            counted = _counted(name, original)
            setattr(dist, name, counted)
            setattr(dist.distributed_c10d, name, counted)  # its own helpers look names up there
    dist.new_group = dist.distributed_c10d.new_group = _as_patient(dist.new_group)


def _counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        largest = _largest((*args, *kwargs.values()))
        if largest is not None:
            kind: Kind = _tap.label or ("gathered" if name in _GATHERS else "checks")
            between = _between_bytes(name, largest.nbytes, (*args, *kwargs.values()))
            setattr(_tap.traffic, kind, getattr(_tap.traffic, kind) + largest.nbytes)
            _tap.traffic.gathered_between += between if kind == "gathered" else 0
            for watcher in _tap.watchers:
                watcher(Call(name, kind, largest.nbytes, between, largest))
        return original(*args, **kwargs)

    return call


def _as_patient(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def new_group(ranks: Any = None, timeout: timedelta | None = None, *args: Any, **kwargs: Any) -> Any:
        return original(ranks, timeout or _tap.timeout, *args, **kwargs)

    return new_group


def _largest(values: Sequence[Any]) -> Tensor | None:
    tensors = [v for v in values if isinstance(v, Tensor)]
    for value in values:
        if isinstance(value, list | tuple):
            tensors.extend(v for v in value if isinstance(v, Tensor))
    return max(tensors, key=lambda tensor: tensor.nbytes, default=None)


def _between_bytes(name: str, num_bytes: int, values: Sequence[Any]) -> int:
    of_call = next((value for value in values if isinstance(value, dist.ProcessGroup)), None)
    ranks = dist.get_process_group_ranks(of_call)
    elsewhere = nodes.num_elsewhere(ranks)
    return num_bytes * elsewhere // len(ranks) if name in _GATHERS else num_bytes * bool(elsewhere)


@contextmanager
def watched(watcher: Callable[[Call], None]) -> Iterator[None]:
    """Call `watcher` before every collective inside the block."""
    _tap.watchers.append(watcher)
    try:
        yield
    finally:
        _tap.watchers.remove(watcher)


def traffic() -> Traffic:
    """A snapshot of the counter."""
    return Traffic(**vars(_tap.traffic))


@contextmanager
def labelled(kind: Kind) -> Iterator[None]:
    """Count every collective of the block as of this kind, whoever makes it."""
    before, _tap.label = _tap.label, kind
    try:
        yield
    finally:
        _tap.label = before


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all ranks, in place, in one collective of exactly their bytes.

    Args:
        tensors: float32, the same shapes in the same order on every rank.
    """
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with labelled("reduced"):
        dist.all_reduce(flat)
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def sum_(values: Tensor) -> Tensor:
    """Sum a small control tensor over all ranks, in place. Returns it."""
    if world_size() > 1:
        with labelled("control"):
            dist.all_reduce(values)
    return values


def is_same(content: bytes) -> bool:
    """Whether every rank has this content, in 16 bytes. Every rank gets the same answer.

    Compares 24 bits of a checksum: it is there to find mistakes, of which one in 16 million gets through.
    """
    if world_size() == 1:
        return True
    mark = zlib.crc32(content) >> 8  # so that the squares of all ranks add up exactly
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    total, squares = sum_(torch.tensor([mark, mark * mark], device=device)).tolist()
    # The sum of (other - mark)^2 over all ranks: 0 on every rank, or on none.
    return bool(squares - 2 * mark * total + world_size() * mark * mark == 0)


def gather_objects(value: Any) -> list[Any]:
    """One picklable value of each rank, in rank order, on every rank. Not for training steps.

    Ranks of one run trust each other: torch pickles the values.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with labelled("control"):
        dist.all_gather_object(values, value)
    return values


def backend_for(device: torch.device) -> str:
    """nccl between GPUs, gloo between CPUs."""
    return "nccl" if device.type == "cuda" else "gloo"


def together(work: Callable[[], T]) -> T:
    """Do local work on every rank; what it raises on one of them, every rank raises.

    A rank that left alone would let the others wait for it until the collectives' time-out, and its error would
    never be seen. The work itself must not talk to other ranks.
    """
    value: T | None = None
    failure: Exception | None = None
    try:
        value = work()
    except Exception as error:
        failure = error
    # Name and text, not the exception: not every one can be pickled.
    told = gather_objects(None if failure is None else (type(failure).__name__, str(failure)))
    if failure is not None:
        raise failure
    for rank, elsewhere in enumerate(told):
        if elsewhere is not None:
            name, text = elsewhere
            raise getattr(errors, name, errors.TrainingError)(f"rank {rank}: {text}")
    return cast(T, value)


def from_rank_0(value: T) -> T:
    """Rank 0's value on every rank, whatever its size. Not for training steps."""
    if world_size() == 1:
        return value
    told = [value if rank() == 0 else None]
    with labelled("control"):
        dist.broadcast_object_list(told, src=0)
    return cast(T, told[0])


def expected_world_size() -> int:
    """Ranks of the run, also before there is a process group: torchrun and Ray say so in the environment."""
    return world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def session(
    *,
    backend: str,
    timeout_s: float,
    rank: int | None = None,
    world: int | None = None,
    store: Path | None = None,
    node_ranks: int | None = None,
) -> Iterator[None]:
    """A process group for the length of the block: the one that Ray made, a file's, or that of torchrun.

    Args:
        backend: 'gloo' or 'nccl'.
        timeout_s: after which a collective that waits for a rank that hangs fails. Of groups that are made in the block
            too; where Ray made this one, it was told by itself.
        rank, world, store: a rendezvous file; left out, the environment variables of torchrun are read.
        node_ranks: of a rendezvous file, so many ranks are taken for those of a node. None: all.
    """
    tap()
    _tap.timeout = timeout = timedelta(seconds=timeout_s)
    if dist.is_initialized():  # Ray made it and takes it down
        yield
        return
    if store is not None:
        assert rank is not None and world is not None
        each = node_ranks or world
        told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % each, "LOCAL_WORLD_SIZE": each}
        os.environ.update({name: str(value) for name, value in told.items()})  # DeepSpeed and `nodes` read them
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> None:
    """End a rank that we started ourselves, at once: an ordinary interpreter exit aborted in 5 of 24 runs after
    correct work, when gloo's threads outlived torch."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(code)
