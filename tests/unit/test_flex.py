"""FlexAttention gives what the batched attention gives, and keeps what is not finite with its own adapter.

Torch compiles no backward of FlexAttention for the CPU. What is shown here: outputs and gradients of torch's uncompiled
form of it, outputs of the kernel compiled for the CPU, and which pairs of blocks any kernel multiplies. On CUDA:
tests/gpu.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import packed_rows
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import HEAD_DIM, layer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

from peftscale.base import attention, exactness, flex, flex_exactness, load, packed
from peftscale.base.padded import Row, logits_at
from peftscale.config import BaseConfig
from peftscale.train import setup

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's uncompiled form, which has a backward: it is refused on CPU because the compiled one has none there."""
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", packed_rows.CASES)
@pytest.mark.usefixtures("uncompiled")
def test_outputs_and_gradients_are_those_of_the_batched_attention(case: str) -> None:
    arguments = packed_rows.CASES[case]
    got, want = packed_rows.attended(is_flex=True, **arguments), packed_rows.attended(is_flex=False, **arguments)
    assert packed_rows.error(got, want) < 1e-6  # measured 1.7e-7 to 5.3e-7


@pytest.mark.parametrize("left_out", ["sliding_window", "softcap", "s_aux", "scaling"])
@pytest.mark.usefixtures("uncompiled")
def test_what_a_layer_asks_for_changes_the_result(left_out: str) -> None:
    """Negative control: none of the arguments above could be ignored and still pass."""
    whole = packed_rows.CASES["all together"]
    got = packed_rows.attended(is_flex=True, **{**whole, left_out: None})
    assert packed_rows.error(got, packed_rows.attended(is_flex=True, **whole)) > 1e-2  # measured 0.14 to 3.2


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_sees_what_the_batched_masks_let_it_see(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=3))
    prefixes = data.draw(st.lists(st.integers(1, 150), max_size=2))
    examples = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    num = len(prompts) + len(prefixes)
    owners = data.draw(st.lists(st.integers(0, num - 1), min_size=len(examples), max_size=len(examples)))
    window = data.draw(st.one_of(st.none(), st.integers(1, 150)))
    rows = [torch.zeros(1, 2, length, 1, 1) for length in prefixes]
    lay = attention.layout(prompts, examples, owners, device=torch.device("cpu"), prefixes_L2PGD=rows)
    want_TS = _seen_by_batches(lay, window)
    places, mask = lay.places, lay.places.mask(window)
    seen_UW = torch_flex.create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
    assert torch.equal(
        mask.to_dense()[0, 0].bool(), seen_UW.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
    )
    back_T = places.back_T
    assert torch.equal(places.queries_U[back_T], torch.arange(lay.num_tokens))
    got_TS = torch.zeros_like(want_TS)
    token_at, key_at = seen_UW[back_T].nonzero(as_tuple=True)
    got_TS[token_at, places.keys_W[key_at].long()] = True
    assert torch.equal(got_TS, want_TS)
    assert seen_UW[back_T].sum() == want_TS.sum()  # no key is seen twice, in a place and in its padding
    padding = torch.ones(len(seen_UW), dtype=torch.bool).index_fill(0, back_T, False)
    assert (seen_UW[padding].sum(1) == 1).all()  # itself: finite, and it reads nobody else


