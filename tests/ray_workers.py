"""The worker processes of the runs that this process has started on Ray, for tests that hurt them."""

import time

import psutil


def found() -> list[psutil.Process]:
    """Those that there are now. Another Ray may run on this machine: only children of this process are looked at."""
    return [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in _name(process)]


def fresh(number: int, old: list[psutil.Process], *, timeout_s: float = 120) -> list[psutil.Process]:
    """So many new ones, once they are there."""
    deadline = time.monotonic() + timeout_s
    while len(new := [process for process in found() if process not in old]) < number:
        assert time.monotonic() < deadline, f"{len(new)} of {number} new workers"
        time.sleep(0.05)
    return new


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
