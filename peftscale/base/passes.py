"""A pass of rows through the frozen base: packed where the base was found fit for it, padded otherwise.

Every rank makes the same number of passes, because gathering the base's weights takes all of them; a rank that has no
rows left makes an empty pass. How rows are put together is `base.packed` and `base.padded`.

Shapes:  M target tokens of all rows   V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftscale.base import packed, padded
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
        return packed.target_logits(base, rows) if base.is_packed else padded.target_logits(base, rows)
    # One token through everything, the embedding too: each part is a gather that the other ranks wait for. The input
    # must require a gradient, or backward would gather nothing here.
    join = packed.join if base.is_packed else padded.join
    embedding = base.model.get_input_embeddings()
    blank, _, arguments = join([Row(None, [0], 0)], embedding, base.compute_dtype, base.device)
    first = torch.zeros(1, dtype=torch.long, device=base.device)
    return logits_at(base.model, blank.requires_grad_(), first, **arguments)


def target_losses(base: Base, rows: Sequence[Row]) -> Tensor:
    """Negative log-likelihood of every target token, (M,) float32 nats, row after row. See `target_logits`."""
    logits_MV = target_logits(base, rows)
    if not rows:
        return logits_MV.sum()[None] * 0
    targets = [token for row in rows for token in row.ids[len(row.ids) - row.num_targets :]]
    return nn.functional.cross_entropy(logits_MV, torch.tensor(targets, device=base.device), reduction="none")
