"""Peak memory of this process while a block runs, over what it held before.

On CUDA the allocator's own peak. On CPU the private memory (RssAnon: not mapped files, not shared pages) is sampled
by a thread, because the kernel keeps no peak of it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_INTERVAL_S = 0.005


class PeakMemory:
    """The highest value so far, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self.restart()
        if device.type != "cuda":
            threading.Thread(target=self._sample, daemon=True, name="peak-memory").start()

    def restart(self) -> None:
        """Measure from now on, over what the process holds now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._highest = _private_bytes()
        self._before = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else self._highest

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._highest = max(self._highest, _private_bytes())

    def peak_bytes(self) -> int:
        """Over what the process held when the measurement began."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(self._highest, _private_bytes()) - self._before

    def held_bytes(self) -> int:
        """At this moment, over what the process held when the measurement began."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        return _private_bytes() - self._before

    def close(self) -> None:
        """End the sampling."""
        self._stop.set()


@contextmanager
def measured(device: torch.device) -> Iterator[PeakMemory]:
    """Measure from here to the end of the block."""
    peak = PeakMemory(device)
    try:
        yield peak
    finally:
        peak.close()


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
