"""The catalogue: every task is whole, a name is enough, and SuperGLUE's own files give what the hub's columns give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import yaml

from peftscale import catalogue, configio
from peftscale.config import DataFiles, RunConfig, TaskConfig
from peftscale.data import texts
from peftscale.errors import ConfigError, DataError

SUPERGLUE = {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"}
OTHERS = {"sst2", "mrpc", "qqp", "emotion", "ag_news", "imdb", "squad", "webnlg", "e2e_nlg", "wmt16_en_ro"}
WrittenRun = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> WrittenRun:
    """Writes a run file with this task; the files that it may name are there."""
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"passage": "p", "question": "q", "label": true}\n')
    (tmp_path / "base").mkdir()

    def write(task: dict[str, Any], *, of_adapter: dict[str, Any] | None = None) -> Path:
        content = {
            "name": "run",
            "seed": 0,
            "base": {
                "model": "./base",
                "quantization": "nf4",
                "compute_dtype": "float32",
                "sharding": "auto",
                "checkpoint_activations": False,
            },
            "adapters": {"a": {"kind": "prompt", "length": 5, "init": "random", "task": of_adapter}},
            "task": task,
            "train": {
                "steps": 2,
                "examples_per_step": 2,
                "microbatch_tokens": 512,
                "optimizer": "adafactor",
                "learning_rate": 0.3,
                "evaluate_every": 1,
                "checkpoint_every": 1,
            },
            "cluster": {"workers": 0, "storage": "runs"},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def _rows(folder: Path, rows: list[dict[str, Any]]) -> DataFiles:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataFiles(train=path, validation=path)


def test_the_catalogue_has_the_tasks_of_the_papers_each_whole() -> None:
    entries = catalogue.entries()
    assert set(entries) == SUPERGLUE | OTHERS | {"multirc-jsonl", "record-jsonl", "wsc-jsonl"}
    for name, entry in entries.items():
        assert entry.task["name"] == name
        assert ("hub" in entry.task) != name.endswith("-jsonl")
        task = entry.over(DataFiles(train=Path("a"), validation=Path("b")))
        assert task.cue == " target:" and catalogue.is_complete(entry.task)
        assert set(entry.sizes) >= {"train", "validation"}
        if "hub" in entry.task:
            hub = TaskConfig.model_validate(entry.task).hub
            assert hub is not None and (hub.test is not None) == ("test" in entry.sizes)
        # the mean decides where there are several metrics of equal weight, as in Lester et al.
        assert ("mean" in task.metrics) <= (task.metrics[0] == "mean")


def test_no_label_of_the_catalogue_begins_with_another_in_whatever_tokens() -> None:
    with_labels = [entry.task["labels"].values() for entry in catalogue.entries().values() if "labels" in entry.task]
    assert len(with_labels) == 13
    for words in with_labels:
        for word in words:
            assert not [other for other in words if other is not word and other.strip().startswith(word.strip())]


def test_official_metrics_of_superglue() -> None:
    assert {name: catalogue.entries()[name].task["metrics"] for name in sorted(SUPERGLUE)} == {
        "boolq": ["accuracy"],
        "cb": ["mean", "macro_f1", "accuracy"],
        "copa": ["accuracy"],
        "multirc": ["mean", "f1", "group_exact_match"],
        "record": ["mean", "squad_f1", "squad_exact_match"],
        "rte": ["accuracy"],
        "wic": ["accuracy"],
        "wsc": ["referent_accuracy"],
    }


def test_the_templates_are_part_of_the_package() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["peftscale"]
    files = {path for pattern in packaged for path in (root / "peftscale").glob(pattern)}
    assert set((root / "peftscale/catalogue").glob("*.yaml")) < files


def test_a_name_is_enough(written: WrittenRun) -> None:
    task = configio.load(written({"name": "boolq"})).task
    assert task.hub is not None and (task.hub.path, task.hub.subset) == ("aps/super_glue", "boolq")
    assert (task.metrics, task.max_text_tokens) == (("accuracy",), 512)
    assert task.labels == {"False": " False", "True": " True"}


def test_files_stand_in_place_of_the_hub_and_single_keys_over_the_catalogue_s(written: WrittenRun) -> None:
    files = {"train": "train.jsonl", "validation": "validation.jsonl"}
    cfg = configio.load(written({"name": "boolq", "files": files, "max_text_tokens": 99, "cue": "\nanswer:"}))
    assert cfg.task.hub is None and cfg.task.files is not None and cfg.task.files.train.is_absolute()
    assert (cfg.task.max_text_tokens, cfg.task.cue) == (99, "\nanswer:")
    assert cfg.task.labels == {"False": " False", "True": " True"}
    assert configio.from_dict(configio.dump(cfg)) == cfg
    # Other words in another order: which label is the positive one of F1 stays what it is.
    swapped = {"name": "mrpc", "labels": {"equivalent": " yes", "not_equivalent": " no"}}
    words = configio.load(written(swapped)).task.labels
    assert words is not None and list(words.items()) == [("not_equivalent", " no"), ("equivalent", " yes")]
    of_hub = configio.load(written({"name": "cb"}), ["task.hub.revision=abc", "task.cut=start"]).task
    assert of_hub.hub is not None and (of_hub.hub.path, of_hub.hub.revision) == ("aps/super_glue", "abc")
    assert of_hub.cut == "start"


def test_a_task_that_is_spelled_out_is_not_touched(written: WrittenRun) -> None:
    own = {
        "name": "cb",
        "hub": {"path": "me/mine"},
        "input": "{{ a }}",
        "target": "{{ b }}",
        "metrics": ["exact_match"],
    }
    task = configio.load(written(own)).task
    assert task == TaskConfig.model_validate({**own, "metrics": ("exact_match",)})
    assert task.labels is None and task.cue == ""


def test_an_adapter_s_own_task_may_be_a_name_too(written: WrittenRun) -> None:
    cfg: RunConfig = configio.load(written({"name": "rte"}, of_adapter={"name": "wsc"}))
    assert cfg.adapter_task("a").metrics == ("referent_accuracy",)


@pytest.mark.parametrize("where", ["task", "adapters.a.task"])
def test_a_name_that_is_not_there_is_one_problem_with_a_hint(written: WrittenRun, where: str) -> None:
    typo = {"name": "boolqq"}
    path = written(typo) if where == "task" else written({"name": "rte"}, of_adapter=typo)
    says = rf"1 problem\(s\)\n  {where}.name: the catalogue .*has no 'boolqq', .*; did you mean 'boolq'\?$"
    with pytest.raises(ConfigError, match=says):
        configio.load(path)


def test_superglue_s_own_files_give_the_examples_of_the_hub_s_columns(tmp_path: Path) -> None:
    story = 'Ann met Bo in Rome.\n@highlight\nAnn is tall\n@highlight\nBo is "old"\n@highlight\nThe end'
    places = [(0, 2), (8, 9), (14, 17), (0, 2)]  # the last letter is inside
    answers = ["Ann", "Bo"]
    lines = "He gave it to Bo ."
    pairs: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
        "multirc": (
            [
                {"paragraph": "<b>One</b><br>two", "question": "What?", "answer": text, "label": label, "idx": idx}
                for idx, (text, label) in enumerate((("a", 1), ("b", 0)))
                for idx in [{"paragraph": 4, "question": 9, "answer": idx}]
            ],
            [
                {
                    "idx": 4,
                    "passage": {
                        "text": "<b>One</b><br>two",
                        "questions": [
                            {
                                "question": "What?",
                                "idx": 9,
                                "answers": [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
                            }
                        ],
                    },
                }
            ],
        ),
        "record": (
            [{"passage": story, "query": "@placeholder sang.", "entities": ["Ann", "Bo", "Rome"], "answers": answers}],
            [
                {
                    "passage": {"text": story, "entities": [{"start": a, "end": b} for a, b in places]},
                    "qas": [{"query": "@placeholder sang.", "answers": [{"text": text} for text in answers]}],
                }
            ],
        ),
        "wsc": (
            [{"text": lines, "span1_text": "Ann", "span2_text": "it", "span2_index": 2, "label": 1}],
            [{"text": lines, "target": {"span1_text": "Ann", "span2_text": "it", "span2_index": 2}, "label": True}],
        ),
    }
    for name, (of_hub, of_files) in pairs.items():
        for split in ("train", "validation"):
            hub, files = (
                texts.render(catalogue.entries()[key].over(_rows(tmp_path, rows)), split)  # type: ignore[arg-type]
                for key, rows in ((name, of_hub), (f"{name}-jsonl", of_files))
            )
            assert [(t.input, t.target, t.references) for t in hub] == [
                (t.input, t.target, t.references) for t in files
            ]
    task = catalogue.entries()["record"].over(_rows(tmp_path, pairs["record"][0]))
    train, (evaluated,) = texts.render(task, "train"), texts.render(task, "validation")
    assert [text.target for text in train] == [" Ann", " Bo"] and evaluated.references == (" Ann", " Bo")
    assert evaluated.input == (
        "query: @placeholder sang. entities: Ann, Bo, Rome passage: "
        'Ann met Bo in Rome. Ann is tall. Bo is "old" The end target:'
    )
    multirc = texts.render(catalogue.entries()["multirc"].over(_rows(tmp_path, pairs["multirc"][0])), "validation")
    assert [text.input for text in multirc] == [
        f"question: What? answer: {answer} paragraph: One two target:" for answer in "ab"
    ]
    assert [text.label for text in multirc] == [1, 0] and len({text.group for text in multirc}) == 1


@pytest.mark.parametrize(
    ("index", "text", "shown"),
    [
        (2, "He gave it to Bo .", "He gave *it* to Bo . target:"),
        (3, 'He said: "Take it," and left.', 'He said: "Take *it*," and left. target:'),
        (1, "To use it was hard.", "To use *it* was hard. target:"),  # one word too early
    ],
)
def test_wsc_marks_the_pronoun_also_where_the_data_set_points_beside_it(
    tmp_path: Path, index: int, text: str, shown: str
) -> None:
    row = {"text": text, "span1_text": "Ann", "span2_text": "it", "span2_index": index, "label": 0}
    (found,) = texts.render(catalogue.entries()["wsc"].over(_rows(tmp_path, [row])), "validation")
    assert (found.input, found.target, found.target_holds) == (shown, " Ann", False)


def test_squad_s_answers_may_be_a_mapping_of_lists_or_a_list_of_mappings(tmp_path: Path) -> None:
    for answers in ({"text": ["a", "b"], "answer_start": [1, 2]}, [{"text": "a"}, {"text": "b"}]):
        row = {"question": "What?", "context": "A b.", "answers": answers}
        (found,) = texts.render(catalogue.entries()["squad"].over(_rows(tmp_path, [row])), "validation")
        assert found.references == (" a", " b")


def test_a_hidden_label_of_the_hub_is_refused(tmp_path: Path) -> None:
    row = {"passage": "p", "question": "q", "label": -1}
    with pytest.raises(Exception, match="task.target renders '-1'"):
        texts.render(catalogue.entries()["boolq"].over(_rows(tmp_path, [row])), "validation")


@pytest.mark.parametrize(("label", "holds"), [(1, True), ("True", True), (True, True), (0, False), ("False", False)])
def test_wsc_reads_its_labels_in_any_spelling_and_refuses_hidden_ones(tmp_path: Path, label: Any, holds: bool) -> None:
    row = {"text": "He gave it to Bo .", "span1_text": "Ann", "span2_text": "it", "span2_index": 2, "label": label}
    task = catalogue.entries()["wsc"]
    (found,) = texts.render(task.over(_rows(tmp_path, [row])), "validation")
    assert found.target_holds is holds
    with pytest.raises(DataError, match="task.target_holds"):
        texts.render(task.over(_rows(tmp_path, [{**row, "label": -1}])), "validation")


def test_tasks_lists_the_catalogue_and_counts_local_data(tmp_path: Path) -> None:
    assert "tasks " in commands.run("--help").out
    for split, rows in (("train", 3), ("validation", 1)):
        (tmp_path / "wsc-jsonl").mkdir(exist_ok=True)
        row = {"text": "A b c", "target": {"span1_text": "A", "span2_text": "b", "span2_index": 1}, "label": True}
        lines = [json.dumps({**row, "label": i > 0 or split != "train"}) for i in range(rows)]
        (tmp_path / "wsc-jsonl" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    done = commands.run("tasks", "--data", tmp_path, "--json")
    found = json.loads(done.out)["tasks"]
    assert list(found) == sorted(catalogue.entries())
    assert found["wsc-jsonl"]["local_sizes"] == {"train": 2, "validation": 1}
    assert found["boolq"]["local_sizes"] is None
    assert found["boolq"]["hub"] == {"path": "aps/super_glue", "subset": "boolq"}
    assert found["boolq"]["kind"] == "labels" and found["squad"]["kind"] == "generated"
    table = commands.run("tasks").err
    assert all(name in table for name in SUPERGLUE | OTHERS)
    missing = commands.run("tasks", "--data", tmp_path / "nowhere")
    assert missing.code == 2 and "no such directory" in missing.err
