"""Code that came with a model or an adapter is never run, whatever the files beside it say."""

import json
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

from peftscale.base.load import load_tokenizer
from peftscale.errors import ModelError

CODE = """\
import pathlib
from transformers import LlamaConfig
pathlib.Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good base with code beside it that leaves a mark when it is run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tiny.save_base(tmp_path / "base")
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (directory / name).write_text(CODE.format(mark=str(tmp_path / "ran")))
    return directory


def _change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_code_would_run_if_it_were_allowed(base: Path, tmp_path: Path) -> None:
    _change(base / "config.json", model_type="own", auto_map=MODEL_CODE)
    AutoConfig.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("command", "changes", "what"),
    [
        ("train", {"model_type": "own"}, "OwnForCausalLM"),
        ("pack", {"model_type": "own", "architectures": None}, "own"),
        ("plan", {"model_type": "own", "trust_remote_code": True}, "OwnForCausalLM"),
        ("plan", {}, "OwnForCausalLM"),  # a class of its own under a type that is known
    ],
)
def test_a_base_that_needs_its_own_code_is_refused_by_name(
    base: Path, tmp_path: Path, command: str, changes: dict[str, Any], what: str
) -> None:
    _change(base / "config.json", **{"architectures": ["OwnForCausalLM"], "auto_map": MODEL_CODE, **changes})
    tiny.run_config(tmp_path, base=base)
    done = commands.run(command, tmp_path / "run.json")
    assert done.code == 2 and "Traceback" not in done.err
    assert f"base.model={base}: {what} is not in transformers, but in code that came with it" in done.err
    assert "(configuration_own.py, modeling_own.py). Such code is never run" in done.err
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_its_own_code_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    _change(base / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    with pytest.raises(
        ModelError, match=r"its tokenizer is code that came with it \(tokenization_own.py\), which is never"
    ):
        load_tokenizer(base)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AttributeError):  # it has no such class, but it was run
        AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_base_is_used_without_the_code_that_it_does_not_need_and_an_adapter_cannot_allow_any(
    base: Path, tmp_path: Path
) -> None:
    _change(base / "config.json", architectures=["LlamaForCausalLM"], auto_map=MODEL_CODE)
    tiny.run_config(tmp_path, base=base)
    assert commands.run("train", tmp_path / "run.json").code == 0
    adapter = Path(shutil.copytree(tmp_path / "runs/tiny/adapters/mood/best", tmp_path / "adapter"))
    (adapter / "peftscale.json").unlink()  # which holds the digest of every file
    (adapter / "configuration_own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    _change(
        adapter / "adapter_config.json",
        trust_remote_code=True,
        auto_map=MODEL_CODE,
        auto_mapping={"base_model_class": "OwnForCausalLM", "parent_library": "configuration_own"},
    )
    own = Path(shutil.copytree(base, tmp_path / "own"))
    _change(own / "config.json", model_type="own", architectures=["OwnForCausalLM"])

    known = commands.run("generate", tmp_path / "run.json", "--adapter", adapter, "--text", "Dull")
    assert known.code == 0, known.err
    other = commands.run("generate", tmp_path / "run.json", f"base.model={own}", "-a", adapter, "--text", "Dull")
    assert other.code == 2 and "Such code is never run" in other.err
    assert not (tmp_path / "ran").exists()
