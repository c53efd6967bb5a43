"""Scores of gathered predictions: accuracy, macro-F1, exact match, and an interval for a share.

Works on plain lists of a whole split. Bringing them together from the ranks is `train.evaluate`'s work: a
score is never a mean of ranks' scores.

Source: macro-F1 over all labels of the task, as in T5's `mean_multiclass_f1`; Wilson 1927, score interval.
"""

from collections.abc import Sequence

from peftscale.config import Metric
from peftscale.errors import DataError


def score(
    metrics: Sequence[Metric],
    predictions: Sequence[int] | Sequence[str],
    truths: Sequence[int] | Sequence[str],
    *,
    num_labels: int,
) -> dict[str, float]:
    """Scores between 0 and 1 in the order of `metrics`.

    Args:
        metrics: accuracy and macro_f1 take labels, exact_match takes labels or texts.
        predictions: one for each example, a label (0 .. num_labels-1) or a text.
        truths: in the same order.
        num_labels: of the task, whether or not each occurs: a label that is neither true nor predicted
            anywhere has an F1 of 0, so macro_f1 of a small split can be low. Not read by the others.

    Raises:
        DataError: no examples.
    """
    if not truths:
        raise DataError(f"metrics {', '.join(metrics)}: no examples to score; at least one is needed.")
    scores: dict[str, float] = {}
    for metric in metrics:
        match metric:
            case "accuracy":
                scores[metric] = _share(predictions, truths)
            case "macro_f1":
                from sklearn.metrics import f1_score  # half a second, and scipy with it

                labels = list(range(num_labels))
                scores[metric] = float(f1_score(truths, predictions, labels=labels, average="macro", zero_division=0))
            case "exact_match":
                scores[metric] = _share([_stripped(p) for p in predictions], [_stripped(t) for t in truths])
    return scores


def share_interval(share: float, num_examples: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson interval of an accuracy or exact match that was measured on `num_examples` examples.

    Examples are taken as independent. It does not hold for macro_f1, which is no share of anything.

    Returns:
        Lower and upper end, both within 0 .. 1.
    """
    from scipy.stats import binomtest

    interval = binomtest(round(share * num_examples), num_examples).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _share(predictions: Sequence[int] | Sequence[str], truths: Sequence[int] | Sequence[str]) -> float:
    return sum(p == t for p, t in zip(predictions, truths, strict=True)) / len(truths)


def _stripped(value: int | str) -> str:
    """Blanks around a text are no part of an answer; case and blanks inside it are."""
    return str(value).strip()
