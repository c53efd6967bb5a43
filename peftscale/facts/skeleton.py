"""Facts of any other model: names and shapes of the meta skeleton that transformers builds without memory.

Imports torch and transformers when it is called, not before. The real skeleton, with frozen linears, is
`base.skeleton`; it refuses what is refused here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from peftscale.errors import ModelError
from peftscale.facts.units import BaseFacts, Kind, LinearFacts, TensorFacts, UnitFacts, in_order, sorted_unit


def refuse(model: str, model_type: str, wrong: Sequence[TensorFacts]) -> NoReturn:
    """
    Raises:
        ModelError: always. Names the kinds of tensors, largest first, each by its first layer.
    """
    first = {re.sub(r"\d+", "N", tensor.name): tensor for tensor in reversed(wrong)}
    largest = sorted(first.values(), key=lambda tensor: (-math.prod(tensor.shape), tensor.name))[:3]
    names = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in largest)
    raise ModelError(
        f"base.model={model}: {len(wrong)} weight(s) of this {model_type} model are neither nn.Linear, Conv1D nor an "
        f"embedding, so they can be neither quantised nor planned for: {names}. "
        f"Fused experts (mixture-of-experts models) are not supported; choose a dense model."
    )


def refuse_own_code(model: str, raw: Mapping[str, Any]) -> None:
    """A model may bring code that it needs no longer, since transformers has its class; that code is not run.

    Args:
        model: as the user named it, for the message.
        raw: its config.json.

    Raises:
        ModelError: its type or its class is not in transformers, but in files beside its config.
    """
    code = raw.get("auto_map")
    if not code:
        return
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = dir(transformers)  # names alone: no class is imported
    classes = [name for name in raw.get("architectures") or [] if name not in known]
    if raw.get("model_type") not in CONFIG_MAPPING_NAMES or classes:
        raise ModelError(
            f"base.model={model}: {', '.join(classes) or raw.get('model_type')} is not in transformers, but in code "
            f"that came with it ({own_files(code)}). Such code is never run, and no file can allow it. Give a model "
            f"that the installed transformers knows."
        )


def own_files(auto_map: Any) -> str:
    """The files of code that an `auto_map` names."""
    entries = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry]) if name]
    return ", ".join(dict.fromkeys(f"{str(name).rpartition('.')[0]}.py" for name in classes))


def read(model_dir: Path) -> BaseFacts:
    """Names and shapes from the model that transformers builds without memory. Code beside the config is never run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        model = _meta_model(config)
    except (OSError, ValueError, KeyError, ImportError, AssertionError, StrictDataclassError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelError(
            f"base.model={model_dir}: transformers cannot build this model from its config.json ({reason}). "
            f"Give a causal language model that the installed transformers knows."
        ) from error
    text = config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise ModelError(
            f"base.model={model_dir}: {type(model).__name__} has no input embedding or no output head, so no text can "
            f"be scored with it. Give a causal language model."
        )
    units = _skeleton_units(model, _block_names(model, text, model_dir), str(model_dir))
    heads = text.num_attention_heads
    act = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    return BaseFacts(
        model=str(model_dir),
        model_type=str(config.model_type),
        hidden_size=text.hidden_size,
        num_layers=sum(unit.kind == "block" for unit in units),
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim(text, f"base.model={model_dir}"),
        activation=str(act or getattr(text, "activation_function", None) or getattr(text, "dense_act_fn", None)),
        vocab_size=text.vocab_size,
        max_positions=max_positions(text),
        is_tied=head.weight is embedding.weight,
        is_encoder_decoder=bool(config.is_encoder_decoder),
        units=in_order(units),
        num_decoder_layers=_decoder_layers(model, units),
    )


def head_dim(text: Any, where: str) -> int:
    """Width of a head of a language model, from transformers' config of it; `where` is what the message names.

    Raises:
        ModelError: its layers differ in it, as Gemma 4's do.
    """
    from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

    try:
        size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    except AmbiguousGlobalPerLayerAttributeError as error:
        raise ModelError(
            f"{where}: the layers of this {text.model_type} model have heads of different sizes, which can be neither "
            f"planned for nor take a prefix. Choose a model whose layers are alike."
        ) from error
    return int(size or text.hidden_size // text.num_attention_heads)


def max_positions(text: Any) -> int | None:
    """Longest sequence of a language model, from transformers' config of it; None where there is no limit.

    With longrope, the longest for which it keeps the frequencies of short texts: one row that is longer would give the
    others of its pass its frequencies too, so that their results would depend on what they happen to stand beside.
    """
    limits = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # some families have frequencies of their own for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min((int(limit) for limit in limits if limit is not None), default=None)


def _decoder_layers(model: Any, units: Sequence[UnitFacts]) -> int:
    """How many of the blocks are the decoder's of an encoder-decoder."""
    if not model.config.is_encoder_decoder:
        return 0
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    return sum(unit.kind == "block" and unit.name.startswith(f"{decoder}.") for unit in units)


def _meta_model(config: Any) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with init_empty_weights(include_buffers=True):
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_config(config)


def _block_names(model: Any, text: Any, model_dir: Path) -> list[str]:
    """Full names of the transformer blocks: the module lists that are as long as the model is deep."""
    depths = {text.num_hidden_layers, *(getattr(text, key, None) for key in ("num_decoder_layers", "decoder_layers"))}
    lists = [name for name, m in model.named_modules() if type(m).__name__ == "ModuleList" and len(m) in depths]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    stacks = outer if model.config.is_encoder_decoder else outer[:1]
    if not stacks:
        raise ModelError(
            f"base.model={model_dir}: found no list of {text.num_hidden_layers} blocks in {type(model).__name__}, so "
            f"it cannot be sharded. Choose a model with one list of decoder blocks."
        )
    return [f"{name}.{index}" for name in stacks for index in range(len(model.get_submodule(name)))]


def _skeleton_units(model: Any, blocks: list[str], where: str) -> list[UnitFacts]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    owner = {weight: name for name, weight in model.named_parameters()}
    kinds: dict[str, Kind] = dict.fromkeys(blocks, "block")
    linears: dict[str, list[LinearFacts]] = {name: [] for name in blocks}
    dense: dict[str, list[TensorFacts]] = {name: [] for name in blocks}
    wrong: list[TensorFacts] = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        # T5 hangs its one embedding into both stacks under other names.
        if not own or (owner[next(iter(own.values()))].rpartition(".")[0] != name and module is not head):
            continue
        unit = next((block for block in blocks if name.startswith(f"{block}.") or name == block), name)
        is_linear = isinstance(module, nn.Linear | Conv1D) and module is not head
        if unit not in kinds:
            table: Kind = "embedding" if module is embedding else "positions"
            other: Kind = table if isinstance(module, nn.Embedding) else "projection" if is_linear else "norm"
            kinds[unit] = "head" if module is head else other
        into = dense.setdefault(unit, [])
        for short, weight in own.items():
            shape = tuple(weight.shape)
            if is_linear and short == "weight":
                rows, cols = shape if isinstance(module, nn.Linear) else shape[::-1]
                linears.setdefault(unit, []).append(LinearFacts(name, rows, cols, own.get("bias") is not None))
            elif len(shape) > 1 and not isinstance(module, nn.Embedding) and module is not head:
                wrong.append(TensorFacts(f"{name}.{short}", shape))
            else:
                into.append(TensorFacts(owner[weight], shape))
    if wrong:
        refuse(where, str(model.config.model_type), wrong)
    return [sorted_unit(unit, kind, linears.get(unit, []), dense[unit]) for unit, kind in kinds.items()]
