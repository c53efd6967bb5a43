"""Several tasks and adapters in the same passes of a sharded base: two ranks find what one finds."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale.adapters import SoftPrompt
from peftscale.base import load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.train import comm, evaluate, setup
from peftscale.train.evaluate import BASE_ALONE, Cell, Evaluation

pytestmark = pytest.mark.ranks

LENGTHS = {"five": 5, "twenty": 20}


def _config(tmp: Path) -> RunConfig:
    data = tiny.save_reviews(tmp / "data")
    titles = tmp / "titles.jsonl"
    titles.write_text(
        "".join(json.dumps({"text": text, "title": text.split()[0]}) + "\n" for text, _ in tiny.REVIEWS[:3])
    )
    task: dict[str, Any] = {
        "name": "titles",
        "files": dict.fromkeys(("train", "validation"), str(titles)),
        "input": "{{ text }}\nTitle:",
        "target": " {{ title }}",
        "metrics": ["exact_match"],
        "max_target_tokens": 5,
    }
    adapters = {name: {"kind": "prompt", "length": length, "init": "random"} for name, length in LENGTHS.items()}
    adapters["twenty"]["task"] = task
    files = dict.fromkeys(("train", "validation"), str(data))
    return tiny.run_config(tmp, adapters=adapters, **{"task.files": files, "base.quantization": "none"})


def _found(cfg: RunConfig) -> list[Evaluation]:
    """Both adapters and the base alone on both tasks, in passes of at most 64 tokens."""
    base: Base = setup.load_base(cfg.base, setup.make_plan(cfg, torch.device("cpu")), torch.device("cpu"))
    setup.choose_packing(cfg, base)
    assert base.is_packed
    torch.manual_seed(0)
    adapters = {name: SoftPrompt(torch.randn(length, 64)) for name, length in LENGTHS.items()}
    cells = []
    for name in LENGTHS:
        of_task = cfg.adapter_task(name)
        task = tasks.load(of_task, base.tokenizer, max_tokens=100)
        cells += [Cell(one, task, task.validation, of_task.metrics) for one in (BASE_ALONE, *adapters)]
    return evaluate.run_cells(base, adapters, cells, microbatch_tokens=64)


def _work(cfg: RunConfig) -> list[tuple[Any, ...]]:
    assert comm.world_size() in (1, 2)
    return [(one.metrics, one.predictions, one.likelihoods) for one in _found(cfg)]


def test_two_ranks_find_on_every_task_what_one_finds(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    load.open_(cfg.base)  # packed once, for both
    (one,) = run_ranks(_work, 1, tmp_path / "one", cfg)
    two, other = run_ranks(_work, 2, tmp_path / "two", cfg)
    assert two == other
    assert len(one) == len(two) == 6
    for (metrics, predictions, likelihoods), found in zip(one, two, strict=True):
        assert found[:2] == (metrics, predictions)
        torch.testing.assert_close(
            torch.tensor(found[2]), torch.tensor(likelihoods), rtol=0, atol=5e-6
        )  # float32 order; measured 0
    assert len({predictions for _, predictions, _ in one}) >= 4  # adapters and tasks could be mixed up
