"""Neighbours: the tokens of a vocabulary that lie next to the rows of a prompt, and what they have in common.

Numbers of matrices and lists of words; where these come from is `analysis.reading`.

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 7 (interpretability): nearest tokens by cosine,
clusters of forms of one word, words that come back, beside random vectors, which show none of it.

Shapes:  P virtual tokens   H hidden size   V vocabulary   K neighbours
"""

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK = 16384
_NUM_LETTERS, _SHARE = 4, 0.6


def nearest(rows_PH: Tensor, table_VH: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The tokens with the largest cosine to each row.

    Args:
        rows_PH: float32.
        table_VH: input embeddings, any float dtype; of equal cosines the smaller id comes first.
        k: how many, at most V.

    Returns:
        Ids (P, K) and cosines (P, K) float32, the nearest first. The cosine of a row of zeros is 0 with everything.
    """
    unit_PH = normalize(rows_PH, dim=1)
    cosines_PV = torch.cat([unit_PH @ normalize(part.float(), dim=1).T for part in table_VH.split(_CHUNK)], dim=1)
    cosines_PK, ids_PK = cosines_PV.sort(dim=1, descending=True, stable=True)
    return ids_PK[:, :k].clone(), cosines_PK[:, :k].clone()


def tightness(ids_PK: Tensor, table_VH: Tensor) -> Tensor:
    """(P,): the mean cosine between the neighbours of a row, pair by pair: 1 where they are one direction. K > 1."""
    unit_PKH = normalize(table_VH[ids_PK].float(), dim=2)
    k = ids_PK.shape[1]
    cosines_PKK = unit_PKH @ unit_PKH.transpose(1, 2)
    return (cosines_PKK.sum(dim=(1, 2)) - cosines_PKK.diagonal(dim1=1, dim2=2).sum(dim=1)) / (k * (k - 1))


def word(text: str) -> str:
    """A token's text without case and without blanks around it."""
    return text.strip().casefold()


def are_forms_of_one_word(one: str, other: str) -> bool:
    """Technology, technologies, technological: equal but for case and blanks, or alike in their beginning.

    Alike: the same first letters, at least 4 of them and at least 0.6 of the longer text.
    """
    one, other = word(one), word(other)
    num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    is_alike = num_same >= max(_NUM_LETTERS, _SHARE * max(len(one), len(other))) and one[:num_same].isalpha()
    return bool(one) and (one == other or is_alike)


def family(texts: Sequence[str]) -> list[str]:
    """The largest group of forms of one word among the neighbours of a row: of one text where there is none."""
    groups = [[text for text in texts if are_forms_of_one_word(first, text)] for first in texts]
    return max(groups, key=len, default=[]) or list(texts[:1])


def recurring(texts_PK: Sequence[Sequence[str]]) -> dict[str, int]:
    """Words that are neighbours of two rows at least, and of how many; the most frequent first, then by letter."""
    counts = Counter(found for texts in texts_PK for found in {word(text) for text in texts} - {""})
    return {found: num for found, num in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if num > 1}


def rows_near(wanted: Sequence[str], texts_PK: Sequence[Sequence[str]]) -> list[int]:
    """The rows that have one of these words among their neighbours, apart from case and blanks."""
    words = {word(text) for text in wanted} - {""}
    return [row for row, texts in enumerate(texts_PK) if words & {word(text) for text in texts}]


def random_rows_like(rows_PH: Tensor, *, seed: int) -> Tensor:
    """(P, H) float32: random directions by `seed` alone, each as long as the row in its place."""
    draw = torch.Generator().manual_seed(seed)
    random_PH = torch.randn(rows_PH.shape, generator=draw)
    scale_P1: Tensor = rows_PH.norm(dim=1, keepdim=True) / random_PH.norm(dim=1, keepdim=True)
    return random_PH * scale_P1
