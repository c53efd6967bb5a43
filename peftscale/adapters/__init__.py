"""Adapters: what is trained. `build` makes the cohort of a run; see the modules for the parts.

Shapes:  P virtual tokens   H hidden size   L layers   K key heads   D head size
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from peftscale.adapters import files, initialisation
from peftscale.adapters.cohort import Adapter, Cohort, Folded
from peftscale.adapters.initialisation import EmbeddingSource
from peftscale.adapters.prefix import Prefix
from peftscale.adapters.reparam import ReparametrisedPrefix, ResidualPrompt
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.base import exactness, prefixed, slots, slots_exactness
from peftscale.base.load import Base
from peftscale.config import AdapterConfig, PrefixConfig, RunConfig, SoftPromptConfig
from peftscale.errors import AdapterError

__all__ = [
    "Adapter",
    "Cohort",
    "EmbeddingSource",
    "Folded",
    "Prefix",
    "ReparametrisedPrefix",
    "ResidualPrompt",
    "SoftPrompt",
    "build",
    "build_cohort",
    "refuse_prefix_on",
    "starting_prompt",
]


def build(cfg: RunConfig, base: Base) -> Cohort:
    """Make the run's adapters: `build_cohort`."""
    return build_cohort(cfg.adapters, base, seed=cfg.seed)


def build_cohort(configs: Mapping[str, AdapterConfig], base: Base, *, seed: int) -> Cohort:
    """Make adapters at their starting values, in the order of `configs`.

    A collective when the base is sharded: every rank calls it with the same configs, and gets the same rows, on
    its device.

    Args:
        configs: of each adapter, by name.
        base: that they belong to.
        seed: of those that have none of their own.

    Raises:
        AdapterError: an adapter cannot start as asked for, or is a prefix and the base takes none; the message names
            its key.
    """
    made: dict[str, Adapter] = {}
    for name, adapter in configs.items():
        own_seed, where = adapter.seed_in(seed), f"adapters.{name}"
        if isinstance(adapter, SoftPromptConfig) and adapter.decoder_length and not base.is_encoder_decoder:
            raise AdapterError(
                f"{where}.decoder_length={adapter.decoder_length}: base {base.name} has no decoder beside an encoder, "
                f"so there is one input only. Leave decoder_length out."
            )
        source = _source(adapter, base, where=where) if adapter.init == "adapter" else None
        if isinstance(adapter, PrefixConfig):
            made[name] = _starting_prefix(adapter, base, source, seed=own_seed, where=where)
        else:
            made[name] = starting_prompt(adapter, base, source, seed=own_seed, where=where)
    return Cohort({name: adapter.to(base.device) for name, adapter in made.items()})


def refuse_prefix_on(base: Base, where: str) -> None:
    """Refuse a prefix on a base that it cannot be exact on, and make an encoder-decoder ready for one; `where` is what
    messages name.

    Raises:
        AdapterError: passes are padded, the base's layers take no keys and values of one shape, or an encoder-decoder
            is of an unknown family.
    """
    needs_packing = not base.is_encoder_decoder and not base.is_packed
    if base.why_no_prefix is None and not needs_packing:
        differs = slots_exactness.differs if base.is_encoder_decoder else exactness.prefix_differs
        base.why_no_prefix = differs(base.model.config, own_attention=base.own_attention) or ""
        if base.is_encoder_decoder and not base.why_no_prefix:
            slots.install(base.model)
    if why := base.why_padded if needs_packing else base.why_no_prefix:
        raise AdapterError(
            f"{where}: a prefix cannot be put into base {base.name}, because its keys and values would not be exact "
            f"there ({why}). Use kind: prompt, or another base."
        )


def _source(cfg: AdapterConfig, base: Base, *, where: str) -> Folded:
    """The adapter that another one starts from."""
    assert cfg.init_adapter is not None  # checked with the run file
    try:
        source, _ = files.load(
            cfg.init_adapter,
            base_digest=base.digest,
            hidden_size=base.hidden_size,
            prefix_shape=prefixed.shape_of(base.model.config),
        )
    except AdapterError as error:
        raise AdapterError(f"{where}.init_adapter: {error}") from error
    has_decoder = isinstance(cfg, SoftPromptConfig) and cfg.decoder_length > 0
    kinds_differ = isinstance(source, Prefix) != isinstance(cfg, PrefixConfig)
    if kinds_differ or (isinstance(source, SoftPrompt) and (source.decoder_length > 0) != has_decoder):
        wanted = f"a {cfg.kind}{' with rows for a decoder' if has_decoder else ''}"
        raise AdapterError(
            f"{where}.init_adapter={cfg.init_adapter} is {files.named(source)}, and {where} is {wanted}. "
            f"An adapter starts from one of its own kind."
        )
    return source


