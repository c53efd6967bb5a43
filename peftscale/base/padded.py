"""The padded pass: one row an example, its prompt in front, zeros behind, through the frozen base.

The reference path: exact for every decoder-only family, because a causal model never sees what stands behind.
Logits are made at target positions only, so that a large vocabulary costs nothing for tokens without a loss.
Every rank must make the same number of passes; one that has no rows left makes an empty pass.

Shapes:  N rows   P virtual tokens   T text tokens   S longest row   H hidden size   M target tokens   V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peftscale.base.load import Base


@dataclass(frozen=True, slots=True)
class Row:
    """One example on its way through the base."""

    prompt_PH: Tensor | None
    """Virtual tokens, float32, or None for the base alone."""
    ids: Sequence[int]
    """Text tokens, the targets last. Not empty before the targets unless there is a prompt."""
    num_targets: int


def target_logits(base: Base, rows: Sequence[Row]) -> Tensor:
    """Logits that predict each target token.

    Args:
        base: the frozen base; gathers are collectives, so every rank calls this equally often.
        rows: examples; with none, an empty pass is made, whose backward runs and reaches no adapter.

    Returns:
        (M, V) float32, row after row; (1, V) of no meaning for an empty pass.
    """
    if not rows:
        # One token through everything, the embedding too: each part is a gather that the other ranks wait for. The
        # input must require a gradient, or backward would gather nothing here.
        blank_1SH, _ = _embed(base, [Row(None, [0], 0)])
        return _logits_at(base, blank_1SH.requires_grad_(), torch.zeros(1, dtype=torch.long, device=base.device))
    embeds_NSH, starts = _embed(base, rows)
    width = embeds_NSH.shape[1]
    at: list[int] = []
    for i, row in enumerate(rows):
        first = i * width + starts[i] + len(row.ids) - row.num_targets - 1  # a position predicts the next token
        at.extend(range(first, first + row.num_targets))
    return _logits_at(base, embeds_NSH, torch.tensor(at, device=base.device))


def target_losses(base: Base, rows: Sequence[Row]) -> Tensor:
    """Negative log-likelihood of every target token, (M,) float32 nats, row after row. See `target_logits`."""
    logits_MV = target_logits(base, rows)
    if not rows:
        return logits_MV.sum()[None] * 0
    targets = [token for row in rows for token in row.ids[len(row.ids) - row.num_targets :]]
    return nn.functional.cross_entropy(logits_MV, torch.tensor(targets, device=base.device), reduction="none")


def generate(base: Base, rows: Sequence[Row], *, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuation of every row, up to the end-of-sequence token (left out) or `max_new_tokens`.

    Every rank calls this equally often; one without rows generates along and returns nothing.
    """
    blank = Row(None, [base.tokenizer.eos_token_id or 0], 0)
    embeds, _ = zip(*(_embed(base, [row]) for row in (rows or [blank])), strict=True)
    longest = max(row_1SH.shape[1] for row_1SH in embeds)
    # Left padding: generation appends on the right.
    padded_NSH = torch.cat([nn.functional.pad(row, (0, 0, longest - row.shape[1], 0)) for row in embeds])
    mask_NS = torch.stack(
        [torch.arange(longest, device=base.device) >= longest - row.shape[1] for row in embeds]
    ).long()
    eos = base.tokenizer.eos_token_id
    with torch.no_grad():
        ids_NT = base.model.generate(
            inputs_embeds=padded_NSH,
            attention_mask=mask_NS,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=eos,
            pad_token_id=base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else eos,
            synced_gpus=base.is_sharded,
        )
    lists: list[list[int]] = ids_NT.tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in lists[: len(rows)]]


def _embed(base: Base, rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
    """Rows (N, S, H) in the compute dtype, zeros behind, and where each row's text starts.

    One call of the embedding for all rows: it is a gather when the base is sharded.
    """
    ids_NT = pad_sequence([torch.tensor(list(row.ids)) for row in rows], batch_first=True).to(base.device)
    with torch.no_grad():
        text_NTH = base.model.get_input_embeddings()(ids_NT).to(base.compute_dtype)
    joined, starts = [], []
    for row, text_TH in zip(rows, text_NTH, strict=True):
        prompt = () if row.prompt_PH is None else (row.prompt_PH.to(base.compute_dtype),)  # a cast per row: the
        joined.append(torch.cat([*prompt, text_TH[: len(row.ids)]]))  # rows' gradients are summed in float32
        starts.append(0 if row.prompt_PH is None else len(row.prompt_PH))
    return pad_sequence(joined, batch_first=True), starts


def _logits_at(base: Base, embeds_NSH: Tensor, at_M: Tensor) -> Tensor:
    """Logits (M, V) at flat positions of (N, S). The head sees only those; the model's scaling and caps still act."""

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_NSH = args[0]
        return (hidden_NSH.flatten(0, 1)[at_M][None], *args[1:])

    hook = base.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits_1MV: Tensor = base.model(inputs_embeds=embeds_NSH, use_cache=False).logits
    finally:
        hook.remove()
    return logits_1MV[0].float()
