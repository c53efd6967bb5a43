"""What a plan says beside what a run measures: memory of a rank, and bytes gathered and reduced a step.

    python tests/bench/bench_plan.py                     # 1, 2, 4 and 2 x 2 ranks, labels and texts: 20 minutes
    python tests/bench/bench_plan.py --ranks 2 --task labels out.jsonl
    python tests/bench/bench_plan.py --ranks 1 --task labels --method lora --method full_finetuning

A random Llama of 290 million parameters in nf4, sharded over gloo ranks (2x2: over two of them, which are taken for a
node), and three adapters (a prompt, a prefix, a prefix with a network) with reviews of the quickstart, several to a
row; or --method, what adapters are compared with. One task compares labels, the other writes texts. Each run is
`train.worker.main` or `baselines.main`, with its evaluations; the plan is the one that it makes itself once it has its
data, and the one that `peftscale plan` makes from the run file alone stands beside it. Private memory is over that of
the same process just before the load, with a C library that gives every freed tensor back
(MALLOC_MMAP_THRESHOLD_=65536 unless it is set): what glibc keeps of freed blocks is in no plan.
Prints a table, says whether memory is within 15% and bytes are within 2%, and appends a BenchRecord a run.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_base import llama, save_config, save_weights

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from harness import run_ranks

from peftscale import baselines, configio, facts, plan, records
from peftscale.base import load
from peftscale.baselines import lora
from peftscale.config import RunConfig
from peftscale.records import RunSummary
from peftscale.train import worker

REVIEWS = Path(__file__).parents[2] / "configs" / "quickstart" / "reviews" / "train.jsonl"
BASE = llama(hidden=1024, feed=2816, layers=24, heads=16, key_value_heads=8, vocab=4096)
MEMORY_WITHIN, BYTES_WITHIN = 0.15, 0.02
TIMEOUT_S = 1800
_KEYS = (
    "peak_rank_bytes",
    "gathered_bytes_per_step",
    "gathered_between_nodes_bytes_per_step",
    "reduced_bytes_per_step",
)
_SHAPES = ["1", "2", "4", "2x2"]
_TASKS: dict[str, dict[str, Any]] = {
    "labels": {
        "target": "{{ label }}",
        "labels": {word: f" {word}" for word in ("terrible", "bad", "good", "great")},
        "metrics": ["accuracy", "macro_f1"],
    },
    "texts": {"target": " {{ answer }}", "metrics": ["exact_match", "bleu"], "max_target_tokens": 24},
}
_METHODS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "lora": {"lora": {"rank": 8, "alpha": 16}},
    "full_finetuning": {"full_finetuning": {}},
    "few_shot": {"few_shot": {"examples": 2}},
}


def main(
    out: Annotated[Path, typer.Argument(help="Records are appended to it.")] = Path("bench.jsonl"),
    ranks: Annotated[list[str], typer.Option(help="Or nodes x ranks of each.")] = _SHAPES,
    task: Annotated[list[str], typer.Option(help="labels, texts.")] = list(_TASKS),  # noqa: B006 - typer copies it
    method: Annotated[list[str], typer.Option(help="adapters, lora, full_finetuning, few_shot.")] = ["adapters"],  # noqa: B006
    compute_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Activation checkpointing.")] = False,
) -> None:
    """Plan, run, compare."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    print("| method, task | ranks | figure | measured | planned in the run | over it | planned before it |")
    print("|---|---|---|---|---|---|---|", flush=True)
    worst, of_before = dict.fromkeys(_KEYS, 0.0), []
    with tempfile.TemporaryDirectory(prefix="peftscale-bench-") as folder:
        tmp = Path(folder)
        os.environ["PEFTSCALE_CACHE"] = str(tmp / "cache")
        save_config(tmp / "base", BASE)
        save_weights(tmp / "base")
        _save_data(tmp)
        for what, kind, shape in product(method, task, ranks):
            nodes, _, each = shape.rpartition("x")
            num_nodes, node_ranks = int(nodes or 1), int(each)
            cfg = _run_file(
                tmp,
                what,
                kind,
                shape,
                sharding="node" if nodes else "world",
                compute_dtype=compute_dtype,
                checkpoint=checkpoint,
            )
            machines = plan.Hardware.parse(f"{num_nodes}xcpu-24GB")
            world = num_nodes * node_ranks
            (before,) = plan.compare(
                cfg, facts.load(cfg.base.model), [machines], worlds=[world], lora_targets=lora.targets
            )
            ended = _run(tmp, cfg, world=world, node_ranks=node_ranks)
            for key in _KEYS:
                ratio = _print_row(f"{what} {kind}", shape, key, ended, getattr(before, key))
                worst[key] = max(worst[key], abs(ratio - 1))
            of_before.append(ended.peak_rank_bytes / before.peak_rank_bytes)
            records.append(out, _record(cfg, ended))
    for key, most in worst.items():
        within = MEMORY_WITHIN if key == "peak_rank_bytes" else BYTES_WITHIN
        verdict = "yes" if most <= within else "NO"
        print(f"{key}: within {within:.0%} of the plan: {verdict} (at most {most:.2%} off)")
    low, high = min(of_before), max(of_before)
    print(f"`peftscale plan` takes texts for as long as they may be: measured {low:.2f} to {high:.2f} of its memory")


