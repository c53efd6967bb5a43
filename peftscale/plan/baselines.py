"""Bytes of a baseline's run: full fine-tuning, LoRA, prompt design. Seconds are planned for adapters alone.

The run itself is the package `peftscale.baselines`, which counts what it trains and plans again with that.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 3 (what an optimizer keeps, and what is cut).
"""

import math
from collections.abc import Sequence
from typing import Any

from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts, LinearFacts, dtype_bytes
from peftscale.plan import pace
from peftscale.plan.figures import Placement, Plan, identity, show
from peftscale.plan.hardware import Hardware
from peftscale.plan.memory import CONTROL_BYTES, Setting, activation_bytes, gathered_bytes, target_tokens, weight_parts
from peftscale.plan.modes import holders

ALL_LINEAR = ("all-linear",)


def of_training(
    cfg: RunConfig,
    facts: BaseFacts,
    hardware: Hardware,
    *,
    world: int,
    num_trained: int | None = None,
    passes: int | None = None,
    lora_targets: Sequence[str] = ALL_LINEAR,
) -> Plan:
    """Full fine-tuning or LoRA in a base that each rank holds whole.

    Args:
        cfg: the run file.
        facts: of its base.
        hardware: what it would run on.
        world: ranks.
        num_trained: numbers that are trained. None: from `facts`, for LoRA those of the linears in `lora_targets`.
        passes: of a step. None: from task.max_text_tokens, or one where that is not given.
        lora_targets: last names of the linears that LoRA takes.

    Raises:
        ConfigError: the base has no linear of these names.
    """
    dense, train = dtype_bytes(cfg.base.compute_dtype), cfg.baseline_train
    is_full, moments = cfg.method == "full_finetuning", 2 if train.optimizer == "adamw" else 1
    if num_trained is None:
        num_trained = facts.num_parameters if is_full else _lora_numbers(cfg, facts, lora_targets)
    own = num_trained * 4
    passes = passes if passes is not None else _passes(cfg, world)
    parts = {
        "slice_bytes": facts.packed_bytes(cfg.base.quantization, dense),
        "gathered_units_bytes": 0,
        # Of full fine-tuning master weights, summed gradient, moments and one intermediate are cut over the ranks; what
        # backward makes, and a bucket of it, is not.
        "adapter_bytes": own // world if is_full else own,
        "gradient_bytes": num_trained * 2 * dense + own // world if is_full else own,
        "optimizer_bytes": own * (1 + moments) // world if is_full else own * moments,
        "activation_bytes": _activations(cfg, facts, dense)
        # Trained linears keep their inputs, of which the outputs of the norms are not kept anyway.
        + train.microbatch_tokens * 2 * facts.hidden_size * _num_blocks(facts) * dense,
        "dequantized_bytes": _dequantized(cfg, facts, dense),
        "logits_bytes": _targets(cfg, world) * facts.vocab_size * (dense + 8),
    }
    num_tensors = sum(len(unit.linears) + len(unit.dense) for unit in facts.stored_units)
    squares = 16 * num_tensors if is_full and train.optimizer == "adafactor" else 0
    sent = {
        "reduced_bytes_per_step": own * (passes if is_full else 1),
        "gathered_bytes_per_step": num_trained * dense if is_full else 0,
        "control_bytes_per_step": CONTROL_BYTES + squares,
    }
    more = "more workers" if is_full else "base.quantization=nf4"
    return _plan(
        cfg,
        facts,
        hardware,
        world=world,
        placed=Placement(sharding="replicated", reason=f"method={cfg.method} holds it whole", prefetch_elements=0),
        parts=parts,
        sent=sent if world > 1 else {},
        passes=passes,
        # Weights that were trained in the compute dtype, or updates in float32.
        file_bytes=facts.packed_bytes("none", dense) if is_full else own,
        checkpoint_bytes=0 if is_full else own * (2 + moments),  # last and best; full fine-tuning keeps none
        way_out=f"each holds the base whole. Take a smaller base, fewer train.microbatch_tokens, "
        f"base.checkpoint_activations=true or {more}.",
    )


def of_evaluation(cfg: RunConfig, facts: BaseFacts, hardware: Hardware, placed: Placement, *, world: int) -> Plan:
    """Prompt design: the base as it is placed, and passes without a backward. It takes no step."""
    dense = dtype_bytes(cfg.base.compute_dtype)
    held_by = holders(placed.sharding, world=world, node_ranks=hardware.ranks_per_node(world))
    setting = Setting(world, held_by, cfg.base.quantization, True, cfg.train.microbatch_tokens)
    parts = {
        **weight_parts(facts, setting, dense),
        "adapter_bytes": 0,
        "gradient_bytes": 0,
        "optimizer_bytes": 0,
        "activation_bytes": _activations(cfg, facts, dense),
        "dequantized_bytes": _dequantized(cfg, facts, dense),
        "logits_bytes": _targets(cfg, world) * facts.vocab_size * (dense + 8),
    }
    each = gathered_bytes(facts, setting, dense)
    note = f"method=few_shot takes no step; a pass that is evaluated gathers {show(each)} at most." if each else None
    return _plan(
        cfg,
        facts,
        hardware,
        world=world,
        placed=placed,
        parts=parts,
        sent={},
        passes=0,
        file_bytes=0,
        checkpoint_bytes=0,
        way_out="Take base.quantization=nf4, base.sharding=world or fewer train.microbatch_tokens.",
        note=note,
    )


