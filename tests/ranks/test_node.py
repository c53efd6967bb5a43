"""Sharding inside a node: 4 ranks as 2 x 2, and between the two nodes no byte of the base, counted and tried.

What is promised of a base that is sharded over all ranks is promised here too: the gradient of one process, slices
that do not change, and no gathered weight alive. The same run over all ranks is the control.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from test_live_gathers import DEEP, watch_a_run
from torch import Tensor

from peftscale import adapters, facts, plan
from peftscale.base import load, shard
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.base.passes import target_logits
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.errors import ConfigError
from peftscale.plan import Hardware
from peftscale.records import EvaluationRecord, Record, RunSummary, StepRecord
from peftscale.train import comm, memory, setup, step, worker
from peftscale.train.comm import Call, Traffic

pytestmark = pytest.mark.ranks

WORLD, NODE = 4, 2
STEPS = 50
TWO = {
    "mood": {"kind": "prompt", "length": 5, "init": "vocabulary"},
    "tone": {"kind": "prompt", "length": 3, "init": "random"},
}
ADAPTER_BYTES = (5 + 3) * 64 * 4
CPU = torch.device("cpu")


@dataclass
class Seen:
    """What one rank saw."""

    summary: RunSummary
    rows: list[Record]
    between: dict[str, int]
    """Bytes of other nodes by kind of collective, from before the base was loaded until the run had ended."""
    checks_by: set[str]
    """The operations of DeepSpeed's checks."""
    digests: list[str]
    """Of the live slices, before and after the run."""
    alive: dict[str, Any]
    """Gathered bytes that were alive, with a deeper base."""
    gradient: Tensor
    moved: tuple[bool, bool]
    """Whether logits moved when the embedding of the first node changed, and when that of the second did."""
    over_all_ranks: Traffic
    """Of one step with the base sharded over the world."""
    moved_over_all_ranks: tuple[bool, bool]


def _see(cfg: RunConfig, over_all: RunConfig, deep: RunConfig, two_units: int) -> Seen:
    between, checks_by = dict.fromkeys(("reduced", "gathered", "control", "checks"), 0), set[str]()
    rows: list[Record] = []

    def watch(call: Call) -> None:
        between[call.kind] += call.between_bytes
        checks_by.update({call.op} if call.kind == "checks" else ())

    with comm.watched(watch), memory.measured(CPU) as peak:
        job = worker.open_job(cfg, CPU, peak, lambda _: None, rows.append)
        digests = [shard.live_digest(job.base.model)]
        ended = worker.train(job)
        digests.append(shard.live_digest(job.base.model))
    gradient, _ = _gradient(cfg, job.base)
    moved = _moved_by_each_node(job.base)
    wide = setup.load_base(over_all.base, setup.place(over_all.base, CPU), CPU)
    _, traffic = _gradient(over_all, wide)
    return Seen(
        summary=ended,
        rows=rows,
        between=between,
        checks_by=checks_by,
        digests=digests,
        alive=watch_a_run(deep, two_units, num_steps=3),
        gradient=gradient,
        moved=moved,
        over_all_ranks=traffic,
        moved_over_all_ranks=_moved_by_each_node(wide),
    )


def _gradient(cfg: RunConfig, base: Base) -> tuple[Tensor, Traffic]:
    """Of all seven examples, from the adapters' start."""
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    items = [item for name, a in cohort.items() for item in training_items(name, a.length, task.train)]
    before = comm.traffic()
    step.gradient(base, cohort, items, microbatch_tokens=4096)
    grads = [parameter.grad.flatten() for parameter in cohort.parameters() if parameter.grad is not None]
    return torch.cat(grads), comm.traffic().since(before)


