"""Doctor: what on this machine would make a run fail, each with what to do about it.

Looks and tries small things; changes nothing, starts no Ray and holds no device. Whether one run file fits is `plan`.
"""

import contextlib
import importlib
import json
import os
import platform
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rich.table import Table
from rich.text import Text

from peftscale import auth, machine
from peftscale.config import Frozen
from peftscale.records import version_of

WORKS_TOGETHER = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "ray": "2.60.0",
}
"""The versions that the tests ran with. A test holds them equal to constraints.txt."""

_MIB = 1 << 20
_RAY_STORE_BYTES = 75 * _MIB  # the least that Ray's object store takes
# Measured: Ray idle 0.4 GiB; 0.5 GiB for the driver and for each worker once all is imported; 1 GiB for the base.
_TWO_WORKERS_BYTES = 3 << 30


class Check(Frozen):
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warn", "fail"]
    """warn: runs, but not as one would expect; fail: a run that needs it fails."""
    found: str
    advice: str = ""
    """What would go wrong and what to do; empty when ok."""


Look = Callable[[], Iterable[Check]]


def run(looks: Sequence[Look] | None = None) -> list[Check]:
    """Every check, in the order in which one would mend things. Takes some seconds, for it imports what a run imports.

    What libraries print while they are imported goes to standard error.

    Args:
        looks: only these, instead of LOOKS.
    """
    checks: list[Check] = []
    with contextlib.redirect_stdout(sys.stderr):
        for look in LOOKS if looks is None else looks:
            try:
                checks.extend(look())
            except Exception as error:  # a check that stumbles is itself a finding
                name = look.__name__.strip("_").replace("_", " ")
                checks.append(
                    Check(name=name, status="fail", found=_first_line(error), advice="this could not be checked")
                )
    return checks


