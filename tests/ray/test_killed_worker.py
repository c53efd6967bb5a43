"""Promise 9 with real Ray: a worker that is killed costs time and nothing else."""

import hashlib
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny

from peftscale import driver, records
from peftscale.config import RunConfig
from peftscale.records import RunSummary, StepRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

STEPS, CHECKPOINT_EVERY, KILL_AT = 60, 10, 25


def _config(tmp: Path, name: str) -> RunConfig:
    return tiny.run_config(
        tmp,
        **{
            "name": name,
            "train.steps": STEPS,
            "train.evaluate_every": 20,
            "train.checkpoint_every": CHECKPOINT_EVERY,
            "cluster.workers": 2,
            "cluster.cpus_per_worker": 0.5,
        },
    )


def _steps(cfg: RunConfig) -> list[int]:
    path = cfg.run_dir / "metrics.jsonl"
    return [r.step for r in records.read(path) if isinstance(r, StepRecord)] if path.exists() else []


def _kill_a_worker_after(cfg: RunConfig, step: int, killed: list[int]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if max(_steps(cfg), default=0) >= step:
            ours = psutil.Process().children(recursive=True)  # another Ray may run on this machine
            workers = [process for process in ours if "RayTrainWorker" in _name(process)]
            workers[-1].kill()  # SIGKILL: nothing of it can run any more
            killed.append(workers[-1].pid)
            return
        time.sleep(0.02)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _digests(cfg: RunConfig) -> dict[str, str]:
    folder = cfg.run_dir / "adapters" / "mood"
    return {
        which: hashlib.sha256((folder / which / "adapter_model.safetensors").read_bytes()).hexdigest()
        for which in ("best", "last")
    }


def _losses(cfg: RunConfig) -> dict[int, float]:
    """The last record of each step."""
    rows = records.read(cfg.run_dir / "metrics.jsonl")
    return {row.step: row.adapters["mood"] for row in rows if isinstance(row, StepRecord)}


def test_a_run_with_a_killed_worker_finishes_by_itself_with_the_same_adapter(tmp_path: Path) -> None:
    calm = _config(tmp_path, "calm")
    summary: RunSummary = driver.run(calm, show=False)
    assert (summary.world_size, summary.sharding, summary.steps) == (2, "world", STEPS)
    assert summary.reduced_bytes_per_step == 5 * 64 * 4
    assert summary.gathered_bytes_per_step == summary.predicted.gathered_bytes_per_step

    stormy = _config(tmp_path, "stormy")
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker_after, args=(stormy, KILL_AT, killed))
    killer.start()
    after: RunSummary = driver.run(stormy, show=False)
    killer.join()
    assert killed  # without a kill the comparison would show nothing

    assert _digests(stormy) == _digests(calm)
    assert _losses(stormy) == _losses(calm)
    repeated = len(_steps(stormy)) - STEPS
    assert 0 < repeated <= CHECKPOINT_EVERY
    # The figures are those of all steps, also of those before the kill.
    assert (after.steps, after.reduced_bytes_per_step) == (STEPS, summary.reduced_bytes_per_step)
    assert after.gathered_bytes_per_step == summary.gathered_bytes_per_step
    ran_before = json.loads((calm.run_dir / "summary.json").read_text())
    assert ran_before["adapters"]["mood"]["after"] == summary.adapters["mood"].after
