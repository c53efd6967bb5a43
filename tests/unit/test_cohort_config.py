"""A cohort in a run file: what an adapter may have for itself, and how lists become adapters with readable names."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from peftscale import configio, selection
from peftscale.errors import ConfigError

TASK: dict[str, Any] = {
    "name": "films",
    "files": {"train": "data/train.jsonl", "validation": "data/validation.jsonl"},
    "input": "{{ text }}",
    "target": "{{ label }}",
    "labels": {"0": " bad", "1": " good"},
    "metrics": ["accuracy"],
}
TRAIN: dict[str, Any] = {
    "steps": 100,
    "examples_per_step": 8,
    "microbatch_tokens": 1024,
    "optimizer": "adamw",
    "learning_rate": 0.3,
    "warmup_steps": 10,
    "clip_norm": 1.0,
    "early_stop": 3,
    "evaluate_every": 50,
    "checkpoint_every": 40,
}
PROMPT: dict[str, Any] = {"kind": "prompt", "length": 20, "init": "vocabulary"}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run file with these adapters beside the data and the model that it names."""
    for folder in ("base", "data", "other"):
        (tmp_path / folder).mkdir()
    for name in ("data/train.jsonl", "data/validation.jsonl", "other/train.jsonl"):
        (tmp_path / name).touch()

    def write(adapters: dict[str, Any]) -> Path:
        content = {
            "name": "first",
            "seed": 3,
            "base": {
                "model": "./base",
                "quantization": "nf4",
                "compute_dtype": "float32",
                "sharding": "world",
                "checkpoint_activations": False,
            },
            "adapters": adapters,
            "task": TASK,
            "train": TRAIN,
            "cluster": {"workers": 2, "storage": "runs"},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configio.load(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_an_adapter_has_the_run_s_settings_and_its_own_where_it_has_any(write: Write, tmp_path: Path) -> None:
    own = {"steps": 30, "optimizer": "adafactor", "learning_rate": 0.5, "weight_decay": 1e-5, "examples_per_step": 4}
    other = {**TASK, "name": "others", "files": {"train": "other/train.jsonl", "validation": "other/train.jsonl"}}
    cfg = configio.load(write({"a": PROMPT, "b": {**PROMPT, "task": other, "train": own, "seed": 9}}))
    assert cfg.adapter_train("a") == cfg.train
    assert cfg.adapter_task("a") == cfg.task
    changed = cfg.adapter_train("b")
    assert {key: getattr(changed, key) for key in own} == own
    assert changed == cfg.train.model_copy(update=own)
    files = cfg.adapter_task("b").files
    assert files is not None and files.train == tmp_path / "other/train.jsonl"
    assert (cfg.adapter_seed("a"), cfg.adapter_seed("b")) == (3, 9)
    assert cfg.num_steps == 100


def test_zero_takes_clipping_and_early_stop_of_the_run_away_from_one_adapter(write: Write) -> None:
    cfg = configio.load(write({"a": PROMPT, "b": {**PROMPT, "train": {"clip_norm": 0, "early_stop": 0}}}))
    assert (cfg.adapter_train("a").clip_norm, cfg.adapter_train("a").early_stop) == (1.0, 3)
    assert (cfg.adapter_train("b").clip_norm, cfg.adapter_train("b").early_stop) == (None, None)


def test_all_problems_of_adapters_come_in_one_message_with_their_keys(write: Write) -> None:
    train = {"microbatch_tokens": 64, "packing": "off", "checkpoint_every": 3, "lerning_rate": 1, "steps": 0}
    task = {**TASK, "metrics": [], "files": {**TASK["files"], "train": "data/tran.jsonl"}}
    lines = problems_of(write({"a": {**PROMPT, "train": train}, "b": {**PROMPT, "task": task}}))
    shared = "unknown key: it belongs to the pass or the run, which all adapters share; write train."
    assert sorted(lines)[:5] == [
        f"adapters.a.train.checkpoint_every: {shared}checkpoint_every",
        "adapters.a.train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        f"adapters.a.train.microbatch_tokens: {shared}microbatch_tokens",
        f"adapters.a.train.packing: {shared}packing",
        "adapters.a.train.steps: must be >= 1, got 0",
    ]
    assert sorted(lines)[5].startswith("adapters.b.task.files.train: no such file, got 'data/tran.jsonl'")
    assert sorted(lines)[6:] == ["adapters.b.task.metrics: needs at least 1, got []"]


def test_a_key_of_another_kind_is_no_slip_of_the_pen(write: Write) -> None:
    prefix = {"kind": "prefix", "length": 3, "init": "random", "decoder_length": 2}
    (line,) = problems_of(write({"a": prefix}))
    assert line == "adapters.a.decoder_length: unknown key here: it belongs to another kind"


def test_a_warm_up_that_never_ends_is_named_for_every_adapter(write: Write) -> None:
    adapters = {name: {**PROMPT, "train": {"steps": steps}} for name, steps in (("a", 10), ("b", 11), ("c", 4))}
    assert problems_of(write(adapters)) == [
        f"adapters.{name}.train: warmup_steps=10 must be less than steps={steps}; what is not given there is the run's"
        for name, steps in (("a", 10), ("c", 4))
    ]


def test_an_override_of_what_all_adapters_share_is_refused_by_name(write: Write) -> None:
    (line,) = problems_of(write({"a": PROMPT}), "adapters.a.train.packing=off")
    assert line.startswith("override 'adapters.a.train.packing=off': unknown key adapters.a.train.packing: it belongs")


def test_lists_become_their_product_with_names_of_what_varies(write: Write) -> None:
    adapter = {**PROMPT, "length": [1, 20], "seed": [0, 1], "init": ["random"]}
    cfg = configio.load(write({"sst2": adapter, "plain": PROMPT}))
    assert list(cfg.adapters) == ["sst2-p1-s0", "sst2-p1-s1", "sst2-p20-s0", "sst2-p20-s1", "plain"]
    assert [(a.length, a.seed, a.init) for a in cfg.adapters.values()] == [
        (1, 0, "random"),
        (1, 1, "random"),
        (20, 0, "random"),
        (20, 1, "random"),
        (20, None, "vocabulary"),
    ]
    assert configio.from_dict(json.loads(json.dumps(configio.dump(cfg)))) == cfg


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"train": {"learning_rate": [0.3, 1e-5, 1]}}, ["a-lr0.3", "a-lr1e-5", "a-lr1"]),
        ({"train": {"optimizer": ["adamw", "adafactor"], "steps": [20, 50]}},
         ["a-adamw-steps20", "a-adamw-steps50", "a-adafactor-steps20", "a-adafactor-steps50"]),
        ({"train": {"weight_decay": [0, 0.1], "examples_per_step": [8, 16]}},
         ["a-wd0-batch8", "a-wd0-batch16", "a-wd0.1-batch8", "a-wd0.1-batch16"]),
        ({"init": "random", "init_top": [100, 200]}, ["a"]),
        ({"init": ["random", "vocabulary"], "init_top": [100, 5000]},
         ["a-random", "a-vocabulary-init_top100", "a-vocabulary-init_top5000"]),
        ({"init": ["random", "text"], "init_text": ["Is it good?", "Rate"]},
         ["a-random", "a-text-text0", "a-text-Rate"]),
        ({"init_top": [100, 200], "init": ["labels", "text"], "init_labels": [" bad"], "init_text": "Rate"},
         ["a-labels-init_top100", "a-labels-init_top200", "a-text"]),
        ({"reparam": ["none", "residual"], "reparam_hidden_size": [8, 16], "seed": [0, 1]},
         ["a-none-s0", "a-none-s1", "a-residual-reparam_hidden_size8-s0", "a-residual-reparam_hidden_size8-s1",
          "a-residual-reparam_hidden_size16-s0", "a-residual-reparam_hidden_size16-s1"]),
        ({"reparam": ["none", "residual"], "reparam_hidden_size": 8}, ["a-none", "a-residual"]),
        ({"init": "text", "init_text": ["Is it good?", "Rate it."]}, ["a-text0", "a-text1"]),
        ({"init": "labels", "init_labels": [" bad", " good"]}, ["a"]),
    ],
)  # fmt: skip
def test_the_names_of_a_product_are_these(write: Write, settings: dict[str, Any], names: list[str]) -> None:
    adapters = configio.load(write({"a": {**PROMPT, **settings}})).adapters
    assert list(adapters) == names
    assert all(one != other for one, other in itertools.combinations(adapters.values(), 2))


