"""Object store of runs: `cluster.storage` as a URL, and the directories here that stand for it.

Everything else reads and writes directories. A run's is its working copy, `RunConfig.run_dir`; this module alone knows
the store, takes a run from it, and brings what is new there. A store cannot rename, so a directory's manifest is
written last and deleted first: a checkpoint without one does not exist. What commands read of a store is fetched
elsewhere, so that nothing comes between a run and its working copy.

The store is asked through pyarrow's file systems (s3, gs, abfs, hdfs), which come with datasets and are Ray's own.
Endpoint, region and credentials are those of the environment, as each of these has them; they are never written down.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from peftscale import configio, machine
from peftscale.config import RunConfig, is_url
from peftscale.errors import CheckpointError, ConfigError

_MANIFEST = "manifest.json"
_OF_STATUS = ("run.json", "metrics.jsonl", "summary.json", "failure.txt")
_ROWS_EVERY_S, _READ_EVERY_S = 30.0, 5.0
_BLOCK = 2**20
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class Store:
    """What is below one URL."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            ConfigError: pyarrow has no file system for it.
        """
        from pyarrow import fs

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fs.FileSystem.from_uri(self.url)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.url}: no store that can be used ({_first_line(error)}). s3, gs and abfs are."
            ) from error
        self._selector = fs.FileSelector

    def files(self, below: str = "") -> dict[str, Any]:
        """Every file below a place there, by its path from the URL on, with pyarrow's `size` and `mtime`."""
        with self._asked("read"):
            selector = self._selector(self._path(below), recursive=True, allow_not_found=True)
            found = self._fs.get_file_info(selector)
        return {info.path.removeprefix(f"{self._root}/"): info for info in found if info.is_file}

    def read(self, name: str, into: Path) -> None:
        """Copy a file from there; it appears whole or not at all."""
        into.parent.mkdir(parents=True, exist_ok=True)
        partial = into.with_name(f".{into.name}.{os.getpid()}.partial")
        try:
            with self._asked("read"), self._fs.open_input_stream(self._path(name)) as there, partial.open("wb") as here:
                shutil.copyfileobj(there, here, _BLOCK)
            partial.replace(into)
        finally:
            partial.unlink(missing_ok=True)

    def write(self, name: str, source: Path) -> None:
        """Copy a file to there; it appears whole or not at all. A copy that breaks off leaves nothing of that name."""
        with self._asked("written"), source.open("rb") as here, self._fs.open_output_stream(self._path(name)) as there:
            try:
                shutil.copyfileobj(here, there, _BLOCK)
            except BaseException:
                with suppress(OSError):
                    there.close()  # which keeps what has come so far, as the end of a `with` would
                with suppress(OSError):
                    self._fs.delete_file(self._path(name))
                raise

    def delete(self, name: str) -> None:
        """Delete a file there."""
        with self._asked("written"):
            self._fs.delete_file(self._path(name))

    def delete_all(self, below: str = "") -> None:
        """Delete everything below a place there."""
        with self._asked("written"):
            self._fs.delete_dir(self._path(below))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.url} cannot be {what}: {_first_line(error)}. Check the bucket, the network, and the endpoint "
                f"and credentials of the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)."
            ) from error


