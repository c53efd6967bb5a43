"""Memory that loading a quantised base over two ranks takes, ours and that of transformers followed by ZeRO-3.

    python tests/bench/bench_load.py bench.jsonl

A random Llama of 1.25e9 parameters (670 MB packed) is written as bfloat16 safetensors, then loaded by two fresh gloo
processes a variant: first start (one rank packs, the other waits), later start (the pack is there), slicing switched
off, and transformers' `from_pretrained` with the same quantisation, then `deepspeed.initialize`. Private memory is
that of a rank over the same process just before the load, all imports done. The bound is about the load: slice + two
largest gathered units + 60 MiB. One training step on top is reported beside `plan`, which counts activations and the
dequantised weight too. Prints a table, says which bounds hold, appends one BenchRecord a variant.
"""

import gc
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_base import llama, one_row, random_items, save_config, save_weights

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from harness import run_ranks

from peftscale import adapters, configio, facts, plan, records
from peftscale.base import host_memory, load
from peftscale.config import RunConfig
from peftscale.plan import Plan
from peftscale.train import memory, step
from peftscale.train.optim import AdapterOptimizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
WORLD, TIMEOUT_S = 2, 900
BASE = llama(hidden=2048, feed=5632, layers=28, heads=32, key_value_heads=4, vocab=4096)
SLACK_BYTES = 60 * 2**20
PART_OF_PACKED = 0.75
STEP_TOKENS = 16  # of one row: text and target
_IMPORTS = (
    "accelerate",
    "bitsandbytes",
    "peftscale.base.shard",  # brings DeepSpeed
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
)


@dataclass(frozen=True)
class Measured:
    """One rank. Bytes over what the process held just before the load."""

    load_peak_bytes: int
    held_bytes: int
    """After the load."""
    step_peak_bytes: int
    """The highest from the beginning of the load to the end of one step; the load's where no step was taken."""
    load_s: float


def main(
    out: Annotated[Path, typer.Argument(help="Records are appended to it.")] = Path("bench.jsonl"),
) -> None:
    """Measure all variants in one run."""
    with tempfile.TemporaryDirectory(prefix="peftscale-bench-") as tmp:
        os.environ["PEFTSCALE_CACHE"] = str(Path(tmp) / "cache")
        model_dir = Path(tmp) / "base"
        save_config(model_dir, BASE)
        num_bytes = save_weights(model_dir)
        print(f"base: {num_bytes:,} bytes of bfloat16 in {len(list(model_dir.glob('*.safetensors')))} files")
        cfg = configio.load(
            QUICKSTART,
            [f"base.model={model_dir}", "base.compute_dtype=bfloat16", f"cluster.storage={tmp}/runs"],
        )
        planned = {sharding: _plan(cfg, sharding) for sharding in ("world", "replicated")}
        variants: dict[str, tuple[Callable[..., Measured], tuple[Any, ...]]] = {
            "load_first_start": (_ours, (cfg, "world")),  # packs, and leaves the pack for the others
            "load_later_start": (_ours, (cfg, "world")),
            "load_without_slicing": (_ours, (cfg, "replicated")),
            "load_transformers": (_transformers, (str(model_dir),)),
        }
        results = {
            name: run_ranks(work, WORLD, Path(tmp) / name, *args, start_method="spawn", timeout_s=TIMEOUT_S)
            for name, (work, args) in variants.items()
        }
    _report(results, planned)
    for name, ranks in results.items():
        records.append(out, _record(name, cfg, ranks, planned))


def _plan(cfg: RunConfig, sharding: str) -> Plan:
    base = cfg.base.model_copy(update={"sharding": sharding})
    tokens = cfg.adapters["grades"].length + STEP_TOKENS
    return plan.make(
        cfg.model_copy(update={"base": base}),
        facts.load(cfg.base.model),
        plan.detect(),
        world=WORLD,
        work=one_row(tokens),
    )


def _ours(cfg: RunConfig, sharding: str) -> Measured:
    """Load through `base.load`, then take one training step of one row a rank."""
    _import_all()
    device = torch.device("cpu")
    with memory.measured(device) as peak:
        start = time.perf_counter()
        base = load.load(cfg.base, sharding=sharding, device=device)  # type: ignore[arg-type]
        load_s, load_peak = time.perf_counter() - start, peak.peak_bytes()
        held = peak.held_bytes()
        cohort = adapters.build(cfg, base)
        optimizers = {name: AdapterOptimizer(adapter.parameters(), cfg.train) for name, adapter in cohort.items()}
        length = cfg.adapters["grades"].length
        items = random_items("grades", length, num_rows=WORLD, num_tokens=STEP_TOKENS, vocab=base.vocab_size)
        result = step.run(base, cohort, optimizers, items, step=0, microbatch_tokens=length + STEP_TOKENS)
        assert not result.skipped
        return Measured(load_peak, held, peak.peak_bytes(), load_s)


