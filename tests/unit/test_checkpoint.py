"""Promise 10: whatever happens to the newest checkpoint, the last good one is used and the log says so."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import damages
import pytest
import states
import torch

from peftscale.errors import CheckpointError
from peftscale.train import checkpoint
from peftscale.train.checkpoint import Identity, State

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
"""Of a process that imports this file."""


def _restore(state: State, root: Path, identity: Identity) -> Path | None:
    """What a worker does as it starts."""
    found = checkpoint.newest(root)
    if found is not None:
        checkpoint.take_over_(state, found, identity)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_restored_state_goes_on_bitwise_as_the_one_that_was_saved(tmp_path: Path, optimizer: str) -> None:
    first = states.make(steps=3, optimizer=optimizer)
    checkpoint.save_(first, tmp_path, states.IDENTITY, keep=2)
    second = states.make(steps=0, optimizer=optimizer)
    assert _restore(second, tmp_path, states.IDENTITY) == tmp_path / "step-3"
    assert second.progress == first.progress
    for state in (first, second):
        states.move_(state, 3)
    assert all(torch.equal(x, y) for x, y in zip(states.rows(first), states.rows(second), strict=True))


def test_only_so_many_checkpoints_are_kept_and_the_newest_is_restored(tmp_path: Path) -> None:
    state = states.make(steps=0)
    for step in range(12):
        states.move_(state, step)
        checkpoint.save_(state, tmp_path, states.IDENTITY, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-11", "step-12"]
    assert _restore(states.make(steps=0), tmp_path, states.IDENTITY) == tmp_path / "step-12"


@pytest.mark.parametrize("file", damages.CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", damages.ALL)
def test_a_damaged_file_of_the_newest_checkpoint_falls_back_to_the_one_before_and_loses_nothing_older(
    tmp_path: Path, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    state = states.make(steps=0)
    for step in range(3):
        states.move_(state, step)
        checkpoint.save_(state, tmp_path, states.IDENTITY, keep=3)
    older = {step: damages.content(tmp_path / step) for step in ("step-1", "step-2")}
    damage(tmp_path / "step-3" / file)
    restored = states.make(steps=0)
    with caplog.at_level(logging.WARNING):
        assert _restore(restored, tmp_path, states.IDENTITY) == tmp_path / "step-2"
    assert restored.step == 2
    if damage is not damages.half_written:  # of which nothing has the name of a checkpoint
        assert f"checkpoint {tmp_path / 'step-3'} is " in caplog.text
        assert "trying the one before it" in caplog.text
    states.move_(restored, 2)
    checkpoint.save_(restored, tmp_path, states.IDENTITY, keep=3)
    assert {step: damages.content(tmp_path / step) for step in older} == older
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-3"]
    assert _restore(states.make(steps=0), tmp_path, states.IDENTITY) == tmp_path / "step-3"  # whole again
    assert all(torch.equal(x, y) for x, y in zip(states.rows(restored), states.rows(state), strict=True))


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every file of it is whole."""
    state = states.make(steps=0)
    for step in range(2):
        states.move_(state, step)
        checkpoint.save_(state, tmp_path, states.IDENTITY, keep=2)
    (tmp_path / "step-1").rename(tmp_path / "step-3")
    assert _restore(states.make(steps=0), tmp_path, states.IDENTITY) == tmp_path / "step-2"
    assert "step-3 is another one, renamed (it holds the state after step 1)" in caplog.text


def test_no_whole_checkpoint_among_several_is_an_error_and_none_at_all_is_a_start(tmp_path: Path) -> None:
    assert _restore(states.make(steps=0), tmp_path / "nothing", states.IDENTITY) is None
    checkpoint.save_(states.make(steps=1), tmp_path, states.IDENTITY, keep=2)
    damages.flip(tmp_path / "step-1" / "adapters.safetensors")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoint"):
        _restore(states.make(steps=0), tmp_path, states.IDENTITY)


def test_a_checkpoint_of_another_version_is_refused_by_its_format(tmp_path: Path) -> None:
    """Between formats the names of tensors change."""
    checkpoint.save_(states.make(steps=1), tmp_path, states.IDENTITY, keep=2)
    manifest = tmp_path / "step-1" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": checkpoint.FORMAT - 1}))
    with pytest.raises(CheckpointError, match=r"step-1 has format 2 \(manifest.json\), this version reads 3: another"):
        _restore(states.make(steps=0), tmp_path, states.IDENTITY)


def test_a_checkpoint_of_another_base_or_run_file_is_refused_with_what_differs(tmp_path: Path) -> None:
    checkpoint.save_(states.make(steps=1), tmp_path, states.IDENTITY, keep=2)
    other_base = Identity("sha256:bb", "f1", 2, 1, states.IDENTITY.config)
    with pytest.raises(CheckpointError, match="base sha256:aa, this base is sha256:bb"):
        _restore(states.make(steps=0), tmp_path, other_base)
    other_file = Identity("sha256:aa", "f2", 2, 1, {"train": {"steps": 10}})
    with pytest.raises(CheckpointError, match="train.steps was 9, now 10"):
        _restore(states.make(steps=0), tmp_path, other_file)


def test_a_disk_that_is_full_while_saving_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    code = """
import resource, signal, sys
from pathlib import Path
import states as t
from peftscale.errors import CheckpointError
from peftscale.train import checkpoint
root = Path(sys.argv[1])
state = t.make(steps=1)
checkpoint.save_(state, root, t.IDENTITY, keep=2)
t.move_(state, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    checkpoint.save_(state, root, t.IDENTITY, keep=2)
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be written: File too large" in done.stdout
    assert f"The last good one is {tmp_path / 'step-1'}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert _restore(states.make(steps=0), tmp_path, states.IDENTITY) == tmp_path / "step-1"


def test_a_process_killed_inside_a_save_leaves_the_last_checkpoint_to_be_used(tmp_path: Path) -> None:
    """SIGKILL when half of the files are written: in os.fsync of the third one."""
    code = """
import os, signal, sys
from pathlib import Path
import states as t
from peftscale.train import checkpoint
root = Path(sys.argv[1])
state = t.make(steps=1)
checkpoint.save_(state, root, t.IDENTITY, keep=2)
t.move_(state, 1)
calls = []
def fsync(descriptor, original=os.fsync):
    calls.append(descriptor)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    original(descriptor)
os.fsync = fsync
checkpoint.save_(state, root, t.IDENTITY, keep=2)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the good one, and what the killed writer left
    restored = states.make(steps=0)
    assert _restore(restored, tmp_path, states.IDENTITY) == tmp_path / "step-1"
    states.move_(restored, 1)
    checkpoint.save_(restored, tmp_path, states.IDENTITY, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    checkpoint.save_(states.make(steps=1), tmp_path, states.IDENTITY, keep=2)
    for path in (tmp_path / "step-1").iterdir():
        content = path.read_bytes()
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(content)
        else:
            assert int.from_bytes(content[:8], "little") < len(content)
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_damaged_newer_checkpoint_takes_no_good_one_s_place(tmp_path: Path) -> None:
    """The run went on from step 2, as step 4 is damaged, and saves before it is there again."""
    for step in (2, 4):
        checkpoint.save_(states.make(steps=step), tmp_path, states.IDENTITY, keep=1 + step)
    (tmp_path / "step-4" / "manifest.json").unlink()
    written = checkpoint.save_(states.make(steps=3), tmp_path, states.IDENTITY, keep=1)
    assert written.name == "step-3"
    assert checkpoint.newest(tmp_path) == written
    assert not (tmp_path / "step-2").exists()
