"""Nodes: which ranks share one, as their launcher says, and the process group of those.

torchrun and Ray Train number ranks node by node and tell each its place, in LOCAL_RANK and LOCAL_WORLD_SIZE. The base
can be sharded over the ranks of a node when all nodes are alike; what it costs is `plan`, how it is done `base.shard`.
"""

import os
from collections.abc import Sequence

import torch.distributed as dist


def own() -> range | None:
    """Ranks of this rank's node; None where the launcher does not say."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return range(1)
    num, place = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("LOCAL_RANK")
    if num is None or place is None:
        return None
    first = dist.get_rank() - int(place)
    return range(first, first + int(num))


def alike(of_ranks: Sequence[range | None]) -> int | None:
    """Ranks of each node, where every node has as many and they are numbered node by node; else None.

    Args:
        of_ranks: what `own` gave on each rank.
    """
    each = len(of_ranks[0] or ())
    if not each or len(of_ranks) % each:
        return None
    expected = [range(rank - rank % each, rank - rank % each + each) for rank in range(len(of_ranks))]
    return each if list(of_ranks) == expected else None


def num_elsewhere(ranks: Sequence[int]) -> int:
    """How many of these ranks are on other nodes; 0 where the launcher does not say."""
    here = own()
    return 0 if here is None else sum(rank not in here for rank in ranks)


def group() -> dist.ProcessGroup:
    """The process group of this rank's node. Every rank of all nodes calls it, once they were found alike."""
    here = own()
    assert here is not None
    of_node: dist.ProcessGroup = dist.new_subgroups(group_size=len(here))[0]
    return of_node
