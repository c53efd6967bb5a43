"""An 11B-shaped base for real: packed from tensors that exist one at a time, sharded over two ranks, one training step.

    python tests/bench/bench_11b.py                      # 2 blocks, half a minute
    python tests/bench/bench_11b.py --full bench.jsonl   # 50 blocks, 11.2e9 parameters, 12 minutes, 7 GB of disk

A random Llama with the dimensions of the 7-8B models (H 4096, F 14336, 32 heads, 8 of them for keys and values,
vocabulary 32000) and as many blocks as make 11 billion. Its bfloat16 weights are never on disk: `base.pack` draws each
tensor, packs it, and drops it. Two fresh gloo processes then load a slice each and take one step through
`train.step` on 64 text tokens, a row a rank behind a prompt of 20. Prints measurement beside `plan` and appends one
BenchRecord. Private memory is that of a rank over the same process just before the load.
"""

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_base import RandomSource, llama, one_row, random_items, save_config

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from harness import run_ranks

from peftscale import adapters, configio, facts, plan, records
from peftscale.base import host_memory, load, pack, skeleton
from peftscale.config import RunConfig
from peftscale.plan import Plan, show
from peftscale.train import memory, step
from peftscale.train.optim import AdapterOptimizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FULL_LAYERS, WORLD, TIMEOUT_S = 50, 2, 1800
TEXT_TOKENS = 64  # of the step, over all ranks


@dataclass(frozen=True)
class Packed:
    """What packing took, in a process of its own."""

    pack_s: float
    pack_peak_bytes: int
    packed_file_bytes: int


@dataclass(frozen=True)
class Measured:
    """One rank. Bytes over what the process held just before the load."""

    load_s: float
    load_peak_bytes: int
    held_bytes: int
    """After the load."""
    peak_rank_bytes: int
    """The highest from the beginning of the load to the end of the step."""
    step_s: float
    gathered_bytes_per_step: int
    reduced_bytes_per_step: int
    control_bytes_per_step: int
    loss: float


