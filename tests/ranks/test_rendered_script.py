"""A rendered script runs: two ranks of torchrun train a few steps of the quickstart, from nothing but the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ranks
def test_the_torchrun_script_trains_on_two_ranks(tmp_path: Path) -> None:
    few = ["train.steps=2", "train.evaluate_every=2", "train.checkpoint_every=2", f"cluster.storage={tmp_path}/runs"]
    done = commands.run("render", ROOT / "configs" / "quickstart.yaml", *few, "--target", "torchrun", "--out", tmp_path)
    assert done.code == 0, done.err
    script = tmp_path / "quickstart.torchrun.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", script, "--json"], capture_output=True, text=True, timeout=240, env={**os.environ, "PATH": path}
    )
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert (summary["world_size"], summary["steps"], summary["sharding"]) == (2, 2, "world")
