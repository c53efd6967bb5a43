"""Evaluation: predictions of adapters over a split, gathered from the ranks, scored once.

Classification compares the likelihood of the label words behind the input; anything else is generated greedily.
Every rank makes the same number of passes, whatever the split's size. Scores themselves are `data.metrics`.

Shapes:  M target positions   V vocabulary   C labels
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peftscale.adapters import Adapter, Folded
from peftscale.base.load import Base
from peftscale.base.padded import generate, generates_with
from peftscale.base.passes import target_logits
from peftscale.config import Metric
from peftscale.data import metrics as scores
from peftscale.data.batches import Item, choice_items, generation_items, plan_passes
from peftscale.data.tasks import Example, TaskData
from peftscale.train import comm
from peftscale.train.step import rows_of

BASE_ALONE = ""
"""Adapter name of rows without a prompt. No adapter can have it."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one adapter on one split, the same on every rank."""

    metrics: dict[str, float]
    predictions: tuple[int, ...] | tuple[str, ...]
    """A label index or a text for every example, in the split's order."""
    truths: tuple[int, ...] | tuple[str, ...]
    seconds: float
    """Of all adapters that were evaluated together."""


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
    """Evaluate all adapters over `examples` in the same passes. Every rank calls it.

    Args:
        adapters: name -> adapter.
        with_base_alone: evaluate the base without a prompt too, under the name BASE_ALONE.
    """
    start = time.perf_counter()
    lengths = {name: adapter.length for name, adapter in adapters.items()}
    if with_base_alone:
        lengths[BASE_ALONE] = 0
    base.eval()
    with torch.no_grad():
        folded = {name: adapter.folded() for name, adapter in adapters.items()}
        found = (_classify if task.labels else _generate)(
            base, folded, lengths, task, examples, microbatch_tokens=microbatch_tokens
        )
    base.train()
    seconds = time.perf_counter() - start
    results = {}
    for name in lengths:
        predictions = tuple(found[name, example.index] for example in examples)
        truths = tuple(e.label if task.labels else e.target_text for e in examples)
        scored = scores.score(metrics, predictions, truths, num_labels=len(task.labels))  # type: ignore[arg-type]
        results[name] = Evaluation(scored, predictions, truths, seconds)  # type: ignore[arg-type]
    return results


def _passes(items: Sequence[Item], microbatch_tokens: int, *, is_packed: bool) -> list[list[Item]]:
    world = comm.world_size()
    return plan_passes(items, world=world, microbatch_tokens=microbatch_tokens, is_packed=is_packed)[comm.rank()]


def _classify(
    base: Base,
    adapters: Mapping[str, Folded],
    lengths: Mapping[str, int],
    task: TaskData,
    examples: Sequence[Example],
    *,
    microbatch_tokens: int,
) -> dict[tuple[str, int], int]:
    """(adapter, example index) -> the label whose words are likeliest."""
    is_one_token = task.has_shared_choices and all(len(ids) == 1 for ids in examples[0].choices_ids)
    items: list[Item] = []
    for name, length in lengths.items():
        if is_one_token:  # one row answers for all labels
            items += [Item(name, length, example, example.choices_ids[0]) for example in examples]
        else:
            items += choice_items(name, length, examples)
    likelihoods: dict[tuple[str, int], dict[int, float]] = {}
    for of_pass in _passes(items, microbatch_tokens, is_packed=base.is_packed):
        logits_MV = target_logits(base, rows_of(of_pass, adapters))
        if not of_pass:
            continue
        logp_MV = logits_MV.log_softmax(-1).cpu()
        for item, logp_TV in zip(of_pass, logp_MV.split([len(i.target_ids) for i in of_pass]), strict=True):
            of_example = likelihoods.setdefault((item.adapter, item.example.index), {})
            if item.choice is None:
                of_example.update({c: float(logp_TV[0, ids[0]]) for c, ids in enumerate(item.example.choices_ids)})
            else:
                ids_T1 = torch.tensor(item.target_ids)[:, None]
                of_example[item.choice] = float(logp_TV.gather(1, ids_T1).sum())
    merged: dict[tuple[str, int], dict[int, float]] = {}
    for part in comm.gather_objects(likelihoods):
        for key, of_example in part.items():
            merged.setdefault(key, {}).update(of_example)
    return {key: max(sorted(of_example), key=of_example.__getitem__) for key, of_example in merged.items()}


def _generate(
    base: Base,
    adapters: Mapping[str, Folded],
    lengths: Mapping[str, int],
    task: TaskData,
    examples: Sequence[Example],
    *,
    microbatch_tokens: int,
) -> dict[tuple[str, int], str]:
    """(adapter, example index) -> the text that was written."""
    room = [task.num_new_tokens(example) for example in examples]
    items = [i for n, length in lengths.items() for i in generation_items(n, length, examples, num_new_tokens=room)]
    texts: dict[tuple[str, int], str] = {}
    # A row goes on until the last one of its pass, on any rank, has ended: one with less room would leave the base's
    # positions behind. So rows of different room go in different passes; as a rule there is one room for all.
    # Rows with a prefix go with those of the same one. Groups are in the order of the items, alike on every rank.
    groups: dict[tuple[int, int, int], list[Item]] = {}
    for item, row in zip(items, rows_of(items, adapters), strict=True):
        groups.setdefault((item.num_new_tokens, *generates_with(base, row)), []).append(item)
    for (num, *_), alike in groups.items():
        for of_pass in _passes(alike, microbatch_tokens, is_packed=False):
            written = generate(base, rows_of(of_pass, adapters), max_new_tokens=num)
            for item, ids in zip(of_pass, written, strict=True):
                text = base.tokenizer.decode(ids, skip_special_tokens=True)
                texts[item.adapter, item.example.index] = str(text)
    return {key: text for part in comm.gather_objects(texts) for key, text in part.items()}
