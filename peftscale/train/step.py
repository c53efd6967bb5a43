"""One training step: passes through the frozen base, one gradient all-reduce, one update of every adapter.

Every rank calls `run` with the same items and computes its own share. The loss of an adapter is the sum over its
target tokens divided by their number on all ranks, so it depends neither on the number of ranks nor on how rows are
put into passes. Which examples a step has is `data.batches`; when to evaluate or save is `train.worker`.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftscale.adapters import Adapter, Cohort, Folded, Prefix
from peftscale.adapters.reparam import FoldedPrefix, FoldedPrompt
from peftscale.base import host_memory
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.base.passes import target_losses
from peftscale.data.batches import Item, plan_passes
from peftscale.train import comm, optim
from peftscale.train.comm import Traffic
from peftscale.train.optim import AdapterOptimizer


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank but for `traffic`."""

    losses: dict[str, float]
    """Nats a target token, by adapter."""
    skipped: tuple[str, ...]
    """Adapters that were not updated, because they, their loss, their gradient or what they would have become were not
    finite."""
    rates: dict[str, float]
    """Learning rate of each adapter that was updated."""
    num_tokens: int
    """Inputs and targets over all ranks, without padding and without virtual tokens."""
    seconds: float
    traffic: Traffic
    """Bytes of this rank's collectives."""


def rows_of(items: Sequence[Item], adapters: Mapping[str, Folded]) -> list[Row]:
    """The rows of one pass; an item whose adapter is not among them goes through the base alone."""
    nothing: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    # Rows of one adapter share the very tensors: by them passes know what to compute once.
    in_front = {name: _in_front(adapter) for name, adapter in adapters.items()}
    rows = []
    for item in items:
        prompt_PH, prefix_L2PKD, decoder_prompt_QH = in_front.get(item.adapter, nothing)
        ids = (*item.example.input_ids, *item.target_ids)
        rows.append(Row(prompt_PH, ids, len(item.target_ids), prefix_L2PKD, decoder_prompt_QH, item.among))
    return rows


def _in_front(adapter: Folded) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Prompt, prefix and decoder's prompt of its rows."""
    if isinstance(adapter, Prefix):
        return None, adapter.keys_values_L2PKD, None
    if not adapter.decoder_length:
        return adapter.rows_PH, None, None
    return adapter.rows_PH[: adapter.length], None, adapter.rows_PH[adapter.length :]


def run(
    base: Base,
    cohort: Cohort,
    optimizers: Mapping[str, AdapterOptimizer],
    items: Sequence[Item],
    *,
    step: int,
    microbatch_tokens: int,
) -> StepResult:
    """Train one step on `items`, of all adapters and all ranks.

    Args:
        base: the frozen base.
        cohort: the adapters that are still training: their bytes are reduced, no others.
        optimizers: of at least those.
        items: of those adapters, any number of each.
        step: 0 for the first.
        microbatch_tokens: most tokens of one pass of one rank.
    """
    start, before = time.perf_counter(), comm.traffic()
    losses = gradient(base, cohort, items, microbatch_tokens=microbatch_tokens)
    # Values, loss and gradient are the same on every rank after the reductions, and so is every decision.
    moving = [name for name in usable(cohort, with_gradients=True) if torch.isfinite(losses[name])]
    for name in cohort:
        if name not in moving:
            optimizers[name].clear()
    stood = dict(zip(moving, optim.snapshots([optimizers[name] for name in moving]), strict=True))
    rates = dict(zip(moving, optim.update_([optimizers[name] for name in moving], step), strict=True))
    moved = usable({name: cohort[name] for name in moving})
    for name in moving:
        if name not in moved:  # everything was finite and the step too large: it has not been
            optimizers[name].go_back(stood[name])
    host_memory.trim(base.device)
    return StepResult(
        losses={name: float(loss) for name, loss in losses.items()},
        skipped=tuple(name for name in cohort if name not in moved),
        rates={name: rates[name] for name in moved},
        num_tokens=sum(item.num_tokens - item.prompt_length for item in items),
        seconds=time.perf_counter() - start,
        traffic=comm.traffic().since(before),
    )


def usable(adapters: Mapping[str, Adapter], *, with_gradients: bool = False) -> list[str]:
    """Those whose numbers can be computed with: with rows of 1e30 a norm of the base is 0, the loss finite and every
    gradient exactly 0.

    Args:
        adapters: by name.
        with_gradients: the gradients must be so too.
    """
    groups: list[list[Tensor]] = []
    for adapter in adapters.values():
        parameters = list(adapter.parameters())
        groups.append([p.detach() for p in parameters])
        groups.append([p.grad for p in parameters if with_gradients and p.grad is not None])
    is_good = optim.are_finite(groups, squared=True)
    return [name for name, *both in zip(adapters, is_good[::2], is_good[1::2], strict=True) if all(both)]


def gradient(base: Base, cohort: Cohort, items: Sequence[Item], *, microbatch_tokens: int) -> dict[str, torch.Tensor]:
    """Leave the gradient of the global batch in every adapter, on every rank, and return the global losses.

    Returns:
        Adapter name -> loss, a float64 scalar on the CPU, in nats a target token.
    """
    num_targets = Counter[str]()
    for item in items:
        num_targets[item.adapter] += len(item.target_ids)
    names = list(cohort)
    totals_K = torch.zeros(len(names), dtype=torch.float64)
    passes = plan_passes(items, world=comm.world_size(), microbatch_tokens=microbatch_tokens, is_packed=base.is_packed)[
        comm.rank()
    ]
    folded = {name: adapter.folded() for name, adapter in cohort.items()}
    for of_pass in passes:
        nll_M = target_losses(base, rows_of(of_pass, folded))
        if not of_pass:
            nll_M.sum().backward()
            continue
        share_M = torch.tensor(
            [1 / num_targets[item.adapter] for item in of_pass for _ in item.target_ids], device=nll_M.device
        )
        (nll_M * share_M).sum().backward()
        parts = nll_M.detach().double().cpu().split([len(item.target_ids) for item in of_pass])
        for item, part in zip(of_pass, parts, strict=True):
            totals_K[names.index(item.adapter)] += part.sum() / num_targets[item.adapter]
    for adapter in folded.values():
        if isinstance(adapter, FoldedPrefix | FoldedPrompt):
            adapter.send_back()
    for parameter in cohort.parameters():
        if parameter.grad is None:  # this rank had no row of the adapter
            parameter.grad = torch.zeros_like(parameter)
    comm.reduce_([p.grad for p in cohort.parameters() if p.grad is not None])
    totals_K = comm.sum_(totals_K.to(base.device)).cpu()
    return dict(zip(names, totals_K, strict=True))
