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
Optimizer = Literal["adamw", "adafactor"]
Schedule = Literal["constant", "linear", "cosine"]
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
    optimizer: Optimizer
    """adafactor is the recipe of Lester et al. 2021: no parameter scaling, not factored, update clipped at RMS 1."""
    learning_rate: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """adamw: multiplied by the rate, as in torch. adafactor: not multiplied by it, as in T5X (1e-5 there)."""
    schedule: Schedule = "constant"
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
    """A step with a non-finite loss or gradient changes nothing and is counted; so many in a row stop the adapter."""

    @model_validator(mode="after")
    def warm_up_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: must be less than steps={self.steps}, got {self.warmup_steps}")
        return self


class AdapterTrainConfig(Frozen):
    """What one adapter does otherwise than the run's `train`. A key that is left out is the run's.

    What belongs to a pass or to the whole run (micro-batches, packing, checkpoints) has no key here.
    """

    steps: PositiveInt | None = None
    """The adapter leaves the cohort when they are taken; the others go on."""
    examples_per_step: PositiveInt | None = None
    optimizer: Optimizer | None = None
    learning_rate: PositiveFloat | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    schedule: Schedule | None = None
    warmup_steps: NonNegativeInt | None = None
    clip_norm: Annotated[float, Field(ge=0)] | None = None
    """0: not clipped, whatever the run's is."""
    evaluate_every: PositiveInt | None = None
    early_stop: NonNegativeInt | None = None
    """0: never stopped early, whatever the run's is."""


class AdapterSettings(Frozen):
    """What every kind of adapter has.

    In a run file each key of an adapter but `kind` and `task`, and each key of its `train`, may be a list: the
    adapter then stands for the product of the lists, one adapter each, named by what varies (`sst2-p5-s0`).
    """

    seed: NonNegativeInt | None = None
    """Of this adapter's start and order of examples; the run's `seed` where it is left out."""
    task: TaskConfig | None = None
    """Its own task; the run's where it is left out."""
    train: AdapterTrainConfig | None = None
    """What it does otherwise than the run's `train`."""


def _require_text_exactly_when_asked_for(init: str, init_text: str | None) -> None:
    """`init_text` belongs to one kind of start, whatever the adapter is."""
    if (init == "text") != (init_text is not None):
        raise ValueError(
            f"init_text: must be given exactly when init is 'text'; got init={init!r} and "
            f"{'no init_text' if init_text is None else 'an init_text'}"
        )


class SoftPromptConfig(AdapterSettings):
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

    @model_validator(mode="after")
    def text_exactly_when_asked_for(self) -> Self:
        _require_text_exactly_when_asked_for(self.init, self.init_text)
        return self

    @model_validator(mode="after")
    def labels_exactly_when_asked_for(self) -> Self:
        if (self.init == "labels") != bool(self.init_labels):
            raise ValueError(
                f"init_labels: must be given exactly when init is 'labels'; "
                f"got init={self.init!r} and {len(self.init_labels)} label(s)"
            )
        return self


class PrefixConfig(AdapterSettings):
    """Trainable keys and values in front of those of every attention layer (Li and Liang 2021)."""

    kind: Literal["prefix"]
    length: PositiveInt
    """Virtual tokens, P. The saved file is 2 * P * layers * key heads * head size * 4 bytes and a header."""
    init: Literal["random", "zero", "text"]
    """Where keys and values start: N(0, 1), zeros, or those that the base computes for a text."""
    init_text: str | None = None
    """The text, repeated or cut to `length` tokens. Required by init='text', refused otherwise."""
    reparam: Literal["none", "mlp"] = "none"
    """mlp: keys and values are what a small network makes of trained vectors; it is folded when the adapter is saved
    and stays in the checkpoint."""
    reparam_hidden_size: PositiveInt | None = None
    """Hidden size of that network (512 and 800 in the paper). Required by reparam='mlp', refused otherwise."""

    @model_validator(mode="after")
    def text_exactly_when_asked_for(self) -> Self:
        _require_text_exactly_when_asked_for(self.init, self.init_text)
        return self

    @model_validator(mode="after")
    def network_exactly_when_asked_for(self) -> Self:
        if (self.reparam == "mlp") != (self.reparam_hidden_size is not None):
            raise ValueError(
                f"reparam_hidden_size: must be given exactly when reparam is 'mlp'; got reparam={self.reparam!r} and "
                f"{'no size' if self.reparam_hidden_size is None else self.reparam_hidden_size}"
            )
        if self.reparam == "mlp" and self.init == "text":
            raise ValueError(
                "init: 'text' gives keys and values, which the network of reparam='mlp' cannot start at; "
                "set reparam to 'none' or init to 'random' or 'zero'"
            )
        return self


AdapterConfig = Annotated[SoftPromptConfig | PrefixConfig, Field(discriminator="kind")]


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
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], AdapterConfig] = Field(min_length=1)
    """Trained together over the one base, each as if alone. Keys may be lists: see AdapterSettings. A dot in a name
    comes from such a product; a name that is typed has none."""
    task: TaskConfig
    train: TrainConfig
    cluster: ClusterConfig
    track: tuple[Tracker, ...] = ()
    """Trackers beside metrics.jsonl, which is always written."""

    @model_validator(mode="after")
    def prefixes_are_packed(self) -> Self:
        if self.train.packing == "off":
            wrong = [
                f"adapters.{name}.kind: a prefix needs packed passes, got train.packing='off'; set that to 'auto', or "
                f"kind to 'prompt'"
                for name, adapter in self.adapters.items()
                if adapter.kind == "prefix"
            ]
            if wrong:
                raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def every_warm_up_ends(self) -> Self:
        wrong = []
        for name in self.adapters:
            of_adapter = self.adapter_train(name)
            if of_adapter.warmup_steps >= of_adapter.steps:
                wrong.append(
                    f"adapters.{name}.train: warmup_steps={of_adapter.warmup_steps} must be less than "
                    f"steps={of_adapter.steps}; what is not given there is the run's"
                )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def adapter_seed(self, name: str) -> int:
        """The seed of one adapter: its own, or the run's."""
        own = self.adapters[name].seed
        return self.seed if own is None else own

    def adapter_task(self, name: str) -> TaskConfig:
        """The task of one adapter: its own, or the run's."""
        return self.adapters[name].task or self.task

    def adapter_train(self, name: str) -> TrainConfig:
        """How one adapter is trained: the run's `train` with what the adapter has otherwise."""
        own = self.adapters[name].train
        if own is None:
            return self.train
        changes = {key: value for key, value in own if value is not None}
        for key in ("clip_norm", "early_stop"):
            if changes.get(key) == 0:
                changes[key] = None
        return self.train.model_copy(update=changes)

    @property
    def num_steps(self) -> int:
        """Steps of the cohort: until its last adapter has taken its own."""
        return max(self.adapter_train(name).steps for name in self.adapters)

    @property
    def run_dir(self) -> Path:
        """Where everything of this run is kept."""
        return self.cluster.storage / self.name

    @property
    def metrics_path(self) -> Path:
        """Every step, evaluation and note, a line each."""
        return self.run_dir / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """Written when the run has ended."""
        return self.run_dir / "summary.json"

    @property
    def checkpoints_dir(self) -> Path:
        """step-N, step-M, ..."""
        return self.run_dir / "checkpoints"

    @property
    def adapters_dir(self) -> Path:
        """NAME/best and NAME/last of every adapter."""
        return self.run_dir / "adapters"
