"""Baselines stand on the adapters' footing: the same base, examples, order, metrics and evaluation; only what moves
differs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from deepspeed.utils import safe_get_full_grad
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

from peftscale import baselines, configio, driver, facts, records, selection
from peftscale.base import load as base_load
from peftscale.base.padded import Row, target_logits
from peftscale.baselines import budget, model, training, use
from peftscale.baselines import task as baseline_task
from peftscale.baselines.adafactor import SlicedAdafactor
from peftscale.baselines.full import Full
from peftscale.baselines.lora import Lora
from peftscale.config import RunConfig
from peftscale.data.batches import Item, training_items
from peftscale.errors import AdapterError, CheckpointError, ConfigError, ModelError, TrainingError
from peftscale.records import EvaluationRecord, RunSummary, StepRecord
from peftscale.train import evaluate, worker
from peftscale.train.evaluate import BASE_ALONE, Cell
from peftscale.train.journal import Journal

CPU = torch.device("cpu")
LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8}}
FULL = {"method": "full_finetuning", "base.quantization": "none"}
FEW = {"method": "few_shot", "few_shot": {"examples": 2}}


def _run(cfg: RunConfig) -> RunSummary:
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    return (worker.main if cfg.method == "adapters" else baselines.main)(cfg)


def _steps(cfg: RunConfig) -> list[StepRecord]:
    return [row for row in records.read(cfg.metrics_path) if isinstance(row, StepRecord)]


def _items(cfg: RunConfig, num: int = 7) -> list[Item]:
    return training_items(cfg.method, 0, baseline_task.load(cfg).train[:num])


def _padded(items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels as anybody would write them for transformers."""
    rows = [[*item.example.input_ids, *item.target_ids] for item in items]
    ids_NT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels_NT = torch.full_like(ids_NT, -100)
    for i, (row, item) in enumerate(zip(rows, items, strict=True)):
        ids_NT[i, : len(row)] = torch.tensor(row)
        labels_NT[i, len(item.example.input_ids) : len(row)] = torch.tensor(item.target_ids)
    return ids_NT, labels_NT


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_untrained_score_of_every_method_is_that_of_the_adapter_run(tmp_path: Path, quantization: str) -> None:
    methods: dict[str, dict[str, Any]] = {"adapters": {}, "lora": LORA, "few_shot": FEW}
    if quantization == "none":
        methods["full_finetuning"] = FULL
    before = {}
    for method, changes in methods.items():
        cfg = tiny.run_config(tmp_path, **{**changes, "base.quantization": quantization, "name": method})
        (found,) = _run(cfg).adapters.values()
        before[method] = found.before
    assert len({json.dumps(scores) for scores in before.values()}) == 1, before


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_of_transformers_gives_the_logits_of_ours(
    tmp_path: Path, quantization: str, compute_dtype: str
) -> None:
    changes = {"base.quantization": quantization, "base.compute_dtype": compute_dtype}
    cfg = tiny.run_config(tmp_path, **changes).base
    rows = [Row(None, [1, 5, 9, 77, 300, 8], 2), Row(None, [1, 44, 3], 1)]
    ours, theirs = base_load.load(cfg, sharding="replicated", device=CPU), model.load(cfg, CPU)
    with torch.no_grad():
        difference = (target_logits(ours, rows) - target_logits(theirs, rows)).abs().max()
    assert difference < 1e-6  # measured 0, weights rounded to bfloat16 before they are quantised give 0.1


def test_baselines_train_on_the_adapters_examples_in_their_order(tmp_path: Path) -> None:
    changes = {"train.steps": 6, "train.examples_per_step": 2, "base.quantization": "none"}
    tokens = {}
    for name, more in {"a": {}, "lora": LORA, "full": FULL, "other": {**LORA, "seed": 4}}.items():
        cfg = tiny.run_config(tmp_path, **{**changes, **more, "name": name})
        _run(cfg)
        tokens[name] = [row.tokens for row in _steps(cfg)]
    assert tokens["lora"] == tokens["full"] == tokens["a"] != tokens["other"]
    assert len(set(tokens["a"])) > 2  # pairs of different length, so that another order would be seen


def _lora(cfg: RunConfig) -> Lora:
    return Lora(model.load(cfg.base, CPU), cfg, Journal(cfg))


