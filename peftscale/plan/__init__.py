"""Plan: what a run will hold, send and keep, in bytes, and how long it will take, before anything is held.

Arithmetic over `facts`, a hardware catalogue and the run file; it reads no weight and imports no torch. The same
figures are measured in the run (`records`) and printed beside these. Runs of a baseline are in `baselines`.
"""

from collections.abc import Callable, Sequence

from peftscale.config import BaseConfig, RunConfig
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts, dtype_bytes
from peftscale.plan import baselines, pace, verdict
from peftscale.plan.adapters import kept, trained_numbers
from peftscale.plan.figures import Placement, Plan, identity, misfits, show, table
from peftscale.plan.hardware import Hardware, detect
from peftscale.plan.memory import (
    CONTROL_BYTES,
    Setting,
    activation_bytes,
    attention_bytes,
    copies_keys,
    evaluation_bytes,
    gathered_bytes,
    peak_bytes,
    rank_parts,
    weight_parts,
)
from peftscale.plan.modes import MODES, Mode, choose, holders, settled
from peftscale.plan.work import PassSize, Work, decoder_tokens, expected, longest_row, max_text_tokens

__all__ = [
    "CONTROL_BYTES",
    "MODES",
    "Hardware",
    "Mode",
    "PassSize",
    "Placement",
    "Plan",
    "Work",
    "activation_bytes",
    "baselines",
    "compare",
    "detect",
    "evaluation_bytes",
    "expected",
    "make",
    "misfits",
    "place",
    "show",
    "table",
    "worlds_of",
]


def compare(
    cfg: RunConfig,
    facts: BaseFacts,
    machines: Sequence[Hardware],
    *,
    worlds: Sequence[int] = (),
    price_per_gpu_hour: float | None = None,
    lora_targets: Callable[[RunConfig, str], Sequence[str]],
) -> list[Plan]:
    """Plan a run file, whatever its method, on each machine and for each number of ranks.

    Args:
        cfg: the run file.
        facts: of its base.
        machines: what it would run on.
        worlds: numbers of ranks. None given: every GPU of a machine, or the most of cluster.workers on CPU.
        price_per_gpu_hour: of one rank's device, in any currency.
        lora_targets: (run file, model type) -> names of the linears that LoRA takes.

    Raises:
        ConfigError: LoRA finds no linear.
    """
    targets = lora_targets(cfg, facts.model_type) if cfg.method == "lora" else ()
    plans = []
    for machine, ranks in ((of, n) for of in machines for n in worlds or (num_ranks(cfg, of),)):
        if cfg.cluster.deploy is not None:
            machine = machine.with_nodes_of(cfg.cluster.deploy.workers_per_node, world=ranks)
        match cfg.method:
            case "adapters":
                plans.append(make(cfg, facts, machine, world=ranks, price_per_gpu_hour=price_per_gpu_hour))
            case "few_shot":
                placed, _ = _place_alone(cfg.base, facts, machine, ranks, MODES)
                plans.append(baselines.of_evaluation(cfg, facts, machine, placed, world=ranks))
            case _:
                plans.append(baselines.of_training(cfg, facts, machine, world=ranks, lora_targets=targets))
    return plans


