"""The driver: work of a run file, in this process or as Ray workers: train, evaluate, generate.

Ray starts the workers, restarts a dead group, and carries the result back (`workers`); checkpoints and metrics are
ours. What a worker does is `train.worker` and `train.use`.
"""

import contextlib
import errno
import logging
import os
import shutil
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from peftscale import (
    auth,
    configio,
    errors,
    gauges,
    logs,
    machine,
    progress,
    records,
    redaction,
    storage,
    workers,
)
from peftscale.config import RunConfig, TaskConfig
from peftscale.errors import CheckpointError, ClusterError, ConfigError, PeftscaleError, TrainingError
from peftscale.records import NoteRecord, Record, RunSummary, StepRecord
from peftscale.task_config import Split

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 * 1024**2  # Ray's least; nothing of ours goes through it
_NOT_RESUMED = {
    "full_finetuning": "full fine-tuning keeps its best weights in full_finetuning/best, and no optimizer state.",
    "few_shot": "prompt design trains nothing, so there is nothing to go on from.",
}


def run(cfg: RunConfig, *, resume: bool = False, show: bool = True) -> RunSummary:
    """Train the cohort of a run file, or do what its `method` says.

    Args:
        cfg: the run. Its name is used once: a second run with it is refused, unless it goes on.
        resume: go on from the newest checkpoint of the run of this name.
        show: print progress to standard error.

    Raises:
        PeftscaleError: the user's input is wrong, and nothing of a new run is left behind; or its disk or store cannot
            be written, and what it has is kept.
        TrainingError: the run failed.
    """
    if resume and not cfg.keeps_checkpoints:
        raise CheckpointError(
            f"--resume {cfg.name}: {_NOT_RESUMED[cfg.method]} Start it under another name, or all of it again with "
            f"--finish."
        )
    return _run(cfg, resume=resume, show=show)


def _is_main(cfg: RunConfig) -> bool:
    """Whether this process answers for the run's files; torchrun starts others beside it."""
    return int(os.environ.get("RANK", "0")) == 0 or cfg.cluster.max_workers > 0


def _run(cfg: RunConfig, *, resume: bool, show: bool) -> RunSummary:
    """`run`, where what keeps no checkpoint begins again."""
    is_main = _is_main(cfg)
    if cfg.cluster.max_workers > 0:
        _check_resources(cfg)  # before anything is written
    mirror = storage.Mirror(cfg)
    with _alone(cfg) if is_main else contextlib.nullcontext(True) as is_held:
        made = _open_run_dir(cfg, mirror, resume=resume) if is_main else []
        try:
            followed = progress.followed(cfg.metrics_path, cfg, show=show, refresh=mirror.follow)
            # A lock needs a directory, and the storage of a first run may be there from here on only.
            with (
                contextlib.nullcontext() if is_held else _alone(cfg),
                followed if is_main else contextlib.nullcontext(),
            ):
                return RunSummary.model_validate(_work(cfg, "train", {}))
        except _AtWorkError:  # it has taken over what was made here
            raise
        except PeftscaleError as error:
            if made and not mirror.has_results() and not _has_steps(cfg, mirror):
                shutil.rmtree(cfg.run_dir, ignore_errors=True)  # the name stays free for the corrected run
                _remove_empty(made)
                with contextlib.suppress(PeftscaleError):
                    mirror.remove()
            else:
                _give_up(cfg, mirror, error)
            raise
        except BaseException as error:
            _give_up(cfg, mirror, error)
            raise


def finished(cfg: RunConfig) -> RunSummary:
    """The summary of a run: of the one that ended under its name, else of one that is made, or gone on with, now. What
    keeps no checkpoint, full fine-tuning and prompt design, begins again.

    Raises:
        ConfigError: the run under its name is another one.
        PeftscaleError, TrainingError: as `run`.
    """
    mirror = storage.Mirror(cfg)
    mirror.pull()
    stored = cfg.run_dir / "run.json"
    if not stored.exists():
        return run(cfg)
    try:
        is_this = configio.fingerprint(configio.from_json(stored.read_text())) == configio.fingerprint(cfg)
    except ValueError:  # of another version, or damaged
        is_this = False
    if not is_this:
        raise ConfigError(
            f"name: the run {cfg.name!r} in {cfg.cluster.storage} has other settings than this one. Remove it, or "
            f"choose another name."
        )
    summary = records.read_summary(cfg.summary_path)
    if summary is None:
        return _run(cfg, resume=True, show=True)
    if _is_main(cfg):
        mirror.push()  # where its end was not brought to the store
    return summary


