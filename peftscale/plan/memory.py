"""Memory of one rank by cause, and bytes gathered in a pass: arithmetic over `facts`.

Deciding, judging and printing is the package itself.

Source: ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054, section 5. What autograd keeps was read from the
model code of transformers 5.23 and compared with live storages on CPU (the docstring of `activation_bytes`).

Shapes:  H hidden   A heads * head size   F feed-forward   V vocabulary   P virtual tokens   T tokens of a pass
"""

import math
from dataclasses import dataclass

from peftscale.config import AdapterConfig, PrefixConfig, Quantization, RunConfig, TaskConfig
from peftscale.facts import BaseFacts, UnitFacts, dtype_bytes

CONTROL_BYTES = 64
"""Most bytes an adapter may send in a step beside its gradient: loss, token counts, flags."""
_TANH_BY_HAND = ("gelu_new", "gelu_fast")  # written out in Python, so that autograd keeps every step


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be turned to make a run fit."""

    world: int
    holders: int
    """Ranks that hold the base together: 1 where it is replicated."""
    quantization: Quantization
    checkpoints: bool
    tokens: int


def rank_parts(cfg: RunConfig, facts: BaseFacts, setting: Setting) -> dict[str, int]:
    """Bytes of one rank by cause, under the names that `Plan` gives them."""
    dense = dtype_bytes(cfg.base.compute_dtype)
    adapters = sum(trained_numbers(a, facts) for a in cfg.adapters.values()) * 4
    prefixes = sum(_prefix_bytes(a, facts, dense) for a in cfg.adapters.values() if a.kind == "prefix")
    weights = [linear.rows * linear.cols for unit in facts.units for linear in unit.linears]
    # nf4 also makes its absmax float32: 4 bytes for 64 weights.
    extra = 1 / 16 if setting.quantization == "nf4" else 0
    return {
        **weight_parts(facts, setting, dense),
        "adapter_bytes": adapters,
        "gradient_bytes": adapters,
        "optimizer_bytes": sum(
            trained_numbers(a, facts) * 4 * (2 if cfg.adapter_train(name).optimizer == "adamw" else 1)
            for name, a in cfg.adapters.items()
        ),
        "activation_bytes": activation_bytes(
            facts,
            tokens=setting.tokens,
            dense_bytes=dense,
            is_checkpointed=setting.checkpoints,
            decoder_tokens=decoder_tokens(cfg, setting) if facts.is_encoder_decoder else 0,
            row_tokens=_row_tokens(cfg, setting),
        )
        + prefixes,
        "dequantized_bytes": 0 if setting.quantization == "none" else int(max(weights) * (dense + extra)),
        "logits_bytes": _targets(cfg, setting) * facts.vocab_size * (dense + 8),
    }


def weight_parts(facts: BaseFacts, setting: Setting, dense: int) -> dict[str, int]:
    """The parts of `rank_parts` that are the base's stored weights, which a rank holds whatever it is used for."""
    padded = sorted(unit.packed_bytes(setting.quantization, dense, setting.holders) for unit in facts.stored_units)
    return {
        "slice_bytes": sum(padded) // setting.holders,
        "gathered_units_bytes": sum(padded[-2:]) if setting.holders > 1 else 0,
    }


