"""On a CUDA device: the frozen layers and the whole pass agree with the CPU, and the base's memory is the packed one.

pytest -m gpu tests/gpu
"""

from pathlib import Path

import pytest
import tiny
import torch

from peftscale import adapters
from peftscale.base import linear, load
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.train import step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _frozen(weight_OI: torch.Tensor, quantization: str, device: str, dtype: torch.dtype) -> linear.FrozenLinear:
    rows, cols = weight_OI.shape
    layer = linear.build(rows, cols, bias=False, compute_dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    if quantization == "none":
        layer.weight = torch.nn.Parameter(weight_OI.to(device, dtype), requires_grad=False)
    else:
        blob = linear.pack_weight(weight_OI, quantization)  # type: ignore[arg-type]
        layer.blob = torch.nn.Parameter(blob.to(device), requires_grad=False)
    return layer


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_frozen_layer_on_cuda_gives_the_cpus_product_and_gradient(quantization: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 160, generator=draw) * 0.05
    results = []
    for device in ("cpu", "cuda"):
        layer = _frozen(weight_OI, quantization, device, torch.float32)
        x = torch.randn(7, 160, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        product = layer(x)
        product.square().sum().backward()
        assert x.grad is not None
        results.append((product.detach().cpu(), x.grad.cpu()))
    for cpu, cuda in zip(*results, strict=True):
        assert float((cuda - cpu).norm() / cpu.norm()) < 1e-3  # TF32 may be on; float32 proper is 1e-6


def test_the_gradient_of_a_bfloat16_nf4_base_on_cuda_is_that_of_float32_on_cpu(tmp_path: Path) -> None:
    grads = []
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        cfg = tiny.run_config(tmp_path, **{"base.compute_dtype": dtype})
        base = load.load(cfg.base, sharding="replicated", device=torch.device(device))
        cohort = adapters.build(cfg, base)
        items = training_items("mood", 5, tasks.load(cfg.task, base.tokenizer, max_tokens=100).train)
        step.gradient(base, cohort, items, microbatch_tokens=256)
        grad = cohort["mood"].rows_PH.grad
        assert grad is not None
        grads.append(grad.float().cpu())
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.1  # bfloat16 has 8 bits


def test_a_loaded_base_holds_its_packed_bytes_on_the_device(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{"base.compute_dtype": "bfloat16"})
    before = torch.cuda.memory_allocated()
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cuda"))
    held = sum(parameter.nbytes for parameter in base.model.parameters())
    assert held <= torch.cuda.memory_allocated() - before < held + 64 * 1024 * len(list(base.model.parameters()))
    assert all(tensor.device.type == "cuda" for tensor in (*base.model.parameters(), *base.model.buffers()))
