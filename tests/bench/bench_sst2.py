"""Accuracy of tuned prompts on SST-2 beside the untuned base: lengths 20 and 100, three seeds each, one cohort.

    python tests/bench/bench_sst2.py DIRECTORY [key=value ...]

DIRECTORY holds stsa.binary.train, .dev and .test: lines of a label, 0 or 1, a blank, and the sentence. The data is not
part of the project; without it the benchmark says so and ends. Prints a row a length, mean and standard deviation
over seeds, with the 95% Wilson interval of the untuned base, and appends one BenchRecord to bench.jsonl.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from peftscale import configio, driver, records
from peftscale.data.metrics import share_interval

ROOT = Path(__file__).parents[2]
LENGTHS, SEEDS = (20, 100), (0, 1, 2)


def convert(source: Path, target: Path) -> int:
    """Write one split as jsonl; return its number of sentences."""
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [{"label": line[0], "text": line[2:].strip()} for line in lines if line.strip()]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def run_file(folder: Path) -> Path:
    """The run: a cohort of six prompts over the quickstart's base."""
    adapters = {
        f"p{length}s{seed}": {"kind": "prompt", "length": length, "init": "vocabulary", "seed": seed}
        for length in LENGTHS
        for seed in SEEDS
    }
    content = {
        "name": "sst2",
        "seed": 0,
        "base": {
            "model": str(ROOT / "configs" / "quickstart" / "base"),
            "quantization": "nf4",
            "compute_dtype": "float32",
            "sharding": "replicated",
            "checkpoint_activations": False,
        },
        "adapters": adapters,
        "task": {
            "name": "sst2",
            "files": {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
            "input": "{{ text }}\nRating:",
            "target": "{{ label }}",
            "labels": {"0": " bad", "1": " good"},
            "metrics": ["accuracy"],
        },
        "train": {
            "steps": 300,
            "examples_per_step": 32,
            "microbatch_tokens": 4096,
            "optimizer": "adafactor",
            "learning_rate": 0.3,
            "evaluate_every": 100,
            "checkpoint_every": 100,
        },
        "cluster": {"workers": 2, "storage": "runs"},
    }
    path = folder / "sst2.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def main(data: Path, changes: list[str], out: Path) -> None:
    """Train, score on the test split, print, record."""
    if not (data / "stsa.binary.train").exists():
        print(f"skipped: {data} has no stsa.binary.train; the data is not part of the project")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = {"train": "train", "dev": "validation", "test": "test"}
        counts = {
            split: convert(data / f"stsa.binary.{name}", folder / f"{split}.jsonl") for name, split in names.items()
        }
        cfg = configio.load(run_file(folder), changes)
        summary = driver.run(cfg)
    before = next(iter(summary.adapters.values())).before["accuracy"]
    low, high = share_interval(before, counts["test"])
    measured = {"untuned_accuracy": before, "seconds": summary.seconds}
    print(f"{counts} untuned {before:.4f} (95% {low:.4f}..{high:.4f}), {summary.seconds:.0f} s")
    for length in LENGTHS:
        found = [a.after["accuracy"] for name, a in summary.adapters.items() if name.startswith(f"p{length}s")]
        mean, deviation = statistics.mean(found), statistics.stdev(found)
        measured |= {f"length_{length}_mean": mean, f"length_{length}_deviation": deviation}
        print(f"length {length:3d}: {mean:.4f} +- {deviation:.4f}  seeds {', '.join(f'{x:.4f}' for x in found)}")
    record = records.BenchRecord(
        name="sst2",
        config_fingerprint=configio.fingerprint(cfg),
        measured=measured,
        environment=records.environment(),
    )
    records.append(out, record)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/sst2"), sys.argv[2:], Path("bench.jsonl"))
