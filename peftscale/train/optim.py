"""Optimizer and schedule of the adapters: each has its own, and one update moves all of a kind at once.

Adapters live outside DeepSpeed, whole and float32 on every rank, so any optimizer works and its numbers do not
depend on how many ranks there are. `update_` makes one pass of foreach operations over the tensors of all adapters
with the same kind of optimizer: torch's own foreach AdamW takes one rate a call, which for a cohort would be a Python
loop over adapters. The formulas are those of torch's AdamW and of transformers' Adafactor without factoring.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Shazeer and Stern 2018, arXiv:1804.04235 (Adafactor);
Lester et al. 2021, arXiv:2104.08691, section 3.2 (Adafactor at a constant 0.3, no parameter scaling); T5X for two
details that the paper leaves to it: a prompt shorter than 128 rows is not factored, and weight decay is not
multiplied by the rate.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from peftscale.adapters import Adapter, ReparametrisedPrefix, ResidualPrompt
from peftscale.config import OptimizerConfig

_BETA1, _BETA2 = 0.9, 0.999  # AdamW, torch's defaults
_DECAY_POWER, _EPS_SQUARE, _CLIP_RMS = -0.8, 1e-30, 1.0  # Adafactor, the paper's


def rate_at(cfg: OptimizerConfig, step: int) -> float:
    """Learning rate of a step. A function of the step alone: there is no state to save.

    Args:
        cfg: rate, schedule, warm-up and the number of steps.
        step: 0 for the first.
    """
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / (cfg.steps - cfg.warmup_steps)
    match cfg.schedule:
        case "constant":
            return cfg.learning_rate
        case "linear":
            return cfg.learning_rate * (1 - done)
        case "cosine":
            return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Snapshot:
    """One adapter and its optimizer at one moment."""

    values: list[Tensor]
    moments: list[dict[str, Tensor]]
    num_updates: int


class AdapterOptimizer:
    """The tensors of one adapter with their moments, and what a resume needs as plain tensors."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], cfg: OptimizerConfig, *, network: Iterable[nn.Parameter] = ()
    ) -> None:
        """Take the tensors as they are.

        Args:
            parameters: of the adapter, all of them.
            cfg: the adapter's own (`RunConfig.adapter_train`).
            network: those among them that have `network_learning_rate`.
        """
        self.cfg = cfg
        self.parameters = list(parameters)
        own = {id(parameter) for parameter in network}
        factor = (cfg.network_learning_rate or cfg.learning_rate) / cfg.learning_rate
        self.factors = [factor if id(parameter) in own else 1.0 for parameter in self.parameters]
        """What each tensor's rate is, in units of the adapter's."""
        self.num_updates = 0
        self.moments: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        """For each tensor flat float32 vectors by name; empty before the first update."""

    @classmethod
    def of(cls, adapter: Adapter, cfg: OptimizerConfig) -> Self:
        """The optimizer of an adapter and of its network, if it has one."""
        network = adapter.network_parameters() if isinstance(adapter, ResidualPrompt | ReparametrisedPrefix) else []
        return cls(adapter.parameters(), cfg, network=network)

    def update(self, step: int) -> float:
        """Clip, move the adapter by its gradient and clear it. Returns the rate used."""
        return update_([self], step)[0]

    def clear(self) -> None:
        """Forget the gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def num_bytes(self) -> int:
        """Of the moments, after the first update."""
        return sum(tensor.nbytes for moments in self.moments for tensor in moments.values())

    def state(self) -> dict[str, Tensor]:
        """The moments, as tensors named '<parameter>.<moment>', and the number of updates as a vector of one."""
        if self.num_updates == 0:
            return {}

        def count() -> Tensor:  # one for each tensor: a file holds no two names of one storage
            return torch.tensor([self.num_updates], dtype=torch.float64)

        return {
            f"{i}.{key}": value
            for i, moments in enumerate(self.moments)
            for key, value in {"step": count(), **moments}.items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over the moments that `state` gave."""
        self.num_updates = 0
        self.moments = [{} for _ in self.parameters]
        for name, value in state.items():
            index, key = name.split(".", 1)
            if key == "step":
                self.num_updates = int(value.item())
            else:
                self.moments[int(index)][key] = value.clone()

    def snapshot(self) -> Snapshot:
        """A copy of the tensors and of their moments as they are."""
        return snapshots([self])[0]

    def go_back(self, to: Snapshot) -> None:
        """Take over what `snapshot` gave: the updates since then have never been. It is used up."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, to.values, strict=True):
                parameter.copy_(value)
        self.moments, self.num_updates = to.moments, to.num_updates

    def take(self, *names: str) -> None:
        """Count an update, and make the moments of these names where there are none yet."""
        self.num_updates += 1
        for parameter, moments in zip(self.parameters, self.moments, strict=True):
            for name in names:
                if name not in moments:
                    moments[name] = torch.zeros(parameter.numel(), device=parameter.device)


def update_(optimizers: Sequence[AdapterOptimizer], step: int) -> list[float]:
    """Clip, move every adapter by its gradient and clear it, each kind of optimizer in one batch.

    Numbers are bitwise those of updating one adapter after the other.

    Args:
        optimizers: of the adapters that move in this step; each tensor has a gradient.
        step: 0 for the first.

    Returns:
        The rate of each.
    """
    with torch.no_grad():
        _clip_([optimizer for optimizer in optimizers if optimizer.cfg.clip_norm is not None])
        rates = [rate_at(optimizer.cfg, step) for optimizer in optimizers]
        for kind, move in (("adamw", _adamw_), ("adafactor", _adafactor_)):
            alike = [(o, rate) for o, rate in zip(optimizers, rates, strict=True) if o.cfg.optimizer == kind]
            if alike:
                move([o for o, _ in alike], [rate for _, rate in alike])
    for optimizer in optimizers:
        optimizer.clear()
    return rates


def snapshots(optimizers: Sequence[AdapterOptimizer]) -> list[Snapshot]:
    """A copy of every adapter and its moments as they are, in one batch."""
    if not optimizers:
        return []
    there = [[p.detach() for p in o.parameters] + [t for m in o.moments for t in m.values()] for o in optimizers]
    copies = [[torch.empty_like(tensor) for tensor in tensors] for tensors in there]
    torch._foreach_copy_([t for tensors in copies for t in tensors], [t for tensors in there for t in tensors])
    found = []
    for optimizer, tensors in zip(optimizers, copies, strict=True):
        each = iter(tensors)
        values = [next(each) for _ in optimizer.parameters]
        found.append(
            Snapshot(values, [{name: next(each) for name in m} for m in optimizer.moments], optimizer.num_updates)
        )
    return found


def are_finite(groups: Sequence[Sequence[Tensor]], *, squared: bool = False) -> list[bool]:
    """Whether every value of every tensor of each group is finite: one batch of norms and one wait for the device.

    Args:
        groups: of float32 tensors.
        squared: whether the sum of the squares of a group is. Asked of gradients, whose squares the moments and the
            clip norm take, and of adapters, whose squares the base's norms take: what is infinite there gives moves or
            gradients of exactly zero, and the adapter would stand still for good without a word.
    """
    tensors = [tensor for group in groups for tensor in group]
    if not tensors:
        return [True] * len(groups)
    if squared:
        return _sums_of_squares(groups).isfinite().tolist()
    # The largest magnitude, which NaN and infinity pass through; a sum of squares could overflow by itself.
    is_good = torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().tolist()
    ends = list(itertools.accumulate(len(group) for group in groups))
    return [all(is_good[end - len(group) : end]) for group, end in zip(groups, ends, strict=True)]


def _sums_of_squares(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sum of the squares of each group, in an order of its own. One group at least has a tensor."""
    squares = torch.stack(torch._foreach_norm([tensor for group in groups for tensor in group])).square()
    lengths = torch.tensor([len(group) for group in groups], device=squares.device)
    return torch.segment_reduce(squares, "sum", lengths=lengths, unsafe=True)  # to check them a GPU would be waited for


