"""Ensembles: votes, ties and mean likelihoods with known outcomes."""

import math

import pytest

from peftscale.analysis import ensembles
from peftscale.train.evaluate import Evaluation


def test_the_majority_decides_each_example_for_itself() -> None:
    assert ensembles.votes([(0, 1, 2), (0, 2, 2), (1, 2, 2)]) == [[0], [2], [2]]
    assert ensembles.votes([("yes", "a b"), ("no", "a b"), ("no", "c")]) == [["no"], ["a b"]]
    assert ensembles.votes([(0,), (2,), (1,), (1,), (2,)]) == [[2, 1]]


def test_a_sure_adapter_outweighs_two_unsure_ones_in_the_mean_of_likelihoods_but_not_in_the_vote() -> None:
    unsure, sure = (math.log(0.55), math.log(0.45)), (math.log(0.01), math.log(0.99))
    assert ensembles.mean_probabilities([[unsure], [unsure], [sure]])[0][1] == pytest.approx((0.45 * 2 + 0.99) / 3)
    assert ensembles.votes([(0,), (0,), (1,)]) == [[0]]


def test_an_adapter_under_which_all_label_words_are_unlikely_counts_as_much_as_the_others() -> None:
    loud, quiet = (math.log(0.4), math.log(0.6)), (math.log(0.9), math.log(0.1))
    for shift in (0.0, -200.0):
        found = ensembles.mean_probabilities([[loud], [tuple(value + shift for value in quiet)]])
        assert found == [pytest.approx([0.65, 0.35])]


def _evaluation(
    accuracy: float, predictions: tuple[int, ...], likelihoods: tuple[tuple[float, ...], ...]
) -> Evaluation:
    return Evaluation({"accuracy": accuracy}, predictions, likelihoods, seconds=0.0)


def test_average_best_vote_and_likelihood_stand_side_by_side() -> None:
    truths = (0, 0, 1, 1)

    def score(predictions: object) -> dict[str, float]:
        assert isinstance(predictions, tuple)
        return {"accuracy": sum(p == t for p, t in zip(predictions, truths, strict=True)) / 4}

    # Each errs once, elsewhere: together they do not.
    wrong_at = [(1, 0, 1, 1), (0, 1, 1, 1), (0, 0, 1, 0)]
    results = [
        _evaluation(0.75, answers, tuple((math.log(0.8), math.log(0.2))[:: 1 - 2 * a] for a in answers))
        for answers in wrong_at
    ]
    found = ensembles.scores(results, score)  # type: ignore[arg-type]
    assert found["size"] == 3
    assert (found["average"], found["best"]) == ({"accuracy": 0.75}, {"accuracy": 0.75})
    assert (found["vote"], found["likelihood"]) == ({"accuracy": 1.0}, {"accuracy": 1.0})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_tie_is_decided_by_the_likelihood_and_not_by_the_order_of_the_adapters(order: tuple[int, int]) -> None:
    results = [
        _evaluation(0.0, (0,), ((math.log(0.6), math.log(0.4)),)),
        _evaluation(1.0, (1,), ((math.log(0.1), math.log(0.9)),)),
    ]
    found = ensembles.scores(
        [results[at] for at in order], lambda predictions: {"accuracy": float(predictions == (1,))}
    )
    assert found["vote"] == found["likelihood"] == {"accuracy": 1.0}


def test_generated_texts_are_voted_on_and_have_no_likelihood() -> None:
    answers = (("a", 1.0), ("b", 0.0), ("a", 1.0))
    results = [Evaluation({"exact_match": share}, (text,), (), seconds=0.0) for text, share in answers]
    found = ensembles.scores(results, lambda predictions: {"exact_match": float(predictions == ("a",))})
    assert found["vote"] == {"exact_match": 1.0}
    assert found["average"] == {"exact_match": pytest.approx(2 / 3)}
    assert "likelihood" not in found
