"""What a run leaves behind reads back as it was, also after a kill in the middle of a line."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peftscale
from peftscale import records
from peftscale.errors import DataError
from peftscale.records import AdapterSummary, BenchRecord, EvaluationRecord, Predicted, RunSummary, StepRecord


def step(number: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(
        step=number,
        adapters={"a": loss, "b": 0.25},
        learning_rate=0.3,
        tokens=77,
        seconds=0.125,
        tokens_per_s=616.0,
        reduced_bytes=20480,
        gathered_bytes=1 << 33,
        control_bytes=64,
        skipped=not math.isfinite(loss),
    )


EVALUATION = EvaluationRecord(step=0, adapter="a", split="test", metrics={"accuracy": 0.25}, seconds=1.5)


def test_records_read_back_in_order_with_their_classes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bench = BenchRecord(name="load", config_fingerprint=None, measured={"s": 0.5}, environment=records.environment())
    written = [EVALUATION, step(1), bench, step(2)]
    for record in written:
        records.append(path, record)
    assert list(records.read(path)) == written
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "evaluation",
        "step",
        "bench",
        "step",
    ]


def test_a_loss_that_is_not_finite_reads_back_and_the_line_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records.append(path, step(3, math.nan))
    records.append(path, step(4, -math.inf))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    first, second = records.read(path)
    assert isinstance(first, StepRecord)
    assert isinstance(second, StepRecord)
    assert math.isnan(first.adapters["a"])
    assert (first.skipped, second.adapters["a"]) == (True, -math.inf)


def test_a_last_line_that_was_cut_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3):
        records.append(path, step(number))
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [row.step for row in records.read(path) if isinstance(row, StepRecord)] == [1, 2]
    path.write_text(whole.replace('"step":2', '"step":"x"'))
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is no record: .*step"):
        list(records.read(path))


def test_the_run_summary_has_the_fields_of_the_contract_and_no_other() -> None:
    figures = {
        "reduced_bytes_per_step": 1,
        "gathered_bytes_per_step": 2,
        "control_bytes_per_step": 3,
        "peak_rank_bytes": 4,
    }
    adapter = AdapterSummary(
        dir="d",
        file_bytes=5,
        trainable_parameters=6,
        train_loss=0.7,
        steps=9,
        stopped=None,
        before={"accuracy": 0.1},
        after={"accuracy": 0.9},
    )
    summary = RunSummary(
        name="n",
        world_size=2,
        sharding="world",
        packing="padded",
        steps=9,
        seconds=10.0,
        tokens_per_s=11.0,
        **figures,
        predicted=Predicted(**figures),
        adapters={"a": adapter},
    )
    written = json.loads(summary.model_dump_json())
    assert ", ".join(written) == (
        "name, world_size, sharding, packing, steps, seconds, tokens_per_s, reduced_bytes_per_step, "
        "gathered_bytes_per_step, control_bytes_per_step, peak_rank_bytes, gathered_between_nodes_bytes_per_step, "
        "step_s, predicted, adapters"
    )
    assert written["predicted"] == {**figures, "gathered_between_nodes_bytes_per_step": 0, "step_s": None}
    assert ", ".join(written["adapters"]["a"]) == (
        "dir, file_bytes, trainable_parameters, train_loss, steps, stopped, before, after"
    )


def test_a_benchmark_line_shows_each_prediction_behind_its_measurement() -> None:
    record = BenchRecord(
        name="train_step",
        config_fingerprint="ab",
        step_s_quartiles=(0.1, 0.25, 0.5),
        measured={"reduced_bytes": 20480, "tokens_per_s": 1234.567},
        planned={"reduced_bytes": 20481},
        environment=records.environment(),
    )
    assert record.line() == "train_step  step_s 0.25 (0.1..0.5)  reduced_bytes 20,480 (plan 20,481)  tokens_per_s 1,235"


def test_the_environment_names_versions_and_hardware() -> None:
    here = records.environment()
    assert here.versions["peftscale"] == peftscale.__version__
    assert {"python", "torch", "deepspeed", "transformers", "ray"} <= set(here.versions)
    assert here.num_cpus >= 1
    assert here.memory_bytes > 1 << 28
    assert here.date.endswith("+00:00")


def test_the_commit_is_that_of_our_own_checkout_and_not_of_a_repository_around_it(tmp_path: Path) -> None:
    shutil.copytree(Path(peftscale.__file__).parent, tmp_path / "peftscale")
    code = "from peftscale import records; print(records.environment().commit)"

    def commit() -> str:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    def git(*arguments: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit() == "None"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody else's")
    assert commit() == "None"
    git("add", "peftscale")
    git("commit", "-q", "-m", "ours")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "peftscale/errors.py").write_text("# changed\n" + (tmp_path / "peftscale/errors.py").read_text())
    assert commit() == git("rev-parse", "HEAD") + "-dirty"
