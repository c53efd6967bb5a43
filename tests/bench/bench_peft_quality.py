"""Accuracy of our recipe beside PEFT's own prompt tuning: same base, examples, order and number of steps, ten seeds.

    python tests/bench/bench_peft_quality.py --data DIR --bases DIR --out DIR [--base 1m] [--task sst2]

PEFT's side is transformers, PEFT and torch alone: a padded batch, PEFT's PromptEmbedding, torch's AdamW or
transformers' Adafactor, a linear schedule without warm-up, the loss in the whole vocabulary. Its default is
PromptTuningConfig's, random rows, with AdamW at 0.03 as in PEFT's guide; its best is what the validation split prefers
among SEARCH, with one seed: three starts (random, sampled words, the label words as a text) and five optimizers. Ours
is configs/recipes/default.yaml as it is, with its loss among the labels and its warm-up; nothing is searched here, but
the recipe was found on SST-2. A third side is ours with the loss in the vocabulary, so that what the loss does is told
from the rest. All sides give their last state, and saved prompts are scored by the same evaluation on the test split.
Prints a row a side and the 95% interval of the difference of means (Welch).
"""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_quality import Study, after, by_setting, cohort, line
from peft import PromptTuningConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.optimization import Adafactor

from peftscale import configio, driver
from peftscale.config import RunConfig
from peftscale.data import batches, tasks
from peftscale.data.tasks import Example, TaskData

NUM_SEEDS = 10
DEFAULT = ("RANDOM", "adamw", 0.03)
SEARCH = [
    (init, optimizer, rate)
    for init in ("RANDOM", "SAMPLE_VOCAB", "TEXT")
    for optimizer, rate in (("adamw", 0.003), ("adamw", 0.03), ("adamw", 0.3), ("adafactor", 0.1), ("adafactor", 0.3))
]

Setting = tuple[str, str, float]


def train(cfg: RunConfig, data: TaskData, setting: Setting, *, seed: int, directory: Path) -> Path:
    """Train one prompt with PEFT and save it, unless it is there. Its directory is one of the run file's settings."""
    init, optimizer_name, rate = setting
    place = directory / f"{init}-{optimizer_name}-{rate}-s{seed}"
    if (place / "adapter_model.safetensors").exists():
        return place
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(cfg.base.model, dtype=torch.float32)
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=20,
        prompt_tuning_init=init,
        # PEFT repeats it to the length of the prompt.
        prompt_tuning_init_text="".join(cfg.task.labels.values()) if init == "TEXT" else None,
        tokenizer_name_or_path=cfg.base.model,
    )
    model = get_peft_model(base, prompt)
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = cfg.train.steps
    if optimizer_name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(rows, lr=rate, weight_decay=0.0)
    else:
        optimizer = Adafactor(rows, lr=rate, scale_parameter=False, relative_step=False, warmup_init=False)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    cursor, examples = batches.Cursor(seed), data.split("train")
    model.train()
    for _ in range(steps):
        indices, cursor = cursor.take(cfg.train.examples_per_step, num_examples=len(examples))
        model(**padded([examples[i] for i in indices])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    return place


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Right-padded inputs with their targets, of which alone the loss is taken."""
    longest = max(len(one.input_ids) + len(one.target_ids) for one in examples)
    made: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for one in examples:
        ids, rest = [*one.input_ids, *one.target_ids], longest - len(one.input_ids) - len(one.target_ids)
        made["input_ids"].append(ids + [0] * rest)
        made["attention_mask"].append([1] * len(ids) + [0] * rest)
        made["labels"].append([-100] * len(one.input_ids) + list(one.target_ids) + [-100] * rest)
    return {name: torch.tensor(value) for name, value in made.items()}


def score(cfg: RunConfig, places: list[Path], split: str) -> list[float]:
    """First metric of saved prompts."""
    found = driver.evaluate(cfg, places, [cfg.task], split)["tasks"][cfg.task.name]["adapters"]
    return [found[str(place)]["metrics"][cfg.task.metrics[0]] for place in places]


def main(
    changes: Annotated[list[str] | None, typer.Argument()] = None,
    *,
    data: Annotated[Path, typer.Option(help="Data sets, as `real_tasks` reads them.")],
    bases: Annotated[Path, typer.Option(help="Directories of bases.")],
    out: Annotated[Path, typer.Option(help="Runs and records.")],
    base: Annotated[str, typer.Option(help="Name under --bases.")] = "1m",
    task: Annotated[str, typer.Option(help="Name in `real_tasks.SETTINGS`.")] = "sst2",
) -> None:
    """Train both sides and compare."""
    study = Study(data, bases, out, ["base.compute_dtype=float32", *(changes or [])])
    prompt = study.prompt(task, length=20)
    adapters = cohort(NUM_SEEDS, ours=prompt, vocabulary=prompt | {"train": {"loss": "vocabulary"}})
    cfg = study.config("peft-ours", base, task, adapters=adapters)
    where = f"{base} {task}"
    texts = tasks.load(cfg.task, AutoTokenizer.from_pretrained(cfg.base.model), max_tokens=None)
    directory = study.out / "peft" / f"{base}.{task}.{configio.fingerprint(cfg)[:12]}"
    tried = [train(cfg, texts, setting, seed=0, directory=directory) for setting in SEARCH]
    on_validation = dict(zip(SEARCH, score(cfg, tried, "validation"), strict=True))
    print(json.dumps({" ".join(map(str, setting)): round(value, 4) for setting, value in on_validation.items()}))
    best = max(on_validation, key=on_validation.__getitem__)
    sides = {"PEFT, default": DEFAULT, f"PEFT, best: {' '.join(map(str, best))}": best}
    _, seconds = after(cfg)
    last = score(cfg, [cfg.adapters_dir / name / "last" for name in cfg.adapters], "test")
    own = dict(by_setting(dict(zip(cfg.adapters, last, strict=True))))
    for name, values in own.items():
        study.row(where, name, values, seconds=seconds / len(own), cfg=cfg)
    for name, setting in sides.items():
        started = time.perf_counter()
        places = [train(cfg, texts, setting, seed=seed, directory=directory) for seed in range(NUM_SEEDS)]
        theirs = score(cfg, places, "test")
        study.row(where, name, theirs, seconds=time.perf_counter() - started, cfg=cfg)
        for one, values in own.items():
            difference = stats.ttest_ind(values, theirs, equal_var=False).confidence_interval()
            line(where, f"{one} - {name}", "", f"{difference.low:.3f}..{difference.high:.3f} (Welch)", "", "")


if __name__ == "__main__":
    typer.run(main)
