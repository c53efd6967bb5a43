"""Quality on real tasks: prompts beside the untuned base, few-shot, prefix, LoRA and full fine-tuning, with seeds.

    python tests/bench/bench_quality.py STUDY --data DIR --bases DIR --out DIR --base 5m --task sst2 [key=value ...]

Studies: `methods` (all of them), `fine-tuning` (that of all weights alone), `spread` (20 seeds of the recipe and of
plain prompt tuning), `means` (these, and plain with one means against instability each), `starts` (lengths and
initialisations), `tries` (other rates and starts, a network, and four times the steps, beside the recipe), `transfer`
(train on one task, score on others), `ensemble` (five seeds together). --base and --task may be repeated.

A run is configs/recipes/default.yaml with another base and task, and what the study varies; what baselines do otherwise
is said below, and of their rates the validation split chooses one for each base and task, with one seed. Runs are kept
in --out and not repeated; one that was cut short is gone on with. key=value changes all of them. Data and bases are not
part of the project: `real_tasks` says which files it reads. Prints Markdown rows: mean and standard deviation over
seeds on the test split, and the 95% interval of the mean; appends a BenchRecord a row to OUT/bench.jsonl.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import real_tasks
import typer
import yaml
from scipy import stats

from peftscale import configio, driver, records, selection
from peftscale.analysis import transfer as transfer_study
from peftscale.config import RunConfig
from peftscale.data.metrics import share_interval

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "recipes" / "default.yaml"
SEEDS = [0, 1, 2]
LENGTHS = [1, 5, 20, 100, 150]

Section = dict[str, Any]


class Study:
    """Where data, bases and runs are, and how a run file of a study is made."""

    def __init__(self, data: Path, bases: Path, out: Path, changes: list[str]) -> None:
        self.data, self.bases, self.out, self.changes = data.resolve(), bases.resolve(), out.resolve(), changes
        self.recipe: Section = yaml.safe_load(RECIPE.read_text())
        (self._prompt,) = self.recipe["adapters"].values()

    def config(self, name: str, base: str, task: str, /, **sections: Any) -> RunConfig:
        """The recipe's run file with these sections in place of its own."""
        content = self.recipe | {
            "name": f"{name}.{base}.{task}",
            "base": self.base(base, "bfloat16"),
            "task": real_tasks.task(self.data, task, self.out / "data"),
            "cluster": {"workers": 0, "storage": str(self.out / "runs")},
        }
        path = self.out / "run-files" / f"{content['name']}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | sections))  # JSON is YAML
        return configio.load(path, self.changes)

    def prompt(self, task: str, **changes: Any) -> Section:
        """The recipe's prompt with the label words of a task."""
        return self._prompt | {"init_labels": list(real_tasks.SETTINGS[task]["labels"].values())} | changes

    def base(self, name: str, compute_dtype: str) -> Section:
        """The `base` section."""
        known = {"quantization": "none", "sharding": "replicated", "checkpoint_activations": False}
        return {"model": str(self.bases / name), "compute_dtype": compute_dtype} | known

    def baseline(
        self,
        method: str,
        base: str,
        task: str,
        *,
        rate: float | None,
        seed: int | None = None,
        longer: Section | None = None,
    ) -> RunConfig:
        """A baseline's run. In float32: padded attention in bfloat16 takes several times as long on a CPU."""
        section, _ = BASELINES[method]
        train = ADAMW if rate is None else ADAMW | {"learning_rate": rate}
        named = method if rate is None else f"{method}-{rate:g}"
        if longer:
            named, section = f"{named}-longer", section | {"train": longer}
        sections = {
            "seed": seed or 0,
            "base": self.base(base, "float32"),
            "method": method,
            method: section,
            "adapters": {"unused": {"kind": "prompt", "length": 1, "init": "random"}},
            "train": self.recipe["train"] | train,
        }
        # With a seed, the name that `transfer` gives it: methods and transfer share their runs.
        cfg = self.config(named, base, task, **sections)
        return cfg if seed is None else cfg.model_copy(update={"name": f"{cfg.name}-s{seed}"})

    def best_rate(self, method: str, base: str, task: str) -> float | None:
        """The rate of a baseline that the validation split prefers, with the first seed. None where it has none."""
        tried = {}
        for rate in BASELINES[method][1]:
            cfg = self.baseline(method, base, task, rate=rate, seed=SEEDS[0])
            driver.finished(cfg)
            rows = [row for row in records.read(cfg.metrics_path) if isinstance(row, records.EvaluationRecord)]
            rows = [row for row in rows if row.split == "validation"]
            begun = max(i for i, row in enumerate(rows) if row.step == 0)  # an attempt that was cut stands before it
            tried[rate] = max(row.metrics[cfg.task.metrics[0]] for row in rows[begun:])
        if tried:
            line(f"{base} {task}", f"{method}, rates on validation", json.dumps(tried), "", 1, "")
        return max(tried, key=tried.__getitem__, default=None)

    def row(self, name: str, what: str, values: list[float], *, seconds: float, cfg: RunConfig) -> None:
        """Print and record the figures of one setting; `cfg` is of its run, or of the first of them."""
        band = transfer_study.band(values)
        interval = "" if band["low"] is None else f"{band['low']:.3f}..{band['high']:.3f}"
        spread = "" if band["deviation"] is None else f" +- {band['deviation']:.3f}"
        line(name, what, f"{band['mean']:.3f}{spread}", interval, len(values), f"{seconds:.0f}")
        measured = {key: value for key, value in band.items() if value is not None}
        self.record(name, what, measured | {"num_seeds": len(values), "seconds": seconds}, cfg)

    def gap_row(self, name: str, what: str, zero: float, tuned: list[float], full: list[float]) -> None:
        """Print and record which part of full fine-tuning's gain a method has."""
        share, low, high = gap(zero, tuned, full)
        line(name, f"{what}: gap closed", f"{share:.2f}", f"{low:.2f}..{high:.2f} (delta method)", len(tuned), "")
        self.record(name, f"{what} gap closed", {"mean": share, "low": low, "high": high})

    def record(self, name: str, what: str, measured: dict[str, float], cfg: RunConfig | None = None) -> None:
        """Append a BenchRecord. What is made of several runs has no fingerprint."""
        record = records.BenchRecord(
            name=f"quality {name} {what}",
            config_fingerprint=cfg and configio.fingerprint(cfg),
            measured=measured,
            environment=records.environment(),
        )
        records.append(self.out / "bench.jsonl", record)


