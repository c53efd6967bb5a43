"""The padded pass: one row an example, its prompt in front, zeros behind, through the frozen base.

The reference path: exact for every decoder-only family, because a causal model never sees what stands behind.
Logits are made at target positions only, so that a large vocabulary costs nothing for tokens without a loss.
The faster pass is `base.packed`; which one a base takes is `base.passes`.

Shapes:  N rows   P virtual tokens   T text tokens   S longest row   H hidden size   M target tokens   V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from peftscale.base import attention, prefixed
from peftscale.base.load import Base
from peftscale.errors import ModelError


@dataclass(frozen=True, slots=True)
class Row:
    """One example on its way through the base."""

    prompt_PH: Tensor | None
    """Virtual tokens, float32, or None for the base alone."""
    ids: Sequence[int]
    """Text tokens, the targets last. Not empty before the targets unless there is a prompt."""
    num_targets: int
    prefix_L2PKD: Tensor | None = None
    """Keys and values of every layer, float32, instead of a prompt. Passes must be packed, or the base be an
    encoder-decoder."""
    decoder_prompt_QH: Tensor | None = None
    """Virtual tokens in front of the decoder's input of an encoder-decoder base, float32."""
    among: Sequence[int] = ()
    """The tokens that the first target is one of, where its likelihood is to be that among them."""


def join(
    rows: Sequence[Row], embedding: nn.Module, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Turn rows into what the model's forward takes.

    Returns:
        Embeddings (N, S, H) in `dtype`, flat positions (M,) in (N, S) that predict the targets, and no further
        arguments of the forward.

    Raises:
        ModelError: a row with a prefix.
    """
    if any(row.prefix_L2PKD is not None for row in rows):
        raise ModelError(
            "a prefix needs packed passes, and this base takes padded ones. Set train.packing to auto, choose a base "
            "for which packing is exact, or use a prompt."
        )
    embeds_NSH, starts = _embed(rows, embedding, dtype, device)
    width = embeds_NSH.shape[1]
    at: list[int] = []
    for i, row in enumerate(rows):
        first = i * width + starts[i] + len(row.ids) - row.num_targets - 1  # a position predicts the next token
        at.extend(range(first, first + row.num_targets))
    return embeds_NSH, torch.tensor(at, device=device), {}


def target_logits(base: Base, rows: Sequence[Row]) -> Tensor:
    """Logits that predict each target token, (M, V) float32, row after row. See `passes.target_logits`."""
    embeds_NSH, at_M, arguments = join(rows, base.model.get_input_embeddings(), base.compute_dtype, base.device)
    return logits_at(base.model, embeds_NSH, at_M, **arguments)


def generate(base: Base, rows: Sequence[Row], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[list[int]]:
    """Greedy continuation of every row, up to the end-of-sequence token (left out), `max_new_tokens`, or soon behind
    one of the texts of `stop` (none empty; what stands behind it has no meaning).

    Every rank calls this equally often and with the same `max_new_tokens`; one without rows generates along and
    returns nothing. A row that has ended goes on until the last one of all ranks has, so each of them must have
    `max_new_tokens` positions left.

    Rows with a prefix share one, all of them; where the base has layers with a window their texts are of one length
    (`generates_with` tells rows that may go together), because padding stands between the prefix and a shorter text.
    """
    eos = base.tokenizer.eos_token_id
    going = rows or [Row(None, [eos or 0], 0)]
    embeds_NSH, starts = _embed(going, base.model.get_input_embeddings(), base.compute_dtype, base.device)
    blanks = [embeds_NSH.shape[1] - start - len(row.ids) for row, start in zip(going, starts, strict=True)]
    # Left padding: generation appends on the right.
    padded_NSH = torch.stack([row_SH.roll(num, dims=0) for row_SH, num in zip(embeds_NSH, blanks, strict=True)])
    at_S = torch.arange(embeds_NSH.shape[1], device=base.device)
    mask_NS = torch.stack([at_S >= num for num in blanks]).long()
    cached: dict[str, Any] = {}
    if (prefix := going[0].prefix_L2PKD) is not None:
        assert all(row.prefix_L2PKD is prefix for row in going)
        assert not any(blanks) or not prefixed.has_window(base.model.config)
        cached["past_key_values"] = prefixed.cache_of(prefix, len(going), base.compute_dtype)
        # generate cuts as many positions off the front as the cache holds.
        padded_NSH = nn.functional.pad(padded_NSH, (0, 0, prefix.shape[2], 0))
        mask_NS = nn.functional.pad(mask_NS, (prefix.shape[2], 0), value=1)
    with torch.no_grad(), attention.original(base.model, base.own_attention):
        ids_NT = base.model.generate(
            inputs_embeds=padded_NSH,
            attention_mask=mask_NS,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=eos,
            pad_token_id=base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else eos,
            synced_gpus=base.is_sharded,
            **stopping(base, stop),
            **cached,
        )
    lists: list[list[int]] = ids_NT.tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in lists[: len(rows)]]


def stopping(base: Base, stop: Sequence[str]) -> dict[str, Any]:
    """The arguments of transformers' generate that end a row behind one of these texts."""
    return {"stop_strings": list(stop), "tokenizer": base.tokenizer} if stop else {}


def generates_with(base: Base, row: Row) -> tuple[int, int]:
    """What rows of one call of `generate` have in common: the prefix, and its text's length where that matters."""
    if row.prefix_L2PKD is None:
        return 0, 0
    return id(row.prefix_L2PKD), len(row.ids) if prefixed.has_window(base.model.config) else 0


def _embed(
    rows: Sequence[Row], embedding: nn.Module, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Rows (N, S, H), zeros behind, and where each row's text starts.

    One call of the embedding for all rows: it is a gather when the base is sharded.
    """
    ids_NT = pad_sequence([torch.tensor(list(row.ids)) for row in rows], batch_first=True).to(device)
    with torch.no_grad():
        text_NTH = embedding(ids_NT).to(dtype)
    joined, starts = [], []
    for row, text_TH in zip(rows, text_NTH, strict=True):
        prompt = () if row.prompt_PH is None else (row.prompt_PH.to(dtype),)  # a cast a row: their gradients are
        joined.append(torch.cat([*prompt, text_TH[: len(row.ids)]]))  # summed in float32
        starts.append(0 if row.prompt_PH is None else len(row.prompt_PH))
    return pad_sequence(joined, batch_first=True), starts


def logits_at(model: PreTrainedModel, embeds_NSH: Tensor | None, at_M: Tensor, **arguments: Any) -> Tensor:
    """Logits (M, V) float32 at flat positions of (N, S). Only those reach the head; the model's scaling and caps act.

    Args:
        embeds_NSH: the input; None where it is among the arguments, as ids.
        arguments: for the model's forward, beside the embeddings.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_NSH = args[0]
        return (hidden_NSH.flatten(0, 1)[at_M][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits_1MV: Tensor = model(inputs_embeds=embeds_NSH, use_cache=False, **arguments).logits
    finally:
        hook.remove()
    return logits_1MV[0].float()
