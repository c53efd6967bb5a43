"""Adapter directories: PEFT's two files, `peftscale.json` and a model card, saved whole and read with suspicion.

PEFT's bytes are `adapters.peft_format`, the types of peftscale.json `adapters.manifest`, the renaming
`adapters.directory`. Nothing is ever unpickled. Checkpoints of a run, with optimizer state, are
`train.checkpoint`.

Shapes:  P virtual tokens   H hidden size   W width of a virtual token (adapters.peft_format)
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from peftscale.adapters import directory as directories
from peftscale.adapters import manifest as manifests
from peftscale.adapters import model_card, peft_format
from peftscale.adapters.cohort import Adapter, Folded
from peftscale.adapters.manifest import (
    MANIFEST_FILE,
    AdapterCard,
    Manifest,
    PrefixDimensions,
    Stored,
    TaskTemplate,
)
from peftscale.adapters.peft_format import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, Header, expected_bytes
from peftscale.adapters.prefix import Prefix
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.base.prefixed import PrefixShape
from peftscale.errors import AdapterError

__all__ = ["AdapterInfo", "Contents", "Description", "describe", "expected_bytes", "load", "read", "save", "verify"]

MODEL_CARD_FILE = "README.md"


@dataclass(frozen=True)
class AdapterInfo:
    """What is known about an adapter that was loaded."""

    directory: Path
    num_file_bytes: int
    """Of `adapter_model.safetensors`."""
    manifest: Manifest | None
    """None for a directory of PEFT."""
    notes: tuple[str, ...] = ()
    """What whoever uses it should be told; the directory is not named."""

    @property
    def base_is_verified(self) -> bool:
        """False: nothing says which base the adapter was trained on, and the caller prints 'base not verified'."""
        return self.manifest is not None


class Description(Stored):
    """What `peftscale inspect` shows. The fields of peftscale.json are None for a directory of PEFT."""

    kind: str
    length: int
    decoder_length: int
    """Of a prompt with rows for the decoder's input; else 0."""
    hidden_size: int | None
    """Of a prompt; None for a prefix."""
    prefix: PrefixDimensions | None
    """Of a prefix; None for a prompt."""
    num_file_bytes: int
    row_norm_mean: float
    row_norm_std: float
    """Over the virtual tokens, each with all that it has; 0 for one of them."""
    base_model: str | None
    base_revision: str | None
    base_digest: str | None
    task: TaskTemplate | None
    """Its own; tasks that it was trained on beside it are `more_tasks`."""
    more_tasks: tuple[TaskTemplate, ...]
    run: str | None
    step: int | None
    metrics: dict[str, float | None] | None


@dataclass(frozen=True)
class Contents:
    """A directory that was read, checked against everything but a base and its model card."""

    adapter: Folded
    header: Header
    files: dict[str, bytes]
    """PEFT's two."""
    manifest: Manifest | None

    @property
    def num_file_bytes(self) -> int:
        """Of `adapter_model.safetensors`."""
        return len(self.files[WEIGHTS_FILE])


def save(adapter: Adapter, directory: Path, *, card: AdapterCard) -> int:
    """Write the adapter's directory, whole or not at all. In a run, rank 0 alone calls it.

    What stands at `directory` is replaced once the new files are safe on the disk. A re-parametrised adapter is folded.

    Returns:
        Bytes of `adapter_model.safetensors`: `expected_bytes(P + Q, W)`.

    Raises:
        AdapterError: rows that are not finite, a place that holds something else than an adapter, or a disk that
            cannot take the files. What stood at `directory` is untouched then.
    """
    with torch.no_grad():
        folded = adapter.folded()
    if not bool(torch.isfinite(folded.values).all()):
        raise AdapterError(f"adapter {directory} is not saved: its rows hold values that are not finite (NaN or inf).")
    weights = peft_format.weights_bytes(folded.values)
    shape = folded.shape if isinstance(folded, Prefix) else None
    files = {
        CONFIG_FILE: _config_json(folded, card),
        WEIGHTS_FILE: weights,
        MODEL_CARD_FILE: model_card.text(card, folded, num_file_bytes=len(weights)).encode(),
    }
    manifest = Manifest(
        # Field by field, because a card may be the manifest of an adapter that was loaded.
        **{name: getattr(card, name) for name in AdapterCard.model_fields},
        format_version=manifests.FORMAT_VERSION,
        kind="prompt" if shape is None else "prefix",
        length=folded.length,
        decoder_length=_decoder_length(folded),
        hidden_size=None if isinstance(folded, Prefix) else folded.hidden_size,
        prefix=_dimensions(shape),
        versions=manifests.versions(),
        files={name: _digest(content) for name, content in files.items()},
    )
    try:
        refuse_other_content(directory)
        directories.write(directory, {**files, MANIFEST_FILE: manifests.sealed(json.loads(manifest.model_dump_json()))})
    except OSError as error:
        raise AdapterError(
            f"adapter {directory} is not saved: {error.strerror or error} (errno {error.errno}). "
            f"What stood there before is untouched. It needs {sum(map(len, files.values())):,} free bytes."
        ) from error
    return len(weights)


