"""From rows to token ids: nothing is lost, invented, cut or relabelled without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peftscale.config import DataFiles, TaskConfig
from peftscale.data import tasks
from peftscale.data.tokens import TextEncoder
from peftscale.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"0": " bad", "1": " good"}
TRAIN = [{"text": "a dull film", "label": 0}, {"text": "a bright film", "label": 1}, {"text": "so so", "label": 1}]


def _load_tokenizer() -> PreTrainedTokenizerBase:
    for base in (ROOT / "configs/quickstart/base", ROOT.parent / "shared/bases/5m"):
        if (base / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(base)
    pytest.skip("no base with a tokenizer in configs/quickstart/base or ../shared/bases/5m")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return _load_tokenizer()


@pytest.fixture(scope="module")
def dressing() -> PreTrainedTokenizerBase:
    """The same tokenizer, but it sets <s> in front of a text and </s> behind it, as Llama's and T5's do."""
    tokenizer = _load_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def melting() -> PreTrainedTokenizerBase:
    """As Llama 2's: no pre-tokens inside a text, so '!' and 'good' melt; and a text alone begins with a blank."""
    merges = [("g", "o"), ("go", "o"), ("goo", "d"), ("b", "a"), ("ba", "d"), ("\u2581", "good"), ("!", "good")]
    tokens = ["</s>", *"\u2581abdfgilmo.!", *dict.fromkeys("".join(merge) for merge in merges)]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def _write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def _task(folder: Path, *, train: list[dict[str, Any]] | None = None, **changed: Any) -> TaskConfig:
    train_file = _write(folder / "train.jsonl", train or TRAIN)
    validation_file = _write(folder / "validation.jsonl", (train or TRAIN)[:2])
    fields: dict[str, Any] = {
        "name": "films",
        "files": DataFiles(train=train_file, validation=validation_file),
        "input": "{{ text }}\nRating:",
        "target": "{{ label }}",
        "labels": LABELS,
        "metrics": ("accuracy",),
    }
    return TaskConfig(**{**fields, **changed})


def _generated(folder: Path, **changed: Any) -> TaskConfig:
    return _task(folder, **{"labels": None, "target": " {{ text }}", "metrics": ("exact_match",), **changed})


def test_input_and_target_are_the_tokens_of_the_whole_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = tasks.load(_task(tmp_path), tokenizer, max_tokens=None)
    assert [len(data.train), len(data.validation), len(data.test)] == [3, 2, 0]
    assert (data.labels, data.words) == (("0", "1"), (" bad", " good"))
    for example, row in zip(data.train, TRAIN, strict=True):
        assert example.label is not None and example.label == row["label"]
        assert example.target_text == data.words[example.label]
        whole = tokenizer.decode(example.input_ids + example.target_ids)
        assert whole == f"{row['text']}\nRating:{example.target_text}"
        assert example.target_ids == example.choices_ids[example.label]
    assert [example.index for example in data.train] == [0, 1, 2]
    assert data.has_shared_choices and data.num_cut == 0 and data.num_seams == 0


def test_the_opening_token_is_kept_and_the_closing_one_is_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, dressing: PreTrainedTokenizerBase
) -> None:
    bare = tasks.load(_task(tmp_path), tokenizer, max_tokens=None)
    dressed = tasks.load(_task(tmp_path), dressing, max_tokens=None)
    assert dressing("a").input_ids[-1] == dressing.eos_token_id  # it does set one
    for without, with_start in zip(bare.train, dressed.train, strict=True):
        assert with_start.input_ids == (dressing.bos_token_id, *without.input_ids)
        assert with_start.target_ids == without.target_ids
        assert with_start.choices_ids == without.choices_ids


def test_a_target_that_melts_into_the_input_is_encoded_alone_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = _task(tmp_path, input="{{ text }}\nRating: ", labels={"0": "bad", "1": "good"})
    data = tasks.load(task, tokenizer, max_tokens=None)
    assert data.num_seams == 5
    for example in (*data.train, *data.validation):
        assert list(example.target_ids) == tokenizer(example.target_text, add_special_tokens=False).input_ids


