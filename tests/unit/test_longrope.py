"""A base whose frequencies follow the longest text of a pass takes none that would change another's results."""

from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor

from peftscale import driver, facts
from peftscale.base import exactness, load, packed, padded
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.errors import DataError

SHORT = 40
"""Positions of the frequencies for short texts."""
_FACTORS = {"short_factor": [1.0 + n for n in range(8)], "long_factor": [3.0 + n for n in range(8)]}
PHI3 = {
    **tiny.LLAMA,
    "model_type": "phi3",
    "original_max_position_embeddings": SHORT,
    "rope_scaling": {"type": "longrope", **_FACTORS},
}
DYNAMIC = {**tiny.LLAMA, "max_position_embeddings": SHORT, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
"""Beyond its positions only, where no text gets."""


def _base(tmp_path: Path, config: dict[str, Any]) -> Base:
    directory = tiny.save_base(tmp_path / "base", config)
    cfg = tiny.run_config(tmp_path, base=directory, **{"base.quantization": "none"}).base
    return load.load(cfg, sharding="replicated", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "longrope", **_FACTORS}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS}},
    ],
    ids=["as models have it", "as transformers 5 writes it"],
)
def test_positions_are_those_of_short_texts_however_the_config_says_it(tmp_path: Path, scaling: dict[str, Any]) -> None:
    base = _base(tmp_path, {**PHI3, **scaling})
    assert base.max_positions == SHORT
    assert facts.load(tmp_path / "base").max_positions == SHORT
    plain = tiny.save_base(tmp_path / "plain", {**PHI3, "rope_scaling": None})
    assert facts.load(plain).max_positions == tiny.LLAMA["max_position_embeddings"]


def _logits(base: Base, rows: list[Row], *, is_packed: bool) -> Tensor:
    if is_packed:
        exactness.make_packed(base)
    with torch.no_grad():
        found_MV = (packed if is_packed else padded).target_logits(base, rows)
    return found_MV[: rows[0].num_targets]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("config", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_what_stands_beside_a_row_changes_it_only_where_it_would_be_refused(
    tmp_path: Path, config: dict[str, Any], is_packed: bool
) -> None:
    base = _base(tmp_path, config)
    assert base.max_positions == SHORT
    torch.manual_seed(0)
    prompt_PH = torch.randn(6, base.hidden_size)
    short = Row(prompt_PH, [7, 30, 11, 5, 90, 12], 3)
    alone_MV = _logits(base, [short], is_packed=is_packed)
    errors = []
    for length in (SHORT - 6, SHORT - 5):
        beside_MV = _logits(base, [short, Row(prompt_PH, [9] * length, 1)], is_packed=is_packed)
        errors.append(float((beside_MV - alone_MV).norm() / alone_MV.norm()))
    assert errors[0] < 2e-6  # measured up to 4.1e-7
    assert errors[1] > 5e-4  # negative control: one token more; measured 0.11 and 1.9e-3


def test_a_run_is_packed_and_refuses_rows_of_more_positions(tmp_path: Path) -> None:
    directory = tiny.save_base(tmp_path / "phi3", PHI3)
    prefix = {"adapters": {"mood": {"kind": "prefix", "length": 5, "init": "random"}}, "train.steps": 1}
    assert driver.run(tiny.run_config(tmp_path, base=directory, **prefix)).packing == "packed"
    thrice = {"name": "thrice", "task.input": "{{ text }} {{ text }} {{ text }}\nVerdict:"}
    with pytest.raises(DataError, match=r"at most 35 fit \(the base's positions, with longrope those of short texts"):
        driver.run(tiny.run_config(tmp_path, base=directory, **prefix, **thrice))


def test_the_small_copy_has_as_many_factors_as_frequencies() -> None:
    """Phi-3's heads of 96 have 48 of them, those of the copy 8."""
    config = families.longrope()
    before = config.to_dict()
    assert exactness.small_copy_differs(config) is None
    assert exactness.prefix_differs(config) is None
    assert config.to_dict() == before