def line(*cells: object) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def after(cfg: RunConfig) -> tuple[dict[str, float], float]:
    """First metric on the test split of every adapter, or of the one baseline, and the seconds of the whole run."""
    summary = driver.finished(cfg)
    metric = cfg.task.metrics[0]
    return {name: adapter.after[metric] for name, adapter in summary.adapters.items()}, summary.seconds


def untuned(cfg: RunConfig) -> float:
    """First metric of the base alone."""
    return next(iter(driver.finished(cfg).adapters.values())).before[cfg.task.metrics[0]]


def by_setting(found: dict[str, float]) -> Iterator[tuple[str, list[float]]]:
    """Values of a cohort whose names end in a seed, as `p20-s0`, by what is in front of it."""
    for setting in dict.fromkeys(name.rsplit("-s", 1)[0] for name in found):
        yield setting, [value for name, value in found.items() if name.rsplit("-s", 1)[0] == setting]


def cohort(num_seeds: int = len(SEEDS), /, **settings: Section) -> dict[str, Section]:
    """Adapters of all settings and seeds."""
    return {
        f"{name}-s{seed}": setting | {"seed": seed} for name, setting in settings.items() for seed in range(num_seeds)
    }


def methods(study: Study, base: str, task: str) -> None:
    """Everything on one base and task, and which part of full fine-tuning's gain each prompt has."""
    prefix = {"kind": "prefix", "length": 20, "init": "text", "init_text": TEXT, "train": {"learning_rate": 0.1}}
    adapters = cohort(prompt20=study.prompt(task, length=20), prompt100=study.prompt(task, length=100), prefix20=prefix)
    cfg = study.config("methods", base, task, adapters=adapters)
    found, seconds = after(cfg)
    where = f"{base} {task}"
    zero = untuned(cfg)
    of_texts = ""
    if cfg.task.metrics[0] == "accuracy":  # an F1 is no share of the texts
        low, high = share_interval(zero, _num_test(cfg))
        of_texts = f"{low:.3f}..{high:.3f} (of the texts)"
    line(where, "untuned", f"{zero:.3f}", of_texts, "", "")
    scores = dict(by_setting(found))
    for setting, values in scores.items():
        study.row(where, setting, values, seconds=seconds / len(scores), cfg=cfg)
    for method in BASELINES:
        rate = study.best_rate(method, base, task)
        scores[method] = _of_baseline(study, method, base, task, rate=rate)
    for setting in ("prompt20", "prompt100", "prefix20", "lora"):
        study.gap_row(where, setting, zero, scores[setting], scores["full_finetuning"])