def test_the_gradient_of_lora_is_that_of_the_formula_in_plain_transformers(tmp_path: Path) -> None:
    changes = {"base.quantization": "none", "train.microbatch_tokens": 40}
    cfg = tiny.run_config(
        tmp_path, **{**LORA, **changes, "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj"]}}
    )
    learner, items = _lora(cfg), _items(cfg)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.named.values():
            parameter.normal_(std=0.1)  # where B is 0 the gradient of A is too
    loss = training.gradient(learner, items, microbatch_tokens=40)

    plain = AutoModelForCausalLM.from_pretrained(cfg.base.model, dtype=torch.float32)
    low = {name: value.detach().clone().requires_grad_() for name, value in learner.named.items()}
    weights = dict(plain.named_parameters())
    for layer in range(3):
        q = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (low[f"base_model.model.{q}.lora_{part}.default.weight"] for part in "AB")
        weights[f"{q}.weight"] = weights[f"{q}.weight"].detach() + 8 / 4 * b @ a
    ids_NT, labels_NT = _padded(items)
    logits_NTV = functional_call(plain, weights, (ids_NT,)).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits_NTV.transpose(1, 2), labels_NT[:, 1:], ignore_index=-100)
    want.backward()
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-6)
    errors = [(p.grad - low[n].grad).norm() / low[n].grad.norm() for n, p in learner.named.items()]  # type: ignore[operator, union-attr]

    assert max(errors) < 5e-6, errors  # float32 order of sums; measured 1.6e-6


def test_an_evaluation_leaves_the_gradient_through_an_nf4_base_as_it_was(tmp_path: Path) -> None:
    """bitsandbytes packs weights for inference on some CPUs, for a kernel without a backward."""
    base = tiny.save_base(tmp_path / "base", {**tiny.LLAMA, "intermediate_size": 128})  # what that kernel needs
    cfg = tiny.run_config(tmp_path, base=base, **LORA)
    task = baseline_task.load(cfg)
    learner, cell = _lora(cfg), Cell(BASE_ALONE, task, task.validation, cfg.task.metrics)
    grads = []
    for _ in range(2):
        training.gradient(learner, _items(cfg), microbatch_tokens=64)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in learner.named.values()])
        for parameter in learner.named.values():
            parameter.grad = None
        evaluate.run_cells(learner.base, {}, [cell], microbatch_tokens=64)
    assert any(grad.abs().max() > 0 for grad in grads[0])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.T5], ids=["llama", "t5"])
def test_a_step_of_full_finetuning_is_that_of_plain_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    cfg = tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", config), **FULL)
    base, items = model.load(cfg.base, CPU), _items(cfg)
    learner = Full(base, cfg, Journal(cfg))
    plain = model.load(cfg.base, CPU).model
    plain.requires_grad_()
    started = [parameter.detach().clone() for parameter in plain.parameters()]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    errors = []
    try:
        for at in range(2):
            loss = training.gradient(learner, items, microbatch_tokens=48)
            optimizer.zero_grad()
            want = _plain_loss(plain, items)
            want.backward()
            assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
            if at == 0:
                of_ours = [safe_get_full_grad(parameter) for parameter in learner.named.values()]
                pairs = [(got, p.grad) for got, p in zip(of_ours, plain.parameters(), strict=True)]
                errors = [float((got - grad).norm() / grad.norm()) for got, grad in pairs if grad is not None]
            assert learner.update(at, is_finite=True) == 0.01
            optimizer.step()
        ends = zip(started, plain.parameters(), learner.named.values(), strict=True)
        apart, moved = zip(
            *((float((q - p).detach().norm()), float((p - start).detach().norm())) for start, p, q in ends), strict=True
        )
    finally:
        learner.close()

    assert max(errors) < 1e-5, errors  # float32 order of sums; measured 2.4e-6
    assert max(apart) < 2e-3 * max(moved)  # Adam magnifies rounding where a gradient is near 0; measured 2.6e-4


