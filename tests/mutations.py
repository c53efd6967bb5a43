"""Random damage of a file's content: of its bytes, of JSON, of the header of safetensors. Drawn by seed."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
Json = Any

VALUES: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    10**400,
    -(2**63) - 1,
    0.5,
    1e999,
    float("nan"),
    "",
    "x",
    "\ud800",
    "\0",
    "[/b] \u202e \U0001f600",
    "sha256:" + "0" * 64,
    "../../etc/passwd",
    "y" * 5000,
    [],
    [1, 2],
    [[]],
    {},
    {"a": {"b": []}},
)
"""What a key is changed to."""
_DTYPES = ("F32", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F33", "", None, 4)


def bytes_(rng: Rng, content: bytes) -> bytes:
    """Content that was flipped, cut, grown, moved or overwritten somewhere; never the same."""
    at, to = sorted(int(place) for place in rng.integers(0, len(content) + 1, size=2))
    noise = rng.bytes(int(rng.integers(1, 20)))
    changed = [
        lambda: _flipped(rng, content),
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + noise + content[at:],
        lambda: content[:at] + content[to:],
        lambda: content[:to] + content[at:],
        lambda: content[:at] + bytes(to - at) + content[to:],
        lambda: content[:at] + noise + content[at + len(noise) :],
        lambda: content[at:] + content[:at],
        lambda: b"",
    ][rng.integers(10)]()
    return changed if changed != content else _flipped(rng, content)


def _flipped(rng: Rng, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def json_(rng: Rng, content: bytes) -> bytes:
    """JSON with a key somewhere that has another value, name or place, is there twice, or is gone."""
    tree = json.loads(content)
    holder, key = _somewhere(rng, tree)
    value = VALUES[rng.integers(len(VALUES))]
    match rng.integers(6):
        case 0 | 1:
            holder[key] = value
        case 2:
            del holder[key]
        case 3 if isinstance(holder, dict):
            holder[f"{key}s"] = holder.pop(key)
        case 4 if isinstance(holder, dict):
            return _twice(tree, holder, key, value)
        case 5:
            deep = json.dumps(tree).encode()
            depth = int(rng.choice([50, 500, 2000, 100_000]))
            return deep[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
        case _:
            holder[key] = [holder[key]]
    return json.dumps(tree).encode()


def _twice(tree: Json, holder: dict[str, Json], key: str, value: Json) -> bytes:
    """The key twice in one object. Which one counts is the reader's choice: the last one in Python's."""
    before = holder[key]
    holder[key] = "THE VALUE"
    text = json.dumps(tree)
    return text.replace('"THE VALUE"', f"{json.dumps(before)}, {json.dumps(key)}: {json.dumps(value)}").encode()


def _somewhere(rng: Rng, tree: Json) -> tuple[Any, Any]:
    """A mapping or list in a tree, and one of its keys."""
    places = list(_places(tree))
    return places[rng.integers(len(places))]


def _places(tree: Json) -> Any:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list) and tree[key]:
            yield from _places(tree[key])


def safetensors_(rng: Rng, content: bytes) -> bytes:
    """A safetensors file with another header: dtype, shape, offsets, names, length."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = names[rng.integers(len(names))]
    entry = header[name]
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    match rng.integers(9):
        case 0 | 1:
            entry["dtype"] = _DTYPES[rng.integers(len(_DTYPES))]
        case 2 | 3:
            shapes = [shape[::-1], [*shape, 1], [], [-1, *shape[1:]], [2**62, *shape[1:]], [shape], None, [0, *shape]]
            entry["shape"] = shapes[rng.integers(len(shapes))]
        case 4:
            wrong = [[begin + 4, end + 4], [begin, end - 4], [end, begin], [0, 2**64], [-4, end], [begin], None]
            entry["data_offsets"] = wrong[rng.integers(len(wrong))]
        case 5:
            header[str(VALUES[rng.integers(12, 19)])] = header.pop(name)
        case 6:
            header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        case 7:
            size_of_header = [0, 1, size + 1, 2**40, 2**64 - 1][rng.integers(5)]
            return size_of_header.to_bytes(8, "little") + content[8:]
        case 8:
            header["__metadata__"] = VALUES[rng.integers(len(VALUES))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def of(rng: Rng, name: str, content: bytes) -> bytes:
    """A mutation of a file of this name."""
    of_kind: Callable[[Rng, bytes], bytes] | None = {"json": json_, "safetensors": safetensors_}.get(
        name.split(".")[-1]
    )
    return of_kind(rng, content) if of_kind is not None and rng.random() < 0.6 else bytes_(rng, content)
