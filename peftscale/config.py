"""The run file as types: frozen pydantic models, one for each section.

Reading a file, overrides and error messages are `configio`; what a value costs is `plan`. Nothing here
imports torch, so that a laptop can check a run file in milliseconds.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from peftscale import machine
from peftscale.baseline_config import FewShotConfig, FullFinetuningConfig, LoraConfig, Method
from peftscale.deploy_config import DeployConfig
from peftscale.task_config import DataFiles as DataFiles
from peftscale.task_config import HubData as HubData
from peftscale.task_config import Metric as Metric
from peftscale.task_config import TaskConfig as TaskConfig
from peftscale.train_config import AdapterTrainConfig as AdapterTrainConfig
from peftscale.train_config import Frozen as Frozen
from peftscale.train_config import Loss as Loss
from peftscale.train_config import Optimizer as Optimizer
from peftscale.train_config import OptimizerConfig as OptimizerConfig
from peftscale.train_config import Schedule as Schedule
from peftscale.train_config import TrainConfig as TrainConfig

Quantization = Literal["nf4", "int8", "none"]
ComputeDtype = Literal["bfloat16", "float32"]
Sharding = Literal["auto", "replicated", "node", "world"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
COLLECTIVE_TIMEOUT_S = 1800.0
_STORE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://(?!\.)[A-Za-z0-9][\w.-]*(/(?!\.)[\w.=+-]+)*")
MEAN_OF_TASKS = "mean_of_tasks"
"""What decides which state of an adapter of several tasks is the best: the mean of their first metrics."""


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
    """replicated: a packed copy on every rank; node: a slice on every rank of a node, so that no weight crosses the
    network; world: a slice on every rank of all; auto: what `plan` finds better."""
    checkpoint_activations: bool
    """Keep one activation a block and compute the rest again in backward: less memory, about a third more time."""
    pack_dir: Path | None = None
    """A directory written by `peftscale pack`. Without it the base is packed once into the user's cache."""


class AdapterSettings(Frozen):
    """What every kind of adapter has.

    In a run file each key of an adapter but `kind`, `task` and `more_tasks`, and each key of its `train`, may be a
    list: the adapter then stands for the product of the lists, one adapter each, named by what varies (`sst2-p5-s0`).
    """

    seed: NonNegativeInt | None = None
    """Of this adapter's start and order of examples; the run's `seed` where it is left out."""
    task: TaskConfig | None = None
    """Its own task; the run's where it is left out."""
    more_tasks: tuple[TaskConfig, ...] = ()
    """Tasks that it is trained on beside its own, in proportion to their training examples: a source prompt (SPoT). The
    mean of each one's first metric decides which state is the best."""
    task_size_limit: PositiveInt | None = None
    """Most examples that one of these tasks gives to an epoch of them all; further epochs go on through its others.
    Left out: all. Refused without `more_tasks`."""
    train: AdapterTrainConfig | None = None
    """What it does otherwise than the run's `train`."""

    @model_validator(mode="after")
    def limit_belongs_to_a_mixture(self) -> Self:
        if self.task_size_limit is not None and not self.more_tasks:
            raise ValueError(
                f"task_size_limit: is for a mixture, and there are no more_tasks beside its own; leave it out, got "
                f"{self.task_size_limit}"
            )
        return self

    def seed_in(self, of_run: int) -> int:
        """Its own seed, or the run's."""
        return of_run if self.seed is None else self.seed


def _require_text_exactly_when_asked_for(init: str, init_text: str | None) -> None:
    """`init_text` belongs to one kind of start, whatever the adapter is."""
    if (init == "text") != (init_text is not None):
        raise ValueError(
            f"init_text: must be given exactly when init is 'text'; got init={init!r} and "
            f"{'no init_text' if init_text is None else 'an init_text'}"
        )


def _require_adapter_exactly_when_asked_for(init: str, init_adapter: Path | None, reparam: str) -> None:
    """`init_adapter` belongs to one kind of start, which no network can begin at."""
    if (init == "adapter") != (init_adapter is not None):
        raise ValueError(
            f"init_adapter: must be given exactly when init is 'adapter'; got init={init!r} and "
            f"{'no init_adapter' if init_adapter is None else 'an init_adapter'}"
        )
    if init == "adapter" and reparam != "none":
        raise ValueError(
            f"init: 'adapter' gives the values to start at, which the network of reparam={reparam!r} would change; set "
            f"reparam to 'none' or choose another init"
        )


