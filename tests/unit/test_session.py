"""The Python interface in one process: the lines of the README, the files it writes, and what it refuses.

That its numbers are those of a run file, on one rank and two, is `tests/ranks/test_own_loop.py`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import tiny
import torch

import peftscale
from peftscale import facts, plan
from peftscale.adapters import files
from peftscale.config import AdapterTrainConfig, PrefixConfig, RunConfig, SoftPromptConfig
from peftscale.data import pairs, tasks
from peftscale.data.tokens import TextEncoder
from peftscale.errors import AdapterError, ClusterError, ConfigError, DataError, ModelError, PeftscaleError
from peftscale.session import Base, Session

ROOT = Path(__file__).parents[2]
PROMPT = SoftPromptConfig(kind="prompt", length=5, init="vocabulary")
WORDS = [" bad", " good"]
TEXTS = [f"{text}\nVerdict:" for text, _ in tiny.REVIEWS]
PAIRS = [(text, f" {label}") for text, (_, label) in zip(TEXTS, tiny.REVIEWS, strict=True)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file over seven reviews and its random base."""
    root = tmp_path_factory.mktemp("session")
    tiny.run_config(root, **{"task.files.test": str(root / "data" / "reviews.jsonl")})
    return root


@pytest.fixture(scope="module")
def base(here: Path) -> Base:
    return peftscale.load_base(here / "base", quantization="nf4", compute_dtype="float32")


def _session(base: Base, **adapters: SoftPromptConfig | PrefixConfig) -> Session:
    return Session(base, adapters or {"mood": PROMPT}, optimizer="adamw", learning_rate=0.05, microbatch_tokens=200)


def _run_script(text: str, *, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=commands.TIMEOUT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_ten_lines_of_the_readme_train_choose_and_save(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## From Python")[1]
    script = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line]) <= 12
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    out = _run_script(script, cwd=tmp_path)
    losses = re.findall(r"'mood': ([0-9.]+)", out)
    assert losses and float(losses[-1]) < 0.7  # nats; 9.0 before the first step, 0.14 measured
    manifest = files.verify(tmp_path / "runs" / "mine" / "mood")
    assert manifest is not None and manifest.step == 20 and manifest.run is None


def test_importing_the_package_imports_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    script = "import sys, peftscale; print('torch' in sys.modules, 'pydantic' in sys.modules)\n"
    script += "peftscale.SoftPromptConfig; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    assert _run_script(script, cwd=tmp_path).split() == ["False", "False", "False", "True"]


def test_every_name_of_the_interface_is_there_and_no_other() -> None:
    for name in peftscale.__all__:
        assert getattr(peftscale, name) is not None
    with pytest.raises(AttributeError, match="module 'peftscale' has no attribute 'Sesion'"):
        peftscale.Sesion  # noqa: B018


