"""Modes: over which ranks a base is sharded, and which of them `auto` takes.

What a mode costs is `memory` and `pace`.

Source: ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054; groups inside a node after ZeRO++, Wang et al. 2023,
arXiv:2306.10209, section 3.2.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

Mode = Literal["replicated", "node", "world"]
MODES: tuple[Mode, ...] = get_args(Mode)

REPLICATE_BELOW = 0.55
"""A packed base that takes at most this part of a device is replicated: no gathers, and room left for activations."""


def holders(mode: Mode, *, world: int, node_ranks: int) -> int:
    """Ranks that hold the base together, each a slice of it."""
    return {"replicated": 1, "node": node_ranks, "world": world}[mode]


def settled(mode: Mode, *, world: int, node_ranks: int) -> tuple[Mode, str]:
    """What a mode that was asked for comes to on so many ranks, and why."""
    asked = f"base.sharding={mode}"
    if mode == "node" and node_ranks == 1:
        return "replicated", f"{asked}, and a node has one rank"
    if mode == "node" and node_ranks == world:
        return "world", f"{asked}, and all ranks are on one node"
    return mode, asked


def choose(
    modes: Sequence[Mode],
    *,
    part: float,
    world: int,
    node_ranks: int,
    too_much: Callable[[Mode], str | None],
) -> tuple[Mode, str]:
    """What `auto` takes, and why: the mode that sends least among those that fit.

    Args:
        modes: those that may be taken.
        part: of a device that the packed base takes.
        world: ranks, at least 2.
        node_ranks: those of one node.
        too_much: 'X and may fill Y' for a mode in which a rank needs more than it has, None for one that fits.
    """
    share = f"the packed base takes {part:.0%} of a device"
    whole = too_much("replicated")
    if part <= REPLICATE_BELOW and (whole is None or too_much("world") is not None):
        return "replicated", f"{share}, at most {REPLICATE_BELOW:.0%}: no gathers"
    why = f"{share}, more than {REPLICATE_BELOW:.0%}"
    if part <= REPLICATE_BELOW:
        why = f"{share}, but beside the rest all of it is too much: a rank would need {whole}"
    if world == node_ranks or "node" not in modes:
        return "world", why
    if world % node_ranks:
        return "world", f"{why}; {world} ranks do not fill nodes of {node_ranks} evenly"
    slices = too_much("node")
    if slices is None and node_ranks == 1:
        return "replicated", f"{why}; a node has one rank, and all of it there crosses no network"
    if slices is None:
        return "node", f"{why}; the {node_ranks} ranks of a node hold it together: no weight crosses the network"
    return "world", f"{why}; sharded over the {node_ranks} ranks of a node, each would need {slices}"
