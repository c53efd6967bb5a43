"""Prefix: P trainable keys and values in front of those of every attention layer.

Holds the parameter and nothing else. Its starting values are `adapters.initialisation`, a prefix that a network
makes is `adapters.reparam`, joining it to a base is `base.attention` or, in an encoder-decoder, `base.slots`, saving it
is `adapters.files`.

Source: Li and Liang 2021, arXiv:2101.00190, section 4.

Shapes:  L layers   P virtual tokens   K key heads   D head size
"""

from typing import Self

import torch
from torch import Tensor, nn

from peftscale.base.prefixed import PrefixShape


class Prefix(nn.Module):
    """Keys (index 0 of the second axis) and values (1), in float32 whatever the base computes in.

    Keys stand behind the base's rotation by position: that of virtual token p is seen at position p as it is.
    """

    def __init__(self, keys_values_L2PKD: Tensor, *, parts: tuple[int, ...] = ()) -> None:
        """Copy `keys_values_L2PKD`, any float dtype, to a float32 parameter on the same device.

        Args:
            keys_values_L2PKD: of every attention layer.
            parts: as in `PrefixShape`.
        """
        super().__init__()
        start = keys_values_L2PKD.detach().to(torch.float32, copy=True).contiguous()
        self.keys_values_L2PKD = nn.Parameter(start)
        self.parts = parts

    @property
    def length(self) -> int:
        """Virtual tokens, P: the positions that this adapter takes from the context."""
        return self.keys_values_L2PKD.shape[2]

    @property
    def num_positions(self) -> int:
        """Virtual tokens of a row; those of an encoder-decoder stand in front of both inputs."""
        return self.length * (2 if self.parts else 1)

    @property
    def shape(self) -> PrefixShape:
        """Of the base that the adapter belongs to."""
        layers, _, _, heads, size = self.keys_values_L2PKD.shape
        return PrefixShape(layers, heads, size, self.parts)

    @property
    def values(self) -> Tensor:
        """What a pass puts in front of a text and a file keeps: all keys and values."""
        return self.keys_values_L2PKD

    def with_values(self, values: Tensor) -> "Prefix":
        """An adapter of the same make with a copy of these values."""
        return Prefix(values, parts=self.parts)

    def folded(self) -> Self:
        """The adapter without its re-parametrisation: itself."""
        return self