def test_a_generated_target_ends_with_eos_and_a_label_does_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    generated = tasks.load(_generated(tmp_path), tokenizer, max_tokens=None)
    labelled = tasks.load(_task(tmp_path), tokenizer, max_tokens=None)
    for example in generated.train:
        assert example.target_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in example.target_ids[:-1]
        assert example.label is None and example.choices_ids == ()
    assert all(example.target_ids[-1] != tokenizer.eos_token_id for example in labelled.train)
    assert not generated.has_shared_choices


@pytest.mark.parametrize(
    ("num_rows", "odd_label"),
    [(7, 0), (1500, 1)],  # found among the probes, though not by its own target; by its own target, though no probe
)
def test_one_odd_row_is_not_given_the_choices_of_the_others(
    tmp_path: Path, melting: PreTrainedTokenizerBase, num_rows: int, odd_label: int
) -> None:
    odd = num_rows // 2 + 2
    train = [{"text": "film" + "!."[i != odd], "label": i % 2} for i in range(num_rows)]
    train[odd]["label"] = odd_label
    task = _task(tmp_path, train=train, input="{{ text }}", labels={"0": "bad", "1": "good"})
    data = tasks.load(task, melting, max_tokens=None)
    assert not data.has_shared_choices
    assert data.num_seams == odd_label  # in train; validation is the first two rows
    bad, good, start_good = (melting.convert_tokens_to_ids(token) for token in ("bad", "good", "\u2581good"))
    for example in data.train:
        assert example.choices_ids == ((bad,), (start_good if example.index == odd else good,))
        assert example.target_ids == example.choices_ids[example.label or 0]
    del train[odd]
    data = tasks.load(_task(tmp_path, train=train, input="{{ text }}", labels=task.labels), melting, max_tokens=None)
    assert data.has_shared_choices