def _moved_by_each_node(base: Base) -> tuple[bool, bool]:
    """Change what one node holds of the embedding, then the other: whether this rank's logits were others."""

    def logits() -> Tensor:
        with base.evaluating():
            return target_logits(base, [Row(None, (5, 6, 4000, 4001), 1)])  # rows of both

    stood, piece = logits(), shard.held(base.model.get_input_embeddings().weight)
    found = []
    for node in range(WORLD // NODE):
        factor = 2 if comm.rank() // NODE == node else 1
        piece.mul_(factor)
        found.append(not torch.equal(logits(), stood))
        piece.div_(factor)  # exact
    assert torch.equal(logits(), stood)
    return found[0], found[1]


@pytest.fixture(scope="module")
def cfgs(tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A run over nodes, the same over all ranks, and one over nodes with a base of which two units are a small part."""
    tmp = tmp_path_factory.mktemp("node")
    settings = {
        "train.steps": STEPS,
        "train.evaluate_every": 25,
        "train.checkpoint_every": STEPS,
        "train.microbatch_tokens": 1024,
    }
    cfgs = [tiny.run_config(tmp, adapters=TWO, **settings, **{"base.sharding": mode}) for mode in ("node", "world")]
    deep = tiny.save_base(tmp / "deep", DEEP)
    return [*cfgs, tiny.run_config(tmp, base=deep, **{"base.sharding": "node"})]


@pytest.fixture(scope="module")
def seen(cfgs: list[RunConfig], tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    cfgs[0].run_dir.mkdir(parents=True)
    two_units = _planned(cfgs[2]).gathered_units_bytes
    return run_ranks(_see, WORLD, tmp_path_factory.mktemp("ranks"), *cfgs, two_units, node_ranks=NODE)


def _planned(cfg: RunConfig) -> plan.Plan:
    return plan.make(cfg, facts.load(cfg.base.model), Hardware.parse("2xcpu-24GB"), world=WORLD)


def _steps(seen: Seen) -> list[StepRecord]:
    return [row for row in seen.rows if isinstance(row, StepRecord)]


def test_between_nodes_go_the_adapters_bytes_and_control_and_no_byte_of_the_base(seen: list[Seen]) -> None:
    """50 steps with an evaluation in the middle, and all that was sent from before the base was loaded."""
    for of_rank in seen:
        steps = _steps(of_rank)
        evaluated = [row.step for row in of_rank.rows if isinstance(row, EvaluationRecord)]
        assert len(steps) == STEPS and 25 in evaluated
        assert of_rank.between["gathered"] == 0
        assert of_rank.between["control"] < 20_000  # 13,326; what travels as a Python object is counted here
        assert of_rank.between["reduced"] == STEPS * ADAPTER_BYTES
        assert {row.reduced_bytes for row in steps} == {ADAPTER_BYTES}
        assert {row.gathered_between_nodes_bytes for row in steps} == {0}
        assert all(0 < row.control_bytes <= 64 * len(TWO) for row in steps)


def test_deepspeed_s_trace_checks_are_broadcasts_over_all_ranks_and_after_a_change_of_passes_alone(
    seen: list[Seen],
) -> None:
    for of_rank in seen:
        checked = {row.step: row.checks_bytes for row in _steps(of_rank) if row.checks_bytes}
        assert set(checked) <= {1, 2, 3, 26, 27, 28}, checked
        assert of_rank.checks_by == {"broadcast"}
        assert 0 < of_rank.between["checks"] < 20_000


def test_what_is_gathered_within_a_node_is_what_was_planned(
    seen: list[Seen], cfgs: tuple[RunConfig, RunConfig]
) -> None:
    made = _planned(cfgs[0])
    assert (made.sharding, made.node_ranks) == ("node", NODE)
    for of_rank in seen:
        summary = of_rank.summary
        assert summary.sharding == "node"
        assert summary.gathered_bytes_per_step == summary.predicted.gathered_bytes_per_step > 0
        assert summary.gathered_between_nodes_bytes_per_step == 0
        assert summary.predicted.gathered_between_nodes_bytes_per_step == 0
        assert summary.gathered_bytes_per_step % made.gathered_bytes_per_step == 0  # planned for one pass a step


def test_over_all_ranks_half_of_the_weights_come_from_the_other_node_and_would_be_seen(
    seen: list[Seen], cfgs: tuple[RunConfig, RunConfig]
) -> None:
    """Negative control."""
    made = _planned(cfgs[1])
    for of_rank in seen:
        assert of_rank.over_all_ranks.gathered == made.gathered_bytes_per_step
        assert of_rank.over_all_ranks.gathered_between == made.gathered_between_nodes_bytes_per_step
        assert made.gathered_between_nodes_bytes_per_step * 2 == made.gathered_bytes_per_step


def test_a_change_of_what_one_node_holds_reaches_no_other_node(seen: list[Seen]) -> None:
    """Not by counting: what is gathered from the other node would change with it, as it does over all ranks."""
    assert [of_rank.moved for of_rank in seen] == [(True, False), (True, False), (False, True), (False, True)]
    assert [of_rank.moved_over_all_ranks for of_rank in seen] == [(True, True)] * WORLD


def test_every_node_holds_the_whole_base_and_no_byte_of_it_changes(seen: list[Seen]) -> None:
    """Promise 2, and that slices follow the place inside the node."""
    assert all(of_rank.digests[0] == of_rank.digests[1] for of_rank in seen)
    first, second, third, fourth = (of_rank.digests[0] for of_rank in seen)
    assert (first, second) == (third, fourth) and first != second


def test_the_gradient_is_that_of_one_process(seen: list[Seen], cfgs: list[RunConfig]) -> None:
    """Promise 4."""
    base = load.load(cfgs[0].base, sharding="replicated", device=CPU)
    setup.choose_packing(cfgs[0], base)
    want, _ = _gradient(cfgs[0], base)
    errors = [float((of_rank.gradient - want).norm() / want.norm()) for of_rank in seen]
    assert all(error < 2e-6 for error in errors), errors


def test_no_gathered_weight_outlives_its_pass_and_two_units_are_the_most(
    seen: list[Seen], cfgs: tuple[RunConfig, RunConfig]
) -> None:
    """Promise 6."""
    made = _planned(cfgs[2])
    assert made.gathered_units_bytes < made.packed_bytes / 2
    for of_rank in seen:
        assert set(of_rank.alive["after_forward"]) == set(of_rank.alive["after_backward"]) == {0}
        assert of_rank.alive["after_evaluation"] == 0
        assert 0 < of_rank.alive["peak"] <= made.gathered_units_bytes


def _place_uneven(of_node: RunConfig, auto: RunConfig) -> tuple[str, str]:
    with pytest.raises(ConfigError) as refused:
        setup.place(of_node.base, CPU)
    return str(refused.value), setup.place(auto.base, CPU).sharding


def test_nodes_that_are_not_alike_are_refused_on_every_rank_and_auto_does_without(tmp_path: Path) -> None:
    """Three ranks, of which the last is alone on its node."""
    cfgs = [tiny.run_config(tmp_path, **{"base.sharding": mode}) for mode in ("node", "auto")]
    for message, taken in run_ranks(_place_uneven, 3, tmp_path / "ranks", *cfgs, node_ranks=2):
        assert message.startswith("base.sharding=node needs as many ranks on every node, numbered node by node")
        assert "Nodes of ranks 0, 1, ... here: 0-1, 0-1, 2-3. Start them so, or take base.sharding=world." in message
        assert taken == "replicated"
