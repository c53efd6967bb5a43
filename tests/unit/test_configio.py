"""A run file becomes a RunConfig or one message that names every problem with its key, value and way out."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from peftscale import configio
from peftscale.config import RunConfig
from peftscale.errors import ConfigError

RUN = """\
name: first
seed: 3
base:
  model: bases/tiny
  quantization: nf4
  compute_dtype: float32
  sharding: world
  checkpoint_activations: false
adapters:
  sst2: {kind: prompt, length: 20, init: vocabulary}
task:
  name: sst2
  files: {train: data/train.jsonl, validation: data/validation.jsonl}
  input: "{{ text }}"
  target: "{{ label }}"
  labels: {0: bad, 1: good}
  metrics: [accuracy]
train:
  steps: 1e2
  examples_per_step: 8
  microbatch_tokens: 1024
  optimizer: adamw
  learning_rate: 3e-1
  evaluate_every: 50
  checkpoint_every: 40
cluster: {workers: 2, storage: runs}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes RUN, with one piece of text replaced, beside the data and the model that it names."""
    (tmp_path / "bases/tiny").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"data/{split}.jsonl").touch()

    def write(old: str = "", new: str = "") -> Path:
        assert old in RUN
        path = tmp_path / "run.yaml"
        path.write_text(RUN.replace(old, new) if old else RUN)
        return path

    return write


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configio.load(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{path}: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


def test_numbers_with_exponents_are_numbers_and_integer_label_keys_are_text(write: Write) -> None:
    cfg = configio.load(write())
    assert (cfg.train.steps, cfg.train.learning_rate) == (100, 0.3)
    assert isinstance(cfg.train.steps, int)
    assert cfg.task.labels == {"0": "bad", "1": "good"}


def test_relative_paths_are_taken_from_the_folder_of_the_run_file(write: Write, tmp_path: Path) -> None:
    cfg = configio.load(write(), ["base.pack_dir=../packs"])
    assert cfg.base.model == str(tmp_path / "bases/tiny")
    assert cfg.base.pack_dir == tmp_path.parent / "packs"
    assert cfg.task.files is not None
    assert cfg.task.files.train == tmp_path / "data/train.jsonl"
    assert cfg.run_dir == tmp_path / "runs/first"


def test_a_model_that_is_no_directory_and_looks_like_none_is_a_hub_id(write: Write) -> None:
    cfg = configio.load(write("model: bases/tiny", "model: some-org/some-model"))
    assert cfg.base.model == "some-org/some-model"


def test_overrides_are_typed_by_the_key_they_set(write: Write) -> None:
    cfg = configio.load(
        write(),
        [
            "name=123",
            "train.steps=${train.evaluate_every}",
            "train.learning_rate=1e-5",
            "adapters.sst2.init=text",
            "adapters.sst2.init_text=Say no: yes",
            "adapters.long={kind: prompt, length: 7, init: random}",
            "task.labels.2=no",
            "track=[wandb]",
            "base.pack_dir=null",
        ],
    )
    assert (cfg.name, cfg.train.steps, cfg.train.learning_rate) == ("123", 50, 1e-5)
    assert cfg.adapters["sst2"].init_text == "Say no: yes"
    assert cfg.adapters["long"].length == 7
    assert cfg.task.labels == {"0": "bad", "1": "good", "2": "no"}
    assert cfg.track == ("wandb",)
    assert cfg.base.pack_dir is None


def test_all_problems_of_a_file_come_in_one_message(write: Write) -> None:
    path = write("length: 20", "length: 0")
    path.write_text(path.read_text().replace("learning_rate", "lerning_rate").replace("  steps: 1e2\n", ""))
    assert problems_of(path) == [
        "adapters.sst2.length: must be >= 1, got 0",
        "train.steps: missing; give it a whole number",
        "train.lerning_rate: unknown key; did you mean 'learning_rate'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("seed: 3", "sed: 3", "sed: unknown key; did you mean 'seed'?"),
        ("seed: 3", "seed: 3\nzzz: 1", "zzz: unknown key; known here: adapters, base, cluster,"),
        ("name: first", "name: 5", "name: must be text, got 5; put it in quotes"),
        ("name: first", "name: a b", "name: must match ^[A-Za-z0-9][A-Za-z0-9._-]*$, got 'a b'"),
        ("length: 20", "length: '20'", "adapters.sst2.length: must be a whole number, got '20'; leave the quotes out"),
        ("length: 20", "length: 2.5", "adapters.sst2.length: must be a whole number, got 2.5"),
        ("3e-1", "0", "train.learning_rate: must be > 0, got 0"),
        ("length: 20", "length: on", "adapters.sst2.length: must be a whole number, got true"),
        ("length: 20, ", "", "adapters.sst2.length: missing; Virtual tokens, P."),
        ("  optimizer: adamw\n", "", "train.optimizer: missing; adafactor is the recipe of Lester et al. 2021"),
        (
            "kind: prompt",
            "kind: promt",
            "adapters.sst2.kind: must be 'prompt' or 'prefix', got 'promt'; did you mean 'prompt'?",
        ),
        ("init: vocabulary", "init: labels", "adapters.sst2.init_labels: must be given exactly when init is 'labels'"),
        ("nf4", "nf3", "base.quantization: must be 'nf4', 'int8' or 'none', got 'nf3'; did you mean 'nf4'?"),
        ("activations: false", "activations: 0", "base.checkpoint_activations: must be true or false, got 0"),
        ("[accuracy]", "accuracy", "task.metrics: must be a list, got 'accuracy'; write [accuracy]"),
        ("[accuracy]", "[]", "task.metrics: needs at least 1, got []"),
        ("0: bad", "no: bad", "task.labels: a key must be text, got false; YAML reads yes, no, on and off as"),
        ("3e-1", ".nan", "train.learning_rate: must be a finite number, got nan"),
        ("3e-1", "!!binary aGVsbG8=", "train.learning_rate: must be text or a number, got binary data (!!binary)"),
        ("3e-1", "${nope}", "train.learning_rate: '${nope}' cannot be resolved: Interpolation key 'nope' not found"),
        ("3e-1", "???", "train.learning_rate: ??? must be filled in"),
        ("cluster: {", "cluster: 3 #", "cluster: must be a mapping (key: value lines), got 3"),
        (
            "validation.jsonl}",
            "validation.jsonl}\n  hub: {path: a}",
            "task.files, task.hub: exactly one of the two must be given, got both",
        ),
        ("data/train.jsonl", "data/tran.jsonl", "task.files.train: no such file, got 'data/tran.jsonl', looked for /"),
        ("bases/tiny", "bases/tny", "base.model: no such directory, got 'bases/tny', looked for /"),
        ("bases/tiny", "./tiny", "base.model: no such directory, got './tiny', looked for /"),
    ],
)
def test_each_problem_names_key_rule_and_value(write: Write, old: str, new: str, line: str) -> None:
    (found,) = problems_of(write(old, new))
    assert found.startswith(line)


LABELLED = "labels: {0: bad, 1: good}"


@pytest.mark.parametrize(
    ("metrics", "rest", "line"),
    [
        ("accuracy", "labels: {0: bad}", "labels: need at least two different words, got ['bad']"),
        ("accuracy", "labels: {0: bad, 1: bad}", "labels: need at least two different words, got ['bad', 'bad']"),
        (
            "exact_match",
            "each: {reference: answers}",
            "each: reference is the name of one of `references`; choose another for 'answers'",
        ),
        (
            "accuracy",
            f"{LABELLED}\n  references: answers",
            "references, task.target_holds: belong to a text that is generated, and this task has the labels 0, 1; got "
            "references='answers', target_holds=None",
        ),
        (
            "exact_match",
            "target_holds: label == 1",
            "metrics: referent_accuracy needs target_holds, and target_holds needs it; got exact_match and "
            "target_holds='label == 1'",
        ),
        (
            "referent_accuracy",
            "",
            "metrics: referent_accuracy needs target_holds, and target_holds needs it; got referent_accuracy and "
            "target_holds=None",
        ),
        ("f1", "labels: {0: bad, 1: good, 2: odd}", "metrics: f1 needs two labels, got 3; macro_f1 takes any number"),
        (
            "accuracy, group_exact_match",
            LABELLED,
            "metrics: group_exact_match needs `group`, which says what belongs together; got accuracy, "
            "group_exact_match and no group",
        ),
        (
            "mean, accuracy",
            LABELLED,
            "metrics: each once, and mean beside two others at least; got mean, accuracy",
        ),
        (
            "accuracy, accuracy",
            LABELLED,
            "metrics: each once, and mean beside two others at least; got accuracy, accuracy",
        ),
    ],
)
def test_keys_of_a_task_that_do_not_go_together_are_named_with_what_was_got(
    write: Write, metrics: str, rest: str, line: str
) -> None:
    path = write(f"{LABELLED}\n  metrics: [accuracy]", f"metrics: [{metrics}]\n  {rest}")
    assert problems_of(path) == [f"task.{line}"]


def test_a_task_without_any_data_says_so(write: Write) -> None:
    path = write("  files: {train: data/train.jsonl, validation: data/validation.jsonl}\n")
    assert problems_of(path) == ["task.files, task.hub: exactly one of the two must be given, got neither"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps", "override 'train.steps': must have the form key=value, for example train.steps=300"),
        (".steps=3", "override '.steps=3': must have the form key=value"),
        ("train.stps=3", "override 'train.stps=3': unknown key train.stps; did you mean 'steps'?"),
        ("seed.x=3", "override 'seed.x=3': seed holds a value, not keys; write seed=VALUE"),
        (
            "adapters.ss2.length=3",
            "override 'adapters.ss2.length=3': the file has no adapter 'ss2'; did you mean 'sst2'?",
        ),
        ("track=[a", "override 'track=[a': broken YAML after '=':"),
        ("train.steps=abc", "train.steps: must be a whole number, got 'abc' (override 'train.steps=abc')"),
        ("task.files.test=t.jsonl", "task.files.test: no such file, got 't.jsonl'"),
    ],
)
def test_an_override_that_fails_is_named(write: Write, override: str, line: str) -> None:
    (found,) = problems_of(write(), override)
    assert found.startswith(line)
    assert f"override '{override}'" in found


def test_a_path_that_is_only_there_from_the_current_folder_says_so(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "t.jsonl").touch()
    monkeypatch.chdir(elsewhere)
    (found,) = problems_of(write(), "task.files.test=t.jsonl")
    assert f"paths are taken from the run file's folder: write {elsewhere}/t.jsonl" in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2", "broken YAML: line 2, column 2: did not find expected ',' or ']'"),
        (b"a: 1\nb: 2\na: 3\n", "broken YAML: line 3, column 1: found duplicate key a"),
        (b"\tb: 1", "broken YAML: line 1, column 1: found character that cannot start any token"),
        (b"- a\n", "must be a mapping (key: value lines), got a list"),
        (b"7\n", "must be a mapping (key: value lines)"),
        (b"", "holds no keys; `peftscale schema` lists them"),
        (b"a: ${b\n", "an interpolation ${...} cannot be read"),
        (b"name: \xff", "not UTF-8 text (byte 6); a run file is YAML"),
    ],
)
def test_what_is_no_run_file_at_all_is_named_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        configio.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_missing_run_file_names_the_nearest_one(write: Write, tmp_path: Path) -> None:
    write()
    with pytest.raises(ConfigError, match=r"rum\.yaml: no such file .* did you mean .*/run\.yaml\?"):
        configio.load(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="there is no directory .*nowhere either"):
        configio.load(tmp_path / "nowhere/run.yaml")
    with pytest.raises(ConfigError, match="is a directory, not a run file"):
        configio.load(tmp_path)


def test_the_fingerprint_follows_what_changes_the_result_and_nothing_else(write: Write, tmp_path: Path) -> None:
    path = write()
    first = configio.fingerprint(configio.load(path))
    same = ["name=other", "cluster.workers=0", "cluster.storage=elsewhere", "track=[mlflow]", "base.pack_dir=p"]
    for override in same:
        assert configio.fingerprint(configio.load(path, [override])) == first, override
    for override in ["seed=4", "adapters.sst2.length=21", "train.learning_rate=0.31", "base.quantization=none"]:
        assert configio.fingerprint(configio.load(path, [override])) != first, override
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert configio.fingerprint(configio.load(moved / "run.yaml")) == first


def test_plain_data_turns_back_into_the_same_config(write: Write) -> None:
    cfg = configio.load(write(), ["track=[mlflow]", "train.clip_norm=1"])
    sent = json.loads(json.dumps(configio.dump(cfg)))
    assert configio.from_dict(sent) == cfg
    with pytest.raises(ConfigError, match=r"saved run configuration: 1 problem.*\n  train.stepz: unknown key"):
        configio.from_dict({**sent, "train": {**sent["train"], "stepz": 1}})


def test_the_schema_takes_a_good_file_and_refuses_a_bad_key(write: Write) -> None:
    schema = configio.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    run = json.loads(json.dumps(yaml.safe_load(write("1e2", "100").read_text().replace("3e-1", "0.3"))))
    jsonschema.validate(run, schema)
    with pytest.raises(jsonschema.ValidationError, match="lerning_rate"):
        jsonschema.validate({**run, "train": {**run["train"], "lerning_rate": 1}}, schema)
    assert "Virtual tokens" in schema["$defs"]["SoftPromptConfig"]["properties"]["length"]["description"]
    assert schema["title"] == "peftscale run file"
    assert set(RunConfig.model_fields) == set(schema["properties"])


def test_a_run_file_is_read_without_importing_torch(write: Write) -> None:
    code = (
        "import sys; from peftscale import configio, records; configio.load(sys.argv[1]); records.environment(); "
        'sys.exit(f\'{sorted({"torch", "transformers", "ray"} & set(sys.modules))}\' if '
        "{'torch', 'transformers', 'ray'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(write())], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_schema_that_editors_read_is_the_one_of_the_code() -> None:
    """`peftscale schema > configs/schema.json` after every change of config.py."""
    path = Path(__file__).parents[2] / "configs" / "schema.json"
    assert json.loads(path.read_text()) == configio.schema()


def _chain(text: str) -> str:
    """Forty keys, each of which holds the one before it several times."""
    return "\n".join(["d0: x", *(f"d{i}: {text.format(before=f'${{d{i - 1}}}')}" for i in range(1, 40))])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("d: " + "[" * 41 + "]" * 41, "more than 40 levels deep in line 1; no run file is"),
        ("d: [\n" + "[" * 100_000, "more than 40 levels deep in line 2; no run file is"),
        (
            "d0: &d0 [x]\n" + "\n".join(f"d{i}: &d{i} [*d{i - 1}]" for i in range(1, 99)),
            " levels deep in line ",
        ),
        (
            "d0: &d0 [x]\n" + "\n".join(f"d{i}: &d{i} [*d{i - 1}, *d{i - 1}]" for i in range(1, 30)),
            "YAML node expansion",
        ),
        (
            _chain("{before}{before}"),
            "78 interpolations ${...} in texts that hold several of them; at most 30 are resolved",
        ),
        (
            _chain("['{before}', '{before}']"),
            "its interpolations make more than 10,000 values or 40 levels: do they go round?",
        ),
        ("d: {e: '${d}'}", "'${d}' cannot be resolved: Interpolation to parent node detected"),
    ],
    ids=["brackets", "open brackets", "aliases", "aliases twice", "texts", "lists", "circle"],
)
def test_a_few_lines_that_stand_for_too_much_are_refused_at_once(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{lines}\n")
    with pytest.raises(ConfigError) as caught:
        configio.load(file)
    assert message in str(caught.value)


def test_lists_that_would_make_a_million_adapters_are_refused(tmp_path: Path) -> None:
    numbers = list(range(1, 101))
    cohort = {"kind": "prompt", "length": numbers, "seed": numbers, "init": "vocabulary", "init_top": numbers}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"adapters": {"many": cohort}}))
    with pytest.raises(
        ConfigError, match=r"adapters\.many: its lists make 1,000,000 adapters, at most 10,000 are made"
    ):
        configio.load(file)


def test_a_section_that_is_a_list_is_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cluster: [1]\n")
    with pytest.raises(ConfigError, match=r"cluster: must be a mapping"):
        configio.load(file)
