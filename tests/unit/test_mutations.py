"""Randomly damaged adapters and checkpoints: what is loaded is what was saved, or our error names the file."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import commands
import mutations
import numpy as np
import pytest
import states
import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from peftscale.adapters import Prefix, SoftPrompt, files, peft_format
from peftscale.adapters.manifest import AdapterCard, BaseCard, TaskTemplate
from peftscale.base.prefixed import PrefixShape
from peftscale.config import TaskConfig
from peftscale.errors import AdapterError, CheckpointError
from peftscale.train import checkpoint

NUM_MUTATIONS = int(os.environ.get("PEFTSCALE_MUTATIONS", "200"))
P, H, SHAPE, PARTS = 5, 12, PrefixShape(2, 2, 3), PrefixShape(6, 2, 3, (2, 2, 2))
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "peftscale.json"
DIGEST = "sha256:" + "9f" * 32
TASK = TaskConfig(
    name="mood",
    files={"train": "a.jsonl", "validation": "b.jsonl"},
    input="{{ text }}",
    target="{{ label }}",
    labels={"0": " bad", "1": " good"},
    metrics=("accuracy",),
)


def _card(*, is_encoder_decoder: bool) -> AdapterCard:
    base = BaseCard(
        model="org/base",
        revision="e3f1",
        digest=DIGEST,
        num_layers=2,
        num_attention_heads=4,
        quantization="nf4",
        compute_dtype="float32",
        is_encoder_decoder=is_encoder_decoder,
    )
    task = TaskTemplate.of(TASK)
    return AdapterCard(base=base, task=task, run="r", fingerprint="f", init="random", step=7, metrics={"accuracy": 0.5})


def _values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


ADAPTERS: dict[str, tuple[SoftPrompt | Prefix, PrefixShape | None]] = {
    "prompt": (SoftPrompt(_values(P, H)), None),
    "prompt of a T5": (SoftPrompt(_values(P + 3, H), decoder_length=3), PARTS),
    "prefix": (Prefix(_values(2, 2, P, 2, 3)), SHAPE),
    "prefix of a T5": (Prefix(_values(6, 2, P, 2, 3), parts=PARTS.parts), PARTS),
}


def _load(directory: Path, shape: PrefixShape | None) -> tuple[SoftPrompt | Prefix, files.AdapterInfo]:
    adapter, info = files.load(directory, base_digest=DIGEST, hidden_size=H, prefix_shape=shape)
    assert isinstance(adapter, SoftPrompt | Prefix)
    return adapter, info


def _tried(
    directory: Path, shape: PrefixShape | None
) -> tuple[tuple[SoftPrompt | Prefix, files.AdapterInfo] | None, str]:
    """What is loaded, or None and why not."""
    try:
        return _load(directory, shape), ""
    except AdapterError as error:
        return None, str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each adapter as we save it, and below `peft` as PEFT does."""
    root = tmp_path_factory.mktemp("saved")
    for name, (adapter, shape) in ADAPTERS.items():
        files.save(adapter, root / name, card=_card(is_encoder_decoder=bool(shape and shape.parts)))
        shutil.copytree(root / name, root / "peft" / name, ignore=shutil.ignore_patterns(MANIFEST, "README.md"))
    return root


def _damage(rng: np.random.Generator, directory: Path, others: list[Path]) -> str:
    """Change one file of a directory, delete it, or put that of another directory in its place. Returns its name."""
    there = sorted(path.name for path in directory.iterdir())
    name = there[rng.integers(len(there))]
    path, kind = directory / name, rng.random()
    if kind < 0.04:
        path.unlink()
    elif kind < 0.1:
        path.write_bytes((others[rng.integers(len(others))] / name).read_bytes())
    elif kind < 0.13:
        path.write_bytes((directory / there[rng.integers(len(there))]).read_bytes())
    else:
        path.write_bytes(mutations.of(rng, name, path.read_bytes()))
    return name


