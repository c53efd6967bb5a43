"""Tasks of the catalogue over real data: they load whole, train two steps on the quickstart base, and are scored."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny

from peftscale import catalogue, configio, driver
from peftscale.config import DataFiles
from peftscale.data import texts

DATA = Path(__file__).resolve().parents[3] / "shared/data"
SUPERGLUE = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc-jsonl": "MultiRC",
    "record-jsonl": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc-jsonl": "WSC",
}
Row = dict[str, Any]


def _folder(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not on this machine")
    return DATA / name


def _lines(path: Path) -> list[str]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def _jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in _lines(path)]


def _written(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _superglue(name: str) -> DataFiles:
    folder = _folder("superglue_fewglue32") / SUPERGLUE[name]
    whole = folder / "val.jsonl"
    return DataFiles(train=folder / "train.jsonl", validation=whole if whole.is_file() else folder / "dev32.jsonl")


@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [
        ("boolq", (32, 3270), {0: 1237, 1: 2033}),
        ("cb", (32, 56), {0: 23, 1: 28, 2: 5}),
        ("copa", (32, 100), {0: 55, 1: 45}),
        ("multirc-jsonl", (154, 4848), {0: 2773, 1: 2075}),
        ("record-jsonl", (44, 32), {}),
        ("rte", (32, 277), {0: 146, 1: 131}),
        ("wic", (32, 638), {0: 319, 1: 319}),
        ("wsc-jsonl", (32, 104), {}),
    ],
)
def test_every_superglue_task_renders_all_of_its_rows(
    name: str, sizes: tuple[int, int], labels: dict[int, int]
) -> None:
    task = catalogue.entries()[name].over(_superglue(name))
    train, evaluated = texts.render(task, "train"), texts.render(task, "validation")
    assert (len(train), len(evaluated)) == sizes
    assert {
        label: count for label, count in Counter(text.label for text in evaluated).items() if label is not None
    } == (labels)
    for text in evaluated:
        assert text.input.endswith(" target:") and "  target:" not in text.input and text.target.strip()
        assert "@highlight" not in text.input and "{" not in text.input[:12]
    if name == "wsc-jsonl":
        assert Counter(text.target_holds for text in evaluated) == {False: 66, True: 38}
        assert all(text.input.count("*") == 2 for text in (*train, *evaluated))
    if name == "multirc-jsonl":
        assert len({text.group for text in evaluated}) == 953
    if name == "record-jsonl":
        assert all("@placeholder" in text.input for text in train)
        assert sum(len(text.references) for text in evaluated) == 46


def _run(tmp: Path, files: dict[str, DataFiles], **of_task: Any) -> dict[str, dict[str, float]]:
    """Two steps of one cohort with an adapter for each task; the scores after."""
    content = json.loads(tiny.run_config(tmp, base=tiny.QUICKSTART / "base").model_dump_json())
    content["base"] |= {"quantization": "none", "sharding": "replicated"}
    content["train"] |= {"steps": 2, "examples_per_step": 2, "microbatch_tokens": 4096, "evaluate_every": 2}
    adapter = {"kind": "prompt", "length": 5, "init": "vocabulary"}
    content["adapters"] = {
        name: {**adapter, "task": {"name": name, "files": found.model_dump(mode="json", exclude_none=True), **of_task}}
        for name, found in files.items()
    }
    path = tmp / "run.json"
    path.write_text(json.dumps(content))
    summary = driver.run(configio.load(path), show=False)
    assert {adapter.steps for adapter in summary.adapters.values()} == {2}
    for name in files:
        kept = json.loads((Path(summary.adapters[name].dir) / "peftscale.json").read_text())["task"]
        given = {**catalogue.entries()[name].task, "hub": None, **of_task}
        assert {key: kept.get(key) for key in given} == given  # the place of the data is not kept, all else is
    return {name: adapter.after for name, adapter in summary.adapters.items()}


def _first(tmp: Path, name: str, files: DataFiles) -> DataFiles:
    """The first rows: as many of train as show every label, two for validation."""
    train, validation = _jsonl(files.train), _jsonl(files.validation)[:2]
    for row in (*train, *validation):
        for question in row.get("passage", {}).get("questions", []) if isinstance(row.get("passage"), dict) else []:
            question["answers"] = question["answers"][:3]
        if isinstance(row.get("passage"), dict) and "questions" in row["passage"]:
            row["passage"]["questions"] = row["passage"]["questions"][:1]
    return DataFiles(
        train=_written(tmp / name / "train.jsonl", train),
        validation=_written(tmp / name / "validation.jsonl", validation),
    )


def test_every_superglue_task_trains_two_steps_and_is_scored(tmp_path: Path) -> None:
    files = {name: _first(tmp_path, name, _superglue(name)) for name in SUPERGLUE}
    scores = _run(tmp_path, files, max_text_tokens=256)
    for name in SUPERGLUE:
        assert list(scores[name]) == catalogue.entries()[name].task["metrics"]
        assert all(0 <= score <= 1 for score in scores[name].values())


def _pairs(folder: Path, split: str) -> list[Row]:
    return [{"sentence": line[2:], "label": int(line[0])} for line in _lines(folder / f"stsa.binary.{split}")]


def _mrpc(folder: Path, split: str) -> list[Row]:
    cells = [line.split("\t") for line in _lines(folder / f"{split}.tsv")[1:]]
    return [{"label": int(label), "sentence1": one, "sentence2": two} for label, _, _, one, two in cells]


def _emotion(folder: Path, split: str) -> list[Row]:
    both = zip(*(_lines(folder / f"emotion/{split}_{kind}.txt") for kind in ("text", "labels")), strict=True)
    return [{"text": text, "label": int(label)} for text, label in both]


def _ag_news(folder: Path) -> list[Row]:
    rows = csv.reader(_lines(folder / "test.csv.gz")[1:])
    return [{"text": f"{title} {text}", "label": int(label) - 1} for label, title, text in rows]


def _squad(folder: Path) -> list[Row]:
    articles = json.loads((folder / "xquad.en.json").read_text())["data"]
    return [
        {"context": paragraph["context"], "question": qa["question"], "answers": qa["answers"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


def _webnlg(folder: Path, split: str) -> list[Row]:
    rows = _jsonl(folder / f"{split}.jsonl.gz")
    return [{"modified_triple_sets": {"mtriple_set": [row["triples"]]}, "lex": {"text": row["refs"]}} for row in rows]


def _e2e(folder: Path, split: str) -> list[Row]:
    pairs = [line.split("||", 1) for line in _lines(folder / f"src1_{split}.txt.gz")]
    return [
        {
            "meaning_representation": ", ".join(f"{p.replace(' : ', '[')}]" for p in mr.split(" | ")),
            "human_reference": text,
        }
        for mr, text in pairs
    ]


def _columns(name: str) -> tuple[list[Row], list[Row]]:
    """Train and validation rows under the columns that the hub's data set has."""
    match name:
        case "sst2":
            return _pairs(_folder("sst2"), "train"), _pairs(_folder("sst2"), "dev")
        case "mrpc":
            return _mrpc(_folder("mrpc"), "train"), _mrpc(_folder("mrpc"), "dev")
        case "emotion":
            return _emotion(_folder("tweeteval"), "train"), _emotion(_folder("tweeteval"), "val")
        case "ag_news":
            rows = _ag_news(_folder("agnews_test"))
            return rows[:6000], rows[6000:]
        case "imdb":
            return _jsonl(_folder("imdb_sample") / "train.jsonl.gz"), _jsonl(_folder("imdb_sample") / "test.jsonl.gz")
        case "squad":
            rows = _squad(_folder("xquad"))
            return rows[:1000], rows[1000:]
        case "webnlg":
            return _webnlg(_folder("webnlg2017"), "train"), _webnlg(_folder("webnlg2017"), "dev")
        case "e2e_nlg":
            return _e2e(_folder("e2e_nlg"), "valid"), _e2e(_folder("e2e_nlg"), "test")
        case _:
            rows = [{"translation": row} for row in _jsonl(_folder("xquad") / "parallel_questions.jsonl")]
            return rows[:1000], rows[1000:]


