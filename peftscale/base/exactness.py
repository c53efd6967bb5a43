"""Whether a base may use the packed pass: proved on a small copy of its config, then on its own weights.

An attention function that is silently wrong for one family (a window that it ignores, a cap, a sink, a model that
never calls it) would train prompts for another model. So each base is checked when it is loaded; where anything differs
from the padded pass, the padded pass is used and the reason is told.

The small copy is float32, has every kind of layer of the config, and its windows are cut below the length of the text.
"""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from peftscale.base import attention, packed, padded, prefixed
from peftscale.base.load import Base
from peftscale.base.padded import Row, logits_at

TOLERANCE = 1e-5
"""Relative error of logits and prompt gradient of the small copy. Float32 in another order of sums gives 1e-6."""
ROUNDINGS = 4
"""Relative error of the real weights' logits that rounding explains, in units of the compute dtype's epsilon. bfloat16
on the quickstart base: 0.6 of one, where the padded pass itself is 0.5 off float32. A wrong mask is off by tens of
percent. In float32 TOLERANCE is the larger one: at a hidden size of 1024 and 8 blocks packing differs by 6.5e-7 and
batching alone by 1.8e-7."""
WINDOW = 8
_OF_LAYERS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""What configs call the lists that tell layers apart, by their place."""
_HEAD_SIZE = 16
_TRIED = "peftscale_packed_tried"
_PROMPT, _TEXTS = 10, (25, 13, 22, 9)  # the prompt longer than a window, with its text longer than three


def make_packed(base: Base, name: str = attention.NAME) -> None:
    """Use packed passes from now on, through `name` of `base.attention`. Only for a base that does not differ, on any
    rank."""
    attention.install(base.model, name)
    base.is_packed = True


def small_copy_differs(config: PretrainedConfig) -> str | None:
    """Compare both passes on a small random model of the same config; None, or how they differ."""
    if config.is_encoder_decoder:
        return f"{config.model_type}: the encoder's prompt sees the text, so no two rows share one"
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = small_copy(config)
        error = gradient_error(model)
    except Exception as error:  # whatever a model does with arguments it does not know: it is not packed then
        return f"{config.model_type}: the packed pass fails ({type(error).__name__}: {str(error)[:200]})"
    finally:
        torch.random.set_rng_state(state)
    if error is None:
        return f"{config.model_type}: its attention does not go through transformers' attention registry"
    return None if error <= TOLERANCE else f"{config.model_type}: packed and padded passes differ by {error:.1e}"


def small_copy(config: PretrainedConfig) -> PreTrainedModel:
    """A random float32 model with the config's kinds of layers as its lists of layers tell them, and small sizes."""
    small = copy.deepcopy(config.get_text_config())
    lists = {name: list(getattr(small, name, None) or ()) for name in _OF_LAYERS}
    lists = {name: of_layers for name, of_layers in lists.items() if len(of_layers) == small.num_hidden_layers}
    depth = min(small.num_hidden_layers, _layers_with_every_kind([*zip(*lists.values(), strict=True)]) if lists else 2)
    heads = small.num_attention_heads
    groups = heads // (getattr(small, "num_key_value_heads", None) or heads)
    small_heads = 2 * max(1, min(groups, 4)) if groups > 1 else 4
    sizes = {
        "num_hidden_layers": depth,
        "vocab_size": 211,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_heads // min(groups, 4) if groups > 1 else small_heads,
        "head_dim": _HEAD_SIZE,
        "hidden_size": _HEAD_SIZE * small_heads,
        "intermediate_size": 96,
        "ffn_dim": 96,
        "word_embed_proj_dim": _HEAD_SIZE * small_heads,
        "max_position_embeddings": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    for name, value in sizes.items():
        if getattr(small, name, None) is not None:
            with contextlib.suppress(AttributeError):  # a property of the others, in some configs
                setattr(small, name, value)
    for name, of_layers in lists.items():
        setattr(small, name, of_layers[:depth])
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(small, name, None) is not None:
            setattr(small, name, WINDOW)
    _cut_factors_(small)
    if getattr(small, "attn_logit_softcapping", None) is not None:
        small.attn_logit_softcapping = 0.05  # scores of a small model are small: under its own cap of 50 nothing bends
    small._attn_implementation = config._attn_implementation
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # sinks and biases start at 0, where a mistake would not show
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.requires_grad_(False).eval()


def _cut_factors_(small: PretrainedConfig) -> None:
    """Longrope has a factor for each frequency: as many as the small heads have. Writes into a config of our own."""
    rope = getattr(small, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            num = int(_HEAD_SIZE * part.get("partial_rotary_factor", 1.0)) // 2
            part |= {name: part[name][:num] for name in ("short_factor", "long_factor")}


def gradient_error(model: PreTrainedModel) -> float | None:
    """Largest relative error of target logits and prompt gradient, packed against padded, NaN where one is not a
    number; None if the attention was never called."""
    hidden = model.get_input_embeddings().embedding_dim
    prompt_PH = nn.Parameter(torch.randn(_PROMPT, hidden) * 0.1)
    other_PH = nn.Parameter(torch.randn(_PROMPT - 2, hidden) * 0.1)
    ids = [torch.randint(1, 200, (length,)).tolist() for length in _TEXTS]
    prompts = [prompt_PH, prompt_PH, other_PH, None]
    rows = [Row(p, text, len(text) - 1 if p is None else len(text)) for p, text in zip(prompts, ids, strict=True)]
    want = _results(model, rows, [prompt_PH, other_PH], is_packed=False)
    before = attention.num_calls()
    attention.install(model)
    try:
        got = _results(model, rows, [prompt_PH, other_PH], is_packed=True)
    except TypeError:  # whoever computes its own attention may add a mask to it, and there is none
        if attention.num_calls() == before:
            return None
        raise
    if attention.num_calls() == before:
        return None
    return largest_error(got, want)


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Of each tensor, relative to its norm; NaN where one is not a number, which Python's `max` may pass over."""
    return float(torch.stack([(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]).max())


def _results(
    model: PreTrainedModel, rows: Sequence[Row], prompts: Sequence[nn.Parameter], *, is_packed: bool
) -> list[Tensor]:
    """Logits at targets, then the gradient of their likelihood in each prompt."""
    joined = packed.join if is_packed else padded.join
    embeds, at_M, arguments = joined(rows, model.get_input_embeddings(), torch.float32, torch.device("cpu"))
    logits_MV = logits_at(model, embeds, at_M, **arguments)
    targets = torch.tensor([token for row in rows for token in row.ids[len(row.ids) - row.num_targets :]])
    nn.functional.cross_entropy(logits_MV, targets).backward()
    gradients = [prompt.grad for prompt in prompts]
    for prompt in prompts:
        prompt.grad = None
    return [logits_MV.detach(), *(gradient for gradient in gradients if gradient is not None)]


def prefix_differs(config: PretrainedConfig, *, own_attention: str | None = None) -> str | None:
    """Compare prefixes in the packed pass with prefixes in transformers' cache, on the small copy.

    Args:
        config: of the base, packed or not.
        own_attention: what transformers chose for the base, where it is packed already.

    Returns:
        None, or how they differ.
    """
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = small_copy(config)
        if own_attention is not None:
            model.config._attn_implementation = own_attention
        error = prefix_error(model)
    except Exception as failure:  # as above
        return f"{config.model_type}: a prefix fails ({type(failure).__name__}: {str(failure)[:200]})"
    finally:
        torch.random.set_rng_state(state)
    return None if error <= TOLERANCE else f"{config.model_type}: a prefix in the packed pass is off by {error:.1e}"


def prefix_error(model: PreTrainedModel) -> float:
    """Largest relative error of target logits and of the gradients of two prefixes, packed against cached."""
    hidden = model.get_input_embeddings().embedding_dim
    layers, heads, size, _ = prefixed.shape_of(model.config)
    prompt_PH = nn.Parameter(torch.randn(_PROMPT, hidden) * 0.1)
    prefix, other = (nn.Parameter(torch.randn(layers, 2, _PROMPT - n, heads, size)) for n in (0, 3))
    ids = [torch.randint(1, 200, (length,)).tolist() for length in _TEXTS]
    rows = [Row(None, text, len(text) - 1, p) for p, text in zip([prefix, other, prefix], ids, strict=False)]
    want = _cached_results(model, rows, [prefix, other])
    attention.install(model)
    rows.append(Row(prompt_PH, ids[-1], 1))  # a prompt beside them changes nothing
    embeds, at, arguments = packed.join(rows, model.get_input_embeddings(), torch.float32, torch.device("cpu"))
    logits_MV = logits_at(model, embeds, at, **arguments)[:-1]
    targets = torch.tensor([token for row in rows[:-1] for token in row.ids[1:]])
    nn.functional.cross_entropy(logits_MV, targets).backward()
    got = [logits_MV.detach(), *(p.grad for p in (prefix, other) if p.grad is not None)]
    return largest_error(got, want)


def _cached_results(model: PreTrainedModel, rows: Sequence[Row], prefixes: Sequence[nn.Parameter]) -> list[Tensor]:
    """Logits at targets, then the gradient of their likelihood in each prefix, row by row through a cache."""
    logits, targets = [], []
    for row in rows:
        assert row.prefix_L2PKD is not None
        cache = prefixed.cache_of(row.prefix_L2PKD, 1, torch.float32)
        ids_1T = torch.tensor([list(row.ids)])
        logits.append(model(input_ids=ids_1T, past_key_values=cache, use_cache=True).logits[0, :-1])
        targets.append(ids_1T[0, 1:])
    logits_MV = torch.cat(logits)
    nn.functional.cross_entropy(logits_MV, torch.cat(targets)).backward()
    gradients = [prefix.grad for prefix in prefixes]
    for prefix in prefixes:
        prefix.grad = None
    return [logits_MV.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _layers_with_every_kind(kinds: Sequence[tuple[Any, ...]]) -> int:
    """The shortest beginning that has each kind, at least two layers."""
    return max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))


def weights_differ(base: Base) -> str | None:
    """One short batch through the real weights: packing may differ by what batching alone does, times three.

    None, or how it differs, or why it fails: attention that fails on one rank gives zeros there, so that it makes the
    gathers that the others wait for. Collective when the base is sharded.
    """
    draw = torch.Generator().manual_seed(0)
    prompt_PH = torch.rand(_PROMPT, base.hidden_size, generator=draw).sub(0.5).mul(0.1).to(base.device)
    ids = [torch.randint(0, base.vocab_size, (length,), generator=draw).tolist() for length in _TEXTS[:2]]
    rows, embedding = [Row(prompt_PH, text, 1) for text in ids], base.model.get_input_embeddings()
    failures: list[Exception] = []
    with base.evaluating():
        alone = torch.cat([padded.target_logits(base, [row]) for row in rows])
        together = padded.target_logits(base, rows)
        with attention.original(base.model, _TRIED):
            try:
                embeds, at_M, arguments = packed.join(rows, embedding, base.compute_dtype, base.device)
                got = logits_at(base.model, embeds, at_M, **arguments, failures=failures)
            except Exception as failure:  # as above
                failures.append(failure)
    if failures:
        return f"the packed pass fails ({type(failures[0]).__name__}: {str(failures[0])[:200]})"
    # Three times what batching alone does; but where the padded pass happens to sum alike in both batches, that is next
    # to nothing, and every other order of sums differs by the dtype's rounding.
    batching = float((together - alone).norm())
    rounding = max(TOLERANCE, ROUNDINGS * torch.finfo(base.compute_dtype).eps) * float(alone.norm())
    allowed = max(3 * batching, rounding)
    error = float((got - alone).norm())
    return None if error <= allowed else f"packed logits differ by {error:.2e}, batching alone by {batching:.2e}"


def _tried(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *mask: Any,
    failures: list[Exception],
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The packed attention, or zeros from where it has failed."""
    if not failures:
        try:
            found: tuple[Tensor, None] = AttentionInterface()[attention.NAME](
                module, query, key, value, *mask, **arguments
            )
            return found
        except Exception as failure:  # as above
            failures.append(failure)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(_TRIED, _tried)
AttentionMaskInterface.register(_TRIED, lambda *_, **__: None)
