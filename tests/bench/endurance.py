"""Endurance: one run of 300 steps on two Ray workers through 20 SIGKILLs at random moments, then one that takes on a
node.

    python tests/bench/endurance.py [--kills 20] [--steps 300] [--seed 0]

A killed worker must cost time and nothing else: the run finishes, its adapters are bitwise those of an undisturbed run,
no example is skipped or met twice, and no kill costs more than `checkpoint_every` steps. Three kills of four come at a
random step of a stretch of their own and a random moment after it, so wherever the workers then are: in a step, an
evaluation, a save; the fourth comes within a second of the start of the group that the third one brought about. The
second run begins on one node of a Ray cluster and has to grow when another one joins it. Prints a table, appends one
BenchRecord, ends with code 1 where anything of this is not so.
"""

import concurrent.futures
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (sets the environment, before Ray is imported)
import psutil
import ray
import ray_workers
import runs
import tiny
import typer
from ray.cluster_utils import Cluster

from peftscale import configio, driver, records, workers
from peftscale.config import RunConfig

RETRIES, CHECKPOINT_EVERY = 25, 10
PATIENCE_S = 900.0


@dataclass
class Kill:
    """One SIGKILL and what came of it."""

    at_step: int
    """Steps taken by then."""
    while_loading: bool
    """The group had not taken a step since the kill before."""
    num_rows: int
    """Steps on record by then, repeated ones too."""
    killed_s: float
    recovery_s: float | None = None
    """Until the next step was taken."""


def config(tmp: Path, name: str, steps: int, **changes: object) -> RunConfig:
    return tiny.run_config(
        tmp,
        **{
            "name": name,
            "adapters": {
                "mood": {"kind": "prompt", "length": 5, "init": "random"},
                "deep": {"kind": "prefix", "length": 3, "init": "zero", "reparam": "mlp", "reparam_hidden_size": 256},
            },
            "train.steps": steps,
            "train.optimizer": "adafactor",
            "train.learning_rate": 0.05,
            "train.schedule": "linear",
            "train.evaluate_every": 50,
            "train.checkpoint_every": CHECKPOINT_EVERY,
            "cluster.workers": 2,
            "cluster.cpus_per_worker": 0.5,
            "cluster.retries": RETRIES,
            **changes,
        },
    )


class Killer:
    """Kills workers of a run beside it, from a thread."""

    def __init__(self, cfg: RunConfig, number: int, seed: int) -> None:
        self.kills: list[Kill] = []
        self.failed: BaseException | None = None
        self._cfg, self._number, self._draw = cfg, number, random.Random(seed)

    def work(self) -> None:
        try:
            group: list[psutil.Process] = []
            old: list[psutil.Process] = []
            for number in range(self._number):
                old += group
                group = ray_workers.fresh(2, old, timeout_s=PATIENCE_S)
                if number % 4 == 3:  # the group that the kill before brought about, before it can have taken a step
                    self._kill(group, after_s=1.0)
                else:
                    self._wait_for_step()
                    stretch = self._cfg.num_steps // self._number
                    step = number * stretch + self._draw.randrange(stretch)
                    _wait_for(lambda step=step: self._step() >= step)
                    self._kill(group, after_s=0.2)
            ray_workers.fresh(2, old + group, timeout_s=PATIENCE_S)
            self._wait_for_step()
        except BaseException as error:
            self.failed = error

    def _kill(self, group: list[psutil.Process], *, after_s: float) -> None:
        time.sleep(self._draw.uniform(0, after_s))
        num_rows = len(runs.steps(self._cfg))
        is_loading = bool(self.kills) and num_rows == self.kills[-1].num_rows
        self.kills.append(Kill(self._step(), is_loading, num_rows, time.monotonic()))
        self._draw.choice(group).kill()
        print(f"kill {len(self.kills)}: at step {self._step()}{', while loading' * is_loading}", flush=True)

    def _wait_for_step(self) -> None:
        """Of the group that is there; it ends the recovery from the kills before."""
        num_rows = len(runs.steps(self._cfg))  # counted now: the group before may have finished a step as it died
        _wait_for(lambda: len(runs.steps(self._cfg)) > num_rows)
        for kill in self.kills:
            if kill.recovery_s is None:
                kill.recovery_s = time.monotonic() - kill.killed_s

    def _step(self) -> int:
        return max((row.step for row in runs.steps(self._cfg)), default=0)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run stands still, or has ended before the last kill")
        time.sleep(0.02)


