"""`peftscale import` and `export`: T5X's .npy and PEFT's directories, bitwise both ways, and every bad source."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import tiny
import torch

from peftscale.adapters import Prefix, SoftPrompt, exchange, files
from peftscale.adapters.initialisation import random_keys_values
from peftscale.adapters.manifest import AdapterCard, BaseCard
from peftscale.base.prefixed import PrefixShape
from peftscale.errors import AdapterError

P, Q, H = 5, 3, 64
SHAPE = PrefixShape(3, 2, 16)  # of the tiny Llama
PARTS = PrefixShape(7, 4, 16, (3, 2, 2))
T5X_PROMPT = tiny.QUICKSTART.parents[2] / "shared" / "data" / "t5x_prompt" / "prompt_5x256.npy"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base that is packed, and a run file over it."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        tiny.run_config(root)
        done = commands.run("pack", root / "run.json")
        assert done.code == 0, done.err
        yield root


def rows(seed: int = 0, hidden_size: int = H) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((P, hidden_size)).astype(np.float32)


def npy(path: Path, array: np.ndarray[Any, Any]) -> Path:
    with path.open("wb") as file:  # as T5X writes: the name gets no suffix
        np.save(file, array)
    return path


def adapter_dir(directory: Path, adapter: SoftPrompt | Prefix, *, is_encoder_decoder: bool = False) -> Path:
    """A directory of ours on some base."""
    base = BaseCard(
        model="org/base",
        revision=None,
        digest="sha256:" + "ab" * 32,
        num_layers=3,
        num_attention_heads=4,
        quantization="none",
        compute_dtype="float32",
        is_encoder_decoder=is_encoder_decoder,
    )
    files.save(adapter, directory, card=AdapterCard(base=base, run="r", fingerprint="f", init="random", step=1))
    return directory


def prompt() -> SoftPrompt:
    return SoftPrompt(torch.from_numpy(rows(1)))


def prefix() -> Prefix:
    return Prefix(random_keys_values(P, SHAPE, seed=1))


def json_of(*arguments: str | Path) -> dict[str, Any]:
    done = commands.run(*arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    assert done.err == "".join(f"{note}\n" for note in found.get("notes", []))
    return found


def test_a_prompt_of_t5x_becomes_an_adapter_that_evaluate_takes_as_its_own(good: Path, tmp_path: Path) -> None:
    source = npy(tmp_path / "encoder.prompt.prompt.prompt", rows())
    found = json_of("import", good / "run.json", source, "--out", tmp_path / "a")
    assert (found["kind"], found["length"], found["hidden_size"], found["step"]) == ("prompt", P, H, 0)
    assert found["notes"] == [f"{source}: base not verified (a .npy file names none)"]
    manifest = files.verify(tmp_path / "a")
    assert manifest is not None and manifest.task is not None
    assert (manifest.init, manifest.run, manifest.task.name) == ("imported", "tiny", "reviews")
    assert manifest.base.digest == found["base_digest"]
    assert "| imported | from another program" in (tmp_path / "a" / "README.md").read_text()
    arguments = ("generate", good / "run.json", "--text", "Dull", "--adapter", tmp_path / "a")
    assert json_of(*arguments)["notes"] == []
    (tmp_path / "a" / "peftscale.json").unlink()
    assert "base not verified" in json_of(*arguments)["notes"][0]  # so the line was absent because of the manifest


@pytest.mark.parametrize("adapter", [prompt(), prefix()], ids=["prompt", "prefix"])
def test_what_is_exported_to_peft_and_imported_again_is_bitwise_the_same(
    good: Path, tmp_path: Path, adapter: SoftPrompt | Prefix
) -> None:
    adapter_dir(tmp_path / "a", adapter)
    found = json_of("export", tmp_path / "a", "--out", tmp_path / "peft")
    assert sorted(os.listdir(tmp_path / "peft")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert found["bytes"] == (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size
    found = json_of("import", good / "run.json", tmp_path / "peft", "--out", tmp_path / "b")
    assert found["notes"] == [f"{tmp_path}/peft: base not verified (no peftscale.json beside the adapter)"]
    again = files.read(tmp_path / "b").adapter
    assert type(again) is type(adapter) and torch.equal(again.values, adapter.values)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_what_is_exported_to_npy_and_imported_again_is_bitwise_the_same(good: Path, tmp_path: Path) -> None:
    adapter_dir(tmp_path / "a", prompt())
    found = json_of("export", tmp_path / "a", "--out", tmp_path / "prompts" / "a.npy", "--format", "npy")
    assert found["bytes"] == (tmp_path / "prompts" / "a.npy").stat().st_size == 128 + P * H * 4
    loaded = np.load(tmp_path / "prompts" / "a.npy")
    assert loaded.dtype == np.float32 and loaded.shape == (P, H)  # T5X's from_array wants exactly this shape
    assert os.listdir(tmp_path / "prompts") == ["a.npy"]
    json_of("import", good / "run.json", tmp_path / "prompts" / "a.npy", "--out", tmp_path / "b")
    assert torch.equal(files.read(tmp_path / "b").adapter.values, prompt().values)


@pytest.mark.skipif(not T5X_PROMPT.exists(), reason="../shared/data/t5x_prompt is not on this machine")
def test_a_real_prompt_of_t5x_goes_in_and_out_bitwise(tmp_path: Path) -> None:
    """The file is float64 and is rounded once, as JAX rounds it when T5X reads it; from there on it is exact."""
    base = tiny.save_base(tmp_path / "base", {**tiny.LLAMA, "hidden_size": 256})
    tiny.run_config(tmp_path, base=base)
    found = json_of("import", tmp_path / "run.json", T5X_PROMPT, "--out", tmp_path / "a")
    assert f"{T5X_PROMPT}: float64 is rounded to float32, as T5X does when it reads it" in found["notes"]
    json_of("export", tmp_path / "a", "--out", tmp_path / "out.npy", "--format", "npy")
    original, once = np.load(T5X_PROMPT, allow_pickle=False), np.load(tmp_path / "out.npy")
    assert once.shape == original.shape == (5, 256)
    assert np.array_equal(once, original.astype(np.float32)) and not np.array_equal(once, original)
    found = json_of("import", tmp_path / "run.json", tmp_path / "out.npy", "--out", tmp_path / "a")
    assert not any("rounded" in note for note in found["notes"])
    json_of("export", tmp_path / "a", "--out", tmp_path / "again.npy", "--format", "npy")
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "out.npy").read_bytes()


def bfloat16_of_jax() -> np.ndarray[Any, Any]:
    """numpy has no such dtype: the two bytes of each value under no name."""
    return torch.from_numpy(rows()).bfloat16().view(torch.int16).numpy().view("V2")


@pytest.mark.parametrize(
    ("array", "want", "is_rounded"),
    [
        (rows().astype(np.float16), rows().astype(np.float16), False),
        (rows().astype(np.float64), rows(), False),
        (rows().astype(np.float64) * (1 + 2**-40), rows(), True),
        (rows().astype(">f4"), rows(), False),
        (np.asfortranarray(rows()), rows(), False),
        (bfloat16_of_jax(), torch.from_numpy(rows()).bfloat16().float().numpy(), False),
    ],
    ids=["half", "double", "rounded", "big-endian", "fortran", "bfloat16"],
)
def test_every_float_that_t5x_may_save_is_read(
    tmp_path: Path, array: np.ndarray[Any, Any], want: np.ndarray[Any, Any], is_rounded: bool
) -> None:
    rows_PH, notes = exchange._npy_rows(npy(tmp_path / "p.npy", array))
    assert rows_PH.dtype == torch.float32 and np.array_equal(rows_PH.numpy(), want)
    assert bool(notes) == is_rounded


def test_a_doubled_file_of_peft_is_imported_as_the_encoder_s_with_a_line(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=H, d_kv=12, num_layers=2, num_heads=4))
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P))
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter, notes = exchange._read(tmp_path / "a", hidden_size=H, prefix_shape=PARTS)
    assert torch.equal(adapter.values, theirs.prompt_encoder["default"].embedding.weight[:P])
    assert "num_transformer_submodules=2: the first 5 rows are the encoder's" in notes[0]


@pytest.mark.parametrize(
    ("adapter", "format", "line"),
    [
        (SoftPrompt(torch.zeros(P + Q, H), decoder_length=Q), "peft", "a prompt with 3 rows for a decoder, which PEFT"),
        (SoftPrompt(torch.zeros(P + Q, H), decoder_length=Q), "npy", "a prompt with 3 rows for a decoder; a .npy file"),
        (Prefix(torch.zeros(7, 2, P, 4, 16), parts=PARTS.parts), "peft", "a prefix of encoder, decoder and cross att"),
        (Prefix(torch.zeros(7, 2, P, 4, 16), parts=PARTS.parts), "npy", "a prefix of encoder, decoder and cross att"),
        (prefix(), "npy", "a prefix; a .npy file of T5X holds a prompt of one input alone."),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, adapter: SoftPrompt | Prefix, format: str, line: str
) -> None:
    is_encoder_decoder = isinstance(adapter, SoftPrompt) or bool(adapter.parts)
    adapter_dir(tmp_path / "a", adapter, is_encoder_decoder=is_encoder_decoder)
    done = commands.run("export", tmp_path / "a", "--out", tmp_path / "out", "--format", format)
    assert (done.code, done.out) == (2, "")
    assert f"adapter {tmp_path}/a is {line}" in done.err and done.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("format", ["peft", "npy"])
def test_export_writes_over_nothing_and_leaves_nothing_where_the_disk_is_full(tmp_path: Path, format: str) -> None:
    adapter_dir(tmp_path / "a", prompt())
    before = tree(tmp_path)
    done = commands.run("export", tmp_path / "a", "--out", tmp_path / "a", "--format", format)
    assert done.code == 2 and done.err == f"--out {tmp_path}/a exists. Choose another place, or remove it.\n"
    with commands.file_size_limit(600):
        done = commands.run("export", tmp_path / "a", "--out", tmp_path / "b", "--format", format)
    assert done.code == 2
    assert done.err == (f"--out {tmp_path}/b cannot be written: File too large. Make room, or choose another place.\n")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    done = commands.run("export", tmp_path / "a", "--out", tmp_path / "b", "--format", format)
    assert done.code == 2 and "cut or altered" in done.err
    shutil.rmtree(tmp_path / "a")
    adapter_dir(tmp_path / "a", prompt())
    assert tree(tmp_path) == before


def test_import_replaces_an_adapter_and_nothing_else(good: Path, tmp_path: Path) -> None:
    source = npy(tmp_path / "p.npy", rows(2))
    adapter_dir(tmp_path / "a", prompt())
    json_of("import", good / "run.json", source, "--out", tmp_path / "a")
    assert np.array_equal(files.read(tmp_path / "a").adapter.values.detach().numpy(), rows(2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    done = commands.run("import", good / "run.json", source, "--out", tmp_path / "mine")
    assert done.code == 2 and f"{tmp_path}/mine is not saved: something that is no adapter stands there" in done.err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    json_of("export", tmp_path / "a", "--out", tmp_path / "peft")
    for out in (tmp_path / "peft", tmp_path / "peft" / ".." / "peft"):
        done = commands.run("import", good / "run.json", tmp_path / "peft", "--out", out)
        assert done.code == 2 and f"would replace {tmp_path}/peft, which is imported. Choose another" in done.err


def test_what_was_trained_on_a_t5_goes_out_where_that_is_possible_and_comes_back(tmp_path: Path) -> None:
    adapters = {
        "encoder": {"kind": "prompt", "length": P, "init": "vocabulary"},
        "both": {"kind": "prompt", "length": P, "decoder_length": Q, "init": "vocabulary"},
        "deep": {"kind": "prefix", "length": P, "init": "random"},
    }
    tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", tiny.T5), adapters=adapters)
    run_file, trained = tmp_path / "run.json", tmp_path / "runs" / "tiny" / "adapters"
    json_of_training = commands.run("train", run_file, "--json")
    assert json_of_training.code == 0, json_of_training.err
    summary = json.loads(json_of_training.out)["adapters"]
    described = {name: json_of("inspect", trained / name / "best") for name in adapters}
    assert {name: summary[name]["file_bytes"] for name in adapters} == {
        name: described[name]["num_file_bytes"] for name in adapters
    }
    assert [described[name]["decoder_length"] for name in adapters] == [0, Q, 0]
    assert described["deep"]["prefix"] == {"num_layers": 8, "num_kv_heads": 4, "head_dim": 24, "parts": [2, 3, 3]}
    for format in ("peft", "npy"):
        out = tmp_path / format
        json_of("export", trained / "encoder" / "best", "--out", out, "--format", format)
        found = json_of("import", run_file, out, "--out", tmp_path / f"from-{format}")
        assert found["base_digest"] == described["encoder"]["base_digest"]
        assert read(tmp_path / f"from-{format}") == read(trained / "encoder" / "best")
        for name in ("both", "deep"):
            assert (
                commands.run("export", trained / name / "best", "--out", tmp_path / "x", "--format", format).code == 2
            )
    arguments = [part for name in adapters for part in ("--adapter", trained / name / "best")]
    answers = json_of("generate", run_file, "--text", "Dull", *arguments, "--adapter", tmp_path / "from-peft")
    assert not any("base not verified" in note for note in answers["notes"])
    assert answers["adapters"][f"{tmp_path}/from-peft"] == answers["adapters"][str(trained / "encoder" / "best")]


def read(directory: Path) -> bytes:
    """The values of an adapter."""
    return files.read(directory).adapter.values.detach().numpy().tobytes()


class _Touch:
    """Unpickled, it makes a file: whoever opens the pickle is found out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def _objects(here: Path) -> Path:
    array = np.empty((P, H), dtype=object)
    array[:] = _Touch(here / "unpickled")
    return npy(here / "source", array)