def make(
    cfg: RunConfig,
    facts: BaseFacts,
    hardware: Hardware,
    *,
    world: int | None = None,
    work: Work | None = None,
    modes: Sequence[Mode] = MODES,
    placed: Placement | None = None,
    price_per_gpu_hour: float | None = None,
) -> Plan:
    """Plan a run of adapters.

    Args:
        cfg: the run file.
        facts: of its base.
        hardware: what it would run on.
        world: ranks. None: every GPU of `hardware`, or the most of cluster.workers on CPU.
        work: of one rank, where the data is known. None: what the run file lets expect.
        modes: shardings that base.sharding=auto may take.
        placed: where the base lies already. None: decided here.
        price_per_gpu_hour: of one rank's device, in any currency.
    """
    world = world if world is not None else num_ranks(cfg, hardware)
    is_expected, work = work is None, work or expected(cfg, facts, world=world)

    def setting_of(mode: Mode) -> Setting:
        held_by = holders(mode, world=world, node_ranks=hardware.ranks_per_node(world))
        stored, checkpoints = cfg.base.quantization, cfg.base.checkpoint_activations
        element, copies = attention_bytes(cfg, hardware), copies_keys(hardware)
        return Setting(world, held_by, stored, checkpoints, element, copies, work)

    def peak_of(mode: Mode) -> int:
        return peak_bytes(rank_parts(cfg, facts, setting_of(mode)))

    placed = placed or _placement(cfg.base, facts, hardware, world, modes, peak_of)
    setting, peak, memory = setting_of(placed.sharding), peak_of(placed.sharding), hardware.rank_bytes(world)
    parts = rank_parts(cfg, facts, setting)
    problems = verdict.shape_problems(cfg, facts, hardware, world=world, sharding=placed.sharding)
    if peak > memory:
        row = longest_row(cfg, facts)
        problems.append(verdict.too_big(cfg, facts, hardware, setting, modes=modes, least_tokens=row))
    sent = _sent(cfg, facts, hardware, setting)
    load = pace.Load(
        tokens=work.tokens_per_step,
        decoder_part=decoder_tokens(cfg, work.step) / work.step.tokens if facts.is_encoder_decoder else 0.0,
        target_tokens=work.passes_per_step * work.step.targets,
        checkpoints=setting.checkpoints,
        passes=work.passes_per_step,
        within_bytes=sent["gathered_within_node_bytes_per_step"],
        between_bytes=sent["gathered_between_nodes_bytes_per_step"],
        reduced_bytes=sent["reduced_bytes_per_step"],
        spans_nodes=world > hardware.ranks_per_node(world),
    )
    found = pace.of_step(facts, hardware, load)
    notes = _notes(cfg, hardware, setting, found)
    if is_expected and max_text_tokens(cfg) is None:
        notes.insert(0, "task.max_text_tokens is not given, so one pass a step is assumed.")
    return Plan(
        **identity(cfg, facts, hardware, world),
        **{key: getattr(placed, key) for key in Placement.model_fields},  # it may be a whole plan
        **parts,
        peak_rank_bytes=peak,
        rank_memory_bytes=memory,
        tokens_per_pass=work.step.tokens,
        passes_per_step=work.passes_per_step,
        tokens_per_step=work.tokens_per_step,
        **sent,
        **pace.figures(found, hardware, load, num_steps=cfg.num_steps, world=world, rate=price_per_gpu_hour),
        **kept(cfg, facts, trained_bytes=parts["adapter_bytes"], optimizer_bytes=parts["optimizer_bytes"]),
        fits=not problems,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def place(
    cfg: BaseConfig, facts: BaseFacts, hardware: Hardware, *, world: int, modes: Sequence[Mode] = MODES
) -> Placement:
    """Plan a base alone, for work that is not known beforehand.

    Raises:
        ConfigError: its weights do not fit by themselves.
    """
    placed, need = _place_alone(cfg, facts, hardware, world, modes)
    if need > hardware.rank_bytes(world):
        raise ConfigError(
            f"base.model={facts.model}: its weights take {show(need)} of a rank ({cfg.quantization}, {placed.sharding} "
            f"over {world} rank(s)), and {show(hardware.rank_bytes(world))} of {hardware.name} may be filled. Store "
            f"them in fewer bits (base.quantization), shard them over more ranks, or take larger devices."
        )
    return placed


def _place_alone(
    cfg: BaseConfig, facts: BaseFacts, hardware: Hardware, world: int, modes: Sequence[Mode]
) -> tuple[Placement, int]:
    """Where its weights are to lie, and what a rank then needs for them."""

    def need_of(mode: Mode) -> int:
        held_by = holders(mode, world=world, node_ranks=hardware.ranks_per_node(world))
        stored, dense = cfg.quantization, dtype_bytes(cfg.compute_dtype)
        return sum(weight_parts(facts, stored, dense, holders=held_by).values())

    placed = _placement(cfg, facts, hardware, world, modes, need_of)
    return placed, need_of(placed.sharding)


def worlds_of(cfg: RunConfig) -> tuple[int, ...]:
    """The ranks that a run asks for; of an elastic one the fewest too, on which it has to fit as well."""
    return tuple(dict.fromkeys(max(1, n) for n in (cfg.cluster.max_workers, cfg.cluster.min_workers)))


def num_ranks(cfg: RunConfig, hardware: Hardware) -> int:
    """Every GPU of the hardware, or the most of cluster.workers on CPU."""
    return hardware.num_devices if hardware.kind == "cuda" else max(1, cfg.cluster.max_workers)


def _placement(
    cfg: BaseConfig,
    facts: BaseFacts,
    hardware: Hardware,
    world: int,
    modes: Sequence[Mode],
    need_of: Callable[[Mode], int],
) -> Placement:
    """Where the base is to lie, given what a rank needs in each mode."""
    most = hardware.rank_bytes(world)

    def too_much(mode: Mode) -> str | None:
        return f"{show(need_of(mode))} and may fill {show(most)}" if need_of(mode) > most else None

    sharding: Mode
    if world == 1:
        sharding, reason = "replicated", "one rank holds everything"
    elif cfg.sharding != "auto":
        sharding, reason = settled(cfg.sharding, world=world, node_ranks=hardware.ranks_per_node(world))
    else:
        packed = facts.packed_bytes(cfg.quantization, dtype_bytes(cfg.compute_dtype))
        device = hardware.memory_bytes if hardware.kind == "cuda" else most
        sharding, reason = choose(
            modes,
            part=packed / max(1, device),
            world=world,
            node_ranks=hardware.ranks_per_node(world),
            too_much=too_much,
        )
    block = max(unit.storage_elements(cfg.quantization) for unit in facts.units if unit.kind == "block")
    prefetches = sharding != "replicated" and hardware.kind == "cuda"
    return Placement(sharding=sharding, reason=reason, prefetch_elements=block if prefetches else 0)


def _sent(cfg: RunConfig, facts: BaseFacts, hardware: Hardware, setting: Setting) -> dict[str, int]:
    """Bytes of a step's collectives, under the names that `Plan` gives them."""
    dense = dtype_bytes(cfg.base.compute_dtype)
    gathered = gathered_bytes(facts, setting.quantization, dense, holders=setting.holders)
    gathered *= setting.work.passes_per_step
    # Each holder has as much of it as any other, so the part of a node is the part of its ranks.
    elsewhere = max(0, setting.holders - hardware.ranks_per_node(setting.world))
    between = gathered * elsewhere // setting.holders
    adapters = sum(trained_numbers(a, facts) for a in cfg.adapters.values()) * 4
    return {
        "gathered_bytes_per_step": gathered,
        "gathered_within_node_bytes_per_step": gathered - between,
        "gathered_between_nodes_bytes_per_step": between,
        "reduced_bytes_per_step": adapters if setting.world > 1 else 0,
        "control_bytes_per_step": CONTROL_BYTES * len(cfg.adapters) if setting.world > 1 else 0,
    }


def _notes(cfg: RunConfig, hardware: Hardware, setting: Setting, found: pace.Pace | None) -> list[str]:
    notes = []
    if cfg.base.compute_dtype == "bfloat16" and hardware.name.startswith("V100"):
        notes.append("V100 has no bfloat16 units: expect it to be slow.")
    if setting.holders > hardware.ranks_per_node(setting.world):
        notes.append("the ranks span nodes, so weights are gathered over the network between them.")
    even = found.hidden_above_tokens if found else None
    if even is not None and setting.work.step.tokens < even:
        notes.append(
            f"below about {even} tokens a pass the gathers, not the arithmetic, set the pace; "
            f"a pass has {setting.work.step.tokens} at most."
        )
    return notes