def render(checks: Sequence[Check]) -> Table:
    """A table for a terminal: the advice stands under what was found."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(title="peftscale doctor", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("found")
    for check in checks:
        found = check.found + (f"\n-> {check.advice}" if check.advice else "")
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", Text(found))
    return table


def to_json(checks: Sequence[Check]) -> str:
    """One JSON object: the worst status of all, and the checks."""
    worst = max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")
    return json.dumps({"status": worst, "checks": [check.model_dump(mode="json") for check in checks]})


def _python() -> Iterable[Check]:
    yield Check(name="python", status="ok", found=f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterable[Check]:
    for package, tested in WORKS_TOGETHER.items():
        name, version = f"{package} version", version_of(package)
        install = f"pip install '{package}=={tested}'"
        if version is None:
            yield Check(name=name, status="fail", found="not installed", advice=install)
        elif version.partition("+")[0] == tested:
            yield Check(name=name, status="ok", found=version)
        else:
            # Before 1.0 the second number is the one that breaks things.
            length = 2 if tested.startswith("0.") else 1
            is_near = version.split(".")[:length] == tested.split(".")[:length]
            status: Literal["warn", "fail"] = "warn" if is_near else "fail"
            told = "was not tested" if is_near else "does not work"
            yield Check(name=name, status=status, found=version, advice=f"{told} with the others here; {install} does")


def _torch() -> Iterable[Check]:
    torch = _import("torch")
    named = machine.accelerators()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found = f"cuda:{index} {properties.name}, {_size(properties.total_memory)}, CUDA {torch.version.cuda}"
            if properties.major < 8:
                advice = "no bfloat16 arithmetic on this device: set base.compute_dtype=float32"
                yield Check(name="devices", status="warn", found=found, advice=advice)
            else:
                yield Check(name="devices", status="ok", found=found)
    elif named:
        reason = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        advice = f"torch {torch.__version__} is {reason} and cannot use them; install the build for this driver"
        yield Check(name="devices", status="fail", found=", ".join(named), advice=advice)
    else:
        yield Check(name="devices", status="ok", found=f"CPU only, {torch.get_num_threads()} threads a process")


def _bitsandbytes() -> Iterable[Check]:
    torch = _import("torch")
    functional = _import("bitsandbytes.functional")
    extension = _import("bitsandbytes.cextension")
    # Without its library bitsandbytes keeps the error, goes on, and fails or falls back at the first call.
    is_missing = isinstance(extension.lib, extension.ErrorHandlerMockBNBNativeLibrary)
    fault = _first_line(extension.lib.error_msg) if is_missing else None
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        name = f"bitsandbytes on {device}"
        try:
            weight = torch.linspace(-1, 1, 128, device=device)
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
        except Exception as caught:
            found = f"quantize_4bit fails: {fault or _first_line(caught)}"
            advice = "base.quantization=nf4 fails; reinstall bitsandbytes for this platform, or use int8 or none"
            yield Check(name=name, status="fail", found=found, advice=advice)
            continue
        if fault:
            # Measured on a 2048 x 2048 weight: dequantisation 0.8 ms with it, 2.9 s without; absmax codes differ.
            advice = (
                "base.quantization=nf4 is a thousand times slower and its pack gets another digest; "
                f"pip install --force-reinstall --no-deps 'bitsandbytes=={WORKS_TOGETHER['bitsandbytes']}'"
            )
            yield Check(name=name, status="fail", found=f"native library missing ({fault})", advice=advice)
        elif error > 0.2:  # the widest gap of NF4 is 0.30 of the largest value, so half of it is 0.15
            advice = "base.quantization=nf4 would be silently wrong; reinstall bitsandbytes for this platform"
            yield Check(name=name, status="fail", found=f"quantize_4bit is off by {error:.2f} of 1", advice=advice)
        else:
            yield Check(name=name, status="ok", found="native library loaded, quantize_4bit runs")


def _deepspeed() -> Iterable[Check]:
    asked = os.environ.get("DS_ACCELERATOR")
    has_cuda = _import("torch").cuda.is_available()
    name = "deepspeed accelerator"
    if asked == "cuda" and not has_cuda:
        advice = "unset it: torch finds no CUDA device here, and sharding would fail"
        yield Check(name=name, status="fail", found="DS_ACCELERATOR=cuda", advice=advice)
        return
    _import("deepspeed")
    chosen = _import("deepspeed.accelerator").get_accelerator().device_name()
    found = f"{chosen} (DS_ACCELERATOR {'not set' if asked is None else asked})"
    if asked == "cpu" and has_cuda:
        yield Check(name=name, status="warn", found=found, advice="unset it, or the CUDA devices stay unused")
    else:
        yield Check(name=name, status="ok", found=found)


def _ray() -> Iterable[Check]:
    version = _import("ray").__version__
    _import("ray.train.torch")
    yield Check(name="ray train", status="ok", found=f"{version} can be imported")


def _ray_address() -> Iterable[Check]:
    address = os.environ.get("RAY_ADDRESS")
    name = "RAY_ADDRESS"
    if not address or address == "local":
        yield Check(name=name, status="ok", found="not set: a run starts a Ray of its own" if not address else "local")
        return
    unset = "unset RAY_ADDRESS to run on this machine"
    if address == "auto":
        advice = f"a run joins the Ray that runs here and fails where there is none; {unset}"
        yield Check(name=name, status="warn", found=address, advice=advice)
        return
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = url.port or (10001 if url.scheme == "ray" else 8265 if url.scheme else 6379)
        with socket.create_connection((url.hostname or "", port), timeout=2):
            pass
    except (OSError, ValueError) as error:
        advice = f"every run with cluster.workers >= 1 would wait for it and fail; {unset}"
        found = f"{address} does not answer ({_first_line(error)})"
        yield Check(name=name, status="fail", found=found, advice=advice)
    else:
        yield Check(name=name, status="warn", found=f"{address} answers", advice=f"runs join that cluster; {unset}")


def _ray_token() -> Iterable[Check]:
    name, mode = "ray token", os.environ.get("RAY_AUTH_MODE")
    file = auth.file()
    if mode is not None and mode.lower() not in ("token", "disabled"):
        advice = "set it to token or disabled; Ray does not start"
        yield Check(name=name, status="fail", found=f"RAY_AUTH_MODE={mode}", advice=advice)
    elif mode is not None and mode.lower() == "disabled":
        advice = "whoever reaches Ray's ports can run code as you; unset it where others share the network"
        yield Check(name=name, status="warn", found="RAY_AUTH_MODE=disabled", advice=advice)
    elif os.environ.get("RAY_AUTH_TOKEN"):
        yield Check(name=name, status="ok", found="RAY_AUTH_TOKEN is set")
    elif file.is_file():
        bits = stat.S_IMODE(file.stat().st_mode)
        if bits & 0o077:
            advice = f"other users of this machine can read it; chmod 600 {file}"
            yield Check(name=name, status="warn", found=f"{file} has mode {bits:04o}", advice=advice)
        else:
            yield Check(name=name, status="ok", found=f"{file} has mode {bits:04o}")
    elif _can_write(file.parent):
        yield Check(name=name, status="ok", found=f"none yet; {file} is made when Ray first starts")
    else:
        advice = "Ray fails at its start; set HOME or RAY_AUTH_TOKEN_PATH to a place that can be written"
        yield Check(name=name, status="fail", found=f"{file} is not there and cannot be made", advice=advice)


def _cpus() -> Iterable[Check]:
    name, count = "CPUs", machine.num_cpus()
    found = f"{count} for this process (the machine has {os.cpu_count()})"
    if count < 2:
        advice = (
            "Ray waits for ever for two workers of one CPU each; set cluster.cpus_per_worker=0.5 or cluster.workers=1"
        )
        yield Check(name=name, status="warn", found=found, advice=advice)
    else:
        yield Check(name=name, status="ok", found=found)


def _threads() -> Iterable[Check]:
    name, threads = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        yield Check(name=name, status="ok", found="not set: Ray gives a worker as many as its CPUs")
    elif not threads.isdigit() or int(threads) < 1:
        yield Check(name=name, status="fail", found=repr(threads), advice="unset it, or set it to a whole number >= 1")
    elif int(threads) > machine.num_cpus():
        advice = f"more threads than the {machine.num_cpus()} CPUs slow a run down; unset it"
        yield Check(name=name, status="warn", found=threads, advice=advice)
    else:
        yield Check(name=name, status="ok", found=threads)


def _memory() -> Iterable[Check]:
    name, free = "free memory", machine.free_bytes()
    found = f"{_size(free)} of {_size(machine.memory_bytes())}"
    if free < _TWO_WORKERS_BYTES:
        advice = f"two workers on a small base need about {_size(_TWO_WORKERS_BYTES)}; they may be killed"
        yield Check(name=name, status="warn", found=found, advice=advice)
    else:
        yield Check(name=name, status="ok", found=found)


def _shared_memory() -> Iterable[Check]:
    name, size = "/dev/shm", machine.shared_memory_bytes()
    if size is None:
        yield Check(name=name, status="ok", found="not on this system: Ray keeps its objects in files")
    elif size < _RAY_STORE_BYTES:
        advice = (
            f"Ray needs {_size(_RAY_STORE_BYTES)} and falls back to files on disk; "
            f"start the container with --shm-size=1g"
        )
        yield Check(name=name, status="warn", found=_size(size), advice=advice)
    else:
        yield Check(name=name, status="ok", found=_size(size))


def _cache() -> Iterable[Check]:
    directory = _import("peftscale.base.pack").cache_dir()
    if _can_write(directory):
        yield Check(name="cache", status="ok", found=f"{directory} can be written")
    else:
        advice = "packing a base fails; set PEFTSCALE_CACHE to a directory that can be written"
        yield Check(name="cache", status="fail", found=f"{directory} cannot be written", advice=advice)


LOOKS: tuple[Look, ...] = (
    _python,
    _packages,
    _torch,
    _bitsandbytes,
    _deepspeed,
    _ray,
    _ray_address,
    _ray_token,
    _cpus,
    _threads,
    _memory,
    _shared_memory,
    _cache,
)


def _import(name: str) -> Any:
    """A module that a run imports. Here and not at the top: this is what may fail, and what takes the seconds."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"{name} cannot be imported: {type(error).__name__}: {_first_line(error)}") from error


def _can_write(directory: Path) -> bool:
    """Whether a file can be made there; where the directory is not there yet, in the nearest one that is."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / _MIB:.0f} MiB"


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