@given(text=st.text(max_size=12), target=st.text(min_size=1, max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_input_and_target_decode_to_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, text: str, target: str
) -> None:
    encoder = TextEncoder(tokenizer)
    inputs = encoder.inputs([text])
    ids, _ = encoder.continuations([text], inputs, [target])[0]
    assert ids
    assert tokenizer.decode(inputs[0] + ids) == tokenizer.decode(tokenizer(text + target).input_ids)


def test_long_inputs_lose_their_first_tokens_and_keep_the_opening_one(
    tmp_path: Path, dressing: PreTrainedTokenizerBase
) -> None:
    train = [*TRAIN, {"text": "word " * 30 + "end", "label": 1}]
    whole = tasks.load(_task(tmp_path, train=train), dressing, max_tokens=None)
    data = tasks.load(_task(tmp_path, train=train, max_text_tokens=9), dressing, max_tokens=10)
    long, cut = whole.train[3], data.train[3]
    assert len(long.input_ids) > 30
    assert cut.input_ids == (dressing.bos_token_id, *long.input_ids[-8:])
    assert (cut.target_ids, cut.choices_ids) == (long.target_ids, long.choices_ids)
    assert data.num_cut == sum(len(example.input_ids) > 9 for example in (*whole.train, *whole.validation)) >= 1
    assert [example.input_ids for example in data.train[:3] if len(example.input_ids) < 9] == [
        example.input_ids for example in whole.train[:3] if len(example.input_ids) < 9
    ]


def test_a_limit_below_the_opening_token_is_refused(tmp_path: Path, dressing: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="task.max_text_tokens=1 leaves no room for text"):
        tasks.load(_task(tmp_path, max_text_tokens=1), dressing, max_tokens=None)


def test_the_longest_example_may_fill_the_base_and_not_one_token_more(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = tasks.load(_task(tmp_path), tokenizer, max_tokens=None)
    longest = max(data.train, key=lambda example: len(example.input_ids))
    fits = len(longest.input_ids) + 1
    assert tasks.load(_task(tmp_path), tokenizer, max_tokens=fits).train == data.train
    says = (
        rf"task.input: .* of 5 examples are too long; the longest, row {longest.index} .* of task.files.train \(.*"
        rf"has {fits} tokens \({fits - 1} of input, 1 of target\); at most {fits - 1} fit .*"
        rf"Set task.max_text_tokens to at most {fits - 2}, .* or lower adapters.\*.length"
    )
    with pytest.raises(DataError, match=says):
        tasks.load(_task(tmp_path), tokenizer, max_tokens=fits - 1)
    helped = tasks.load(_task(tmp_path, max_text_tokens=fits - 2), tokenizer, max_tokens=fits - 1)
    assert helped.num_cut >= 1
    with pytest.raises(DataError, match=rf"task.max_text_tokens={fits - 1}: .*are too long"):
        tasks.load(_task(tmp_path, max_text_tokens=fits - 1), tokenizer, max_tokens=fits - 1)


def test_the_longest_label_counts_though_it_is_not_the_true_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = [{"text": "a film " * 20, "label": 0}, {"text": "b", "label": 1}]
    task = _task(tmp_path, train=train, labels={"0": " bad", "1": " good and then some more of it"})
    data = tasks.load(task, tokenizer, max_tokens=None)
    (num_input, num_true, num_other) = map(len, (data.train[0].input_ids, *data.train[0].choices_ids))
    assert num_other > num_true
    with pytest.raises(DataError, match=rf"row 0 .*has {num_input + num_other} tokens"):
        tasks.load(task, tokenizer, max_tokens=num_input + num_true)
    assert tasks.load(task, tokenizer, max_tokens=num_input + num_other).train == data.train


@pytest.mark.parametrize("max_text_tokens", [None, 5])
def test_a_target_longer_than_the_context_is_refused_cut_or_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, max_text_tokens: int | None
) -> None:
    train = [*TRAIN, {"text": "word " * 40, "label": 0}]
    task = _generated(tmp_path, train=train, input="Say:", max_text_tokens=max_text_tokens)
    with pytest.raises(
        DataError, match=r"task.target: row 3 .*train.jsonl\) has a target of \d+ tokens.* at most 20 fit"
    ):
        tasks.load(task, tokenizer, max_tokens=20)


def test_generation_never_goes_past_the_base_s_positions(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = _generated(tmp_path, max_target_tokens=30)
    data, example = tasks.load(task, tokenizer, max_tokens=None), tasks.Example(0, (1,) * 7, (2,), None, "")
    assert [data.num_new_tokens(example, room=room) for room in (None, 40, 35)] == [30, 30, 28]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"input": "{{ txt }}"}, r"task.input: unknown column 'txt'; did you mean 'text'\? .* are 'text', 'label'"),
        ({"input": "{% if zzz %}{{ text }}{% endif %}"}, "task.input: unknown column 'zzz' The columns of task.files"),
        ({"target": "{{ lable }}"}, r"task.target: unknown column 'lable'; did you mean 'label'\?"),
        ({"input": "{{ text.author }}"}, "task.input: fails on row 0 .* of task.files.train .*no attribute 'author'"),
        ({"input": "{{ text / 2 }}"}, "task.input: fails on row 0"),
        ({"input": "{{ text.__class__.__mro__ }}"}, "task.input: fails on row 0 .*unsafe"),
        ({"labels": {"0": " bad", "2": " good"}}, r"renders '1' \(2 times\), first in row 1 .* are '0', '2'"),
        (
            {"labels": {**LABELS, "2": " odd"}},
            r"task.labels: '2' never occur\(s\) in task.files.train .* '0', '1' there",
        ),
        ({"labels": {"0 ": " bad", "1": " good"}}, r"renders '0' \(1 times\).* Did you mean '0 '\?"),
        ({"input": ""}, r"task.input: row 0 .* of task.files.train .* renders '', which is no token"),
    ],
)
def test_what_a_template_or_a_label_gets_wrong_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        tasks.load(_task(tmp_path, **changed), tokenizer, max_tokens=None)


@pytest.mark.parametrize("labels", [{"0": " good film", "1": " good"}, {"0": " good", "1": " good film"}])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_label_that_begins_with_another_s_tokens_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, labels: dict[str, str], is_encoder_decoder: bool
) -> None:
    says = (
        r"task.labels: ' good film', .*\[(\d+), \d+\], begins with the tokens of ' good', \[\1\], behind row 0 of task"
    )
    with pytest.raises(DataError, match=says):
        tasks.load(_task(tmp_path, labels=labels), tokenizer, max_tokens=None, is_encoder_decoder=is_encoder_decoder)


def test_labels_of_the_same_tokens_are_refused(tmp_path: Path, melting: PreTrainedTokenizerBase) -> None:
    train = [{"text": "film", "label": 0}, {"text": "film.", "label": 1}]
    task = _task(tmp_path, train=train, input="{{ text }}", labels={"0": " good", "1": "\u2581good"})
    with pytest.raises(
        DataError, match=r"' good', .*(\[\d+\]), begins with the tokens of '.good', \1, behind row 0 of"
    ):
        tasks.load(task, melting, max_tokens=None)


