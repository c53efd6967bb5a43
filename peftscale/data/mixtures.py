"""Mixture: the tasks that one adapter is trained on, as one order of examples. Of one task it is the task's own order.

The order of numbers, passes and ranks are `batches`; a task's examples are `tasks`; predictions are `train.evaluate`.

Order: an epoch has min(n, limit) places for a task of n examples, the places of one task behind those of another, and
`batches.indices` goes through them. Where a task has more examples than places, the k places of epoch e are filled with
those at e*k .. e*k + k-1 of an endless order of its own, which follows from the seed too: nothing is left out for ever.

Source: Raffel et al. 2020, arXiv:1910.10683, section 3.5.2 (examples-proportional mixing; there examples are drawn at
these rates, here each epoch has exactly as many); Vu et al. 2022, arXiv:2110.07904 (SPoT).
"""

import bisect
import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from peftscale.config import MEAN_OF_TASKS
from peftscale.data.batches import Cursor, Permutation, indices, permutation
from peftscale.data.tasks import Example, TaskData


@dataclass(frozen=True)
class Mixture:
    """What one adapter is trained on."""

    tasks: tuple[TaskData, ...]
    """Its own first. At least one."""
    limit: int | None = None
    """Most examples of one task in an epoch."""

    @cached_property
    def shares(self) -> dict[str, int]:
        """Examples of each task in one epoch, by its name."""
        return {task.name: min(len(task.train), self.limit or len(task.train)) for task in self.tasks}

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """The place behind the last one of each task."""
        return tuple(itertools.accumulate(self.shares.values()))

    @cached_property
    def _kept(self) -> Permutation:
        """Its own orders at hand, whatever the size of the cohort: of each task and of all, the epoch and the next."""
        return functools.lru_cache(maxsize=2 * (1 + len(self.tasks)))(permutation)

    def take(self, cursor: Cursor, num: int) -> tuple[list[Example], Cursor]:
        """The next `num` examples, and the cursor behind them: a function of the cursor, not of ranks or past calls."""
        epoch_size = self._ends[-1]
        moved = replace(cursor, position=cursor.position + num)
        places = indices(cursor.seed, cursor.position, moved.position, num_examples=epoch_size, kept=self._kept)
        found = []
        for position, place in enumerate(places, start=cursor.position):
            number = bisect.bisect_right(self._ends, place)
            task = self.tasks[number]
            share = self.shares[task.name]
            at = place - (self._ends[number] - share)
            if share < len(task.train):
                own = position // epoch_size * share + at
                num_examples = len(task.train)
                (at,) = indices(
                    cursor.seed, own, own + 1, num_examples=num_examples, stream=number + 1, kept=self._kept
                )
            found.append(task.train[at])
        return found, moved

    def scores(self, of_tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of one adapter: those of its task as they are; of several tasks the mean of each one's first metric,
        then all of them, as `task/metric`."""
        if len(self.tasks) == 1:
            return dict(of_tasks[0])
        named = {
            f"{task.name}/{metric}": value
            for task, metrics in zip(self.tasks, of_tasks, strict=True)
            for metric, value in metrics.items()
        }
        return {MEAN_OF_TASKS: statistics.fmean(next(iter(metrics.values())) for metrics in of_tasks), **named}

    def described(self) -> str:
        """What an epoch is made of: `all 3257 of emotion, 5000 of the 6920 of sst2`."""
        parts = []
        for task, share in zip(self.tasks, self.shares.values(), strict=True):
            has = len(task.train)
            parts.append(f"all {has} of {task.name}" if share == has else f"{share} of the {has} of {task.name}")
        return ", ".join(parts)
