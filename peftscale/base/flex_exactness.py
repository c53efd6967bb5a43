"""Whether a base may take its packed attention through `base.flex`: compared with the batched way, layer by layer.

That the batched way is what the model means is proved before, by `base.exactness`. Here each layer of the real weights
takes the same queries, keys and values through both ways, on the device and in the dtype of the run, forward and
backward, because the compiled kernel is another one on each device, and a wrong gradient is not seen in the logits. A
base that takes prefixes takes one here.

Shapes:  P virtual tokens   L layers   H hidden size   T tokens of the row, F of prefixes   A heads   K of keys   D size
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from peftscale.base import attention, exactness, packed, prefixed
from peftscale.base.exactness import ROUNDINGS, TOLERANCE
from peftscale.base.load import Base
from peftscale.base.padded import Row, logits_at

_BOTH = "peftscale_packed_both"
_PROMPTS, _TEXTS = (6, 4), (25, 13, 150)  # the long one fills more than a block
_PREFIX = 5
_PARTS = ("outputs", "gradients of queries", "gradients of keys", "gradients of values", "gradients of prefixes")


def flex_differs(base: Base) -> str | None:
    """Compare both ways in every layer; None, or how they differ, or why the one cannot run.

    It is one pass, in which every layer goes on with what the batched way gives. So a rank on which the other fails
    stays in step with the others. Collective when the base is sharded.
    """
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.rand(length, base.hidden_size, generator=draw).sub(0.5).mul(0.1) for length in _PROMPTS]
    longest = (base.max_positions or sum(_TEXTS)) - max(_PROMPTS)
    ids = [torch.randint(0, base.vocab_size, (min(num, longest),), generator=draw).tolist() for num in _TEXTS]
    owners = [prompts[0].to(base.device), prompts[1].to(base.device)]
    rows = [Row(owners[0], ids[0], 1), Row(None, ids[1], 1), Row(owners[1], ids[2], 1), Row(owners[0], ids[1], 1)]
    if exactness.prefix_differs(base.model.config, own_attention=base.own_attention) is None:
        layers, heads, size, _ = prefixed.shape_of(base.model.config)
        prefix_L2PKD = torch.randn(layers, 2, _PREFIX, heads, size, generator=draw).to(base.device)
        rows += [Row(None, ids[0], 1, prefix_L2PKD), Row(None, ids[2], 1, prefix_L2PKD)]
    reasons: list[str] = []
    with base.evaluating(), attention.original(base.model, _BOTH):
        embedding = base.model.get_input_embeddings()
        embeds_1TH, at_M, arguments = packed.join(rows, embedding, base.compute_dtype, base.device)
        logits_at(base.model, embeds_1TH, at_M, **arguments, reasons=reasons)
    return reasons[0] if reasons else None


def _both(module: nn.Module, *states: Tensor, reasons: list[str], **arguments: Any) -> tuple[Tensor, None]:
    """An attention function that tries the flexible way and goes the batched one."""
    if not reasons:
        try:
            reason = _ways_differ(module, states[:3], arguments)
        except Exception as failure:  # whatever torch's compiler raises here: this base takes the other way
            reason = f"it fails ({type(failure).__name__}: {' '.join(str(failure).split())[:200]})"
        if reason is not None:
            reasons.append(f"layer {getattr(module, 'layer_idx', '?')}: {reason}")
    return attention.packed_attention(module, *states, **arguments)


def _ways_differ(module: nn.Module, states: Sequence[Tensor], arguments: dict[str, Any]) -> str | None:
    """How one layer's two ways differ, both measured against float32: three times what the batched one does, or its
    dtype's rounding, is no difference."""
    dtype = states[0].dtype
    exact = _outputs_and_gradients(module, [state.float() for state in states], arguments, is_flex=False)
    batched = _outputs_and_gradients(module, states, arguments, is_flex=False)
    flexible = _outputs_and_gradients(module, states, arguments, is_flex=True)
    for part, want, other, got in zip(_PARTS[: len(exact)], exact, batched, flexible, strict=True):
        size, by_dtype, error = (float(n.norm()) for n in (want, other - want, got - want))
        allowed = max(3 * by_dtype, max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps) * size)
        if not error <= allowed:  # NaN is not
            return f"its {part} differ by {error:.2e}, batched ones by {by_dtype:.2e}, of {size:.2e}"
    return None


def _outputs_and_gradients(
    module: nn.Module, states: Sequence[Tensor], arguments: dict[str, Any], *, is_flex: bool
) -> list[Tensor]:
    leaves = query, key, value = [state.detach().requires_grad_() for state in states]
    if (layout := arguments["layout"]).prefixes:
        prefixes, layer = list(layout.prefixes), int(module.layer_idx)  # type: ignore[arg-type]
        prefixes[layer] = prefix_2FKD = prefixes[layer].detach().to(query.dtype).requires_grad_()
        leaves.append(prefix_2FKD)
        arguments = {**arguments, "layout": dataclasses.replace(layout, prefixes=tuple(prefixes))}
    with torch.enable_grad():
        out_1TAD, _ = attention.packed_attention(module, query, key, value, None, **arguments, is_flex=is_flex)
        draw = torch.Generator(out_1TAD.device).manual_seed(0)
        upstream_1TAD = torch.randn(out_1TAD.shape, generator=draw, device=out_1TAD.device).to(out_1TAD.dtype)
        gradients = torch.autograd.grad(out_1TAD, leaves, upstream_1TAD)
    return [tensor.detach().float() for tensor in (out_1TAD, *gradients)]


AttentionInterface.register(_BOTH, _both)
AttentionMaskInterface.register(_BOTH, lambda *_, **__: None)
