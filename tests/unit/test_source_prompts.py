"""SPoT from end to end: a prompt that is trained on a classified and a generated task at once, and one that starts from
it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

from peftscale import adapters, configio, records
from peftscale.adapters import files
from peftscale.base import load
from peftscale.config import MEAN_OF_TASKS
from peftscale.data.batches import Cursor
from peftscale.records import EvaluationRecord, NoteRecord, RunSummary, StepRecord
from peftscale.train import setup

SENTENCES = [
    ("good morning", "guten Morgen"),
    ("the house is old and cold", "das Haus ist alt und kalt"),
    ("yes", "ja"),
]
SCORES = [MEAN_OF_TASKS, "reviews/accuracy", "reviews/macro_f1", "words/bleu"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that has ended: `source` of two tasks, `plain` of the first one, over one base."""
    root = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        tiny.save_base(root / "base")
        rows = [{"english": english, "german": german} for english, german in SENTENCES]
        (root / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = {
            "name": "words",
            "files": dict.fromkeys(("train", "validation"), str(root / "words.jsonl")),
            "input": "English: {{ english }}\nGerman:",
            "target": " {{ german }}",
            "metrics": ["bleu"],
            "max_target_tokens": 9,
        }
        prompt = {"kind": "prompt", "length": 5, "init": "vocabulary"}
        adapters = {"source": {**prompt, "more_tasks": [words], "task_size_limit": 4}, "plain": prompt}
        changes = {"adapters": adapters, "task.metrics": ["accuracy", "macro_f1"], "base.sharding": "replicated"}
        changes |= {"train.learning_rate": 0.3, "train.evaluate_every": 1, "train.early_stop": 2, "train.steps": 8}
        tiny.run_config(root, base=root / "base", **changes)
        done = commands.run("train", root / "run.json", "--json")
        assert done.code == 0, done.err
        assert RunSummary.model_validate_json(done.out).name == "tiny"
        yield root


def _rows(here: Path) -> list[records.Record]:
    return list(records.read(here / "runs" / "tiny" / "metrics.jsonl"))


def _best(here: Path, name: str) -> Path:
    return here / "runs" / "tiny" / "adapters" / name / "best"


def test_summary_and_records_have_the_mean_and_the_scores_of_each_task(here: Path) -> None:
    summary = RunSummary.model_validate_json((here / "runs" / "tiny" / "summary.json").read_text())
    source, plain = (summary.adapters[name] for name in ("source", "plain"))
    assert list(source.before) == list(source.after) == SCORES
    assert list(plain.after) == ["accuracy", "macro_f1"]
    for scores in (source.before, source.after):
        assert scores[MEAN_OF_TASKS] == pytest.approx((scores["reviews/accuracy"] + scores["words/bleu"]) / 2)
    assert source.before["reviews/accuracy"] == plain.before["accuracy"]  # the base alone, on the same texts
    notes = [row.text for row in _rows(here) if isinstance(row, NoteRecord)]
    assert "source is trained on several tasks; an epoch has 4 of the 7 of reviews, all 3 of words" in notes
    shown = commands.run("evaluate", here / "run.json", "--split", "validation")
    assert "examples: reviews 7 (validation), words 3 (validation)" in shown.err


def test_the_best_state_is_that_with_the_best_mean_and_early_stop_follows_it(here: Path) -> None:
    rows = [row for row in _rows(here) if isinstance(row, EvaluationRecord) and row.split == "validation"]
    scores = {row.step: row.metrics for row in rows if row.adapter == "source"}
    manifest = files.verify(_best(here, "source"))
    assert manifest is not None
    means = [scores[step][MEAN_OF_TASKS] for step in sorted(scores)]
    assert manifest.step == means.index(max(means))  # the first of equal ones
    assert manifest.metrics == scores[manifest.step]
    summary = RunSummary.model_validate_json((here / "runs" / "tiny" / "summary.json").read_text())
    assert (
        summary.adapters["source"].stopped == f"early stop: 2 evaluation(s) in a row without a better {MEAN_OF_TASKS}"
    )


def test_the_adapter_says_what_it_was_trained_on(here: Path) -> None:
    manifest, alone = (files.verify(_best(here, name)) for name in ("source", "plain"))
    assert manifest is not None and alone is not None
    assert manifest.task is not None and manifest.task.name == "reviews"
    assert [(task.name, task.target, task.labels) for task in manifest.more_tasks] == [("words", " {{ german }}", None)]
    assert manifest.mixture == {"reviews": 4, "words": 3}
    assert (alone.more_tasks, alone.mixture) == ((), {})
    card = (_best(here, "source") / "README.md").read_text()
    assert "# Soft prompt of 5 tokens for reviews + words" in card
    assert "## Task reviews (4 examples an epoch)" in card and "## Task words (3 examples an epoch)" in card
    shown = json.loads(commands.run("inspect", _best(here, "source"), "--json").out)
    assert [task["name"] for task in shown["more_tasks"]] == ["words"]
    ranked = json.loads(commands.run("similar", _best(here, "plain"), here / "runs", "--json").out)
    assert [row["task"] for row in ranked["library"]] == ["reviews + words"]
    read = json.loads(commands.run("inspect", _best(here, "source"), here / "run.json", "--json").out)
    assert "start_cosine" in read["reading"]["prompt"]  # its start can be made again without its tasks


def test_the_tokens_of_each_step_are_those_of_the_examples_of_both_tasks(here: Path) -> None:
    cfg = configio.load(here / "run.json")
    mixtures = setup.load_tasks(cfg)
    assert mixtures["source"].tasks[0] is mixtures["plain"].tasks[0]  # read once
    steps = [row for row in _rows(here) if isinstance(row, StepRecord)]

    def tokens(name: str, *, of: str) -> list[int]:
        """Of the examples that an adapter meets in each step that it took, if its tasks were those of `of`."""
        cursor, found = Cursor(cfg.adapter_seed(name)), []
        for step in steps:
            examples = []
            if name in step.adapters:
                examples, cursor = mixtures[of].take(cursor, cfg.train.examples_per_step)
            found.append(sum(len(one.input_ids) + len(one.target_ids) for one in examples))
        return found

    of_plain = tokens("plain", of="plain")
    measured = [step.tokens for step in steps]
    assert measured == [sum(both) for both in zip(tokens("source", of="source"), of_plain, strict=True)]
    assert measured != [sum(both) for both in zip(tokens("source", of="plain"), of_plain, strict=True)]


def test_a_task_that_turns_another_around_leaves_no_state_better_than_the_first(here: Path) -> None:
    """What the one gains the other loses: by its own task alone one of the two would have a later best state."""
    content = json.loads((here / "run.json").read_text())
    content["name"] = "turned"
    reviews = content["task"]
    turned = {**reviews, "name": "turned", "labels": {"bad": " good", "good": " bad"}}
    prompt = {"kind": "prompt", "length": 5, "init": "vocabulary"}
    content["adapters"] = {
        "one": {**prompt, "more_tasks": [turned]},
        "other": {**prompt, "task": turned, "more_tasks": [reviews]},
    }
    for task in (reviews, turned):
        task["metrics"] = ["accuracy"]
    content["train"] = {**content["train"], "steps": 6, "early_stop": None, "learning_rate": 1.0}
    (here / "turned.json").write_text(json.dumps(content))
    done = commands.run("train", here / "turned.json")
    assert done.code == 0, done.err
    rows = [
        row for row in records.read(here / "runs" / "turned" / "metrics.jsonl") if isinstance(row, EvaluationRecord)
    ]
    rises = []
    for name, own in (("one", "reviews"), ("other", "turned")):
        of_one = [row.metrics for row in rows if row.adapter == name and row.split == "validation"]
        assert [scores[MEAN_OF_TASKS] for scores in of_one] == pytest.approx([0.5] * len(of_one))
        rises.append(max(scores[f"{own}/accuracy"] for scores in of_one) > of_one[0][f"{own}/accuracy"])
        manifest = files.verify(here / "runs" / "turned" / "adapters" / name / "best")
        assert manifest is not None and manifest.step == 0
    assert any(rises)


def test_evaluate_scores_a_source_prompt_on_all_its_tasks(here: Path) -> None:
    done = commands.run("evaluate", here / "run.json", "-a", _best(here, "source"), "--split", "validation", "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    manifest = files.verify(_best(here, "source"))
    assert manifest is not None
    for name, metric in (("reviews", "accuracy"), ("words", "bleu")):
        scores = found["tasks"][name]["adapters"][str(_best(here, "source"))]["metrics"]
        assert scores[metric] == pytest.approx(manifest.metrics[f"{name}/{metric}"])


def test_a_target_prompt_starts_bitwise_at_the_source_prompt(here: Path) -> None:
    content = json.loads((here / "run.json").read_text())
    source = _best(here, "source")
    content["name"] = "target"
    content["adapters"] = {"target": {"kind": "prompt", "length": 5, "init": "adapter", "init_adapter": str(source)}}
    content["train"] = {**content["train"], "steps": 1}
    (here / "target.json").write_text(json.dumps(content))
    cfg = configio.load(here / "target.json")
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    start = adapters.build(cfg, base)["target"].folded().values.detach()
    assert torch.equal(start, files.read(source).adapter.values)
    done = commands.run("train", here / "target.json", "--json")
    assert done.code == 0, done.err


def test_a_baseline_is_of_the_run_s_own_task_whatever_its_adapters_add(here: Path) -> None:
    alone = commands.run(
        "train", here / "run.json", "method=few_shot", "few_shot={examples: 0}", "name=shown", "--json"
    )
    assert alone.code == 0, alone.err
    (scored,) = json.loads(alone.out)["adapters"].values()
    assert list(scored["after"]) == ["accuracy", "macro_f1"]


def test_texts_of_another_task_that_cannot_be_used_are_named_with_their_key(here: Path) -> None:
    content = json.loads((here / "run.json").read_text())
    content["name"] = "wrong"
    content["adapters"]["source"]["more_tasks"][0]["target"] = " {{ deutsch }}"
    (here / "wrong.json").write_text(json.dumps(content))
    done = commands.run("train", here / "wrong.json")
    assert done.code == 2 and "adapters.source.more_tasks.0: " in done.err and "deutsch" in done.err


def test_a_resume_with_other_tasks_is_refused_with_the_key_that_changed(here: Path) -> None:
    change = "adapters.source.more_tasks.0.max_target_tokens=8"
    done = commands.run("train", here / "run.json", change, "--resume", "tiny")
    assert done.code == 2
    assert "changed since: adapters.source.more_tasks.0.max_target_tokens was 9, now 8. Undo" in done.err
    none = ("adapters.source.more_tasks=[]", "adapters.source.task_size_limit=null")
    alone = commands.run("train", here / "run.json", *none, "--resume", "tiny")
    assert alone.code == 2 and "adapters.source.more_tasks was [{" in alone.err
