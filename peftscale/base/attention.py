"""Attention over a packed row [prompt_1 .. prompt_K | example_1 .. example_N]: each prompt once, nothing padded.

In a causal decoder a soft prompt sees itself alone, so its keys and values are the same for every example behind it.
The layout of a row is made once a pass and travels to every layer through the model's keyword arguments; the function
is registered with transformers' attention registry. Making the row and the logits is `base.packed`, deciding whether a
model may use it is `base.exactness`.

A prefix adds no token to the row: the keys and values of each layer stand behind the row's own, outside of every
example but those that it belongs to.

There are two ways, with equal results: the row is cut into batches of parts of like lengths for torch's own attention,
which runs anywhere, or it stays whole for `base.flex`, on CUDA.

Grouped queries, sliding windows, logit caps and sinks are those of the model's own layers, relative to an example's
own positions: behind a prompt or a prefix of P tokens its text begins at P, as in the padded row.

Shapes:  T tokens of the row   N parts of a batch   E the longest of them   S its keys   A heads   D head size
         L layers   F virtual tokens of all prefixes   G key heads   P virtual tokens of one
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from peftscale.base import flex
from peftscale.errors import ModelError

NAME = "peftscale_packed"
FLEX = "peftscale_packed_flex"
HIDDEN = 2**30
"""Position of a key that nobody sees."""
LENGTH_STEP = 1.25
"""Parts whose lengths differ by less than about this factor are one batch: its square is what padding may cost."""
_calls = [0]


@dataclass(frozen=True)
class Batch:
    """Prompts, or examples, of like lengths: where in the row they stand, padded to the longest."""

    queries_NE: Tensor
    """Index into the row; padding points at the part's own first token and is masked."""
    keys_NS: Tensor
    """The prompt's or prefix's, then the part's own. Those of prefixes count on from T."""
    queries_at_NE: Tensor
    """Own positions, and those of the keys: HIDDEN where these are padding."""
    keys_at_NS: Tensor

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask (N, 1, E, S) of one kind of layer."""
        distance = self.queries_at_NE[:, :, None] - self.keys_at_NS[:, None, :]
        sees = distance >= 0
        if window is not None:
            sees &= distance < window
        mask = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
        # Finite, so that a row without anything to see is a mean of something and not NaN; nobody reads padded queries.
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed row stand, and who sees whom."""

    prompt_lengths: tuple[int, ...]
    example_lengths: tuple[int, ...]
    owners: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    positions_1T: Tensor
    """Each token's own position: prompts from 0, an example from the length of its prompt."""
    batches: tuple[Batch, ...]
    back_T: Tensor
    """Where each token of the row stands in the outputs of the batches, one after the other."""
    prefixes: tuple[Tensor, ...] = ()
    """For each layer (2, F, G, D), keys and values of all prefixes; empty where there is none."""
    _masks: dict[tuple[int | None, torch.dtype], tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.positions_1T.shape[1])

    def masks(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Those of the batches for one kind of layer, made at its first use."""
        key = (window, dtype)
        if key not in self._masks:
            self._masks[key] = tuple(batch.mask(window, dtype) for batch in self.batches)
        return self._masks[key]

    @cached_property
    def places(self) -> flex.Places:
        """The same for `base.flex`, made at its first use."""
        return flex.place(
            self.prompt_lengths,
            self.example_lengths,
            self.owners,
            self.prefix_lengths,
            device=self.positions_1T.device,
        )


def layout(
    prompt_lengths: Sequence[int],
    example_lengths: Sequence[int],
    owners: Sequence[int],
    *,
    device: torch.device,
    prefixes_L2PGD: Sequence[Tensor] = (),
) -> Layout:
    """Lay out a row.

    Args:
        prompt_lengths: of each prompt, in the order of the row. 0 for none.
        example_lengths: of each example, at least 1.
        owners: which prompt each example stands behind; numbers behind the last prompt are prefixes.
        device: of the row.
        prefixes_L2PGD: in the row's dtype, P of any length.
    """
    lengths = [*prompt_lengths, *example_lengths]
    starts = [0, *itertools.accumulate(lengths)]
    prefix_lengths = [prefix.shape[2] for prefix in prefixes_L2PGD]
    # What stands ahead of a part: nothing of a prompt, of an example its prompt or prefix.
    head_starts = starts[: len(prompt_lengths)]
    head_starts += itertools.accumulate(prefix_lengths[:-1], initial=starts[-1]) if prefix_lengths else []
    head_lengths = [*prompt_lengths, *prefix_lengths]
    ahead = [(0, 0)] * len(prompt_lengths) + [(head_starts[owner], head_lengths[owner]) for owner in owners]
    parts = [(*head, start, length) for head, start, length in zip(ahead, starts[:-1], lengths, strict=True)]
    alike: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for part in parts:
        if part[3]:
            alike.setdefault((_step(part[1]), _step(part[3])), []).append(part)
    batches = [_batch(torch.tensor(group)) for _, group in sorted(alike.items())]
    rows = torch.cat([torch.where(is_real, batch.queries_NE, -1).flatten() for batch, is_real in batches])
    return Layout(
        tuple(prompt_lengths),
        tuple(example_lengths),
        tuple(owners),
        tuple(prefix_lengths),
        torch.cat([length + torch.arange(n) for _, length, _, n in parts])[None].to(device),
        tuple(Batch(*(getattr(batch, f.name).to(device) for f in fields(batch))) for batch, _ in batches),
        # The padding's -1 come first in the order of rows.
        rows.argsort(stable=True)[-starts[-1] :].to(device),
        # One join for all layers: a slice a layer would make a gradient of the whole for each of them.
        torch.cat(list(prefixes_L2PGD), dim=2).unbind(0) if prefixes_L2PGD else (),
    )


def _step(length: int) -> int:
    return math.ceil(math.log(length, LENGTH_STEP)) if length else -1


def _batch(parts_N4: Tensor) -> tuple[Batch, Tensor]:
    """A batch of parts (start and length of what is ahead, start and length), and which of its queries are real.

    Padding points at the part's own first token: what is not finite in one adapter must not reach another, and even
    a value that a mask takes out would, as 0 * NaN in backward.
    """
    ahead_starts, ahead, starts, lengths = parts_N4[:, :, None].unbind(1)
    h_P, e_E = torch.arange(int(ahead.max())), torch.arange(int(lengths.max()))
    is_ahead, is_real = h_P < ahead, e_E < lengths
    queries_NE = torch.where(is_real, starts + e_E, starts)
    keys_NS = torch.cat([torch.where(is_ahead, ahead_starts + h_P, starts), queries_NE], dim=1)
    queries_at_NE = ahead + e_E
    keys_at_NS = torch.cat([h_P.expand(len(parts_N4), -1), queries_at_NE], dim=1)
    keys_at_NS = keys_at_NS.masked_fill(~torch.cat([is_ahead, is_real], dim=1), HIDDEN)
    return Batch(queries_NE, keys_NS, queries_at_NE, keys_at_NS), is_real


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_flex: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for a packed row. query, key, value: (1, heads, T, D). Returns (1, T, A, D).

    Dropout is not applied: the base is frozen. `is_flex` is the way that a name of the registry stands for.
    """
    if layout is None:
        raise ModelError("its model does not hand the layout of a packed row on to the attention")
    _calls[0] += 1
    query_TAD, key_SAD, value_SAD = (states[0].transpose(0, 1) for states in (query, key, value))
    if layout.prefixes:
        key_FGD, value_FGD = layout.prefixes[cast(int, module.layer_idx)]
        key_SAD, value_SAD = torch.cat([key_SAD, key_FGD]), torch.cat([value_SAD, value_FGD])
    if is_flex:
        out_TAD = flex.attend(
            query_TAD,
            key_SAD,
            value_SAD,
            layout.places,
            window=sliding_window,
            scaling=scaling,
            softcap=softcap,
            sinks_A=s_aux,
        )
        return out_TAD[None], None
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float32:
        # torch's attention on a CPU takes a multiple of the time in bfloat16, and rounds on top of it.
        query_TAD, key_SAD, value_SAD = query_TAD.float(), key_SAD.float(), value_SAD.float()
    queries, keys = ([getattr(batch, name) for batch in layout.batches] for name in ("queries_NE", "keys_NS"))
    of_batches = zip(
        _taken(query_TAD, queries),
        _taken(key_SAD, keys),
        _taken(value_SAD, keys),
        layout.masks(sliding_window, query_TAD.dtype),
        strict=True,
    )
    outs = []
    for q, k, v, mask in of_batches:
        out = _attend(q, k, v, mask, scaling=scaling, softcap=softcap, sinks_A=s_aux)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[layout.back_T].to(dtype)[None], None


def _taken(states_TAD: Tensor, indices_NS: Sequence[Tensor]) -> Iterator[Tensor]:
    """(N, heads, S, D) of each batch."""
    if states_TAD.requires_grad:
        # All batches at once: each gather makes a gradient of the whole row.
        picked = states_TAD.index_select(0, torch.cat([index.flatten() for index in indices_NS]))
        parts: Iterable[Tensor] = picked.split([index.numel() for index in indices_NS])
    else:  # one after the other, so that the copies of one batch are there at a time
        parts = (states_TAD.index_select(0, index.flatten()) for index in indices_NS)
    for index_NS, part in zip(indices_NS, parts, strict=True):
        yield part.view(*index_NS.shape, *part.shape[1:]).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks_A: Tensor | None,
) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    if softcap is None and sinks_A is None:
        out: Tensor = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
        )
        return out
    if is_grouped:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks_A is not None:  # one more key that takes weight and gives nothing
        sinks = sinks_A.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        return torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def num_calls() -> int:
    """How often the packed attention ran in this process: a model that bypasses the registry never calls it."""
    return _calls[0]


def install(model: PreTrainedModel, name: str = NAME) -> None:
    """Make every layer of `model` use the packed attention from now on, also when a block is computed again: NAME or
    FLEX."""
    model.config._attn_implementation = name


@contextmanager
def original(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """The model's own attention for the length of the block. No backward may follow: a block that is computed again
    looks its attention up again."""
    installed, model.config._attn_implementation = model.config._attn_implementation, name
    try:
        yield
    finally:
        model.config._attn_implementation = installed


AttentionInterface.register(NAME, packed_attention)
AttentionInterface.register(FLEX, partial(packed_attention, is_flex=True))
for _name in (NAME, FLEX):
    AttentionMaskInterface.register(_name, lambda *_, **__: None)