def _starting_prefix(
    cfg: PrefixConfig, base: Base, source: Folded | None, *, seed: int, where: str
) -> Prefix | ReparametrisedPrefix:
    refuse_prefix_on(base, where)
    shape = prefixed.shape_of(base.model.config)
    if cfg.reparam == "mlp":
        assert cfg.reparam_hidden_size is not None  # checked with the run file
        # One draw for all parts: with seed + part, one seed's decoder would begin as the next one's encoder.
        draw = torch.Generator().manual_seed(seed)
        networks = [
            initialisation.network(
                cfg.length,
                base.hidden_size,
                hidden=cfg.reparam_hidden_size,
                outputs=shape.width // shape.num_layers * num_layers,
                draw=draw,
                is_zero=cfg.init == "zero",
            )
            for num_layers in shape.parts or (shape.num_layers,)
        ]
        return ReparametrisedPrefix(networks, shape=shape)
    match cfg.init:
        case "random":
            values = initialisation.random_keys_values(cfg.length, shape, seed=seed)
        case "zero":
            values = initialisation.random_keys_values(cfg.length, shape, seed=seed).zero_()
        case "text":
            groups = initialisation.text_groups(cfg.length, base, text=cfg.init_text or "", where=where)
            values = prefixed.activations(base, [token for group in groups for token in group])
        case "adapter":
            assert source is not None
            values = initialisation.fitted(source.values, cfg.length, dim=2)
    return Prefix(values, parts=shape.parts)


def starting_prompt(
    cfg: SoftPromptConfig, base: EmbeddingSource, source: Folded | None = None, *, seed: int, where: str
) -> SoftPrompt | ResidualPrompt:
    """A prompt at its starting values. Collective when the base is sharded.

    Args:
        cfg: of the prompt.
        base: what is needed of it.
        source: the prompt that it starts from, where init is 'adapter'.
        seed: of its draw.
        where: its key in the run file, for messages.

    Raises:
        AdapterError: it cannot start as asked for.
    """
    rows_PH = _starting_rows(cfg, base, source, seed=seed, where=where)
    if cfg.reparam == "none":
        return SoftPrompt(rows_PH, decoder_length=cfg.decoder_length)
    assert cfg.reparam_hidden_size is not None  # checked with the run file
    down, up = initialisation.bottleneck(base.hidden_size, hidden=cfg.reparam_hidden_size, seed=seed)
    # The paper's gain of 1 fits T5, whose embeddings are that large. Others are a hundredth of it: what is added starts
    # as large as the rows.
    gain = float(rows_PH.square().mean().sqrt())
    return ResidualPrompt(rows_PH, down, up, gain=gain, decoder_length=cfg.decoder_length)


def _starting_rows(
    cfg: SoftPromptConfig, base: EmbeddingSource, source: Folded | None, *, seed: int, where: str
) -> Tensor:
    """(P, H) float32, the decoder's rows behind the others and as one start with them."""
    length = cfg.length + cfg.decoder_length
    match cfg.init:
        case "random":
            return initialisation.random_rows(length, base.hidden_size, seed=seed)
        case "scaled":
            return initialisation.scaled_rows(length, base, top=cfg.init_top, seed=seed)
        case "vocabulary":
            groups = initialisation.vocabulary_groups(length, base, top=cfg.init_top, seed=seed, where=where)
        case "text":
            groups = initialisation.text_groups(length, base, text=cfg.init_text or "", where=where)
        case "labels":
            groups = initialisation.label_groups(
                length, base, labels=cfg.init_labels, top=cfg.init_top, seed=seed, where=where
            )
        case "adapter":
            assert isinstance(source, SoftPrompt)
            of_input, of_decoder = source.rows_PH.split([source.length, source.decoder_length])
            rows = [initialisation.fitted(of_input, cfg.length, dim=0)]
            if cfg.decoder_length:
                rows.append(initialisation.fitted(of_decoder, cfg.decoder_length, dim=0))
            return torch.cat(rows)
    return initialisation.embedded(groups, base)
