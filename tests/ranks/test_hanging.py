"""A rank that hangs is noticed at the session's time-out, in groups that others make too."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

pytestmark = pytest.mark.ranks

TIMEOUT_S = 8.0


def _miss_each_other(how: str, given_up: Path) -> float:
    """Rank 1 does nothing until rank 0 has given up. Returns how long that took."""
    group = dist.new_group(range(2)) if how == "new_group" else dist.new_subgroups(2)[0]
    start_s = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="(?i)timed out"):
            dist.all_reduce(torch.ones(1), group=group)
        given_up.touch()
    while not given_up.exists():
        time.sleep(0.05)
    return time.monotonic() - start_s


@pytest.mark.parametrize("how", ["new_group", "new_subgroups"])  # as DeepSpeed makes its own, and we those of nodes
def test_a_group_without_a_time_out_of_its_own_has_that_of_the_run_file(tmp_path: Path, how: str) -> None:
    waited_s, _ = run_ranks(_miss_each_other, 2, tmp_path, how, tmp_path / "given-up", timeout_s=TIMEOUT_S)
    assert TIMEOUT_S - 1 < waited_s < 2 * TIMEOUT_S  # torch's is half an hour
