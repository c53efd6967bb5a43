"""Bytes of a baseline's run: full fine-tuning, LoRA, prompt design. Seconds are planned for adapters alone.

The run itself is the package `peftscale.baselines`, which counts what it trains and plans again with that.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 3 (what an optimizer keeps, and what is cut).
"""

from collections.abc import Sequence
from typing import Any

from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts, LinearFacts, dtype_bytes
from peftscale.plan import pace
from peftscale.plan.figures import Placement, Plan, identity, show
from peftscale.plan.hardware import Hardware
from peftscale.plan.memory import (
    CONTROL_BYTES,
    Setting,
    activation_bytes,
    at_peak,
    attention_bytes,
    dequantized_bytes,
    evaluations_bytes,
    gathered_bytes,
    logits_bytes,
    peak_bytes,
    update_bytes,
    weight_parts,
)
from peftscale.plan.modes import holders
from peftscale.plan.work import Work, decoder_tokens, expected

ALL_LINEAR = ("all-linear",)


def of_training(
    cfg: RunConfig,
    facts: BaseFacts,
    hardware: Hardware,
    *,
    world: int,
    num_trained: int | None = None,
    work: Work | None = None,
    lora_targets: Sequence[str] = ALL_LINEAR,
) -> Plan:
    """Full fine-tuning or LoRA in a base that each rank holds whole.

    Args:
        cfg: the run file.
        facts: of its base.
        hardware: what it would run on.
        world: ranks.
        num_trained: numbers that are trained. None: from `facts`, for LoRA those of the linears in `lora_targets`.
        work: of one rank, where the data is known. None: what the run file lets expect.
        lora_targets: last names of the linears that LoRA takes.

    Raises:
        ConfigError: the base has no linear of these names.
    """
    dense, train = dtype_bytes(cfg.base.compute_dtype), cfg.baseline_train
    is_full, moments = cfg.method == "full_finetuning", 2 if train.optimizer == "adamw" else 1
    if num_trained is None:
        num_trained = facts.num_parameters if is_full else _lora_numbers(cfg, facts, lora_targets)
    own = num_trained * 4
    work = work or expected(cfg, facts, world=world)
    # Passes are those of transformers' own attention.
    setting = Setting(
        world, 1, cfg.base.quantization, cfg.base.checkpoint_activations, dense, copies_keys=False, work=work
    )
    parts = {
        "slice_bytes": facts.packed_bytes(cfg.base.quantization, dense),
        "gathered_units_bytes": 0,
        # Of full fine-tuning master weights, summed gradient, moments and one intermediate are cut over the ranks; what
        # backward makes, and a bucket of it, is not.
        "adapter_bytes": own // world if is_full else own,
        "best_bytes": 0 if is_full else own,  # full fine-tuning writes it to disk
        "gradient_bytes": num_trained * 2 * dense + own // world if is_full else own,
        "optimizer_bytes": own * (1 + moments) // world if is_full else own * moments,
        "dequantized_bytes": dequantized_bytes(facts, cfg.base.quantization, dense),
        "activation_bytes": activation_bytes(
            facts,
            tokens=work.step.tokens,
            dense_bytes=dense,
            is_checkpointed=setting.checkpoints,
            decoder_tokens=decoder_tokens(cfg, work.step) if facts.is_encoder_decoder else 0,
            row_tokens=work.step.row_tokens,
        )
        # Trained linears keep their inputs, of which the outputs of the norms are not kept anyway.
        + work.step.tokens * 2 * facts.hidden_size * _num_blocks(facts) * dense,
        "logits_bytes": logits_bytes(facts, work.step, dense),
        "update_bytes": 0 if is_full else update_bytes(own),  # of full fine-tuning it is among what is cut
        "evaluation_bytes": evaluations_bytes(cfg, facts, setting),
    }
    num_tensors = sum(len(unit.linears) + len(unit.dense) for unit in facts.stored_units)
    squares = 16 * num_tensors if is_full and train.optimizer == "adafactor" else 0
    sent = {
        "reduced_bytes_per_step": own * (work.passes_per_step if is_full else 1),
        "gathered_bytes_per_step": num_trained * dense if is_full else 0,
        "control_bytes_per_step": CONTROL_BYTES + squares,
    }
    ways = ["a smaller base", "fewer train.microbatch_tokens", "base.checkpoint_activations=true"]
    ways += ["base.quantization=nf4"] if not is_full and cfg.base.quantization != "nf4" else []
    last = "more workers" if is_full else "a lower lora.rank"
    return _plan(
        cfg,
        facts,
        hardware,
        world=world,
        placed=Placement(sharding="replicated", reason=f"method={cfg.method} holds it whole", prefetch_elements=0),
        parts=parts,
        sent=sent if world > 1 else {},
        work=work,
        # Weights that were trained in the compute dtype, or updates in float32.
        file_bytes=facts.packed_bytes("none", dense) if is_full else own,
        checkpoint_bytes=0 if is_full else own * (2 + moments),  # last and best; full fine-tuning keeps none
        way_out=f"each holds the base whole. Take {', '.join(ways)} or {last}.",
    )


