"""The optimizers are those of the paper, and their numbers are those of a hand calculation."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftscale.config import TrainConfig
from peftscale.train.optim import AdapterOptimizer, are_finite, rate_at, snapshots, update_

aten = torch.ops.aten


def _config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "steps": 10,
        "examples_per_step": 1,
        "microbatch_tokens": 1,
        "optimizer": "adafactor",
        "learning_rate": 0.3,
        "evaluate_every": 1,
        "checkpoint_every": 1,
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def _prompt() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 100 * 7).view(100, 7))


def test_adafactor_is_the_papers_recipe_not_factored_not_scaled_clipped_at_one() -> None:
    """Two updates beside the formulas of Shazeer and Stern 2018 without factoring: v, clip by RMS 1, rate 0.3."""
    prompt = _prompt()
    want, v = prompt.detach().clone(), torch.zeros(700).view(100, 7)
    optimizer = AdapterOptimizer([prompt], _config())
    for step in range(2):
        grad = torch.cos(want * (step + 3))
        prompt.grad = grad.clone()
        assert optimizer.update(step) == 0.3
        beta2 = 1 - (step + 1) ** -0.8
        v = beta2 * v + (1 - beta2) * (grad**2 + 1e-30)
        update = grad / v.sqrt()
        update /= max(1.0, float(update.pow(2).mean().sqrt()))
        want -= 0.3 * update
    torch.testing.assert_close(prompt.detach(), want, rtol=0, atol=1e-6)  # measured 2.4e-7
    shapes = {name: tuple(value.shape) for name, value in optimizer.state().items()}
    assert shapes["0.exp_avg_sq"] == (700,)  # a factored one would keep a row and a column
    assert not any("row" in name or "col" in name for name in shapes)


def test_adafactor_factors_a_matrix_that_is_not_flattened() -> None:
    """Negative control: the library alone would keep two vectors for this prompt."""
    from transformers.optimization import Adafactor

    prompt = _prompt()
    library = Adafactor([prompt], lr=0.3, scale_parameter=False, relative_step=False)
    prompt.grad = torch.ones_like(prompt)
    library.step()
    assert "exp_avg_sq_row" in library.state[prompt]


def test_the_decay_of_adafactor_is_not_multiplied_by_the_rate_and_that_of_adamw_is() -> None:
    for optimizer, kept in (("adafactor", 1 - 0.01), ("adamw", 1 - 0.3 * 0.01)):
        prompt = nn.Parameter(torch.full((5, 3), 2.0))
        plain = nn.Parameter(prompt.detach().clone())
        for parameter, decay in ((prompt, 0.01), (plain, 0.0)):
            parameter.grad = torch.ones_like(parameter)
            AdapterOptimizer([parameter], _config(optimizer=optimizer, weight_decay=decay)).update(0)
        torch.testing.assert_close(
            prompt.detach() - plain.detach(), torch.full((5, 3), 2.0 * (kept - 1)), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_clipping_bounds_the_norm_of_what_an_adapter_sees(optimizer: str) -> None:
    seen = []
    for scale in (1.0, 1e6):
        prompt = _prompt()
        prompt.grad = torch.sin(prompt.detach()) * scale
        AdapterOptimizer([prompt], _config(optimizer=optimizer, clip_norm=1e-3, learning_rate=0.1)).update(0)
        seen.append(prompt.detach().clone())
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-6)


def test_schedules_warm_up_and_come_down_as_they_say() -> None:
    linear = _config(schedule="linear", warmup_steps=2, learning_rate=1.0)
    assert [round(rate_at(linear, step), 4) for step in range(10)] == [
        0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125
    ]  # fmt: skip
    cosine = _config(schedule="cosine", learning_rate=1.0)
    assert rate_at(cosine, 0) == 1.0
    assert rate_at(cosine, 5) == pytest.approx(0.5)
    assert rate_at(cosine, 9) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert {rate_at(_config(), step) for step in range(10)} == {0.3}


def _cohort() -> list[TrainConfig]:
    """Five adapters of two kinds of optimizer, no two alike."""
    return [
        _config(optimizer="adamw", learning_rate=0.3, weight_decay=0.1),
        _config(optimizer="adafactor", learning_rate=0.1, clip_norm=0.5),
        _config(optimizer="adamw", learning_rate=1e-3, schedule="linear", warmup_steps=3, clip_norm=1e-2),
        _config(optimizer="adafactor", learning_rate=0.3, weight_decay=1e-3, schedule="cosine"),
        _config(optimizer="adamw", learning_rate=0.02),
    ]


def test_one_update_of_a_cohort_is_bitwise_one_update_after_the_other_also_where_some_are_skipped() -> None:
    cfgs = _cohort()
    values = [[torch.randn(4 + i, 3), torch.randn(2, 5 + i)][: 1 + i % 2] for i in range(len(cfgs))]
    together, alone = ([[nn.Parameter(v.clone()) for v in of_one] for of_one in values] for _ in range(2))
    batched, single = (
        [AdapterOptimizer(of, cfg) for of, cfg in zip(side, cfgs, strict=True)] for side in (together, alone)
    )
    for step in range(8):
        moving = [i for i in range(len(cfgs)) if (step + i) % 4]  # the others were not finite in this step
        for i in moving:
            for one, other in zip(together[i], alone[i], strict=True):
                one.grad = torch.sin(one.detach() * (step + 1) * 50)
                other.grad = one.grad.clone()
        rates = update_([batched[i] for i in moving], step)
        assert rates == [single[i].update(step) for i in moving]
        for ones, others in zip(together, alone, strict=True):
            assert all(torch.equal(one, other) and one.grad is None for one, other in zip(ones, others, strict=True))
    assert [o.num_updates for o in batched] == [6, 6, 6, 6, 6]


class _Calls(TorchDispatchMode):
    """Counts calls of what computes: views and new memory are no work for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func not in (aten.detach.default, aten.view.default, aten.empty_like.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_an_update_of_many_adapters_is_as_many_calls_as_that_of_one(kind: str) -> None:
    found = []
    for num, looped in ((1, False), (32, False), (32, True)):
        cfg = _config(optimizer=kind, clip_norm=1.0)
        optimizers = [AdapterOptimizer([_prompt(), nn.Parameter(torch.ones(n + 1))], cfg) for n in range(num)]
        for step in range(2):  # the first one makes the moments
            for optimizer in optimizers:
                for value in optimizer.parameters:
                    value.grad = torch.ones_like(value)
            with _Calls() as calls:
                for group in [[o] for o in optimizers] if looped else [optimizers]:
                    snapshots(group)
                    update_(group, step)
                    are_finite([o.parameters for o in group], squared=True)
        found.append(calls.num)
    assert found[1] == found[0]
    assert found[2] == 32 * found[0]  # the control: one after the other


@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_adamw_is_bitwise_that_of_torch(epsilon: float | None) -> None:
    ours, theirs = _prompt(), _prompt()
    own = {} if epsilon is None else {"adam_epsilon": epsilon}
    optimizer = AdapterOptimizer([ours], _config(optimizer="adamw", learning_rate=0.02, weight_decay=0.1, **own))
    library = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1, **({} if epsilon is None else {"eps": epsilon}))
    for step in range(10):
        ours.grad = torch.sin(ours.detach() * (step + 1) * 50)
        theirs.grad = ours.grad.clone()
        optimizer.update(step)
        library.step()
        assert torch.equal(ours, theirs)


