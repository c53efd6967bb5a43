"""The pass of an encoder-decoder base: text to the encoder, targets to the decoder, one padded row an example.

The encoder's prompt sees the text, so no two examples share one and nothing can be packed. Virtual tokens of the
decoder stand in front of its start token. Prefixes take empty positions in front of both (`base.slots`). The pass of
decoder-only bases is `base.padded`; which one is taken is `base.passes`.

Shapes:  N rows   S longest text with what stands in front   T longest target with what stands in front
         P virtual tokens   Q virtual tokens of the decoder   H hidden size   M target tokens   V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from peftscale.base import prefixed, slots
from peftscale.base.load import Base
from peftscale.base.padded import Row, logits_at, stopping
from peftscale.errors import ModelError


def join(
    rows: Sequence[Row], model: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Turn rows into what the model's forward takes.

    Returns:
        Embeddings of the encoder (N, S, H) in `dtype`, flat positions (M,) in (N, T) that predict the targets, and the
        further arguments of the forward.
    """
    texts, read = zip(*(sides(row, model) for row in rows), strict=True)
    embedding = model.get_input_embeddings()
    # One call of the embedding for both sides of all rows: it is a gather when the base is sharded.
    both_NTH = _embedded([[*text, *ids] for text, ids in zip(texts, read, strict=True)], embedding, dtype, device)
    encoder = [
        torch.cat([_in_front(row.prompt_PH, row, vectors_TH), vectors_TH[: len(text)]])
        for row, text, vectors_TH in zip(rows, texts, both_NTH, strict=True)
    ]
    decoder = [
        torch.cat([_in_front(row.decoder_prompt_QH, row, vectors_TH), vectors_TH[len(text) : len(text) + len(ids)]])
        for row, text, ids, vectors_TH in zip(rows, texts, read, both_NTH, strict=True)
    ]
    decoder_NTH = pad_sequence(decoder, batch_first=True)
    at: list[int] = []
    for i, (row, ids, side) in enumerate(zip(rows, read, decoder, strict=True)):
        first = i * decoder_NTH.shape[1] + len(side) - len(ids)
        at.extend(range(first, first + row.num_targets))
    arguments: dict[str, Any] = {
        "attention_mask": _mask(encoder),
        "decoder_inputs_embeds": decoder_NTH,  # what is padded stands behind, where a causal decoder does not look
    }
    if any(row.prefix_L2PKD is not None for row in rows):
        arguments["slots"] = slots.Slots([row.prefix_L2PKD for row in rows], prefixed.shape_of(model.config).parts)
    return pad_sequence(encoder, batch_first=True), torch.tensor(at, device=device), arguments


def sides(row: Row, model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Ids that the encoder reads, and those that the decoder does: its start token, and each target one step after it
    was written."""
    num_read = len(row.ids) - row.num_targets
    return list(row.ids[:num_read]), [_start_id(model), *row.ids[num_read:][:-1]]


def target_logits(base: Base, rows: Sequence[Row]) -> Tensor:
    """Logits that predict each target token, (M, V) float32, row after row. See `passes.target_logits`."""
    embeds_NSH, at_M, arguments = join(rows, base.model, base.compute_dtype, base.device)
    if base.is_sharded and torch.is_grad_enabled():
        # A block is dropped when its input's gradient is there: without one it would stay on this rank, and the next
        # pass would wait here for a gather that other ranks make.
        for embeds in (embeds_NSH, arguments["decoder_inputs_embeds"]):
            if not embeds.requires_grad:
                embeds.requires_grad_()
    return logits_at(base.model, embeds_NSH, at_M, **arguments)


def generate(base: Base, rows: Sequence[Row], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[list[int]]:
    """Greedy targets of every row, up to the end-of-sequence token (left out), `max_new_tokens`, or soon behind one of
    the texts of `stop` (see `padded.generate`).

    Every rank calls this equally often and with the same `max_new_tokens`; one without rows generates along and returns
    nothing. Rows share the decoder's prompt and the prefix, all of them (`generates_with`).
    """
    model, eos = base.model, base.tokenizer.eos_token_id
    going = list(rows) or [Row(None, [eos or 0], 0)]
    assert all(generates_with(row) == generates_with(going[0]) for row in going)
    embeds_NSH, _, arguments = join(going, model, base.compute_dtype, base.device)
    ahead_NTH = arguments["decoder_inputs_embeds"]
    start_NT = torch.full(ahead_NTH.shape[:2], _start_id(model), device=base.device)
    with torch.no_grad(), slots.handed(model, arguments.get("slots")), _beginning_with(model.get_decoder(), ahead_NTH):
        ids_NT = model.generate(
            inputs_embeds=embeds_NSH,
            attention_mask=arguments["attention_mask"],
            decoder_input_ids=start_NT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            # transformers' own would have as many layers as the encoder, which may have fewer.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            decoder_start_token_id=_start_id(model),
            eos_token_id=eos,
            pad_token_id=base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else eos,
            synced_gpus=base.is_sharded,
            **stopping(base, stop),
        )
    lists: list[list[int]] = ids_NT[:, start_NT.shape[1] :].tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in lists[: len(rows)]]


def generates_with(row: Row) -> tuple[int, int]:
    """What rows of one call of `generate` have in common: the prefix, and the decoder's prompt."""
    return 0 if row.prefix_L2PKD is None else id(row.prefix_L2PKD), (
        0 if row.decoder_prompt_QH is None else id(row.decoder_prompt_QH)
    )


@contextmanager
def _beginning_with(decoder: nn.Module, ahead_NTH: Tensor) -> Iterator[None]:
    """Let the decoder's first pass read these vectors instead of as many ids."""
    is_first = [True]

    def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if is_first:
            is_first.clear()
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": ahead_NTH}
        return args, kwargs

    hook = decoder.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _embedded(ids: Sequence[Sequence[int]], embedding: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    ids_NT = pad_sequence([torch.tensor(list(row)) for row in ids], batch_first=True).to(device)
    with torch.no_grad():
        vectors_NTH: Tensor = embedding(ids_NT)
    return vectors_NTH.to(dtype)


def _in_front(prompt_PH: Tensor | None, row: Row, vectors_TH: Tensor) -> Tensor:
    """Virtual tokens, or as many empty positions as the row's prefix has, (P, H)."""
    if prompt_PH is not None:
        return prompt_PH.to(vectors_TH.dtype)  # a cast a row: their gradients are summed in float32
    length = 0 if row.prefix_L2PKD is None else row.prefix_L2PKD.shape[2]
    return vectors_TH.new_zeros(length, vectors_TH.shape[1])


def _mask(rows: Sequence[Tensor]) -> Tensor:
    """(N, S), 1 where a row has a position."""
    return pad_sequence([torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows], batch_first=True)


def _start_id(model: PreTrainedModel) -> int:
    """What the decoder begins with: what its config says or, as T5 before it said so, the padding token.

    Raises:
        ModelError: the config has neither.
    """
    config = model.config
    for token in (getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)):
        if token is not None:
            return int(token)
    raise ModelError(f"{config.model_type}: its config.json has no decoder_start_token_id, so no target can begin.")
