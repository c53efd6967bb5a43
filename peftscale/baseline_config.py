"""Sections of a run file for what adapters are compared with: full fine-tuning, LoRA, prompt design.

Which of them a run does is `RunConfig.method`; what they do is the package `baselines`. Nothing here imports torch.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from peftscale.train_config import AdapterTrainConfig, Frozen

Method = Literal["adapters", "full_finetuning", "lora", "few_shot"]


class FullFinetuningConfig(Frozen):
    """All weights of the base are trained. It must not be quantised, and each rank holds all of it; the optimizer's
    state is cut over the ranks."""

    train: AdapterTrainConfig | None = None
    """What it does otherwise than the run's `train`. Its adafactor has parameter scaling, as in the model tuning of
    Lester et al. 2021 (rate 1e-3)."""


class LoraConfig(Frozen):
    """Low-rank updates of linear weights, through PEFT (Hu et al. 2021), without dropout. The base may be nf4."""

    rank: PositiveInt
    alpha: PositiveFloat
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | None = None
    """Last names of the linears, or all-linear alone. Left out: those that PEFT takes for the base's family."""
    train: AdapterTrainConfig | None = None
    """What it does otherwise than the run's `train`."""


class FewShotConfig(Frozen):
    """Prompt design: nothing is trained, solved examples stand in front of each input (Brown et al. 2020)."""

    examples: NonNegativeInt
    """Drawn from the train split, as many of each label as can be; the same for every input. 0: zero-shot."""
    seed: NonNegativeInt | None = None
    """Of the draw and of their order; the run's `seed` where it is left out."""
    calibrated: bool = False
    """Divide the likelihood of each label by that behind inputs that say nothing (Zhao et al. 2021)."""
    separator: Annotated[str, Field(min_length=1)] = "\n\n"
    """Stands behind each solved example. A generated answer ends where it writes this."""
