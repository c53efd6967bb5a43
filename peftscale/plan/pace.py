"""Pace: seconds of one step, and the tokens from which gathers hide behind arithmetic.

From data sheets and two assumed fractions of them; bytes are `memory`, rates `hardware`. Fractions are stated in what
is printed, because they are the weakest figures of a plan.

FLOPs of a frozen base: 2 a weight and token in forward, 2 for the gradient of the inputs, 2 more where forward is
computed again; none for a gradient of weights. Left out: scores of attention (2 L / H of a block's forward at rows of L
tokens and hidden size H is a few percent), reading packed weights back into the compute dtype, which is per pass and
not per token and so matters for short passes, and T5's cross attention, whose keys and values count as if they were
made of the decoder's tokens.

Break-even: T = gathered bytes a pass / bandwidth * FLOP/s / FLOPs a token. With a gather in forward and one in backward
of q bytes a weight it does not depend on the base: T = q * 2 * F / (6 * B).
"""

import math
from dataclasses import dataclass
from typing import Any

from peftscale.facts import BaseFacts
from peftscale.plan.hardware import Hardware

FLOPS_REACHED = 0.4
"""Of the dense bfloat16 peak, recomputation counted. Published 4-bit runs of 70B and 405B reach 0.33 to 0.64."""
LINK_REACHED = 0.8
"""Of a link's bandwidth in one direction."""
ASSUMED = f"{FLOPS_REACHED:.0%} of the device's peak and {LINK_REACHED:.0%} of its links, which is a guess"


@dataclass(frozen=True, slots=True)
class Load:
    """What one rank does in a step."""

    tokens: int
    decoder_part: float
    """Of the tokens that go through the decoder of an encoder-decoder; 0 for a decoder alone."""
    target_tokens: int
    checkpoints: bool
    passes: int
    within_bytes: int
    """Gathered of slices on the rank's own node."""
    between_bytes: int
    """Gathered of slices on other nodes."""
    reduced_bytes: int
    spans_nodes: bool


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one step of one rank."""

    arithmetic_s: float
    gather_s: float
    reduce_s: float
    hidden_above_tokens: int | None

    @property
    def step_s(self) -> float:
        """Gathers run beside the arithmetic, the reduction after both."""
        return max(self.arithmetic_s, self.gather_s) + self.reduce_s


def of_step(facts: BaseFacts, hardware: Hardware, load: Load) -> Pace | None:
    """None where a rate that is needed is not known."""
    sends = load.within_bytes + load.between_bytes + load.reduced_bytes > 0
    if not hardware.peak_tflops or (sends and not hardware.link_gbytes_per_s):
        return None
    if load.spans_nodes and not hardware.network_gbytes_per_s:
        return None
    flops = hardware.peak_tflops * 1e12 * FLOPS_REACHED
    link, network = (1e9 * LINK_REACHED * x for x in (hardware.link_gbytes_per_s, hardware.into_node_gbytes_per_s))
    each = token_flops(facts, decoder_part=load.decoder_part, checkpoints=load.checkpoints)
    head = next(math.prod(unit.dense[0].shape) for unit in facts.units if unit.kind == "head")
    gathered = load.within_bytes + load.between_bytes
    gather_s = gathered / link if gathered else 0.0
    if load.between_bytes:
        # A byte of another node enters this one once, whatever the number of ranks here, and is passed on over links.
        gather_s = max(gather_s, load.between_bytes / network)
    slowest = min(link, network) if load.spans_nodes else link
    return Pace(
        arithmetic_s=(load.tokens * each + 4 * load.target_tokens * head) / flops,
        gather_s=gather_s,
        reduce_s=2 * load.reduced_bytes / slowest if load.reduced_bytes else 0.0,
        hidden_above_tokens=math.ceil(gather_s / load.passes * flops / each) if gathered else None,
    )


def token_flops(facts: BaseFacts, *, decoder_part: float, checkpoints: bool) -> float:
    """FLOPs of one token through the blocks that it meets, forward and backward."""
    blocks = [sum(linear.rows * linear.cols for linear in unit.linears) for unit in facts.units if unit.kind == "block"]
    first_decoder = len(blocks) - facts.num_decoder_layers
    met = (1 - decoder_part) * sum(blocks[:first_decoder]) + decoder_part * sum(blocks[first_decoder:])
    return (6 if checkpoints else 4) * met


def figures(
    found: Pace | None, hardware: Hardware, load: Load | None, *, num_steps: int, world: int, rate: float | None
) -> dict[str, Any]:
    """Time and price of a run, under the names that a `Plan` gives them.

    Args:
        found: None where seconds are not planned.
        hardware: whose rates they rest on.
        load: what they are of.
        num_steps: of the run.
        world: ranks.
        rate: price of one rank's device for an hour.
    """
    hours = found.step_s * num_steps / 3600 if found else None
    return {
        "hidden_above_tokens": found.hidden_above_tokens if found else None,
        "arithmetic_step_s": found.arithmetic_s if found else None,
        "gather_step_s": found.gather_s if found else None,
        "step_s": found.step_s if found else None,
        "num_steps": num_steps,
        "hours": hours,
        "price": hours * world * rate if hours is not None and rate is not None else None,
        "assumes": _assumptions(found, hardware, load) if load else "",
    }


def _assumptions(found: Pace | None, hardware: Hardware, load: Load) -> str:
    if found is None:
        return f"seconds are not planned: the rates of {hardware.name} are not known"
    parts = [f"{FLOPS_REACHED:.0%} of {hardware.peak_tflops:g} TFLOP/s"]
    if load.within_bytes + load.reduced_bytes:
        parts.append(f"{LINK_REACHED:.0%} of {hardware.link_gbytes_per_s:g} GB/s between devices")
    if load.spans_nodes:
        parts.append(f"{LINK_REACHED:.0%} of {hardware.into_node_gbytes_per_s:g} GB/s into a node")
    return f"seconds assume {', '.join(parts)}; hours are those of training steps alone"
