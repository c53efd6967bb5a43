"""Adapter directories: bitwise round trip, size to the byte, and every way in which one is refused."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from peftscale.adapters import SoftPrompt, files
from peftscale.adapters import manifest as manifests
from peftscale.adapters.manifest import AdapterCard, BaseCard, TaskTemplate
from peftscale.config import TaskConfig
from peftscale.errors import AdapterError

P, H = 5, 12
DIGEST = "sha256:" + "9f" * 32
OTHER = "sha256:" + "77" * 32
TASK = TaskConfig.model_validate(
    {
        "name": "sst2",
        "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "input": "{{ text }}\nRating:",
        "target": "{{ label }}",
        "labels": {"0": " bad", "1": " good"},
        "metrics": ["accuracy"],
        "max_text_tokens": 60,
    }
)
CARD = AdapterCard(
    base=BaseCard(
        model="org/base",
        revision="e3f1",
        digest=DIGEST,
        num_layers=3,
        num_attention_heads=4,
        quantization="nf4",
        compute_dtype="bfloat16",
    ),
    task=TaskTemplate.of(TASK),
    run="run-1",
    fingerprint="f00d",
    init="labels",
    step=1200,
    metrics={"accuracy": 0.875, "loss": float("nan")},
)


def prompt(seed: int = 0) -> SoftPrompt:
    return SoftPrompt(torch.randn(P, H, generator=torch.Generator().manual_seed(seed)))


def load(directory: Path) -> SoftPrompt:
    return files.load(directory, base_digest=DIGEST, hidden_size=H)[0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    files.save(prompt(), tmp_path / "out" / "sst2", card=CARD)
    return tmp_path / "out" / "sst2"


def make_peft_only(directory: Path) -> Path:
    """The directory as PEFT would have left it: without our two files."""
    (directory / "peftscale.json").unlink()
    (directory / "README.md").unlink()
    return directory


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a file as the program that wrote it would have."""
    fields = json.loads(path.read_text()) | changes
    path.write_bytes(manifests.sealed(fields) if path.name == manifests.MANIFEST_FILE else json.dumps(fields).encode())


def test_loading_gives_bitwise_the_rows_that_were_saved(saved: Path) -> None:
    adapter, info = files.load(saved, base_digest=DIGEST, hidden_size=H)
    assert torch.equal(adapter.rows_PH, prompt().rows_PH)
    assert adapter.rows_PH.requires_grad
    assert info.base_is_verified
    assert info.manifest is not None and info.manifest.task == CARD.task


def test_a_directory_holds_these_four_files_and_nothing_is_left_beside_it(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "peftscale.json",
    ]
    assert os.listdir(saved.parent) == ["sst2"]


@pytest.mark.parametrize(("length", "hidden_size"), [(1, 1), (5, 64), (20, 256), (99, 1000), (100, 4096)])
def test_the_size_of_the_file_is_the_arithmetic_to_the_byte(tmp_path: Path, length: int, hidden_size: int) -> None:
    num_bytes = files.save(SoftPrompt(torch.zeros(length, hidden_size)), tmp_path / "a", card=CARD)
    assert num_bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert num_bytes == files.expected_bytes(length, hidden_size)
    assert 0 < num_bytes - length * hidden_size * 4 <= 8 + 128


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    files.save(prompt(), tmp_path / "again", card=CARD)
    for name in os.listdir(saved):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_an_adapter_that_was_loaded_is_saved_again_with_its_manifest_as_the_card(saved: Path, tmp_path: Path) -> None:
    adapter, info = files.load(saved, base_digest=DIGEST, hidden_size=H)
    assert info.manifest is not None
    files.save(adapter, tmp_path / "copy", card=info.manifest)
    assert files.describe(tmp_path / "copy") == files.describe(saved)


def test_another_base_is_refused_with_both_digests(saved: Path) -> None:
    with pytest.raises(AdapterError, match=f"was trained on base {DIGEST}, this base is {OTHER}") as caught:
        files.load(saved, base_digest=OTHER, hidden_size=H)
    assert "revision 'e3f1'" in str(caught.value) and str(saved) in str(caught.value)


def test_another_hidden_size_is_refused_when_nothing_names_the_base(saved: Path) -> None:
    with pytest.raises(AdapterError, match=rf"rows of {H} numbers, this base has a hidden size of 13"):
        files.load(make_peft_only(saved), base_digest=DIGEST, hidden_size=13)


