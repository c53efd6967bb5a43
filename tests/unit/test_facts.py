"""Facts agree with the models that transformers builds, and with the files on disk."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from transformers import AutoConfig

from peftscale import facts
from peftscale.base import prefixed
from peftscale.base import skeleton as base_skeleton
from peftscale.errors import ModelError
from peftscale.facts import families, skeleton

MODELS = Path(__file__).parents[2] / "configs" / "models"

# Every axis has its own size, so that rows and columns cannot match by accident.
_LLAMA_LIKE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 50,
    "pad_token_id": 0,
}
_PLAIN = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_OPT = {**_PLAIN, "ffn_dim": 40, "word_embed_proj_dim": 24}
_GPT2 = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 50}
_T5 = {"vocab_size": 97, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", _LLAMA_LIKE),
    ("llama", {**_LLAMA_LIKE, "attention_bias": True, "mlp_bias": True, "head_dim": 14, "tie_word_embeddings": True}),
    ("llama", _PLAIN),
    ("mistral", _LLAMA_LIKE),
    ("qwen2", _LLAMA_LIKE),
    ("qwen3", {**_LLAMA_LIKE, "attention_bias": True}),
    ("gemma", _LLAMA_LIKE),
    ("gemma2", _LLAMA_LIKE),
    ("gemma3_text", {**_LLAMA_LIKE, "head_dim": 14}),
    ("phi3", _LLAMA_LIKE),
    ("olmo2", _LLAMA_LIKE),
    ("gpt2", _GPT2),
    ("gpt2", {**_GPT2, "n_inner": 41, "tie_word_embeddings": False}),
    ("opt", _OPT),
    ("opt", {**_OPT, "enable_bias": False}),
    ("gpt_neox", _PLAIN),
    ("gpt_neox", {**_PLAIN, "attention_bias": False}),
    ("t5", _T5),
    ("t5", {**_T5, "feed_forward_proj": "gated-gelu"}),
]


def _write(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("written", ["all keys", "only keys that differ from the defaults"])
@pytest.mark.parametrize(("model_type", "sizes"), FAMILIES)
def test_a_family_by_arithmetic_equals_its_meta_skeleton(
    tmp_path: Path, model_type: str, sizes: dict[str, Any], written: str
) -> None:
    config = AutoConfig.for_model(model_type, **sizes)
    fields = config.to_dict() if written == "all keys" else {**config.to_diff_dict(), "model_type": model_type}
    model_dir = _write(tmp_path, fields)
    counted = families.read(str(model_dir), json.loads((model_dir / "config.json").read_text()))
    if counted is None:
        assert written != "all keys"  # a size was left out, so the default is asked of transformers
        counted = facts.load(model_dir)
    assert counted == skeleton.read(model_dir)


def test_a_wrong_row_in_the_table_would_be_seen(tmp_path: Path) -> None:
    model_dir = _write(tmp_path, AutoConfig.for_model("llama", **_LLAMA_LIKE).to_dict())
    built = skeleton.read(model_dir)
    block = built.units[1]
    swapped = tuple(replace(linear, rows=linear.cols, cols=linear.rows) for linear in block.linears)
    assert facts.load(model_dir) == built
    assert facts.load(model_dir) != replace(
        built, units=(built.units[0], replace(block, linears=swapped), *built.units[2:])
    )


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_published_models_have_their_published_number_of_parameters(name: str, num_parameters: int) -> None:
    found = facts.load(MODELS / name)
    assert found.num_parameters == num_parameters
    assert found == skeleton.read(MODELS / name)


def test_t5_v1_1_counts_its_separate_head_which_the_skeleton_ties() -> None:
    found, built = facts.load(MODELS / "t5-v1.1-xxl"), skeleton.read(MODELS / "t5-v1.1-xxl")
    assert found.num_parameters == 11_135_332_352
    assert not found.is_tied and built.is_tied
    assert found.num_parameters - built.num_parameters == 32_128 * 4096
    assert found.units[:-1] == built.units[:-1]


_T5_V1_1 = {**_T5, "feed_forward_proj": "gated-gelu"}
_BART = {"vocab_size": 97, "d_model": 24, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 50}
_BART |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44}


@pytest.mark.parametrize(
    ("model_type", "sizes", "is_tied"),
    [
        ("t5", {**_T5, "tie_word_embeddings": True}, True),
        ("t5", {**_T5_V1_1, "tie_word_embeddings": False}, False),
        ("t5", {**_T5_V1_1, "tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ("mt5", {**_T5_V1_1, "tie_word_embeddings": False}, False),
        ("mt5", {**_T5_V1_1, "tie_word_embeddings": True}, False),
        ("bart", _BART, True),
    ],
    ids=["t5", "t5 v1.1", "t5 v1.1 of a newer transformers", "mt5", "mt5 of a newer transformers", "bart"],
)
def test_the_facts_of_an_encoder_decoder_are_the_bytes_and_the_layers_of_the_base_that_is_made(
    tmp_path: Path, model_type: str, sizes: dict[str, Any], is_tied: bool
) -> None:
    model_dir = _write(tmp_path, {"model_type": model_type, "is_encoder_decoder": True, **sizes})
    found, config = facts.load(model_dir), AutoConfig.from_pretrained(model_dir)
    for quantization in ("nf4", "int8", "none"):
        made = base_skeleton.build(config, quantization=quantization, compute_dtype=torch.float32, where="here")
        stored = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in made.entries)
        assert found.packed_bytes(quantization, 4) == stored
    assert (found.is_tied, found.is_encoder_decoder, found.num_layers) == (is_tied, True, len(made.blocks))
    shape = prefixed.shape_of(config)
    assert shape.parts == (3, 2, 2)
    assert (found.num_decoder_layers, found.prefix_width) == (2, shape.width)


def test_a_config_outside_the_table_is_read_from_the_skeleton(tmp_path: Path) -> None:
    model_dir = _write(tmp_path, AutoConfig.for_model("starcoder2", **_LLAMA_LIKE).to_dict())
    assert families.read("x", json.loads((model_dir / "config.json").read_text())) is None
    found = facts.load(model_dir)
    assert [unit.kind for unit in found.units] == ["embedding", "block", "block", "norm", "head"]
    # 2 blocks of q, k, v, o and two feed-forward matrices with biases, two norms with biases; embedding, last norm.
    linears = 24 * 24 * 2 + 12 * 24 * 2 + 40 * 24 * 2 + (24 + 12 + 12 + 24 + 40 + 24)
    head = 0 if found.is_tied else 97 * 24
    assert found.num_parameters == 97 * 24 + 2 * (linears + 4 * 24) + 2 * 24 + head


def test_opt_with_projections_around_the_blocks_keeps_them_as_units(tmp_path: Path) -> None:
    config = AutoConfig.for_model("opt", **{**_OPT, "word_embed_proj_dim": 10})
    found = facts.load(_write(tmp_path, config.to_dict()))
    assert [
        (unit.name, unit.linears[0].rows, unit.linears[0].cols) for unit in found.units if unit.kind == "projection"
    ] == [
        ("model.decoder.project_out", 10, 24),
        ("model.decoder.project_in", 24, 10),
    ]


def test_mixtral_is_refused_by_name_as_its_skeleton_is() -> None:
    with pytest.raises(
        ModelError, match=r"mixtral model .*experts.gate_up_proj \(8, 28672, 4096\).*dense model"
    ) as one:
        facts.load(MODELS / "mixtral-8x7b")
    with pytest.raises(ModelError) as other:
        skeleton.read(MODELS / "mixtral-8x7b")
    assert str(one.value) == str(other.value)


def test_fused_experts_of_an_unknown_family_are_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt_oss", **_LLAMA_LIKE, head_dim=4, num_local_experts=5)
    with pytest.raises(ModelError, match=r"gpt_oss model.*experts.gate_up_proj \(5, 24, 80\)"):
        facts.load(_write(tmp_path, config.to_dict()))


def test_a_model_whose_layers_have_heads_of_different_sizes_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"head_dim": 4, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    model_dir = _write(tmp_path, {"model_type": "gemma4_text", **_LLAMA_LIKE, **sizes})
    with pytest.raises(ModelError, match=r"base.model=.*gemma4_text model have heads of different sizes"):
        facts.load(model_dir)
    with pytest.raises(ModelError, match=r"gemma4_text model have heads of different sizes"):
        prefixed.shape_of(AutoConfig.from_pretrained(model_dir))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent", r"absent: no such directory \(looked for .*config.json\)"),
        (lambda d: d, r"has no config.json \(it holds: nothing\)"),
        (lambda d: _text(d, '{"model_type": '), r"config.json: cannot be read as JSON"),
        (lambda d: _text(d, '{"hidden_size": 3}'), r"config.json: has no model_type"),
        (lambda d: _text(d, '{"model_type": "no_such_model"}'), r"transformers cannot build this model"),
        (lambda d: _text(d, '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}'), r"\(awq;"),
        (lambda d: _text(d, '{"model_type": "llama", "hidden_size": "4096"}'), r"hidden_size"),
    ],
)
def test_a_bad_model_directory_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        facts.load(make(tmp_path))


def _text(directory: Path, text: str) -> Path:
    (directory / "config.json").write_text(text)
    return directory


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (65, 127), (257, 192), (130, 129)])
def test_nf4_blob_bytes_are_those_of_a_really_packed_tensor(shape: tuple[int, int]) -> None:
    packed, state = quantize_4bit(torch.randn(shape), blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors = (packed, state.absmax, state.state2.absmax, state.offset)
    assert facts.blob_bytes(*shape, "nf4", 2) == sum(tensor.nbytes for tensor in tensors)


def test_blob_bytes_by_hand() -> None:
    assert facts.blob_bytes(3, 5, "nf4", 2) == 8 + 1 + 4 + 4  # 15 weights
    assert facts.blob_bytes(512, 64, "nf4", 2) == 16_384 + 512 + 8 + 4
    assert facts.blob_bytes(3, 5, "int8", 2) == 15 + 12
    assert facts.blob_bytes(3, 5, "none", 2) == 30


def test_a_unit_is_padded_parameter_by_parameter() -> None:
    unit = facts.UnitFacts(
        "b", "block", (facts.LinearFacts("b.x", 3, 5, True),), (facts.TensorFacts("b.x.bias", (3,)),)
    )
    assert unit.packed_bytes("nf4", 2) == 17 + 6
    assert unit.packed_bytes("nf4", 2, world=2) == 18 + 8
    assert unit.packed_bytes("none", 4, world=4) == 16 * 4 + 4 * 4
    assert unit.num_parameters == 18


def _shards(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
    weight_map = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        save_file({name: tensor}, directory / file)
        weight_map[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return tensors


def test_headers_say_where_the_bytes_of_a_tensor_lie(tmp_path: Path) -> None:
    tensors = _shards(tmp_path)
    files = facts.source_files(tmp_path)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = facts.headers(files)
    assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == {
        "b": ("F32", (2, 3)),
        "a": ("BF16", (5,)),
    }
    for name, tensor in tensors.items():
        entry = found[name]
        stored = entry.file.read_bytes()[entry.begin : entry.end]
        assert stored == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert facts.source_files(tmp_path) == [tmp_path / "model.safetensors"]


def _cut(directory: Path) -> None:
    file = directory / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _lengthen(directory: Path) -> None:
    with (directory / "model-00001-of-00002.safetensors").open("ab") as stream:
        stream.write(b"\0")


def _cut_in_header(directory: Path) -> None:
    file = directory / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def _swap(directory: Path) -> None:
    first, second = (directory / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _pickles(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model-00002-of-00002.safetensors: is cut: \d+ bytes, its header names \d+"),
        (_lengthen, "model-00001-of-00002.safetensors: has bytes too many"),
        (_cut_in_header, "is no safetensors file or is cut within its header"),
        (_swap, "index.json puts a into model-00002-of-00002.safetensors, which does not hold it"),
        (_pickles, r"its weights are pickles \(pytorch_model.bin\)"),
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "1 of the 2 files .* are missing: model-00002"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "holds no weights; looked for model.safetensors"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "is no index of safetensors files"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    _shards(tmp_path)
    facts.source_files(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        facts.source_files(tmp_path)


def test_the_source_key_changes_with_whatever_changes_the_pack(tmp_path: Path) -> None:
    _shards(tmp_path)
    keys = [
        facts.source_key(tmp_path, "nf4", "bfloat16", "v1"),
        facts.source_key(tmp_path, "int8", "bfloat16", "v1"),
        facts.source_key(tmp_path, "nf4", "float32", "v1"),
        facts.source_key(tmp_path, "nf4", "bfloat16", "v2"),
    ]
    assert facts.source_key(tmp_path, "nf4", "bfloat16", "v1") == keys[0]
    (tmp_path / "config.json").write_text('{"rope": 2}')
    keys.append(facts.source_key(tmp_path, "nf4", "bfloat16", "v1"))
    save_file({"b": torch.zeros(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    keys.append(facts.source_key(tmp_path, "nf4", "bfloat16", "v1"))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_storage_elements_count_a_blob_byte_as_one() -> None:
    block = next(unit for unit in facts.load(MODELS / "llama-3.1-8b").units if unit.kind == "block")
    blobs = sum(facts.blob_bytes(linear.rows, linear.cols, "nf4", 2) for linear in block.linears)
    assert block.storage_elements("nf4") == blobs + sum(math.prod(tensor.shape) for tensor in block.dense)
