"""A template of a run file: Jinja source over the columns of a row -> text.

A run file may come from somebody else, so the source runs in Jinja's sandbox. Nothing is filled in
silently: an unknown column, a missing value and an error inside the template are refused.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peftscale.errors import ConfigError, DataError


class Template:
    """One compiled template. `key` is where it stands in the run file, for messages."""

    def __init__(self, key: str, source: str) -> None:
        self.key = key
        # a line break at the end is text that the base reads, and Jinja would drop it
        env = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_no_missing_value
        )
        try:
            self.names: frozenset[str] = frozenset(meta.find_undeclared_variables(env.parse(source)))
            self._template = env.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{key}: not a Jinja template: {error} (in {source!r}).") from error
        self._globals = frozenset(env.globals)

    def used(self, columns: Sequence[str], *, where: str) -> frozenset[str]:
        """The columns that the template reads.

        Raises:
            DataError: it names one that `columns` lacks.
        """
        for name in sorted(self.names - set(columns)):
            close = difflib.get_close_matches(name, columns, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{self.key}: unknown column {name!r}{hint} The columns of {where} are {', '.join(map(repr, columns))}."
            )
        # a column called `range` or `dict` is a column, not Jinja's function of that name
        return self.names | (self._globals & set(columns))

    def render(self, row: Mapping[str, Any], *, where: str, index: int) -> str:
        """The text of one row.

        Raises:
            DataError: a value is missing, or the template fails on this row; `index` is in the message.
        """
        try:
            return self._template.render(row)
        except Exception as error:  # a template is a program: whatever it raises comes out here
            raise DataError(f"{self.key}: fails on row {index} (counted from 0) of {where}: {error}") from error


def _no_missing_value(value: Any) -> Any:
    """Called by Jinja on everything it is about to write. None would become the word 'None' in a text."""
    if value is None:
        raise DataError(
            "a value is null or missing; fill it in, drop the row, or say in the template what stands for it, "
            "as in {{ column or '' }}"
        )
    return value
