"""Host memory: blocks the size of a weight go back to the system when they are freed.

glibc keeps freed blocks below a threshold for later, and raises the threshold (up to 32 MB) to the size of every larger
block that is freed. Weights that are gathered, dequantised and dropped in turn end up below it, in the heaps of the
main thread and of autograd's, between small tensors that stay: a rank of two that needed 0.5 GB held 1.3 to 2 GB after
one step (`tests/bench/bench_load.py`; DECISIONS.md). GPU memory is not concerned.
"""

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD_BYTES = 4 * 2**20
"""Below it blocks are kept and used again at once. At 1 MiB the quickstart's step took 1.3 to 1.5 times as long, at
4 MiB as long as before: a fresh page costs a fault. A pass of few tokens through large weights pays it in any case."""


def return_freed() -> None:
    """Fix the threshold for this process. Does nothing where the C library has none, or the user has set it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
