"""What a prefix needs of a base: the shape of its keys and values, those of a text, and a cache that holds a prefix.

In training a prefix enters through `base.attention`, and in an encoder-decoder always through `base.slots`, without a
cache; only generation and the reference of `base.exactness` put it into one. The parameter itself is `adapters.prefix`.

Shapes:  L layers   P virtual tokens   K key heads   D head size   N rows
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from peftscale.base import attention, slots
from peftscale.base.load import Base
from peftscale.base.skeleton import decoder_depth
from peftscale.facts.skeleton import head_dim


class PrefixShape(NamedTuple):
    """What a base and a prefix must agree on."""

    num_layers: int
    """Attention layers: an encoder-decoder base has three kinds of them."""
    num_kv_heads: int
    """Key heads: fewer than query heads where several of those share one."""
    head_dim: int
    parts: tuple[int, ...] = ()
    """Encoder-decoder: how many of the layers are the encoder's, the decoder's own and its cross attention's, which
    follow one another in this order. Empty for a decoder-only base."""

    def __str__(self) -> str:
        of_parts = f" = {' + '.join(map(str, self.parts))}" if self.parts else ""
        return f"({self.num_layers}{of_parts}, {self.num_kv_heads}, {self.head_dim})"

    @property
    def width(self) -> int:
        """Numbers of one virtual token: keys and values of all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim


def shape_of(config: PretrainedConfig) -> PrefixShape:
    """As the config says it. Layers that differ from one another are found out by `exactness.prefix_differs`.

    Raises:
        ModelError: they differ in their heads' size, and transformers says so.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    parts: tuple[int, ...] = ()
    if config.is_encoder_decoder:
        decoder = decoder_depth(config) or text.num_hidden_layers
        parts = (text.num_hidden_layers, decoder, decoder)
    return PrefixShape(
        sum(parts) or text.num_hidden_layers,
        getattr(text, "num_key_value_heads", None) or heads,
        head_dim(text, config.name_or_path or "the base"),
        parts,
    )


def has_window(config: PretrainedConfig) -> bool:
    """Whether some layer sees only so many tokens back."""
    text = config.get_text_config()
    return any(getattr(text, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))


def activations(base: Base, ids: Sequence[int]) -> Tensor:
    """Keys and values that the base computes for a text, in every layer.

    Collective when the base is sharded: every rank calls it with the same `ids`.

    Returns:
        (L, 2, P, K, D) float32 on the base's device, P = len(ids).
    """
    if base.is_encoder_decoder:
        return _recorded(base, ids)
    cache = DynamicCache()  # without a config: with one, layers with a window would forget what is outside of it
    with base.evaluating(), attention.original(base.model, base.own_attention):
        ids_1P = torch.tensor([list(ids)], device=base.device)
        base.model(input_ids=ids_1P, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(layers).transpose(2, 3).float()


def _recorded(base: Base, ids: Sequence[int]) -> Tensor:
    """`activations` of an encoder-decoder: encoder and decoder read the same text."""
    recorder = slots.Recorder(shape_of(base.model.config).parts)
    ids_1P = torch.tensor([list(ids)], device=base.device)
    slots.install(base.model)
    with base.evaluating(), slots.handed(base.model, recorder):
        base.model(input_ids=ids_1P, decoder_input_ids=ids_1P, use_cache=False)
    return recorder.keys_values_L2PKD.float()


def cache_of(prefix_L2PKD: Tensor, num_rows: int, dtype: torch.dtype) -> DynamicCache:
    """A cache that looks as if P tokens with these keys and values had been passed, for every row."""
    rows_L2NKPD = prefix_L2PKD.to(dtype).transpose(2, 3)[:, :, None].expand(-1, -1, num_rows, -1, -1, -1)
    return DynamicCache([(keys, values) for keys, values in rows_L2NKPD])