def load(
    directory: Path, *, base_digest: str, hidden_size: int, prefix_shape: PrefixShape | None = None
) -> tuple[Folded, AdapterInfo]:
    """Read an adapter for the base with this digest. Its values are on the CPU, bitwise as they were saved.

    A directory that PEFT wrote, without peftscale.json, is used: see `AdapterInfo.base_is_verified`. A changed
    model card harms nobody and is left to `verify`.

    Args:
        directory: the adapter's.
        base_digest: of the base.
        hidden_size: of the base, which a prompt must have.
        prefix_shape: of the base, which a prefix must have; its `parts` say that the base is an encoder-decoder.
            None: decoder-only, and prefixes are refused.

    Raises:
        AdapterError: not an adapter directory, a file that is cut or altered, a pickle, another kind of adapter,
            rows that are not finite, another base.
    """
    contents = read(directory)
    manifest = contents.manifest
    if manifest is not None and manifest.base.digest != base_digest:
        raise AdapterError(
            f"adapter {directory} was trained on base {manifest.base.digest}, this base is {base_digest}.\n"
            f"{MANIFEST_FILE} says model {manifest.base.model!r}, revision {manifest.base.revision!r}: "
            f"check base.model and base.revision."
        )
    is_encoder_decoder = prefix_shape is not None and prefix_shape.parts != ()
    if contents.header.is_encoder_decoder not in (None, is_encoder_decoder):
        kinds = {True: "an encoder-decoder", False: "a decoder-only"}
        raise AdapterError(
            f"adapter {directory} is {named(contents.adapter)}, made for {kinds[not is_encoder_decoder]} base; this "
            f"base is {kinds[is_encoder_decoder]} model. Check base.model."
        )
    refuse_other_sizes(
        contents.adapter, where=f"adapter {directory}", hidden_size=hidden_size, prefix_shape=prefix_shape
    )
    return contents.adapter, AdapterInfo(directory, contents.num_file_bytes, manifest, _notes(contents))


def refuse_other_sizes(adapter: Folded, *, where: str, hidden_size: int, prefix_shape: PrefixShape | None) -> None:
    """
    Raises:
        AdapterError: the adapter does not fit a base of this hidden size and prefix shape; `where` is what the message
            names.
    """
    if isinstance(adapter, Prefix):
        if adapter.shape != prefix_shape:
            takes = "takes no prefix" if prefix_shape is None else f"has {prefix_shape}"
            raise AdapterError(
                f"{where} is a prefix of {adapter.shape} (layers, key heads, head size), this base "
                f"{takes}. The adapter belongs to another base: check base.model."
            )
    elif adapter.hidden_size != hidden_size:
        raise AdapterError(
            f"{where} has rows of {adapter.hidden_size} numbers, this base has a hidden size of "
            f"{hidden_size}. The adapter belongs to another base: check base.model."
        )


def verify(directory: Path) -> Manifest | None:
    """Check everything that can be checked without the base, the model card included.

    Returns:
        What peftscale.json says, or None for a directory of PEFT, of which less can be checked.

    Raises:
        AdapterError: as `load`, and any file that peftscale.json lists is missing or altered.
    """
    manifest = read(directory).manifest
    if manifest is not None:
        for name, digest in manifest.files.items():
            _checked_content(directories.current(directory) / name, digest)
    return manifest


def describe(directory: Path) -> Description:
    """Read an adapter for people. Raises what `verify` raises."""
    manifest = verify(directory)
    contents = read(directory)
    adapter = contents.adapter
    rows_PW = peft_format.flat(adapter.values.detach())
    norms_P = rows_PW.norm(dim=1)
    shape = adapter.shape if isinstance(adapter, Prefix) else None
    return Description(
        kind="prompt" if shape is None else "prefix",
        length=adapter.length,
        decoder_length=_decoder_length(adapter),
        hidden_size=None if isinstance(adapter, Prefix) else adapter.hidden_size,
        prefix=_dimensions(shape),
        num_file_bytes=contents.num_file_bytes,
        row_norm_mean=norms_P.mean().item(),
        row_norm_std=norms_P.std(correction=0).item(),
        base_model=manifest.base.model if manifest else None,
        base_revision=manifest.base.revision if manifest else None,
        base_digest=manifest.base.digest if manifest else None,
        task=manifest.task if manifest else None,
        more_tasks=manifest.more_tasks if manifest else (),
        run=manifest.run if manifest else None,
        step=manifest.step if manifest else None,
        metrics=manifest.metrics if manifest else None,
    )


