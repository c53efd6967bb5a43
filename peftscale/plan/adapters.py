"""Adapters in numbers: what is trained, what a file keeps, and the virtual tokens of a row.

What a rank holds of them beside the base is `memory`; the files themselves are `adapters.files`.

Shapes:  H hidden   P virtual tokens
"""

import math

from peftscale.config import AdapterConfig, PrefixConfig, RunConfig
from peftscale.facts import BaseFacts

MANIFEST_BYTES = 16_384
"""Allowance for JSON in a checkpoint: two for the run with its random state, one for each adapter."""


def token_width(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Numbers of one virtual token, as the adapter's file keeps it."""
    return facts.hidden_size if adapter.kind == "prompt" else facts.prefix_width


def file_rows(adapter: AdapterConfig) -> int:
    """Rows of the adapter's file, one for each virtual token that has values of its own."""
    return adapter.length + (adapter.decoder_length if adapter.kind == "prompt" else 0)


def positions(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Virtual tokens of a row, in front of the encoder's and the decoder's input together."""
    return file_rows(adapter) * (2 if adapter.kind == "prefix" and facts.is_encoder_decoder else 1)


def trained_numbers(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Numbers that are trained: those of the file, or vectors of H and two layers that make those."""
    width = token_width(adapter, facts)
    if adapter.kind == "prompt":
        hidden = adapter.reparam_hidden_size or 0
        network = hidden * (2 * width + 1) + 3 * width if hidden else 0  # two layers, gain and shift of the norm
        return file_rows(adapter) * width + network
    if adapter.reparam_hidden_size is None:
        return adapter.length * width
    # Encoder, decoder and cross attention have vectors and an inner layer each.
    hidden, networks = adapter.reparam_hidden_size, 3 if facts.is_encoder_decoder else 1
    inner = adapter.length * facts.hidden_size + hidden * (facts.hidden_size + 1)
    return networks * inner + width * (hidden + 1)


def prefix_bytes(adapter: PrefixConfig, facts: BaseFacts, dense_bytes: int) -> int:
    """Beside parameter and gradient: keys and values in the compute dtype and their gradient, and what a network
    made, as a leaf, with its gradient."""
    copies = 12 if adapter.reparam == "mlp" else 0
    return adapter.length * facts.prefix_width * (2 * dense_bytes + copies)


def file_bytes(adapter: AdapterConfig, facts: BaseFacts) -> int:
    """Size of its file: 8-byte length, JSON header padded to 8 bytes, a row of float32 for each virtual token."""
    rows, width = file_rows(adapter), token_width(adapter, facts)
    size = rows * width * 4
    entry = f'"prompt_embeddings":{{"dtype":"F32","shape":[{rows},{width}],"data_offsets":[0,{size}]}}'
    header = f'{{"__metadata__":{{"format":"pt"}},{entry}}}'
    return 8 + math.ceil(len(header) / 8) * 8 + size


def kept(cfg: RunConfig, facts: BaseFacts, *, trained_bytes: int, optimizer_bytes: int) -> dict[str, int]:
    """Bytes on disk, under the names that `Plan` gives them."""
    files = sum(file_bytes(adapter, facts) for adapter in cfg.adapters.values())
    manifests = MANIFEST_BYTES * (2 + len(cfg.adapters))
    return {
        "adapter_file_bytes": files,
        "checkpoint_bytes": trained_bytes + files + optimizer_bytes + manifests,
    }
