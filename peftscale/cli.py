"""The command line: parses, calls, prints. Every decision is made elsewhere.

Progress and tables go to standard error. `--json` prints one JSON object on standard output and nothing else.
Exit codes: 0 done, 2 the user's input is wrong (one message, no traceback), 1 the run failed.
Nothing heavy is imported before a command runs: `peftscale --help` answers at once.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from peftscale import __version__, redaction
from peftscale.arguments import AsJson, Overrides, RunFile, names_its_run_file
from peftscale.errors import ConfigError, PeftscaleError, TrainingError
from peftscale.jobs import commands as clusters

if TYPE_CHECKING:
    from peftscale.config import RunConfig
    from peftscale.task_config import Split

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Soft prompts through a frozen, quantised, sharded language model.",
)

app.add_typer(clusters.app)

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="An adapter directory or URL; repeatable. Left out: the run's own best ones."),
]

SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="train, validation or test. Left out: test, of tasks without one validation."),
]


@app.command()
@names_its_run_file
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with the run of this name from its last checkpoint.")
    ] = None,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="Go on with the run of this name and these settings if there is one, or begin it again.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the adapters of a run file."""
    from peftscale import configio, driver, report

    if finish and resume is not None:
        raise ConfigError("--finish, --resume: give one of the two.")
    cfg = configio.load(run_file, [*(overrides or []), *([f"name={resume}"] if resume else [])])
    try:
        summary = driver.finished(cfg) if finish else driver.run(cfg, resume=resume is not None)
    except KeyboardInterrupt:
        report.note(f"stopped; go on with: peftscale train {run_file} {cfg.going_on}")
        raise typer.Exit(1) from None
    if as_json:
        report.show_json(summary.model_dump(mode="json"))
    else:
        report.show(report.summary_table(summary))


