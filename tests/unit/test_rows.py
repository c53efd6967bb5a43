"""Reading data files: what is in the file arrives unchanged, and what cannot be read is named."""

import gzip
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from peftscale.config import DataFiles, HubData, TaskConfig
from peftscale.data import rows
from peftscale.errors import DataError

ROWS = [
    {"text": "one film", "grade": 3},
    {"text": 'cafe \u00e9t\u00e9, "so"\nso', "grade": 1},
    {"text": "last", "grade": 2},
]


def _task(train: Path, **more: Any) -> TaskConfig:
    files = DataFiles(train=train, validation=train)
    return TaskConfig(name="t", files=files, input="{{ text }}", target="{{ grade }}", metrics=("exact_match",), **more)


def _write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def _read(path: Path, *columns: str) -> list[dict[str, Any]]:
    table = rows.load(_task(path), "train")
    assert table is not None
    return table.only(set(columns))


def test_jsonl_packed_jsonl_and_parquet_give_the_rows_in_order(tmp_path: Path) -> None:
    plain = _write_jsonl(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(parquet)
    for path in (plain, packed, parquet):
        assert _read(path, "text", "grade") == ROWS
        assert _read(path, "grade") == [{"grade": 3}, {"grade": 1}, {"grade": 2}]


def test_a_csv_cell_is_the_text_that_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,grade\nnull,007\n"a, ""b""\nc",true\nNA,\n', encoding="utf-8-sig")
    assert _read(path, "text", "grade") == [
        {"text": "null", "grade": "007"},
        {"text": 'a, "b"\nc', "grade": "true"},
        {"text": "NA", "grade": ""},
    ]


@pytest.mark.parametrize("body", ["x,1,2\ny,3\n", "x,1\ny,2,3\n"])
def test_a_csv_row_longer_than_the_header_is_refused_instead_of_shifted(tmp_path: Path, body: str) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text,grade\n" + body)
    with pytest.raises(DataError, match=r"task.files.train \(.*long.csv\): cannot be read as csv"):
        _read(path, "text")


def test_a_directory_named_like_a_pattern_is_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    assert len(_read(_write_jsonl(folder / "a.jsonl", ROWS), "text")) == 3


def test_a_file_changed_behind_its_size_and_time_is_read_again(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "old", "grade": 1}])
    times = path.stat()
    assert _read(path, "text") == [{"text": "old"}]
    _write_jsonl(path, [{"text": "new", "grade": 1}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert _read(path, "text") == [{"text": "new"}]


def _refuse_and_note(asked: list[Any]) -> Callable[..., None]:
    def look_up(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    return look_up


def test_reading_a_local_file_leaves_nothing_behind_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", ROWS)
    home, temporary, asked = tmp_path / "home", tmp_path / "tmp", list[Any]()
    temporary.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(socket, "getaddrinfo", _refuse_and_note(asked))
    assert len(_read(path, "text")) == 3
    assert not home.exists()
    assert list(temporary.iterdir()) == []
    assert asked == []
    assert capfd.readouterr() == ("", "")
    datasets.Dataset.from_json(str(path))
    assert list(home.rglob("*.arrow"))  # without care the same call leaves a copy in the user's home


def test_progress_bars_and_log_level_are_given_back(tmp_path: Path) -> None:
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    _read(_write_jsonl(tmp_path / "a.jsonl", ROWS), "text")
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level


def _broken(tmp_path: Path, what: str) -> Path:
    good = _write_jsonl(tmp_path / "good.jsonl", ROWS * 40)
    parquet = tmp_path / "good.parquet"
    match what:
        case "nowhere.jsonl" | "notes.txt":
            pass
        case "half.jsonl":
            (tmp_path / what).write_bytes(good.read_bytes()[:-20])
        case "half.jsonl.gz":
            packed = gzip.compress(good.read_bytes())
            (tmp_path / what).write_bytes(packed[: len(packed) // 2])
        case "half.parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(parquet)
            (tmp_path / what).write_bytes(parquet.read_bytes()[:-100])
        case "latin.csv":
            (tmp_path / what).write_bytes("text,grade\n\u00e9t\u00e9,1\n".encode("latin-1"))
        case "header.csv":
            (tmp_path / what).write_text("text,grade\n")
        case "twice.csv":
            (tmp_path / what).write_text("text,text\na,b\n")
        case "folder.jsonl":
            (tmp_path / what).mkdir()
        case "none.parquet":
            datasets.Dataset.from_dict({"text": [], "grade": []}).to_parquet(tmp_path / what)
        case _:
            (tmp_path / what).write_bytes(b"")
    return tmp_path / what


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nowhere.jsonl", "no such file; expected a jsonl file"),
        ("folder.jsonl", "is a directory"),
        ("notes.txt", "unknown suffix '.txt'; expected .jsonl"),
        ("empty.jsonl", "the file is empty"),
        ("empty.csv", "the file is empty"),
        ("empty.parquet", "the file is empty"),
        ("none.parquet", "no rows"),
        ("header.csv", "there is a header and no row"),
        ("twice.csv", "the header has 'text' twice"),
        ("half.jsonl", "cannot be read as jsonl: .+"),
        ("half.jsonl.gz", "cannot be read as jsonl: Compressed file ended"),
        ("half.parquet", "cannot be read as parquet: .*Parquet"),
        ("latin.csv", "cannot be read as csv: 'utf-8' codec"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_key(
    tmp_path: Path, what: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _broken(tmp_path, what)
    capfd.readouterr()
    with pytest.raises(DataError, match=rf"task.files.train \(.*{what}\): .*{says}") as caught:
        rows.load(_task(path), "train")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # one message, and it is ours


def test_dates_in_jsonl_are_refused_where_they_are_used(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "day": "2020-01-01"}, {"text": "b", "day": "2021-03-05"}])
    assert _read(path, "text") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match="every value of column 'day' looks like a date"):
        _read(path, "text", "day")
    (tmp_path / "a.csv").write_text("text,day\na,2020-01-01\n")
    assert _read(tmp_path / "a.csv", "day") == [{"day": "2020-01-01"}]


def test_a_split_the_task_does_not_have_is_none(tmp_path: Path) -> None:
    assert rows.load(_task(_write_jsonl(tmp_path / "a.jsonl", ROWS)), "test") is None


def test_a_data_set_of_the_hub_is_read_by_split_and_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory stands for the hub's repository: `datasets` takes both through the same door."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home"))
    folder = tmp_path / "films"
    folder.mkdir()
    _write_jsonl(folder / "train.jsonl", ROWS)
    hub = HubData(path=str(folder), train="train[:67%]", validation="train[67%:]", test="nowhere")
    task = TaskConfig(name="t", hub=hub, input="{{ text }}", target="{{ grade }}", metrics=("exact_match",))
    table = rows.load(task, "train")
    assert table is not None and table.only({"grade"}) == [{"grade": 3}, {"grade": 1}]
    with pytest.raises(DataError, match=r"task.hub.test \(.*films, .*split 'nowhere'.*\): cannot be loaded: .*nowhere"):
        rows.load(task, "test")
