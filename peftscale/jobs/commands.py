"""Commands of clusters: render, submit, status, logs. The others, and the program itself, are `cli`.

Nothing heavy is imported before a command runs.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peftscale.arguments import AsJson, Overrides, RunFile, names_its_run_file
from peftscale.errors import CheckpointError, ClusterError, ConfigError, PeftscaleError, TrainingError

if TYPE_CHECKING:
    from peftscale.jobs.submit import Cluster, Package, Submitted

app = typer.Typer()


@app.command()
@names_its_run_file
def render(
    run_file: RunFile,
    target: Annotated[
        Literal["kuberay", "slurm", "skypilot", "ray-aws", "ray-gcp", "torchrun"],
        typer.Option(help="Where it is to run: cluster/README.md says which one to choose."),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write the file to. Left out: standard output.")] = None,
) -> None:
    """Write what a cluster takes, from the run file alone. Nothing is submitted."""
    from peftscale import report
    from peftscale.jobs import render as jobs

    rendered = jobs.render(run_file, overrides or [], target)
    if out is None:
        print(rendered.text, end="")
    else:
        report.note(str(jobs.save(rendered, out)))


@app.command()
@names_its_run_file
def submit(
    run_file: RunFile,
    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard: http://HOST:8265."),
    ],
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the job's log until it ends; 0 if it succeeded, else 1.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say how the run's last job stands.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Only end the run's job.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run it as a job of a Ray cluster that is up. Submitted again, it goes on where it was."""
    from peftscale import configio, report
    from peftscale.jobs import submit as jobs

    if follow + status + stop > 1:
        raise ConfigError("--follow, --status, --stop: give one of the three.")
    if jobs.is_open_to_listeners(address):
        report.note(
            f"{address} is not encrypted: who listens has the token and the run's secrets. Unless the network is your "
            f"own, use https, or `ssh -L 8265:127.0.0.1:8265 HEAD` and http://127.0.0.1:8265."
        )
    if status or stop:
        name, cluster = configio.load(run_file, overrides or []).name, jobs.Cluster(address)
        job = cluster.newest(name)
        if job is None:
            raise ClusterError(f"{address}: no job of the run {name!r} there.")
        job = job if status or job.has_ended else cluster.stop(job)
    else:
        run = jobs.package(run_file, overrides or [])
        job = (_followed if follow else _started)(jobs.Cluster(address), run)
    if as_json:
        report.show_json(asdict(job))
    elif status:
        found = {key: value for key, value in asdict(job).items() if value is not None}
        report.show(report.facts_table(address, found.pop("metadata") | found))
    elif follow or stop:
        report.note(f"{job.id}: {job.state}")
    if follow and job.state != "succeeded":
        raise TrainingError(f"the job {job.id} has not succeeded; its log says why.")


def _started(cluster: "Cluster", run: "Package") -> "Submitted":
    from peftscale import report

    job = cluster.submit(run)
    report.note(f"{job.id} is submitted; the same command with --follow shows its log, --stop ends it.")
    return job


def _followed(cluster: "Cluster", run: "Package") -> "Submitted":
    """Submit a run, or take the job of it that is under way, and show its log to the end."""
    from peftscale import report

    def show(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    job = cluster.newest(run.name)
    if job is None or job.has_ended or job.metadata.get("config_digest") != run.digest:
        job = _started(cluster, run)
    try:
        return cluster.follow(job, show)
    except KeyboardInterrupt:
        report.note(f"{job.id} goes on; the same command shows its log again, with --stop it ends.")
        raise typer.Exit(1) from None


@app.command()
def status(
    where: Annotated[str, typer.Argument(help="A run file, a run's directory or URL, or a storage of runs.")],
    as_json: AsJson = False,
) -> None:
    """Say how runs stand, from their files: it works while they run, wherever that is."""
    from peftscale import report, storage
    from peftscale import status as runs

    found, unread = [], []
    with storage.viewed(where) as view:
        for directory in runs.find(view.directory, called=where):
            try:
                found.append(runs.of(directory).model_dump(mode="json") | {"dir": view.name_of(directory)})
            except PeftscaleError as error:
                unread.append(f"{view.name_of(directory)}: {error}")
    if not found:
        raise CheckpointError("\n".join(unread))
    for line in unread:
        report.note(line)
    if as_json:
        report.show_json({"runs": found})
    else:
        report.show(report.status_table(found))


@app.command()
def logs(
    where: Annotated[str, typer.Argument(help="A run file, or a run's directory or URL.")],
    rank: Annotated[list[int] | None, typer.Option(help="Of this rank; repeatable. Left out: of all.")] = None,
    level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="And what is above it.")] = "info",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends or Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what the ranks of a run logged, in the order of time; --json: a JSON object a line."""
    from peftscale import logs as files
    from peftscale import status as runs
    from peftscale import storage

    with storage.viewed(where) as view:
        directory = runs.one(view.directory, called=where)
        until = runs.ending(directory, refresh=view.refresh) if follow else None
        for line in files.follow(directory / "logs", rank or [], level, until=until):
            print(line.model_dump_json() if as_json else line.text(), flush=True)
