"""Full fine-tuning: every weight is trained, through DeepSpeed ZeRO with the optimizer's state cut over the ranks.

Each rank holds the model whole; summed gradients, float32 master weights and moments are cut (stage 2: stage 1 sums
passes in bfloat16 where the base computes in it). The steps are `baselines.training`. There is no checkpoint to resume
from: the best weights so far are on disk.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peftscale.adapters import directory
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.baselines import model
from peftscale.baselines.adafactor import SlicedAdafactor
from peftscale.config import RunConfig, TrainConfig
from peftscale.train import comm, optim
from peftscale.train.journal import Journal

_BUCKET = 50_000_000  # weights; what is reduced and gathered in one call


class Full:
    """A whole base in training. A `training.Learner`."""

    def __init__(self, base: Base, cfg: RunConfig, journal: Journal) -> None:
        """Hand the base's model to DeepSpeed. Every rank calls it; one process alone makes a group of one."""
        self.base = base
        self.named = dict(base.model.named_parameters())
        for parameter in self.named.values():
            parameter.requires_grad_()
        self._train, self._journal = cfg.baseline_train, journal
        self.directory = cfg.run_dir / "full_finetuning" / "best"
        base_load.sharder(base.device)  # settles which device DeepSpeed is for
        import deepspeed

        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(comm.backend_for(base.device), store=store, rank=0, world_size=1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for a minute
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self._optimizer = _optimizer(self._train, self.named)
        with _local_rank():
            self._engine, *_ = deepspeed.initialize(
                model=base.model,
                optimizer=self._optimizer,
                config=_config(self._train, base.compute_dtype, sum(p.numel() for p in self.named.values())),
            )
        self.through = self._engine

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add to the gradient, which is summed over the ranks as it comes out of every pass."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        with comm.labelled("reduced"):
            self._engine.backward(loss * comm.world_size())  # DeepSpeed takes the mean

    def update(self, step: int, *, is_finite: bool) -> float | None:
        """Move this rank's slice and gather the others'. DeepSpeed passes over a gradient that is not finite."""
        if not is_finite:
            for pieces in self._engine.optimizer.averaged_gradients.values():
                for piece in pieces:
                    piece.fill_(torch.nan)
        rate = optim.rate_at(self._train, step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        return rate if self._engine.was_step_applied() else None

    def keep(self) -> None:
        """Write the present weights as a transformers directory, in place of the best so far."""

        def write() -> None:
            with directory.filled(self.directory) as folder:
                with model.quiet():
                    self.base.model.save_pretrained(folder)
                self.base.tokenizer.save_pretrained(folder)

        self._journal.write(write)

    def restore(self) -> None:
        """Read the best weights back, on every rank, in place."""
        with model.quiet(), torch.no_grad():
            found = dict(
                type(self.base.model)
                .from_pretrained(self.directory, dtype="auto", use_safetensors=True)
                .named_parameters()
            )
            for name, parameter in self.named.items():
                parameter.copy_(found[name])

    def save(self) -> None:
        """`keep` has written already."""

    def state(self) -> None:
        """There is none to resume from."""

    def take_over_(self, tensors: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Never called: a resume is refused before anything is loaded."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what DeepSpeed holds."""
        import deepspeed

        self._engine.destroy()
        if self._owns_group:
            deepspeed.comm.destroy_process_group()


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """DeepSpeed reads LOCAL_RANK as it starts. Left behind, accelerate would take the process for one of a group."""
    is_missing = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if is_missing:
            del os.environ["LOCAL_RANK"]


def _optimizer(cfg: TrainConfig, named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    match cfg.optimizer:
        case "adamw":
            return torch.optim.AdamW(
                named.values(), lr=cfg.learning_rate, eps=cfg.epsilon, weight_decay=cfg.weight_decay
            )
        case "adafactor":
            return SlicedAdafactor(named.values(), weight_decay=cfg.weight_decay)


def _config(cfg: TrainConfig, compute_dtype: torch.dtype, num_weights: int) -> dict[str, Any]:
    bucket = min(_BUCKET, num_weights + num_weights % 2)
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed; what a step has is counted by ourselves
        "bf16": {"enabled": compute_dtype == torch.bfloat16, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": cfg.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # ours goes over slices, AdamW over elements
        "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
    }
