"""Whether a base takes texts as embeddings, as they stand behind a prompt, proved on its own weights.

Packed and padded passes both hand embeddings to the model, so an error that they share is not seen by `base.exactness`:
Gemma 3n looks up further embeddings of the ids in every layer, and goes on without them where there are no ids.

Shapes:  N rows   T longest text   M target tokens   V vocabulary
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peftscale.base import encoder_decoder, passes
from peftscale.base.exactness import ROUNDINGS, TOLERANCE
from peftscale.base.load import Base
from peftscale.base.padded import Row


def texts_differ(base: Base) -> str | None:
    """None if texts that enter as embeddings give the logits of their ids, or why not.

    Pegasus, for one, scales embeddings only where it looks them up itself. What is random in training mode is found out
    too. Collective when the base is sharded.
    """
    name, draw = base.model.config.model_type, torch.Generator().manual_seed(0)
    ordinary = sorted(set(range(base.vocab_size)) - set(base.tokenizer.all_special_ids))
    picked = [[ordinary[i] for i in torch.randint(len(ordinary), (n,), generator=draw)] for n in (9, 14)]
    rows = [Row(None, ids, num_targets) for ids, num_targets in zip(picked, (1, 4), strict=True)]
    try:
        with torch.no_grad():
            got_MV = passes.target_logits(base, rows)
            base.eval()
            want_MV = _logits_of_ids(base, rows)
    except Exception as failure:  # whatever a model does with arguments that it does not know
        return f"{name}: a text as embeddings fails ({type(failure).__name__}: {str(failure)[:200]})"
    finally:
        base.train()
    error = float((got_MV - want_MV).norm() / want_MV.norm())
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(base.compute_dtype).eps)
    return None if error <= allowed else f"{name}: a text as embeddings is off by {error:.1e}"


def _logits_of_ids(base: Base, rows: list[Row]) -> Tensor:
    """(M, V) float32, by transformers' own way from ids."""
    if base.is_encoder_decoder:
        found = []
        for row in rows:
            text, read = (torch.tensor([ids], device=base.device) for ids in encoder_decoder.sides(row, base.model))
            found.append(base.model(input_ids=text, decoder_input_ids=read, use_cache=False).logits[0])
        return torch.cat(found).float()
    # One batch, as the rows are: what stands behind a text is not seen, so any token may.
    ids_NT = pad_sequence([torch.tensor(list(row.ids)) for row in rows], batch_first=True, padding_value=rows[0].ids[0])
    logits_NTV = base.model(input_ids=ids_NT.to(base.device), use_cache=False).logits
    ends = [(len(row.ids) - row.num_targets - 1, len(row.ids) - 1) for row in rows]
    picked = [logits_TV[first:last] for logits_TV, (first, last) in zip(logits_NTV, ends, strict=True)]
    return torch.cat(picked).float()
