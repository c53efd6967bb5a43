"""The run file as types: frozen pydantic models, one for each section.

Reading a file, overrides and error messages are `configio`; what a value costs is `plan`. Nothing here
imports torch, so that a laptop can check a run file in milliseconds.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Quantization = Literal["nf4", "int8", "none"]
ComputeDtype = Literal["bfloat16", "float32"]
Sharding = Literal["auto", "replicated", "world"]
Metric = Literal["accuracy", "macro_f1", "exact_match"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Frozen(BaseModel):
    """A model that cannot be changed after it was checked, and that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BaseConfig(Frozen):
    """The frozen language model."""

    model: str
    """A directory with config.json, tokenizer and safetensors (taken relative to the run file), or a hub id."""
    revision: str = "main"
    """Branch, tag or commit of a hub id. Not used for a directory."""
    quantization: Quantization
    """How the linear weights are stored: nf4 about 0.52, int8 1, none 2 or 4 bytes a weight."""
    compute_dtype: ComputeDtype
    """The dtype of activations, embeddings, norms and head. Adapters are float32 always."""
    sharding: Sharding
    """replicated: a packed copy on every rank; world: a slice on every rank; auto: what `plan` finds better."""
    checkpoint_activations: bool
    """Keep one activation a block and compute the rest again in backward: less memory, about a third more time."""
    pack_dir: Path | None = None
    """A directory written by `peftscale pack`. Without it the base is packed once into the user's cache."""


class SoftPromptConfig(Frozen):
    """One trainable matrix in front of the input embeddings (Lester et al. 2021, section 2)."""

    kind: Literal["prompt"]
    length: PositiveInt
    """Virtual tokens, P. The saved file is P * H * 4 bytes and a header: 1.6 MB for P=100, H=4096."""
    init: Literal["random", "vocabulary", "text", "labels"]
    """Where the rows start: U(-0.5, 0.5), frequent embeddings, an embedded sentence, embedded label words."""
    init_text: str | None = None
    """The sentence, repeated or cut to `length` tokens. Required by init='text', refused otherwise."""
    init_labels: tuple[str, ...] = ()
    """Label words, one row each. Required by init='labels', refused otherwise."""
    init_top: PositiveInt = 5000
    """Sampled rows are drawn among token ids 0 .. init_top-1, the most frequent ones (cut to the vocabulary)."""
    seed: NonNegativeInt | None = None
    """Of this adapter's start and order of examples; the run's `seed` where it is left out."""

    @model_validator(mode="after")
    def text_exactly_when_asked_for(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError(
                f"init_text: must be given exactly when init is 'text'; got init={self.init!r} and "
                f"{'no init_text' if self.init_text is None else 'an init_text'}"
            )
        return self

    @model_validator(mode="after")
    def labels_exactly_when_asked_for(self) -> Self:
        if (self.init == "labels") != bool(self.init_labels):
            raise ValueError(
                f"init_labels: must be given exactly when init is 'labels'; "
                f"got init={self.init!r} and {len(self.init_labels)} label(s)"
            )
        return self


AdapterConfig = SoftPromptConfig


class DataFiles(Frozen):
    """Local files of one data set: jsonl, csv or parquet, by their suffix."""

    train: Path
    validation: Path
    test: Path | None = None


class HubData(Frozen):
    """A data set of the hub, in splits called train, validation and (optional) test."""

    path: str
    subset: str | None = None
    revision: str = "main"
    train: str = "train"
    """Name of the split, slices allowed: train[:90%]."""
    validation: str = "validation"
    test: str | None = None


class TaskConfig(Frozen):
    """Text in, text out: which columns make the text that is read and the text that is to be written."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Used in reports and kept with the adapter."""
    files: DataFiles | None = None
    hub: HubData | None = None
    input: str
    """Jinja template over the columns: the text that the base reads."""
    target: str
    """Jinja template over the columns: the text to be written, or the key into `labels`."""
    labels: dict[str, str] | None = None
    """Rendered target -> the words that stand for it. Given: classification by the likelihood of those words.
    Left out: the target itself is written by greedy generation."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """The first one decides which adapter is the best."""
    max_text_tokens: PositiveInt | None = None
    """Longer inputs lose their first tokens, and the run says how many were cut. Left out: they are refused."""
    max_target_tokens: PositiveInt = 64
    """Longest text that is generated. Unit: tokens."""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if (self.files is None) == (self.hub is None):
            raise ValueError("files, hub: exactly one of the two must be given")
        return self

    @model_validator(mode="after")
    def metrics_fit_the_target(self) -> Self:
        if self.labels is None:
            wrong = [metric for metric in self.metrics if metric != "exact_match"]
            if wrong:
                raise ValueError(
                    f"metrics: {', '.join(wrong)} need(s) `labels`; a generated text is scored by exact_match"
                )
        elif len(self.labels) < 2 or len(set(self.labels.values())) != len(self.labels):
            raise ValueError(f"labels: need at least two different words, got {list(self.labels.values())}")
        return self


class TrainConfig(Frozen):
    """How the adapters are trained."""

    steps: PositiveInt
    examples_per_step: PositiveInt
    """Over all ranks and micro-batches: the number of workers never changes it."""
    microbatch_tokens: PositiveInt
    """Most tokens, prompts and padding included, in one pass of one rank. It bounds memory, not the result."""
    packing: Literal["auto", "off"] = "auto"
    """auto: one row of all prompts and texts, each prompt computed once, where that is exact for the base (it is
    checked); off: one padded row an example, the reference."""
    optimizer: Literal["adamw", "adafactor"]
    """adafactor is the recipe of Lester et al. 2021: no parameter scaling, not factored, update clipped at RMS 1."""
    learning_rate: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """adamw: multiplied by the rate, as in torch. adafactor: not multiplied by it, as in T5X (1e-5 there)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after warm-up, down to zero at `steps` for linear and cosine."""
    warmup_steps: NonNegativeInt = 0
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of one adapter's gradient."""
    evaluate_every: PositiveInt
    """Steps between evaluations on the validation split. There is one before the first step and one at the end too."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints. There is always one at the end."""
    keep_checkpoints: PositiveInt = 2
    early_stop: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better first metric."""
    max_nonfinite_steps: PositiveInt = 10
    """A step with a non-finite loss or gradient changes nothing and is counted; so many in a row end the run."""

    @model_validator(mode="after")
    def warm_up_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: must be less than steps={self.steps}, got {self.warmup_steps}")
        return self


class ClusterConfig(Frozen):
    """What Ray is asked for."""

    workers: NonNegativeInt
    """Ranks. 0: in this process (or the ranks of torchrun), without Ray."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: PositiveFloat = 1
    """Fractions are allowed: Ray counts them, it does not enforce them."""
    storage: Path
    """Where runs are kept, as <storage>/<name>. Shared by all nodes. Taken relative to the run file."""
    retries: NonNegativeInt = 3
    """How often a dead worker group is started again from the last checkpoint."""


class RunConfig(Frozen):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's directory in the storage. A name is used once."""
    seed: NonNegativeInt
    base: BaseConfig
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], AdapterConfig] = Field(min_length=1)
    task: TaskConfig
    train: TrainConfig
    cluster: ClusterConfig
    track: tuple[Tracker, ...] = ()
    """Trackers beside metrics.jsonl, which is always written."""

    def adapter_seed(self, name: str) -> int:
        """The seed of one adapter: its own, or the run's."""
        own = self.adapters[name].seed
        return self.seed if own is None else own

    @property
    def run_dir(self) -> Path:
        """Where everything of this run is kept."""
        return self.cluster.storage / self.name
