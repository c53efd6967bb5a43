"""Evaluation: predictions of adapters on tasks, gathered from the ranks, scored once.

Rows of all adapters and all tasks share passes. Classification compares the likelihood of the label words behind the
input; anything else is generated greedily.
Every rank makes the same number of passes, whatever the split's size. Scores themselves are `data.metrics`.

Shapes:  M target positions   V vocabulary   C labels
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peftscale.adapters import Adapter, Folded
from peftscale.base import host_memory
from peftscale.base.load import Base
from peftscale.base.passes import generate, generates_with, target_logits
from peftscale.config import Metric
from peftscale.data import metrics as scores
from peftscale.data.batches import Item, choice_items, generation_items, plan_passes
from peftscale.data.tasks import Example, TaskData
from peftscale.plan import PassSize
from peftscale.train import comm, workload
from peftscale.train.step import rows_of

BASE_ALONE = ""
"""Adapter name of rows without a prompt. No adapter can have it."""


@dataclass(frozen=True)
class Cell:
    """One adapter on one task."""

    adapter: str
    """Its name, or BASE_ALONE."""
    task: TaskData
    examples: Sequence[Example]
    """Of one split. At least one."""
    metrics: Sequence[Metric]
    """() scores nothing."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one adapter on one split, the same on every rank."""

    metrics: dict[str, float]
    predictions: tuple[int, ...] | tuple[str, ...]
    """A label index or a text for every example, in the split's order."""
    likelihoods: tuple[tuple[float, ...], ...]
    """Log-likelihood of the words of each label, in nats, for every example; () where texts are generated."""
    seconds: float
    """Of all cells that were evaluated together."""


def run(
    base: Base,
    adapters: Mapping[str, Adapter],
    task: TaskData,
    examples: Sequence[Example],
    *,
    metrics: Sequence[Metric],
    microbatch_tokens: int,
    with_base_alone: bool = False,
) -> dict[str, Evaluation]:
    """All adapters on one task: `run_cells`, by adapter.

    Args:
        adapters: name -> adapter.
        with_base_alone: evaluate the base without a prompt too, under the name BASE_ALONE.
    """
    names = [*adapters, BASE_ALONE] if with_base_alone else list(adapters)
    cells = [Cell(name, task, examples, metrics) for name in names]
    return dict(zip(names, run_cells(base, adapters, cells, microbatch_tokens=microbatch_tokens), strict=True))


def run_cells(
    base: Base, adapters: Mapping[str, Adapter], cells: Sequence[Cell], *, microbatch_tokens: int
) -> list[Evaluation]:
    """Evaluate any adapters on any tasks, rows of all of them in the same passes. Every rank calls it.

    Args:
        adapters: name -> adapter, of at least those that cells name.
        cells: what to evaluate. What is classified goes through passes of its own, what is generated through others.

    Returns:
        One result for each cell, in their order.
    """
    if not cells:
        return []
    start, lengths = time.perf_counter(), _lengths(adapters)
    with base.evaluating():
        folded = {name: adapter.folded() for name, adapter in adapters.items()}
        likelihoods = _classify(base, folded, lengths, cells, microbatch_tokens=microbatch_tokens)
        texts = _generate(base, folded, lengths, cells, microbatch_tokens=microbatch_tokens)
    host_memory.trim(base.device)
    seconds = time.perf_counter() - start
    results = []
    for number, cell in enumerate(cells):
        places = [(number, example.index) for example in cell.examples]
        found = tuple(likelihoods[place] for place in places) if cell.task.labels else ()
        predictions = tuple(map(likeliest, found)) if cell.task.labels else tuple(texts[place] for place in places)
        scored = score(cell, predictions) if cell.metrics else {}
        results.append(Evaluation(scored, predictions, found, seconds))
    return results


def pass_sizes(
    base: Base, adapters: Mapping[str, Adapter], cells: Sequence[Cell], *, microbatch_tokens: int
) -> list[PassSize]:
    """The largest passes that `run_cells` would make with these arguments, of each kind that there would be."""
    lengths, world = _lengths(adapters), comm.world_size()
    with torch.no_grad():
        folded = {name: adapter.folded() for name, adapter in adapters.items()}
    compared, written = _compared(lengths, cells), _written(base, folded, lengths, cells).values()
    kinds = [([compared] if compared else [], base.is_packed), (written, False)]
    sizes = []
    for groups, is_packed in kinds:
        ranks = [
            of_rank
            for items in groups
            for of_rank in plan_passes(items, world=world, microbatch_tokens=microbatch_tokens, is_packed=is_packed)
        ]
        if ranks:
            sizes.append(workload.size_of(ranks, is_packed=is_packed))
    return sizes


def _lengths(adapters: Mapping[str, Adapter]) -> dict[str, tuple[int, int]]:
    """Virtual tokens of a row by adapter, and how many of them are the decoder's."""
    both = {name: (adapter.num_positions, adapter.num_positions - adapter.length) for name, adapter in adapters.items()}
    return {BASE_ALONE: (0, 0), **both}


def likeliest(of_labels: Sequence[float]) -> int:
    """The label with the largest value, the first of equal ones."""
    return max(range(len(of_labels)), key=of_labels.__getitem__)


