"""Redaction: secrets taken out of text before it is shown or written down.

What is a secret: the value of a variable whose name says so (HF_TOKEN, AWS_SECRET_ACCESS_KEY) or that
`cluster.deploy.secrets` names; a password in a URL; and what looks like a token. It is asked wherever text leaves us:
rows of records and logs, messages, run files as they are read.
"""

import os
import re
import traceback
from collections.abc import Iterable

NAMES = "PEFTSCALE_SECRETS"
"""The variable that holds the names of those that are secret whatever they are called. Jobs are given it."""
_ENDINGS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "_KEY", "_KEY_ID", "CREDENTIALS", "CONNECTION_STRING")
_LEAST = 8
"""Shorter values are words and numbers that text holds anyway. Unit: characters."""
_MARK = "<redacted>"
_SHAPES = (  # each begins with few letters, so that long texts are searched fast
    (re.compile(r"://[^/\s:@]*:[^/\s@]+@"), f"://{_MARK}@"),
    (re.compile(r"([?&][\w.-]*(?i:token|signature|secret|password|credential)[\w.-]*=)[^&\s'\")<>]+"), rf"\1{_MARK}"),
    (re.compile(r"([Bb]earer )[\w.~+/=-]{8,}"), rf"\1{_MARK}"),
    (re.compile(r"\b(?:(?:hf|gh[pousr])_[A-Za-z0-9]{20,}|(?:github_pat_|sk-)[\w-]{20,}|AKIA[A-Z0-9]{16})\b"), _MARK),
)


def redacted(text: str) -> str:
    """The text with the name of the variable, or a mark, in place of each secret. Twice changes no more than once."""
    named = _named()
    values = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _LEAST and (name.upper().endswith(_ENDINGS) or name in named)
    }
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, f"<{values[value]}>")
    for shape, without in _SHAPES:
        text = shape.sub(without, text)
    return text


def current_error() -> str:
    """The exception that is being handled, with its traceback, as it may be shown."""
    return redacted(traceback.format_exc())


def name(variables: Iterable[str]) -> None:
    """Take the values of these variables for secrets from now on, here and in processes that are started."""
    names = dict.fromkeys([*_named(), *variables])
    if names:
        os.environ[NAMES] = ",".join(names)


def named_variables() -> dict[str, str]:
    """The variables that were named and are set, and what names them: for processes that do not inherit them."""
    found = {variable: os.environ[variable] for variable in _named() if variable in os.environ}
    return {**found, NAMES: os.environ[NAMES]} if found else {}


def _named() -> list[str]:
    return [variable for variable in os.environ.get(NAMES, "").split(",") if variable]
