"""Where the values of an adapter start: at random, or from rows of the input embedding.

Which token ids are embedded depends on the seed and the text alone, so every rank finds the same ids
without talking. The rows behind them may be sharded: `EmbeddingSource.embedding_rows` is a collective, and
is called once for each adapter with all its ids. Nothing here keeps or trains the rows. A prefix that starts at the
keys and values of a text has them from `base.prefixed`.

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 3.2; for prefixes Li and Liang 2021,
arXiv:2101.00190, their code, and PEFT's, which draw from the same distributions.

Shapes:  P virtual tokens   H hidden size   N token ids   L layers   K key heads   D head size
         E width of a vector, M hidden size and O outputs of a prefix's network
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftscale.base.prefixed import PrefixShape
from peftscale.errors import AdapterError

TokenGroups = list[list[int]]
"""P lists of token ids. Row p starts as the mean of the embeddings of the ids in list p."""


class EmbeddingSource(Protocol):
    """What is needed of a base: its tokenizer, its dimensions and device, rows of its input embedding."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Special tokens are the ids of its `all_special_ids`."""

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding, which may be more than the tokenizer has tokens."""

    @property
    def hidden_size(self) -> int:
        """H."""

    @property
    def device(self) -> torch.device:
        """Where adapters are trained."""

    def embedding_rows(self, ids_N: Tensor, /) -> Tensor:
        """(N, H) float32 copy. A collective when the base is sharded: every rank gives the same ids."""


def random_rows(length: int, hidden_size: int, *, seed: int) -> Tensor:
    """(P, H) float32 rows from U(-0.5, 0.5), on the CPU. The global random state is left alone."""
    draw = torch.Generator().manual_seed(seed)
    # The paper's interval. Its published code draws from [0, 0.5).
    return torch.rand(length, hidden_size, generator=draw) - 0.5


def scaled_rows(length: int, source: EmbeddingSource, *, top: int, seed: int) -> Tensor:
    """(P, H) float32 rows, normal with the mean and the deviation of the frequent embeddings in each dimension.

    Args:
        length: rows to draw, P.
        source: its ids 0 .. top-1 are embedded, special ones left out.
        top: as of `vocabulary_groups`.
        seed: of this draw only; the global random state is left alone.
    """
    known_NH = source.embedding_rows(torch.tensor(_ordinary(source, top)))
    draw = torch.Generator().manual_seed(seed)
    normal_PH = torch.randn(length, source.hidden_size, generator=draw).to(known_NH.device)
    return known_NH.mean(dim=0) + normal_PH * known_NH.std(dim=0)


def bottleneck(hidden_size: int, *, hidden: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weight and bias of the two layers of a residual prompt's network, by `seed` alone, drawn as `network` draws."""
    draw = torch.Generator().manual_seed(seed)
    return _layer(hidden, hidden_size, draw), _layer(hidden_size, hidden, draw)


