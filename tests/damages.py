"""What disks, kills and copies do to files: for tests of what is still read afterwards."""

from pathlib import Path

CHECKPOINT_FILES = ("adapters.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
"""In the order in which a save writes them."""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def half_copied(path: Path) -> None:
    """A copy of the directory that was stopped inside this file: what comes after it is not there."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name in CHECKPOINT_FILES[CHECKPOINT_FILES.index(path.name) + 1 :]:
        (path.parent / name).unlink()


def half_written(path: Path) -> None:
    """A save that was killed inside this file: its directory does not have its name yet."""
    half_copied(path)
    path.parent.rename(path.parent.with_name(f".{path.parent.name}.partial"))


ALL = (cut, flip, delete, empty, grow, half_copied, half_written)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
