"""Promise 9: a run that was stopped goes on as if nothing had happened, on any number of ranks."""

import contextlib
from pathlib import Path

import pytest
import runs
import tiny
import torch
from harness import run_ranks

from peftscale.config import RunConfig
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
    changes |= {"adapters": {"mood": {"kind": "prompt", "length": 5, "init": "random"}}}
    return tiny.run_config(tmp, **{"name": name, **changes})


def test_a_stopped_run_on_two_ranks_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    whole, parts = _config(tmp_path, "whole"), _config(tmp_path, "parts")
    assert run_ranks(_train, 2, tmp_path / "a", whole, None) == [8, 8]
    assert run_ranks(_train, 2, tmp_path / "b", parts, 4) == [4, 4]
    assert run_ranks(_train, 2, tmp_path / "c", parts, None) == [8, 8]
    assert (runs.losses(parts), runs.ends(parts)) == (runs.losses(whole), runs.ends(whole))
    assert runs.texts(parts) == runs.texts(whole)


def test_two_then_one_then_three_ranks_see_the_same_examples_and_end_where_one_rank_ends(tmp_path: Path) -> None:
    alone, mixed = _config(tmp_path, "alone"), _config(tmp_path, "mixed")
    run_ranks(_train, 1, tmp_path / "a", alone, None)
    assert run_ranks(_train, 2, tmp_path / "b", mixed, 2) == [2, 2]
    assert run_ranks(_train, 1, tmp_path / "c", mixed, 4) == [4]
    assert run_ranks(_train, 3, tmp_path / "d", mixed, None) == [8, 8, 8]
    assert [text for text in runs.notes(mixed) if "goes on" in text] == [
        "goes on from step-2, on 1 rank(s) where there were 2",
        "goes on from step-4, on 3 rank(s) where there were 1",
    ]
    assert runs.texts(mixed) == runs.texts(alone)
    assert len(set(runs.texts(mixed))) == 8  # other examples would be seen
    assert runs.apart(mixed, alone, "mood") < 1e-5


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
    assert runs.ends(cut)["mood/last"] != runs.ends(whole)["mood/last"]
    assert runs.apart(cut, whole, "mood") > 1e-3