def token_width(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Numbers of one virtual token, as the adapter's file keeps it."""
    return facts.hidden_size if adapter.kind == "prompt" else facts.prefix_width


def file_rows(adapter: AdapterConfig) -> int:
    """Rows of the adapter's file, one for each virtual token that has values of its own."""
    return adapter.length + (adapter.decoder_length if adapter.kind == "prompt" else 0)


def positions(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Virtual tokens of a row, in front of the encoder's and the decoder's input together."""
    return file_rows(adapter) * (2 if adapter.kind == "prefix" and facts.is_encoder_decoder else 1)


def trained_numbers(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Numbers that are trained: those of the file, or vectors of H and two layers that make those."""
    width = token_width(adapter, facts)
    if adapter.kind == "prompt":
        hidden = adapter.reparam_hidden_size or 0
        network = hidden * (2 * width + 1) + 3 * width if hidden else 0  # two layers, gain and shift of the norm
        return file_rows(adapter) * width + network
    if adapter.reparam_hidden_size is None:
        return adapter.length * width
    # Encoder, decoder and cross attention have vectors and an inner layer each.
    hidden, networks = adapter.reparam_hidden_size, 3 if facts.is_encoder_decoder else 1
    inner = adapter.length * facts.hidden_size + hidden * (facts.hidden_size + 1)
    return networks * inner + width * (hidden + 1)


def _prefix_bytes(adapter: PrefixConfig, facts: BaseFacts, dense_bytes: int) -> int:
    """Beside parameter and gradient: keys and values in the compute dtype and their gradient, and what a network
    made, as a leaf, with its gradient."""
    copies = 12 if adapter.reparam == "mlp" else 0
    return adapter.length * facts.prefix_width * (2 * dense_bytes + copies)


def activation_bytes(
    facts: BaseFacts,
    *,
    tokens: int,
    dense_bytes: int,
    is_checkpointed: bool,
    decoder_tokens: int = 0,
    row_tokens: int = 1,
) -> int:
    """Bytes of activations of one pass of `tokens` tokens, e = `dense_bytes` an element.

    A block keeps for each token: e * 4A for attention (queries, keys and values as attention reads them, that is for
    every head, and its output); e * F for a plain activation, 3 e * F for a gated one (gate, activated gate, up), three
    times F more where gelu is written out in Python; 4 bytes an element of what its norms see (float32 copies: H each,
    A for norms of queries and keys); 4 bytes a head and a norm for their scalars. A frozen linear keeps nothing.
    A block of a decoder beside an encoder also keeps e * 2A for each of its own tokens (query and output of the cross
    attention) and for each of the encoder's (key and value). T5's blocks keep a mask with their bias, e * heads for
    each pair of tokens of a row that see each other.
    With checkpointing, every block keeps its input e * H, and one block at a time keeps all of the above. On top:
    3 e * max(F, A) for gradients in flight and 8 H for the last norm. All other attention is counted as linear in the
    row's length; the eager one of families without scaled-dot-product attention takes more.

    Peak of live storages on CPU over this, 6 blocks, 4 rows of 256 tokens, both dtypes, with and without
    checkpointing: 0.84 to 1.12 for llama, gpt2, opt and gpt_neox; 0.75 to 1.28 for a qwen3 whose attention is eight
    times as wide as H; 0.82 to 1.18 for T5 and T5 v1.1 of 6 + 6 blocks with 4 rows of 256 + 16 and 128 + 128 tokens and
    16 of 64 + 4.

    Args:
        decoder_tokens: those of `tokens` that go through the decoder of an encoder-decoder.
        row_tokens: of one row of its encoder.
    """
    blocks = [unit for unit in facts.units if unit.kind == "block"]
    num_encoder_blocks = len(blocks) - facts.num_decoder_layers
    text_tokens, width = tokens - decoder_tokens, facts.num_heads * facts.head_dim * dense_bytes
    has_bias = any("relative_attention_bias" in tensor.name for unit in blocks for tensor in unit.dense)
    pair_bytes = facts.num_heads * dense_bytes if has_bias else 0
    decoder_row_tokens = decoder_tokens * row_tokens // max(1, text_tokens)
    each = []
    for unit in blocks[:num_encoder_blocks]:
        each.append(text_tokens * (_block_activation(unit, facts, dense_bytes) + row_tokens * pair_bytes))
    for unit in blocks[num_encoder_blocks:]:
        own = _block_activation(unit, facts, dense_bytes) + 2 * width + (row_tokens + decoder_row_tokens) * pair_bytes
        each.append(decoder_tokens * own + text_tokens * 2 * width)
    inputs = num_encoder_blocks * text_tokens + facts.num_decoder_layers * decoder_tokens
    kept = inputs * facts.hidden_size * dense_bytes + max(each) if is_checkpointed else sum(each)
    widest = max(linear.cols for unit in blocks for linear in unit.linears)  # F, or A where attention is wider
    return kept + max(text_tokens, decoder_tokens) * (3 * widest * dense_bytes + 8 * facts.hidden_size)


def _block_activation(unit: UnitFacts, facts: BaseFacts, dense_bytes: int) -> int:
    """Bytes a token that autograd keeps of one block."""
    hidden, heads = facts.hidden_size, facts.num_heads * facts.head_dim
    inner = [linear.cols for linear in unit.linears]
    feed = max((cols for cols in inner if cols not in (hidden, heads)), default=max(inner))
    into_feed = sum(x.rows for x in unit.linears if x.cols == hidden and x.rows in (feed, 2 * feed))
    activated = (3 if into_feed >= 2 * feed else 1) + (3 if facts.activation in _TANH_BY_HAND else 0)
    norms = [t for t in unit.dense if t.name.endswith(".weight") and len(t.shape) == 1]
    seen = sum(hidden if norm.shape[0] == hidden else heads for norm in norms)
    return dense_bytes * (4 * heads + activated * feed) + 4 * seen + 4 * (facts.num_heads + len(norms))


def gathered_bytes(facts: BaseFacts, setting: Setting, dense: int) -> int:
    """Gathered output of one pass: every unit in forward, and all but embeddings again in backward."""
    if setting.holders == 1:
        return 0
    return sum(
        unit.packed_bytes(setting.quantization, dense, setting.holders)
        * (1 if unit.kind in ("embedding", "positions") else 2)
        for unit in facts.units
    )


def target_tokens(task: TaskConfig) -> int:
    """Most target tokens of one example; a label word has no more tokens than UTF-8 bytes."""
    if task.labels is None:
        return task.max_target_tokens
    return max(len(word.encode()) for word in task.labels.values()) + 1


def most_target_tokens(cfg: RunConfig) -> int:
    """Of one example of any task that an adapter is trained on."""
    return max(target_tokens(task) for name in cfg.adapters for task in cfg.adapter_tasks(name))


def step_rows(cfg: RunConfig, world: int) -> int:
    """Examples of one step of all adapters, on the rank that has most."""
    return math.ceil(sum(cfg.adapter_train(name).examples_per_step for name in cfg.adapters) / world)


def step_tokens(cfg: RunConfig, facts: BaseFacts, *, world: int, passes: int, tokens_per_pass: int) -> int:
    """Tokens that a rank computes in a step, every text as long as task.max_text_tokens: full passes where that is not
    given. Packed passes, where they are not off, compute a prompt once each."""
    limits = [task.max_text_tokens for name in cfg.adapters for task in cfg.adapter_tasks(name)]
    if None in limits:
        return passes * tokens_per_pass
    rows = step_rows(cfg, world)
    text = max(limit for limit in limits if limit is not None)
    target = most_target_tokens(cfg)
    virtual = [positions(adapter, facts) for adapter in cfg.adapters.values()]
    is_packed = cfg.train.packing == "auto" and not facts.is_encoder_decoder
    prompts = max(passes * max(virtual), math.ceil(sum(virtual) / world)) if is_packed else rows * max(virtual)
    return min(passes * tokens_per_pass, rows * (text + target) + prompts)


def _targets(cfg: RunConfig, setting: Setting) -> int:
    """Most target positions of one pass."""
    return _rows(cfg, setting) * most_target_tokens(cfg)


def _rows(cfg: RunConfig, setting: Setting) -> int:
    """Most rows of one pass: as short as they can be, as many as there are."""
    target = most_target_tokens(cfg)
    row = min(a.length for a in cfg.adapters.values()) + 1 + target
    return max(1, min(step_rows(cfg, setting.world), setting.tokens // row))


def decoder_tokens(cfg: RunConfig, setting: Setting) -> int:
    """Tokens of one pass that go through the decoder: targets and what stands in front of them."""
    virtual = max(a.decoder_length if a.kind == "prompt" else a.length for a in cfg.adapters.values())
    return min(setting.tokens, _targets(cfg, setting) + _rows(cfg, setting) * virtual)


def _row_tokens(cfg: RunConfig, setting: Setting) -> int:
    """Virtual and text tokens of the longest row. Where task.max_text_tokens is not given, a step is taken for one pass
    of rows of one length."""
    rows = [(a.length, task.max_text_tokens) for name, a in cfg.adapters.items() for task in cfg.adapter_tasks(name)]
    alike = max(1, setting.tokens // step_rows(cfg, setting.world))
    return min(setting.tokens, max(alike if text is None else virtual + text for virtual, text in rows))