def main(
    out: Annotated[Path, typer.Argument(help="The record is appended to it.")] = Path("bench.jsonl"),
    layers: Annotated[int, typer.Option(help="Blocks.")] = 2,
    full: Annotated[bool, typer.Option("--full", help=f"{FULL_LAYERS} blocks: 11 billion parameters.")] = False,
    compute_dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Pack, load, step."""
    num_layers = FULL_LAYERS if full else layers
    with tempfile.TemporaryDirectory(prefix="peftscale-bench-") as folder:
        tmp = Path(folder)
        save_config(
            tmp / "base",
            llama(hidden=4096, feed=14336, layers=num_layers, heads=32, key_value_heads=8, vocab=32000),
        )
        cfg = configio.load(
            QUICKSTART,
            [
                f"base.model={tmp / 'base'}",
                f"base.pack_dir={tmp / 'pack'}",
                f"base.compute_dtype={compute_dtype}",
                f"cluster.storage={tmp / 'runs'}",
            ],
        )
        planned = _plan(cfg)
        print(f"{planned.num_parameters:,} parameters; {planned.summary()}", flush=True)
        # A process of its own: the ranks shall not start with what packing left in the parent.
        (packed,) = run_ranks(_pack, 1, tmp / "packing", cfg, start_method="spawn", timeout_s=TIMEOUT_S)
        print(
            f"packed in {packed.pack_s:.0f} s into {show(packed.packed_file_bytes)} "
            f"(plan {show(planned.packed_bytes)}), peak {show(packed.pack_peak_bytes)}",
            flush=True,
        )
        ranks = run_ranks(_work, WORLD, tmp / "ranks", cfg, start_method="spawn", timeout_s=TIMEOUT_S)
    _report(ranks, planned)
    record = _record(cfg, packed, ranks, planned, num_layers)
    records.append(out, record)
    print(record.line())


def _plan(cfg: RunConfig) -> Plan:
    return plan.make(
        cfg,
        facts.load(cfg.base.model),
        plan.detect(),
        world=WORLD,
        work=one_row(cfg.adapters["grades"].length + TEXT_TOKENS // WORLD),
    )


def _pack(cfg: RunConfig) -> Packed:
    """Write the pack from tensors that are drawn when they are read. One thread, so that others' load changes little:
    two threads of small steps wait for each other."""
    host_memory.return_freed()
    assert cfg.base.pack_dir is not None
    model_dir, out = Path(cfg.base.model), cfg.base.pack_dir
    model = skeleton.build(
        skeleton.read_config(model_dir),
        quantization=cfg.base.quantization,
        compute_dtype=getattr(torch, cfg.base.compute_dtype),
        where=cfg.base.model,
    )
    start = time.perf_counter()
    with memory.measured(torch.device("cpu")) as peak:
        pack.write(
            model,
            RandomSource(model_dir),
            out,
            quantization=cfg.base.quantization,
            config_sha256=pack.config_sha256(model_dir),
        )
        return Packed(time.perf_counter() - start, peak.peak_bytes(), (out / pack.WEIGHTS).stat().st_size)


def _work(cfg: RunConfig) -> Measured:
    """Load a slice and take one step."""
    from peftscale.base import shard  # noqa: F401 - brings DeepSpeed, whose code is not what is measured

    device = torch.device("cpu")
    with memory.measured(device) as peak:
        start = time.perf_counter()
        base = load.load(cfg.base, sharding="world", device=device)
        load_s, load_peak, held = time.perf_counter() - start, peak.peak_bytes(), peak.held_bytes()
        cohort = adapters.build(cfg, base)
        optimizers = {name: AdapterOptimizer(adapter.parameters(), cfg.train) for name, adapter in cohort.items()}
        length, text = cfg.adapters["grades"].length, TEXT_TOKENS // WORLD
        items = random_items("grades", length, num_rows=WORLD, num_tokens=text, vocab=base.vocab_size)
        before = cohort["grades"].rows_PH.detach().clone()
        result = step.run(base, cohort, optimizers, items, step=0, microbatch_tokens=length + text)
        assert not result.skipped and not torch.equal(before, cohort["grades"].rows_PH)
        return Measured(
            load_s=load_s,
            load_peak_bytes=load_peak,
            held_bytes=held,
            peak_rank_bytes=peak.peak_bytes(),
            step_s=result.seconds,
            gathered_bytes_per_step=result.traffic.gathered,
            reduced_bytes_per_step=result.traffic.reduced,
            control_bytes_per_step=result.traffic.control,
            loss=result.losses["grades"],
        )


def _report(ranks: list[Measured], planned: Plan) -> None:
    rows: list[tuple[str, list[str], str]] = [
        ("seconds of loading", [f"{rank.load_s:.1f}" for rank in ranks], ""),
        ("seconds of the step", [f"{rank.step_s:.1f}" for rank in ranks], ""),
        ("load peak", [show(rank.load_peak_bytes) for rank in ranks], ""),
        ("held after the load (plan: slice)", [show(rank.held_bytes) for rank in ranks], show(planned.slice_bytes)),
        ("peak with the step", [show(rank.peak_rank_bytes) for rank in ranks], show(planned.peak_rank_bytes)),
    ]
    for key in ("gathered_bytes_per_step", "reduced_bytes_per_step", "control_bytes_per_step"):
        rows.append((key, [f"{getattr(rank, key):,}" for rank in ranks], f"{getattr(planned, key):,}"))
    rows.append(("loss, nats (ln of the vocabulary: 10.37)", [f"{rank.loss:.3f}" for rank in ranks], ""))
    print("\n| figure | rank 0 | rank 1 | plan |\n|---|---|---|---|")
    for title, values, plan_value in rows:
        print(f"| {title} | {' | '.join(values)} | {plan_value} |")
    print()


def _record(
    cfg: RunConfig, packed: Packed, ranks: list[Measured], planned: Plan, num_layers: int
) -> records.BenchRecord:
    worst: dict[str, Any] = {key: max(asdict(rank)[key] for rank in ranks) for key in asdict(ranks[0])}
    return records.BenchRecord(
        name="step_11b" if num_layers == FULL_LAYERS else f"step_11b_{num_layers}_layers",
        config_fingerprint=configio.fingerprint(cfg),
        measured={**asdict(packed), **worst, "num_parameters": planned.num_parameters},
        planned={
            "packed_file_bytes": planned.packed_bytes,
            "held_bytes": planned.slice_bytes,
            "load_peak_bytes": planned.slice_bytes + planned.gathered_units_bytes,
            "peak_rank_bytes": planned.peak_rank_bytes,
            "gathered_bytes_per_step": planned.gathered_bytes_per_step,
            "reduced_bytes_per_step": planned.reduced_bytes_per_step,
            "control_bytes_per_step": planned.control_bytes_per_step,
        },
        environment=records.environment(),
    )


if __name__ == "__main__":
    typer.run(main)
