"""The packed base: one safetensors file with a blob per linear, and a manifest with the base's digest.

Reads the original weights one tensor at a time and writes each packed tensor at once, so that packing needs
the memory of one tensor whatever the size of the model. A rank later reads only the bytes of its slice:
that is `base.load`. Packs are kept in a cache, made by the first process that asks and waited for by the
others through a file lock, not through a collective (packing 405B takes longer than any time-out).

The digest names the original weights, not the packing: it is taken over the sha256 of each source tensor in
name order, so an adapter may be moved between quantisations of one base and never to another base.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from peftscale import facts, machine
from peftscale.base.linear import pack_weight
from peftscale.base.skeleton import Entry, Skeleton
from peftscale.config import Quantization
from peftscale.errors import ModelError

FORMAT = 1
_STALE_S = 3600.0
WEIGHTS, MANIFEST = "base.safetensors", "manifest.json"
_DTYPE_NAMES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}


class Source(Protocol):
    """Where original weights come from."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by its name."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        ...


class SafetensorsSource:
    """The safetensors files of a model directory, one file or an index over several."""

    def __init__(self, model_dir: Path) -> None:
        self._headers = facts.headers(facts.source_files(model_dir))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(header.shape) for name, header in self._headers.items()}

    def read(self, name: str) -> Tensor:
        with safe_open(self._headers[name].file, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class PackedBase:
    """A packed directory, opened for reading slices."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ModelError: not a pack, of another format, or cut.
        """
        self.directory = directory
        try:
            self.manifest = json.loads((directory / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"base.pack_dir={directory} has no readable {MANIFEST} ({error}). Make it with `peftscale pack`."
            ) from error
        if self.manifest.get("format") != FORMAT:
            raise ModelError(
                f"base.pack_dir={directory} has format {self.manifest.get('format')!r}, this version reads {FORMAT}. "
                f"Pack the base again with `peftscale pack`."
            )
        self._extents = facts.headers([directory / WEIGHTS])

    @property
    def digest(self) -> str:
        """'sha256:...' over the original weights."""
        return str(self.manifest["digest"])

    def check(self, skeleton: Skeleton, quantization: Quantization, config_sha256: str) -> None:
        """Refuse a pack of another model, quantisation, or layout.

        Raises:
            ModelError: says what differs.
        """
        for key, want in (("quantization", quantization), ("config_sha256", config_sha256)):
            if self.manifest.get(key) != want:
                raise ModelError(
                    f"{self.directory} was packed with {key}={self.manifest.get(key)}, the run file asks for {want}. "
                    f"Pack the base again with `peftscale pack`, or leave base.pack_dir out."
                )
        for entry in skeleton.entries:
            extent = self._extents.get(entry.name)
            have = None if extent is None else (extent.dtype, tuple(extent.shape))
            want_layout = (_DTYPE_NAMES[entry.dtype], entry.shape)
            if have != want_layout:
                raise ModelError(
                    f"{self.directory} holds {entry.name} as {have}, expected {want_layout}. "
                    f"Pack the base again with `peftscale pack` (base.compute_dtype may have changed)."
                )

    def read_into(self, name: str, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of tensor `name` from byte `begin` on; what lies past its end becomes 0."""
        extent = self._extents[name]
        available = max(0, min(len(buffer), extent.end - extent.begin - begin))
        with open(extent.file, "rb", buffering=0) as file:
            file.seek(extent.begin + begin)
            filled = 0
            while filled < available:
                count = file.readinto(buffer[filled:available])
                if not count:
                    raise ModelError(f"{extent.file} ended inside {name}. Pack the base again with `peftscale pack`.")
                filled += count
        buffer[available:] = bytes(len(buffer) - available)


def cache_dir() -> Path:
    """Where packs are kept: $PEFTSCALE_CACHE, or the user's cache directory."""
    return machine.cache_dir() / "packs"


def cached(model_dir: Path, *, quantization: Quantization, compute_dtype: torch.dtype) -> Path:
    """Where the cached pack of a model is, or would be."""
    dtype = str(compute_dtype).removeprefix("torch.")
    return cache_dir() / facts.source_key(model_dir, quantization, dtype, f"{FORMAT} {version('bitsandbytes')}")


def ensure(model_dir: Path, skeleton: Skeleton, *, quantization: Quantization, compute_dtype: torch.dtype) -> Path:
    """The cached pack of a model, made now if it is not there. Safe when several processes ask at once.

    Raises:
        ModelError: the weights are missing, cut, pickled, or do not fit the config.
    """
    directory = cached(model_dir, quantization=quantization, compute_dtype=compute_dtype)
    if (directory / MANIFEST).exists():
        return directory
    with writable(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not (directory / MANIFEST).exists():
                _clear(directory)
                write(
                    skeleton,
                    SafetensorsSource(model_dir),
                    directory,
                    quantization=quantization,
                    config_sha256=config_sha256(model_dir),
                )
    return directory


@contextmanager
def writable(directory: Path) -> Iterator[None]:
    """Say, of a disk that is full or closed, what was to be written there and where else it may go.

    Raises:
        ModelError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"the packed base cannot be written to {directory}: {error.strerror or error}. Make room, or choose "
            f"another place: the environment variable PEFTSCALE_CACHE, or `peftscale pack --out` and base.pack_dir."
        ) from error


def config_sha256(model_dir: Path) -> str:
    """Identity of the config that a pack belongs to."""
    return hashlib.sha256((model_dir / "config.json").read_bytes()).hexdigest()


def write(
    skeleton: Skeleton,
    source: Source,
    directory: Path,
    *,
    quantization: Quantization,
    config_sha256: str,
    progress: Callable[[str], None] = lambda _: None,
) -> str:
    """Pack a base into `directory`, which appears whole or not at all. Returns the digest.

    Raises:
        ModelError: a tensor is missing in `source` or has another shape.
    """
    names = _match_names(skeleton, source.shapes())
    _refuse_untied(skeleton, source)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        hashes: dict[str, str] = {}
        with open(temporary / WEIGHTS, "wb") as file:
            _write_header(file, skeleton.entries)
            for entry in skeleton.entries:
                original = source.read(names[entry.source])
                hashes[entry.source] = _sha256(original)
                file.write(raw_bytes(_packed(original, entry, quantization)))
                progress(entry.name)
            file.flush()
            os.fsync(file.fileno())
        listing = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
        digest = f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"
        manifest = {
            "format": FORMAT,
            "digest": digest,
            "quantization": quantization,
            "config_sha256": config_sha256,
            "bitsandbytes": version("bitsandbytes"),
            "source_sha256": hashes,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _put(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return digest


def _clear(directory: Path) -> None:
    """Remove what packers that were killed left, and what stands in the place of a pack and is none."""
    shutil.rmtree(directory, ignore_errors=True)
    for left in directory.parent.glob(f".{directory.name}-*"):
        # One that is at work elsewhere, where this lock is not seen, writes all the time.
        if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _put(temporary: Path, directory: Path) -> None:
    """Rename what was packed into place. Where a machine whose lock is not seen here was faster, its pack stays."""
    try:
        os.rename(temporary, directory)
    except OSError:
        if not (directory / MANIFEST).exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def read_dense(skeleton: Skeleton, source: Source, name: str) -> Tensor:
    """One tensor of the original weights that is not quantised, as `write` would store it; `name` is the skeleton's.

    Raises:
        ModelError: the weights do not fit the config.
    """
    (entry,) = (entry for entry in skeleton.entries if entry.name == name)
    assert not entry.is_blob
    return _packed(source.read(_match_names(skeleton, source.shapes())[entry.source]), entry, "none")


def _packed(original: Tensor, entry: Entry, quantization: Quantization) -> Tensor:
    weight = original.T if entry.is_transposed else original
    return pack_weight(weight, quantization) if entry.is_blob else weight.to(entry.dtype).contiguous()


def _match_names(skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Model name -> checkpoint name. A checkpoint may lack or add the base model's prefix, and some families have other
    names on disk than in memory (the head of Pythia is embed_out): transformers knows which."""
    renamings = [t for t in get_model_conversion_mapping(skeleton.model) if isinstance(t, WeightRenaming)]
    prefix, known = skeleton.model.base_model_prefix or None, {entry.source: True for entry in skeleton.entries}
    on_disk = {rename_source_key(name, renamings, [], prefix, known)[0]: name for name in shapes}
    names = {}
    tied: dict[str, str] = getattr(skeleton.model, "_tied_weights_keys", None) or {}
    for entry in skeleton.entries:
        # A T5 v1.1 that was saved while its head was tied holds that under the embedding's name alone.
        found = on_disk.get(entry.source) or on_disk.get(tied.get(entry.source, ""))
        if found is None:
            raise ModelError(
                f"the base's weights have no tensor {entry.source} of shape {entry.source_shape}; "
                f"they hold {len(shapes)} tensors such as {next(iter(shapes), 'none')}. "
                f"Give a checkpoint that belongs to this config.json."
            )
        if shapes[found] != entry.source_shape:
            raise ModelError(
                f"the base's tensor {found} has shape {shapes[found]}, its config.json asks for {entry.source_shape}. "
                f"Give a checkpoint that belongs to this config.json."
            )
        names[entry.source] = found
    return names


def _refuse_untied(skeleton: Skeleton, source: Source) -> None:
    """Refuse a checkpoint that holds a head of its own where the model takes its embedding for it: transformers would
    use both, and a prompt trained here would belong to another model."""
    weight, there = skeleton.model.get_output_embeddings().weight, source.shapes()
    names = [n for n, p in skeleton.model.named_parameters(remove_duplicate=False) if p is weight and n in there]
    if len(names) > 1 and len({_sha256(source.read(name)) for name in names}) > 1:
        raise ModelError(
            f"the base's weights hold {' and '.join(names)}, which differ, but by its config.json they are one tensor "
            f"(tie_word_embeddings). Set it to false there, or give a checkpoint that belongs to this config.json."
        )


def _write_header(file: BinaryIO, entries: tuple[Entry, ...]) -> None:
    """The safetensors header: 8 bytes of length, then JSON with name, dtype, shape and offsets."""
    header, at = {}, 0
    for entry in entries:
        size = entry.dtype.itemsize
        for extent in entry.shape:
            size *= extent
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; of its own storage, to be written to, where it is contiguous."""
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _sha256(tensor: Tensor) -> str:
    """Of dtype, shape and bytes, so that a cast or a reshape is another base."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    hasher.update(raw_bytes(tensor))
    return hasher.hexdigest()
