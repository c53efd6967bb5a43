"""Prefixes on real ranks: one gradient however the base is stored, beside prompts, after evaluations, after a stop."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from peftscale import adapters
from peftscale.adapters import Cohort, files
from peftscale.analysis import matrix
from peftscale.base import load, shard
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.train import comm, evaluate, setup, step, worker
from peftscale.train.optim import AdapterOptimizer

pytestmark = pytest.mark.ranks

PLAIN = {"kind": "prefix", "length": 6, "init": "random"}
NETWORK = {**PLAIN, "length": 4, "reparam": "mlp", "reparam_hidden_size": 24}
FROM_TEXT = {"kind": "prefix", "length": 3, "init": "text", "init_text": "Verdict: good or bad"}
PROMPT = {"kind": "prompt", "length": 5, "init": "vocabulary"}
MIXED = {"words": PROMPT, "keys": PLAIN, "network": NETWORK, "text": FROM_TEXT}


def _open(cfg: RunConfig, sharding: Any) -> Base:
    base = load.load(cfg.base, sharding=sharding, device=torch.device("cpu"))
    assert setup.choose_packing(cfg, base) is None
    return base


def _gradients(cohort: Cohort) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in cohort.named_parameters().items() if p.grad is not None}


def _gradient(cfg: RunConfig, sharding: str, microbatch_tokens: int) -> dict[str, Any]:
    """Gradients of one global batch of seven examples for every adapter, and the bytes that were reduced."""
    base = _open(cfg, sharding)
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    items = [item for name, adapter in cohort.items() for item in training_items(name, adapter.length, task.train)]
    before = comm.traffic()
    losses = step.gradient(base, cohort, items, microbatch_tokens=microbatch_tokens)
    return {
        "gradients": _gradients(cohort),
        "losses": {name: float(loss) for name, loss in losses.items()},
        "reduced": comm.traffic().since(before).reduced,
        "bytes": cohort.num_bytes,
        "still gathered": shard.gathered_bytes(base.model),
        "start": {name: p.detach().clone() for name, p in cohort.named_parameters().items()},
    }


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert set(got) <= set(want)
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in got}


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_one_and_two_ranks_give_one_gradient_sharded_with_checkpointing_on_and_off(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tiny.save_base(tmp_path / "base", config)
    plain = tiny.run_config(tmp_path, base=path, adapters=MIXED)
    checkpointed = tiny.run_config(tmp_path, base=path, adapters=MIXED, **{"base.checkpoint_activations": True})
    (want,) = run_ranks(_gradient, 1, tmp_path / "one", plain, "replicated", 4096)
    assert len(want["gradients"]) == 1 + 1 + 5 + 1 and all(bool(g.any()) for g in want["gradients"].values())
    worst = {}
    for world, sharding, cfg, tokens in [
        (1, "replicated", checkpointed, 4096),
        (2, "world", plain, 4096),
        (2, "world", checkpointed, 64),
    ]:
        name = f"{world} {sharding} {cfg.base.checkpoint_activations} {tokens}"
        for got in run_ranks(_gradient, world, tmp_path / name, cfg, sharding, tokens):
            for key, value in want["start"].items():  # text activations of a sharded base are those of a whole one
                torch.testing.assert_close(got["start"][key], value, rtol=0, atol=1e-6)
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
            assert got["reduced"] == (got["bytes"] if world > 1 else 0)
            errors = _errors(got["gradients"], want["gradients"])
            worst[name] = float(torch.tensor([*errors.values()]).max())  # NaN stays
    assert worst["1 replicated True 4096"] == 0  # a block that is computed again gives the same bits
    assert all(error < 2e-6 for error in worst.values()), worst  # float32 order of sums; measured 1.0e-6


@pytest.mark.parametrize("adapter", [PLAIN, NETWORK], ids=["plain", "network"])
def test_after_the_backward_of_prefixes_alone_no_gathered_weight_is_alive(
    tmp_path: Path, adapter: dict[str, Any]
) -> None:
    cfg = tiny.run_config(tmp_path, adapters={"keys": adapter})
    for got in run_ranks(_gradient, 2, tmp_path / "two", cfg, "world", 64):
        assert got["still gathered"] == 0  # 17,992, the first block, where the row's embeddings take no gradient


def test_a_cohort_of_prompts_and_prefixes_equals_each_alone(tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path / "base")
    mixed = tiny.run_config(tmp_path, base=path, adapters=MIXED)
    (together,) = run_ranks(_gradient, 1, tmp_path / "all", mixed, "replicated", 4096)
    for name, adapter in MIXED.items():
        cfg = tiny.run_config(tmp_path, base=path, adapters={name: adapter})
        (alone,) = run_ranks(_gradient, 1, tmp_path / name, cfg, "replicated", 4096)
        errors = _errors(alone["gradients"], together["gradients"])
        assert all(error < 1e-6 for error in errors.values()), errors  # measured 4.6e-7
        assert alone["losses"][name] == pytest.approx(together["losses"][name], rel=1e-6)


def _steps(cfg: RunConfig, sharding: str) -> dict[str, Any]:
    """Step, evaluation, step: every adapter's values after each, and the digest of what is frozen."""
    base = _open(cfg, sharding)
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    optimizers = {name: AdapterOptimizer(adapter.parameters(), cfg.train) for name, adapter in cohort.items()}
    items = [item for name, adapter in cohort.items() for item in training_items(name, adapter.length, task.train)]
    found, digests = [], []

    def keep() -> None:
        found.append({name: parameter.detach().clone() for name, parameter in cohort.named_parameters().items()})
        digests.append(shard.live_digest(base.model))

    keep()
    for number in range(2):
        step.run(base, cohort, optimizers, items, step=number, microbatch_tokens=96)
        keep()
        evaluate.run(base, cohort, task, task.validation, metrics=("accuracy",), microbatch_tokens=96)
    return {"values": found, "digests": digests}


