"""Promise 6: between passes no gathered weight is alive on any rank, and never more than the two largest units are."""

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from peftscale import adapters, facts, plan
from peftscale.base import shard
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.train import comm, evaluate, setup, step
from peftscale.train.comm import Call
from peftscale.train.optim import AdapterOptimizer

pytestmark = pytest.mark.ranks

# Blocks that are not dwarfed by the embedding: two units are a small part of the whole then.
DEEP = {**tiny.LLAMA, "num_hidden_layers": 6, "intermediate_size": 4096, "tie_word_embeddings": True}


class Alive(TorchDispatchMode):
    """Counts live storages of gathered weights, at every operation of the rank.

    A storage counts from the moment that a gather is called with it as output until nothing refers to it any more,
    whatever DeepSpeed's own status of the parameter says. So do the copies that DeepSpeed cuts out of a buffer that
    was gathered for several parameters in one call.
    """

    def __init__(self, most: int) -> None:
        """`most`: bytes that may be alive at any moment."""
        super().__init__()
        self._alive: dict[StorageWeakRef, int] = {}
        self._most = most
        self._patience_s = 1.0
        self.num_gathers = 0
        self.peak = 0

    def on_call(self, call: Call) -> None:
        if call.kind == "gathered":
            self.num_gathers += 1
            self._add(call.tensor)

    def num_bytes(self, *, expected: int) -> int:
        """Bytes alive now. gloo's thread lets go of a buffer a moment after the wait for it has ended, so what is more
        than `expected` must still be there after a second to count, the first time."""
        end = time.monotonic() + self._patience_s
        while (found := self._count()) > expected:
            if time.monotonic() > end:
                self._patience_s = 0
                break
            time.sleep(0.001)
        return found

    def _count(self) -> int:
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        return sum(self._alive.values())

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive[StorageWeakRef(storage)] = storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default and any(
            StorageWeakRef(piece.untyped_storage()) in self._alive for piece in args[0]
        ):
            self._add(out)
        self.peak = max(self.peak, self.num_bytes(expected=max(self.peak, self._most)))
        return out


def _watch_runs(cfgs: list[RunConfig], most: list[int]) -> list[dict[str, Any]]:
    return [watch_a_run(cfg, num_bytes, num_steps=10) for cfg, num_bytes in zip(cfgs, most, strict=True)]


def _watch_with_deepspeeds_defaults(cfg: RunConfig, most: int) -> dict[str, Any]:
    """Let DeepSpeed prefetch, reuse and keep what it would by default, in this rank's own process."""
    ours = shard._config

    def defaults(**kwargs: Any) -> dict[str, Any]:
        settings = ours(**kwargs)
        for key in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance", "stage3_max_live_parameters"):
            del settings["zero_optimization"][key]
        return settings

    shard._config = defaults
    return watch_a_run(cfg, most, num_steps=3)


def watch_a_run(cfg: RunConfig, most: int, *, num_steps: int) -> dict[str, Any]:
    """Steps of one pass, an evaluation, one more step of several; what was alive after each half of each pass."""
    device = torch.device("cpu")
    base = setup.load_base(cfg.base, setup.place(cfg.base, device), device)
    setup.choose_packing(cfg, base)
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    optimizers = {name: AdapterOptimizer(adapter.parameters(), cfg.train) for name, adapter in cohort.items()}
    items = training_items("mood", cohort["mood"].length, task.train)
    alive = Alive(most)
    after_forward: list[int] = []
    after_backward: list[int] = []

    def left() -> int:
        return max(alive.num_bytes(expected=0), shard.gathered_bytes(base.model))

    def take_a_step(number: int, microbatch_tokens: int) -> None:
        step.run(base, cohort, optimizers, items, step=number, microbatch_tokens=microbatch_tokens)
        after_backward.append(left())

    # After DeepSpeed's own hooks, which were there first, and with the graph for backward alive.
    base.model.register_forward_hook(lambda *_: after_forward.append(left()))
    with comm.watched(alive.on_call), alive:
        for number in range(num_steps):
            take_a_step(number, 4096)
        evaluate.run(base, cohort, task, task.validation, metrics=("accuracy",), microbatch_tokens=4096)
        after_evaluation = left()
        take_a_step(num_steps, 64)
    return {
        "after_forward": after_forward,
        "after_backward": after_backward,
        "after_evaluation": after_evaluation,
        "peak": alive.peak,
        "num_gathers": alive.num_gathers,
    }


def _planned(cfg: RunConfig) -> int:
    """Bytes of the two largest units."""
    planned = plan.make(cfg, facts.load(cfg.base.model), plan.detect(cuda=False), world=2)
    assert planned.gathered_units_bytes < planned.packed_bytes / 2  # else the bound would say little
    return planned.gathered_units_bytes


def test_no_gathered_weight_outlives_its_pass_and_two_units_are_the_most(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", DEEP)
    cfgs = [
        tiny.run_config(
            tmp_path,
            base=base,
            **{
                "base.quantization": quantization,
                "base.checkpoint_activations": is_checkpointed,
                "train.packing": packing,
            },
        )
        for quantization, is_checkpointed, packing in (
            ("nf4", False, "auto"),
            ("nf4", True, "auto"),
            ("none", False, "off"),
        )
    ]
    most = [_planned(cfg) for cfg in cfgs]
    for of_rank in run_ranks(_watch_runs, 2, tmp_path / "ranks", cfgs, most):
        for cfg, two_units, seen in zip(cfgs, most, of_rank, strict=True):
            assert len(seen["after_forward"]) > 12 and seen["num_gathers"] > 16 * 11, cfg.base
            assert set(seen["after_forward"]) == {0}, cfg.base
            assert set(seen["after_backward"]) == {0}, cfg.base
            assert seen["after_evaluation"] == 0, cfg.base
            assert 0 < seen["peak"] <= two_units, cfg.base


def test_deepspeeds_default_settings_keep_weights_alive_and_would_be_seen(tmp_path: Path) -> None:
    """Negative control: from the second pass on they gather ahead, and keep what they will use again."""
    cfg = tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", DEEP), **{"train.packing": "off"})
    two_units = _planned(cfg)
    for seen in run_ranks(_watch_with_deepspeeds_defaults, 2, tmp_path / "ranks", cfg, two_units):
        assert max(seen["after_forward"]) > 2 * two_units  # measured 3,524,360 of 1,461,164: the whole base
        assert max(seen["after_backward"]) > 0
        assert seen["peak"] > 4 * two_units  # 7,048,720: the buffer of the one gather, and the weights cut out of it