def _import_all() -> None:
    """What the load would import otherwise: code is not what is measured."""
    for module in _IMPORTS:
        importlib.import_module(module)
    gc.collect()


def _transformers(model_dir: str) -> Measured:
    """The common way: a quantised `from_pretrained` on every rank, which ZeRO-3 partitions afterwards."""
    _import_all()
    import deepspeed
    import transformers
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import HfDeepSpeedConfig

    from peftscale.base import shard

    transformers.utils.logging.disable_progress_bar()
    host_memory.return_freed()  # ours does it in the load; what is compared shall not be the C library
    shard.partitioner()  # DeepSpeed joins the process group, as in ours
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with memory.measured(torch.device("cpu")) as peak:
        start = time.perf_counter()
        aware = HfDeepSpeedConfig(config)  # must live as long as the load: transformers keeps a weak reference
        model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantization, dtype=torch.bfloat16)
        model.requires_grad_(False)
        engine = deepspeed.initialize(model=model, config=config)[0]
        load_s, load_peak = time.perf_counter() - start, peak.peak_bytes()
        gc.collect()
        held = peak.held_bytes()
        del aware, engine
        return Measured(load_peak, held, load_peak, load_s)


def _bound(planned: Plan) -> int:
    return planned.slice_bytes + planned.gathered_units_bytes + SLACK_BYTES


def _report(results: dict[str, list[Measured]], planned: dict[str, Plan]) -> None:
    world = planned["world"]
    packed, bound = world.packed_bytes, _bound(world)
    print(f"packed {_mb(packed)}, slice {_mb(world.slice_bytes)}, two largest units {_mb(world.gathered_units_bytes)}")
    print(f"bound on a load: slice + units + 60 MiB = {_mb(bound)}; and {PART_OF_PACKED} x packed = ", end="")
    print(f"{_mb(int(PART_OF_PACKED * packed))}\n")
    print("| variant | load peak, rank 0 / 1 | held after | peak with a step | seconds | within bound | below 0.75 |")
    print("|---|---|---|---|---|---|---|")
    for name, ranks in results.items():
        load_peak = max(rank.load_peak_bytes for rank in ranks)
        cells = [
            name,
            *(" / ".join(_mb(getattr(rank, key)) for rank in ranks) for key in ("load_peak_bytes", "held_bytes")),
            "-" if name == "load_transformers" else " / ".join(_mb(rank.step_peak_bytes) for rank in ranks),
            f"{max(rank.load_s for rank in ranks):.1f}",
            "yes" if load_peak <= bound else "NO",
            "yes" if load_peak < PART_OF_PACKED * packed else "NO",
        ]
        print(f"| {' | '.join(cells)} |")
    print(f"\nplan of a sharded rank with one step: {_mb(world.peak_rank_bytes)}")
    over = {name: max(rank.load_peak_bytes for rank in ranks) > bound for name, ranks in results.items()}
    print(f"ours is within the bound on a later start: {_answer(not over['load_later_start'])}")
    print(f"ours is within the bound on the first start: {_answer(not over['load_first_start'])}")
    print(f"with slicing off the bound is exceeded, as it must be: {_answer(over['load_without_slicing'])}")
    print(f"transformers and ZeRO-3 exceed it: {_answer(over['load_transformers'])}")


def _record(name: str, cfg: RunConfig, ranks: list[Measured], planned: dict[str, Plan]) -> records.BenchRecord:
    world = planned["world"]
    measured: dict[str, int | float] = {
        key: max(asdict(rank)[key] for rank in ranks) for key in ("load_peak_bytes", "held_bytes", "load_s")
    }
    if name != "load_transformers":
        measured["step_peak_bytes"] = max(rank.step_peak_bytes for rank in ranks)
    own = planned["replicated" if name == "load_without_slicing" else "world"]
    return records.BenchRecord(
        name=name,
        config_fingerprint=configio.fingerprint(cfg),
        measured={**measured, "packed_bytes": world.packed_bytes, "bound_bytes": _bound(world)},
        planned={}
        if name == "load_transformers"
        else {
            "load_peak_bytes": own.slice_bytes + own.gathered_units_bytes,
            "held_bytes": own.slice_bytes,
            "step_peak_bytes": own.peak_rank_bytes,
        },
        environment=records.environment(),
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _answer(is_so: bool) -> str:
    return "yes" if is_so else "NO"


if __name__ == "__main__":
    typer.run(main)