def test_after_an_evaluation_the_prefix_still_trains(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, adapters=MIXED, **{"base.checkpoint_activations": True})
    first, second = run_ranks(_steps, 2, tmp_path / "two", cfg, "world")
    for name, start in first["values"][0].items():
        once, twice = first["values"][1][name], first["values"][2][name]
        assert not torch.equal(start, once) and not torch.equal(once, twice), name
        assert torch.equal(twice, second["values"][2][name])
    for rank in (first, second):
        assert len(set(rank["digests"])) == 1


def _written(cfg: RunConfig, sharding: str) -> dict[str, Any]:
    """Texts that each adapter, and the base alone, write behind seven inputs."""
    base = _open(cfg, sharding)
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    results = evaluate.run(
        base, cohort, task, task.validation, metrics=("exact_match",), microbatch_tokens=96, with_base_alone=True
    )
    return {name: result.predictions for name, result in results.items()}


WINDOWED = {**tiny.LLAMA, "model_type": "mistral", "sliding_window": 8}


@pytest.mark.parametrize("config", [tiny.LLAMA, WINDOWED], ids=["llama", "windowed"])
def test_prefixes_write_on_two_ranks_what_they_write_on_one(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tiny.save_base(tmp_path / "base", config)
    changes = {"task.labels": None, "task.metrics": ["exact_match"], "task.max_target_tokens": 7}
    cfg = tiny.run_config(tmp_path, base=path, adapters=MIXED, **changes)
    (one,) = run_ranks(_written, 1, tmp_path / "one", cfg, "replicated")
    for got in run_ranks(_written, 2, tmp_path / "two", cfg, "world"):
        assert got == one
    assert len(set(one.values())) == len(MIXED) + 1  # each adapter writes something else


class _Stopped(Exception):
    """What the tests throw into a run after a checkpoint."""


def _train(cfg: RunConfig, stop_at: int | None) -> int:
    """Run the worker, to its end or until the checkpoint of a step; returns the last step that was saved."""
    reported = []

    def report(number: int) -> None:
        reported.append(number)
        if number == stop_at:
            raise _Stopped

    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(_Stopped):
        worker.main(cfg, report)
    return reported[-1]


def _digests(cfg: RunConfig) -> dict[str, str]:
    found = {}
    for name in cfg.adapters:
        for which in ("best", "last"):
            path = cfg.run_dir / "adapters" / name / which / "adapter_model.safetensors"
            found[f"{name} {which}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_a_stopped_run_of_prefixes_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    changes = {"train.steps": 6, "train.evaluate_every": 3, "train.checkpoint_every": 2, "train.microbatch_tokens": 64}
    whole = tiny.run_config(tmp_path, base=base, adapters=MIXED, name="whole", **changes)
    parts = tiny.run_config(tmp_path, base=base, adapters=MIXED, name="parts", **changes)
    assert run_ranks(_train, 2, tmp_path / "a", whole, None) == [6, 6]
    assert run_ranks(_train, 2, tmp_path / "b", parts, 4) == [4, 4]
    assert run_ranks(_train, 2, tmp_path / "c", parts, None) == [6, 6]
    assert _digests(parts) == _digests(whole)
    summary = json.loads((whole.run_dir / "summary.json").read_text())
    assert summary["packing"] == "packed"
    assert summary["reduced_bytes_per_step"] == summary["predicted"]["reduced_bytes_per_step"]
    for name, of_adapter in summary["adapters"].items():
        written = Path(of_adapter["dir"]) / "adapter_model.safetensors"
        assert written.stat().st_size == of_adapter["file_bytes"]
        assert files.verify(Path(of_adapter["dir"])) is not None, name
    directories = [Path(one["dir"]) for one in summary["adapters"].values()]
    found = matrix.scores(whole, directories, [whole.task], "validation", together={})["tasks"][whole.task.name]
    for of_adapter in summary["adapters"].values():  # trained adapters at work, from their files
        assert found["adapters"][of_adapter["dir"]]["metrics"] == of_adapter["after"]
    kept = load_file(whole.run_dir / "checkpoints" / "step-6" / "adapters.safetensors")
    network = sorted(key for key in kept if key.startswith("network/last/"))
    assert [key.rpartition(".")[2] for key in network] == ["inner_M", "inner_ME", "inputs_PE", "outer_O", "outer_OM"]
