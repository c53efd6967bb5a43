"""The loss of a label is its likelihood in the vocabulary, or among the labels: in adapters and in baselines alike."""

import json
from pathlib import Path

import commands
import tiny
import torch
from torch import Tensor

from peftscale.base import load as base_load
from peftscale.base import passes
from peftscale.base.padded import Row
from peftscale.baselines import model

CPU = torch.device("cpu")


def test_a_target_that_is_one_of_some_tokens_has_its_likelihood_among_those() -> None:
    torch.manual_seed(0)
    logits_MV, targets_M = torch.randn(5, 11, requires_grad=True), torch.tensor([3, 4, 2, 7, 9])
    rows = [Row(None, [1, 3], 1, among=(3, 5)), Row(None, [1, 4, 2], 2), Row(None, [1, 7, 9], 2, among=(7, 1, 2))]
    logp_MV = logits_MV.log_softmax(-1)

    def among(row: int, target: int, ids: list[int]) -> Tensor:
        return -logits_MV[row, ids].log_softmax(-1)[ids.index(target)]

    want = [among(0, 3, [3, 5]), -logp_MV[1, 4], -logp_MV[2, 2], among(3, 7, [7, 1, 2]), -logp_MV[4, 9]]
    got_M = passes.losses(logits_MV, targets_M, rows)
    torch.testing.assert_close(got_M, torch.stack(want), rtol=0, atol=1e-6)
    assert abs(got_M[0].item() + logp_MV[0, 3].item()) > 0.1  # in the vocabulary it is another number
    got_M.sum().backward()
    assert logits_MV.grad is not None
    assert logits_MV.grad[0].nonzero()[:, 0].tolist() == [3, 5]  # other words are neither raised nor lowered


def test_a_baseline_s_loss_among_labels_is_that_of_adapters(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{"base.quantization": "none"})
    rows = [Row(None, [1, 5, 9, 77, 300], 1, among=(300, 8)), Row(None, [1, 44, 3], 1, among=(2, 3, 4))]
    ours = base_load.load(cfg.base, sharding="replicated", device=CPU)
    theirs = model.load(cfg.base, CPU)
    want_M = passes.target_losses(ours, rows)
    torch.testing.assert_close(model.target_losses(theirs, rows, through=theirs.model), want_M, rtol=0, atol=2e-6)
    plain_M = passes.target_losses(ours, [Row(None, row.ids, 1) for row in rows])
    assert (
        float((want_M - plain_M).abs().min()) > 1.0
    )  # negative control: a tiny vocabulary already is far from two words


def test_a_run_with_the_loss_among_labels_trains_on_less_than_the_vocabulary_s(tmp_path: Path) -> None:
    """At chance the loss is at most that of guessing among the labels, not among all words."""
    losses = {}
    for loss in ("vocabulary", "labels"):
        tiny.run_config(tmp_path, **{"name": loss, "train.loss": loss, "train.steps": 2})
        done = commands.run("train", tmp_path / "run.json", "--json")
        assert done.code == 0, done.err
        (adapter,) = json.loads(done.out)["adapters"].values()
        losses[loss] = adapter["train_loss"]
    assert losses["labels"] < 2.0 < losses["vocabulary"]


def test_labels_of_several_tokens_and_tasks_without_labels_have_no_loss_among_labels(tmp_path: Path) -> None:
    tiny.run_config(tmp_path, **{"train.loss": "labels"})
    content = json.loads((tmp_path / "run.json").read_text())
    first = next(iter(content["task"]["labels"]))
    content["task"]["labels"][first] = " a word of many tokens"
    (tmp_path / "run.json").write_text(json.dumps(content))
    done = commands.run("train", tmp_path / "run.json")
    assert done.code == 2
    assert "needs labels whose words are one token each" in done.err
    assert "' a word of many tokens'" in done.err
    tiny.run_config(tmp_path, **{"train.loss": "labels"})
    content = json.loads((tmp_path / "run.json").read_text())
    content["task"] |= {"labels": None, "metrics": ["exact_match"]}
    (tmp_path / "run.json").write_text(json.dumps(content))
    done = commands.run("train", tmp_path / "run.json")
    assert done.code == 2
    assert "no labels; leave train.loss at 'vocabulary'" in done.err
