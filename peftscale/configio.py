"""Run file: YAML and `key=value` overrides turned into a checked RunConfig, and back into plain data.

The types and rules are `config`; the words for what breaks them are here. All problems of a file are found
in one go. Whether a model or a data set is usable is `facts` and `data`; here their files must only be there.
"""

import difflib
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from peftscale import catalogue, complaints, limits, redaction
from peftscale.complaints import Problems, close_to, shown
from peftscale.config import RunConfig, is_url
from peftscale.errors import ConfigError

_SPLITS = ("train", "validation", "test")
_SHORT = {"length": "p", "seed": "s", "learning_rate": "lr", "weight_decay": "wd", "examples_per_step": "batch"}
"""What a key is called in the name of an adapter that a product made; other keys keep their own name."""
_MAY_BE_MADE = (("base", "pack_dir"), ("cluster", "storage"), ("cluster", "deploy", "shared", "local"))
_NOT_THE_RESULT: Any = {"name": True, "cluster": True, "track": True, "base": {"pack_dir"}}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply the overrides in order and check everything.

    Relative paths, also those of overrides, are taken from the folder of the run file and come back absolute.
    `base.model` is a path when it begins with `.`, `/` or `~` or when that directory is there; else it is a hub id.

    Args:
        path: the YAML file.
        overrides: `train.steps=300`, dotted keys. Text stays as typed; other values are read as YAML.

    Raises:
        ConfigError: one message with every problem, each with its key, the rule and the value that was got.
    """
    path = Path(path)
    problems = Problems()
    raw = _typed(path, overrides, problems)
    _refuse_secrets(raw, (), problems)
    _fill_tasks(raw, problems)
    _expand(raw, problems)
    cfg: RunConfig | None = None
    try:
        cfg = from_json(json.dumps(raw))
    except ValidationError as error:
        complaints.collect(error, raw, problems)
    if problems or cfg is None:
        raise ConfigError(problems.text(str(path)))
    return cfg


def placed(path: str | Path, overrides: Sequence[str], place: Callable[[str, str], str]) -> dict[str, Any]:
    """A run file for another place: its keys as they were typed, overrides among them, every path another one.

    Args:
        path, overrides: what `load` takes, and has taken before: problems are not told here.
        place: dotted key and absolute path here -> the path there.

    Returns:
        Plain data. Written as YAML it is a run file that stands alone.
    """
    raw = _typed(Path(path), overrides, Problems())
    for holder, keys in _paths(raw):
        typed = holder[keys[-1]]
        is_no_path = (keys == ("base", "model") and not Path(typed).is_absolute()) or (
            isinstance(typed, str) and is_url(typed)
        )
        if isinstance(typed, list):
            holder[keys[-1]] = [place(".".join(keys), one) for one in typed]
        elif not is_no_path:
            holder[keys[-1]] = place(".".join(keys), typed)
    return raw


def from_json(text: str) -> RunConfig:
    """The pydantic check in its JSON mode: strict about types, but lists are tuples and strings are paths there."""
    return RunConfig.model_validate_json(text, strict=True)


def dump(cfg: RunConfig) -> dict[str, Any]:
    """Plain dicts, lists and scalars that `from_dict` turns back into an equal RunConfig in another process."""
    return cfg.model_dump(mode="json")


def from_dict(data: dict[str, Any]) -> RunConfig:
    """The inverse of `dump`. Paths are taken as they are and not looked at.

    Raises:
        ConfigError: `data` is not what `dump` wrote, for example of another version.
    """
    try:
        return from_json(json.dumps(data))
    except ValidationError as error:
        problems = Problems()
        complaints.collect(error, data, problems)
        raise ConfigError(problems.text("saved run configuration")) from None


def fingerprint(cfg: RunConfig) -> str:
    """Sha256 (64 hex digits) over what changes the result of a run, in canonical JSON.

    Left out are the name, the cluster, the trackers and `base.pack_dir`. Of a path the last two parts count, so that
    the fingerprint is the same on another machine; what is in the base is the digest's business.
    """
    data = cfg.model_dump(mode="json", exclude=_NOT_THE_RESULT)
    data["base"]["model"] = "/".join(Path(cfg.base.model).parts[-2:])
    for adapter in data["adapters"].values():
        if adapter["init_adapter"]:
            adapter["init_adapter"] = "/".join(Path(adapter["init_adapter"]).parts[-2:])
    of_adapters = [task for adapter in data["adapters"].values() for task in (adapter["task"], *adapter["more_tasks"])]
    for task in (data["task"], *of_adapters):
        for split, file in ((task or {}).get("files") or {}).items():
            task["files"][split] = file and "/".join(Path(file).parts[-2:])
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """JSON schema of a run file, with the field docstrings as descriptions, for editors that check YAML."""
    made = RunConfig.model_json_schema()
    made["$defs"]["TaskConfig"]["required"] = ["name"]  # the catalogue may have the others
    for name, section in made["$defs"].items():
        if name != "AdapterTrainConfig" and not {"kind", "seed", "task", "train"} <= set(section["properties"]):
            continue
        for key, value in section["properties"].items():
            if key in ("kind", "task", "train") or value.get("type") == "array":  # more_tasks and init_labels are lists
                continue
            one = {word: value.pop(word) for word in list(value) if word not in ("description", "title", "default")}
            value["anyOf"] = [one, {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "peftscale run file"}


def _typed(path: Path, overrides: Sequence[str], problems: Problems) -> dict[str, Any]:
    """What was typed, with interpolations resolved and paths absolute."""
    conf = _read(path)
    _override(conf, overrides, problems)
    raw: dict[str, Any] = _plain(conf, (), problems, iter(range(limits.VALUES)))
    _take_paths_from(path.absolute().parent, raw, problems)
    return raw


def _read(path: Path) -> DictConfig:
    """The file as a tree with its interpolations unresolved. OmegaConf refuses duplicate keys and reads 3e-4 right."""
    if not path.is_file():
        raise ConfigError(_not_there(path))
    try:
        text = path.read_text(encoding="utf-8")
        if (line := limits.deep_line(text)) is not None:
            raise ConfigError(f"{path}: more than {limits.LEVELS} levels deep in line {line}; no run file is")
        conf = OmegaConf.load(io.StringIO(text))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a run file is YAML") from None
    except OSError as error:
        # OmegaConf raises it without a reason for a file that is one number.
        fault = f"cannot be read: {error.strerror}" if error.strerror else "must be a mapping (key: value lines)"
        raise ConfigError(f"{path}: {fault}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_broken(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: an interpolation ${{...}} cannot be read: {_first_line(error)}") from None
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise ConfigError(f"{path}: holds a value that cannot be read: {_first_line(error)}") from None
    if not isinstance(conf, DictConfig):
        raise ConfigError(f"{path}: must be a mapping (key: value lines), got a list")
    if not conf:
        raise ConfigError(f"{path}: holds no keys; `peftscale schema` lists them")
    num_references = limits.num_joined_references(OmegaConf.to_container(conf, resolve=False))
    if num_references > limits.REFERENCES:
        raise ConfigError(
            f"{path}: {num_references} interpolations ${{...}} in texts that hold several of them; at most "
            f"{limits.REFERENCES} are resolved"
        )
    return conf


def _not_there(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    what = "is a directory, not a run file" if path.is_dir() else f"no such file (looked for {path.absolute()})"
    if not folder.is_dir():
        return f"{path}: {what}; there is no directory {folder} either"
    known = sorted(str(folder / file.name) for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    nearest = difflib.get_close_matches(str(path), known, n=1, cutoff=0.6)
    if nearest:
        return f"{path}: {what}; did you mean {nearest[0]}?"
    return f"{path}: {what}; run files in {folder}: {', '.join(known[:8]) or 'none'}"


def _broken(error: yaml.YAMLError) -> str:
    """Line, column and fault of a YAML error. The parser's own text spreads these over four lines."""
    mark = getattr(error, "problem_mark", None)
    fault = getattr(error, "problem", None) or _first_line(error)
    context = getattr(error, "context", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    begun = getattr(error, "context_mark", None)
    since = f" begun in line {begun.line + 1}" if begun is not None else ""
    return f"broken YAML: {where}{fault}" + (f" ({context}{since})" if context else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _override(conf: DictConfig, overrides: Iterable[str], problems: Problems) -> None:
    """Write each override into the tree; one whose key no run file has is a problem and is not written."""
    for override in overrides:
        key, equals, typed = override.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            problems.add(f"override '{override}'", "must have the form key=value, for example train.steps=300")
            continue
        wrong = complaints.unknown(keys)
        if wrong is None and len(keys) > 2 and keys[0] == "adapters" and keys[1] not in (conf.get("adapters") or {}):
            # A whole new adapter is given as adapters.NAME={...}; a single key of one is nearly always a typo.
            known = [str(name) for name in conf.get("adapters") or {}]
            wrong = f"the file has no adapter '{keys[1]}'{close_to(keys[1], known)}"
        if wrong is not None:
            problems.add(f"override '{override}'", wrong)
            continue
        try:
            OmegaConf.update(conf, key, _value(keys, typed), merge=True)
        except yaml.YAMLError as error:
            problems.add(f"override '{override}'", f"broken YAML after '=': {getattr(error, 'problem', None) or error}")
        except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
            problems.add(f"override '{override}'", f"cannot be applied to the file: {_first_line(error)}")
        problems.typed[keys] = override


def _value(keys: tuple[str, ...], typed: str) -> Any:
    """What was typed after the equals sign. Where the key holds text nothing is read into it (1e5, no, a: b)."""
    is_text, is_optional = complaints.holds_text(keys)
    is_quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\""
    # A text may begin with a bracket by itself; words and paths do not.
    is_listed = keys[-1] == "init_adapter" or bool(complaints.words_of(keys))
    is_product = keys[0] == "adapters" and typed.startswith("[") and is_listed
    if is_text and not is_quoted and not is_product and not (is_optional and typed in ("null", "~")):
        return typed
    return OmegaConf.from_dotlist([f"value={typed}"])._get_node("value")


def _plain(node: Any, keys: tuple[str, ...], problems: Problems, left: Iterator[int]) -> Any:
    """Dicts, lists and scalars with interpolations resolved. What cannot be resolved is a problem and left out.

    Args:
        left: values that there may still be.
    """
    if OmegaConf.is_list(node):
        return [_entry(node, index, (*keys, str(index)), problems, left) for index in range(len(node))]
    if not OmegaConf.is_dict(node):
        if isinstance(node, bytes):
            problems.add(keys, "must be text or a number, got binary data (!!binary)")
            return None
        if isinstance(node, float) and not math.isfinite(node):
            problems.add(keys, f"must be a finite number, got {node}")
        if isinstance(node, bool) and (word := "on" if node else "off") in complaints.words_of(keys):
            return word  # YAML reads the word as true or false
        # 1e3 is a float in YAML and a whole number to the person who wrote it.
        return int(node) if isinstance(node, float) and node.is_integer() else node
    plain: dict[str, Any] = {}
    for key in node:
        if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
            plain[str(key)] = _entry(node, key, (*keys, str(key)), problems, left)
        else:
            problems.add(
                keys,
                f"a key must be text, got {shown(key)}; YAML reads yes, no, on and off as true and false, so quote it",
            )
    return plain


def _entry(node: Any, key: Any, keys: tuple[str, ...], problems: Problems, left: Iterator[int]) -> Any:
    if len(keys) > limits.LEVELS or next(left, None) is None:
        problems.add(
            "run file",
            f"its interpolations make more than {limits.VALUES:,} values or {limits.LEVELS} levels: do they go round?",
        )
        return None
    try:
        if OmegaConf.is_missing(node, key):
            problems.add(keys, "??? must be filled in")
            return None
        return _plain(node[key], keys, problems, left)
    except OmegaConfBaseException as error:
        source = OmegaConf.to_container(node, resolve=False)
        written = source[key] if isinstance(source, dict | list) else source
        problems.add(keys, f"{shown(written)} cannot be resolved: {_first_line(error)}")
        return None


def _refuse_secrets(node: Any, keys: tuple[str, ...], problems: Problems) -> None:
    """A run file is copied into runs, checkpoints and jobs, and what is in it is shown."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_secrets(value, (*keys, str(key)), problems)
    elif isinstance(node, str) and (shown := redaction.redacted(node)) != node:
        problems.add(
            keys,
            f"holds a secret, which a run file must not ({shown}). Programs take theirs from the environment; a "
            f"cluster's nodes are given those that cluster.deploy.secrets names",
        )


def _take_paths_from(folder: Path, raw: dict[str, Any], problems: Problems) -> None:
    """Make the paths in `raw` absolute, in place, and look whether the files that are read are there."""
    for holder, keys in _paths(raw):
        must_be = "file" if keys[-2] == "files" else "directory" if keys not in _MAY_BE_MADE else None
        typed = holder[keys[-1]]
        if isinstance(typed, list):  # a product: each of its adapters starts from another
            holder[keys[-1]] = [_absolute(folder, one, keys, problems, must_be=must_be) for one in typed]
        else:
            holder[keys[-1]] = _absolute(folder, typed, keys, problems, must_be=must_be)


def _paths(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], complaints.Keys]]:
    """Every path that was given: the mapping that holds it, and its keys."""
    typed_adapters = raw.get("adapters")
    names = list(typed_adapters) if isinstance(typed_adapters, dict) else []
    data_files = [(*keys, "files", split) for keys, _ in _typed_tasks(raw) for split in _SPLITS]
    starts = [("adapters", name, "init_adapter") for name in names]
    for keys in (*data_files, *starts, *_MAY_BE_MADE, ("base", "model")):
        holder: Any = raw
        for key in keys[:-1]:
            if isinstance(holder, list) and key.isdigit():  # a task among the more_tasks of an adapter
                holder = holder[int(key)] if int(key) < len(holder) else None
            else:
                holder = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and holder.get(keys[-1]) is not None:
            yield holder, keys


def _absolute(folder: Path, typed: Any, keys: complaints.Keys, problems: Problems, *, must_be: str | None) -> Any:
    """A path as it was typed, taken from the run file's folder; what is no path comes back as it is."""
    if not isinstance(typed, str) or not typed or (keys == ("base", "model") and not _is_path(typed, folder)):
        return typed
    if is_url(typed) and keys == ("cluster", "storage"):
        return typed.rstrip("/") if is_url(typed.rstrip("/")) else typed
    if "://" in typed:
        problems.add(keys, f"must be a path that every node sees (a mounted directory), got the URL {shown(typed)}")
        return typed
    place = Path(os.path.abspath(folder / Path(typed).expanduser()))
    if (must_be == "file" and not place.is_file()) or (must_be == "directory" and not place.is_dir()):
        problems.add(keys, _missing(must_be, place, typed))
    return str(place)


def _fill_tasks(raw: dict[str, Any], problems: Problems) -> None:
    """Complete the tasks that leave out what the catalogue has under their name, in place."""
    for keys, task in _typed_tasks(raw):
        if catalogue.is_complete(task):
            continue
        filled = catalogue.filled(task)
        name = task.get("name")
        if filled is None and isinstance(name, str) and not {"input", "target"} & set(task):
            problems.add(
                (*keys, "name"),
                f"the catalogue (`peftscale tasks`) has no {name!r}, and a task of your own gives input, target and "
                f"metrics{close_to(name, catalogue.entries())}",
            )
            # What is missing now is the same fault.
            filled = {"input": "", "target": "", "metrics": ["exact_match"], **task}
            if not {"files", "hub"} & set(task):
                filled["hub"] = {"path": name}
        task.update(filled or {})


def _typed_tasks(raw: dict[str, Any]) -> list[tuple[complaints.Keys, dict[str, Any]]]:
    """Each task that was typed as a mapping, with its keys: the run's, those of adapters, and what these add."""
    found: list[tuple[complaints.Keys, Any]] = [(("task",), raw.get("task"))]
    adapters = raw.get("adapters")
    for name, adapter in adapters.items() if isinstance(adapters, dict) else ():
        if isinstance(adapter, dict):
            more = adapter.get("more_tasks")
            found.append((("adapters", name, "task"), adapter.get("task")))
            found += [
                (("adapters", name, "more_tasks", str(number)), task)
                for number, task in enumerate(more if isinstance(more, list) else ())
            ]
    return [(keys, task) for keys, task in found if isinstance(task, dict)]


def _expand(raw: dict[str, Any], problems: Problems) -> None:
    """Replace each adapter with lists among its values by the product of them, in place, in the order of the file.

    `sst2: {length: [1, 5], seed: [0, 1]}` becomes sst2-p1-s0, sst2-p1-s1, sst2-p5-s0 and sst2-p5-s1; a list of one
    value is that value and leaves the name alone. Where `init` or `reparam` varies, `init_text` and the like and
    `reparam_hidden_size` go to those adapters alone that use them.
    """
    typed = raw.get("adapters")
    if not isinstance(typed, dict):
        return
    made: dict[str, Any] = {}
    for name, adapter in typed.items():
        if "." in name:
            problems.add(("adapters", name), "a dot in the name of an adapter is kept for those that a product makes")
        for new, settings in _product(name, adapter, problems) if isinstance(adapter, dict) else [(name, adapter)]:
            if new in made or (new != name and new in typed):
                problems.add(("adapters", name), f"its lists make the adapter {new}, which is there already")
            made[new] = settings
            problems.products[new] = name
    raw["adapters"] = made


def _product(name: str, adapter: dict[str, Any], problems: Problems) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of every adapter that one entry of `adapters` stands for."""
    lists: dict[tuple[str, ...], list[Any]] = {}
    train = adapter.get("train")
    places = [(key,) for key in adapter if key not in ("kind", "task", "train")]
    for keys in (*places, *(("train", key) for key in (train if isinstance(train, dict) else ()))):
        value = (adapter if len(keys) == 1 else adapter["train"])[keys[-1]]
        where = ("adapters", name, *keys)
        if not isinstance(value, list) or complaints.takes_list(where):
            continue
        wrong = [entry for entry in value if not isinstance(entry, str | int | float)]
        twice = [entry for i, entry in enumerate(value) if entry in value[:i]]
        if not value or wrong:
            problems.add(where, f"a list here must hold numbers or words, got {shown(wrong[0] if value else value)}")
            value = [None]
        elif twice:
            problems.add(where, f"{shown(twice[0])} is there twice; each value makes one adapter")
            value = value[:1]
        lists[keys] = value
    found = []
    num_adapters = math.prod(map(len, lists.values()))
    if num_adapters > limits.PRODUCT:
        problems.add(
            ("adapters", name), f"its lists make {num_adapters:,} adapters, at most {limits.PRODUCT:,} are made"
        )
        return []
    for values in itertools.product(*lists.values()):
        settings = {**adapter, **({"train": {**train}} if isinstance(train, dict) else {})}
        new = name
        for keys, value in zip(lists, values, strict=True):
            (settings if len(keys) == 1 else settings["train"])[keys[-1]] = value
        unused = _unused(settings, lists)
        settings = {key: value for key, value in settings.items() if (key,) not in unused}
        if isinstance(train, dict):
            settings["train"] = {k: v for k, v in settings["train"].items() if ("train", k) not in unused}
        for (keys, among), value in zip(lists.items(), values, strict=True):
            if len(among) > 1 and keys not in unused:
                new += f"-{_named(keys[-1], value, among)}"
        if (new, settings) not in found:  # a value of a key that is not used makes no other adapter
            found.append((new, settings))
    return found


def _unused(settings: dict[str, Any], lists: dict[tuple[str, ...], list[Any]]) -> set[tuple[str, ...]]:
    """Keys that belong to another start, network or optimizer than this adapter of a product has."""
    unused = set[tuple[str, ...]]()
    if len(lists.get(("init",), ())) > 1:
        unused |= {(f"init_{key}",) for key in ("text", "labels", "adapter") if settings["init"] != key}
    is_listed = ("init",) in lists or ("init_top",) in lists
    if is_listed and settings.get("kind") == "prompt" and settings.get("init") in ("random", "text", "adapter"):
        unused.add(("init_top",))
    if len(lists.get(("reparam",), ())) > 1 and settings["reparam"] == "none":
        unused |= {("reparam_hidden_size",), ("train", "network_learning_rate")}
    if len(lists.get(("train", "optimizer"), ())) > 1 and settings["train"]["optimizer"] != "adamw":
        unused.add(("train", "adam_epsilon"))
    return unused


def _named(key: str, value: Any, among: Sequence[Any]) -> str:
    """One value of a product as a piece of a name: p5, s0, lr1e-5, random; text2 for a text."""
    if isinstance(value, str):
        is_word = all(letter.isalnum() or letter in "_-" for letter in value) and value.isascii()
        return value if is_word else f"{key.removeprefix('init_')}{among.index(value)}"
    if isinstance(value, bool):
        return f"{key}-{str(value).lower()}"
    number = str(value).replace("e-0", "e-")
    return f"{_SHORT.get(key, key)}{number}"


def _is_path(model: str, folder: Path) -> bool:
    """A hub id is `name` or `owner/name`; what is or looks like a directory next to the run file is a path."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or (folder / model).is_dir():
        return True
    return "/" in model and (folder / model.split("/")[0]).is_dir()


def _missing(what: str, place: Path, typed: str) -> str:
    near = [other.name for other in place.parent.iterdir()] if place.parent.is_dir() else []
    text = f"no such {what}, got {shown(typed)}, looked for {place}{close_to(place.name, near)}"
    if not Path(typed).is_absolute() and Path(typed).exists():
        text += f"; paths are taken from the run file's folder: write {Path(typed).absolute()}"
    return text
