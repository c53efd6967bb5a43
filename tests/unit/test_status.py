"""How a run stands is read from its files alone, while it runs, after it ended, and after it died."""

import json
import os
import time
from pathlib import Path

import commands
import pytest
import tiny

from peftscale import driver, logs, status
from peftscale.config import RunConfig
from peftscale.errors import CheckpointError


def _ran(tmp_path: Path, name: str = "first") -> RunConfig:
    cfg = tiny.run_config(tmp_path, **{"name": name, "train.checkpoint_every": 2})
    driver.run(cfg, show=False)
    return cfg


def _fail(cfg: RunConfig) -> None:
    with logs.kept(cfg.logs_dir, 1) as book:
        book.step = 3
        raise RuntimeError("no room")


def _back_to(cfg: RunConfig, step: int) -> None:
    """The files as they were right after a step."""
    cfg.summary_path.unlink()
    lines = cfg.metrics_path.read_text().splitlines(keepends=True)
    end = next(
        i for i, line in enumerate(lines) if json.loads(line)["kind"] == "step" and json.loads(line)["step"] == step
    )
    cfg.metrics_path.write_text("".join(lines[: end + 1]))


def test_a_run_is_ended_going_on_silent_or_failed(tmp_path: Path) -> None:
    cfg = _ran(tmp_path)
    ended = status.of(cfg.run_dir)
    assert (ended.state, ended.step, ended.num_steps, ended.checkpoint) == ("ended", 4, 4, "step-4")
    assert ended.training == () and set(ended.scores) == {"mood"} and ended.seconds_left is None
    _back_to(cfg, 3)
    going = status.of(cfg.run_dir)
    assert (going.state, going.step, going.training) == ("going on", 3, ("mood",))
    assert going.seconds_left is not None and going.seconds_left > 0
    with pytest.raises(RuntimeError):
        _fail(cfg)
    failed = status.of(cfg.run_dir)
    assert failed.state == "failed" and failed.error is not None
    assert failed.error.startswith("rank 1 on ") and failed.error.endswith(" at step 3: RuntimeError: no room")
    for path in (cfg.run_dir / "run.json", cfg.metrics_path, *cfg.logs_dir.iterdir()):
        os.utime(path, (time.time() - 500, time.time() - 500))
    (cfg.logs_dir / "rank-1.jsonl").unlink()
    silent = status.of(cfg.run_dir)
    assert silent.state == "silent" and silent.silent_seconds > 499 and silent.error is None


def test_a_run_whose_workers_are_started_again_has_not_failed_until_it_is_given_up(tmp_path: Path) -> None:
    cfg = _ran(tmp_path)
    _back_to(cfg, 3)
    stored = cfg.run_dir / "run.json"
    content = json.loads(stored.read_text())
    content["cluster"]["workers"] = 2
    stored.write_text(json.dumps(content))
    with pytest.raises(RuntimeError):
        _fail(cfg)
    has_ended = status.ending(cfg.run_dir)
    recovering = status.of(cfg.run_dir)
    assert recovering.state == "restarting" and recovering.error is not None and not has_ended()
    cfg.failure_path.write_text("2 retries were not enough")
    assert status.of(cfg.run_dir).state == "failed" and has_ended()
    before = time.time() - 200  # another try began since
    os.utime(cfg.failure_path, (before, before))
    assert status.of(cfg.run_dir).state == "restarting"


def test_the_commands_find_runs_by_run_file_directory_and_storage(tmp_path: Path) -> None:
    first, second = _ran(tmp_path), _ran(tmp_path, "second")
    for where, names in ((tmp_path / "run.json", None), (first.run_dir, ["first"]), (tmp_path / "runs", None)):
        done = commands.run("status", where, "--json")
        assert done.code == 0, done.err
        found = [run["name"] for run in json.loads(done.out)["runs"]]
        assert found == (names or (["second"] if where.is_file() else ["second", "first"]))
    table = commands.run("status", first.cluster.storage).err
    assert "ended" in table and "4/4" in table
    lines = commands.run("logs", second.run_dir, "--json")
    assert json.loads(lines.out.splitlines()[0])["message"] == "begins, one of 1"
    followed = commands.run("logs", second.run_dir, "--follow")  # it has ended
    assert followed.out.splitlines()[0].endswith("begins, one of 1")
    several = commands.run("logs", first.cluster.storage)
    assert several.code == 2 and "2 runs are there (second, first); name one" in several.err


def test_where_no_run_is_both_commands_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run there. Name a run file, a run's directory, or a storage"):
        status.find(tmp_path)
    for command in ("status", "logs"):
        assert commands.run(command, tmp_path).code == 2


def test_a_run_of_another_version_does_not_hide_the_others(tmp_path: Path) -> None:
    cfg = _ran(tmp_path)
    other = cfg.cluster.runs_dir / "other"
    other.mkdir()
    (other / "run.json").write_text('{"name": "other"}')
    done = commands.run("status", cfg.cluster.storage, "--json")
    assert done.code == 0 and [run["name"] for run in json.loads(done.out)["runs"]] == ["first"]
    assert "other: saved run configuration" in done.err
