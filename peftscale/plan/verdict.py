"""Verdict: what is wrong with a plan, and what would make it fit.

Whether it fits is decided where the plan is made; bytes are `memory`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from peftscale.config import RunConfig
from peftscale.facts import BaseFacts
from peftscale.plan.adapters import positions
from peftscale.plan.figures import show
from peftscale.plan.hardware import Hardware
from peftscale.plan.memory import OF_ADAPTERS, Setting, at_peak, peak_bytes, rank_parts
from peftscale.plan.modes import Mode
from peftscale.plan.work import expected, target_tokens

Change = Callable[[Setting], Setting]
Check = Callable[[Setting], bool]
Spread = Callable[[Setting, int], Setting]
"""The same over another number of ranks, each with a slice."""


def shape_problems(cfg: RunConfig, facts: BaseFacts, hardware: Hardware, *, world: int, sharding: Mode) -> list[str]:
    """What is wrong whatever the memory."""
    problems = []
    if hardware.kind == "cuda" and hardware.is_all and world > hardware.num_devices:
        problems.append(
            f"{world} ranks need {world} GPUs, {hardware.label} has {hardware.num_devices}; lower cluster.workers."
        )
    if sharding == "node" and world % hardware.ranks_per_node(world):
        problems.append(
            f"base.sharding=node needs as many ranks on every node, and {world} ranks do not fill nodes of "
            f"{hardware.ranks_per_node(world)} evenly; take another number of ranks, or base.sharding=world."
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


_NOTHING = "Nothing in the run file is enough, nor more such devices: take larger ones, or a smaller base."


def too_big(
    cfg: RunConfig, facts: BaseFacts, hardware: Hardware, setting: Setting, *, modes: Sequence[Mode], least_tokens: int
) -> str:
    """Name what is too much, largest first, and every single change that would make it fit, or else all together.

    Args:
        cfg: the run file.
        facts: of its base.
        hardware: what it would run on.
        setting: as it is planned.
        modes: shardings that may be proposed.
        least_tokens: of a pass: one row.
    """

    def is_enough(changed: Setting) -> bool:
        return peak_bytes(rank_parts(cfg, facts, changed)) <= hardware.rank_bytes(changed.world)

    def spread(changed: Setting, world: int) -> Setting:
        work = expected(cfg, facts, world=world).within(changed.work.most_tokens)
        return replace(changed, world=world, holders=world, work=work)

    changes = _changes(setting, hardware, modes=modes, least_tokens=least_tokens, is_enough=is_enough, spread=spread)
    ways = [words for words, change in changes if is_enough(change(setting))]
    ways += _more_devices(setting, hardware, is_enough, spread)
    way_out = f"Enough would be: {'; or '.join(ways)}."
    parts = rank_parts(cfg, facts, setting)
    if not ways:
        way_out = _together(setting, hardware, changes, is_enough, spread)
    without_adapters = peak_bytes({**parts, **dict.fromkeys(OF_ADAPTERS, 0)})
    if way_out == _NOTHING and without_adapters <= hardware.rank_bytes(setting.world):
        way_out = "Enough would be: fewer or shorter adapters in one run, as every rank holds and updates all of them."
    causes = sorted(((size, key.removesuffix("_bytes")) for key, size in at_peak(parts).items()), reverse=True)[:3]
    named = ", ".join(f"{key.replace('_', ' ')} {show(size)}" for size, key in causes)
    return (
        f"a rank needs {show(peak_bytes(parts))} and may fill {show(hardware.rank_bytes(setting.world))} of "
        f"{hardware.name} ({named}). {way_out}"
    )


def _changes(
    setting: Setting,
    hardware: Hardware,
    *,
    modes: Sequence[Mode],
    least_tokens: int,
    is_enough: Check,
    spread: Spread,
) -> list[tuple[str, Change]]:
    """What may be changed without other hardware, the cheapest first; a change of nothing is left out."""
    found: list[tuple[str, Change]] = []
    if setting.quantization != "nf4":
        found.append(("base.quantization=nf4", lambda s: replace(s, quantization="nf4")))
    if not setting.checkpoints:
        found.append(("base.checkpoint_activations=true", lambda s: replace(s, checkpoints=True)))
    of_node = hardware.ranks_per_node(setting.world)
    if "node" in modes and setting.holders < of_node < setting.world and setting.world % of_node == 0:
        found.append(("base.sharding=node", lambda s: replace(s, holders=of_node)))
    if setting.holders < setting.world:
        found.append(("base.sharding=world", lambda s: replace(s, holders=s.world)))
    fewer = setting.work.most_tokens
    while fewer // 2 >= least_tokens and not is_enough(replace(setting, work=setting.work.within(fewer))):
        fewer //= 2
    if fewer < setting.work.most_tokens:
        found.append((f"train.microbatch_tokens={fewer}", lambda s: replace(s, work=s.work.within(fewer))))
    if hardware.kind == "cpu" and setting.world > 1:
        found.append(("cluster.workers=0 (one process)", lambda s: spread(s, 1)))
    return found


def _more_devices(setting: Setting, hardware: Hardware, is_enough: Check, spread: Spread) -> list[str]:
    """The smallest number of them that is enough; none where no number is."""
    if hardware.kind == "cuda":
        for count in (2**n for n in range(1, 11) if 2**n > setting.world):
            if is_enough(spread(setting, count)):
                return [f"--hardware {count}x{hardware.name} with base.sharding=world"]
    return []


def _together(
    setting: Setting,
    hardware: Hardware,
    changes: Sequence[tuple[str, Change]],
    is_enough: Check,
    spread: Spread,
) -> str:
    taken: list[str] = []
    for words, change in changes:
        taken, setting = [*taken, words], change(setting)
        if is_enough(setting):
            break
    else:
        more = _more_devices(setting, hardware, is_enough, spread)
        if not more:
            return _NOTHING
        taken += more
    return f"No single change is enough; together these are: {', '.join(taken)}."
