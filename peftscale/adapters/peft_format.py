"""PEFT's file format for prompt and prefix tuning: one JSON, one safetensors, byte for byte as PEFT 0.21.2 writes them.

Pure bytes and dictionaries. Which files make a directory, and whether they can be trusted, is
`adapters.files`. PEFT itself is not imported: it is an extra.

Shapes:  P virtual tokens   S transformer submodules   H hidden size   L layers   K key heads   D head size
         W width of a virtual token: H of a prompt, L * 2 * K * D of a prefix, in this order
"""

import json
import math
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from peftscale.base.prefixed import PrefixShape
from peftscale.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
TENSOR = "prompt_embeddings"
PEFT_TYPES = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
PEFT_VERSION = "0.21.2"


@dataclass(frozen=True)
class Header:
    """What `adapter_config.json` says about the tensor."""

    length: int
    """P."""
    num_submodules: int
    """S: 1 for a decoder. PEFT stores S * P rows for an encoder-decoder model and reads the first P of them."""
    token_dim: int | None
    """H, where the file says so; K * D of a prefix."""
    prefix: PrefixShape | None = None
    """Of a prefix; None for a prompt."""


def config_json(
    *, length: int, hidden_size: int, num_layers: int, num_attention_heads: int, model: str, revision: str | None
) -> bytes:
    """`adapter_config.json` of a soft prompt of a causal language model."""
    fields = {
        **_common(length, "PROMPT_TUNING", model, revision),
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        # PEFT's TEXT and SAMPLE_VOCAB would embed anew, or ask for a tokenizer, in a reader that trains on. How the
        # rows really started is kept in peftscale.json.
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "token_dim": hidden_size,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def prefix_config_json(*, length: int, shape: PrefixShape, model: str, revision: str | None) -> bytes:
    """`adapter_config.json` of a prefix of a causal language model. A network that made it is folded."""
    fields = {
        **_common(length, "PREFIX_TUNING", model, revision),
        # PEFT counts key heads where they are fewer than query heads.
        "num_attention_heads": shape.num_kv_heads,
        "num_layers": shape.num_layers,
        "token_dim": shape.num_kv_heads * shape.head_dim,
        "encoder_hidden_size": shape.num_kv_heads * shape.head_dim,
        "init_weights": None,
        "prefix_projection": False,
    }
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def _common(length: int, peft_type: str, model: str, revision: str | None) -> dict[str, object]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": model,
        "inference_mode": True,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": peft_type,
        "peft_version": PEFT_VERSION,
        "revision": revision,
        "task_type": "CAUSAL_LM",
    }


def flat(values: Tensor) -> Tensor:
    """(P, W) of a prompt's rows or a prefix's keys and values (L, 2, P, K, D), as PEFT orders them."""
    return values if values.ndim == 2 else values.permute(2, 0, 1, 3, 4).flatten(1)


def unflat(rows_PW: Tensor, shape: PrefixShape) -> Tensor:
    """(L, 2, P, K, D) of a prefix's file."""
    layers, heads, size = shape
    return rows_PW.view(len(rows_PW), layers, 2, heads, size).permute(1, 2, 0, 3, 4)


def weights_bytes(values: Tensor) -> bytes:
    """`adapter_model.safetensors` with these rows, or keys and values, in float32."""
    rows_PW = flat(values.detach()).to(device="cpu", dtype=torch.float32).contiguous()
    return safetensors.torch.save({TENSOR: rows_PW}, metadata={"format": "pt"})


def expected_bytes(length: int, width: int) -> int:
    """Size of `adapter_model.safetensors`: P * W * 4 and the header, which is padded to 8 bytes."""
    num_data_bytes = length * width * 4
    header = {
        "__metadata__": {"format": "pt"},
        TENSOR: {"dtype": "F32", "shape": [length, width], "data_offsets": [0, num_data_bytes]},
    }
    num_header_bytes = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(num_header_bytes / 8) * 8 + num_data_bytes


