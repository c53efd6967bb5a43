"""Bytes of a baseline's run, before it is held.

The same kind of arithmetic as `plan`, whose figures of weights and activations it takes; that one plans runs of
adapters.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 3 (what an optimizer keeps, and what is cut).
"""

from dataclasses import dataclass

import torch

from peftscale import facts, plan
from peftscale.base import load as base_load
from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts, dtype_bytes
from peftscale.plan import Placement, memory


@dataclass(frozen=True)
class Budget:
    """What a run says beforehand. A `train.summary.Prediction`."""

    world_size: int
    sharding: str
    reduced_bytes_per_step: int
    gathered_bytes_per_step: int
    control_bytes_per_step: int
    peak_rank_bytes: int


def of_training(
    cfg: RunConfig, device: torch.device, *, world: int, num_trained: int = 0, num_tensors: int = 0, passes: int = 1
) -> Budget:
    """Full fine-tuning or LoRA in a base that each rank holds whole.

    Args:
        num_trained: of LoRA, once it is known; full fine-tuning trains what there is.
        num_tensors: that are trained, once it is known.
        passes: of a step.

    Raises:
        ConfigError: it does not fit.
    """
    base_facts = _facts(cfg)
    dense, train = dtype_bytes(cfg.base.compute_dtype), cfg.baseline_train
    is_full, moments = cfg.method == "full_finetuning", 2 if train.optimizer == "adamw" else 1
    sums_squares = is_full and train.optimizer == "adafactor"
    if is_full:
        num_trained = base_facts.num_parameters
        # What backward makes and a bucket of it; master weights, moments, summed gradient and one intermediate are cut.
        state = num_trained * 2 * dense + num_trained * 4 * (3 + moments) // world
    else:
        state = num_trained * 4 * (2 + moments)
    parts = {
        "weights": base_facts.packed_bytes(cfg.base.quantization, dense),
        "gradients and optimizer": state,
        "activations": _activations(cfg, base_facts, dense)
        # Trained linears keep their inputs, of which the outputs of the norms are not kept anyway.
        + train.microbatch_tokens * 2 * base_facts.hidden_size * _num_blocks(base_facts) * dense,
        "one weight dequantised": _dequantized(cfg, base_facts, dense),
        "logits": _targets(cfg, world) * base_facts.vocab_size * (dense + 8),
    }
    hardware = plan.detect(cuda=device.type == "cuda")
    peak, most = sum(parts.values()), hardware.rank_bytes(world)
    if peak > most:
        named = ", ".join(f"{name} {plan.show(size)}" for name, size in parts.items() if size)
        raise ConfigError(
            f"method={cfg.method}: a rank needs {plan.show(peak)} and may fill {plan.show(most)} of {hardware.name} "
            f"({named}); each holds the base whole. Take a smaller base, fewer train.microbatch_tokens, "
            f"base.checkpoint_activations=true or {'more workers' if is_full else 'base.quantization=nf4'}."
        )
    return Budget(
        world_size=world,
        sharding="replicated",
        reduced_bytes_per_step=num_trained * 4 * (passes if is_full else 1) if world > 1 else 0,
        gathered_bytes_per_step=num_trained * dense if is_full and world > 1 else 0,
        control_bytes_per_step=plan.CONTROL_BYTES + (16 * num_tensors if sums_squares else 0) if world > 1 else 0,
        peak_rank_bytes=peak,
    )


def of_evaluation(cfg: RunConfig, placed: Placement, *, world: int) -> Budget:
    """Prompt design: the base as it is placed, and passes without a backward."""
    base_facts, dense = _facts(cfg), dtype_bytes(cfg.base.compute_dtype)
    setting = memory.Setting(world, placed.sharding, cfg.base.quantization, True, cfg.train.microbatch_tokens)
    peak = sum(memory.weight_parts(base_facts, setting, dense).values()) + _activations(cfg, base_facts, dense)
    peak += _dequantized(cfg, base_facts, dense) + _targets(cfg, world) * base_facts.vocab_size * (dense + 8)
    return Budget(world, placed.sharding, 0, 0, 0, peak)


def _facts(cfg: RunConfig) -> BaseFacts:
    return facts.load(base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False))


def _activations(cfg: RunConfig, base_facts: BaseFacts, dense: int) -> int:
    is_one_block = cfg.base.checkpoint_activations or cfg.method == "few_shot"
    tokens = cfg.train.microbatch_tokens
    return memory.activation_bytes(base_facts, tokens=tokens, dense_bytes=dense, is_checkpointed=is_one_block)


def _num_blocks(base_facts: BaseFacts) -> int:
    return sum(unit.kind == "block" for unit in base_facts.units)


def _dequantized(cfg: RunConfig, base_facts: BaseFacts, dense: int) -> int:
    largest = max(linear.rows * linear.cols for unit in base_facts.units for linear in unit.linears)
    return 0 if cfg.base.quantization == "none" else int(largest * (dense + 1 / 16))


def _targets(cfg: RunConfig, world: int) -> int:
    """Most target positions of one pass."""
    each = memory.target_tokens(cfg.task)
    rows = min(-(-cfg.baseline_train.examples_per_step // world), cfg.train.microbatch_tokens // (1 + each))
    return max(1, rows) * each
