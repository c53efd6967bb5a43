"""Bytes of a baseline's run on the machine that it finds itself on, before it is held.

The arithmetic is `plan.baselines`.
"""

import torch

from peftscale import facts, plan
from peftscale.base import load as base_load
from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts
from peftscale.plan import Placement, Plan, Work
from peftscale.train import setup


def of_training(
    cfg: RunConfig, device: torch.device, *, world: int, num_trained: int | None = None, work: Work | None = None
) -> Plan:
    """Full fine-tuning or LoRA.

    Args:
        num_trained: once it is known. None: all that full fine-tuning trains, and nothing yet of LoRA's updates.
        work: once the data is known.

    Raises:
        ConfigError: it does not fit.
    """
    if num_trained is None and cfg.method == "lora":
        num_trained = 0
    machine = setup.hardware(device)
    made = plan.baselines.of_training(cfg, _facts(cfg), machine, world=world, num_trained=num_trained, work=work)
    if not made.fits:
        raise ConfigError("\n".join(made.problems))
    return made


def of_evaluation(cfg: RunConfig, device: torch.device, placed: Placement, *, world: int, work: Work) -> Plan:
    """Prompt design. Whether it fits was asked when the base was placed."""
    return plan.baselines.of_evaluation(cfg, _facts(cfg), setup.hardware(device), placed, world=world, work=work)


def _facts(cfg: RunConfig) -> BaseFacts:
    return facts.load(base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False))
