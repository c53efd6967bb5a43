"""`train --finish`, which rendered jobs use: it may be started any number of times."""

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import commands
import pytest
from filelock import FileLock, Timeout

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_a_run_is_finished_once_and_another_run_of_its_name_is_refused(tmp_path: Path) -> None:
    few = ["cluster.workers=0", "train.evaluate_every=2", "train.checkpoint_every=2", f"cluster.storage={tmp_path}"]
    train = ["train", QUICKSTART, *few, "--finish", "--json"]
    first = commands.run(*train, "train.steps=4")
    assert first.code == 0, first.err
    metrics = tmp_path / "quickstart" / "metrics.jsonl"
    before = metrics.read_bytes()

    again = commands.run(*train, "train.steps=4")
    assert again.code == 0 and json.loads(again.out) == json.loads(first.out)
    assert metrics.read_bytes() == before  # nothing was trained

    (tmp_path / "quickstart" / "summary.json").unlink()  # as if it had been stopped before its end
    gone_on = commands.run(*train, "train.steps=4")
    assert gone_on.code == 0, gone_on.err
    assert (
        json.loads(gone_on.out)["adapters"]["grades"]["after"] == json.loads(first.out)["adapters"]["grades"]["after"]
    )

    other = commands.run(*train, "train.steps=6")
    assert other.code == 2 and "has other settings than this one" in other.err


def test_finish_and_resume_exclude_each_other() -> None:
    done = commands.run("train", QUICKSTART, "--finish", "--resume", "quickstart")
    assert done.code == 2 and "--finish, --resume: give one of the two" in done.err


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    few = ["cluster.workers=0", "train.steps=2", "train.evaluate_every=2", f"cluster.storage={tmp_path}"]
    with FileLock(tmp_path / ".quickstart.running"):
        refused = commands.run("train", QUICKSTART, *few)
        assert refused.code == 2 and "name: another process works on the run 'quickstart'" in refused.err
        assert not (tmp_path / "quickstart").exists()
    assert commands.run("train", QUICKSTART, *few).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]


def test_where_files_have_no_locks_a_killed_process_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without `-o flock`: what another host's process left, as filelock would leave it, holds up nobody."""
    few = ["cluster.workers=0", "train.steps=2", "train.evaluate_every=2", f"cluster.storage={tmp_path}"]
    (tmp_path / ".quickstart.running").write_text("1234\nanother-host\n")

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(Timeout):
        FileLock(tmp_path / ".quickstart.running", timeout=0).acquire()
    done = commands.run("train", QUICKSTART, *few)
    assert done.code == 0, done.err


_KILLED_BEHIND_THE_LAST_CHECKPOINT = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and os.path.exists("{checkpoint}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def test_a_run_that_is_cut_behind_its_last_checkpoint_has_its_adapters_in_the_end(tmp_path: Path) -> None:
    few = ["cluster.workers=0", "train.steps=4", "train.evaluate_every=2", "train.checkpoint_every=4"]
    assert commands.run("train", QUICKSTART, *few, f"cluster.storage={tmp_path / 'whole'}").code == 0
    run = tmp_path / "cut" / "quickstart"
    killed = commands.run_alone(
        *("train", QUICKSTART, *few, f"cluster.storage={run.parent}"),
        before=_KILLED_BEHIND_THE_LAST_CHECKPOINT.format(checkpoint=run / "checkpoints" / "step-4"),
    )
    assert killed.code == -signal.SIGKILL and not list(run.glob("adapters/*/[a-z]*"))
    assert commands.run("train", QUICKSTART, *few, f"cluster.storage={run.parent}", "--finish").code == 0
    assert _adapters(run) == _adapters(tmp_path / "whole" / "quickstart")


def _adapters(run: Path) -> dict[str, bytes]:
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.glob("adapters/*/[a-z]*/adapter_model.safetensors")
    }
    assert sorted(found) == [f"adapters/grades/{which}/adapter_model.safetensors" for which in ("best", "last")]
    return found
