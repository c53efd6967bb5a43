"""Adafactor over slices: every rank holds a piece of each tensor, and what needs the whole tensor is summed over ranks.

For full fine-tuning under ZeRO, whose optimizers see flat pieces: one that takes a root mean square would otherwise
depend on the number of ranks. Not factored, because a piece has no axes. The optimizer of adapters is `train.optim`.

Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4 without factoring and with parameter scaling, as in the
model tuning of Raffel et al. 2020 and Lester et al. 2021; the decay of weights is T5X's, not multiplied by the rate.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftscale.train import comm

_DECAY_POWER, _EPS_SQUARE, _LEAST_SCALE, _CLIP_RMS = -0.8, 1e-30, 1e-3, 1.0


class SlicedAdafactor(torch.optim.Optimizer):
    """Each parameter group is one tensor; ZeRO puts this rank's piece in its place, zeros behind its end."""

    def __init__(self, tensors: Iterable[nn.Parameter], *, weight_decay: float) -> None:
        """Take whole tensors; their numbers of elements are kept."""
        groups = [{"params": [tensor], "num_elements": tensor.numel()} for tensor in tensors]
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move this rank's pieces. A collective for each tensor: every rank calls it with the same groups."""
        for group in self.param_groups:
            (piece,) = group["params"]
            state = self.state[piece]
            state.setdefault("step", 0)
            state["step"] += 1
            square = state.setdefault("exp_avg_sq", torch.zeros_like(piece))
            kept = 1 - state["step"] ** _DECAY_POWER
            square.mul_(kept).add_(piece.grad**2 + _EPS_SQUARE, alpha=1 - kept)
            move = piece.grad * square.rsqrt()
            sums = comm.sum_(torch.stack([_sum_of_squares(move), _sum_of_squares(piece)]))
            rms_of_move, rms_of_values = (sums / group["num_elements"]).sqrt().tolist()
            if group["lr"] > 0:
                piece.mul_(1 - group["weight_decay"])
            scale = group["lr"] * max(_LEAST_SCALE, rms_of_values)
            piece.sub_(move, alpha=scale / max(1.0, rms_of_move / _CLIP_RMS))


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()
