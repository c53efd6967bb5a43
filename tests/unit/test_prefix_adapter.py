"""Prefixes: the parameter, its starts, its network, and the packed pass that it enters."""

from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from peftscale import adapters, configio, driver, facts, plan
from peftscale.adapters import Cohort, Prefix, ReparametrisedPrefix, SoftPrompt, files, initialisation, peft_format
from peftscale.adapters.reparam import FoldedPrefix
from peftscale.base import attention, exactness, load, padded, passes, prefixed
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.base.prefixed import PrefixShape
from peftscale.config import RunConfig
from peftscale.errors import AdapterError, ConfigError, ModelError
from peftscale.train import setup

L, P, K, D = 3, 5, 2, 16  # tiny.LLAMA's, with four query heads
SHAPE = PrefixShape(L, K, D)
PACKED = sorted(set(families.configs()) - {"falcon", "bloom"})
WINDOWED = {**tiny.LLAMA, "model_type": "mistral", "sliding_window": 8}


def _prefix(seed: int = 0, length: int = P) -> Prefix:
    return Prefix(initialisation.random_keys_values(length, SHAPE, seed=seed))


def _config(tmp: Path, **changes: Any) -> RunConfig:
    own = {key.removeprefix("adapter."): changes.pop(key) for key in list(changes) if key.startswith("adapter.")}
    adapter = {"kind": "prefix", "length": P, "init": "random", **own}
    return tiny.run_config(tmp, **{"adapters": {"mood": adapter}, "base.quantization": "none", **changes})


def _load(cfg: RunConfig, *, is_packed: bool = True) -> Base:
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    if is_packed:
        exactness.make_packed(base)
    return base


def test_a_prefix_is_a_float32_copy_of_its_keys_and_values() -> None:
    start = torch.randn(L, 2, P, K, D).bfloat16()
    prefix = Prefix(start)
    assert prefix.values is prefix.keys_values_L2PKD and prefix.values.requires_grad
    assert prefix.values.dtype == torch.float32
    assert (prefix.length, prefix.shape, prefix.shape.width) == (P, SHAPE, L * 2 * K * D)
    assert prefix.folded() is prefix
    same_dtype = torch.randn(L, 2, P, K, D)
    Prefix(same_dtype).values.data.zero_()
    assert same_dtype.abs().sum() > 0


def test_the_last_axis_of_the_file_is_layer_then_key_or_value_then_head_then_number() -> None:
    values = _prefix().values.detach()
    flat_PW = peft_format.flat(values)
    for layer, kv, p, head, j in [(0, 0, 0, 0, 0), (2, 1, 4, 1, 15), (1, 0, 3, 1, 7), (0, 1, 2, 0, 9)]:
        assert flat_PW[p, ((layer * 2 + kv) * K + head) * D + j] == values[layer, kv, p, head, j]
    assert torch.equal(peft_format.unflat(flat_PW, SHAPE), values)


def test_a_cohort_holds_prompts_and_prefixes_but_no_two_shapes_of_prefixes() -> None:
    cohort = Cohort({"a": SoftPrompt(torch.zeros(4, 64)), "b": _prefix(), "c": _prefix(length=2)})
    assert cohort.num_bytes == (4 * 64 + (P + 2) * SHAPE.width) * 4
    other = Prefix(torch.zeros(L, 2, P, K, D + 1))
    with pytest.raises(AdapterError, match=r"one shape .*; got b: \(3, 2, 16\), c: \(3, 2, 17\)"):
        Cohort({"b": _prefix(), "c": other})


@pytest.mark.parametrize("family", PACKED)
def test_a_prefix_in_the_packed_pass_is_one_in_the_cache_for(family: str) -> None:
    config = families.configs()[family]
    assert exactness.prefix_differs(config) is None
    torch.manual_seed(1)
    assert exactness.prefix_error(exactness.small_copy(config)) < 2e-6  # measured 2.4e-7 to 5.1e-7


