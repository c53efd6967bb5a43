"""Texts of a task: each row of a split as what is read, what is to be written, and what a prediction is held against.

A row may become several examples (`task.each`, `task.references`), and rows of an evaluation may become one
(`task.group`). Reading files is `rows`, the templates themselves are `template`, token ids are `tasks`.

Source: one example for each right answer in training and one for each question in evaluation is how ReCoRD is put in
Raffel et al. 2020, arXiv:1910.10683; targets that are not the right ones are its WSC.
"""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftscale.config import TaskConfig
from peftscale.data import rows
from peftscale.data.template import Expression, Template
from peftscale.errors import DataError
from peftscale.task_config import Split

_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Text:
    """One rendered example."""

    split: Split
    where: str
    index: int
    """Among the examples of its split, counted from 0."""
    input: str
    target: str
    """The words of the label, or the text to be written."""
    label: int | None
    references: tuple[str, ...] = ()
    """All right texts, where the target is generated: at least the target."""
    group: str | None = None
    target_holds: bool = True


def render(task: TaskConfig, split: Split, *, is_encoder_decoder: bool = False) -> list[Text]:
    """The texts of one split, labels checked; nothing where the task has no such split.

    Raises:
        DataError: a file, a row or a label that cannot be used; the message names it.
        ConfigError: a template that is not Jinja.
    """
    table = rows.load(task, split)
    if table is None:
        return []
    form = Form(task, is_encoder_decoder=is_encoder_decoder)
    columns = form.columns(table.columns, where=table.where)
    found: list[Text] = []
    for number, row in enumerate(table.only(columns)):
        found += form.texts(row, split=split, where=table.where, index=number)
    if not found:
        raise DataError(f"{table.where}: its {len(table)} rows give no example{_why_none(task, split)}.")
    where = table.where + (", counted as examples" if len(found) != len(table) else "")
    if task.labels is not None:
        _check_labels(task.labels, [text.target for text in found], where=where, is_train=split == "train")
        place = {key: i for i, key in enumerate(task.labels)}
        found = [
            dataclasses.replace(text, target=task.labels[text.target], label=place[text.target], references=())
            for text in found
        ]
    elif task.group is not None and split != "train":
        found = _merged(found)
        where = f"{table.where}, counted by task.group"
    return [dataclasses.replace(text, where=where, index=i) for i, text in enumerate(found)]


def count(task: TaskConfig) -> dict[str, int]:
    """Examples of each split that the task has, after every row has been rendered."""
    sizes = {split: len(render(task, split)) for split in rows.SPLITS}
    return {split: num for split, num in sizes.items() if num}