class Mirror:
    """One run in the storage and its working copy here. Of a storage that is a directory it does nothing."""

    def __init__(self, cfg: RunConfig, rank: int = 0) -> None:
        """
        Args:
            cfg: the run's.
            rank: of this process: 0 has the run, the others their own log.
        """
        self._cfg, self._here, self._rank = cfg, cfg.run_dir, rank
        self._store = Store(cfg.run_url) if cfg.run_url is not None else None
        self._there: dict[str, tuple[int, int]] = {}
        """Size and time of what was brought there, by name."""
        self._rows_at = time.monotonic()
        self._has_pulled = False

    def names(self) -> list[str]:
        """The runs in the storage."""
        if self._store is None:
            return sorted(path.parent.name for path in self._here.parent.glob("*/run.json"))
        found = [PurePosixPath(name) for name in Store(self._cfg.cluster.storage).files()]
        return sorted(path.parts[0] for path in found if path.parts[1:] == ("run.json",))

    def exists(self) -> bool:
        """Whether there is a run of this name, there or here."""
        return (self._here / "run.json").exists() or (self._store is not None and "run.json" in self._store.files())

    def pull(self) -> None:
        """Make the working copy as new as the run: each whole checkpoint that it misses, and all else where the run has
        come further there, on another machine. What is further here, because it could not be brought there, stays.

        Raises:
            CheckpointError: the store does not answer.
        """
        if self._store is None:
            return
        self._here.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._here.with_name(f".{self._here.name}.lock")):
            self._pull(self._store)
        self._has_pulled = True

    def _pull(self, store: Store) -> None:
        there = store.files()
        if self._rank != 0:
            own = f"logs/rank-{self._rank}.jsonl"
            if own in there and not (self._here / own).exists():
                store.read(own, self._here / own)
            return
        is_ahead = not (self._here / "run.json").exists() or _progress(there) > _progress(_local_files(self._here))
        for step in _whole_checkpoints(there):
            if not _is_whole(self._here / step):
                self._take(store, step, [name for name in there if name.startswith(f"{step}/")])
        for name in there if is_ahead else ():
            if not name.startswith("checkpoints/"):
                store.read(name, self._here / name)

    def push(self) -> None:
        """Bring there what is new here: of each directory the manifest last. Checkpoints that are gone here are deleted
        there, if all were here before.

        Raises:
            CheckpointError: the store does not take it. What is here stays as it is.
        """
        if self._store is None:
            return
        try:
            self._push(self._store)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} What the run has made is kept in {self._here}; `{self._cfg.going_on}` brings it there."
            ) from error
        self._rows_at = time.monotonic()

    def push_failure(self) -> None:
        """Bring there why the run was given up, and nothing else: what the run has made may be on another machine.

        Raises:
            CheckpointError: the store does not take it.
        """
        if self._store is not None:
            self._store.write(self._cfg.failure_path.name, self._cfg.failure_path)

    @contextmanager
    def pushed_at_the_end(self) -> Iterator[None]:
        """Bring there what the block has made, also where it fails: why is in the log.

        Raises:
            CheckpointError: the block ended well and the store does not take it.
        """
        try:
            yield
        except BaseException:
            with suppress(CheckpointError):
                self.push()
            raise
        self.push()

    def _push(self, store: Store) -> None:
        here = {name: stamp for name, stamp in _local_files(self._here).items() if self._is_mine(name)}
        changed = [name for name in here if self._there.get(name) != here[name]]
        for name in sorted(changed, key=_manifests_last):
            store.write(name, self._here / name)
            self._there[name] = here[name]
        if self._rank == 0 and self._has_pulled:  # else another machine's are not here, and are not gone
            there = store.files("checkpoints")
            for step in sorted(_steps(there) - _steps(here)):
                if f"{step}/{_MANIFEST}" in there:
                    store.delete(f"{step}/{_MANIFEST}")
                store.delete_all(step)

    def push_rows(self) -> None:
        """Bring the rows and the log of rank 0 there, twice a minute at most: for who watches elsewhere. A store that
        does not answer is left alone until the next checkpoint, which says so."""
        if self._store is None or self._rank != 0 or time.monotonic() - self._rows_at < _ROWS_EVERY_S:
            return
        self._rows_at = time.monotonic()
        try:
            for name in ("metrics.jsonl", "logs/rank-0.jsonl"):
                if (self._here / name).exists():
                    self._store.write(name, self._here / name)
        except CheckpointError:
            self._rows_at = float("inf")

    def follow(self) -> None:
        """`take_rows`, at most every few seconds."""
        if time.monotonic() - self._rows_at >= _READ_EVERY_S:
            self.take_rows()

    def take_rows(self) -> None:
        """Take over rows and logs of ranks on other machines, where these are longer there than here."""
        if self._store is None:
            return
        self._rows_at = time.monotonic()
        here = _local_files(self._here)
        with suppress(CheckpointError):  # the run itself says so
            for name, info in self._store.files().items():
                if name.endswith(".jsonl") and info.size > here.get(name, (0, 0))[0]:
                    self._store.read(name, self._here / name)

    def has_results(self) -> bool:
        """Whether there is a checkpoint or a best state, here or there; True also where the store does not answer."""
        try:
            names = {*_local_files(self._here), *(self._store.files() if self._store is not None else ())}
        except CheckpointError:
            return True
        return any(part == "best" or part.startswith("step-") for name in names for part in PurePosixPath(name).parts)

    def remove(self) -> None:
        """Delete the run there."""
        if self._store is not None and self._store.files():
            self._store.delete_all()

    def _is_mine(self, name: str) -> bool:
        if name.startswith("logs/"):
            return name == f"logs/rank-{self._rank}.jsonl"
        return self._rank == 0

    def _take(self, store: Store, step: str, names: Iterable[str]) -> None:
        """One checkpoint from there, in the place of what stands here under its name."""
        target = self._here / step
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in names:
            store.read(name, partial / PurePosixPath(name).name)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def delete(place: str) -> None:
    """Delete a directory of a storage, and the one that holds it where nothing else is in it. What cannot be deleted
    stays."""
    if is_url(place):
        with suppress(CheckpointError):
            Store(place).delete_all()
        return
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        Path(place).parent.rmdir()


