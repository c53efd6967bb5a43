"""Re-parametrised prefix: keys and values that a small network makes of P trained vectors.

Trained directly, a prefix is unstable (the paper's section 4.3). Passes see only what the network made, as a leaf of
its own: it is computed once a step, blocks that are computed again in backward do not compute it again, and its
gradient goes through the network once, at the end. Saved adapters hold what was made; checkpoints hold the network.
Starting values are `adapters.initialisation`.

Source: Li and Liang 2021, arXiv:2101.00190, section 4.3, and the published code (one hidden layer, tanh).

Shapes:  P virtual tokens   E width of a trained vector   M hidden size of the network   O = L * 2 * K * D outputs
         L layers   K key heads   D head size
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftscale.adapters.prefix import Prefix
from peftscale.base.prefixed import PrefixShape


class FoldedPrefix(Prefix):
    """What the network made, as a leaf, and how its gradient finds the way back."""

    def __init__(self, made_L2PKD: Tensor) -> None:
        """Copy what was made; the graph behind it is kept until the gradient is sent back."""
        super().__init__(made_L2PKD)
        self._made_L2PKD = made_L2PKD

    def send_back(self) -> None:
        """Add the gradient of the leaf to the network's parameters. Nothing happens where no row was behind it."""
        gradient = self.keys_values_L2PKD.grad
        if gradient is not None:
            self._made_L2PKD.backward(gradient)


class ReparametrisedPrefix(nn.Module):
    """The trained vectors and the network, all float32."""

    def __init__(
        self, inputs_PE: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], *, shape: PrefixShape
    ) -> None:
        """Copy all tensors to parameters.

        Args:
            inputs_PE: the trained vectors.
            inner: weight (M, E) and bias (M,).
            outer: weight (O, M) and bias (O,).
            shape: of the base.
        """
        super().__init__()
        self.inputs_PE, self.inner_ME, self.inner_M, self.outer_OM, self.outer_O = (
            nn.Parameter(tensor.detach().to(torch.float32, copy=True).contiguous())
            for tensor in (inputs_PE, *inner, *outer)
        )
        self.shape = shape

    @property
    def length(self) -> int:
        """Virtual tokens, P."""
        return self.inputs_PE.shape[0]

    def forward(self) -> Tensor:
        """The keys and values, (L, 2, P, K, D), with the graph behind them."""
        hidden_PM = torch.tanh(linear(self.inputs_PE, self.inner_ME, self.inner_M))
        made_PO = linear(hidden_PM, self.outer_OM, self.outer_O)
        layers, heads, size = self.shape
        made: Tensor = made_PO.view(self.length, layers, 2, heads, size).permute(1, 2, 0, 3, 4)
        return made

    def folded(self) -> FoldedPrefix:
        """What passes see and files keep. Its gradient comes back by its `send_back`."""
        return FoldedPrefix(self())