class Form:
    """The compiled templates and expressions of a task."""

    def __init__(self, task: TaskConfig, *, is_encoder_decoder: bool) -> None:
        self._cue = "" if is_encoder_decoder else task.cue
        self._each = {name: Expression(f"task.each.{name}", source) for name, source in task.each.items()}
        self._input = Template("task.input", task.input)
        self._target = Template("task.target", task.target)
        self._references, self._group, self._holds = (
            None if source is None else Expression(f"task.{key}", source)
            for key, source in (
                ("references", task.references),
                ("group", task.group),
                ("target_holds", task.target_holds),
            )
        )

    def columns(self, of_table: Sequence[str], *, where: str) -> set[str]:
        """The columns of the table that are read.

        Raises:
            DataError: one is named that the table lacks.
        """
        known, used = list(of_table), set[str]()
        for name, expression in self._each.items():
            used |= expression.used(known, where=where)
            known.append(name)
        for source in (self._input, self._references, self._group, self._holds):
            used |= source.used(known, where=where) if source else set()
        used |= self._target.used([*known, *(["reference"] if self._references else [])], where=where)
        return used & set(of_table)

    def input(self, row: Mapping[str, Any], *, where: str, index: int) -> str:
        """The text that is read. `row` holds the names of `each` already.

        Raises:
            DataError: a column is not there, or the template fails.
        """
        self._input.used(list(row), where=where)
        text = self._input.render(row, where=where, index=index)
        return text.rstrip() + self._cue if self._cue else text

    def texts(self, row: Mapping[str, Any], *, split: Split, where: str, index: int) -> Iterator[Text]:
        """The examples of one row; the label is still the rendered target."""
        at: Any = {"where": where, "index": index}
        for spread in self._spread(row, at):
            holds = self._holds is None or self._holds.value(spread, bool, **at)
            if split == "train" and not holds:
                continue
            text = self.input(spread, **at)
            group = None if self._group is None else str(self._group.value(spread, object, **at))
            targets = self._targets(spread, at)
            for target in targets if split == "train" else targets[:1]:
                references = (target,) if split == "train" else targets
                yield Text(split, where, index, text, target, None, references, group, holds)

    def _spread(self, row: Mapping[str, Any], at: Any) -> list[Mapping[str, Any]]:
        """The row once for each entry of its lists."""
        spread = [row]
        for name, expression in self._each.items():
            spread = [{**outer, name: entry} for outer in spread for entry in expression.value(outer, list, **at)]
        return spread

    def _targets(self, row: Mapping[str, Any], at: Any) -> tuple[str, ...]:
        """The rendered target, or that of each reference; equal ones once."""
        if self._references is None:
            return (self._target.render(row, **at),)
        references = self._references.value(row, list, **at)
        if not references:
            raise DataError(
                f"task.references: empty in row {at['index']} (counted from 0) of {at['where']}; at least one answer "
                f"is needed. Drop the row."
            )
        return tuple(dict.fromkeys(self._target.render({**row, "reference": one}, **at) for one in references))


def _merged(texts: Sequence[Text]) -> list[Text]:
    """One example for each group, with the references of all of its rows, in the order of the first ones."""
    groups: dict[str | None, Text] = {}
    for text in texts:
        first = groups.setdefault(text.group, text)
        if first.input != text.input:
            raise DataError(
                f"task.group: rows {first.index} and {text.index} (counted from 0) of {text.where} have the group "
                f"{text.group!r:.80} and different inputs; one prediction cannot stand for both."
            )
        references = tuple(dict.fromkeys(first.references + text.references))
        groups[text.group] = dataclasses.replace(first, references=references)
    return list(groups.values())


def _why_none(task: TaskConfig, split: Split) -> str:
    """Which keys of the task may have left nothing over."""
    keys = [f"task.each.{name}" for name in task.each]
    if split == "train" and task.target_holds is not None:
        keys.append("task.target_holds")
    return f"; look at {' and '.join(keys)}" if keys else ""


def _check_labels(labels: dict[str, str], found: Sequence[str], *, where: str, is_train: bool) -> None:
    """Both directions: every rendered target is a key, and every key occurs in the train split."""
    counts = Counter(found)
    unknown = [(value, count) for value, count in counts.most_common() if value not in labels]
    if unknown:
        value = unknown[0][0]
        close = difflib.get_close_matches(value, labels, n=1) or [key for key in labels if key.strip() == value.strip()]
        hint = f"Did you mean {close[0]!r}?" if close else "Add it to task.labels, or correct the rows."
        listed = ", ".join(f"{value!r} ({count} times)" for value, count in unknown[:_NUM_SHOWN])
        more = f" and {len(unknown) - _NUM_SHOWN} more" if len(unknown) > _NUM_SHOWN else ""
        raise DataError(
            f"{where}: task.target renders {listed}{more}, first in row {list(found).index(value)} (counted from 0); "
            f"the keys of task.labels are {', '.join(map(repr, labels))}. {hint}"
        )
    absent = [key for key in labels if key not in counts]
    if is_train and absent:
        raise DataError(
            f"task.labels: {', '.join(map(repr, absent))} never occur(s) in {where}; task.target renders "
            f"{', '.join(map(repr, sorted(counts)))} there. Take the key out, or check the file."
        )
