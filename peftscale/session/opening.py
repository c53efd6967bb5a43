"""Opening: ranks that meet, and a base that is loaded, without a run file.

What is trained over the base is `session`; the base itself is `base.load`, the ranks are `train.comm`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from peftscale.base.load import Base
from peftscale.config import COLLECTIVE_TIMEOUT_S, BaseConfig, ComputeDtype, Quantization, Sharding
from peftscale.errors import ClusterError, ConfigError
from peftscale.session.settings import checked
from peftscale.train import comm, setup

log = logging.getLogger(__name__)


@contextmanager
def ranks(*, device: Literal["cpu", "cuda"] | None = None) -> Iterator[None]:
    """Let the processes that torchrun started meet, for the length of the block. Alone, a process needs none.

    Args:
        device: as for `load_base`.
    """
    backend = comm.backend_for(_device(device))
    with comm.session(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S):
        yield


def load_base(
    model: str | Path,
    *,
    quantization: Quantization,
    compute_dtype: ComputeDtype = "bfloat16",
    sharding: Sharding = "auto",
    checkpoint_activations: bool = False,
    packing: Literal["auto", "off"] = "auto",
    revision: str = "main",
    pack_dir: str | Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
) -> Base:
    """Load and freeze a base; the first time it is packed into the user's cache. Every rank calls it.

    Args:
        model: a directory with config.json, tokenizer and safetensors, or a hub id.
        quantization, compute_dtype, sharding, checkpoint_activations, revision, pack_dir: as `base` in a run file.
        packing: as `train.packing` there.
        device: None: this rank's GPU where there is one, else the CPU.

    Raises:
        ConfigError: an argument is wrong, or the weights do not fit.
        ModelError: the model cannot be read, packed or sharded.
        ClusterError: ranks have not met, or there is no such device.
    """
    given = {
        "model": str(Path(model).absolute()) if Path(model).is_dir() else str(model),
        "revision": revision,
        "quantization": quantization,
        "compute_dtype": compute_dtype,
        "sharding": sharding,
        "checkpoint_activations": checkpoint_activations,
        "pack_dir": pack_dir,
    }
    cfg = checked(BaseConfig, "peftscale.load_base", given)
    if packing not in ("auto", "off"):
        raise ConfigError(f"peftscale.load_base: packing: must be 'auto' or 'off', got {packing!r}")
    on = _device(device)
    if comm.expected_world_size() != comm.world_size():
        raise ClusterError(
            f"WORLD_SIZE={comm.expected_world_size()}: this process is one of several that have not met. Put all that "
            f"begins with peftscale.load_base inside `with peftscale.ranks():`."
        )
    comm.tap()
    base = setup.load_base(cfg, setup.place(cfg, on), on)
    note = None if packing == "off" else setup.pack_where_exact(base)
    if comm.rank() == 0:
        for text in base.notes:
            log.info(text)
        if note:
            log.log(logging.INFO if base.is_packed else logging.WARNING, note)
    return base


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    match name or ("cuda" if has_gpu else "cpu"):
        case "cpu":
            return torch.device("cpu")
        case "cuda" if has_gpu:
            return setup.own_gpu()
        case "cuda":
            raise ClusterError(
                f"device='cuda', but this process sees no CUDA device (torch {torch.__version__}). Install a CUDA "
                f"build of torch, or leave device out."
            )
        case other:
            raise ConfigError(f"device: must be 'cpu' or 'cuda', got {other!r}")
