"""Workload of a run: what its first steps and its evaluations put into passes, counted on its own rows.

What it costs is `plan`, which has to guess it from the run file before there is data.
"""

import statistics
from collections.abc import Iterable, Sequence

from peftscale.data.batches import Item, pass_tokens, plan_passes
from peftscale.plan import PassSize, Work

COUNTED_STEPS = 20


def counted(
    steps: Iterable[Sequence[Item]],
    evaluations: Iterable[Sequence[PassSize]],
    *,
    world: int,
    microbatch_tokens: int,
    is_packed: bool,
) -> Work:
    """Sum it up.

    Args:
        steps: items of all ranks, of the first steps. None where nothing is trained.
        evaluations: `evaluate.pass_sizes` of each.
        world: ranks.
        microbatch_tokens: of a pass.
        is_packed: steps are packed.
    """
    passes, tokens, sizes = [], [], []
    for items in steps:
        ranks = plan_passes(items, world=world, microbatch_tokens=microbatch_tokens, is_packed=is_packed)
        passes.append(len(ranks[0]))
        tokens.append(max(sum(pass_tokens(rows, is_packed=is_packed) for rows in of_rank) for of_rank in ranks))
        sizes.append(size_of(ranks, is_packed=is_packed))
    return Work(  # of steps that were: 1.5 passes are none
        passes_per_step=statistics.median_low(passes) if passes else 0,
        tokens_per_step=statistics.median_low(tokens) if tokens else 0,
        step=_largest(sizes),
        evaluated=tuple(size for found in evaluations for size in found),
    )


def size_of(ranks: Iterable[Sequence[Sequence[Item]]], *, is_packed: bool) -> PassSize:
    """Of the passes of all ranks. Texts that are written are never packed."""
    return _largest(
        [
            PassSize(
                tokens=pass_tokens(rows, is_packed=is_packed),
                rows=len(rows),
                targets=sum(len(item.target_ids) for item in rows),
                row_tokens=max(item.num_tokens - len(item.target_ids) - item.num_new_tokens for item in rows),
                new_tokens=max(item.num_new_tokens for item in rows),
                shared_tokens=sum(item.prompt_length for item in rows) if is_packed else 0,
            )
            for passes in ranks
            for rows in passes
            if rows
        ]
    )


def _largest(sizes: Sequence[PassSize]) -> PassSize:
    """The most of each: passes of a run are much alike."""
    keys = PassSize.__slots__
    return PassSize(**{key: max((getattr(size, key) for size in sizes), default=0) for key in keys})