def _require_network_exactly_when_asked_for(network: str, reparam: str, hidden_size: int | None) -> None:
    """`reparam_hidden_size` belongs to the one network that the kind of adapter knows."""
    if (reparam == network) != (hidden_size is not None):
        raise ValueError(
            f"reparam_hidden_size: must be given exactly when reparam is {network!r}; got reparam={reparam!r} and "
            f"{'no size' if hidden_size is None else hidden_size}"
        )


class SoftPromptConfig(AdapterSettings):
    """One trainable matrix in front of the input embeddings (Lester et al. 2021, section 2)."""

    kind: Literal["prompt"]
    length: PositiveInt
    """Virtual tokens, P. The saved file is P * H * 4 bytes and a header: 1.6 MB for P=100, H=4096."""
    decoder_length: NonNegativeInt = 0
    """Virtual tokens in front of the decoder's input too, beside those of the encoder's. Encoder-decoder bases only."""
    init: Literal["random", "scaled", "vocabulary", "text", "labels", "adapter"]
    """Where the rows start: U(-0.5, 0.5) as in the paper, normal with mean and deviation of the frequent embeddings,
    frequent embeddings, an embedded sentence, embedded label words, another prompt (SPoT)."""
    init_text: str | None = None
    """The sentence, repeated or cut to `length` tokens. Required by init='text', refused otherwise."""
    init_labels: tuple[str, ...] = ()
    """Label words, one row each. Required by init='labels', refused otherwise."""
    init_top: PositiveInt = 5000
    """Sampled rows are drawn among token ids 0 .. init_top-1, the most frequent ones (cut to the vocabulary)."""
    init_adapter: Path | None = None
    """The directory of a prompt of the same base, cut or repeated from its first row on to `length` rows. Required by
    init='adapter', refused otherwise."""
    reparam: Literal["none", "residual"] = "none"
    """residual: rows are trained vectors and what a small network adds to them (Razdaibiedina et al. 2023); folded when
    the adapter is saved, kept in the checkpoint."""
    reparam_hidden_size: PositiveInt | None = None
    """Hidden size of that network. Required by reparam='residual', refused otherwise."""

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

    @model_validator(mode="after")
    def adapter_exactly_when_asked_for(self) -> Self:
        _require_adapter_exactly_when_asked_for(self.init, self.init_adapter, self.reparam)
        return self

    @model_validator(mode="after")
    def network_exactly_when_asked_for(self) -> Self:
        _require_network_exactly_when_asked_for("residual", self.reparam, self.reparam_hidden_size)
        return self


class PrefixConfig(AdapterSettings):
    """Trainable keys and values in front of those of every attention layer (Li and Liang 2021)."""

    kind: Literal["prefix"]
    length: PositiveInt
    """Virtual tokens, P. The saved file is 2 * P * layers * key heads * head size * 4 bytes and a header."""
    init: Literal["random", "zero", "text", "adapter"]
    """Where keys and values start: N(0, 1), zeros, those that the base computes for a text, another prefix (SPoT)."""
    init_text: str | None = None
    """The text, repeated or cut to `length` tokens. Required by init='text', refused otherwise."""
    init_adapter: Path | None = None
    """The directory of a prefix of the same base, cut or repeated from its first token on to `length` tokens. Required
    by init='adapter', refused otherwise."""
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
    def adapter_exactly_when_asked_for(self) -> Self:
        _require_adapter_exactly_when_asked_for(self.init, self.init_adapter, self.reparam)
        return self

    @model_validator(mode="after")
    def network_exactly_when_asked_for(self) -> Self:
        _require_network_exactly_when_asked_for("mlp", self.reparam, self.reparam_hidden_size)
        if self.reparam == "mlp" and self.init == "text":
            raise ValueError(
                "init: 'text' gives keys and values, which the network of reparam='mlp' cannot start at; "
                "set reparam to 'none' or init to 'random' or 'zero'"
            )
        return self


AdapterConfig = Annotated[SoftPromptConfig | PrefixConfig, Field(discriminator="kind")]
AdapterConfigs = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], AdapterConfig], Field(min_length=1)
]
"""By name, which is the name of a directory too."""


