"""Transfer between tasks: bands by hand, which runs are made, and the command on a small base."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import pytest
import tiny

from peftscale import driver
from peftscale.analysis import transfer
from peftscale.config import RunConfig, TaskConfig
from peftscale.errors import ConfigError
from peftscale.task_config import Split

LORA = {"method": "lora", "lora": {"rank": 2, "alpha": 4}}


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    """A run with one adapter."""
    return tiny.run_config(tmp_path)


def test_a_band_is_student_s() -> None:
    found = transfer.band([1.0, 2.0, 3.0])
    assert (found["mean"], found["deviation"]) == (2.0, 1.0)
    assert found["high"] == pytest.approx(2 + 4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees of freedom at 0.975
    assert found["low"] == pytest.approx(2 - 4.302653 / 3**0.5, rel=1e-6)
    assert transfer.band([0.5, 0.5]) == {"mean": 0.5, "deviation": 0.0, "low": 0.5, "high": 0.5}


def test_one_seed_has_no_band() -> None:
    assert transfer.band([0.25]) == {"mean": 0.25, "deviation": None, "low": None, "high": None}


def test_all_seeds_of_an_adapter_are_one_cohort(cfg: RunConfig) -> None:
    found = transfer.members([cfg], [0, 4])
    assert len({id(member.run) for member in found}) == 1
    (run,) = {member.run.name: member.run for member in found}.values()
    assert run.name == "tiny-s0-s4"
    assert {name: run.adapter_seed(name) for name in run.adapters} == {"mood-s0": 0, "mood-s4": 4}
    assert [(m.name, m.method, m.seed, m.task.name) for m in found] == [
        ("mood-s0", "tiny", 0, "reviews"),
        ("mood-s4", "tiny", 4, "reviews"),
    ]


def test_a_run_without_seeds_is_what_it_is_and_its_own_seeds_are_one_method(tmp_path: Path) -> None:
    adapters = {
        "mood": {"kind": "prompt", "length": [2, 3], "init": "random", "seed": [5, 6]},
        "deep": {"kind": "prefix", "length": 2, "init": "random"},
    }
    cfg = tiny.run_config(tmp_path, adapters=adapters)
    found = transfer.members([cfg], [])
    assert {id(member.run) for member in found} == {id(cfg)}
    assert [(member.name, member.method, member.seed) for member in found] == [
        ("mood-p2-s5", "tiny/mood-p2-s5", 5),
        ("mood-p2-s6", "tiny/mood-p2-s5", 6),
        ("mood-p3-s5", "tiny/mood-p3-s5", 5),
        ("mood-p3-s6", "tiny/mood-p3-s5", 6),
        ("deep", "tiny/deep", 3),
    ]


def test_seeds_that_are_given_stand_in_the_place_of_the_run_file_s_own(tmp_path: Path) -> None:
    adapters = {"mood": {"kind": "prompt", "length": 2, "init": "random", "seed": [5, 6]}}
    found = transfer.members([tiny.run_config(tmp_path, adapters=adapters)], [0, 1])
    assert [(member.method, member.seed) for member in found] == [("tiny", 0), ("tiny", 1)]


def test_two_tasks_are_compared_by_the_first_metric_that_both_have(cfg: RunConfig) -> None:
    (member,) = transfer.members([cfg.model_copy(update={"task": _with(cfg, "mean", "accuracy", "macro_f1")})], [])
    targets = [
        _with(cfg, "mean", "macro_f1", "accuracy", name="all"),
        _with(cfg, "mean", "accuracy", "exact_match", name="another mean"),
        _with(cfg, "exact_match", "macro_f1", name="second"),
        _with(cfg, "exact_match", name="none"),
    ]

    def score(run: RunConfig, places: Any, tasks: Any, split: Split | None) -> dict[str, Any]:
        metrics = {"mean": 0.75, "accuracy": 0.5, "macro_f1": 0.25, "exact_match": 0.125}
        away = {name: 2 * value for name, value in metrics.items()}
        of_tasks = {task.name: metrics if task == run.task else away for task in tasks}
        return {
            "notes": [],
            "tasks": {
                name: {"base": {"accuracy": 0.1}, "adapters": {str(place): {"metrics": found} for place in places}}
                for name, found in of_tasks.items()
            },
        }

    trained = driver.RunSummary.model_construct(adapters={member.name: SimpleNamespace(dir="somewhere")})
    found = transfer.study([member], targets, "test", train=lambda _: trained, score=score)
    on = found["methods"]["tiny"]["tasks"]
    assert [(on[name]["metric"], on[name]["shift"] and on[name]["shift"]["mean"]) for name in on] == [
        ("mean", None),
        ("mean", 0.75),
        ("accuracy", 0.5),
        ("macro_f1", 0.25),
        ("exact_match", None),
    ]
    assert [on[name]["untuned"] for name in on] == [None, None, 0.1, None, None]


def _with(cfg: RunConfig, *metrics: str, name: str = "reviews") -> TaskConfig:
    return cfg.task.model_copy(update={"name": name, "metrics": metrics})


def test_a_baseline_is_a_run_for_each_seed(cfg: RunConfig, tmp_path: Path) -> None:
    lora = tiny.run_config(tmp_path, name="low", **LORA)
    found = transfer.members([cfg, lora], [1, 2])
    assert [(m.run.name, m.run.seed, m.name, m.method) for m in found[2:]] == [
        ("low-s1", 1, "lora", "low"),
        ("low-s2", 2, "lora", "low"),
    ]
    assert [member.run.name for member in transfer.members([lora], [])] == ["low"]


def test_runs_that_cannot_be_compared_are_refused(cfg: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two run files are called 'tiny'; each method needs a name of its own"):
        transfer.members([cfg, cfg], [])
    with pytest.raises(ConfigError, match="--seed 4: given twice; a band is over seeds that differ"):
        transfer.members([cfg], [4, 1, 4])
    with pytest.raises(ConfigError, match="--seed -1: must be 0 or more"):
        transfer.members([cfg], [0, -1])
    shown = tiny.run_config(tmp_path, name="shown", method="few_shot", few_shot={"examples": 2})
    with pytest.raises(ConfigError, match="shown: method 'few_shot' trains nothing on one task"):
        transfer.members([shown], [])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A prompt's run file, and one of the same reviews whose labels are turned round."""
    root = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        data = str(tiny.save_reviews(root / "data"))
        changes = {
            "base.quantization": "none",
            "base.sharding": "replicated",
            "task.files": dict.fromkeys(("train", "validation", "test"), data),
            "train.steps": 2,
        }
        tiny.run_config(root, **changes)
        (root / "run.json").rename(root / "prompt.json")
        turned = {"bad": " good", "good": " bad"}
        tiny.run_config(root, **changes, **{"task.name": "turned", "task.labels": turned})
        (root / "run.json").rename(root / "turned.json")
        tiny.run_config(root, **changes, **{"task.labels": turned})
        (root / "run.json").rename(root / "namesake.json")
        tiny.run_config(root, **changes, name="low", **LORA)
        (root / "run.json").rename(root / "lora.json")
        yield root


