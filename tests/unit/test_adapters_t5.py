"""Adapters of encoder-decoder bases on disk: both ways with real PEFT on a small random T5, and what PEFT refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from peftscale.adapters import Prefix, SoftPrompt, files
from peftscale.adapters import manifest as manifests
from peftscale.adapters.initialisation import random_keys_values
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.base import passes, prefixed
from peftscale.base.load import load as load_base
from peftscale.base.padded import Row
from peftscale.base.prefixed import PrefixShape
from peftscale.config import BaseConfig
from peftscale.errors import AdapterError

peft = pytest.importorskip("peft", reason="PEFT is an extra")

P, Q, H, V = 5, 3, 64, 300
CONFIG = T5Config(
    vocab_size=V,
    d_model=H,
    d_kv=12,  # not H / num_heads
    d_ff=96,
    num_layers=4,
    num_decoder_layers=3,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
)
SHAPE = PrefixShape(4 + 3 + 3, 4, 12, (4, 3, 3))
DECODER_ONLY = PrefixShape(3, 2, 16)
DIGEST = "sha256:" + "ab" * 32
IDS_BT = torch.tensor([[9, 5, 7, 30, 200, 1], [8, 11, 290, 1, 0, 0]])
MASK_BT = (IDS_BT != 0).long()
DECODER_BT = torch.tensor([[0, 40, 41], [0, 77, 12]])


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(CONFIG).eval()


def card(model: str = "org/t5", config: Any = CONFIG) -> AdapterCard:
    cfg = BaseConfig.model_validate(
        {"model": model, "quantization": "none", "compute_dtype": "float32", "checkpoint_activations": False}
        | {"sharding": "replicated"}
    )
    base = BaseCard.of(cfg, DIGEST, config)
    return AdapterCard(base=base, run="run", fingerprint="f00d", init="random", step=3)


def prompt(decoder_length: int = 0) -> SoftPrompt:
    rows_PH = torch.randn(P + decoder_length, H, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(rows_PH, decoder_length=decoder_length)


def prefix(shape: PrefixShape = SHAPE) -> Prefix:
    return Prefix(random_keys_values(P, shape, seed=2), parts=shape.parts)


def load(directory: Path, shape: PrefixShape | None = SHAPE) -> tuple[Any, files.AdapterInfo]:
    return files.load(directory, base_digest=DIGEST, hidden_size=H, prefix_shape=shape)


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a file as the program that wrote it would have."""
    fields = json.loads(path.read_text()) | changes
    path.write_bytes(manifests.sealed(fields) if path.name == manifests.MANIFEST_FILE else json.dumps(fields).encode())


def make_peft_only(directory: Path) -> Path:
    (directory / "peftscale.json").unlink()
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS_BT, attention_mask=MASK_BT, decoder_input_ids=DECODER_BT).logits
    return found


@torch.no_grad()
def logits_of_a_concatenation(rows_PH: Tensor) -> Tensor:
    model = tiny_t5()
    text_BTH = model.get_input_embeddings()(IDS_BT)
    found: Tensor = model(
        inputs_embeds=torch.cat([rows_PH.expand(2, -1, -1), text_BTH], dim=1),
        attention_mask=torch.cat([torch.ones(2, len(rows_PH)), MASK_BT], dim=1),
        decoder_input_ids=DECODER_BT,
    ).logits
    return found


def test_peft_puts_our_prompt_in_front_of_the_encoder_s_input_alone(tmp_path: Path) -> None:
    files.save(prompt(), tmp_path / "a", card=card())
    theirs = peft.PeftModel.from_pretrained(tiny_t5(), str(tmp_path / "a")).eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    ours = logits_of_a_concatenation(prompt().rows_PH)
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)  # measured 0
    assert (ours - logits(tiny_t5())).abs().max() > 1e-2  # the prompt does something


