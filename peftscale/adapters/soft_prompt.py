"""Soft prompt: P trainable vectors placed in front of the input embeddings.

In an encoder-decoder base that is the encoder's input; Q more vectors may stand in front of the decoder's. Holds the
parameter and nothing else. Its starting values are `adapters.initialisation`, joining it to a base is `base.packed`,
`base.padded` or `base.encoder_decoder`, saving it is `adapters.files`, summing its gradient over ranks is `train.comm`.

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 2.

Shapes:  P virtual tokens, the decoder's included   Q virtual tokens of the decoder   H hidden size
"""

from typing import Self

import torch
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """The rows, in float32 whatever the base computes in: a step of 1e-3 on a bfloat16 row of 0.5 is lost."""

    def __init__(self, rows_PH: Tensor, *, decoder_length: int = 0) -> None:
        """Copy `rows_PH`, any float dtype, to a float32 parameter on the same device.

        Args:
            rows_PH: the input's, and behind them the decoder's.
            decoder_length: how many of them are the decoder's, Q.
        """
        super().__init__()
        self.rows_PH = nn.Parameter(rows_PH.detach().to(torch.float32, copy=True).contiguous())
        self.decoder_length = decoder_length

    @property
    def length(self) -> int:
        """Virtual tokens in front of the input: the positions that this adapter takes from the context."""
        return self.rows_PH.shape[0] - self.decoder_length

    @property
    def num_positions(self) -> int:
        """Virtual tokens of a row, in front of the encoder's and the decoder's input together."""
        return self.rows_PH.shape[0]

    @property
    def hidden_size(self) -> int:
        """H of the base that the adapter belongs to."""
        return self.rows_PH.shape[1]

    @property
    def values(self) -> Tensor:
        """What passes put in front of texts and a file keeps: all rows."""
        return self.rows_PH

    def with_values(self, values: Tensor) -> "SoftPrompt":
        """An adapter of the same make with a copy of these values."""
        return SoftPrompt(values, decoder_length=self.decoder_length)

    def folded(self) -> Self:
        """The adapter without its re-parametrisation: itself."""
        return self
