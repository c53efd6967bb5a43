"""Memory of one rank by cause, and bytes gathered in a pass: arithmetic over `facts`.

Deciding, judging and printing is the package itself; what passes hold is `work`.

Source: ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054, section 5. What autograd keeps was read from the
model code of transformers 5.23 and compared with live storages on CPU (the docstrings of `activation_bytes` and
`evaluation_bytes`).

Shapes:  H hidden   A heads * head size   K key heads * head size   F feed-forward   V vocabulary   T tokens of a pass
"""

from collections.abc import Mapping
from dataclasses import dataclass

from peftscale.config import Quantization, RunConfig
from peftscale.facts import BaseFacts, UnitFacts, dtype_bytes
from peftscale.plan.adapters import file_rows, prefix_bytes, token_width, trained_numbers
from peftscale.plan.hardware import Hardware
from peftscale.plan.work import PassSize, Work, decoder_tokens

CONTROL_BYTES = 64
"""Most bytes an adapter may send in a step beside its gradient: loss, token counts, flags."""
PHASES = (("activation_bytes", "logits_bytes"), ("update_bytes",), ("evaluation_bytes",))
"""What the passes of a step take, its update, and an evaluation, one at a time: the peak has the largest of them."""
OF_ADAPTERS = ("adapter_bytes", "best_bytes", "gradient_bytes", "optimizer_bytes", "update_bytes")
"""What no device but a larger one makes less: every rank has all adapters."""
_TANH_BY_HAND = ("gelu_new", "gelu_fast")  # written out in Python, so that autograd keeps every step


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be turned to make a run fit."""

    world: int
    holders: int
    """Ranks that hold the base together: 1 where it is replicated."""
    quantization: Quantization
    checkpoints: bool
    attention_bytes: int
    """Of an element in attention."""
    copies_keys: bool
    """Packed attention has a copy of a shared prompt's keys and values for each row."""
    work: Work


def attention_bytes(cfg: RunConfig, hardware: Hardware) -> int:
    """Packed attention on a CPU computes in float32."""
    return 4 if hardware.kind == "cpu" and cfg.train.packing == "auto" else dtype_bytes(cfg.base.compute_dtype)


def copies_keys(hardware: Hardware) -> bool:
    """FlexAttention, which is taken on GPUs where it is exact, reads them in place."""
    return hardware.kind == "cpu"


def at_peak(parts: Mapping[str, int]) -> dict[str, int]:
    """Of `rank_parts` those that are there at once, at most."""
    largest = max(PHASES, key=lambda phase: sum(parts[key] for key in phase))
    others = {key for phase in PHASES if phase != largest for key in phase}
    return {key: size for key, size in parts.items() if key not in others}


def peak_bytes(parts: Mapping[str, int]) -> int:
    """The sum of `at_peak`."""
    return sum(at_peak(parts).values())


def rank_parts(cfg: RunConfig, facts: BaseFacts, setting: Setting) -> dict[str, int]:
    """Bytes of one rank by cause, under the names that `Plan` gives them."""
    dense, size = dtype_bytes(cfg.base.compute_dtype), setting.work.step
    adapters = sum(trained_numbers(a, facts) for a in cfg.adapters.values()) * 4
    prefixes = sum(prefix_bytes(a, facts, dense) for a in cfg.adapters.values() if a.kind == "prefix")
    return {
        **weight_parts(facts, setting.quantization, dense, holders=setting.holders),
        "adapter_bytes": adapters,
        "best_bytes": sum(file_rows(a) * token_width(a, facts) for a in cfg.adapters.values()) * 4,
        "gradient_bytes": adapters,
        "optimizer_bytes": sum(
            trained_numbers(a, facts) * 4 * (2 if cfg.adapter_train(name).optimizer == "adamw" else 1)
            for name, a in cfg.adapters.items()
        ),
        "activation_bytes": activation_bytes(
            facts,
            tokens=size.tokens,
            dense_bytes=dense,
            is_checkpointed=setting.checkpoints,
            decoder_tokens=decoder_tokens(cfg, size) if facts.is_encoder_decoder else 0,
            row_tokens=size.row_tokens,
            attention_bytes=setting.attention_bytes,
            shared_tokens=size.shared_tokens if setting.copies_keys else 0,
        )
        + prefixes,
        "dequantized_bytes": dequantized_bytes(facts, setting.quantization, dense),
        "logits_bytes": logits_bytes(facts, size, dense),
        "update_bytes": update_bytes(adapters),
        "evaluation_bytes": evaluations_bytes(cfg, facts, setting),
    }


def update_bytes(trained_bytes: int) -> int:
    """A copy of the tensors and their moments, to go back to, and what the optimizer makes of them: once their size
    beside AdamW's two moments, twice beside Adafactor's one."""
    return 4 * trained_bytes


