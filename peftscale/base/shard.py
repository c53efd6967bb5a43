"""ZeRO-3 as a sharder of frozen parameters: partition, gather hooks, and what is alive at a moment.

DeepSpeed gets no optimizer and no gradient. It holds a slice of every parameter, gathers a block before its
forward and backward, and drops it after. Filling the slices is `base.load`; adapters are never seen here.

Two choices that the defaults get wrong for a frozen base (measured in DECISIONS.md):
blocks are leaf modules, so that a block is gathered in one call per dtype; prefetch, reuse and live limits are 0
on CPU, because the defaults (counted in elements) gather a small model whole from the third pass on.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; `load.sharder` sets it for a CPU run beside a GPU

import deepspeed
import deepspeed.comm
import deepspeed.ops
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to standard output, and resets this at its import
# DeepSpeed's own call, which the pinned torch still serves.
warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")

from peftscale.base.pack import raw_bytes  # noqa: E402


def _config(*, prefetch_elements: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, used by nothing here
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": prefetch_elements,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * prefetch_elements,
            "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
        },
    }


class _Partition(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init without its broadcast: every rank fills its own slice, so sending rank 0's garbage is waste.

    Overrides an internal method of the pinned DeepSpeed; tests/ranks compares gradients with one process.
    """

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()  # type: ignore[attr-defined]


def partitioner(holders: ProcessGroup | None) -> _Partition:
    """What turns parameters into slices; one for a whole model. Needs a process group, which DeepSpeed joins.

    Args:
        holders: the ranks that hold the model together, and gather it from each other. None: all.
    """
    # Otherwise a shared-memory op is compiled for a minute, and gloo does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return _Partition(config_dict_or_path=_config(prefetch_elements=0), data_parallel_group=holders)


def partition(init: _Partition, parameter: nn.Parameter) -> Tensor:
    """Turn one materialised parameter into this rank's slice.

    Returns:
        The slice, a vector of ceil(numel / holders) elements of the parameter's dtype, to be filled in place.
        The tail past the parameter's end is padding.
    """
    init._zero_init_param(parameter)
    piece: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return piece


def attach(model: nn.Module, blocks: Sequence[nn.Module], *, prefetch_elements: int) -> None:
    """Install the gather and release hooks, each block a leaf.

    Args:
        model: all parameters partitioned already, all buffers on the device.
        blocks: the transformer blocks.
        prefetch_elements: storage elements that may be gathered ahead of use. 0 on CPU; on a GPU one block.
    """
    set_z3_leaf_modules(model, sorted({type(block) for block in blocks}, key=lambda cls: cls.__name__))
    deepspeed.initialize(model=model, config=_config(prefetch_elements=prefetch_elements))


def held(parameter: nn.Parameter) -> Tensor:
    """What this rank stores of a parameter for good: its slice, or all of it where nothing is sharded."""
    piece: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return piece


def held_bytes(model: nn.Module) -> int:
    """Bytes of all that this rank stores of the base's parameters."""
    return sum(held(parameter).nbytes for parameter in model.parameters())


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of weights that are gathered, or on their way, at this moment. 0 between passes."""
    return sum(
        getattr(parameter, "ds_numel", 0) * parameter.element_size()
        for parameter in model.parameters()
        if getattr(parameter, "ds_status", ZeroParamStatus.NOT_AVAILABLE) is not ZeroParamStatus.NOT_AVAILABLE
    )


def live_digest(model: nn.Module) -> str:
    """sha256 over every byte of the base that this rank holds now: slices and buffers. For tests and audits."""
    hasher = hashlib.sha256()
    for name, tensor in (*((n, held(p)) for n, p in model.named_parameters()), *model.named_buffers()):
        hasher.update(name.encode())
        hasher.update(raw_bytes(tensor.cpu()))
    return hasher.hexdigest()
