"""Workers: how many of them a run asks Ray for, and how Ray keeps them going: restarts, other numbers, time-outs.

Joining or starting Ray and what a worker does are `driver`. What is said when they fail in the end comes from `logs`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peftscale import logs
from peftscale.config import RunConfig
from peftscale.errors import ClusterError, TrainingError

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_GROW_EVERY_S = 60.0
"""How often an elastic run looks for room for more workers: each change costs the steps since the last checkpoint."""
_PLACING_S = 10.0
"""How long an elastic run waits for the places of as many workers as Ray counted; it then counts again, because a node
that was lost is counted for a while. Ray places workers on nodes that are there in well under a second."""


def set_ray_defaults() -> None:
    """Before ray is imported. What the user has set stays."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would pack the working directory for local runs
        # One more process for each start of the group. Nobody takes this machine away with a notice.
        _WATCHER: "1" if os.environ.get("RAY_ADDRESS") else "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # one that hangs does not answer, the others do at once
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def is_leaving() -> bool:
    """Whether a node of this run is about to be taken away. Inside of a worker; all of them ask together, and get the
    same answer."""
    import ray.train

    return os.environ.get(_WATCHER) == "1" and ray.train.get_preemption_info() is not None


def refuse_too_much(cfg: RunConfig, num_cpus: float, num_gpus: float, where: str) -> None:
    """Refuse what one machine cannot hold.

    Raises:
        ClusterError: fewer workers have room than the run starts with.
    """
    cluster = cfg.cluster
    for key, each, have in (("cpus", cluster.cpus_per_worker, num_cpus), ("gpus", cluster.gpus_per_worker, num_gpus)):
        if cluster.min_workers * each > have:
            raise ClusterError(
                f"cluster.workers={cluster.min_workers} x cluster.{key}_per_worker={each:g} needs "
                f"{cluster.min_workers * each:g} {key.upper()[:-1]}s, {where} has {have:g}; Ray would wait for ever. "
                f"Lower cluster.workers or cluster.{key}_per_worker."
            )


def refuse_too_few_places(cfg: RunConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """A worker lies on one node: what counts is how many each can hold, not the sum over the cluster.

    Raises:
        ClusterError: fewer workers have room than the run starts with.
    """
    wanted = {"CPU": cfg.cluster.cpus_per_worker, "GPU": cfg.cluster.gpus_per_worker}
    places = sum(
        math.floor(min(node.get(kind, 0) / each for kind, each in wanted.items() if each) + 1e-9) for node in nodes
    )
    if places < cfg.cluster.min_workers:
        raise ClusterError(
            f"cluster.workers={cfg.cluster.min_workers}: the {len(nodes)} node(s) of the Ray cluster have room for "
            f"{places} worker(s) of cluster.cpus_per_worker={wanted['CPU']:g} and "
            f"cluster.gpus_per_worker={wanted['GPU']:g}; Ray would wait for ever. Lower one of the three."
        )


def run(cfg: RunConfig, work: Callable[[dict[str, Any]], dict[str, Any]], config: dict[str, Any], *, own: str) -> Any:
    """Let every worker do `work(config)`, again and again from the start where one of them dies, up to
    `cluster.retries` times.

    Args:
        cfg: the run.
        work: found by its name in the workers' own processes.
        config: its argument.
        own: a place for Ray itself, in the storage. Its name is used once: Ray resumes what it finds.

    Returns:
        What rank 0's `work` returned.

    Raises:
        TrainingError: the workers failed too often.
    """
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = cfg.cluster
    use_gpu, is_training = cluster.gpus_per_worker > 0, config["task"] == "train"
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            # What keeps no checkpoint is not interrupted.
            elastic_resize_monitor_interval_s=_GROW_EVERY_S if is_training else math.inf,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": cluster.cpus_per_worker,
                **({"GPU": cluster.gpus_per_worker} if use_gpu else {}),
            },
        ),
        run_config=RayRunConfig(
            name=own.rpartition("/")[2],
            storage_path=own.rpartition("/")[0],
            failure_config=FailureConfig(max_failures=cluster.retries),
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=math.ceil(cluster.collective_timeout_s)
        ),
    )
    try:
        with _time_outs(cfg):
            return trainer.fit().return_value
    except SystemExit as stop:  # Ray's own answer to Ctrl-C
        raise KeyboardInterrupt from stop
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        causes = [f"rank {rank}: {last_line(cause)}" for rank, cause in sorted(failures.items())]
        gone = [rank for rank, cause in failures.items() if type(cause).__name__.startswith("WorkerHealthCheck")]
        first = logs.cause(cfg.logs_dir, gone)
        said = "" if first is None else f" First: {first} (traceback: peftscale logs {cfg.run_dir})."
        raise TrainingError(f"the workers failed.{said} Ray: {'; '.join(causes) or last_line(error)}") from error


@contextmanager
def _time_outs(cfg: RunConfig) -> Iterator[None]:
    """Those of Ray that follow from the run file, unless the user has set them: Ray reads them from the environment."""
    ours = {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": cfg.cluster.collective_timeout_s}
    if cfg.cluster.is_elastic:
        ours["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = _PLACING_S
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update({name: str(value) for name, value in ours.items()})
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def last_line(error: BaseException) -> str:
    """What an error of Ray comes down to."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
