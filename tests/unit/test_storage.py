"""Object stores on a local S3 server: a run there is the run that it would be in a directory, on whatever machine."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import damages
import pytest
import requests
import tiny
from moto.server import ThreadedMotoServer

from peftscale import configio, driver, records, storage
from peftscale.config import RunConfig
from peftscale.errors import CheckpointError, ConfigError
from peftscale.records import NoteRecord
from peftscale.storage import Store

URL = "s3://bucket/some/runs"
SECRET = "verySecretAccessKey"


class Server:
    """A bucket on loopback that can be switched off."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        requests.post(f"{self.endpoint}/moto-api/reset", timeout=30)
        requests.put(f"{self.endpoint}/bucket", timeout=30).raise_for_status()

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "someAccessKeyId",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def _machine(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be another machine: one with a cache of its own, in which the base is packed already."""
    cache, packs = tmp_path / name, Path(os.environ["PEFTSCALE_CACHE"]) / "packs"
    if packs.exists() and not cache.exists():
        shutil.copytree(packs, cache / "packs")
    monkeypatch.setenv("PEFTSCALE_CACHE", str(cache))
    return cache


def _config(tmp_path: Path, **changes: Any) -> RunConfig:
    return tiny.run_config(tmp_path, **{"cluster.storage": URL, "train.steps": 6, **changes})


def _there(below: str = "") -> set[str]:
    return set(Store(URL).files(below))


def _adapters(run_dir: Path) -> dict[str, dict[str, bytes]]:
    return {which: damages.content(run_dir / "adapters" / "mood" / which) for which in ("best", "last")}


def _train_until_killed(environment: dict[str, str], run_file: Path) -> None:
    """A process that dies when it would write the manifest of step 4."""
    os.environ.update(environment)
    write = Store.write

    def killed(self: Store, name: str, source: Path) -> None:
        if name.endswith("step-4/manifest.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, source)

    Store.write = killed  # type: ignore[method-assign]
    driver.run(configio.load(run_file), show=False)


def test_a_run_in_a_bucket_that_is_killed_and_goes_on_elsewhere_ends_as_one_in_a_directory(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL when the files of the second checkpoint are there and its manifest is not."""
    calm = tiny.run_config(tmp_path, **{"train.steps": 6})
    driver.run(calm, show=False)
    first = _machine(tmp_path, "first machine", monkeypatch)
    cfg = _config(tmp_path)
    multiprocessing.set_forkserver_preload(["peftscale.train.worker", "peftscale.base.shard"])  # as the ranks' harness
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_train_until_killed, args=(dict(os.environ), tmp_path / "run.json"))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert (first / "storage/s3/bucket/some/runs/tiny/checkpoints/step-4/manifest.json").exists()
    assert {name for name in _there() if "step-4" in name} == {
        f"tiny/checkpoints/step-4/{name}" for name in damages.CHECKPOINT_FILES if name != "manifest.json"
    }

    _machine(tmp_path, "second machine", monkeypatch)
    (standing,) = json.loads(commands.run("status", URL, "--json").out)["runs"]
    assert (standing["name"], standing["dir"], standing["checkpoint"]) == ("tiny", f"{URL}/tiny", "step-2")
    done = commands.run("train", tmp_path / "run.json", "--resume", "tiny")
    assert done.code == 0, done.err
    assert "goes on from step-2" in done.err
    assert _adapters(cfg.run_dir) == _adapters(calm.run_dir)
    assert {name.split("/")[2] for name in _there() if "/checkpoints/" in name} == {"step-4", "step-6"}  # two are kept
    for step in ("step-4", "step-6"):
        for name in ("adapters.safetensors", "optimizer.safetensors"):
            mine, theirs = (of.checkpoints_dir / step / name for of in (cfg, calm))
            assert mine.read_bytes() == theirs.read_bytes()

    made = cfg.run_dir
    third = _machine(tmp_path, "third machine", monkeypatch)
    whole = storage.here(f"{URL}/tiny")  # everything is in the bucket as it is on the machine that made it
    assert whole.is_relative_to(third)
    for path in (path for path in whole.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert content == (made / path.relative_to(whole)).read_bytes()
        assert SECRET.encode() not in content and server.endpoint.encode() not in content


def test_the_commands_read_a_run_from_the_bucket_alone(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(tmp_path, "first machine", monkeypatch)
    cfg = _config(tmp_path, **{"train.steps": 2})
    file = tmp_path / "run.json"
    made = commands.run("train", file, "--json")
    assert made.code == 0, made.err
    own = commands.run("evaluate", file, "--split", "validation", "--json")

    _machine(tmp_path, "second machine", monkeypatch)
    for where in (file, f"{URL}/tiny", URL):
        (found,) = json.loads(commands.run("status", where, "--json").out)["runs"]
        assert (found["state"], found["step"], found["dir"]) == ("ended", 2, f"{URL}/tiny")
    lines = commands.run("logs", f"{URL}/tiny", "--follow")
    assert lines.code == 0 and lines.out.splitlines()[0].endswith("begins, one of 1")
    elsewhere = commands.run("evaluate", file, "--split", "validation", "--json")
    assert elsewhere.code == 0, elsewhere.err
    named = commands.run("evaluate", file, "-a", f"{URL}/tiny/adapters/mood/best", "--split", "validation", "--json")
    scores = [json.loads(done.out)["adapters"] for done in (own, elsewhere, named)]
    assert [list(of.values()) for of in scores[1:]] == [list(scores[0].values())] * 2
    assert not cfg.run_dir.exists()  # what is read is no working copy
    finished = commands.run("train", file, "--finish", "--json")
    assert finished.code == 0 and json.loads(finished.out) == json.loads(made.out)
    taken = commands.run("train", file)
    assert taken.code == 2 and f"name: a run 'tiny' exists in {URL}" in taken.err
    nothing = commands.run("train", file, "--resume", "other")
    assert nothing.code == 2 and f"--resume other: no such run in {URL}; there is tiny." in nothing.err


def test_a_network_that_goes_down_loses_nothing_and_a_resume_brings_what_is_here_there(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(tmp_path, "first machine", monkeypatch)
    cfg = _config(tmp_path)
    push, pushes = storage.Mirror.push, []

    def counted(self: storage.Mirror) -> None:
        pushes.append(self)
        if len(pushes) == 3:  # run.json, step 2, step 4
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
            server.stop()
        push(self)

    monkeypatch.setattr(storage.Mirror, "push", counted)
    done = commands.run("train", tmp_path / "run.json")
    assert done.code == 2
    message = done.err.splitlines()[-1]
    assert f"{URL}/tiny cannot be written: " in message and "Could not connect to server" in message
    assert f"is kept in {cfg.run_dir}; `--resume tiny` brings it there." in message
    assert server.endpoint.removeprefix("http://") not in done.err and SECRET not in done.err
    notes = [row for row in records.read(cfg.metrics_path) if isinstance(row, NoteRecord)]
    assert [row.step for row in notes if "cannot be written" in row.text] == [4, 6]
    assert cfg.summary_path.exists() and (cfg.checkpoints_dir / "step-6" / "manifest.json").exists()

    again = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", again.endpoint)
    before = cfg.summary_path.read_bytes()
    done = commands.run("train", tmp_path / "run.json", "--resume", "tiny")
    assert done.code == 0, done.err
    assert cfg.summary_path.read_bytes() == before
    assert {"tiny/summary.json", "tiny/checkpoints/step-6/manifest.json"} <= _there()
    again.stop()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://nobodys/runs", "s3://nobodys/runs/tiny cannot be written: "),
        ("ftp://bucket/runs", "ftp://bucket/runs/tiny: no store that can be used (Unrecognized filesystem type in URI"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_before_anything_is_held(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    _machine(tmp_path, "machine", monkeypatch)
    cfg = _config(tmp_path, **{"cluster.storage": url})
    done = commands.run("train", tmp_path / "run.json")
    assert done.code == 2 and message in done.err, done.err
    assert done.err.count("\n") == 1
    assert not cfg.run_dir.exists()


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/runs",
        f"s3://bucket/runs?secret_key={SECRET}",
        "s3://bucket/../runs",
        "s3://",
        "file:///runs",
        "s3://bucket/a b",
    ],
)
def test_a_url_that_is_more_than_a_place_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    rule = r"cluster\.storage: (a URL must be scheme://bucket/prefix;|holds a secret, which a run file must not)"
    with pytest.raises(ConfigError, match=rule) as caught:
        _config(tmp_path, **{"cluster.storage": url})
    assert SECRET not in str(caught.value)


def test_a_url_is_kept_as_it_is_and_its_working_copy_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = _machine(tmp_path, "machine", monkeypatch)
    cfg = _config(tmp_path, **{"cluster.storage": f"{URL}/"})
    assert configio.from_dict(configio.dump(cfg)) == cfg
    assert (cfg.cluster.storage, cfg.run_url) == (URL, f"{URL}/tiny")
    assert cfg.run_dir == cache / "storage/s3/bucket/some/runs/tiny"
    assert storage.url_of(storage.fetched(URL) / "a") == f"{URL}/a"


def test_what_is_further_in_the_store_is_taken_and_what_is_further_here_stays(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is damaged here is taken from there too."""
    _machine(tmp_path, "first machine", monkeypatch)
    cfg = _config(tmp_path)
    driver.run(cfg, show=False)
    as_it_ended = {p.relative_to(cfg.run_dir): p.read_bytes() for p in cfg.run_dir.rglob("*") if p.is_file()}

    cfg.summary_path.unlink()  # as this machine would have stood at step 4
    shutil.rmtree(cfg.checkpoints_dir / "step-6")
    damages.flip(cfg.checkpoints_dir / "step-4" / "adapters.safetensors")
    cfg.metrics_path.write_text("")
    storage.Mirror(cfg).pull()
    assert {p.relative_to(cfg.run_dir): p.read_bytes() for p in cfg.run_dir.rglob("*") if p.is_file()} == as_it_ended

    store = Store(f"{URL}/tiny")  # as the store would stand if it had not answered after step 4
    for name in ("summary.json", "checkpoints/step-6/manifest.json"):
        store.delete(name)
    cfg.metrics_path.write_text("longer here")
    storage.Mirror(cfg).pull()
    assert cfg.metrics_path.read_text() == "longer here"
    storage.Mirror(cfg).push()
    assert {"summary.json", "checkpoints/step-6/manifest.json"} <= set(store.files())


def test_a_store_that_is_asked_for_more_than_it_has_says_so(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{URL} cannot be read: .*Path does not exist"):
        Store(URL).read("nothing", tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_driver_elsewhere_that_gives_up_leaves_the_word_and_takes_nothing_away(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints are on the machine of rank 0, and may never have been on the driver's."""
    _machine(tmp_path, "rank 0's", monkeypatch)
    cfg = _config(tmp_path)
    driver.run(cfg, show=False)
    before = _there("tiny")

    _machine(tmp_path, "the driver's", monkeypatch)
    cfg.run_dir.mkdir(parents=True)
    cfg.failure_path.write_text("no retries are left")
    mirror = storage.Mirror(cfg)
    mirror.push_failure()
    assert _there("tiny") == before | {"tiny/failure.txt"}
    mirror.push()
    assert _there("tiny") == before | {"tiny/failure.txt"}

    mirror.pull()  # now they are here, and what is deleted here is meant to be gone
    shutil.rmtree(cfg.checkpoints_dir / "step-4")
    mirror.push()
    assert before - _there("tiny") == {name for name in before if "/step-4/" in name}


def test_a_copy_that_breaks_off_leaves_nothing_there(server: Server) -> None:
    with pytest.raises(CheckpointError):
        Store(URL).write("broken", Path("/proc/self/mem"))  # whose first byte cannot be read
    assert _there() == set()
