"""Sections of a run file that say how something is trained: the run's `train`, and what an adapter or a baseline has
otherwise.

The other sections and the whole file are `config`, which hands these on. Nothing here imports torch.
"""

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Optimizer = Literal["adamw", "adafactor"]
Schedule = Literal["constant", "linear", "cosine"]
Loss = Literal["vocabulary", "labels"]
Epsilon = Annotated[float, Field(ge=1e-30, le=1e30)]  # what float32 has by itself and as a root
Rate = Annotated[float, Field(gt=0, le=1e30)]  # what is larger overflows float32 inside of an update


class Frozen(BaseModel):
    """A model that cannot be changed after it was checked, and that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class OptimizerConfig(Frozen):
    """How far an adapter moves in each step."""

    steps: PositiveInt
    optimizer: Optimizer
    """adafactor is the recipe of Lester et al. 2021: no parameter scaling, not factored, update clipped at RMS 1."""
    learning_rate: Rate
    network_learning_rate: Rate | None = None
    """Of the network of a re-parametrised adapter, on the same schedule; `learning_rate` where it is left out."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """adamw: multiplied by the rate, as in torch. adafactor: not multiplied by it, as in T5X (1e-5 there)."""
    adam_epsilon: Epsilon | None = None
    """Of adamw, added to the root of the mean square; 1e-8, torch's, where it is left out. A number whose gradient is
    far below it moves by that gradient, not by its sign, so that rounding (another number of workers, other adapters
    in the cohort) moves it less."""
    schedule: Schedule = "constant"
    """The rate after warm-up, down to zero at `steps` for linear and cosine."""
    warmup_steps: NonNegativeInt = 0
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of one adapter's gradient."""

    @property
    def epsilon(self) -> float:
        """Of adamw."""
        return 1e-8 if self.adam_epsilon is None else self.adam_epsilon

    @model_validator(mode="after")
    def warm_up_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: must be less than steps={self.steps}, got {self.warmup_steps}")
        return self


AnyOptimizerConfig = TypeVar("AnyOptimizerConfig", bound=OptimizerConfig)


class TrainConfig(OptimizerConfig):
    """How the adapters are trained."""

    loss: Loss = "vocabulary"
    """Of a target token, its likelihood among the whole vocabulary; labels: of a label's word, among the words of all
    labels of the task, which is what classification compares (Gao et al. 2021, section 3). One token each, then."""
    examples_per_step: PositiveInt
    """Over all ranks and micro-batches: the number of workers never changes it."""
    microbatch_tokens: PositiveInt
    """Most tokens, prompts and padding included, in one pass of one rank. It bounds what is computed, and memory with
    it, not the result. On a CPU packed passes keep keys and values of a prompt for each text as well: see `plan`."""
    packing: Literal["auto", "off"] = "auto"
    """auto: one row of all prompts and texts, each prompt computed once, where that is exact for the base (it is
    checked); off: one padded row an example, the reference."""
    evaluate_every: PositiveInt
    """Steps between evaluations on the validation split. There is one before the first step and one at the end too."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints. There is always one at the end."""
    keep_checkpoints: PositiveInt = 2
    early_stop: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better first metric."""
    max_nonfinite_steps: PositiveInt = 10
    """A step with a non-finite loss or gradient changes nothing and is counted; so many in a row stop the adapter."""


class AdapterTrainConfig(Frozen):
    """What one adapter does otherwise than the run's `train`. A key that is left out is the run's.

    What belongs to a pass or to the whole run (micro-batches, packing, checkpoints) has no key here.
    """

    loss: Loss | None = None
    steps: PositiveInt | None = None
    """The adapter leaves the cohort when they are taken; the others go on."""
    examples_per_step: PositiveInt | None = None
    optimizer: Optimizer | None = None
    learning_rate: Rate | None = None
    network_learning_rate: Rate | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    adam_epsilon: Epsilon | None = None
    schedule: Schedule | None = None
    warmup_steps: NonNegativeInt | None = None
    clip_norm: Annotated[float, Field(ge=0)] | None = None
    """0: not clipped, whatever the run's is."""
    evaluate_every: PositiveInt | None = None
    early_stop: NonNegativeInt | None = None
    """0: never stopped early, whatever the run's is."""

    def over(self, of_run: AnyOptimizerConfig) -> AnyOptimizerConfig:
        """The run's settings with what is given here in their place."""
        changes = {key: value for key, value in self if value is not None}
        for key in ("clip_norm", "early_stop"):
            if changes.get(key) == 0:
                changes[key] = None
        return of_run.model_copy(update=changes)
