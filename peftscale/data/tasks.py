"""A task as tokenised examples: texts as token ids, cut to what fits and measured.

Text in, text out. Reading files is `rows`, making texts of them is `texts`, token ids are `tokens`; the order
in which examples are trained on is `batches`. Only target tokens count in the loss.

Source: the text-to-text form of Raffel et al. 2020, arXiv:1910.10683, section 2.4. Classification compares the
likelihoods of the labels' words: the probability that the base writes a label, so that longer ones are not favoured by
dividing by their tokens.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftscale.config import TaskConfig
from peftscale.data.rows import SPLITS
from peftscale.data.texts import Form, Text, render
from peftscale.data.tokens import Ids, TextEncoder
from peftscale.errors import DataError
from peftscale.task_config import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_PROBES = 256


@dataclass(frozen=True, slots=True)
class Example:
    """One text and its target. Ids carry no padding and no virtual token."""

    index: int
    """Among the examples of its split, counted from 0."""
    input_ids: Ids
    """At least one; with what the tokenizer sets in front of a text, without EOS (with it for an encoder-decoder)."""
    target_ids: Ids
    """At least one. Ends with EOS where the target is generated, so that generation learns to end, and always for an
    encoder-decoder base, as T5 was trained."""
    label: int | None
    """Position in TaskData.labels; None where the target is generated."""
    target_text: str
    """The words of the label, or the rendered target."""
    choices_ids: tuple[Ids, ...] = ()
    """Classification: the words of each label behind this input, in the order of TaskData.labels."""
    references: tuple[str, ...] = ()
    """Generation: all right texts."""
    group: str | None = None
    """Classification: what the answers to one question have in common, and no others."""
    target_holds: bool = True
    """Generation: whether the target is right; a right prediction is another text where it is not."""
    has_sides: bool = False
    """An encoder reads the input and a decoder the target: each side is padded by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """The splits that were asked for. The others, and a test split that the task does not have, are empty."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    """Keys of task.labels, in the order of the run file; empty where targets are generated."""
    words: tuple[str, ...]
    """What each label is called in text."""
    num_cut: int
    """Examples of all splits that lost tokens to task.max_text_tokens."""
    num_seams: int
    """Examples whose target was encoded alone, because a token reached across from the input.
    As a rule `input` ends in a blank that belongs in front of the target."""
    has_shared_choices: bool
    """Every example has the same choices_ids: they do not depend on the input."""
    max_target_tokens: int

    def split(self, name: Split) -> tuple[Example, ...]:
        """The examples of one split.

        Raises:
            DataError: the split is empty, because the task has none or because it was not loaded.
        """
        examples: tuple[Example, ...] = getattr(self, name)
        if not examples:
            raise DataError(f"task {self.name}: no {name} split; give task.files.{name} or task.hub.{name}.")
        return examples

    def num_new_tokens(self, example: Example, *, room: int | None) -> int:
        """How many tokens may be generated behind this input, EOS included.

        Args:
            room: tokens of input and target together, at most; None: no limit.
        """
        return self.max_target_tokens if room is None else min(self.max_target_tokens, room - len(example.input_ids))


def load(
    task: TaskConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int | None,
    splits: Collection[Split] = SPLITS,
    is_encoder_decoder: bool = False,
) -> TaskData:
    """Read, render, check and tokenise the splits of a task. The same on every rank.

    Args:
        task: which files, which templates. Paths are absolute or relative to the working directory.
        tokenizer: of the base.
        max_tokens: what has to fit: the base's positions minus the longest prompt. None: no limit.
        splits: what to load. A test split that the task does not have is left empty.
        is_encoder_decoder: of the base: inputs and all targets end as its tokenizer ends a text, as T5's.

    Raises:
        DataError: a file, a row, a label or a length that cannot be used; the message names it.
        ConfigError: a template that is not Jinja.
    """
    texts: list[Text] = []
    for split in SPLITS:
        if split in splits:
            texts.extend(render(task, split, is_encoder_decoder=is_encoder_decoder))
    return _tokenised(task, tokenizer, texts, max_tokens=max_tokens, is_encoder_decoder=is_encoder_decoder)


def from_rows(
    task: TaskConfig,
    tokenizer: "PreTrainedTokenizerBase",
    columns: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int | None,
    is_encoder_decoder: bool = False,
) -> TaskData:
    """Rows without an answer, to be classified or continued: the test split of the result.

    Args:
        columns: what task.input reads, one mapping a row; the names of task.each are columns here.

    Raises:
        DataError, ConfigError: as `load`.
    """
    form, where = Form(task, is_encoder_decoder=is_encoder_decoder), "the given rows"
    words = next(iter(task.labels.values())) if task.labels else " x"  # a target has to be there; nobody looks at it
    inputs = [form.input(row, where=where, index=i) for i, row in enumerate(columns)]
    texts = [Text("test", where, i, text, words, None) for i, text in enumerate(inputs)]
    return _tokenised(task, tokenizer, texts, max_tokens=max_tokens, is_encoder_decoder=is_encoder_decoder)


def _tokenised(
    task: TaskConfig,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[Text],
    *,
    max_tokens: int | None,
    is_encoder_decoder: bool,
) -> TaskData:
    encoder = TextEncoder(tokenizer, is_encoder_decoder=is_encoder_decoder)
    inputs = encoder.inputs([text.input for text in texts])
    found = encoder.continuations([text.input for text in texts], inputs, [text.target for text in texts])
    targets = [ids for ids, _ in found]
    _refuse_empty(texts, [ids[: len(ids) - len(encoder.end_ids)] for ids in inputs], targets)
    if task.labels is None:
        choices: list[tuple[Ids, ...]] = [()] * len(texts)
    else:
        choices = _choices(encoder, texts, inputs, targets, tuple(task.labels.values()))
        _refuse_never_predicted(task.labels, texts, choices)
    if task.labels is None or is_encoder_decoder:
        targets = [(*ids, _eos(tokenizer)) for ids in targets]
    num_start, num_end = len(encoder.start_ids), len(encoder.end_ids)
    if task.cut == "end" and not is_encoder_decoder:
        num_end = len(encoder.inputs([task.cue])[0]) - num_start
    cut = [_cut(ids, task, num_start=num_start, num_end=num_end) for ids in inputs]
    _refuse_long(task, texts, cut, targets, choices, max_tokens=max_tokens)
    examples: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for text, ids, target_ids, choices_ids in zip(texts, cut, targets, choices, strict=True):
        of_text = (text.references, text.group, text.target_holds, is_encoder_decoder)
        examples[text.split].append(
            Example(text.index, ids, target_ids, text.label, text.target, choices_ids, *of_text)
        )
    return TaskData(
        name=task.name,
        train=tuple(examples["train"]),
        validation=tuple(examples["validation"]),
        test=tuple(examples["test"]),
        labels=tuple(task.labels or ()),
        words=tuple((task.labels or {}).values()),
        num_cut=sum(len(short) < len(long) for short, long in zip(cut, inputs, strict=True)),
        num_seams=sum(not is_joined for _, is_joined in found),
        has_shared_choices=task.labels is not None and len(set(choices)) == 1,
        max_target_tokens=task.max_target_tokens,
    )


def _choices(
    encoder: TextEncoder, texts: Sequence[Text], inputs: Sequence[Ids], targets: Sequence[Ids], words: tuple[str, ...]
) -> list[tuple[Ids, ...]]:
    """The ids of every label's words behind every input.

    As a rule they are the same behind all inputs, and encoding N * K strings to find that is the larger part of
    the loading time. So the K words are encoded behind 256 inputs spread over the data; where those agree
    with each other, and with the own target of every example, all examples share one tuple. A row where only the words
    of another label would differ then has them as they are behind every other row.
    """
    if not texts:  # a split that the task does not have: `TaskData.split` says so
        return []
    probes = range(0, len(texts), max(1, len(texts) // _NUM_PROBES))

    def behind(places: Sequence[int]) -> list[tuple[Ids, ...]]:
        chosen, read = [texts[i].input for i in places], [inputs[i] for i in places]
        by_word = [[ids for ids, _ in encoder.continuations(chosen, read, [word] * len(chosen))] for word in words]
        return list(zip(*by_word, strict=True))

    shared, *others = behind(probes)
    own_agrees = all(
        text.label is not None and ids == shared[text.label] for text, ids in zip(texts, targets, strict=True)
    )
    if own_agrees and all(other == shared for other in others):
        return [shared] * len(texts)
    return behind(range(len(texts)))


def _cut(ids: Ids, task: TaskConfig, *, num_start: int, num_end: int) -> Ids:
    """task.max_text_tokens of the ids, those that open and close every text among them."""
    most = task.max_text_tokens
    if most is None or len(ids) <= most:
        return ids
    num_kept = num_start + (num_end if task.cut == "end" else 0)
    if most <= num_kept:
        raise DataError(
            f"task.max_text_tokens={most} leaves no room for text: with this base's tokenizer every text has "
            f"{num_kept} token(s) that stay. Raise it above {num_kept}."
        )
    if task.cut == "end":
        return ids[: most - num_end] + ids[len(ids) - num_end :]
    return ids[:num_start] + ids[len(ids) - (most - num_start) :]


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "task.labels: left out, or the base is an encoder-decoder, so targets end with an end-of-sequence token, "
            "but this base's tokenizer has none. Take a base whose tokenizer has an eos_token, or give a decoder-only "
            "base labels."
        )
    return eos


def _refuse_empty(texts: Sequence[Text], inputs: Sequence[Ids], targets: Sequence[Ids]) -> None:
    for text, ids, target_ids in zip(texts, inputs, targets, strict=True):
        if not ids or not target_ids:
            key = "task.input" if not ids else "task.target"
            got = text.input if not ids else text.target
            raise DataError(
                f"{key}: row {text.index} (counted from 0) of {text.where} renders {got!r}, which is no token; "
                f"at least one is needed. Drop the row, or write a template that always says something."
            )


def refuse_long_labels(task: TaskData) -> None:
    """A loss among labels is that of one token.

    Raises:
        DataError: the words of a label are several tokens, or have other ids behind other inputs.
    """
    examples = (*task.train, *task.validation, *task.test)
    lengths = {word: len(ids) for word, ids in zip(task.words, examples[0].choices_ids, strict=True)}
    if task.has_shared_choices and set(lengths.values()) == {1}:
        return
    found = ", ".join(f"{word!r} {num}" for word, num in lengths.items())
    raise DataError(
        f"task {task.name}: train.loss='labels' needs labels whose words are one token each, the same behind every "
        f"input; got tokens: {found}. Choose other words in task.labels, or loss 'vocabulary'."
    )


def never_predicted(choices_ids: Sequence[Ids]) -> tuple[int, int] | None:
    """Places of a label and of another whose tokens it begins with, so that it is never the likelier one; None: no such
    two."""
    pairs = itertools.permutations(range(len(choices_ids)), 2)
    return next(((i, j) for i, j in pairs if choices_ids[i][: len(choices_ids[j])] == choices_ids[j]), None)


def _refuse_never_predicted(
    labels: Mapping[str, str], texts: Sequence[Text], choices: Sequence[tuple[Ids, ...]]
) -> None:
    words, seen = list(labels.values()), set[tuple[Ids, ...]]()
    for text, choices_ids in zip(texts, choices, strict=True):
        found = None if choices_ids in seen else never_predicted(choices_ids)
        seen.add(choices_ids)
        if found is not None:
            label, other = found
            raise DataError(
                f"task.labels: {words[label]!r}, for this base's tokenizer {list(choices_ids[label])}, begins with the "
                f"tokens of {words[other]!r}, {list(choices_ids[other])}, behind row {text.index} of {text.where}, so "
                f"it could never be the likelier of the two. Choose other words."
            )


def _refuse_long(
    task: TaskConfig,
    texts: Sequence[Text],
    inputs: Sequence[Ids],
    targets: Sequence[Ids],
    choices: Sequence[tuple[Ids, ...]],
    *,
    max_tokens: int | None,
) -> None:
    """The longest example that does not fit, with what would help."""
    if max_tokens is None or not texts:
        return
    behind = [max(map(len, (target, *words))) for target, words in zip(targets, choices, strict=True)]
    worst = max(range(len(texts)), key=behind.__getitem__)
    limit = (
        f"at most {max_tokens} fit (the base's positions, with longrope those of short texts, minus the longest prompt)"
    )
    if behind[worst] >= max_tokens:
        raise DataError(
            f"task.target: row {texts[worst].index} (counted from 0) of {texts[worst].where} has a target of "
            f"{behind[worst]} tokens, which leaves no room for the input; {limit}. "
            f"Shorten the target or lower adapters.*.length."
        )
    totals = [len(ids) + num for ids, num in zip(inputs, behind, strict=True)]
    long = [i for i, total in enumerate(totals) if total > max_tokens]
    if not long:
        return
    most = max(long, key=totals.__getitem__)
    room = max_tokens - max(behind)
    key = "task.input" if task.max_text_tokens is None else f"task.max_text_tokens={task.max_text_tokens}"
    raise DataError(
        f"{key}: {len(long)} of {len(texts)} examples are too long; the longest, row {texts[most].index} (counted "
        f"from 0) of {texts[most].where}, has {totals[most]} tokens ({len(inputs[most])} of input, {behind[most]} of "
        f"target); {limit}. Set task.max_text_tokens to at most {room}, which cuts inputs at their {task.cut}, "
        f"or lower adapters.*.length."
    )
