"""Plans by hand: the figures that a person can check with a pencil, and what makes a run fit."""

import functools
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import small_plans
import tiny
import torch
from living import peak
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from peftscale import configio, facts, plan
from peftscale.adapters import SoftPrompt
from peftscale.base import load
from peftscale.base.passes import target_losses
from peftscale.config import BaseConfig, TrainConfig
from peftscale.data.batches import pass_tokens, training_items
from peftscale.data.tasks import Example
from peftscale.errors import ConfigError
from peftscale.facts import BaseFacts, TensorFacts, UnitFacts
from peftscale.plan import memory
from peftscale.train import optim, setup, step

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
RUN_FILES = sorted((CONFIGS / "plan").glob("*.yaml"))


# One linear: 192 weights = 96 packed + 3 absmax + 4 nested + 4 offset = 107 bytes. One block: 2 * 107 + 8 * 2 = 230.
# Embedding: 50 * 8 * 2 = 800. Norm: 16. Packed: 800 + 2 * 230 + 16 = 1276.
# Over 3 ranks: a blob is 108, a norm of 8 elements is 9, the table of 400 elements is 402.
BLOCK_3, TABLE_3, NORM_3 = 108 * 2 + 9 * 2, 402 * 2, 9 * 2


def test_bytes_of_a_tiny_base_over_three_ranks_by_hand() -> None:
    cfg, base, cpu = small_plans.cfg(adapters={"a": 5}), small_plans.base(), plan.Hardware.parse("cpu-24GB")
    made = plan.make(cfg, base, cpu, world=3, work=replace(plan.expected(cfg, base, world=3), passes_per_step=4))
    assert made.packed_bytes == 1276
    assert made.slice_bytes == (TABLE_3 + 2 * BLOCK_3 + NORM_3) // 3
    assert made.gathered_units_bytes == TABLE_3 + BLOCK_3
    # Forward: table, blocks, norm, head (the table again). Backward: all of them but the embedding.
    assert made.gathered_bytes_per_step == 4 * (3 * TABLE_3 + 2 * 2 * BLOCK_3 + 2 * NORM_3)
    assert made.reduced_bytes_per_step == 5 * 8 * 4
    assert (made.adapter_bytes, made.best_bytes, made.gradient_bytes, made.optimizer_bytes) == (160, 160, 160, 320)
    assert made.dequantized_bytes == 192 * 2 + 192 // 16
    # 12 examples over 3 ranks are 4 rows of at most 3 targets; logits bfloat16, float32 and its gradient.
    assert made.logits_bytes == 4 * 3 * 50 * (2 + 4 + 4)
    # Attention 4 * 8 in float32, as on a CPU, and one activation of 24 in bfloat16, the norm's float32 copy of 8,
    # scalars of 2 heads and a norm.
    block = 4 * 4 * 8 + 2 * 24 + 4 * 8 + 4 * (2 + 1)
    copies = 4 * 5 * 2 * 8 * 4  # for each of 4 rows keys and values of 5 virtual tokens
    assert made.activation_bytes == 100 * (2 * block + 3 * 24 * 2 + 8 * 8) + 2 * copies
    # Labels are compared in passes of 100 tokens. Without a limit on texts, those of a step's 4 rows fill a pass, 20
    # behind a prompt of 5; one of them and 3 targets are 23 tokens, so 4 rows make 12 logits.
    block = 2 * 2 * 8 + (2 * (8 + 2 * 8) + 4 * (6 * 8 + 4 * 8))  # input and norm; attention with copies in float32
    assert made.evaluation_bytes == max(100 * block, 8 * 12 * 50)
    assert made.update_bytes == 160 + 320 + 160  # a copy to go back to, and AdamW's square roots
    parts = (made.slice_bytes, made.gathered_units_bytes, 160, 160, 160, 320, 396)
    assert made.activation_bytes + made.logits_bytes > made.evaluation_bytes
    assert made.peak_rank_bytes == sum(parts) + made.activation_bytes + made.logits_bytes
    assert made.sharding == "world" and made.reason == "base.sharding=world"
    assert made.fits and made.problems == ()
    assert made.prefetch_elements == 0


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_the_update_of_adapters_takes_what_is_planned(kind: str) -> None:
    adapters = [nn.Parameter(torch.zeros(length, 64)) for length in (400, 700, 900)]
    cfg = TrainConfig(
        steps=9,
        examples_per_step=1,
        microbatch_tokens=1,
        optimizer=kind,
        learning_rate=0.1,
        evaluate_every=9,
        checkpoint_every=9,
    )
    optimizers = [optim.AdapterOptimizer([adapter], cfg) for adapter in adapters]

    def update(at: int) -> None:
        kept = optim.snapshots(optimizers)
        optim.update_(optimizers, at)
        del kept

    for at in range(2):  # moments are there from the first update on
        for adapter in adapters:
            adapter.grad = torch.ones_like(adapter)
        taken = peak(functools.partial(update, at))
    planned = memory.update_bytes(sum(adapter.nbytes for adapter in adapters))
    assert planned <= taken <= 1.01 * planned, taken / planned


