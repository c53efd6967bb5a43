"""An adapter under lm-evaluation-harness: tasks from local files, and the numbers of its own model for transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM

import peftscale
from peftscale.adapters import Adapter
from peftscale.config import PrefixConfig, SoftPromptConfig
from peftscale.errors import ConfigError, DataError, PeftscaleError
from peftscale.session import Base, Session

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the extra 'harness'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from peftscale import harness  # noqa: E402
from peftscale.harness import AdapterLM  # noqa: E402

GRADES = ["terrible", "bad", "good", "great"]
PROMPT = SoftPromptConfig(kind="prompt", length=5, init="random")
TEXT = "{{ text }}\nVerdict:"
LONG = "One two three four. " * 40
PAIRS = [
    ("A dull film.\nVerdict:", " bad"),
    ("A dull film.\nVerdict:", " good"),
    ("A dull film.\nVerdict: ", "good or bad"),  # the blank goes to the continuation
    ("", "An opening line"),
    (LONG, " the end"),  # loses its start
    ("Tw", "o words"),  # a token reaches across the seam
]
TEXTS = ["Short one.", LONG, "", "word " * 124]
ASKS: list[tuple[str, dict[str, Any]]] = [
    ("A dull film.\nVerdict:", {"until": ["\n\n"], "max_gen_toks": 24}),
    (LONG, {"max_gen_toks": 12}),
    ("x", {"until": ["er", "a"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
    ("Tw", {"until": " ", "max_gen_toks": 5}),
]


def _requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, args if isinstance(args, tuple) else (args,), i) for i, args in enumerate(arguments)]


def _open(directory: Path, config: dict[str, Any], kind: SoftPromptConfig | PrefixConfig = PROMPT) -> Session:
    base = peftscale.load_base(
        tiny.save_base(directory, config), quantization="none", compute_dtype="float32", device="cpu"
    )
    return Session(base, {"mood": kind}, optimizer="adamw", learning_rate=0.1)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return _open(tmp_path_factory.mktemp("harness") / "base", tiny.LLAMA)


@pytest.fixture
def ours(session: Session) -> AdapterLM:
    return AdapterLM(session.base, session.cohort["mood"], microbatch_tokens=150)


def _save_task(path: Path, rows: Path, **changes: Any) -> Path:
    content = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": TEXT,
        "doc_to_target": "{{ label }}",
        **changes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_tasks_from_local_files_score_as_evaluate_does_on_the_same_rows(tmp_path: Path) -> None:
    """By name, through `python -m peftscale.harness`: one of multiple choice, one that generates."""
    rows = tmp_path / "rows.jsonl"
    reviews = (tiny.QUICKSTART / "reviews" / "test.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(reviews[:40]))
    base = peftscale.load_base(tiny.QUICKSTART / "base", quantization="nf4", compute_dtype="float32", device="cpu")
    session = Session(base, {"mood": PROMPT}, optimizer="adafactor", learning_rate=0.3)
    pairs = [(f"{row['text']}\nVerdict:", f" {row['label']}{session.end}") for row in map(json.loads, reviews[40:72])]
    for _ in range(8):
        session.step({"mood": pairs})
    adapter = session.save(tmp_path)["mood"]

    choose = _save_task(tmp_path / "choose.yaml", rows, output_type="multiple_choice", doc_to_choice=GRADES)
    write = _save_task(
        tmp_path / "write.yaml",
        rows,
        output_type="generate_until",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        filter_list=[{"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match"}],
    )
    labels = {grade: f" {grade}" for grade in GRADES}
    answers = {}
    for name, of_task in {
        "choose": {"labels": labels, "target": "{{ label }}", "metrics": ["accuracy"]},
        "write": {"labels": None, "target": " {{ label }}", "metrics": ["exact_match"], "max_target_tokens": 8},
    }.items():
        (tmp_path / name).mkdir()
        changes = {"files": {"train": str(rows), "validation": str(rows)}, **of_task}
        tiny.run_config(
            tmp_path / name, base=tiny.QUICKSTART / "base", **{f"task.{key}": value for key, value in changes.items()}
        )
        run_file = tmp_path / name / "run.json"
        done = commands.run("evaluate", run_file, "--adapter", adapter, "--split", "validation", "--json")
        assert done.code == 0, done.err
        answers[name] = json.loads(done.out)

    ran = _run_harness(
        "--model_args",
        f"run_file={tmp_path / 'choose' / 'run.json'},adapter={adapter},train.microbatch_tokens=500",
        "--tasks",
        f"{choose},{write}",
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    )
    assert ran.returncode == 0, ran.stderr
    (found,) = (json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json"))
    scores = found["results"]["choose"]["acc,none"], found["results"]["write"]["exact_match,strip"]
    by_evaluate = [answers[name]["adapters"][str(adapter)] for name in answers]
    assert scores == (by_evaluate[0]["metrics"]["accuracy"], by_evaluate[1]["metrics"]["exact_match"])
    samples = {path.name.split("_")[1]: _lines(path) for path in (tmp_path / "out").rglob("samples_*.jsonl")}
    chosen = [GRADES[_likeliest(row["filtered_resps"])] for row in samples["choose"]]
    written = [row["filtered_resps"][0] for row in samples["write"]]
    assert chosen == by_evaluate[0]["predictions"] and len(set(chosen)) > 1
    assert written == [text.strip() for text in by_evaluate[1]["predictions"]]

    # The base alone, in this process, is what evaluate says of it, and something else in both.
    tasks = [yaml.safe_load(path.read_text()) for path in (choose, write)]
    alone = lm_eval.simple_evaluate(
        AdapterLM(base, None), tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    scores = alone["results"]["choose"]["acc,none"], alone["results"]["write"]["exact_match,strip"]
    assert scores == (answers["choose"]["base"]["accuracy"], answers["write"]["base"]["exact_match"])
    assert [GRADES[_likeliest(row["filtered_resps"])] for row in alone["samples"]["choose"]] != chosen
    assert [row["filtered_resps"][0] for row in alone["samples"]["write"]] != written


def _run_harness(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peftscale.harness", "--model", "peftscale", *arguments],
        capture_output=True,
        text=True,
        timeout=commands.TIMEOUT_S,
        check=False,
        env=dict(os.environ),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: int(row["doc_id"]))


def _likeliest(answers: Sequence[Sequence[Any]]) -> int:
    return max(range(len(answers)), key=lambda choice: float(answers[choice][0]))


def test_log_likelihoods_are_those_of_transformers_behind_the_concatenated_prompt(
    session: Session, ours: AdapterLM
) -> None:
    model = AutoModelForCausalLM.from_pretrained(session.base.name).eval()
    for (context, target), (found, _) in zip(PAIRS[:3], ours.loglikelihood(_requests("", PAIRS[:3])), strict=True):
        ids, target_ids = ours._encode_pair(context, target)
        with torch.no_grad():
            text_TH = model.get_input_embeddings()(torch.tensor(ids + target_ids))
            embeds_1SH = torch.cat([session.cohort["mood"].values, text_TH])[None]
            logp_TV = model(inputs_embeds=embeds_1SH).logits[0, -len(target_ids) - 1 : -1].log_softmax(-1)
        wanted = float(logp_TV.gather(1, torch.tensor(target_ids)[:, None]).sum())
        assert found == pytest.approx(wanted, abs=2e-5)  # nats; measured 0
    (alone, _), *_ = AdapterLM(session.base, None).loglikelihood(_requests("", PAIRS[:1]))
    assert abs(alone - ours.loglikelihood(_requests("", PAIRS[:1]))[0][0]) > 0.01


@pytest.mark.parametrize("is_tuned", [False, True], ids=["alone", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_every_kind_of_request_is_answered_as_by_the_harness_own_model(
    tmp_path: Path, family: str, is_tuned: bool
) -> None:
    """Transformers and PEFT there, packed or encoder-decoder passes here; requests as in the harness's contract."""
    pytest.importorskip("peft", reason="PEFT is an extra")
    from lm_eval.models.huggingface import HFLM

    # That model ties the head of every T5 and gives it a cache for as many decoder layers as the encoder has.
    t5 = {**tiny.T5, "num_decoder_layers": tiny.T5["num_layers"], "tie_word_embeddings": True}
    session = _open(tmp_path / "base", {"llama": tiny.LLAMA, "gpt2": tiny.GPT2, "t5": t5}[family])
    adapter: Adapter | None = session.cohort["mood"] if is_tuned else None
    ours = AdapterLM(session.base, adapter, microbatch_tokens=150)
    assert ours.max_length == (2048 if family == "t5" else 128) - 1 - (5 if is_tuned else 0)
    directory = str(session.save(tmp_path / "mine")["mood"]) if is_tuned else None
    theirs = HFLM(
        pretrained=session.base.name,
        peft=directory,
        dtype="float32",
        batch_size=1,
        max_length=ours.max_length,
        device="cpu",
    )

    pairs = [model.loglikelihood(_requests("loglikelihood", PAIRS)) for model in (ours, theirs)]
    assert [logp for logp, _ in pairs[0]] == pytest.approx([logp for logp, _ in pairs[1]], abs=2e-5)  # measured 4e-6
    assert [is_greedy for _, is_greedy in pairs[0]] == [is_greedy for _, is_greedy in pairs[1]]
    texts = [model.loglikelihood_rolling(_requests("loglikelihood_rolling", TEXTS)) for model in (ours, theirs)]
    assert texts[0] == pytest.approx(texts[1], rel=1e-6, abs=1e-9)  # measured 9e-8 of 729 nats
    assert texts[0][2] == 0 > texts[0][0]
    written = [model.generate_until(_requests("generate_until", ASKS)) for model in (ours, theirs)]
    if family == "t5":  # theirs counts the tokens that the encoder read as room for new ones
        assert all(text.startswith(mine) for mine, text in zip(*written, strict=True)) and any(written[0])
    else:
        assert written[0] == written[1] and any(written[0])


