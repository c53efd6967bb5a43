"""The recipes of configs/recipes: each is a whole run file, holds the paper's values, and trains."""

import json
from pathlib import Path

import commands
import pytest

from peftscale import configio

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PAPERS = {
    "lester2021": {
        "length": 100,
        "init": "labels",
        "init_top": 5000,
        "optimizer": "adafactor",
        "learning_rate": 0.3,
        "weight_decay": 1e-5,
        "steps": 30_000,
        "examples_per_step": 32,
        "schedule": "constant",
        "early_stop": 10,
        "metrics": ("mean", "accuracy", "macro_f1"),
    },
    "liliang2021": {
        "kind": "prefix",
        "length": 10,
        "reparam": "mlp",
        "reparam_hidden_size": 512,
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "schedule": "linear",
        "steps": 1216,
        "examples_per_step": 5,
    },
    "residual": {
        "length": 10,
        "init": "vocabulary",
        "reparam": "residual",
        "reparam_hidden_size": 800,
        "optimizer": "adamw",
        "learning_rate": 0.3,
        "network_learning_rate": None,
        "weight_decay": 1e-5,
        "steps": 1520,
        "examples_per_step": 8,
        "schedule": "constant",
    },
}
"""Read in the papers and in their code, not in the recipes."""


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_recipe_has_the_values_of_its_paper(name: str) -> None:
    cfg = configio.load(RECIPES / f"{name}.yaml")
    (adapter,) = cfg.adapters.values()
    values = {**dict(cfg.train), **dict(adapter), "metrics": cfg.task.metrics}
    assert {key: values[key] for key in PAPERS[name]} == PAPERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    few = ["train.steps=2", "train.warmup_steps=0", "train.evaluate_every=2", f"cluster.storage={tmp_path}"]
    done = commands.run("train", RECIPES / f"{name}.yaml", *few, "--json")
    assert done.code == 0, done.err
    (adapter,) = json.loads(done.out)["adapters"].values()
    assert adapter["steps"] == 2 and adapter["train_loss"] > 0
