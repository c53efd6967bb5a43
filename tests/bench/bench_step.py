"""One training step of ours beside one of PEFT's prompt tuning: the same base, the same real examples, one run.

    python tests/bench/bench_step.py [SST2_DIRECTORY IMDB_JSONL_GZ]

Base: a random float32 Llama (hidden 512, 8 layers, grouped heads) with a head of 32,000 rows, not quantised, so that
both sides multiply the same matrices. A step is forward and backward of one batch: SST-2 with 32 examples, IMDB with 8
of up to 512 tokens, prompts of 20 and 100 tokens. Sides take turns in one process; medians of 7 after one untimed turn.
Peak memory is measured in a process of its own for each side. Prints a table and appends one BenchRecord a row. The
data sets are not part of the project: without them the benchmark says so and ends.
"""

import gzip
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from peftscale import records
from peftscale.adapters import Cohort, SoftPrompt
from peftscale.base import load
from peftscale.base.load import Base
from peftscale.config import BaseConfig
from peftscale.data.batches import training_items
from peftscale.data.tasks import Example
from peftscale.train import memory, setup, step

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "configs" / "quickstart" / "base"
NUM_TURNS = 7
CASES = (("sst2", 32, 100), ("sst2", 32, 20), ("imdb", 8, 100), ("imdb", 8, 20))
MAX_TOKENS = 512


def save_base(directory: Path) -> Path:
    """A random base with the quickstart's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TOKENIZER / name).read_bytes())
    return directory


def read_texts(sst2: Path, imdb: Path) -> dict[str, list[tuple[str, str]]]:
    """(input, target) of the first examples of both sets, in their order."""
    lines = (sst2 / "stsa.binary.train").read_text(errors="replace").splitlines()[:256]
    with gzip.open(imdb, "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(64), strict=False)]
    words = {"0": " bad", "1": " good"}
    return {
        "sst2": [(f"{line[2:].strip()}\nRating:", words[line[0]]) for line in lines],
        "imdb": [(f"{row['text']}\nRating:", words[str(row["label"])]) for row in rows],
    }


def batch(base: Base, texts: list[tuple[str, str]], size: int) -> list[Example]:
    """The first `size` examples; inputs longer than MAX_TOKENS lose their first tokens."""
    examples = []
    for i, (text, target) in enumerate(texts[:size]):
        ids = base.tokenizer(text)["input_ids"][-MAX_TOKENS + 1 :]
        examples.append(Example(i, tuple(ids), tuple(base.tokenizer(target)["input_ids"]), None, target))
    return examples


def ours(base: Base, examples: list[Example], length: int) -> Callable[[], torch.Tensor]:
    """A step through the training path; returns the prompt's gradient."""
    rows = torch.rand(length, base.hidden_size, generator=torch.Generator().manual_seed(1)) - 0.5
    cohort = Cohort({"p": SoftPrompt(rows)})
    items = training_items("p", length, examples)

    def run() -> torch.Tensor:
        cohort["p"].rows_PH.grad = None
        step.gradient(base, cohort, items, microbatch_tokens=10**9)
        grad = cohort["p"].rows_PH.grad
        assert grad is not None
        return grad

    return run


def pefts(directory: Path, base: Base, examples: list[Example], length: int) -> Callable[[], torch.Tensor]:
    """A step of PEFT's prompt tuning on the same padded batch."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    weight = next(p for p in tuned.parameters() if p.requires_grad)
    rows = torch.rand(length, base.hidden_size, generator=torch.Generator().manual_seed(1)) - 0.5
    weight.data.copy_(rows)
    texts = [[*e.input_ids, *e.target_ids] for e in examples]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    labels = torch.full_like(ids, -100)
    for i, (text, example) in enumerate(zip(texts, examples, strict=True)):
        labels[i, len(text) - len(example.target_ids) : len(text)] = torch.tensor(example.target_ids)

    def run() -> torch.Tensor:
        weight.grad = None
        tuned(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return weight.grad

    return run


def _open(directory: Path) -> Base:
    cfg = BaseConfig(
        model=str(directory),
        quantization="none",
        compute_dtype="float32",
        sharding="replicated",
        checkpoint_activations=False,
    )
    base = load.load(cfg, sharding="replicated", device=torch.device("cpu"))
    assert setup.pack_where_exact(base) is None
    return base


def _peak(side: str, directory: Path, texts: list[tuple[str, str]], size: int, length: int, out: str) -> None:
    """In a process of its own: peak private memory of two steps over that before them."""
    base = _open(directory)
    examples = batch(base, texts, size)
    run = ours(base, examples, length) if side == "ours" else pefts(directory, base, examples, length)
    with memory.measured(torch.device("cpu")) as peak:
        run()
        run()
        Path(out).write_text(str(peak.peak_bytes()))


def peak_bytes(side: str, directory: Path, texts: list[tuple[str, str]], size: int, length: int) -> int:
    """Measure one side alone."""
    out = directory / f"peak-{side}"
    process = multiprocessing.get_context("spawn").Process(
        target=_peak, args=(side, directory, texts, size, length, str(out))
    )
    process.start()
    process.join()
    return int(out.read_text())


def main(sst2: Path, imdb: Path, out: Path) -> None:
    """Every case: times, ratio, gradient difference, memory."""
    if not (sst2 / "stsa.binary.train").exists() or not imdb.exists():
        print(f"skipped: no {sst2}/stsa.binary.train or no {imdb}; the data is not part of the project")
        return
    print("| data | examples | length | ours s | PEFT s | ratio | ours MB | PEFT MB | gradient difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        directory, texts = save_base(Path(temporary) / "base"), read_texts(sst2, imdb)
        base = _open(directory)
        for name, size, length in CASES:
            examples = batch(base, texts[name], size)
            sides = {"ours": ours(base, examples, length), "peft": pefts(directory, base, examples, length)}
            grads = {side: run().clone() for side, run in sides.items()}
            error = float((grads["ours"] - grads["peft"]).norm() / grads["peft"].norm())
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(NUM_TURNS):
                for side, run in sides.items():
                    start = time.perf_counter()
                    run()
                    seconds[side].append(time.perf_counter() - start)
            middle = {side: statistics.median(values) for side, values in seconds.items()}
            peak = {side: peak_bytes(side, directory, texts[name], size, length) for side in sides}
            ratio = middle["peft"] / middle["ours"]
            print(
                f"| {name} | {size} | {length} | {middle['ours']:.3f} | {middle['peft']:.3f} | {ratio:.2f} | "
                f"{peak['ours'] / 1e6:.0f} | {peak['peft'] / 1e6:.0f} | {error:.1e} |",
                flush=True,
            )
            measured = {"ours_s": middle["ours"], "peft_s": middle["peft"], "ratio": ratio, "gradient_error": error}
            measured |= {"ours_peak_bytes": peak["ours"], "peft_peak_bytes": peak["peft"]}
            record = records.BenchRecord(
                name=f"step-{name}-{length}",
                config_fingerprint=None,
                measured=measured,
                environment=records.environment(),
            )
            records.append(out, record)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:3]]
    main(*(given or [Path("data/sst2"), Path("data/imdb_train.jsonl.gz")]), Path("bench.jsonl"))
