"""Real data sets as the files and task sections that run files name: what the quality benchmarks are made on.

The sets are not part of the project. A directory of them has the sub-directories and files that `FILES` reads; each
becomes jsonl files with the columns of the catalogue's task, whose wording is used. The words of the labels are other
ones: a vocabulary of 4,096 has most of the catalogue's in pieces. Questions and translations are those of XQuAD, whose
paragraphs stand in several splits: they are there to be mixed with other tasks, not for their quality.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MOODS = {"negative": " bad", "positive": " good"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sst2": {"labels": MOODS, "max_text_tokens": 64},
    "imdb": {"labels": MOODS, "max_text_tokens": 64},  # the last ones: reviews say at their end what they think
    "emotion": {
        "labels": {"anger": " bad", "joy": " happy", "optimism": " hope", "sadness": " sad"},
        "max_text_tokens": 64,
    },
    "ag_news": {
        "labels": {"World": " world", "Sports": " games", "Business": " business", "Sci/Tech": " technology"},
        "max_text_tokens": 64,
    },
    "squad": {"max_text_tokens": 192, "max_target_tokens": 16},
    "wmt16_en_ro": {"max_text_tokens": 64, "max_target_tokens": 16},
}
"""What is said otherwise than in the catalogue. `movies` and `products` are worded as `imdb`."""
SETTINGS["movies"] = SETTINGS["products"] = SETTINGS["imdb"] | {
    "input": "text: {{ text }}",
    "cue": " target:",
    "target": "{{ {0: 'negative', 1: 'positive'}[label] }}",
    "metrics": ["accuracy"],
}

Rows = list[dict[str, Any]]


def task(data: Path, name: str, folder: Path) -> dict[str, Any]:
    """The `task` section of a run file, its jsonl files written to `folder` where they are not there yet."""
    place = folder / name
    if not (place / "test.jsonl").exists():
        place.mkdir(parents=True, exist_ok=True)
        for split, rows in _splits(data, name).items():
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "name": name,
        "files": {split: str(place / f"{split}.jsonl") for split in ("train", "validation", "test")},
    }
    return section | SETTINGS[name]


def _splits(data: Path, name: str) -> dict[str, Rows]:
    """Rows of train, validation and test. Sets without these splits are shuffled with a seed of 0 and cut."""
    match name:
        case "sst2":
            names = {"train": "train", "validation": "dev", "test": "test"}
            return {split: list(_sst2(data / "sst2" / f"stsa.binary.{of}")) for split, of in names.items()}
        case "imdb":
            train, test = (list(_jsonl(data / "imdb_sample" / f"{of}.jsonl.gz")) for of in ("train", "test"))
            return _cut(train, 2600, 400) | {"test": test[:1500]}
        case "emotion":
            names = {"train": "train", "validation": "val", "test": "test"}
            return {split: list(_emotion(data / "tweeteval" / "emotion", of)) for split, of in names.items()}
        case "ag_news":
            return _cut(list(_ag_news(data / "agnews_test" / "test.csv.gz")), 5400, 600)
        case "movies":
            return _cut(list(_jsonl(data / "movie_reviews" / "movie_reviews.jsonl.gz")), 1400, 200)
        case "products":
            return _cut(list(_jsonl(data / "product_reviews" / "product_reviews.jsonl")), 2400, 334)
        case "squad":
            return _cut(list(_questions(data / "xquad" / "xquad.en.json")), 900, 100)
        case "wmt16_en_ro":
            lines = (data / "xquad" / "parallel_questions.jsonl").read_text(encoding="utf-8").strip().split("\n")
            return _cut([{"translation": json.loads(line)} for line in lines], 900, 100)
    raise ValueError(f"no task {name!r}")


def _cut(rows: Rows, num_train: int, num_validation: int) -> dict[str, Rows]:
    random.Random(0).shuffle(rows)
    ends = num_train, num_train + num_validation
    return {"train": rows[: ends[0]], "validation": rows[ends[0] : ends[1]], "test": rows[ends[1] :]}


def _sst2(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.strip():
            yield {"sentence": line[2:].strip(), "label": int(line[0])}


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    raw = path.read_bytes()
    for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().split("\n"):
        if line:
            row = json.loads(line)
            yield {"text": " ".join(row["text"].split()), "label": int(row["label"])}


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = {"text": [answer["text"] for answer in asked["answers"]]}
                yield {"context": paragraph["context"], "question": asked["question"], "answers": answers}


def _emotion(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    texts, labels = ((folder / f"{split}_{what}.txt").read_text().strip().split("\n") for what in ("text", "labels"))
    for text, label in zip(texts, labels, strict=True):
        yield {"text": text.strip(), "label": int(label)}


def _ag_news(path: Path) -> Iterator[dict[str, Any]]:
    table: Iterable[dict[str, str]] = csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))
    for row in table:
        yield {"text": f"{row['Title']} {row['Description']}", "label": int(row["Class Index"]) - 1}
