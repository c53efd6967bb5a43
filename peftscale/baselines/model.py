"""The base as transformers loads it, whole on every rank, and the loss of plain transformers on padded rows.

It is a `Base` like any other, so that evaluation and generation are the very code that adapters are scored with. How
our own base is loaded, packed and sharded is `base.load`; what is trained in this one is `baselines.lora` and
`baselines.full`.

Shapes:  N rows   T longest row   M target tokens of all rows
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from peftscale.base import host_memory
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.base.padded import Row, logits_at
from peftscale.base.passes import losses
from peftscale.base.skeleton import read_config
from peftscale.config import BaseConfig
from peftscale.errors import ModelError


def load(cfg: BaseConfig, device: torch.device) -> Base:
    """Load a base through transformers: nf4 as bitsandbytes' own Linear4bit, anything else dense in the compute dtype.

    Numbers are those of our own base. So nf4 is made from the weights as they are stored, as our packs are, and only
    then is the rest cast.

    Raises:
        ModelError: transformers cannot load it, or would not quantise what our own base does.
    """
    host_memory.return_freed()
    model_dir = base_load.resolve(cfg.model, cfg.revision, with_weights=True)
    compute_dtype: torch.dtype = getattr(torch, cfg.compute_dtype)
    auto = AutoModelForSeq2SeqLM if read_config(model_dir).is_encoder_decoder else AutoModelForCausalLM
    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    try:
        with quiet():
            model: PreTrainedModel = auto.from_pretrained(
                model_dir,
                dtype="auto",
                device_map={"": device},
                quantization_config=stored if cfg.quantization == "nf4" else None,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"base.model={cfg.model}: transformers cannot load it: {error}") from error
    if cfg.quantization == "nf4":
        _refuse_other_base(model, cfg.model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype)
    for module in model.modules():
        # On some CPUs bitsandbytes packs the weight anew at the first evaluation, rounded to bfloat16 and for a kernel
        # without a backward: every later step would train on a gradient that has lost its way through the weight.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    base_load.prepare(model, device=device)
    if cfg.checkpoint_activations:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return Base(
        model=model,
        tokenizer=base_load.load_tokenizer(model_dir),
        digest="",
        cfg=cfg,
        device=device,
        compute_dtype=compute_dtype,
        is_sharded=False,
        own_attention=model.config._attn_implementation,
    )


def _refuse_other_base(model: PreTrainedModel, where: str) -> None:
    """Transformers leaves some linears of some families dense (T5's wo): adapters are trained on another base then."""
    head = model.get_output_embeddings()
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and module.weight.is_floating_point()
    ]
    if dense:
        raise ModelError(
            f"base.model={where}: transformers leaves {len(dense)} linears dense that are quantised for adapters, for "
            f"example {dense[0]}, so it would be another base. Set base.quantization to none for this method."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and what libraries say to those who call them off the terminal."""
    had_bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def target_losses(base: Base, rows: Sequence[Row], *, through: nn.Module) -> Tensor:
    """Negative log-likelihood of every target token, (M,) float32 nats, row after row.

    Ids go in, so that embeddings may be trained too; `base.passes` keeps them out of the graph.

    Args:
        rows: at least one, without anything in front.
        through: the model, or what stands for it.
    """
    ids = [torch.tensor(list(row.ids)) for row in rows]
    targets = [row[len(row) - rows[i].num_targets :] for i, row in enumerate(ids)]
    arguments: dict[str, Any]
    if base.is_encoder_decoder:
        texts = [row[: len(row) - len(target)] for row, target in zip(ids, targets, strict=True)]
        labels_NT = pad_sequence(targets, batch_first=True, padding_value=-100).to(base.device)
        arguments = {
            "input_ids": pad_sequence(texts, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
            "decoder_input_ids": base.model.prepare_decoder_input_ids_from_labels(labels=labels_NT),
        }
        starts, width = [0] * len(rows), labels_NT.shape[1]
    else:
        arguments = {"input_ids": pad_sequence(ids, batch_first=True)}  # behind a text, where no causal model looks
        starts = [len(row) - len(target) - 1 for row, target in zip(ids, targets, strict=True)]
        width = max(map(len, ids))
    at = [i * width + start + t for i, start in enumerate(starts) for t in range(len(targets[i]))]
    logits_MV = logits_at(
        through,
        None,
        torch.tensor(at, device=base.device),
        **{name: tensor.to(base.device) for name, tensor in arguments.items()},
    )
    return losses(logits_MV, torch.cat(targets).to(base.device), rows)
