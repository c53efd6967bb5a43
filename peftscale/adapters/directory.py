"""A directory that appears whole or not at all: written beside its name, flushed to disk, renamed into place.

Knows nothing about what is inside. A directory that stands at the name is kept, as `.NAME.previous`, until the
new one stands there: a crash at any moment leaves one of them whole, and `current` finds it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make `directory` hold exactly these files, or leave everything as it was. See `filled`."""
    with filled(directory) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)


@contextmanager
def filled(directory: Path) -> Iterator[Path]:
    """Give an empty directory to put files into, which takes the place of `directory` when the block ends.

    For one writer at a time. Parents are created. What a killed writer left behind is removed.

    Raises:
        OSError: the disk is full, or the place cannot be written. What stood at `directory` still stands there.
    """
    directory = directory.resolve()
    partial, previous = _sibling(directory, "partial"), _sibling(directory, "previous")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        _replace(partial, directory, previous)
    finally:
        _remove(partial)
    _flush(directory.parent)
    _remove(previous)


def current(directory: Path) -> Path:
    """Where the content of `directory` is: there, or beside it if its writer was killed between two renames."""
    previous = _sibling(directory.resolve(), "previous")
    return previous if previous.exists() and not directory.exists() else directory


def _replace(partial: Path, directory: Path, previous: Path) -> None:
    """Two renames, because no portable one replaces a directory that is not empty."""
    if not directory.exists():
        os.replace(partial, directory)
        return
    _remove(previous)
    os.replace(directory, previous)
    try:
        os.replace(partial, directory)
    except BaseException:
        os.rename(previous, directory)
        raise


def _sibling(directory: Path, role: str) -> Path:
    return directory.with_name(f".{directory.name}.{role}")


def _flush(path: Path) -> None:
    """To the disk: a file's content, or the names in a directory, which a power cut could forget."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