def parse_config(content: bytes, *, where: str) -> Header:
    """Read `adapter_config.json`; `where` is its path, for the message.

    Raises:
        AdapterError: not JSON, another kind of adapter, or a count that is no positive integer.
    """
    fields = json_object(content, where=where)
    kind = PEFT_TYPES.get(str(fields.get("peft_type")))
    if kind is None:
        known = " and ".join(f"{name!r} (a {word})" for name, word in PEFT_TYPES.items())
        raise AdapterError(f"{where}: peft_type is {fields.get('peft_type')!r}; only {known} can be used.")
    token_dim = fields.get("token_dim")
    header = Header(
        length=_count(fields.get("num_virtual_tokens"), f"{where}: num_virtual_tokens"),
        num_submodules=_count(fields.get("num_transformer_submodules") or 1, f"{where}: num_transformer_submodules"),
        token_dim=None if token_dim is None else _count(token_dim, f"{where}: token_dim"),
    )
    return header if kind == "prompt" else replace(header, prefix=_prefix_shape(fields, header, where=where))


def _prefix_shape(fields: dict[str, object], header: Header, *, where: str) -> PrefixShape:
    if header.num_submodules != 1:
        raise AdapterError(
            f"{where}: num_transformer_submodules is {header.num_submodules}: the prefix belongs to an "
            f"encoder-decoder model, whose prefixes cannot be used. Only those of causal language models can."
        )
    layers, heads, width = (
        _count(fields.get(name), f"{where}: {name}") for name in ("num_layers", "num_attention_heads", "token_dim")
    )
    if width % heads:
        raise AdapterError(f"{where}: token_dim={width} is not a multiple of num_attention_heads={heads}.")
    return PrefixShape(layers, heads, width // heads)


def parse_weights(content: bytes, header: Header, *, where: str) -> Tensor:
    """Read `adapter_model.safetensors` as (P, H) or, of a prefix, (L, 2, P, K, D) float32; `where` is its path, for
    the message.

    Raises:
        AdapterError: not safetensors, cut, another tensor, another shape than the header's, or a non-finite row.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{where}: not a whole safetensors file of {len(content)} bytes ({error}). "
            f"It was cut or is of another format: copy or save the adapter again."
        ) from error
    if list(tensors) != [TENSOR]:
        raise AdapterError(f"{where}: expected the one tensor {TENSOR!r}, got {sorted(tensors)}.")
    stored = tensors[TENSOR]
    if not stored.is_floating_point() or stored.ndim != 2:
        raise AdapterError(
            f"{where}: {TENSOR} must be a matrix of floats, got {stored.dtype} of shape {list(stored.shape)}."
        )
    if stored.shape[0] != header.length * header.num_submodules:
        raise AdapterError(
            f"{where}: {TENSOR} has {stored.shape[0]} rows, but {CONFIG_FILE} says num_virtual_tokens={header.length} "
            f"x num_transformer_submodules={header.num_submodules} = {header.length * header.num_submodules}."
        )
    if header.prefix is not None and stored.shape[1] != header.prefix.width:
        layers, heads, size = header.prefix
        raise AdapterError(
            f"{where}: {TENSOR} has rows of {stored.shape[1]}, but {CONFIG_FILE} says 2 * num_layers={layers} * "
            f"num_attention_heads={heads} * {size} = {header.prefix.width}."
        )
    if header.prefix is None and header.token_dim not in (None, stored.shape[1]):
        raise AdapterError(
            f"{where}: {TENSOR} has rows of {stored.shape[1]}, but {CONFIG_FILE} says token_dim={header.token_dim}."
        )
    # Rows behind the first P belong to a decoder of an encoder-decoder model; PEFT itself never reads them.
    rows_PW = stored[: header.length].to(torch.float32)
    num_bad = int((~torch.isfinite(rows_PW).all(dim=1)).sum())
    if num_bad:
        raise AdapterError(f"{where}: {num_bad} of {header.length} rows hold values that are not finite (NaN or inf).")
    return rows_PW if header.prefix is None else unflat(rows_PW, header.prefix)


def json_object(content: bytes, *, where: str) -> dict[str, object]:
    """Parse untrusted bytes as one JSON object.

    Raises:
        AdapterError: anything else; `where` is the path that the message names.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: not JSON ({error}). Copy or save the adapter again.") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value


def _count(value: object, where: str) -> int:
    """A positive integer, and not a bool."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{where} must be an integer >= 1, got {value!r}.")
    return value
