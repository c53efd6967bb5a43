"""`train --finish`, which rendered jobs use: it may be started any number of times."""

import json
from pathlib import Path

import commands
from filelock import FileLock

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
