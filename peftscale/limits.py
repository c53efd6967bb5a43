"""Limits of a run file: how much a few lines of YAML may stand for, looked at before anything is made of them.

Files with more are mistakes or bombs, which would take minutes or all memory where one message is enough. Values behind
aliases are counted by OmegaConf. What a file may say is `config`.
"""

from collections.abc import Iterator
from typing import Any

import yaml

LEVELS = 40
VALUES = 10_000
"""Of a file with its interpolations resolved."""
REFERENCES = 30
"""In texts that hold several: a chain of such texts grows as a power."""
PRODUCT = 10_000
"""Adapters that the lists of one entry may make."""


def deep_line(text: str) -> int | None:
    """The first line of YAML that is more than LEVELS deep, what is behind aliases counted. None: no line is.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    known: dict[str, int] = {}
    unfinished: list[tuple[str | None, int]] = [(None, 0)]  # the document, and each collection that is not closed yet
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor, levels = None, 0
        if isinstance(event, yaml.CollectionStartEvent):
            unfinished.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, levels = unfinished.pop()
        elif isinstance(event, yaml.AliasEvent):
            levels = known.get(str(event.anchor), 0)
        if anchor is not None:
            known[anchor] = levels
        if len(unfinished) + levels > LEVELS:
            mark: Any = event.start_mark
            return int(mark.line) + 1
        of, deepest = unfinished.pop()
        unfinished.append((of, max(deepest, levels + 1)))
    return None


def num_joined_references(tree: Any) -> int:
    """Interpolations in all texts of a tree that hold more than one."""
    counts = (text.count("${") for text in _texts(tree))
    return sum(count for count in counts if count > 1)


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(value)
