"""Sentiment, question answering and translation in one batch, with prompts of length 5, 20 and 100, beside each alone.

    python tests/bench/bench_mixed.py --data DIR --bases DIR [--base 5m] [--steps 30] [--examples 16]

SST-2, XQuAD's English questions and the same questions in Romanian, worded as in the catalogue. The prompts are trained
for a few steps of 8 examples each, in one cohort, on the base in float32. Then the first rows of each test split are
evaluated, all in one batch and each adapter by itself. Data and bases are not part of the project: `real_tasks` says
which files it reads. Prints two rows an adapter, the batch beside the adapter alone and, as a control, beside the base
without a prompt: predictions that are the same; the largest difference, in nats, of the likelihood of a label, and of a
token of the target in one pass of the rows of all three. Appends a BenchRecord to bench.jsonl.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import real_tasks
import torch
import typer
from torch import Tensor

import peftscale
from peftscale import catalogue, records
from peftscale.adapters import Folded
from peftscale.base.load import Base
from peftscale.base.passes import target_losses
from peftscale.config import DataFiles, TaskConfig
from peftscale.data import tasks, texts
from peftscale.data.batches import Item, training_items
from peftscale.train import evaluate
from peftscale.train.evaluate import BASE_ALONE, Cell, Evaluation
from peftscale.train.step import rows_of

LENGTHS = {"sst2": 5, "squad": 20, "wmt16_en_ro": 100}
EXAMPLES_PER_STEP = 8
ONE_BATCH = 100_000
"""Tokens of a pass: more than there are."""


def of_task(data: Path, name: str, folder: Path) -> TaskConfig:
    """The catalogue's task over the real data."""
    section = real_tasks.task(data, name, folder)
    files = DataFiles(**{split: Path(path) for split, path in section["files"].items()})
    return catalogue.entries()[name].over(files).model_copy(update=real_tasks.SETTINGS[name])


def trained(base: Base, found: dict[str, TaskConfig], *, steps: int) -> peftscale.Session:
    """A prompt for each task, trained together."""
    prompts = {
        name: peftscale.SoftPromptConfig(kind="prompt", length=LENGTHS[name], init="vocabulary") for name in found
    }
    session = peftscale.Session(base, prompts, optimizer="adafactor", learning_rate=0.3, microbatch_tokens=ONE_BATCH)
    pairs = {
        name: [(text.input, text.target + ("" if task.labels else session.end)) for text in texts.render(task, "train")]
        for name, task in found.items()
    }
    for step in range(steps):
        at = slice(step * EXAMPLES_PER_STEP, (step + 1) * EXAMPLES_PER_STEP)
        losses = session.step({name: of_one[at] for name, of_one in pairs.items()}).losses
        print(f"step {step + 1}/{steps}", *(f"{name} {loss:.3f}" for name, loss in losses.items()), flush=True)
    return session


def token_likelihoods(base: Base, adapters: Mapping[str, Folded], items: Sequence[Item]) -> dict[str, Tensor]:
    """Log-likelihood of the target tokens of each adapter's items, all of them in one pass."""
    with base.evaluating():
        losses_M = target_losses(base, rows_of(items, adapters))
    parts: dict[str, list[Tensor]] = {}
    for item, losses in zip(items, losses_M.split([len(item.target_ids) for item in items]), strict=True):
        parts.setdefault(item.adapter, []).append(-losses)
    return {name: torch.cat(of_adapter) for name, of_adapter in parts.items()}


def differences(one: Evaluation, other: Evaluation) -> dict[str, float]:
    """Predictions that are the same, and the largest difference of the likelihood of a label where there are labels."""
    found: dict[str, float] = {"same": sum(a == b for a, b in zip(one.predictions, other.predictions, strict=True))}
    if one.likelihoods:
        found["label"] = float((torch.tensor(one.likelihoods) - torch.tensor(other.likelihoods)).abs().max())
    return found


def main(
    *,
    data: Annotated[Path, typer.Option(help="Data sets, as `real_tasks` reads them.")],
    bases: Annotated[Path, typer.Option(help="Directories of bases.")],
    base: Annotated[str, typer.Option(help="A name under --bases.")] = "5m",
    steps: Annotated[int, typer.Option(min=1, max=112, help="Of 8 of the 900 questions each.")] = 30,
    examples: Annotated[int, typer.Option(min=1, max=190, help="Of each test split.")] = 16,
) -> None:
    """Train, evaluate together and alone, print, record."""
    loaded = peftscale.load_base(bases / base, quantization="none", compute_dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: of_task(data, name, Path(folder)) for name in LENGTHS}
        session = trained(loaded, found, steps=steps)
        cells = {}
        for name, task in found.items():
            test = tasks.load(task, loaded.tokenizer, max_tokens=loaded.room(LENGTHS[name]), splits=("test",))
            cells[name] = Cell(name, test, test.test[:examples], task.metrics)
    adapters = {name: adapter.folded() for name, adapter in session.cohort.items()}
    together = evaluate.run_cells(loaded, adapters, list(cells.values()), microbatch_tokens=ONE_BATCH)
    items = {name: training_items(name, LENGTHS[name], cell.examples) for name, cell in cells.items()}
    mixed = [item for of_place in zip(*items.values(), strict=True) for item in of_place]  # adapters alternate
    in_batch = token_likelihoods(loaded, adapters, mixed)
    print("| adapter | beside | examples | same predictions | label, nats | target token, nats |")
    print("|---|---|---|---|---|---|")
    measured: dict[str, float] = {}
    for (name, cell), result in zip(cells.items(), together, strict=True):
        for beside, adapter, length in (("alone", name, LENGTHS[name]), ("without", BASE_ALONE, 0)):
            other_cell = Cell(adapter, cell.task, cell.examples, ())
            (other,) = evaluate.run_cells(loaded, adapters, [other_cell], microbatch_tokens=ONE_BATCH)
            own = token_likelihoods(loaded, adapters, training_items(adapter, length, cell.examples))[adapter]
            found = differences(result, other) | {"token": float((in_batch[name] - own).abs().max())}
            label = f"{found['label']:.1e}" if "label" in found else ""
            counts = f"{len(cell.examples)} | {found['same']:.0f}"
            print(f"| {name}, {LENGTHS[name]} | {beside} | {counts} | {label} | {found['token']:.1e} |", flush=True)
            measured |= {f"{name}_{beside}_{what}": value for what, value in found.items()}
    record = records.BenchRecord(
        name=f"mixed {base}",
        config_fingerprint=None,
        measured=measured,
        environment=records.environment(),
    )
    records.append(Path("bench.jsonl"), record)


if __name__ == "__main__":
    typer.run(main)
