"""Similarity of adapters: both measures against values by hand, and a library with things that do not belong."""

import json
import math
import shutil
from pathlib import Path

import commands
import pytest
import torch

from peftscale.adapters import Prefix, SoftPrompt, files
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.analysis import similarity
from peftscale.errors import AdapterError, ConfigError

DIGEST = "sha256:" + "1" * 64


def _save(directory: Path, adapter: SoftPrompt | Prefix, *, digest: str = DIGEST) -> Path:
    base = BaseCard(
        model="base",
        revision=None,
        digest=digest,
        num_layers=3,
        num_attention_heads=4,
        quantization="nf4",
        compute_dtype="float32",
    )
    card = AdapterCard(base=base, run="run", fingerprint="f", init="random", step=1)
    files.save(adapter, directory, card=card)
    return directory


def test_both_measures_are_those_of_the_paper() -> None:
    one = torch.tensor([[3.0, 0], [0, 1]])
    other = torch.tensor([[2.0, 0], [0, 5], [0, 5]])
    means = torch.tensor([1.5, 0.5]), torch.tensor([2 / 3, 10 / 3])
    expected = float(means[0] @ means[1] / means[0].norm() / means[1].norm())
    assert math.isclose(similarity.of_mean_tokens(one, other), expected, rel_tol=1e-6)
    assert math.isclose(similarity.of_token_pairs(one, other), 3 / 6, rel_tol=1e-6)  # of six pairs three are parallel
    assert math.isclose(similarity.of_token_pairs(one, -other), -3 / 6, rel_tol=1e-6)


def test_the_order_of_virtual_tokens_changes_nothing() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(5, 4), torch.randn(3, 4)
    for measure in (similarity.of_mean_tokens, similarity.of_token_pairs):
        assert math.isclose(measure(one, other), measure(one.flip(0), other.roll(1, 0)), rel_tol=1e-5)
        assert math.isclose(measure(one, other), measure(other, one), rel_tol=1e-5)


def test_a_library_is_ranked_and_what_does_not_belong_is_passed_over_and_named(tmp_path: Path) -> None:
    rows_PH = torch.eye(4)[:3] + 0.1
    library = tmp_path / "library"
    own = _save(library / "run" / "own" / "best", SoftPrompt(rows_PH))
    near = _save(library / "run" / "near" / "best", SoftPrompt(rows_PH[[0, 1, 2, 0]] * 3))
    _save(library / "run" / "near" / "last", SoftPrompt(rows_PH))
    far = _save(library / "far", SoftPrompt(-rows_PH))
    _save(library / "elsewhere", SoftPrompt(rows_PH), digest="sha256:" + "2" * 64)
    _save(library / "narrow", SoftPrompt(rows_PH[:, :3]))
    _save(library / "deep", Prefix(torch.ones(1, 2, 3, 1, 2)))
    broken = _save(library / "broken", SoftPrompt(rows_PH)) / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    found = similarity.rank(own, library)
    assert [row["directory"] for row in found["library"]] == [str(near), str(far)]
    assert found["library"][0]["length"] == 4
    assert found["library"][1]["mean_tokens"] == pytest.approx(-1.0)
    told = "\n".join(found["notes"])
    assert len(found["notes"]) == 4
    for text in (
        "elsewhere: passed over, it belongs to another base",
        "narrow: passed over, it is a prompt of width 3, not a prompt of 4",
        "deep: passed over, it is a prefix of width 4, not a prompt of 4",
        "broken/adapter_model.safetensors: cut or altered",
    ):
        assert text in told


def test_an_adapter_of_peft_is_ranked_with_a_note(tmp_path: Path) -> None:
    own = _save(tmp_path / "own", SoftPrompt(torch.eye(3)))
    shutil.copytree(own, tmp_path / "library" / "theirs")
    (tmp_path / "library" / "theirs" / "peftscale.json").unlink()
    found = similarity.rank(own, tmp_path / "library")
    assert found["library"][0]["mean_tokens"] == pytest.approx(1.0)
    assert found["notes"] == [f"{tmp_path}/library/theirs: base not verified"]


def test_a_library_with_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    own = _save(tmp_path / "library" / "own", SoftPrompt(torch.eye(3)))
    with pytest.raises(AdapterError, match=r"library: holds no other adapter\. Name a directory with adapters of"):
        similarity.rank(own, tmp_path / "library")
    _save(tmp_path / "library" / "narrow", SoftPrompt(torch.ones(1, 2)))
    with pytest.raises(
        AdapterError, match=r"holds 1 adapter\(s\), none of which can be compared: .*narrow: passed over"
    ):
        similarity.rank(own, tmp_path / "library")


def test_a_library_that_is_not_there_is_told_from_an_empty_one(tmp_path: Path) -> None:
    own = _save(tmp_path / "own", SoftPrompt(torch.eye(3)))
    with pytest.raises(ConfigError, match=r"nowhere: no such directory\. Name one that has adapters"):
        similarity.rank(own, tmp_path / "nowhere")


def test_the_command_prints_the_ranking_once_as_a_table_and_once_as_json(tmp_path: Path) -> None:
    own = _save(tmp_path / "own", SoftPrompt(torch.eye(3)))
    near = _save(tmp_path / "library" / "near", SoftPrompt(torch.eye(3) * 2))
    done = commands.run("similar", own, tmp_path / "library", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == similarity.rank(own, tmp_path / "library")
    shown = commands.run("similar", own, tmp_path / "library")
    assert (shown.code, shown.out) == (0, "")
    assert "+1.0000" in shown.err and near.name in shown.err
