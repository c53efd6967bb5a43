"""The numbers of a Python session are those of a run file, bitwise, on one rank and on two; ranks that disagree end."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import run_ranks

import peftscale
from peftscale import records
from peftscale.adapters import files
from peftscale.config import AdapterTrainConfig, PrefixConfig, RunConfig, SoftPromptConfig
from peftscale.data.batches import Cursor
from peftscale.errors import DataError, PeftscaleError
from peftscale.records import StepRecord
from peftscale.session import Session
from peftscale.train import comm, worker

pytestmark = pytest.mark.ranks

OWN = {"learning_rate": 0.03, "optimizer": "adafactor", "schedule": "linear", "warmup_steps": 2, "clip_norm": 0.1}
ADAPTERS = {
    "mood": {"kind": "prompt", "length": 5, "init": "vocabulary"},
    "tone": {"kind": "prompt", "length": 3, "init": "labels", "init_labels": [" bad"], "seed": 8, "train": OWN},
    "deep": {"kind": "prefix", "length": 2, "init": "random", "reparam": "mlp", "reparam_hidden_size": 12},
}
CONFIGS: dict[str, SoftPromptConfig | PrefixConfig] = {
    "mood": SoftPromptConfig(kind="prompt", length=5, init="vocabulary"),
    "tone": SoftPromptConfig(
        kind="prompt", length=3, init="labels", init_labels=(" bad",), seed=8, train=AdapterTrainConfig(**OWN)
    ),
    "deep": PrefixConfig(kind="prefix", length=2, init="random", reparam="mlp", reparam_hidden_size=12),
}
PAIRS = [(f"{text}\nVerdict:", f" {label}") for text, label in tiny.REVIEWS]


def _open(cfg: RunConfig) -> Session:
    base = peftscale.load_base(
        cfg.base.model, quantization="nf4", compute_dtype="float32", sharding="world", checkpoint_activations=True
    )
    assert base.is_sharded == (comm.world_size() > 1)
    return Session(base, CONFIGS, optimizer="adamw", learning_rate=0.01, steps=6, seed=3, microbatch_tokens=64)


def _both(cfg: RunConfig, place: Path) -> dict[str, Any]:
    """The run of a file, and a loop over the same reviews in the same order."""
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    worker.main(cfg)
    with peftscale.ranks():
        session, losses = _open(cfg), []
        cursors = {name: Cursor(cfg.adapter_seed(name)) for name in CONFIGS}
        for _ in range(cfg.train.steps):
            batch = {}
            for name in reversed(CONFIGS):  # the order of a batch changes nothing
                at, cursors[name] = cursors[name].take(cfg.train.examples_per_step, num_examples=len(PAIRS))
                batch[name] = [PAIRS[i] for i in at]
            losses.append(session.step(batch).losses)
        answers = session.choose("tone", [text for text, _ in PAIRS], [" bad", " good"])
        scores = session.score({"deep": PAIRS, "mood": PAIRS[:1]})
        session.save(place)
    return {"losses": losses, "answers": answers, "scores": scores}


@pytest.mark.parametrize("world", [1, 2])
def test_a_session_gives_bitwise_the_losses_and_the_files_of_a_run(tmp_path: Path, world: int) -> None:
    changes = {"train.steps": 6, "train.evaluate_every": 4, "base.checkpoint_activations": True}
    cfg = tiny.run_config(tmp_path, adapters=ADAPTERS, **changes)
    results = run_ranks(_both, world, tmp_path / "ranks", cfg, tmp_path / "mine")
    of_run = [row.adapters for row in records.read(cfg.metrics_path) if isinstance(row, StepRecord)]
    assert len({row["mood"] for row in of_run}) == 6 and all(result == results[0] for result in results)
    assert results[0]["losses"] == of_run
    assert len(set(results[0]["answers"])) <= 2 and len(results[0]["scores"]["deep"]) == len(PAIRS)
    for name in CONFIGS:
        places = tmp_path / "mine" / name, cfg.adapters_dir / name / "last"
        ours, theirs = ((place / "adapter_model.safetensors").read_bytes() for place in places)
        assert ours == theirs
        manifests = [files.verify(place) for place in places]
        shared = [m and (m.base, m.init, m.start, m.step, m.length, m.prefix) for m in manifests]
        assert shared[0] == shared[1] is not None


def _disagree(cfg: RunConfig) -> list[Any]:
    """What each rank is told when one has another seed, another adapter, other texts, or what cannot be used; and then
    all agree."""
    found: list[Any] = []
    session, rank = _open(cfg), comm.rank()
    lost = SoftPromptConfig(kind="prompt", length=5, init="adapter", init_adapter=Path("/nowhere"))
    there = SoftPromptConfig(kind="prompt", length=5, init="random")
    for adapter, seed in ((there, rank // 2), (there if rank else lost, 0), (lost, 0)):
        try:
            Session(session.base, {"mood": adapter}, optimizer="adamw", learning_rate=0.1, seed=seed)
        except PeftscaleError as error:
            found.append(f"{type(error).__name__}: {error}")
    for batch in ({"mood": PAIRS[: rank + 1]}, {"mood": PAIRS if rank == 1 else []}, {"mood": PAIRS}):
        try:
            found.append(session.step(batch).losses["mood"])
        except DataError as error:
            found.append(str(error))
    # Marks of three ranks may lie so that one of them is their mean: it must notice too.
    return [
        *found,
        session.num_steps,
        comm.is_same(b"a"),
        comm.is_same(bytes([rank])),
        comm.is_same(bytes([rank // 2])),
    ]


def test_ranks_that_were_given_different_texts_are_told_and_none_waits(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path)
    results = run_ranks(_disagree, 3, tmp_path / "ranks", cfg)
    for rank, (seeds, one, lost, other, unusable, loss, *rest) in enumerate(results):
        given = f"DataError: rank {rank} was given something else than another rank."
        assert seeds.startswith(given) and one.startswith(given)
        assert lost.startswith("AdapterError: adapters.mood.init_adapter: ")
        assert other.startswith(f"rank {rank} was given something else than another rank.")
        assert unusable.startswith("rank 1 was given" if rank == 1 else "batch['mood']: must be a list of at least one")
        assert loss == results[0][5] > 0
        assert rest == [1, True, False, False]