def test_what_would_be_generated_is_called_greedy_and_nothing_else_is(ours: AdapterLM) -> None:
    (text,) = ours.generate_until(_requests("generate_until", [("A dull film.", {"max_gen_toks": 3})]))
    answers = ours.loglikelihood(_requests("loglikelihood", [("A dull film.", text), ("A dull film.", f"{text} no")]))
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_a_text_that_is_not_there_is_the_token_that_begins_one(ours: AdapterLM) -> None:
    first = ours.tokenizer.decode(ours.prefix_token_id)
    asked = _requests("generate_until", [("", {"max_gen_toks": 4}), (first, {"max_gen_toks": 4})])
    texts = ours.generate_until(asked)
    assert texts[0] == texts[1] != ""


def test_a_prefix_scores_as_in_its_session(tmp_path: Path) -> None:
    session = _open(tmp_path / "base", tiny.LLAMA, PrefixConfig(kind="prefix", length=3, init="random"))
    pairs = PAIRS[:2]
    found = AdapterLM(session.base, session.cohort["mood"]).loglikelihood(_requests("loglikelihood", pairs))
    assert [logp for logp, _ in found] == pytest.approx(session.score({"mood": pairs})["mood"], abs=1e-5)


def _counted(base: Base, work: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What the work gives, and how many tokens each call of the embedding had."""
    counts: list[int] = []
    hook = base.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    try:
        return work(), counts
    finally:
        hook.remove()


def test_choices_of_one_token_are_answered_by_one_row(session: Session, ours: AdapterLM) -> None:
    four = [("A dull film.\nVerdict:", f" {grade}") for grade in ("good", "bad", "one", "two")]
    answers, tokens = _counted(session.base, lambda: ours.loglikelihood(_requests("", four)))
    alone, of_one = _counted(session.base, lambda: [ours.loglikelihood(_requests("", [pair]))[0] for pair in four])
    assert [logp for logp, _ in answers] == pytest.approx([logp for logp, _ in alone], abs=1e-5)
    assert sum(of_one) == 4 * sum(tokens)


def test_a_stop_text_ends_generation_at_once_and_is_cut_off(session: Session, ours: AdapterLM) -> None:
    def write(**given: Any) -> tuple[str, int]:
        asked = _requests("generate_until", [("A dull film.", {"max_gen_toks": 40, **given})])
        (text,), tokens = _counted(session.base, lambda: ours.generate_until(asked))
        return text, len(tokens)

    text, num_calls = write()
    stop = text[len(text) // 4 : len(text) // 4 + 2]
    cut, num_calls_of_cut = write(until=[stop, ""])
    assert cut == text.split(stop)[0] != text
    assert num_calls_of_cut < num_calls / 2


REFUSED: dict[str, tuple[Callable[[AdapterLM], object], type[PeftscaleError], str]] = {
    "sampling": (
        lambda lm: lm.generate_until(_requests("", [("x", {"do_sample": True, "temperature": 0.7})])),
        ConfigError,
        r"generation_kwargs: adapters are asked greedily, got \{'do_sample': True, 'temperature': 0.7\}",
    ),
    "beams": (
        lambda lm: lm.generate_until(_requests("", [("x", {"num_beams": 4})])),
        ConfigError,
        r"asked greedily, got \{'num_beams': 4\}",
    ),
    "room": (
        lambda lm: lm.generate_until(_requests("", [("x", {"max_gen_toks": 122})])),
        DataError,
        r"max_gen_toks=122: 122 tokens fit beside the adapter",
    ),
    "nothing": (lambda lm: lm.loglikelihood(_requests("", [("x", "")])), DataError, r"continuation '' has 0 tokens"),
    "long": (lambda lm: lm.loglikelihood(_requests("", [("x", LONG)])), DataError, r"tokens; .* 122 fit beside"),
    "no file": (
        lambda lm: lm.create_from_arg_string("adapter=here"),
        ConfigError,
        r"--model_args: run_file must be given, got \{'adapter': 'here'\}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_by_name(ours: AdapterLM, case: str) -> None:
    ask, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ask(ours)


def test_an_error_of_the_user_ends_the_command_line_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The harness's own command line takes ten seconds to index its tasks before it makes a model.
    make = get_model("peftscale").create_from_arg_string
    monkeypatch.setattr(harness, "cli_evaluate", lambda: make("run_file=nowhere.yaml,adapter=none"))
    with pytest.raises(SystemExit) as stop:
        harness.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("nowhere.yaml: ")
