"""What every kind of work begins with: device, plan, base and data of a run file, agreed on by all ranks.

Training goes on in `train.worker`, scoring and answering in `train.use`. What one rank finds wrong is raised on every
rank, and what each would decide alone (does it fit, which sharding, packed or not) is decided once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from peftscale import facts, plan
from peftscale.adapters import files
from peftscale.base import attention, exactness, flex_exactness, text_exactness
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.config import AdapterConfig, BaseConfig, RunConfig
from peftscale.data import metrics, tasks
from peftscale.data.mixtures import Mixture
from peftscale.data.tasks import TaskData
from peftscale.errors import AdapterError, ClusterError, ConfigError, DataError, ModelError
from peftscale.facts import BaseFacts
from peftscale.plan import Hardware, Mode, Placement, Plan, Work
from peftscale.train import comm, nodes

AnyPlacement = TypeVar("AnyPlacement", bound=Placement)


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
    return own_gpu()


def own_gpu() -> torch.device:
    """The GPU of this rank, made the current one."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def make_plan(
    cfg: RunConfig, device: torch.device, *, placed: Placement | None = None, work: Work | None = None
) -> Plan:
    """The plan for the world that this run finds itself in: rank 0's, if it fits on every rank.

    Args:
        cfg: the run file.
        device: of this rank.
        placed: where the base lies already; None before it is loaded.
        work: what the data has decided; None before it is read.

    Raises:
        ConfigError: it does not fit, with what would help.
    """

    def local(base_facts: BaseFacts, hardware: Hardware, modes: Sequence[Mode]) -> Plan:
        world = comm.world_size()
        planned = plan.make(cfg, base_facts, hardware, world=world, modes=modes, placed=placed, work=work)
        if not planned.fits:
            raise ConfigError("\n".join(planned.problems))
        return planned

    return _agreed(cfg.base, device, local)


def place(cfg: BaseConfig, device: torch.device) -> Placement:
    """Where a base lies when nothing is known but the base: rank 0's answer, if it fits on every rank.

    Raises:
        ConfigError: the weights do not fit.
    """

    def local(base_facts: BaseFacts, hardware: Hardware, modes: Sequence[Mode]) -> Placement:
        return plan.place(cfg, base_facts, hardware, world=comm.world_size(), modes=modes)

    return _agreed(cfg, device, local)


def _agreed(
    cfg: BaseConfig,
    device: torch.device,
    local: Callable[[BaseFacts, Hardware, Sequence[Mode]], AnyPlacement],
) -> AnyPlacement:
    """What rank 0 plans from the base's facts and its machine, once every rank has found it possible."""
    of_ranks = comm.gather_objects(nodes.own())
    modes = [mode for mode in plan.MODES if mode != "node" or nodes.alike(of_ranks)]

    def work() -> AnyPlacement:
        if cfg.sharding not in ("auto", *modes):
            raise ConfigError(
                f"base.sharding=node needs as many ranks on every node, numbered node by node, and LOCAL_RANK and "
                f"LOCAL_WORLD_SIZE in the environment of each, as torchrun and Ray set them. Nodes of ranks 0, 1, ... "
                f"here: {', '.join(map(_in_words, of_ranks))}. Start them so, or take base.sharding=world."
            )
        base_facts = facts.load(base_load.resolve(cfg.model, cfg.revision, with_weights=False))
        return local(base_facts, hardware(device), modes)

    planned: AnyPlacement = comm.gather_objects(comm.together(work))[0]
    return planned


def _in_words(node: range | None) -> str:
    return "not said" if node is None else f"{node.start}-{node.stop - 1}"


def hardware(device: torch.device) -> Hardware:
    """What this rank finds itself on, and how many ranks share it."""
    found, here = plan.detect(cuda=device.type == "cuda"), nodes.own()
    return found if here is None else found.with_nodes_of(len(here), world=comm.world_size())


