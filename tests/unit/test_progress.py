"""The live view of a run: plain lines into a pipe, a bar on a terminal, trackers beside, and nothing of any library."""

import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from peftscale import progress, records
from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.records import EvaluationRecord, NoteRecord, Record, StepRecord

COLUMNS = 80
FIGURES = r"loss \d+\.\d{4}  rate 0\.01  [\d,]+ tokens/s  [\d,]+ B reduced"
EVALUATION = (
    r"evaluation at step \d+  mood  (validation|validation without prompt|test)  accuracy \d\.\d{4}  \(\d+\.\d s\)"
)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 20 steps that nobody starts."""
    root = tmp_path_factory.mktemp("followed")
    (root / "base").mkdir()
    return tiny.run_config(root, base=root / "base", **{"train.steps": 20})


def _step(step: int, **changes: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "step": step,
        "adapters": {"mood": 1.23456},
        "learning_rate": 0.01,
        "tokens": 500,
        "seconds": 0.4,
        "tokens_per_s": 1250.4,
        "reduced_bytes": 20480,
        "gathered_bytes": 0,
        "control_bytes": 8,
        "skipped": False,
    }
    return StepRecord(**{**fields, **changes})


@contextlib.contextmanager
def _followed(path: Path, cfg: RunConfig) -> Iterator[io.StringIO]:
    """What is shown while the block writes to `path`; complete when the block has ended."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), progress.followed(path, cfg, show=True):
        yield shown


def test_a_plain_line_has_step_loss_rate_speed_bytes_and_the_time_that_is_left(
    tmp_path: Path, cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with _followed(tmp_path / "metrics.jsonl", cfg) as shown:
        for step in (1, 2, 3):
            records.append(tmp_path / "metrics.jsonl", _step(step))
            seen = len(shown.getvalue())
            while len(shown.getvalue()) == seen:  # one at a time, so that there is a time between them
                time.sleep(0.01)
    first, _, third = shown.getvalue().splitlines()
    assert first == "step 1/20  loss 1.2346  rate 0.01  1,250 tokens/s  20,480 B reduced"
    figures, left = third.rsplit("  ", 1)
    assert figures == "step 3/20  loss 1.2346  rate 0.01  1,250 tokens/s  20,480 B reduced"
    # Polled every tenth of a second: two steps took 0.2 s, or more on a busy machine, and 17 are left.
    assert re.fullmatch(r"\d:\d\d:\d\d left", left) and left != "0:00:00 left"


def test_plain_lines_are_few_but_none_is_lost_that_matters(tmp_path: Path, cfg: RunConfig) -> None:
    rows: list[Record] = [_step(step, skipped=step == 7) for step in range(1, 21)]
    rows.insert(4, EvaluationRecord(step=4, adapter="mood", split="validation", metrics={"accuracy": 0.5}, seconds=1.5))
    rows.insert(9, NoteRecord(step=8, text="checkpoint [step-6] is damaged"))
    with _followed(tmp_path / "metrics.jsonl", cfg) as shown:
        for row in rows:
            records.append(tmp_path / "metrics.jsonl", row)
    lines = shown.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/20",
        "evaluation at step 4",
        "step 7/20",
        "note at step 8: checkpoint [step-6] is damaged",
        "step 20/20",
    ]
    assert "NOT FINITE, skipped" in lines[2]
    assert lines[1] == "evaluation at step 4  mood  validation  accuracy 0.5000  (1.5 s)"


def test_the_losses_of_a_cohort_are_shown_as_their_range(tmp_path: Path, cfg: RunConfig) -> None:
    with _followed(tmp_path / "metrics.jsonl", cfg) as shown:
        records.append(tmp_path / "metrics.jsonl", _step(1, adapters={"a": 2.5, "b": 0.75, "c": 1.0}))
    assert "loss 0.7500..2.5000  " in shown.getvalue()


def test_the_view_begins_at_the_end_of_the_file_and_waits_for_whole_lines(tmp_path: Path, cfg: RunConfig) -> None:
    path = tmp_path / "metrics.jsonl"
    records.append(path, _step(1))
    line = _step(20).model_dump_json().encode() + b"\n"
    with _followed(path, cfg) as shown, path.open("ab") as file:
        file.write(b'{"kind": "of a later version"}\n' + line[:30])
        file.flush()
        time.sleep(0.3)  # three looks at half a line
        assert shown.getvalue() == ""
        file.write(line[30:])
    assert shown.getvalue().startswith("step 20/20  ")
    assert shown.getvalue().count("\n") == 1