def test_peft_with_our_directory_gives_the_logits_of_our_own_pass(tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path / "base", tiny.T5)
    cfg = tiny.run_config(tmp_path, base=path, **{"base.quantization": "none"})
    base = load_base(cfg.base, sharding="replicated", device=torch.device("cpu"))
    files.save(prompt(), tmp_path / "a", card=card(str(path), base.model.config))
    model = T5ForConditionalGeneration.from_pretrained(path).eval()
    texts, targets = ([9, 5, 7, 30, 2], [8, 2]), ([40, 2], [7, 6, 5, 2])
    rows = [Row(prompt().rows_PH, [*text, *target], len(target)) for text, target in zip(texts, targets, strict=True)]
    with torch.no_grad():
        ours = passes.target_logits(base, rows)
        alone = passes.target_logits(base, [Row(None, row.ids, row.num_targets) for row in rows])
        theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
        want = torch.cat(
            [
                theirs(
                    input_ids=torch.tensor([text]),
                    attention_mask=torch.ones(1, len(text)),
                    decoder_input_ids=torch.tensor([[0, *target[:-1]]]),
                ).logits[0]
                for text, target in zip(texts, targets, strict=True)
            ]
        )
    assert float((ours - want).norm() / want.norm()) < 2e-6  # measured 5.8e-7
    assert float((ours - alone).norm() / want.norm()) > 1e-2  # the prompt does something


def test_our_two_files_of_an_encoder_prompt_are_peft_s_byte_for_byte(tmp_path: Path) -> None:
    tiny_t5().save_pretrained(tmp_path / "base")
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    rows_PH = theirs.prompt_encoder["default"].embedding.weight
    files.save(SoftPrompt(rows_PH), tmp_path / "ours", card=card(str(tmp_path / "base")))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size == files.expected_bytes(P, H)


@pytest.mark.parametrize("says_submodules", [True, False])
def test_of_peft_s_doubled_file_the_rows_that_peft_reads_are_read_and_a_line_says_so(
    tmp_path: Path, says_submodules: bool
) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)  # its default
    theirs = peft.get_peft_model(tiny_t5(), config).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    rows_2PH = theirs.prompt_encoder["default"].embedding.weight.detach()
    assert rows_2PH.shape == (2 * P, H)
    if not says_submodules:
        edit_json(tmp_path / "a" / "adapter_config.json", num_transformer_submodules=None)
    adapter, info = load(tmp_path / "a")
    assert torch.equal(adapter.rows_PH, rows_2PH[:P])
    assert (adapter.length, adapter.decoder_length) == (P, 0)
    assert f"the first {P} rows are the encoder's and are read; PEFT never used nor trained the others" in info.notes[0]
    torch.testing.assert_close(logits_of_a_concatenation(adapter.rows_PH), logits(theirs), rtol=0, atol=1e-6)
    files.save(adapter, tmp_path / "ours", card=card())
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["num_transformer_submodules"] == 1
    assert load(tmp_path / "ours")[1].notes == ()


@pytest.mark.parametrize("adapter", [prompt(Q), prefix()], ids=["decoder prompt", "prefix"])
def test_what_peft_cannot_express_comes_back_bitwise_and_peft_refuses_it_by_name(
    tmp_path: Path, adapter: SoftPrompt | Prefix
) -> None:
    num_bytes = files.save(adapter, tmp_path / "a", card=card())
    again, info = load(tmp_path / "a")
    assert torch.equal(again.values, adapter.values) and info.base_is_verified
    if isinstance(adapter, Prefix):
        assert again.shape == SHAPE
        assert num_bytes == files.expected_bytes(P, SHAPE.width)
    else:
        assert (again.length, again.decoder_length) == (P, Q)
        assert num_bytes == files.expected_bytes(P + Q, H)
    files.save(again, tmp_path / "copy", card=card())
    for name in ("adapter_config.json", "adapter_model.safetensors", "peftscale.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    peft_type = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"]
    for read in (peft.PeftConfig.from_pretrained, lambda path: peft.PeftModel.from_pretrained(tiny_t5(), path)):
        with pytest.raises(KeyError, match=peft_type):
            read(str(tmp_path / "a"))
    assert torch.equal(load(make_peft_only(tmp_path / "a"))[0].values, adapter.values)  # PEFT's two files say all