def test_a_peft_directory_is_used_but_its_base_is_not_verified(saved: Path) -> None:
    adapter, info = files.load(make_peft_only(saved), base_digest=OTHER, hidden_size=H)
    assert torch.equal(adapter.rows_PH, prompt().rows_PH)
    assert not info.base_is_verified
    assert files.verify(saved) is None
    assert files.describe(saved).base_digest is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_refused_by_name_with_both_hashes(saved: Path, name: str, damage: str) -> None:
    content = bytearray((saved / name).read_bytes())
    if damage == "cut":
        content = content[:-1]
    else:
        content[-3] ^= 1  # of the rows: still a valid file of finite numbers
    (saved / name).write_bytes(content)
    with pytest.raises(
        AdapterError, match=rf"{name}: cut or altered\. .* says sha256:\w{{64}}, .* give sha256:\w{{64}}"
    ):
        load(saved)


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 60, 135, 136, -1])
def test_a_cut_file_of_peft_is_refused(saved: Path, num_bytes: int) -> None:
    weights = make_peft_only(saved) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: not a whole safetensors file"):
        load(saved)


def test_no_flipped_byte_of_the_header_raises_anything_but_an_adapter_error(saved: Path) -> None:
    weights = make_peft_only(saved) / "adapter_model.safetensors"
    content, refused = weights.read_bytes(), 0
    for position in range(len(content) - P * H * 4):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 7
        weights.write_bytes(damaged)
        try:
            load(saved)
        except AdapterError:
            refused += 1
    assert refused > 80  # the rest is padding and the value of the metadata


def test_a_changed_model_card_is_reported_by_verify_and_does_not_stop_a_load(saved: Path) -> None:
    (saved / "README.md").write_text("my own card\n")
    assert torch.equal(load(saved).rows_PH, prompt().rows_PH)
    with pytest.raises(AdapterError, match=r"README\.md: cut or altered"):
        files.verify(saved)


