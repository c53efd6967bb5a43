"""Which examples a step trains on, and which of them a rank computes in which pass through the base.

The order is global: a function of the seed and the position, never of the number of workers. Dealing to
ranks is a function of the step's items, the world size and `microbatch_tokens`; every rank computes the plan
of all ranks for itself, and no rank talks. Joining items to tensors is `train.step`.

Order: in epoch e of seed s over N examples, example i has the key w_i, where w_0 .. w_(N-1) are the first N
raw 64-bit words of numpy.random.Philox with the key (s mod 2^64, e). The epoch goes through the examples by
increasing w, equal ones by index. numpy keeps raw words the same for ever (NEP 19), which it does not promise
for `permutation`, nor torch for `randperm`. Other streams of a seed begin elsewhere in Philox's counter. Which examples
an adapter of several tasks meets is `mixtures`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

import functools
import itertools
import math
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftscale.config import Loss
from peftscale.data.tasks import Example
from peftscale.data.tokens import Ids

Permutation = Callable[[int, int, int, int], npt.NDArray[np.int64]]
"""Seed, epoch, number of examples and stream -> the order of that epoch."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where an adapter stands in its order of examples: all that a checkpoint has to keep of the data."""

    seed: int
    position: int = 0
    """Examples that were trained on so far, over all ranks and epochs."""

    def take(self, num: int, *, num_examples: int) -> "tuple[tuple[int, ...], Cursor]":
        """The next `num` examples, as indices 0 .. num_examples-1, and the cursor behind them.

        Across the end of an epoch the next one begins, so a step is never short. A step with more than
        `num_examples` items has examples twice.
        """
        end = self.position + num
        return indices(self.seed, self.position, end, num_examples=num_examples), Cursor(self.seed, end)


@dataclass(frozen=True, slots=True)
class Item:
    """One row of one pass: an example behind an adapter's prompt."""

    adapter: str
    prompt_length: int
    """Virtual tokens in front of the row; 0 for the base alone."""
    example: Example
    target_ids: Ids
    """What is scored behind the input; () where it is to be generated."""
    choice: int | None = None
    """Which label's words `target_ids` are, when all labels of an example are scored."""
    num_new_tokens: int = 0
    """Room for what is generated behind the input."""
    cell: int = 0
    """Which of the (adapter, task) pairs of an evaluation it belongs to."""
    among: Ids = ()
    """The tokens of all labels, where the loss is that of one among them."""
    decoder_length: int = 0
    """How many of the virtual tokens stand in front of what a decoder beside an encoder reads."""

    @property
    def num_tokens(self) -> int:
        """Length of the row at its longest: virtual tokens, input, target, generated."""
        return sum(self.sides)

    @property
    def sides(self) -> tuple[int, int]:
        """Of these what the encoder reads and what the decoder does; all and none where the base has no two sides."""
        in_front = self.prompt_length - self.decoder_length + len(self.example.input_ids)
        behind = self.decoder_length + len(self.target_ids) + self.num_new_tokens
        return (in_front, behind) if self.example.has_sides else (in_front + behind, 0)


@functools.lru_cache(maxsize=64)  # shared by those of one seed; who walks through an order keeps it (`mixtures`)
def permutation(seed: int, epoch: int, num_examples: int, stream: int) -> npt.NDArray[np.int64]:
    """The order of one epoch, (num_examples,). Shared by its callers: read only."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)  # the highest word: no stream runs into another
    order = np.argsort(np.random.Philox(key=key, counter=counter).random_raw(num_examples), kind="stable")
    order.setflags(write=False)
    return order


def indices(
    seed: int, start: int, stop: int, *, num_examples: int, stream: int = 0, kept: Permutation = permutation
) -> tuple[int, ...]:
    """The examples at the positions start .. stop-1 of an endless order of `seed`; each stream is another order.

    `kept` is `permutation` with a cache of the caller's.
    """
    assert num_examples > 0
    taken: list[int] = []
    while start < stop:
        epoch, first = divmod(start, num_examples)
        last = min(num_examples, first + stop - start)
        taken.extend(kept(seed, epoch, num_examples, stream)[first:last].tolist())
        start += last - first
    return tuple(taken)


def checksum(items: Iterable[Item]) -> int:
    """Of who is trained on what, in this order: 32 bits."""
    found = 0
    for item in items:
        ids = array("q", (*item.example.input_ids, -1, *item.target_ids))
        found = zlib.crc32(ids.tobytes(), zlib.crc32(item.adapter.encode(), found))
    return found


def training_items(
    adapter: str, prompt_length: int, examples: Iterable[Example], *, loss: Loss = "vocabulary", decoder_length: int = 0
) -> list[Item]:
    """Each example with its own target: for a step, or for the loss over a split."""
    return [
        Item(
            adapter,
            prompt_length,
            example,
            example.target_ids,
            among=tuple(ids[0] for ids in example.choices_ids) if loss == "labels" else (),
            decoder_length=decoder_length,
        )
        for example in examples
    ]


def choice_items(
    adapter: str, prompt_length: int, examples: Iterable[Example], *, cell: int = 0, decoder_length: int = 0
) -> list[Item]:
    """Each example once for each label: the likelihoods that classification compares."""
    return [
        Item(adapter, prompt_length, example, ids, choice=choice, cell=cell, decoder_length=decoder_length)
        for example in examples
        for choice, ids in enumerate(example.choices_ids)
    ]


def generation_items(
    adapter: str,
    prompt_length: int,
    examples: Iterable[Example],
    *,
    num_new_tokens: Sequence[int],
    cell: int = 0,
    decoder_length: int = 0,
) -> list[Item]:
    """Each example's input with room for so many new tokens (`TaskData.num_new_tokens`)."""
    return [
        Item(adapter, prompt_length, example, (), num_new_tokens=num, cell=cell, decoder_length=decoder_length)
        for example, num in zip(examples, num_new_tokens, strict=True)
    ]


