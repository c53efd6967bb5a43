"""Modes, seconds and prices of a plan by hand; why `auto` takes a mode; what would make a run fit."""

import re
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import small_plans

from peftscale import configio, facts, plan
from peftscale.config import PrefixConfig
from peftscale.plan import Hardware, Plan

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "configs" / "plan"
PREFIX = PrefixConfig(kind="prefix", length=100, init="random")
FOUR = replace(Hardware.parse("4xH100-80GB"), devices_per_node=2)

# Over 2 or 4 ranks: a blob of 107 bytes is 108, a norm of 8 elements and the table of 400 stay. See test_plan.py.
BLOCK, TABLE, NORM = 108 * 2 + 8 * 2, 400 * 2, 8 * 2
PASS_BYTES = 3 * TABLE + 2 * 2 * BLOCK + 2 * NORM


@pytest.mark.parametrize(
    ("mode", "holders", "within", "between"),
    [
        ("replicated", 1, 0, 0),
        ("node", 2, PASS_BYTES, 0),
        ("world", 4, PASS_BYTES // 2, PASS_BYTES // 2),  # two of four slices lie on the other node
    ],
)
def test_only_a_base_over_the_world_sends_weights_between_nodes(
    mode: str, holders: int, within: int, between: int
) -> None:
    cfg = small_plans.cfg(adapters={"a": 5}, base={"sharding": mode})
    made = plan.make(cfg, small_plans.base(), FOUR)
    assert (made.sharding, made.world_size, made.node_ranks) == (mode, 4, 2)
    assert made.gathered_within_node_bytes_per_step == within
    assert made.gathered_between_nodes_bytes_per_step == between
    assert made.gathered_bytes_per_step == within + between
    assert made.reduced_bytes_per_step == 5 * 8 * 4  # over all ranks in every mode
    if holders > 1:
        assert made.slice_bytes == (TABLE + 2 * BLOCK + NORM) // holders


def _made(model: str, hardware: str, *changes: str) -> Plan:
    cfg = configio.load(PLANS / f"{model}.yaml", list(changes))
    return plan.make(cfg, facts.load(cfg.base.model), Hardware.parse(hardware))


@pytest.mark.parametrize(
    ("model", "hardware", "mode", "reason"),
    [
        ("llama-3.1-70b", "16xH100-80GB", "replicated", "takes 49% of a device, at most 55%: no gathers"),
        ("llama-3.1-405b", "8xH200-141GB", "world", "takes 153% of a device, more than 55%"),
        ("llama-3.1-405b", "64xH100-80GB", "node", "the 8 ranks of a node hold it together: no weight crosses the net"),
        ("llama-3.1-405b", "12xH100-80GB", "world", "12 ranks do not fill nodes of 8 evenly"),
        ("llama-3.1-405b", "64xA100-40GB", "world", "over the 8 ranks of a node, each would need 42.1 GB and may fill"),
        ("llama-3.1-405b", "H100-80GB", "replicated", "one rank holds everything"),
    ],
)
def test_auto_takes_the_mode_that_sends_least_among_those_that_fit(
    model: str, hardware: str, mode: str, reason: str
) -> None:
    made = _made(model, hardware)
    assert made.sharding == mode
    assert reason in made.reason


def test_auto_shards_a_small_base_when_the_rest_leaves_no_room_for_all_of_it() -> None:
    made = _made("llama-3.1-70b", "8xH100-80GB", "train.microbatch_tokens=32768", "train.examples_per_step=1100")
    assert made.sharding == "world" and made.fits
    assert "at most" not in made.reason and "but beside the rest all of it is too much: a rank would" in made.reason


def test_gathers_hide_from_as_many_tokens_as_the_formula_says() -> None:
    made = _made("llama-3.1-405b", "8xH200-141GB")
    bytes_a_weight = (made.packed_bytes - 2 * 128256 * 16384 * 2) / (made.num_parameters - 2 * 128256 * 16384)
    by_hand = bytes_a_weight * 2 * (0.4 * 989e12) / (6 * 0.8 * 450e9)  # two gathers; forward twice, backward once
    assert by_hand == pytest.approx(189, abs=1)
    assert made.hidden_above_tokens == pytest.approx(by_hand, rel=0.05)  # embedding and head: 195
    assert made.arithmetic_step_s is not None and made.gather_step_s is not None
    assert made.gather_step_s == pytest.approx(made.gathered_bytes_per_step / (0.8 * 450e9))
    assert made.step_s == pytest.approx(max(made.arithmetic_step_s, made.gather_step_s), rel=1e-3)


def test_the_network_sets_the_pace_where_weights_cross_it() -> None:
    over_all = _made("llama-3.1-405b", "64xH100-80GB", "base.sharding=world")
    slow = replace(Hardware.parse("64xH100-80GB"), network_gbytes_per_s=12.5)
    cfg = configio.load(PLANS / "llama-3.1-405b.yaml", ["base.sharding=world"])
    slower = plan.make(cfg, facts.load(cfg.base.model), slow)
    assert slower.gather_step_s == pytest.approx(slower.gathered_between_nodes_bytes_per_step / 0.8 / 12.5e9)
    assert (slower.step_s or 0) > 5 * (over_all.step_s or 0)
    assert (slower.hidden_above_tokens or 0) > slower.tokens_per_pass
    assert any(note.startswith("below about") for note in slower.notes)


def test_seconds_hours_and_price_by_hand() -> None:
    cfg = small_plans.cfg(adapters={"a": 5}, task={"max_text_tokens": 22}, train={"packing": "off"})
    hardware = Hardware.parse("2xH100-80GB")
    made = plan.make(cfg, small_plans.base(), hardware, price_per_gpu_hour=3.0)
    # 6 rows a rank of 5 + 22 + 3 tokens, 3 in a pass of 100; forward and input gradient through 2 x 384 weights; head.
    assert (made.passes_per_step, made.tokens_per_pass, made.tokens_per_step) == (2, 100, 180)
    flops = 180 * 4 * 768 + 4 * (6 * 3) * 400
    gathered, reduced = 2 * PASS_BYTES, 5 * 8 * 4
    assert made.gathered_bytes_per_step == gathered
    step_s = max(flops / (0.4 * 989e12), gathered / (0.8 * 450e9)) + 2 * reduced / (0.8 * 450e9)
    assert made.step_s == pytest.approx(step_s)
    assert made.hours == pytest.approx(5 * step_s / 3600)
    assert made.price == pytest.approx(5 * step_s / 3600 * 2 * 3.0)
    assert plan.make(cfg, small_plans.base(), hardware).price is None


def test_a_machine_without_known_rates_has_bytes_and_no_seconds() -> None:
    made = plan.make(small_plans.cfg(adapters={"a": 5}), small_plans.base(), Hardware.parse("cpu-24GB"))
    assert made.gathered_bytes_per_step > 0
    assert (made.step_s, made.hours, made.price, made.hidden_above_tokens) == (None, None, None, None)
    assert "the rates of cpu-24GB are not known" in made.assumes


def _ways(problem: str) -> list[list[str]]:
    if "Enough would be: " in problem:
        return [[way] for way in problem.partition("Enough would be: ")[2].rstrip(".").split("; or ")]
    return [problem.partition("together these are: ")[2].rstrip(".").split(", ")]


@pytest.mark.parametrize(
    ("model", "hardware", "changes", "is_one_enough"),
    [
        ("llama-3.1-70b", "8xH100-80GB", ["base.quantization=none", "base.sharding=replicated"], True),
        ("llama-3.1-405b", "8xH100-80GB", ["train.examples_per_step=512"], True),
        ("llama-3.1-70b", "cpu-64GB", ["base.quantization=none", "cluster.workers=2"], False),
        ("llama-3.1-8b", "A100-40GB", ["base.quantization=none", "base.checkpoint_activations=false"], True),
        ("llama-3.1-70b", "cpu-160GB", ["cluster.workers=8", "base.sharding=replicated"], True),
    ],
)
def test_what_would_make_a_run_fit_does(model: str, hardware: str, changes: list[str], is_one_enough: bool) -> None:
    cfg = configio.load(PLANS / f"{model}.yaml", changes)
    made = plan.make(cfg, facts.load(cfg.base.model), Hardware.parse(hardware))
    assert not made.fits
    (problem,) = made.problems
    assert ("Enough would be" in problem) == is_one_enough
    ways = _ways(problem)
    for way in ways:
        machine, overrides = hardware, list(changes)
        for change in way:
            if found := re.fullmatch(r"--hardware (\S+) with (base.sharding=world)", change):
                machine, change = found[1], found[2]
            overrides.append(change.partition(" (")[0])
        assert _made(model, machine, *overrides).fits, way


def test_where_adapters_are_too_many_for_a_device_that_is_what_it_says() -> None:
    cfg = configio.load(PLANS / "llama-2-13b.yaml")
    base, h100 = facts.load(cfg.base.model), Hardware.parse("H100-80GB")
    made = [
        plan.make(cfg.model_copy(update={"adapters": {f"p{n}": PREFIX for n in range(number)}}), base, h100)
        for number in (60, 40)
    ]
    (problem,) = made[0].problems
    assert "(update 39.3 GB" in problem
    assert problem.endswith("fewer or shorter adapters in one run, as every rank holds and updates all of them.")
    assert made[1].fits


def test_nothing_is_promised_where_nothing_is_enough() -> None:
    tiny_device = replace(Hardware.parse("8xH100-80GB"), memory_bytes=2_000_000_000)
    cfg = configio.load(PLANS / "llama-3.1-405b.yaml")
    problem = plan.make(cfg, facts.load(cfg.base.model), tiny_device).problems[0]
    assert problem.endswith("is enough, nor more such devices: take larger ones, or a smaller base.")


@pytest.mark.parametrize(
    ("devices_per_node", "mode", "reason"),
    [
        (1, "replicated", "base.sharding=node, and a node has one rank"),
        (2, "node", "base.sharding=node"),
        (4, "world", "base.sharding=node, and all ranks are on one node"),
    ],
)
def test_sharding_inside_a_node_is_what_it_comes_to(devices_per_node: int, mode: str, reason: str) -> None:
    cfg = small_plans.cfg(adapters={"a": 5}, base={"sharding": "node"})
    made = plan.make(cfg, small_plans.base(), replace(FOUR, devices_per_node=devices_per_node))
    assert (made.sharding, made.reason, made.fits) == (mode, reason, True)


def test_ranks_that_fill_nodes_unevenly_are_a_problem_of_node_sharding() -> None:
    cfg = small_plans.cfg(adapters={"a": 5}, base={"sharding": "node"})
    made = plan.make(cfg, small_plans.base(), FOUR, world=3)
    assert made.problems[0].startswith("base.sharding=node needs as many ranks on every node, and 3 ranks do not fill")


def test_auto_crosses_no_network_where_a_node_has_one_rank_and_room_for_all() -> None:
    cfg = configio.load(PLANS / "llama-3.1-70b.yaml")
    larger = replace(Hardware.parse("4xH100-80GB"), memory_bytes=65_000_000_000)  # 61% of it is the base
    made = plan.make(cfg, facts.load(cfg.base.model), replace(larger, devices_per_node=1))
    assert (made.sharding, made.gathered_bytes_per_step) == ("replicated", 0) and made.fits
    assert made.reason.endswith("a node has one rank, and all of it there crosses no network")
    assert plan.make(cfg, facts.load(cfg.base.model), replace(larger, devices_per_node=2)).sharding == "node"


@pytest.mark.parametrize(("node_ranks", "expected"), [(1, 50.0), (4, 200.0), (8, 400.0), (16, 400.0)])
def test_a_node_of_fewer_devices_has_its_part_of_the_ports(node_ranks: int, expected: float) -> None:
    seen_alone = replace(Hardware.parse("H100-80GB"), devices_per_node=1)  # by a rank that sees its own GPU only
    for hardware in (Hardware.parse("64xH100-80GB"), seen_alone):
        assert hardware.with_nodes_of(node_ranks, world=64).into_node_gbytes_per_s == expected
    one_port = Hardware.parse("64xL40S-48GB").with_nodes_of(node_ranks, world=64)
    assert one_port.into_node_gbytes_per_s == one_port.network_gbytes_per_s == 12.5


def test_seconds_are_those_of_the_ports_that_a_small_node_has() -> None:
    cfg = configio.load(PLANS / "llama-3.1-405b.yaml", ["base.sharding=world"])
    eights = Hardware.parse("64xH100-80GB")
    gather_s = [
        plan.make(cfg, facts.load(cfg.base.model), of, world=64).gather_step_s
        for of in (eights, eights.with_nodes_of(1, world=64))
    ]
    assert gather_s[0] is not None and gather_s[1] is not None
    assert gather_s[1] > 7 * gather_s[0]


def test_a_run_plans_with_the_nodes_that_it_finds_and_a_plan_with_those_of_the_run_file() -> None:
    cfg, base = small_plans.cfg(adapters={"a": 5}), small_plans.base()
    found = replace(Hardware.parse("8xH100-80GB"), is_all=False)  # as a rank sees them
    assert plan.make(cfg, base, found.with_nodes_of(2, world=6), world=6).node_ranks == 2
    cpu = Hardware.parse("cpu-24GB").with_nodes_of(2, world=6)
    assert (cpu.label, cpu.ranks_per_node(6)) == ("3xcpu-24GB", 2)
    deploy = {"workers_per_node": 4, "memory_gb_per_worker": 8}
    (made,) = plan.compare(
        small_plans.cfg(adapters={"a": 5}, cluster={"deploy": deploy}),
        base,
        [Hardware.parse("8xH100-80GB")],
        lora_targets=lambda *_: (),
    )
    assert (made.world_size, made.node_ranks) == (8, 4)
    assert made.gathered_between_nodes_bytes_per_step * 2 == made.gathered_bytes_per_step


def test_the_command_prints_a_column_for_each_machine_and_names_the_one_that_is_too_small() -> None:
    file = PLANS / "llama-3.1-405b.yaml"
    machines = ["--hardware", "8xH200-141GB", "--hardware", "H100-80GB"]
    done = commands.run("plan", file, *machines, "--price-per-gpu-hour", "2.5")
    assert done.code == 2
    assert "8xH200-141GB: world, because" in done.err and "price of all steps" in done.err
    assert "H100-80GB: a rank needs" in done.err and "Enough would be: --hardware 8xH100-80GB" in done.err
    assert commands.run("plan", file, *machines[:2]).code == 0


def test_the_network_of_a_cluster_can_be_said() -> None:
    command = ["plan", PLANS / "llama-3.1-405b.yaml", "base.sharding=world", "--hardware", "64xH100-80GB", "--json"]
    fast, slow = (commands.run(*command, "--network-gbit-per-s", gbit).out for gbit in ("3200", "100"))
    assert '"gather_step_s"' in fast and fast != slow


def test_the_readme_s_table_is_what_plan_says() -> None:
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    rows = [cells for cells in lines if cells[0].startswith("Llama-") and len(cells) == 10]
    assert [row[0] for row in rows] == ["Llama-2-13B"] * 4 + ["Llama-3.1-70B"] * 4 + ["Llama-3.1-405B"] * 4
    for model, hardware, *cells in rows:
        made = _made(model.lower(), hardware)
        figures = (made.slice_bytes, made.peak_rank_bytes, made.gathered_within_node_bytes_per_step)
        figures += (made.gathered_between_nodes_bytes_per_step, made.reduced_bytes_per_step)
        seconds = f"{made.step_s:.3g}"
        assert cells == [made.sharding, *map(plan.show, figures), seconds, "yes" if made.fits else "no"], hardware
