"""Promise 10 through the command: a run with a damaged checkpoint goes on from the one before, and says so."""

import shutil
from collections.abc import Callable
from pathlib import Path

import commands
import damages
import pytest
import tiny

from peftscale import driver, records, status
from peftscale.config import RunConfig
from peftscale.errors import DataError
from peftscale.records import NoteRecord


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was never disturbed, with a checkpoint of steps 2, 4 and 6."""
    cfg = tiny.run_config(tmp_path_factory.mktemp("calm"), **{"train.steps": 6, "train.keep_checkpoints": 3})
    driver.run(cfg, show=False)
    return cfg


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (damages.cut, "adapters.safetensors"),
        (damages.flip, "optimizer.safetensors"),
        (damages.half_copied, "state.json"),
        (damages.delete, "manifest.json"),
    ],
)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_ends_bitwise_alike(
    tmp_path: Path, calm: RunConfig, damage: Callable[[Path], None], file: str
) -> None:
    run_dir = Path(shutil.copytree(calm.run_dir, tmp_path / "runs" / "tiny"))
    (run_dir / "summary.json").unlink()
    checkpoints, undisturbed = run_dir / "checkpoints", calm.checkpoints_dir
    damage(checkpoints / "step-6" / file)
    run_file = calm.cluster.runs_dir.parent / "run.json"
    done = commands.run("train", run_file, f"cluster.storage={tmp_path / 'runs'}", "--resume", "tiny")
    assert done.code == 0, done.err
    notes = [row.text for row in records.read(run_dir / "metrics.jsonl") if isinstance(row, NoteRecord)]
    passed_over, goes_on = notes[-2:]
    assert f"checkpoint {checkpoints}/step-6 is " in passed_over and "trying the one before" in passed_over
    assert goes_on == "goes on from step-4"
    assert passed_over in done.err and goes_on in done.err
    for step in ("step-2", "step-4"):
        assert damages.content(checkpoints / step) == damages.content(undisturbed / step)
    for which in ("best", "last"):
        ours, theirs = (damages.content(of / "adapters" / "mood" / which) for of in (run_dir, calm.run_dir))
        assert ours == theirs
    for name in ("adapters.safetensors", "optimizer.safetensors"):  # state.json holds seconds
        assert (checkpoints / "step-6" / name).read_bytes() == (undisturbed / "step-6" / name).read_bytes()


def test_damaged_records_and_a_torn_summary_end_no_run(tmp_path: Path, calm: RunConfig) -> None:
    """A bad disk changes a letter in a line of the metrics, and the summary is half there."""
    run_dir = Path(shutil.copytree(calm.run_dir, tmp_path / "runs" / "tiny"))
    metrics, summary = run_dir / "metrics.jsonl", run_dir / "summary.json"
    lines = metrics.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"kind":"step"' in line and b'"step":2,' in line)
    lines[at] = lines[at].replace(b'"step":2,', b'"step":\xff,')
    metrics.write_bytes(b"".join(lines))
    whole = summary.read_bytes()
    summary.write_bytes(whole[: len(whole) // 2])
    assert status.of(run_dir).state != "ended"
    run_file = calm.cluster.runs_dir.parent / "run.json"
    done = commands.run("train", run_file, f"cluster.storage={tmp_path / 'runs'}", "--finish", "--json")
    assert done.code == 0, done.err
    assert f"metrics.jsonl: line {at + 1} is no record" in done.err
    ended, undisturbed = (records.RunSummary.model_validate_json(text) for text in (done.out, whole))
    assert ended.steps == undisturbed.steps and ended.reduced_bytes_per_step == undisturbed.reduced_bytes_per_step
    assert ended.adapters["mood"].after == undisturbed.adapters["mood"].after
    assert status.of(run_dir).state == "ended"
    with pytest.raises(DataError, match=f"line {at + 1} is no record"):  # nobody is told, so it is not passed over
        list(records.read(metrics))