def _plain_loss(plain: Any, items: list[Item]) -> torch.Tensor:
    if not plain.config.is_encoder_decoder:
        ids_NT, labels_NT = _padded(items)
        logits_NTV = plain(input_ids=ids_NT).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits_NTV.transpose(1, 2), labels_NT[:, 1:], ignore_index=-100)
    sums = [
        plain(input_ids=torch.tensor([item.example.input_ids]), labels=torch.tensor([item.target_ids])).loss
        * len(item.target_ids)
        for item in items
    ]
    return torch.stack(sums).sum() / sum(len(item.target_ids) for item in items)


def test_adafactor_over_whole_tensors_is_that_of_transformers_with_parameter_scaling() -> None:
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(size) * 0.3) for size in (7, 12)]  # vectors: theirs does not factor those
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in mine]
    ours = SlicedAdafactor(mine, weight_decay=0.0)
    reference = Adafactor(theirs, lr=0.05, scale_parameter=True, relative_step=False, warmup_init=False)
    for step in range(5):
        for pair in zip(mine, theirs, strict=True):
            grad = torch.randn_like(pair[0]) * 10**-step
            pair[0].grad, pair[1].grad = grad, grad.clone()
        for group in ours.param_groups:
            group["lr"] = 0.05
        ours.step()
        reference.step()
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)  # of 0.03 moved; measured 1.5e-8