def test_inspect_and_the_model_card_tell_the_parts(tmp_path: Path) -> None:
    files.save(prompt(Q), tmp_path / "a", card=card())
    files.save(prefix(), tmp_path / "b", card=card())
    files.save(prompt(), tmp_path / "c", card=card())
    found = files.describe(tmp_path / "a")
    assert (found.kind, found.length, found.decoder_length, found.hidden_size) == ("prompt", P, Q, H)
    found = files.describe(tmp_path / "b")
    assert (found.kind, found.length, found.decoder_length, found.hidden_size) == ("prefix", P, 0, None)
    assert found.prefix is not None and found.prefix.parts == (4, 3, 3)
    texts = [(tmp_path / name / "README.md").read_text() for name in "abc"]
    assert "5 trained vectors of 64 numbers in front of the encoder's input embeddings, and 3 in front of" in texts[0]
    assert "the encoder's, the decoder's and its cross attention's." in texts[1]
    assert all("PEFT has no such adapter" in text and "library_name: peftscale" in text for text in texts[:2])
    assert "AutoModelForSeq2SeqLM.from_pretrained('org/t5')" in texts[2] and "library_name: peft\n" in texts[2]


def test_the_card_of_a_t5_counts_the_encoder_as_peft_does() -> None:
    base = card().base
    assert (base.num_layers, base.num_attention_heads, base.is_encoder_decoder) == (4, 4, True)
    assert prefixed.shape_of(CONFIG) == SHAPE


@pytest.mark.parametrize(
    ("adapter", "shape", "named"),
    [
        (
            prompt(Q),
            DECODER_ONLY,
            "a prompt with 3 rows for a decoder, made for an encoder-decoder base; this base is a",
        ),
        (prompt(), DECODER_ONLY, "a prompt, made for an encoder-decoder base; this base is a decoder-only model"),
        (prompt(), None, "a prompt, made for an encoder-decoder base; this base is a decoder-only model"),
        (prefix(), DECODER_ONLY, "a prefix of encoder, decoder and cross attention, made for an encoder-decoder base"),
        (
            prefix(),
            PrefixShape(8, 4, 12, (4, 2, 2)),
            "is a prefix of (10 = 4 + 3 + 3, 4, 12) (layers, key heads, head ",
        ),
    ],
)
def test_an_adapter_of_an_encoder_decoder_is_refused_by_name_on_another_base(
    tmp_path: Path, adapter: SoftPrompt | Prefix, shape: PrefixShape | None, named: str
) -> None:
    files.save(adapter, tmp_path / "a", card=card())
    with pytest.raises(AdapterError) as caught:
        load(tmp_path / "a", shape)
    assert named in str(caught.value)


@pytest.mark.parametrize("adapter", [prompt(), prefix(PrefixShape(10, 4, 12))], ids=["prompt", "prefix"])
def test_an_adapter_of_a_decoder_only_base_is_refused_by_name_on_a_t5(
    tmp_path: Path, adapter: SoftPrompt | Prefix
) -> None:
    base = card().base.model_copy(update={"is_encoder_decoder": False})
    files.save(adapter, tmp_path / "a", card=card().model_copy(update={"base": base}))
    kind = "prefix" if isinstance(adapter, Prefix) else "prompt"
    with pytest.raises(AdapterError, match=f"is a {kind}, made for a decoder-only base; this base is an encoder-dec"):
        load(tmp_path / "a")


