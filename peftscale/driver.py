"""The driver: work of a run file, in this process or as Ray workers: train, evaluate, generate.

Ray starts the workers, restarts a dead group, and carries the result back (`workers`); checkpoints and metrics are
ours. What a worker does is `train.worker` and `train.use`.
"""

import contextlib
import json
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
    catalogue,
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
from peftscale.complaints import close_to
from peftscale.config import RunConfig, TaskConfig
from peftscale.errors import AdapterError, CheckpointError, ClusterError, ConfigError, PeftscaleError, TrainingError
from peftscale.records import NoteRecord, Record, RunSummary, StepRecord
from peftscale.task_config import told_apart

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
        PeftscaleError: the user's input is wrong; nothing of a new run is left behind.
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
            if made and not mirror.has_results():
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
    split: str,
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


def ensembles(cfg: RunConfig, directories: Sequence[Path], tasks: Sequence[TaskConfig]) -> dict[str, list[int]]:
    """Name of a task -> places in `directories` of the adapters that were trained on it, where there are several.

    Raises:
        ConfigError: no two adapters have a task in common.
    """
    own = [_tasks_of(cfg, path) for path in directories]
    found = {task.name: [place for place, of_one in enumerate(own) if task in of_one] for task in tasks}
    several = {name: places for name, places in found.items() if len(places) > 1}
    if not several:
        raise ConfigError(
            "--ensemble: no two of these adapters were trained on the same task. Name the task with --task, and all of "
            "them answer together on it."
        )
    return several