SIZES = {
    "sst2": (6920, 872),
    "mrpc": (3668, 408),
    "emotion": (3257, 374),
    "ag_news": (6000, 1600),
    "imdb": (3000, 3000),
    "squad": (1000, 190),
    "webnlg": (18102, 872),
    "e2e_nlg": (4672, 630),
    "wmt16_en_ro": (1000, 190),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_other_task_renders_all_of_its_rows(tmp_path: Path, name: str) -> None:
    train, validation = _columns(name)
    files = DataFiles(
        train=_written(tmp_path / "train.jsonl", train), validation=_written(tmp_path / "validation.jsonl", validation)
    )
    assert tuple(texts.count(catalogue.entries()[name].over(files)).values()) == SIZES[name]


def test_every_other_task_trains_two_steps_and_is_scored(tmp_path: Path) -> None:
    files = {}
    for name in SIZES:
        train, validation = _columns(name)
        few = list(islice(train, 0, None, max(1, len(train) // 40)))  # every label is among them
        files[name] = DataFiles(
            train=_written(tmp_path / name / "train.jsonl", few),
            validation=_written(tmp_path / name / "validation.jsonl", validation[:2]),
        )
    scores = _run(tmp_path, files, max_text_tokens=128, max_target_tokens=8)
    for name in SIZES:
        assert list(scores[name]) == catalogue.entries()[name].task["metrics"]
        assert all(0 <= score <= 1 for score in scores[name].values())