def survive(tmp: Path, *, kills: int, steps: int, seed: int) -> dict[str, float]:
    """An undisturbed run, a disturbed one, and what the second one cost. Raises AssertionError where they differ."""
    workers.set_ray_defaults()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 1024**2
    )
    try:
        calm, stormy = config(tmp, "calm", steps), config(tmp, "stormy", steps)
        start_s = time.monotonic()
        driver.run(calm, show=False)
        calm_s = time.monotonic() - start_s
        killer = Killer(stormy, kills, seed)
        thread = threading.Thread(target=killer.work, daemon=True)
        thread.start()
        start_s = time.monotonic()
        driver.run(stormy, show=False)
        stormy_s = time.monotonic() - start_s
        thread.join(timeout=5)
    finally:
        ray.shutdown()
    if killer.failed is not None:
        raise killer.failed
    assert len(killer.kills) == kills
    assert runs.ends(stormy) == runs.ends(calm)
    assert runs.losses(stormy) == runs.losses(calm)
    assert runs.texts(stormy) == runs.texts(calm)
    repeated = runs.repeated(stormy)
    assert max(repeated) <= CHECKPOINT_EVERY and len(repeated) <= kills
    recovery = [kill.recovery_s for kill in killer.kills if kill.recovery_s is not None]
    assert len(recovery) == kills
    return {
        "kills": kills,
        "kills_while_loading": sum(kill.while_loading for kill in killer.kills),
        "steps": steps,
        "adapter_files_equal": len(runs.ends(calm)),
        "repeated_steps": sum(repeated),
        "most_repeated_steps_of_a_kill": max(repeated),
        "median_recovery_s": statistics.median(recovery),
        "longest_recovery_s": max(recovery),
        "undisturbed_s": calm_s,
        "disturbed_s": stormy_s,
    }


def grow(tmp: Path) -> dict[str, float]:
    """A run that begins on one node and takes on a second one. Raises AssertionError where it does not."""
    steps, workers._GROW_EVERY_S = 800, 5.0  # a minute, else, and the run would have to last several
    calm = config(tmp, "small", steps, **{"cluster.workers": 0, "train.checkpoint_every": 100})
    driver.run(calm, show=False)
    growing = config(
        tmp,
        "growing",
        steps,
        **{"cluster.workers": [1, 2], "cluster.cpus_per_worker": 1, "train.checkpoint_every": 100},
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # Ray's node takes over signals, which only this one may
            ended = pool.submit(driver.run, growing, show=False)
            _wait_for(lambda: len(runs.steps(growing)) >= 100 or ended.done())
            joined_s = time.monotonic()
            cluster.add_node(num_cpus=1)
            _wait_for(lambda: any("goes on from" in text for text in runs.notes(growing)) or ended.done())
            grown_s = time.monotonic()
            summary = ended.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert summary.world_size == 2, "the run has not grown"
    assert runs.texts(growing) == runs.texts(calm)
    apart = runs.apart(growing, calm, "mood")
    assert apart < 1e-5, apart
    return {
        "grown_after_s": grown_s - joined_s,
        "grown_apart": apart,
        "grown_repeated_steps": sum(runs.repeated(growing)),
    }


def main(kills: int = 20, steps: int = 300, seed: int = 0, out: Path = Path("bench.jsonl")) -> None:
    """Both runs, the table, the record."""
    with tempfile.TemporaryDirectory(prefix="peftscale-endurance-") as temporary:
        survived = survive(Path(temporary) / "killed", kills=kills, steps=steps, seed=seed)
        _print(survived)
        grown = grow(Path(temporary) / "grown")
        _print(grown)
        fingerprint = configio.fingerprint(config(Path(temporary) / "killed", "calm", steps))
    measured = {**survived, **grown}
    record = records.BenchRecord(
        name="endurance", config_fingerprint=fingerprint, measured=measured, environment=records.environment()
    )
    records.append(out, record)


def _print(measured: dict[str, float]) -> None:
    for name, value in measured.items():
        print(f"{name.replace('_', ' '):<36}{value:>12.4g}", flush=True)


if __name__ == "__main__":
    typer.run(main)
