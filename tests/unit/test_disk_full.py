"""A disk that is full: a file system of 2 MB of its own, in which nothing can be written any more, metrics and logs
neither. Limits of single files are in `test_bad_input.py` and `test_checkpoint.py`."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
import tiny

_MOUNT = 'mount -t tmpfs -o size=2m none "$0" && exec "$@"'
_ALONE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT]
_CODE = "import sys, json, pathlib, test_disk_full as t; print(json.dumps(t.fill_and_go_on(pathlib.Path(sys.argv[1]))))"


def _digests(*directories: Path) -> dict[str, str]:
    files = (path for directory in directories for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    tiny.run_config(here)
    file, run_dir = here / "run.json", here / "runs" / "tiny"
    assert commands.run("train", file).code == 0
    adapters = _digests(run_dir / "adapters")
    (run_dir / "summary.json").unlink()
    for path in (run_dir / "checkpoints" / "step-4").iterdir():
        path.unlink()
    (run_dir / "checkpoints" / "step-4").rmdir()
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
