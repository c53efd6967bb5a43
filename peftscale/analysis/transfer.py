"""Transfer: methods trained on one task and scored on others that they never saw, over several seeds.

Training and scoring are handed in by the driver; here it is decided what is trained, and figures are put together.

Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 4 (domain shift: in-domain beside zero-shot).
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from peftscale.config import AdapterConfig, RunConfig, TaskConfig
from peftscale.errors import ConfigError
from peftscale.records import RunSummary
from peftscale.task_config import Split, told_apart

CONFIDENCE = 0.95

Train = Callable[[RunConfig], RunSummary]
Score = Callable[[RunConfig, Sequence[Path], Sequence[TaskConfig], Split | None], dict[str, Any]]


@dataclass(frozen=True)
class Member:
    """One state that a run trains: an adapter of a cohort, or a whole baseline."""

    run: RunConfig
    name: str
    """Of the adapter, or the run's method."""
    method: str
    """What it is called in the result; the same for all seeds."""
    task: TaskConfig
    """That it is trained on, and that others are compared with."""
    seed: int
    more_tasks: tuple[TaskConfig, ...] = ()
    """That it is trained on too."""


def members(runs: Sequence[RunConfig], seeds: Sequence[int]) -> list[Member]:
    """What is to be trained: all seeds of a run's adapters in one cohort, a baseline once a seed.

    Args:
        runs: one for each method, of different names.
        seeds: each adapter and baseline is trained with each of them, under a name of its own. Without any, runs are
            what they are.

    Raises:
        ConfigError: two runs of one name, a seed given twice or below 0, or a run that trains nothing.
    """
    twice = _twice([run.name for run in runs])
    if twice:
        raise ConfigError(f"name: two run files are called {twice[0]!r}; each method needs a name of its own.")
    again = _twice(seeds)
    if again:
        raise ConfigError(f"--seed {again[0]}: given twice; a band is over seeds that differ. Leave one out.")
    if min(seeds, default=0) < 0:
        raise ConfigError(f"--seed {min(seeds)}: must be 0 or more.")
    found: list[Member] = []
    for run in runs:
        if run.method == "few_shot":
            raise ConfigError(f"{run.name}: method 'few_shot' trains nothing on one task that could go to another.")
        if run.method != "adapters":
            of_seeds = [_with_seed(run, seed) for seed in seeds] or [run]
            found += [Member(one, run.method, run.name, run.task, one.seed) for one in of_seeds]
            continue
        cohort, methods = _cohort(run, seeds)
        found += [
            Member(
                cohort, name, methods[name], cohort.adapter_task(name), cohort.adapter_seed(name), adapter.more_tasks
            )
            for name, adapter in cohort.adapters.items()
        ]
    return found


def study(
    found: Sequence[Member], targets: Sequence[TaskConfig], split: Split | None, *, train: Train, score: Score
) -> dict[str, Any]:
    """Train what is not trained yet, score its best state on its own task and on every target, and sum up.

    Args:
        found: of `members`.
        targets: tasks that nothing is trained on.
        split: to score on; None for the one that each task reports on.
        train: trains a run, or hands back what it gave if it has ended already.
        score: the driver's `evaluate`.

    Returns:
        {"confidence", "methods": {name: {"task", "seeds", "tasks": {task: {"split", "metric", "values", "mean",
        "deviation", "low", "high", "shift", "untuned"}}}}, "notes"}. The metric is the first of the method's own task
        that the other task has too; `shift` is the same band for the difference to the own task, seed by seed, None
        where there is no such metric, and then the metric is the other task's first. `untuned` is the base alone, None
        beside a baseline. Bands of one seed have no deviation and no ends.

    Raises:
        ConfigError: two different tasks of one name, something is trained on a target beside its own task, or nothing
            is left that any method has not seen.
    """
    told_apart((*(member.task for member in found), *targets), where="task.name")
    if all(member.task == target for member in found for target in targets):
        raise ConfigError(
            f"--to {targets[0].name}: all methods are trained on it, and it is to be a task that they never saw. Name "
            f"another."
        )
    for member in found:
        seen = [task.name for task in targets if task in member.more_tasks]
        if seen:
            raise ConfigError(
                f"--to {seen[0]}: {member.name} of run {member.run.name} is trained on it too (more_tasks), and others "
                f"are to be tasks that it never saw. Leave it out; `peftscale evaluate` scores what was trained on."
            )
    runs = list({member.run.name: member.run for member in found}.values())
    scores: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    untuned: dict[str, dict[str, dict[str, float]]] = {}
    notes: list[str] = []
    for run in runs:
        of_run = [member for member in found if member.run is run]
        summary = train(run)
        places = {Path(summary.adapters[member.name].dir): member.name for member in of_run}
        tasks = told_apart((*(member.task for member in of_run), *targets), where="task.name")
        result = score(run, list(places), tasks, split)
        notes += result["notes"]
        untuned[run.name] = {name: of_task.get("base", {}) for name, of_task in result["tasks"].items()}
        for task_name, of_task in result["tasks"].items():
            for place, name in places.items():
                scores.setdefault((run.name, name), {})[task_name] = of_task["adapters"][str(place)]["metrics"]
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(member.method for member in found):
        of_method = [member for member in found if member.method == method]
        own, first_run = of_method[0].task, of_method[0].run
        methods[method] = {
            "task": own.name,
            "seeds": [member.seed for member in of_method],
            "tasks": {
                task.name: {"split": split or task.reported_split}
                | _on(
                    task,
                    own,
                    [scores[member.run.name, member.name] for member in of_method],
                    untuned[first_run.name][task.name],
                )
                for task in (own, *(target for target in targets if target != own))
            },
        }
    return {"confidence": CONFIDENCE, "methods": methods, "notes": notes}