def test_where_the_start_varies_its_words_go_to_those_that_start_from_them(write: Write) -> None:
    starts = {"init": ["labels", "random", "text"], "init_labels": [" bad", " good"], "init_text": "Rate it."}
    cfg = configio.load(write({"a": {**PROMPT, **starts}}))
    assert [(a.init, a.init_labels, a.init_text) for a in cfg.adapters.values()] == [  # type: ignore[union-attr]
        ("labels", (" bad", " good"), None),
        ("random", (), None),
        ("text", (), "Rate it."),
    ]


def test_an_override_may_be_a_list_of_numbers_or_of_words(write: Write) -> None:
    path = write({"a": PROMPT})
    cfg = configio.load(path, ["adapters.a.init=[random,vocabulary]", "adapters.a.train.steps=[20, 30]"])
    assert list(cfg.adapters) == [
        "a-random-steps20",
        "a-random-steps30",
        "a-vocabulary-steps20",
        "a-vocabulary-steps30",
    ]
    text = configio.load(path, ["adapters.a.init=text", "adapters.a.init_text=[INST] rate it [/INST]"])
    assert text.adapters["a"].init_text == "[INST] rate it [/INST]"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("adapters", "line"),
    [
        ({"a": {**PROMPT, "length": [5, 20, 5]}}, "adapters.a.length: 5 is there twice; each value makes one adapter"),
        ({"a": {**PROMPT, "length": []}}, "adapters.a.length: a list here must hold numbers or words, got []"),
        ({"a": {**PROMPT, "seed": [1, None]}}, "adapters.a.seed: a list here must hold numbers or words, got nothing"),
        ({"a": {**PROMPT, "length": [5, 6]}, "a-p5": PROMPT},
         "adapters.a: its lists make the adapter a-p5, which is there already"),
        ({"a.b": PROMPT}, "adapters.a.b: a dot in the name of an adapter is kept for those that a product makes"),
        ({"a": {**PROMPT, "length": [0, 5], "seed": [1, 2]}}, "adapters.a.length: must be >= 1, got 0"),
        ({"a": {**PROMPT, "train": {"steps": [5, 50]}}}, "adapters.a.train: warmup_steps=10 must be less than steps=5"),
    ],
)  # fmt: skip
def test_a_product_that_cannot_be_is_refused_once_under_the_key_that_was_typed(
    write: Write, adapters: dict[str, Any], line: str
) -> None:
    (found,) = problems_of(write(adapters))
    assert found.startswith(line)


