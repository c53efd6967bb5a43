"""Complaints: what is wrong with a run file, in words a person can act on.

Puts pydantic's errors into our form (key, rule, what was got, what to do) and knows which keys a run file may have.
The rules themselves are `config`; reading the file is `configio`.
"""

import difflib
import functools
import operator
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from peftscale.config import RunConfig, TrainConfig

Keys = tuple[str, ...]
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_OF_ADAPTER = re.compile(r"^adapters\.(\S+?)\.([a-z_]+(?:\.[a-z_]+)*): (.+)$")
_OWN_KEYS = re.compile(r"^([a-z_]+(?:\.[a-z_]+)*(?:, [a-z_]+)*): (.+)$", re.DOTALL)


class Problems:
    """The problems of one file in the order they were found, one for each key: the first one explains the rest."""

    def __init__(self) -> None:
        self.typed: dict[Keys, str] = {}
        """Overrides that were applied, by their keys: a problem there names the override."""
        self.products: dict[str, str] = {}
        """Adapters that a product made -> the adapter that was typed: a problem there is told once, where it stands."""
        self._lines: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, keys: Keys | str, text: str) -> None:
        """Note `text` for a key, or for a place that has a name of its own."""
        if keys[0:1] == ("adapters",) and len(keys) > 1:
            keys = ("adapters", self.products.get(keys[1], keys[1]), *keys[2:])
        name = keys if isinstance(keys, str) else ".".join(keys)
        for typed, override in self.typed.items():
            if not isinstance(keys, str) and (keys[: len(typed)] == typed or typed[: len(keys)] == keys != ()):
                text += f" (override '{override}')"
                break
        self._lines.setdefault(name or "run file", text)

    def text(self, source: str) -> str:
        """The whole message: the file, the number, and a line for each problem."""
        lines = [f"  {name}: {text}" for name, text in self._lines.items()]
        return "\n".join([f"{source}: {len(lines)} problem(s)", *lines])


def shown(value: object) -> str:
    """A value as the user would recognise it, at most about 80 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, list(value)[:4])) or 'no keys'}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...'"


def close_to(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something is close, else what is known, else nothing."""
    known = sorted(known)
    nearest = _nearest(word, known)
    if nearest:
        return f"; did you mean '{nearest}'?"
    return f"; known here: {', '.join(known[:20])}" if known else ""


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def unknown(keys: Keys) -> str | None:
    """Why no run file has this dotted key, or None when it may have it."""
    annotation: Any = RunConfig
    for depth, key in enumerate(keys):
        fields = _fields(annotation)
        if fields and key not in fields:
            return f"unknown key {'.'.join(keys[: depth + 1])}{_of_the_run(keys[:depth], key) or close_to(key, fields)}"
        child = _child(annotation, key)
        if child is None:
            return f"{'.'.join(keys[:depth])} holds a value, not keys; write {'.'.join(keys[:depth])}=VALUE"
        annotation = child[0]
    return None


def holds_text(keys: Keys) -> tuple[bool, bool]:
    """Whether the key holds text (or a path, or one word of several), and whether it may be null."""
    annotation, _ = _at(keys)
    kinds = _members(annotation)
    optional = type(None) in kinds
    text = [kind for kind in kinds if kind is not type(None)]
    return bool(text) and all(kind in (str, Path) or _words(kind) for kind in text), optional


def words_of(keys: Keys) -> tuple[Any, ...]:
    """The words among which the key's value is one; nothing for a key of another kind."""
    return tuple(word for kind in _members(_at(keys)[0]) for word in _words(kind))


def takes_list(keys: Keys) -> bool:
    """Whether the key holds a list by itself, so that a list there is one value and no product."""
    return any(get_origin(kind) in (tuple, list) for kind in _members(_at(keys)[0]))


def collect(error: ValidationError, raw: Mapping[str, Any], problems: Problems) -> None:
    """Add each pydantic error to `problems`. `raw` is what was checked."""
    items = error.errors(include_url=False)
    extra = [_typed_keys(item["loc"], raw) for item in items if item["type"] == "extra_forbidden"]
    for item in items:
        keys, value, context = _typed_keys(item["loc"], raw), item["input"], item.get("ctx", {})
        if item["type"] == "value_error":
            # Our own validators begin with the key or keys that they mean.
            for text in str(context["error"]).splitlines():
                if of_adapter := _OF_ADAPTER.match(text):  # of the whole run: its keys are whole
                    problems.add(("adapters", of_adapter[1], *of_adapter[2].split(".")), of_adapter[3])
                elif named := _OWN_KEYS.match(text):
                    where = ", ".join(".".join((*keys, key)) for key in named[1].split(", "))
                    problems.add((*keys, *named[1].split(".")) if ", " not in named[1] else where, named[2])
                else:
                    problems.add(keys, text)
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            tag_keys = (*keys, context["discriminator"].strip("'"))
            problems.add(tag_keys, _wrong_tag(context, tag_keys))
        elif item["type"] == "missing":
            # A key that is there under a slip of the pen is one problem, not two.
            if any(
                keys[:-1] == other[:-1] and _nearest(other[-1], _fields(_at(keys[:-1])[0])) == keys[-1]
                for other in extra
            ):
                continue
            problems.add(keys, f"missing; {_meaning(keys)}")
        elif item["type"] == "extra_forbidden":
            annotation, _ = _at(keys[:-1])
            known = _fields(annotation)
            of_other = " here: it belongs to another kind" if keys[-1] in known else ""
            rest = of_other or _of_the_run(keys[:-1], keys[-1]) or close_to(keys[-1], known)
            problems.add(keys, f"unknown key{rest}")
        else:
            problems.add(
                keys, f"{_rule(item['type'], context, item['msg'], keys)}, got {shown(value)}{_advice(item, keys)}"
            )


