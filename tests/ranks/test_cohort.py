"""Promise 5 and 13 for cohorts: each adapter ends where it would have ended alone, and leaves without a trace."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from torch import Tensor

from peftscale import adapters, records
from peftscale.adapters import Cohort, files
from peftscale.base import load
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.errors import TrainingError
from peftscale.records import NoteRecord, RunSummary, StepRecord
from peftscale.train import memory, setup, step, worker

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
PROMPT = {"kind": "prompt", "init": "vocabulary"}
NUM_STEPS = 20


def _four(tmp: Path) -> dict[str, Any]:
    """Another length, seed, start, rate, optimizer, number of steps, task and batch size for each."""
    data = str(tiny.save_reviews(tmp / "other", [(text, "no" if label == "bad" else "yes") for text, label in REVIEWS]))
    other = {
        "name": "others",
        "files": {"train": data, "validation": data},
        "input": "Shall I see it? {{ text }} Answer:",
        "target": "{{ label }}",
        "labels": {"no": " no", "yes": " yes of course"},
        "metrics": ["macro_f1"],
    }
    adafactor = {"optimizer": "adafactor", "learning_rate": 0.03, "weight_decay": 1e-5, "examples_per_step": 3}
    short = {"steps": 12, "schedule": "linear", "warmup_steps": 4, "clip_norm": 0.1, "evaluate_every": 6}
    return {
        "mood": {**PROMPT, "length": 5, "seed": 0},
        "tone": {**PROMPT, "length": 3, "init": "random", "seed": 1, "train": adafactor},
        "view": {**PROMPT, "length": 9, "init": "labels", "init_labels": [" no", " yes"], "task": other},
        "wish": {**PROMPT, "length": 2, "init": "text", "init_text": "Rate it", "train": short},
    }


REVIEWS = tiny.REVIEWS[:5]


def _config(tmp: Path, name: str, some: dict[str, Any], **changes: Any) -> RunConfig:
    settings = {"train.steps": NUM_STEPS, "train.evaluate_every": 20, "train.checkpoint_every": 100, **changes}
    settings.setdefault("train.microbatch_tokens", 200)
    return tiny.run_config(tmp, **{"name": name, "adapters": some, **settings})


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _gradients(cfg: RunConfig) -> dict[str, float]:
    """Largest relative error of an adapter's gradient in the cohort against its gradient alone."""
    base = load.load(cfg.base, sharding="world", device=CPU)
    setup.choose_packing(cfg, base)
    assert base.is_packed == (cfg.train.packing == "auto")
    cohort = adapters.build(cfg, base)
    data = {name: tasks.load(cfg.adapter_task(name), base.tokenizer, max_tokens=100).train for name in cohort}
    items = {
        name: training_items(name, a.length, data[name][: cfg.adapter_train(name).examples_per_step])
        for name, a in cohort.items()
    }
    tokens = cfg.train.microbatch_tokens
    losses = step.gradient(base, cohort, [i for of_one in items.values() for i in of_one], microbatch_tokens=tokens)
    together = {name: _take_gradient(adapter) for name, adapter in cohort.items()}
    errors = {}
    for name, adapter in cohort.items():
        alone = step.gradient(base, Cohort({name: adapter}), items[name], microbatch_tokens=tokens)
        assert float(losses[name]) == pytest.approx(float(alone[name]), rel=1e-6)
        errors[name] = _error(together[name], _take_gradient(adapter))
    return errors


def _take_gradient(adapter: torch.nn.Module) -> Tensor:
    (rows_PH,) = adapter.parameters()
    assert rows_PH.grad is not None
    grad, rows_PH.grad = rows_PH.grad.clone(), None
    return grad


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_of_an_adapter_in_a_cohort_is_its_gradient_alone(tmp_path: Path, packing: str, world: int) -> None:
    cfg = _config(tmp_path, "four", _four(tmp_path), **{"train.packing": packing})
    for errors in run_ranks(_gradients, world, tmp_path / "ranks", cfg):
        assert max(errors.values()) < 2e-6, errors  # float32 order of sums; measured up to 1.32e-6


