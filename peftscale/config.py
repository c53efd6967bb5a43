"""The run file as types: frozen pydantic models, one for each section.

Reading a file, overrides and error messages are `configio`; what a value costs is `plan`. Nothing here
imports torch, so that a laptop can check a run file in milliseconds.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from peftscale import machine
from peftscale.adapter_config import AdapterConfig as AdapterConfig
from peftscale.adapter_config import AdapterConfigs as AdapterConfigs
from peftscale.adapter_config import PrefixConfig as PrefixConfig
from peftscale.adapter_config import SoftPromptConfig as SoftPromptConfig
from peftscale.adapter_config import refuse_endless_warm_ups as refuse_endless_warm_ups
from peftscale.adapter_config import refuse_what_no_optimizer_uses as refuse_what_no_optimizer_uses
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
        own = self.baseline_changes
        return self.train if own is None else own.over(self.train)

    @property
    def baseline_changes(self) -> AdapterTrainConfig | None:
        """What the method's section has otherwise than the run's `train`."""
        section = {"lora": self.lora, "full_finetuning": self.full_finetuning}.get(self.method)
        return None if section is None else section.train

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