def _of_the_run(section: Keys, key: str) -> str:
    """What to say of a key of `train` that an adapter cannot have for itself. Nothing for any other key."""
    if section[:1] == ("adapters",) and section[2:] == ("train",) and key in TrainConfig.model_fields:
        return f": it belongs to the pass or the run, which all adapters share; write train.{key}"
    return ""


def _wrong_tag(context: Mapping[str, Any], keys: Keys) -> str:
    """The key that says which kind a section is of is missing or holds another word."""
    if "tag" not in context:
        return f"missing; {_meaning(keys)}"
    words = [word.strip("'") for word in context["expected_tags"].split(", ")]
    nearest = _nearest(context["tag"], words)
    advice = f"; did you mean '{nearest}'?" if nearest else ""
    return f"must be {' or '.join(map(repr, words))}, got {shown(context['tag'])}{advice}"


def _rule(kind: str, context: Mapping[str, Any], message: str, keys: Keys) -> str:
    """What would have been right."""
    match kind:
        case "greater_than_equal":
            return f"must be >= {context['ge']:g}"
        case "greater_than" if int in _members(_at(keys)[0]):
            return f"must be >= {context['gt'] + 1:g}"
        case "greater_than":
            return f"must be > {context['gt']:g}"
        case "less_than_equal":
            return f"must be <= {context['le']:g}"
        case "less_than":
            return f"must be < {context['lt']:g}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "too_short":
            return f"needs at least {context['min_length']}"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type":
            return "must be text"
        case "path_type":
            return "must be a path"
        case "tuple_type" | "list_type":
            return "must be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a mapping (key: value lines)"
        case _:
            return message[:1].lower() + message[1:]


def _advice(item: Any, keys: Keys) -> str:
    """What to write instead, where we can tell."""
    value = item["input"]
    match item["type"]:
        case "literal_error" if isinstance(value, str):
            nearest = _nearest(value, map(str, words_of(keys)))
            return f"; did you mean '{nearest}'?" if nearest else ""
        case "string_type" if isinstance(value, bool | int | float):
            return "; put it in quotes"
        case "tuple_type" | "list_type" if isinstance(value, str | int | float):
            return f"; write [{value}]"
        case "int_type" | "int_parsing" | "float_type" | "float_parsing" if isinstance(value, str):
            return "; leave the quotes out" if value.replace(".", "", 1).isdigit() else ""
        case _:
            return ""


def _typed_keys(loc: tuple[int | str, ...], raw: Any) -> Keys:
    """The keys as they stand in the file: without the tags of unions and marks that pydantic puts between."""
    keys: list[str] = []
    for position, key in enumerate(loc):
        is_last = position == len(loc) - 1
        is_mark = isinstance(raw, Mapping) and ((key not in raw and not is_last) or raw.get("kind") == key)
        if key == "[key]" or is_mark:
            continue
        keys.append(str(key))
        if isinstance(raw, Mapping):
            raw = raw.get(key)
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
    return tuple(keys)


def _meaning(keys: Keys) -> str:
    """What a missing key is for: the docstring of its field, or of the section that belongs there."""
    annotation, description = _at(keys)
    kinds = [
        part
        for kind in _members(annotation)
        for part in (_members(get_args(kind)[1]) if get_origin(kind) is dict else [kind])
    ]
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    description = description or (models[0].__doc__ if models else None)
    texts = [" ".join(description.split()).rstrip(".")] if description else []
    words = " | ".join(str(word) for kind in kinds for word in _words(kind))
    if words:
        texts.append(f"one of {words}")
    return "; ".join(texts) or f"give it {' or '.join(_KINDS[kind] for kind in kinds if kind in _KINDS) or 'a value'}"


def _at(keys: Keys) -> tuple[Any, str | None]:
    """Type and docstring of a dotted key; (None, None) where there is no such key."""
    found: tuple[Any, str | None] = (RunConfig, None)
    for key in keys:
        child = _child(found[0], key)
        if child is None:
            return None, None
        found = child
    return found


def _child(annotation: Any, key: str) -> tuple[Any, str | None] | None:
    found = [model.model_fields[key] for model in _models(annotation) if key in model.model_fields]
    if found:  # a key of several kinds may hold what any of them takes
        return functools.reduce(operator.or_, [field.annotation for field in found]), found[0].description
    for kind in _members(annotation):
        if get_origin(kind) is dict:
            return get_args(kind)[1], None
        if get_origin(kind) is tuple and key.isdigit():
            return get_args(kind)[0], None
    return None


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of a section; those of every member where it is a union."""
    return {name: field for model in _models(annotation) for name, field in model.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that may stand there."""
    return [kind for kind in _members(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _members(annotation: Any) -> list[Any]:
    """The types of a union, with Annotated taken off; a list of one for anything else."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _words(kind: Any) -> tuple[Any, ...]:
    """The words of a Literal. Nothing for another type."""
    return get_args(kind) if get_origin(kind) is Literal else ()