def _train(cfgs: list[RunConfig]) -> list[RunSummary]:
    found = []
    for cfg in cfgs:
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        found.append(worker.main(cfg))
    return found


def _rows(cfg: RunConfig, name: str, which: str = "last") -> Tensor:
    return files.read(cfg.run_dir / "adapters" / name / which).adapter.values.detach()


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("world", [1, 2])
def test_after_twenty_steps_each_adapter_is_where_it_would_be_alone(tmp_path: Path, packing: str, world: int) -> None:
    """Rates: 0.01 with AdamW, 0.03 with Adafactor; 12 steps for one of them."""
    four = _four(tmp_path)
    cohort = _config(tmp_path, "four", four, **{"train.packing": packing})
    alone = {name: _config(tmp_path, name, {name: four[name]}, **{"train.packing": packing}) for name in four}
    at_start = {name: {**a, "train": {"steps": 1, "learning_rate": 1e-30}} for name, a in four.items()}
    still = _config(tmp_path, "still", at_start)
    (summary, *_), *_ = run_ranks(_train, world, tmp_path / "ranks", [cohort, *alone.values(), still])
    errors = {}
    for name in four:
        start, together, single = (_rows(cfg, name) for cfg in (still, cohort, alone[name]))
        errors[name] = float((together - single).norm() / (single - start).norm())
        assert summary.adapters[name].steps == (12 if name == "wish" else NUM_STEPS)
        assert summary.adapters[name].stopped is None
    assert max(errors.values()) < 1e-5, errors  # measured up to 1.2e-6
    assert summary.steps == NUM_STEPS
    notes = [row.text for row in records.read(cohort.run_dir / "metrics.jsonl") if isinstance(row, NoteRecord)]
    assert [text for text in notes if "done" in text] == ["wish is done at step 12: it has taken its 12 steps"]


def test_another_seed_would_be_seen(tmp_path: Path) -> None:
    """Negative control of the two tests above: other examples move an adapter elsewhere by far more."""
    text = {"kind": "prompt", "length": 5, "init": "text", "init_text": "Rate it"}
    cfgs = [_config(tmp_path, f"seed-{seed}", {"mood": {**text, "seed": seed}}) for seed in (0, 1)]
    run_ranks(_train, 1, tmp_path / "ranks", cfgs)
    assert _error(_rows(cfgs[1], "mood"), _rows(cfgs[0], "mood")) > 1e-2


class _Stopped(Exception):
    """What the tests throw into a run after a checkpoint."""


def _open(cfg: RunConfig, report: Callable[[int], None] = lambda step: None) -> worker.Job:
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    with memory.measured(CPU) as peak:
        return worker.open_job(cfg, CPU, peak, report)


def _stop_at(at: int) -> Callable[[int], None]:
    def report(step: int) -> None:
        if step == at:
            raise _Stopped

    return report


def _leave_and_go_on(cohort: RunConfig, longer: RunConfig, rest: RunConfig) -> None:
    """A cohort in which two leave, one in which they stay, and those who stay from that moment on without them."""
    stopped = _open(cohort.model_copy(update={"name": "stopped"}), _stop_at(4))
    with contextlib.suppress(_Stopped):
        worker.train(stopped)
    assert stopped.state.training == ("tone", "view")
    job = _open(rest)
    for name in stopped.state.training:
        with torch.no_grad():
            for own, other in zip(
                job.state.cohort[name].parameters(), stopped.state.cohort[name].parameters(), strict=True
            ):
                own.copy_(other)
        job.state.optimizers[name].restore(stopped.state.optimizers[name].state())
        job.state.progress[name] = stopped.state.progress[name]
        job.state.best_rows[name] = stopped.state.best_rows[name]
    job.state.step = 4
    worker.train(job)
    _train([cohort, longer])


