"""A disk that is full: one message, and what was saved is gone on from.

Once by a file system of 2 MB of its own, in which nothing can be written any more, metrics and logs neither; else by a
limit on the size of files, by which it can be chosen which of them is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
import tiny

from peftscale import records
from peftscale.base import pack
from peftscale.records import NoteRecord, StepRecord

_MOUNT = 'mount -t tmpfs -o size=2m none "$0" && exec "$@"'
_ALONE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT]
_CODE = "import sys, json, pathlib, test_disk_full as t; print(json.dumps(t.fill_and_go_on(pathlib.Path(sys.argv[1]))))"


def _digests(*directories: Path) -> dict[str, str]:
    files = (path for directory in directories for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _stopped_run(here: Path) -> tuple[Path, Path]:
    """A run that was stopped between steps 2 and 4. Returns its run file and its directory."""
    tiny.run_config(here)
    file, run_dir = here / "run.json", here / "runs" / "tiny"
    assert commands.run("train", file).code == 0
    shutil.rmtree(run_dir / "checkpoints" / "step-4")
    (run_dir / "summary.json").unlink()
    return file, run_dir


def _steps(run_dir: Path) -> list[int]:
    return [row.step for row in records.read(run_dir / "metrics.jsonl") if isinstance(row, StepRecord)]


def _fill(directory: Path) -> Iterator[Path]:
    """Files that take all the room there is, down to the last block."""
    for number, size in enumerate((1 << 20, 1 << 16, 1 << 12)):
        path = directory / f"filler-{number}"
        try:
            with path.open("wb", buffering=0) as file:
                while file.write(b"0" * size) == size:
                    pass
        except OSError:
            pass
        yield path


def fill_and_go_on(here: Path) -> dict[str, object]:
    """A run whose disk is full between steps 2 and 4, and that goes on when there is room again; inside of the small
    file system, on which `here / "runs"` lies."""
    file, run_dir = _stopped_run(here)
    adapters = _digests(run_dir / "adapters")
    kept = _digests(run_dir / "checkpoints", run_dir / "adapters")
    fillers = list(_fill(here / "runs"))
    full = commands.run("train", file, "--resume", "tiny")
    is_kept = _digests(run_dir / "checkpoints", run_dir / "adapters") == kept
    for path in fillers:
        path.unlink()
    after = commands.run("train", file, "--resume", "tiny")
    return {
        "full": [full.code, full.out, full.err],
        "kept": is_kept,
        "after": [after.code, after.err],
        "same": _digests(run_dir / "adapters") == adapters,
    }


def test_a_full_disk_is_one_message_and_when_there_is_room_the_run_ends_bitwise_as_without_it(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    if subprocess.run([*_ALONE, tmp_path / "runs", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a process have a file system of its own")
    here = Path(__file__).parent
    done = subprocess.run(
        [*_ALONE, tmp_path / "runs", sys.executable, "-c", _CODE, tmp_path],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    code, out, err = found["full"]
    assert (code, out) == (2, "")
    message = err.splitlines()[-1]
    run_dir = tmp_path / "runs" / "tiny"
    assert f"checkpoint {run_dir}/checkpoints/step-4 cannot be written: No space left on device. It needs" in message
    assert f"The last good one is {run_dir}/checkpoints/step-2. Make room and go on with --resume." in message
    assert "Traceback" not in err + done.stderr
    assert found["kept"] and found["same"]
    assert found["after"][0] == 0 and "goes on from step-2" in found["after"][1]


def test_a_full_disk_ends_the_run_with_its_directory_and_the_last_checkpoint_goes_on(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own: no library adds a line of its own either."""
    file, run_dir = _stopped_run(tmp_path)
    before = _digests(run_dir / "checkpoints", run_dir / "adapters")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = commands.run_alone("train", file, "--resume", "tiny", before=limit)
    assert (done.code, done.out) == (2, "")
    *progress, message = done.err.splitlines()
    assert message.startswith(
        f"{file}: checkpoint {run_dir}/checkpoints/step-4 cannot be written: File too large. It needs"
    )
    assert f"The last good one is {run_dir}/checkpoints/step-2. Make room and go on with --resume." in message
    assert all(line.startswith(("note at step", "step ", "evaluation at step")) for line in progress), progress
    assert _digests(run_dir / "checkpoints", run_dir / "adapters") == before
    done = commands.run("train", file, "--resume", "tiny")
    assert done.code == 0
    assert "goes on from step-2" in done.err
    assert _steps(run_dir) == [1, 2, 3, 4, 3, 4, 3, 4]


def test_a_disk_that_is_full_at_the_first_checkpoint_costs_a_run_neither_its_rows_nor_its_name(tmp_path: Path) -> None:
    tiny.run_config(tmp_path)
    file, run_dir = tmp_path / "run.json", tmp_path / "runs" / "tiny"
    assert commands.run("train", file, "name=packs").code == 0
    with commands.file_size_limit(2_500):  # room for rows
        full = commands.run("train", file)
    assert full.code == 2 and "step-2 cannot be written: File too large" in full.err, full.err
    assert "The last good one is none. Make room and go on with --resume, from the first step." in full.err
    assert _steps(run_dir) == [1, 2]
    again = commands.run("train", file, "--resume", "tiny")
    assert again.code == 0, again.err
    assert _steps(run_dir)[-4:] == [1, 2, 3, 4]


def test_metrics_that_cannot_be_written_end_the_run_at_its_next_checkpoint(tmp_path: Path) -> None:
    file, run_dir = _stopped_run(tmp_path)
    for number in range(1000):
        records.append(run_dir / "metrics.jsonl", NoteRecord(step=2, text=f"long note {number:090}"))
    size = (run_dir / "metrics.jsonl").stat().st_size
    with commands.file_size_limit(size + 20):  # room for a checkpoint, and for a part of the next row
        done = commands.run("train", file, "--resume", "tiny")
    assert done.code == 2
    assert done.err == (
        f"{file}: {run_dir} cannot be written: File too large. What was saved before is kept; make room and start the "
        f"run again (with --resume tiny where it has taken a step).\n"
    )
    assert (run_dir / "checkpoints" / "step-4").is_dir()
    done = commands.run("train", file, "--resume", "tiny")
    assert done.code == 0
    assert "goes on from step-4" in done.err
    assert _steps(run_dir) == [1, 2, 3, 4]  # readable: the row that was cut is gone


def test_a_full_disk_while_packing_leaves_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSCALE_CACHE", str(tmp_path / "cache"))
    tiny.run_config(tmp_path)
    file = tmp_path / "run.json"
    with commands.file_size_limit(100_000):
        done = commands.run("train", file)
    assert done.code == 2
    assert f"{file}: the packed base cannot be written to {tmp_path}/cache/packs/" in done.err
    assert "File too large. Make room, or choose another place: the environment variable PEFTSCALE_CACHE" in done.err
    assert not (tmp_path / "runs").exists()
    assert [path.suffix for path in pack.cache_dir().iterdir()] == [".lock"]
