"""One adapter trained on a classified and a generated task: the same examples on any number of ranks, and a resume that
is exact."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import run_ranks

from peftscale import records
from peftscale.adapters import files
from peftscale.config import RunConfig
from peftscale.data.batches import Cursor
from peftscale.records import StepRecord
from peftscale.train import comm, setup, worker

pytestmark = pytest.mark.ranks
SENTENCES = [("good morning", "guten Morgen"), ("the house is old", "das Haus ist alt"), ("yes", "ja")]


class _Stopped(Exception):
    """What the tests throw into a run after a checkpoint."""


def _config(tmp: Path, name: str, *, limit: int | None = 4) -> RunConfig:
    (tmp / "words.jsonl").write_text("".join(json.dumps({"en": en, "de": de}) + "\n" for en, de in SENTENCES))
    words = {
        "name": "words",
        "files": dict.fromkeys(("train", "validation"), str(tmp / "words.jsonl")),
        "input": "English: {{ en }}\nGerman:",
        "target": " {{ de }}",
        "metrics": ["exact_match"],
        "max_target_tokens": 5,
    }
    source: dict[str, Any] = {"kind": "prompt", "length": 5, "init": "vocabulary", "more_tasks": [words]}
    if limit is not None:
        source["task_size_limit"] = limit
    changes = {"train.steps": 6, "train.evaluate_every": 3, "train.checkpoint_every": 2, "train.learning_rate": 0.05}
    return tiny.run_config(tmp, **{"name": name, "adapters": {"source": source}, **changes})


def _train(cfg: RunConfig, stop_at: int | None) -> int:
    """Run until the end, or until the checkpoint of step `stop_at` is written. Returns the last step reported."""
    reported = [0]

    def report(step: int) -> None:
        reported.append(step)
        if step == stop_at:
            raise _Stopped

    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(_Stopped):
        worker.main(cfg, report)
    return reported[-1]


def _ids(cfg: RunConfig) -> list[tuple[str, int]]:
    """What this rank takes for the examples of the first steps."""
    mixture = comm.together(lambda: setup.load_tasks(cfg))["source"]
    names = {id(example): task.name for task in mixture.tasks for example in task.train}
    taken, _ = mixture.take(Cursor(cfg.adapter_seed("source")), 30)
    return [(names[id(example)], example.index) for example in taken]


def _losses(cfg: RunConfig) -> list[float]:
    rows = {r.step: r.adapters["source"] for r in records.read(cfg.metrics_path) if isinstance(r, StepRecord)}
    return [rows[step] for step in sorted(rows)]


def test_every_rank_of_every_world_takes_the_same_examples_of_both_tasks(tmp_path: Path) -> None:
    cfg, free = _config(tmp_path, "limited"), _config(tmp_path, "free", limit=None)
    (alone,) = run_ranks(_ids, 1, tmp_path / "a", cfg)
    assert run_ranks(_ids, 2, tmp_path / "b", cfg) == [alone, alone]
    assert sum(name == "words" for name, _ in alone[:28]) == 4 * 3  # epochs of four reviews and three sentences
    (without,) = run_ranks(_ids, 1, tmp_path / "c", free)
    assert without != alone
    assert sum(name == "words" for name, _ in without[:30]) == 3 * 3


def test_a_mixture_trains_alike_on_one_and_two_ranks(tmp_path: Path) -> None:
    one, two, other = _config(tmp_path, "one"), _config(tmp_path, "two"), _config(tmp_path, "other", limit=1)
    run_ranks(_train, 1, tmp_path / "a", one, None)
    run_ranks(_train, 2, tmp_path / "b", two, None)
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)
    run_ranks(_train, 1, tmp_path / "c", other, None)
    assert _losses(other) != pytest.approx(_losses(one), rel=1e-2)  # other examples


def test_a_stopped_mixture_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    whole, parts = _config(tmp_path, "whole"), _config(tmp_path, "parts")
    assert run_ranks(_train, 2, tmp_path / "a", whole, None) == [6, 6]
    assert run_ranks(_train, 2, tmp_path / "b", parts, 4) == [4, 4]
    assert run_ranks(_train, 2, tmp_path / "c", parts, None) == [6, 6]
    assert _losses(parts) == _losses(whole)
    for which in ("best", "last"):
        found = [files.read(cfg.adapters_dir / "source" / which) for cfg in (whole, parts)]
        assert found[0].files["adapter_model.safetensors"] == found[1].files["adapter_model.safetensors"]
        assert [one.manifest.metrics for one in found if one.manifest] == [found[0].manifest.metrics] * 2  # type: ignore[union-attr]