def _plan(
    cfg: RunConfig,
    facts: BaseFacts,
    hardware: Hardware,
    *,
    world: int,
    placed: Placement,
    parts: dict[str, int],
    sent: dict[str, int],
    passes: int,
    file_bytes: int,
    checkpoint_bytes: int,
    way_out: str,
    note: str | None = None,
) -> Plan:
    peak, most = sum(parts.values()), hardware.rank_bytes(world)
    problems = []
    if peak > most:
        named = ", ".join(f"{key.removesuffix('_bytes')} {show(size)}" for key, size in parts.items() if size)
        problems.append(
            f"method={cfg.method}: a rank needs {show(peak)} and may fill {show(most)} of {hardware.name} "
            f"({named.replace('_', ' ')}); {way_out}"
        )
    keys = ("gathered_bytes_per_step", "reduced_bytes_per_step", "control_bytes_per_step")
    bytes_sent: dict[str, Any] = {key: sent.get(key, 0) for key in keys}
    gathered, here = bytes_sent["gathered_bytes_per_step"], hardware.ranks_per_node(world)
    between = gathered * (world - here) // world
    tokens = cfg.train.microbatch_tokens
    return Plan(
        **identity(cfg, facts, hardware, world),
        **{key: getattr(placed, key) for key in Placement.model_fields},
        **parts,
        peak_rank_bytes=peak,
        rank_memory_bytes=most,
        tokens_per_pass=tokens,
        passes_per_step=passes,
        tokens_per_step=passes * tokens,
        gathered_within_node_bytes_per_step=gathered - between,
        gathered_between_nodes_bytes_per_step=between,
        **bytes_sent,
        **pace.figures(None, hardware, None, num_steps=cfg.num_steps, world=world, rate=None),
        adapter_file_bytes=file_bytes,
        checkpoint_bytes=checkpoint_bytes,
        fits=not problems,
        problems=tuple(problems),
        notes=("seconds and price are planned for method=adapters alone.", *([note] if note else [])),
    )


def _lora_numbers(cfg: RunConfig, facts: BaseFacts, targets: Sequence[str]) -> int:
    assert cfg.lora is not None  # checked with the run file
    linears = [linear for unit in facts.units for linear in unit.linears]
    found = [linear for linear in linears if tuple(targets) == ALL_LINEAR or _is_called(linear, targets)]
    if not found:
        names = sorted({linear.name.rpartition(".")[2] for linear in linears})
        raise ConfigError(
            f"lora.target_modules={', '.join(targets)}: {facts.model} has no such linear; it has {', '.join(names)}."
        )
    return cfg.lora.rank * sum(linear.rows + linear.cols for linear in found)


def _is_called(linear: LinearFacts, targets: Sequence[str]) -> bool:
    return any(linear.name == target or linear.name.endswith(f".{target}") for target in targets)


def _passes(cfg: RunConfig, world: int) -> int:
    text, train = cfg.task.max_text_tokens, cfg.baseline_train
    if text is None:
        return 1
    rows = max(1, train.microbatch_tokens // (text + target_tokens(cfg.task)))
    return math.ceil(math.ceil(train.examples_per_step / world) / rows)


def _activations(cfg: RunConfig, facts: BaseFacts, dense: int) -> int:
    is_one_block = cfg.base.checkpoint_activations or cfg.method == "few_shot"
    tokens = cfg.train.microbatch_tokens
    return activation_bytes(facts, tokens=tokens, dense_bytes=dense, is_checkpointed=is_one_block)


def _num_blocks(facts: BaseFacts) -> int:
    return sum(unit.kind == "block" for unit in facts.units)


def _dequantized(cfg: RunConfig, facts: BaseFacts, dense: int) -> int:
    largest = max(linear.rows * linear.cols for unit in facts.units for linear in unit.linears)
    return 0 if cfg.base.quantization == "none" else int(largest * (dense + 1 / 16))


def _targets(cfg: RunConfig, world: int) -> int:
    """Most target positions of one pass."""
    each = target_tokens(cfg.task)
    rows = min(-(-cfg.baseline_train.examples_per_step // world), cfg.train.microbatch_tokens // (1 + each))
    return max(1, rows) * each