def _seen_by_batches(lay: attention.Layout, window: int | None) -> Tensor:
    """(T, T + F), from the masks of the batched attention."""
    seen_TS = torch.zeros(lay.num_tokens, lay.num_tokens + sum(lay.prefix_lengths), dtype=torch.bool)
    num_rows = 0
    for batch, masks in zip(lay.batches, lay.masks(window, torch.float32), strict=True):
        is_real_NE = torch.isin(torch.arange(num_rows, num_rows + batch.queries_NE.numel()), lay.back_T)
        num_rows += batch.queries_NE.numel()
        real = is_real_NE.view_as(batch.queries_NE)
        for at, keys_at, mask, ok in zip(batch.queries_NE, batch.keys_NS, masks[:, 0], real, strict=True):
            query, key = ((mask == 0) & ok[:, None]).nonzero(as_tuple=True)
            seen_TS[at[query], keys_at[key]] = True
    return seen_TS


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_block_holds_two_adapters_and_none_is_multiplied_with_another_s(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    prefixes = data.draw(st.lists(st.integers(1, 150), max_size=3))
    examples = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    num = len(prompts) + len(prefixes)
    owners = data.draw(st.lists(st.integers(0, num - 1), min_size=len(examples), max_size=len(examples)))
    places = flex.place(prompts, examples, owners, prefixes, device=torch.device("cpu"))
    owner_of_token = torch.tensor(
        [
            *(owner for owner, length in enumerate(prompts) for _ in range(length)),
            *(owner for owner, length in zip(owners, examples, strict=True) for _ in range(length)),
            *(len(prompts) + owner for owner, length in enumerate(prefixes) for _ in range(length)),
        ]
    )
    of_queries, of_keys = (
        owner_of_token[at.long()].unflatten(0, (-1, 128)) for at in (places.queries_U, places.keys_W)
    )
    for of_places in (of_queries, of_keys):
        assert (of_places == of_places[:, :1]).all()
    pairs_QB = places.mask(None).to_dense()[0, 0].bool()
    assert (of_queries[:, None, 0] == of_keys[None, :, 0])[pairs_QB].all()


@pytest.mark.parametrize("bad", [0, 1])
@needs_compiler
def test_a_compiled_kernel_keeps_what_is_not_finite_with_its_adapter(bad: int) -> None:
    lay = attention.layout([3, 130, 0], [4, 2, 6, 1], [0, 1, 0, 2], device=torch.device("cpu"))
    rows = {0: [*range(3), *range(133, 137), *range(139, 145)], 1: [*range(3, 133), 137, 138]}[bad]
    states = torch.randn(1, 2, lay.num_tokens, HEAD_DIM)
    states[:, :, rows[: 3 if bad == 0 else 130]] = float("nan")
    with torch.no_grad():
        out, want = (
            attention.packed_attention(layer(), states, states, states, None, layout=lay, is_flex=is_flex)[0][0]
            for is_flex in (True, False)
        )
    assert out.isnan().any(-1).any(-1).nonzero()[:, 0].tolist() == rows
    healthy = ~want.isnan().any(-1).any(-1)
    assert packed_rows.error([out[healthy]], [want[healthy]]) < 1e-6  # measured 2.0e-8 and 6.1e-8


def _tiles(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, **_: Any) -> Tensor:
    """What a kernel of blocks multiplies: every number of a visited pair, masked ones as 0, forward and backward."""
    size, num_queries = block_mask.BLOCK_SIZE[0], query.shape[2] // block_mask.BLOCK_SIZE[0]
    seen = torch_flex.create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")[0, 0]
    outs = []
    for block in range(num_queries):
        visited = block_mask.kv_indices[0, 0, block, : block_mask.kv_num_blocks[0, 0, block]]
        keys_at = (visited[:, None] * size + torch.arange(size)).flatten()
        queries_at = torch.arange(block * size, (block + 1) * size)
        scores = query[:, :, queries_at] @ key[:, :, keys_at].transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen[queries_at][:, keys_at], float("-inf"))
        outs.append(scores.softmax(-1) @ value[:, :, keys_at])
    return torch.cat(outs, dim=2)


def test_a_kernel_of_blocks_keeps_what_is_not_finite_with_its_adapter_in_backward_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: _tiles)
    rows, bad_outputs, bad_gradients = packed_rows.spoiled()
    assert bad_outputs == rows
    assert bad_gradients == rows


def test_a_kernel_that_multiplies_all_pairs_spoils_every_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the mask alone keeps nothing apart."""

    def whole(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, **rest: Any) -> Tensor:
        num_queries, num_keys = block_mask.seq_lengths
        every = torch.arange(num_keys // 128, dtype=torch.int32).expand(1, 1, num_queries // 128, -1)
        counts = torch.full((1, 1, num_queries // 128), num_keys // 128, dtype=torch.int32)
        mask = torch_flex.BlockMask.from_kv_blocks(counts, every, mask_mod=block_mask.mask_mod)
        return _tiles(query, key, value, block_mask=mask, **rest)

    monkeypatch.setattr(flex, "_compiled", lambda: whole)
    rows, bad_outputs, bad_gradients = packed_rows.spoiled()
    assert len(bad_outputs) > len(rows) and len(bad_gradients) > len(rows)


def _counted(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """The compiled kernel as it is, but for the last stage, which would need a device."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend=counter, **how))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    return counter


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    yield
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def _pass(num: int, *, heads: int = 4, **arguments: Any) -> None:
    """One row of an adapter with `num` examples, forward and backward."""
    lay = attention.layout([20, 0], [30 + i for i in range(num)], [0] * num, device=torch.device("cpu"))
    states = [torch.randn(1, count, lay.num_tokens, HEAD_DIM, requires_grad=True) for count in (heads, 2, 2)]
    out, _ = attention.packed_attention(layer(), *states, None, layout=lay, is_flex=True, **arguments)
    out.sum().backward()


@pytest.mark.usefixtures("fresh_kernel")
def test_rows_of_all_lengths_and_layers_of_all_windows_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _counted(monkeypatch)
    for num, window in ((1, None), (9, None), (4, 16), (30, None), (9, 200), (17, 16), (60, None), (1, 3)):
        _pass(num, sliding_window=window)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_kernel")