def _save_data(tmp: Path) -> None:
    """Rows of six reviews, the label of the first and the first words of the last."""
    reviews = cycle([json.loads(line) for line in REVIEWS.read_text().splitlines()])
    for split, num in (("train", 64), ("validation", 4)):
        lines = [json.dumps(row) for row in islice(_rows(reviews), num)]
        (tmp / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _rows(reviews: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    while True:
        some = list(islice(reviews, 6))
        answer = " ".join(some[-1]["text"].split()[:6])
        yield {"text": " ".join(one["text"] for one in some[:-1]), "label": some[0]["label"], "answer": answer}


def _run_file(
    tmp: Path, method: str, kind: str, shape: str, *, sharding: str, compute_dtype: str, checkpoint: bool
) -> RunConfig:
    prefix = {"kind": "prefix", "length": 20, "init": "random"}
    return configio.from_dict(
        {
            "name": f"{method}-{kind}-{shape}",
            "seed": 0,
            "method": method,
            **_METHODS[method],
            "base": {
                "model": str(tmp / "base"),
                "quantization": "none" if method == "full_finetuning" else "nf4",
                "compute_dtype": compute_dtype,
                "sharding": sharding,
                "checkpoint_activations": checkpoint,
            },
            "adapters": {
                "prompt": {"kind": "prompt", "length": 100, "init": "vocabulary"},
                "prefix": prefix,
                "network": {**prefix, "reparam": "mlp", "reparam_hidden_size": 64},
            },
            "task": {
                "name": kind,
                "files": {split: str(tmp / f"{split}.jsonl") for split in ("train", "validation")},
                "input": "Reviews: {{ text }}\nVerdict:",
                "max_text_tokens": 100,
                **_TASKS[kind],
            },
            "train": {
                "steps": 2,
                "examples_per_step": 4,
                "microbatch_tokens": 640,
                "optimizer": "adamw",
                "learning_rate": 0.01,
                "evaluate_every": 2,
                "checkpoint_every": 2,
            },
            "cluster": {"workers": 0, "storage": str(tmp / "runs")},
        }
    )


def _run(tmp: Path, cfg: RunConfig, *, world: int, node_ranks: int) -> RunSummary:
    options: dict[str, Any] = {"start_method": "spawn", "timeout_s": TIMEOUT_S}
    if cfg.method in ("adapters", "few_shot"):  # the others load through transformers, which packs nothing
        # A process of its own: the ranks shall not start with what packing left behind.
        run_ranks(_pack, 1, tmp / f"pack-{cfg.name}", cfg, **options)
    cfg.run_dir.mkdir(parents=True)
    main_of_rank = worker.main if cfg.method == "adapters" else baselines.main
    ended: list[RunSummary] = run_ranks(
        main_of_rank, world, tmp / f"ranks-{cfg.name}", cfg, **options, node_ranks=node_ranks
    )
    return ended[0]


def _pack(cfg: RunConfig) -> None:
    load.open_(cfg.base)


def _print_row(kind: str, shape: str, key: str, ended: RunSummary, before: int) -> float:
    """Print one figure; measured over planned."""
    measured, planned = getattr(ended, key), getattr(ended.predicted, key)
    ratio = measured / planned if planned else float(measured == 0)
    cells = (kind, shape, key, f"{measured:,}", f"{planned:,}", f"{ratio:.3f}", f"{before:,}")
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return ratio


def _record(cfg: RunConfig, ended: RunSummary) -> records.BenchRecord:
    return records.BenchRecord(
        name=f"plan_{cfg.name}",
        config_fingerprint=configio.fingerprint(cfg),
        measured={"world_size": ended.world_size, **{key: getattr(ended, key) for key in _KEYS}},
        planned={key: getattr(ended.predicted, key) for key in _KEYS},
        environment=records.environment(),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