def _clip_(optimizers: Sequence[AdapterOptimizer]) -> None:
    """Scale the gradients of each adapter to its largest L2 norm, over all its tensors."""
    if not optimizers:
        return
    groups = [_gradients(optimizer) for optimizer in optimizers]
    norms = _sums_of_squares(groups).sqrt()
    most = torch.tensor([optimizer.cfg.clip_norm for optimizer in optimizers], device=norms.device)
    # Numbers, not tensors: foreach has one kernel for those, and for tensors of other shapes one each.
    scales = (most / (norms + 1e-6)).clamp(max=1.0).tolist()
    torch._foreach_mul_([grad for grads in groups for grad in grads], _each(optimizers, scales))


def _adamw_(optimizers: Sequence[AdapterOptimizer], rates: Sequence[float]) -> None:
    """torch.optim.AdamW with a rate, a decay and a count of updates for each adapter."""
    for optimizer in optimizers:
        optimizer.take("exp_avg", "exp_avg_sq")
    values, grads = _flat(optimizers)
    means, squares = _moments(optimizers, "exp_avg"), _moments(optimizers, "exp_avg_sq")
    pairs = list(zip(optimizers, rates, strict=True))
    decays = [1 - rate * factor * o.cfg.weight_decay for o, rate in pairs for factor in o.factors]
    torch._foreach_mul_(values, decays)
    torch._foreach_lerp_(means, grads, 1 - _BETA1)
    torch._foreach_mul_(squares, _BETA2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - _BETA2)
    under = torch._foreach_sqrt(squares)
    torch._foreach_div_(under, _each(optimizers, [(1 - _BETA2**o.num_updates) ** 0.5 for o in optimizers]))
    torch._foreach_add_(under, _each(optimizers, [o.cfg.epsilon for o in optimizers]))
    sizes = [-rate * factor / (1 - _BETA1**o.num_updates) for o, rate in pairs for factor in o.factors]
    torch._foreach_addcdiv_(values, means, under, sizes)


