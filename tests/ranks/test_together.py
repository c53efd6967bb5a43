"""What one rank finds wrong alone is raised on every rank, with its text; nobody waits for a rank that left."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from torch import Tensor

from peftscale.base import attention, load
from peftscale.config import RunConfig
from peftscale.errors import ClusterError, ModelError
from peftscale.train import comm, setup

pytestmark = pytest.mark.ranks


def _one_rank_fails() -> tuple[str, str]:
    def local() -> int:
        if comm.rank() == 1:
            raise ModelError("no such file here")
        return 7

    try:
        return "value", str(comm.together(local))
    except ModelError as error:
        return "ModelError", str(error)


def _packed_attention_fails_on_one_rank(cfg: RunConfig) -> tuple[str | None, bool]:
    base = load.load(cfg.base, sharding="world", device=torch.device("cpu"))

    def fails(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if module.layer_idx == 2:  # the small copy has two layers
            raise RuntimeError("no kernel")
        return attention.packed_attention(module, *args, **kwargs)

    if comm.rank() == 1:
        attention.AttentionInterface._global_mapping[attention.NAME] = fails
    return setup.pack_where_exact(base), base.is_packed


def test_a_packed_check_that_fails_on_one_rank_means_padded_passes_on_all(tmp_path: Path) -> None:
    deep = tiny.save_base(tmp_path / "base", {**tiny.LLAMA, "num_hidden_layers": 4})  # gathers follow the failure
    results = run_ranks(_packed_attention_fails_on_one_rank, 2, tmp_path / "a", tiny.run_config(tmp_path, base=deep))
    assert results == [("passes are padded: the packed pass fails (RuntimeError: no kernel)", False)] * 2


def _none_fails() -> int:
    return comm.together(lambda: comm.rank() * 2)


def test_an_error_on_one_rank_is_raised_on_all_and_says_where(tmp_path: Path) -> None:
    results = run_ranks(_one_rank_fails, 3, tmp_path / "a")
    assert results == [
        ("ModelError", "rank 1: no such file here"),
        ("ModelError", "no such file here"),
        ("ModelError", "rank 1: no such file here"),
    ]
    assert run_ranks(_none_fails, 2, tmp_path / "b") == [0, 2]


def _base_that_one_rank_cannot_read(cfg: RunConfig) -> str:
    if comm.rank() == 1:
        cfg = cfg.model_copy(update={"base": cfg.base.model_copy(update={"pack_dir": Path("/nowhere/at/all")})})
    device = setup.pick_device(cfg)
    try:
        setup.load_base(cfg.base, setup.make_plan(cfg, device), device)
    except ModelError as error:
        return str(error)
    return "loaded"


def test_a_pack_that_is_missing_on_one_node_ends_the_run_on_all(tmp_path: Path) -> None:
    results = run_ranks(_base_that_one_rank_cannot_read, 2, tmp_path / "ranks", tiny.run_config(tmp_path))
    assert all("/nowhere/at/all has no readable manifest.json" in text for text in results)


def test_a_run_that_asks_for_gpus_is_not_trained_on_the_cpu(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{"cluster.gpus_per_worker": 1})
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ClusterError, match=r"cluster.gpus_per_worker=1, but this process sees no CUDA device"):
        setup.pick_device(cfg)
