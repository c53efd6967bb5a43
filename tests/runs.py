"""What runs left behind, for tests that compare them: every step that was taken, in order, and where adapters ended."""

import hashlib
import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftscale import records
from peftscale.adapters import initialisation
from peftscale.config import RunConfig
from peftscale.records import NoteRecord, StepRecord


def steps(cfg: RunConfig) -> list[StepRecord]:
    """Every step that the run has taken so far, repeated ones too."""
    return [row for row in _rows(cfg) if isinstance(row, StepRecord)]


def notes(cfg: RunConfig) -> list[str]:
    """What it said to whoever watched."""
    return [row.text for row in _rows(cfg) if isinstance(row, NoteRecord)]


def _rows(cfg: RunConfig) -> list[records.Record]:
    return list(records.read(cfg.metrics_path)) if cfg.metrics_path.exists() else []


def repeated(cfg: RunConfig) -> list[int]:
    """Steps that were taken again, for each time that the run went back."""
    taken = [row.step for row in steps(cfg)]
    return [before - after + 1 for before, after in itertools.pairwise(taken) if after <= before]


def texts(cfg: RunConfig) -> list[int]:
    """Of a run that ended, the checksum of the examples of each step, once none is found skipped or repeated.

    A step that was taken again after a failure had the same examples each time, or this fails.
    """
    taken: dict[int, tuple[dict[str, int], int]] = {}
    for row in steps(cfg):
        assert taken.setdefault(row.step, (row.examples, row.texts_crc32)) == (row.examples, row.texts_crc32), row.step
    assert sorted(taken) == list(range(1, cfg.num_steps + 1))
    for step, (examples, _) in taken.items():
        assert examples == {name: step * cfg.adapter_train(name).examples_per_step for name in cfg.adapters}, step
    return [taken[step][1] for step in sorted(taken)]


def losses(cfg: RunConfig) -> list[dict[str, float]]:
    """By step, as it was taken the last time."""
    last = {row.step: row.adapters for row in steps(cfg)}
    return [last[step] for step in sorted(last)]


def ends(cfg: RunConfig) -> dict[str, str]:
    """The digest of each adapter file."""
    return {
        str(path.parent.relative_to(cfg.adapters_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cfg.adapters_dir.glob("*/*/adapter_model.safetensors"))
    }


def apart(cfg: RunConfig, other: RunConfig, name: str) -> float:
    """How far two prompts with the same random start ended from each other, over the distance that one moved."""
    end_PH, other_PH = _rows_of(cfg.adapters_dir / name / "last"), _rows_of(other.adapters_dir / name / "last")
    assert cfg.adapters[name] == other.adapters[name] and cfg.adapters[name].init == "random"
    start_PH = initialisation.random_rows(*end_PH.shape, seed=cfg.adapter_seed(name))
    return float((end_PH - other_PH).norm() / (end_PH - start_PH).norm())


def _rows_of(directory: Path) -> Tensor:
    (rows_PH,) = load_file(directory / "adapter_model.safetensors").values()
    assert rows_PH.dtype == torch.float32
    return rows_PH
