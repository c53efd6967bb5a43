"""The task of a baseline: the run's, to the token as its adapters have it."""

from peftscale.config import RunConfig
from peftscale.data.tasks import TaskData
from peftscale.train import setup


def load(cfg: RunConfig) -> TaskData:
    """The run's task with the room that its adapters leave, so that the same texts are cut and refused."""
    longest = max(cfg.adapters.values(), key=lambda adapter: (adapter.task is None, adapter.length))
    alone = {cfg.method: longest.model_copy(update={"task": None, "more_tasks": (), "task_size_limit": None})}
    return setup.load_tasks(cfg.model_copy(update={"adapters": alone}))[cfg.method].tasks[0]
