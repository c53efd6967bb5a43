"""Baselines: what adapters are compared with, on the same task, order of examples, metrics and evaluation.

Full fine-tuning and LoRA train a base that transformers has loaded (`training`); prompt design asks our own base and
trains nothing (`few_shot`). Adapters themselves are `train`.
"""

from collections.abc import Callable

from peftscale.baselines import few_shot, training
from peftscale.config import RunConfig
from peftscale.records import RunSummary
from peftscale.train import comm, memory, setup
from peftscale.train.journal import Leaving, Watch, never, nobody


def main(
    cfg: RunConfig,
    report: Callable[[int], None] = lambda step: None,
    watch: Watch = nobody,
    is_leaving: Leaving = never,
) -> RunSummary:
    """Do what `method` of the run file says, in this process or as one of many. The same summary on every rank."""
    device = setup.pick_device(cfg)
    with (
        comm.session(backend=comm.backend_for(device), timeout_s=cfg.cluster.collective_timeout_s),
        memory.measured(device) as peak,
    ):
        if cfg.method == "few_shot":
            return few_shot.run(cfg, device, peak, watch)
        return training.run(cfg, device, peak, report, watch, is_leaving)
