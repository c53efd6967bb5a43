"""PEFT's file format for prompt and prefix tuning: one JSON, one safetensors, byte for byte as PEFT 0.21.2 writes them.

Pure bytes and dictionaries. Which files make a directory, and whether they can be trusted, is
`adapters.files`. PEFT itself is not imported: it is an extra. What it has no words for, a prompt with rows for a
decoder's input and a prefix of encoder, decoder and cross attention, is kept in the same two files, with keys of our
own and a `peft_type` that PEFT raises on.

Shapes:  P virtual tokens   Q of the decoder's input   S transformer submodules   H hidden size   L attention layers
         K key heads   D head size   W width of a virtual token: H of a prompt, L * 2 * K * D of a prefix, in this order
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
OWN_TYPES = {"PEFTSCALE_PROMPT_TUNING": "prompt", "PEFTSCALE_PREFIX_TUNING": "prefix"}
"""Of what PEFT cannot express. It refuses a type that it does not know."""
DECODER_LENGTH, PARTS = "num_decoder_virtual_tokens", "num_layers_of_parts"
"""Our keys: Q of a prompt, `PrefixShape.parts` of a prefix."""
TASK_TYPES = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}
"""PEFT's words for decoder-only and for encoder-decoder models."""
PEFT_VERSION = "0.21.2"


@dataclass(frozen=True)
class Header:
    """What `adapter_config.json` says about the tensor."""

    peft_type: str
    length: int
    """P."""
    num_submodules: int
    """S: 1 for a decoder. PEFT stores S * P rows for an encoder-decoder model and reads the first P of them."""
    token_dim: int | None
    """H, where the file says so; K * D of a prefix."""
    is_encoder_decoder: bool | None
    """Of the base; None where the file does not say."""
    decoder_length: int = 0
    """Q."""
    prefix: PrefixShape | None = None
    """Of a prefix; None for a prompt."""

    @property
    def is_peft(self) -> bool:
        """Whether PEFT can express the adapter."""
        return self.peft_type in PEFT_TYPES


def config_json(
    *,
    length: int,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    model: str,
    revision: str | None,
    is_encoder_decoder: bool = False,
    decoder_length: int = 0,
) -> bytes:
    """`adapter_config.json` of a soft prompt. That of an encoder has one submodule, where PEFT's default is two."""
    kind = "PEFTSCALE_PROMPT_TUNING" if decoder_length else "PROMPT_TUNING"
    fields = {
        **_common(length, kind, model, revision, is_encoder_decoder=is_encoder_decoder),
        **({DECODER_LENGTH: decoder_length} if decoder_length else {}),
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
    """`adapter_config.json` of a prefix. A network that made it is folded."""
    kind = "PEFTSCALE_PREFIX_TUNING" if shape.parts else "PREFIX_TUNING"
    fields = {
        **_common(length, kind, model, revision, is_encoder_decoder=bool(shape.parts)),
        **({PARTS: shape.parts} if shape.parts else {}),
        # PEFT counts key heads where they are fewer than query heads.
        "num_attention_heads": shape.num_kv_heads,
        "num_layers": shape.num_layers,
        "token_dim": shape.num_kv_heads * shape.head_dim,
        "encoder_hidden_size": shape.num_kv_heads * shape.head_dim,
        "init_weights": None,
        "prefix_projection": False,
    }
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def _common(
    length: int, peft_type: str, model: str, revision: str | None, *, is_encoder_decoder: bool
) -> dict[str, object]:
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
        "task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
    }


def flat(values: Tensor) -> Tensor:
    """(P, W) of a prompt's rows or a prefix's keys and values (L, 2, P, K, D), as PEFT orders them."""
    return values if values.ndim == 2 else values.permute(2, 0, 1, 3, 4).flatten(1)


