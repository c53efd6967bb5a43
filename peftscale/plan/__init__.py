"""Plan: what a run will hold, send and keep, in bytes, before anything is held.

Arithmetic over `facts`, a hardware catalogue and the run file; it reads no weight and imports no torch. The same
figures are measured in the run (`records`) and printed beside these.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from peftscale.config import BaseConfig, Frozen, RunConfig
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts, dtype_bytes
from peftscale.plan.hardware import Hardware, detect
from peftscale.plan.memory import (
    Mode,
    Setting,
    activation_bytes,
    file_rows,
    gathered_bytes,
    most_target_tokens,
    positions,
    rank_parts,
    step_rows,
    target_tokens,
    token_width,
    weight_parts,
)

__all__ = ["Hardware", "Placement", "Plan", "activation_bytes", "detect", "make", "place", "show", "table"]

REPLICATE_BELOW = 0.55
"""A packed base that takes at most this part of a device is replicated: no gathers, and room left for activations."""
CONTROL_BYTES = 64
"""Most bytes an adapter may send in a step beside its gradient: loss, token counts, flags."""
MANIFEST_BYTES = 16_384
"""Allowance for JSON in a checkpoint: two for the run with its random state, one for each adapter."""
_FLOPS_REACHED = 0.4  # of the peak; 70B QLoRA runs report 0.22-0.42


class Placement(Frozen):
    """Where the base lies. Enough to load it."""

    sharding: Mode
    reason: str
    """Why this sharding."""
    prefetch_elements: int
    """Storage elements that ZeRO-3 may gather ahead of use: one block on GPUs, 0 on CPU and without sharding."""


class Plan(Placement):
    """All figures of a run. Bytes are those of one rank unless the name says otherwise."""

    name: str
    model: str
    num_parameters: int
    """Of the base."""
    quantization: str
    hardware: str
    world_size: int
    packed_bytes: int
    """The whole base as it is stored, over all ranks once."""
    slice_bytes: int
    """What a rank keeps of it, padding included; all of it when replicated."""
    gathered_units_bytes: int
    """The two largest units (block, embedding, head), which a sharded rank holds for a moment."""
    adapter_bytes: int
    """Parameters, float32."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Kept from forward for backward, and the largest gradients in flight."""
    dequantized_bytes: int
    """The largest linear weight, read from its blob into the compute dtype."""
    logits_bytes: int
    """At target positions only: logits, their float32 copy and its gradient."""
    peak_rank_bytes: int
    """Sum of the eight above from slice to logits."""
    rank_memory_bytes: int
    """What a rank may fill, after a reserve for the runtime."""
    tokens_per_pass: int
    passes_per_step: int
    gathered_bytes_per_step: int
    reduced_bytes_per_step: int
    """The gradient all-reduce: exactly the adapters' bytes, 0 with one rank."""
    control_bytes_per_step: int
    """Upper bound for everything else."""
    adapter_file_bytes: int
    """One safetensors file for each adapter; their sum."""
    checkpoint_bytes: int
    """What is trained as it is now, adapters at their best, optimizer moments and an allowance for JSON."""
    fits: bool
    problems: tuple[str, ...]
    """Why the run cannot be, each with what would help. Empty when `fits`."""
    notes: tuple[str, ...]
    """What a reader of the figures should know."""

    def summary(self) -> str:
        """One line: where the base lies, what a rank needs and what a step sends."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"{self.hardware}: {verdict}; {self.sharding} over {self.world_size} rank(s); "
            f"{self.quantization} {show(self.packed_bytes)}; "
            f"{show(self.peak_rank_bytes)} of {show(self.rank_memory_bytes)} a rank; "
            f"gathered {show(self.gathered_bytes_per_step)}, reduced {show(self.reduced_bytes_per_step)} a step"
        )


def make(
    cfg: RunConfig,
    facts: BaseFacts,
    hardware: Hardware,
    *,
    world: int | None = None,
    passes_per_step: int | None = None,
    tokens_per_pass: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        cfg: the run file.
        facts: of its base.
        hardware: what it would run on.
        world: ranks. None: every GPU of `hardware`, or cluster.workers on CPU.
        passes_per_step: of one rank. None: from task.max_text_tokens, or one where that is not given.
        tokens_per_pass: most tokens of one pass. None: train.microbatch_tokens.
    """
    gpus = hardware.num_devices if hardware.kind == "cuda" else max(1, cfg.cluster.workers)
    world = world if world is not None else gpus
    tokens = tokens_per_pass if tokens_per_pass is not None else cfg.train.microbatch_tokens
    notes = []
    if passes_per_step is None:
        passes_per_step = _passes(cfg, facts, world)
        if _max_text_tokens(cfg) is None:
            notes.append("task.max_text_tokens is not given, so one pass a step is assumed.")
    dense = dtype_bytes(cfg.base.compute_dtype)
    placed = _placement(cfg.base, facts, hardware, world)
    setting = Setting(world, placed.sharding, cfg.base.quantization, cfg.base.checkpoint_activations, tokens)
    parts = rank_parts(cfg, facts, setting)
    peak, memory = sum(parts.values()), hardware.rank_bytes(world)
    problems = _shape_problems(cfg, facts, hardware, world)
    if peak > memory:
        problems.append(_too_big(cfg, facts, hardware, setting, parts, memory))
    gathered = gathered_bytes(facts, setting, dense) * passes_per_step if placed.sharding == "world" else 0
    adapter_files = sum(_safetensors_bytes(file_rows(a), token_width(a, facts)) for a in cfg.adapters.values())
    notes += _notes(cfg, facts, hardware, setting, gathered // max(1, passes_per_step))
    return Plan(
        name=cfg.name,
        model=facts.model,
        num_parameters=facts.num_parameters,
        quantization=cfg.base.quantization,
        hardware=hardware.label,
        world_size=world,
        sharding=placed.sharding,
        reason=placed.reason,
        prefetch_elements=placed.prefetch_elements,
        packed_bytes=facts.packed_bytes(cfg.base.quantization, dense),
        **parts,
        peak_rank_bytes=peak,
        rank_memory_bytes=memory,
        tokens_per_pass=tokens,
        passes_per_step=passes_per_step,
        gathered_bytes_per_step=gathered,
        reduced_bytes_per_step=parts["adapter_bytes"] if world > 1 else 0,
        control_bytes_per_step=CONTROL_BYTES * len(cfg.adapters) if world > 1 else 0,
        adapter_file_bytes=adapter_files,
        checkpoint_bytes=parts["adapter_bytes"]
        + adapter_files
        + parts["optimizer_bytes"]
        + MANIFEST_BYTES * (2 + len(cfg.adapters)),
        fits=not problems,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def place(cfg: BaseConfig, facts: BaseFacts, hardware: Hardware, *, world: int) -> Placement:
    """Plan a base alone, for work that is not known beforehand.

    Raises:
        ConfigError: its weights do not fit by themselves.
    """
    placed = _placement(cfg, facts, hardware, world)
    setting = Setting(world, placed.sharding, cfg.quantization, cfg.checkpoint_activations, tokens=0)
    need = sum(weight_parts(facts, setting, dtype_bytes(cfg.compute_dtype)).values())
    if need > hardware.rank_bytes(world):
        raise ConfigError(
            f"base.model={facts.model}: its weights take {show(need)} of a rank ({cfg.quantization}, {placed.sharding} "
            f"over {world} rank(s)), and {show(hardware.rank_bytes(world))} of {hardware.name} may be filled. Store "
            f"them in fewer bits (base.quantization), shard them over more ranks, or take larger devices."
        )
    return placed


def _placement(cfg: BaseConfig, facts: BaseFacts, hardware: Hardware, world: int) -> Placement:
    sharding, reason = _mode(cfg, facts, hardware, world)
    block = max(unit.storage_elements(cfg.quantization) for unit in facts.units if unit.kind == "block")
    prefetches = sharding == "world" and hardware.kind == "cuda"
    return Placement(sharding=sharding, reason=reason, prefetch_elements=block if prefetches else 0)


def _mode(cfg: BaseConfig, facts: BaseFacts, hardware: Hardware, world: int) -> tuple[Mode, str]:
    if world == 1:
        return "replicated", "one rank holds everything"
    if cfg.sharding != "auto":
        return cfg.sharding, f"base.sharding={cfg.sharding}"
    packed = facts.packed_bytes(cfg.quantization, dtype_bytes(cfg.compute_dtype))
    device = hardware.memory_bytes if hardware.kind == "cuda" else hardware.rank_bytes(world)
    part = packed / max(1, device)
    if part <= REPLICATE_BELOW:
        return "replicated", f"the packed base takes {part:.0%} of a device, at most {REPLICATE_BELOW:.0%}: no gathers"
    return "world", f"the packed base takes {part:.0%} of a device, more than {REPLICATE_BELOW:.0%}"


def _max_text_tokens(cfg: RunConfig) -> int | None:
    """Of all tasks; None where one has no limit."""
    limits = [task.max_text_tokens for name in cfg.adapters for task in cfg.adapter_tasks(name)]
    return None if None in limits else max(limit for limit in limits if limit is not None)


def _passes(cfg: RunConfig, facts: BaseFacts, world: int) -> int:
    most = _max_text_tokens(cfg)
    if most is None:
        return 1
    row = max(positions(a, facts) for a in cfg.adapters.values()) + most + most_target_tokens(cfg)
    return math.ceil(step_rows(cfg, world) / max(1, cfg.train.microbatch_tokens // row))


def _safetensors_bytes(length: int, width: int) -> int:
    """Size of an adapter's file: 8-byte length, JSON header padded to 8 bytes, P rows of `width` float32."""
    size = length * width * 4
    entry = f'"prompt_embeddings":{{"dtype":"F32","shape":[{length},{width}],"data_offsets":[0,{size}]}}'
    header = f'{{"__metadata__":{{"format":"pt"}},{entry}}}'
    return 8 + math.ceil(len(header) / 8) * 8 + size


def _shape_problems(cfg: RunConfig, facts: BaseFacts, hardware: Hardware, world: int) -> list[str]:
    """What is wrong whatever the memory."""
    problems = []
    if hardware.kind == "cuda" and hardware.is_all and world > hardware.num_devices:
        problems.append(
            f"{world} ranks need {world} GPUs, {hardware.label} has {hardware.num_devices}; lower cluster.workers."
        )
    for name, adapter in cfg.adapters.items():
        if adapter.kind == "prefix" and cfg.train.packing == "off" and not facts.is_encoder_decoder:
            problems.append(
                f"adapters.{name}.kind: a prefix in {facts.model} needs packed passes, got train.packing='off'; set "
                f"that to 'auto', or kind to 'prompt'."
            )
        tasks = cfg.adapter_tasks(name)
        text, target = max(
            ((task.max_text_tokens or 1, target_tokens(task) if task.labels is None else 1) for task in tasks), key=sum
        )
        virtual = positions(adapter, facts)
        row = virtual + text + target
        if facts.max_positions is not None and row > facts.max_positions:
            problems.append(
                f"adapters.{name}.length={adapter.length} and {text} text and {target} target token(s) make {row}, "
                f"the base has {facts.max_positions} positions (with longrope, those of short texts); shorten "
                f"the prompt or task.max_text_tokens."
            )
        if row > cfg.train.microbatch_tokens:
            problems.append(
                f"train.microbatch_tokens={cfg.train.microbatch_tokens} does not hold one row of adapters.{name}: "
                f"{virtual} virtual, {text} text and {target} target token(s) make {row}; raise it to {row}."
            )
    return problems


def _too_big(
    cfg: RunConfig, facts: BaseFacts, hardware: Hardware, setting: Setting, parts: dict[str, int], memory: int
) -> str:
    """Name what is too much, largest first, and every single change that would make it fit."""

    def is_enough(changed: Setting) -> bool:
        return sum(rank_parts(cfg, facts, changed).values()) <= hardware.rank_bytes(changed.world)

    ways = []
    if setting.quantization != "nf4" and is_enough(replace(setting, quantization="nf4")):
        ways.append("base.quantization=nf4")
    if not setting.checkpoints and is_enough(replace(setting, checkpoints=True)):
        ways.append("base.checkpoint_activations=true")
    if setting.sharding == "replicated" and setting.world > 1 and is_enough(replace(setting, sharding="world")):
        ways.append("base.sharding=world")
    fewer = setting.tokens
    while fewer > 1 and not is_enough(replace(setting, tokens=fewer)):
        fewer //= 2
    row = max(positions(a, facts) for a in cfg.adapters.values()) + (_max_text_tokens(cfg) or 1) + 1
    if fewer >= row:
        ways.append(f"train.microbatch_tokens={fewer}")
    if hardware.kind == "cuda":
        counts = (2**n for n in range(1, 11) if 2**n > setting.world)
        more = next((n for n in counts if is_enough(replace(setting, world=n, sharding="world"))), None)
        if more is not None:
            ways.append(f"--hardware {more}x{hardware.name} with base.sharding=world")
    elif is_enough(replace(setting, world=1, sharding="replicated")):
        ways.append("cluster.workers=0 (one process)")
    peak = sum(parts.values())
    causes = sorted(((size, key.removesuffix("_bytes")) for key, size in parts.items()), reverse=True)[:3]
    named = ", ".join(f"{key.replace('_', ' ')} {show(size)}" for size, key in causes)
    way_out = f"Enough would be: {'; or '.join(ways)}." if ways else "No single change is enough: combine them."
    return f"a rank needs {show(peak)} and may fill {show(memory)} of {hardware.name} ({named}). {way_out}"


def _notes(cfg: RunConfig, facts: BaseFacts, hardware: Hardware, setting: Setting, gathered: int) -> list[str]:
    notes = []
    if cfg.base.compute_dtype == "bfloat16" and hardware.name.startswith("V100"):
        notes.append("V100 has no bfloat16 units: expect it to be slow.")
    if setting.sharding == "world" and hardware.kind == "cuda":
        if setting.world > hardware.devices_per_node:
            notes.append("the ranks span nodes, so weights are gathered over the network between them.")
        elif hardware.link_gbytes_per_s:
            # Forward, recomputation and the gradient of the inputs take 2 FLOP a weight and token each.
            passes = 3 if setting.checkpoints else 2
            gather_s = gathered / (hardware.link_gbytes_per_s * 1e9)
            token_s = 2 * passes * facts.num_parameters / (hardware.peak_tflops * 1e12 * _FLOPS_REACHED)
            even = math.ceil(gather_s / token_s)
            if setting.tokens < even:
                notes.append(
                    f"below about {even} tokens a pass the gathers, not the arithmetic, set the pace; "
                    f"train.microbatch_tokens={setting.tokens}."
                )
    return notes


def show(num_bytes: int) -> str:
    """1234567 -> '1.23 MB', powers of ten."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    if units[0] == "B":
        return f"{num_bytes} B"
    size = float(f"{size:.2e}")  # rounded first: 99.96 has as many digits before the point as 100
    return f"{size:.{2 - math.floor(math.log10(size))}f} {units[0]}"


_ROWS = (
    ("packed base", "packed_bytes"),
    ("a rank: slice", "slice_bytes"),
    ("a rank: two largest gathered units", "gathered_units_bytes"),
    ("a rank: adapters", "adapter_bytes"),
    ("a rank: gradients", "gradient_bytes"),
    ("a rank: optimizer", "optimizer_bytes"),
    ("a rank: activations", "activation_bytes"),
    ("a rank: largest weight dequantised", "dequantized_bytes"),
    ("a rank: logits", "logits_bytes"),
    ("a rank: peak", "peak_rank_bytes"),
    ("a rank: may fill", "rank_memory_bytes"),
    ("gathered a step", "gathered_bytes_per_step"),
    ("reduced a step", "reduced_bytes_per_step"),
    ("control a step, at most", "control_bytes_per_step"),
    ("adapter files", "adapter_file_bytes"),
    ("checkpoint", "checkpoint_bytes"),
)


def table(plans: Sequence[Plan]) -> Table:
    """A column for each plan, a row for each figure."""
    view = Table()
    view.add_column("")
    for plan in plans:
        view.add_column(f"{plan.name}\n{plan.hardware}", justify="right")
    view.add_row("parameters", *(f"{plan.num_parameters:,}" for plan in plans))
    view.add_row("sharding", *(f"{plan.sharding}, {plan.world_size} rank(s)" for plan in plans))
    view.add_row("tokens a pass, passes a step", *(f"{p.tokens_per_pass} x {p.passes_per_step}" for p in plans))
    for title, key in _ROWS:
        view.add_row(title, *(show(getattr(plan, key)) for plan in plans))
    view.add_row("fits", *("yes" if plan.fits else "no" for plan in plans))
    return view