def test_adapters_that_end_early_leave_the_others_bitwise_as_if_they_had_never_been_there_on_three_ranks(
    tmp_path: Path,
) -> None:
    """One has taken its steps, one does not become better. Until then the cohort is one in which they go on; from then
    on it is one without them. Each has seven reviews or five, and three ranks share 3 to 13 rows a step."""
    four = _four(tmp_path)
    four["mood"]["train"] = {"steps": 4}
    still = {"steps": 9, "learning_rate": 1e-9, "early_stop": 2, "evaluate_every": 2, "examples_per_step": 1}
    four["wish"] = {**PROMPT, "length": 2, "seed": 4, "train": still}
    changes = {"train.steps": 9, "train.checkpoint_every": 2}
    cohort = _config(tmp_path, "cohort", four, **changes)
    stay = {"mood": {**four["mood"], "train": {}}, "wish": {**four["wish"], "train": {**still, "early_stop": 0}}}
    longer = _config(tmp_path, "longer", {**four, **stay}, **changes)
    rest = _config(tmp_path, "rest", {name: four[name] for name in ("tone", "view")}, **changes)
    run_ranks(_leave_and_go_on, 3, tmp_path / "ranks", cohort, longer, rest)  # 60 s are the time-out
    for name in ("tone", "view"):
        for which in ("best", "last"):
            assert torch.equal(_rows(cohort, name, which), _rows(rest, name, which))
        assert [_losses(cohort)[s][name] for s in range(4)] == [_losses(longer)[s][name] for s in range(4)]
    width = 64 * 4
    all_of_them, those_who_stay = (5 + 3 + 9 + 2) * width, (3 + 9) * width
    assert [row.reduced_bytes for row in _steps(cohort)] == [all_of_them] * 4 + [those_who_stay] * 5
    assert [list(row.adapters) for row in _steps(cohort)][4:] == [["tone", "view"]] * 5
    summary = RunSummary.model_validate_json((cohort.run_dir / "summary.json").read_text())
    assert {name: a.steps for name, a in summary.adapters.items()} == {"mood": 4, "tone": 9, "view": 9, "wish": 4}
    assert summary.adapters["wish"].stopped == "early stop: 2 evaluation(s) in a row without a better accuracy"
    assert _notes(cohort) == [
        "mood is done at step 4: it has taken its 4 steps",
        "wish is done at step 4: early stop: 2 evaluation(s) in a row without a better accuracy",
    ]


def _steps(cfg: RunConfig) -> list[StepRecord]:
    return [row for row in records.read(cfg.run_dir / "metrics.jsonl") if isinstance(row, StepRecord)]


def _losses(cfg: RunConfig) -> list[dict[str, float]]:
    return [row.adapters for row in _steps(cfg)]


def _notes(cfg: RunConfig) -> list[str]:
    rows = records.read(cfg.run_dir / "metrics.jsonl")
    return [row.text for row in rows if isinstance(row, NoteRecord) and row.text.startswith(("mood", "wish"))]


def _train_spoiled(cfg: RunConfig, factor: float) -> RunSummary:
    """A whole run in which every number of one adapter starts at `factor` times its value."""
    job = _open(cfg)
    with torch.no_grad():
        for parameter in job.state.cohort["mood"].parameters():
            parameter.mul_(factor)
    return worker.train(job)


