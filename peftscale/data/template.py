"""Templates and expressions of a run file: Jinja source over the columns of a row -> text, or a value.

A run file may come from somebody else, so the source runs in Jinja's sandbox. Nothing is filled in
silently: an unknown column, a missing value and an error inside the template are refused.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peftscale.errors import ConfigError, DataError


class _Source:
    """What templates and expressions share: a key of the run file, for messages, and the names that are read."""

    names: frozenset[str]

    def __init__(self, key: str) -> None:
        self.key = key
        # a line break at the end is text that the base reads, and Jinja would drop it
        self._env = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_no_missing_value
        )

    def used(self, columns: Collection[str], *, where: str) -> frozenset[str]:
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
        return self.names | (frozenset(self._env.globals) & set(columns))

    def _failed(self, error: Exception, *, where: str, index: int) -> DataError:
        return DataError(f"{self.key}: fails on row {index} (counted from 0) of {where}: {error}")


class Template(_Source):
    """One compiled template."""

    def __init__(self, key: str, source: str) -> None:
        super().__init__(key)
        try:
            self.names = frozenset(meta.find_undeclared_variables(self._env.parse(source)))
            self._template = self._env.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{key}: not a Jinja template: {error} (in {source!r}).") from error

    def render(self, row: Mapping[str, Any], *, where: str, index: int) -> str:
        """The text of one row.

        Raises:
            DataError: a value is missing, or the template fails on this row; `index` is in the message.
        """
        try:
            return self._template.render(row)
        except Exception as error:  # a template is a program: whatever it raises comes out here
            raise self._failed(error, where=where, index=index) from error


class Expression(_Source):
    """One compiled expression: what stands between the braces of a template."""

    def __init__(self, key: str, source: str) -> None:
        super().__init__(key)
        try:
            self._value = self._env.compile_expression(source, undefined_to_none=False)
            self.names = frozenset(meta.find_undeclared_variables(self._env.parse(f"{{{{ {source} }}}}")))
        except jinja2.TemplateError as error:
            raise ConfigError(f"{key}: not a Jinja expression: {error} (in {source!r}).") from error

    def value(self, row: Mapping[str, Any], kind: type[Any], *, where: str, index: int) -> Any:
        """What the expression gives for one row.

        Args:
            kind: what it has to be: bool, list, or object for anything.

        Raises:
            DataError: it fails on this row, gives nothing, or something else.
        """
        try:
            value = self._value(row)
            if isinstance(value, jinja2.Undefined):
                str(value)  # says what is missing
            _no_missing_value(value)
        except Exception as error:
            raise self._failed(error, where=where, index=index) from error
        if not isinstance(value, kind):
            got = TypeError(f"gives {value!r:.80}, but a {kind.__name__} is needed")
            raise self._failed(got, where=where, index=index)
        return value


def _no_missing_value(value: Any) -> Any:
    """Called by Jinja on everything it is about to write. None would become the word 'None' in a text."""
    if value is None:
        raise DataError(
            "a value is null or missing; fill it in, drop the row, or say in the template what stands for it, "
            "as in {{ column or '' }}"
        )
    return value
