"""Attention over a packed row [prompt_1 .. prompt_K | example_1 .. example_N]: each prompt once, nothing padded.

In a causal decoder a soft prompt sees itself alone, so its keys and values are the same for every example behind it.
The layout of a row is made once a pass and travels to every layer through the model's keyword arguments; the function
is registered with transformers' attention registry. Making the row and the logits is `base.packed`, deciding whether a
model may use it is `base.exactness`.

A prefix adds no token to the row: the keys and values of each layer stand behind the row's own, outside of every
example but those that it belongs to.

There are two ways, with equal results: the row is cut into a batch for torch's own attention, which runs anywhere, or
it stays whole for `base.flex`, on CUDA.

Grouped queries, sliding windows, logit caps and sinks are those of the model's own layers, relative to an example's
own positions: behind a prompt or a prefix of P tokens its text begins at P, as in the padded row.

Shapes:  T tokens of the row   K prompts   P longest prompt   N examples   E longest example   A heads   D head size
         L layers   F virtual tokens of all prefixes   G key heads   S keys: of an example, or T + F
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from peftscale.base import flex

NAME = "peftscale_packed"
FLEX = "peftscale_packed_flex"
HIDDEN = 2**30
"""Position of a key that nobody sees."""
_calls = [0]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed row stand, and who sees whom."""

    prompt_lengths: tuple[int, ...]
    example_lengths: tuple[int, ...]
    owners: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    positions_1T: Tensor
    """Each token's own position: prompts from 0, an example from the length of its prompt."""
    prompts_KP: Tensor
    """Index into the row, of prompts that have a token; padding points at the part's own first token and is masked."""
    examples_NE: Tensor
    keys_NS: Tensor
    """The prompt's or prefix's, then the example's own; S = P + E. Those of prefixes count on from T."""
    back_T: Tensor
    """Where each token of the row stands in the outputs [K * P | N * E]."""
    queries_at_NE: Tensor
    """Own positions of the examples' tokens, and of their keys: HIDDEN where those are padding."""
    keys_at_NS: Tensor
    keys_at_KP: Tensor
    prefixes: tuple[Tensor, ...] = ()
    """For each layer (2, F, G, D), keys and values of all prefixes; empty where there is none."""
    _masks: dict[tuple[int | None, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.positions_1T.shape[1])

    def masks(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Additive masks (K, 1, P, P) and (N, 1, E, S) of one kind of layer, made at its first use."""
        key = (window, dtype)
        if key not in self._masks:
            made = []
            queries_at_1P = torch.arange(self.keys_at_KP.shape[1], device=self.keys_at_KP.device)[None]
            for queries_at, keys_at in ((queries_at_1P, self.keys_at_KP), (self.queries_at_NE, self.keys_at_NS)):
                distance = queries_at[:, :, None] - keys_at[:, None, :]
                sees = distance >= 0
                if window is not None:
                    sees &= distance < window
                mask = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
                # A padded query sees nothing: finite, so that its row is a mean of something and not NaN.
                made.append(mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None])
            self._masks[key] = (made[0], made[1])
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
    prompt_K, example_N = torch.tensor(prompt_lengths), torch.tensor(example_lengths)
    owner_N = torch.tensor(owners)
    starts = torch.cat([prompt_K, example_N]).cumsum(0) - torch.cat([prompt_K, example_N])
    prompt_starts, example_starts = starts[: len(prompt_K)], starts[len(prompt_K) :]
    there = prompt_K > 0
    prompts_KP, prompt_ok = _grid(prompt_starts[there], prompt_K[there])
    examples_NE, example_ok = _grid(example_starts, example_N)
    prefix_lengths = [prefix.shape[2] for prefix in prefixes_L2PGD]
    ends = torch.tensor([int(prompt_K.sum() + example_N.sum()), *prefix_lengths]).cumsum(0)
    head_lengths = [*prompt_lengths, *prefix_lengths]
    ahead_N = torch.tensor(head_lengths)[owner_N][:, None]
    h_P, e_E = torch.arange(int(ahead_N.max())), torch.arange(int(example_N.max()))
    behind_NP = h_P < ahead_N
    head_starts_N1 = torch.cat([prompt_starts, ends[:-1]])[owner_N][:, None]
    head_keys_NP = torch.where(behind_NP, head_starts_N1 + h_P, example_starts[:, None])
    queries_at_NE = ahead_N + e_E
    keys_at_NS = torch.cat([h_P.expand(len(owner_N), -1), queries_at_NE], dim=1)
    keys_at_NS = keys_at_NS.masked_fill(~torch.cat([behind_NP, example_ok], dim=1), HIDDEN)
    keys_at_KP = torch.arange(int(prompt_K.max())).masked_fill(~prompt_ok, HIDDEN)
    positions = [torch.arange(n) for n in prompt_lengths]
    positions += [head_lengths[k] + torch.arange(n) for k, n in zip(owners, example_lengths, strict=True)]
    return Layout(
        tuple(prompt_lengths),
        tuple(example_lengths),
        tuple(owners),
        tuple(prefix_lengths),
        torch.cat(positions)[None].to(device),
        prompts_KP.to(device),
        examples_NE.to(device),
        torch.cat([head_keys_NP, examples_NE], dim=1).to(device),
        torch.cat([prompt_ok.flatten(), example_ok.flatten()]).nonzero()[:, 0].to(device),
        queries_at_NE.to(device),
        keys_at_NS.to(device),
        keys_at_KP.to(device),
        # One join for all layers: a slice a layer would make a gradient of the whole for each of them.
        torch.cat(list(prefixes_L2PGD), dim=2).unbind(0) if prefixes_L2PGD else (),
    )


def _grid(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices of parts, padded to the longest, and which of them are real.

    Padding points at the part's own first token: what is not finite in one adapter must not reach another, and even
    a value that a mask takes out would, as 0 * NaN in backward.
    """
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0)
    is_real = steps[None] < lengths[:, None]
    return torch.where(is_real, starts[:, None] + steps, starts[:, None]), is_real


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
    assert layout is not None, "a packed base was passed a row without a layout"
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
    prompt_mask, example_mask = layout.masks(sliding_window, query.dtype)
    parts = []
    for at, keys_at, mask in (
        (layout.prompts_KP, layout.prompts_KP, prompt_mask),
        (layout.examples_NE, layout.keys_NS, example_mask),
    ):
        if at.numel():
            q, k, v = (
                _take(states, index) for states, index in ((query_TAD, at), (key_SAD, keys_at), (value_SAD, keys_at))
            )
            out = _attend(q, k, v, mask, scaling=scaling, softcap=softcap, sinks_A=s_aux)
            parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[layout.back_T][None], None


def _take(states_TAD: Tensor, index_NS: Tensor) -> Tensor:
    """(N, heads, S, D)."""
    picked = states_TAD.index_select(0, index_NS.flatten())
    return picked.view(*index_NS.shape, *picked.shape[1:]).transpose(1, 2)


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
