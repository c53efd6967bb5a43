"""A pass of rows through the frozen base: packed where the base was found fit for it, padded otherwise.

An encoder-decoder base has a pass of its own, `base.encoder_decoder`.

Every rank makes the same number of passes, because gathering the base's weights takes all of them; a rank that has no
rows left makes an empty pass. How rows are put together is `base.packed` and `base.padded`.

Shapes:  M target tokens of all rows   V vocabulary   N of them that are one of C labels, R the rest
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftscale.base import encoder_decoder, packed, padded
from peftscale.base.load import Base
from peftscale.base.padded import Row, logits_at


def target_logits(base: Base, rows: Sequence[Row]) -> Tensor:
    """Logits that predict each target token.

    Args:
        base: the frozen base; gathers are collectives, so every rank calls this equally often.
        rows: examples; with none, an empty pass is made, whose backward runs and reaches no adapter.

    Returns:
        (M, V) float32, row after row; (1, V) of no meaning for an empty pass.
    """
    if rows:
        if base.is_encoder_decoder:
            return encoder_decoder.target_logits(base, rows)
        return packed.target_logits(base, rows) if base.is_packed else padded.target_logits(base, rows)
    # One token through everything, the embedding too: each part is a gather that the other ranks wait for. The input
    # must require a gradient, or backward would gather nothing here.
    row, device = Row(None, [0], 0), base.device
    if base.is_encoder_decoder:
        blank, _, arguments = encoder_decoder.join([row], base.model, base.compute_dtype, device)
        arguments["decoder_inputs_embeds"].requires_grad_()
    else:
        join = packed.join if base.is_packed else padded.join
        blank, _, arguments = join([row], base.model.get_input_embeddings(), base.compute_dtype, device)
    first = torch.zeros(1, dtype=torch.long, device=device)
    return logits_at(base.model, blank.requires_grad_(), first, **arguments)


def target_losses(base: Base, rows: Sequence[Row]) -> Tensor:
    """Negative log-likelihood of every target token, (M,) float32 nats, row after row. See `target_logits`."""
    logits_MV = target_logits(base, rows)
    if not rows:
        return logits_MV.sum()[None] * 0
    targets = [token for row in rows for token in row.ids[len(row.ids) - row.num_targets :]]
    return losses(logits_MV, torch.tensor(targets, device=base.device), rows)


def losses(logits_MV: Tensor, targets_M: Tensor, rows: Sequence[Row]) -> Tensor:
    """Negative log-likelihood of the targets, (M,) nats: in the vocabulary, or among those that a row gives."""
    ends = itertools.accumulate(row.num_targets for row in rows)
    limited = {end - row.num_targets: row.among for end, row in zip(ends, rows, strict=True) if row.among}
    if not limited:
        return nn.functional.cross_entropy(logits_MV, targets_M, reduction="none")
    device, width = logits_MV.device, max(map(len, limited.values()))
    at_N = torch.tensor(list(limited), device=device)
    rest_R = torch.tensor([i for i in range(len(targets_M)) if i not in limited], dtype=torch.long, device=device)
    among_NC = torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in limited.values()], device=device)
    of_limited_NV = logits_MV[at_N]
    chosen_NC = of_limited_NV.gather(1, among_NC.clamp(min=0)).masked_fill(among_NC < 0, float("-inf"))
    own_N = of_limited_NV.gather(1, targets_M[at_N, None])[:, 0]
    of_rest_R = nn.functional.cross_entropy(logits_MV[rest_R], targets_M[rest_R], reduction="none")
    both = torch.cat([chosen_NC.logsumexp(1) - own_N, of_rest_R])
    return both[torch.cat([at_N, rest_R]).argsort()]


def generate(base: Base, rows: Sequence[Row], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[list[int]]:
    """Greedy continuation of every row. See `padded.generate`."""
    if base.is_encoder_decoder:
        return encoder_decoder.generate(base, rows, max_new_tokens=max_new_tokens, stop=stop)
    return padded.generate(base, rows, max_new_tokens=max_new_tokens, stop=stop)


def generates_with(base: Base, row: Row) -> tuple[int, int]:
    """What rows of one call of `generate` have in common."""
    return encoder_decoder.generates_with(row) if base.is_encoder_decoder else padded.generates_with(base, row)
