"""Nodes that go away, on a Ray cluster of three nodes on this machine: with a notice, and without one. The run goes on
with what is left."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import runs
import tiny
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from peftscale import driver
from peftscale.config import RunConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS, CHECKPOINT_EVERY, NOTICE_S = 400, 50, 4
QUICKLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head and two more nodes with one CPU each, whom runs join as they would join any cluster."""
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": QUICKLY}
    )
    try:
        made.add_node(num_cpus=1)
        made.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
        monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
        monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def _config(tmp: Path, name: str, **changes: object) -> RunConfig:
    return tiny.run_config(
        tmp,
        **{
            "name": name,
            "adapters": {"mood": {"kind": "prompt", "length": 5, "init": "random"}},
            "train.steps": STEPS,
            "train.optimizer": "adafactor",
            "train.schedule": "linear",
            "train.learning_rate": 0.05,
            "train.evaluate_every": 200,
            "train.checkpoint_every": CHECKPOINT_EVERY,
            **changes,
        },
    )


class _Nodes:
    """Takes two nodes away from a run, one after the other. Its driver's node stays."""

    def __init__(self, cluster: Cluster, cfg: RunConfig) -> None:
        self._cluster, self._cfg = cluster, cfg
        self.failed: BaseException | None = None

    def take_away(self) -> None:
        try:
            drained, lost = self._cluster.worker_nodes
            self._wait_for(60)
            self._drain(drained.node_id)
            self._wait_for_restarts(1)
            self._wait_for(runs.steps(self._cfg)[-1].step + 60)
            raylet = lost.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process
            psutil.Process(raylet.pid).kill()
        except BaseException as error:
            self.failed = error

    def _drain(self, node_id: str) -> None:
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "wanted back"]
        left = ["--deadline-remaining-seconds", str(NOTICE_S)]
        ray_command = Path(sys.executable).with_name("ray")
        command = [ray_command, "drain-node", "--address", self._cluster.address, "--node-id", node_id, *reason, *left]
        subprocess.run(command, check=True, capture_output=True)

    def _wait_for(self, step: int) -> None:
        self._wait(lambda: max((row.step for row in runs.steps(self._cfg)), default=0) >= step)

    def _wait_for_restarts(self, number: int) -> None:
        self._wait(lambda: sum("goes on from" in text for text in runs.notes(self._cfg)) >= number)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_an_elastic_run_goes_on_without_a_drained_and_a_lost_node_and_ends_where_it_would_have(
    tmp_path: Path, cluster: Cluster
) -> None:
    calm, elastic = _config(tmp_path, "calm"), _config(tmp_path, "elastic", **{"cluster.workers": [1, 3]})
    driver.run(calm, show=False)  # in this process
    nodes = _Nodes(cluster, elastic)
    thread = threading.Thread(target=nodes.take_away)
    thread.start()
    summary = driver.run(elastic, show=False)
    thread.join()
    assert nodes.failed is None
    assert summary.world_size == 1

    notes = runs.notes(elastic)
    notice, first, second = [text for text in notes if "taken away" in text or "goes on from" in text]
    assert "every step is saved" in notice
    assert first.endswith(", on 2 rank(s) where there were 3") and second.endswith(", on 1 rank(s) where there were 2")
    # The second one went back to a checkpoint; the first one had saved its last step, or the one before that.
    assert sum(runs.repeated(elastic)) <= 1 + CHECKPOINT_EVERY
    assert all(number <= 1 for number in runs.repeated(elastic)[:-1])
    assert runs.texts(elastic) == runs.texts(calm)
    assert runs.apart(elastic, calm, "mood") < 1e-5
