"""Scores of gathered predictions, and an interval for a share.

Works on plain lists of a whole split. Bringing them together from the ranks is `train.evaluate`'s work: a
score is never a mean of ranks' scores. F1 is scikit-learn's, SQuAD's rules are torchmetrics', BLEU is sacrebleu's with
its default tokeniser (13a).

Source: macro_f1 over all labels of the task, as in T5's `mean_multiclass_f1`; f1 and group_exact_match are F1a and EM
of MultiRC, Khashabi et al. 2018; referent_accuracy is T5's reading of WSC, its `postprocessors.wsc_simple`; Rajpurkar
et al. 2016 (SQuAD), whose rules ReCoRD has taken over; Wilson 1927, score interval.
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftscale.config import Metric
from peftscale.errors import DataError

_DETERMINERS = {"a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some", "that", "the"}
_DETERMINERS |= {"their", "these", "this", "those", "which", "whose", "your"}

_LIBRARIES = {"f1": "sklearn.metrics", "macro_f1": "sklearn.metrics", "bleu": "sacrebleu"}
_LIBRARIES |= dict.fromkeys(("squad_f1", "squad_exact_match"), "torchmetrics.functional.text")


def import_libraries(metrics: Iterable[Metric]) -> None:
    """Import what scoring these takes, before memory is measured: up to 60 MB that are not the base's."""
    for library in sorted({_LIBRARIES[metric] for metric in metrics if metric in _LIBRARIES}):
        importlib.import_module(library)


def of_labels(
    metrics: Sequence[Metric],
    predictions: Sequence[int],
    truths: Sequence[int],
    *,
    num_labels: int,
    groups: Sequence[str | None] = (),
) -> dict[str, float]:
    """Scores between 0 and 1 of a classification, in the order of `metrics`.

    Args:
        metrics: those for labels, as `TaskConfig` checks.
        predictions: one for each example, 0 .. num_labels-1.
        truths: in the same order.
        num_labels: of the task, whether or not each occurs: a label that is neither true nor predicted
            anywhere has an F1 of 0, so macro_f1 of a small split can be low. f1 is that of the last label.
        groups: of each example, for group_exact_match: a group is right where all of its examples are.

    Raises:
        DataError: no examples.
    """
    _refuse_none(metrics, truths)
    are_right = [p == t for p, t in zip(predictions, truths, strict=True)]
    found: dict[str, float] = {}
    for metric in metrics:
        match metric:
            case "accuracy" | "exact_match":
                found[metric] = _share(are_right)
            case "macro_f1":
                found[metric] = _f1(predictions, truths, range(num_labels))
            case "f1":
                found[metric] = _f1(predictions, truths, [num_labels - 1])
            case "group_exact_match":
                of_group: dict[str | None, list[bool]] = {}
                for group, is_right in zip(groups, are_right, strict=True):
                    of_group.setdefault(group, []).append(is_right)
                found[metric] = _share([all(answers) for answers in of_group.values()])
    return _in_order(metrics, found)


def of_texts(
    metrics: Sequence[Metric],
    predictions: Sequence[str],
    references: Sequence[tuple[str, ...]],
    *,
    holds: Sequence[bool] = (),
) -> dict[str, float]:
    """Scores between 0 and 1 of generated texts, in the order of `metrics`.

    Args:
        metrics: those for texts, as `TaskConfig` checks.
        predictions: one for each example.
        references: in the same order, all right texts of each: the best match counts, and BLEU takes all of them.
        holds: for referent_accuracy, whether the one reference is the right one.

    Raises:
        DataError: no examples.
    """
    _refuse_none(metrics, references)
    said = [text.strip() for text in predictions]
    right = [tuple(text.strip() for text in of_one) for of_one in references]
    found: dict[str, float] = {}
    for metric in metrics:
        match metric:
            case "exact_match":
                found[metric] = _share([text in of_one for text, of_one in zip(said, right, strict=True)])
            case "squad_f1" | "squad_exact_match" if metric not in found:
                found |= _squad(said, right)
            case "referent_accuracy":
                names = [_is_referent(text, of_one[0]) for text, of_one in zip(said, right, strict=True)]
                found[metric] = _share([is_named is it for is_named, it in zip(names, holds, strict=True)])
            case "bleu":
                found[metric] = _bleu(said, right)
    return _in_order(metrics, found)


def share_interval(share: float, num_examples: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson interval of an accuracy or exact match that was measured on `num_examples` examples.

    Examples are taken as independent. It does not hold for an F1, a mean or BLEU, which are no share of anything.

    Returns:
        Lower and upper end, both within 0 .. 1.
    """
    from scipy.stats import binomtest

    interval = binomtest(round(share * num_examples), num_examples).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _refuse_none(metrics: Sequence[Metric], truths: Sequence[object]) -> None:
    if not truths:
        raise DataError(f"metrics {', '.join(metrics)}: no examples to score; at least one is needed.")


def _in_order(metrics: Sequence[Metric], found: Mapping[str, float]) -> dict[str, float]:
    """The scores that were asked for, with the mean of the others where that is one of them."""
    others = [found[metric] for metric in metrics if metric != "mean"]
    return {metric: sum(others) / len(others) if metric == "mean" else found[metric] for metric in metrics}


def _share(are_right: Sequence[bool]) -> float:
    return sum(are_right) / len(are_right)


def _f1(predictions: Sequence[int], truths: Sequence[int], labels: Iterable[int]) -> float:
    """The mean of the F1 of these labels."""
    from sklearn.metrics import f1_score  # half a second, and scipy with it

    return float(f1_score(truths, predictions, labels=list(labels), average="macro", zero_division=0))


def _squad(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """F1 over words and exact match, both without case, punctuation and articles; the best reference counts."""
    from torchmetrics.functional.text import squad  # a second

    answers: list[Any] = [{"id": str(i), "answers": {"text": list(of_one)}} for i, of_one in enumerate(references)]
    found = squad([{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)], answers)
    return {"squad_f1": float(found["f1"]) / 100, "squad_exact_match": float(found["exact_match"]) / 100}


def _bleu(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """BLEU of the whole split, the usual figure divided by 100."""
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    streams = [[of_one[i] if i < len(of_one) else None for of_one in references] for i in range(most)]
    return min(1.0, float(corpus_bleu(list(predictions), streams).score) / 100)  # all right is 100.00000000000004


def _is_referent(prediction: str, referent: str) -> bool | None:
    """Whether a prediction names the referent: one is part of the other, apart from case and determiners.

    A genitive in only one of the two makes them different things: Fred and Fred's bike. None, which is right nowhere,
    for a prediction that says nothing.
    """
    said, meant = (
        {word for word in text.lower().split() if word not in _DETERMINERS} for text in (prediction, referent)
    )
    if not said:
        return None
    if not meant or any("'" in word for word in said) != any("'" in word for word in meant):
        return False
    return said <= meant or meant <= said
