"""Figures of a plan: their names, their units, and how a person sees them.

Nothing is computed here: that is the package itself with `memory` and `pace`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from peftscale.config import Frozen, RunConfig
from peftscale.facts import BaseFacts, dtype_bytes
from peftscale.plan.hardware import Hardware
from peftscale.plan.modes import Mode


class Placement(Frozen):
    """Where the base lies. Enough to load it."""

    sharding: Mode
    reason: str
    """Why this sharding."""
    prefetch_elements: int
    """Storage elements that ZeRO-3 may gather ahead of use: one block on GPUs, 0 on CPU and without sharding."""


class Plan(Placement):
    """All figures of a run. Bytes and seconds are those of one rank unless the name says otherwise."""

    name: str
    model: str
    num_parameters: int
    """Of the base."""
    quantization: str
    hardware: str
    world_size: int
    node_ranks: int
    """Ranks on one node."""
    packed_bytes: int
    """The whole base as it is stored, over all ranks once."""
    slice_bytes: int
    """What a rank keeps of it, padding included; all of it when replicated, more when sharded over a node alone."""
    gathered_units_bytes: int
    """The two largest units (block, embedding, head), which a sharded rank holds for a moment."""
    adapter_bytes: int
    """Parameters, float32."""
    best_bytes: int
    """A copy of each adapter at its best."""
    gradient_bytes: int
    optimizer_bytes: int
    dequantized_bytes: int
    """The largest linear weight, read from its blob into the compute dtype."""
    activation_bytes: int
    """Kept from forward for backward, and the largest gradients in flight."""
    logits_bytes: int
    """At target positions only: logits, their float32 copy and its gradient."""
    update_bytes: int
    """What moving the adapters takes behind the passes: a copy of them and their moments, and
    what the optimizer makes of them."""
    evaluation_bytes: int
    """What the largest pass of an evaluation takes in place of activations and logits: one block without a backward,
    logits of all labels, or the cache of keys and values of texts that are written."""
    peak_rank_bytes: int
    """Sum of those above from slice to dequantised, and the largest of activations with logits, update, evaluation."""
    rank_memory_bytes: int
    """What a rank may fill, after a reserve for the runtime."""
    tokens_per_pass: int
    """Most of one pass: what memory is planned for."""
    passes_per_step: int
    tokens_per_step: int
    """What a rank computes in a step, virtual tokens included: what seconds are planned for."""
    gathered_bytes_per_step: int
    """The two below together: weights as they stand after their gathers, a rank's own slice included."""
    gathered_within_node_bytes_per_step: int
    """Of slices that lie on the rank's node."""
    gathered_between_nodes_bytes_per_step: int
    """Of slices that lie on other nodes."""
    reduced_bytes_per_step: int
    """The gradient all-reduce: exactly the adapters' bytes, 0 with one rank."""
    control_bytes_per_step: int
    """Upper bound for everything else."""
    hidden_above_tokens: int | None
    """Tokens of a pass from which the gathers take no longer than the arithmetic. None: nothing is gathered, or the
    device's rates are not known."""
    arithmetic_step_s: float | None
    """None, as in the four below, where the device's rates are not known."""
    gather_step_s: float | None
    """Gathers run beside the arithmetic: the longer of the two counts."""
    step_s: float | None
    num_steps: int
    hours: float | None
    """Of all steps. Loading, evaluations and checkpoints come on top."""
    price: float | None
    """Of those hours on all ranks, in the currency of the rate; None without a rate."""
    assumes: str
    """What the seconds rest on, or why there are none."""
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

    def lines(self) -> list[str]:
        """What the table has no room for: why this sharding, what seconds rest on, and the notes."""
        texts = (f"{self.sharding}, because {self.reason}", *([self.assumes] if self.assumes else []), *self.notes)
        return [f"{self.hardware}: {text}" for text in texts]