def fine_tuning(study: Study, base: str, task: str) -> None:
    """Full fine-tuning alone."""
    _of_baseline(study, "full_finetuning", base, task, rate=study.best_rate("full_finetuning", base, task))


def _of_baseline(
    study: Study, method: str, base: str, task: str, *, rate: float | None, longer: Section | None = None
) -> list[float]:
    values, total = [], 0.0
    runs = [study.baseline(method, base, task, rate=rate, seed=seed, longer=longer) for seed in SEEDS]
    for cfg in runs:
        of_seed, took = after(cfg)
        values += of_seed.values()
        total += took
    study.row(f"{base} {task}", f"{method}, longer" if longer else method, values, seconds=total, cfg=runs[0])
    return values


def gap(zero: float, tuned: list[float], full: list[float]) -> tuple[float, float, float]:
    """Mean gain over the untuned base in units of full fine-tuning's, and its 95% interval.

    The untuned base has the compute dtype of the prompts' run, which is bfloat16 unless it is changed.

    The interval counts the seeds of both sides: the delta method for a ratio, degrees of freedom after Welch and
    Satterthwaite. The untuned score has no seed.
    """
    gain, of_full = statistics.fmean(tuned) - zero, statistics.fmean(full) - zero
    parts = [
        statistics.variance(tuned) / len(tuned) / of_full**2,
        statistics.variance(full) / len(full) * gain**2 / of_full**4,
    ]
    total = max(sum(parts), 1e-12)
    freedom = total**2 / max(parts[0] ** 2 / (len(tuned) - 1) + parts[1] ** 2 / (len(full) - 1), 1e-24)
    half = float(stats.t.ppf(0.975, freedom)) * total**0.5
    return gain / of_full, gain / of_full - half, gain / of_full + half


def _num_test(cfg: RunConfig) -> int:
    assert cfg.task.files is not None and cfg.task.files.test is not None
    return len(cfg.task.files.test.read_text().splitlines())


def spread(study: Study, base: str, task: str) -> None:
    """20 seeds of the recipe and of plain prompt tuning."""
    compared = ("plain", "labels-start", "recipe")
    _spread(study, base, task, "spread", {name: means_settings(study, task)[name] for name in compared})


def means(study: Study, base: str, task: str) -> None:
    """20 seeds of the recipe, of plain prompt tuning, and of plain with one means against instability each."""
    _spread(study, base, task, "means", means_settings(study, task))


def _spread(study: Study, base: str, task: str, name: str, settings: dict[str, Section]) -> None:
    cfg = study.config(name, base, task, adapters=cohort(20, **settings))
    found, seconds = after(cfg)
    scores = dict(by_setting(found))
    for setting, values in scores.items():
        study.row(f"{base} {task}", setting, values, seconds=seconds / len(scores), cfg=cfg)
        for beside in {"plain", "labels-start"} & scores.keys() - {setting}:
            ratio = statistics.stdev(values) / max(statistics.stdev(scores[beside]), LEAST_DEVIATION)
            low, high = ratio_interval(values, scores[beside])
            interval = f"{low:.2f}..{high:.2f} (bootstrap)"
            line(f"{base} {task}", f"deviation {setting} / {beside}", f"{ratio:.2f}", interval, "", "")
            study.record(
                f"{base} {task}", f"deviation {setting} / {beside}", {"ratio": ratio, "low": low, "high": high}
            )


