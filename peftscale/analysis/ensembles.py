"""Ensemble: several prompts of one task answer together, over one base and in the passes of one batch.

Answers and likelihoods come from `train.evaluate`; here they are put together.

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 5 (majority vote); the mean of likelihoods is ours.

Shapes:  N adapters   E examples   C labels
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from scipy.special import softmax

from peftscale.train.evaluate import Evaluation, likeliest

Answer = TypeVar("Answer")


def votes(answers_NE: Sequence[Sequence[Answer]]) -> list[list[Answer]]:
    """The most frequent answers to each example: several where they are equally frequent, in the adapters' order."""
    found = []
    for of_example in zip(*answers_NE, strict=True):
        counts = Counter(of_example)
        most = max(counts.values())
        found.append([answer for answer, num in counts.items() if num == most])
    return found


def mean_probabilities(likelihoods_NEC: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """(E, C): the mean over adapters of each label's probability.

    Args:
        likelihoods_NEC: log-likelihoods of label words, in nats. Those of one adapter are normalised over the labels
            first, so that one under which all label words are unlikely counts as much as the others.
    """
    means: list[list[float]] = softmax(likelihoods_NEC, axis=-1).mean(axis=0).tolist()
    return means


def scores(
    results: Sequence[Evaluation], score: Callable[[Sequence[int] | Sequence[str]], Mapping[str, float]]
) -> dict[str, Any]:
    """The adapters of one task apart and together.

    Args:
        results: of each adapter on the same examples.
        score: the metrics of predictions for those examples.

    Returns:
        {"size", "average", "best", "vote", "likelihood"}: number of adapters, then metrics: their mean over adapters,
        their highest (on these very examples, so an upper end), those of the vote, and those of the mean likelihood,
        which is left out where texts are generated. Votes that are equally many are decided by the mean likelihood,
        between texts by the adapter that comes first.
    """
    metrics = list(results[0].metrics)
    answers: list[Any] = [one.predictions for one in results]  # labels of all of them or texts of all of them
    means_EC = mean_probabilities([one.likelihoods for one in results]) if results[0].likelihoods else []
    voted = votes(answers)
    if means_EC:
        voted = [[max(most, key=means_C.__getitem__)] for most, means_C in zip(voted, means_EC, strict=True)]
    found: dict[str, Any] = {
        "size": len(results),
        "average": {metric: sum(one.metrics[metric] for one in results) / len(results) for metric in metrics},
        "best": {metric: max(one.metrics[metric] for one in results) for metric in metrics},
        "vote": dict(score(tuple(most[0] for most in voted))),
    }
    if means_EC:
        found["likelihood"] = dict(score(tuple(map(likeliest, means_EC))))
    return found
