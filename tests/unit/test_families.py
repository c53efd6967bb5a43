"""Promise 12: a base takes packed passes only where they are exact; everything else is padded, and says why."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
import transformers
from torch import Tensor

from peftscale import adapters, driver
from peftscale.base import attention, exactness, load, slots, slots_exactness
from peftscale.config import BaseConfig
from peftscale.errors import AdapterError
from peftscale.train import setup

PADDED = {"falcon", "bloom"}
ATTENTION_ONLY = {"mixtral", "gpt_oss"}
CONFIGS = families.configs()


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - PADDED))
def test_the_packed_pass_is_exact_for(family: str) -> None:
    assert exactness.small_copy_differs(CONFIGS[family]) is None
    error = exactness.gradient_error(exactness.small_copy(CONFIGS[family]))
    assert error is not None
    assert error < 2e-6  # measured 2e-7 to 9e-7


def test_bases_with_fused_experts_are_refused_and_all_others_of_the_table_load() -> None:
    found = {family: families.base_of(config) for family, config in (CONFIGS | families.encoder_decoders()).items()}
    refused = dict.fromkeys(ATTENTION_ONLY, "attention only: refused for fused experts")
    assert found == dict.fromkeys(found, "loads") | refused
    assert len(set(CONFIGS) - PADDED - ATTENTION_ONLY) >= 12


def test_the_small_copy_has_every_kind_of_layer_that_a_config_lists() -> None:
    """SmolLM3's fourth layer is the first without positions; its `layer_types` are all alike."""
    config = transformers.SmolLM3Config(num_hidden_layers=8, hidden_size=64, num_attention_heads=4, pad_token_id=0)
    small = exactness.small_copy(config).config
    assert (small.num_hidden_layers, small.no_rope_layers) == (4, [1, 1, 1, 0])
    assert exactness.small_copy(CONFIGS["llama"]).config.num_hidden_layers == 2


@pytest.mark.parametrize("family", sorted(PADDED))
def test_a_family_that_bypasses_the_registry_is_padded_with_a_reason(family: str) -> None:
    reason = exactness.small_copy_differs(CONFIGS[family])
    assert reason == f"{family}: its attention does not go through transformers' attention registry"


def test_a_crash_inside_of_the_packed_attention_is_no_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the reason above."""

    def crashes(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        attention.packed_attention(*args, **kwargs)
        raise TypeError("no such thing")

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, crashes)
    reason = exactness.small_copy_differs(CONFIGS["llama"])
    assert reason == "llama: the packed pass fails (TypeError: no such thing)"


@pytest.mark.parametrize("family", families.encoder_decoders())
def test_an_encoder_decoder_is_padded_with_a_reason_and_exact(family: str) -> None:
    config = families.encoder_decoders()[family]
    reason = exactness.small_copy_differs(config)
    assert reason == f"{config.model_type}: the encoder's prompt sees the text, so no two rows share one"
    assert families.prompt_error(config) < 4e-6  # measured 6.3e-7, and 2.3e-6 for version 1.1
    assert families.prefix_error(config) < 1e-6  # measured 0


def _ignoring(name: str) -> object:
    """The packed attention without one of its arguments."""

    def naive(*args: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return attention.packed_attention(*args, **{**kwargs, name: None})  # type: ignore[arg-type]

    return naive


@pytest.mark.parametrize(
    ("family", "argument"),
    [
        ("mistral with window", "sliding_window"),
        ("qwen2 with window", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("gemma2", "softcap"),
        ("gemma3", "sliding_window"),
        ("gpt_oss", "s_aux"),
        ("gpt_oss", "sliding_window"),
    ],
)
def test_an_attention_that_ignores_what_a_layer_asks_for_is_found_out(
    family: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the check itself: the naive function is silently wrong, and the base would be padded."""
    registry = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(registry, attention.NAME, _ignoring(argument))
    reason = exactness.small_copy_differs(CONFIGS[family])
    assert reason is not None
    assert "packed and padded passes differ by" in reason


