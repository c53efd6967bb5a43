"""A packed row of random queries, keys and values, and what one way of the packed attention makes of it."""

from typing import Any

import torch
from torch import Tensor, nn

from peftscale.base import attention, exactness

HEAD_DIM = 16
PROMPTS, EXAMPLES, OWNERS = [3, 130, 0], [4, 2, 6, 140, 1], [0, 1, 0, 1, 2]
"""A prompt and an example that fill more than a block, and a text behind nothing."""
PREFIXES, BEHIND_PREFIXES = [5, 131], [3, 4, 0, 1, 2]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"key_heads": 2},
    "narrow window": {"sliding_window": 5},
    "window wider than a block": {"sliding_window": 133},
    "cap": {"softcap": 0.5},
    "sinks": {"s_aux": torch.linspace(-1, 2, 4)},
    "scaling": {"scaling": 0.4},
    "prefixes": {"has_prefixes": True},
    "prefixes with a window": {"has_prefixes": True, "sliding_window": 7},
    "all together": {
        "has_prefixes": True,
        "key_heads": 2,
        "sliding_window": 133,
        "softcap": 0.5,
        "s_aux": torch.linspace(-1, 2, 4),
        "scaling": 0.3,
    },
}


def layer() -> nn.Module:
    """The second layer of a model, as far as the attention looks at it."""
    module = nn.Identity()
    module.layer_idx = 1  # type: ignore[assignment]
    return module


def attended(
    *,
    is_flex: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
    key_heads: int = 4,
    has_prefixes: bool = False,
    s_aux: Tensor | None = None,
    **arguments: Any,
) -> list[Tensor]:
    """Output and gradients in queries, keys, values and prefixes, float32 on the CPU.

    Args:
        dtype: of the computation.
        rounded_to: dtype to which inputs are rounded before, so that two dtypes can start from the same numbers.
    """
    draw = torch.Generator().manual_seed(0)
    prefixes = [torch.randn(2, 2, num, key_heads, HEAD_DIM, generator=draw) for num in PREFIXES if has_prefixes]
    num_tokens = sum(PROMPTS) + sum(EXAMPLES)
    states = [torch.randn(1, heads, num_tokens, HEAD_DIM, generator=draw) for heads in (4, key_heads, key_heads)]
    upstream = torch.randn(1, num_tokens, 4, HEAD_DIM, generator=draw)
    leaves = [
        tensor.to(rounded_to or dtype).to(device, dtype, copy=True).requires_grad_() for tensor in (*states, *prefixes)
    ]
    lay = attention.layout(
        PROMPTS,
        EXAMPLES,
        BEHIND_PREFIXES if has_prefixes else OWNERS,
        device=torch.device(device),
        prefixes_L2PGD=leaves[3:],
    )
    query, key, value = leaves[:3]
    sinks = None if s_aux is None else s_aux.to(device, dtype)
    out, _ = attention.packed_attention(
        layer(), query, key, value, None, layout=lay, is_flex=is_flex, s_aux=sinks, **arguments
    )
    gradients = torch.autograd.grad(out, leaves, upstream.to(rounded_to or dtype).to(device, dtype))
    return [tensor.detach().float().cpu() for tensor in (out, *gradients)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative one."""
    return exactness.largest_error(got, want)


def spoiled(*, device: str = "cpu") -> tuple[set[int], set[int], set[int]]:
    """One of three adapters has a prompt of NaN: its rows, and the rows whose outputs or gradients are not finite."""
    lay = attention.layout([3, 130, 0], [4, 2, 6, 1], [0, 1, 0, 2], device=torch.device(device))
    rows = {*range(3), *range(133, 137), *range(139, 145)}
    states = torch.randn(1, 2, lay.num_tokens, HEAD_DIM)
    states[:, :, :3] = float("nan")
    states = states.to(device).requires_grad_()
    out, _ = attention.packed_attention(layer(), states, states, states, None, layout=lay, is_flex=True)
    out.sum().backward()
    assert states.grad is not None
    bad_outputs = ~out.detach()[0].isfinite().flatten(1).all(1)
    bad_gradients = ~states.grad[0].isfinite().transpose(0, 1).flatten(1).all(1)
    return rows, set(bad_outputs.nonzero()[:, 0].tolist()), set(bad_gradients.nonzero()[:, 0].tolist())
