"""Families of models as a table: names and shapes of their weights from config.json alone.

No torch, so that a laptop plans 405B in milliseconds. What the table does not cover is `skeleton`; a test
compares the two for every family here.

Source: model code of transformers 5.23.

Sizes in the table:  H hidden   A heads * head size   K key-value heads * head size   D head size   F feed-forward
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftscale.facts.units import BaseFacts, Kind, LinearFacts, TensorFacts, UnitFacts, in_order, sorted_unit


@dataclass(frozen=True, slots=True)
class _Family:
    """One architecture: linears are (name, rows, cols, bias), where bias is 'yes', 'no' or a key of the config."""

    linears: tuple[tuple[str, str, str, str], ...]
    norms: tuple[str, ...]
    """'name:size', of the block."""
    norm_bias: bool = False
    names: tuple[str, str, str, str, str] = ("model.embed_tokens", "", "model.layers", "model.norm", "lm_head")
    """Embedding, positions ('' where there is no such table), blocks, last norm, head."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Where the config's name of a size is not the usual one."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that is left out."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Values for which the table holds; with others the skeleton is asked. A key left out has this value."""
    extra_positions: int = 0


def _qkvo(bias: str, out_bias: str, out: str = "o_proj") -> tuple[tuple[str, str, str, str], ...]:
    inner = tuple((f"self_attn.{name}_proj", rows, "H", bias) for name, rows in (("q", "A"), ("k", "K"), ("v", "K")))
    return (*inner, (f"self_attn.{out}", "H", "A", out_bias))


def _gated(bias: str) -> tuple[tuple[str, str, str, str], ...]:
    return (
        ("mlp.gate_proj", "F", "H", bias),
        ("mlp.up_proj", "F", "H", bias),
        ("mlp.down_proj", "H", "F", bias),
    )


