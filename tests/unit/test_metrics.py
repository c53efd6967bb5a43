"""Scores over a whole split, against figures worked out by hand."""

import math

import pytest

from peftscale.data import metrics
from peftscale.errors import DataError


def test_accuracy_is_the_share_of_right_labels() -> None:
    assert metrics.of_labels(("accuracy",), [0, 1, 1, 2, 0], [0, 1, 2, 2, 1], num_labels=3) == {"accuracy": 0.6}


def test_macro_f1_weighs_every_label_the_same() -> None:
    # label 0: precision 3/4, recall 3/3 -> 6/7; label 1: precision 0/0, recall 0/1 -> 0
    predictions, truths = [0, 0, 0, 0], [0, 0, 0, 1]
    scores = metrics.of_labels(("macro_f1", "accuracy"), predictions, truths, num_labels=2)
    assert list(scores) == ["macro_f1", "accuracy"]  # the first decides which adapter is the best
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)
    assert scores["accuracy"] == 0.75


def test_a_label_that_nobody_has_counts_as_zero() -> None:
    assert metrics.of_labels(("macro_f1",), [0, 1], [0, 1], num_labels=4) == {"macro_f1": 0.5}


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
    scores = metrics.of_texts(("exact_match",), [prediction, "x"], [("dull", " a bright film"), ("y",)])
    assert scores == {"exact_match": 0.5 * is_right}


def test_exact_match_of_labels_is_their_accuracy() -> None:
    scores = metrics.of_labels(("exact_match", "accuracy"), [0, 10, 1], [0, 1, 1], num_labels=11)
    assert scores["exact_match"] == scores["accuracy"] == pytest.approx(2 / 3)


def test_f1_is_that_of_the_last_label() -> None:
    # MRPC: 3 of 4 that are called equivalent are, and 3 of 5 that are equivalent are called so
    predictions, truths = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0]
    assert metrics.of_labels(("f1",), predictions, truths, num_labels=2)["f1"] == pytest.approx(2 / 3)
    other = metrics.of_labels(("f1",), [1 - p for p in predictions], [1 - t for t in truths], num_labels=2)
    assert other["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_multirc_counts_answers_in_f1_and_questions_in_exact_match() -> None:
    # question a: 3 of 3 answers right; b: a wrong answer taken for right. Pooled: precision 3/4, recall 3/3.
    predictions, truths, groups = [1, 0, 1, 1, 1], [1, 0, 1, 0, 1], ["a", "a", "a", "b", "b"]
    scores = metrics.of_labels(("mean", "f1", "group_exact_match"), predictions, truths, num_labels=2, groups=groups)
    assert scores == pytest.approx({"mean": (6 / 7 + 1 / 2) / 2, "f1": 6 / 7, "group_exact_match": 1 / 2})
    assert list(scores) == ["mean", "f1", "group_exact_match"]
    apart = metrics.of_labels(("group_exact_match",), predictions, truths, num_labels=2, groups=list("abcde"))
    assert apart["group_exact_match"] == 4 / 5  # every answer a question: accuracy


def test_cb_s_score_is_the_mean_of_macro_f1_and_accuracy() -> None:
    # per label: 2/2 and 2/3, 1/2 and 1/1, 0/0 and 0/0: F1 4/5, 2/3, 0
    scores = metrics.of_labels(("mean", "macro_f1", "accuracy"), [0, 0, 1, 1], [0, 0, 0, 1], num_labels=3)
    assert scores == pytest.approx({"mean": (22 / 45 + 3 / 4) / 2, "macro_f1": 22 / 45, "accuracy": 3 / 4})


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        ("the Denver Broncos!", ("Denver Broncos",), 1.0, 1.0),  # case, punctuation and articles do not count
        ("  Denver   Broncos ", ("Denver Broncos",), 1.0, 1.0),
        ("Denver Broncos team", ("Denver Broncos",), 0.8, 0.0),  # precision 2/3, recall 1
        ("Broncos", ("the Denver Broncos", "The Broncos"), 1.0, 1.0),  # the best answer, F1 2/3 and 1
        ("Carolina Panthers", ("Denver Broncos", "Panthers of Carolina"), 0.8, 0.0),  # 2 of 2 and 2 of 3 words
        ("a cat and a cat", ("cat and dog",), 2 / 3, 0.0),  # a word counts as often as it is there: 2 of 3, 2 of 3
        ("Panthers", ("Denver Broncos",), 0.0, 0.0),
        ("", ("Denver Broncos",), 0.0, 0.0),
    ],
)
def test_squad_takes_the_best_answer_after_its_own_normalisation(
    prediction: str, references: tuple[str, ...], f1: float, exact: float
) -> None:
    scores = metrics.of_texts(
        ("squad_exact_match", "squad_f1", "mean"), [prediction, "right"], [references, ("right",)]
    )
    assert scores == pytest.approx(
        {"squad_exact_match": (exact + 1) / 2, "squad_f1": (f1 + 1) / 2, "mean": (exact + f1 + 2) / 4}
    )


