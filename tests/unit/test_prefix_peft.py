"""Both ways between our prefixes and real PEFT, on random bases of several families."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from peftscale import adapters
from peftscale.adapters import Prefix, files
from peftscale.adapters.initialisation import random_keys_values
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.base import exactness, load, passes, prefixed
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.base.prefixed import PrefixShape
from peftscale.errors import AdapterError

peft = pytest.importorskip("peft", reason="PEFT is an extra")

P = 5
QWEN2 = {**tiny.LLAMA, "model_type": "qwen2"}
WINDOWED = {**tiny.LLAMA, "model_type": "mistral", "sliding_window": 8}
GEMMA2 = {**tiny.LLAMA, "model_type": "gemma2", "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True}
QWEN3 = {**tiny.LLAMA, "model_type": "qwen3", "head_dim": 24}  # not hidden size / heads
FAMILIES = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "windowed": WINDOWED,
    "gemma2": GEMMA2,
}
TEXTS = ("The plot falls apart after ten minutes and nobody cares.\nVerdict:", "Lovely\nVerdict:", "Dull, dull, dull")


@pytest.fixture(params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Base, PreTrainedModel]:
    """The base as we load it, packed, and as transformers does."""
    path = tiny.save_base(tmp_path / "base", FAMILIES[request.param])
    cfg = tiny.run_config(tmp_path, base=path, **{"base.quantization": "none"})
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    exactness.make_packed(base)
    return base, AutoModelForCausalLM.from_pretrained(path).eval()


def _save(prefix: Prefix, base: Base, directory: Path) -> None:
    card = BaseCard(
        model=base.name,
        revision=None,
        digest=base.digest,
        num_layers=prefix.shape.num_layers,
        num_attention_heads=4,
        quantization="none",
        compute_dtype="float32",
    )
    files.save(prefix, directory, card=AdapterCard(base=card, run="run", fingerprint="f00d", init="random", step=2))


def _load(directory: Path, base: Base) -> tuple[Any, files.AdapterInfo]:
    return files.load(
        directory,
        base_digest=base.digest,
        hidden_size=base.hidden_size,
        prefix_shape=prefixed.shape_of(base.model.config),
    )


@torch.no_grad()
def _ours(base: Base, values: Tensor | None) -> Tensor:
    """Logits of every text at all of its tokens, in one packed pass."""
    texts = [base.tokenizer(text)["input_ids"] for text in TEXTS]
    return passes.target_logits(base, [Row(None, [*ids, 0], len(ids), values) for ids in texts])


@torch.no_grad()
def _theirs(model: Any, base: Base) -> Tensor:
    """The same, text by text."""
    texts = [torch.tensor([base.tokenizer(text)["input_ids"]]) for text in TEXTS]
    return torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() for ids in texts])


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_peft_loads_our_prefix_and_gives_our_logits(opened: tuple[Base, PreTrainedModel], tmp_path: Path) -> None:
    base, model = opened
    prefix = Prefix(random_keys_values(P, prefixed.shape_of(model.config), seed=1))
    _save(prefix, base, tmp_path / "ours")
    ours, alone = _ours(base, prefix.values), _ours(base, None)
    assert _error(ours, alone) > 1e-2  # the prefix does something
    with_peft = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    assert _error(ours, _theirs(with_peft, base)) < 2e-6  # measured 2.0e-7 to 3.0e-7


@pytest.mark.parametrize("is_projected", [False, True], ids=["plain", "projected"])
def test_we_read_a_prefix_of_peft_and_give_its_logits(
    opened: tuple[Base, PreTrainedModel], tmp_path: Path, is_projected: bool
) -> None:
    base, model = opened
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=is_projected, encoder_hidden_size=24
    )
    with_peft = peft.get_peft_model(model, config).eval()
    with_peft.save_pretrained(str(tmp_path / "theirs"))
    prefix, info = _load(tmp_path / "theirs", base)
    assert isinstance(prefix, Prefix) and not info.base_is_verified
    ours = _ours(base, prefix.values)
    assert _error(ours, _theirs(with_peft, base)) < 2e-6  # measured 2.0e-7 to 3.0e-7
    assert _error(ours, _ours(base, None)) > (1e-3 if is_projected else 1e-2)


def test_our_two_files_are_peft_s_byte_for_byte(opened: tuple[Base, PreTrainedModel], tmp_path: Path) -> None:
    base, model = opened
    theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    prefix, _ = _load(tmp_path / "theirs", base)
    _save(prefix, base, tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size == files.expected_bytes(
        P, prefixed.shape_of(model.config).width
    )
    again, info = _load(tmp_path / "ours", base)
    assert torch.equal(again.values, prefix.values) and info.base_is_verified
    found = files.describe(tmp_path / "ours")
    assert (found.kind, found.length, found.hidden_size) == ("prefix", P, None)
    assert found.prefix is not None and found.prefix.num_kv_heads == prefix.shape.num_kv_heads


def test_our_network_is_peft_s_with_the_same_weights(tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(path)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=24
    )
    theirs = peft.get_peft_model(model, config).prompt_encoder["default"]
    inner, _, outer = theirs.transform
    ours = adapters.ReparametrisedPrefix(
        [(theirs.embedding.weight, (inner.weight, inner.bias), (outer.weight, outer.bias))], shape=PrefixShape(3, 2, 16)
    )
    want = files.peft_format.unflat(theirs(torch.arange(P)), ours.shape)
    torch.testing.assert_close(ours(), want, rtol=0, atol=0)


def test_a_start_from_a_text_is_peft_s(tmp_path: Path) -> None:
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

    path = tiny.save_base(tmp_path / "base")
    text = "Verdict: the plot falls apart"
    adapter = {"kind": "prefix", "length": P, "init": "text", "init_text": text}
    cfg = tiny.run_config(tmp_path, base=path, **{"base.quantization": "none", "adapters": {"mood": adapter}})
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    exactness.make_packed(base)
    ours = adapters.build(cfg, base)["mood"].folded().values
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).eval()

    def plain(text: str, **kwargs: Any) -> Any:
        return base.tokenizer(text, add_special_tokens=False, return_tensors="pt")

    rows = initialize_kv_prefix_from_text(theirs, plain, text=text, use_chat_template=False)
    torch.testing.assert_close(files.peft_format.flat(ours), rows.view(P, -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"num_transformer_submodules": 2},
            "num_transformer_submodules is 2: the prefix belongs to an encoder-",
        ),
        ({"num_layers": 4}, "prompt_embeddings has rows of 192, but adapter_config.json says 2 * num_layers=4 * "),
        ({"num_attention_heads": 3}, "token_dim=32 is not a multiple of num_attention_heads=3"),
        ({"token_dim": None}, "token_dim must be an integer >= 1, got None"),
        ({"num_virtual_tokens": 4}, "has 5 rows, but adapter_config.json says num_virtual_tokens=4"),
    ],
)
def test_a_prefix_s_config_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    shape = PrefixShape(3, 2, 16)
    (tmp_path / "a").mkdir()
    content = files.peft_format.prefix_config_json(length=P, shape=shape, model="m", revision=None)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**json.loads(content), **changes}))
    weights = files.peft_format.weights_bytes(random_keys_values(P, shape, seed=0))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(AdapterError) as caught:
        files.load(tmp_path / "a", base_digest="sha256:0", hidden_size=64, prefix_shape=shape)
    assert line in str(caught.value)


def test_a_prefix_of_another_shape_is_refused(tmp_path: Path) -> None:
    shape = PrefixShape(3, 2, 16)
    (tmp_path / "a").mkdir()
    content = files.peft_format.prefix_config_json(length=P, shape=shape, model="m", revision=None)
    (tmp_path / "a" / "adapter_config.json").write_bytes(content)
    weights = files.peft_format.weights_bytes(random_keys_values(P, shape, seed=0))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(AdapterError, match=r"a prefix of \(3, 2, 16\) .*, this base has \(3, 4, 16\)"):
        files.load(tmp_path / "a", base_digest="sha256:0", hidden_size=64, prefix_shape=PrefixShape(3, 4, 16))