def here(place: str | Path) -> Path:
    """A directory of a storage on this machine, fetched now where `place` is a URL. Each node does it for itself.

    Raises:
        CheckpointError: the store does not answer.
        ConfigError: nothing can be asked for it.
    """
    if not is_url(str(place)):
        return Path(place).absolute()
    store, target = Store(str(place)), fetched(str(place))
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the ranks of a node fetch it once after the other
        names = store.files()
        for name in names:
            store.read(name, target / name)
        for gone in set(_local_files(target)) - set(names):
            (target / gone).unlink()
    return target


def fetched(url: str) -> Path:
    """Where `here` puts what is at a URL."""
    scheme, _, rest = url.rstrip("/").partition("://")
    return machine.cache_dir() / "fetched" / scheme / rest


def url_of(directory: Path) -> str:
    """The URL that a directory was fetched from; of any other directory its path."""
    root = machine.cache_dir() / "fetched"
    if not directory.is_relative_to(root):
        return str(directory)
    scheme, *rest = directory.relative_to(root).parts
    return f"{scheme}://{'/'.join(rest)}"


class View:
    """What `status` and `logs` read of runs: directories as they are, of a store a copy for the length of a block."""

    def __init__(self, where: str, copy: Path) -> None:
        """
        Args:
            where: a run file, a directory, or a URL.
            copy: an empty directory.
        """
        url = where if is_url(where) else None
        if url is None and Path(where).is_file():
            url = configio.load(where).run_url
        self.directory = copy if url is not None else Path(where)
        self._store = None if url is None else Store(url)
        self._read_at = float("-inf")
        self.refresh()

    def refresh(self) -> None:
        """Read a store again, if that was not done just now."""
        if self._store is None or time.monotonic() - self._read_at < _READ_EVERY_S:
            return
        self._read_at = time.monotonic()
        there = self._store.files()
        for name, info in there.items():
            path, parts = self.directory / name, PurePosixPath(name).parts
            if parts[-1] in _OF_STATUS or parts[-2:-1] == ("logs",):
                mtime = _seconds(info.mtime)
                if not path.exists() or path.stat().st_size != info.size:
                    self._store.read(name, path)
                os.utime(path, (mtime, mtime))  # by which a run is found to be silent
            elif parts[-1] == _MANIFEST and parts[-3:-2] == ("checkpoints",):
                path.parent.mkdir(parents=True, exist_ok=True)

    def name_of(self, directory: Path) -> str:
        """What a user calls a run's directory."""
        if self._store is None:
            return str(directory)
        below = directory.relative_to(self.directory).as_posix()
        return self._store.url if below == "." else f"{self._store.url}/{below}"


@contextmanager
def viewed(where: str) -> Iterator[View]:
    """Runs to be read, wherever they are.

    Raises:
        CheckpointError: the store does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="peftscale-") as copy:
        yield View(where, Path(copy))


def _local_files(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a directory, by its path from there on. What is being written is hidden."""
    found = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with suppress(FileNotFoundError):  # a run deletes what it keeps no longer
                stat = path.stat()
                found[name.as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _manifests_last(name: str) -> tuple[bool, str, bool, str]:
    """The order of files: one directory after the other, each with its manifest at its end; last what says that a run
    has ended."""
    path = PurePosixPath(name)
    return path.name == "summary.json", str(path.parent), path.name in (_MANIFEST, "peftscale.json"), path.name


def _steps(files: Iterable[str]) -> set[str]:
    """checkpoints/step-N of every checkpoint that has a file."""
    parts = [PurePosixPath(name).parts for name in files]
    return {f"checkpoints/{p[1]}" for p in parts if p[0] == "checkpoints" and len(p) > 2}


def _whole_checkpoints(files: Mapping[str, Any]) -> list[str]:
    """checkpoints/step-N of those that have a manifest, as a run's files tell."""
    parts = [PurePosixPath(name).parts for name in files]
    return [f"checkpoints/{p[1]}" for p in parts if p[0] == "checkpoints" and p[2:] == (_MANIFEST,)]


def _progress(files: Mapping[str, Any]) -> tuple[bool, int]:
    """How far a run has come, as its files tell: has it ended, and its newest checkpoint."""
    steps = [step.removeprefix("checkpoints/step-") for step in _whole_checkpoints(files)]
    return "summary.json" in files, max((int(step) for step in steps if step.isdigit()), default=-1)


def _is_whole(directory: Path) -> bool:
    """Whether every file that the manifest names is what it was."""
    try:
        hashes = json.loads((directory / _MANIFEST).read_bytes())["sha256"]
        return all(hashlib.sha256((directory / name).read_bytes()).hexdigest() == was for name, was in hashes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _seconds(mtime: datetime | None) -> float:
    return time.time() if mtime is None else mtime.timestamp()


def _first_line(error: Exception) -> str:
    """Without the endpoint, which is the environment's and is written nowhere."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].split("; Details:")[0]
    for variable in _ENDPOINTS:
        line = line.replace(os.environ.get(variable) or variable, variable)
    return line