def test_a_pickle_is_refused_by_name_and_never_opened(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (make_peft_only(saved) / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        load(saved)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_renamed_to_safetensors_is_refused(saved: Path) -> None:
    (make_peft_only(saved) / "adapter_model.safetensors").write_bytes(pickle.dumps({"prompt_embeddings": [1.0]}))
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_neither_loaded_nor_saved(saved: Path, value: float) -> None:
    rows_PH = prompt().rows_PH.detach().clone()
    rows_PH[3, 7] = value
    with pytest.raises(AdapterError, match="not saved: its rows hold values that are not finite"):
        files.save(SoftPrompt(rows_PH), saved, card=CARD)
    assert torch.equal(load(saved).rows_PH, prompt().rows_PH)
    safetensors.torch.save_file({"prompt_embeddings": rows_PH}, make_peft_only(saved) / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"1 of {P} rows hold values that are not finite"):
        load(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": torch.zeros(P + 1, H)}, f"has {P + 1} rows, but adapter_config.json says"),
        ({"prompt_embeddings": torch.zeros(P, H + 1)}, f"rows of {H + 1}, but adapter_config.json says token_dim={H}"),
        ({"prompt_embeddings": torch.zeros(P * H)}, "must be a matrix of floats"),
        ({"prompt_embeddings": torch.zeros(P, H, dtype=torch.int32)}, "must be a matrix of floats, got torch.int32"),
        ({"lora_A": torch.zeros(P, H)}, "expected the one tensor 'prompt_embeddings', got ['lora_A']"),
        ({"prompt_embeddings": torch.zeros(P, H), "lm_head": torch.zeros(2)}, "expected the one tensor"),
    ],
)
def test_a_tensor_that_the_config_does_not_describe_is_refused(
    saved: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    safetensors.torch.save_file(tensors, make_peft_only(saved) / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        load(saved)
    assert message in str(caught.value)


def test_the_doubled_rows_of_an_encoder_decoder_file_are_cut_to_those_that_peft_reads(saved: Path) -> None:
    doubled = torch.randn(2 * P, H)
    safetensors.torch.save_file({"prompt_embeddings": doubled}, make_peft_only(saved) / "adapter_model.safetensors")
    edit_json(saved / "adapter_config.json", num_transformer_submodules=2)
    assert torch.equal(load(saved).rows_PH, doubled[:P])


def test_half_precision_rows_of_peft_become_float32_exactly(saved: Path) -> None:
    rows_PH = torch.randn(P, H).bfloat16()
    safetensors.torch.save_file({"prompt_embeddings": rows_PH}, make_peft_only(saved) / "adapter_model.safetensors")
    assert torch.equal(load(saved).rows_PH, rows_PH.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; only 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens must be an integer >= 1, got '5'"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be an integer >= 1, got True"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer >= 1, got 0"),
        ({"token_dim": -1}, "token_dim must be an integer >= 1, got -1"),
    ],
)
def test_a_config_that_is_no_soft_prompt_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    edit_json(make_peft_only(saved) / "adapter_config.json", **changes)
    with pytest.raises(AdapterError) as caught:
        load(saved)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=repr)
@pytest.mark.parametrize("name", ["adapter_config.json", "peftscale.json"])
def test_a_file_that_is_no_json_object_is_refused_by_name(saved: Path, name: str, content: bytes) -> None:
    if name == "adapter_config.json":
        make_peft_only(saved)
    (saved / name).write_bytes(content)
    with pytest.raises(AdapterError, match=rf"{name}: (not JSON|expected a JSON object)"):
        load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2; peftscale"),
        ({"files": {}}, "files: no digest of adapter_config.json, adapter_model.safetensors"),
        ({"files": {"../../etc/passwd": DIGEST}}, "../../etc/passwd"),
        ({"length": P + 1}, f"says length {P + 1} and hidden_size {H}, but the rows are [{P}, {H}]"),
        ({"kind": "lora", "step": "many"}, "2 problem(s)"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    edit_json(saved / "peftscale.json", **changes)
    with pytest.raises(AdapterError) as caught:
        load(saved)
    assert message in str(caught.value) and "peftscale.json" in str(caught.value)


def test_a_manifest_that_was_edited_is_refused(saved: Path) -> None:
    path = saved / "peftscale.json"
    path.write_text(path.read_text().replace("Rating:", "Verdict:"))
    with pytest.raises(
        AdapterError, match=r"peftscale\.json: altered\. By its digest its keys gave 'sha256:\w{64}', now"
    ):
        load(saved)


def test_a_key_of_a_later_minor_version_is_passed_over(saved: Path) -> None:
    edit_json(saved / "peftscale.json", mood="cheerful")
    assert files.verify(saved) is not None


def test_a_place_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"adapter {tmp_path / 'none'}: does not exist"):
        load(tmp_path / "none")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: No such file"):
        load(tmp_path)


def test_describe_tells_what_inspect_shows(saved: Path) -> None:
    shown = files.describe(saved)
    norms_P = prompt().rows_PH.detach().norm(dim=1)
    assert (shown.kind, shown.length, shown.hidden_size) == ("prompt", P, H)
    assert shown.num_file_bytes == files.expected_bytes(P, H)
    assert shown.row_norm_mean == pytest.approx(norms_P.mean().item())
    assert shown.row_norm_std == pytest.approx(norms_P.std(correction=0).item())
    assert (shown.base_model, shown.base_digest, shown.step) == ("org/base", DIGEST, 1200)
    assert shown.metrics == {"accuracy": 0.875, "loss": None}
    assert shown.task is not None and shown.task.labels == {"0": " bad", "1": " good"}
    json.loads(shown.model_dump_json())


def test_the_model_card_names_the_base_the_task_and_the_result(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    assert text.startswith('---\nbase_model: "org/base"\n')
    for part in (DIGEST, "{{ text }}", "' good'", "| accuracy | 0.8750 |", "step 1200", "nf4"):
        assert part in text


def fail_with_a_full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_adapter_valid_and_nothing_beside_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail_with_a_full_disk)
        with pytest.raises(AdapterError, match=r"is not saved: No space left on device .* needs [\d,]+ free bytes"):
            files.save(prompt(seed=1), saved, card=CARD)
    assert files.verify(saved) is not None
    assert torch.equal(load(saved).rows_PH, prompt().rows_PH)
    assert os.listdir(saved.parent) == ["sst2"]
    files.save(prompt(seed=1), saved, card=CARD)  # and once there is room again, it is replaced
    assert torch.equal(load(saved).rows_PH, prompt(seed=1).rows_PH)
    assert os.listdir(saved.parent) == ["sst2"]


def test_a_failing_second_rename_puts_the_old_adapter_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            fail_with_a_full_disk()
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(AdapterError, match="No space left"):
        files.save(prompt(seed=1), saved, card=CARD)
    assert torch.equal(load(saved).rows_PH, prompt().rows_PH)
    assert os.listdir(saved.parent) == ["sst2"]


def test_a_kill_between_the_two_renames_leaves_the_old_adapter_readable(saved: Path) -> None:
    saved.rename(saved.with_name(".sst2.previous"))
    (saved.with_name(".sst2.partial")).mkdir()
    assert torch.equal(load(saved).rows_PH, prompt().rows_PH)
    assert files.verify(saved) is not None
    files.save(prompt(seed=1), saved, card=CARD)
    assert torch.equal(load(saved).rows_PH, prompt(seed=1).rows_PH)
    assert os.listdir(saved.parent) == ["sst2"]


def test_a_directory_that_is_no_adapter_is_never_replaced(tmp_path: Path) -> None:
    thesis = tmp_path / "work" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years")
    for place in (thesis.parent, thesis):
        with pytest.raises(AdapterError, match="something that is no adapter stands there"):
            files.save(prompt(), place, card=CARD)
    assert thesis.read_text() == "years"
    shutil.rmtree(thesis.parent)
    files.save(prompt(), thesis.parent, card=CARD)