def _pickle(here: Path) -> Path:
    (here / "source").write_bytes(pickle.dumps(_Touch(here / "unpickled")))
    return here / "source"


def _archive(here: Path) -> Path:
    content = io.BytesIO()
    np.savez(content, prompt=rows())
    (here / "source").write_bytes(content.getvalue())
    return here / "source"


def _text(here: Path) -> Path:
    (here / "source").write_text("0.1 0.2\n")
    return here / "source"


def _cut(here: Path) -> Path:
    source = npy(here / "source", rows())
    os.truncate(source, source.stat().st_size - 1)
    return source


def _too_long(here: Path) -> Path:
    source = npy(here / "source", rows())
    source.write_bytes(source.read_bytes() + b"\0")
    return source


def _far_too_long(here: Path) -> Path:
    content = npy(here / "source", rows()).read_bytes()
    (here / "source").write_bytes(content.replace(b"(5, 64), }        ", b"(9999999999, 64),}"))
    return here / "source"


def _with_nan(here: Path) -> Path:
    array = rows()
    array[3, 7] = np.nan
    return npy(here / "source", array)


def _empty_directory(here: Path) -> Path:
    (here / "source").mkdir()
    return here / "source"


def _lora(here: Path) -> Path:
    (here / "source").mkdir()
    (here / "source" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (here / "source" / "adapter_model.safetensors").write_bytes(b"")
    return here / "source"


def _of_a_t5(here: Path) -> Path:
    adapter_dir(here / "source", prompt(), is_encoder_decoder=True)
    for name in ("peftscale.json", "README.md"):
        (here / "source" / name).unlink()
    return here / "source"


SOURCES: list[tuple[str, Callable[[Path], Path], str]] = [
    ("nothing", lambda here: here / "source", "{source}: No such file or directory. Give a .npy file of T5X or"),
    ("text", _text, "{source}: not a NumPy file that can be read without running code (the magic string is not corr"),
    ("pickle", _pickle, "{source}: not a NumPy file that can be read without running code (the magic string is not"),
    ("objects", _objects, "{source}: not a NumPy file that can be read without running code (Object arrays cannot b"),
    ("archive", _archive, "{source}: not a NumPy file that can be read without running code (the magic string is no"),
    ("cut", _cut, "{source}: not a NumPy file that can be read without running code (Failed to read all da"),
    ("too long", _too_long, "{source}: not a NumPy file that can be read without running code (more bytes follow t"),
    ("far too long", _far_too_long, "{source}: not a NumPy file that can be read without running code ("),
    ("vector", lambda here: npy(here / "source", rows()[0]), "{source}: holds float32 of shape [64]. T5X keeps a pr"),
    ("batch", lambda here: npy(here / "source", rows()[None]), "{source}: holds float32 of shape [1, 5, 64]. T5X ke"),
    ("no rows", lambda here: npy(here / "source", rows()[:0]), "{source}: holds float32 of shape [0, 64]. T5X keeps"),
    ("integers", lambda here: npy(here / "source", rows().astype(int)), "{source}: holds int64 of shape [5, 64]. T5"),
    (
        "other size",
        lambda here: npy(here / "source", rows(hidden_size=H + 1)),
        "{source} has rows of 65 numbers, this base has a hidden size of 64. The adapter belongs to another base: ",
    ),
    ("NaN", _with_nan, "{source}: 1 of 5 rows hold values that are not finite (NaN or inf)."),
    (
        "too large",
        lambda here: npy(here / "source", np.full((P, H), 1e300)),
        "{source}: 5 of 5 rows hold values that are not finite (NaN or inf).",
    ),
    ("empty directory", _empty_directory, "{source}/adapter_config.json: No such file or directory. An adapter dir"),
    ("LoRA", _lora, "{source}/adapter_config.json: peft_type is 'LORA'; only 'PROMPT_TUNING' (a prompt) and 'PREF"),
    ("of a T5", _of_a_t5, "adapter {source} is a prompt, made for an encoder-decoder base; this base is a decoder-o"),
    (
        "another shape",
        lambda here: files_of_peft(here, Prefix(torch.zeros(3, 2, P, 4, 16))),
        "adapter {source} is a prefix of (3, 4, 16) (layers, key heads, head size), this base has (3, 2, 16).",
    ),
    ("ours", lambda here: adapter_dir(here / "source", prompt()), "{source} is a directory of peftscale already: use"),
]


def files_of_peft(here: Path, adapter: Prefix) -> Path:
    adapter_dir(here / "ours", adapter)
    exchange.export(here / "ours", here / "source", "peft")
    return here / "source"


def tree(root: Path) -> dict[str, str]:
    """Every path below the root, with the digest of a file's bytes."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize(("build", "line"), [case[1:] for case in SOURCES], ids=[case[0] for case in SOURCES])
def test_a_bad_source_is_refused_in_one_message_before_the_base_is_packed_and_nothing_is_written(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], Path], line: str
) -> None:
    source = build(tmp_path)
    monkeypatch.setenv("PEFTSCALE_CACHE", str(tmp_path / "cache"))  # an empty one
    before = tree(tmp_path)
    done = commands.run("import", good / "run.json", source, "--out", tmp_path / "out" / "a")
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith(f"{good}/run.json: {line.format(source=source)}")
    assert done.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_no_flipped_byte_of_a_npy_header_raises_anything_but_an_adapter_error(tmp_path: Path) -> None:
    source = npy(tmp_path / "p.npy", rows())
    content, refused = source.read_bytes(), 0
    for position in range(len(content) - P * H * 4):
        for bit in range(7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            source.write_bytes(damaged)
            try:
                exchange._npy_rows(source)
            except AdapterError:
                refused += 1
    assert refused > 400