def unflat(rows_PW: Tensor, shape: PrefixShape) -> Tensor:
    """(L, 2, P, K, D) of a prefix's file."""
    layers, heads, size, _ = shape
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
        AdapterError: not JSON, another kind of adapter, a prefix of PEFT for an encoder-decoder model, or a count that
            is no positive integer.
    """
    fields = json_object(content, where=where)
    peft_type = str(fields.get("peft_type"))
    kind = (PEFT_TYPES | OWN_TYPES).get(peft_type)
    if kind is None:
        known = " and ".join(f"{name!r} (a {word})" for name, word in PEFT_TYPES.items())
        raise AdapterError(f"{where}: peft_type is {fields.get('peft_type')!r}; only {known} can be used.")
    token_dim = fields.get("token_dim")
    is_of_seq2seq = TASK_TYPES.get(str(fields.get("task_type")))
    num_submodules = fields.get("num_transformer_submodules") or (2 if is_of_seq2seq else 1)  # PEFT's own defaults
    header = Header(
        peft_type=peft_type,
        length=_count(fields.get("num_virtual_tokens"), f"{where}: num_virtual_tokens"),
        num_submodules=_count(num_submodules, f"{where}: num_transformer_submodules"),
        token_dim=None if token_dim is None else _count(token_dim, f"{where}: token_dim"),
        is_encoder_decoder=is_of_seq2seq if peft_type in PEFT_TYPES else True,
    )
    if kind == "prefix":
        return replace(header, prefix=_prefix_shape(fields, header, where=where))
    if header.is_peft:
        return header
    return replace(header, decoder_length=_count(fields.get(DECODER_LENGTH), f"{where}: {DECODER_LENGTH}"))


def _prefix_shape(fields: dict[str, object], header: Header, *, where: str) -> PrefixShape:
    if header.is_peft and (header.num_submodules != 1 or header.is_encoder_decoder):
        num = header.num_submodules
        said = f"task_type is {fields.get('task_type')!r}" if num == 1 else f"num_transformer_submodules is {num}"
        raise AdapterError(
            f"{where}: {said}: the prefix belongs to an encoder-decoder model. PEFT puts such a prefix before the "
            f"decoder's self-attention alone, and with two submodules layers i and i + L/2 share one half of it while "
            f"the other half is never used. It cannot be used here: train a prefix of encoder, decoder and cross "
            f"attention, or use a prompt."
        )
    layers, heads, width = (
        _count(fields.get(name), f"{where}: {name}") for name in ("num_layers", "num_attention_heads", "token_dim")
    )
    if width % heads:
        raise AdapterError(f"{where}: token_dim={width} is not a multiple of num_attention_heads={heads}.")
    if header.is_peft:
        return PrefixShape(layers, heads, width // heads)
    stored = fields.get(PARTS)
    parts = tuple(_count(part, f"{where}: {PARTS}") for part in stored) if isinstance(stored, list) else ()
    if len(parts) != 3 or sum(parts) != layers:
        raise AdapterError(
            f"{where}: {PARTS} must be three counts of layers (encoder, decoder, cross attention) with the sum "
            f"num_layers={layers}, got {stored!r}."
        )
    return PrefixShape(layers, heads, width // heads, parts)


def parse_weights(content: bytes, header: Header, *, where: str) -> Tensor:
    """Read `adapter_model.safetensors` as (P + Q, H) or, of a prefix, (L, 2, P, K, D) float32; `where` is its path,
    for the message.

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
    num_rows = header.length * header.num_submodules + header.decoder_length
    if stored.shape[0] != num_rows:
        more = f" + {DECODER_LENGTH}={header.decoder_length}" if header.decoder_length else ""
        raise AdapterError(
            f"{where}: {TENSOR} has {stored.shape[0]} rows, but {CONFIG_FILE} says num_virtual_tokens={header.length} "
            f"x num_transformer_submodules={header.num_submodules}{more} = {num_rows}."
        )
    if header.prefix is not None and stored.shape[1] != header.prefix.width:
        layers, heads, size, _ = header.prefix
        raise AdapterError(
            f"{where}: {TENSOR} has rows of {stored.shape[1]}, but {CONFIG_FILE} says 2 * num_layers={layers} * "
            f"num_attention_heads={heads} * {size} = {header.prefix.width}."
        )
    if header.prefix is None and header.token_dim not in (None, stored.shape[1]):
        raise AdapterError(
            f"{where}: {TENSOR} has rows of {stored.shape[1]}, but {CONFIG_FILE} says token_dim={header.token_dim}."
        )
    # Of two submodules PEFT stores as many rows again for the decoder, and never reads nor trains them.
    rows_PW = stored[: header.length + header.decoder_length].to(torch.float32)
    refuse_nonfinite(rows_PW, where=where)
    return rows_PW if header.prefix is None else unflat(rows_PW, header.prefix)


def refuse_nonfinite(rows_PW: Tensor, *, where: str) -> None:
    """
    Raises:
        AdapterError: a row holds a value that is not finite; `where` is the path that the message names.
    """
    num_bad = int((~torch.isfinite(rows_PW).all(dim=1)).sum())
    if num_bad:
        raise AdapterError(f"{where}: {num_bad} of {len(rows_PW)} rows hold values that are not finite (NaN or inf).")


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
