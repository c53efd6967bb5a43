"""Pairs: texts that a caller brings herself, tokenised as the rows of a task are.

For `session`, which has no files and no templates; those are `data.tasks`. Messages name a place in what was given.
"""

from collections.abc import Sequence

from peftscale.data.tasks import Example, TaskData, never_predicted
from peftscale.data.tokens import Ids, TextEncoder
from peftscale.errors import DataError

Pair = tuple[str, str]
"""The text that is read, and the text that is to be written directly behind it."""


def examples(
    pairs: Sequence[Pair], encoder: TextEncoder, *, where: str, max_tokens: int | None, end_ids: Ids = ()
) -> tuple[Example, ...]:
    """The examples of pairs, numbered by place. The target is its example's one choice.

    Args:
        pairs: input and target.
        encoder: of the base's tokenizer.
        where: what messages call `pairs`.
        max_tokens: of input and target together; None: no limit.
        end_ids: what every target is to end with.

    Raises:
        DataError: no pair, something that is no pair of texts, a text without a token, or one that is too long.
    """
    _refuse_empty(pairs, where=where)
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{where}[{i}]: must be a pair of texts (input, target), got {pair!r}.")
    texts, targets = [text for text, _ in pairs], [target for _, target in pairs]
    inputs = encoder.inputs(texts)
    found = []
    for i, (ids, target_ids) in enumerate(zip(inputs, _behind(encoder, texts, inputs, targets), strict=True)):
        _refuse_misfit(encoder, ids, target_ids, where=f"{where}[{i}]", max_tokens=max_tokens)
        ended_ids = target_ids + end_ids
        found.append(Example(i, ids, ended_ids, None, targets[i], (ended_ids,), has_sides=encoder.is_encoder_decoder))
    return tuple(found)


def to_score(examples: tuple[Example, ...]) -> TaskData:
    """The examples of pairs as the test split of a task whose one label is the target, whatever it is."""
    return _task(examples, ("target",), has_shared_choices=False, max_target_tokens=1)


def to_choose(texts: Sequence[str], words: Sequence[str], encoder: TextEncoder, *, max_tokens: int | None) -> TaskData:
    """Texts behind which the likeliest of `words` is to be found, as the test split of a task.

    Raises:
        DataError: as `examples`, or words that are not two at least, or one that begins with the tokens of another.
    """
    _refuse_all_but_texts(texts, where="texts")
    _refuse_all_but_texts(words, where="words")
    inputs = encoder.inputs(texts)
    by_word = [_behind(encoder, texts, inputs, [word] * len(texts)) for word in words]
    choices: list[tuple[Ids, ...]] = list(zip(*by_word, strict=True))
    for i, (ids, of_text) in enumerate(zip(inputs, choices, strict=True)):
        _refuse_misfit(encoder, ids, max(of_text, key=len), where=f"texts[{i}]", max_tokens=max_tokens)
        if not all(of_text) or len(of_text) < 2 or never_predicted(of_text):
            raise DataError(
                f"words: must be at least two, none of which begins with the tokens of another, because it would never "
                f"be the likelier one; got {list(words)}, which are the tokens {list(of_text)} behind texts[{i}]. "
                f"Choose other words."
            )
    asked = tuple(
        Example(i, ids, (), None, "", choices[i], has_sides=encoder.is_encoder_decoder) for i, ids in enumerate(inputs)
    )
    return _task(asked, words, has_shared_choices=len(set(choices)) == 1, max_target_tokens=1)


def to_continue(texts: Sequence[str], encoder: TextEncoder, *, max_tokens: int | None, max_new_tokens: int) -> TaskData:
    """Texts behind which at most `max_new_tokens` are to be written, as the test split of a task.

    Raises:
        DataError: as `examples`; no new token.
    """
    _refuse_all_but_texts(texts, where="texts")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens: must be >= 1, got {max_new_tokens}.")
    inputs = encoder.inputs(texts)
    for i, ids in enumerate(inputs):
        _refuse_misfit(encoder, ids, (0,), where=f"texts[{i}]", max_tokens=max_tokens)  # room for one token
    asked = tuple(Example(i, ids, (), None, "", has_sides=encoder.is_encoder_decoder) for i, ids in enumerate(inputs))
    return _task(asked, (), has_shared_choices=False, max_target_tokens=max_new_tokens)


def _task(
    asked: tuple[Example, ...],
    words: Sequence[str],
    *,
    has_shared_choices: bool,
    max_target_tokens: int,
) -> TaskData:
    return TaskData(
        name="texts",
        train=(),
        validation=(),
        test=asked,
        labels=tuple(words),
        words=tuple(words),
        num_cut=0,
        num_seams=0,
        has_shared_choices=has_shared_choices,
        max_target_tokens=max_target_tokens,
    )


def _behind(encoder: TextEncoder, texts: Sequence[str], inputs: Sequence[Ids], targets: Sequence[str]) -> list[Ids]:
    return [ids for ids, _ in encoder.continuations(texts, inputs, targets)]


def _refuse_empty(given: Sequence[object], *, where: str) -> None:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:  # an iterator would be used up here
        raise DataError(f"{where}: must be a list of at least one, got {given!r}.")


def _refuse_all_but_texts(given: Sequence[object], *, where: str) -> None:
    _refuse_empty(given, where=where)
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise DataError(f"{where}[{i}]: must be a text, got {text!r}.")


def _refuse_misfit(encoder: TextEncoder, ids: Ids, target_ids: Ids, *, where: str, max_tokens: int | None) -> None:
    has_input = len(ids) > len(encoder.end_ids)
    if not has_input or not target_ids:
        raise DataError(f"{where}: its {'target' if has_input else 'input'} is no token; at least one is needed.")
    num_tokens = len(ids) + len(target_ids)
    if max_tokens is not None and num_tokens > max_tokens:
        raise DataError(
            f"{where}: has {num_tokens} tokens ({len(ids)} of input, {len(target_ids)} of target); at most "
            f"{max_tokens} fit (the base's positions, with longrope those of short texts, minus the adapter's length). "
            f"Shorten the input."
        )
