"""Promise 4: the adapter's gradient is that of one process, on any number of ranks, however the base is stored."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale import adapters
from peftscale.base import load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.train import comm, setup, step

pytestmark = pytest.mark.ranks


def _load(cfg: RunConfig, sharding: str = "replicated") -> Base:
    """The base, with the passes that the run file asks for."""
    base = load.load(cfg.base, sharding=sharding, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert setup.choose_packing(cfg, base) is None
    assert base.is_packed == (cfg.train.packing == "auto")
    return base


def _gradient(cfg: RunConfig, sharding: str, microbatch_tokens: int) -> dict[str, Any]:
    """Gradient of one global batch of seven examples, what it cost in bytes, and what is left gathered."""
    base = _load(cfg, sharding)
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    items = training_items("mood", cohort["mood"].length, task.train)
    before = comm.traffic()
    losses = step.gradient(base, cohort, items, microbatch_tokens=microbatch_tokens)
    grad = cohort["mood"].rows_PH.grad
    assert grad is not None
    return {
        "grad": grad,
        "loss": losses["mood"],
        "traffic": comm.traffic().since(before),
        "rows": cohort["mood"].rows_PH,
    }


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize(("config", "packing"), [(tiny.LLAMA, "auto"), (tiny.GPT2, "off")], ids=["packed", "padded"])
def test_one_two_and_three_ranks_give_one_gradient_sharded_and_replicated(
    tmp_path: Path, quantization: str, config: dict[str, Any], packing: str
) -> None:
    base = tiny.save_base(tmp_path / "base", config)
    changes = {"base.quantization": quantization, "train.packing": packing}
    plain = tiny.run_config(tmp_path, base=base, **changes)
    checkpointed = tiny.run_config(tmp_path, base=base, **changes, **{"base.checkpoint_activations": True})
    (want,) = run_ranks(_gradient, 1, tmp_path / "one", plain, "replicated", 4096)
    errors: dict[str, list[float]] = {}
    cases = [
        (2, "world", plain, 4096),
        (2, "world", checkpointed, 64),
        (3, "world", plain, 64),
        (3, "replicated", checkpointed, 4096),
    ]
    for world, sharding, cfg, tokens in cases:
        name = f"{world} {sharding} {cfg.base.checkpoint_activations} {tokens}"
        for got in run_ranks(_gradient, world, tmp_path / name, cfg, sharding, tokens):
            assert torch.equal(got["rows"], want["rows"])  # the same token ids on every rank, without talking
            assert got["loss"] == pytest.approx(float(want["loss"]), rel=1e-6)
            assert got["traffic"].reduced == 5 * 64 * 4
            assert (got["traffic"].gathered > 0) == (sharding == "world")
            errors.setdefault(name, []).append(_error(got["grad"], want["grad"]))
    # float32 order of sums; measured 1.02e-6
    assert all(error < 2e-6 for of_case in errors.values() for error in of_case), errors


def test_a_wrong_share_of_the_batch_would_be_seen(tmp_path: Path) -> None:
    """Negative control: six of the seven examples give another gradient by far more than the tolerance."""
    cfg = tiny.run_config(tmp_path)
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    cohort = adapters.build(cfg, base)
    examples = tasks.load(cfg.task, base.tokenizer, max_tokens=100).train
    grads = []
    for count in (7, 6):
        cohort["mood"].rows_PH.grad = None
        step.gradient(base, cohort, training_items("mood", 5, examples[:count]), microbatch_tokens=4096)
        grads.append(cohort["mood"].rows_PH.grad)
    assert _error(grads[1], grads[0]) > 1e-2


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_packed_and_padded_passes_give_one_gradient(tmp_path: Path, quantization: str) -> None:
    changes = {"base.quantization": quantization, "base.checkpoint_activations": True}
    packed, padded = (
        _gradient(tiny.run_config(tmp_path, **changes, **{"train.packing": packing}), "replicated", 64)
        for packing in ("auto", "off")
    )
    assert packed["loss"] == pytest.approx(float(padded["loss"]), rel=1e-6)
    assert _error(packed["grad"], padded["grad"]) < 2e-6


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_accumulation_over_four_passes_equals_one_pass(tmp_path: Path, packing: str) -> None:
    """Promise 5, in one process."""
    cfg = tiny.run_config(tmp_path, **{"train.packing": packing})
    base = _load(cfg)
    cohort = adapters.build(cfg, base)
    items = training_items("mood", 5, tasks.load(cfg.task, base.tokenizer, max_tokens=100).train)
    grads = []
    for tokens in (4096, 40):
        cohort["mood"].rows_PH.grad = None
        step.gradient(base, cohort, items, microbatch_tokens=tokens)
        grads.append(cohort["mood"].rows_PH.grad)
    assert _error(grads[1], grads[0]) < 1e-6