def test_an_epsilon_keeps_rounding_from_deciding_a_first_move() -> None:
    """Two gradients that differ by rounding, on two sides of zero."""
    ends = {}
    for epsilon in (None, 1e-6):
        for sign in (1, -1):
            prompt = nn.Parameter(torch.zeros(3))
            optimizer = AdapterOptimizer([prompt], _config(optimizer="adamw", learning_rate=0.1, adam_epsilon=epsilon))
            prompt.grad = torch.tensor([1e-3, sign * 1e-8, -1e-3])
            optimizer.update(0)
            ends[epsilon, sign] = prompt.detach()
    apart = {epsilon: float((ends[epsilon, 1] - ends[epsilon, -1]).norm()) for epsilon in (None, 1e-6)}
    assert apart[None] == pytest.approx(0.1)  # 0.05 each way: as much as the epsilon
    assert apart[1e-6] < 0.0021
    assert torch.allclose(ends[1e-6, 1][[0, 2]], torch.tensor([-0.1, 0.1]), rtol=2e-3)


def test_a_number_that_is_not_finite_is_found_in_the_adapter_that_has_it() -> None:
    good, large = torch.ones(3), torch.full((2, 2), 1e30)  # the sum of its squares overflows, it itself does not
    bad = [torch.tensor([1.0, float(word)]) for word in ("nan", "inf", "-inf")]
    assert are_finite([[good, large], [bad[0]], [good, bad[1]], [bad[2], good], [good], []]) == [
        True, False, False, False, True, True
    ]  # fmt: skip
    groups = [[good], [large], [bad[1]], [good, -large], []]
    assert are_finite(groups, squared=True) == [True, False, False, False, True]


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_gradient_whose_clip_norm_would_be_infinite_is_not_taken_for_finite(kind: str) -> None:
    """Each square is finite and their sum is not: clipped by an infinite norm the adapter would not move at all."""
    just, over = 1e17, 1.5e19
    assert are_finite([[torch.full((20, 256), just)], [torch.full((20, 256), over)]], squared=True) == [True, False]
    assert math.isfinite(torch.tensor(over).square().item())
    for size, moves in ((just, True), (over, False)):
        values = nn.Parameter(torch.ones(20, 256))
        values.grad = torch.full_like(values, size)
        AdapterOptimizer([values], _config(optimizer=kind, clip_norm=1.0)).update(0)
        assert torch.equal(values, torch.ones(20, 256)) != moves


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("num_before", [0, 3])
def test_an_update_that_is_taken_back_leaves_nothing_in_values_moments_or_count(kind: str, num_before: int) -> None:
    sides = []
    for takes_back in (True, False):
        values = _prompt()
        optimizer = AdapterOptimizer([values], _config(optimizer=kind))
        for step in range(6):
            values.grad = torch.sin(values.detach() * (step + 1) * 50)
            if takes_back and step == num_before:
                stood = optimizer.snapshot()
                optimizer.update(step)
                optimizer.go_back(stood)
                assert bool(optimizer.state()) == bool(num_before)
                values.grad = torch.sin(values.detach() * (step + 1) * 50)
            optimizer.update(step)
        sides.append((values, optimizer))
    (ours, back), (theirs, straight) = sides
    assert torch.equal(ours, theirs)
    assert back.num_updates == straight.num_updates == 6
    assert all(torch.equal(value, straight.state()[name]) for name, value in back.state().items())
