"""`peftscale.json`: what an adapter directory says about its adapter beyond what PEFT's files can hold.

The types of that file and their checks. Reading and writing directories is `adapters.files`, the text for
people is `adapters.model_card`.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor
from transformers import PretrainedConfig

import peftscale
from peftscale.adapters import peft_format
from peftscale.config import AdapterConfig, BaseConfig, TaskConfig
from peftscale.errors import AdapterError

MANIFEST_FILE = "peftscale.json"
FORMAT_VERSION = 1
_DIGEST = "digest"
_NOT_OF_THE_START = ("task", "more_tasks", "task_size_limit", "train")
RECORDED_PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes", "safetensors")

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # no path that could leave the directory


class Stored(BaseModel):
    """Frozen. Keys that a newer minor version may have added are passed over; `format_version` guards the meaning."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class BaseCard(Stored):
    """The frozen model that the adapter was trained on, and belongs to."""

    model: str
    revision: str | None
    """Of a hub id; None for a directory."""
    digest: str
    """Over the base's tensors. An adapter is refused on a base with another one."""
    num_layers: PositiveInt
    """Of the encoder, where there is one."""
    num_attention_heads: PositiveInt
    quantization: str
    compute_dtype: str
    is_encoder_decoder: bool = False

    @classmethod
    def of(cls, base: BaseConfig, digest: str, config: PretrainedConfig) -> Self:
        """The base of a run file, with its digest and its own config.json."""
        text = config.get_text_config()
        return cls(
            model=base.model,
            revision=None if Path(base.model).is_dir() else base.revision,
            digest=digest,
            num_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            quantization=base.quantization,
            compute_dtype=base.compute_dtype,
            is_encoder_decoder=config.is_encoder_decoder,
        )


class TaskTemplate(Stored):
    """How text is put to the base, without the place of the training data."""

    name: str
    each: dict[str, str] = {}
    input: str
    cue: str = ""
    target: str
    references: str | None = None
    group: str | None = None
    target_holds: str | None = None
    labels: dict[str, str] | None
    metrics: tuple[str, ...]
    max_text_tokens: PositiveInt | None
    cut: str = "start"
    max_target_tokens: PositiveInt

    @classmethod
    def of(cls, task: TaskConfig) -> Self:
        """The template of a run file's task."""
        return cls(**task.model_dump(include=set(cls.model_fields)))


class StartCard(Stored):
    """Where an adapter started: enough to make its start again."""

    settings: dict[str, JsonValue]
    """Its section of the run file without what it is trained on and how, and its seed."""
    norm: float
    """L2 norm of all its starting values: what is made again must have it."""

    @classmethod
    def of(cls, cfg: AdapterConfig, *, seed: int, values: Tensor) -> Self:
        """The start of an adapter of a run file; `values` are those that its first pass saw."""
        settings = cfg.model_dump(mode="json", exclude={*_NOT_OF_THE_START}) | {"seed": seed}
        return cls(settings=settings, norm=float(values.norm()))


class AdapterCard(Stored):
    """What the run knows about an adapter that it saves."""

    base: BaseCard
    task: TaskTemplate | None = None
    """Its own."""
    more_tasks: tuple[TaskTemplate, ...] = ()
    """That it was trained on beside its own."""
    mixture: dict[str, PositiveInt] = {}
    """Examples of each task in an epoch of them all, by name; empty where there was one task, or no epoch."""
    run: str | None
    """Name of the run; None where there was none, as in a script of the user's."""
    fingerprint: str | None
    """Of the run's resolved run file; None where there was none."""
    init: str
    """How it started, in the word of the run file. imported: it comes from another program, and the rest of the card is
    what the import was told."""
    start: StartCard | None = None
    """None where no run of ours started it."""
    step: NonNegativeInt
    """Training steps taken."""
    metrics: dict[str, float | None] = {}
    """Of the validation split at `step`; of several tasks their mean and `task/metric`. A value that is not finite is
    stored as null."""

    @property
    def task_names(self) -> str | None:
        """For people: `sst2`, or `sst2 + emotion`; None where no task is known."""
        return None if self.task is None else " + ".join(task.name for task in (self.task, *self.more_tasks))


class PrefixDimensions(Stored):
    """What a prefix and its base must agree on."""

    num_layers: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    parts: tuple[PositiveInt, ...] = ()
    """Layers of the encoder, of the decoder and of its cross attention; empty for a decoder-only base."""


class Manifest(AdapterCard):
    """The whole of `peftscale.json`."""

    format_version: Literal[1]
    kind: Literal["prompt", "prefix"]
    length: PositiveInt
    decoder_length: NonNegativeInt = 0
    """Rows of a prompt for the decoder's input, behind those of `length`."""
    hidden_size: PositiveInt | None
    """Of a prompt; null for a prefix."""
    prefix: PrefixDimensions | None = None
    """Of a prefix; null for a prompt."""
    versions: dict[str, str]
    files: dict[FileName, Digest]
    """Digest of every other file of the directory."""

    @model_validator(mode="after")
    def lists_the_files_that_are_read(self) -> Self:
        """A digest that is left out is a check that is left out."""
        missing = {peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE} - set(self.files)
        if missing:
            raise ValueError(f"files: no digest of {', '.join(sorted(missing))}")
        return self

    @model_validator(mode="after")
    def has_the_dimensions_of_its_kind(self) -> Self:
        is_prefix = self.kind == "prefix"
        if is_prefix != (self.prefix is not None) or is_prefix != (self.hidden_size is None):
            raise ValueError(f"kind: {self.kind!r} needs {'prefix' if is_prefix else 'hidden_size'} and nothing else")
        return self


def sealed(fields: Mapping[str, object]) -> bytes:
    """The file with these keys, and the digest of them all beside them."""
    return f"{json.dumps({**fields, _DIGEST: _digest(fields)}, indent=2, ensure_ascii=False)}\n".encode()


def parse(content: bytes, *, where: str) -> Manifest:
    """Read untrusted bytes; `where` is the path that messages name.

    Raises:
        AdapterError: not JSON, of a newer format, altered, or a key is missing or wrong. All problems at once.
    """
    fields = peft_format.json_object(content, where=where)
    if fields.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{where}: format_version is {fields.get('format_version')!r}; peftscale {peftscale.__version__} reads "
            f"{FORMAT_VERSION}. Read it with the version that wrote it (versions: {fields.get('versions')})."
        )
    if fields.get(_DIGEST, _digest(fields)) != _digest(fields):  # files of earlier versions have none
        raise AdapterError(
            f"{where}: altered. By its {_DIGEST} its keys gave {fields[_DIGEST]!r}, now they give {_digest(fields)}. "
            f"Copy or save the adapter again."
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
        raise AdapterError("\n".join([f"{where}: {len(problems)} problem(s)", *problems])) from error


def _digest(fields: Mapping[str, object]) -> str:
    """Of all keys but the digest's own, whatever their order and the blanks between them."""
    rest = {key: value for key, value in fields.items() if key != _DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def versions() -> dict[str, str]:
    """Versions of this package and of those that a result depends on, where they are installed."""
    found = {"peftscale": peftscale.__version__}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