def test_labels_that_share_their_first_tokens_are_told_apart_by_the_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = tasks.load(_task(tmp_path, labels={"0": " good film", "1": " good story"}), tokenizer, max_tokens=None)
    (first, second) = data.train[0].choices_ids
    assert first[0] == second[0] and first != second


def test_a_template_that_is_not_jinja_is_the_run_file_s_fault(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ConfigError, match="task.input: not a Jinja template: .*{{ text"):
        tasks.load(_task(tmp_path, input="{{ text"), tokenizer, max_tokens=None)


def test_a_missing_value_is_not_the_word_none(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train: list[dict[str, Any]] = [*TRAIN, {"text": None, "label": 1}]
    with pytest.raises(DataError, match=r"task.input: fails on row 3 .*null or missing"):
        tasks.load(_task(tmp_path, train=train), tokenizer, max_tokens=None)
    data = tasks.load(_task(tmp_path, train=train, input="{{ text or '' }}\nRating:"), tokenizer, max_tokens=None)
    assert tokenizer.decode(data.train[3].input_ids) == "\nRating:"


def test_an_empty_generated_target_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = [*TRAIN, {"text": "", "label": 1}]
    with pytest.raises(DataError, match=r"task.target: row 3 .* renders '', which is no token"):
        tasks.load(_generated(tmp_path, train=train, target="{{ text }}"), tokenizer, max_tokens=None)


def test_a_column_may_have_the_name_of_a_jinja_function(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = [{"range": "a film", "label": 0}, {"range": "films", "label": 1}]
    data = tasks.load(_task(tmp_path, train=train, input="{{ range }}"), tokenizer, max_tokens=None)
    assert tokenizer.decode(data.train[1].input_ids) == "films"


def test_a_line_break_at_the_end_of_a_template_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = tasks.load(_task(tmp_path, input="{{ text }}\n"), tokenizer, max_tokens=None)
    assert tokenizer.decode(data.train[0].input_ids) == "a dull film\n"


def test_a_tokenizer_without_eos_cannot_generate(tmp_path: Path) -> None:
    tokenizer = _load_tokenizer()
    tokenizer.eos_token = None
    assert tasks.load(_task(tmp_path), tokenizer, max_tokens=None).train
    with pytest.raises(DataError, match="task.labels: left out.* this base.s tokenizer has none"):
        tasks.load(_generated(tmp_path), tokenizer, max_tokens=None)


def test_a_split_is_read_alone_and_one_that_is_not_there_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = _task(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    data = tasks.load(task, tokenizer, max_tokens=None, splits=("validation", "test"))
    assert len(data.split("validation")) == 2 and data.train == ()
    with pytest.raises(DataError, match=r"task films: no test split; give task.files.test"):
        data.split("test")


def test_real_reviews_are_read_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = ROOT.parent / "shared/data/sst2"
    if not folder.is_dir():
        pytest.skip("../shared/data/sst2 is not on this machine")
    pairs: dict[str, list[tuple[str, str]]] = {}
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        lines = (folder / f"stsa.binary.{name}").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        pairs[split] = [(line[0], line[2:]) for line in lines]
        _write(tmp_path / f"{split}.jsonl", [{"label": label, "text": text} for label, text in pairs[split]])
    files = DataFiles(**{split: tmp_path / f"{split}.jsonl" for split in pairs})
    task = TaskConfig(
        name="sst2",
        files=files,
        input="{{ text }}\nRating:",
        target="{{ label }}",
        labels=LABELS,
        metrics=("accuracy",),
    )
    data = tasks.load(task, tokenizer, max_tokens=1024 - 100)
    assert [len(data.train), len(data.validation), len(data.test)] == [6920, 872, 1821]
    assert data.has_shared_choices and data.num_cut == data.num_seams == 0
    for split in tasks.SPLITS:
        assert [example.label for example in data.split(split)] == [int(label) for label, _ in pairs[split]]
        for example, (_, text) in list(zip(data.split(split), pairs[split], strict=True))[::97]:
            assert tokenizer.decode(example.input_ids) == f"{text}\nRating:"
