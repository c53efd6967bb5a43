"""Ray's token: found where Ray finds it, and readable for nobody else from the moment it is there."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftscale import auth
from peftscale.errors import ClusterError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)  # what is made without care is everybody's
    yield tmp_path
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_alone(home: Path) -> None:
    (home / "other").write_text("")
    assert _mode(home / "other") == 0o666  # the control
    auth.prepare()
    file = home / ".ray" / "auth_token"
    assert _mode(file) == 0o600 and _mode(file.parent) == 0o700
    made = file.read_text()
    assert len(made) == 64 and int(made, 16) >= 0
    auth.prepare()
    assert file.read_text() == made
    assert auth.find() == auth.Token(made, str(file))


def test_a_token_that_others_can_read_is_closed_and_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "token"
    file.write_text("abc\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    auth.prepare()
    assert _mode(file) == 0o600 and file.read_text() == "abc\n"
    found = auth.find()
    assert found is not None and found.value == "abc" and "abc" not in repr(found)


def test_nothing_is_made_where_ray_needs_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    auth.prepare()
    assert auth.find() == auth.Token("abc", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.prepare()
    assert auth.find() is None
    assert list(home.iterdir()) == []


def test_no_token_is_none_and_a_path_to_none_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth.find() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "nowhere"))
    with pytest.raises(ClusterError, match="nowhere, Ray's token, cannot be read: No such file or directory"):
        auth.find()


def test_a_home_where_no_token_can_be_made_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    with pytest.raises(
        ClusterError, match=r"file/.ray/auth_token, Ray's token, cannot be made: .*Set HOME or RAY_AUTH"
    ):
        auth.prepare()