def _healthy_and_spoiled(*cfgs: RunConfig) -> list[RunSummary]:
    return [_train_spoiled(cfg, factor) for cfg, factor in zip(cfgs, (1, 1, math.nan, 1e30), strict=True)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_an_adapter_that_is_not_finite_is_stopped_and_named_and_the_others_end_bitwise_as_ever(
    tmp_path: Path, packing: str, family: str
) -> None:
    """For as long as the bad one is in the passes, the others are as in the run in which it is healthy; then as in one
    in which it leaves at that step: without it passes are cut elsewhere, and sums are rounded otherwise (by 7e-7).
    Rows of 1e30 overflow in GPT-2's norms, those of Llama make zeros of them."""
    base, four = tiny.save_base(tmp_path / "base", {"gpt2": tiny.GPT2, "llama": tiny.LLAMA}[family]), _four(tmp_path)
    four["tone"] |= {"reparam": "residual", "reparam_hidden_size": 8}
    if packing == "auto":  # padded passes of these bases take none
        four["view"] = {"kind": "prefix", "length": 9, "init": "random", "task": four["view"]["task"]}
    changes = {"train.packing": packing, "train.steps": 8, "train.max_nonfinite_steps": 3, "train.evaluate_every": 2}
    leaves = {**four, "mood": {**four["mood"], "train": {"steps": 3}}}
    cfgs = [
        _config(tmp_path, name, some, base=base, **changes)
        for name, some in (("stays", four), ("leaves", leaves), ("nan", four), ("overflow", four))
    ]
    (_, _, *bad), _ = run_ranks(_healthy_and_spoiled, 2, tmp_path / "ranks", *cfgs)
    stays, leaves_at_3 = ([{n: v for n, v in row.items() if n != "mood"} for row in _losses(cfg)] for cfg in cfgs[:2])
    assert stays != leaves_at_3  # negative control of what follows
    for cfg, summary in zip(cfgs[2:], bad, strict=True):
        assert summary.steps == 12
        reason = "its values, loss or gradient were not finite in 3 steps in a row, the last one step 3"
        assert {name: a.stopped for name, a in summary.adapters.items()} == {**dict.fromkeys(four), "mood": reason}
        assert _notes(cfg)[0] == (
            f"mood is stopped at step 3: {reason}. Lower train.learning_rate=0.01 or set train.clip_norm."
        )
        assert [row.skipped_adapters for row in _steps(cfg)] == [("mood",)] * 3 + [()] * 9
        for name in ("tone", "view", "wish"):
            for which in ("best", "last"):
                assert torch.equal(_rows(cfg, name, which), _rows(cfgs[1], name, which)), (cfg.name, name, which)
        losses = [{n: v for n, v in row.items() if n != "mood"} for row in _losses(cfg)]
        assert losses[:3] == stays[:3]
        assert losses == leaves_at_3
        mood = summary.adapters["mood"]  # nothing of it could be kept, so nothing is said of it
        assert (mood.dir, mood.file_bytes, mood.after) == ("", 0, {})
    assert not (cfgs[2].run_dir / "adapters" / "mood").exists()


def test_a_run_fails_only_when_every_adapter_has_failed_and_then_names_them(tmp_path: Path) -> None:
    four = _four(tmp_path)
    rates = {"learning_rate": 1e30, "optimizer": "adafactor"}
    both = {name: {**four[name], "train": rates} for name in ("mood", "tone")}
    cfg = _config(tmp_path, "both", both, **{"train.max_nonfinite_steps": 2})
    torch.set_num_threads(1)
    with pytest.raises(TrainingError) as caught:
        _train([cfg])
    assert str(caught.value).count("were not finite in 2 steps in a row") == 2
    assert str(caught.value).startswith("adapter mood: ")
    assert "; adapter tone: " in str(caught.value)
    assert "Lower train.learning_rate=1e+30 of adapter mood or set train.clip_norm" in str(caught.value)


def _stop_and_go_on(whole: RunConfig, parts: RunConfig) -> list[tuple[str, ...]]:
    _train([whole])
    for at in (4, 6):
        job = _open(parts, _stop_at(at))
        with contextlib.suppress(_Stopped):
            worker.train(job)
    last = _open(parts)
    still = last.state.training
    worker.train(last)
    return [still, last.state.training]


def test_a_cohort_that_was_stopped_remembers_who_has_left_and_ends_bitwise_as_if_it_had_gone_on(tmp_path: Path) -> None:
    four = _four(tmp_path)
    four["wish"]["train"] = {"steps": 3}
    changes = {"train.steps": 8, "train.checkpoint_every": 2, "train.evaluate_every": 3}
    whole, parts = (_config(tmp_path, name, four, **changes) for name in ("whole", "parts"))
    for found in run_ranks(_stop_and_go_on, 2, tmp_path / "ranks", whole, parts):
        assert found == [("mood", "tone", "view"), ()]
    for name in four:
        for which in ("best", "last"):
            assert torch.equal(_rows(whole, name, which), _rows(parts, name, which))
    assert _losses(parts) == _losses(whole)
    assert _notes(parts).count("wish is done at step 3: it has taken its 3 steps") == 1