def test_where_adapters_outweigh_a_pass_the_peak_is_that_of_their_update() -> None:
    cfg = small_plans.cfg(adapters={f"a{n}": 5 for n in range(200)})
    made = plan.make(cfg, small_plans.base(), plan.Hardware.parse("cpu-24GB"), world=1)
    of_passes = max(made.activation_bytes + made.logits_bytes, made.evaluation_bytes)
    assert made.update_bytes > of_passes
    held = 200 * (160 + 160 + 160 + 320)
    weights = made.slice_bytes + made.gathered_units_bytes + made.dequantized_bytes
    assert made.peak_rank_bytes == weights + held + made.update_bytes


def test_checkpointing_keeps_one_input_a_block() -> None:
    kept = plan.activation_bytes(small_plans.base(), tokens=1, dense_bytes=4, is_checkpointed=False)
    fewer = plan.activation_bytes(small_plans.base(), tokens=1, dense_bytes=4, is_checkpointed=True)
    block = 4 * (4 * 8 + 24) + 4 * 8 + 4 * (2 + 1)
    assert kept - fewer == block - 2 * 8 * 4


def test_one_rank_gathers_and_reduces_nothing() -> None:
    made = plan.make(small_plans.cfg(adapters={"a": 5}), small_plans.base(), plan.Hardware.parse("H100-80GB"))
    assert (made.world_size, made.sharding, made.reason) == (1, "replicated", "one rank holds everything")
    assert made.slice_bytes == made.packed_bytes
    assert made.gathered_units_bytes == made.gathered_bytes_per_step == 0
    assert made.reduced_bytes_per_step == made.control_bytes_per_step == 0


def test_replicated_ranks_reduce_and_gather_nothing() -> None:
    cfg = small_plans.cfg(adapters={"a": 5, "b": 7}, base={"sharding": "replicated"}, train={"optimizer": "adafactor"})
    made = plan.make(cfg, small_plans.base(), plan.Hardware.parse("2xH100-80GB"))
    assert made.gathered_bytes_per_step == 0
    assert made.reduced_bytes_per_step == (5 + 7) * 8 * 4
    assert made.optimizer_bytes == made.adapter_bytes == 384
    assert made.control_bytes_per_step == 2 * 64


@pytest.mark.parametrize(("length", "hidden"), [(1, 1), (20, 256), (100, 4096), (1001, 3)])
def test_the_adapter_file_has_the_planned_size(tmp_path: Path, length: int, hidden: int) -> None:
    save_file({"prompt_embeddings": torch.zeros(length, hidden)}, tmp_path / "a", metadata={"format": "pt"})
    base = small_plans.base()
    wide = BaseFacts(**{name: getattr(base, name) for name in base.__slots__} | {"hidden_size": hidden})
    made = plan.make(small_plans.cfg(adapters={"a": length}), wide, plan.Hardware.parse("cpu-24GB"))
    assert made.adapter_file_bytes == (tmp_path / "a").stat().st_size
    # Beside the best rows, a file's worth: the rows as they are, and two moments of each.
    assert made.checkpoint_bytes - made.adapter_file_bytes - 3 * 16_384 == 3 * length * hidden * 4


@pytest.mark.parametrize(
    ("hardware", "mode", "reason"),
    [
        ("8xA100-40GB", "world", "takes 99% of a device, more than 55%"),  # 39.5 GB packed
        ("8xH100-80GB", "replicated", "takes 49% of a device, at most 55%: no gathers"),
    ],
)
def test_auto_replicates_what_takes_little_of_a_device(hardware: str, mode: str, reason: str) -> None:
    cfg = configio.load(CONFIGS / "plan" / "llama-3.1-70b.yaml")
    made = plan.make(cfg, facts.load(cfg.base.model), plan.Hardware.parse(hardware))
    assert made.sharding == mode
    assert reason in made.reason


