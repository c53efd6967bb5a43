"""Promises 7 and 8: an adapter is the same after its files, and PEFT and we read each other's directories alike.

On bases as the package loads them; the bytes of the files themselves are tests/unit/test_adapters_files.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftscale import adapters, driver
from peftscale.adapters import SoftPrompt, files
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.base import exactness, load, padded, passes
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import training_items
from peftscale.train import step
from peftscale.train.optim import AdapterOptimizer

peft = pytest.importorskip("peft", reason="PEFT is an extra")
pytestmark = pytest.mark.ranks

P = 5
TEXTS = ("The plot falls apart after ten minutes and nobody cares.\nVerdict:", "Lovely\nVerdict:", "Dull, dull, dull")


def _load(cfg: RunConfig, sharding: Any = "replicated") -> Base:
    return load.load(cfg.base, sharding=sharding, device=torch.device("cpu"))


def _trained(cfg: RunConfig, base: Base) -> SoftPrompt:
    """The run file's adapter after two steps."""
    cohort = adapters.build(cfg, base)
    task = tasks.load(cfg.task, base.tokenizer, max_tokens=100)
    optimizers = {name: AdapterOptimizer(adapter.parameters(), cfg.train) for name, adapter in cohort.items()}
    items = training_items("mood", P, task.train)
    for number in range(2):
        step.run(base, cohort, optimizers, items, step=number, microbatch_tokens=4096)
    return cohort["mood"]


def _save(adapter: SoftPrompt, base: Base, directory: Path) -> int:
    config = base.model.config
    card = BaseCard(
        model=base.name,
        revision=None,
        digest=base.digest,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        quantization="none",
        compute_dtype="float32",
    )
    return files.save(
        adapter, directory, card=AdapterCard(base=card, run="run", fingerprint="f00d", init="vocabulary", step=2)
    )


def _ids(base: Base) -> list[list[int]]:
    return [base.tokenizer(text)["input_ids"] for text in TEXTS]


def _rows(base: Base, rows_PH: Tensor) -> list[Row]:
    """Every text behind the prompt, with logits wanted from the last virtual token to the end of the text."""
    return [Row(rows_PH, [*ids, 0], len(ids) + 1) for ids in _ids(base)]


@torch.no_grad()
def _ours(base: Base, rows_PH: Tensor) -> Tensor:
    return padded.target_logits(base, _rows(base, rows_PH))


@torch.no_grad()
def _theirs(model: Any, texts: Sequence[Sequence[int]], *, start: int) -> Tensor:
    """Logits of each text from position `start` on, one text at a time."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0, start:] for ids in texts])


def _save_and_load(cfg: RunConfig, sharding: str, directory: str) -> dict[str, Any]:
    base = _load(cfg, sharding)
    adapter = _trained(cfg, base)
    place = Path(directory) / f"{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}"
    num_bytes = _save(adapter, base, place)
    loaded, info = files.load(place, base_digest=base.digest, hidden_size=base.hidden_size)
    before = [_ours(base, adapter.rows_PH)]
    after = [_ours(base, loaded.rows_PH)]
    exactness.make_packed(base)
    with torch.no_grad():
        before.append(passes.target_logits(base, _rows(base, adapter.rows_PH)))
        after.append(passes.target_logits(base, _rows(base, loaded.rows_PH)))
        start = passes.target_logits(base, _rows(base, adapters.build(cfg, base)["mood"].rows_PH))
    return {
        "before": before,
        "after": after,
        "start": start,
        "bytes": (num_bytes, info.num_file_bytes, (place / "adapter_model.safetensors").stat().st_size),
        "is_verified": info.base_is_verified,
    }


def _assert_the_same_after_its_files(seen: dict[str, Any]) -> None:
    for before, after in zip(seen["before"], seen["after"], strict=True):
        assert torch.equal(before, after)
        assert not torch.equal(before, seen["start"])  # negative control: two steps are seen
    assert set(seen["bytes"]) == {files.expected_bytes(P, 64)}
    assert seen["is_verified"]


def test_a_saved_and_loaded_adapter_gives_bitwise_the_same_logits(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path)
    _assert_the_same_after_its_files(_save_and_load(cfg, "replicated", str(tmp_path / "one")))
    for seen in run_ranks(_save_and_load, 2, tmp_path / "ranks", cfg, "world", str(tmp_path / "two")):
        _assert_the_same_after_its_files(seen)


def test_the_file_of_a_run_has_the_bytes_of_its_rows_and_its_header(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{"train.steps": 2, "adapters.mood.length": 7})
    summary = driver.run(cfg, show=False).adapters["mood"]
    for which in ("best", "last"):
        path = Path(summary.dir).with_name(which) / "adapter_model.safetensors"
        content = path.read_bytes()
        num_header_bytes = int.from_bytes(content[:8], "little")
        assert json.loads(content[8 : 8 + num_header_bytes])["prompt_embeddings"]["shape"] == [7, 64]
        assert len(content) == 8 + num_header_bytes + 7 * 64 * 4 == files.expected_bytes(7, 64) == summary.file_bytes
        assert num_header_bytes % 8 == 0 and num_header_bytes < 200


def _bases(tmp: Path, which: str) -> tuple[RunConfig, Any]:
    """A base as we load it without quantisation, and as transformers does, both in float32."""
    directory = tiny.save_base(tmp / "base") if which == "tiny" else tiny.QUICKSTART / "base"
    cfg = tiny.run_config(tmp, base=directory, **{"base.quantization": "none"})
    return cfg, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest logit, which is 1.9 for the tiny base and 16 for the quickstart's."""
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("which", ["tiny", "quickstart"])
def test_peft_reads_our_directory_and_gives_our_logits(tmp_path: Path, which: str) -> None:
    cfg, model = _bases(tmp_path, which)
    base = _load(cfg)
    adapter = _trained(cfg, base)
    _save(adapter, base, tmp_path / "ours")
    ours_MV, texts = _ours(base, adapter.rows_PH), _ids(base)
    without_MV = _theirs(model, texts, start=0)
    with_peft = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    theirs_MV = _theirs(with_peft, texts, start=P - 1)
    assert _error(ours_MV, theirs_MV) < 2e-6  # measured 4.2e-7
    behind_MV = _theirs(with_peft, texts, start=P)
    assert _error(behind_MV, without_MV) > 1e-2  # negative control: the prompt does something


@pytest.mark.parametrize("which", ["tiny", "quickstart"])
def test_we_read_a_directory_of_peft_and_give_its_logits(tmp_path: Path, which: str) -> None:
    cfg, model = _bases(tmp_path, which)
    base = _load(cfg)
    torch.manual_seed(3)
    with_peft = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    with_peft.save_pretrained(str(tmp_path / "theirs"))
    adapter, info = files.load(tmp_path / "theirs", base_digest=base.digest, hidden_size=base.hidden_size)
    assert not info.base_is_verified
    theirs_MV = _theirs(with_peft, _ids(base), start=P - 1)
    assert _error(_ours(base, adapter.rows_PH), theirs_MV) < 2e-6  # measured 4.9e-7
    exactness.make_packed(base)
    with torch.no_grad():
        packed_MV = passes.target_logits(base, _rows(base, adapter.rows_PH))
    assert _error(packed_MV, theirs_MV) < 2e-6  # measured 5.4e-7
