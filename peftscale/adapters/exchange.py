"""Exchange: adapters that come from other programs, T5X's `.npy` prompts and PEFT's directories, and that go to them.

Our own directories are `adapters.files`, PEFT's bytes `adapters.peft_format`.

Source of the .npy: google-research/prompt-tuning. Its `train/utils.py` saves the parameter with `numpy.save`, in the
dtype of the checkpoint, and its `prompts.py` reads it with `numpy.load` and refuses any other shape than (P, H).

Shapes:  P virtual tokens   H hidden size
"""

import io
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from peftscale import configio
from peftscale.adapters import directory as directories
from peftscale.adapters import files, peft_format
from peftscale.adapters.cohort import Folded
from peftscale.adapters.manifest import AdapterCard, BaseCard, TaskTemplate
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.base import load, prefixed
from peftscale.base.prefixed import PrefixShape
from peftscale.config import RunConfig
from peftscale.errors import AdapterError

Format = Literal["peft", "npy"]


def import_(cfg: RunConfig, source: Path, out: Path) -> dict[str, Any]:
    """Write an adapter of another program as a directory of ours, for the base and the task of a run file.

    The base is not loaded. It is packed if it is not in the cache, since that gives its digest; all else is checked
    before.

    Args:
        cfg: says which base the adapter belongs to, and which task it was trained for.
        source: a `.npy` file of T5X, whatever its name, or a directory of PEFT.
        out: the directory to write. An adapter that stands there is replaced.

    Returns:
        {"directory", "notes"} and what `files.describe` says.

    Raises:
        AdapterError: the source is neither, does not fit the base or is an adapter of ours already; or something that
            is no adapter stands at `out`.
        ModelError: the base cannot be read or packed.
    """
    files.refuse_other_content(out)
    if source.resolve().is_relative_to(out.resolve()):
        raise AdapterError(f"--out {out} would replace {source}, which is imported. Choose another directory.")
    model_dir = load.resolve(cfg.base.model, cfg.base.revision, with_weights=False)
    model = load.make_skeleton(cfg.base, model_dir).model
    adapter, notes = _read(
        source,
        hidden_size=int(model.get_input_embeddings().embedding_dim),
        prefix_shape=prefixed.shape_of(model.config),
    )
    card = AdapterCard(
        base=BaseCard.of(cfg.base, load.open_(cfg.base).packed.digest, model.config),
        task=TaskTemplate.of(cfg.task),
        run=cfg.name,
        fingerprint=configio.fingerprint(cfg),
        init="imported",
        step=0,
    )
    files.save(adapter, out, card=card)
    described = files.describe(out).model_dump(mode="json")
    return {"directory": str(out), **described, "notes": [f"{source}: {note}" for note in notes]}


def export(directory: Path, out: Path, format: Format) -> dict[str, Any]:
    """Write an adapter for another program.

    Args:
        directory: the adapter's.
        out: what to write; nothing may stand there.
        format: 'peft': a directory of exactly PEFT's two files. 'npy': one file with the rows of a prompt, (P, H)
            float32, as T5X reads it.

    Returns:
        {"path", "format", "kind", "length", "bytes"}

    Raises:
        AdapterError: the format cannot express the adapter, the adapter is damaged, or `out` exists or cannot be
            written.
    """
    if out.exists():
        raise AdapterError(f"--out {out} exists. Choose another place, or remove it.")
    files.verify(directory)
    contents = files.read(directory)
    content = contents.files if format == "peft" else _npy_bytes(contents.adapter, where=f"adapter {directory}")
    if format == "peft" and not contents.header.is_peft:
        raise AdapterError(
            f"adapter {directory} is {files.named(contents.adapter)}, which PEFT cannot express. It can be used "
            f"through peftscale alone, as it is."
        )
    with _writable(out):
        if isinstance(content, bytes):
            _write_file(out, content)
        else:
            directories.write(out, content)
    return {
        "path": str(out),
        "format": format,
        "kind": "prompt" if isinstance(contents.adapter, SoftPrompt) else "prefix",
        "length": contents.adapter.length,
        "bytes": len(content) if isinstance(content, bytes) else contents.num_file_bytes,
    }


def _read(source: Path, *, hidden_size: int, prefix_shape: PrefixShape) -> tuple[Folded, list[str]]:
    """The adapter of a file or directory that fits such a base, and what the user should know."""
    if source.is_dir():
        if files.verify(source) is not None:
            raise AdapterError(f"{source} is a directory of peftscale already: use it as it is, on its own base.")
        adapter, info = files.load(source, base_digest="", hidden_size=hidden_size, prefix_shape=prefix_shape)
        return adapter, list(info.notes)
    rows_PH, notes = _npy_rows(source)
    prompt = SoftPrompt(rows_PH)
    files.refuse_other_sizes(prompt, where=str(source), hidden_size=hidden_size, prefix_shape=prefix_shape)
    return prompt, [*notes, "base not verified (a .npy file names none)"]


def _npy_rows(path: Path) -> tuple[Tensor, list[str]]:
    """(P, H) float32 of a file of T5X."""
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("more bytes follow than its header names")
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}. Give a .npy file of T5X or a directory of PEFT.") from error
    except (ValueError, MemoryError, SyntaxError, tokenize.TokenError) as error:  # a header is a Python literal
        raise AdapterError(
            f"{path}: not a NumPy file that can be read without running code ({error}). Give a .npy file with the "
            f"rows of a prompt, or a directory of PEFT."
        ) from error
    is_bfloat16 = array.dtype == np.dtype("V2")  # what numpy makes of JAX's, which it has no name for
    if array.ndim != 2 or not array.size or not (is_bfloat16 or array.dtype.kind == "f"):
        raise AdapterError(
            f"{path}: holds {array.dtype} of shape {list(array.shape)}. T5X keeps a prompt as one matrix of floats, a "
            f"row for each virtual token: save that alone."
        )
    if is_bfloat16:
        rows_PH = torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16).float()
        return _finite(rows_PH, path), []
    with np.errstate(over="ignore"):  # the infinity that comes of it is refused
        rounded = array.astype(np.float32)
    notes = [] if (rounded == array).all() else [f"{array.dtype} is rounded to float32, as T5X does when it reads it"]
    return _finite(torch.from_numpy(rounded), path), notes


def _finite(rows_PH: Tensor, path: Path) -> Tensor:
    peft_format.refuse_nonfinite(rows_PH, where=str(path))
    return rows_PH


def _npy_bytes(adapter: Folded, *, where: str) -> bytes:
    if not isinstance(adapter, SoftPrompt) or adapter.decoder_length:
        raise AdapterError(
            f"{where} is {files.named(adapter)}; a .npy file of T5X holds a prompt of one input alone. "
            f"Leave out --format npy, or export a prompt."
        )
    file = io.BytesIO()
    np.save(file, adapter.rows_PH.detach().numpy(), allow_pickle=False)
    return file.getvalue()


def _write_file(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"--out {out} cannot be written: {error.strerror or error}. Make room, or choose another place."
        ) from error
