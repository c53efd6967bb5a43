"""Freed weights go back to the system: without it a rank's memory grows to several times what it needs."""

import os
import subprocess
import sys

import pytest

# Blocks of 8 MiB, freed between small ones that stay: the shape of gathering and dequantising.
_WORK = """
import sys
import torch
from peftscale.base import host_memory
from peftscale.train.memory import measured

if sys.argv[1] == "on":
    host_memory.return_freed()
torch.zeros(31 * 2**20, dtype=torch.uint8)  # freed at once: glibc now keeps everything up to this size
kept = []
with measured(torch.device("cpu")) as peak:
    for _ in range(20):
        blocks = [torch.zeros(8 * 2**20, dtype=torch.uint8) for _ in range(4)]
        kept.append(torch.zeros(100_000, dtype=torch.uint8))
        del blocks
    print(peak.held_bytes())
"""


# Blocks of 1 MiB, which no threshold gives back, freed between small ones that stay: the shape of a pass.
_PASS = """
import sys
import torch
from peftscale.base import host_memory
from peftscale.train.memory import measured

host_memory.return_freed()
with measured(torch.device("cpu")) as peak:
    blocks, kept = [], []
    for _ in range(100):
        blocks.append(torch.zeros(2**20, dtype=torch.uint8))
        kept.append(torch.zeros(10_000, dtype=torch.uint8))
    del blocks
    if sys.argv[1] == "on":
        host_memory.trim(torch.device("cpu"))
    print(peak.held_bytes())
"""
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}


def _held_bytes(work: str, switch: str, **environment: str) -> int:
    command = [sys.executable, "-c", work, switch]
    done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_blocks_are_returned_and_were_kept_without_the_call() -> None:
    assert _held_bytes(_WORK, "on") < 4 * 2**20  # measured 1.95e6: the small tensors that stay
    assert _held_bytes(_WORK, "off") > 32 * 2**20  # the negative control; measured 260e6, of which 2e6 are in use


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_holes_of_a_pass_are_given_back_unless_the_user_has_said_when() -> None:
    assert _held_bytes(_PASS, "on") < 8 * 2**20  # measured 1.5e6: the small tensors that stay
    assert _held_bytes(_PASS, "off") > 64 * 2**20  # the negative control; measured 106e6
    assert _held_bytes(_PASS, "on", MALLOC_TRIM_THRESHOLD_=str(2**30)) > 64 * 2**20
