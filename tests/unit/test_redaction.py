"""Secrets are taken out of whatever leaves the program as text, and nothing else is."""

import json
import logging
from pathlib import Path

import commands
import pytest
import tiny

from peftscale import logs, redaction, report
from peftscale.driver import _worker_with
from peftscale.records import NoteRecord
from peftscale.train import journal

TOKEN = "hf_Zq3vY8nW2kLr7TbXc5MdAe"
PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", PASSWORD)
    monkeypatch.setenv(redaction.NAMES, "DATABASE")
    monkeypatch.setenv("DATABASE", "db-of-the-team")
    monkeypatch.setenv("DATABASE_HOST", "db.example.com")


@pytest.mark.parametrize(
    ("text", "without"),
    [
        (f"got {PASSWORD}!", "got <SOME_API_KEY>!"),
        ("at db-of-the-team", "at <DATABASE>"),
        ("https://me:pa55@host/x", "https://<redacted>@host/x"),
        ("s3://key:s3cr3t/with+signs@bucket", "s3://key:s3cr3t/with+signs@bucket"),  # no URL has a slash there
        (
            "401 for https://h/f?X-Amz-Signature=0a1b2c&expires=9",
            "401 for https://h/f?X-Amz-Signature=<redacted>&expires=9",
        ),
        ("{'Authorization': 'Bearer 0123456789abcdef'}", "{'Authorization': 'Bearer <redacted>'}"),
        (f"token {TOKEN} is not valid", "token <redacted> is not valid"),
        ("AKIAABCDEFGHIJKLMNOP", "<redacted>"),
    ],
)
def test_a_secret_is_taken_out_and_what_stands_around_it_stays(text: str, without: str) -> None:
    assert redaction.redacted(text) == without
    assert redaction.redacted(without) == without


@pytest.mark.parametrize(
    "text",
    [
        "db.example.com",  # its name says nothing of a secret
        "20,480 B reduced  9f3a77c1e5d24b6f8a0c1d2e3f4a5b6c7d8e9f0a",  # a commit
        "http://127.0.0.1:8265/api/jobs/?limit=5",
        "/home/me@work:/runs/a:b",
        "hf_xet, sk-learn, bearer of bad news",
        "3 virtual tokens",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redaction.redacted(text) == text


def test_a_short_value_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_TOKEN", "1")
    assert redaction.redacted("step 1 of 11") == "step 1 of 11"


def test_the_longest_of_secrets_that_hold_each_other_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONG_TOKEN", PASSWORD + " battery")
    assert redaction.redacted(f"{PASSWORD} battery") == "<LONG_TOKEN>"


def test_rows_and_logs_hold_no_secret_whoever_writes_them(tmp_path: Path) -> None:
    assert PASSWORD not in NoteRecord(step=1, text=f"no {PASSWORD}").model_dump_json()
    with logs.kept(tmp_path, 0) as book:
        logging.getLogger("peftscale.x").warning("no %s", PASSWORD)
        book.failed(ValueError(f"not {PASSWORD}"))
    said = (tmp_path / "rank-0.jsonl").read_text()
    assert PASSWORD not in said and "no <SOME_API_KEY>" in said and "ValueError: not <SOME_API_KEY>" in said


def test_what_is_printed_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    report.note(f"no {PASSWORD}")
    report.show_json({"notes": [PASSWORD]})
    out, err = capsys.readouterr()
    assert err == "no <SOME_API_KEY>\n" and json.loads(out) == {"notes": ["<SOME_API_KEY>"]}


def test_a_run_file_that_holds_a_secret_is_refused_and_the_secret_is_not_repeated(tmp_path: Path) -> None:
    tiny.run_config(tmp_path)
    file = tmp_path / "run.json"
    content = json.loads(file.read_text())
    content["task"]["input"] = "${oc.env:SOME_API_KEY}{{ text }}"
    content["base"]["revision"] = "https://me:pa55word@host"
    file.write_text(json.dumps(content))
    for command in ("train", "plan"):
        done = commands.run(command, file)
        assert done.code == 2 and "Traceback" not in done.err
        assert "task.input: holds a secret, which a run file must not (<SOME_API_KEY>{{ text }})" in done.err
        assert "base.revision: holds a secret" in done.err
        assert PASSWORD not in done.err and "pa55word" not in done.err
    assert not (tmp_path / "runs").exists()


def test_an_override_that_holds_a_secret_is_not_repeated(tmp_path: Path) -> None:
    tiny.run_config(tmp_path)
    done = commands.run("train", tmp_path / "run.json", f"name={TOKEN}")
    assert done.code == 2 and "name: holds a secret" in done.err and TOKEN not in done.err


def test_an_error_that_nobody_expected_is_shown_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError(f"nobody expects {PASSWORD}")

    tiny.run_config(tmp_path)
    monkeypatch.setattr(journal.records, "mend", fail)
    done = commands.run("train", tmp_path / "run.json")
    assert done.code == 1 and "ArithmeticError: nobody expects <SOME_API_KEY>" in done.err
    assert PASSWORD not in done.err
    run = tmp_path / "runs" / "tiny"
    assert (run / "run.json").exists()
    assert [path for path in run.rglob("*") if path.is_file() and PASSWORD in path.read_text()] == []
    # Ray writes down what a worker raises.
    config = {"cfg": json.loads((run / "run.json").read_text()), "task": "train", "payload": {}}
    with pytest.raises(RuntimeError, match="ArithmeticError, with a secret taken out") as caught:
        _worker_with({"DATABASE": "another-database"})(config)
    assert "nobody expects <SOME_API_KEY>" in str(caught.value) and PASSWORD not in str(caught.value)
    assert caught.value.__suppress_context__
    assert redaction.redacted("another-database") == "<DATABASE>"
