"""Randomly changed run files through `peftscale plan`: a plan or one message, exit code 0 or 2, never a traceback."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import mutations
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftscale import configio

CONFIGS = Path(__file__).parents[2] / "configs"
RUN_FILES = sorted(path for path in CONFIGS.rglob("*.yaml"))
HUB_IDS = {"meta-llama/Llama-3.1-70B": "llama-3.1-70b", "google/t5-xxl-lm-adapt": "t5-v1.1-xxl"}


def _seed(path: Path) -> dict[str, Any]:
    """A shipped run file as a tree, its paths absolute and its base here."""
    tree = configio.placed(path, [], lambda _, place: place)
    if tree["base"]["model"] in HUB_IDS:
        tree["base"]["model"] = str(CONFIGS / "models" / HUB_IDS[tree["base"]["model"]])
    return tree


SEEDS = [_seed(path) for path in RUN_FILES]
NUM_MUTATIONS = int(os.environ.get("PEFTSCALE_MUTATIONS", "500"))
HARDWARE = ([], [], [], ["--hardware", "8xH100-80GB"], ["--hardware", "64xH100-80GB", "--price-per-gpu-hour", "3"])
KEYS = (
    "steps",
    "kind",
    "init",
    "lora",
    "few_shot",
    "more_tasks",
    "task",
    "files",
    "0",
    "",
    "a.b",
    "\u00fc",
    "no",
    "<<",
)
NUMBERS = (
    0,
    1,
    2,
    3,
    8,
    1000,
    10**6,
    10**9,
    2**31,
    2**63,
    10**18,
    10**30,
    -1,
    0.5,
    1e-9,
    1e-300,
    3.7,
    1e6,
    1e300,
    True,
)
WORDS = (
    *(
        "prompt",
        "prefix",
        "random",
        "vocabulary",
        "zero",
        "scaled",
        "none",
        "mlp",
        "residual",
        "nf4",
        "int8",
        "float32",
    ),
    *(
        "bfloat16",
        "auto",
        "node",
        "world",
        "replicated",
        "adamw",
        "adafactor",
        "constant",
        "linear",
        "labels",
        "adapters",
    ),
    *("lora", "few_shot", "full_finetuning", "accuracy", "exact_match", "sst2", "boolq", "squad", "wmt16_en_ro", "x"),
)
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
)
LINES = (
    BOMB,
    "seed: &itself [*itself]",
    "deep: " + "[" * 3000,
    "deep: " + "[" * 90 + "]" * 90,
    "\n".join(["b0: &b0 [x]", *(f"b{i}: &b{i} [*b{i - 1}]" for i in range(1, 100))]),
    "deep: " + "{a: " * 400 + "1" + "}" * 400,
    "\n".join(["c0: x", *(f"c{i}: ${{c{i - 1}}}${{c{i - 1}}}${{c{i - 1}}}" for i in range(1, 40))]),
    "e: {f: {g: '${e}'}}",
    "base: !!python/object/apply:os.system [exit 1]",
    "seed: !!int many",
    "seed: !!binary aGVsbG8=",
    "seed: !!set {1, 2}",
    "seed: 2026-11-28",
    "seed: 0x_",
    "seed: 1_000",
    "seed: 60:60:60",
    "seed: .inf",
    "seed: " + "9" * 5000,
    "name: ${name}",
    "name: ${oc.env:NOBODY_HAS_THIS}",
    "name: ${train.steps}",
    "name: ${${${",
    "name: ???",
    "name: *nothing",
    "name: !unknown x",
    "<<: {name: x}",
    "<<: *nothing",
    "? [1, 2]\n: 3",
    "1: 2",
    "null: 2",
    "on: 2",
    "--- 1",
    "...",
    "%YAML 9.9",
    "\t",
    "\0",
    "\ufeff",
    "\u2028",
    "- x",
    ": : :",
    "'",
    '"',
    "|",
    "{",
)
"""Put between two lines of a file."""


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _values() -> st.SearchStrategy[Any]:
    simple = st.one_of(
        st.sampled_from(mutations.VALUES),
        st.integers(),
        st.integers(-3, 5),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(
            ["prompt", "prefix", "lora", "few_shot", "nf4", "auto", "/", "..", "~", "~nobody/x", "a/b", "."]
        ),
    )
    return st.one_of(
        simple, simple, st.lists(simple, max_size=3), st.dictionaries(st.sampled_from(KEYS), simple, max_size=2)
    )


def _changed(draw: Any, tree: dict[str, Any]) -> None:
    """One key somewhere gets another value, another name, a neighbour, or goes."""
    places = list(_places(tree))
    if not places:
        return
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    kind = draw(st.sampled_from(["alike", "alike", "alike", "value", "delete", "rename", "move", "list", "more"]))
    if kind == "alike" and isinstance(holder[key], int | float):
        holder[key] = draw(st.sampled_from(NUMBERS))
    elif kind == "alike":
        holder[key] = draw(st.sampled_from(WORDS))
    elif kind == "value":
        holder[key] = draw(_values())
    elif kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from([*KEYS, f"{key}s", str(key)[:-1]]))] = holder.pop(key)
    elif kind == "move":  # what stands elsewhere
        other, of = places[draw(st.integers(0, len(places) - 1))]
        if of in other if isinstance(other, dict) else of < len(other):
            holder[key] = copy.deepcopy(other[of])
    elif kind == "list":
        holder[key] = [holder[key], draw(_values())]
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from(KEYS))] = draw(_values())


@st.composite
def run_files(draw: Any) -> bytes:
    """The bytes of a run file with one to three changes."""
    tree = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        _changed(draw, tree)
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw(st.booleans()))
    lines = text.splitlines()
    at = draw(st.integers(0, len(lines)))
    match draw(st.integers(0, 30)):
        case 0:
            line = draw(st.sampled_from(LINES))
            lines = [other for other in lines if not other.startswith(f"{line.split(':')[0]}:")]
            lines.insert(at, line)
        case 1:
            lines.insert(at, " " * draw(st.integers(0, 6)) + draw(st.sampled_from(LINES)))
        case 2:
            lines[at : at + 1] *= 2
        case 3:
            lines[at : at + 1] = []
        case 4:
            lines[at : at + 1] = [" " * draw(st.integers(0, 3)) + line.strip() for line in lines[at : at + 1]]
        case 5:
            lines = lines[:at]
        case 6:
            text = text[: len(text) * at // (len(lines) + 1)]
            lines = text.splitlines()
    content = "\n".join(lines).encode(errors="surrogatepass")
    match draw(st.integers(0, 60)):
        case 0:
            place = draw(st.integers(0, len(content)))
            return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:]
        case 1:
            return content.decode(errors="replace").encode("utf-16")
    return content


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "run.yaml"


@pytest.mark.timeout(1800)
@settings(
    max_examples=NUM_MUTATIONS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(content=run_files(), hardware=st.sampled_from(HARDWARE))
def test_a_changed_run_file_is_planned_or_refused_in_words(file: Path, content: bytes, hardware: list[str]) -> None:
    file.write_bytes(content)
    done = commands.run("plan", file, *hardware)
    assert done.code in (0, 2) and done.out == "" and done.err.strip(), done
    assert "Traceback" not in done.err


@pytest.mark.parametrize("path", RUN_FILES, ids=[str(path.relative_to(CONFIGS)) for path in RUN_FILES])
def test_without_a_change_each_of_them_is_planned(file: Path, path: Path) -> None:
    """Negative control: what the test above sees refused is refused for its changes."""
    file.write_text(yaml.safe_dump(_seed(path), sort_keys=False))
    done = commands.run("plan", file, "--hardware", "64xH200-141GB")
    assert done.code == 0 or "mixtral" in path.name, done.err
