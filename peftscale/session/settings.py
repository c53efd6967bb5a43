"""What a session is told, checked by the rules of a run file and answered in its words.

The keys are those of a run file too: `config` holds the rules, `complaints` the words.
"""

import sys
from typing import Any, Self, TypeVar

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError, model_validator

from peftscale import complaints
from peftscale.config import (
    AdapterConfigs,
    AdapterTrainConfig,
    OptimizerConfig,
    refuse_endless_warm_ups,
    refuse_what_no_optimizer_uses,
)
from peftscale.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
ENDLESS = sys.maxsize
"""`steps` of a session that has no last one."""


class Settings(OptimizerConfig):
    """The arguments of `Session` but for the base."""

    adapters: AdapterConfigs
    seed: NonNegativeInt
    microbatch_tokens: PositiveInt

    def of(self, name: str) -> OptimizerConfig:
        """What the optimizer of one adapter uses."""
        own = self.adapters[name].train
        return self if own is None else own.over(self)

    @model_validator(mode="after")
    def what_has_no_effect_is_refused(self) -> Self:
        foreign = sorted(AdapterTrainConfig.model_fields.keys() - OptimizerConfig.model_fields.keys())
        wrong = [
            f"adapters.{name}.train.{key}: has no effect in a session, which neither chooses examples nor evaluates "
            f"nor stops by itself; leave it out"
            for name, adapter in self.adapters.items()
            for key in foreign
            if adapter.train is not None and getattr(adapter.train, key) is not None
        ]
        wrong += [
            f"adapters.{name}.more_tasks: has no effect in a session, which trains on the texts that it is given; "
            f"leave it out"
            for name, adapter in self.adapters.items()
            if adapter.more_tasks
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def every_rate_and_epsilon_has_a_use(self) -> Self:
        refuse_what_no_optimizer_uses(self.adapters, self, {}, of_run_in="")
        return self

    @model_validator(mode="after")
    def every_schedule_ends(self) -> Self:
        refuse_endless_warm_ups(self.adapters, self)
        for name in self.adapters:
            if self.of(name).schedule != "constant" and self.of(name).steps == ENDLESS:
                raise ValueError(f"steps: must be given, because the schedule of {name} is {self.of(name).schedule!r}")
        return self


def checked(model: type[Model], where: str, given: dict[str, Any]) -> Model:
    """A config of these keys, with our own words for what is wrong."""
    try:
        return model(**given)
    except ValidationError as error:
        problems = complaints.Problems()
        complaints.collect(error, given, problems)
        raise ConfigError(problems.text(where)) from None