@pytest.mark.parametrize("changes", [LORA, FULL], ids=["lora", "full"])
def test_the_score_at_the_end_is_that_of_the_best_evaluation_not_of_the_last(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    rate = {"train.learning_rate": 0.03, "train.steps": 8, "train.evaluate_every": 1}
    cfg = tiny.run_config(tmp_path, **{**changes, **rate})
    environment = dict(os.environ)
    (found,) = _run(cfg).adapters.values()
    assert dict(os.environ) == environment  # a LOCAL_RANK left behind makes accelerate look for a process group
    rows = [row for row in records.read(cfg.metrics_path) if isinstance(row, EvaluationRecord)]
    scores = [row.metrics["accuracy"] for row in rows[1:-1]]  # on the validation split, which is the reported one here
    assert len(scores) == 9
    assert found.after["accuracy"] == max(scores) > found.before["accuracy"]
    stopped = tiny.run_config(
        tmp_path, **{**changes, **rate, "train.early_stop": 1, "name": "short", "train.steps": 40}
    )
    (short,) = _run(stopped).adapters.values()
    assert short.steps < 40
    assert short.stopped == "early stop: 1 evaluation(s) in a row without a better accuracy"


def test_the_result_of_lora_is_a_peft_directory_with_the_same_logits(tmp_path: Path) -> None:
    from peft import PeftModel

    cfg = tiny.run_config(tmp_path, **{**LORA, "base.quantization": "none"})
    (found,) = _run(cfg).adapters.values()
    learner, items = _lora(cfg), _items(cfg)
    plain = AutoModelForCausalLM.from_pretrained(cfg.base.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, found.dir).eval()
    ids_NT, _ = _padded(items)
    with torch.no_grad():
        untuned = learner.base.model.eval()(ids_NT).logits
        content = training.checkpoint.read(cfg.checkpoints_dir / "step-4", _identity(cfg))
        learner.take_over_(*content[1:])
        learner.restore()
        tuned = learner.base.model(ids_NT).logits
        assert torch.equal(loaded(input_ids=ids_NT).logits, tuned)
    assert (tuned - untuned).abs().max() > 1e-3
    settings = json.loads((Path(found.dir) / "adapter_config.json").read_text())
    assert (settings["r"], settings["peft_type"], settings["base_model_name_or_path"]) == (4, "LORA", cfg.base.model)
    assert found.trainable_parameters == 3 * (4 * (64 + 64) + 4 * (64 + 32))  # query and value of three layers


def _identity(cfg: RunConfig) -> training.Identity:
    state = json.loads((cfg.checkpoints_dir / "step-4" / "state.json").read_text())
    return training.Identity(state["base_digest"], configio.fingerprint(cfg), 1, 1, {})


def test_the_result_of_full_finetuning_is_a_base_for_other_runs(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **FULL)
    (found,) = _run(cfg).adapters.values()
    again = tiny.run_config(tmp_path, **{"base.model": found.dir, "base.quantization": "none", "name": "again"})
    (prompt,) = _run(again).adapters.values()
    assert prompt.before == found.after != found.before
    assert found.trainable_parameters == facts.load(Path(cfg.base.model)).num_parameters


def test_a_lora_run_that_was_stopped_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int) -> None:
        if step == 4:
            raise Stopped

    torch.set_num_threads(1)
    changes = {**LORA, "train.steps": 8, "train.evaluate_every": 3, "train.schedule": "linear"}
    whole, parts = (tiny.run_config(tmp_path, **{**changes, "name": name}) for name in ("whole", "parts"))
    _run(whole)
    parts.run_dir.mkdir(parents=True)
    with pytest.raises(Stopped):
        baselines.main(parts, stop)
    _run(parts)
    for which in ("best", "last"):
        files = [cfg.run_dir / "lora" / which / "adapter_model.safetensors" for cfg in (whole, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert [row.adapters for row in _steps(whole)] == [row.adapters for row in _steps(parts)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (FULL, "full fine-tuning keeps its best weights in full_finetuning/best, and no optimizer state"),
        (FEW, "prompt design trains nothing, so there is nothing to go on from"),
    ],
    ids=["full", "few_shot"],
)
def test_what_keeps_no_checkpoint_is_not_resumed(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    cfg = tiny.run_config(tmp_path, **changes)
    driver.run(cfg, show=False)
    with pytest.raises(CheckpointError, match=reason):
        driver.run(cfg, resume=True, show=False)


@pytest.mark.parametrize("changes", [FULL, FEW], ids=["full", "few_shot"])
def test_what_keeps_no_checkpoint_is_finished_by_beginning_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    cfg = tiny.run_config(tmp_path, **changes)
    whole = driver.run(cfg, show=False)
    cfg.summary_path.unlink()  # as where the machine was taken away before the end
    further = _steps(cfg)[-1].model_copy(update={"step": 99}) if cfg.method == "full_finetuning" else None
    if further is not None:  # an attempt on other workers, which stopped later
        records.append(cfg.metrics_path, further)
    again = driver.finished(cfg)
    assert [one.steps for one in again.adapters.values()] == [one.steps for one in whole.adapters.values()]
    assert again.steps == whole.steps
    assert not list(cfg.run_dir.rglob("best-before"))
    assert {name: one.after for name, one in again.adapters.items()} == {n: o.after for n, o in whole.adapters.items()}
    assert driver.finished(cfg) == again


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({"train.steps": 40, "train.max_nonfinite_steps": 3}, {"lora": 3, "full_finetuning": 3}),
        # Full fine-tuning has taken one step by then.
        ({"train.steps": 4, "train.max_nonfinite_steps": 10}, {"lora": 4, "full_finetuning": 3}),
        (
            {"train.steps": 40, "train.max_nonfinite_steps": 3, "train.evaluate_every": 1, "train.early_stop": 2},
            {"lora": 3, "full_finetuning": 3},
        ),
    ],
    ids=["midway", "at its end", "before an early stop"],
)
@pytest.mark.parametrize(("changes", "kept"), [(LORA, "lora"), (FULL, "full_finetuning")], ids=["lora", "full"])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(
    tmp_path: Path, changes: dict[str, Any], kept: str, more: dict[str, Any], rows: dict[str, int]
) -> None:
    cfg = tiny.run_config(tmp_path, **{**changes, "train.learning_rate": 1e30, **more})
    with pytest.raises(
        TrainingError, match=f"{kept}: the loss or gradient was not finite in {rows[kept]} steps in a row"
    ):
        driver.run(cfg, show=False)
    assert [row.skipped for row in _steps(cfg)][-3:] == [True] * 3
    if kept == "full_finetuning":
        best = AutoModelForCausalLM.from_pretrained(cfg.run_dir / kept / "best")
        assert all(parameter.isfinite().all() for parameter in best.parameters())


@pytest.mark.parametrize(("section", "is_told"), [({}, True), ({"train": {"learning_rate": 0.01}}, False)])
def test_a_baseline_says_when_it_takes_the_rate_of_prompts(
    tmp_path: Path, section: dict[str, Any], is_told: bool
) -> None:
    cfg = tiny.run_config(tmp_path, **{**LORA, "lora": {**LORA["lora"], **section}, "train.steps": 1})
    _run(cfg)
    notes = [row.text for row in records.read(cfg.metrics_path) if isinstance(row, records.NoteRecord)]
    told = f"trains with the run's learning_rate={cfg.train.learning_rate:g}, as no other is given in lora.train"
    assert any(note.startswith(told) for note in notes) is is_told


