"""Encoder-decoder bases: prompts on encoder and decoder, prefixes in all three attentions, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import tiny
import torch
from families import encoder_decoders, largest_error, prompted_rows, transformers_logits
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from peftscale import adapters, driver, records
from peftscale.adapters import Cohort, initialisation
from peftscale.base import encoder_decoder, load, passes, prefixed, slots, slots_exactness, text_exactness
from peftscale.base.linear import FrozenLinear
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.data.tokens import TextEncoder
from peftscale.errors import AdapterError, ModelError
from peftscale.train import evaluate, setup, step

H = 64
ORIGINAL = {**tiny.T5, "tie_word_embeddings": True, "feed_forward_proj": "relu"}  # scaled outputs, the head is tied
MT5 = {**tiny.T5, "model_type": "mt5"}
PEGASUS = {**tiny.BART, "model_type": "pegasus"}
BASES = {"t5 v1.1": tiny.T5, "t5": ORIGINAL, "mt5": MT5, "bart": tiny.BART}

PROMPT = {"kind": "prompt", "length": 5, "init": "vocabulary"}
BOTH = {**PROMPT, "length": 3, "decoder_length": 2}
PREFIX = {"kind": "prefix", "length": 4, "init": "random"}
NETWORK = {**PREFIX, "length": 3, "reparam": "mlp", "reparam_hidden_size": 24}
MIXED = {"words": PROMPT, "both": BOTH, "keys": PREFIX, "network": NETWORK}


def _config(tmp: Path, config: dict[str, Any] = tiny.T5, **changes: Any) -> RunConfig:
    base = tmp / "base" if (tmp / "base").exists() else tiny.save_base(tmp / "base", config)
    changes = {"adapters": MIXED, "base.quantization": "none", "train.microbatch_tokens": 512, **changes}
    return tiny.run_config(tmp, base=base, **changes)


def _load(cfg: RunConfig) -> Base:
    return load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))


def _theirs(tmp: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(tmp / "base", dtype=torch.float32).eval().requires_grad_(False)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _task(cfg: RunConfig, base: Base) -> tasks.TaskData:
    return tasks.load(cfg.task, base.tokenizer, max_tokens=100, is_encoder_decoder=base.is_encoder_decoder)


def _gradients(cfg: RunConfig, base: Base, cohort: Cohort, *, microbatch_tokens: int = 512) -> dict[str, Tensor]:
    examples = _task(cfg, base).train
    items = [item for name, a in cohort.items() for item in training_items(name, a.num_positions, examples)]
    for parameter in cohort.parameters():
        parameter.grad = None
    step.gradient(base, cohort, items, microbatch_tokens=microbatch_tokens)
    return {name: p.grad.clone() for name, p in cohort.named_parameters().items() if p.grad is not None}


# Prompts


@pytest.mark.parametrize("name", BASES)
def test_logits_and_prompt_gradients_are_those_of_transformers_on_concatenated_embeddings(
    tmp_path: Path, name: str
) -> None:
    base, theirs = _load(_config(tmp_path, BASES[name])), _theirs(tmp_path)
    rows, prompts = prompted_rows(H, seed=1)
    want_MV = torch.cat([transformers_logits(theirs, row) for row in rows])
    error = largest_error(passes.target_logits(base, rows), want_MV, rows, prompts)  # one padded batch
    assert error < 4e-6  # measured 2.1e-6; transformers' own are 3.2e-6 off those of float64


def test_the_head_of_version_1_1_is_its_own_and_that_of_the_original_is_the_embedding(tmp_path: Path) -> None:
    for name, config in (("t5 v1.1", tiny.T5), ("t5", ORIGINAL), ("mt5", MT5)):
        model = _load(_config(tmp_path / name, config)).model
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert is_tied == (name == "t5")
        assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight


def test_a_version_1_1_that_was_saved_with_a_tied_head_is_the_model_that_transformers_makes_of_it(
    tmp_path: Path,
) -> None:
    cfg = _config(tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base, theirs = _load(cfg), _theirs(tmp_path)
    rows = [Row(None, [5, 9, 11, 40, 8], 2)]
    with torch.no_grad():
        assert _error(passes.target_logits(base, rows), transformers_logits(theirs, rows[0])) < 2e-6


def test_a_head_that_differs_from_the_embedding_it_should_be_is_refused(tmp_path: Path) -> None:
    cfg = _config(tmp_path, ORIGINAL)
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["shared.weight"].clone()}, file, metadata={"format": "pt"})
    _load(cfg)  # two equal ones are one
    save_file({**weights, "lm_head.weight": weights["shared.weight"] * 1.01}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"hold shared.weight and lm_head.weight, which differ, but by its config"):
        _load(cfg)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_packed_t5_has_the_logits_of_transformers_with_its_dequantised_weights(
    tmp_path: Path, quantization: str
) -> None:
    base, theirs = _load(_config(tmp_path, **{"base.quantization": quantization})), _theirs(tmp_path)
    frozen = {name: module for name, module in base.model.named_modules() if isinstance(module, FrozenLinear)}
    assert len(frozen) == 2 * 7 + 3 * 11 + 1  # attention of 4, cross attention of 4, gated feed-forward of 3; the head
    moved = 0.0
    for name, module in frozen.items():
        original = theirs.get_submodule(name)
        moved = max(moved, _error(module.weight_in(torch.float32), original.weight))
        original.weight.data = module.weight_in(torch.float32)
    assert (moved > 1e-3) == (quantization != "none")
    rows, _ = prompted_rows(H, seed=2)
    with torch.no_grad():
        want_MV = torch.cat([transformers_logits(theirs, row) for row in rows])
        assert _error(passes.target_logits(base, rows), want_MV) < 2e-6


def test_dropout_is_left_out_and_a_run_says_so(tmp_path: Path) -> None:
    cfg = _config(tmp_path, **{"train.steps": 1})
    base = _load(cfg)
    row = Row(None, [5, 9, 11, 40, 8], 2)
    with torch.no_grad():
        assert base.model.training
        assert torch.equal(passes.target_logits(base, [row]), passes.target_logits(base, [row]))
        theirs = _theirs(tmp_path).train()
        once, again = (transformers_logits(theirs, row) for _ in range(2))
    assert _error(once, again) > 1e-2  # it does something there
    driver.run(cfg)
    notes = [row.text for row in records.read(cfg.metrics_path) if isinstance(row, records.NoteRecord)]
    assert re.fullmatch(r"dropout is left out in \d+ places of the base", notes[0]), notes


# What is not exact is refused


def test_a_family_that_treats_embeddings_otherwise_than_ids_is_refused_by_name(tmp_path: Path) -> None:
    cfg = _config(tmp_path, PEGASUS)
    placed = setup.make_plan(cfg, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"base: no adapter would be exact .*pegasus: a text as embeddings is off by"):
        setup.load_base(cfg.base, placed, torch.device("cpu"))


@pytest.mark.parametrize("name", BASES)
def test_the_check_of_prompts_lets_exact_families_pass(tmp_path: Path, name: str) -> None:
    base = _load(_config(tmp_path, BASES[name], **{"base.compute_dtype": "bfloat16", "base.quantization": "nf4"}))
    assert text_exactness.texts_differ(base) is None
    assert base.model.training


def test_dropout_that_was_left_in_would_be_found_out(tmp_path: Path) -> None:
    base = _load(_config(tmp_path))
    base.model.encoder.dropout.p = 0.1
    assert "t5: a text as embeddings is off by" in (text_exactness.texts_differ(base) or "")


def test_a_prefix_asks_for_no_packing_where_nothing_is_packed(tmp_path: Path) -> None:
    prefix = {"mood": {"kind": "prefix", "length": 3, "init": "random"}}
    ended = driver.run(_config(tmp_path, adapters=prefix, **{"train.packing": "off", "train.steps": 1}))
    assert (ended.packing, ended.steps) == ("padded", 1)


def test_a_prefix_on_another_family_is_refused_by_name(tmp_path: Path) -> None:
    cfg = _config(tmp_path, tiny.BART, adapters={"keys": PREFIX})
    with pytest.raises(AdapterError, match=r"adapters.keys: a prefix .*\(bart: of encoder-decoder models only t5 and"):
        adapters.build(cfg, _load(cfg))


def test_a_prompt_for_the_decoder_of_a_decoder_only_base_is_refused_with_its_key(tmp_path: Path) -> None:
    cfg = _config(tmp_path, tiny.LLAMA, adapters={"mood": BOTH})
    with pytest.raises(AdapterError, match=r"adapters.mood.decoder_length=2: base .* has no decoder beside an encoder"):
        adapters.build(cfg, _load(cfg))


# Prefixes

CONFIGS = encoder_decoders()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefix_in_its_slots_is_one_that_is_hooked_into_keys_and_values(name: str) -> None:
    assert slots_exactness.differs(CONFIGS[name], own_attention="sdpa") is None


def _is_encoder(module: Any) -> bool:
    return not module.is_decoder


def _is_own(module: Any) -> bool:
    return bool(module.is_decoder and module.is_causal)


def _is_cross(module: Any) -> bool:
    return bool(module.is_decoder and not module.is_causal)


@pytest.mark.parametrize("place", [_is_encoder, _is_own, _is_cross])
@pytest.mark.parametrize("mistake", ["left out", "of the next layer"])
def test_a_prefix_that_one_attention_does_not_get_right_is_found_out(
    monkeypatch: pytest.MonkeyPatch, place: Any, mistake: str
) -> None:
    """Negative control of the check."""

    def wrong(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("slots", None)
        seen = module
        if place(module):
            depth = 3 if module.is_decoder else 2
            seen = SimpleNamespace(is_decoder=module.is_decoder, is_causal=module.is_causal)
            seen.layer_idx = (module.layer_idx + 1) % depth
        if given is not None and not (place(module) and mistake == "left out"):
            key, value = given.put(seen, key, value)
        return slots.slotted_attention(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(slots.AttentionInterface._global_mapping, slots.NAME, wrong)
    reason = slots_exactness.differs(CONFIGS["t5 v1.1"], own_attention="sdpa")
    assert reason is not None
    assert "t5: a prefix is off by" in reason


def test_the_check_leaves_the_random_state_and_the_config_alone() -> None:
    config = CONFIGS["t5 v1.1"]
    state, before = torch.random.get_rng_state(), config.to_dict()
    slots_exactness.differs(config, own_attention="sdpa")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert config.to_dict() == before


def test_a_text_s_start_is_what_encoder_and_decoder_make_of_it(tmp_path: Path) -> None:
    text = "Verdict: the plot falls apart"
    cfg = _config(tmp_path, adapters={"keys": {**PREFIX, "length": 6, "init": "text", "init_text": text}})
    base, theirs = _load(cfg), _theirs(tmp_path)
    ids = torch.tensor([(base.tokenizer(text, add_special_tokens=False)["input_ids"] * 6)[:6]])
    attentions = [block.layer[0].SelfAttention for stack in (theirs.encoder, theirs.decoder) for block in stack.block]
    attentions += [block.layer[1].EncDecAttention for block in theirs.decoder.block]
    want = torch.zeros(2 + 3 + 3, 2, 6, 4, 24)

    def keep(layer: int, which: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            want[layer, which] = out[0].view(6, 4, 24)

        return hook

    for layer, module in enumerate(attentions):
        module.k.register_forward_hook(keep(layer, 0))
        module.v.register_forward_hook(keep(layer, 1))
    values = adapters.build(cfg, base)["keys"].folded().values
    with torch.no_grad():
        theirs(input_ids=ids, decoder_input_ids=ids)
    assert len({float(value) for value in want.flatten(1).abs().sum(1)}) == 8
    torch.testing.assert_close(values, want, rtol=0, atol=1e-6)


def test_networks_of_all_parts_and_seeds_begin_apart(tmp_path: Path) -> None:
    """Encoder, decoder and cross attention of three seeds. Their vectors have one shape, so that two could be equal."""
    prefix = {"kind": "prefix", "length": 5, "init": "random", "reparam": "mlp", "reparam_hidden_size": 8}
    cfg = _config(tmp_path, adapters={f"s{seed}": prefix | {"seed": seed} for seed in range(3)})
    cohort = adapters.build(cfg, _load(cfg))
    starts = [parameter for adapter in cohort.values() for parameter in adapter.parameters() if len(parameter) == 5]
    assert len(starts) == 9
    assert len({start.detach().numpy().tobytes() for start in starts}) == 9


# Training and evaluation


def test_checkpointing_changes_no_bit_of_a_gradient_and_passes_each_block_twice(tmp_path: Path) -> None:
    gradients = []
    for is_checkpointed, times in ((False, 1), (True, 2)):
        cfg = _config(tmp_path, **{"base.checkpoint_activations": is_checkpointed})
        base = _load(cfg)
        cohort = adapters.build(cfg, base)
        passed: list[nn.Module] = []
        # The block's own call is the checkpoint's, once; what is in it is computed again.
        inside = [block.layer[0] for stack in (base.model.encoder, base.model.decoder) for block in stack.block]
        for part in inside:
            part.register_forward_pre_hook(lambda module, _, passed=passed: passed.append(module))
        gradients.append(_gradients(cfg, base, cohort, microbatch_tokens=4096))
        assert [passed.count(part) for part in inside] == [times] * 5
    assert len(gradients[0]) == 1 + 1 + 1 + 3 * 5
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.equal(gradient, gradients[1][name]), name


def test_accumulation_over_many_passes_equals_one_pass(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    base = _load(cfg)
    cohort = adapters.build(cfg, base)
    one, many = (_gradients(cfg, base, cohort, microbatch_tokens=tokens) for tokens in (4096, 60))
    errors = {name: _error(many[name], one[name]) for name in one}
    assert all(error < 2e-6 for error in errors.values()), errors  # float32 order of sums; measured 1.3e-6


def test_a_cohort_of_all_kinds_equals_each_alone(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    base = _load(cfg)
    cohort = adapters.build(cfg, base)
    together = _gradients(cfg, base, cohort)
    for name, adapter in cohort.items():
        alone = _gradients(cfg, base, Cohort({name: adapter}))
        errors = {key: _error(gradient, together[key]) for key, gradient in alone.items()}
        assert all(error < 1e-6 for error in errors.values()), errors  # measured 8.1e-7


@pytest.mark.parametrize("bad", MIXED)
def test_what_is_not_finite_in_one_adapter_touches_no_bit_of_the_others(tmp_path: Path, bad: str) -> None:
    cfg = _config(tmp_path)
    base = _load(cfg)
    cohort = adapters.build(cfg, base)
    healthy = _gradients(cfg, base, cohort)
    with torch.no_grad():
        for parameter in cohort[bad].parameters():
            parameter.fill_(float("nan"))
    for name, gradient in _gradients(cfg, base, cohort).items():
        if name.startswith(f"{bad}/"):
            assert gradient.isnan().any(), name
        else:
            assert torch.equal(gradient, healthy[name]), name


def _likeliest(base: Base, row: Row, num: int) -> list[int]:
    """Greedy targets by one pass a token, up to the end-of-sequence token."""
    ids = list(row.ids)
    for number in range(num):
        with torch.no_grad():
            row_so_far = Row(row.prompt_PH, [*ids, 0], number + 1, row.prefix_L2PKD, row.decoder_prompt_QH)
            token = int(passes.target_logits(base, [row_so_far])[-1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[len(row.ids) :]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", ["nothing", "prompt", "decoder prompt", "prefix"])
def test_what_is_written_is_what_the_pass_finds_likeliest(tmp_path: Path, name: str, kind: str) -> None:
    if name == "bart" and kind == "prefix":
        pytest.skip("no prefix on bart")
    base = _load(_config(tmp_path, BASES[name]))
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randn(n, H, generator=draw) * 3 for n in (5, 2)]
    ahead = torch.randn(3, H, generator=draw) * 3 if kind == "decoder prompt" else None
    prefix = None
    if kind == "prefix":
        adapters.refuse_prefix_on(base, "here")
        prefix = initialisation.random_keys_values(4, prefixed.shape_of(base.model.config), seed=4)
    rows = []
    for number, (text, _) in enumerate(tiny.REVIEWS[:4]):
        prompt = prompts[number % 2] if "prompt" in kind else None  # rows of two prompts go together
        rows.append(Row(prompt, base.tokenizer(text)["input_ids"], 0, prefix, ahead))
    base.eval()
    written = passes.generate(base, rows, max_new_tokens=8)
    assert written == [_likeliest(base, row, 8) for row in rows]
    alone = passes.generate(base, [Row(None, row.ids, 0) for row in rows], max_new_tokens=8)
    assert (alone == written) == (kind == "nothing" or name == "bart")
    assert passes.generate(base, [], max_new_tokens=2) == []


def test_adapters_that_are_evaluated_together_write_and_choose_what_each_does_alone(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    base = _load(cfg)
    cohort = adapters.build(cfg, base)
    for changes in ({}, {"labels": None, "metrics": ("exact_match",), "max_target_tokens": 6}):
        cfg = cfg.model_copy(update={"task": cfg.task.model_copy(update=changes)})
        task = _task(cfg, base)
        options: dict[str, Any] = {"metrics": cfg.task.metrics, "microbatch_tokens": 96}
        together = evaluate.run(base, cohort, task, task.validation, **options, with_base_alone=True)
        for name in cohort:
            alone = evaluate.run(base, {name: cohort[name]}, task, task.validation, **options)
            assert alone[name].predictions == together[name].predictions
    assert len({result.predictions for result in together.values()}) == len(MIXED) + 1


# Data


def test_texts_and_targets_end_as_the_tokenizer_ends_a_text_and_words_are_compared_without_the_end(
    tmp_path: Path,
) -> None:
    cfg = _config(tmp_path, **{"task.max_text_tokens": 6})
    base = _load(cfg)
    tokenizer, eos = base.tokenizer, base.tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    task = _task(cfg, base)
    words = [tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (" bad", " good")]
    for example in task.train:
        assert example.input_ids[-1] == eos and len(example.input_ids) <= 6  # what is cut keeps its end
        assert example.choices_ids == tuple(words)
        assert example.target_ids == (*words[example.label or 0], eos)
    assert task.has_shared_choices and task.num_seams == 0
    written = tasks.load(
        cfg.task.model_copy(update={"labels": None, "metrics": ("exact_match",)}),
        tokenizer,
        max_tokens=100,
        is_encoder_decoder=True,
    )
    assert {example.target_ids[-1] for example in written.train} == {eos}
    decoder_only = tasks.load(cfg.task, tokenizer, max_tokens=100)
    assert all(e.input_ids[-1] != eos and e.target_ids[-1] != eos for e in decoder_only.train)
    opens = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", eos)])
    tokenizer.backend_tokenizer.post_processor = opens  # as BART's: targets open as texts do
    assert {e.target_ids[0] for e in _task(cfg, base).train} == {tokenizer.bos_token_id}


def test_t5_s_own_tokenizer_file_is_read_and_closes_what_the_encoder_reads(tmp_path: Path) -> None:
    """The checkpoints of T5 come with spiece.model."""
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text, _ in tiny.REVIEWS * 4),
            model_writer=file,
            vocab_size=60,
            minloglevel=2,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    tokenizer = load.load_tokenizer(tmp_path)
    encoder = TextEncoder(tokenizer, is_encoder_decoder=True)
    assert (encoder.start_ids, encoder.end_ids, tokenizer.eos_token_id, tokenizer.pad_token_id) == ((), (1,), 1, 0)
    (text,) = encoder.inputs(["Lovely people"])
    assert text[-1] == 1 and 1 not in text[:-1]
    assert tokenizer.decode(text, skip_special_tokens=True) == "Lovely people"
    assert encoder.continuations(["Lovely"], [text], ["people"]) == [(encoder.inputs(["people"])[0][:-1], True)]


def test_the_config_of_a_saved_base_says_that_the_head_is_its_own(tmp_path: Path) -> None:
    """What the fixtures stand on: a config.json of T5 v1.1 as it lies on the hub."""
    tiny.save_base(tmp_path / "base", tiny.T5)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["tie_word_embeddings"] is False
    assert encoder_decoder.sides(Row(None, [7, 8, 9, 10], 2), _theirs(tmp_path)) == ([7, 8], [0, 9])
