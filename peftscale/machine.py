"""The machine as this process may use it: CPUs, memory, shared memory, names of accelerators.

Asks the kernel, never torch, so that it can be asked anywhere. A container's limits count (cgroup v1 and v2): what the
whole machine has is of no use to a process that is killed at a tenth of it. What fits is `plan`.
"""

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def cache_dir() -> Path:
    """Where this package keeps what can be made again: $PEFTSCALE_CACHE, or a place in the user's cache directory."""
    root = os.environ.get("PEFTSCALE_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "peftscale"


def num_cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may keep busy: its affinity, cut to the quota of its cgroup; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [float(allowed)]
    for folder in _groups("cpu", root):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                quotas.append(float(quota) / float(period))
        except (OSError, ValueError):
            continue
    return max(1, math.floor(min(quotas)))


def memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process may fill: the machine's, cut to the limit of its cgroup."""
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit, _ in _limits(root))])


def free_bytes(root: Path = _ROOT) -> int:
    """Memory that can be filled now without swapping and without being killed. File caches count as free."""
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *(limit - used for limit, used in _limits(root))]))


def shared_memory_bytes() -> int | None:
    """Size of /dev/shm, where Ray keeps its objects; None on a system without it."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return None
    total: int = psutil.disk_usage(str(shm)).total
    return total


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def accelerators() -> tuple[str, ...]:
    """Names of NVIDIA devices, as their driver's files give them; empty where there are none."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    return tuple(names)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each cgroup around this process that has a limit."""
    for folder in _groups("memory", root):
        is_v2 = (folder / "memory.max").is_file()
        limit_file, used_file = (
            ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit == "max" or int(limit) >= 1 << 60:  # v1 writes "no limit" as almost 2**63
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
            yield int(limit), int((folder / used_file).read_text()) - cached
        except (OSError, ValueError):
            continue


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of this process's cgroup and of all around it; in a container only the outermost may be there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if names else "")
        inner = path.strip("/")
        while True:
            if (mount / inner).is_dir():
                yield mount / inner
            if not inner:
                break
            inner = inner.rpartition("/")[0]