def test_a_base_that_does_not_fit_says_what_would_help() -> None:
    cfg = configio.load(CONFIGS / "plan" / "llama-3.1-405b.yaml", ["train.microbatch_tokens=4096"])
    base = facts.load(cfg.base.model)
    made = plan.make(cfg, base, plan.Hardware.parse("4xH100-80GB"))
    assert not made.fits
    (problem,) = made.problems
    assert "a rank needs" in problem and "of H100-80GB (slice 53.9 GB" in problem
    assert "8xH100-80GB with base.sharding=world" in problem
    assert plan.make(cfg, base, plan.Hardware.parse("8xH100-80GB")).fits  # the way out is one
    dense = configio.load(CONFIGS / "plan" / "llama-3.1-8b.yaml", ["base.quantization=none"])
    eight = facts.load(dense.base.model)
    large = replace(plan.expected(dense, eight, world=1).step, tokens=65_536)
    work = replace(plan.expected(dense, eight, world=1), step=large)
    small = plan.make(dense, eight, plan.Hardware.parse("A100-40GB"), work=work)
    assert not small.fits
    assert "Enough would be:" in small.problems[0] and "train.microbatch_tokens=" in small.problems[0]


def test_rows_that_cannot_be_are_named_with_their_keys() -> None:
    cfg = small_plans.cfg(adapters={"a": 63}, train={"microbatch_tokens": 64})
    made = plan.make(cfg, small_plans.base(), plan.Hardware.parse("2xV100-32GB"), world=3)
    assert [problem.split(";")[0] for problem in made.problems] == [
        "3 ranks need 3 GPUs, 2xV100-32GB has 2",
        "adapters.a.length=63 and 1 text and 1 target token(s) make 65, the base has 64 positions "
        "(with longrope, those of short texts)",
        "train.microbatch_tokens=64 does not hold one row of adapters.a: 63 virtual, 1 text and 1 target token(s) "
        "make 65",
    ]
    assert "V100 has no bfloat16 units: expect it to be slow." in made.notes


def test_a_worker_that_sees_one_gpu_of_many_is_not_refused() -> None:
    seen = replace(plan.Hardware.parse("H100-80GB"), is_all=False)
    assert plan.make(small_plans.cfg(adapters={"a": 5}), small_plans.base(), seen, world=16).fits
    assert not plan.make(
        small_plans.cfg(adapters={"a": 5}), small_plans.base(), plan.Hardware.parse("H100-80GB"), world=16
    ).fits


def test_passes_follow_from_the_longest_row() -> None:
    cfg = small_plans.cfg(adapters={"a": 5}, task={"max_text_tokens": 22})
    base, three = small_plans.base(), plan.Hardware.parse("cpu-24GB")
    assert plan.make(cfg, base, three).passes_per_step == 2  # 4 rows a rank, 3 rows of 5 + 22 + 3 in 100 tokens
    counted = replace(plan.expected(cfg, base, world=3), passes_per_step=7)
    assert plan.make(cfg, base, three, work=counted).passes_per_step == 7
    unknown = plan.make(small_plans.cfg(adapters={"a": 5}), base, three)
    assert unknown.passes_per_step == 1
    assert unknown.notes == ("task.max_text_tokens is not given, so one pass a step is assumed.",)


def test_ranks_of_a_cpu_machine_share_its_memory() -> None:
    one = plan.Hardware.parse("cpu-24GB")
    assert one.rank_bytes(1) == 23_500_000_000
    assert one.rank_bytes(3) == 7_500_000_000
    assert plan.Hardware.parse("2xcpu-24GB").rank_bytes(3) == 11_500_000_000
    assert plan.Hardware.parse("2xh100-80gb").label == "2xH100-80GB"