def refuse_endless_warm_ups(adapters: Mapping[str, AdapterSettings], of_run: OptimizerConfig) -> None:
    """Check what adapters have for themselves together with what is the run's.

    Raises:
        ValueError: a line for each adapter whose warm-up would not end. For a validator.
    """
    wrong = []
    for name, adapter in adapters.items():
        train = of_run if adapter.train is None else adapter.train.over(of_run)
        if train.warmup_steps >= train.steps:
            wrong.append(
                f"adapters.{name}.train: warmup_steps={train.warmup_steps} must be less than steps={train.steps}; what "
                f"is not given there is the run's"
            )
    if wrong:
        raise ValueError("\n".join(wrong))


def refuse_what_no_optimizer_uses(
    adapters: Mapping[str, AdapterConfig],
    of_run: OptimizerConfig,
    baselines: Mapping[str, AdapterTrainConfig | None],
    *,
    of_run_in: str,
) -> None:
    """Check keys that some optimizers use alone: what adapters or baselines have for themselves each of them must use,
    and what is the run's one of them, whatever the method is.

    Args:
        adapters: of the run.
        of_run: what they share.
        baselines: name of a section -> what it has otherwise.
        of_run_in: where the run's keys stand, for messages.

    Raises:
        ValueError: a line for each key without a use. For a validator.
    """
    users = [(f"adapters.{name}.", adapter.train, adapter.reparam != "none") for name, adapter in adapters.items()]
    users += [(f"{name}.", own, False) for name, own in baselines.items()]
    adamw = [(of_run if own is None else own.over(of_run)).optimizer == "adamw" for _, own, _ in users]
    rate = "is the rate of a re-parametrised adapter's network, and there is none; set reparam or leave it out, got"
    epsilon = "is AdamW's, and what would use it has adafactor; set optimizer to 'adamw' or leave it out, got"
    wrong = []
    for (where, own, has_network), is_adamw in zip(users, adamw, strict=True):
        if own is not None and own.network_learning_rate is not None and not has_network:
            wrong.append(f"{where}train.network_learning_rate: {rate} {own.network_learning_rate:g}")
        if own is not None and own.adam_epsilon is not None and not is_adamw:
            wrong.append(f"{where}train.adam_epsilon: {epsilon} {own.adam_epsilon:g}")
    if of_run.network_learning_rate is not None and not any(has_network for _, _, has_network in users):
        wrong.append(f"{of_run_in}network_learning_rate: {rate} {of_run.network_learning_rate:g}")
    if of_run.adam_epsilon is not None and not any(adamw):
        wrong.append(f"{of_run_in}adam_epsilon: {epsilon} {of_run.adam_epsilon:g}")
    if wrong:
        raise ValueError("\n".join(wrong))


def is_url(place: str) -> bool:
    """Whether a place is one of an object store, and no directory."""
    return "://" in place