def _transfer(here: Path, *arguments: str | Path) -> dict[str, Any]:
    done = commands.run("transfer", *arguments, "--to", here / "turned.json", "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_the_shift_to_a_task_with_its_labels_turned_round_is_known(here: Path) -> None:
    found = _transfer(here, here / "prompt.json", "--seed", "0", "--seed", "1", "--seed", "2")
    assert list(found["methods"]) == ["tiny"]
    of_method = found["methods"]["tiny"]
    assert (of_method["task"], of_method["seeds"]) == ("reviews", [0, 1, 2])
    home, away = of_method["tasks"]["reviews"], of_method["tasks"]["turned"]
    # The same words are likeliest for the same texts, and they mean the other label now.
    assert away["values"] == pytest.approx([1 - value for value in home["values"]])
    assert home["shift"] is None
    assert away["untuned"] == pytest.approx(1 - home["untuned"])
    assert away["shift"]["mean"] == pytest.approx(1 - 2 * home["mean"])
    expected = transfer.band([1 - 2 * value for value in home["values"]])
    assert away["shift"] == {key: pytest.approx(value) for key, value in expected.items()}

    scored = json.loads((here / "runs" / "tiny-s0-s1-s2" / "summary.json").read_text())
    assert [one["after"]["accuracy"] for one in scored["adapters"].values()] == home["values"]


def test_a_run_that_has_ended_is_not_trained_again(here: Path) -> None:
    first = _transfer(here, here / "prompt.json", "--seed", "7")
    metrics = here / "runs" / "tiny-s7" / "metrics.jsonl"
    before = metrics.read_bytes()
    assert _transfer(here, here / "prompt.json", "--seed", "7") == first
    assert metrics.read_bytes() == before
    done = commands.run("transfer", here / "prompt.json", "train.steps=3", "--seed", "7", "--to", here / "turned.json")
    assert done.code == 2
    assert "name: the run 'tiny-s7' in" in done.err and "has other settings than this one" in done.err


def test_a_run_that_was_stopped_is_gone_on_with(here: Path, tmp_path: Path) -> None:
    whole = _transfer(here, here / "prompt.json", f"cluster.storage={tmp_path}", "--seed", "8")
    (tmp_path / "tiny-s8" / "summary.json").unlink()
    assert _transfer(here, here / "prompt.json", f"cluster.storage={tmp_path}", "--seed", "8") == whole
    assert "goes on from step-2" in (tmp_path / "tiny-s8" / "metrics.jsonl").read_text()


def test_a_baseline_stands_beside_the_prompt(here: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is an extra")
    found = _transfer(here, here / "prompt.json", here / "lora.json", "--seed", "0", "--seed", "1")
    assert list(found["methods"]) == ["tiny", "low"]
    low = found["methods"]["low"]
    assert low["tasks"]["turned"]["untuned"] is None
    assert low["seeds"] == [0, 1]
    for seed, home, away in zip((0, 1), *(low["tasks"][task]["values"] for task in ("reviews", "turned")), strict=True):
        summary = json.loads((here / "runs" / f"low-s{seed}" / "summary.json").read_text())
        assert summary["adapters"]["lora"]["after"]["accuracy"] == pytest.approx(home)
        assert away == pytest.approx(1 - home)
    shown = commands.run(
        "transfer", here / "prompt.json", here / "lora.json", "--seed", "0", "--seed", "1", "--to", here / "turned.json"
    )
    assert shown.out == ""
    title = "mean, deviation and 95% interval over seeds"
    for text in (title, "test split", "2 seed(s)", "trained on", "difference", "base alone"):
        assert text in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt.json", "--to", "revews"], "--to revews: neither a task of the run file (reviews) nor one that the"),
        (["prompt.json", "--to", "revews"], "of which the task is taken; did you mean 'reviews'?"),
        (["prompt.json", "--to", "wsc-jsonl"], "--to wsc-jsonl: the catalogue has its form alone, for files of your"),
        (
            ["prompt.json", "--to", "reviews"],
            "--to reviews: all methods are trained on it, and it is to be a task that",
        ),
        (["prompt.json", "--to", "namesake.json"], "task.name: two different tasks are called 'reviews', and scores"),
        (["prompt.json", "--to", "turned.json", "--split", "dev"], "--split: must be train, validation or test"),
        (["train.steps=1", "--to", "turned.json"], "transfer: no run file given"),
        (["nowhere.json", "--to", "turned.json"], "nowhere.json: no such file"),
    ],
)
def test_a_transfer_that_cannot_be_is_refused_before_anything_is_trained(
    here: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    runs = sorted(here.glob("runs/*"))
    done = commands.run("transfer", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert sorted(here.glob("runs/*")) == runs


def test_finished_refuses_a_summary_of_another_run(here: Path, tmp_path: Path) -> None:
    cfg = tiny.configio.load(here / "prompt.json", [f"cluster.storage={tmp_path}", "name=mine", "train.steps=1"])
    summary = driver.finished(cfg)
    assert driver.finished(cfg) == summary
    with pytest.raises(ConfigError, match="the run 'mine' in .* has other settings than this one"):
        driver.finished(cfg.model_copy(update={"seed": cfg.seed + 1}))