@pytest.mark.parametrize(
    ("family", "argument"),
    [
        ("mistral with window", "sliding_window"),
        ("gemma2", "softcap"),
        ("gemma3", "sliding_window"),
        ("gpt_oss", "s_aux"),
    ],
)
def test_an_attention_that_ignores_what_a_layer_asks_for_takes_no_prefix(
    family: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the check."""

    def naive(*args: Any, **kwargs: Any) -> Any:
        return attention.packed_attention(*args, **{**kwargs, argument: None})

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, naive)
    assert "a prefix in the packed pass is off by" in (exactness.prefix_differs(families.configs()[family]) or "")


def test_an_attention_that_gives_every_layer_the_first_one_s_prefix_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def confused(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first = nn.Identity()
        first.layer_idx = 0  # type: ignore[assignment]
        return attention.packed_attention(first, *args, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, confused)
    assert "off by" in (exactness.prefix_differs(families.configs()["llama"]) or "")


@pytest.mark.parametrize("bad", ["prefix 0", "prefix 1", "prompt", "example 1"])
def test_what_is_not_finite_reaches_only_the_rows_behind_it(bad: str) -> None:
    """A prompt of 3 and prefixes of 4 and 2; examples of 4, 2, 6, 1 behind prefix 0, prefix 1, the prompt, nothing."""
    prefixes = [torch.randn(1, 2, n, 2, 8) for n in (4, 2)]
    states = torch.randn(1, 2, 3 + 4 + 2 + 6 + 1, 8)
    behind = {"prefix 0": range(3, 7), "prefix 1": range(7, 9), "example 1": range(7, 9)}
    reached = {**behind, "prompt": [*range(3), *range(9, 15)]}
    if bad.startswith("prefix"):
        prefixes[int(bad[-1])].fill_(float("nan"))
    else:
        states[:, :, 7 if bad == "example 1" else slice(0, 3)] = float("nan")
    for tensor in (*prefixes, states):
        tensor.requires_grad_()
    lay = attention.layout([3, 0], [4, 2, 6, 1], [2, 3, 0, 1], device=torch.device("cpu"), prefixes_L2PGD=prefixes)
    module = nn.Identity()
    module.layer_idx = 0  # type: ignore[assignment]
    out, _ = attention.packed_attention(module, states, states, states, None, layout=lay)
    assert out[0].isnan().any(-1).any(-1).nonzero()[:, 0].tolist() == list(reached[bad])
    out.sum().backward()
    for name, prefix in zip(("prefix 0", "prefix 1"), prefixes, strict=True):
        assert prefix.grad is not None
        assert bool(prefix.grad.isnan().any()) == (name == bad or (name, bad) == ("prefix 1", "example 1"))
    assert states.grad is not None
    assert states.grad[0].isnan().any(-1).any(0).nonzero()[:, 0].tolist() == list(reached[bad])


def test_texts_behind_a_prefix_begin_at_its_length() -> None:
    prefixes = [torch.randn(1, 2, 4, 2, 8)]
    lay = attention.layout([3, 0], [2, 2, 2], [2, 0, 1], device=torch.device("cpu"), prefixes_L2PGD=prefixes)
    assert lay.positions_1T.tolist() == [[0, 1, 2, 4, 5, 3, 4, 0, 1]]
    assert lay.num_tokens == 9  # the prefix adds none


@pytest.mark.parametrize("init", ["random", "zero"])
def test_keys_and_values_start_where_they_are_told_to(tmp_path: Path, init: str) -> None:
    cfg = _config(tmp_path, **{"adapter.init": init, "adapter.length": 50})
    state = torch.random.get_rng_state()
    cohort = adapters.build(cfg, base := _load(cfg))
    assert torch.equal(torch.random.get_rng_state(), state)
    values = cohort["mood"].folded().values
    assert values.shape == (L, 2, 50, K, D)
    assert torch.equal(values, adapters.build(cfg, base)["mood"].folded().values)
    if init == "zero":
        assert not values.any()
    else:
        assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02  # 9,600 draws of N(0, 1)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2, WINDOWED], ids=["llama", "gpt2", "windowed"])
def test_a_text_s_start_is_its_keys_and_values_in_the_base(tmp_path: Path, config: dict[str, Any]) -> None:
    text = "Verdict: the plot falls apart after ten minutes and nobody seems to care about it"
    path = tiny.save_base(tmp_path / "base", config)
    cfg = _config(tmp_path, base=path, **{"adapter.init": "text", "adapter.init_text": text, "adapter.length": 30})
    base = _load(cfg)
    values = adapters.build(cfg, base)["mood"].folded().values
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < 30  # repeated
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([(ids * 30)[:30]]), past_key_values=cache, use_cache=True)
    for layer, cached in enumerate(cache.layers):
        torch.testing.assert_close(values[layer, 0], cached.keys[0].transpose(0, 1), rtol=0, atol=1e-6)
        torch.testing.assert_close(values[layer, 1], cached.values[0].transpose(0, 1), rtol=0, atol=1e-6)
    assert base.model.training and base.model.config._attn_implementation == attention.NAME


def _network(seed: int = 0, *, is_zero: bool = False) -> ReparametrisedPrefix:
    draw = torch.Generator().manual_seed(seed)
    tensors = initialisation.network(P, 64, hidden=24, outputs=SHAPE.width, draw=draw, is_zero=is_zero)
    return ReparametrisedPrefix([tensors], shape=SHAPE)


def test_a_network_makes_the_prefix_and_gets_its_gradient_back_through_a_leaf() -> None:
    network, direct = _network(), _network()
    weight = torch.randn(L, 2, P, K, D)
    (direct() * weight).tanh().sum().backward()  # no leaf between
    folded = network.folded()
    assert isinstance(folded, FoldedPrefix) and folded.values.is_leaf and torch.equal(folded.values, network())
    (folded.values * weight).tanh().sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    folded.send_back()
    for got, want in zip(network.parameters(), direct.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)  # type: ignore[arg-type]
    untouched = _network()
    untouched.folded().send_back()  # this rank had no row of the adapter
    assert all(parameter.grad is None for parameter in untouched.parameters())


def test_a_network_starts_like_torch_s_own_layers_or_at_zeros() -> None:
    big = initialisation.network(100, 64, hidden=512, outputs=96, draw=torch.Generator().manual_seed(1), is_zero=False)
    (inputs_PE, (inner, inner_bias), (outer, outer_bias)) = big
    assert abs(float(inputs_PE.std()) - 1) < 0.05
    for tensor, inputs in ((inner, 64), (inner_bias, 64), (outer, 512), (outer_bias, 512)):
        assert float(tensor.abs().max()) <= inputs**-0.5
        assert float(tensor.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.15)  # of a uniform distribution
    zero = _network(is_zero=True)
    assert not zero().any() and zero.networks[0].inner_ME.any()


def test_the_file_of_a_prefix_has_the_size_of_the_arithmetic_and_of_peft_s_own_results() -> None:
    # Llama-3.2-3B: 28 layers, 8 key heads of 128, in PEFT's published benchmark at lengths 200 and 50.
    width = PrefixShape(28, 8, 128).width
    assert files.expected_bytes(200, width) == 45_875_328
    assert files.expected_bytes(50, width) == 11_468_928
    weights = peft_format.weights_bytes(_prefix().values)
    assert len(weights) == files.expected_bytes(P, SHAPE.width)
    assert 0 < len(weights) - 2 * P * L * K * D * 4 <= 8 + 128


@pytest.mark.parametrize(
    "reparam", [{}, {"adapter.reparam": "mlp", "adapter.reparam_hidden_size": 24}], ids=["none", "mlp"]
)
@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_the_plan_s_bytes_are_those_of_the_prefix(
    tmp_path: Path, config: dict[str, Any], reparam: dict[str, Any]
) -> None:
    cfg = _config(tmp_path, base=tiny.save_base(tmp_path / "base", config), **reparam)
    cohort = adapters.build(cfg, _load(cfg))
    made = plan.make(cfg, facts.load(tmp_path / "base"), plan.Hardware.parse("cpu-24GB"), world=2)
    assert made.adapter_bytes == made.gradient_bytes == made.reduced_bytes_per_step == cohort.num_bytes
    assert made.optimizer_bytes == 2 * cohort.num_bytes
    assert made.adapter_file_bytes == len(peft_format.weights_bytes(cohort["mood"].folded().values))


def test_facts_count_key_heads_where_several_query_heads_share_one() -> None:
    root = Path(__file__).parents[2] / "configs" / "plan"
    cfg = configio.load(root / "llama-3.1-70b.yaml")
    base = facts.load(cfg.base.model)
    assert (base.num_heads, base.num_kv_heads, base.head_dim) == (64, 8, 128)
    assert base.prefix_width == 80 * 2 * 8 * 128


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"adapter.init": "text"}, "adapters.mood.init_text: must be given exactly when init is 'text'"),
        ({"adapter.init": "labels"}, "adapters.mood.init: must be 'random', 'zero', 'text' or 'adapter', got 'labels'"),
        ({"adapter.reparam": "mlp"}, "adapters.mood.reparam_hidden_size: must be given exactly when reparam is 'mlp'"),
        ({"adapter.reparam_hidden_size": 8}, "adapters.mood.reparam_hidden_size: must be given exactly when reparam"),
        (
            {
                "adapter.reparam": "mlp",
                "adapter.reparam_hidden_size": 8,
                "adapter.init": "text",
                "adapter.init_text": "a",
            },
            "adapters.mood.init: 'text' gives keys and values, which the network of reparam='mlp' cannot start at",
        ),
    ],
)
def test_a_prefix_that_cannot_be_is_refused_with_its_key(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(tmp_path, **changes)
    assert f"  {line}" in str(caught.value)


def test_a_prefix_with_packing_off_is_refused_before_the_base_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTSCALE_CACHE", str(tmp_path / "cache"))
    line = r"adapters.mood.kind: a prefix in .* needs packed passes, got train.packing='off'; set that to 'auto'"
    with pytest.raises(ConfigError, match=line):
        driver.run(_config(tmp_path, **{"train.packing": "off"}))
    assert not (tmp_path / "cache").exists()


def test_a_base_that_takes_padded_passes_refuses_a_prefix_by_name(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    base = _load(cfg, is_packed=False)
    with pytest.raises(AdapterError, match=r"adapters.mood: a prefix cannot be put .*is off.*Use kind: prompt"):
        adapters.build(cfg, base)
    with pytest.raises(ModelError, match="a prefix needs packed passes"):
        passes.target_logits(base, [Row(None, [5, 6, 7], 1, _prefix().values)])
    exactness.make_packed(base)
    adapters.build(cfg, base)


def test_a_base_that_bypasses_the_registry_refuses_a_prefix_with_that_reason(tmp_path: Path) -> None:
    config = {**families.configs()["bloom"].to_dict(), "vocab_size": 4096}
    cfg = _config(tmp_path, base=tiny.save_base(tmp_path / "base", config))
    base = _load(cfg, is_packed=False)
    setup.choose_packing(cfg, base)
    with pytest.raises(AdapterError, match=r"adapters.mood: a prefix .*\(bloom: its attention does not go"):
        adapters.build(cfg, base)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2, WINDOWED], ids=["llama", "gpt2", "windowed"])
def test_what_is_written_behind_a_prefix_is_what_the_packed_pass_finds_likeliest(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    cfg = _config(tmp_path, base=tiny.save_base(tmp_path / "base", config))
    base = _load(cfg)
    prefix = initialisation.random_keys_values(P, prefixed.shape_of(base.model.config), seed=4)
    texts = [base.tokenizer(text)["input_ids"] for text, _ in tiny.REVIEWS[:4]]
    rows = [Row(None, ids, 0, prefix) for ids in texts]
    base.eval()
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(padded.generates_with(base, row), []).append(row)
    assert len(groups) == (len({len(ids) for ids in texts}) if config is WINDOWED else 1)
    num_other = 0
    for group in groups.values():
        for row, written in zip(group, padded.generate(base, group, max_new_tokens=12), strict=True):
            ids = list(row.ids)
            for token in written:
                with torch.no_grad():
                    (logits_V,) = passes.target_logits(base, [Row(None, [*ids, 0], 1, prefix)])
                assert int(logits_V.argmax()) == token
                ids.append(token)
            alone = padded.generate(base, [Row(None, row.ids, 0)], max_new_tokens=12)[0]
            num_other += alone != written
    assert num_other > 1  # the prefix does something
