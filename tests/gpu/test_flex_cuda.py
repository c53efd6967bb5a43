"""On a CUDA device: FlexAttention gives the batched attention's outputs and gradients, and is what a base takes there.

pytest -m gpu tests/gpu

Not run yet: the tolerances are those that the CPU and the dtypes let expect, none was measured.
"""

from pathlib import Path

import packed_rows
import pytest
import tiny
import torch

from peftscale import adapters
from peftscale.adapters import Cohort
from peftscale.base import attention, flex, flex_exactness, load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import Item, training_items
from peftscale.train import setup, step
from peftscale.train.optim import AdapterOptimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("case", packed_rows.CASES)
def test_outputs_and_gradients_in_float32_are_those_of_the_batched_attention_on_the_cpu(case: str) -> None:
    arguments = packed_rows.CASES[case]
    want = packed_rows.attended(is_flex=False, **arguments)
    assert packed_rows.error(packed_rows.attended(is_flex=True, device="cuda", **arguments), want) < 1e-5


@pytest.mark.parametrize("case", packed_rows.CASES)
def test_outputs_and_gradients_in_bfloat16_are_as_near_to_float32_as_the_batched_ones(case: str) -> None:
    arguments, half = packed_rows.CASES[case], torch.bfloat16
    want = packed_rows.attended(is_flex=False, rounded_to=half, **arguments)
    flexible, batched = (
        packed_rows.error(packed_rows.attended(is_flex=is_flex, device="cuda", dtype=half, **arguments), want)
        for is_flex in (True, False)
    )
    assert flexible < max(3 * batched, 1e-2)


@pytest.mark.parametrize("left_out", ["sliding_window", "softcap", "s_aux", "scaling"])
def test_what_a_layer_asks_for_is_found_missing(left_out: str) -> None:
    """Negative control of the two above."""
    whole = packed_rows.CASES["all together"]
    got = packed_rows.attended(is_flex=True, device="cuda", **{**whole, left_out: None})
    assert packed_rows.error(got, packed_rows.attended(is_flex=False, **whole)) > 1e-2


def test_what_is_not_finite_stays_with_its_adapter_forward_and_backward() -> None:
    rows, bad_outputs, bad_gradients = packed_rows.spoiled(device="cuda")
    assert bad_outputs == rows
    assert bad_gradients == rows


def test_rows_of_all_lengths_share_one_kernel() -> None:
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    for num in (1, 9, 4, 30, 60):
        lay = attention.layout([20, 0], [30 + i for i in range(num)], [0] * num, device=torch.device("cuda"))
        states = [torch.randn(1, heads, lay.num_tokens, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
        out, _ = attention.packed_attention(packed_rows.layer(), *states, None, layout=lay, is_flex=True)  # type: ignore[misc]
        out.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _loaded(cfg: RunConfig, device: str) -> tuple[Base, Cohort, list[Item]]:
    base = load.load(cfg.base, sharding="replicated", device=torch.device(device))
    said = setup.pack_where_exact(base)
    assert said == (None if device == "cpu" else "attention is FlexAttention")
    items = training_items("mood", 5, tasks.load(cfg.task, base.tokenizer, max_tokens=100).train)
    return base, adapters.build(cfg, base), items


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_no_gradient(tmp_path: Path, compute_dtype: str) -> None:
    grads = []
    for is_on in (False, True):
        changes = {"base.compute_dtype": compute_dtype, "base.checkpoint_activations": is_on}
        base, cohort, items = _loaded(tiny.run_config(tmp_path, **changes), "cuda")
        step.gradient(base, cohort, items, microbatch_tokens=10**6)
        grad = cohort["mood"].rows_PH.grad
        assert grad is not None and grad.norm() > 0
        grads.append(grad.cpu())
    assert torch.equal(*grads)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_step_on_cuda_is_the_step_of_the_cpu(tmp_path: Path, is_checkpointed: bool) -> None:
    """A tiny base in float32: loss, gradient, and where one update of AdamW takes the prompt."""
    losses, grads, moved = [], [], []
    for device in ("cpu", "cuda"):
        cfg = tiny.run_config(tmp_path, **{"base.checkpoint_activations": is_checkpointed})
        base, cohort, items = _loaded(cfg, device)
        before = cohort["mood"].rows_PH.detach().cpu().clone()
        step.gradient(base, cohort, items, microbatch_tokens=64)
        grad = cohort["mood"].rows_PH.grad
        assert grad is not None
        grads.append(grad.cpu().clone())
        cohort["mood"].rows_PH.grad = None
        optimizers = {name: AdapterOptimizer(adapter.parameters(), cfg.train) for name, adapter in cohort.items()}
        losses.append(step.run(base, cohort, optimizers, items, step=0, microbatch_tokens=64).losses["mood"])
        moved.append(cohort["mood"].rows_PH.detach().cpu() - before)
    assert abs(losses[1] / losses[0] - 1) < 1e-5
    assert packed_rows.error([grads[1]], [grads[0]]) < 1e-4
    assert packed_rows.error([moved[1]], [moved[0]]) < 1e-2  # AdamW's first update is a sign: tiny gradients may turn


def test_the_check_at_load_finds_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: keys that are scaled a little."""
    base = load.load(tiny.run_config(tmp_path).base, sharding="replicated", device=torch.device("cuda"))
    attend = flex.attend

    def wrong(query: torch.Tensor, key: torch.Tensor, *rest: object, **arguments: object) -> torch.Tensor:
        return attend(query, key * 1.2, *rest, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(flex, "attend", wrong)
    reason = flex_exactness.flex_differs(base)
    assert reason is not None
    assert "differ by" in reason
