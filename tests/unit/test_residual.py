"""Residual prompts: rows and what a small network adds, folded when saved; two learning rates; starts at scale."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from peftscale import adapters, driver, facts, plan
from peftscale.adapters import ResidualPrompt, SoftPrompt, files, initialisation
from peftscale.adapters.reparam import FoldedPrompt
from peftscale.base import load
from peftscale.config import RunConfig, TrainConfig
from peftscale.errors import ConfigError
from peftscale.plan.adapters import MANIFEST_BYTES
from peftscale.train import checkpoint
from peftscale.train.optim import AdapterOptimizer

P, H, M = 5, 64, 12
RESIDUAL = {"kind": "prompt", "length": P, "init": "vocabulary", "reparam": "residual", "reparam_hidden_size": M}


def _residual(seed: int = 0, gain: float = 0.3) -> ResidualPrompt:
    rows_PH = initialisation.random_rows(P, H, seed=seed)
    down, up = initialisation.bottleneck(H, hidden=M, seed=seed)
    return ResidualPrompt(rows_PH, down, up, gain=gain)


def _config(tmp: Path, **changes: Any) -> RunConfig:
    return tiny.run_config(tmp, **{"adapters": {"mood": RESIDUAL}, "base.quantization": "none", **changes})


def test_what_is_added_is_the_published_network_s() -> None:
    adapter = _residual()
    published = nn.Sequential(nn.Linear(H, M), nn.ReLU(), nn.Linear(M, H), nn.LayerNorm(H))
    own = [adapter.down_MH, adapter.down_M, adapter.up_HM, adapter.up_H, adapter.gain_H, adapter.shift_H]
    for theirs, ours in zip(published.parameters(), own, strict=True):
        theirs.data.copy_(ours.data)
    torch.testing.assert_close(adapter(), adapter.rows_PH + published(adapter.rows_PH), rtol=0, atol=1e-7)


def test_the_gradient_of_the_folded_prompt_goes_back_through_the_network() -> None:
    adapter, direct = _residual(), _residual()
    weight = torch.randn(P, H)
    (direct() * weight).tanh().sum().backward()
    folded = adapter.folded()
    assert isinstance(folded, FoldedPrompt) and folded.values.is_leaf and torch.equal(folded.values, adapter())
    (folded.values * weight).tanh().sum().backward()
    assert all(parameter.grad is None for parameter in adapter.parameters())
    folded.send_back()
    for got, want in zip(adapter.parameters(), direct.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_rows_and_network_move_at_two_rates(optimizer: str) -> None:
    """One update beside two optimizers of one rate each."""
    cfg = TrainConfig(
        steps=10,
        examples_per_step=1,
        microbatch_tokens=1,
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=0.2,
        network_learning_rate=0.01,
        weight_decay=0.1,
        evaluate_every=1,
        checkpoint_every=1,
    )
    adapter, rows, network = _residual(), _residual(), _residual()
    alone = cfg.model_copy(update={"network_learning_rate": None})
    optimizers = [
        (adapter, AdapterOptimizer.of(adapter, cfg)),
        (rows, AdapterOptimizer.of(rows, alone)),
        (network, AdapterOptimizer.of(network, alone.model_copy(update={"learning_rate": 0.01}))),
    ]
    for each, its_optimizer in optimizers:
        for parameter in each.parameters():
            parameter.grad = torch.cos(parameter.detach() * 3)
        its_optimizer.update(0)
    assert torch.equal(adapter.rows_PH, rows.rows_PH) and not torch.equal(adapter.rows_PH, network.rows_PH)
    for got, want in zip(adapter.network_parameters(), network.network_parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_a_run_saves_what_the_network_made_and_a_resume_has_the_network(tmp_path: Path) -> None:
    whole = _config(tmp_path, **{"name": "whole", "train.steps": 4})
    driver.run(whole)
    half = _config(tmp_path, **{"name": "half", "train.steps": 4})
    driver.run(half)
    for step in (half.checkpoints_dir / "step-4",):
        for path in step.iterdir():
            path.unlink()
        step.rmdir()
    half.summary_path.unlink()
    driver.run(half, resume=True)
    last = [checkpoint._verified(cfg.checkpoints_dir / "step-4")["adapters.safetensors"] for cfg in (whole, half)]
    assert last[0] == last[1] and b"down_MH" in last[0]
    saved = files.describe(whole.adapters_dir / "mood" / "last")
    assert (saved.kind, saved.length, saved.hidden_size) == ("prompt", P, H)
    assert saved.num_file_bytes == files.expected_bytes(P, H)
    planned = plan.make(whole, facts.load(tmp_path / "base"), plan.Hardware.parse("cpu-24GB"), world=1)
    num_bytes = sum(path.stat().st_size for path in (whole.checkpoints_dir / "step-4").iterdir())
    assert num_bytes <= planned.checkpoint_bytes < num_bytes + 2 * MANIFEST_BYTES


def test_the_plan_counts_the_network(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    cohort = adapters.build(cfg, base)
    made = plan.make(cfg, facts.load(tmp_path / "base"), plan.Hardware.parse("cpu-24GB"), world=2)
    assert made.adapter_bytes == made.reduced_bytes_per_step == cohort.num_bytes
    assert made.optimizer_bytes == 2 * cohort.num_bytes


def test_a_network_size_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reparam_hidden_size: must be given exactly when reparam is 'residual'"):
        _config(tmp_path, adapters={"mood": {**RESIDUAL, "reparam": "none"}})
    with pytest.raises(ConfigError, match="reparam_hidden_size: must be given exactly when reparam is 'residual'"):
        _config(tmp_path, adapters={"mood": {**RESIDUAL, "reparam_hidden_size": None}})


def test_a_rate_of_a_network_without_a_network_is_refused(tmp_path: Path) -> None:
    bare, own = {"kind": "prompt", "length": 2, "init": "random"}, {"train": {"network_learning_rate": 0.02}}
    with pytest.raises(ConfigError, match="train.network_learning_rate: is the rate of a re-parametrised adapter's"):
        _config(tmp_path, adapters={"mood": bare}, **{"train.network_learning_rate": 0.01})
    with pytest.raises(ConfigError, match="adapters.bare.train.network_learning_rate: .* got 0.02"):
        _config(tmp_path, adapters={"mood": RESIDUAL, "bare": {**bare, **own}})
    lora = {"method": "lora", "lora": {"rank": 2, "alpha": 4, **own}, "adapters": {"mood": RESIDUAL}}
    with pytest.raises(ConfigError, match="lora.train.network_learning_rate: .* got 0.02"):
        _config(tmp_path, **lora)
    few = {"method": "few_shot", "few_shot": {"examples": 1}, "adapters": {"mood": RESIDUAL}}
    assert _config(tmp_path, **few, **{"train.network_learning_rate": 0.01}).method == "few_shot"  # one word more
    mixed = _config(tmp_path, adapters={"mood": RESIDUAL, "bare": bare}, **{"train.network_learning_rate": 0.01})
    assert mixed.adapter_train("mood").network_learning_rate == 0.01


def test_a_scaled_start_has_mean_and_deviation_of_the_frequent_embeddings(tmp_path: Path) -> None:
    adapter = {"kind": "prompt", "length": 400, "init": "scaled", "init_top": 300}
    cfg = tiny.run_config(
        tmp_path, **{"adapters": {"mood": adapter}, "base.quantization": "none", "train.microbatch_tokens": 512}
    )
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    table_VH = base.model.get_input_embeddings().weight
    table_VH.data[:300] = table_VH.data[:300] * 3 + 1
    start = adapters.build(cfg, base)["mood"]
    assert isinstance(start, SoftPrompt)
    known_NH = table_VH[[i for i in range(300) if i not in base.tokenizer.all_special_ids]].float()
    # Four hundred draws: the error of a mean is a twentieth of the deviation, over 64 dimensions at most three of it.
    torch.testing.assert_close(start.values.mean(0), known_NH.mean(0), rtol=0, atol=0.2 * float(known_NH.std()))
    assert functional.cosine_similarity(start.values.std(0), known_NH.std(0), dim=0) > 0.99
    assert torch.equal(start.values, adapters.build(cfg, base)["mood"].folded().values)
