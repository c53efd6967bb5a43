"""The catalogue: tasks of the literature by name, in the text-to-text form of T5, with their metrics.

Each is a YAML file beside this one: the keys of a run file's `task`, where the data and the form come from, and how
many examples the data set of the hub has. A run file's task that is not complete takes from here what it leaves out.
Nothing in these files runs but the Jinja of their templates, in the sandbox of `data.template`.

Source: Raffel et al. 2020, arXiv:1910.10683, appendix D; the name of the task in front of the input is left out, as in
Lester et al. 2021, arXiv:2104.08691, section 3.1. The cue " target:" is that of section 3.2.2 of the former, where a
decoder alone continues the input; an encoder-decoder reads the input without it.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from peftscale.config import DataFiles, Frozen, TaskConfig

Split = Literal["train", "validation", "test"]
_REQUIRED = {"input", "target", "metrics"}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


class Entry(Frozen):
    """One task of the catalogue."""

    about: str
    """What is asked."""
    source: str
    """Of the data, and of the form that they are put in."""
    sizes: dict[Split, int]
    """Examples of the hub's data set, as they are trained on and evaluated."""
    task: dict[str, Any]
    """Keys of TaskConfig. No `hub` where there are only files."""

    def over(self, files: DataFiles) -> TaskConfig:
        """The task over local files of the same columns."""
        return TaskConfig.model_validate({**self.task, "hub": None, "files": files})

    def files_in(self, directory: Path) -> DataFiles | None:
        """DIRECTORY/<name>/train.jsonl, validation.jsonl, test.jsonl (or csv, parquet); None without the first two."""
        folder = directory / self.task["name"]
        found = {
            split: folder / f"{split}{suffix}"
            for split in get_args(Split)
            for suffix in _SUFFIXES
            if (folder / f"{split}{suffix}").is_file()
        }
        return DataFiles(**found) if {"train", "validation"} <= set(found) else None


@functools.cache
def entries() -> dict[str, Entry]:
    """All tasks by name, in alphabetical order."""
    files = sorted(Path(__file__).parent.glob("*.yaml"), key=lambda file: file.stem)
    return {file.stem: Entry.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files}


def described(entry: Entry) -> dict[str, Any]:
    """What a list of tasks says of one."""
    hub = entry.task.get("hub")
    return {
        "about": entry.about,
        "source": entry.source,
        "kind": "labels" if "labels" in entry.task else "generated",
        "metrics": entry.task["metrics"],
        "hub": hub and {"path": hub["path"], "subset": hub.get("subset")},
        "sizes": dict(entry.sizes),
    }


def is_complete(task: Mapping[str, Any]) -> bool:
    """Whether a run file's task needs nothing from here."""
    return set(task) >= _REQUIRED


def filled(task: Mapping[str, Any]) -> dict[str, Any] | None:
    """A run file's task with what it leaves out taken from the catalogue's; None where that has no such name.

    What is given stands: `files` in place of the catalogue's `hub`, single keys of `hub` among the others. Other words
    for the same labels keep the catalogue's order, whose last one is the positive class of F1.
    """
    entry = entries().get(str(task.get("name")))
    if entry is None:
        return None
    merged = {**entry.task, **task}
    labels, own_labels = entry.task.get("labels"), task.get("labels")
    if labels and isinstance(own_labels, dict) and set(own_labels) == set(labels):
        merged["labels"] = {label: own_labels[label] for label in labels}
    own_hub = task.get("hub")
    if isinstance(own_hub, dict):
        merged["hub"] = {**entry.task.get("hub", {}), **own_hub}
    elif task.get("files") is not None:
        merged["hub"] = own_hub
    return merged