def evaluate(
    cfg: RunConfig,
    directories: Sequence[Path],
    tasks: Sequence[TaskConfig],
    split: Split | None,
    *,
    together: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, Any]:
    """`analysis.matrix.scores` on the run file's workers."""
    payload = {
        "directories": [storage.url_of(path) for path in directories],
        "tasks": [task.model_dump_json() for task in tasks],
        "split": split,
        "together": {name: list(places) for name, places in together.items()},
    }
    return _work(cfg, "scores", payload)


def generate(cfg: RunConfig, directories: Sequence[Path], rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """`train.use.answers` on the run file's workers.

    Raises:
        ConfigError: the run's method is a baseline.
    """
    if cfg.method != "adapters":
        raise ConfigError(f"method: only adapters answer single inputs, got {cfg.method!r}. Score it with evaluate.")
    payload = {"directories": [storage.url_of(path) for path in directories], "rows": [dict(row) for row in rows]}
    return _work(cfg, "answers", payload)


def _work(cfg: RunConfig, task: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Run one of `_TASKS` here or on Ray."""
    redaction.name(cfg.cluster.deploy.secret_references if cfg.cluster.deploy else ())
    if cfg.cluster.max_workers == 0:
        return _TASKS[task](cfg, payload)
    _check_resources(cfg)
    return _run_with_ray(cfg, task, payload)


def _train(cfg: RunConfig, payload: dict[str, Any]) -> dict[str, Any]:
    from peftscale import baselines
    from peftscale.train import comm, journal, use, worker

    uses_ray, rank = cfg.cluster.max_workers > 0, int(os.environ.get("RANK", "0"))
    mirror = storage.Mirror(cfg, rank)

    def report(step: int) -> None:
        try:
            mirror.push()
        except CheckpointError as error:  # the run is worth more: the next checkpoint, or the end, tries again
            log.warning(str(error))
            if rank == 0:
                records.append(cfg.metrics_path, NoteRecord(step=step, text=str(error)))
        if uses_ray:
            import ray.train

            ray.train.report({"step": step})

    main = worker.main if cfg.method == "adapters" else baselines.main
    with contextlib.ExitStack() as stack:
        if cfg.run_url:
            stack.enter_context(use.session(cfg))
            comm.together(mirror.pull)  # what rank 0 cannot have, every rank says
            stack.enter_context(mirror.pushed_at_the_end())
        book = stack.enter_context(logs.kept(cfg.logs_dir, rank, comm.expected_world_size()))
        live = gauges.Gauges(cfg.name, rank) if uses_ray else None

        def watch(row: Record) -> None:
            if isinstance(row, StepRecord):
                book.step = row.step
                mirror.push_rows()
            if live is not None:
                live.show(row)

        is_leaving = workers.is_leaving if uses_ray else journal.never
        return main(cfg, report, watch, is_leaving).model_dump(mode="json")


def _scores(cfg: RunConfig, payload: dict[str, Any]) -> dict[str, Any]:
    from peftscale.analysis import matrix

    tasks = [TaskConfig.model_validate_json(text, strict=True) for text in payload["tasks"]]
    directories = [storage.here(place) for place in payload["directories"]]
    return matrix.scores(cfg, directories, tasks, payload["split"], together=payload["together"])


def _answers(cfg: RunConfig, payload: dict[str, Any]) -> dict[str, Any]:
    from peftscale.train import use

    return use.answers(cfg, [storage.here(place) for place in payload["directories"]], payload["rows"])


class _AtWorkError(ConfigError):
    """Another process has this run."""


_TASKS = {"train": _train, "scores": _scores, "answers": _answers}


def _open_run_dir(cfg: RunConfig, mirror: storage.Mirror, *, resume: bool) -> list[Path]:
    """Make a new run's directory, or look for an old one's. Returns the directories that were made, innermost first."""
    if resume:
        mirror.pull()
        if not (cfg.run_dir / "run.json").exists():
            known = mirror.names()
            raise CheckpointError(
                f"--resume {cfg.name}: no such run in {cfg.cluster.storage}; there is {', '.join(known) or 'none'}."
            )
        records.mend(cfg.metrics_path)
        cfg.failure_path.unlink(missing_ok=True)
        return []
    made = [path for path in (cfg.run_dir, *cfg.run_dir.parents) if not path.exists()]
    try:
        if mirror.exists():
            raise FileExistsError
        cfg.run_dir.mkdir(parents=True)
        records.write_whole(cfg.run_dir / "run.json", cfg.model_dump_json(indent=1))
        mirror.push()  # whether it can be written is known before anything is held
    except FileExistsError:
        copy = f" or {cfg.run_dir}, its working copy" if cfg.run_url else ""
        raise ConfigError(
            f"name: a run {cfg.name!r} exists in {cfg.cluster.storage}{copy}. "
            f"Choose another with name=..., or go on with {cfg.going_on}."
        ) from None
    except (OSError, CheckpointError) as error:
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, CheckpointError):
            raise
        raise ConfigError(
            f"cluster.storage={cfg.cluster.storage} cannot be written: {error.strerror}. Choose another directory, or "
            f"make room."
        ) from error
    return made


@contextlib.contextmanager
def _alone(cfg: RunConfig) -> Iterator[bool]:
    """Hold the run's name for this process: two that go on with one run would write over each other's checkpoints.

    Yields whether it is held: without the storage's directory it cannot be.
    """
    where = cfg.run_dir.with_name(f".{cfg.name}.running")
    # A file that stands for a lock, as filelock makes it otherwise, would outlive a process that is killed.
    lock = FileLock(where, timeout=0, fallback_to_soft=False)
    try:
        if where.parent.exists():
            lock.acquire()
    except Timeout:
        raise _AtWorkError(
            f"name: another process works on the run {cfg.name!r} in {cfg.cluster.storage}. Wait for its end, or "
            f"stop it."
        ) from None
    except OSError as error:  # what cannot be written is said when the run is opened
        if error.errno == errno.ENOSYS:
            log.warning("%s has no locks: nothing keeps another process from this run.", where.parent)
            where.unlink(missing_ok=True)
        else:
            log.debug("%s: no lock is held: %s", where, error)
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            where.unlink(missing_ok=True)  # while it is held: nobody can have taken it by its name
        lock.release()


def _has_steps(cfg: RunConfig, mirror: storage.Mirror) -> bool:
    """Whether the run has come so far that its rows and logs are worth keeping."""
    mirror.take_rows()
    rows = records.read(cfg.metrics_path, passed_over=log.debug) if cfg.metrics_path.exists() else ()
    return any(isinstance(row, StepRecord) for row in rows)


def _give_up(cfg: RunConfig, mirror: storage.Mirror, error: BaseException) -> None:
    """Leave the word by which `status` knows that nobody will start the workers again."""
    if cfg.cluster.max_workers > 0 and cfg.run_dir.exists():
        with contextlib.suppress(OSError, PeftscaleError):
            cfg.failure_path.write_text(redaction.redacted(str(error) or type(error).__name__))
            mirror.push_failure()


def _remove_empty(directories: Sequence[Path]) -> None:
    """Remove directories, innermost first, up to the first that is gone or holds something."""
    with contextlib.suppress(OSError):
        for directory in directories:
            if directory.exists():
                directory.rmdir()


def _check_resources(cfg: RunConfig) -> None:
    """Refuse what Ray would wait for without end. A cluster elsewhere is asked once it is joined."""
    if not os.environ.get("RAY_ADDRESS"):
        workers.refuse_too_much(cfg, machine.num_cpus(), len(machine.accelerators()), "this machine")


def _run_with_ray(cfg: RunConfig, task: str, payload: dict[str, Any]) -> dict[str, Any]:
    workers.set_ray_defaults()
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        _start_ray(ray)
    # A new name each time: Ray resumes what it finds under an old one, and the state to resume is ours.
    own = f"{cfg.cluster.storage}/.ray/{task}-{uuid.uuid4().hex[:8]}"
    try:
        workers.refuse_too_few_places(cfg, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        config = {"cfg": configio.dump(cfg), "task": task, "payload": payload}
        return _result(workers.run(cfg, _worker_with(redaction.named_variables()), config, own=own))
    finally:
        if started_here:
            ray.shutdown()
        storage.delete(own)  # a marker of Ray's; nothing of ours


def _result(value: dict[str, Any]) -> dict[str, Any]:
    """What the workers returned: a result, or the error that was not worth a retry."""
    if "error" in value:
        raise getattr(errors, value["error"])(value["message"])
    result: dict[str, Any] = value["result"]
    return result


def _worker_with(secrets: Mapping[str, str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The worker, in an environment that has these too. Ray logs runtime environments, and shows a loop's config."""

    def worker(config: dict[str, Any]) -> dict[str, Any]:
        os.environ.update(secrets)
        return _worker(config)

    return worker


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray runs in every worker process.

    An error of the user's input is returned, not raised: Ray would start the group again to fail alike.
    """
    try:
        return {"result": _TASKS[config["task"]](configio.from_dict(config["cfg"]), config["payload"])}
    except (PeftscaleError, TrainingError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # which Ray writes into logs of its own
        shown = redaction.current_error()
        if shown == traceback.format_exc():
            raise
        raise RuntimeError(f"{type(error).__name__}, with a secret taken out:\n{shown}") from None


def _start_ray(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there ({workers.last_line(error)}). "
                f"Unset it to run on this machine."
            ) from error
        return
    auth.prepare()
    ray.init(
        address="local",
        num_cpus=machine.num_cpus(),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
