"""PEFT's file format for prompt tuning: one JSON, one safetensors, byte for byte as PEFT 0.21.2 writes them.

Pure bytes and dictionaries. Which files make a directory, and whether they can be trusted, is
`adapters.files`. PEFT itself is not imported: it is an extra.

Shapes:  P virtual tokens   S transformer submodules   H hidden size
"""

import json
import math
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from peftscale.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
TENSOR = "prompt_embeddings"
PEFT_TYPE = "PROMPT_TUNING"
PEFT_VERSION = "0.21.2"


@dataclass(frozen=True)
class PromptHeader:
    """What `adapter_config.json` says about the tensor."""

    length: int
    """P."""
    num_submodules: int
    """S: 1 for a decoder. PEFT stores S * P rows for an encoder-decoder model and reads the first P of them."""
    token_dim: int | None
    """H, where the file says so."""


def config_json(
    *, length: int, hidden_size: int, num_layers: int, num_attention_heads: int, model: str, revision: str | None
) -> bytes:
    """`adapter_config.json` of a soft prompt of a causal language model."""
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": model,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": PEFT_TYPE,
        "peft_version": PEFT_VERSION,
        # PEFT's TEXT and SAMPLE_VOCAB would embed anew, or ask for a tokenizer, in a reader that trains on. How the
        # rows really started is kept in peftscale.json.
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": hidden_size,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def weights_bytes(rows_PH: Tensor) -> bytes:
    """`adapter_model.safetensors` with these rows in float32."""
    rows_PH = rows_PH.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return safetensors.torch.save({TENSOR: rows_PH}, metadata={"format": "pt"})


def expected_bytes(length: int, hidden_size: int) -> int:
    """Size of `adapter_model.safetensors`: P * H * 4 and the header, which is padded to 8 bytes."""
    num_data_bytes = length * hidden_size * 4
    header = {
        "__metadata__": {"format": "pt"},
        TENSOR: {"dtype": "F32", "shape": [length, hidden_size], "data_offsets": [0, num_data_bytes]},
    }
    num_header_bytes = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(num_header_bytes / 8) * 8 + num_data_bytes


def parse_config(content: bytes, *, where: str) -> PromptHeader:
    """Read `adapter_config.json`; `where` is its path, for the message.

    Raises:
        AdapterError: not JSON, another kind of adapter, or a count that is no positive integer.
    """
    fields = json_object(content, where=where)
    if fields.get("peft_type") != PEFT_TYPE:
        raise AdapterError(
            f"{where}: peft_type is {fields.get('peft_type')!r}; only {PEFT_TYPE!r} (a soft prompt) can be used."
        )
    token_dim = fields.get("token_dim")
    return PromptHeader(
        length=_count(fields.get("num_virtual_tokens"), f"{where}: num_virtual_tokens"),
        num_submodules=_count(fields.get("num_transformer_submodules") or 1, f"{where}: num_transformer_submodules"),
        token_dim=None if token_dim is None else _count(token_dim, f"{where}: token_dim"),
    )


def parse_weights(content: bytes, header: PromptHeader, *, where: str) -> Tensor:
    """Read `adapter_model.safetensors` as (P, H) float32; `where` is its path, for the message.

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
    if header.token_dim not in (None, stored.shape[1]):
        raise AdapterError(
            f"{where}: {TENSOR} has rows of {stored.shape[1]}, but {CONFIG_FILE} says token_dim={header.token_dim}."
        )
    # Rows behind the first P belong to a decoder of an encoder-decoder model; PEFT itself never reads them.
    rows_PH = stored[: header.length].to(torch.float32)
    num_bad = int((~torch.isfinite(rows_PH).all(dim=1)).sum())
    if num_bad:
        raise AdapterError(f"{where}: {num_bad} of {header.length} rows hold values that are not finite (NaN or inf).")
    return rows_PH


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