def read(directory: Path) -> Contents:
    """All checks that need no base. Each file is read once, so what was checked is what is used.

    Raises:
        AdapterError: as `load`, but for another base.
    """
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
    values = peft_format.parse_weights(weights, header, where=str(here / WEIGHTS_FILE))
    adapter: Folded
    if header.prefix is None:
        adapter = SoftPrompt(values, decoder_length=header.decoder_length)
    else:
        adapter = Prefix(values, parts=header.prefix.parts)
    if manifest is not None:
        _refuse_other_header(manifest, header, adapter, where=str(manifest_path))
    return Contents(adapter, header, {CONFIG_FILE: config, WEIGHTS_FILE: weights}, manifest)


def _refuse_other_header(manifest: Manifest, header: Header, adapter: Folded, *, where: str) -> None:
    """The manifest must say what PEFT's two files say, of which the tensor was checked against the config."""
    hidden_size = None if isinstance(adapter, Prefix) else adapter.hidden_size
    said = (manifest.length, manifest.decoder_length, manifest.hidden_size, manifest.prefix)
    if said != (header.length, header.decoder_length, hidden_size, _dimensions(header.prefix)):
        size = f"prefix ({manifest.prefix})" if manifest.prefix else f"hidden_size {manifest.hidden_size}"
        more = f", decoder_length {manifest.decoder_length}" if manifest.decoder_length else ""
        raise AdapterError(
            f"{where}: says length {manifest.length}{more} and {size}, but the rows are "
            f"{list(adapter.values.shape)}. The file was altered: copy or save the adapter again."
        )
    if manifest.base.is_encoder_decoder != header.is_encoder_decoder:
        raise AdapterError(
            f"{where}: says base.is_encoder_decoder {manifest.base.is_encoder_decoder}, but {CONFIG_FILE} says "
            f"{header.is_encoder_decoder}. The file was altered: copy or save the adapter again."
        )


def _notes(contents: Contents) -> tuple[str, ...]:
    header = contents.header
    notes = []
    if header.num_submodules > 1:
        notes.append(
            f"{CONFIG_FILE} says num_transformer_submodules={header.num_submodules}: the first {header.length} rows "
            f"are the encoder's and are read; PEFT never used nor trained the others"
        )
    if contents.manifest is None:
        notes.append(f"base not verified (no {MANIFEST_FILE} beside the adapter)")
    return tuple(notes)


def _decoder_length(adapter: Folded) -> int:
    return adapter.decoder_length if isinstance(adapter, SoftPrompt) else 0


def named(adapter: Folded) -> str:
    """What the adapter is, in words for a message: 'a prefix'."""
    if isinstance(adapter, Prefix):
        return "a prefix of encoder, decoder and cross attention" if adapter.parts else "a prefix"
    return f"a prompt with {adapter.decoder_length} rows for a decoder" if adapter.decoder_length else "a prompt"


def _config_json(adapter: Folded, card: AdapterCard) -> bytes:
    base = card.base
    if isinstance(adapter, Prefix):
        return peft_format.prefix_config_json(
            length=adapter.length, shape=adapter.shape, model=base.model, revision=base.revision
        )
    return peft_format.config_json(
        length=adapter.length,
        hidden_size=adapter.hidden_size,
        num_layers=base.num_layers,
        num_attention_heads=base.num_attention_heads,
        model=base.model,
        revision=base.revision,
        is_encoder_decoder=base.is_encoder_decoder,
        decoder_length=adapter.decoder_length,
    )


def _dimensions(shape: PrefixShape | None) -> PrefixDimensions | None:
    return None if shape is None else PrefixDimensions(**shape._asdict())


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


def refuse_other_content(directory: Path) -> None:
    """Replacing a directory deletes what is in it, so it must be an adapter's, or empty.

    Raises:
        AdapterError: it is neither.
    """
    if not directory.exists() or (directory / CONFIG_FILE).exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise AdapterError(
            f"adapter {directory} is not saved: something that is no adapter stands there. Choose another place."
        )