def _layer(rows: int, cols: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight and bias from U(-n^-0.5, n^-0.5) for n inputs: torch's own for linears."""
    bound = cols**-0.5
    weight, bias = torch.rand(rows, cols, generator=draw), torch.rand(rows, generator=draw)
    return weight.mul_(2 * bound).sub_(bound), bias.mul_(2 * bound).sub_(bound)


def fitted(values: Tensor, length: int, *, dim: int) -> Tensor:
    """A copy with `length` virtual tokens along `dim`: the first ones, or all of them repeated from the first on."""
    return values.detach().index_select(dim, torch.arange(length) % values.shape[dim])


def random_keys_values(length: int, shape: PrefixShape, *, seed: int) -> Tensor:
    """(L, 2, P, K, D) float32 from N(0, 1), on the CPU. The global random state is left alone."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape.num_layers, 2, length, shape.num_kv_heads, shape.head_dim, generator=draw)


def network(
    length: int, width: int, *, hidden: int, outputs: int, draw: torch.Generator, is_zero: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Vectors and network of a re-parametrised prefix, by `draw` alone, float32 on the CPU.

    Vectors are drawn from N(0, 1), weights and biases of a layer with n inputs from U(-n^-0.5, n^-0.5): torch's own for
    embeddings and linears.

    Args:
        length: virtual tokens, P.
        width: of a vector, E.
        hidden: size of the hidden layer, M.
        outputs: numbers that the network makes for a virtual token, O.
        draw: where the numbers come from, and those of the next network after them.
        is_zero: make the outer layer zero, so that the prefix starts at zeros; the vectors and the inner layer are
            drawn as ever.

    Returns:
        Vectors (P, E); weight (M, E) and bias (M,) of the inner layer; weight (O, M) and bias (O,) of the outer one.
    """
    inputs_PE = torch.randn(length, width, generator=draw)
    inner, outer = _layer(hidden, width, draw), _layer(outputs, hidden, draw)
    if is_zero:
        outer[0].zero_()
        outer[1].zero_()
    return inputs_PE, inner, outer


def vocabulary_groups(length: int, source: EmbeddingSource, *, top: int, seed: int, where: str) -> TokenGroups:
    """Draw `length` frequent tokens without replacement, by `seed` alone.

    Args:
        length: tokens to draw. 0 draws none.
        source: its tokenizer says which ids are special; those are never drawn.
        top: draw among ids 0 .. top-1, cut to the vocabulary: most vocabularies are sorted by frequency. The paper
            uses 5000.
        seed: of this draw only; the global random state is left alone.
        where: the adapter's key in the run file, for the message.

    Raises:
        AdapterError: fewer tokens than `length` can be drawn.
    """
    candidates = _ordinary(source, top)
    if length > len(candidates):
        raise AdapterError(
            f"{where}.length: {length} rows cannot be drawn without repeats from the {len(candidates)} ordinary tokens "
            f"among the ids 0 .. {_end(source, top) - 1} ({where}.init_top={top}, vocabulary of {source.vocab_size}). "
            f"Lower {where}.length or raise {where}.init_top."
        )
    draw = torch.Generator().manual_seed(seed)
    return [[candidates[index]] for index in torch.randperm(len(candidates), generator=draw)[:length].tolist()]


def _end(source: EmbeddingSource, top: int) -> int:
    """Rows behind the tokenizer's last token are padding that was never trained."""
    return min(top, source.vocab_size, len(source.tokenizer))


def _ordinary(source: EmbeddingSource, top: int) -> list[int]:
    special = set(source.tokenizer.all_special_ids)
    return [token for token in range(_end(source, top)) if token not in special]


def text_groups(length: int, source: EmbeddingSource, *, text: str, where: str) -> TokenGroups:
    """The tokens of `text` without special ones, repeated or cut to `length`.

    Raises:
        AdapterError: the text has no token, or one that the base has no embedding for.
    """
    ids = _token_ids(text, source, f"{where}.init_text")
    return [[ids[position % len(ids)]] for position in range(length)]


def label_groups(
    length: int, source: EmbeddingSource, *, labels: Sequence[str], top: int, seed: int, where: str
) -> TokenGroups:
    """One virtual token for each label, in order, the rest drawn as `vocabulary_groups` draws them.

    A label of several tokens starts as the mean of their rows. Labels are tokenised as they are written: for
    most tokenizers " good" and "good" are different tokens.

    Raises:
        AdapterError: more labels than virtual tokens, a label without a token, or too few tokens for the rest.
    """
    if len(labels) > length:
        raise AdapterError(
            f"{where}.init_labels: {len(labels)} labels need one virtual token each, got {where}.length={length}. "
            f"Raise {where}.length to at least {len(labels)} or give fewer labels."
        )
    words = [_token_ids(label, source, f"{where}.init_labels") for label in labels]
    return words + vocabulary_groups(length - len(labels), source, top=top, seed=seed, where=where)


def embedded(groups: TokenGroups, source: EmbeddingSource) -> Tensor:
    """(P, H) float32 rows, the mean embedding of each group. One collective for all of them."""
    ids_N = torch.tensor([token for group in groups for token in group], dtype=torch.long)
    parts = torch.split(source.embedding_rows(ids_N), [len(group) for group in groups])
    return torch.stack([part_NH.mean(dim=0) for part_NH in parts])


def _token_ids(text: str, source: EmbeddingSource, key: str) -> list[int]:
    """Ids of `text` without special tokens; `key` is what the user typed it under."""
    ids: list[int] = source.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise AdapterError(f"{key}: {text!r} has no token in the base's tokenizer. Give at least one word.")
    if max(ids) >= source.vocab_size:
        raise AdapterError(
            f"{key}: {text!r} has the token id {max(ids)}, but the base embeds only the ids "
            f"0 .. {source.vocab_size - 1}. The tokenizer belongs to another model: check base.model."
        )
    return ids