def test_what_a_session_saves_is_evaluated_inspected_and_read_by_peft(here: Path, base: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    prefix = PrefixConfig(kind="prefix", length=2, init="random", seed=4)
    session = _session(base, mood=PROMPT, deep=prefix)
    for _ in range(3):
        session.step({"mood": PAIRS, "deep": PAIRS[:2]})
    places = session.save(tmp_path / "mine")
    assert places == {"mood": tmp_path / "mine" / "mood", "deep": tmp_path / "mine" / "deep"}
    for name, place in places.items():
        stored = peft.utils.load_peft_weights(str(place), device="cpu")["prompt_embeddings"]
        assert stored.flatten().sort().values.equal(session.cohort[name].values.detach().flatten().sort().values)
        options = [option for path in places.values() for option in ("--adapter", path)]
        scored = commands.run("evaluate", here / "run.json", *options, "--json")
        assert scored.code == 0, scored.err
        of_adapter = json.loads(scored.out)["adapters"][str(place)]
        assert [f" {label}" for label in of_adapter["predictions"]] == session.choose(name, TEXTS, WORDS)
        shown = json.loads(commands.run("inspect", place, "--json").out)
        assert (shown["step"], shown["run"], shown["base_digest"]) == (3, None, base.digest)
    assert "3 steps of a Python session" in (places["mood"] / "README.md").read_text()
    assert "Verdict" not in (places["mood"] / "README.md").read_text()  # the session knows no template


def test_the_template_of_an_adapters_task_is_kept_with_it(here: Path, base: Base, tmp_path: Path) -> None:
    task = tiny.run_config(here).task
    session = _session(base, mood=PROMPT.model_copy(update={"task": task}))
    manifest = files.verify(session.save(tmp_path)["mood"])
    assert manifest is not None and manifest.task is not None and manifest.task.input == task.input


def test_scores_are_the_losses_of_the_next_step_and_change_nothing(base: Base) -> None:
    session = _session(base)
    session.step({"mood": PAIRS})
    scores = session.score({"mood": PAIRS})["mood"]
    assert len(scores) == len(PAIRS) and max(scores) < 0
    assert session.num_steps == 1
    # One token a target, so the mean over targets is the mean over pairs.
    assert session.step({"mood": PAIRS}).losses["mood"] == pytest.approx(-sum(scores) / len(scores), rel=1e-6)


def test_an_adapter_that_is_not_in_a_batch_stands_still_and_the_other_moves_as_if_alone(base: Base) -> None:
    both, alone = _session(base, mood=PROMPT, tone=PROMPT), _session(base, tone=PROMPT)
    start = both.cohort["mood"].values.detach().clone()
    losses = [[s.step({"tone": PAIRS}).losses["tone"] for _ in range(3)] for s in (both, alone)]
    assert losses[0] == losses[1]
    assert torch.equal(both.cohort["mood"].values, start)
    assert torch.equal(both.cohort["tone"].values, alone.cohort["tone"].values)
    assert not torch.equal(both.cohort["tone"].values, start)


def test_what_an_interrupted_step_left_behind_does_not_reach_the_next(base: Base) -> None:
    sessions = _session(base), _session(base)
    for parameter in sessions[0].cohort["mood"].parameters():
        parameter.grad = torch.ones_like(parameter)
    for session in sessions:
        session.step({"mood": PAIRS})
    assert torch.equal(*(session.cohort["mood"].values for session in sessions))


def test_a_target_with_the_end_is_tokenised_as_one_that_a_task_generates(here: Path, base: Base) -> None:
    free = {"task.labels": None, "task.metrics": ["exact_match"], "task.target": " {{ label }}"}
    task = tiny.run_config(here, **free).task
    wanted = tasks.load(task, base.tokenizer, max_tokens=100).train
    end = _session(base).end
    with_end = [(text, target + end) for text, target in PAIRS]
    found = pairs.examples(with_end, TextEncoder(base.tokenizer), where="batch", max_tokens=100)
    assert [(e.input_ids, e.target_ids) for e in found] == [(e.input_ids, e.target_ids) for e in wanted]
    tiny.run_config(here, **{"task.files.test": str(here / "data" / "reviews.jsonl")})


def test_a_trained_target_is_written_and_ends() -> None:
    """On the quickstart's base: a random one does not learn to end."""
    base = peftscale.load_base(tiny.QUICKSTART / "base", quantization="nf4", compute_dtype="float32")
    session = Session(base, {"mood": PROMPT}, optimizer="adafactor", learning_rate=0.3)
    text, target = "Which way?", " left"
    before = session.generate("mood", [text], max_new_tokens=12)
    alone = session.generate(None, [text], max_new_tokens=12)
    for _ in range(40):
        session.step({"mood": [(text, target + session.end)]})
    assert session.generate("mood", [text], max_new_tokens=12) == [target] != before
    assert session.generate(None, [text], max_new_tokens=12) == alone != [target]
    assert session.choose("mood", [text, text], [" up", target]) == [target, target]


def test_a_session_trains_and_asks_an_encoder_decoder_whose_targets_end_by_themselves(tmp_path: Path) -> None:
    base = peftscale.load_base(tiny.save_base(tmp_path / "base", tiny.T5), quantization="nf4", compute_dtype="float32")
    prompt = SoftPromptConfig(kind="prompt", length=5, decoder_length=2, init="random")
    session = Session(base, {"mood": prompt}, optimizer="adafactor", learning_rate=0.3)
    assert session.end == ""
    losses = [session.step({"mood": PAIRS}).losses["mood"] for _ in range(15)]
    assert losses[-1] < losses[0] - 0.5
    scores = session.score({"mood": PAIRS})["mood"]
    # Two tokens a target: its word and the end.
    assert session.step({"mood": PAIRS}).losses["mood"] == pytest.approx(-sum(scores) / (2 * len(PAIRS)), rel=1e-6)
    assert set(session.choose("mood", TEXTS, WORDS)) <= set(WORDS)
    assert len(session.generate("mood", TEXTS, max_new_tokens=3)) == len(TEXTS)
    cfg = tiny.run_config(tmp_path, adapters={"mood": prompt.model_dump(exclude_none=True)})
    place = session.save(tmp_path / "mine")["mood"]
    scored = json.loads(
        commands.run("evaluate", tmp_path / "run.json", "--adapter", place, "--json", "--split", "train").out
    )
    words = [cfg.task.labels[label] for label in scored["adapters"][str(place)]["predictions"]]  # type: ignore[index]
    assert words == session.choose("mood", TEXTS, WORDS)


def test_an_adapter_keeps_what_it_does_otherwise(base: Base) -> None:
    own = AdapterTrainConfig(learning_rate=0.5, schedule="linear", steps=4, warmup_steps=1)
    session = _session(base, mood=PROMPT, tone=PROMPT.model_copy(update={"train": own}))
    rates = [session.step({"mood": PAIRS, "tone": PAIRS}).rates for _ in range(4)]
    assert [rate["mood"] for rate in rates] == [0.05] * 4
    assert [rate["tone"] for rate in rates] == pytest.approx([0.5, 0.5, 0.5 * 2 / 3, 0.5 / 3])
    with pytest.raises(ConfigError, match=r"session.step: tone: all 4 steps are taken. Raise steps, or leave it out."):
        session.step({"mood": PAIRS, "tone": PAIRS})
    assert session.step({"mood": PAIRS}).rates == {"mood": 0.05}


def test_one_that_is_not_finite_is_named_and_stays(base: Base, tmp_path: Path) -> None:
    session = _session(base, mood=PROMPT, tone=PROMPT)
    with torch.no_grad():
        session.cohort["mood"].values[0, 0] = float("nan")
    result = session.step({"mood": PAIRS, "tone": PAIRS})
    assert result.skipped == ("mood",) and set(result.rates) == {"tone"}
    with pytest.raises(AdapterError, match="mood is not saved: its rows hold values that are not finite"):
        session.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tone"]  # behind it, and written all the same


def test_a_session_whose_evaluation_is_interrupted_trains_on_as_before(base: Base) -> None:
    session = _session(base, mood=PROMPT)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = base.model.get_input_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.choose("mood", ["a fine film"], [" good", " bad"])
    hook.remove()
    assert base.model.training and torch.is_grad_enabled()
    assert session.step({"mood": PAIRS}).skipped == ()


def _train(**changes: object) -> SoftPromptConfig:
    return PROMPT.model_copy(update={"train": AdapterTrainConfig.model_validate(changes)})


BAD_SESSIONS: dict[str, tuple[dict[str, object], str]] = {
    "rate": ({"learning_rate": 0}, r"peftscale.Session: 1 problem.*learning_rate: must be > 0, got 0"),
    "optimizer": ({"optimizer": "sgd"}, r"optimizer: must be 'adamw' or 'adafactor', got 'sgd'"),
    "none": ({"adapters": {}}, r"adapters: needs at least 1, got a mapping with no keys"),
    "name": ({"adapters": {"a/b": PROMPT}}, r"adapters.a/b: must match"),
    "dict": ({"adapters": {"a": {"kind": "prompt", "length": 0, "init": "random"}}}, r"adapters.a.length: must be >="),
    "end": ({"schedule": "cosine"}, r"steps: must be given, because the schedule of mood is 'cosine'"),
    "own end": ({"adapters": {"a": _train(schedule="linear")}}, r"steps: must be given, .* of a is 'linear'"),
    "warm-up": ({"steps": 3, "warmup_steps": 3}, r"warmup_steps: must be less than steps=3, got 3"),
    "own warm-up": ({"steps": 9, "adapters": {"a": _train(warmup_steps=9)}}, r"adapters.a.train: warmup_steps=9 must"),
    "stop": ({"adapters": {"a": _train(early_stop=2)}}, r"adapters.a.train.early_stop: has no effect in a session"),
    "tokens": ({"microbatch_tokens": 0}, r"microbatch_tokens: must be > 0, got 0"),
    "both": ({"seed": -1, "clip_norm": -2.0}, r"2 problem.*clip_norm: must be > 0.*seed: must be >= 0, got -1"),
    "start": (
        {"adapters": {"a": SoftPromptConfig(kind="prompt", length=9000, init="vocabulary")}},
        r"adapters.a.length: 9000 rows cannot be drawn",
    ),
}


@pytest.mark.parametrize("given", BAD_SESSIONS)
def test_a_wrong_argument_of_a_session_is_refused_by_name(base: Base, given: str) -> None:
    changes, message = BAD_SESSIONS[given]
    arguments = {"adapters": {"mood": PROMPT}, "optimizer": "adamw", "learning_rate": 0.1, **changes}
    with pytest.raises(PeftscaleError, match=f"(?s){message}"):
        Session(base, **arguments)  # type: ignore[arg-type]


BAD_CALLS: dict[str, tuple[Callable[[Session], object], str]] = {
    "name": (lambda s: s.step({"mod": PAIRS}), r"'mod' is no adapter of this session; it has 'mood'"),
    "nothing": (lambda s: s.step({}), r"batch: must name at least one adapter"),
    "no pair": (lambda s: s.step({"mood": []}), r"batch\['mood'\]: must be a list of at least one, got \[\]"),
    "a text": (lambda s: s.step({"mood": "ab"}), r"batch\['mood'\]: must be a list of at least one, got 'ab'"),  # type: ignore[dict-item]
    "an iterator": (lambda s: s.step({"mood": iter(PAIRS)}), r"batch\['mood'\]: must be a list of at least one"),  # type: ignore[dict-item]
    "a label": (lambda s: s.step({"mood": [PAIRS[0], ("x", 1)]}), r"batch\['mood'\]\[1\]: must be a pair of texts"),  # type: ignore[list-item]
    "no target": (lambda s: s.step({"mood": [("x", "")]}), r"batch\['mood'\]\[0\]: its target is no token"),
    "long": (lambda s: s.score({"mood": [("x " * 150, " y")]}), r"\['mood'\]\[0\]: has \d+ tokens .* at most 123 fit"),
    "one text": (lambda s: s.choose("mood", "x", WORDS), r"texts: must be a list of at least one, got 'x'"),
    "no words": (lambda s: s.choose("mood", TEXTS, []), r"words: must be a list of at least one"),
    "one word": (lambda s: s.choose("mood", TEXTS, [" good"]), r"words: must be at least two, none of which begins"),
    "twice": (lambda s: s.choose("mood", TEXTS, [" good", " good"]), r"words: must be at least two, none of which"),
    "inside": (lambda s: s.choose("mood", TEXTS, [" good film", " good"]), r"got \[' good film', ' good'\], which are"),
    "base": (lambda s: s.choose("", TEXTS, WORDS), r"'' is no adapter of this session"),
    "tokens": (lambda s: s.generate("mood", TEXTS, max_new_tokens=0), r"max_new_tokens: must be >= 1, got 0"),
    "no room": (lambda s: s.generate(None, ["x " * 150]), r"texts\[0\]: has \d+ tokens .* at most 128 fit"),
}


@pytest.mark.parametrize("given", BAD_CALLS)
def test_texts_that_cannot_be_used_are_refused_by_place_and_change_nothing(base: Base, given: str) -> None:
    call, message = BAD_CALLS[given]
    session, untouched = _session(base), _session(base)
    with pytest.raises(DataError, match=message):
        call(session)
    assert session.num_steps == 0
    assert session.step({"mood": PAIRS}).losses == untouched.step({"mood": PAIRS}).losses


def test_a_base_that_cannot_be_loaded_is_refused_by_argument(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"peftscale.load_base: 1 problem.*\n.*quantization: must be .* got 'nf5'"):
        peftscale.load_base(here / "base", quantization="nf5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"packing: must be 'auto' or 'off', got 'on'"):
        peftscale.load_base(here / "base", quantization="nf4", packing="on")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"base.model=.*nowhere"):
        peftscale.load_base("./nowhere", quantization="nf4")
    with pytest.raises(ConfigError, match=r"device: must be 'cpu' or 'cuda', got 'tpu'"):
        peftscale.load_base(here / "base", quantization="nf4", device="tpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ClusterError, match=r"device='cuda', but this process sees no CUDA device"):
            peftscale.load_base(here / "base", quantization="nf4", device="cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ClusterError, match=r"WORLD_SIZE=2: .*inside `with peftscale.ranks\(\):`"):
        peftscale.load_base(here / "base", quantization="nf4")


def test_padded_passes_are_taken_on_request_and_agree(here: Path, base: Base) -> None:
    padded = peftscale.load_base(here / "base", quantization="nf4", compute_dtype="float32", packing="off")
    assert base.is_packed and not padded.is_packed
    losses = [_session(each).step({"mood": PAIRS}).losses["mood"] for each in (base, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(AdapterError, match="adapters.deep: a prefix cannot be put into base"):
        _session(padded, deep=PrefixConfig(kind="prefix", length=2, init="zero"))


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(here: Path) -> None:
    cfg: RunConfig = tiny.run_config(here, **{"task.files.test": str(here / "data" / "reviews.jsonl")})
    small = plan.Hardware(name="small", kind="cpu", num_devices=1, memory_bytes=2 * 10**9, num_cores=1, is_all=False)
    large = facts.load(ROOT / "configs" / "models" / "llama-3.1-8b")
    with pytest.raises(ConfigError, match=r"its weights take 7.80 GB of a rank \(nf4, replicated over 1 rank"):
        plan.place(cfg.base, large, small, world=1)
    assert plan.place(cfg.base, facts.load(here / "base"), small, world=2).sharding == "world"