def _adafactor_(optimizers: Sequence[AdapterOptimizer], rates: Sequence[float]) -> None:
    """Adafactor without factoring, parameter scaling or momentum. Decay is not multiplied by the rate, as in T5X."""
    for optimizer in optimizers:
        optimizer.take("exp_avg_sq")
    values, grads = _flat(optimizers)
    squares = _moments(optimizers, "exp_avg_sq")
    kept = [1 - o.num_updates**_DECAY_POWER for o in optimizers]
    new = torch._foreach_mul(grads, grads)
    torch._foreach_add_(new, _EPS_SQUARE)
    torch._foreach_mul_(new, _each(optimizers, [1 - part for part in kept]))
    torch._foreach_mul_(squares, _each(optimizers, kept))
    torch._foreach_add_(squares, new)
    moves = torch._foreach_rsqrt(squares)
    torch._foreach_mul_(moves, grads)
    sizes = torch.tensor([move.numel() for move in moves], device=moves[0].device)
    rms = torch.stack(torch._foreach_norm(moves)) / sizes.sqrt()
    torch._foreach_div_(moves, (rms / _CLIP_RMS).clamp(min=1.0).tolist())
    each = [rate * factor for o, rate in zip(optimizers, rates, strict=True) for factor in o.factors]
    torch._foreach_mul_(moves, each)
    # A rate of zero, at the very end of a schedule, leaves the adapter as it is.
    decays = [o.cfg.weight_decay if rate > 0 else 0.0 for o, rate in zip(optimizers, rates, strict=True)]
    torch._foreach_mul_(values, _each(optimizers, [1 - decay for decay in decays]))
    torch._foreach_sub_(values, moves)


def _gradients(optimizer: AdapterOptimizer) -> list[Tensor]:
    grads = [parameter.grad for parameter in optimizer.parameters]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


def _flat(optimizers: Sequence[AdapterOptimizer]) -> tuple[list[Tensor], list[Tensor]]:
    """Every tensor and its gradient as vectors over the same storage: an optimizer has no use for axes."""
    values = [parameter.detach().view(-1) for optimizer in optimizers for parameter in optimizer.parameters]
    return values, [grad.reshape(-1) for optimizer in optimizers for grad in _gradients(optimizer)]


def _moments(optimizers: Sequence[AdapterOptimizer], name: str) -> list[Tensor]:
    return [moments[name] for optimizer in optimizers for moments in optimizer.moments]


def _each(optimizers: Sequence[AdapterOptimizer], numbers: Sequence[float]) -> list[float]:
    """A number of each adapter -> the same number for each of its tensors."""
    return [x for optimizer, x in zip(optimizers, numbers, strict=True) for _ in optimizer.parameters]
