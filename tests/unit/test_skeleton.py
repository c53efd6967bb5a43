"""The skeleton: what of a transformers model is quantised, what stays dense, what is refused, and that what is built
computes what transformers computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peftscale.base import load, padded, skeleton
from peftscale.base.linear import BlobLinear, FrozenLinear
from peftscale.base.padded import Row
from peftscale.config import BaseConfig
from peftscale.errors import ModelError

# Every axis has its own size, so that rows and columns cannot match by accident.
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 50}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
# Windows shorter than the text, soft caps low enough to bend logits: what a family adds must be at work.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 14},
    "gemma": {"head_dim": 14},
    "gemma2": {
        "head_dim": 14,
        "sliding_window": 8,
        "query_pre_attn_scalar": 14,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {"head_dim": 14, "sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "phi": {"num_key_value_heads": 6},  # its head has a bias
    "olmo2": {},
    "starcoder2": {"sliding_window": 8},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 6},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 3},
    "gpt2": _GPT2,
    "gpt2 untied": {**_GPT2, "tie_word_embeddings": False},
}


def _config(family: str) -> dict[str, Any]:
    own = FAMILIES[family]
    return own if "model_type" in own else {"model_type": family, **_SIZES, **own}


def _base_config(directory: Path, **changes: Any) -> BaseConfig:
    content = {
        "model": str(directory),
        "quantization": "none",
        "compute_dtype": "float32",
        "sharding": "replicated",
        "checkpoint_activations": False,
    }
    return BaseConfig(**{**content, **changes})


def _load(directory: Path, **changes: Any) -> load.Base:
    return load.load(_base_config(directory, **changes), sharding="replicated", device=torch.device("cpu"))


def _write(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _build(config: dict[str, Any], quantization: str = "nf4") -> skeleton.Skeleton:
    made = AutoConfig.for_model(**config)
    return skeleton.build(made, quantization=quantization, compute_dtype=torch.float32, where="here")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_transformers_own_logits_with_and_without_a_prompt(tmp_path: Path, family: str) -> None:
    directory = tiny.save_base(tmp_path / "base", _config(family))
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 97, (length,), generator=draw) for length in (21, 13)]
    prompt_PH = torch.randn(5, 24, generator=draw)
    rows = [Row(prompt, [*ids.tolist(), 0], len(ids)) for ids, prompt in zip(texts, (None, prompt_PH), strict=True)]
    with torch.no_grad():
        ours_MV = padded.target_logits(_load(directory), rows)  # one padded batch
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        embedded_1TH = theirs.get_input_embeddings()(texts[1][None])
        joined_1SH = torch.cat([prompt_PH[None], embedded_1TH], dim=1)
        want_MV = torch.cat(
            [theirs(input_ids=texts[0][None]).logits[0], theirs(inputs_embeds=joined_1SH).logits[0, 5:]]
        )
    assert want_MV.std() > 0.05
    error = float((ours_MV - want_MV).abs().max() / want_MV.abs().max())
    assert error < 2e-6, error  # measured 2.0e-7 for gemma2, 0 for most


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_becomes_a_blob_and_all_else_stays_dense_and_frozen(family: str) -> None:
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_config(family)))
    built = _build(_config(family))
    linear_names = {
        name
        for name, module in original.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
        and module is not original.get_output_embeddings()
    }
    modules = dict(built.model.named_modules())
    assert {name for name, module in modules.items() if isinstance(module, BlobLinear)} == linear_names
    assert {entry.source.removesuffix(".weight") for entry in built.entries if entry.is_blob} == linear_names
    assert {entry.source for entry in built.entries} == set(dict(original.named_parameters()))
    assert [name for name, parameter in built.model.named_parameters() if parameter.requires_grad] == []
    assert all(parameter.is_meta for parameter in built.model.parameters())
    assert len(built.blocks) == 2


def test_conv1d_of_gpt2_is_stored_as_rows_of_outputs(tmp_path: Path) -> None:
    directory = tiny.save_base(tmp_path / "base", _GPT2)
    frozen = _load(directory).model.get_submodule("transformer.h.0.attn.c_attn")
    original = AutoModelForCausalLM.from_pretrained(directory).get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(frozen, FrozenLinear)
    assert original.weight.shape == (24, 72)  # (in, out)
    assert torch.equal(frozen.weight_in(torch.float32), original.weight.T)
    x = torch.randn(3, 24)
    torch.testing.assert_close(frozen(x), original(x), rtol=0, atol=1e-6)  # measured 0


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_tied_head_and_its_embedding_are_one_parameter(tmp_path: Path, quantization: str) -> None:
    tied = tiny.save_base(tmp_path / "tied", _GPT2)
    model = _load(tied, quantization=quantization).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert [name for name, _ in model.named_parameters() if "lm_head" in name or "wte" in name] == [
        "transformer.wte.weight"
    ]
    untied = tiny.save_base(tmp_path / "untied", {**_GPT2, "tie_word_embeddings": False})
    model = _load(untied, quantization=quantization).model
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_fused_experts_are_refused_by_their_name() -> None:
    mixtral = {"model_type": "mixtral", **_SIZES, "num_local_experts": 3}
    with pytest.raises(
        ModelError, match=r"here: 6 weight.* model\.layers\.0\.mlp\.experts\.gate_up_proj \(3, 80, 24\)"
    ):
        _build(mixtral)


@pytest.mark.parametrize("head", ["tied", "its own"])
def test_an_encoder_decoder_has_the_blocks_of_both_stacks_and_every_linear_in_them_is_a_blob(head: str) -> None:
    t5 = {"model_type": "t5", "vocab_size": 97, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_heads": 6}
    t5 |= {"num_decoder_layers": 3, "tie_word_embeddings": head == "tied"}
    built, original = _build(t5), AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**t5))
    assert [type(block).__name__ for block in built.blocks] == ["T5Block"] * 5
    linear_names = {
        name
        for name, module in original.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not original.lm_head
    }
    assert len(linear_names) == 2 * 6 + 3 * 10
    assert {entry.source.removesuffix(".weight") for entry in built.entries if entry.is_blob} == linear_names
    own = {"lm_head.weight"} if head == "its own" else set()
    assert {entry.source for entry in built.entries} == set(dict(original.named_parameters())) | own
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in built.model.parameters())


def test_an_encoder_decoder_without_two_known_stacks_is_refused() -> None:
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    parts = {side: {"model_type": "bert", **sizes} for side in ("encoder", "decoder")}
    with pytest.raises(ModelError, match=r"base.model=here: found no stack of .* blocks in Bert.*one for each of enc"):
        _build({"model_type": "encoder-decoder", **parts})


def test_an_encoder_that_transformers_would_build_as_a_language_model_is_refused() -> None:
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    with pytest.raises(ModelError, match=r"base.model=here: bert is an encoder.*does not say is_decoder"):
        _build({"model_type": "bert", **sizes})
    assert len(_build({"model_type": "bert", **sizes, "is_decoder": True}).blocks) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonesuch"}, "model type `nonesuch` but Transformers does not recognize"),
        ({**_SIZES}, "Should have a `model_type` key"),
        ({"model_type": "llama", **_SIZES, "hidden_size": "wide"}, "'hidden_size': .*expected int, got str .*'wide'"),
        ({"model_type": "llama", **_SIZES, "hidden_size": 25}, "hidden size .25. is not a multiple"),
    ],
    ids=["unknown type", "no type", "wrong type of a value", "values that do not fit"],
)
def test_a_config_that_transformers_cannot_read_is_refused_with_its_reason(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    _write(tmp_path, config)
    with pytest.raises(ModelError, match=rf"base.model={tmp_path}: transformers cannot read .*{message}"):
        skeleton.read_config(tmp_path)


def test_a_model_without_a_causal_head_is_refused() -> None:
    with pytest.raises(ModelError, match=r"base.model=here: transformers cannot build a language model"):
        _build({"model_type": "clip"})
