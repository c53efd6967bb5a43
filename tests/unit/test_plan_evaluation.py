"""Evaluations in a plan: a pass without a backward against live storages, and the passes that a run counts itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_plans
import tiny
import torch
from living import peak

from peftscale import driver, facts, plan
from peftscale.base import load, passes
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.data import tasks
from peftscale.data.batches import Item, pass_tokens, plan_passes
from peftscale.plan import Hardware, PassSize, memory
from peftscale.train import comm, evaluate, setup

CPU = torch.device("cpu")
SIZES = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = {
    **SIZES,
    "model_type": "llama",
    "intermediate_size": 344,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
WIDE = {**SIZES, "model_type": "qwen3", "intermediate_size": 344, "num_key_value_heads": 2, "head_dim": 96}
GPT2 = {**tiny.GPT2, "n_embd": 128, "n_layer": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {**tiny.T5, "d_model": 128, "d_kv": 32, "d_ff": 344, "dropout_rate": 0.0}
NUM_ROWS, NUM_TOKENS = 6, 90


def _base(tmp_path: Path, config: dict[str, Any], dtype: str) -> Base:
    cfg = tiny.run_config(
        tmp_path,
        base=tiny.save_base(tmp_path / "large", {"max_position_embeddings": 256, "n_positions": 256, **config}),
        **{"base.quantization": "none", "base.compute_dtype": dtype},
    )
    with comm.session(backend="gloo", timeout_s=60):
        base = load.load(cfg.base, sharding="replicated", device=CPU)
        if not base.is_encoder_decoder:
            assert setup.pack_where_exact(base) is None
    base.eval()
    return base


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("config", [LLAMA, WIDE, GPT2, T5], ids=["llama", "wide heads", "gpt2", "t5"])
def test_a_pass_of_an_evaluation_takes_what_is_planned(
    tmp_path: Path, config: dict[str, Any], dtype: str, num_bytes: int
) -> None:
    base, of_base = _base(tmp_path, config, dtype), facts.load(tmp_path / "large")
    draw, is_t5 = torch.Generator().manual_seed(0), config["model_type"] == "t5"
    texts = torch.randint(3, 4096, (NUM_ROWS, NUM_TOKENS), generator=draw).tolist()
    passes.target_logits(base, [Row(None, texts[0], 1)])  # what is made once
    compared = peak(lambda: passes.target_logits(base, [Row(None, ids, 1) for ids in texts]).log_softmax(-1))
    num = NUM_ROWS * NUM_TOKENS
    size = PassSize(tokens=num, rows=NUM_ROWS, targets=NUM_ROWS, row_tokens=NUM_TOKENS - 1)
    in_attention = num_bytes if is_t5 else 4
    planned = plan.evaluation_bytes(
        of_base, size, dense_bytes=num_bytes, decoder_tokens=NUM_ROWS * is_t5, attention_bytes=in_attention
    )
    assert 0.8 * planned < compared < 1.1 * planned, compared / planned
    written = peak(lambda: passes.generate(base, [Row(None, ids, 0) for ids in texts], max_new_tokens=20))
    size = PassSize(num + NUM_ROWS * 20, rows=NUM_ROWS, targets=0, row_tokens=NUM_TOKENS, new_tokens=20)
    decoder_tokens = NUM_ROWS * 21 * is_t5
    planned = plan.evaluation_bytes(of_base, size, dense_bytes=num_bytes, decoder_tokens=decoder_tokens)
    assert 0.8 * planned < written < 1.1 * planned, written / planned


def test_bytes_of_labels_and_of_texts_by_hand() -> None:
    base = small_plans.base()
    labels = PassSize(tokens=100, rows=10, targets=30, row_tokens=9)
    # The input of 8 twice, and attention with its copies, which is more than a plain activation of 24 three times.
    assert plan.evaluation_bytes(base, labels, dense_bytes=2) == 100 * 2 * (2 * 8 + 5 * 8 + 8 * 8)
    many = replace(labels, targets=100)
    assert plan.evaluation_bytes(base, many, dense_bytes=2) == 8 * 100 * 50
    texts = PassSize(tokens=100, rows=4, targets=0, row_tokens=15, new_tokens=10)
    block = 2 * (2 * 8 + 3 * 24) + 2 * (8 + 15)  # the text itself and a mask beside it
    cache = 2 * 2 * 8 * 2 * 100  # keys and values of 8, two layers, room for what is written
    assert plan.evaluation_bytes(base, texts, dense_bytes=2) == cache + (100 - 4 * 10) * block


def test_the_peak_has_the_larger_of_step_and_evaluation() -> None:
    cfg, base, hardware = small_plans.cfg(adapters={"a": 5}), small_plans.base(), Hardware.parse("cpu-24GB")
    work = plan.expected(cfg, base, world=1)
    of_step = plan.make(cfg, base, hardware, world=1, work=work)
    many = replace(work, evaluated=(PassSize(tokens=100, rows=100, targets=90_000, row_tokens=1),))
    of_labels = plan.make(cfg, base, hardware, world=1, work=many)
    assert of_labels.evaluation_bytes == 8 * 90_000 * 50
    difference = of_labels.evaluation_bytes - of_step.activation_bytes - of_step.logits_bytes
    assert of_labels.peak_rank_bytes - of_step.peak_rank_bytes == difference > 0
    smaller = replace(hardware, memory_bytes=500_000_000 + of_step.peak_rank_bytes + 1000)
    assert plan.make(cfg, base, smaller, world=1, work=work).fits
    (problem,) = plan.make(cfg, base, smaller, world=1, work=many).problems
    assert "(evaluation 36.0 MB," in problem


def test_a_run_counts_the_passes_of_its_own_evaluations(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{"train.microbatch_tokens": 40})
    with comm.session(backend="gloo", timeout_s=60):
        base = load.load(cfg.base, sharding="replicated", device=CPU)
        task = tasks.load(cfg.task, base.tokenizer, max_tokens=None)
        cell = evaluate.Cell(evaluate.BASE_ALONE, task, task.validation, ())
        (labels,) = evaluate.pass_sizes(base, {}, [cell], microbatch_tokens=40)
        lengths = [len(example.input_ids) + 1 for example in task.validation]  # words of one token: one row for all
        assert labels.row_tokens == max(lengths) - 1
        ranks = plan_passes(
            [Item("", 0, one, one.choices_ids[0]) for one in task.validation], world=1, microbatch_tokens=40
        )
        assert labels.tokens == max(pass_tokens(rows, is_packed=False) for rows in ranks[0]) <= 40
        assert labels.targets == labels.rows == max(map(len, ranks[0]))
        assert labels.new_tokens == 0


def test_a_run_predicts_more_memory_where_an_evaluation_is_what_takes_it(tmp_path: Path) -> None:
    """A step of one short row, and an evaluation of many at once."""
    changes: dict[str, Any] = {"train.examples_per_step": 1, "train.microbatch_tokens": 1500}
    cfg = tiny.run_config(tmp_path, **changes)
    ended = driver.run(cfg, show=False)
    planned = plan.make(cfg, facts.load(cfg.base.model), plan.detect(cuda=False), world=1)
    weights = planned.slice_bytes + planned.dequantized_bytes
    assert ended.predicted.peak_rank_bytes > weights + memory.evaluation_bytes(
        facts.load(cfg.base.model), PassSize(100, 7, 7, 20), dense_bytes=4
    )
