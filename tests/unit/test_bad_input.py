"""Bad input: exit code 2, one message that names the place, the value and the way out, and nothing written."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny

MODELS = tiny.QUICKSTART.parent / "models"


@dataclass(frozen=True)
class Place:
    """Where a case is built: a directory of its own, and good things that it may copy but not touch."""

    here: Path
    good: Path

    def run_file(self, **changes: Any) -> Path:
        """run.yaml over the good base and the seven reviews, with dotted changes."""
        tiny.run_config(self.here, base=self.good / "base")
        content = json.loads((self.here / "run.json").read_text())
        (self.here / "run.json").unlink()
        for key, value in changes.items():
            *path, last = key.split(".")
            section = content
            for part in path:
                section = section[part]
            section[last] = value
        file = self.here / "run.yaml"
        file.write_text(json.dumps(content, indent=1))  # JSON is YAML
        return file

    def copy(self, name: str) -> Path:
        """A copy of the good base or adapter, to be broken."""
        return Path(shutil.copytree(self.good / name, self.here / name))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base, a run over it that ended, and its adapter; a cache that holds the packed base."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        tiny.run_config(root)
        done = commands.run("train", root / "run.json")
        assert done.code == 0, done.err
        shutil.copytree(root / "runs" / "tiny" / "adapters" / "mood" / "best", root / "adapter")
        yield root


@pytest.fixture
def place(tmp_path: Path, good: Path) -> Place:
    return Place(tmp_path, good)


def _tree(*roots: Path) -> dict[str, str]:
    """Every path below the roots, with the digest of a file's bytes."""
    paths = [path for root in roots for path in sorted(root.rglob("*"))]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths}


def _unknown_key(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"train.lerning_rate": 0.1})]


def _wrong_type(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"train.steps": "many"})]


def _two_problems(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"adapters.mood.length": 0}), "train.steps=none"]


def _no_run_file(place: Place) -> list[str | Path]:
    place.run_file()
    return ["train", place.here / "runn.yaml"]


def _no_data_file(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"task.files.train": "data/review.jsonl"})]


def _broken_yaml(place: Place) -> list[str | Path]:
    file = place.here / "run.yaml"
    file.write_text("name: tiny\nbase: {model: [\nseed: 3\n")
    return ["train", file]


def _label_not_among_the_keys(place: Place) -> list[str | Path]:
    file = place.run_file()
    tiny.save_reviews(place.here / "data", [*tiny.REVIEWS, ("Neither here nor there", "mixed")])
    return ["train", file]


def _label_not_in_the_data(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"task.labels": {"bad": " bad", "good": " good", "great": " great"}})]


def _empty_data(place: Place) -> list[str | Path]:
    file = place.run_file()
    tiny.save_reviews(place.here / "data", [])
    return ["train", file]


def _target_longer_than_the_context(place: Place) -> list[str | Path]:
    file = place.run_file(
        **{
            "task.labels": None,
            "task.metrics": ["exact_match"],
            "train.microbatch_tokens": 512,
            "task.target": "{{ label }}",
        }
    )
    tiny.save_reviews(place.here / "data", [("Short", "a word " * 80)])
    return ["train", file]


def _prompt_longer_than_the_context(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"adapters.mood.length": 127, "train.microbatch_tokens": 512})]


def _prompt_and_text_longer_than_the_context(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"adapters.mood.length": 110, "train.microbatch_tokens": 512})]


