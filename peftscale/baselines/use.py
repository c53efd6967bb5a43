"""A trained baseline at work: its best state, scored on tasks.

Training it is `baselines.training`; adapters at work are `train.use`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from peftscale.base.load import Base
from peftscale.baselines import lora, model
from peftscale.config import RunConfig, TaskConfig
from peftscale.errors import ModelError
from peftscale.task_config import Split
from peftscale.train import comm, use
from peftscale.train.evaluate import BASE_ALONE
from peftscale.train.use import Evaluated


def evaluated(cfg: RunConfig, directory: Path, task_configs: Sequence[TaskConfig], split: Split | None) -> Evaluated:
    """Evaluate a state of full fine-tuning or LoRA on a split of every task, all in the same passes.

    Args:
        cfg: of the run that trained it.
        directory: that it was saved to.
        task_configs: what to evaluate on.
        split: of each task; None for what each reports on.

    Raises:
        ModelError: there is no such state.
        DataError: a task has no such split, or its data cannot be used.
    """
    with use.session(cfg) as device:
        base = comm.together(lambda: _load(cfg, directory, device))
        of_tasks = use.on_tasks(
            base,
            {},
            [BASE_ALONE],
            task_configs,
            split,
            max_tokens=base.max_positions,
            microbatch_tokens=cfg.train.microbatch_tokens,
        )
        return Evaluated(of_tasks, [])


def _load(cfg: RunConfig, directory: Path, device: torch.device) -> Base:
    weights = "adapter_model.safetensors" if cfg.method == "lora" else "config.json"
    if not (directory / weights).is_file():
        raise ModelError(f"{directory}: no state of method={cfg.method} is there. Train the run first.")
    if cfg.method == "full_finetuning":
        return model.load(cfg.base.model_copy(update={"model": str(directory)}), device)
    base = model.load(cfg.base, device)
    with model.quiet():
        lora.library().PeftModel.from_pretrained(base.model, directory)  # in place
    return base