def load_base(cfg: BaseConfig, placed: Placement, device: torch.device) -> Base:
    """Load the base as planned. What can fail on one rank alone (files, cache, disk) fails on all before any gather.

    Raises:
        ModelError: it cannot be loaded, or prompts would not be exact on it.
    """
    opened = comm.together(lambda: base_load.open_(cfg))
    base = base_load.load(
        cfg,
        sharding=placed.sharding,
        device=device,
        node=nodes.group() if placed.sharding == "node" else None,
        prefetch_elements=placed.prefetch_elements,
        opened=opened,
    )
    reasons = comm.gather_objects(text_exactness.texts_differ(base))
    if any(reasons):
        raise ModelError(
            f"base.model={cfg.model}: no adapter would be exact on this base ({next(filter(None, reasons))}). "
            f"Choose another one, such as a Llama, a Qwen or a T5."
        )
    return base


def choose_packing(cfg: RunConfig, base: Base) -> str | None:
    """Make the base packed where the run file allows it and every rank found it exact. Returns a line for the user."""
    return None if cfg.train.packing == "off" else pack_where_exact(base)


def pack_where_exact(base: Base) -> str | None:
    """Make the base packed if every rank found it exact, on CUDA through FlexAttention if that is exact too.

    Returns:
        What was chosen and why, where there was a choice: a line for the user.
    """
    # One half after the other on all ranks: the second is a collective when the base is sharded.
    reasons = comm.gather_objects(exactness.small_copy_differs(base.model.config))
    if not any(reasons):
        reasons = comm.gather_objects(exactness.weights_differ(base))
    if any(reasons):
        base.why_padded = next(filter(None, reasons))
        return f"passes are padded: {base.why_padded}"
    exactness.make_packed(base)
    if base.device.type != "cuda":  # FlexAttention has no backward elsewhere
        return None
    reasons = comm.gather_objects(flex_exactness.flex_differs(base))
    if any(reasons):
        return f"attention is batched, not FlexAttention: {next(filter(None, reasons))}"
    exactness.make_packed(base, attention.FLEX)
    return "attention is FlexAttention"


def verify_starts(adapters: Mapping[str, AdapterConfig]) -> list[str]:
    """Check the adapters that others start from before a base is loaded for them.

    Returns:
        What the user should know of them, a line each.

    Raises:
        AdapterError: one cannot be used, whatever the base.
    """
    notes = []
    for name, adapter in adapters.items():
        if adapter.init_adapter is None:
            continue
        where = f"adapters.{name}.init_adapter"
        try:
            manifest = files.verify(adapter.init_adapter)
        except AdapterError as error:
            raise AdapterError(f"{where}: {error}") from error
        if manifest is None:
            notes.append(f"{where}={adapter.init_adapter}: base not verified")
    return notes


def load_tasks(cfg: RunConfig) -> dict[str, Mixture]:
    """The data of each adapter, each task read once; adapters with the same task share its data."""
    model_dir = base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False)
    base_load.make_skeleton(cfg.base, model_dir)  # a base that cannot be trained is said first
    base_facts = facts.load(model_dir)
    positions = base_facts.max_positions
    tokenizer = base_load.load_tokenizer(model_dir)
    alike: dict[str, list[tuple[str, int]]] = {}
    for name in cfg.adapters:
        for number, task in enumerate(cfg.adapter_tasks(name)):
            alike.setdefault(task.model_dump_json(), []).append((name, number))
    found: dict[tuple[str, int], TaskData] = {}
    for places in alike.values():
        room = None if positions is None else positions - max(cfg.adapters[name].length for name, _ in places)
        first, number = places[0]
        try:
            data = tasks.load(
                cfg.adapter_tasks(first)[number],
                tokenizer,
                max_tokens=room,
                is_encoder_decoder=base_facts.is_encoder_decoder,
            )
            if any(cfg.trained_by(name).loss == "labels" for name, _ in places):
                tasks.refuse_long_labels(data)
        except (ConfigError, DataError) as error:
            if number == 0 and cfg.adapters[first].task is None:
                raise
            of_more = f".more_tasks.{number - 1}" if number else ""
            raise type(error)(f"adapters.{first}{of_more}: {error}") from error
        found |= dict.fromkeys(places, data)
    metrics.import_libraries(metric for name in cfg.adapters for of in cfg.adapter_tasks(name) for metric in of.metrics)
    return {
        name: Mixture(
            tuple(found[name, number] for number, _ in enumerate(cfg.adapter_tasks(name))), adapter.task_size_limit
        )
        for name, adapter in cfg.adapters.items()
    }