@app.command()
@names_its_run_file
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    hardware: Annotated[
        list[str] | None, typer.Option(help="For example 8xH100-80GB; repeatable. Left out: this machine.")
    ] = None,
    network_gbit_per_s: Annotated[
        float | None,
        typer.Option(min=0.1, help="Into a node, over all of its ports. Left out: of the vendor's own system."),
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="In any currency.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute bytes and seconds per step, hours and price, from the base's config alone. Exit code 2 where it does not
    fit."""
    from peftscale import configio, facts, report
    from peftscale import plan as planning

    cfg = configio.load(run_file, overrides or [])
    machines = [planning.Hardware.parse(name) for name in hardware or []] or [planning.detect()]
    if network_gbit_per_s is not None:
        # Of the nodes that there are, whatever their size.
        network = network_gbit_per_s / 8
        machines = [replace(machine, network_gbytes_per_s=network, network_ports=1) for machine in machines]
    plans = planning.compare(
        cfg,
        facts.load(_config_dir(cfg.base.model, cfg.base.revision)),
        machines,
        worlds=() if hardware else planning.worlds_of(cfg),
        price_per_gpu_hour=price_per_gpu_hour,
        lora_targets=_lora_targets,
    )
    if as_json:
        report.show_json({"plans": [item.model_dump(mode="json") for item in plans]})
    else:
        report.show(planning.table(plans))
        for line in (line for item in plans for line in item.lines()):
            report.note(line)
    if problems := planning.misfits(plans):
        raise ConfigError("\n".join(problems))


@app.command()
@names_its_run_file
def evaluate(
    run_file: RunFile,
    overrides: Overrides = None,
    adapter: Adapters = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of the run file or catalogue, or a run file; repeatable. Left out: the run file's."),
    ] = None,
    split: SplitOption = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Let adapters of one task answer together too; on a --task all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score every adapter, and the base without any, on every task, in the same passes. The base is loaded once."""
    from peftscale import configio, driver, report, selection
    from peftscale.task_config import refuse_without

    of_split = _split(split)
    cfg = configio.load(run_file, overrides or [])
    directories = selection.adapter_dirs(cfg, adapter)
    if ensemble and len(directories) < 2:
        raise ConfigError("--ensemble: needs two adapters at least, got one. Name more with --adapter.")
    tasks = selection.tasks_for(cfg, directories, task or [], option="--task")
    together: Mapping[str, Sequence[int]] = {}
    if ensemble:  # on a task that was named all of them, whatever they were trained on
        everyone = {of_task.name: range(len(directories)) for of_task in tasks}
        together = everyone if task else selection.ensembles(cfg, directories, tasks)
    refuse_without(tasks, of_split, where="--split")
    result = driver.evaluate(cfg, directories, tasks, of_split, together=together)
    for note in result["notes"]:
        report.note(note)
    if as_json:
        report.show_json(report.scores_json(result))
    else:
        report.show(report.scores_table(result))


@app.command()
@names_its_run_file
def generate(
    run_file: RunFile,
    overrides: Overrides = None,
    adapter: Adapters = None,
    text: Annotated[list[str] | None, typer.Option(help="Input, where the task's template has one column.")] = None,
    row: Annotated[
        list[str] | None, typer.Option(help='Input columns as JSON, for example \'{"text": "..."}\'.')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer single inputs: the likeliest label of a classification, or a greedy continuation."""
    from peftscale import configio, driver, report, selection

    cfg = configio.load(run_file, overrides or [])
    directories = selection.adapter_dirs(cfg, adapter)
    cfg = selection.with_task_of(cfg, directories)
    rows = selection.input_rows(cfg, text or [], row or [])
    result = driver.generate(cfg, directories, rows)
    for note in result["notes"]:
        report.note(note)
    if as_json:
        report.show_json(result)
    else:
        report.show(report.answers_table(rows, result))


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    run_file: Annotated[Path | None, typer.Argument(help="A run file, for its base: read the prompt in words.")] = None,
    base: Annotated[str | None, typer.Option(help="The base in place of a run file: a directory or a hub id.")] = None,
    neighbours: Annotated[
        int | None,
        typer.Option("--neighbours", "-k", min=2, max=100, help="Words for each virtual token. Left out: 5."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the prompt among its neighbours.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what an adapter directory holds, after checking every hash; with its base, what its prompt is near to."""
    from peftscale import report
    from peftscale.adapters import files

    if (run_file is None) == (base is None) and (run_file or png or neighbours):
        raise ConfigError("inspect: what a prompt is near to takes its base from a run file or --base: name one.")
    found = files.describe(adapter).model_dump(mode="json")
    tables = [report.facts_table(str(adapter), found)]
    if run_file is not None or base is not None:
        from peftscale import configio
        from peftscale.analysis import picture, reading

        run = configio.load(run_file) if run_file is not None else None
        of_base = run.base if run is not None else reading.base_of(adapter, base or "")
        read = reading.read(adapter, of_base, k=neighbours or 5, run=run)
        if png is not None:
            picture.save(read, png, title=str(adapter))
        found["reading"] = read.to_json()
        tables += report.reading_tables(found["reading"])
        for note in found["reading"]["notes"]:
            report.note(note)
    if as_json:
        report.show_json(found)
        return
    for table in tables:
        report.show(table)


@app.command()
def similar(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    library: Annotated[Path, typer.Argument(help="A directory with adapters somewhere below it.")],
    as_json: AsJson = False,
) -> None:
    """Rank a library of adapters by their similarity with one: which of them to start another task from."""
    from peftscale import report
    from peftscale.analysis import similarity

    found = similarity.rank(adapter, library)
    for note in found["notes"]:
        report.note(note)
    if as_json:
        report.show_json(found)
    else:
        report.show(report.library_table(found))


@app.command()
def transfer(
    run_files: Annotated[list[str], typer.Argument(metavar="RUN_FILE... [KEY=VALUE]...", help="One for each method.")],
    to: Annotated[
        list[str], typer.Option(help="A task of the first run file or the catalogue, or a run file; repeatable.")
    ],
    seed: Annotated[
        list[int] | None, typer.Option(help="Train everything with this seed; repeatable. Left out: the run files'.")
    ] = None,
    split: SplitOption = None,
    as_json: AsJson = False,
) -> None:
    """Train methods on one task, unless they are, and score them on others that they never saw."""
    from peftscale import configio, driver, report, selection
    from peftscale.analysis import transfer as study
    from peftscale.task_config import refuse_without

    of_split = _split(split)
    overrides = [word for word in run_files if "=" in word and not Path(word).is_file()]
    runs = [configio.load(path, overrides) for path in run_files if path not in overrides]
    if not runs:
        raise ConfigError("transfer: no run file given.")
    targets = selection.tasks_for(runs[0], [], to, option="--to")
    members = study.members(runs, seed or [])
    refuse_without([*targets, *(member.task for member in members)], of_split, where="--split")
    found = study.study(members, targets, of_split, train=driver.finished, score=driver.evaluate)
    for note in found["notes"]:
        report.note(note)
    if as_json:
        report.show_json(found)
    else:
        report.show(report.transfer_table(found))


@app.command("import")
@names_its_run_file
def import_(
    run_file: RunFile,
    source: Annotated[Path, typer.Argument(help="A .npy prompt of T5X, or an adapter directory of PEFT.")],
    out: Annotated[Path, typer.Option(help="The adapter directory to write.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Take over an adapter of another program, for the run file's base and task."""
    from peftscale import configio, report
    from peftscale.adapters import exchange

    found = exchange.import_(configio.load(run_file, overrides or []), source, out)
    for note in found["notes"]:
        report.note(note)
    if as_json:
        report.show_json(found)
    else:
        report.show(report.facts_table("imported adapter", {key: found[key] for key in found if key != "notes"}))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    out: Annotated[Path, typer.Option(help="What to write: a directory for peft, a file for npy.")],
    format: Annotated[Literal["peft", "npy"], typer.Option(help="PEFT's two files, or T5X's matrix.")] = "peft",
    as_json: AsJson = False,
) -> None:
    """Write an adapter for another program."""
    from peftscale import report
    from peftscale.adapters import exchange

    found = exchange.export(adapter, out, format)
    if as_json:
        report.show_json(found)
    else:
        report.show(report.facts_table("exported adapter", found))


@app.command()
@names_its_run_file
def pack(
    run_file: RunFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write. Left out: the user's cache.")] = None,
    as_json: AsJson = False,
) -> None:
    """Quantise the base once, ahead of a run, and print its digest."""
    from peftscale import configio, report
    from peftscale.base import load

    found = load.pack_ahead(configio.load(run_file, overrides or []).base, out)
    if as_json:
        report.show_json(found)
    else:
        report.show(report.facts_table("packed base", found))


@app.command()
def tasks(
    data: Annotated[
        Path | None, typer.Option(help="Count local data too: DATA/<task>/train.jsonl, validation.jsonl, ...")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that a run file can name, with their metrics and sizes."""
    from peftscale import catalogue, report

    found = {name: catalogue.described(entry) for name, entry in catalogue.entries().items()}
    if data is not None:
        from peftscale.data import texts

        if not data.is_dir():
            raise ConfigError(f"--data {data}: no such directory")
        for name, entry in catalogue.entries().items():
            files = entry.files_in(data.absolute())
            found[name]["local_sizes"] = texts.count(entry.over(files)) if files else None
    if as_json:
        report.show_json({"tasks": found})
    else:
        report.show(report.tasks_table(found))


@app.command()
def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of run files, for editors. It is one JSON object with and without --json."""
    from peftscale import configio, report

    report.show_json(configio.schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and say what would fail. Exit code 1 where something would."""
    from peftscale import doctor as checks
    from peftscale import report

    found = checks.run()
    if as_json:
        print(checks.to_json(found))
    else:
        report.show(checks.render(found))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `peftscale` command."""
    code = _run()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a rank of torchrun
        from peftscale.train import comm

        comm.leave(code)
    sys.exit(code)


def _run() -> int:
    """Run the command; return its exit code."""
    try:
        app()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except PeftscaleError as error:
        print(redaction.redacted(str(error)), file=sys.stderr)
        return 2
    except TrainingError as error:
        print(redaction.redacted(f"the run failed: {error}"), file=sys.stderr)
        return 1
    except Exception:
        print(redaction.current_error(), end="", file=sys.stderr)
        return 1
    return 0


def _split(word: str | None) -> "Split | None":
    if word not in (None, "train", "validation", "test"):
        raise ConfigError(f"--split: must be train, validation or test, got {word!r}")
    return cast("Split | None", word)


def _lora_targets(cfg: "RunConfig", model_type: str) -> Sequence[str]:
    """The linears that LoRA takes where the run file names none: PEFT knows, which takes seconds to import."""
    from peftscale.baselines import lora

    return lora.targets(cfg, model_type)


def _config_dir(model: str, revision: str) -> Path:
    """A plan needs config.json only: no torch is imported for a directory."""
    directory = Path(model)
    if directory.is_dir():
        return directory
    from peftscale.base import load

    return load.resolve(model, revision, with_weights=False)
