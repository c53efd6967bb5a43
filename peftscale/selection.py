"""Which adapters, tasks and inputs a command means by the words that were typed."""

import json
from collections.abc import Sequence
from pathlib import Path

from peftscale import catalogue, configio, storage
from peftscale.complaints import close_to
from peftscale.config import RunConfig, TaskConfig
from peftscale.errors import AdapterError, ConfigError
from peftscale.task_config import told_apart


def adapter_dirs(cfg: RunConfig, given: Sequence[str] | None) -> list[Path]:
    """The adapters that a command works on: those that were named, else the best ones of the run itself. Of a baseline,
    its best state. What is in an object store is fetched.

    Raises:
        AdapterError: none was named and the run has none.
        ConfigError: one was named twice; several were, and the run's method is a baseline; or prompt design, which
            keeps no state.
    """
    if cfg.method == "few_shot":
        raise ConfigError("method: 'few_shot' trains nothing that could be used again; `peftscale train` scores it.")
    if given and len(given) > 1 and cfg.method != "adapters":
        raise ConfigError(f"--adapter: method={cfg.method} is scored one state at a time, got {len(given)}.")
    if given:
        named = [storage.here(place) for place in given]
        places = [path.resolve() for path in named]
        again = [path for i, path in enumerate(named) if places[i] in places[:i]]
        if again:
            raise ConfigError(f"--adapter: {again[0]} is named twice. Leave one out.")
        return named
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
    return cfg.adapter_tasks(directory.parent.name) if _is_own(cfg, directory) else (cfg.task,)


def _is_own(cfg: RunConfig, directory: Path) -> bool:
    own = storage.fetched(f"{cfg.run_url}/adapters") if cfg.run_url else cfg.adapters_dir
    return directory.parent.parent == own and directory.parent.name in cfg.adapters


def _names_of_tasks(cfg: RunConfig, directory: Path) -> list[str]:
    """What an adapter of any run was trained on, by what peftscale.json says where it is another run's; PEFT's own
    adapters, which have none, are taken for the run's task."""
    from peftscale.adapters import files

    manifest = None if _is_own(cfg, directory) else files.read(directory).manifest
    if manifest is None or manifest.task is None:
        return [task.name for task in _tasks_of(cfg, directory)]
    return [task.name for task in (manifest.task, *manifest.more_tasks)]


def tasks_for(cfg: RunConfig, directories: Sequence[Path], given: Sequence[str], *, option: str) -> list[TaskConfig]:
    """The tasks that adapters are evaluated on: those that were named, else those of the run's own adapters, and the
    run's task for adapters from elsewhere.

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


def ensembles(cfg: RunConfig, directories: Sequence[Path], tasks: Sequence[TaskConfig]) -> dict[str, list[int]]:
    """Name of a task -> places in `directories` of the adapters that were trained on it, where there are several.

    Raises:
        ConfigError: no two adapters have a task in common.
    """
    trained_on = [_names_of_tasks(cfg, path) for path in directories]
    found = {task.name: [place for place, of_one in enumerate(trained_on) if task.name in of_one] for task in tasks}
    several = {name: places for name, places in found.items() if len(places) > 1}
    if not several:
        raise ConfigError(
            "--ensemble: no two of these adapters were trained on the same task. Name the task with --task, and all of "
            "them answer together on it."
        )
    return several


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
