"""Whether an encoder-decoder base takes prefixes exactly, proved on a small random model of its config.

The reference knows nothing of `base.slots`: hooks behind every projection to keys and to values write the
prefix into the rows' first positions. Prompts are proved in `base.text_exactness`, packed
passes of decoder-only bases in `base.exactness`.

Shapes:  N rows   S positions   P virtual tokens   L layers   K heads   D head size
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from peftscale.base import encoder_decoder, prefixed, slots
from peftscale.base.exactness import TOLERANCE, largest_error
from peftscale.base.padded import Row, logits_at


def differs(config: PretrainedConfig, *, own_attention: str | None) -> str | None:
    """None if prefixes are exact for the base, or why not.

    Args:
        config: of an encoder-decoder base.
        own_attention: what transformers chose for it.
    """
    if config.model_type not in slots.FAMILIES:
        return f"{config.model_type}: of encoder-decoder models only {' and '.join(slots.FAMILIES)} take prefixes"
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        error = prefix_error(small_copy(config, own_attention))
    except Exception as failure:  # whatever a model does with arguments that it does not know
        return f"{config.model_type}: a prefix fails ({type(failure).__name__}: {str(failure)[:200]})"
    finally:
        torch.random.set_rng_state(state)
    return None if error <= TOLERANCE else f"{config.model_type}: a prefix is off by {error:.1e}"


def small_copy(config: PretrainedConfig, own_attention: str | None) -> PreTrainedModel:
    """A random float32 model of the config's kind, with encoder and decoder of different depth."""
    small = copy.deepcopy(config)
    small.vocab_size, small.num_layers, small.num_decoder_layers = 211, 2, 3
    small.d_model, small.d_kv, small.d_ff, small.num_heads = 48, 8, 80, 4
    small._attn_implementation = own_attention
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(small).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.requires_grad_(False).eval()


def prefix_error(model: PreTrainedModel) -> float:
    """Largest relative error of target logits and of the gradients of two prefixes, in slots against hooked in."""
    layers, heads, size, _ = prefixed.shape_of(model.config)
    long, short = (nn.Parameter(torch.randn(layers, 2, length, heads, size)) for length in (6, 3))
    rows = [
        Row(None, torch.randint(1, 200, (length,)).tolist(), num_targets, prefix)
        for length, num_targets, prefix in ((25, 4, long), (13, 1, short), (22, 7, long), (9, 2, None))
    ]
    hooks = [
        getattr(module, name).register_forward_hook(_writes(rows, layer, which))
        for layer, module in enumerate(_attentions(model))
        for which, name in enumerate(("k", "v"))
    ]
    want = _results(model, rows, (long, short), with_slots=False)
    for hook in hooks:
        hook.remove()
    slots.install(model)
    got = _results(model, rows, (long, short), with_slots=True)
    return largest_error(got, want)


def _attentions(model: PreTrainedModel) -> list[Any]:
    """Of the encoder, then the decoder's own, then cross attention: the layers of a prefix in their order."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    own = [block.layer[0].SelfAttention for stack in (encoder, decoder) for block in stack.block]
    return own + [block.layer[1].EncDecAttention for block in decoder.block]


def _writes(rows: Sequence[Row], layer: int, which: int) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: tuple[Any, ...], states_NSI: Tensor) -> Tensor:
        written = []
        for row, states_SI in zip(rows, states_NSI, strict=True):
            ahead = () if row.prefix_L2PKD is None else (row.prefix_L2PKD[layer, which].flatten(1),)
            length = 0 if row.prefix_L2PKD is None else row.prefix_L2PKD.shape[2]
            written.append(torch.cat([*ahead, states_SI[length:]]))
        return torch.stack(written)

    return hook


def _results(
    model: PreTrainedModel, rows: Sequence[Row], prefixes: Sequence[nn.Parameter], *, with_slots: bool
) -> list[Tensor]:
    """Logits at targets, then the gradient of their likelihood in each prefix."""
    embeds, at_M, arguments = encoder_decoder.join(rows, model, torch.float32, torch.device("cpu"))
    if not with_slots:
        del arguments["slots"]
    logits_MV = logits_at(model, embeds, at_M, **arguments)
    targets = torch.tensor([token for row in rows for token in row.ids[len(row.ids) - row.num_targets :]])
    nn.functional.cross_entropy(logits_MV, targets).backward()
    gradients = [prefix.grad for prefix in prefixes]
    for prefix in prefixes:
        prefix.grad = None
    return [logits_MV.detach(), *(gradient for gradient in gradients if gradient is not None)]
