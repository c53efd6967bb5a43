"""Promise 13: ranks with unequal shares end together, and with the results of one rank.

Seven examples on three ranks, from one word to nearly all positions of the base, so that the last passes are empty on
some ranks; five to classify; five to continue, of which one has room for a single token, one ends early and others
write forty. A rank that made one gather too few or too many would let the others wait until the harness's time-out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks

from peftscale import adapters
from peftscale.adapters import Cohort
from peftscale.base import load, padded
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import plan_passes, training_items
from peftscale.data.tasks import TaskData
from peftscale.train import evaluate, setup, step

pytestmark = pytest.mark.ranks

TWO: dict[str, dict[str, Any]] = {
    "mood": {"kind": "prompt", "length": 5, "init": "vocabulary"},
    "tone": {"kind": "prompt", "length": 3, "init": "random"},
}
MICROBATCH_TOKENS = 40
MAX_TOKENS = 128 - 5
NEW_TOKENS = 40
_LONG = "The plot falls apart after ten minutes and nobody seems to care about it at all"
SEVEN = [  # 8, 100, 9, 23, 43, 13 and 9 tokens
    ("Dull", "bad"),
    (" and ".join([_LONG] * 5), "bad"),
    ("Lovely", "good"),
    ("Bright, quick and funny from the first minute to the very last one of it", "good"),
    (" and ".join([_LONG] * 2), "bad"),
    ("A slow story with flat people", "bad"),
    ("Again", "good"),
]


def _run_config(tmp: Path, base: Path, **changes: Any) -> RunConfig:
    files = {
        "train": str(tiny.save_reviews(tmp / "seven", SEVEN)),
        "validation": str(tiny.save_reviews(tmp / "five", SEVEN[:5])),
    }
    return tiny.run_config(tmp, base=base, adapters=TWO, **{"task.files": files, **changes})


def _load(cfg: RunConfig, sharding: Any) -> Base:
    return load.load(cfg.base, sharding=sharding, device=torch.device("cpu"))


def _all(choosing: Sequence[RunConfig], writing: RunConfig, sharding: str, end_id: int) -> dict[str, Any]:
    return {"chosen": [_choose(cfg, sharding) for cfg in choosing], "written": _write(writing, sharding, end_id)}


def _choose(cfg: RunConfig, sharding: str) -> dict[str, Any]:
    """Loss and gradient of the seven examples, labels of the five, and the gradient once more."""
    base = _load(cfg, sharding)
    setup.choose_packing(cfg, base)
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=MAX_TOKENS)
    items = [i for name, adapter in cohort.items() for i in training_items(name, adapter.length, task.train)]
    found: dict[str, Any] = {"losses": [], "gradients": []}

    def compute_gradient() -> None:
        for adapter in cohort.values():
            adapter.rows_PH.grad = None
        losses = step.gradient(base, cohort, items, microbatch_tokens=MICROBATCH_TOKENS)
        found["losses"].append({name: float(loss) for name, loss in losses.items()})
        found["gradients"].append({name: adapter.rows_PH.grad for name, adapter in cohort.items()})

    compute_gradient()
    results = evaluate.run(
        base,
        cohort,
        task,
        task.validation,
        metrics=("accuracy",),
        microbatch_tokens=MICROBATCH_TOKENS,
        with_base_alone=True,
    )
    found["predictions"] = {name: result.predictions for name, result in results.items()}
    found["metrics"] = {name: result.metrics for name, result in results.items()}
    compute_gradient()
    return found


def _write(cfg: RunConfig, sharding: str, end_id: int) -> list[tuple[int, ...] | tuple[str, ...]]:
    """What is written behind the five, in one pass of all rows and in passes of few."""
    base = _load(cfg, sharding)
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(end_id)
    cohort, task = adapters.build(cfg, base), _task_with_one_short_row(cfg, base)
    alone = {"mood": cohort["mood"]}  # rows of one example side by side would all end together
    return [
        evaluate.run(base, alone, task, task.validation, metrics=("exact_match",), microbatch_tokens=tokens)[
            "mood"
        ].predictions
        for tokens in (4096, MICROBATCH_TOKENS)
    ]


def _task_with_one_short_row(cfg: RunConfig, base: Base) -> TaskData:
    """The longest example has room for one token, all others for forty."""
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=MAX_TOKENS)
    longest = max(len(example.input_ids) for example in task.validation)
    base.model.config.max_position_embeddings = TWO["mood"]["length"] + longest + 1
    num_new = [task.num_new_tokens(example, room=longest + 1) for example in task.validation]
    assert sorted(num_new) == [1, *[NEW_TOKENS] * 4]
    return task


def _early_end(cfg: RunConfig) -> int:
    """A token that one of the rows writes after a few others, and another row never."""
    base = _load(cfg, "replicated")
    cohort: Cohort = adapters.build(cfg, base)
    task = _task_with_one_short_row(cfg, base)
    base.eval()
    rows = [Row(cohort["mood"].rows_PH, example.input_ids, 0) for example in task.validation if example.index != 1]
    written = padded.generate(base, rows, max_new_tokens=NEW_TOKENS)
    ends = [
        token
        for ids in written
        for at, token in enumerate(ids[:10])
        if at >= 3 and token not in ids[:at] and any(token not in other for other in written)
    ]
    assert ends
    return ends[0]


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_three_ranks_with_unequal_shares_end_and_give_the_results_of_one(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    base = tiny.save_base(tmp_path / "base", config)
    one_token = _run_config(tmp_path, base)
    several = _run_config(
        tmp_path,
        base,
        **{"task.labels": {"bad": " not good at all", "good": " good"}, "train.packing": "off"},
    )
    writing = _run_config(
        tmp_path,
        base,
        **{"task.labels": None, "task.metrics": ["exact_match"], "task.max_target_tokens": NEW_TOKENS},
    )
    end_id = _early_end(writing)
    want = _all([one_token, several], writing, "replicated", end_id)
    assert want["written"][0] == want["written"][1]
    for got in run_ranks(_all, 3, tmp_path / "ranks", [one_token, several], writing, "world", end_id):
        assert got["written"] == want["written"]
        for mine, alone in zip(got["chosen"], want["chosen"], strict=True):
            assert mine["predictions"] == alone["predictions"] and mine["metrics"] == alone["metrics"]
            for after in (0, 1):  # before and after an evaluation
                assert mine["losses"][after] == pytest.approx(alone["losses"][after], rel=1e-6)
                for name in TWO:
                    grad, grad_alone = mine["gradients"][after][name], alone["gradients"][after][name]
                    assert float((grad - grad_alone).norm() / grad_alone.norm()) < 3e-6  # measured 8.8e-7


def test_the_shares_are_as_unequal_as_the_test_above_needs_them(tmp_path: Path) -> None:
    cfg = _run_config(tmp_path, tiny.save_base(tmp_path / "base"))
    base = _load(cfg, "replicated")
    train = tasks.load(cfg.task, base.tokenizer, max_tokens=MAX_TOKENS).train
    assert sorted(len(example.input_ids) for example in train) == [8, 9, 9, 13, 23, 43, 100]
    items = [i for name, adapter in TWO.items() for i in training_items(name, adapter["length"], train)]
    shares = plan_passes(items, world=3, microbatch_tokens=MICROBATCH_TOKENS)
    rows = [[len(of_pass) for of_pass in of_rank] for of_rank in shares]
    assert len({len(of_rank) for of_rank in rows}) == 1 and len({sum(of_rank) for of_rank in rows}) > 1
    assert min(min(of_rank) for of_rank in rows) == 0