def test_another_scaling_or_cap_is_another_kernel_and_not_an_uncompiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbolic numbers break the graph, and flex_attention would run with every score in memory."""
    counter = _counted(monkeypatch)
    kinds = [{"scaling": 0.1}, {"scaling": 0.3}, {"softcap": 0.5}, {"softcap": 0.7}, {"softcap": 0.7, "scaling": 0.1}]
    for number, kind in enumerate(kinds * 2):
        _pass(3 + number, **kind)
    assert counter.frame_count == len(kinds)


@pytest.mark.parametrize("family", ["llama", "qwen2 with window", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("uncompiled")
def test_a_whole_model_gives_the_same_logits_and_prompt_gradients(family: str) -> None:
    torch.manual_seed(0)
    model = exactness.small_copy(families.configs()[family])
    prompts = [nn.Parameter(torch.randn(num, model.get_input_embeddings().embedding_dim) * 0.1) for num in (6, 4)]
    ids = [torch.randint(1, 200, (num,)).tolist() for num in (25, 13, 22, 9)]
    rows = [Row(p, text, 2) for p, text in zip([prompts[0], prompts[1], prompts[0], None], ids, strict=True)]
    ways = []
    for name in (attention.NAME, attention.FLEX):
        attention.install(model, name)
        embeds, at, arguments = packed.join(rows, model.get_input_embeddings(), torch.float32, torch.device("cpu"))
        logits = logits_at(model, embeds, at, **arguments)
        ways.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), prompts)])
    assert packed_rows.error(*ways) < 2e-6  # measured 5.0e-7 to 7.3e-7


@pytest.mark.usefixtures("fresh_kernel")
def test_checkpointing_changes_no_gradient_and_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _counted(monkeypatch)
    gradients, calls, counts = [], [], []
    for is_on in (False, True):
        torch.manual_seed(0)
        model = exactness.small_copy(families.configs()["gemma2"])
        attention.install(model, attention.FLEX)
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        prompt = nn.Parameter(torch.randn(6, model.get_input_embeddings().embedding_dim) * 0.1)
        rows = [Row(prompt, torch.randint(1, 200, (num,)).tolist(), 2) for num in (25, 13, 140)]
        embeds, at, arguments = packed.join(rows, model.get_input_embeddings(), torch.float32, torch.device("cpu"))
        before = attention.num_calls()
        logits = logits_at(model, embeds, at, **arguments)
        gradients.append(torch.autograd.grad(logits.square().sum(), prompt)[0])
        calls.append(attention.num_calls() - before)
        counts.append(counter.frame_count)
    assert torch.equal(*gradients)
    assert calls[1] == 2 * calls[0]
    assert counts == [1, 1]


def _quickstart(compute_dtype: str) -> load.Base:
    cfg = BaseConfig(
        model=str(tiny.QUICKSTART / "base"),
        quantization="nf4",
        compute_dtype=compute_dtype,  # type: ignore[arg-type]
        sharding="replicated",
        checkpoint_activations=False,
    )
    return load.load(cfg, sharding="replicated", device=torch.device("cpu"))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("uncompiled")
def test_the_check_at_load_passes_a_kernel_that_is_right(compute_dtype: str) -> None:
    base = _quickstart(compute_dtype)
    before = base.model.config._attn_implementation
    assert flex_exactness.flex_differs(base) is None
    assert base.model.config._attn_implementation == before and base.model.training


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("uncompiled")
def test_the_check_at_load_finds_a_wrong_gradient_behind_right_outputs(
    compute_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        return torch_flex.flex_attention(query, key + 0.2 * (key - key.detach()), value, **arguments)

    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    reason = flex_exactness.flex_differs(_quickstart(compute_dtype))
    assert reason is not None
    assert reason.startswith("layer 0: its gradients of keys differ by")


@pytest.mark.usefixtures("uncompiled")
def test_the_check_at_load_finds_a_kernel_that_is_wrong_for_prefixes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        own, behind = key.split([query.shape[2], key.shape[2] - query.shape[2]], dim=2)
        wrong = torch.cat([own, behind + 0.2 * (behind - behind.detach())], dim=2)
        return torch_flex.flex_attention(query, wrong, value, **arguments)

    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    base = _quickstart("float32")
    reason = flex_exactness.flex_differs(base)
    assert reason is not None
    assert reason.startswith("layer 0: its gradients of prefixes differ by")
    monkeypatch.setattr(exactness, "prefix_differs", lambda *_, **__: "none here")
    assert flex_exactness.flex_differs(base) is None  # such a base has no prefix to be wrong for


def test_a_base_on_which_the_kernel_fails_is_told_so_and_goes_on() -> None:
    base = _quickstart("float32")
    reason = flex_exactness.flex_differs(base)
    assert reason is not None
    assert reason.startswith("layer 0: it fails (")
    assert setup.pack_where_exact(base) is None


def test_a_base_on_the_cpu_stays_batched_without_a_word(tmp_path: Path) -> None:
    base = load.load(tiny.run_config(tmp_path).base, sharding="replicated", device=torch.device("cpu"))
    assert setup.pack_where_exact(base) is None
    assert base.model.config._attn_implementation == attention.NAME
