"""The command line: what each command prints, where, and with which exit code."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from commands import Done
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftscale import records
from peftscale.base import pack
from peftscale.records import EvaluationRecord, StepRecord

peft = pytest.importorskip("peft", reason="PEFT is an extra")

COMMANDS = {
    "train",
    "plan",
    "render",
    "submit",
    "evaluate",
    "generate",
    "inspect",
    "similar",
    "transfer",
    "import",
    "export",
    "pack",
    "tasks",
    "schema",
    "status",
    "logs",
    "doctor",
}
FIGURES = {
    "reduced_bytes_per_step",
    "gathered_bytes_per_step",
    "control_bytes_per_step",
    "peak_rank_bytes",
    "gathered_between_nodes_bytes_per_step",
    "step_s",
}
SUMMARY = FIGURES | {
    "name",
    "world_size",
    "sharding",
    "packing",
    "steps",
    "seconds",
    "tokens_per_s",
    "predicted",
    "adapters",
}
ADAPTER = {"dir", "file_bytes", "trainable_parameters", "train_loss", "steps", "stopped", "before", "after"}
FREE_TEXT = ("task.labels=null", "task.metrics=[exact_match]", "task.target={{ label }}", "task.max_target_tokens=6")

_opened: list[str] = []


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run file over an unquantised base with two adapters, and its run, which ended."""
    root = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        prompts = {"mood": {"kind": "prompt", "length": 5, "init": "vocabulary"}}
        prompts["tone"] = {"kind": "prompt", "length": 3, "init": "random", "seed": 8}  # type: ignore[dict-item]
        tiny.run_config(
            root,
            **{
                "adapters": prompts,
                "base.quantization": "none",
                "task.files": {
                    split: str(root / "data" / "reviews.jsonl") for split in ("train", "validation", "test")
                },
                "train.learning_rate": 0.3,
                "track": ["tensorboard"],
            },
        )
        done = commands.run("train", root / "run.json", "--json")
        assert done.code == 0, done.err
        (root / "train.out").write_text(done.out)
        yield root


def _one_object(done: Done) -> dict[str, Any]:
    """What --json printed, which has to be one object and nothing else."""
    assert done.code == 0, done.err
    value, end = json.JSONDecoder().raw_decode(done.out)
    assert isinstance(value, dict)
    assert done.out[end:] == "\n"
    return value


def _adapter(here: Path, name: str) -> Path:
    return here / "runs" / "tiny" / "adapters" / name / "best"


def test_help_imports_nothing_heavy() -> None:
    done = commands.run_alone("--help", after="import sys; print(sorted(m for m in sys.modules if '.' not in m))")
    assert done.code == 0
    modules = set(re.findall(r"'(\w+)'", done.out.splitlines()[-1]))
    assert "typer" in modules  # the list is there
    assert not modules & {"torch", "transformers", "ray", "deepspeed", "datasets", "bitsandbytes", "pydantic", "numpy"}


def test_help_shows_the_commands_that_work_and_no_other() -> None:
    done = commands.run("--help")
    assert set(re.findall(r"^\W*([a-z]+) {2,}[A-Z]", done.out, flags=re.MULTILINE)) == COMMANDS


def test_train_prints_exactly_the_summary_of_the_contract(here: Path) -> None:
    summary = _one_object(Done(0, (here / "train.out").read_text(), ""))
    assert set(summary) == SUMMARY == set(records.RunSummary.model_fields)
    assert set(summary["predicted"]) == FIGURES
    assert {name: set(adapter) for name, adapter in summary["adapters"].items()} == {"mood": ADAPTER, "tone": ADAPTER}
    assert (summary["world_size"], summary["steps"], summary["reduced_bytes_per_step"]) == (1, 4, 0)
    mood = summary["adapters"]["mood"]
    assert mood["trainable_parameters"] == 5 * 64
    assert mood["file_bytes"] == (Path(mood["dir"]) / "adapter_model.safetensors").stat().st_size
    assert set(mood["before"]) == set(mood["after"]) == {"accuracy"}


def test_overrides_change_the_run(here: Path) -> None:
    summary = _one_object(
        commands.run(
            "train", here / "run.json", "name=shorter", "train.steps=1", "track=[]", "adapters.mood.length=4", "--json"
        )
    )
    assert (summary["name"], summary["steps"]) == ("shorter", 1)
    assert summary["adapters"]["mood"]["trainable_parameters"] == 4 * 64


def test_plan_prints_a_plan_for_every_hardware_and_says_what_would_help_where_it_does_not_fit(here: Path) -> None:
    model = f"base.model={tiny.QUICKSTART.parent / 'models' / 'llama-3.1-405b'}"
    fits = _one_object(
        commands.run("plan", here / "run.json", "--hardware", "cpu-8GB", "--hardware", "1xH100-80GB", "--json")
    )
    assert [plan["hardware"] for plan in fits["plans"]] == ["cpu-8GB", "H100-80GB"]
    done = commands.run(
        "plan", here / "run.json", model, "base.quantization=nf4", "--hardware", "1xV100-32GB", "--json"
    )
    assert done.code == 2
    assert not json.loads(done.out)["plans"][0]["fits"]
    assert re.fullmatch(
        r".*/run\.json: a rank needs 2\d\d GB and may fill 3\d\.\d GB of V100-32GB \(slice .*\)\. "
        r"Enough would be: --hardware \d+xV100-32GB with base\.sharding=world\.\n",
        done.err,
    )


