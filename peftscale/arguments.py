"""Arguments that many commands have: the run file, changes to it, and JSON in place of a table.

The commands are `cli` and, of clusters, `jobs.commands`.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from peftscale.errors import PeftscaleError

RunFile = Annotated[Path, typer.Argument(help="The run file, for example configs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes: train.steps=100")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def names_its_run_file(command: Callable[..., None]) -> Callable[..., None]:
    """Put the run file in front of a message that does not name it: a script may run many."""

    @wraps(command)
    def named(run_file: Path, **options: object) -> None:
        try:
            command(run_file=run_file, **options)
        except PeftscaleError as error:
            if str(run_file) in str(error):
                raise
            raise type(error)(f"{run_file}: {error}") from error

    return named