def band(values: Sequence[float], *, confidence: float = CONFIDENCE) -> dict[str, float | None]:
    """Mean, deviation (n - 1) and Student's interval of the mean, for values that seeds differ in.

    Returns:
        {"mean", "deviation", "low", "high"}; of one value the mean alone, the others None.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "deviation": None, "low": None, "high": None}
    deviation = statistics.stdev(values)
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return {"mean": mean, "deviation": deviation, "low": mean - reach, "high": mean + reach}


def _on(
    task: TaskConfig, own: TaskConfig, scores: Sequence[dict[str, dict[str, float]]], untuned: dict[str, float]
) -> dict[str, Any]:
    """One method on one task."""
    # A mean is of the task's other metrics: the same thing only where these are.
    is_same_mean = set(own.metrics) == set(task.metrics)
    of_both = [metric for metric in own.metrics if metric in task.metrics and (metric != "mean" or is_same_mean)]
    metric = next(iter(of_both), task.metrics[0])
    values = [of_seed[task.name][metric] for of_seed in scores]
    found: dict[str, Any] = {
        "metric": metric,
        "values": values,
        **band(values),
        "shift": None,
        "untuned": untuned.get(metric),
    }
    if task != own and of_both:
        at_home = [of_seed[own.name][metric] for of_seed in scores]
        found["shift"] = band([away - home for away, home in zip(values, at_home, strict=True)])
    return found


def _twice(given: Sequence[Any]) -> list[Any]:
    """What is there again, in order."""
    return [one for i, one in enumerate(given) if one in given[:i]]


def _with_seed(run: RunConfig, seed: int) -> RunConfig:
    return run.model_copy(update={"seed": seed, "name": f"{run.name}-s{seed}"})


def _cohort(run: RunConfig, seeds: Sequence[int]) -> tuple[RunConfig, dict[str, str]]:
    """A run with all of its adapters at all seeds, and which method each is: alike but for the seed."""
    made: dict[str, AdapterConfig] = {}
    settings: dict[str, str] = {}
    for name, adapter in run.adapters.items():
        alike = adapter.model_dump_json(exclude={"seed"})
        if seeds and alike in settings.values():
            continue  # another of the run file's own seeds, in whose place `seeds` are
        for seed in seeds or (run.adapter_seed(name),):
            new = f"{name}-s{seed}" if seeds else name
            made[new] = adapter.model_copy(update={"seed": seed})
            settings[new] = alike
    first = {alike: name for name, alike in reversed(settings.items())}
    methods = {name: run.name if len(first) == 1 else f"{run.name}/{first[alike]}" for name, alike in settings.items()}
    if not seeds:
        return run, methods
    name = "-".join([run.name, *(f"s{seed}" for seed in seeds)])
    return run.model_copy(update={"adapters": made, "name": name}), methods