@pytest.mark.parametrize("num_submodules", [1, 2])
def test_peft_s_own_prefix_of_a_t5_is_refused_with_the_reason_and_the_reason_holds(
    tmp_path: Path, num_submodules: int
) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=H, d_kv=16, num_layers=4, num_heads=4)).eval()
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=num_submodules
    )
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(
        AdapterError, match=r"PEFT puts such a prefix before the decoder's self-attention alone, and with"
    ):
        load(tmp_path / "a")
    out = theirs(input_ids=IDS_BT, decoder_input_ids=DECODER_BT)
    out.logits.square().sum().backward()
    # The file holds as much as the decoder's own four layers take, and of two submodules only half of it acts.
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad.view(P, 4, 2, 4, 16)
    acts = gradient.abs().amax(dim=(0, 2, 3, 4)) > 0
    assert acts.tolist() == ([True] * 4 if num_submodules == 1 else [True, False, True, False])
    without = model.encoder(IDS_BT).last_hidden_state
    assert torch.equal(out.encoder_last_hidden_state, without)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"decoder_length": 2}, f"says length {P}, decoder_length 2 and hidden_size {H}, but the rows are [8, {H}]"),
        ({"decoder_length": 0}, f"says length {P} and hidden_size {H}, but the rows are [8, {H}]"),
        ({"length": P + Q, "decoder_length": 0}, f"says length 8 and hidden_size {H}, but the rows are [8, {H}]"),
        ({"decoder_length": -1}, "decoder_length: Input should be greater than or equal to 0"),
        (
            {"base": card().base.model_dump() | {"is_encoder_decoder": False}},
            "says base.is_encoder_decoder False, but adapter_config.json says True",
        ),
    ],
)
def test_a_manifest_that_tells_other_parts_than_the_files_is_refused(
    tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    files.save(prompt(Q), tmp_path / "a", card=card())
    edit_json(tmp_path / "a" / "peftscale.json", **changes)
    with pytest.raises(AdapterError) as caught:
        load(tmp_path / "a")
    assert line in str(caught.value)


def test_a_manifest_with_other_parts_of_a_prefix_is_refused(tmp_path: Path) -> None:
    files.save(prefix(), tmp_path / "a", card=card())
    dimensions = {"num_layers": 10, "num_kv_heads": 4, "head_dim": 12, "parts": [3, 4, 3]}
    edit_json(tmp_path / "a" / "peftscale.json", prefix=dimensions)
    with pytest.raises(AdapterError, match=r"prefix \(.*parts=\(3, 4, 3\)\), but the rows are \[10, 2, 5, 4, 12\]"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("adapter", "changes", "line"),
    [
        (
            prompt(Q),
            {"num_decoder_virtual_tokens": 2},
            "8 rows, but adapter_config.json says num_virtual_tokens=5 x num",
        ),
        (
            prompt(Q),
            {"num_decoder_virtual_tokens": None},
            "num_decoder_virtual_tokens must be an integer >= 1, got None",
        ),
        (prompt(Q), {"peft_type": "PROMPT_TUNING"}, "num_transformer_submodules=1 = 5."),
        (prefix(), {"num_layers_of_parts": [4, 3]}, "num_layers=10, got [4, 3]"),
        (prefix(), {"num_layers_of_parts": [4, 3, 4]}, "num_layers=10, got [4, 3, 4]"),
        (prefix(), {"num_layers_of_parts": [4, 0, 6]}, "num_layers_of_parts must be an integer >= 1, got 0"),
        (prefix(), {"num_layers_of_parts": 10}, "cross attention) with the sum num_layers=10, got 10"),
        (
            prefix(),
            {"num_layers": 3, "num_layers_of_parts": [1, 1, 1]},
            "rows of 960, but adapter_config.json says 2 * ",
        ),
        (prefix(), {"peft_type": "PREFIX_TUNING"}, "the prefix belongs to an encoder-decoder model"),
    ],
)
def test_a_config_of_ours_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, adapter: SoftPrompt | Prefix, changes: dict[str, object], line: str
) -> None:
    files.save(adapter, tmp_path / "a", card=card())
    edit_json(make_peft_only(tmp_path / "a") / "adapter_config.json", **changes)
    with pytest.raises(AdapterError) as caught:
        load(tmp_path / "a")
    assert line in str(caught.value)


@pytest.mark.parametrize("adapter", [prompt(), prefix(DECODER_ONLY)], ids=["prompt", "prefix"])
def test_a_manifest_written_before_encoder_decoders_is_read(tmp_path: Path, adapter: SoftPrompt | Prefix) -> None:
    base = card().base.model_copy(update={"is_encoder_decoder": False})
    files.save(adapter, tmp_path / "a", card=card().model_copy(update={"base": base}))
    path = tmp_path / "a" / "peftscale.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"], manifest["decoder_length"], manifest["base"]["is_encoder_decoder"]
    if manifest["prefix"]:
        del manifest["prefix"]["parts"]
    path.write_text(json.dumps(manifest))
    again, info = load(tmp_path / "a", DECODER_ONLY)
    assert torch.equal(again.values, adapter.values) and info.base_is_verified
    assert files.verify(tmp_path / "a") == info.manifest
