"""Ray's token: whoever has it may run code on the cluster. Found where Ray looks, made where nobody else can read it.

Which clusters it is sent to is `jobs.submit`. Source: Ray's page on token authentication.
"""

import contextlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from peftscale.errors import ClusterError

_OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class Token:
    """A token and where it came from. What is printed of it is the second."""

    value: str = field(repr=False)
    source: str


def is_disabled() -> bool:
    """Whether RAY_AUTH_MODE says that there is to be none."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"


def file() -> Path:
    """Where Ray reads the token where RAY_AUTH_TOKEN does not hold it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def find() -> Token | None:
    """The token as Ray would find it; None where there is none or RAY_AUTH_MODE=disabled.

    Raises:
        ClusterError: its file cannot be read.
    """
    if is_disabled():
        return None
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    if not file().exists() and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return None
    try:
        value = file().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ClusterError(f"{file()}, Ray's token, cannot be read: {reason}. Set RAY_AUTH_TOKEN_PATH.") from error
    return Token(value, str(file())) if value else None


def prepare() -> None:
    """Before a Ray starts on this machine: make the token that it will take, or close the one that is there to others.

    Ray would make it readable by everybody.

    Raises:
        ClusterError: there is none and none can be made.
    """
    if is_disabled() or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        with contextlib.suppress(OSError):  # somebody else's, or mounted: `peftscale doctor` names it
            if path.stat().st_mode & _OTHERS:
                path.chmod(0o600)
    except OSError as error:
        raise ClusterError(
            f"{path}, Ray's token, cannot be made: {error.strerror}. Set HOME or RAY_AUTH_TOKEN_PATH to a place that "
            f"can be written."
        ) from error
    else:
        with os.fdopen(descriptor, "w") as new:
            new.write(secrets.token_hex(32))