def test_bleu_is_that_of_sacrebleu_s_own_example() -> None:
    """The example of its README, which gives 48.53."""
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ("The dog bit the man.", "The dog had bit the man."),
        ("It was not unexpected.", "No one was surprised."),
        ("The man bit him first.", "The man had bitten the dog."),
    ]
    assert metrics.of_texts(("bleu",), said, references)["bleu"] == pytest.approx(0.4853, abs=5e-5)
    # blanks around a text are no part of it
    padded = [f" {text}\n" for text in said]
    assert metrics.of_texts(("bleu",), padded, references)["bleu"] == pytest.approx(0.4853, abs=5e-5)


def test_bleu_by_hand_with_references_of_different_number() -> None:
    # n-grams found: 4/5, 3/4, 2/3, 1/2, as long as the reference; the second text is right in one of its references
    first = metrics.of_texts(("bleu",), ["a b c d e"], [("a b c d f",)])
    assert first["bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    both = metrics.of_texts(("bleu",), ["a b c d e", "v w x y z"], [("a b c d f",), ("1 2 3 4 5", "v w x y z")])
    assert both["bleu"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    # half as long as the reference: brevity penalty exp(1 - 10/5)
    short = metrics.of_texts(("bleu",), ["a b c d e"], [("a b c d e f g h i j",)])
    assert short["bleu"] == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("num", [1, 2, 7])
def test_bleu_of_what_is_all_right_is_one_and_not_a_rounding_more(num: int) -> None:
    said = ["the red boat left the harbour at noon", "it rained the whole long day"] * num
    assert metrics.of_texts(("bleu",), said, [(text,) for text in said])["bleu"] == 1.0


@pytest.mark.parametrize(
    ("prediction", "referent", "is_named"),
    [
        ("The City Councilmen", "city councilmen", True),  # case and determiners
        ("councilmen", "The city councilmen", True),  # a part names the whole
        ("the old city councilmen", "councilmen", True),
        ("demonstrators", "The city councilmen", False),
        ("Fred", "Fred's bike", False),  # a genitive makes it another thing
        ("Fred's", "Fred's bike", True),
        ("the city demonstrators", "the city councilmen", False),
    ],
)
def test_wsc_asks_whether_the_candidate_was_named(prediction: str, referent: str, is_named: bool) -> None:
    for holds in (True, False):
        scores = metrics.of_texts(("referent_accuracy",), [prediction], [(referent,)], holds=[holds])
        assert scores["referent_accuracy"] == (is_named is holds)


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("prediction", ["", "  ", "the"])
def test_saying_nothing_is_never_right(prediction: str, holds: bool) -> None:
    assert metrics.of_texts(("referent_accuracy",), [prediction], [("Fred",)], holds=[holds]) == {
        "referent_accuracy": 0.0
    }


def test_no_examples_have_no_score() -> None:
    with pytest.raises(DataError, match="metrics accuracy: no examples to score"):
        metrics.of_labels(("accuracy",), [], [], num_labels=2)


def test_a_prediction_too_few_is_our_bug() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        metrics.of_labels(("accuracy",), [1], [1, 0], num_labels=2)


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
