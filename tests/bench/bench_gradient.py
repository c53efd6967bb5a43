"""Error of the adapter gradient on 1, 2 and 3 ranks, sharded and replicated, in every quantisation, with and without
activation checkpointing, in packed passes.

    python tests/bench/bench_gradient.py bench.jsonl

The quickstart base (5M Llama) and one global batch of 32 real reviews behind the quickstart's prompt of 20 tokens, in
float32. Each cell is the largest relative error over the ranks, |g - g1| / |g1| in the L2 norm, against one replicated
rank of the same quantisation without checkpointing, in padded passes. Prints a table and appends one BenchRecord a
quantisation. The last line is the control: the same measure where the batch lacks one review. The promise is below
1e-5.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from harness import run_ranks

from peftscale import adapters, configio, records
from peftscale.base import load
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import Cursor, training_items
from peftscale.train import setup, step

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
QUANTIZATIONS = ("nf4", "int8", "none")
WORLDS, SHARDINGS, CHECKPOINTING = (1, 2, 3), ("replicated", "world"), (False, True)
MICROBATCH_TOKENS, TIMEOUT_S = 512, 300  # several passes on each rank, unequal in length


@dataclass(frozen=True)
class Case:
    """One cell of the table, but for the number of ranks."""

    quantization: str
    sharding: str
    checkpoints: bool


CASES = [Case(*values) for values in product(QUANTIZATIONS, SHARDINGS, CHECKPOINTING)]


def main(
    out: Annotated[Path, typer.Argument(help="Records are appended to it.")] = Path("bench.jsonl"),
) -> None:
    """Compute every gradient and compare."""
    with tempfile.TemporaryDirectory(prefix="peftscale-bench-") as tmp:
        os.environ["PEFTSCALE_CACHE"] = str(Path(tmp) / "cache")
        cfg = configio.load(QUICKSTART, [f"cluster.storage={tmp}/runs"])
        ranks = {
            world: run_ranks(_gradients, world, Path(tmp) / str(world), cfg, timeout_s=TIMEOUT_S) for world in WORLDS
        }
        (padded,) = run_ranks(_padded_gradients, 1, Path(tmp) / "padded", cfg, timeout_s=TIMEOUT_S)
        (short,) = run_ranks(_gradient_without_one_review, 1, Path(tmp) / "short", cfg)
    errors = {
        (world, case): max(_error(grads[case], padded[case.quantization]) for grads in ranks[world])
        for world, case in product(WORLDS, CASES)
    }
    print("| ranks | sharding | checkpointing | " + " | ".join(QUANTIZATIONS) + " |")
    print("|---|---|---|" + "---|" * len(QUANTIZATIONS))
    for world, sharding, checkpoints in product(WORLDS, SHARDINGS, CHECKPOINTING):
        cells = [_cell(errors[world, Case(quantization, sharding, checkpoints)]) for quantization in QUANTIZATIONS]
        print(f"| {world} | {sharding} | {'on' if checkpoints else 'off'} | {' | '.join(cells)} |")
    control = _error(short, padded["nf4"])
    print(f"\nlargest: {max(errors.values()):.1e}; without one of the 32 reviews (nf4): {control:.1e}")
    for quantization in QUANTIZATIONS:
        measured: dict[str, int | float] = {
            f"relative_error_{world}_{case.sharding}_checkpointing_{'on' if case.checkpoints else 'off'}": error
            for (world, case), error in errors.items()
            if case.quantization == quantization
        }
        record = records.BenchRecord(
            name=f"gradient_{quantization}",
            config_fingerprint=configio.fingerprint(cfg),
            measured={**measured, "largest_relative_error": max(measured.values())},
            environment=records.environment(),
        )
        records.append(out, record)


def _gradients(cfg: RunConfig) -> dict[Case, Tensor]:
    """The gradient of the global batch in every case, on this rank."""
    return {case: _gradient(cfg, case, cfg.train.examples_per_step) for case in CASES}


def _padded_gradients(cfg: RunConfig) -> dict[str, Tensor]:
    """What every case is compared with, by quantisation."""
    padded = cfg.model_copy(update={"train": cfg.train.model_copy(update={"packing": "off"})})
    num = cfg.train.examples_per_step
    return {name: _gradient(padded, Case(name, "replicated", False), num) for name in QUANTIZATIONS}


def _gradient_without_one_review(cfg: RunConfig) -> Tensor:
    return _gradient(cfg, Case("nf4", "replicated", False), cfg.train.examples_per_step - 1)


def _gradient(cfg: RunConfig, case: Case, num_examples: int) -> Tensor:
    """Through `train.step`, as a run would; one rank cannot shard, so `world` there is a slice that is the whole."""
    changes = {"quantization": case.quantization, "checkpoint_activations": case.checkpoints}
    base = load.load(
        cfg.base.model_copy(update=changes),
        sharding=case.sharding,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )
    assert setup.choose_packing(cfg, base) is None
    cohort = adapters.build(cfg, base)
    train = tasks.load(cfg.task, base.tokenizer, max_tokens=None, splits=("train",)).train
    at, _ = Cursor(cfg.seed).take(num_examples, num_examples=len(train))
    items = training_items("grades", cohort["grades"].length, [train[i] for i in at])
    step.gradient(base, cohort, items, microbatch_tokens=MICROBATCH_TOKENS)
    gradient_PH = cohort["grades"].rows_PH.grad
    assert gradient_PH is not None
    torch.distributed.barrier()
    return gradient_PH


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _cell(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


if __name__ == "__main__":
    typer.run(main)
