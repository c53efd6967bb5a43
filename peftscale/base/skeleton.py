"""The base without its weights: a transformers model on the meta device, its linears made frozen blobs.

Decides what is quantised, what stays dense and what is refused. It reads no weight: `base.pack` and
`base.load` do.

Rules: every `nn.Linear` and GPT-2's `Conv1D` becomes a `FrozenLinear`; the output head becomes a dense one;
embeddings, norms, biases and other vectors stay dense in the compute dtype; any other matrix (fused
experts, for example) is refused by name, because leaving it dense in silence would break the plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from peftscale.base import linear
from peftscale.config import Quantization
from peftscale.errors import ModelError
from peftscale.facts.skeleton import refuse_own_code


@dataclass(frozen=True)
class Entry:
    """One stored tensor of the base and the tensor of the checkpoint that it comes from."""

    name: str
    """Parameter name in the skeleton, for example model.layers.0.mlp.up_proj.blob."""
    source: str
    """Parameter name in the original model, for example model.layers.0.mlp.up_proj.weight."""
    source_shape: tuple[int, ...]
    is_blob: bool
    is_transposed: bool
    """GPT-2's Conv1D stores (in, out); blobs are (out, in)."""
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and what it is made of."""

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    """The transformer blocks; of an encoder-decoder, the encoder's and the decoder's."""
    entries: tuple[Entry, ...]


def read_config(model_dir: Path) -> PretrainedConfig:
    """The transformers config of a directory. Code that came with it is never run.

    Raises:
        ModelError: transformers does not know the architecture or cannot read the file.
    """
    try:
        refuse_own_code(str(model_dir), PretrainedConfig.get_config_dict(model_dir)[0])
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"base.model={model_dir}: transformers cannot read its config.json ({_first_line(error)}). "
            f"Give a directory of a language model that this version of transformers knows."
        ) from error


def build(config: PretrainedConfig, *, quantization: Quantization, compute_dtype: torch.dtype, where: str) -> Skeleton:
    """Make the skeleton of a decoder-only or an encoder-decoder model.

    Args:
        config: of the original model. Read, never written.
        quantization: how linear weights are stored.
        compute_dtype: of everything else.
        where: the model as the user named it, for messages.

    Raises:
        ModelError: an encoder, no stack of blocks found, or matrices that are neither a Linear, a Conv1D nor an
            Embedding.
    """
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        is_encoder_decoder or getattr(config, "is_decoder", False)
    ):
        raise ModelError(  # transformers would build it, and each token would see those behind it, its target too
            f"base.model={where}: {config.model_type} is an encoder, whose tokens see the ones behind them; its "
            f"config.json does not say is_decoder. Give a decoder-only or an encoder-decoder model."
        )
    try:
        # Parameters on meta, buffers (rotary frequencies) real: they are computed by the constructor.
        with init_empty_weights(include_buffers=False):
            auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_config(config, dtype=compute_dtype)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"base.model={where}: transformers cannot build a language model from its config "
            f"({_first_line(error)}). Give a decoder-only or an encoder-decoder model."
        ) from error
    model.tie_weights()  # parameters made on meta are separate objects until told otherwise
    if _has_own_head(config):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    model.requires_grad_(False)
    blocks = _blocks(model, config, where)
    _refuse_other_matrices(model, where)
    sources = _freeze_linears(model, quantization, compute_dtype)
    return Skeleton(model, blocks, tuple(_entries(model, sources, compute_dtype)))


def decoder_depth(config: PretrainedConfig) -> int | None:
    """Blocks of the decoder of an encoder-decoder; None where its config does not say it as T5's or BART's do."""
    text = config.get_text_config()
    depth: int | None = getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", None)
    return depth


def _has_own_head(config: PretrainedConfig) -> bool:
    """T5 v1.1 and mT5 have a head of their own, but transformers forces tie_word_embeddings to True and unties at load,
    when it sees that the weights differ. Of the original T5 it keeps that its outputs are scaled for the tied head."""
    return config.model_type == "mt5" or (config.model_type == "t5" and not config.scale_decoder_outputs)


def _blocks(model: PreTrainedModel, config: PretrainedConfig, where: str) -> tuple[nn.Module, ...]:
    text = config.get_text_config()
    parts = [(model, text.num_hidden_layers)]
    if config.is_encoder_decoder:
        parts = [(model.get_encoder(), text.num_hidden_layers), (model.get_decoder(), decoder_depth(config))]
    found: list[nn.Module] = []
    for part, depth in parts:
        stacks = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not stacks:
            raise ModelError(
                f"base.model={where}: found no stack of {depth} blocks in {type(part).__name__}. Its layers cannot be "
                f"sharded; choose a model with one list of blocks, or one for each of encoder and decoder."
            )
        found.extend(stacks[0])
    return tuple(found)


def _refuse_other_matrices(model: PreTrainedModel, where: str) -> None:
    known = (nn.Linear, Conv1D, nn.Embedding)
    wrong = [
        (parameter.numel(), f"{module_name}.{name} {tuple(parameter.shape)}")
        for module_name, module in model.named_modules()
        if not isinstance(module, known)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    if wrong:
        _, largest = max(wrong, key=lambda found: found[0])
        raise ModelError(
            f"base.model={where}: {len(wrong)} weight(s) of {type(model).__name__} are neither nn.Linear nor Conv1D "
            f"and would stay unquantised, for example {largest}. Fused experts are not supported; take a dense model."
        )


def _freeze_linears(
    model: PreTrainedModel, quantization: Quantization, compute_dtype: torch.dtype
) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Replace each linear by its frozen form; return module name -> (source, source shape, transposed), the dense
    head left out."""
    head = model.get_output_embeddings()
    sources = {}
    for module_name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if module is head:
            model.set_submodule(module_name, _frozen_head(module, compute_dtype))
            continue
        shape = tuple(module.weight.shape)
        transposed = isinstance(module, Conv1D)
        rows, cols = (shape[1], shape[0]) if transposed else shape
        has_bias = module.bias is not None
        frozen = linear.build(rows, cols, bias=has_bias, compute_dtype=compute_dtype, quantization=quantization)
        model.set_submodule(module_name, frozen)
        sources[module_name] = (f"{module_name}.weight", shape, transposed)
    return sources


def _frozen_head(head: nn.Linear, compute_dtype: torch.dtype) -> linear.FrozenLinear:
    """The head over its own parameters, which may be the embedding's. `nn.Linear` keeps a view of its weight for
    backward, which holds the gathered head on every rank from its forward to its backward."""
    frozen = linear.build(
        head.out_features,
        head.in_features,
        bias=head.bias is not None,
        compute_dtype=compute_dtype,
        quantization="none",
    )
    frozen.weight, frozen.bias = head.weight, head.bias
    return frozen


def _entries(
    model: PreTrainedModel, sources: dict[str, tuple[str, tuple[int, ...], bool]], compute_dtype: torch.dtype
) -> Iterator[Entry]:
    """Every distinct parameter once; a tied weight goes under its first name."""
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        shape = tuple(parameter.shape)
        if module_name in sources and leaf in ("blob", "weight"):
            source, source_shape, transposed = sources[module_name]
            yield Entry(name, source, source_shape, leaf == "blob", transposed, shape, parameter.dtype)
        else:
            yield Entry(name, name, shape, False, False, shape, compute_dtype)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300]
