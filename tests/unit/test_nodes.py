"""Which ranks share a node, as launchers say: as many on each and numbered node by node, or no sharding inside them."""

import pytest

from peftscale.train import nodes


@pytest.mark.parametrize(
    ("of_ranks", "each"),
    [
        ([range(1)], 1),
        ([range(4)] * 4, 4),
        ([range(2), range(2), range(2, 4), range(2, 4)], 2),
        ([range(1), range(1, 2), range(2, 3)], 1),
    ],
)
def test_nodes_that_are_alike_have_so_many_ranks(of_ranks: list[range], each: int) -> None:
    assert nodes.alike(of_ranks) == each


@pytest.mark.parametrize(
    "of_ranks",
    [
        [range(3), range(3), range(3), range(3, 4)],
        [range(1), range(1, 4), range(1, 4), range(1, 4)],
        [range(2), range(2), range(2, 3), range(3, 4)],  # as many as the first one has do divide the world
        [range(2), range(1, 3), range(1, 3), range(2, 4)],  # ranks 0 and 2 on one node, 1 and 3 on the other
        [None, None],
        [range(2), range(2), None, None],
    ],
)
def test_other_nodes_are_not_alike(of_ranks: list[range | None]) -> None:
    assert nodes.alike(of_ranks) is None
