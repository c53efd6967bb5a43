"""Re-parametrised adapters: prefixes and prompts that a small network makes of trained vectors.

Trained directly, a prefix is unstable (Li and Liang, section 4.3), and so is a prompt of a small base. Passes see only
what the network made, as a leaf of its own: it is computed once a step, blocks that are computed again in backward do
not compute it again, and its gradient goes through the network once, at the end. Saved adapters hold what was made;
checkpoints hold the network. Starting values are `adapters.initialisation`.

Source: Li and Liang 2021, arXiv:2101.00190, section 4.3, and the published code (one hidden layer, tanh);
Razdaibiedina et al. 2023, arXiv:2305.03937, section 3 (prompt + network(prompt); ReLU, then a layer norm).

Shapes:  P virtual tokens   E width of a trained vector   M hidden size of the network   O = L * 2 * K * D outputs
         H hidden size of the base   L layers   K key heads   D head size
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from peftscale.adapters.prefix import Prefix
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.base.prefixed import PrefixShape


class FoldedPrefix(Prefix):
    """What the network made, as a leaf, and how its gradient finds the way back."""

    def __init__(self, made_L2PKD: Tensor, *, parts: tuple[int, ...] = ()) -> None:
        """Copy what was made; the graph behind it is kept until the gradient is sent back."""
        super().__init__(made_L2PKD, parts=parts)
        self._made_L2PKD = made_L2PKD

    def send_back(self) -> None:
        """Add the gradient of the leaf to the network's parameters. Nothing happens where no row was behind it."""
        _send_back(self._made_L2PKD, self.keys_values_L2PKD)


class FoldedPrompt(SoftPrompt):
    """As `FoldedPrefix`, of a prompt."""

    def __init__(self, made_PH: Tensor, *, decoder_length: int = 0) -> None:
        """Copy what was made; the graph behind it is kept until the gradient is sent back."""
        super().__init__(made_PH, decoder_length=decoder_length)
        self._made_PH = made_PH

    def send_back(self) -> None:
        """As of `FoldedPrefix`."""
        _send_back(self._made_PH, self.rows_PH)


def _send_back(made: Tensor, leaf: Tensor) -> None:
    if leaf.grad is not None:
        made.backward(leaf.grad)


class _Network(nn.Module):
    """The trained vectors of one part and the network behind them."""

    def __init__(self, inputs_PE: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.inputs_PE, self.inner_ME, self.inner_M, self.outer_OM, self.outer_O = (
            nn.Parameter(tensor.detach().to(torch.float32, copy=True).contiguous())
            for tensor in (inputs_PE, *inner, *outer)
        )

    def forward(self) -> Tensor:
        hidden_PM = torch.tanh(linear(self.inputs_PE, self.inner_ME, self.inner_M))
        return linear(hidden_PM, self.outer_OM, self.outer_O)


Weights = tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Vectors (P, E), weight (M, E) and bias (M,) of the inner layer, weight (O, M) and bias (O,) of the outer one."""


class ReparametrisedPrefix(nn.Module):
    """The trained vectors and the network, all float32; of an encoder-decoder base, a pair for each of its parts."""

    def __init__(self, weights: Sequence[Weights], *, shape: PrefixShape) -> None:
        """Copy all tensors to parameters.

        Args:
            weights: of each part of the shape, or of the one that a decoder-only base has.
            shape: of the base.
        """
        super().__init__()
        self.networks = nn.ModuleList(_Network(*of_part) for of_part in weights)
        self.shape = shape

    @property
    def length(self) -> int:
        """Virtual tokens, P."""
        return next(self.parameters()).shape[0]  # of the first network's vectors

    def network_parameters(self) -> list[nn.Parameter]:
        """Those that have a learning rate of their own: all but the trained vectors."""
        return [p for name, p in self.named_parameters() if not name.endswith("inputs_PE")]

    @property
    def num_positions(self) -> int:
        """Virtual tokens of a row; those of an encoder-decoder stand in front of both inputs."""
        return self.length * (2 if self.shape.parts else 1)

    def forward(self) -> Tensor:
        """The keys and values, (L, 2, P, K, D), with the graph behind them."""
        _, heads, size, _ = self.shape
        made = [network().view(self.length, -1, 2, heads, size) for network in self.networks]
        return torch.cat(made, dim=1).permute(1, 2, 0, 3, 4)

    def with_values(self, values: Tensor) -> Prefix:
        """The prefix with a copy of these keys and values."""
        return Prefix(values, parts=self.shape.parts)

    def folded(self) -> FoldedPrefix:
        """What passes see and files keep. Its gradient comes back by its `send_back`."""
        return FoldedPrefix(self(), parts=self.shape.parts)


class ResidualPrompt(nn.Module):
    """The trained rows and a bottleneck that adds to them, all float32: rows + norm(up(relu(down(rows))))."""

    def __init__(
        self,
        rows_PH: Tensor,
        down: tuple[Tensor, Tensor],
        up: tuple[Tensor, Tensor],
        *,
        gain: float,
        decoder_length: int = 0,
    ) -> None:
        """Copy all tensors to parameters.

        Args:
            rows_PH: where the prompt starts.
            down: weight (M, H) and bias (M,).
            up: weight (H, M) and bias (H,).
            gain: of the layer norm at the start: how large, beside the rows, what is added.
            decoder_length: as of `SoftPrompt`.
        """
        super().__init__()
        norm = torch.full_like(rows_PH[0], gain), torch.zeros_like(rows_PH[0])
        self.rows_PH, self.down_MH, self.down_M, self.up_HM, self.up_H, self.gain_H, self.shift_H = (
            nn.Parameter(tensor.detach().to(torch.float32, copy=True).contiguous())
            for tensor in (rows_PH, *down, *up, *norm)
        )
        self.decoder_length = decoder_length

    @property
    def length(self) -> int:
        """As of `SoftPrompt`."""
        return self.rows_PH.shape[0] - self.decoder_length

    @property
    def num_positions(self) -> int:
        """As of `SoftPrompt`."""
        return self.rows_PH.shape[0]

    @property
    def hidden_size(self) -> int:
        """H of the base that the adapter belongs to."""
        return self.rows_PH.shape[1]

    def network_parameters(self) -> list[nn.Parameter]:
        """Those that have a learning rate of their own: all but the rows."""
        return [p for name, p in self.named_parameters() if name != "rows_PH"]

    def forward(self) -> Tensor:
        """The prompt, (P, H), with the graph behind it."""
        hidden_PM = linear(self.rows_PH, self.down_MH, self.down_M).relu()
        added_PH = linear(hidden_PM, self.up_HM, self.up_H)
        return self.rows_PH + layer_norm(added_PH, (self.hidden_size,), self.gain_H, self.shift_H)

    def with_values(self, values: Tensor) -> SoftPrompt:
        """The prompt with a copy of these rows."""
        return SoftPrompt(values, decoder_length=self.decoder_length)

    def folded(self) -> FoldedPrompt:
        """What passes see and files keep. Its gradient comes back by its `send_back`."""
        return FoldedPrompt(self(), decoder_length=self.decoder_length)
