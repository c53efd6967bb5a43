"""The real `peftscale` command for tests: in this process, or in a process of its own."""

import contextlib
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from peftscale import cli

TIMEOUT_S = 120


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run(*arguments: str | Path) -> Done:
    """The command in this process: its exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["peftscale", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def run_alone(*arguments: str | Path, before: str = "", after: str = "") -> Done:
    """The command in a new process, where nothing is imported yet and nothing that a library prints can hide.

    Args:
        arguments: of the command.
        before: Python to be executed first, for example to limit the process.
        after: Python to be executed when the command has ended, whatever came of it.
    """
    code = f"{before}\nfrom peftscale import cli\ntry:\n    cli.main()\nfinally:\n    {after or 'pass'}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """A full disk, as far as one process can have one of its own: no file grows beyond the limit."""
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
