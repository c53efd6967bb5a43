"""Matrix: adapters on tasks, every one on every other, as plain data for `peftscale evaluate`.

All cells are evaluated in the same passes by `train.use`; ensembles are `analysis.ensembles`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peftscale.analysis import ensembles
from peftscale.config import RunConfig, TaskConfig
from peftscale.task_config import Split
from peftscale.train import evaluate, use
from peftscale.train.evaluate import BASE_ALONE


def scores(
    cfg: RunConfig,
    directories: Sequence[Path],
    tasks: Sequence[TaskConfig],
    split: Split | None,
    *,
    together: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Evaluate adapters, and the base without a prompt, on a split of each task.

    Args:
        cfg: of the base and the passes; its own tasks do not count.
        directories: of the adapters; where the run's method is a baseline, the one of its state.
        tasks: of different names.
        split: None for the one that each task reports on.
        together: name of a task -> places in `directories` of the adapters that answer together on it too.

    Returns:
        {"tasks": {name: {"split", "examples", "base": metrics, "adapters": {directory: {"metrics", "predictions"}}}},
        "notes"}; `predictions` are labels or texts in the split's order. A baseline has no "base". A task of
        `together` has "ensemble", as `ensembles.scores` gives it.
    """
    if cfg.method == "adapters":
        names = [BASE_ALONE, *map(str, directories)]
        found = use.evaluated(cfg, directories, tasks, split)
    else:
        from peftscale.baselines import use as baseline_use  # PEFT and DeepSpeed's optimizers, which few need

        names = [str(directory) for directory in directories]
        found = baseline_use.evaluated(cfg, directories[0], tasks, split)
    by_task: dict[str, Any] = {}
    for task, of_task in zip(tasks, found.tasks, strict=True):
        cell, by_name = of_task[0][0], dict(zip(names, (result for _, result in of_task), strict=True))
        alone = by_name.pop(BASE_ALONE, None)
        by_task[task.name] = {
            "split": split or task.reported_split,
            "examples": len(cell.examples),
            **({} if alone is None else {"base": alone.metrics}),
            "adapters": {
                name: {"metrics": result.metrics, "predictions": use.readable(result.predictions, cell.task)}
                for name, result in by_name.items()
            },
        }
        if task.name in together:
            members = [by_name[str(directories[place])] for place in together[task.name]]
            by_task[task.name]["ensemble"] = ensembles.scores(members, partial(evaluate.score, cell))
    return {"tasks": by_task, "notes": found.notes}
