"""Optimizer and schedule of one adapter.

Adapters live outside DeepSpeed, whole and float32 on every rank, so any optimizer works and its numbers do not
depend on how many ranks there are. AdamW is torch's, Adafactor is transformers'.

Source: Lester et al. 2021, arXiv:2104.08691, section 3.2 (Adafactor at a constant 0.3, no parameter scaling);
T5X for two details that the paper leaves to it: a prompt shorter than 128 rows is not factored, and weight
decay is not multiplied by the rate.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from peftscale.config import TrainConfig


def rate_at(cfg: TrainConfig, step: int) -> float:
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


class AdapterOptimizer:
    """Updates the tensors of one adapter, and keeps what a resume needs as plain tensors."""

    def __init__(self, parameters: Iterable[nn.Parameter], cfg: TrainConfig) -> None:
        self._cfg = cfg
        self._parameters = list(parameters)
        # Vectors over the same storage: Adafactor factors whatever has two axes, a prompt must not be.
        self._flat = [nn.Parameter(p.data.view(-1)) for p in self._parameters]
        self._optimizer: torch.optim.Optimizer
        if cfg.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(self._flat, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
        else:
            self._optimizer = Adafactor(
                self._flat,
                lr=cfg.learning_rate,
                scale_parameter=False,
                relative_step=False,
                warmup_init=False,
                decay_rate=-0.8,
                clip_threshold=1.0,
            )

    def update(self, step: int) -> float:
        """Clip, move the adapter by its gradient and clear it. Returns the rate used."""
        rate = rate_at(self._cfg, step)
        if self._cfg.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._cfg.clip_norm)
        for flat, parameter in zip(self._flat, self._parameters, strict=True):
            assert parameter.grad is not None and flat.data_ptr() == parameter.data_ptr()
            flat.grad = parameter.grad.view(-1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            if self._cfg.optimizer == "adafactor":  # it multiplies by the rate, T5X does not
                group["weight_decay"] = self._cfg.weight_decay / rate if rate > 0 else 0.0
        self._optimizer.step()
        self.clear()
        return rate

    def clear(self) -> None:
        """Forget the gradient."""
        for flat, parameter in zip(self._flat, self._parameters, strict=True):
            flat.grad = parameter.grad = None

    def num_bytes(self) -> int:
        """Of the moments, after the first update."""
        return sum(tensor.nbytes for tensor in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """The moments, as tensors named '<parameter>.<moment>'; numbers become vectors of one float64."""
        return {
            f"{i}.{key}": value if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float64)
            for i, moments in self._optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over the moments that `state` gave."""
        full = self._optimizer.state_dict()
        full["state"] = {}
        for name, value in state.items():
            index, key = name.split(".", 1)
            is_number = value.dtype == torch.float64 and value.shape == (1,)
            number = value.item() if is_number else None
            moments = full["state"].setdefault(int(index), {})
            moments[key] = (int(number) if key == "step" else number) if number is not None else value.clone()
        self._optimizer.load_state_dict(full)