def _stored_rows(content: bytes, num_rows: int) -> Tensor:
    """What a safetensors file says in plain words: numpy on the bytes that its header names."""
    size = int.from_bytes(content[:8], "little")
    (entry,) = (v for k, v in json.loads(content[8 : 8 + size]).items() if k != "__metadata__")
    begin, end = entry["data_offsets"]
    data = content[8 + size + begin : 8 + size + end]
    if entry["dtype"] == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry["dtype"]]).astype("<f4")
    return torch.from_numpy(values.reshape(entry["shape"])[:num_rows].copy())


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("is_peft", [False, True], ids=["ours", "of PEFT"])
def test_a_damaged_adapter_is_loaded_as_it_was_saved_or_refused_by_the_name_of_the_file(
    tmp_path: Path, saved: Path, name: str, is_peft: bool
) -> None:
    """A directory of PEFT has no hashes: of it whatever is loaded must be what its two files say."""
    where, (adapter, shape) = saved / "peft" if is_peft else saved, ADAPTERS[name]
    others = [where / other for other in ADAPTERS if other != name]
    rng = np.random.default_rng([is_peft, *name.encode()])
    of_saved = _load(where / name, shape)[1].manifest
    num_refused = 0
    for number in range(NUM_MUTATIONS // 8):
        directory = Path(shutil.copytree(where / name, tmp_path / f"{number}"))
        file = _damage(rng, directory, others)
        loaded, refused = _tried(directory, shape)
        if loaded is None:
            num_refused += 1
            assert str(directory) in refused
            assert file in refused or "this base" in refused  # a config of another base, with nothing to hold it to
        else:
            assert type(loaded[0]) is type(adapter)
            rows_PW = peft_format.flat(loaded[0].values)
            assert torch.equal(rows_PW, _stored_rows((directory / WEIGHTS).read_bytes(), len(rows_PW)))
            assert is_peft or torch.equal(loaded[0].values, adapter.values)
            assert loaded[1].manifest == (of_saved if (directory / MANIFEST).exists() else None)
        shown = commands.run("inspect", directory, "--json")
        assert (shown.code, bool(shown.out), bool(shown.err)) in ((0, True, False), (2, False, True)), shown
        assert "Traceback" not in shown.err
    assert NUM_MUTATIONS // 8 > num_refused > NUM_MUTATIONS // 16  # blanks, metadata and the model card harm nobody


def test_the_same_damage_gives_other_rows_or_other_exceptions_to_a_reader_that_trusts(saved: Path) -> None:
    """Negative control: the mutations are worth refusing."""
    rng, wrong, crashed = np.random.default_rng(0), 0, set()
    content = (saved / "prompt" / WEIGHTS).read_bytes()
    for _ in range(NUM_MUTATIONS):
        try:
            rows_PH = parse_safetensors(mutations.of(rng, WEIGHTS, content))["prompt_embeddings"].float()
            wrong += not torch.equal(rows_PH, ADAPTERS["prompt"][0].values)
        except Exception as error:
            crashed.add(type(error).__name__)
    assert wrong > NUM_MUTATIONS // 20 and crashed >= {"KeyError", "SafetensorError"}, (wrong, crashed)


def _everything(state: checkpoint.State) -> list[Any]:
    """All that a state is, in a form that can be compared."""
    moments = [value for optimizer in state.optimizers.values() for _, value in sorted(optimizer.state().items())]
    tensors = [*states.rows(state), *state.best_rows.values(), *moments]
    return [state.step, *map(asdict, state.progress.values()), *(tensor.tolist() for tensor in tensors)]


def test_a_damaged_checkpoint_is_taken_over_as_it_was_saved_or_passed_over_by_the_name_of_the_file(
    tmp_path: Path,
) -> None:
    good, state, as_saved = tmp_path / "good", states.make(steps=0), {}
    for step in (0, 1):
        states.move_(state, step)
        checkpoint.save_(state, good, states.IDENTITY, keep=2)
        as_saved[f"step-{step + 1}"] = _everything(state)
    rng, random_state = np.random.default_rng(2), torch.random.get_rng_state()
    taken = dict.fromkeys(as_saved, 0)
    for number in range(NUM_MUTATIONS):
        root, notes = tmp_path / f"{number}", []
        shutil.copytree(good, root)
        file = _damage(rng, root / "step-2", [root / "step-1"])
        found = checkpoint.newest(root, note=notes.append)
        assert found is not None
        torch.manual_seed(number)
        restored = states.make(steps=0)
        checkpoint.take_over_(restored, found, states.IDENTITY)
        assert _everything(restored) == as_saved[found.name]
        assert torch.equal(torch.random.get_rng_state(), random_state)
        taken[found.name] += 1
        if found.name == "step-1":
            (note,) = notes
            assert f"checkpoint {root / 'step-2'} " in note and file in note
            with pytest.raises(CheckpointError, match=file):
                checkpoint.take_over_(restored, root / "step-2", states.IDENTITY)
        shutil.rmtree(root)
    assert taken["step-1"] > NUM_MUTATIONS * 0.8  # the rest: blanks and further keys in the manifest
    assert taken["step-2"] > 0