_TWO_NORMS = ("input_layernorm:H", "post_attention_layernorm:H")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm:H", "post_feedforward_layernorm:H")
_GEMMA = _Family(
    (*_qkvo("attention_bias", "attention_bias"), *_gated("no")),
    _TWO_NORMS,
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
)
_FAMILIES: dict[str, _Family] = {
    "llama": _Family((*_qkvo("attention_bias", "attention_bias"), *_gated("mlp_bias")), _TWO_NORMS),
    "mistral": _Family((*_qkvo("no", "no"), *_gated("no")), _TWO_NORMS, defaults={"num_key_value_heads": 8}),
    "qwen2": _Family((*_qkvo("yes", "no"), *_gated("no")), _TWO_NORMS, defaults={"num_key_value_heads": 32}),
    "qwen3": _Family(
        (*_qkvo("attention_bias", "attention_bias"), *_gated("no")),
        (*_TWO_NORMS, "self_attn.q_norm:D", "self_attn.k_norm:D"),
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma": _GEMMA,
    "gemma2": _Family(_GEMMA.linears, _FOUR_NORMS, defaults={**_GEMMA.defaults, "num_key_value_heads": 4}),
    "gemma3_text": _Family(
        _GEMMA.linears,
        (*_FOUR_NORMS, "self_attn.q_norm:D", "self_attn.k_norm:D"),
        defaults={**_GEMMA.defaults, "num_key_value_heads": 4},
    ),
    "phi3": _Family(
        (
            ("self_attn.qkv_proj", "A+2K", "H", "no"),
            ("self_attn.o_proj", "H", "A", "no"),
            ("mlp.gate_up_proj", "2F", "H", "no"),
            ("mlp.down_proj", "H", "F", "no"),
        ),
        _TWO_NORMS,
    ),
    "olmo2": _Family(
        (*_qkvo("attention_bias", "attention_bias"), *_gated("no")),
        (
            "self_attn.q_norm:A",
            "self_attn.k_norm:K",
            "post_attention_layernorm:H",
            "post_feedforward_layernorm:H",
        ),
    ),
    "gpt2": _Family(
        (
            ("attn.c_attn", "3H", "H", "yes"),
            ("attn.c_proj", "H", "H", "yes"),
            ("mlp.c_fc", "F", "H", "yes"),
            ("mlp.c_proj", "H", "F", "yes"),
        ),
        ("ln_1:H", "ln_2:H"),
        norm_bias=True,
        names=("transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f", "lm_head"),
        keys={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        defaults={"n_inner": None, "tie_word_embeddings": True, "activation_function": "gelu_new"},
        needs={"add_cross_attention": False},
    ),
    "opt": _Family(
        (
            *_qkvo("enable_bias", "enable_bias", "out_proj"),
            ("fc1", "F", "H", "enable_bias"),
            ("fc2", "H", "F", "enable_bias"),
        ),
        ("self_attn_layer_norm:H", "final_layer_norm:H"),
        norm_bias=True,
        names=(
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
            "model.decoder.layers",
            "model.decoder.final_layer_norm",
            "lm_head",
        ),
        keys={"intermediate_size": "ffn_dim"},
        defaults={"enable_bias": True, "tie_word_embeddings": True, "activation_function": "relu"},
        needs={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": "hidden_size",
        },
        extra_positions=2,
    ),
    "gpt_neox": _Family(
        (
            ("attention.query_key_value", "3H", "H", "attention_bias"),
            ("attention.dense", "H", "H", "attention_bias"),
            ("mlp.dense_h_to_4h", "F", "H", "yes"),
            ("mlp.dense_4h_to_h", "H", "F", "yes"),
        ),
        _TWO_NORMS,
        norm_bias=True,
        names=("gpt_neox.embed_in", "", "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head"),
        defaults={"attention_bias": True, "hidden_act": "gelu"},
    ),
}


def read(model: str, raw: Mapping[str, Any]) -> BaseFacts | None:
    """The facts of a config.json, or None where the table does not cover it."""
    return _t5(model, raw) if raw["model_type"] in ("t5", "mt5") else _decoder(model, raw)


def _decoder(model: str, raw: Mapping[str, Any]) -> BaseFacts | None:
    family = _FAMILIES.get(raw["model_type"])
    if family is None:
        return None
    cfg = {**family.defaults, **raw}
    usual = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    keys = {key: family.keys.get(key, key) for key in (*usual, "max_position_embeddings")}
    if not all(key in cfg for key in keys.values()):
        return None
    if "short_factor" in str(cfg.get("rope_parameters") or cfg.get("rope_scaling")):
        return None  # longrope: what its old spellings and left out keys mean for the positions is transformers' to say
    if any(cfg.get(key, want) not in (want, cfg.get(str(want))) for key, want in family.needs.items()):
        return None
    sized = {name: cfg[key] for name, key in keys.items() if cfg[key] is not None or name != "intermediate_size"}
    if not has(sized, *sized):
        return None
    hidden, feed, layers, heads, vocab, positions = (cfg[key] for key in keys.values())
    size = cfg.get("head_dim") or hidden // heads
    groups = cfg.get("num_key_value_heads") or heads
    sizes = {"H": hidden, "F": feed or 4 * hidden, "A": heads * size, "K": groups * size, "D": size}
    embed, table, blocks, last, head = family.names
    units = [_unit(embed, "embedding", (), [("weight", (vocab, hidden))])]
    if table:
        units.append(_unit(table, "positions", (), [("weight", (positions + family.extra_positions, hidden))]))
    for index in range(layers):
        units.append(_block(f"{blocks}.{index}", family, cfg, sizes))
    parts = ("weight", "bias") if family.norm_bias else ("weight",)
    units.append(_unit(last, "norm", (), [(part, (hidden,)) for part in parts]))
    is_tied = bool(cfg.get("tie_word_embeddings", False))
    units.append(_head(head, embed if is_tied else head, vocab, hidden))
    act = cfg.get("hidden_activation") or cfg.get("hidden_act") or cfg.get("activation_function") or "silu"
    return BaseFacts(
        model=model,
        model_type=raw["model_type"],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size,
        activation=act,
        vocab_size=vocab,
        max_positions=positions,
        is_tied=is_tied,
        is_encoder_decoder=False,
        units=in_order(units),
    )


def _block(name: str, family: _Family, cfg: Mapping[str, Any], sizes: Mapping[str, int]) -> UnitFacts:
    linears = [
        (row[0], _size(row[1], sizes), _size(row[2], sizes), row[3] == "yes" or bool(cfg.get(row[3], False)))
        for row in family.linears
    ]
    dense: list[tuple[str, tuple[int, ...]]] = []
    for norm in family.norms:
        norm_name, _, size = norm.partition(":")
        for part in ("weight", "bias") if family.norm_bias else ("weight",):
            dense.append((f"{norm_name}.{part}", (sizes[size],)))
    return _unit(name, "block", linears, dense)


def _size(text: str, sizes: Mapping[str, int]) -> int:
    """'A+2K' -> a number."""
    return sum(int(term[:-1] or 1) * sizes[term[-1]] for term in text.split("+"))


def _t5(model: str, raw: Mapping[str, Any]) -> BaseFacts | None:
    """T5, T5 v1.1 and mT5. The last two have a head of their own, though transformers ties it until it sees the
    weights. A config of T5 v1.1 says that the head is not tied or, written by a newer transformers, that outputs are
    not scaled."""
    if not has(raw, "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"):
        return None
    hidden, size, feed, heads, vocab = (raw[key] for key in ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size"))
    is_mt5 = raw["model_type"] == "mt5"
    act = str(raw.get("feed_forward_proj", "gated-gelu" if is_mt5 else "relu"))
    inputs = ("wi_0", "wi_1") if act.startswith("gated") else ("wi",)
    depths = {"encoder": raw["num_layers"], "decoder": raw.get("num_decoder_layers") or raw["num_layers"]}
    units = [_unit("shared", "embedding", (), [("weight", (vocab, hidden))])]
    for stack, depth in depths.items():
        attentions = ("SelfAttention", "EncDecAttention")[: 1 if stack == "encoder" else 2]
        for index in range(depth):
            linears: list[tuple[str, int, int, bool]] = []
            dense: list[tuple[str, tuple[int, ...]]] = []
            for at, attention in enumerate(attentions):
                linears += [(f"layer.{at}.{attention}.{x}", heads * size, hidden, False) for x in "qkv"]
                linears.append((f"layer.{at}.{attention}.o", hidden, heads * size, False))
            last = f"layer.{len(attentions)}.DenseReluDense"
            linears += [(f"{last}.{name}", feed, hidden, False) for name in inputs]
            linears.append((f"{last}.wo", hidden, feed, False))
            dense += [(f"layer.{at}.layer_norm.weight", (hidden,)) for at in range(len(attentions) + 1)]
            if index == 0:
                buckets = raw.get("relative_attention_num_buckets", 32)
                dense.append(("layer.0.SelfAttention.relative_attention_bias.weight", (buckets, heads)))
            units.append(_unit(f"{stack}.block.{index}", "block", linears, dense))
        units.append(_unit(f"{stack}.final_layer_norm", "norm", (), [("weight", (hidden,))]))
    is_tied = not is_mt5 and False not in (raw.get("tie_word_embeddings"), raw.get("scale_decoder_outputs"))
    units.append(_head("lm_head", "shared" if is_tied else "lm_head", vocab, hidden))
    return BaseFacts(
        model=model,
        model_type=raw["model_type"],
        hidden_size=hidden,
        num_layers=sum(depths.values()),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        activation="gelu_new" if act == "gated-gelu" else act.removeprefix("gated-"),
        vocab_size=vocab,
        max_positions=None,
        is_tied=is_tied,
        is_encoder_decoder=True,
        units=in_order(units),
        num_decoder_layers=depths["decoder"],
    )


def _unit(
    name: str,
    kind: Kind,
    linears: Sequence[tuple[str, int, int, bool]],
    dense: Sequence[tuple[str, tuple[int, ...]]],
) -> UnitFacts:
    """A unit from names relative to it; the biases of its linears are added to the dense tensors."""
    found = [LinearFacts(f"{name}.{short}", rows, cols, bias) for short, rows, cols, bias in linears]
    tensors = [TensorFacts(f"{name}.{short}", shape) for short, shape in dense]
    tensors += [TensorFacts(f"{linear.name}.bias", (linear.rows,)) for linear in found if linear.has_bias]
    return sorted_unit(name, kind, found, tensors)


def _head(name: str, owner: str, vocab: int, hidden: int) -> UnitFacts:
    return UnitFacts(name, "head", (), (TensorFacts(f"{owner}.weight", (vocab, hidden)),))


def has(raw: Mapping[str, Any], *keys: str) -> bool:
    """Every key is there and a positive whole number."""
    return all(isinstance(raw.get(key), int) and raw[key] > 0 for key in keys)


def mixtral_experts(raw: Mapping[str, Any]) -> list[TensorFacts]:
    hidden, feed, experts = raw["hidden_size"], raw["intermediate_size"], raw.get("num_local_experts", 8)
    shapes = {
        "gate.weight": (experts, hidden),
        "experts.gate_up_proj": (experts, 2 * feed, hidden),
        "experts.down_proj": (experts, hidden, feed),
    }
    layers = range(raw["num_hidden_layers"])
    return [TensorFacts(f"model.layers.{i}.mlp.{name}", shape) for i in layers for name, shape in shapes.items()]
