"""Baselines on several ranks end where one rank ends, and what should be cut over the ranks is."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale import baselines
from peftscale.baselines import model, training
from peftscale.baselines import task as baseline_task
from peftscale.baselines.full import Full
from peftscale.baselines.lora import Lora
from peftscale.config import RunConfig
from peftscale.data.batches import training_items
from peftscale.records import RunSummary
from peftscale.train import comm
from peftscale.train.journal import Journal

pytestmark = pytest.mark.ranks

LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8}}
FULL = {"method": "full_finetuning", "base.quantization": "none"}


def _steps(cfg: RunConfig, num_examples: int) -> dict[str, Any]:
    """Three steps over the same examples: the end, how far it is, and what this rank keeps and sent for it."""
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    base = model.load(cfg.base, torch.device("cpu"))
    learner = (Lora if cfg.method == "lora" else Full)(base, cfg, Journal(cfg))
    started = {name: parameter.detach().clone() for name, parameter in learner.named.items()}
    items = training_items(cfg.method, 0, baseline_task.load(cfg).train[:num_examples])
    losses, sent = [], comm.traffic()
    for at in range(3):
        losses.append(float(training.gradient(learner, items, microbatch_tokens=cfg.train.microbatch_tokens)))
        assert learner.update(at, is_finite=True) is not None
    ended = {name: parameter.detach().clone() for name, parameter in learner.named.items()}
    kept = 0
    if isinstance(learner, Full):
        state = learner._optimizer.state.values()
        kept = sum(t.numel() for of_piece in state for t in of_piece.values() if isinstance(t, torch.Tensor))
    found = {
        "losses": losses,
        "ended": ended,
        "moved": max(float((ended[name] - started[name]).norm()) for name in ended),
        "kept": kept,
        "traffic": comm.traffic().since(sent),
    }
    learner.close()
    return found


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest distance of a tensor, in units of the largest that was moved."""
    distances = [float((one["ended"][name] - other["ended"][name]).norm()) for name in one["ended"]]
    return max(distances) / one["moved"]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_full_finetuning_ends_where_one_rank_ends_with_the_optimizer_cut_over_the_ranks(
    tmp_path: Path, optimizer: str
) -> None:
    changes = {**FULL, "train.optimizer": optimizer, "train.learning_rate": 3e-3, "train.clip_norm": 1.0}
    cfg = tiny.run_config(tmp_path, **changes)
    (one,) = run_ranks(_steps, 1, tmp_path / "one", cfg, 7)
    num_weights = sum(tensor.numel() for tensor in one["ended"].values())
    moments = 2 if optimizer == "adamw" else 1
    assert one["kept"] == pytest.approx(moments * num_weights, rel=1e-3)
    for world in (2, 3) if optimizer == "adamw" else (3,):
        several = run_ranks(_steps, world, tmp_path / str(world), cfg, 7)
        for rank in several:
            assert rank["kept"] == pytest.approx(moments * num_weights / world, rel=1e-3)
            assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert _apart(one, rank) < 1e-3  # Adam magnifies rounding where a gradient is near 0; measured 1.1e-4
            assert all(torch.equal(rank["ended"][name], tensor) for name, tensor in several[0]["ended"].items())


def test_lora_over_nf4_ends_where_one_rank_ends_and_sends_its_own_bytes_alone(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **LORA)
    (one,) = run_ranks(_steps, 1, tmp_path / "one", cfg, 7)
    num_bytes = sum(tensor.nbytes for tensor in one["ended"].values())
    for world in (2, 3):
        for rank in run_ranks(_steps, world, tmp_path / str(world), cfg, 7):
            assert rank["traffic"].reduced == 3 * num_bytes
            assert rank["traffic"].gathered == rank["traffic"].checks == 0
            assert rank["losses"] == pytest.approx(one["losses"], rel=1e-6)
            assert _apart(one, rank) < 1e-4  # measured 6.3e-6


@pytest.mark.parametrize("changes", [LORA, FULL], ids=["lora", "full"])
def test_ranks_without_a_row_go_along(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Two examples on three ranks, one of which has nothing in any pass."""
    cfg = tiny.run_config(tmp_path, **{**changes, "train.learning_rate": 1e-3})
    (one,) = run_ranks(_steps, 1, tmp_path / "one", cfg, 2)
    for rank in run_ranks(_steps, 3, tmp_path / "three", cfg, 2):
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert _apart(one, rank) < 1e-2  # measured 1.1e-3 with Adam over all weights, 3.4e-6 for LoRA


def test_other_examples_would_be_seen(tmp_path: Path) -> None:
    """Negative control of the distances above."""
    cfg = tiny.run_config(tmp_path, **FULL)
    six, seven = (run_ranks(_steps, 1, tmp_path / str(num), cfg, num)[0] for num in (6, 7))
    assert _apart(seven, six) > 0.1


def _run(cfg: RunConfig) -> RunSummary:
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    return baselines.main(cfg)


@pytest.mark.parametrize(
    "changes",
    [
        {**LORA, "train.learning_rate": 0.003},
        FULL,
        {"method": "few_shot", "few_shot": {"examples": 2, "calibrated": True}, "base.sharding": "world"},
    ],
    ids=["lora", "full", "few_shot"],
)
def test_a_run_on_two_ranks_reports_the_scores_of_one_and_the_bytes_it_said(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    cfgs = [tiny.run_config(tmp_path, **{**changes, "name": name}) for name in ("one", "two")]
    (one,) = run_ranks(_run, 1, tmp_path / "a", cfgs[0])
    first, second = run_ranks(_run, 2, tmp_path / "b", cfgs[1])
    assert first.adapters == second.adapters
    (alone,), (together,) = one.adapters.values(), first.adapters.values()
    assert (together.before, together.after) == (alone.before, alone.after)
    assert (first.world_size, first.sharding) == (2, "world" if cfgs[1].method == "few_shot" else "replicated")
    assert first.reduced_bytes_per_step == first.predicted.reduced_bytes_per_step
    assert first.gathered_bytes_per_step == first.predicted.gathered_bytes_per_step
    assert first.control_bytes_per_step <= first.predicted.control_bytes_per_step
    assert (first.reduced_bytes_per_step > 0) == (cfgs[1].method != "few_shot")
