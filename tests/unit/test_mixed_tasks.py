"""Sentiment, question answering and translation in one batch, with adapters of length 5, 20 and 100 and a prefix: every
output is that of the adapter alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

from peftscale.adapters import Folded, Prefix, SoftPrompt
from peftscale.base import load, prefixed
from peftscale.base.load import Base
from peftscale.base.passes import target_logits
from peftscale.config import RunConfig, TaskConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.train import evaluate, setup
from peftscale.train.evaluate import BASE_ALONE, Cell, Evaluation
from peftscale.train.step import rows_of

LENGTHS = {"mood": 5, "answers": 20, "words": 100}
QUESTIONS = [
    ("The red boat left the harbour at noon.", "When did the boat leave?", "at noon"),
    ("Anna keeps two cats and a very old dog in the house by the river.", "Who keeps the cats?", "Anna"),
    ("It rained.", "What did it do?", "rained"),
]
SENTENCES = [
    ("good morning", "guten Morgen"),
    ("the house is old and cold", "das Haus ist alt und kalt"),
    ("yes", "ja"),
]


def _write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _tasks(here: Path) -> dict[str, dict[str, Any]]:
    """The two generated tasks, as a run file has them, over rows of the project's own."""
    asked = [{"text": text, "question": question, "answer": answer} for text, question, answer in QUESTIONS]
    said = [{"english": english, "german": german} for english, german in SENTENCES]
    forms = {
        "answers": ("{{ text }}\n{{ question }}\nAnswer:", " {{ answer }}", "squad_f1", asked),
        "words": ("English: {{ english }}\nGerman:", " {{ german }}", "exact_match", said),
    }
    found = {}
    for name, (text, target, metric, rows) in forms.items():
        path = _write(here / f"{name}.jsonl", rows)
        files = dict.fromkeys(("train", "validation", "test"), path)
        found[name] = {
            "name": name,
            "files": files,
            "input": text,
            "target": target,
            "metrics": [metric],
            "max_target_tokens": 7,
        }
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run file with three adapters of three tasks, and its run of two steps, which ended."""
    root = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        tiny.save_base(root / "base", {**tiny.LLAMA, "max_position_embeddings": 256})
        data = tiny.save_reviews(root / "data")
        adapters: dict[str, Any] = {
            name: {"kind": "prompt", "length": length, "init": "random"} for name, length in LENGTHS.items()
        }
        for name, task in _tasks(root).items():
            adapters[name]["task"] = task
        changes = {
            "adapters": adapters,
            "base.sharding": "replicated",
            "task.files": dict.fromkeys(("train", "validation", "test"), str(data)),
            "train.steps": 2,
            "train.microbatch_tokens": 2048,
            "train.learning_rate": 0.3,
        }
        tiny.run_config(root, base=root / "base", **changes)
        done = commands.run("train", root / "run.json", "--json")
        assert done.code == 0, done.err
        yield root


@pytest.fixture(scope="module")
def opened(here: Path) -> tuple[RunConfig, Base, dict[str, Folded], dict[str, Cell]]:
    """The base, packed, adapters with large random values, and each on its own task."""
    cfg = tiny.configio.load(here / "run.json")
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    assert setup.choose_packing(cfg, base) is None
    assert base.is_packed
    torch.manual_seed(0)
    adapters: dict[str, Folded] = {name: SoftPrompt(torch.randn(length, 64)) for name, length in LENGTHS.items()}
    shape = prefixed.shape_of(base.model.config)
    adapters["deep"] = Prefix(torch.randn(shape.num_layers, 2, 6, shape.num_kv_heads, shape.head_dim))
    cells = {}
    for name in adapters:
        of_task: TaskConfig = cfg.adapter_task(name if name in LENGTHS else "mood")
        task = tasks.load(of_task, base.tokenizer, max_tokens=150)
        cells[name] = Cell(name, task, task.test, of_task.metrics)
    return cfg, base, adapters, cells


def _counted(base: Base, adapters: dict[str, Folded], cells: list[Cell]) -> tuple[list[Evaluation], int, int]:
    """Results, forward passes of whole texts, and calls of transformers' generate."""
    forwards, calls, generate = [0], [0], base.model.generate

    def seen(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        forwards[0] += kwargs.get("past_key_values") is None and not kwargs.get("use_cache")

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return generate(*args, **kwargs)

    handle = base.model.register_forward_pre_hook(seen, with_kwargs=True)
    base.model.generate = counting
    try:
        return evaluate.run_cells(base, adapters, cells, microbatch_tokens=4096), forwards[0], calls[0]
    finally:
        handle.remove()
        del base.model.generate


def test_one_batch_mixes_tasks_and_lengths_and_every_output_is_that_of_the_adapter_alone(
    opened: tuple[RunConfig, Base, dict[str, Folded], dict[str, Cell]],
) -> None:
    _, base, adapters, cells = opened
    together, forwards, calls = _counted(base, adapters, [cells[name] for name in adapters])
    assert (forwards, calls) == (1, 1)  # both classifications in one pass, both generations in one call
    for name, result in zip(adapters, together, strict=True):
        ((alone,), *_) = _counted(base, {name: adapters[name]}, [cells[name]])
        assert result.predictions == alone.predictions
        assert result.metrics == alone.metrics
        if cells[name].task.labels:  # float32; measured 0
            torch.testing.assert_close(
                torch.tensor(result.likelihoods), torch.tensor(alone.likelihoods), rtol=0, atol=5e-6
            )
    texts = {name: result.predictions for name, result in zip(adapters, together, strict=True)}
    assert any(texts["answers"]) and any(texts["words"])  # something was written
    (other,), *_ = _counted(base, {"words": adapters["answers"]}, [cells["words"]])
    assert other.predictions != texts["words"]  # another adapter writes something else


def test_one_training_pass_mixes_tasks_and_lengths_and_every_logit_is_that_of_the_adapter_alone(
    opened: tuple[RunConfig, Base, dict[str, Folded], dict[str, Cell]],
) -> None:
    _, base, adapters, cells = opened
    items = [
        item
        for name, cell in cells.items()
        for item in training_items(name, adapters[name].num_positions, cell.examples)
    ]
    mixed = items[::2] + items[1::2]  # adapters alternate
    with torch.no_grad():
        logits_MV = target_logits(base, rows_of(mixed, adapters))
        parts = logits_MV.split([len(item.target_ids) for item in mixed])
        for item, part in zip(mixed, parts, strict=True):
            alone_TV = target_logits(base, rows_of([item], adapters))
            torch.testing.assert_close(part, alone_TV, rtol=0, atol=5e-6)  # float32 order; measured 9.9e-7
            swapped = "mood" if item.adapter != "mood" else "words"
            other_TV = target_logits(base, rows_of([item], {item.adapter: adapters[swapped]}))
            assert float((other_TV - part).abs().max()) > 1e-2


def test_what_is_written_does_not_depend_on_how_rows_are_put_into_calls(
    opened: tuple[RunConfig, Base, dict[str, Folded], dict[str, Cell]],
) -> None:
    _, base, adapters, cells = opened
    wanted = [cells["answers"], Cell(BASE_ALONE, cells["words"].task, cells["words"].examples, ()), cells["words"]]
    at_once = evaluate.run_cells(base, adapters, wanted, microbatch_tokens=4096)
    one_by_one = evaluate.run_cells(base, adapters, wanted, microbatch_tokens=1)
    assert [one.predictions for one in at_once] == [one.predictions for one in one_by_one]


def test_no_cells_are_no_passes(opened: tuple[RunConfig, Base, dict[str, Folded], dict[str, Cell]]) -> None:
    _, base, adapters, _ = opened
    assert _counted(base, adapters, []) == ([], 0, 0)


def _evaluate(here: Path, *arguments: str | Path) -> dict[str, Any]:
    done = commands.run("evaluate", here / "run.json", *arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_evaluate_fills_the_matrix_of_a_run_s_adapters_and_tasks(here: Path) -> None:
    found = _evaluate(here)
    assert list(found["tasks"]) == ["reviews", "answers", "words"]
    dirs = [str(here / "runs" / "tiny" / "adapters" / name / "best") for name in LENGTHS]
    for name, of_task in found["tasks"].items():
        assert list(of_task["adapters"]) == dirs
        alone = _evaluate(here, "--task", name, "-a", dirs[1])  # one task: its keys stand at the top
        assert (alone["task"], alone["base"], alone["examples"]) == (name, of_task["base"], of_task["examples"])
        assert alone["adapters"] == {dirs[1]: of_task["adapters"][dirs[1]]}
    shown = commands.run("evaluate", here / "run.json")
    assert "examples: reviews 7 (test), answers 3 (test), words 3 (test)" in shown.err
    assert "(base alone)" in shown.err


def test_evaluate_takes_the_task_of_another_run_file(here: Path, tmp_path: Path) -> None:
    other = json.loads((here / "run.json").read_text())
    other["task"] = {**other["task"], "name": "turned", "labels": {"bad": " good", "good": " bad"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    mood = here / "runs" / "tiny" / "adapters" / "mood" / "best"
    found = _evaluate(here, "-a", mood, "--task", "reviews", "--task", tmp_path / "other.json")
    plain, turned = (found["tasks"][name]["adapters"][str(mood)] for name in ("reviews", "turned"))
    assert [{"bad": "good", "good": "bad"}[label] for label in plain["predictions"]] == turned["predictions"]
    assert plain["metrics"]["accuracy"] == pytest.approx(1 - turned["metrics"]["accuracy"])


def test_an_ensemble_stands_beside_its_adapters(here: Path) -> None:
    found = _evaluate(here, "--task", "reviews", "--task", "words", "--ensemble")
    for name, ways in (("reviews", {"vote", "likelihood"}), ("words", {"vote"})):
        of_task = found["tasks"][name]
        assert set(of_task["ensemble"]) == {"size", "average", "best"} | ways
        each = [one["metrics"] for one in of_task["adapters"].values()]
        for metric in each[0]:
            values = [of_one[metric] for of_one in each]
            assert of_task["ensemble"]["best"][metric] == max(values)
            assert of_task["ensemble"]["average"][metric] == pytest.approx(sum(values) / 3)
    labels = [one["predictions"] for one in found["tasks"]["reviews"]["adapters"].values()]
    right = [label for _, label in tiny.REVIEWS]
    voted = [max(set(three), key=three.count) for three in zip(*labels, strict=True)]  # of two labels one has two votes
    hits = sum(got == want for got, want in zip(voted, right, strict=True))
    assert found["tasks"]["reviews"]["ensemble"]["vote"]["accuracy"] == pytest.approx(hits / 7)


def test_each_task_is_scored_on_the_split_that_it_reports_on(here: Path, tmp_path: Path) -> None:
    """Of a task without a test split on validation, beside others that have one."""
    other = json.loads((here / "run.json").read_text())
    other["task"]["name"] = "untested"
    del other["task"]["files"]["test"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    found = _evaluate(here, "--task", "reviews", "--task", tmp_path / "other.json")["tasks"]
    assert {name: of_task["split"] for name, of_task in found.items()} == {"reviews": "test", "untested": "validation"}
    done = commands.run(
        "evaluate", here / "run.json", "--task", "reviews", "--task", tmp_path / "other.json", "--split", "test"
    )
    assert done.code == 2
    assert "--split test: task untested has no test split. Give task.files.test or task.hub.test, or" in done.err


def test_where_no_task_is_named_those_of_one_task_are_an_ensemble(here: Path, tmp_path: Path) -> None:
    run = json.loads((here / "run.json").read_text())
    run["name"], run["adapters"]["more"] = "two", {**run["adapters"]["mood"], "seed": 9}
    (tmp_path / "two.json").write_text(json.dumps(run))
    assert commands.run("train", tmp_path / "two.json").code == 0
    done = commands.run("evaluate", tmp_path / "two.json", "--ensemble", "--json")
    found = json.loads(done.out)["tasks"]
    assert {name: of_task.get("ensemble", {}).get("size") for name, of_task in found.items()} == {
        "reviews": 2,
        "answers": None,
        "words": None,
    }
    of_reviews = found["reviews"]
    each = [one for name, one in of_reviews["adapters"].items() if Path(name).parent.name in ("mood", "more")]
    best = max(one["metrics"]["accuracy"] for one in each)
    assert of_reviews["ensemble"]["best"]["accuracy"] == best
    shown = commands.run("evaluate", tmp_path / "two.json", "--ensemble")
    (row,) = [line for line in shown.err.splitlines() if "(vote)" in line]
    assert len(re.findall(r"\d\.\d{4}", row)) == 1  # nothing of the two tasks with one adapter each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ensemble"], "--ensemble: no two of these adapters were trained on the same task. Name the task with"),
        (["--task", "review"], "--task review: neither a task of the run file (reviews, answers, words) nor one that"),
        (["--split", "dev"], "--split: must be train, validation or test, got 'dev'"),
        (["name=other", "-a", "{mood}", "-a", "{words}", "--ensemble"], "--ensemble: no two of these adapters were"),
        (["-a", "{mood}", "-a", "{mood}/../best"], "mood/best/../best is named twice. Leave one out."),
        (["-a", "{mood}", "--ensemble"], "--ensemble: needs two adapters at least, got one"),
        (["--task", "{other}"], "--task: two different tasks are called 'reviews'"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    here: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    other = json.loads((here / "run.json").read_text())
    other["task"]["input"] = "{{ text }}"
    (tmp_path / "other.json").write_text(json.dumps(other))
    adapters = here / "runs" / "tiny" / "adapters"
    names = {"mood": adapters / "mood" / "best", "words": adapters / "words" / "best", "other": tmp_path / "other.json"}
    words = [word.format(**names) for word in arguments]
    if "{other}" in arguments:
        words += ["--task", "reviews"]
    done = commands.run("evaluate", here / "run.json", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_what_an_adapter_writes_does_not_depend_on_a_longer_one_beside_it(tmp_path: Path) -> None:
    """Of 128 positions a prompt of 60 leaves fewer than 64 behind these texts, one of 2 does not."""
    lengths = {"short": 2, "long": 60}
    files = dict.fromkeys(("train", "validation"), str(tiny.save_reviews(tmp_path / "two", tiny.REVIEWS[1:5:3])))
    task = {"task.files": files, "task.labels": None, "task.metrics": ["exact_match"], "task.max_target_tokens": 64}

    def written(*names: str) -> list[Evaluation]:
        made = {name: {"kind": "prompt", "length": lengths[name], "init": "random"} for name in names}
        cfg = tiny.run_config(tmp_path, adapters=made, **task)
        base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
        base.tokenizer.eos_token = None  # nothing ends before its room does
        data = setup.load_tasks(cfg)["short"].tasks[0]
        assert 128 - 2 - 64 > max(len(example.input_ids) for example in data.validation) > 128 - 60 - 64
        torch.manual_seed(0)
        adapters = {name: SoftPrompt(torch.randn(lengths[name], 64)) for name in names}
        cells = [Cell(name, data, data.validation, ()) for name in (BASE_ALONE, *names)]
        return evaluate.run_cells(base, adapters, cells, microbatch_tokens=4096)

    alone, together = written("short"), written("short", "long")
    assert [result.predictions for result in alone] == [result.predictions for result in together[:2]]
