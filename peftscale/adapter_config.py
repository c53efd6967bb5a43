"""The `adapters` of a run file: a soft prompt or a prefix each, and what it has that the run does not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from peftscale.task_config import TaskConfig
from peftscale.train_config import AdapterTrainConfig, Frozen, OptimizerConfig


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
