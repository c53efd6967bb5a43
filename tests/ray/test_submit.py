"""A run as a job of a real Ray that asks for a token, on loopback: one head for all of these tests."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
from commands import Done

from peftscale import auth, records
from peftscale.records import RunSummary, StepRecord

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHORT = (
    "cluster.workers=1",
    "train.steps=4",
    "train.evaluate_every=2",
    "train.checkpoint_every=2",
    "task.max_text_tokens=16",
)
SAID = "inputs were cut to"


@dataclasses.dataclass(frozen=True)
class Head:
    """A Ray of this file's own."""

    address: str
    token: Path
    here: Path
    """Its directory, logs included."""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _takes_jobs(address: str, agent_port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", agent_port), timeout=2).close()
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    raise AssertionError("this Ray asks for no token, and the tests would show nothing")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    here = Path(tempfile.mkdtemp(prefix="ps-"))  # short: sockets lie in it
    said, (gcs, client, dashboard, agent) = here / "said", _free_ports(4)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(here / "token")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        auth.prepare()
    assert stat.S_IMODE((here / "token").stat().st_mode) == 0o600
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"),
            *(f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={here / 'ray'}"),
            *("--object-store-memory=80000000", "--disable-usage-stats"),
        ],
        env={
            **os.environ,
            **settings,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_raylet_start_wait_time_s": "120",  # its 30 are too few on a busy machine
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is nobody to wait for at its end
        },
        stdout=said.open("w"),
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in said.read_text() or not _takes_jobs(address, agent):
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
        yield Head(address, here / "token", here)
    finally:
        process.terminate()  # and what it started goes with it
        process.wait(60)
        shutil.rmtree(here, ignore_errors=True)


@pytest.fixture(autouse=True)
def _with_its_token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    # Ray's client would go there in place of the address that it is given, and send the token along.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")


def _submit(head: Head, tmp: Path, *arguments: str) -> Done:
    storage = f"cluster.storage={tmp / 'runs'}"
    return commands.run("submit", QUICKSTART, *SHORT, storage, "--address", head.address, *arguments)


def _holding(folder: Path, text: str) -> list[str]:
    """The files that hold a text."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    ]


def _taken_steps(run: Path) -> int:
    return sum(isinstance(row, StepRecord) for row in records.read(run / "metrics.jsonl"))


def test_a_job_runs_the_quickstart_and_nothing_of_a_secret_is_written_anywhere(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIN_NAME", SAID)  # what the ranks have to say holds it
    monkeypatch.setenv("NOT_LISTED", "a-value-that-is-not-asked-for")
    deploy = "cluster.deploy={workers_per_node: 1, memory_gb_per_worker: 1, secrets: [PLAIN_NAME=a/b]}"
    run, job_logs = tmp_path / "runs" / "first", head.here / "ray" / "session_latest" / "logs"

    first = _submit(head, tmp_path, "name=first", deploy, "--follow", "--json")
    assert first.code == 0, first.err
    job: dict[str, Any] = json.loads(first.out)
    assert (job["id"], job["state"], job["exit_code"]) == ("first", "succeeded", 0)
    assert set(job["metadata"]) == {"config_digest", "peftscale_version", "git_revision"}
    assert "evaluation at step 2" in first.err and "step 4/4" in first.err
    summary = RunSummary.model_validate_json((run / "summary.json").read_text())
    assert (summary.world_size, summary.steps) == (1, 4)

    # The ranks have it, or they would not know what to take out.
    assert " <PLAIN_NAME> task.max_text_tokens" in first.err
    assert _holding(run, "<PLAIN_NAME>") == ["metrics.jsonl"] and _holding(run, SAID) == []
    # Ray logs every variable that it is given: the names of secrets are there, and what is on our list.
    for logged in ("PEFTSCALE_SECRETS", "HF_HUB_OFFLINE"):
        assert "runtime_env_agent.log" in _holding(job_logs, logged)
    for hidden in (SAID, "a-value-that-is-not-asked-for", head.token.read_text()):
        assert _holding(job_logs, hidden) == []
    (with_value,) = (path for path in (head.here / "ray").rglob("secrets.env") if SAID in path.read_text())
    assert stat.S_IMODE(with_value.stat().st_mode) == 0o600

    again = _submit(head, tmp_path, "name=first", deploy, "--follow", "--json")
    assert again.code == 0 and json.loads(again.out)["id"] == "first~2", again.err
    assert _taken_steps(run) == 4  # it had ended
    other = _submit(head, tmp_path, "name=first", "train.learning_rate=0.1", "--follow")
    assert other.code == 1 and "the job first~3 has not succeeded; its log says why" in other.err
    assert "the run 'first' in" in other.err and "has other settings than this one" in other.err


def test_a_job_under_way_is_not_submitted_again_and_can_be_stopped(head: Head, tmp_path: Path) -> None:
    assert _submit(head, tmp_path, "name=long", "--status").code == 2
    begun = _submit(head, tmp_path, "name=long", "train.steps=100000")
    assert begun.code == 0 and "long is submitted; the same command with --follow shows its log" in begun.err
    second = _submit(head, tmp_path, "name=long", "train.steps=100000")
    assert second.code == 2
    assert "the job long of this run is" in second.err and "--stop ends it" in second.err
    other = _submit(head, tmp_path, "name=long", "train.steps=7", "--follow")  # not the job that is to be seen
    assert other.code == 2 and "must end first" in other.err
    stopped = _submit(head, tmp_path, "name=long", "--stop")
    assert stopped.code == 0 and "long: stopped" in stopped.err
    told = _submit(head, tmp_path, "name=long", "--status", "--json")
    assert told.code == 0 and json.loads(told.out)["state"] == "stopped"


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "", "the token of RAY_AUTH_TOKEN is not the cluster's"),
        (
            {"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"},
            "",
            "asks for its token, and none was found here. Give it in",
        ),
        ({"RAY_AUTH_MODE": "disabled"}, "", "asks for its token, and RAY_AUTH_MODE=disabled says that there is none"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "", "/nowhere, Ray's token, cannot be read: No such file or directory"),
        ({}, "/jobs", "what answers there is no job server of Ray"),
    ],
)
def test_who_has_no_right_token_or_place_is_told_so_in_one_message(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], path: str, message: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    elsewhere = dataclasses.replace(head, address=head.address + path)
    done = _submit(elsewhere, tmp_path, "name=shut-out")
    assert done.code == 2 and done.out == ""
    assert message in done.err and "Traceback" not in done.err
    assert head.token.read_text() not in done.err
    with monkeypatch.context() as allowed:
        for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.token)}.items():
            allowed.setenv(name, value)
        allowed.delenv("RAY_AUTH_TOKEN", raising=False)
        assert "no job of the run 'shut-out' there" in _submit(head, tmp_path, "name=shut-out", "--status").err


def test_where_nothing_listens_the_way_in_is_named(head: Head, tmp_path: Path) -> None:
    (port,) = _free_ports(1)
    done = _submit(dataclasses.replace(head, address=f"http://127.0.0.1:{port}"), tmp_path)
    assert done.code == 2 and "no Ray answers there" in done.err and "ssh -L 8265:127.0.0.1:8265 HEAD" in done.err