class _NotANumber(torch.autograd.Function):
    """Passes on what comes in forward, and NaN in backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], float("nan"))


def _spoiled(attend: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Right outputs, and gradients that are not numbers."""

    def spoiled(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _NotANumber.apply(attend(*args, **kwargs)[0]), None

    return spoiled


def test_a_gradient_that_is_not_a_number_is_found_out_behind_right_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, llama = attention.AttentionInterface._global_mapping, CONFIGS["llama"]
    monkeypatch.setitem(registry, attention.NAME, _spoiled(attention.packed_attention))
    assert exactness.small_copy_differs(llama) == "llama: packed and padded passes differ by nan"
    assert exactness.prefix_differs(llama) == "llama: a prefix in the packed pass is off by nan"
    monkeypatch.setitem(registry, slots.NAME, _spoiled(slots.slotted_attention))
    reason = slots_exactness.differs(families.encoder_decoders()["t5"], own_attention="sdpa")
    assert reason == "t5: a prefix is off by nan"


def test_a_run_over_a_base_whose_window_would_be_ignored_is_padded_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_base(tmp_path / "base", {**tiny.LLAMA, "model_type": "mistral", "sliding_window": 8})
    good, naive = (tiny.run_config(tmp_path, base=base, name=name, **{"train.steps": 1}) for name in ("good", "naive"))
    assert driver.run(good).packing == "packed"
    assert "passes are padded" not in good.metrics_path.read_text()
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, _ignoring("sliding_window"))
    assert driver.run(naive).packing == "padded"
    assert "passes are padded: mistral: packed and padded passes differ by" in naive.metrics_path.read_text()


def test_the_check_leaves_the_random_state_and_the_config_alone() -> None:
    config = CONFIGS["mistral with window"]
    state, before = torch.random.get_rng_state(), config.to_dict()
    exactness.small_copy_differs(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert config.to_dict() == before


@pytest.mark.parametrize("bad", [0, 1])
def test_a_padding_slot_never_reads_another_adapters_row(bad: int) -> None:
    """Rows of NaN in one prompt reach that prompt and the examples behind it, in forward and in backward."""
    lay = attention.layout([3, 5, 0], [4, 2, 6, 1], [0, 1, 0, 2], device=torch.device("cpu"))
    rows = {0: [*range(0, 3), *range(8, 12), *range(14, 20)], 1: [*range(3, 8), 12, 13]}[bad]
    states = torch.randn(1, 2, lay.num_tokens, 8)
    states[:, :, rows[: 3 if bad == 0 else 5]] = float("nan")
    states.requires_grad_()
    out, _ = attention.packed_attention(torch.nn.Identity(), states, states, states, None, layout=lay)
    assert out[0].isnan().any(-1).any(-1).nonzero()[:, 0].tolist() == rows
    out.sum().backward()
    assert states.grad is not None
    assert states.grad[0].isnan().any(-1).any(0).nonzero()[:, 0].tolist() == rows


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_bfloat16_base_takes_packed_passes(quantization: str) -> None:
    """Its own rounding is no reason against them: padded and packed logits are as far from float32."""
    cfg = BaseConfig(
        model=str(tiny.QUICKSTART / "base"),
        quantization=quantization,  # type: ignore[arg-type]
        compute_dtype="bfloat16",
        sharding="replicated",
        checkpoint_activations=False,
    )
    base = load.load(cfg, sharding="replicated", device=torch.device("cpu"))
    assert setup.pack_where_exact(base) is None


def test_a_packed_pass_that_fails_on_the_real_weights_alone_is_padded_and_a_prefix_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if module.layer_idx == 2:  # the small copy has two layers
            raise RuntimeError("no kernel")
        return attention.packed_attention(module, *args, **kwargs)

    base = load.load(tiny.run_config(tmp_path).base, sharding="replicated", device=torch.device("cpu"))
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, fails)
    why = "the packed pass fails (RuntimeError: no kernel)"
    assert setup.pack_where_exact(base) == f"passes are padded: {why}"
    assert not base.is_packed
    assert base.model.config._attn_implementation == base.own_attention
    with pytest.raises(AdapterError, match=f"^here: a prefix .*{re.escape(why)}"):
        adapters.refuse_prefix_on(base, "here")


def test_a_wrong_mask_on_the_real_weights_is_found_out_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: examples that do not see their prompt."""
    cfg = BaseConfig(
        model=str(tiny.QUICKSTART / "base"),
        quantization="nf4",
        compute_dtype="bfloat16",
        sharding="replicated",
        checkpoint_activations=False,
    )
    base = load.load(cfg, sharding="replicated", device=torch.device("cpu"))

    def blind(*args: Tensor, layout: attention.Layout, **kwargs: object) -> tuple[Tensor, None]:
        batches = []
        for batch in layout.batches:
            keys_at_NS = batch.keys_at_NS.clone()
            keys_at_NS[:, : keys_at_NS.shape[1] - batch.queries_at_NE.shape[1]] = attention.HIDDEN
            batches.append(dataclasses.replace(batch, keys_at_NS=keys_at_NS))
        blinded = dataclasses.replace(layout, batches=tuple(batches), _masks={})
        return attention.packed_attention(*args, layout=blinded, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, blind)
    reason = exactness.weights_differ(base)
    assert reason is not None
    assert "packed logits differ by" in reason