def plan_passes(
    items: Sequence[Item], *, world: int, microbatch_tokens: int, is_packed: bool = False
) -> list[list[list[Item]]]:
    """Deal the rows of a step, or of a whole split, to ranks and passes.

    Ranks go through the base in lockstep, because gathering its weights takes all of them: a pass is as slow as
    its slowest rank, and one more pass costs one more gather of everything. So padded passes take as many rows as fill
    `microbatch_tokens` on every rank, longest first: nobody waits, and rows of a pass are of nearly one length. For
    packed ones rows of an adapter stay together as far as the ranks' loads stay even, because its prompt is computed
    once for each pass that has a row of it.

    Args:
        items: of all adapters. The plan depends on their order only between rows of equal length.
        world: ranks.
        microbatch_tokens: most tokens in one pass of one rank, as `pass_tokens` counts them. A row that is longer
            than this by itself stands alone in its pass.
        is_packed: passes are packed.

    Returns:
        [rank][pass] -> rows. Every rank has the same number of passes, and the rows of all of them are
        exactly `items`; where the last passes have too few rows for all ranks, some ranks have empty ones.
    """
    assert world > 0 and microbatch_tokens > 0
    queue = sorted(items, key=lambda item: [-side for side in item.sides])  # stable, so equal on every rank
    if is_packed:
        ranks = [_filled(share, microbatch_tokens) for share in _dealt(queue, world)]
        num_passes = max(len(passes) for passes in ranks)
        return [passes + [[] for _ in range(num_passes - len(passes))] for passes in ranks]
    ranks = [[] for _ in range(world)]
    while queue:
        shares, queue = _take_padded(queue, world, microbatch_tokens)
        for passes, share in zip(ranks, shares, strict=True):
            passes.append(share)
    return ranks


def pass_tokens(rows: Sequence[Item], *, is_packed: bool) -> int:
    """Tokens that one pass computes: padded rows are as long as the longest of each side; packed ones share prompts."""
    if not is_packed:
        return len(rows) * sum(_longest(rows))
    prompts = {row.adapter: row.prompt_length for row in rows}
    return sum(prompts.values()) + sum(row.num_tokens - row.prompt_length for row in rows)


def _take_padded(queue: list[Item], world: int, most: int) -> tuple[list[list[Item]], list[Item]]:
    """Rows of one pass by rank, dealt in turn, and what is left."""
    num_rows, longest = 0, (0, 0)
    while num_rows < len(queue):
        of_next = _longest(queue[num_rows : num_rows + world])
        longest = max(longest[0], of_next[0]), max(longest[1], of_next[1])
        if num_rows and (num_rows // world + 1) * sum(longest) > most:
            break
        num_rows += world
    return [queue[rank:num_rows:world] for rank in range(world)], queue[num_rows:]


def _longest(rows: Sequence[Item]) -> tuple[int, int]:
    """Of each side."""
    return max((row.sides[0] for row in rows), default=0), max((row.sides[1] for row in rows), default=0)


def _dealt(queue: Sequence[Item], world: int) -> list[list[Item]]:
    """Rows by rank: those of an adapter on one rank, or on as few as keep the loads even."""
    by_adapter: dict[str, list[Item]] = {}
    for item in queue:
        by_adapter.setdefault(item.adapter, []).append(item)
    even = math.ceil(sum(pass_tokens(rows, is_packed=True) for rows in by_adapter.values()) / world)
    shares: list[list[Item]] = [[] for _ in range(world)]
    loads = [0] * world
    for rows in sorted(by_adapter.values(), key=lambda rows: -pass_tokens(rows, is_packed=True)):
        prompt = rows[0].prompt_length
        emptiest = sorted(range(world), key=loads.__getitem__)
        room = itertools.accumulate(max(0, even - loads[rank] - prompt) for rank in emptiest)
        num = 1 + sum(space < pass_tokens(rows, is_packed=True) - prompt for space in room)
        ahead = dict.fromkeys(emptiest[:num], prompt)  # what a rank still has to compute before its first row
        for item in rows:  # longest first, so that ranks get long and short ones alike
            rank = min(ahead, key=lambda at: loads[at] + ahead[at])
            shares[rank].append(item)
            loads[rank] += ahead[rank] + item.num_tokens - prompt
            ahead[rank] = 0
    return shares


def _filled(rows: Sequence[Item], most: int) -> list[list[Item]]:
    """Passes of one rank: rows in their order, until one would not fit."""
    passes: list[list[Item]] = []
    load, there = 0, set[str]()
    for item in rows:
        load += item.num_tokens - (item.prompt_length if item.adapter in there else 0)
        if not passes or load > most:
            passes.append([])
            load, there = item.num_tokens, set()
        passes[-1].append(item)
        there.add(item.adapter)
    return passes
