"""Text to token ids, as a text that is read and the text that continues it.

Holds no text and no template; which texts there are is `tasks`. Training, scoring and generation all come
through here, so that a label word is the same tokens in each of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftscale.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class TextEncoder:
    """A tokenizer with what it sets in front of a text kept, and what it sets behind left out.

    For an encoder-decoder base a text ends where it ends, and what is set behind it (EOS, in T5) is kept.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, is_encoder_decoder: bool = False) -> None:
        self._tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.start_ids, end_ids = self._find_special()
        """What this tokenizer opens every text with: () or, as a rule, the BOS id."""
        self.end_ids: Ids = end_ids if is_encoder_decoder else ()
        """What closes every input."""

    def inputs(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts that are to be continued: the opening ids are there, an EOS at the end is not. For an
        encoder-decoder base, ids of texts to be answered, with both."""
        return [self.start_ids + ids + self.end_ids for ids in self._plain(texts)]

    def continuations(
        self, texts: Sequence[str], inputs: Sequence[Ids], targets: Sequence[str]
    ) -> list[tuple[Ids, bool]]:
        """Ids of each target behind its text.

        Text and target are encoded as one string. Where that begins with the text's own ids, the rest is the
        target, which is the tokenisation that the base saw in pre-training. Where a token reaches across
        the seam (an input that ends in a blank, as a rule), the target is encoded alone. For an encoder-decoder base
        there is no seam: every target is encoded alone and opens as a text does.

        Args:
            texts: N texts.
            inputs: `self.inputs(texts)`.
            targets: N texts, each directly behind its text: a blank between the two has to be part of one.

        Returns:
            N pairs: ids, and False where the target had to be encoded alone. No opening ids behind a text, and no EOS.
        """
        if self.is_encoder_decoder:
            return [(self.start_ids + ids, True) for ids in self._plain(targets)]
        num_start = len(self.start_ids)
        found: list[tuple[Ids, bool]] = []
        alone: dict[str, Ids] = {}
        joined = self._plain([text + target for text, target in zip(texts, targets, strict=True)])
        for ids, whole, target in zip(inputs, joined, targets, strict=True):
            num_read = len(ids) - num_start
            if whole[:num_read] == ids[num_start:]:
                found.append((whole[num_read:], True))
                continue
            if target not in alone:
                alone[target] = self._plain([target])[0]
            found.append((alone[target], False))
        return found

    def _plain(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no line about model_max_length: what fits is checked by `tasks`, with the base's figure
        )
        return [tuple(ids) for ids in encoded["input_ids"]]

    def _find_special(self) -> tuple[Ids, Ids]:
        """The ids in front of and behind a text that has none of its own."""
        probe = "a"
        plain, dressed = self._plain([probe])[0], tuple(self._tokenizer(probe)["input_ids"])
        for start in range(len(dressed) - len(plain) + 1):
            if dressed[start : start + len(plain)] == plain:
                return dressed[:start], dressed[start + len(plain) :]
        raise ModelError(
            f"base.model: the tokenizer ({type(self._tokenizer).__name__}) encodes {probe!r} as {list(plain)} without "
            f"and as {list(dressed)} with its special tokens; the first was expected inside the second."
        )