def dequantized_bytes(facts: BaseFacts, quantization: Quantization, dense: int) -> int:
    """The largest linear weight; nf4 also makes its absmax float32, 4 bytes for 64 weights."""
    largest = max(linear.rows * linear.cols for unit in facts.units for linear in unit.linears)
    return 0 if quantization == "none" else int(largest * (dense + (1 / 16 if quantization == "nf4" else 0)))


def logits_bytes(facts: BaseFacts, size: PassSize, dense: int) -> int:
    """At the targets of a step: logits, their float32 copy and its gradient."""
    return size.targets * facts.vocab_size * (dense + 8)


def evaluations_bytes(cfg: RunConfig, facts: BaseFacts, setting: Setting) -> int:
    """Of the largest pass of an evaluation."""
    sizes = (
        evaluation_bytes(
            facts,
            size,
            dense_bytes=dtype_bytes(cfg.base.compute_dtype),
            decoder_tokens=decoder_tokens(cfg, size) if facts.is_encoder_decoder else 0,
            attention_bytes=setting.attention_bytes,
        )
        for size in setting.work.evaluated
    )
    return max(sizes, default=0)


def weight_parts(facts: BaseFacts, quantization: Quantization, dense: int, *, holders: int) -> dict[str, int]:
    """The parts of `rank_parts` that are the base's stored weights, which a rank holds whatever it is used for."""
    padded = sorted(unit.packed_bytes(quantization, dense, holders) for unit in facts.stored_units)
    return {
        "slice_bytes": sum(padded) // holders,
        "gathered_units_bytes": sum(padded[-2:]) if holders > 1 else 0,
    }


def activation_bytes(
    facts: BaseFacts,
    *,
    tokens: int,
    dense_bytes: int,
    is_checkpointed: bool,
    decoder_tokens: int = 0,
    row_tokens: int = 1,
    attention_bytes: int | None = None,
    shared_tokens: int = 0,
) -> int:
    """Bytes of activations of one pass of `tokens` tokens, e = `dense_bytes` an element.

    A block keeps for each token: e * 4A for attention (queries, keys and values as attention reads them, that is for
    every head, and its output); e * F for a plain activation, 3 e * F for a gated one (gate, activated gate, up), three
    times F more where gelu is written out in Python; 4 bytes an element of what its norms see (float32 copies: H each,
    A for norms of queries and keys); 4 bytes a head and a norm for their scalars. A frozen linear keeps nothing.
    A block of a decoder beside an encoder also keeps e * 2A for each of its own tokens (query and output of the cross
    attention) and for each of the encoder's (key and value). T5's blocks keep a mask with their bias, e * heads for
    each pair of tokens of a row that see each other. Where a pass is packed, attention keeps e * 2K more for each row
    and virtual token that it sees.
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
        attention_bytes: of an element in attention, where it is not `dense_bytes`.
        shared_tokens: virtual tokens that are computed once and copied for each row, counted for every row.
    """
    blocks, attention = _blocks(facts), attention_bytes or dense_bytes
    num_encoder_blocks = len(blocks) - facts.num_decoder_layers
    text_tokens, width = tokens - decoder_tokens, facts.num_heads * facts.head_dim * dense_bytes
    pair_bytes = _pair_bytes(facts, dense_bytes)
    decoder_row_tokens = decoder_tokens * row_tokens // max(1, text_tokens)
    each = []
    copied = shared_tokens * 2 * facts.num_kv_heads * facts.head_dim * attention
    for unit in blocks[:num_encoder_blocks]:
        own = _block_activation(unit, facts, dense_bytes, attention) + row_tokens * pair_bytes
        each.append(text_tokens * own + copied)
    for unit in blocks[num_encoder_blocks:]:
        own = (
            _block_activation(unit, facts, dense_bytes, attention)
            + 2 * width
            + (row_tokens + decoder_row_tokens) * pair_bytes
        )
        each.append(decoder_tokens * own + text_tokens * 2 * width)
    inputs = num_encoder_blocks * text_tokens + facts.num_decoder_layers * decoder_tokens
    kept = inputs * facts.hidden_size * dense_bytes + max(each) if is_checkpointed else sum(each)
    widest = max(linear.cols for unit in blocks for linear in unit.linears)  # F, or A where attention is wider
    return kept + max(text_tokens, decoder_tokens) * (3 * widest * dense_bytes + 8 * facts.hidden_size)