def test_a_tracker_that_is_not_installed_is_refused_with_its_name(tmp_path: Path) -> None:
    missing = [name for name in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    (tmp_path / "base").mkdir()
    cfg = tiny.run_config(tmp_path, base=tmp_path / "base", track=missing[:1])
    with (
        pytest.raises(ConfigError, match=rf"track: {missing[0]} is not installed .*'peftscale\[track\]', or take"),
        _followed(tmp_path / "metrics.jsonl", cfg),
    ):
        pass


_CHILD = """
import json, sys
from peftscale import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["peftscale", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def _on_a_terminal(commands: list[list[str]]) -> tuple[int, str, str]:
    """Run commands in one new process with a terminal as standard error.

    Returns:
        Exit code, standard output, and every byte that the terminal got.
    """
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (30, COLUMNS))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {
        "TERM": "xterm-256color"
    }
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(commands)], stdin=slave, stdout=subprocess.PIPE, stderr=slave, env=env
    )
    os.close(slave)
    got, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    got += os.read(master, 65536)
                except OSError:  # the other end is closed
                    break
            elif child.poll() is not None:
                break
        assert child.stdout is not None
        out = child.stdout.read().decode()
        return child.wait(timeout=10), out, got.decode()
    finally:
        child.kill()
        os.close(master)


def test_a_terminal_gets_a_bar_and_figures_and_not_one_line_of_a_library(tmp_path: Path) -> None:
    """Train, evaluate and generate in a process where everything is imported for the first time."""
    tiny.run_config(tmp_path, **{"train.steps": 30, "train.evaluate_every": 10, "train.checkpoint_every": 30})
    run_file = str(tmp_path / "run.json")
    free = ["task.labels=null", "task.metrics=[exact_match]", "task.max_target_tokens=5"]
    code, out, terminal = _on_a_terminal(
        [
            ["train", run_file, "--json"],
            ["evaluate", run_file, "--split", "validation", "--json"],
            ["generate", run_file, "--text", "Fine", "--json"],
            ["generate", run_file, "--text", "Fine", "--json", *free],
        ]
    )
    assert code == 0, terminal
    objects = []
    while out.strip():
        value, end = json.JSONDecoder().raw_decode(out)
        objects.append(value)
        out = out[end:].lstrip()
    assert [set(value) & {"steps", "split", "adapters"} for value in objects] == [
        {"steps", "adapters"},
        {"split", "adapters"},
        {"adapters"},
        {"adapters"},
    ]

    assert "\x1b[2K" in terminal  # a line that is drawn again
    lines = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal)) if line]
    bar = r"tiny  step +\d+/30 \S+ (-:--:--|\d:\d\d:\d\d) left *"
    allowed = re.compile(f"({bar})|(starting *)|({FIGURES} *)|({EVALUATION})")
    assert [line for line in lines if not allowed.fullmatch(line)] == []
    assert all(len(line.rstrip()) <= COLUMNS for line in lines)
    assert any(re.fullmatch(FIGURES, line.rstrip()) for line in lines)
    drawn = [int(m[1]) for line in lines if (m := re.match(r"tiny  step +(\d+)/30", line))]
    assert drawn == sorted(drawn) and drawn[0] == 0 and drawn[-1] == 30
    assert sum("evaluation at step" in line for line in lines) == 6


def test_the_line_of_a_cohort_says_how_many_still_train_and_which_one_was_skipped(
    tmp_path: Path, cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    two = {"adapters": {"mood": 1.2, "tone": float("nan"), "wish": 0.7}, "skipped": True, "skipped_adapters": ("tone",)}
    with _followed(tmp_path / "metrics.jsonl", cfg) as shown:
        records.append(tmp_path / "metrics.jsonl", _step(1, **two))
        records.append(tmp_path / "metrics.jsonl", NoteRecord(step=1, text="tone is stopped at step 1: so it is"))
        records.append(tmp_path / "metrics.jsonl", _step(2, adapters={"mood": 1.1, "wish": 0.6}))
    first, note, second = shown.getvalue().splitlines()
    assert first.startswith("step 1/20  3 adapters  loss 0.7000..1.2000  rate")
    assert first.endswith("NOT FINITE, skipped: tone")
    assert note == "note at step 1: tone is stopped at step 1: so it is"
    assert second.startswith("step 2/20  2 adapters  loss 0.6000..1.1000  rate")