def test_packing_off_needs_no_quotes_although_yaml_reads_it_as_false(write: Write) -> None:
    path = write({"a": PROMPT})
    path.write_text(path.read_text().replace("train:\n  steps", "train:\n  packing: off\n  steps"))
    assert configio.load(path).train.packing == "off"


def test_the_fingerprint_follows_what_an_adapter_has_for_itself(write: Write) -> None:
    first = configio.fingerprint(configio.load(write({"a": PROMPT})))
    for own in ({"train": {"steps": 99}}, {"task": {**TASK, "input": "{{ text }}!"}}, {"seed": 3}):
        assert configio.fingerprint(configio.load(write({"a": {**PROMPT, **own}}))) != first, own


def test_adapters_are_evaluated_on_the_task_they_were_trained_on_and_on_one_at_a_time(write: Write) -> None:
    other = {**TASK, "name": "others"}
    cfg = configio.load(write({"a": PROMPT, "b": {**PROMPT, "task": other}}))
    a, b = (cfg.run_dir / "adapters" / name / "best" for name in ("a", "b"))
    assert selection.with_task_of(cfg, [b]).task.name == "others"
    assert selection.with_task_of(cfg, [a, Path("/elsewhere/adapter")]) == cfg
    with pytest.raises(ConfigError, match="a/best was trained on task films, .*b/best on others; name the adapters of"):
        selection.with_task_of(cfg, [a, b])


def test_the_schema_takes_lists_where_a_product_may_stand(write: Write) -> None:
    schema = configio.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    adapter = {**PROMPT, "length": [1, 5], "init": ["random", "vocabulary"], "train": {"learning_rate": [0.3, 0.1]}}
    run = yaml.safe_load(write({"a": adapter}).read_text())
    jsonschema.validate(run, schema)
    for wrong in ({"length": [1, "x"]}, {"length": [5, 5]}, {"train": {"steps": []}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**run, "adapters": {"a": {**PROMPT, **wrong}}}, schema)


def test_an_epsilon_of_adamw_is_refused_where_nothing_uses_it(write: Write) -> None:
    path = write({"a": PROMPT, "b": PROMPT})
    plain = ["train.optimizer=adafactor", "train.adam_epsilon=1e-6"]
    (problem,) = problems_of(path, *plain)
    assert problem == (
        "train.adam_epsilon: is AdamW's, and what would use it has adafactor; set optimizer to 'adamw' or leave it "
        "out, got 1e-06 (override 'train.adam_epsilon=1e-6')"
    )
    cfg = configio.load(path, [*plain, "adapters.a.train.optimizer=adamw"])
    assert cfg.adapter_train("a").epsilon == 1e-6
    cfg = configio.load(path, [*plain, "full_finetuning={train: {optimizer: adamw}}"])
    assert cfg.adapter_train("a").optimizer == "adafactor"
    own = ["train.optimizer=adamw", "adapters.b.train.optimizer=adafactor", "adapters.b.train.adam_epsilon=0.1"]
    (problem,) = problems_of(path, *own)
    assert problem.startswith("adapters.b.train.adam_epsilon: is AdamW's, and what would use it has adafactor")
    for epsilon in ("1e-46", "1e300"):  # 0 / 0, and no move at all
        (problem,) = problems_of(path, "train.optimizer=adamw", f"train.adam_epsilon={epsilon}")
        assert problem.startswith("train.adam_epsilon: must be")


def test_a_product_gives_a_rate_or_an_epsilon_to_those_that_use_it(write: Write) -> None:
    network = {
        "reparam": ["none", "residual"],
        "reparam_hidden_size": 4,
        "train": {"network_learning_rate": [0.1, 0.2]},
    }
    cfg = configio.load(write({"a": {**PROMPT, **network}}))
    found = {name: a.train.network_learning_rate if a.train else None for name, a in cfg.adapters.items()}
    assert found == {
        "a-none": None,
        "a-residual-network_learning_rate0.1": 0.1,
        "a-residual-network_learning_rate0.2": 0.2,
    }
    cfg = configio.load(write({"a": {**PROMPT, "train": {"optimizer": ["adamw", "adafactor"], "adam_epsilon": 1e-6}}}))
    assert {name: a.train.adam_epsilon if a.train else None for name, a in cfg.adapters.items()} == {
        "a-adamw": 1e-6,
        "a-adafactor": None,
    }
