"""Rows to examples: lists spread, references shared out, groups put together, and nothing of it without a key."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from peftscale.config import DataFiles, HubData, TaskConfig
from peftscale.data import tasks, texts
from peftscale.errors import ConfigError, DataError

STORIES = [
    {
        "story": "Ann met Bo.",
        "asked": [{"q": "Who?", "right": ["Ann", "Bo", "Ann"]}, {"q": "Where?", "right": ["here"]}],
    },
    {"story": "Cy left.", "asked": [{"q": "Who?", "right": ["Cy"]}]},
]
GENERATED: dict[str, Any] = {
    "each": {"one": "asked"},
    "input": "{{ story }} {{ one.q }}",
    "target": " {{ reference }}",
    "references": "one.right",
    "metrics": ("exact_match",),
}


def _task(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> TaskConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig(name="t", files=DataFiles(train=path, validation=path), **{**GENERATED, **keys})


def test_a_row_becomes_one_example_for_each_entry_of_its_lists(tmp_path: Path) -> None:
    found = texts.render(_task(tmp_path, STORIES), "validation")
    assert [text.input for text in found] == ["Ann met Bo. Who?", "Ann met Bo. Where?", "Cy left. Who?"]
    assert [text.index for text in found] == [0, 1, 2]
    nested = {"each": {"one": "asked", "name": "one.right"}, "target": " {{ name }}", "references": None}
    spread = texts.render(_task(tmp_path, STORIES, **nested), "validation")
    assert [text.target for text in spread] == [" Ann", " Bo", " Ann", " here", " Cy"]


def test_training_sees_every_reference_and_evaluation_holds_one_prediction_against_all(tmp_path: Path) -> None:
    task = _task(tmp_path, STORIES)
    train, evaluated = texts.render(task, "train"), texts.render(task, "validation")
    assert [text.target for text in train] == [" Ann", " Bo", " here", " Cy"]  # equal ones once
    assert all(text.references == (text.target,) for text in train)
    assert [text.references for text in evaluated] == [(" Ann", " Bo"), (" here",), (" Cy",)]
    assert texts.count(task) == {"train": 4, "validation": 3}


def test_rows_of_a_group_are_one_example_of_an_evaluation_and_not_of_training(tmp_path: Path) -> None:
    rows = [{"mr": "x", "text": "one"}, {"mr": "y", "text": "two"}, {"mr": "x", "text": "three"}]
    keys = {"each": {}, "input": "{{ mr }}", "target": " {{ text }}", "references": None, "group": "mr"}
    task = _task(tmp_path, rows, **keys)
    assert [text.references for text in texts.render(task, "validation")] == [(" one", " three"), (" two",)]
    assert [text.target for text in texts.render(task, "train")] == [" one", " two", " three"]
    with pytest.raises(
        DataError, match=r"group: rows 0 and 2 .* have the group 'x' .*; one prediction cannot stand for both"
    ):
        texts.render(_task(tmp_path, rows, **{**keys, "input": "{{ mr }} {{ text }}"}), "validation")


def test_a_target_that_does_not_hold_is_evaluated_and_not_trained_on(tmp_path: Path) -> None:
    rows = [{"who": "Ann", "label": 1}, {"who": "Bo", "label": 0}]
    keys = {"each": {}, "input": "Who?", "target": " {{ who }}", "references": None, "metrics": ("referent_accuracy",)}
    task = _task(tmp_path, rows, **keys, target_holds="label == 1")
    assert [text.target for text in texts.render(task, "train")] == [" Ann"]
    assert [(text.target, text.target_holds) for text in texts.render(task, "validation")] == [
        (" Ann", True),
        (" Bo", False),
    ]
    with pytest.raises(DataError, match=r"task.target_holds: fails on row 0 .*gives 1, but a bool is needed"):
        texts.render(_task(tmp_path, rows, **keys, target_holds="label"), "train")
    with pytest.raises(DataError, match=r"its 2 rows give no example; look at task.target_holds"):
        texts.render(_task(tmp_path, rows, **keys, target_holds="label == 7"), "train")


def test_answers_to_one_question_keep_their_group_and_their_label(tmp_path: Path) -> None:
    rows = [{"q": 7, "a": "yes", "label": 1}, {"q": 7, "a": "no", "label": 0}]
    keys = {
        "each": {},
        "input": "{{ a }}",
        "target": "{{ label }}",
        "references": None,
        "group": "q",
        "labels": {"0": " False", "1": " True"},
        "metrics": ("group_exact_match",),
    }
    found = texts.render(_task(tmp_path, rows, **keys), "validation")
    assert [(text.group, text.label, text.references) for text in found] == [("7", 1, ()), ("7", 0, ())]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"each": {"one": "askd"}}, r"task.each.one: unknown column 'askd'; did you mean 'asked'\?"),
        ({"each": {"one": "story"}}, r"task.each.one: fails on row 0 .*gives 'Ann met Bo.', but a list is needed"),
        ({"references": "one.left"}, "task.references: fails on row 0 .*no attribute 'left'"),
        ({"references": "[]"}, r"task.references: empty in row 0 .* at least one answer is needed"),
        ({"target": "{{ answer }}"}, "task.target: unknown column 'answer' The columns of .*'one', 'reference'"),
        ({"group": "story.__class__.__mro__"}, "task.group: fails on row 0 .*unsafe"),
    ],
)
def test_an_expression_that_does_not_fit_the_rows_is_named(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        texts.render(_task(tmp_path, STORIES, **changed), "validation")


def test_an_expression_that_is_not_jinja_is_the_run_file_s_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.references: not a Jinja expression: .*one\["):
        texts.render(_task(tmp_path, STORIES, references="one["), "train")


def test_a_cue_replaces_the_last_blanks_and_an_encoder_decoder_reads_none(tmp_path: Path) -> None:
    task = _task(tmp_path, STORIES, input="{{ story }} \n", cue=" target:")
    assert texts.render(task, "validation")[0].input == "Ann met Bo. target:"
    assert texts.render(task, "validation", is_encoder_decoder=True)[0].input == "Ann met Bo. \n"


def test_a_long_input_cut_at_its_end_keeps_its_beginning_and_the_cue(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.QUICKSTART / "base")
    rows = [{"text": "one two three four five six seven", "label": "x"}]
    keys: dict[str, Any] = {
        "each": {},
        "input": "question: {{ text }}",
        "cue": " target:",
        "target": " {{ label }}",
        "references": None,
    }

    def shown(**more: Any) -> str:
        found = tasks.load(_task(tmp_path, rows, **{**keys, **more}), tokenizer, max_tokens=None)
        assert found.num_cut == 2 * bool(more)  # train and validation
        return str(tokenizer.decode(found.train[0].input_ids, skip_special_tokens=True))

    whole = shown()
    most = len(tokenizer(whole, add_special_tokens=False).input_ids) - 4
    at_end, at_start = shown(max_text_tokens=most, cut="end"), shown(max_text_tokens=most)
    assert whole == "question: one two three four five six seven target:"
    assert at_end.startswith("question: one two") and at_end.endswith(" target:") and "seven" not in at_end
    assert at_start.endswith("six seven target:") and "question" not in at_start
    with pytest.raises(DataError, match="task.max_text_tokens=2 leaves no room for text"):
        shown(max_text_tokens=2, cut="end")


def test_an_encoder_s_input_cut_at_its_end_still_ends_as_a_text_does(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.QUICKSTART / "base")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    rows = [{"text": "one two three four five six seven"}]
    keys: dict[str, Any] = {"each": {}, "input": "{{ text }}", "cue": " target:", "target": "x", "references": None}
    task = _task(tmp_path, rows, **keys, max_text_tokens=6, cut="end")
    data = tasks.load(task, tokenizer, max_tokens=None, is_encoder_decoder=True)
    whole = tokenizer("one two three four five six seven").input_ids
    assert data.train[0].input_ids == (*whole[:5], tokenizer.eos_token_id)


def test_a_conversion_of_the_hub_has_its_subsets_in_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory stands for the branch; the split `dev` of such a conversion is read as validation."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home"))
    for subset in ("de", "en"):
        for split in ("train", "dev"):
            (tmp_path / subset / split).mkdir(parents=True)
            rows = datasets.Dataset.from_list([{"text": f"{subset} {split}"}])
            rows.to_parquet(str(tmp_path / subset / split / "0000.parquet"))
    hub = HubData(path=str(tmp_path), subset="en", revision="refs/convert/parquet")
    task = TaskConfig(name="t", hub=hub, input="{{ text }}", target="x", metrics=("exact_match",))
    assert [text.input for text in texts.render(task, "validation")] == ["en dev"]
    assert [text.input for text in texts.render(task, "train")] == ["en train"]