_LEARNS = {"train.learning_rate": 0.03, "train.steps": 20, "train.evaluate_every": 20}


@pytest.mark.parametrize("changes", [{**LORA, **_LEARNS}, FULL], ids=["lora", "full"])
def test_evaluate_scores_the_state_that_a_baseline_s_run_made(tmp_path: Path, changes: dict[str, Any]) -> None:
    cfg = tiny.run_config(tmp_path, **changes)
    (made,) = driver.run(cfg, show=False).adapters.values()
    done = commands.run("evaluate", tmp_path / "run.json", "--split", "validation", "--json")
    assert done.code == 0, done.err
    ((place, scored),) = json.loads(done.out)["adapters"].items()
    assert (place, scored["metrics"]) == (made.dir, made.after)
    assert made.after != made.before


def test_a_baseline_has_one_state_and_none_before_it_is_trained(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **LORA)
    with pytest.raises(AdapterError, match=r"runs/tiny/lora/best: no such state of method=lora. Train the run first"):
        selection.adapter_dirs(cfg, None)
    with pytest.raises(ConfigError, match="--adapter: method=lora is scored one state at a time, got 2"):
        selection.adapter_dirs(cfg, [tmp_path, tmp_path])
    with pytest.raises(ModelError, match=rf"{tmp_path}: no state of method=lora is there. Train the run first"):
        use.evaluated(cfg, tmp_path, [cfg.task], "validation")
    with pytest.raises(ConfigError, match="method: 'few_shot' trains nothing that could be used again; `peftscale tra"):
        selection.adapter_dirs(tiny.run_config(tmp_path, **FEW), None)


def test_peft_is_asked_for_by_name_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r"method='lora' needs PEFT, which is not installed .* 'peftscale\[baselines\]'"
    ):
        _lora(tiny.run_config(tmp_path, **LORA))


def test_linears_that_are_not_there_are_refused(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **{**LORA, "lora": {"rank": 2, "alpha": 2, "target_modules": ["c_attn"]}})
    with pytest.raises(ConfigError, match=r"lora.target_modules=\('c_attn',\): Target modules .*c_attn.* not found"):
        _lora(cfg)


def test_a_base_that_transformers_quantises_otherwise_is_refused(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", tiny.T5), **LORA)
    with pytest.raises(ModelError, match=r"leaves 5 linears dense .*\.wo, so it would be another base\. Set base"):
        model.load(cfg.base, CPU)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"method": "full_finetuning"},
            "method: 'full_finetuning' trains the weights, so base.quantization must be 'none'",
        ),
        ({**LORA, "base.quantization": "int8"}, "method: 'lora' takes base.quantization 'nf4' or 'none', got 'int8'"),
        ({"method": "lora"}, r"lora: missing; method='lora' needs it, for example \{rank: 8, alpha: 16\}"),
        ({"method": "few_shot"}, "few_shot: missing; method='few_shot' needs it"),
        ({"method": "lorra"}, "method: must be .*'lora'.*, got 'lorra'; did you mean 'lora'"),
        (
            {**LORA, "lora": {"rank": 4, "alpha": 8, "train": {"warmup_steps": 9}}},
            "lora: train.warmup_steps=9 must be less than steps=4",
        ),
        (
            {"method": "few_shot", "few_shot": {"examples": 1, "calibrated": True}, "task.labels": None}
            | {"task.metrics": ["exact_match"]},
            "few_shot: calibrated compares the likelihoods of task.labels",
        ),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_run_file(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny.run_config(tmp_path, **changes)


def test_a_run_that_does_not_fit_is_refused_before_the_base_is_read(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **FULL)
    llama = Path(__file__).parents[2] / "configs" / "models" / "llama-3.1-405b"  # a config.json and no weights
    large = cfg.model_copy(update={"base": cfg.base.model_copy(update={"model": str(llama)})})
    with pytest.raises(ConfigError, match=r"method=full_finetuning: a rank needs .* TB and may fill .* more workers"):
        budget.of_training(large, CPU, world=1)
