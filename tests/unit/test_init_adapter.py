"""A prompt or a prefix that starts from another adapter (SPoT)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from torch import Tensor

from peftscale import adapters, configio
from peftscale.adapters import Folded, Prefix, SoftPrompt, files
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.base import load, prefixed
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.errors import AdapterError, ConfigError
from peftscale.train import setup


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base on disk, and a cache of its own."""
    root = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        tiny.save_base(root / "base")
        yield root


@pytest.fixture(scope="module")
def base(here: Path) -> Base:
    """Packed, so that it takes prefixes."""
    cfg = tiny.run_config(here, **{"base.sharding": "replicated"})
    opened = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    setup.choose_packing(cfg, opened)
    return opened


def _save(directory: Path, adapter: Folded, cfg: RunConfig, digest: str, base: Base) -> Path:
    card = AdapterCard(
        base=BaseCard.of(cfg.base, digest, base.model.config), run="source", fingerprint="f", init="random", step=3
    )
    files.save(adapter, directory, card=card)
    return directory


def _config(here: Path, adapter: dict[str, Any]) -> RunConfig:
    return tiny.run_config(here, base=here / "base", **{"adapters": {"mood": adapter}, "base.sharding": "replicated"})


def _started(here: Path, base: Base, source: Folded, kind: str, length: int, **more: Any) -> Tensor:
    """The values of an adapter that starts from `source`."""
    cfg = _config(here, {"kind": "prompt", "length": 1, "init": "random"})
    directory = _save(here / f"source-{kind}", source, cfg, base.digest, base)
    cfg = _config(here, {"kind": kind, "length": length, "init": "adapter", "init_adapter": str(directory), **more})
    return adapters.build(cfg, base)["mood"].folded().values.detach()


def test_a_prompt_starts_bitwise_at_the_prompt_that_is_named(here: Path, base: Base) -> None:
    source = SoftPrompt(torch.randn(5, 64))
    assert torch.equal(_started(here, base, source, "prompt", 5), source.rows_PH)


def test_a_shorter_one_is_its_beginning_and_a_longer_one_repeats_it_from_the_first_row(here: Path, base: Base) -> None:
    source = SoftPrompt(torch.randn(3, 64))
    assert torch.equal(_started(here, base, source, "prompt", 2), source.rows_PH[:2])
    assert torch.equal(_started(here, base, source, "prompt", 7), source.rows_PH[[0, 1, 2, 0, 1, 2, 0]])


def test_a_prefix_starts_at_the_prefix_that_is_named(here: Path, base: Base) -> None:
    shape = prefixed.shape_of(base.model.config)
    values_L2PKD = torch.randn(shape.num_layers, 2, 3, shape.num_kv_heads, shape.head_dim)
    found = _started(here, base, Prefix(values_L2PKD), "prefix", 4)
    assert torch.equal(found, values_L2PKD[:, :, [0, 1, 2, 0]])


def test_the_decoder_s_rows_start_at_the_decoder_s(tmp_path: Path) -> None:
    model = tiny.save_base(tmp_path / "t5", tiny.T5)
    cfg = tiny.run_config(tmp_path, base=model, **{"base.sharding": "replicated"})
    t5 = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    rows_PH = torch.randn(5, 64)
    directory = _save(tmp_path / "source", SoftPrompt(rows_PH, decoder_length=2), cfg, t5.digest, t5)
    adapter = {"kind": "prompt", "length": 4, "init": "adapter", "init_adapter": str(directory), "decoder_length": 1}
    cfg = tiny.run_config(tmp_path, base=model, **{"base.sharding": "replicated", "adapters": {"mood": adapter}})
    found = adapters.build(cfg, t5)["mood"]
    assert isinstance(found, SoftPrompt) and found.decoder_length == 1
    assert torch.equal(found.rows_PH, rows_PH[[0, 1, 2, 0, 3]])
    del adapter["decoder_length"]
    cfg = tiny.run_config(tmp_path, base=model, **{"base.sharding": "replicated", "adapters": {"mood": adapter}})
    with pytest.raises(AdapterError, match="is a prompt with 2 rows for a decoder, and adapters.mood is a prompt"):
        adapters.build(cfg, t5)


def test_several_sources_make_an_adapter_each(here: Path, base: Base) -> None:
    cfg = _config(here, {"kind": "prompt", "length": 1, "init": "random"})
    sources = [str(_save(here / f"of-{n}", SoftPrompt(torch.randn(2, 64)), cfg, base.digest, base)) for n in range(2)]
    found = tiny.configio.load(
        here / "run.json", ["adapters.mood.init=adapter", f"adapters.mood.init_adapter=[{','.join(sources)}]"]
    )
    assert [str(adapter.init_adapter) for adapter in found.adapters.values()] == sources


def test_training_it_leaves_the_source_as_it_was(here: Path, base: Base) -> None:
    source = SoftPrompt(torch.randn(5, 64))
    _started(here, base, source, "prompt", 5).zero_()
    kept = files.read(here / "source-prompt").adapter
    assert torch.equal(kept.values, source.rows_PH)


