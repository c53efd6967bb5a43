"""Both ways between our directories and real PEFT, on a small random Llama."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftscale.adapters import SoftPrompt, files
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.errors import AdapterError

peft = pytest.importorskip("peft", reason="PEFT is an extra")

P, H, V, NUM_LAYERS, NUM_HEADS = 5, 64, 300, 2, 4
DIGEST = "sha256:" + "ab" * 32


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=V,
            hidden_size=H,
            intermediate_size=96,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).eval()


def card(model: str) -> AdapterCard:
    base = BaseCard(
        model=model,
        revision=None,
        digest=DIGEST,
        num_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        quantization="none",
        compute_dtype="float32",
    )
    return AdapterCard(base=base, run="run", fingerprint="f00d", init="random", step=3)


@torch.no_grad()
def logits_of_a_concatenation(model: LlamaForCausalLM, rows_PH: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    text_BTH = model.get_input_embeddings()(ids_BT)
    prompt_BPH = rows_PH.expand(len(ids_BT), -1, -1)
    logits: torch.Tensor = model(inputs_embeds=torch.cat([prompt_BPH, text_BTH], dim=1)).logits
    return logits


def test_peft_loads_our_directory_and_gives_our_logits(tmp_path: Path) -> None:
    rows_PH = torch.randn(P, H, generator=torch.Generator().manual_seed(1))
    files.save(SoftPrompt(rows_PH), tmp_path / "a", card=card("tiny"))
    ids_BT = torch.arange(3 * 7).view(3, 7) % V
    ours = logits_of_a_concatenation(tiny_llama(), rows_PH, ids_BT)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"))(input_ids=ids_BT).logits
        without = tiny_llama()(input_ids=ids_BT).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours[:, P:] - without).abs().max() > 1e-2  # the prompt does something


def test_our_two_files_are_peft_s_byte_for_byte(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    rows_PH = theirs.prompt_encoder["default"].embedding.weight
    files.save(SoftPrompt(rows_PH), tmp_path / "ours", card=card(str(tmp_path / "base")))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_directory_saved_by_peft_gives_peft_s_rows_and_logits(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter, info = files.load(tmp_path / "a", base_digest=DIGEST, hidden_size=H)
    assert torch.equal(adapter.rows_PH, theirs.prompt_encoder["default"].embedding.weight)
    assert not info.base_is_verified
    ids_BT = torch.arange(2 * 6).view(2, 6) % V
    with torch.no_grad():
        expected = theirs(input_ids=ids_BT).logits
    ours = logits_of_a_concatenation(tiny_llama(), adapter.rows_PH, ids_BT)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_peft_s_own_result_files_have_the_size_of_our_arithmetic() -> None:
    # PEFT's published benchmark: prompt tuning of Llama-3.2-3B (H=3072) with 200 tokens, 2,457,728 bytes.
    assert files.expected_bytes(200, 3072) == 2_457_728


def test_another_kind_of_peft_is_refused_by_its_name(tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=8)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "P_TUNING"
    with pytest.raises(AdapterError, match="peft_type is 'P_TUNING'; only 'PROMPT_TUNING' .a prompt. and 'PREFIX_TUN"):
        files.load(tmp_path / "a", base_digest=DIGEST, hidden_size=H)
