"""Promises 1 to 3: only adapters are trained, no byte of the base changes, only the adapters' bytes are reduced.

Beside them what a frozen base must not do in train mode: compute a block more often than asked, or drop anything out.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from torch import Tensor, nn

from peftscale import adapters, facts, plan
from peftscale.adapters import Cohort
from peftscale.base import load, shard
from peftscale.base.linear import FrozenLinear
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.base.passes import target_losses
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import Item, training_items
from peftscale.data.tasks import TaskData
from peftscale.train import evaluate, setup, step
from peftscale.train.optim import AdapterOptimizer

pytestmark = pytest.mark.ranks

TWO = {
    "mood": {"kind": "prompt", "length": 5, "init": "vocabulary"},
    "tone": {"kind": "prompt", "length": 3, "init": "random"},
}
ADAPTER_BYTES = (5 + 3) * 64 * 4
BASES = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2}


class Setup:
    """All that a training step needs, as `train.worker` makes it."""

    def __init__(self, cfg: RunConfig, sharding: Any) -> None:
        self.base: Base = load.load(cfg.base, sharding=sharding, device=torch.device("cpu"))
        setup.choose_packing(cfg, self.base)
        assert self.base.is_packed == (cfg.train.packing == "auto")
        self.cohort: Cohort = adapters.build(cfg, self.base)
        self.task: TaskData = tasks.load(cfg.task, self.base.tokenizer, max_tokens=100)
        self.optimizers = {name: AdapterOptimizer(a.parameters(), cfg.train) for name, a in self.cohort.items()}
        self.num_forwards = 0
        self.base.model.register_forward_hook(self._count)
        self._num_steps = 0

    def _count(self, *_: Any) -> None:
        self.num_forwards += 1

    def items(self) -> list[Item]:
        return [i for name, a in self.cohort.items() for i in training_items(name, a.length, self.task.train)]

    def step(self, microbatch_tokens: int = 4096) -> step.StepResult:
        self._num_steps += 1
        return step.run(
            self.base,
            self.cohort,
            self.optimizers,
            self.items(),
            step=self._num_steps - 1,
            microbatch_tokens=microbatch_tokens,
        )

    def evaluate(self) -> None:
        examples = self.task.validation
        evaluate.run(self.base, self.cohort, self.task, examples, metrics=("accuracy",), microbatch_tokens=4096)


def _unexpected(base: Base, cohort: Cohort, optimizers: Mapping[str, AdapterOptimizer]) -> list[str]:
    """What is trained and should not be, or should be trained and is not."""
    wrong = [f"base: {name} requires grad" for name, p in base.model.named_parameters() if p.requires_grad]
    wrong += [f"base: {name} requires grad" for name, b in base.model.named_buffers() if b.requires_grad]
    wrong += [f"base: {name} has a gradient" for name, p in base.model.named_parameters() if p.grad is not None]
    for name, adapter in cohort.items():
        held = sorted((p.data_ptr(), p.numel()) for p in optimizers[name].parameters)
        own = sorted((p.data_ptr(), p.numel()) for p in adapter.parameters())
        wrong += [f"{name}: {key} is not trained" for key, p in adapter.named_parameters() if not p.requires_grad]
        wrong += [f"{name}: holds more than its rows"] if list(dict(adapter.named_parameters())) != ["rows_PH"] else []
        wrong += [f"{name}: the optimizer holds other tensors"] if held != own else []
    return wrong


def _step_evaluation_step(cfg: RunConfig, sharding: str) -> dict[str, Any]:
    """Promises 1 and 2 on one rank: what was found before, between and after."""
    setup = Setup(cfg, sharding)
    digests, rows, wrong = [], [], []

    def look() -> None:
        digests.append(shard.live_digest(setup.base.model))
        rows.append({name: adapter.rows_PH.detach().clone() for name, adapter in setup.cohort.items()})
        wrong.append(_unexpected(setup.base, setup.cohort, setup.optimizers))

    look()
    setup.step()
    look()
    setup.evaluate()
    look()
    setup.step()
    look()
    return {"digests": digests, "rows": rows, "unexpected": wrong, "with a byte changed": _changed(setup.base)}


def _changed(base: Base) -> list[str]:
    """The digest with one byte changed in a slice of each kind of parameter and in a buffer, and again without."""
    tensors = [
        shard.held(parameter)
        for name, parameter in base.model.named_parameters()
        if name.endswith(("layers.1.mlp.up_proj.blob", "embed_tokens.weight", "norm.weight"))
    ]
    assert len(tensors) >= 3
    digests = []
    for tensor in (*tensors, next(base.model.buffers())):
        byte = tensor.data.flatten().view(torch.uint8)[:1]
        byte ^= 1
        digests.append(shard.live_digest(base.model))
        byte ^= 1
    return [*digests, shard.live_digest(base.model)]


def _assert_only_adapters_moved(seen: dict[str, Any]) -> None:
    assert seen["unexpected"] == [[], [], [], []]
    assert len(set(seen["digests"])) == 1
    before, first, evaluated, second = seen["rows"]
    for name in TWO:
        assert not torch.equal(before[name], first[name])
        assert torch.equal(first[name], evaluated[name])
        assert not torch.equal(evaluated[name], second[name])
    *changed, restored = seen["with a byte changed"]
    assert restored == seen["digests"][0]
    assert len({*changed, restored}) == len(changed) + 1  # negative control: every single byte is seen


def test_after_step_evaluation_step_every_adapter_moved_twice_and_no_byte_of_the_base_did(tmp_path: Path) -> None:
    """Promises 1 and 2, on two ranks that share an NF4 base."""
    cfg = tiny.run_config(tmp_path, adapters=TWO)
    first, second = run_ranks(_step_evaluation_step, 2, tmp_path / "ranks", cfg, "world")
    _assert_only_adapters_moved(first)
    _assert_only_adapters_moved(second)
    for mine, theirs in zip(first["rows"], second["rows"], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in TWO)  # bitwise, without ever being sent
    assert first["digests"][0] != second["digests"][0]  # two different slices


def test_a_replicated_base_does_not_change_either(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, adapters=TWO, **{"train.packing": "off"})
    _assert_only_adapters_moved(_step_evaluation_step(cfg, "replicated"))


def test_an_unfrozen_norm_or_a_foreign_tensor_in_an_optimizer_would_be_seen(tmp_path: Path) -> None:
    """Negative control of promise 1."""
    cfg = tiny.run_config(tmp_path, adapters=TWO)
    setup = Setup(cfg, "replicated")
    norm = setup.base.model.get_submodule("model.layers.1.input_layernorm")
    norm.weight.requires_grad_(True)
    assert _unexpected(setup.base, setup.cohort, setup.optimizers) == [
        "base: model.layers.1.input_layernorm.weight requires grad"
    ]
    setup.step()
    assert "base: model.layers.1.input_layernorm.weight has a gradient" in _unexpected(
        setup.base, setup.cohort, setup.optimizers
    )
    norm.weight.requires_grad_(False).grad = None
    rows_PH = setup.cohort["tone"].rows_PH
    setup.optimizers["tone"] = AdapterOptimizer([rows_PH, norm.weight], cfg.train)
    assert _unexpected(setup.base, setup.cohort, setup.optimizers) == ["tone: the optimizer holds other tensors"]


def _traffic(cfgs: list[RunConfig]) -> list[list[dict[str, int]]]:
    """Bytes of three steps of one pass and one of several, for every run file."""
    found = []
    for cfg in cfgs:
        setup, of_steps = Setup(cfg, "world"), []
        for microbatch_tokens in (4096, 4096, 4096, 64):
            before = setup.num_forwards
            result = setup.step(microbatch_tokens)
            of_steps.append({**vars(result.traffic), "passes": setup.num_forwards - before})
        found.append(of_steps)
    return found


def test_reduced_bytes_are_the_adapters_and_gathered_bytes_the_plan_s_to_the_byte(tmp_path: Path) -> None:
    """Promise 3. Three ranks, so that nearly every slice needs padding."""
    cfgs = [
        tiny.run_config(
            tmp_path,
            base=tmp_path / name if (tmp_path / name).exists() else tiny.save_base(tmp_path / name, config),
            adapters=TWO,
            **{"base.quantization": quantization, "train.packing": packing},
        )
        for name, config in BASES.items()
        for quantization, packing in (("nf4", "auto"), ("int8", "off"), ("none", "auto"))
    ]
    for of_rank in run_ranks(_traffic, 3, tmp_path / "ranks", cfgs):
        for cfg, of_steps in zip(cfgs, of_rank, strict=True):
            base_facts = facts.load(cfg.base.model)
            for index, seen in enumerate(of_steps):
                work = replace(plan.expected(cfg, base_facts, world=3), passes_per_step=seen["passes"])
                planned = plan.make(cfg, base_facts, plan.detect(cuda=False), world=3, work=work)
                assert seen["reduced"] == planned.reduced_bytes_per_step == ADAPTER_BYTES, cfg.base
                assert seen["gathered"] == planned.gathered_bytes_per_step, (cfg.base, index)
                assert 0 < seen["control"] <= 64 * len(TWO), cfg.base
                assert seen["checks"] == 0 or index < 2, cfg.base  # DeepSpeed compares its traces at the beginning
            assert [seen["passes"] for seen in of_steps[:3]] == [1, 1, 1] and of_steps[3]["passes"] > 1


def _traffic_with_an_unfrozen_norm(cfg: RunConfig) -> int:
    setup = Setup(cfg, "replicated")
    norm = setup.base.model.get_submodule("model.norm")
    norm.weight.requires_grad_(True)
    setup.cohort["mood"].norm = norm.weight  # its gradient joins the reduction
    return setup.step().traffic.reduced


def test_the_gradient_of_an_unfrozen_norm_would_show_as_more_bytes(tmp_path: Path) -> None:
    """Negative control of promise 3."""
    cfg = tiny.run_config(tmp_path, adapters=TWO)
    assert run_ranks(_traffic_with_an_unfrozen_norm, 2, tmp_path / "ranks", cfg) == [ADAPTER_BYTES + 64 * 4] * 2


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("is_checkpointed", "expected"), [(True, 2), (False, 1)], ids=["checkpointed", "kept"])
def test_a_block_computes_forward_twice_with_checkpointing_and_once_without(
    tmp_path: Path, name: str, is_checkpointed: bool, expected: int
) -> None:
    base = tiny.save_base(tmp_path / "base", BASES[name])
    setup = Setup(
        tiny.run_config(tmp_path, base=base, **{"base.checkpoint_activations": is_checkpointed}), "replicated"
    )
    blocks = next(module for module in setup.base.model.modules() if isinstance(module, nn.ModuleList))
    counts = [0] * len(blocks)

    def count(index: int) -> None:
        counts[index] += 1

    for index, block in enumerate(blocks):
        # In the block, because transformers recomputes forward() without the block's own hooks; and at its beginning,
        # because recomputation ends as soon as it has what backward needs.
        first = next(module for module in block.modules() if isinstance(module, FrozenLinear))
        first.register_forward_pre_hook(lambda *_, index=index: count(index))
    setup.step(microbatch_tokens=64)
    assert setup.num_forwards > 2  # passes
    assert counts == [expected * setup.num_forwards] * len(blocks)
    counts, before = [0] * len(blocks), setup.num_forwards
    setup.evaluate()
    assert counts == [setup.num_forwards - before] * len(blocks)


_SMALL = {key: value for key, value in tiny.LLAMA.items() if key not in ("model_type", "num_key_value_heads")}
DROPOUTS = {
    "gpt2": {**tiny.GPT2, "attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3},
    "llama": {**tiny.LLAMA, "attention_dropout": 0.3},
    "opt": {
        "model_type": "opt",
        **_SMALL,
        "ffn_dim": 112,
        "word_embed_proj_dim": 64,
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "layerdrop": 0.3,
    },
    "phi3": {
        **tiny.LLAMA,
        "model_type": "phi3",
        "attention_dropout": 0.3,
        "embd_pdrop": 0.3,
        "resid_pdrop": 0.3,
    },
    "starcoder2": {
        **tiny.LLAMA,
        "model_type": "starcoder2",
        "attention_dropout": 0.3,
        "residual_dropout": 0.3,
        "embedding_dropout": 0.3,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_SMALL, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "bloom": {"model_type": "bloom", **_SMALL, "n_layer": 3, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "falcon": {"model_type": "falcon", **_SMALL, "attention_dropout": 0.3, "hidden_dropout": 0.3},
}


def _two_passes(base: Base) -> tuple[Tensor, Tensor]:
    base.train()
    assert base.model.training
    rows = [Row(None, list(range(3, 40)), 20)]
    with torch.no_grad():
        return target_losses(base, rows), target_losses(base, rows)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_of_the_model_s_config_does_not_act_in_train_mode(tmp_path: Path, name: str) -> None:
    directory = tiny.save_base(tmp_path / "base", DROPOUTS[name])
    cfg = tiny.run_config(tmp_path, base=directory)
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    first, second = _two_passes(base)
    assert torch.equal(first, second)


def test_a_dropout_that_was_left_would_be_seen(tmp_path: Path) -> None:
    """Negative control: one of the base's dropouts acts."""
    cfg = tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", tiny.GPT2))
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    dropout = next(module for module in base.model.modules() if isinstance(module, nn.Dropout))
    dropout.p = 0.1
    first, second = _two_passes(base)
    assert not torch.equal(first, second)