def generate(cfg: RunConfig, directories: Sequence[Path], rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """`train.use.answers` on the run file's workers.

    Raises:
        ConfigError: the run's method is a baseline.
    """
    if cfg.method != "adapters":
        raise ConfigError(f"method: only adapters answer single inputs, got {cfg.method!r}. Score it with evaluate.")
    payload = {"directories": [storage.url_of(path) for path in directories], "rows": [dict(row) for row in rows]}
    return _work(cfg, "answers", payload)


def adapter_dirs(cfg: RunConfig, given: Sequence[str] | None) -> list[Path]:
    """The adapters that a command works on: those that were named, else the best ones of the run itself. Of a baseline,
    its best state. What is in an object store is fetched.

    Raises:
        AdapterError: none was named and the run has none.
        ConfigError: several were named, and the run's method is a baseline; or prompt design, which keeps no state.
    """
    if cfg.method == "few_shot":
        raise ConfigError("method: 'few_shot' trains nothing that could be used again; `peftscale train` scores it.")
    if given and len(given) > 1 and cfg.method != "adapters":
        raise ConfigError(f"--adapter: method={cfg.method} is scored one state at a time, got {len(given)}.")
    if given:
        return [storage.here(place) for place in given]
    if cfg.method == "adapters":
        adapters_dir = storage.here(f"{cfg.run_url}/adapters") if cfg.run_url else cfg.adapters_dir
        kind, found = "adapter", [adapters_dir / name / "best" for name in cfg.adapters]
    else:
        of_run = storage.here(f"{cfg.run_url}/{cfg.method}") if cfg.run_url else cfg.run_dir / cfg.method
        kind, found = f"state of method={cfg.method}", [of_run / "best"]
    missing = [path for path in found if not path.is_dir()]
    if missing:
        raise AdapterError(f"{missing[0]}: no such {kind}. Train the run first, or name one with --adapter.")
    return found


def with_task_of(cfg: RunConfig, directories: Sequence[Path]) -> RunConfig:
    """The run file with the task of these adapters, where they are the run's own, as its `task`.

    Raises:
        ConfigError: they have different tasks.
    """
    found = {path: _tasks_of(cfg, path)[0] for path in directories}
    different = [path for path, task in found.items() if task != found[directories[0]]]
    if different:
        raise ConfigError(
            f"--adapter: {directories[0]} was trained on task {found[directories[0]].name}, {different[0]} on "
            f"{found[different[0]].name}; name the adapters of one task at a time."
        )
    return cfg.model_copy(update={"task": found[directories[0]]})


def _tasks_of(cfg: RunConfig, directory: Path) -> tuple[TaskConfig, ...]:
    """What an adapter was trained on, its own task first, where it is the run's own; else the run's task."""
    name = directory.parent.name
    own = storage.fetched(f"{cfg.run_url}/adapters") if cfg.run_url else cfg.adapters_dir
    is_own = directory.parent.parent == own and name in cfg.adapters
    return cfg.adapter_tasks(name) if is_own else (cfg.task,)


def tasks_for(cfg: RunConfig, directories: Sequence[Path], given: Sequence[str], *, option: str) -> list[TaskConfig]:
    """The tasks that adapters are evaluated on: those that were named, else the adapters' own.

    Args:
        cfg: the run file.
        directories: of the adapters.
        given: names of tasks of the run file or of the catalogue, and run files, of which the `task` is meant.
        option: what they were typed under, for messages.

    Raises:
        ConfigError: a name that is none of these, or two tasks of one name.
    """
    found = [_named_task(cfg, word, option) for word in given]
    found = found or [task for path in directories for task in _tasks_of(cfg, path)]
    return told_apart(found, where=option)


def _named_task(cfg: RunConfig, word: str, option: str) -> TaskConfig:
    if Path(word).suffix in (".yaml", ".yml", ".json"):
        return configio.load(word).task
    of_adapters = [task for name in cfg.adapters for task in cfg.adapter_tasks(name)]
    of_run = {task.name: task for task in (cfg.task, *of_adapters)}
    if word in of_run:
        return of_run[word]
    entry = catalogue.entries().get(word)
    if entry is not None and "hub" in entry.task:
        return TaskConfig.model_validate(entry.task)
    if entry is not None:
        raise ConfigError(
            f"{option} {word}: the catalogue has its form alone, for files of your own. Name a run file, of which the "
            f"task is taken, with `task: {{name: {word}, files: ...}}`."
        )
    known = [*of_run, *(name for name, one in catalogue.entries().items() if "hub" in one.task)]
    raise ConfigError(
        f"{option} {word}: neither a task of the run file ({', '.join(of_run)}) nor one that the catalogue loads by "
        f"itself (`peftscale tasks`). Name one of them, or a run file, of which the task is taken"
        f"{close_to(word, known)}"
    )


def input_rows(cfg: RunConfig, texts: Sequence[str], rows: Sequence[str]) -> list[dict[str, str]]:
    """Rows of columns from --text (a template with one column) and --row (JSON).

    Raises:
        ConfigError: nothing given, a template with several columns, or JSON that is no object.
    """
    from peftscale.data.template import Template

    columns = sorted(Template("task.input", cfg.task.input).names)
    if texts and len(columns) != 1:
        raise ConfigError(f"--text: task.input reads the columns {', '.join(columns)}; give them with --row as JSON.")
    found = [{columns[0]: text} for text in texts]
    for text in rows:
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--row {text}: not JSON ({error}).") from error
        if not isinstance(row, dict) or not set(columns) <= set(row):
            raise ConfigError(f"--row {text}: need an object with the keys {', '.join(columns)}.")
        # Lists and mappings are columns too; anything else is the text that it would be in a file.
        found.append({c: row[c] if isinstance(row[c], list | dict) else str(row[c]) for c in columns})
    if not found:
        raise ConfigError("no input given: use --text or --row.")
    return found


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
        book = stack.enter_context(logs.kept(cfg.logs_dir, rank))
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
    lock = FileLock(where, timeout=0)
    try:
        if where.parent.exists():
            lock.acquire()
    except Timeout:
        raise _AtWorkError(
            f"name: another process works on the run {cfg.name!r} in {cfg.cluster.storage}. Wait for its end, or "
            f"stop it."
        ) from None
    except (OSError, NotImplementedError) as error:  # what cannot be written is said when the run is opened
        log.debug("%s: no lock is held: %s", where, error)
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            where.unlink(missing_ok=True)  # while it is held: nobody can have taken it by its name
        lock.release()


def _give_up(cfg: RunConfig, mirror: storage.Mirror, error: BaseException) -> None:
    """Leave the word by which `status` knows that nobody will start the workers again."""
    if cfg.cluster.max_workers > 0 and cfg.run_dir.exists():
        with contextlib.suppress(OSError, PeftscaleError):
            cfg.failure_path.write_text(redaction.redacted(str(error) or type(error).__name__))
            mirror.push()


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