def identity(cfg: RunConfig, facts: BaseFacts, hardware: Hardware, world: int) -> dict[str, Any]:
    """The figures of a `Plan` that say what is planned."""
    return {
        "name": cfg.name,
        "model": facts.model,
        "num_parameters": facts.num_parameters,
        "quantization": cfg.base.quantization,
        "hardware": hardware.label,
        "world_size": world,
        "node_ranks": hardware.ranks_per_node(world),
        "packed_bytes": facts.packed_bytes(cfg.base.quantization, dtype_bytes(cfg.base.compute_dtype)),
    }


def show(num_bytes: int) -> str:
    """1234567 -> '1.23 MB', powers of ten."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    if units[0] == "B":
        return f"{num_bytes} B"
    return f"{_three_digits(size)} {units[0]}"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")  # rounded first: 99.96 has as many digits before the point as 100
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"


def _number(value: float | None) -> str:
    """Three digits, or a dash for what is not known."""
    return "-" if value is None else _three_digits(value)


_ROWS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("packed base", "packed_bytes", show),
    ("a rank: slice", "slice_bytes", show),
    ("a rank: two largest gathered units", "gathered_units_bytes", show),
    ("a rank: adapters", "adapter_bytes", show),
    ("a rank: adapters at their best", "best_bytes", show),
    ("a rank: gradients", "gradient_bytes", show),
    ("a rank: optimizer", "optimizer_bytes", show),
    ("a rank: largest weight dequantised", "dequantized_bytes", show),
    ("  and in a step: activations", "activation_bytes", show),
    ("                 logits", "logits_bytes", show),
    ("  or in its update", "update_bytes", show),
    ("  or in an evaluation", "evaluation_bytes", show),
    ("a rank: peak", "peak_rank_bytes", show),
    ("a rank: may fill", "rank_memory_bytes", show),
    ("gathered a step", "gathered_bytes_per_step", show),
    ("  of them within the node", "gathered_within_node_bytes_per_step", show),
    ("  of them between nodes", "gathered_between_nodes_bytes_per_step", show),
    ("reduced a step", "reduced_bytes_per_step", show),
    ("control a step, at most", "control_bytes_per_step", show),
    ("gathers hide from, tokens a pass", "hidden_above_tokens", lambda n: "-" if n is None else f"{n:,}"),
    ("seconds a step: arithmetic", "arithmetic_step_s", _number),
    ("seconds a step: gathers", "gather_step_s", _number),
    ("seconds a step", "step_s", _number),
    ("hours of all steps", "hours", _number),
    ("adapter files", "adapter_file_bytes", show),
    ("checkpoint", "checkpoint_bytes", show),
)


def misfits(plans: Sequence[Plan]) -> list[str]:
    """Why runs cannot be, and where."""
    found = []
    for plan in plans:
        ranks = f", {plan.world_size} rank(s)" if any(p.hardware == plan.hardware and p != plan for p in plans) else ""
        where = f"{plan.hardware}{ranks}: " if len(plans) > 1 else ""
        found += [where + problem for problem in plan.problems]
    return found


def table(plans: Sequence[Plan]) -> Table:
    """A column for each plan, a row for each figure."""
    titles = dict.fromkeys(f"{p.name}: {p.num_parameters:,} parameters, {p.quantization}" for p in plans)
    view = Table(title=", ".join(titles))
    view.add_column("")
    for plan in plans:
        view.add_column(plan.hardware, justify="right", overflow="fold")
    view.add_row("sharding", *(f"{plan.sharding}, {plan.world_size} rank(s)" for plan in plans))
    view.add_row("tokens a pass, passes a step", *(f"{p.tokens_per_pass} x {p.passes_per_step}" for p in plans))
    view.add_row("tokens a step", *(f"{plan.tokens_per_step:,}" for plan in plans))
    for title, key, shown in _ROWS:
        view.add_row(title, *(shown(getattr(plan, key)) for plan in plans))
    if any(plan.price is not None for plan in plans):
        view.add_row("price of all steps", *("-" if p.price is None else f"{p.price:,.2f}" for p in plans))
    view.add_row("fits", *("yes" if plan.fits else "no" for plan in plans))
    return view
