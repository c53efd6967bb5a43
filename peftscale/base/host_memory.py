"""Host memory: what is freed goes back to the system, blocks the size of a weight at once, the rest after a step.

glibc keeps freed blocks below a threshold for later, and raises the threshold (up to 32 MB) to the size of every larger
block that is freed. Weights that are gathered, dequantised and dropped in turn end up below it, in the heaps of the
main thread and of autograd's, between small tensors that stay: a rank of two that needed 0.5 GB held 1.3 to 2 GB after
one step (`tests/bench/bench_load.py`; DECISIONS.md). Smaller blocks leave a heap full of holes, which grew from step to
step. GPU memory is not concerned.
"""

import ctypes
import os

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD_BYTES = 4 * 2**20
"""Below it blocks are kept and used again at once. At 1 MiB the quickstart's step took 1.3 to 1.5 times as long, at
4 MiB as long as before: a fresh page costs a fault. A pass of few tokens through large weights pays it in any case."""


def return_freed() -> None:
    """Fix the threshold for this process. Does nothing where the C library has none, or the user has set it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)


def trim(device: torch.device) -> None:
    """Give back the whole pages that smaller freed blocks left in the heaps.

    It takes a hundredth of a step that leaves a gigabyte of them (DECISIONS.md). Does nothing where passes run on a
    GPU, the C library cannot, or the user has set when it should.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and malloc_trim is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        malloc_trim(0)
