"""Prefixes in an encoder-decoder base: keys and values that take the places of empty positions, in every layer.

A row with a prefix of P tokens has P empty positions in front of its text and of its target. What the layers compute
there is thrown away: in each of them the prefix's keys and values stand at these places, in the encoder's attention, in
the decoder's own, and in the cross attention, which looks at the encoder's places. So masks and relative positions are
those that the model gives to any token in front, and no cache is needed. Making the row is `base.encoder_decoder`;
decoder-only bases take prefixes through `base.attention`.

Source: Li and Liang 2021, arXiv:2101.00190, section 4 (PREFIX on encoder and decoder).

Shapes:  N rows   F prefixes   P longest prefix   S keys   L layers of all three kinds   K heads   D head size
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "peftscale_slots"
FAMILIES = ("t5", "mt5")
"""Model types whose attention modules are told apart as `_layer` does."""


class Slots:
    """The prefixes of one pass, and where they stand."""

    def __init__(self, prefixes: Sequence[Tensor | None], parts: tuple[int, ...]) -> None:
        """
        Args:
            prefixes: of each row (L, 2, P, K, D) float32, at least one; rows with the same one share the very tensor.
            parts: as in `PrefixShape`.
        """
        own = {id(prefix): prefix for prefix in prefixes if prefix is not None}
        first = next(iter(own.values()))
        padded_FPL2KD = pad_sequence([prefix.movedim(2, 0) for prefix in own.values()], batch_first=True)
        # One unbinding for all layers: a slice a layer would make a gradient of the whole for each of them.
        self._layers = padded_FPL2KD.permute(2, 3, 0, 4, 1, 5).unbind(0)  # L x (2, F, K, P, D)
        places = {key: place for place, key in enumerate(own)}
        self._of_row_N = torch.tensor([places.get(id(prefix), 0) for prefix in prefixes], device=first.device)
        lengths_N1 = torch.tensor([[0 if p is None else p.shape[2]] for p in prefixes], device=first.device)
        at_P = torch.arange(padded_FPL2KD.shape[1], device=first.device)
        self._is_slot_N1P1 = (at_P < lengths_N1)[:, None, :, None]
        self._parts = parts

    def put(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, K, S, D) with the prefixes at their places."""
        layer = _layer(module, self._parts)
        # The cast is a row's own: their gradients are summed in float32.
        prefix_2NKPD = self._layers[layer].index_select(1, self._of_row_N).to(key.dtype)
        width = prefix_2NKPD.shape[3]
        keys, values = (
            torch.cat([torch.where(self._is_slot_N1P1, prefix, states[:, :, :width]), states[:, :, width:]], dim=2)
            for prefix, states in zip(prefix_2NKPD, (key, value), strict=True)
        )
        return keys, values


class Recorder:
    """Keeps the keys and values that each attention computes, without changing any."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        self._parts = parts
        self._found: dict[int, Tensor] = {}

    def put(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Slots`."""
        layer = _layer(module, self._parts)
        self._found[layer] = torch.stack([key[0], value[0]]).transpose(1, 2)
        return key, value

    @property
    def keys_values_L2PKD(self) -> Tensor:
        """Of the one row that was passed, all layers."""
        return torch.stack([self._found[layer] for layer in range(sum(self._parts))])


def _layer(module: nn.Module, parts: tuple[int, ...]) -> int:
    """Which of the prefix's layers an attention is: the encoder's come first, then the decoder's own, then cross."""
    place = (1 if module.is_causal else 2) if module.is_decoder else 0
    return sum(parts[:place]) + cast(int, module.layer_idx)


def slotted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: Slots | Recorder | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled-dot-product attention, with prefixes at their places."""
    if slots is not None:
        key, value = slots.put(module, key, value)
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    return out


def install(model: PreTrainedModel) -> None:
    """Make every attention of encoder and decoder use the function, also when a block is computed again. A model
    without prefixes in its passes does not notice."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = NAME


@contextmanager
def handed(model: PreTrainedModel, slots: Slots | Recorder | None) -> Iterator[None]:
    """Hand `slots` to encoder and decoder for the length of the block, past callers that know no such argument."""

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "slots": slots}

    hooks = [
        part.register_forward_pre_hook(add, with_kwargs=True) for part in (model.get_encoder(), model.get_decoder())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


AttentionInterface.register(NAME, slotted_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