def of_evaluation(
    cfg: RunConfig, facts: BaseFacts, hardware: Hardware, placed: Placement, *, world: int, work: Work | None = None
) -> Plan:
    """Prompt design: the base as it is placed, and passes without a backward. It takes no step."""
    work = work or expected(cfg, facts, world=world)
    dense = dtype_bytes(cfg.base.compute_dtype)
    held_by = holders(placed.sharding, world=world, node_ranks=hardware.ranks_per_node(world))
    setting = Setting(
        world, held_by, cfg.base.quantization, True, attention_bytes(cfg, hardware), copies_keys=False, work=work
    )
    parts = {
        **weight_parts(facts, cfg.base.quantization, dense, holders=held_by),
        **dict.fromkeys(("adapter_bytes", "best_bytes", "gradient_bytes", "optimizer_bytes"), 0),
        "dequantized_bytes": dequantized_bytes(facts, cfg.base.quantization, dense),
        **dict.fromkeys(("activation_bytes", "logits_bytes", "update_bytes"), 0),
        "evaluation_bytes": evaluations_bytes(cfg, facts, setting),
    }
    each = gathered_bytes(facts, cfg.base.quantization, dense, holders=held_by)
    note = f"method=few_shot takes no step; a pass that is evaluated gathers {show(each)} at most." if each else None
    return _plan(
        cfg,
        facts,
        hardware,
        world=world,
        placed=placed,
        parts=parts,
        sent={},
        work=work,
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
    work: Work,
    file_bytes: int,
    checkpoint_bytes: int,
    way_out: str,
    note: str | None = None,
) -> Plan:
    peak, most = peak_bytes(parts), hardware.rank_bytes(world)
    problems = []
    if peak > most:
        named = ", ".join(f"{key.removesuffix('_bytes')} {show(size)}" for key, size in at_peak(parts).items() if size)
        problems.append(
            f"method={cfg.method}: a rank needs {show(peak)} and may fill {show(most)} of {hardware.name} "
            f"({named.replace('_', ' ')}); {way_out}"
        )
    keys = ("gathered_bytes_per_step", "reduced_bytes_per_step", "control_bytes_per_step")
    bytes_sent: dict[str, Any] = {key: sent.get(key, 0) for key in keys}
    gathered, here = bytes_sent["gathered_bytes_per_step"], hardware.ranks_per_node(world)
    between = gathered * (world - here) // world
    return Plan(
        **identity(cfg, facts, hardware, world),
        **{key: getattr(placed, key) for key in Placement.model_fields},
        **parts,
        peak_rank_bytes=peak,
        rank_memory_bytes=most,
        tokens_per_pass=work.most_tokens,
        passes_per_step=work.passes_per_step,
        tokens_per_step=work.tokens_per_step,
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


def _num_blocks(facts: BaseFacts) -> int:
    return sum(unit.kind == "block" for unit in facts.units)
