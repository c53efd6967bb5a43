"""Memory of one rank by cause, and bytes gathered in a pass: arithmetic over `facts`.

Deciding, judging and printing is the package itself.

Source: ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054, section 5. What autograd keeps was read from the
model code of transformers 5.23 and compared with live storages on CPU (the docstring of `activation_bytes`).

Shapes:  H hidden   A heads * head size   F feed-forward   V vocabulary   P virtual tokens   T tokens of a pass
"""

import math
from dataclasses import dataclass
from typing import Literal

from peftscale.config import Quantization, RunConfig
from peftscale.facts import BaseFacts, UnitFacts, dtype_bytes

Mode = Literal["replicated", "world"]
_TANH_BY_HAND = ("gelu_new", "gelu_fast")  # written out in Python, so that autograd keeps every step


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be turned to make a run fit."""

    world: int
    sharding: Mode
    quantization: Quantization
    checkpoints: bool
    tokens: int


def rank_parts(cfg: RunConfig, facts: BaseFacts, setting: Setting) -> dict[str, int]:
    """Bytes of one rank by cause, under the names that `Plan` gives them."""
    dense, world = dtype_bytes(cfg.base.compute_dtype), setting.world
    is_sharded = setting.sharding == "world"
    padded = sorted(unit.packed_bytes(setting.quantization, dense, world) for unit in facts.stored_units)
    adapters = sum(a.length for a in cfg.adapters.values()) * facts.hidden_size * 4
    weights = [linear.rows * linear.cols for unit in facts.units for linear in unit.linears]
    # nf4 also makes its absmax float32: 4 bytes for 64 weights.
    extra = 1 / 16 if setting.quantization == "nf4" else 0
    return {
        "slice_bytes": sum(padded) // world if is_sharded else facts.packed_bytes(setting.quantization, dense),
        "gathered_units_bytes": sum(padded[-2:]) if is_sharded else 0,
        "adapter_bytes": adapters,
        "gradient_bytes": adapters,
        "optimizer_bytes": adapters * (2 if cfg.train.optimizer == "adamw" else 1),
        "activation_bytes": activation_bytes(
            facts, tokens=setting.tokens, dense_bytes=dense, is_checkpointed=setting.checkpoints
        ),
        "dequantized_bytes": 0 if setting.quantization == "none" else int(max(weights) * (dense + extra)),
        "logits_bytes": _targets(cfg, setting) * facts.vocab_size * (dense + 8),
    }


def activation_bytes(facts: BaseFacts, *, tokens: int, dense_bytes: int, is_checkpointed: bool) -> int:
    """Bytes of activations of one pass of `tokens` tokens, e = `dense_bytes` an element.

    A block keeps for each token: e * 4A for attention (queries, keys and values as attention reads them, that is for
    every head, and its output); e * F for a plain activation, 3 e * F for a gated one (gate, activated gate, up), three
    times F more where gelu is written out in Python; 4 bytes an element of what its norms see (float32 copies: H each,
    A for norms of queries and keys); 4 bytes a head and a norm for their scalars. A frozen linear keeps nothing.
    With checkpointing, every block keeps its input e * H, and one block at a time keeps all of the above. On top:
    3 e * max(F, A) for gradients in flight and 8 H for the last norm. Attention is counted as linear in the row's
    length; the eager one of families without scaled-dot-product attention takes more, and so does the second one of an
    encoder-decoder.

    Peak of live storages on CPU over this, 6 blocks, 4 rows of 256 tokens, both dtypes, with and without
    checkpointing: 0.84 to 1.12 for llama, gpt2, opt and gpt_neox; 0.75 to 1.28 for a qwen3 whose attention is eight
    times as wide as H.
    """
    blocks = [unit for unit in facts.units if unit.kind == "block"]
    each = [_block_activation(unit, facts, dense_bytes) for unit in blocks]
    kept = len(blocks) * facts.hidden_size * dense_bytes + max(each) if is_checkpointed else sum(each)
    widest = max(linear.cols for unit in blocks for linear in unit.linears)  # F, or A where attention is wider
    return tokens * (kept + 3 * widest * dense_bytes + 8 * facts.hidden_size)


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
    return sum(
        unit.packed_bytes(setting.quantization, dense, setting.world)
        * (1 if unit.kind in ("embedding", "positions") else 2)
        for unit in facts.units
    )


def target_tokens(cfg: RunConfig) -> int:
    """Most target tokens of one example; a label word has no more tokens than UTF-8 bytes."""
    if cfg.task.labels is None:
        return cfg.task.max_target_tokens
    return max(len(word.encode()) for word in cfg.task.labels.values()) + 1


def _targets(cfg: RunConfig, setting: Setting) -> int:
    """Most target positions of one pass: rows as short as they can be, as many as there are."""
    target = target_tokens(cfg)
    row = min(a.length for a in cfg.adapters.values()) + 1 + target
    rows = math.ceil(len(cfg.adapters) * cfg.train.examples_per_step / setting.world)
    return max(1, min(rows, setting.tokens // row)) * target