def score(cell: Cell, predictions: Sequence[int] | Sequence[str]) -> dict[str, float]:
    """The cell's metrics of these predictions, labels or texts in the order of its examples."""
    metrics, task, examples = cell.metrics, cell.task, cell.examples
    if task.labels:
        return scores.of_labels(
            metrics,
            [int(label) for label in predictions],
            [example.label or 0 for example in examples],
            num_labels=len(task.labels),
            groups=[example.group for example in examples],
        )
    return scores.of_texts(
        metrics,
        [str(text) for text in predictions],
        [example.references for example in examples],
        holds=[example.target_holds for example in examples],
    )


def _passes(items: Sequence[Item], microbatch_tokens: int, *, is_packed: bool) -> list[list[Item]]:
    world = comm.world_size()
    return plan_passes(items, world=world, microbatch_tokens=microbatch_tokens, is_packed=is_packed)[comm.rank()]


def _classify(
    base: Base,
    adapters: Mapping[str, Folded],
    lengths: Mapping[str, tuple[int, int]],
    cells: Sequence[Cell],
    *,
    microbatch_tokens: int,
) -> dict[tuple[int, int], tuple[float, ...]]:
    """(cell, example index) -> log-likelihood of each label's words, for the cells that have labels."""
    items = _compared(lengths, cells)
    if not items:
        return {}
    likelihoods: dict[tuple[int, int], dict[int, float]] = {}
    for of_pass in _passes(items, microbatch_tokens, is_packed=base.is_packed):
        logits_MV = target_logits(base, rows_of(of_pass, adapters))
        if not of_pass:
            continue
        logp_MV = logits_MV.log_softmax(-1).cpu()
        for item, logp_TV in zip(of_pass, logp_MV.split([len(i.target_ids) for i in of_pass]), strict=True):
            of_example = likelihoods.setdefault((item.cell, item.example.index), {})
            if item.choice is None:
                of_example.update({c: float(logp_TV[0, ids[0]]) for c, ids in enumerate(item.example.choices_ids)})
            else:
                ids_T1 = torch.tensor(item.target_ids)[:, None]
                of_example[item.choice] = float(logp_TV.gather(1, ids_T1).sum())
    merged: dict[tuple[int, int], dict[int, float]] = {}
    for part in comm.gather_objects(likelihoods):
        for place, of_example in part.items():
            merged.setdefault(place, {}).update(of_example)
    return {place: tuple(of_example[c] for c in sorted(of_example)) for place, of_example in merged.items()}


def _compared(lengths: Mapping[str, tuple[int, int]], cells: Sequence[Cell]) -> list[Item]:
    """Rows of the cells that have labels."""
    items: list[Item] = []
    for number, cell in enumerate(cells):
        name, (length, of_decoder) = cell.adapter, lengths[cell.adapter]
        if not cell.task.labels:
            continue
        if cell.task.has_shared_choices and all(len(ids) == 1 for ids in cell.examples[0].choices_ids):
            # One row answers for all labels.
            items += [
                Item(name, length, one, one.choices_ids[0], cell=number, decoder_length=of_decoder)
                for one in cell.examples
            ]
        else:
            items += choice_items(name, length, cell.examples, cell=number, decoder_length=of_decoder)
    return items


def _generate(
    base: Base,
    adapters: Mapping[str, Folded],
    lengths: Mapping[str, tuple[int, int]],
    cells: Sequence[Cell],
    *,
    microbatch_tokens: int,
) -> dict[tuple[int, int], str]:
    """(cell, example index) -> the text that was written, for the cells without labels."""
    groups = _written(base, adapters, lengths, cells)
    if not groups:
        return {}
    texts: dict[tuple[int, int], str] = {}
    for (num, *_), alike in groups.items():
        for of_pass in _passes(alike, microbatch_tokens, is_packed=False):
            written = generate(base, rows_of(of_pass, adapters), max_new_tokens=num)
            for item, ids in zip(of_pass, written, strict=True):
                text = base.tokenizer.decode(ids, skip_special_tokens=True)
                texts[item.cell, item.example.index] = str(text)
    return {place: text for part in comm.gather_objects(texts) for place, text in part.items()}


def _written(
    base: Base, adapters: Mapping[str, Folded], lengths: Mapping[str, tuple[int, int]], cells: Sequence[Cell]
) -> dict[tuple[int, int, int], list[Item]]:
    """Rows of the cells without labels, by what they have in common: the room of each and `generates_with`.

    A row goes on until the last one of its pass, on any rank, has ended: one with less room would leave the base's
    positions behind. So rows of different room go in different passes; as a rule there is one room for all.
    Rows with a prefix go with those of the same one. Groups are in the order of the items, alike on every rank.
    """
    items: list[Item] = []
    for number, cell in enumerate(cells):
        if not cell.task.labels:
            name, (length, of_decoder) = cell.adapter, lengths[cell.adapter]
            room = base.room(0 if name == BASE_ALONE else adapters[name].length)
            num_new = [cell.task.num_new_tokens(example, room=room) for example in cell.examples]
            items += generation_items(
                name, length, cell.examples, num_new_tokens=num_new, cell=number, decoder_length=of_decoder
            )
    groups: dict[tuple[int, int, int], list[Item]] = {}
    for item, row in zip(items, rows_of(items, adapters), strict=True):
        groups.setdefault((item.num_new_tokens, *generates_with(base, row)), []).append(item)
    return groups
