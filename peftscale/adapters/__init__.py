"""Adapters: what is trained. `build` makes the cohort of a run; see the modules for the parts.

Shapes:  P virtual tokens   H hidden size   L layers   K key heads   D head size
"""

from torch import Tensor

from peftscale.adapters import initialisation
from peftscale.adapters.cohort import Adapter, Cohort, Folded, from_values
from peftscale.adapters.initialisation import EmbeddingSource
from peftscale.adapters.prefix import Prefix
from peftscale.adapters.reparam import ReparametrisedPrefix
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.base import exactness, prefixed
from peftscale.base.load import Base
from peftscale.config import PrefixConfig, RunConfig, SoftPromptConfig
from peftscale.errors import AdapterError

__all__ = [
    "Adapter",
    "Cohort",
    "EmbeddingSource",
    "Folded",
    "Prefix",
    "ReparametrisedPrefix",
    "SoftPrompt",
    "build",
    "from_values",
    "refuse_prefix_on",
]


def build(cfg: RunConfig, base: Base) -> Cohort:
    """Make the run's adapters at their starting values, in the order of the run file.

    A collective when the base is sharded: every rank calls it with the same run file, and gets the same rows, on
    its device.

    Raises:
        AdapterError: an adapter cannot start as asked for, or is a prefix and the base takes none; the message names
            its key.
    """
    made: dict[str, Adapter] = {}
    for name, adapter in cfg.adapters.items():
        seed, where = cfg.adapter_seed(name), f"adapters.{name}"
        if isinstance(adapter, PrefixConfig):
            made[name] = _starting_prefix(adapter, base, seed=seed, where=where)
        else:
            made[name] = SoftPrompt(_starting_rows(adapter, base, seed=seed, where=where))
    return Cohort({name: adapter.to(base.device) for name, adapter in made.items()})


def refuse_prefix_on(base: Base, where: str) -> None:
    """Refuse a prefix on a base that it cannot be exact on; `where` is what messages name.

    Raises:
        AdapterError: passes are padded, or the base's layers take no keys and values of one shape.
    """
    config = base.model.config
    if not base.is_packed:
        why = exactness.small_copy_differs(config) or "train.packing is off, or its weights were found inexact"
    else:
        why = exactness.prefix_differs(config, own_attention=base.own_attention) or ""
    if why:
        raise AdapterError(
            f"{where}: a prefix cannot be put into base {base.name}, because it takes keys and values through packed "
            f"passes only ({why}). Use kind: prompt, or a base for which packing is exact."
        )


def _starting_prefix(cfg: PrefixConfig, base: Base, *, seed: int, where: str) -> Prefix | ReparametrisedPrefix:
    refuse_prefix_on(base, where)
    shape = prefixed.shape_of(base.model.config)
    if cfg.reparam == "mlp":
        assert cfg.reparam_hidden_size is not None  # checked with the run file
        inputs_PE, inner, outer = initialisation.network(
            cfg.length,
            base.hidden_size,
            hidden=cfg.reparam_hidden_size,
            outputs=shape.width,
            seed=seed,
            is_zero=cfg.init == "zero",
        )
        return ReparametrisedPrefix(inputs_PE, inner, outer, shape=shape)
    match cfg.init:
        case "random":
            return Prefix(initialisation.random_keys_values(cfg.length, shape, seed=seed))
        case "zero":
            return Prefix(initialisation.random_keys_values(cfg.length, shape, seed=seed).zero_())
        case "text":
            groups = initialisation.text_groups(cfg.length, base, text=cfg.init_text or "", where=where)
            return Prefix(prefixed.activations(base, [token for group in groups for token in group]))


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