def ratio_interval(values: list[float], beside: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of two standard deviations."""

    def ratio(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.std(one, axis=axis, ddof=1) / np.maximum(np.std(other, axis=axis, ddof=1), LEAST_DEVIATION)

    draw = np.random.default_rng(0)
    found = stats.bootstrap((values, beside), ratio, n_resamples=9999, method="percentile", rng=draw)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def starts(study: Study, base: str, task: str) -> None:
    """Lengths at a start from the vocabulary, which a length of 1 can have too, and other starts at a length of 20: one
    cohort."""
    bare = {key: value for key, value in study.prompt(task, length=20).items() if not key.startswith("init")}
    settings = {f"length{n}": bare | {"length": n, "init": "vocabulary"} for n in LENGTHS}
    others: dict[str, Section] = {"random": {}, "scaled": {}, "text": {"init_text": TEXT}}
    settings |= {f"start-{init}": bare | {"init": init} | own for init, own in others.items()}
    settings["start-labels"] = study.prompt(task, length=20)
    cfg = study.config("starts", base, task, adapters=cohort(**settings))
    found, seconds = after(cfg)
    for setting, values in by_setting(found):
        study.row(f"{base} {task}", setting, values, seconds=seconds / len(settings), cfg=cfg)


def tries(study: Study, base: str, task: str) -> None:
    """Rates, starts, a network and more steps beside the recipe: which part of full fine-tuning's gain each closes.

    Full fine-tuning is taken at the number of steps of these two whose mean is higher on the test split, so that the
    parts are rather too small than too large.
    """
    prompt = study.prompt(task, length=20)
    train = study.config("tries", base, task, adapters={"recipe": prompt}).train
    longer = {"steps": MORE_STEPS * train.steps, "warmup_steps": MORE_STEPS * train.warmup_steps}
    bare = {key: value for key, value in prompt.items() if not key.startswith("init")}
    residual = {"reparam": "residual", "reparam_hidden_size": 64}
    settings = {
        "recipe": prompt,
        "rate-low": prompt | {"train": {"learning_rate": 0.1}},
        "rate-high": prompt | {"train": {"learning_rate": 1.0}},
        "start-random": bare | {"init": "random"},
        "start-vocabulary": bare | {"init": "vocabulary"},
        "residual": prompt | residual | {"train": {"network_learning_rate": 0.01}},
        "longer": prompt | {"train": longer},
        "longer-100": prompt | {"length": 100, "train": longer},
    }
    cfg = study.config("tries", base, task, adapters=cohort(**settings))
    found, seconds = after(cfg)
    rate = study.best_rate("full_finetuning", base, task)
    both = [_of_baseline(study, "full_finetuning", base, task, rate=rate, longer=more) for more in (None, longer)]
    zero, full = untuned(cfg), max(both, key=statistics.fmean)
    for setting, values in by_setting(found):
        study.row(f"{base} {task}", setting, values, seconds=seconds / len(settings), cfg=cfg)
        study.gap_row(f"{base} {task}", setting, zero, values, full)


def transfer(study: Study, base: str, task: str) -> None:
    """Prompt, LoRA and full fine-tuning trained on `task`, scored on the tasks of SHIFTS."""
    prompt = {"prompt20": study.prompt(task, length=20)}
    runs = [study.config("shift-prompt", base, task, adapters=prompt)]
    for method in ("lora", "full_finetuning"):
        runs.append(study.baseline(method, base, task, rate=study.best_rate(method, base, task)))
    targets = [study.config("shift-prompt", base, target, adapters=prompt).task for target in SHIFTS[task]]
    found = transfer_study.members(runs, SEEDS)
    result = transfer_study.study(found, targets, "test", train=driver.finished, score=driver.evaluate)
    by_name = {run.name: run for run in runs}
    for method, of_method in result["methods"].items():
        run = by_name[method]
        title = "prompt20" if run.method == "adapters" else run.method
        for name, on in of_method["tasks"].items():
            study.row(f"{base} {task} -> {name}", title, on["values"], seconds=0, cfg=run)
            if on["shift"]:
                mean, deviation, low, high = (on["shift"][key] for key in ("mean", "deviation", "low", "high"))
                line(
                    "", "difference to its own task", f"{mean:.3f} +- {deviation:.3f}", f"{low:.3f}..{high:.3f}", "", ""
                )


def ensemble(study: Study, base: str, task: str) -> None:
    """Five seeds of one prompt: average, best, and both ensembles."""
    adapters = cohort(5, prompt20=study.prompt(task, length=20))
    cfg = study.config("ensemble", base, task, adapters=adapters)
    found, seconds = after(cfg)
    places = selection.adapter_dirs(cfg, None)
    result = driver.evaluate(cfg, places, [cfg.task], "test", together={task: range(len(places))})
    print(json.dumps({key: value for key, value in result["tasks"][task].items() if key != "adapters"}))
    study.row(f"{base} {task}", "average", list(found.values()), seconds=seconds, cfg=cfg)


TEXT = "Read the text and say in one word what it is about and whether the writer thinks that it is good or bad."
ADAMW: Section = {"optimizer": "adamw", "clip_norm": 1.0}
BASELINES: dict[str, tuple[Section, list[float]]] = {
    "few_shot": ({"examples": 8, "calibrated": True}, []),
    "lora": ({"rank": 8, "alpha": 16}, [3e-3, 1e-2, 3e-2]),
    "full_finetuning": ({}, [3e-4, 1e-3, 3e-3, 1e-2]),
}
"""What each method does, and the rates of AdamW among which it is searched."""
LEAST_DEVIATION = 1e-9
"""Seeds that all end alike, as when each of them answers with one label."""
MORE_STEPS = 4
"""Of `tries`: so many times the steps of the others."""
SHIFTS = {"sst2": ["imdb"], "movies": ["products"]}


def means_settings(study: Study, task: str) -> dict[str, Section]:
    """Plain is random rows, a constant rate, and likelihood among the whole vocabulary. `labels-start` is the same from
    label words: the paper's own prompt tuning."""
    prompt = study.prompt(task, length=20)
    train = {"schedule": "constant", "warmup_steps": 0, "loss": "vocabulary"}
    plain = {"kind": "prompt", "length": 20, "init": "random", "train": train}
    network = {"reparam": "residual", "reparam_hidden_size": 64}
    return {
        "plain": plain,
        "recipe": prompt,
        "scaled-start": plain | {"init": "scaled"},
        "labels-start": prompt | {"train": train},
        "warm-up": plain | {"train": train | {"warmup_steps": study.recipe["train"]["warmup_steps"]}},
        "linear": plain | {"train": train | {"schedule": "linear"}},
        "clipping": plain | {"train": train | {"clip_norm": 1.0}},
        "labels-loss": plain | {"train": train | {"loss": "labels"}},
        "residual": plain | network,
        "residual-two-rates": plain | network | {"train": train | {"network_learning_rate": 0.01}},
    }


STUDIES: dict[str, Callable[[Study, str, str], None]] = {
    "methods": methods,
    "fine-tuning": fine_tuning,
    "spread": spread,
    "means": means,
    "starts": starts,
    "tries": tries,
    "transfer": transfer,
    "ensemble": ensemble,
}


def main(
    name: str,
    changes: Annotated[list[str] | None, typer.Argument()] = None,
    *,
    data: Annotated[Path, typer.Option(help="Data sets, as `real_tasks` reads them.")],
    bases: Annotated[Path, typer.Option(help="Directories of bases.")],
    out: Annotated[Path, typer.Option(help="Runs and records.")],
    base: Annotated[list[str], typer.Option(help="Names under --bases.")],
    task: Annotated[list[str], typer.Option(help="Names in `real_tasks.SETTINGS`.")],
) -> None:
    """Run a study on every base and task."""
    study = Study(data, bases, out, changes or [])
    print("| | | test | 95% interval | seeds | seconds |\n|---|---|---|---|---|---|")
    for one in base:
        for of in task:
            STUDIES[name](study, one, of)


if __name__ == "__main__":
    typer.run(main)
