"""A state of training for tests of what is kept of it: two small prompts that made-up gradients move."""

import torch

from peftscale.adapters import Cohort, SoftPrompt
from peftscale.config import TrainConfig
from peftscale.data.batches import Cursor
from peftscale.train.checkpoint import AdapterProgress, Identity, State
from peftscale.train.optim import AdapterOptimizer

IDENTITY = Identity("sha256:aa", "f1", 2, 1, {"train": {"steps": 9}})


def _train_config(optimizer: str) -> TrainConfig:
    return TrainConfig(
        steps=9,
        examples_per_step=1,
        microbatch_tokens=1,
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=0.1,
        evaluate_every=1,
        checkpoint_every=1,
    )


def make(*, steps: int, optimizer: str = "adamw") -> State:
    """A cohort of two that was moved `steps` times by made-up gradients."""
    draw = torch.Generator().manual_seed(1)
    cohort = Cohort({name: SoftPrompt(torch.rand(length, 3, generator=draw)) for name, length in (("a", 4), ("b", 5))})
    cfg = _train_config(optimizer)
    state = State(
        cohort,
        {name: AdapterOptimizer(adapter.parameters(), cfg) for name, adapter in cohort.items()},
        {name: adapter.rows_PH.detach().clone() for name, adapter in cohort.items()},
        {name: AdapterProgress(Cursor(7), best={"accuracy": 0.5}, best_step=0) for name in cohort},
    )
    for step in range(steps):
        move_(state, step)
    return state


def move_(state: State, step: int) -> None:
    for name, adapter in state.cohort.items():
        adapter.rows_PH.grad = torch.sin(adapter.rows_PH.detach() * (step + 1) + len(name))
        state.optimizers[name].update(step)
        state.progress[name].cursor = Cursor(7, step + 1)
    state.step = step + 1


def rows(state: State) -> list[torch.Tensor]:
    return [adapter.rows_PH.detach().clone() for adapter in state.cohort.values()]
