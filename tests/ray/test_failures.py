"""Promise 9 with real Ray: workers that are killed, or that hang, cost time and nothing else. Lost nodes are
`test_nodes.py`, many kills `tests/bench/endurance.py`."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import ray_workers
import runs
import tiny

from peftscale import driver, workers
from peftscale.config import RunConfig
from peftscale.errors import TrainingError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS, CHECKPOINT_EVERY = 60, 10
PROMPT = {"kind": "prompt", "length": 5, "init": "vocabulary"}
LARGE = {"kind": "prefix", "length": 3, "init": "zero", "reparam": "mlp", "reparam_hidden_size": 4096}
"""4.3 MB, and 8.6 MB of moments: writing them takes long enough to be met."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all runs of this file are kept, with one Ray for all of them."""
    workers.set_ray_defaults()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 1024**2
    )
    try:
        yield tmp_path_factory.mktemp("failures")
    finally:
        ray.shutdown()


def _config(tmp: Path, name: str, **changes: object) -> RunConfig:
    return tiny.run_config(
        tmp,
        **{
            "name": name,
            "adapters": {"mood": PROMPT, "deep": LARGE},
            "train.steps": STEPS,
            "train.evaluate_every": 20,
            "train.checkpoint_every": CHECKPOINT_EVERY,
            "cluster.workers": 2,
            "cluster.cpus_per_worker": 0.5,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def calm(folder: Path) -> RunConfig:
    """A run that nothing happened to."""
    cfg = _config(folder, "calm")
    summary = driver.run(cfg, show=False)
    assert (summary.world_size, summary.sharding, summary.steps) == (2, "world", STEPS)
    assert summary.reduced_bytes_per_step == summary.predicted.reduced_bytes_per_step > 4e6
    assert summary.gathered_bytes_per_step == summary.predicted.gathered_bytes_per_step
    return cfg


def _disturbed(cfg: RunConfig, disturb: Callable[[RunConfig], None]) -> None:
    """Run to the end while `disturb` does its worst beside it."""
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            disturb(cfg)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        driver.run(cfg, show=False)
    finally:
        thread.join()
    assert not failed, failed


def _assert_same(cfg: RunConfig, calm: RunConfig, *, most_repeated: int) -> None:
    assert runs.ends(cfg) == runs.ends(calm)
    assert runs.losses(cfg) == runs.losses(calm)
    assert runs.texts(cfg) == runs.texts(calm)
    assert 0 < len(runs.steps(cfg)) - STEPS <= most_repeated


def _workers_at(cfg: RunConfig, step: int, old: list[psutil.Process] | None = None) -> list[psutil.Process]:
    """The two workers, new ones where there are old ones, once they have taken the step."""
    _wait_for(lambda: bool(runs.steps(cfg)))
    found = ray_workers.fresh(2, old or [])
    _wait_for(lambda: runs.steps(cfg)[-1].step >= step)
    return found


def _kill_in_a_step_and_in_a_save(cfg: RunConfig) -> None:
    first = _workers_at(cfg, 25)
    first[-1].kill()  # SIGKILL: nothing of it can run any more
    second = _workers_at(cfg, 0, old=first)
    while True:  # the next save that is met while its files are being written
        _wait_for(lambda: any(cfg.checkpoints_dir.glob(".step-*.partial")), every_s=0.001)
        for process in second:
            process.suspend()
        if partial := list(cfg.checkpoints_dir.glob(".step-*.partial")):
            break
        for process in second:
            process.resume()
    for process in second:
        process.kill()
    assert partial[0].exists() and not (cfg.checkpoints_dir / partial[0].name[1:].removesuffix(".partial")).exists()


def _wait_for(condition: Callable[[], bool], *, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every_s)


def test_workers_killed_in_a_step_and_in_a_save_cost_time_and_nothing_else(folder: Path, calm: RunConfig) -> None:
    cfg = _config(folder, "killed")
    _disturbed(cfg, _kill_in_a_step_and_in_a_save)
    _assert_same(cfg, calm, most_repeated=2 * CHECKPOINT_EVERY)
    assert sum("goes on from" in text for text in runs.notes(cfg)) == 2
    assert sorted(path.name for path in cfg.checkpoints_dir.iterdir()) == ["step-50", "step-60"]


def test_a_worker_that_hangs_is_replaced_once_the_others_have_waited_long_enough(folder: Path, calm: RunConfig) -> None:
    cfg, hung = _config(folder, "hung", **{"cluster.collective_timeout_s": 10}), list[psutil.Process]()

    def stop_one(cfg: RunConfig) -> None:
        hung.append(_workers_at(cfg, 25)[-1])
        hung[0].suspend()  # SIGSTOP: it is there, and does nothing

    _disturbed(cfg, stop_one)
    _assert_same(cfg, calm, most_repeated=CHECKPOINT_EVERY)
    assert not hung[0].is_running()


def test_a_run_that_is_given_up_says_which_rank_was_killed_and_where(folder: Path) -> None:
    cfg, host = _config(folder, "given-up", **{"cluster.retries": 0}), re.escape(socket.gethostname())
    word = rf"First: rank [01] on {host} was killed or hangs, without a word; it was missed by rank [01] on {host}"
    with pytest.raises(TrainingError, match=word):
        _disturbed(cfg, lambda cfg: _workers_at(cfg, 5)[-1].kill())
