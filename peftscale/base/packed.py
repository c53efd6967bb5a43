"""The packed pass: one row [prompt_1 .. prompt_K | example_1 .. example_N] through the frozen base.

Each prompt is computed once, however many examples stand behind it, and no token is padding outside of attention. The
results are those of `base.padded`, which serves every base for which they would not be (`base.exactness`). Who sees
whom is `base.attention`. Prefixes add no token to the row.

Shapes:  T tokens of the row   P virtual tokens   H hidden size   M target tokens   V vocabulary
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftscale.base import attention
from peftscale.base.load import Base
from peftscale.base.padded import Row, logits_at


def join(
    rows: Sequence[Row], embedding: nn.Module, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Turn rows into one packed row. Rows that share a prompt or a prefix share the very tensor.

    Returns:
        Embeddings (1, T, H) in `dtype`, positions (M,) in T that predict the targets, and the arguments of the
        model's forward that carry the layout.
    """
    prompts: dict[int, Tensor] = {}
    prefixes: dict[int, Tensor] = {}
    for row in rows:
        if row.prompt_PH is not None:
            prompts.setdefault(id(row.prompt_PH), row.prompt_PH)
        if row.prefix_L2PKD is not None:
            prefixes.setdefault(id(row.prefix_L2PKD), row.prefix_L2PKD)
    alone = len(prompts)  # a prompt of no tokens, behind which the rows without a prompt or prefix stand
    places = {key: place for place, key in enumerate(prompts)}
    places |= {key: place for place, key in enumerate(prefixes, start=alone + 1)}
    heads = [row.prompt_PH if row.prefix_L2PKD is None else row.prefix_L2PKD for row in rows]
    owners = [alone if head is None else places[id(head)] for head in heads]
    layout = attention.layout(
        [*(len(prompt) for prompt in prompts.values()), 0],
        [len(row.ids) for row in rows],
        owners,
        device=device,
        prefixes_L2PGD=[prefix.to(dtype) for prefix in prefixes.values()],
    )
    ids_T = torch.tensor([token for row in rows for token in row.ids], device=device)
    with torch.no_grad():
        text_TH = embedding(ids_T[None])[0].to(dtype)
    embeds_1TH = torch.cat([*(prompt.to(dtype) for prompt in prompts.values()), text_TH])[None]
    ends = list(itertools.accumulate(len(prompt) for prompt in prompts.values()))
    at: list[int] = []
    start = layout.num_tokens - len(ids_T)
    for row, owner in zip(rows, owners, strict=True):
        first = start + len(row.ids) - row.num_targets
        # A position predicts the next token; a text that is all target is predicted by its prompt's last position.
        at.extend(ends[owner] - 1 if place == start else place - 1 for place in range(first, first + row.num_targets))
        start += len(row.ids)
    return embeds_1TH, torch.tensor(at, device=device), {"position_ids": layout.positions_1T, "layout": layout}


def target_logits(base: Base, rows: Sequence[Row]) -> Tensor:
    """Logits that predict each target token, (M, V) float32, row after row. See `passes.target_logits`."""
    embeds_1TH, at_M, arguments = join(rows, base.model.get_input_embeddings(), base.compute_dtype, base.device)
    if base.is_sharded and torch.is_grad_enabled() and not embeds_1TH.requires_grad:
        # Rows of prefixes alone. The first block is dropped when its input's gradient is there: without one it would
        # stay on this rank, and the next pass would wait here for a gather that other ranks make.
        embeds_1TH.requires_grad_()
    return logits_at(base.model, embeds_1TH, at_M, **arguments)