class _Touch:
    """Unpickled, it makes a file: whoever opens the pickle is found out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def _pickled_base(place: Place) -> list[str | Path]:
    base = place.copy("base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(place.here / "unpickled")))
    return ["train", place.run_file(**{"base.model": str(base)})]


def _base_without_weights(place: Place) -> list[str | Path]:
    base = place.copy("base")
    (base / "model.safetensors").unlink()
    return ["train", place.run_file(**{"base.model": str(base)})]


def _cut_base(place: Place) -> list[str | Path]:
    weights = place.copy("base") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    return ["train", place.run_file(**{"base.model": str(weights.parent)})]


def _base_without_tokenizer(place: Place) -> list[str | Path]:
    base = tiny.save_base(place.here / "base", seed=2)  # one that is not packed yet
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    return ["train", place.run_file(**{"base.model": str(base)})]


def _other_base(place: Place) -> list[str | Path]:
    base = tiny.save_base(place.here / "base", seed=1)
    file = place.run_file(**{"base.model": str(base)})
    assert commands.run("pack", file).code == 0  # a good base, so its pack may be there
    return ["evaluate", file, "--adapter", place.good / "adapter"]


def _cut_adapter(place: Place) -> list[str | Path]:
    weights = place.copy("adapter") / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    return ["evaluate", place.run_file(), "--adapter", weights.parent]


def _altered_adapter(place: Place) -> list[str | Path]:
    weights = place.copy("adapter") / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return ["generate", place.run_file(), "--text", "Fine", "--adapter", weights.parent]


def _altered_model_card(place: Place) -> list[str | Path]:
    card = place.copy("adapter") / "README.md"
    card.write_text(card.read_text() + "\nThe best adapter there is.\n")
    return ["inspect", card.parent]


def _pickled_adapter(place: Place) -> list[str | Path]:
    adapter = place.copy("adapter")
    for name in ("adapter_model.safetensors", "peftscale.json"):
        (adapter / name).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Touch(place.here / "unpickled")))
    return ["evaluate", place.run_file(), "--adapter", adapter]


def _no_adapter(place: Place) -> list[str | Path]:
    return ["evaluate", place.run_file()]


def _no_test_split(place: Place) -> list[str | Path]:
    return ["evaluate", place.run_file(), "--adapter", place.good / "adapter", "--split", "test"]


def _other_columns(place: Place) -> list[str | Path]:
    return ["generate", place.run_file(), "--adapter", place.good / "adapter", "--row", '{"txt": "Fine"}']


def _too_many_cpus(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"cluster.workers": 4000, "cluster.cpus_per_worker": 2})]


def _name_taken(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"cluster.storage": str(place.good / "runs")})]


def _nothing_to_resume(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"cluster.storage": str(place.good / "runs")}), "--resume", "tinny"]


def _hub_out_of_reach(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"base.model": "nobody/no-such-model"})]


def _inexact_encoder_decoder(place: Place) -> list[str | Path]:
    base = tiny.save_base(place.here / "base", {**tiny.BART, "model_type": "pegasus"})
    file = place.run_file(**{"base.model": str(base)})
    assert commands.run("pack", file).code == 0
    return ["train", file]


def _mixture_of_experts(place: Place) -> list[str | Path]:
    return ["train", place.run_file(**{"base.model": str(MODELS / "mixtral-8x7b")})]


def _storage_is_a_file(place: Place) -> list[str | Path]:
    (place.here / "taken").write_text("")
    return ["train", place.run_file(**{"cluster.storage": str(place.here / "taken" / "runs")})]


def _unknown_hardware(place: Place) -> list[str | Path]:
    return ["plan", place.run_file(), "--hardware", "8xZ80-64KB"]


def _pack_over_something(place: Place) -> list[str | Path]:
    return ["pack", place.run_file(), "--out", place.here / "data"]


FILE = "{here}/run.yaml: "
DATA = "{here}/data/reviews.jsonl"
CASES: list[tuple[Callable[[Place], list[str | Path]], tuple[str, ...]]] = [
    (
        _unknown_key,
        ("{here}/run.yaml: 1 problem(s)\n  train.lerning_rate: unknown key; did you mean 'learning_rate'?",),
    ),
    (_wrong_type, ("{here}/run.yaml: 1 problem(s)\n  train.steps: must be a whole number, got 'many'",)),
    (
        _two_problems,
        (
            "{here}/run.yaml: 2 problem(s)\n",
            "  adapters.mood.length: must be >= 1, got 0\n",
            "  train.steps: must be a whole number, got 'none' (override 'train.steps=none')",
        ),
    ),
    (_no_run_file, ("{here}/runn.yaml: no such file", "did you mean {here}/run.yaml?")),
    (
        _no_data_file,
        (
            "{here}/run.yaml: 1 problem(s)\n",
            "  task.files.train: no such file, got 'data/review.jsonl', looked for {here}/data/review.jsonl",
            "did you mean 'reviews.jsonl'?",
        ),
    ),
    (_broken_yaml, ("{here}/run.yaml: broken YAML: line 4, column 1: did not find", "flow sequence begun in line 2)")),
    (
        _label_not_among_the_keys,
        (
            FILE,
            f"task.files.train ({DATA}): task.target renders 'mixed' (1 times), first in row 7",
            "the keys of task.labels are 'bad', 'good'. Add it to task.labels, or correct the rows.",
        ),
    ),
    (
        _label_not_in_the_data,
        (
            FILE,
            f"task.labels: 'great' never occur(s) in task.files.train ({DATA})",
            "'bad', 'good' there. Take the key out",
        ),
    ),
    (_empty_data, (FILE, f"task.files.train ({DATA}): the file is empty. At least one row is needed.")),
    (
        _target_longer_than_the_context,
        (FILE, "task.target: row 0", DATA, "at most 123 fit", "Shorten the target or lower adapters.*.length."),
    ),
    (
        _prompt_longer_than_the_context,
        (FILE, "adapters.mood.length=127 and 1 text and 1 target", "the base has 128 positions (with longrope"),
    ),
    (
        _prompt_and_text_longer_than_the_context,
        (
            FILE,
            "task.input: 6 of 14 examples are too long; the longest, row 4",
            "at most 18 fit",
            "Set task.max_text_tokens to at most 17",
        ),
    ),
    (
        _pickled_base,
        (FILE, "base.model={here}/base: its weights are pickles (pytorch_model.bin)", "Take the safetensors version"),
    ),
    (
        _base_without_weights,
        (FILE, "base.model={here}/base: holds no weights; looked for model.safetensors", "Fetch the"),
    ),
    (_cut_base, (FILE, "{here}/base/model.safetensors: is cut: ", " bytes, its header names ", "Fetch it again.")),
    (_base_without_tokenizer, (FILE, "base.model={here}/base has no vocabulary (looked", "Put tokenizer.json and")),
    (
        _other_base,
        (
            FILE,
            "adapter {good}/adapter was trained on base sha256:",
            ", this base is sha256:",
            ".\npeftscale.json says model '{good}/base'",
        ),
    ),
    (
        _cut_adapter,
        (
            FILE,
            "{here}/adapter/adapter_model.safetensors: cut or altered",
            "1396 bytes",
            "Copy or save the adapter again.",
        ),
    ),
    (
        _altered_adapter,
        (
            FILE,
            "{here}/adapter/adapter_model.safetensors: cut or altered. peftscale.json says sha256:",
            "Copy or save the",
        ),
    ),
    (_altered_model_card, ("{here}/adapter/README.md: cut or altered", "Copy or save the adapter again.")),
    (_pickled_adapter, (FILE, "adapter {here}/adapter: adapter_model.bin is a pickle", "save it with a PEFT that")),
    (
        _no_adapter,
        (FILE, "{here}/runs/tiny/adapters/mood/best: no such adapter. Train the run first, or name one with"),
    ),
    (_no_test_split, (FILE, "--split test: task reviews has no test split. Give task.files.test or task.hub.test, or")),
    (_other_columns, (FILE, '--row {"txt": "Fine"}: need an object with the keys text.')),
    (
        _too_many_cpus,
        (
            FILE,
            "cluster.workers=4000 x cluster.cpus_per_worker=2 needs 8000 CPUs, this machine has",
            "Lower cluster.workers",
        ),
    ),
    (
        _name_taken,
        (FILE, "name: a run 'tiny' exists in {good}/runs. Choose another with name=..., or go on with --resume tiny."),
    ),
    (_nothing_to_resume, (FILE, "--resume tinny: no such run in {good}/runs; there is tiny.")),
    (
        _hub_out_of_reach,
        (FILE, "base.model=nobody/no-such-model (revision main)", "Give a directory with config.json, tokenizer and"),
    ),
    (
        _inexact_encoder_decoder,
        (FILE, "base.model={here}/base: no adapter would be exact on this base (pegasus: a text as embeddings is off"),
    ),
    (_mixture_of_experts, (FILE, f"base.model={MODELS}/mixtral-8x7b: ", "mixtral", "experts", "choose a dense model")),
    (
        _storage_is_a_file,
        (FILE, "cluster.storage={here}/taken/runs cannot be written: Not a directory. Choose another"),
    ),
    (
        _unknown_hardware,
        (FILE, "--hardware: cannot plan for '8xZ80-64KB'; expected <count>x<device> with one of H100-80GB"),
    ),
    (_pack_over_something, (FILE, "--out {here}/data exists. Choose another directory")),
]


@pytest.mark.parametrize(("build", "expected"), CASES, ids=[build.__name__.strip("_") for build, _ in CASES])
def test_bad_input_is_refused_in_one_message_and_leaves_nothing_behind(
    place: Place, build: Callable[[Place], list[str | Path]], expected: tuple[str, ...]
) -> None:
    arguments = build(place)
    before = _tree(place.here, place.good)
    done = commands.run(*arguments)
    assert done.code == 2, done.err
    assert done.out == ""
    texts = [text.replace("{here}", str(place.here)).replace("{good}", str(place.good)) for text in expected]
    assert [text for text in texts if text not in done.err] == [], done.err
    assert "Traceback" not in done.err
    # One message: nothing stands before it or behind it, and it is not said twice.
    assert done.err.startswith(texts[0]) and done.err.count(texts[0]) == 1
    assert done.err.count("\n") == "".join(texts).count("\n") + 1
    assert _tree(place.here, place.good) == before


def test_what_a_bad_run_leaves_is_told_from_what_a_good_one_leaves(place: Place) -> None:
    """Negative control: the same call without a fault writes, prints no complaint, and may use the same name."""
    file = place.run_file()
    assert commands.run("train", file, "task.input={{ nothing }}").code == 2
    before = _tree(place.here)
    done = commands.run("train", file)
    assert done.code == 0, done.err
    assert len(_tree(place.here)) > len(before)


def test_more_cpus_than_there_are_is_refused_before_ray_is_imported(place: Place) -> None:
    """In a process of its own, where another test cannot have imported it."""
    done = commands.run_alone(
        *_too_many_cpus(place), after="import sys; print('ray' in sys.modules, 'torch' in sys.modules)"
    )
    assert (done.code, done.out) == (2, "False False\n")
    assert done.err.count("\n") == 1