def _block_activation(unit: UnitFacts, facts: BaseFacts, dense_bytes: int, attention_bytes: int) -> int:
    """Bytes a token that autograd keeps of one block."""
    hidden, heads = facts.hidden_size, facts.num_heads * facts.head_dim
    feed, is_gated = _feed(unit, facts)
    activated = (3 if is_gated else 1) + (3 if facts.activation in _TANH_BY_HAND else 0)
    norms = [t for t in unit.dense if t.name.endswith(".weight") and len(t.shape) == 1]
    seen = sum(hidden if norm.shape[0] == hidden else heads for norm in norms)
    scalars = 4 * (facts.num_heads + len(norms))
    return attention_bytes * 4 * heads + dense_bytes * activated * feed + 4 * seen + scalars


def _blocks(facts: BaseFacts) -> list[UnitFacts]:
    return [unit for unit in facts.units if unit.kind == "block"]


def _feed(unit: UnitFacts, facts: BaseFacts) -> tuple[int, bool]:
    """F, and whether a gate as wide goes with it."""
    hidden, heads = facts.hidden_size, facts.num_heads * facts.head_dim
    inner = [linear.cols for linear in unit.linears]
    feed = max((cols for cols in inner if cols not in (hidden, heads)), default=max(inner))
    return feed, sum(x.rows for x in unit.linears if x.cols == hidden and x.rows in (feed, 2 * feed)) >= 2 * feed


def _pair_bytes(facts: BaseFacts, dense_bytes: int) -> int:
    """Of T5's bias, for each pair of tokens that see each other."""
    has_bias = any("relative_attention_bias" in tensor.name for unit in _blocks(facts) for tensor in unit.dense)
    return facts.num_heads * dense_bytes if has_bias else 0


def evaluation_bytes(
    facts: BaseFacts, size: PassSize, *, dense_bytes: int, decoder_tokens: int = 0, attention_bytes: int | None = None
) -> int:
    """Bytes of one pass without a backward, beside the weights.

    One block at a time holds for each token e * 2H (its input, and that normed), e = `dense_bytes`, and the larger of
    its two halves: e * 3 F for up, activated and product, 4 with a gate, 5 for a gelu that is written out in Python,
    or attention's e * (4 A + 4 K), of packed passes e * (5 A + 8 K) with copies of parts of like lengths. Where labels
    are compared, 8 bytes for each logit of each target (float32, and their logarithms); where texts are written, logits
    of the last position of each row, e * H for the text itself, a mask, and the cache of keys and values, e * 2 K for
    each layer and token; of an encoder-decoder e * 2 A for each layer of the decoder and token of either side, and the
    encoder's output.

    Peak of live storages on CPU over this, 4 blocks, 6 rows of 90 tokens, both dtypes: 0.96 to 1.06
    for llama and gpt2, 0.84 to 0.97 for a qwen3 whose attention is three times as wide as H and for T5 v1.1.

    Args:
        size: of the pass.
        decoder_tokens: those of its tokens that go through the decoder of an encoder-decoder.
        attention_bytes: of an element in packed attention, where it is not `dense_bytes`; in copies then.
    """
    e, hidden = dense_bytes, facts.hidden_size
    heads, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    is_written, attention = size.new_tokens > 0, attention_bytes or dense_bytes
    read = size.tokens - (decoder_tokens if facts.is_encoder_decoder else size.rows * size.new_tokens)
    by_hand, has_copies = facts.activation in _TANH_BY_HAND, not is_written and not facts.is_encoder_decoder
    shapes = [_feed(unit, facts) for unit in _blocks(facts)]
    feed = max(of_one * (5 if by_hand else 3 + is_gated) for of_one, is_gated in shapes)
    attended = e * (5 * heads + 8 * keys if has_copies else 4 * heads + 4 * keys)
    if attention != e and has_copies:
        attended = e * (heads + 2 * keys) + attention * (6 * heads + 4 * keys)
    block = e * 2 * hidden + max(e * feed, attended) + size.row_tokens * _pair_bytes(facts, e)
    logits = facts.vocab_size * (size.rows * (e + 4) if is_written else 8 * size.targets)
    if facts.is_encoder_decoder:
        cache = e * 2 * heads * facts.num_decoder_layers * (read + decoder_tokens) if is_written else 0
        at_once = decoder_tokens - size.rows * size.new_tokens  # what is written goes through one by one
        return max(read * block, read * e * hidden + cache + max(logits, at_once * block))
    if not is_written:
        return max(read * block, logits)
    cache = e * 2 * keys * facts.num_layers * size.tokens
    return cache + max(read * (block + e * (hidden + size.row_tokens)), logits)


def gathered_bytes(facts: BaseFacts, quantization: Quantization, dense: int, *, holders: int) -> int:
    """Gathered output of one pass: every unit in forward, and all but embeddings again in backward."""
    if holders == 1:
        return 0
    return sum(
        unit.packed_bytes(quantization, dense, holders) * (1 if unit.kind in ("embedding", "positions") else 2)
        for unit in facts.units
    )
