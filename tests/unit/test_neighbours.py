"""Neighbours of rows in hand-made vocabularies, where it is known who lies next to whom."""

import pytest
import torch

from peftscale.analysis import neighbours


def test_the_nearest_tokens_are_those_of_the_smallest_angle_whatever_their_length() -> None:
    table_VH = torch.tensor([[1.0, 0, 0], [0, 9, 0], [0, 0, 0.1], [-5, 0, 0]])
    ids_PK, cosines_PK = neighbours.nearest(torch.tensor([[0.0, 3, 4], [7, 0, 0]]), table_VH, k=2)
    assert ids_PK.tolist() == [[2, 1], [0, 1]]  # of tokens 1 and 2, both at a right angle, the smaller id
    torch.testing.assert_close(cosines_PK, torch.tensor([[0.8, 0.6], [1.0, 0.0]]))


def test_a_vocabulary_of_several_pieces_is_searched_whole_and_in_its_own_dtype() -> None:
    torch.manual_seed(0)
    table_VH = torch.randn(20_000, 5).bfloat16()
    wanted = [3, 16_383, 16_384, 19_999]
    ids_PK, cosines_PK = neighbours.nearest(table_VH[wanted].float() * 2, table_VH, k=1)
    assert ids_PK[:, 0].tolist() == wanted
    torch.testing.assert_close(cosines_PK, torch.ones(4, 1))


def test_a_row_of_zeros_is_near_to_nothing() -> None:
    _, cosines_PK = neighbours.nearest(torch.zeros(1, 3), torch.eye(3), k=3)
    assert cosines_PK.tolist() == [[0.0, 0.0, 0.0]]


def test_neighbours_of_one_direction_are_tight_and_those_at_right_angles_are_not() -> None:
    table_VH = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 3]])
    found_P = neighbours.tightness(torch.tensor([[0, 1], [0, 2]]), table_VH)
    torch.testing.assert_close(found_P, torch.tensor([1.0, 0.0]))
    mixed = neighbours.tightness(torch.tensor([[0, 1, 2]]), table_VH)
    torch.testing.assert_close(mixed, torch.tensor([1 / 3]))  # one pair of three


@pytest.mark.parametrize(
    ("one", "other"),
    [(" Technology", "technologies"), ("technological", "technology"), ("entirely", "entire"), ("It", " it")],
)
def test_forms_of_one_word_are_recognised(one: str, other: str) -> None:
    assert neighbours.are_forms_of_one_word(one, other)
    assert neighbours.are_forms_of_one_word(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [("the", "then"), ("good", "goodness"), ("entirely", "completely"), ("", ""), (" ", " "), ("1990", "1991")],
)
def test_other_words_are_not_taken_for_forms_of_one(one: str, other: str) -> None:
    assert not neighbours.are_forms_of_one_word(one, other)


def test_the_largest_family_is_found() -> None:
    assert neighbours.family(["good", " bad", "Bad", "BAD ", "goods"]) == [" bad", "Bad", "BAD "]
    assert neighbours.family(["one", "two"]) == ["one"]
    assert neighbours.family(["", " "]) == [""]


def test_a_word_comes_back_when_two_rows_have_it() -> None:
    texts = [["good", " Good", "bad"], [" good", "the"], ["the", "", "good"], ["", "once"]]
    assert neighbours.recurring(texts) == {"good": 3, "the": 2}
    assert neighbours.rows_near([" Good"], texts) == [0, 1, 2]
    assert neighbours.rows_near(["", "nowhere"], texts) == []


def test_random_rows_are_as_long_as_the_prompt_s_and_leave_the_global_seed_alone() -> None:
    rows_PH = torch.randn(4, 7) * torch.tensor([[0.1], [1], [10], [100]])
    state = torch.random.get_rng_state()
    random_PH = neighbours.random_rows_like(rows_PH, seed=1)
    torch.testing.assert_close(random_PH.norm(dim=1), rows_PH.norm(dim=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(neighbours.random_rows_like(rows_PH, seed=1), random_PH)
    assert not torch.equal(neighbours.random_rows_like(rows_PH, seed=2), random_PH)


def test_rows_inside_clusters_show_them_and_their_random_control_does_not() -> None:
    torch.manual_seed(0)
    centres_CH = torch.randn(40, 64)
    table_VH = (centres_CH[:, None] + 0.1 * torch.randn(40, 5, 64)).flatten(0, 1)
    words = [f"{chr(97 + c % 26) * 2}word{chr(97 + c // 26)}{ending}" for c in range(40) for ending in "vwxyz"]
    rows_PH = 30 * centres_CH[:8]

    def found(values_PH: torch.Tensor) -> tuple[float, float]:
        ids_PK, _ = neighbours.nearest(values_PH, table_VH, k=5)
        families = [len(neighbours.family([words[i] for i in ids])) for ids in ids_PK.tolist()]
        return float(neighbours.tightness(ids_PK, table_VH).mean()), sum(families) / len(families)

    tight, family = found(rows_PH)
    assert tight > 0.98 and family == 5  # measured 0.990
    # A random row has one cluster or pieces of several nearest; a cluster's own words are one direction.
    cosine = neighbours.nearest(rows_PH, table_VH, k=1)[1].mean()
    control_PH = neighbours.random_rows_like(rows_PH, seed=1)
    assert float(cosine) > 0.99
    assert float(neighbours.nearest(control_PH, table_VH, k=1)[1].mean()) < 0.5  # measured 0.26
    no_clusters_VH = torch.randn(200, 64)
    ids_PK, _ = neighbours.nearest(control_PH, no_clusters_VH, k=5)
    assert float(neighbours.tightness(ids_PK, no_clusters_VH).mean()) < 0.2  # measured 0.07
