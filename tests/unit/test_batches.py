"""The order of examples and the dealing to ranks: functions of the run file, never of luck or world size."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftscale.data import batches
from peftscale.data.batches import Cursor, Item, pass_tokens, plan_passes
from peftscale.data.tasks import Example

ITEMS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(1, 200), st.integers(1, 9)), max_size=60
)


def _items(shapes: list[tuple[str, int, int, int]]) -> list[Item]:
    return [
        Item(adapter, prompt, Example(i, (7,) * num_input, (8,) * num_target, None, ""), (8,) * num_target)
        for i, (adapter, prompt, num_input, num_target) in enumerate(shapes)
    ]


def _padded(rows: list[Item]) -> int:
    return max((item.num_tokens for item in rows), default=0) * len(rows)


def test_the_order_is_frozen() -> None:
    # Golden: a change here changes every run, and no checkpoint resumes on the same examples.
    assert batches.indices(0, 0, 7, num_examples=7) == (0, 2, 1, 5, 4, 3, 6)
    assert batches.indices(17, 0, 12, num_examples=5) == (4, 3, 2, 0, 1, 4, 0, 3, 1, 2, 0, 4)
    assert batches.indices(2**64 + 17, 6920 * 3 - 3, 6920 * 3 + 3, num_examples=6920) == (
        1653,
        2198,
        4839,
        4221,
        5455,
        4710,
    )


def test_every_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    epochs = [batches.indices(3, 11 * e, 11 * (e + 1), num_examples=11) for e in range(6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(epochs)) == 6
    assert len({batches.indices(seed, 0, 11, num_examples=11) for seed in range(20)}) == 20


@given(
    seed=st.integers(0, 2**70),
    num_examples=st.integers(1, 23),
    steps=st.lists(st.integers(0, 60), max_size=6),
)
@settings(deadline=None)
def test_steps_of_any_size_walk_through_one_order(seed: int, num_examples: int, steps: list[int]) -> None:
    cursor, walked = Cursor(seed), list[int]()
    for num in steps:
        taken, cursor = cursor.take(num, num_examples=num_examples)
        assert len(taken) == num
        walked.extend(taken)
    assert cursor == Cursor(seed, sum(steps))  # a checkpoint keeps these two numbers and nothing else
    assert tuple(walked) == batches.indices(seed, 0, sum(steps), num_examples=num_examples)


def test_each_place_is_as_likely_for_each_example() -> None:
    counts = Counter(
        (i, place) for e in range(3000) for place, i in enumerate(batches.indices(5, 4 * e, 4 * e + 4, num_examples=4))
    )
    assert len(counts) == 16
    assert max(abs(count - 750) for count in counts.values()) < 120  # 5 standard deviations of 23.7


@given(shapes=ITEMS, world=st.sampled_from([1, 2, 3, 5]), microbatch_tokens=st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_a_pass_of_an_encoder_decoder_is_within_the_bound_with_each_side_as_long_as_its_longest(
    shapes: list[tuple[str, int, int, int]], world: int, microbatch_tokens: int
) -> None:
    items = [
        replace(item, decoder_length=item.prompt_length // 3, example=replace(item.example, has_sides=True))
        for item in _items(shapes)
    ]
    ranks = plan_passes(items, world=world, microbatch_tokens=microbatch_tokens)
    dealt = [item.example.index for passes in ranks for rows in passes for item in rows]
    assert sorted(dealt) == list(range(len(items)))
    for rows in (rows for passes in ranks for rows in passes if rows):
        encoder = max(len(i.example.input_ids) + i.prompt_length - i.prompt_length // 3 for i in rows)
        decoder = max(len(i.target_ids) + i.prompt_length // 3 for i in rows)
        assert pass_tokens(rows, is_packed=False) == len(rows) * (encoder + decoder)
        assert len(rows) * (encoder + decoder) <= microbatch_tokens or len(rows) == 1


@given(shapes=ITEMS, world=st.sampled_from([1, 2, 3, 5]), microbatch_tokens=st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_ranks_together_have_exactly_the_step_in_equally_many_passes(
    shapes: list[tuple[str, int, int, int]], world: int, microbatch_tokens: int
) -> None:
    items = _items(shapes)
    ranks = plan_passes(items, world=world, microbatch_tokens=microbatch_tokens)
    assert len(ranks) == world
    assert len({len(passes) for passes in ranks}) == 1
    dealt = [item for passes in ranks for rows in passes for item in rows]
    assert sorted(item.example.index for item in dealt) == list(range(len(items)))
    for passes in ranks:
        for rows in passes:
            assert _padded(rows) <= microbatch_tokens or len(rows) == 1
    for column in zip(*ranks, strict=True):
        sizes = [len(rows) for rows in column]
        assert sum(sizes) > 0  # a pass that is empty on every rank costs a gather for nothing
        assert max(sizes) - min(sizes) <= 1
    assert all(rows for passes in ranks for rows in passes[:-1])  # only the last pass can be empty somewhere


@given(shapes=ITEMS, microbatch_tokens=st.integers(1, 900))
@settings(deadline=None)
def test_more_ranks_never_need_more_passes(shapes: list[tuple[str, int, int, int]], microbatch_tokens: int) -> None:
    num = [len(plan_passes(_items(shapes), world=w, microbatch_tokens=microbatch_tokens)[0]) for w in (1, 2, 3, 5)]
    assert num == sorted(num, reverse=True)


def test_the_plan_is_the_same_for_whoever_computes_it() -> None:
    shapes = [("a", 4, 10 + 7 * i % 13, 1) for i in range(17)]
    one, other = (plan_passes(_items(shapes), world=3, microbatch_tokens=64) for _ in range(2))
    assert one == other


def test_no_items_are_no_passes_on_any_rank() -> None:
    assert plan_passes([], world=3, microbatch_tokens=10) == [[], [], []]


def test_fewer_items_than_ranks_leave_an_empty_pass() -> None:
    ranks = plan_passes(_items([("a", 2, 5, 1), ("a", 2, 9, 1)]), world=3, microbatch_tokens=100)
    assert [[[item.example.index for item in rows] for rows in passes] for passes in ranks] == [[[1]], [[0]], [[]]]


def test_a_row_longer_than_the_limit_stands_alone() -> None:
    ranks = plan_passes(_items([("a", 0, 5, 1), ("a", 0, 50, 1), ("a", 0, 6, 1)]), world=1, microbatch_tokens=20)
    assert [[item.example.index for item in rows] for rows in ranks[0]] == [[1], [2, 0]]


def test_an_adapter_s_prompt_counts_into_its_rows() -> None:
    shapes = [("short", 1, 9, 1), ("short", 1, 9, 1), ("long", 30, 9, 1)]
    ranks = plan_passes(_items(shapes), world=1, microbatch_tokens=41)
    assert [[item.adapter for item in rows] for rows in ranks[0]] == [["long"], ["short", "short"]]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_get_nearly_the_same_work_in_every_pass(world: int) -> None:
    items = _items([("a", 20, 5 + (i * 7919) % 300, 1) for i in range(900)])  # 5 .. 304 tokens of text
    ranks = plan_passes(items, world=world, microbatch_tokens=4096)
    work = [sum(_padded(rows) for rows in passes) for passes in ranks]
    lockstep = sum(max(_padded(rows) for rows in column) for column in zip(*ranks, strict=True))
    assert max(work) / min(work) < 1.02  # measured up to 1.007
    assert lockstep * world / sum(work) < 1.02  # time lost to waiting; measured up to 1.0033
    in_file_order = [sum(_padded(items[i : i + 12]) for i in range(r * 12, 900, 12 * world)) for r in range(world)]
    assert sum(in_file_order) > 1.5 * sum(work)  # what padding costs without sorting


@given(shapes=ITEMS, world=st.sampled_from([1, 2, 3, 5]), microbatch_tokens=st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_packed_passes_hold_exactly_the_step_and_their_prompts_within_the_limit(
    shapes: list[tuple[str, int, int, int]], world: int, microbatch_tokens: int
) -> None:
    prompts = {adapter: length for adapter, length, *_ in shapes}  # an adapter has one prompt
    items = _items([(adapter, prompts[adapter], *rest) for adapter, _, *rest in shapes])
    ranks = plan_passes(items, world=world, microbatch_tokens=microbatch_tokens, is_packed=True)
    assert len(ranks) == world and len({len(passes) for passes in ranks}) == 1
    dealt = [item for passes in ranks for rows in passes for item in rows]
    assert sorted(item.example.index for item in dealt) == list(range(len(items)))
    for passes in ranks:
        assert all(pass_tokens(rows, is_packed=True) <= microbatch_tokens or len(rows) == 1 for rows in passes)
    assert all(any(column) for column in zip(*ranks, strict=True))  # no gather for nothing


@pytest.mark.parametrize("world", [1, 2, 4])
def test_adapters_that_can_be_dealt_whole_have_their_prompt_computed_on_one_rank(world: int) -> None:
    items = _items([(f"a{i % 16}", 20, 24, 1) for i in range(64)])  # 16 adapters with 4 rows each
    ranks = plan_passes(items, world=world, microbatch_tokens=10**6, is_packed=True)
    assert sum(pass_tokens(rows, is_packed=True) for passes in ranks for rows in passes) == 16 * 20 + 64 * 25
    assert len({pass_tokens(passes[0], is_packed=True) for passes in ranks}) == 1


@pytest.mark.parametrize("num_adapters", [1, 3, 7])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_packed_ranks_get_nearly_the_same_work(num_adapters: int, world: int) -> None:
    items = _items([(f"a{i % num_adapters}", 20, 5 + (i * 7919) % 300, 1) for i in range(900)])
    ranks = plan_passes(items, world=world, microbatch_tokens=4096, is_packed=True)
    work = [sum(pass_tokens(rows, is_packed=True) for rows in passes) for passes in ranks]
    lockstep = sum(max(pass_tokens(rows, is_packed=True) for rows in column) for column in zip(*ranks, strict=True))
    assert max(work) / min(work) < 1.01  # measured up to 1.0015
    assert lockstep * world / sum(work) < 1.04  # measured up to 1.0225


def test_items_of_training_choice_and_generation_have_the_tokens_they_need() -> None:
    example = Example(4, (1, 2, 3), (9,), 1, " good", ((8, 8), (9,)))
    (trained,) = batches.training_items("a", 5, [example])
    assert (trained.target_ids, trained.choice, trained.num_tokens) == ((9,), None, 5 + 3 + 1)
    scored = batches.choice_items("a", 5, [example])
    assert [(item.target_ids, item.choice, item.num_tokens) for item in scored] == [((8, 8), 0, 10), ((9,), 1, 9)]
    (written,) = batches.generation_items("a", 0, [example], num_new_tokens=[40])
    assert (written.target_ids, written.num_new_tokens, written.num_tokens) == ((), 40, 43)
