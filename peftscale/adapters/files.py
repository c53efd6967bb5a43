"""Adapter directories: PEFT's two files, `peftscale.json` and a model card, saved whole and read with suspicion.

PEFT's bytes are `adapters.peft_format`, the types of peftscale.json `adapters.manifest`, the renaming
`adapters.directory`. Nothing is ever unpickled. Checkpoints of a run, with optimizer state, are
`train.checkpoint`.

Shapes:  P virtual tokens   H hidden size
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftscale.adapters import directory as directories
from peftscale.adapters import manifest as manifests
from peftscale.adapters import model_card, peft_format
from peftscale.adapters.manifest import MANIFEST_FILE, AdapterCard, Manifest, Stored, TaskTemplate
from peftscale.adapters.peft_format import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, expected_bytes
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.errors import AdapterError

__all__ = ["AdapterInfo", "Description", "describe", "expected_bytes", "load", "save", "verify"]

MODEL_CARD_FILE = "README.md"


@dataclass(frozen=True)
class AdapterInfo:
    """What is known about an adapter that was loaded."""

    directory: Path
    num_file_bytes: int
    """Of `adapter_model.safetensors`."""
    manifest: Manifest | None
    """None for a directory of PEFT."""

    @property
    def base_is_verified(self) -> bool:
        """False: nothing says which base the adapter was trained on, and the caller prints 'base not verified'."""
        return self.manifest is not None


class Description(Stored):
    """What `peftscale inspect` shows. The fields of peftscale.json are None for a directory of PEFT."""

    kind: str
    length: int
    hidden_size: int
    num_file_bytes: int
    row_norm_mean: float
    row_norm_std: float
    """Over the rows; 0 for one row."""
    base_model: str | None
    base_revision: str | None
    base_digest: str | None
    task: TaskTemplate | None
    run: str | None
    step: int | None
    metrics: dict[str, float | None] | None


@dataclass(frozen=True)
class _Contents:
    rows_PH: Tensor
    num_file_bytes: int
    manifest: Manifest | None


def save(adapter: SoftPrompt, directory: Path, *, card: AdapterCard) -> int:
    """Write the adapter's directory, whole or not at all. In a run, rank 0 alone calls it.

    What stands at `directory` is replaced once the new files are safe on the disk.

    Returns:
        Bytes of `adapter_model.safetensors`: `expected_bytes(P, H)`.

    Raises:
        AdapterError: rows that are not finite, a place that holds something else than an adapter, or a disk that
            cannot take the files. What stood at `directory` is untouched then.
    """
    if not bool(torch.isfinite(adapter.rows_PH).all()):
        raise AdapterError(f"adapter {directory} is not saved: its rows hold values that are not finite (NaN or inf).")
    weights = peft_format.weights_bytes(adapter.rows_PH)
    readme = model_card.text(card, length=adapter.length, hidden_size=adapter.hidden_size, num_file_bytes=len(weights))
    files = {
        CONFIG_FILE: peft_format.config_json(
            length=adapter.length,
            hidden_size=adapter.hidden_size,
            num_layers=card.base.num_layers,
            num_attention_heads=card.base.num_attention_heads,
            model=card.base.model,
            revision=card.base.revision,
        ),
        WEIGHTS_FILE: weights,
        MODEL_CARD_FILE: readme.encode(),
    }
    manifest = Manifest(
        # Field by field, because a card may be the manifest of an adapter that was loaded.
        **{name: getattr(card, name) for name in AdapterCard.model_fields},
        format_version=manifests.FORMAT_VERSION,
        kind="prompt",
        length=adapter.length,
        hidden_size=adapter.hidden_size,
        versions=manifests.versions(),
        files={name: _digest(content) for name, content in files.items()},
    )
    try:
        _refuse_other_content(directory)
        directories.write(directory, {**files, MANIFEST_FILE: f"{manifest.model_dump_json(indent=2)}\n".encode()})
    except OSError as error:
        raise AdapterError(
            f"adapter {directory} is not saved: {error.strerror or error} (errno {error.errno}). "
            f"What stood there before is untouched. It needs {sum(map(len, files.values())):,} free bytes."
        ) from error
    return len(weights)


def load(directory: Path, *, base_digest: str, hidden_size: int) -> tuple[SoftPrompt, AdapterInfo]:
    """Read an adapter for the base with this digest. The rows are on the CPU, bitwise as they were saved.

    A directory that PEFT wrote, without peftscale.json, is used: see `AdapterInfo.base_is_verified`. A changed
    model card harms nobody and is left to `verify`.

    Raises:
        AdapterError: not an adapter directory, a file that is cut or altered, a pickle, another kind of adapter,
            rows that are not finite, another base.
    """
    contents = _read(directory)
    manifest = contents.manifest
    if manifest is not None and manifest.base.digest != base_digest:
        raise AdapterError(
            f"adapter {directory} was trained on base {manifest.base.digest}, this base is {base_digest}.\n"
            f"{MANIFEST_FILE} says model {manifest.base.model!r}, revision {manifest.base.revision!r}: "
            f"check base.model and base.revision."
        )
    if contents.rows_PH.shape[1] != hidden_size:
        raise AdapterError(
            f"adapter {directory} has rows of {contents.rows_PH.shape[1]} numbers, this base has a hidden size of "
            f"{hidden_size}. The adapter belongs to another base: check base.model."
        )
    return SoftPrompt(contents.rows_PH), AdapterInfo(directory, contents.num_file_bytes, manifest)


def verify(directory: Path) -> Manifest | None:
    """Check everything that can be checked without the base, the model card included.

    Returns:
        What peftscale.json says, or None for a directory of PEFT, of which less can be checked.

    Raises:
        AdapterError: as `load`, and any file that peftscale.json lists is missing or altered.
    """
    manifest = _read(directory).manifest
    if manifest is not None:
        for name, digest in manifest.files.items():
            _checked_content(directories.current(directory) / name, digest)
    return manifest


def describe(directory: Path) -> Description:
    """Read an adapter for people. Raises what `verify` raises."""
    manifest = verify(directory)
    contents = _read(directory)
    norms_P = contents.rows_PH.norm(dim=1)
    return Description(
        kind="prompt",
        length=contents.rows_PH.shape[0],
        hidden_size=contents.rows_PH.shape[1],
        num_file_bytes=contents.num_file_bytes,
        row_norm_mean=norms_P.mean().item(),
        row_norm_std=norms_P.std(correction=0).item(),
        base_model=manifest.base.model if manifest else None,
        base_revision=manifest.base.revision if manifest else None,
        base_digest=manifest.base.digest if manifest else None,
        task=manifest.task if manifest else None,
        run=manifest.run if manifest else None,
        step=manifest.step if manifest else None,
        metrics=manifest.metrics if manifest else None,
    )


def _read(directory: Path) -> _Contents:
    """All checks that need no base. Each file is read once, so what was checked is what is used."""
    here = directories.current(directory)
    if not here.is_dir():
        raise AdapterError(f"adapter {directory}: {'not a directory' if here.exists() else 'does not exist'}.")
    if not (here / WEIGHTS_FILE).exists() and (here / PICKLE_FILE).exists():
        raise AdapterError(
            f"adapter {directory}: {PICKLE_FILE} is a pickle, which can run code when it is read; only {WEIGHTS_FILE} "
            f"is read. Load it once where you trust it and save it with a PEFT that writes safetensors."
        )
    manifest_path = here / MANIFEST_FILE
    manifest = manifests.parse(_content(manifest_path), where=str(manifest_path)) if manifest_path.exists() else None
    files = manifest.files if manifest else {}
    config, weights = (_checked_content(here / name, files.get(name)) for name in (CONFIG_FILE, WEIGHTS_FILE))
    header = peft_format.parse_config(config, where=str(here / CONFIG_FILE))
    rows_PH = peft_format.parse_weights(weights, header, where=str(here / WEIGHTS_FILE))
    if manifest is not None and (manifest.length, manifest.hidden_size) != tuple(rows_PH.shape):
        raise AdapterError(
            f"{manifest_path}: says length {manifest.length} and hidden_size {manifest.hidden_size}, but the rows are "
            f"{list(rows_PH.shape)}. The file was altered: copy or save the adapter again."
        )
    return _Contents(rows_PH, len(weights), manifest)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(
            f"{path}: {error.strerror}. An adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from error


def _checked_content(path: Path, expected: str | None) -> bytes:
    """The content of the file, which must have the expected digest where there is one."""
    content = _content(path)
    found = _digest(content)
    if expected not in (None, found):
        raise AdapterError(
            f"{path}: cut or altered. {MANIFEST_FILE} says {expected}, the file's {len(content)} bytes give {found}. "
            f"Copy or save the adapter again."
        )
    return content


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _refuse_other_content(directory: Path) -> None:
    """Replacing a directory deletes what is in it, so it must be an adapter's, or empty."""
    if not directory.exists() or (directory / CONFIG_FILE).exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise AdapterError(
            f"adapter {directory} is not saved: something that is no adapter stands there. Choose another place."
        )
