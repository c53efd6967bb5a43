"""Promise 9: a run that was stopped goes on as if nothing had happened, on any number of ranks."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale import records
from peftscale.config import RunConfig
from peftscale.records import StepRecord
from peftscale.train import checkpoint, worker

pytestmark = pytest.mark.ranks


class _Stopped(Exception):
    """What the tests throw into a run after a checkpoint."""


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


def _config(tmp: Path, name: str) -> RunConfig:
    changes = {"train.steps": 8, "train.evaluate_every": 3, "train.checkpoint_every": 2, "train.microbatch_tokens": 48}
    changes |= {"train.optimizer": "adafactor", "train.learning_rate": 0.05, "train.schedule": "linear"}
    return tiny.run_config(tmp, **{"name": name, **changes})


def _adapter_digest(cfg: RunConfig, which: str) -> str:
    path = cfg.run_dir / "adapters" / "mood" / which / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _losses(cfg: RunConfig) -> list[float]:
    rows = {
        r.step: r.adapters["mood"] for r in records.read(cfg.run_dir / "metrics.jsonl") if isinstance(r, StepRecord)
    }
    return [rows[step] for step in sorted(rows)]


def _state(cfg: RunConfig, step: int) -> dict[str, object]:
    state: dict[str, object] = json.loads((cfg.run_dir / "checkpoints" / f"step-{step}" / "state.json").read_text())
    return state


def test_a_stopped_run_on_two_ranks_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    whole, parts = _config(tmp_path, "whole"), _config(tmp_path, "parts")
    assert run_ranks(_train, 2, tmp_path / "a", whole, None) == [8, 8]
    assert run_ranks(_train, 2, tmp_path / "b", parts, 4) == [4, 4]
    assert run_ranks(_train, 2, tmp_path / "c", parts, None) == [8, 8]
    assert _losses(parts) == _losses(whole)
    for which in ("best", "last"):
        assert _adapter_digest(parts, which) == _adapter_digest(whole, which)


def test_one_two_and_three_ranks_train_on_the_same_examples_and_take_over_from_each_other(tmp_path: Path) -> None:
    alone, mixed = _config(tmp_path, "alone"), _config(tmp_path, "mixed")
    run_ranks(_train, 1, tmp_path / "a", alone, None)
    assert run_ranks(_train, 2, tmp_path / "b", mixed, 2) == [2, 2]
    assert run_ranks(_train, 1, tmp_path / "c", mixed, 4) == [4]
    assert run_ranks(_train, 3, tmp_path / "d", mixed, None) == [8, 8, 8]
    assert _state(mixed, 8)["progress"]["mood"]["cursor"] == _state(alone, 8)["progress"]["mood"]["cursor"]  # type: ignore[index]
    assert _losses(mixed) == pytest.approx(_losses(alone), rel=1e-4)  # other examples would differ by 1e-1


def test_the_gradient_state_is_not_restored_by_chance(tmp_path: Path) -> None:
    """Negative control: the same run without its optimizer moments ends elsewhere."""
    whole, cut = _config(tmp_path, "whole"), _config(tmp_path, "cut")
    torch.set_num_threads(1)
    _train(whole, None)
    _train(cut, 4)
    original = checkpoint.load
    try:
        checkpoint.load = lambda data: {} if b"exp_avg" in data else original(data)  # type: ignore[assignment]
        _train(cut, None)
    finally:
        checkpoint.load = original
    assert _adapter_digest(cut, "last") != _adapter_digest(whole, "last")
