"""Departures: when an adapter leaves its cohort, and why. The others go on.

Decides from the adapters' progress alone, which is the same on every rank. Evaluating, saving and writing notes down
is `train.worker`; what is not finite is found by `train.step`.
"""

from collections.abc import Sequence

from peftscale.config import RunConfig
from peftscale.errors import TrainingError
from peftscale.train import checkpoint
from peftscale.train.checkpoint import AdapterProgress, State


def mark_done_(cfg: RunConfig, state: State, training: Sequence[str]) -> None:
    """After a step: mark those that have taken their steps, and those that failed.

    Raises:
        TrainingError: every adapter of the run has failed.
    """
    limit = cfg.train.max_nonfinite_steps
    for name in training:
        progress = state.progress[name]
        row, is_last = progress.nonfinite_steps, progress.steps == cfg.adapter_train(name).steps
        if row >= limit or (is_last and ends_badly(progress)):
            progress.outcome = "failed"
            what = "its values, loss or gradient were not finite"
            progress.reason = f"{what} in {row} step{'s' * (row > 1)} in a row, the last one step {state.step}"
        elif is_last:
            progress.outcome = "finished"
    if all(progress.outcome == "failed" for progress in state.progress.values()):
        reasons = "; ".join(f"adapter {name}: {progress.reason}" for name, progress in state.progress.items())
        advice = _lower_rate(cfg, next(iter(state.progress)))
        kept = next(iter(checkpoint.newest_first(cfg.checkpoints_dir)), None)
        found = f"the last checkpoint is {kept}" if kept else "no checkpoint had been written"
        raise TrainingError(f"{reasons}. {advice}; {found}.")


def ends_badly(progress: AdapterProgress) -> bool:
    """Whether the last steps were not finite: one may be a bad batch, more, or nothing else, are no training."""
    row = progress.nonfinite_steps
    return row > 1 or 0 < row == progress.steps


def due(cfg: RunConfig, state: State, training: Sequence[str]) -> list[str]:
    """Those to be evaluated after this step: their turn has come, or they leave, whatever the reason."""
    return [
        name
        for name in training
        if state.progress[name].outcome or state.progress[name].steps % cfg.adapter_train(name).evaluate_every == 0
    ]


def mark_stale_(cfg: RunConfig, state: State, training: Sequence[str]) -> None:
    """After an evaluation: mark those that have not become better for as long as they may."""
    for name in training:
        progress, patience = state.progress[name], cfg.adapter_train(name).early_stop
        if progress.outcome is None and patience is not None and progress.stale_evaluations >= patience:
            progress.outcome = "stopped early"
            metric = cfg.deciding_metric(name)
            progress.reason = f"early stop: {patience} evaluation(s) in a row without a better {metric}"


def notes(cfg: RunConfig, state: State, training: Sequence[str]) -> list[str]:
    """A line for each adapter that leaves. None for one that ends with the run itself."""
    lines = []
    for name in training:
        progress = state.progress[name]
        match progress.outcome:
            case "finished" if state.step < cfg.num_steps:
                lines.append(f"{name} is done at step {state.step}: it has taken its {progress.steps} steps")
            case "stopped early":
                lines.append(f"{name} is done at step {state.step}: {progress.reason}")
            case "failed":
                lines.append(f"{name} is stopped at step {state.step}: {progress.reason}. {_lower_rate(cfg, name)}.")
    return lines


def _lower_rate(cfg: RunConfig, name: str) -> str:
    """What helps against steps that are not finite. The name may come from a product: no key can be made of it."""
    own, rate = cfg.adapters[name].train, cfg.adapter_train(name).learning_rate
    whose = "" if own is None or own.learning_rate is None else f" of adapter {name}"
    return f"Lower train.learning_rate={rate:g}{whose} or set train.clip_norm"
