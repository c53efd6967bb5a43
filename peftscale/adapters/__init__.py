"""Adapters: what is trained. `build` makes the cohort of a run; see the modules for the parts.

Shapes:  P virtual tokens   H hidden size
"""

from torch import Tensor

from peftscale.adapters import initialisation
from peftscale.adapters.cohort import Cohort
from peftscale.adapters.initialisation import EmbeddingSource
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.config import RunConfig, SoftPromptConfig

__all__ = ["Cohort", "EmbeddingSource", "SoftPrompt", "build"]


def build(cfg: RunConfig, base: EmbeddingSource) -> Cohort:
    """Make the run's adapters at their starting values, in the order of the run file.

    A collective when the base is sharded: every rank calls it with the same run file, and gets the same rows, on
    its device.

    Raises:
        AdapterError: an adapter cannot start as asked for; the message names its key.
    """
    rows = {
        name: _starting_rows(adapter, base, seed=cfg.adapter_seed(name), where=f"adapters.{name}")
        for name, adapter in cfg.adapters.items()
    }
    return Cohort({name: SoftPrompt(rows_PH.to(base.device)) for name, rows_PH in rows.items()})


def _starting_rows(cfg: SoftPromptConfig, base: EmbeddingSource, *, seed: int, where: str) -> Tensor:
    """(P, H) float32."""
    match cfg.init:
        case "random":
            return initialisation.random_rows(cfg.length, base.hidden_size, seed=seed)
        case "vocabulary":
            groups = initialisation.vocabulary_groups(cfg.length, base, top=cfg.init_top, seed=seed, where=where)
        case "text":
            groups = initialisation.text_groups(cfg.length, base, text=cfg.init_text or "", where=where)
        case "labels":
            groups = initialisation.label_groups(
                cfg.length, base, labels=cfg.init_labels, top=cfg.init_top, seed=seed, where=where
            )
    return initialisation.embedded(groups, base)
