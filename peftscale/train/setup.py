"""What every kind of work begins with: device, plan, base and data of a run file, agreed on by all ranks.

Training goes on in `train.worker`, scoring and answering in `train.use`. What one rank finds wrong is raised on every
rank, and what each would decide alone (does it fit, which sharding, packed or not) is decided once.
"""

import os

import torch

from peftscale import facts, plan
from peftscale.base import exactness
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.tasks import TaskData
from peftscale.errors import ClusterError, ConfigError, DataError
from peftscale.plan import Plan
from peftscale.train import comm

COLLECTIVE_TIMEOUT_S = 1800.0


def pick_device(cfg: RunConfig) -> torch.device:
    """This rank's GPU where the run asks for GPUs, else the CPU.

    Raises:
        ClusterError: the run asks for GPUs and this process sees none, or for parts of one.
    """
    each = cfg.cluster.gpus_per_worker
    if each == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            f"cluster.gpus_per_worker={each:g}, but this process sees no CUDA device (torch {torch.__version__}). "
            f"Install a CUDA build of torch, or set cluster.gpus_per_worker=0 to run on the CPU."
        )
    if each < 1 and comm.expected_world_size() > 1:
        raise ClusterError(
            f"cluster.gpus_per_worker={each:g}: two workers cannot share one device, because NCCL refuses it. "
            f"Set it to 1, or cluster.workers=1."
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def make_plan(cfg: RunConfig, device: torch.device, **known: int) -> Plan:
    """The plan for the world that this run finds itself in: rank 0's, if it fits on every rank.

    Raises:
        ConfigError: it does not fit, with what would help.
    """

    def local() -> Plan:
        base_facts = facts.load(base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False))
        hardware = plan.detect(cuda=device.type == "cuda")
        planned = plan.make(cfg, base_facts, hardware, world=comm.world_size(), **known)
        if not planned.fits:
            raise ConfigError("\n".join(planned.problems))
        return planned

    planned: Plan = comm.gather_objects(comm.together(local))[0]
    return planned


def load_base(cfg: RunConfig, planned: Plan, device: torch.device) -> Base:
    """Load the base as planned. What can fail on one rank alone (files, cache, disk) fails on all before any gather."""
    opened = comm.together(lambda: base_load.open_(cfg.base))
    return base_load.load(
        cfg.base,
        sharding=planned.sharding,
        device=device,
        prefetch_elements=planned.prefetch_elements,
        opened=opened,
    )


def choose_packing(cfg: RunConfig, base: Base) -> str | None:
    """Make the base packed where the run file allows it and every rank found it exact; else say why not."""
    if cfg.train.packing == "off":
        return None
    # One half after the other on all ranks: the second is a collective when the base is sharded.
    reasons = comm.gather_objects(exactness.small_copy_differs(base.model.config))
    if not any(reasons):
        reasons = comm.gather_objects(exactness.weights_differ(base))
    if any(reasons):
        return str(next(reason for reason in reasons if reason))
    exactness.make_packed(base)
    return None


def load_tasks(cfg: RunConfig) -> dict[str, TaskData]:
    """The data of each adapter, each task read once."""
    model_dir = base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False)
    base_load.make_skeleton(cfg.base, model_dir)  # a base that cannot be trained is said first
    positions = facts.load(model_dir).max_positions
    tokenizer = base_load.load_tokenizer(model_dir)
    alike: dict[str, list[str]] = {}
    for name in cfg.adapters:
        alike.setdefault(cfg.adapter_task(name).model_dump_json(), []).append(name)
    found: dict[str, TaskData] = {}
    for names in alike.values():
        room = None if positions is None else positions - max(cfg.adapters[name].length for name in names)
        try:
            data = tasks.load(cfg.adapter_task(names[0]), tokenizer, max_tokens=room)
        except (ConfigError, DataError) as error:
            if cfg.adapters[names[0]].task is None:
                raise
            raise type(error)(f"adapters.{names[0]}: {error}") from error
        found |= dict.fromkeys(names, data)
    return found