def test_evaluate_prints_metrics_and_predictions_of_the_base_and_of_each_adapter(here: Path) -> None:
    found = _one_object(commands.run("evaluate", here / "run.json", "--split", "validation", "--json"))
    assert (found["split"], found["examples"], found["notes"]) == ("validation", 7, [])
    assert set(found["adapters"]) == {str(_adapter(here, name)) for name in ("mood", "tone")}
    right = [label for _, label in tiny.REVIEWS]
    for scored in found["adapters"].values():
        hits = sum(got == want for got, want in zip(scored["predictions"], right, strict=True))
        assert scored["metrics"]["accuracy"] == hits / 7


def _opens_of_the_base(*arguments: str | Path) -> tuple[dict[str, Any], int]:
    """What a command prints, and how often it opened the packed base: once for each tensor of each load."""
    _opened.clear()
    found = _one_object(commands.run(*arguments))
    return found, len(_opened)


def test_evaluate_loads_the_base_once_for_two_adapters_and_gives_what_each_gives_alone(here: Path) -> None:
    def seen(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(details[0], str | Path) and Path(details[0]).name == pack.WEIGHTS:
            _opened.append(str(details[0]))

    sys.addaudithook(seen)  # for good: python has no way to take it off
    paths = {name: _adapter(here, name) for name in ("mood", "tone")}
    both, num_both = _opens_of_the_base(
        "evaluate", here / "run.json", "-a", paths["mood"], "-a", paths["tone"], "--json"
    )
    num_alone = 0
    for path in paths.values():
        alone, num = _opens_of_the_base("evaluate", here / "run.json", "-a", path, "--json")
        assert alone["adapters"][str(path)] == both["adapters"][str(path)]
        assert alone["base"] == both["base"]
        num_alone += num
    assert num_both > 20  # llama's tensors
    assert num_alone == 2 * num_both
    mood, tone = (both["adapters"][str(path)]["predictions"] for path in paths.values())
    assert mood != tone  # else nothing could have been mixed up


def _peft_model(here: Path, directory: Path, seed: int) -> Any:
    """A prompt as real PEFT starts and saves it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(here / "base").eval()
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    model.save_pretrained(str(directory))
    return model


@torch.no_grad()
def _choice_of(model: Any, tokenizer: Any, text: str) -> str:
    """The label word that PEFT's model finds likeliest behind a review."""
    likelihoods = {}
    prompt = tokenizer(f"{text}\nVerdict:", add_special_tokens=False).input_ids
    for label in ("bad", "good"):
        whole = tokenizer(f"{text}\nVerdict: {label}", add_special_tokens=False).input_ids
        assert whole[: len(prompt)] == prompt
        logits_TV = model(input_ids=torch.tensor([whole])).logits[0, -len(whole) :]
        behind = range(len(prompt), len(whole))
        likelihoods[label] = sum(float(logits_TV[i - 1].log_softmax(-1)[whole[i]]) for i in behind)
    return max(likelihoods, key=likelihoods.__getitem__)


def test_an_adapter_of_peft_is_used_and_answers_as_peft_does(here: Path, tmp_path: Path) -> None:
    model, tokenizer = _peft_model(here, tmp_path / "theirs", seed=7), AutoTokenizer.from_pretrained(here / "base")
    done = commands.run("evaluate", here / "run.json", "--adapter", tmp_path / "theirs", "--json")
    assert f"{tmp_path}/theirs: base not verified" in done.err
    found = _one_object(done)["adapters"][str(tmp_path / "theirs")]["predictions"]
    theirs = [_choice_of(model, tokenizer, text) for text, _ in tiny.REVIEWS]
    assert found == theirs
    assert set(theirs) == {"bad", "good"}  # a constant answer would agree by chance

    text = tiny.REVIEWS[1][0]
    done = commands.run(
        "generate",
        here / "run.json",
        *FREE_TEXT,
        "train.microbatch_tokens=256",
        "-a",
        tmp_path / "theirs",
        "--text",
        text,
        "--json",
    )
    written = _one_object(done)["adapters"][str(tmp_path / "theirs")]
    ids = tokenizer(f"{text}\nVerdict:", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        continued = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert written == [tokenizer.decode(continued, skip_special_tokens=True)]


def test_generate_answers_each_text_and_each_row_with_one_of_the_labels(here: Path) -> None:
    texts = [text for text, _ in tiny.REVIEWS[:2]]
    found = _one_object(
        commands.run(
            "generate", here / "run.json", "--text", texts[0], "--row", json.dumps({"text": texts[1]}), "--json"
        )
    )
    scored = _one_object(commands.run("evaluate", here / "run.json", "--json"))
    for name, answers in found["adapters"].items():
        assert answers == scored["adapters"][name]["predictions"][:2]
    shown = commands.run("generate", here / "run.json", "--text", texts[0])
    assert shown.out == ""
    assert "mood" in shown.err and "An awful film" in shown.err


def test_inspect_and_pack_print_one_object(here: Path, tmp_path: Path) -> None:
    described = _one_object(commands.run("inspect", _adapter(here, "mood"), "--json"))
    assert (described["kind"], described["length"], described["run"]) == ("prompt", 5, "tiny")
    packed = _one_object(commands.run("pack", here / "run.json", "--out", tmp_path / "packed", "--json"))
    assert packed["digest"] == described["base_digest"]
    assert packed["bytes"] == (tmp_path / "packed" / pack.WEIGHTS).stat().st_size
    again = _one_object(
        commands.run(
            "train", here / "run.json", "name=packed", f"base.pack_dir={tmp_path}/packed", "track=[]", "--json"
        )
    )
    assert (
        again["adapters"]["mood"]["after"] == json.loads((here / "train.out").read_text())["adapters"]["mood"]["after"]
    )


def test_the_schema_is_printed_as_one_object() -> None:
    assert _one_object(commands.run("schema"))["title"] == "peftscale run file"


def test_of_the_ranks_of_torchrun_only_the_first_prints(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = commands.run("inspect", _adapter(here, "mood"), "--json").out
    for rank, expected in (("0", printed), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert commands.run("inspect", _adapter(here, "mood"), "--json").out == expected


def test_a_tracked_run_can_be_read_by_tensorboard(here: Path) -> None:
    events = EventAccumulator(str(here / "runs" / "tiny" / "tensorboard"))
    events.Reload()
    rows = list(records.read(here / "runs" / "tiny" / "metrics.jsonl"))
    steps = [row for row in rows if isinstance(row, StepRecord)]
    tags = events.Tags()["scalars"]
    assert {"loss/mood", "loss/tone", "learning_rate", "tokens_per_s", "validation/mood/accuracy"} <= set(tags)
    for name in ("mood", "tone"):
        assert [(e.step, e.value) for e in events.Scalars(f"loss/{name}")] == [
            (row.step, pytest.approx(row.adapters[name], rel=1e-6)) for row in steps
        ]
    evaluations = [
        r for r in rows if isinstance(r, EvaluationRecord) and (r.adapter, r.split) == ("mood", "validation")
    ]
    assert [e.step for e in events.Scalars("validation/mood/accuracy")] == [row.step for row in evaluations]


def _interrupt_after(directory: Path) -> None:
    """Ctrl-C as soon as a directory is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if directory.is_dir():
            os.kill(os.getpid(), signal.SIGINT)
            return
        time.sleep(0.001)


def _rows(run_dir: Path, which: str) -> bytes:
    return (run_dir / "adapters" / "mood" / which / "adapter_model.safetensors").read_bytes()


def test_a_run_that_is_stopped_goes_on_with_resume_alone_and_with_the_same_run_file_alone(here: Path) -> None:
    """Ctrl-C, and then what a person may try."""
    changes = ("track=[]", "train.steps=14", "train.evaluate_every=7")
    whole = commands.run("train", here / "run.json", "name=whole", *changes)
    assert whole.code == 0, whole.err
    stopped_dir = here / "runs" / "stopped"
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may ignore it
    hand = threading.Thread(target=_interrupt_after, args=(stopped_dir / "checkpoints" / "step-2",))
    hand.start()
    stopped = commands.run("train", here / "run.json", "name=stopped", *changes)
    hand.join()
    signal.signal(signal.SIGINT, handler)
    assert (stopped.code, stopped.out) == (1, "")
    assert stopped.err.endswith(f"stopped; go on with: peftscale train {here}/run.json --resume stopped\n")
    assert "Traceback" not in stopped.err
    assert not (stopped_dir / "summary.json").exists()

    again = commands.run("train", here / "run.json", "name=stopped", *changes)
    assert again.code == 2
    assert f"a run 'stopped' exists in {here}/runs. Choose another with name=..., or go on with --resume" in again.err
    changed = commands.run("train", here / "run.json", "--resume", "stopped", *changes, "train.learning_rate=0.2")
    assert changed.code == 2
    assert "changed since: train.learning_rate was 0.3, now 0.2. Undo the changes, or start a new run" in changed.err
    resumed = commands.run("train", here / "run.json", "--resume", "stopped", *changes)
    assert resumed.code == 0, resumed.err
    assert "goes on from step-" in resumed.err
    for which in ("best", "last"):
        assert _rows(stopped_dir, which) == _rows(here / "runs" / "whole", which)


def test_a_run_that_ended_keeps_its_figures_when_it_is_resumed(here: Path, tmp_path: Path) -> None:
    before = json.loads((here / "train.out").read_text())
    shutil.copytree(here / "runs" / "tiny", tmp_path / "tiny")
    after = _one_object(
        commands.run("train", here / "run.json", "--resume", "tiny", f"cluster.storage={tmp_path}", "--json")
    )
    assert after == before
    assert (
        (tmp_path / "tiny" / "metrics.jsonl").read_bytes().startswith((here / "runs/tiny/metrics.jsonl").read_bytes())
    )
