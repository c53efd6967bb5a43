"""FlexAttention over a packed row: torch's block-sparse kernel, which on CUDA never makes the scores.

The other way through `base.attention`, with the same results. Each adapter's prompt and examples stand together here
and begin a block of their own, so that no block holds tokens of two adapters: the kernel multiplies whole blocks and
takes out afterwards what a mask hides, and 0 * NaN would carry one adapter's overflow into another. Which of the two
ways a base may take is `base.flex_exactness`.

What a token sees is two runs of places: its own part up to itself, and its prompt or prefix. Windows only move where
the runs begin, so that all kinds of layers, rows and steps share one compiled kernel.

Source: Dong et al. 2024, arXiv:2412.05496.

Shapes:  T tokens of the row   U places of queries, a multiple of BLOCK   W places of keys: U, then those of prefixes
         A heads   G key heads   D head size
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
"""Places of a block. The kernel's own tiles divide it on every device."""
_WHOLE = 2**30
"""As far back as any row reaches."""
_FEWEST_BLOCKS = 2
"""Of queries: torch.compile makes a second kernel for sizes of 1."""
_MOST_KERNELS = 64
"""Of one process: kinds of layers, with and without gradients, bases. torch stops at 8, with an error."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a packed row stand for the kernel, and which places each of them sees."""

    queries_U: Tensor
    """Token of each place. Padding holds its own group's first token, sees itself alone, and is read by nobody."""
    keys_W: Tensor
    """The same for keys and values; tokens of prefixes count on from T."""
    back_T: Tensor
    """Place of each token."""
    own_U: Tensor
    """First place of the part that the token belongs to."""
    head_U: Tensor
    """First place of its prompt or prefix among the keys, and where that ends; equal for whoever has none."""
    head_end_U: Tensor
    position_U: Tensor
    """The token's own position: behind a prompt of P tokens a text begins at P."""
    _masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def mask(self, window: int | None) -> BlockMask:
        """What one kind of layer sees, made at its first use."""
        if window not in self._masks:
            self._masks[window] = self._make(window)
        return self._masks[window]

    def _make(self, window: int | None) -> BlockMask:
        back = _WHOLE if window is None else window - 1
        at_U = torch.arange(len(self.own_U), device=self.own_U.device, dtype=torch.int32)
        own_U = torch.maximum(self.own_U, at_U - back)
        end_U = self.head_end_U.clone()  # new like the others: to the compiler a view is another kind of argument
        head_U = torch.minimum(self.head_U + (self.position_U - back).clamp_min(0), end_U)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_own = (key >= own_U[query]) & (key <= query)
            return is_own | ((key >= head_U[query]) & (key < end_U[query]))

        # Blocks that hold anything seen. None is marked as seen whole, which would spare the kernel its mask there.
        block_B = torch.arange(len(self.keys_W) // BLOCK, device=own_U.device)
        is_own_UB = ((own_U // BLOCK)[:, None] <= block_B) & (block_B <= (at_U // BLOCK)[:, None])
        is_head_UB = ((head_U // BLOCK)[:, None] <= block_B) & (block_B <= ((end_U - 1) // BLOCK)[:, None])
        seen_QB = (is_own_UB | (is_head_UB & (head_U < end_U)[:, None])).unflatten(0, (-1, BLOCK)).any(1)
        first_seen_QB = seen_QB.int().argsort(dim=1, descending=True, stable=True)
        return BlockMask.from_kv_blocks(
            seen_QB.sum(1, dtype=torch.int32)[None, None],
            first_seen_QB.int()[None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(len(own_U), len(self.keys_W)),
        )


def place(
    prompt_lengths: Sequence[int],
    example_lengths: Sequence[int],
    owners: Sequence[int],
    prefix_lengths: Sequence[int],
    *,
    device: torch.device,
) -> Places:
    """Give every token of a row its place. Arguments as of `attention.layout`."""
    num_prompts, lengths = len(prompt_lengths), [*prompt_lengths, *example_lengths]
    firsts = list(accumulate([*lengths, *prefix_lengths], initial=0))  # tokens; of prompts, examples, prefixes
    groups = {owner: [owner] for owner, length in enumerate(prompt_lengths) if length}
    for part, owner in enumerate(owners, start=num_prompts):
        groups.setdefault(owner, []).append(part)
    ends = list(accumulate(_aligned(sum(lengths[part] for part in parts)) for parts in groups.values()))
    ends[-1] = max(ends[-1], _FEWEST_BLOCKS * BLOCK)
    prefix_starts = list(accumulate(map(_aligned, prefix_lengths), initial=ends[-1]))
    tokens, own, head, head_end, position = (list[int]() for _ in range(5))
    back = [0] * sum(lengths)
    for (owner, parts), end in zip(groups.items(), ends, strict=True):
        is_prefix = owner >= num_prompts
        head_at = prefix_starts[owner - num_prompts] if is_prefix else len(tokens)
        head_length = prefix_lengths[owner - num_prompts] if is_prefix else prompt_lengths[owner]
        for part in parts:
            first, num, at = firsts[part], lengths[part], len(tokens)
            ahead = 0 if part < num_prompts else head_length
            back[first : first + num] = range(at, at + num)
            tokens += range(first, first + num)
            own += [at] * num
            head += [head_at] * num
            head_end += [head_at + ahead] * num
            position += range(ahead, ahead + num)
        padding = range(len(tokens), end)
        tokens += [firsts[parts[0]]] * len(padding)
        own += padding
        head += padding
        head_end += padding
        position += [0] * len(padding)
    keys = list(tokens)
    for first, num in zip(firsts[len(lengths) :], prefix_lengths, strict=False):
        keys += [*range(first, first + num), *[first] * (_aligned(num) - num)]
    columns_5U = torch.tensor([tokens, own, head, head_end, position], dtype=torch.int32).to(device)
    queries_U, own_U, head_U, head_end_U, position_U = columns_5U.unbind()
    keys_W = torch.tensor(keys, dtype=torch.int32).to(device) if prefix_lengths else queries_U
    return Places(queries_U, keys_W, torch.tensor(back).to(device), own_U, head_U, head_end_U, position_U)


def _aligned(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def attend(
    query_TAD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    places: Places,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks_A: Tensor | None,
) -> Tensor:
    """Attention of a packed row, (T, A, D). Keys and values of prefixes stand behind those of the row.

    Any error of torch's compiler passes through: what it cannot compile here is left to the other kernel.
    """
    query, key, value = (
        states.index_select(0, index).transpose(0, 1)[None]
        for states, index in ((query_TAD, places.queries_U), (key_SGD, places.keys_W), (value_SGD, places.keys_W))
    )

    def capped(score: Tensor, batch: Tensor, head: Tensor, at_query: Tensor, at_key: Tensor) -> Tensor:
        assert softcap is not None
        return torch.tanh(score / softcap) * softcap

    result = _compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=places.mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks_A is None else AuxRequest(lse=True),
    )
    if sinks_A is None:
        out: Tensor = result
    else:  # one more key that takes weight and gives nothing: the others keep their share of the whole sum
        out, (lse, _) = result
        share = torch.sigmoid(lse - sinks_A.reshape(1, -1, 1).to(lse.dtype))
        out = (out * share[..., None]).to(query.dtype)
    return out[0].transpose(0, 1).index_select(0, places.back_T)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """torch's kernel, compiled at its first call, once for all lengths of rows.

    Whole, because a graph that breaks runs flex_attention uncompiled: correct, with every score in memory, and without
    a word. Numbers (scaling, cap) are constants of the kernel, because symbolic ones are such a break. Sizes that are
    equal in the first row by chance, as those of its blocks and heads may be, are not taken for one.
    """
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    with_constants = torch._dynamo.config.patch(specialize_float=True, recompile_limit=_MOST_KERNELS)
    with_own_sizes = shape_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    return with_own_sizes(with_constants(compiled))  # type: ignore[no-any-return]
