"""Packs: the digest names the original weights, a pack is made once, and a wrong or damaged one is refused."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftscale.base import pack, skeleton
from peftscale.base.pack import PackedBase
from peftscale.errors import ModelError

_CONFIG = {**tiny.LLAMA, "vocab_size": 97, "num_hidden_layers": 2}


def _skeleton(model_dir: Path, quantization: Any = "nf4", dtype: torch.dtype = torch.float32) -> skeleton.Skeleton:
    config = skeleton.read_config(model_dir)
    return skeleton.build(config, quantization=quantization, compute_dtype=dtype, where=str(model_dir))


def _pack(model_dir: Path, out: Path, quantization: Any = "nf4", dtype: torch.dtype = torch.float32) -> PackedBase:
    pack.write(
        _skeleton(model_dir, quantization, dtype),
        pack.SafetensorsSource(model_dir),
        out,
        quantization=quantization,
        config_sha256=pack.config_sha256(model_dir),
    )
    return PackedBase(out)


def _change(model_dir: Path, name: str, delta: float) -> None:
    """Add `delta` to the last number of one tensor."""
    weights = load_file(model_dir / "model.safetensors")
    weights[name].view(-1)[-1] += delta
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


def test_the_digest_does_not_depend_on_quantisation_compute_dtype_or_number_of_files(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "one", _CONFIG)
    parts = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(parts, max_shard_size="60KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    digests = {
        _pack(model_dir, tmp_path / "nf4", "nf4").digest,
        _pack(model_dir, tmp_path / "int8", "int8").digest,
        _pack(model_dir, tmp_path / "none", "none").digest,
        _pack(model_dir, tmp_path / "bf16", "nf4", torch.bfloat16).digest,
        _pack(parts, tmp_path / "from parts").digest,
    }
    assert len(digests) == 1
    assert (tmp_path / "nf4" / pack.WEIGHTS).read_bytes() == (tmp_path / "from parts" / pack.WEIGHTS).read_bytes()
    assert (tmp_path / "nf4" / pack.WEIGHTS).read_bytes() != (tmp_path / "bf16" / pack.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
)
def test_the_digest_changes_with_one_number_of_one_weight(tmp_path: Path, name: str) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    before = _pack(model_dir, tmp_path / "before").digest
    _change(model_dir, name, 1e-6)  # too small for any NF4 value to move
    assert _pack(model_dir, tmp_path / "after").digest != before


def test_the_digest_tells_a_cast_weight_from_its_original(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    cast = tiny.save_base(tmp_path / "cast", _CONFIG)
    weights = load_file(cast / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()}, cast / "model.safetensors", {"format": "pt"}
    )
    assert _pack(model_dir, tmp_path / "a").digest != _pack(cast, tmp_path / "b").digest


def test_a_pack_without_quantisation_holds_the_original_bytes(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    _pack(model_dir, tmp_path / "pack", "none")
    original, packed = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "pack" / pack.WEIGHTS)
    assert set(original) == set(packed)
    assert all(torch.equal(original[name], packed[name]) for name in original)


def test_a_checkpoint_of_the_model_without_its_head_s_prefix_is_packed_alike(tmp_path: Path) -> None:
    gpt2 = {**tiny.GPT2, "vocab_size": 97}
    model_dir, bare = tiny.save_base(tmp_path / "base", gpt2), tiny.save_base(tmp_path / "bare", gpt2)
    weights = load_file(bare / "model.safetensors")
    shorter = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert set(shorter) != set(weights)
    save_file(shorter, bare / "model.safetensors", metadata={"format": "pt"})
    assert _pack(model_dir, tmp_path / "a").digest == _pack(bare, tmp_path / "b").digest


def _ask_at_once(model_dir: Path, cache: Path, together: Barrier) -> None:
    """One process that wants the pack, twice; a line in `cache`/packed for every time that it packs."""
    os.environ["PEFTSCALE_CACHE"] = str(cache)
    really = pack.write

    def counted(*args: Any, **kwargs: Any) -> str:
        with (cache / "packed").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return really(*args, **kwargs)

    pack.write = counted
    built = _skeleton(model_dir)
    for _ in range(2):
        together.wait(60)
        pack.ensure(model_dir, built, quantization="nf4", compute_dtype=torch.float32)


def test_two_processes_that_ask_at_once_pack_once_and_later_ones_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir, cache = tiny.save_base(tmp_path / "base", _CONFIG), tmp_path / "cache"
    cache.mkdir()
    multiprocessing.set_forkserver_preload(["peftscale.train.worker", "peftscale.base.shard"])  # as the ranks' harness
    context = multiprocessing.get_context("forkserver")
    together = context.Barrier(2)
    processes = [context.Process(target=_ask_at_once, args=(model_dir, cache, together)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((cache / "packed").read_text().splitlines()) == 1
    monkeypatch.setenv("PEFTSCALE_CACHE", str(cache))
    directory = pack.ensure(model_dir, _skeleton(model_dir), quantization="nf4", compute_dtype=torch.float32)
    made = (directory / pack.MANIFEST).stat()
    assert [path.name for path in pack.cache_dir().iterdir() if path.is_dir()] == [directory.name]
    assert pack.ensure(model_dir, _skeleton(model_dir), quantization="nf4", compute_dtype=torch.float32) == directory
    assert (directory / pack.MANIFEST).stat().st_mtime_ns == made.st_mtime_ns


def _die_in_the_middle(model_dir: Path, cache: Path, together: Barrier) -> None:
    """One process that is killed while it packs, when the other one waits for it."""
    os.environ["PEFTSCALE_CACHE"] = str(cache)
    really, reads = pack.SafetensorsSource.read, []

    def read(self: pack.SafetensorsSource, name: str) -> Tensor:
        reads.append(name)
        if len(reads) == 7:
            together.wait(60)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return really(self, name)

    pack.SafetensorsSource.read = read  # type: ignore[method-assign]
    pack.ensure(model_dir, _skeleton(model_dir), quantization="nf4", compute_dtype=torch.float32)


def _wait_and_load(model_dir: Path, cache: Path, together: Barrier) -> None:
    os.environ["PEFTSCALE_CACHE"] = str(cache)
    built = _skeleton(model_dir)
    together.wait(60)
    directory = pack.ensure(model_dir, built, quantization="nf4", compute_dtype=torch.float32)
    PackedBase(directory).check(built, "nf4", pack.config_sha256(model_dir))


def _unlocked(model_dir: Path, cache: Path, together: Barrier) -> None:
    """On a file system whose locks other machines do not see: both pack, and both are done at the same moment."""
    os.environ["PEFTSCALE_CACHE"] = str(cache)
    pack.FileLock = contextlib.nullcontext  # type: ignore[misc,assignment]
    put = pack._put

    def put_together(temporary: Path, directory: Path) -> None:
        together.wait(60)
        put(temporary, directory)

    pack._put = put_together
    built = _skeleton(model_dir)
    directory = cache / "packs" / "same"
    pack.write(built, pack.SafetensorsSource(model_dir), directory, quantization="nf4", config_sha256="x")
    PackedBase(directory).check(built, "nf4", "x")


@pytest.mark.parametrize(
    ("works", "codes"),
    [((_die_in_the_middle, _wait_and_load), [-signal.SIGKILL, 0]), ((_unlocked, _unlocked), [0, 0])],
    ids=["a packer is killed", "locks are not seen"],
)
def test_two_processes_leave_one_whole_pack_whatever_happens_to_one_of_them(
    tmp_path: Path, works: tuple[Any, Any], codes: list[int]
) -> None:
    model_dir, cache = tiny.save_base(tmp_path / "base", _CONFIG), tmp_path / "cache"
    cache.mkdir()
    multiprocessing.set_forkserver_preload(["peftscale.train.worker", "peftscale.base.shard"])
    context = multiprocessing.get_context("forkserver")
    together = context.Barrier(2)
    processes = [context.Process(target=work, args=(model_dir, cache, together)) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == codes
    (made,) = [path for path in (cache / "packs").iterdir() if path.is_dir() and not path.name.startswith(".")]
    alone = _pack(model_dir, tmp_path / "alone")
    assert (made / pack.WEIGHTS).read_bytes() == (tmp_path / "alone" / pack.WEIGHTS).read_bytes()
    assert PackedBase(made).digest == alone.digest


def test_what_stands_in_the_place_of_a_pack_and_what_killed_packers_left_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTSCALE_CACHE", str(tmp_path / "cache"))
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    directory = pack.cached(model_dir, quantization="nf4", compute_dtype=torch.float32)
    old, at_work = (directory.with_name(f".{directory.name}-{end}") for end in ("old", "at-work"))
    for left in (directory, old, at_work):
        left.mkdir(parents=True)
        (left / pack.WEIGHTS).write_bytes(b"half")
    for path in (old / pack.WEIGHTS, old):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert pack.ensure(model_dir, _skeleton(model_dir), quantization="nf4", compute_dtype=torch.float32) == directory
    assert PackedBase(directory).digest == _pack(model_dir, tmp_path / "alone").digest
    assert {path.name for path in pack.cache_dir().iterdir() if path.is_dir()} == {directory.name, at_work.name}


def test_changed_weights_another_quantisation_and_another_dtype_get_packs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTSCALE_CACHE", str(tmp_path / "cache"))
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)

    def ensured(quantization: Any, dtype: torch.dtype) -> Path:
        built = _skeleton(model_dir, quantization, dtype)
        return pack.ensure(model_dir, built, quantization=quantization, compute_dtype=dtype)

    first = ensured("nf4", torch.float32)
    others = {ensured("int8", torch.float32), ensured("nf4", torch.bfloat16)}
    _change(model_dir, "model.norm.weight", 0.5)
    others.add(ensured("nf4", torch.float32))
    assert len(others | {first}) == 4
    assert len({PackedBase(directory).digest for directory in others | {first}}) == 2


def test_a_pack_of_another_model_quantisation_or_dtype_is_refused(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    packed, sha256 = _pack(model_dir, tmp_path / "pack"), pack.config_sha256(model_dir)
    packed.check(_skeleton(model_dir), "nf4", sha256)
    with pytest.raises(ModelError, match=r"pack was packed with quantization=nf4, the run file asks for int8\. Pack"):
        packed.check(_skeleton(model_dir, "int8"), "int8", sha256)
    with pytest.raises(
        ModelError, match=r"embed_tokens.weight as \('F32', .*BF16.*base.compute_dtype may have changed"
    ):
        packed.check(_skeleton(model_dir, dtype=torch.bfloat16), "nf4", sha256)
    other = tiny.save_base(tmp_path / "other", {**_CONFIG, "rms_norm_eps": 1e-3})  # every tensor has the same shape
    with pytest.raises(ModelError, match=rf"packed with config_sha256={sha256}, the run file asks for "):
        packed.check(_skeleton(other), "nf4", pack.config_sha256(other))


def test_a_pack_that_is_cut_incomplete_or_of_another_version_is_refused(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    packed = _pack(model_dir, tmp_path / "pack")
    weights, manifest = tmp_path / "pack" / pack.WEIGHTS, tmp_path / "pack" / pack.MANIFEST
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(
        ModelError, match=rf"{pack.WEIGHTS}: is cut: {len(whole) - 1} bytes, its header names {len(whole)}"
    ):
        PackedBase(tmp_path / "pack")
    last = max(packed._extents, key=lambda name: packed._extents[name].end)  # cut behind an open reader's back
    extent = packed._extents[last]
    with pytest.raises(ModelError, match=rf"ended inside {last}"):
        packed.read_into(last, 0, memoryview(bytearray(extent.end - extent.begin)))
    weights.write_bytes(whole)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(ModelError, match=r"has format 99, this version reads 1"):
        PackedBase(tmp_path / "pack")
    manifest.unlink()
    with pytest.raises(ModelError, match=r"has no readable manifest.json .*Make it with `peftscale pack`"):
        PackedBase(tmp_path / "pack")


def test_a_slice_past_the_end_of_a_tensor_is_padded_with_zeros(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    packed = _pack(model_dir, tmp_path / "pack", "none")
    want = load_file(model_dir / "model.safetensors")["model.norm.weight"]  # 64 numbers over 3 ranks of 22
    pieces = torch.full((3, 22), 7.0)
    for rank in range(3):
        packed.read_into("model.norm.weight", rank * 22 * 4, memoryview(pieces[rank].view(torch.uint8).numpy()))
    assert torch.equal(pieces.view(-1)[:64], want)
    assert pieces.view(-1)[64:].tolist() == [0.0, 0.0]


def test_weights_that_do_not_fit_the_config_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)
    weights = load_file(model_dir / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def packed_with(changed: dict[str, Tensor]) -> None:
        save_file(changed, model_dir / "model.safetensors", metadata={"format": "pt"})
        _pack(model_dir, tmp_path / "packs" / "one")

    with pytest.raises(ModelError, match=rf"have no tensor {name} of shape \(64, 112\); they hold 20 tensors"):
        packed_with({other: tensor for other, tensor in weights.items() if other != name})
    with pytest.raises(ModelError, match=rf"{name} has shape \(64, 111\), its config.json asks for \(64, 112\)"):
        packed_with({**weights, name: weights[name][:, :111].contiguous()})
    assert not (tmp_path / "packs").exists()


def test_packing_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    model_dir = tiny.save_base(tmp_path / "base", _CONFIG)

    class Interrupted(pack.SafetensorsSource):
        """Ends in the middle, as a full disk or Ctrl-C would."""

        def shapes(self) -> Mapping[str, tuple[int, ...]]:
            self.left = 7
            return super().shapes()

        def read(self, name: str) -> Tensor:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().read(name)

    with pytest.raises(KeyboardInterrupt):
        pack.write(
            _skeleton(model_dir),
            Interrupted(model_dir),
            tmp_path / "packs" / "one",
            quantization="nf4",
            config_sha256="",
        )
    assert list((tmp_path / "packs").iterdir()) == []