def test_an_adapter_of_another_base_is_refused_with_both_digests(here: Path, base: Base) -> None:
    cfg = _config(here, {"kind": "prompt", "length": 1, "init": "random"})
    other = "sha256:" + "0" * 64
    directory = _save(here / "elsewhere", SoftPrompt(torch.ones(2, 64)), cfg, other, base)
    cfg = _config(here, {"kind": "prompt", "length": 2, "init": "adapter", "init_adapter": str(directory)})
    with pytest.raises(AdapterError, match=rf"adapters\.mood\.init_adapter: .*{other}, this base is {base.digest}"):
        adapters.build(cfg, base)


def test_an_adapter_of_another_kind_is_refused(here: Path, base: Base) -> None:
    with pytest.raises(
        AdapterError, match=r"adapters\.mood\.init_adapter=.* is a prompt, and adapters\.mood is a prefix"
    ):
        _started(here, base, SoftPrompt(torch.ones(2, 64)), "prefix", 2)


def test_a_file_that_was_altered_is_refused_before_a_base_is_loaded(here: Path, base: Base) -> None:
    _started(here, base, SoftPrompt(torch.randn(2, 64)), "prompt", 2)
    weights = here / "source-prompt" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    cfg = configio.load(here / "run.json")
    with pytest.raises(AdapterError, match=r"adapters\.mood\.init_adapter: .*cut or altered"):
        setup.verify_starts(cfg.adapters)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"init": "adapter"}, "init_adapter: must be given exactly when init is 'adapter'; got init='adapter' and no"),
        (
            {"init": "random", "init_adapter": "base"},
            "init_adapter: must be given exactly when init is 'adapter'; got init='random' and an init_adapter",
        ),
        (
            {"init": "adapter", "init_adapter": "base", "reparam": "residual", "reparam_hidden_size": 4},
            "adapters.mood.init: 'adapter' gives the values to start at, which the network of reparam='residual' would",
        ),
        (
            {"kind": "prefix", "init": "adapter", "init_adapter": "base", "reparam": "mlp", "reparam_hidden_size": 4},
            "adapters.mood.init: 'adapter' gives the values to start at, which the network of reparam='mlp' would",
        ),
        (
            {"init": "adapter", "init_adapter": "bse"},
            "adapters.mood.init_adapter: no such directory, got 'bse', looked",
        ),
    ],
)
def test_keys_that_do_not_belong_together_are_refused(here: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(here, {"kind": "prompt", "length": 2, **adapter})
    assert message in str(caught.value)


def test_a_path_is_taken_from_the_run_file_and_a_list_makes_a_product(here: Path) -> None:
    (here / "one").mkdir(exist_ok=True)
    (here / "two").mkdir(exist_ok=True)
    cfg = _config(here, {"kind": "prompt", "length": 2, "init": "adapter", "init_adapter": ["one", "two"]})
    found = {name: adapter.init_adapter for name, adapter in cfg.adapters.items()}
    assert found == {"mood-adapter0": here / "one", "mood-adapter1": here / "two"}
    both = _config(here, {"kind": "prompt", "length": 2, "init": ["adapter", "random"], "init_adapter": "one"})
    assert [adapter.init_adapter for adapter in both.adapters.values()] == [here / "one", None]


def test_the_fingerprint_is_that_of_another_machine_with_the_same_library(here: Path) -> None:
    prints = []
    for place in ("here/library/one", "there/library/one", "here/library/two"):
        (here / place).mkdir(parents=True, exist_ok=True)
        cfg = _config(here, {"kind": "prompt", "length": 2, "init": "adapter", "init_adapter": place})
        prints.append(configio.fingerprint(cfg))
    assert prints[0] == prints[1] != prints[2]


def test_a_run_that_starts_from_another_s_best_begins_where_that_one_ended(here: Path) -> None:
    first = {"mood": {"kind": "prompt", "length": 5, "init": "vocabulary"}}
    changes = {"base.sharding": "replicated", "train.learning_rate": 0.1, "adapters": first, "name": "first"}
    tiny.run_config(here, base=here / "base", **changes)
    assert commands.run("train", here / "run.json").code == 0
    best = here / "runs" / "first" / "adapters" / "mood" / "best"
    changes |= {
        "adapters": {"mood": {"kind": "prompt", "length": 5, "init": "adapter", "init_adapter": str(best)}},
        "name": "second",
    }
    tiny.run_config(here, base=here / "base", **changes)
    assert commands.run("train", here / "run.json").code == 0
    rows = map(json.loads, (here / "runs/second/metrics.jsonl").read_text().splitlines())
    at_start = next(row for row in rows if row.get("split") == "validation")
    kept = files.read(best)
    assert kept.manifest is not None
    assert (at_start["step"], at_start["metrics"]) == (0, kept.manifest.metrics)
    manifest = json.loads((here / "runs/second/adapters/mood/last/peftscale.json").read_text())
    assert (manifest["init"], manifest["start"]["settings"]["init_adapter"]) == ("adapter", str(best))
    assert manifest["start"]["norm"] == pytest.approx(float(kept.adapter.values.detach().norm()), rel=1e-6)