@pytest.mark.parametrize("text", ["8xB999-1GB", "0xH100-80GB", "", "x", "cpu-0GB", "H100"])
def test_unknown_hardware_is_refused_with_the_catalogue(text: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot plan for '{text}'; expected .*H100-80GB, .*cpu-24GB"):
        plan.Hardware.parse(text)


def test_this_machine_is_found_without_torch() -> None:
    code = (
        "import sys; from peftscale import facts, plan; found = plan.detect()\n"
        f"facts.load({str(CONFIGS / 'models' / 'llama-3.1-405b')!r})\n"
        "assert found.kind == 'cpu' and found.memory_bytes > 1e8 and found.num_cores >= 1, found\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def _header(run_file: Path) -> str:
    lines = run_file.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("run_file", RUN_FILES, ids=lambda file: file.stem)
def test_the_header_of_a_run_file_says_what_plan_says(run_file: Path) -> None:
    cfg, header = configio.load(run_file), _header(run_file)
    hardware = plan.Hardware.parse(header.partition("--hardware ")[2].split()[0])
    if run_file.stem == "mixtral-8x7b":
        with pytest.raises(facts.ModelError, match=r"experts.gate_up_proj \(8, 28672, 4096\)"):
            facts.load(cfg.base.model)
        assert "experts.gate_up_proj (8, 28672, 4096)" in header
        return
    base = facts.load(cfg.base.model)
    made = plan.make(cfg, base, hardware)
    assert made.summary() in header
    assert made.fits, made.problems


def test_the_header_of_the_t5_recipe_says_what_plan_says_without_network() -> None:
    file = CONFIGS / "t5-v1.1-xxl.yaml"
    header = _header(file)
    command = header.partition("peftscale plan ")[2].split()
    assert command[0] == "configs/t5-v1.1-xxl.yaml" and command[2] == "--hardware"
    cfg = configio.load(file, [command[1]])
    made = plan.make(cfg, facts.load(cfg.base.model), plan.Hardware.parse(command[3]))
    assert made.summary() in header
    assert made.fits and made.notes == ()


def test_all_published_models_have_a_run_file() -> None:
    assert {file.stem for file in RUN_FILES} == {path.name for path in (CONFIGS / "models").iterdir()}


@pytest.mark.skipif(not QUICKSTART.is_file(), reason="configs/quickstart.yaml and its base are not there")
def test_the_quickstart_reduces_its_prompt_and_gathers_its_base() -> None:
    cfg = configio.load(QUICKSTART)
    base = facts.load(cfg.base.model)
    work = replace(plan.expected(cfg, base, world=2), passes_per_step=1)
    made = plan.make(cfg, base, plan.Hardware.parse("cpu-4GB"), world=2, work=work)
    # Hidden 256, 6 blocks: q, o 256 x 256, k, v 128 x 256, three of 672 x 256; 4096 tokens, tied; float32.
    weights = (2 * 256 * 256, 2 * 128 * 256, 3 * 672 * 256)
    blobs = 2 * _nf4(256 * 256) + 2 * _nf4(128 * 256) + 3 * _nf4(672 * 256)
    block, table, norm = blobs + 2 * 256 * 4, 4096 * 256 * 4, 256 * 4
    assert made.num_parameters == 6 * (sum(weights) + 512) + 4096 * 256 + 256
    assert made.packed_bytes == 6 * block + table + norm
    assert made.slice_bytes == made.packed_bytes // 2  # every parameter is even, so nothing is padded
    assert made.gathered_units_bytes == table + block
    assert made.gathered_bytes_per_step == table + 2 * (6 * block + norm + table)
    length = sum(adapter.length for adapter in cfg.adapters.values())
    assert made.reduced_bytes_per_step == length * 256 * 4


def _nf4(num: int) -> int:
    return num // 2 + num // 64 + 4 * -(-num // 64 // 256) + 4


def test_activations_of_a_llama_agree_with_what_autograd_keeps() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="sdpa",
    )
    model, tokens = LlamaForCausalLM(config).model, 128
    embeds = torch.randn(1, tokens, 64, requires_grad=True)
    kept = _kept_bytes(model, lambda: model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    base = BaseFacts(
        "m", "llama", 64, 3, 4, 4, 16, "silu", 50, 2048, False, False, _llama_blocks(layers=3, hidden=64, feed=172)
    )
    planned = plan.activation_bytes(base, tokens=tokens, dense_bytes=4, is_checkpointed=False)
    planned -= tokens * 3 * 172 * 4  # gradients in flight, which forward has not
    assert kept == pytest.approx(planned, rel=0.05)  # measured 0.989 of it


@pytest.mark.parametrize("key_heads", [4, 2])
def test_activations_of_packed_passes_count_a_copy_of_the_prompt_for_each_row(tmp_path: Path, key_heads: int) -> None:
    """Many short texts behind a long prompt: what a pass computes is little beside what attention reads."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3}
    config = tiny.LLAMA | sizes | {"num_attention_heads": 4, "num_key_value_heads": key_heads}
    where = str(tiny.save_base(tmp_path / "base", config))
    known = {"quantization": "none", "compute_dtype": "float32", "checkpoint_activations": False, "sharding": "auto"}
    base = load.load(BaseConfig(model=where, **known), sharding="replicated", device=torch.device("cpu"))
    assert setup.pack_where_exact(base) is None
    prompt = SoftPrompt(torch.randn(100, base.hidden_size))
    examples = [Example(i, tuple(range(3, 18)), (5,), None, "") for i in range(60)]
    items = training_items("a", 100, examples)
    kept = _kept_bytes(base.model, lambda: target_losses(base, step.rows_of(items, {"a": prompt})))
    of_base, tokens = facts.load(where), pass_tokens(items, is_packed=True)
    planned, without = (
        plan.activation_bytes(of_base, tokens=tokens, dense_bytes=4, is_checkpointed=False, shared_tokens=shared)
        - tokens * 3 * config["intermediate_size"] * 4  # gradients in flight, which forward has not
        + len(items) * config["vocab_size"] * 12  # logits
        for shared in (60 * 100, 0)
    )
    assert kept == pytest.approx(planned, rel=0.05), kept / planned
    assert kept > 1.2 * without


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_activations_of_a_t5_agree_with_what_autograd_keeps(tmp_path: Path, feed_forward: str) -> None:
    """Three rows of 40 text tokens and 24 of the decoder."""
    sizes = {"vocab_size": 50, "d_model": 64, "d_kv": 24, "d_ff": 172, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(**sizes, num_layers=3, num_decoder_layers=2, feed_forward_proj=feed_forward)
    config.save_pretrained(tmp_path)
    embeds, decoder_embeds = (torch.randn(3, tokens, 64, requires_grad=True) for tokens in (40, 24))
    mask = torch.ones(3, 40).tril(38)  # a row is padded, so that there is a mask
    model, inputs = T5Model(config), {"inputs_embeds": embeds, "decoder_inputs_embeds": decoder_embeds}
    kept = _kept_bytes(model, lambda: model(**inputs, attention_mask=mask).last_hidden_state)
    made = {"tokens": 3 * 64, "decoder_tokens": 3 * 24, "row_tokens": 40, "dense_bytes": 4, "is_checkpointed": False}
    planned = plan.activation_bytes(facts.load(tmp_path), **made)
    planned -= 3 * 40 * 3 * 172 * 4  # gradients in flight, which forward has not
    assert kept == pytest.approx(planned, rel=0.05), kept / planned  # measured 0.979 of it


def _kept_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps of a forward, without the weights."""
    model.requires_grad_(False).train()
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    return sum(kept.values())


def _llama_blocks(*, layers: int, hidden: int, feed: int) -> tuple[UnitFacts, ...]:
    square = [(name, hidden, hidden) for name in ("q", "k", "v", "o")]
    shapes = [*square, ("gate", feed, hidden), ("up", feed, hidden), ("down", hidden, feed)]
    linears = tuple(facts.LinearFacts(name, rows, cols, False) for name, rows, cols in shapes)
    norms = (TensorFacts("n1.weight", (hidden,)), TensorFacts("n2.weight", (hidden,)))
    return tuple(UnitFacts(f"b.{i}", "block", linears, norms) for i in range(layers))


def test_the_table_has_a_column_for_each_plan() -> None:
    base, cfg = small_plans.base(), small_plans.cfg(adapters={"a": 5})
    plans = [plan.make(cfg, base, plan.Hardware.parse(text)) for text in ("2xH100-80GB", "cpu-24GB")]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table(plans))
    text = console.export_text()
    assert "2xH100-80GB" in text and "cpu-24GB" in text
    assert "1.28 kB" in text and "world, 3 rank(s)" in text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_600, "1.00 MB"),
        (99_960, "100 kB"),
        (215_610_740_168, "216 GB"),
    ],
)
def test_bytes_are_shown_with_three_digits(num_bytes: int, text: str) -> None:
    assert plan.show(num_bytes) == text
