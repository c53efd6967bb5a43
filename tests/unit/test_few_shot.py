"""Prompt design: demonstrations are what transformers reads as one text, drawn evenly, calibrated as published."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from peftscale import baselines
from peftscale.adapters import SoftPrompt
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.baselines import few_shot
from peftscale.baselines import task as baseline_task
from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.records import RunSummary
from peftscale.train import evaluate
from peftscale.train.evaluate import Cell, Evaluation

CPU = torch.device("cpu")
FEW = {"method": "few_shot", "few_shot": {"examples": 2}}


def _run(cfg: RunConfig) -> RunSummary:
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    return baselines.main(cfg)


def _shown(cfg: RunConfig) -> tuple[Base, few_shot.Demonstrations, Cell]:
    base, task = base_load.load(cfg.base, sharding="replicated", device=CPU), baseline_task.load(cfg)
    shown = few_shot.demonstrations(cfg, task, base)
    return base, shown, shown.cell(cfg, base, task, task.validation, cfg.task.metrics)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_demonstrations_give_the_likelihoods_of_the_whole_text_in_plain_transformers(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    base_dir = tiny.save_base(tmp_path / "base", config)
    cfg = tiny.run_config(tmp_path, base=base_dir, **{**FEW, "base.quantization": "none"})
    base, shown, cell = _shown(cfg)
    prompt = SoftPrompt(base.embedding_rows(torch.tensor(shown.ids)))
    (result,) = evaluate.run_cells(base, {"few_shot": prompt}, [cell], microbatch_tokens=512)
    plain = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    train = baseline_task.load(cfg).train
    text = "".join(f"{tiny.REVIEWS[row][0]}\nVerdict: {tiny.REVIEWS[row][1]}\n\n" for row in shown.rows)
    assert base.tokenizer.decode(shown.ids, skip_special_tokens=True) == text
    for example, found in zip(train, result.likelihoods, strict=True):
        whole = torch.tensor([[*shown.ids, *example.input_ids[shown.num_start :]]])
        with torch.no_grad():
            logp_V = plain(whole).logits[0, -1].log_softmax(-1)
        want = [float(logp_V[ids[0]]) for ids in example.choices_ids]
        assert found == pytest.approx(want, abs=1e-5)  # of about 8; measured 1e-6


def test_demonstrations_are_balanced_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    train = baseline_task.load(tiny.run_config(tmp_path, **FEW)).train  # four bad and three good
    labels = [sorted(train[row].label or 0 for row in few_shot.draw(train, 4, seed=seed)) for seed in range(8)]
    assert labels == [[0, 0, 1, 1]] * 8
    assert sorted(few_shot.draw(train, 7, seed=0)) == list(range(7))
    drawn = [few_shot.draw(train, 4, seed=seed) for seed in range(8)]
    assert drawn == [few_shot.draw(train, 4, seed=seed) for seed in range(8)]
    assert len(set(drawn)) > 4
    first = {train[rows[0]].label for rows in drawn}
    assert first == {0, 1}  # in a random order, not one label after the other


def test_calibration_divides_by_what_labels_get_behind_nothing() -> None:
    """Zhao et al. 2021: a model that says `good` with 0.7 whatever it reads has to say it with more."""
    log = torch.tensor
    free = log([[0.3, 0.7], [0.3, 0.7]]).log().tolist()
    likelihoods = log([[0.35, 0.65], [0.25, 0.75], [0.035, 0.065]]).log().tolist()
    assert few_shot.calibrated(likelihoods, free) == [0, 1, 0]
    assert few_shot.calibrated(likelihoods, log([[0.5, 0.5]]).log().tolist()) == [1, 1, 1]


def test_zero_shot_is_the_base_alone_and_calibration_is_not(tmp_path: Path) -> None:
    zero = tiny.run_config(tmp_path, method="few_shot", few_shot={"examples": 0}, name="zero")
    (found,) = _run(zero).adapters.values()
    assert found.after == found.before
    cfg = tiny.run_config(tmp_path, method="few_shot", few_shot={"examples": 0, "calibrated": True}, name="calibrated")
    base, shown, cell = _shown(cfg)
    free = few_shot.content_free(cfg, base)
    texts = [base.tokenizer.decode(one.input_ids, skip_special_tokens=True) for one in free.test]
    assert texts == ["N/A\nVerdict:", "[MASK]\nVerdict:", "\nVerdict:"]
    cells = [cell, shown.cell(cfg, base, free, free.test, ())]
    plain, of_free = evaluate.run_cells(base, {}, cells, microbatch_tokens=512)
    want = evaluate.score(cell, few_shot.calibrated(plain.likelihoods, of_free.likelihoods))
    (found,) = _run(cfg).adapters.values()
    assert found.after == want


def test_a_generated_answer_ends_where_the_next_example_would_begin(tmp_path: Path) -> None:
    texts = {"method": "few_shot", "few_shot": {"examples": 2}, "task.labels": None, "task.metrics": ["exact_match"]}
    cfg = tiny.run_config(tmp_path, **{**texts, "task.target": " {{ label }}", "task.max_target_tokens": 4})
    assert cfg.few_shot is not None
    _, shown, cell = _shown(cfg)
    right = [example.target_text for example in cell.examples]
    written = tuple(f"{text}\n\nAnother film\nVerdict: good" for text in right)
    assert few_shot.finished(cfg.few_shot, cell, Evaluation({"exact_match": 0.0}, written, (), 0.0)) == {
        "exact_match": 1.0
    }
    assert 2 not in shown.ids  # a demonstration ends with the separator, not with the end of a text
    (found,) = _run(cfg).adapters.values()
    assert 0.0 <= found.after["exact_match"] <= 1.0


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"examples": 8}, "few_shot.examples=8: the train split of reviews has 7"),
        ({"examples": 7}, r"few_shot.examples=7: the demonstrations take \d+ tokens .* the base has 128 positions"),
    ],
)
def test_demonstrations_that_cannot_be_shown_are_refused(tmp_path: Path, section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        _shown(tiny.run_config(tmp_path, method="few_shot", few_shot=section))


def test_a_separator_that_is_no_token_is_refused(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **FEW)
    base, task = base_load.load(cfg.base, sharding="replicated", device=CPU), baseline_task.load(cfg)
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")  # as T5's reads line breaks
    with pytest.raises(ConfigError, match=r"few_shot.separator='\\n\\n' is no token for this base's tokenizer"):
        few_shot.demonstrations(cfg, task, base)
