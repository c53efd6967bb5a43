"""Soft prompt: P trainable vectors placed in front of the input embeddings.

Holds the parameter and nothing else. Its starting values are `adapters.initialisation`, joining it to a
base is `base.attention`, saving it is `adapters.files`, summing its gradient over ranks is `train.comm`.

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 2.

Shapes:  P virtual tokens   H hidden size
"""

from typing import Self

import torch
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """The rows, in float32 whatever the base computes in: a step of 1e-3 on a bfloat16 row of 0.5 is lost."""

    def __init__(self, rows_PH: Tensor) -> None:
        """Copy `rows_PH`, any float dtype, to a float32 parameter on the same device."""
        super().__init__()
        self.rows_PH = nn.Parameter(rows_PH.detach().to(torch.float32, copy=True).contiguous())

    @property
    def length(self) -> int:
        """Virtual tokens, P: the positions that this adapter takes from the context."""
        return self.rows_PH.shape[0]

    @property
    def hidden_size(self) -> int:
        """H of the base that the adapter belongs to."""
        return self.rows_PH.shape[1]

    @property
    def values(self) -> Tensor:
        """What a pass puts in front of a text and a file keeps: the rows."""
        return self.rows_PH

    def folded(self) -> Self:
        """The adapter without its re-parametrisation: itself."""
        return self