class ClusterConfig(Frozen):
    """What Ray is asked for."""

    workers: NonNegativeInt | tuple[PositiveInt, PositiveInt]
    """Ranks. 0: in this process (or the ranks of torchrun), without Ray. [least, most]: elastic, as many as there is
    room for; a run that loses some goes on with the others and takes on new ones, with the same global batch."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: PositiveFloat = 1
    """Fractions are allowed: Ray counts them, it does not enforce them."""
    storage: str
    """Where runs are kept, as <storage>/<name>: a directory that all nodes see (taken relative to the run file), or the
    URL of an object store (s3://bucket/prefix, gs://, abfs://), of which each machine has working copies in its cache.
    Endpoint and credentials are the environment's."""
    retries: NonNegativeInt = 3
    """How often a dead worker group is started again from the last checkpoint."""
    collective_timeout_s: PositiveFloat = COLLECTIVE_TIMEOUT_S
    """How long a rank waits for another one that hangs, before the group is started again. Ranks wait for each other at
    every gather, and while one of them saves, or packs its node's copy of the base."""
    deploy: DeployConfig | None = None
    """What `peftscale render` needs beside the keys above."""

    @field_validator("workers", mode="before")
    @classmethod
    def workers_are_a_number_or_two(cls, workers: Any) -> Any:
        is_list = isinstance(workers, list | tuple)
        numbers = workers if is_list else [workers]
        is_whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        is_pair = is_whole and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]
        if not (is_pair if is_list else is_whole and workers >= 0):
            raise ValueError(
                f"must be a whole number >= 0, or [least, most] of an elastic run, with 1 <= least <= most; got "
                f"{workers!r}"
            )
        return tuple(workers) if is_list else workers

    @model_validator(mode="after")
    def places_of_an_elastic_run_can_be_counted(self) -> Self:
        # Ray divides the sum of the workers' shares by one share, in floating point.
        for key, share in (("cpus_per_worker", self.cpus_per_worker), ("gpus_per_worker", self.gpus_per_worker)):
            if self.is_elastic and not float(share * 1024).is_integer():
                raise ValueError(
                    f"{key}: Ray cannot count the places of an elastic run exactly in shares of {share:g}; take a "
                    f"whole number, 0.5 or 0.25"
                )
        return self

    @model_validator(mode="after")
    def url_is_a_place_and_no_more(self) -> Self:
        if is_url(self.storage) and not _STORE.fullmatch(self.storage):
            # What was got is not told: it may hold a password.
            raise ValueError(
                "storage: a URL must be scheme://bucket/prefix; endpoint, region, credentials and other options come "
                "from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)"
            )
        return self

    @property
    def runs_dir(self) -> Path:
        """Where runs are on this machine: the storage, or the working copies of one that is a URL."""
        scheme, is_there, rest = self.storage.partition("://")
        return machine.cache_dir() / "storage" / scheme / rest if is_there else Path(self.storage)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of ranks may change while it runs."""
        return isinstance(self.workers, tuple)

    @property
    def min_workers(self) -> int:
        """Ranks without which the run does not start."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        """Ranks that are asked for. 0: without Ray."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class RunConfig(Frozen):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's directory in the storage. A name is used once."""
    seed: NonNegativeInt
    base: BaseConfig
    adapters: AdapterConfigs
    """Trained together over the one base, each as if alone. Keys may be lists: see AdapterSettings. A dot in a name
    comes from such a product; a name that is typed has none."""
    task: TaskConfig
    train: TrainConfig
    cluster: ClusterConfig
    method: Method = "adapters"
    """adapters: train them. Another word does that instead, for comparison: on the run's task, in the same order, with
    the same evaluation; the adapters are left alone."""
    full_finetuning: FullFinetuningConfig | None = None
    lora: LoraConfig | None = None
    few_shot: FewShotConfig | None = None
    track: tuple[Tracker, ...] = ()
    """Trackers beside metrics.jsonl, which is always written."""

    @model_validator(mode="after")
    def labels_are_there_to_choose_among(self) -> Self:
        users = [
            (f"adapters.{name}", task, self.adapter_train(name))
            for name in self.adapters
            for task in self.adapter_tasks(name)
        ]
        if self.method != "adapters":
            users = [(self.method, self.task, self.baseline_train)]
        wrong = [
            f"{where}: loss 'labels' is the likelihood of a label among those of the task, and task {task.name!r} has "
            f"no labels; leave train.loss at 'vocabulary'"
            for where, task, train in users
            if train.loss == "labels" and task.labels is None
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def tasks_of_an_adapter_have_names_of_their_own(self) -> Self:
        wrong = []
        for name in self.adapters:
            names = [task.name for task in self.adapter_tasks(name)]
            wrong += [
                f"adapters.{name}.more_tasks: {twice!r} is the name of two of its tasks ({', '.join(names)}; its own "
                f"comes first), and their scores are told apart by it; leave one out, or give it another name"
                for twice in dict.fromkeys(task for i, task in enumerate(names) if task in names[:i])
            ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def every_warm_up_ends(self) -> Self:
        refuse_endless_warm_ups(self.adapters, self.train)
        return self

    @model_validator(mode="after")
    def every_rate_and_epsilon_has_a_use(self) -> Self:
        sections = {"lora": self.lora, "full_finetuning": self.full_finetuning}
        baselines = {
            name: section.train if section else None
            for name, section in sections.items()
            if section is not None or self.method == name
        }
        refuse_what_no_optimizer_uses(self.adapters, self.train, baselines, of_run_in="train.")
        return self

    @model_validator(mode="after")
    def method_is_possible(self) -> Self:
        method, stored, train, wrong = self.method, self.base.quantization, self.baseline_train, []
        if method in ("lora", "few_shot") and getattr(self, method) is None:
            example = "{rank: 8, alpha: 16}" if method == "lora" else "{examples: 4}"
            wrong.append(f"{method}: missing; method={method!r} needs it, for example {example}")
        if method == "full_finetuning" and stored != "none":
            wrong.append(
                f"method: 'full_finetuning' trains the weights, so base.quantization must be 'none', got {stored!r}"
            )
        if method == "lora" and stored == "int8":
            wrong.append(
                "method: 'lora' takes base.quantization 'nf4' or 'none', got 'int8', whose kernels round inputs too"
            )
        if method == "few_shot" and self.few_shot and self.few_shot.calibrated and self.task.labels is None:
            wrong.append("few_shot: calibrated compares the likelihoods of task.labels, and this task has none")
        if train.warmup_steps >= train.steps:
            wrong.append(f"{method}: train.warmup_steps={train.warmup_steps} must be less than steps={train.steps}")
        if not self.keeps_checkpoints and self.cluster.is_elastic:
            wrong.append(
                f"method: {method!r} keeps no checkpoint, so that every change of workers would start it anew; "
                f"cluster.workers must be one number, got [{self.cluster.min_workers}, {self.cluster.max_workers}]"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def adapter_seed(self, name: str) -> int:
        """The seed of one adapter: its own, or the run's."""
        return self.adapters[name].seed_in(self.seed)

    def adapter_task(self, name: str) -> TaskConfig:
        """The task of one adapter: its own, or the run's."""
        return self.adapters[name].task or self.task

    def adapter_tasks(self, name: str) -> tuple[TaskConfig, ...]:
        """All that one adapter is trained on, its own task first."""
        return (self.adapter_task(name), *self.adapters[name].more_tasks)

    def deciding_metric(self, name: str) -> str:
        """The one by which the best state of an adapter is chosen."""
        return MEAN_OF_TASKS if self.adapters[name].more_tasks else self.adapter_task(name).metrics[0]

    def adapter_train(self, name: str) -> TrainConfig:
        """How one adapter is trained: the run's `train` with what the adapter has otherwise."""
        own = self.adapters[name].train
        return self.train if own is None else own.over(self.train)

    def trained_by(self, name: str) -> TrainConfig:
        """How what has this name is trained: an adapter, or the run's baseline under the name of its method."""
        return self.baseline_train if name == self.method else self.adapter_train(name)

    @property
    def baseline_train(self) -> TrainConfig:
        """How full fine-tuning or LoRA is trained: the run's `train` with what the method's section has otherwise."""
        section = {"lora": self.lora, "full_finetuning": self.full_finetuning}.get(self.method)
        return self.train if section is None or section.train is None else section.train.over(self.train)

    @property
    def keeps_checkpoints(self) -> bool:
        """What does not begins again where it is cut."""
        return self.method in ("adapters", "lora")

    @property
    def going_on(self) -> str:
        """The option of `train` that goes on with this run where it was cut."""
        return f"--resume {self.name}" if self.keeps_checkpoints else "--finish"

    @property
    def num_steps(self) -> int:
        """Steps of the run: until the last adapter of the cohort has taken its own."""
        if self.method != "adapters":
            return 0 if self.method == "few_shot" else self.baseline_train.steps
        return max(self.adapter_train(name).steps for name in self.adapters)

    @property
    def run_dir(self) -> Path:
        """Where everything of this run is kept."""
        return self.cluster.runs_dir / self.name

    @property
    def run_url(self) -> str | None:
        """The same in the storage, where that is an object store."""
        return f"{self.cluster.storage}/{self.name}" if is_url(self.cluster.storage) else None

    @property
    def metrics_path(self) -> Path:
        """Every step, evaluation and note, a line each."""
        return self.run_dir / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """Written when the run has ended."""
        return self.run_dir / "summary.json"

    @property
    def failure_path(self) -> Path:
        """Why the run was given up, where workers are started again after a failure; gone while it goes on."""
        return self.run_dir / "failure.txt"

    @property
    def logs_dir(self) -> Path:
        """A file of every rank."""
        return self.run_dir / "logs"

    @property
    def checkpoints_dir(self) -> Path:
        """step-N, step-M, ..."""
        return self.run_dir / "checkpoints"

    @property
    def adapters_dir(self) -> Path:
        """NAME/best and NAME/last of every adapter."""
        return self.run_dir / "adapters"
