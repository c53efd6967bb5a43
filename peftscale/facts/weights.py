"""Where the weights of a base lie: its safetensors files and their headers, checked, without reading a weight.

Packing is `base.pack`. Pickles are never opened.

Source: safetensors format, huggingface.co/docs/safetensors (8-byte little-endian length, JSON header, data).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from peftscale.errors import ModelError

_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


class Header(NamedTuple):
    """Where one tensor lies. `begin` and `end` are offsets in bytes from the start of the file."""

    file: Path
    dtype: str
    """As safetensors writes it: BF16, F32, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int


def source_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a model in order: model.safetensors, or all that its index names.

    Raises:
        ModelError: only pickles, nothing at all, shards that are missing, or a file that is cut.
    """
    model_dir = Path(model_dir)
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.is_file():
        headers([single])
        return [single]
    if not index.is_file():
        _refuse_without_safetensors(model_dir)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of safetensors files ({error!r}). Fetch the file again.") from error
    missing = [name for name in names if not (model_dir / name).is_file()]
    if missing:
        raise ModelError(
            f"base.model={model_dir}: {len(missing)} of the {len(names)} files of {index.name} are missing: "
            f"{', '.join(missing[:5])}. Fetch them."
        )
    files = [model_dir / name for name in names]
    there = headers(files)
    lost = sorted(name for name, file in weight_map.items() if name not in there or there[name].file.name != file)
    if lost:
        raise ModelError(
            f"base.model={model_dir}: {index.name} puts {lost[0]} into {weight_map[lost[0]]}, which does not hold it "
            f"({len(lost)} such tensor(s)). Index and files are of different versions; fetch both again."
        )
    return files


def _refuse_without_safetensors(model_dir: Path) -> NoReturn:
    suffixes = (".bin", ".pt", ".pth", ".ckpt")
    pickles = sorted(p.name for p in model_dir.iterdir() if p.suffix in suffixes) if model_dir.is_dir() else []
    if pickles:
        raise ModelError(
            f"base.model={model_dir}: its weights are pickles ({', '.join(pickles[:5])}), which can run code when they "
            f"are read and are never opened here. Take the safetensors version of the model, or convert it elsewhere "
            f"with transformers' save_pretrained."
        )
    raise ModelError(
        f"base.model={model_dir}: holds no weights; looked for model.safetensors and model.safetensors.index.json. "
        f"Fetch the model's safetensors files."
    )


def headers(files: Sequence[Path]) -> dict[str, Header]:
    """Every tensor of the files by its name. Reads the 8-byte length and the JSON header of each, no data.

    Raises:
        ModelError: a file is cut, has bytes too many, is no safetensors file, or a name occurs twice.
    """
    found: dict[str, Header] = {}
    for file in files:
        _, entries = _read_header(file)
        for name, entry in entries.items():
            if name in found:
                raise ModelError(f"{file}: tensor {name} is in {found[name].file} as well. Remove the old file.")
            found[name] = entry
    return found


def _read_header(file: Path) -> tuple[bytes, dict[str, Header]]:
    """The raw JSON and its tensors, checked against the size of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= min(_MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}).") from error
    if not text:
        raise ModelError(
            f"{file}: is no safetensors file or is cut within its header ({size} bytes, header of {length}). "
            f"Fetch it again."
        )
    start, entries, last = 8 + length, {}, 8 + length
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            shape, (begin, end) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
            width = _ITEM_BYTES.get(entry["dtype"])
            if width is not None and end - begin != math.prod(shape) * width:
                raise ModelError(
                    f"{file}: tensor {name} has {end - begin} bytes, but {entry['dtype']} {shape} takes "
                    f"{math.prod(shape) * width}. The header is damaged; fetch the file again."
                )
            entries[name] = Header(file, entry["dtype"], shape, start + begin, start + end)
            last = max(last, start + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: its header is no safetensors header ({error!r}). Fetch the file again.") from error
    if last != size:
        kind = "is cut" if size < last else "has bytes too many"
        raise ModelError(f"{file}: {kind}: {size} bytes, its header names {last}. Fetch it again.")
    return text, entries


def source_key(model_dir: str | Path, quantization: str, compute_dtype: str, extra: str = "") -> str:
    """A hex key for what would be packed: changes with config.json, any header, file size or time, or the arguments.

    The directory's own path is left out, so that a moved model keeps its pack. Weights are not read: their digest
    is `base.pack`'s.
    """
    model_dir = Path(model_dir)
    hasher = hashlib.sha256(json.dumps([quantization, compute_dtype, extra]).encode())
    for file in source_files(model_dir):
        stat = file.stat()
        hasher.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
        hasher.update(_read_header(file)[0])
    try:
        hasher.update((model_dir / "config.json").read_bytes())
    except OSError as error:
        raise ModelError(f"base.model={model_dir}: has no readable config.json ({error.strerror}).") from error
    return hasher.hexdigest()
