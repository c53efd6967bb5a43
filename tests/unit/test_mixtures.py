"""Several tasks for one adapter: the order of their examples, and what a run file may say of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from peftscale import configio, driver, selection
from peftscale.analysis import transfer
from peftscale.config import MEAN_OF_TASKS
from peftscale.data import batches
from peftscale.data.batches import Cursor
from peftscale.data.mixtures import Mixture
from peftscale.data.tasks import Example, TaskData
from peftscale.errors import ConfigError
from peftscale.session.settings import Settings, checked

Place = tuple[str, int]


def _task(name: str, num_examples: int) -> TaskData:
    """A generated task; target_text tells where an example comes from."""
    examples = tuple(Example(i, (5, 6), (7,), None, name) for i in range(num_examples))
    return TaskData(
        name=name,
        train=examples,
        validation=examples[:1],
        test=(),
        labels=(),
        words=(),
        num_cut=0,
        num_seams=0,
        has_shared_choices=False,
        max_target_tokens=4,
    )


def _walk(mixture: Mixture, num: int, *, seed: int = 3, start: int = 0) -> list[Place]:
    taken, moved = mixture.take(Cursor(seed, start), num)
    assert moved == Cursor(seed, start + num)
    return [(example.target_text, example.index) for example in taken]


def test_an_epoch_has_every_example_of_every_task_once_and_mixes_them() -> None:
    mixture = Mixture((_task("a", 30), _task("b", 10)))
    for epoch in range(3):
        walked = _walk(mixture, 40, start=40 * epoch)
        assert sorted(walked) == [("a", i) for i in range(30)] + [("b", i) for i in range(10)]
        halves = [sum(name == "b" for name, _ in walked[part]) for part in (slice(20), slice(20, 40))]
        assert min(halves) > 0  # task upon task would leave all of b to the second half


def test_a_limit_changes_the_proportion_and_leaves_no_example_out_for_ever() -> None:
    tasks = (_task("a", 30), _task("b", 10), _task("c", 6))
    free, limited = Mixture(tasks), Mixture(tasks, limit=10)
    assert Counter(name for name, _ in _walk(free, 46)) == {"a": 30, "b": 10, "c": 6}
    epochs = [_walk(limited, 26, start=26 * epoch) for epoch in range(3)]
    assert [Counter(name for name, _ in walked) for walked in epochs] == [{"a": 10, "b": 10, "c": 6}] * 3
    of_a = [{i for name, i in walked if name == "a"} for walked in epochs]
    assert [len(met) for met in of_a] == [10, 10, 10]
    assert set.union(*of_a) == set(range(30))
    assert limited.described() == "10 of the 30 of a, all 10 of b, all 6 of c"


def test_which_examples_a_limit_takes_is_a_function_of_the_seed_and_differs_between_tasks() -> None:
    mixture = Mixture((_task("a", 40), _task("b", 40)), limit=10)

    def met(name: str, seed: int) -> frozenset[int]:
        return frozenset(i for of, i in _walk(mixture, 20, seed=seed) if of == name)

    assert met("a", 3) == met("a", 3)
    assert len({met("a", seed) for seed in range(20)}) == 20
    assert all(met("a", seed) != met("b", seed) for seed in range(20))  # one stream would give both the same places


def test_the_order_of_a_mixture_is_frozen() -> None:
    # Golden: a change here changes every run, and no checkpoint resumes on the same examples.
    walked = _walk(Mixture((_task("a", 5), _task("b", 3)), limit=4), 9, seed=17)
    assert walked == [("b", 0), ("a", 2), ("a", 0), ("a", 3), ("a", 1), ("b", 1), ("b", 2), ("b", 2), ("b", 0)]


def test_the_mixture_of_one_task_is_the_order_of_that_task() -> None:
    walked = _walk(Mixture((_task("a", 7),)), 40, seed=5)
    assert [i for _, i in walked] == list(batches.indices(5, 0, 40, num_examples=7))


def test_streams_of_a_seed_are_different_orders() -> None:
    assert len({batches.indices(3, 0, 11, num_examples=11, stream=stream) for stream in range(20)}) == 20
    assert batches.indices(3, 0, 11, num_examples=11, stream=0) == batches.indices(3, 0, 11, num_examples=11)


@given(
    seed=st.integers(0, 2**70),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    limit=st.none() | st.integers(1, 10),
    steps=st.lists(st.integers(0, 30), max_size=6),
)
@settings(deadline=None)
def test_steps_of_any_size_walk_through_one_order(
    seed: int, sizes: list[int], limit: int | None, steps: list[int]
) -> None:
    mixture = Mixture(tuple(_task(f"t{i}", size) for i, size in enumerate(sizes)), limit)
    walked: list[Place] = []
    for num in steps:
        walked += _walk(mixture, num, seed=seed, start=len(walked))
    assert walked == _walk(mixture, sum(steps), seed=seed)


def test_a_cohort_of_any_size_makes_each_order_of_an_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    philox = np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **key: made.append(key) or philox(**key))
    task = _task("a", 40)
    cohort = [(Mixture((task,)), Cursor(seed)) for seed in range(9000, 9070)]  # seeds of no other test
    for _ in range(5):
        cohort = [(mixture, mixture.take(cursor, 10)[1]) for mixture, cursor in cohort]
        assert len(made) == 70 or cohort[0][1].position > 40
    assert len(made) == 140  # the fifth step begins the second epoch


def test_scores_of_several_tasks_are_the_mean_of_their_first_metrics_and_each_one_s_own() -> None:
    of_tasks = [{"accuracy": 0.5, "f1": 0.1}, {"bleu": 0.2}]
    two, one = Mixture((_task("a", 1), _task("b", 1))), Mixture((_task("a", 1),))
    found = two.scores(of_tasks)
    assert found.pop(MEAN_OF_TASKS) == pytest.approx(0.35)
    assert found == {"a/accuracy": 0.5, "a/f1": 0.1, "b/bleu": 0.2}
    assert one.scores(of_tasks[:1]) == of_tasks[0]


PROMPT: dict[str, Any] = {"kind": "prompt", "length": 5, "init": "vocabulary"}


def _write(tmp: Path, **adapter: Any) -> Path:
    """The run file of tiny with other words for its adapter, and data of a second task beside it."""
    if not (tmp / "run.json").exists():
        tiny.run_config(tmp)
    data = tmp / "data"
    (data / "moods.jsonl").write_text('{"text": "I am so happy", "label": "joy"}\n')
    content = json.loads((tmp / "run.json").read_text())
    content["adapters"] = {"source": {**PROMPT, **adapter}}
    path = tmp / "mixed.json"
    path.write_text(json.dumps(content))
    return path


def _moods(**changes: Any) -> dict[str, Any]:
    """A second task that is generated, in paths relative to the run file."""
    files = dict.fromkeys(("train", "validation"), "data/moods.jsonl")
    return {
        "name": "moods",
        "files": files,
        "input": "{{ text }}\nMood:",
        "target": " {{ label }}",
        "metrics": ["exact_match"],
        **changes,
    }


def test_more_tasks_are_completed_from_the_catalogue_and_their_paths_are_the_run_file_s(tmp_path: Path) -> None:
    files = {"train": "data/moods.jsonl", "validation": "data/moods.jsonl"}
    path = _write(tmp_path, more_tasks=[_moods(), {"name": "sst2", "files": files}], task_size_limit=100)
    cfg = configio.load(path)
    own, moods, sst2 = cfg.adapter_tasks("source")
    assert [own.name, moods.name, sst2.name] == ["reviews", "moods", "sst2"]
    assert own == cfg.adapter_task("source") == cfg.task
    assert moods.files is not None and moods.files.train == tmp_path / "data" / "moods.jsonl"
    assert sst2.labels is not None and sst2.metrics == ("accuracy",)
    assert sst2.files is not None and sst2.files.validation == tmp_path / "data" / "moods.jsonl"
    assert cfg.deciding_metric("source") == MEAN_OF_TASKS
    assert configio.from_dict(json.loads(json.dumps(configio.dump(cfg)))) == cfg
    jsonschema.validate(json.loads(path.read_text()), configio.schema())
    assert configio.load(_write(tmp_path)).deciding_metric("source") == "accuracy"


def test_a_product_of_limits_and_lengths_shares_its_tasks(tmp_path: Path) -> None:
    cfg = configio.load(_write(tmp_path, length=[5, 6], task_size_limit=[2, 3], more_tasks=[_moods()]))
    assert list(cfg.adapters) == [f"source-p{length}-task_size_limit{limit}" for length in (5, 6) for limit in (2, 3)]
    assert {len(adapter.more_tasks) for adapter in cfg.adapters.values()} == {1}
    assert [adapter.task_size_limit for adapter in cfg.adapters.values()] == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"task_size_limit": 5}, "adapters.source.task_size_limit: is for a mixture, and there are no more_tasks"),
        ({"more_tasks": [_moods()], "task_size_limit": 0}, "adapters.source.task_size_limit: must be >= 1, got 0"),
        ({"more_tasks": [_moods(name="reviews")]},
         "adapters.source.more_tasks: 'reviews' is the name of two of its tasks (reviews, reviews; its own comes"),
        ({"more_tasks": [_moods(), _moods()]}, "adapters.source.more_tasks: 'moods' is the name of two of its tasks"),
        ({"more_tasks": [{"name": "sst3"}]},
         "adapters.source.more_tasks.0.name: the catalogue (`peftscale tasks`) has no 'sst3', and a task of your own "
         "gives input, target and metrics; did you mean 'sst2'?"),
        ({"more_tasks": [_moods(), _moods(name="other", files={"train": "data/mods.jsonl", "validation": "run.json"})]},
         "adapters.source.more_tasks.1.files.train: no such file, got 'data/mods.jsonl'"),
        ({"more_tasks": [_moods(metrics=["accuracy"])]},
         "adapters.source.more_tasks.0.metrics: accuracy need(s) `labels`"),
        ({"more_tasks": [_moods(lables={})]},
         "adapters.source.more_tasks.0.lables: unknown key; did you mean 'labels'?"),
        ({"more_tasks": _moods()}, "adapters.source.more_tasks: must be a list, got a mapping"),
        ({"more_tasks": ["sst2"]}, "adapters.source.more_tasks.0: must be a mapping (key: value lines), got 'sst2'"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused_under_its_key(tmp_path: Path, adapter: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configio.load(_write(tmp_path, **adapter))
    (found,) = str(caught.value).splitlines()[1:]
    assert found.strip().startswith(line)


def test_the_fingerprint_follows_the_tasks_and_the_limit_and_not_where_their_files_lie(tmp_path: Path) -> None:
    def of(place: Path, **adapter: Any) -> str:
        place.mkdir(parents=True, exist_ok=True)
        return configio.fingerprint(configio.load(_write(place, **adapter)))

    here, there = (tmp_path / machine / "study" for machine in ("here", "there"))
    first = of(here, more_tasks=[_moods()])
    assert of(there, more_tasks=[_moods()]) == first
    assert of(here, more_tasks=[_moods()], task_size_limit=5) != first
    assert of(here, more_tasks=[_moods(input="{{ text }}")]) != first
    assert of(here) != first


def test_an_adapter_is_evaluated_on_all_its_tasks_unless_others_are_named(tmp_path: Path) -> None:
    cfg = configio.load(_write(tmp_path, more_tasks=[_moods()]))
    best = cfg.adapters_dir / "source" / "best"
    assert [task.name for task in selection.tasks_for(cfg, [best], [], option="--task")] == ["reviews", "moods"]
    assert [task.name for task in selection.tasks_for(cfg, [best], ["moods"], option="--task")] == ["moods"]
    assert selection.with_task_of(cfg, [best]).task.name == "reviews"


def test_a_task_that_was_trained_on_is_no_target_of_a_transfer(tmp_path: Path) -> None:
    cfg = configio.load(_write(tmp_path, more_tasks=[_moods()]))
    targets = selection.tasks_for(cfg, [], ["moods"], option="--to")
    with pytest.raises(ConfigError, match="--to moods: source of run tiny is trained on it too"):
        transfer.study(transfer.members([cfg], []), targets, "test", train=driver.finished, score=driver.evaluate)


def test_a_session_refuses_tasks_that_it_would_not_read(tmp_path: Path) -> None:
    cfg = configio.load(_write(tmp_path, more_tasks=[_moods()]))
    given = {"adapters": cfg.adapters, "seed": 0, "microbatch_tokens": 8, "steps": 1, "optimizer": "adamw"}
    with pytest.raises(ConfigError, match="adapters.source.more_tasks: has no effect in a session"):
        checked(Settings, "peftscale.Session", {**given, "learning_rate": 0.1})
