"""Scores over a whole split, against figures worked out by hand."""

import pytest

from peftscale.data import metrics
from peftscale.errors import DataError


def test_accuracy_is_the_share_of_right_labels() -> None:
    assert metrics.score(("accuracy",), [0, 1, 1, 2, 0], [0, 1, 2, 2, 1], num_labels=3) == {"accuracy": 0.6}


def test_macro_f1_weighs_every_label_the_same() -> None:
    # label 0: precision 3/4, recall 3/3 -> 6/7; label 1: precision 0/0, recall 0/1 -> 0
    predictions, truths = [0, 0, 0, 0], [0, 0, 0, 1]
    scores = metrics.score(("macro_f1", "accuracy"), predictions, truths, num_labels=2)
    assert list(scores) == ["macro_f1", "accuracy"]  # the first decides which adapter is the best
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)
    assert scores["accuracy"] == 0.75


def test_a_label_that_nobody_has_counts_as_zero() -> None:
    assert metrics.score(("macro_f1",), [0, 1], [0, 1], num_labels=4) == {"macro_f1": 0.5}


@pytest.mark.parametrize(
    ("prediction", "is_right"),
    [
        ("a bright film", True),
        ("  a bright film\n", True),
        ("A bright film", False),
        ("a  bright film", False),
        ("", False),
    ],
)
def test_exact_match_forgives_blanks_around_the_text_and_nothing_else(prediction: str, is_right: bool) -> None:
    assert metrics.score(("exact_match",), [prediction, "x"], ["a bright film", "y"], num_labels=0) == {
        "exact_match": 0.5 * is_right
    }


def test_exact_match_of_labels_is_their_accuracy() -> None:
    scores = metrics.score(("exact_match", "accuracy"), [0, 10, 1], [0, 1, 1], num_labels=11)
    assert scores["exact_match"] == scores["accuracy"] == pytest.approx(2 / 3)


def test_no_examples_have_no_score() -> None:
    with pytest.raises(DataError, match="metrics accuracy: no examples to score"):
        metrics.score(("accuracy",), [], [], num_labels=2)


def test_a_prediction_too_few_is_our_bug() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        metrics.score(("accuracy",), [1], [1, 0], num_labels=2)


def test_the_interval_is_wilson_s() -> None:
    # p = 8/10, z = 1.959964: (p + z^2/20 -+ z * sqrt(p(1-p)/10 + z^2/400)) / (1 + z^2/10)
    assert metrics.share_interval(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    low, high = metrics.share_interval(0.8, 1000)
    assert 0.77 < low < 0.8 < high < 0.83


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_interval_at_the_edge_is_no_point(share: float) -> None:
    low, high = metrics.share_interval(share, 20)
    assert 0 <= low < high <= 1
    assert high - low == pytest.approx(0.1611, abs=1e-4)
