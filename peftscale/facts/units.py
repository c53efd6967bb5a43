"""Sizes of a base in numbers: tensors, units that are gathered together, and the bytes they take.

Only arithmetic: where the numbers come from is `families` and `skeleton`, what a GPU makes of them is `plan`.

Source: NF4 with double quantisation, Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from peftscale.config import ComputeDtype, Quantization

NF4_GROUP = 64
"""Weights that share one absmax."""
NF4_NESTED = 256
"""Absmax values that share one nested absmax."""

Kind = Literal["embedding", "positions", "projection", "block", "norm", "head"]
KINDS: tuple[Kind, ...] = ("embedding", "positions", "projection", "block", "norm", "head")


def dtype_bytes(compute_dtype: ComputeDtype) -> int:
    """Bytes of one dense element."""
    return {"bfloat16": 2, "float32": 4}[compute_dtype]


def blob_bytes(rows: int, cols: int, quantization: Quantization, dense_bytes: int) -> int:
    """Bytes of one stored linear weight (rows = outputs, cols = inputs).

    nf4: packed ceil(n/2), an absmax byte a group of 64, a float32 for 256 of those, a float32 offset.
    int8: n, and a float32 a row. none: n dense elements.
    """
    num = rows * cols
    match quantization:
        case "nf4":
            groups = math.ceil(num / NF4_GROUP)
            return math.ceil(num / 2) + groups + 4 * math.ceil(groups / NF4_NESTED) + 4
        case "int8":
            return num + 4 * rows
        case "none":
            return num * dense_bytes


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor that stays dense."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """A linear weight as it is packed, (rows, cols); its bias is among the unit's dense tensors."""

    name: str
    """Of the module: model.layers.0.mlp.up_proj."""
    rows: int
    cols: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """What is gathered together: a block, or a module with weights outside the blocks. Tensors are sorted by name."""

    name: str
    kind: Kind
    linears: tuple[LinearFacts, ...]
    dense: tuple[TensorFacts, ...]

    @property
    def num_parameters(self) -> int:
        return sum(n.rows * n.cols for n in self.linears) + sum(math.prod(t.shape) for t in self.dense)

    def packed_bytes(self, quantization: Quantization, dtype_bytes: int, world: int = 1) -> int:
        """Stored bytes of the unit, every parameter padded to a multiple of `world` elements."""
        return sum(size * math.ceil(num / world) * world for num, size in self._stored(quantization, dtype_bytes))

    def _stored(self, quantization: Quantization, dtype_bytes: int) -> Iterator[tuple[int, int]]:
        """Elements and bytes an element of every stored parameter."""
        for linear in self.linears:
            if quantization == "none":
                yield linear.rows * linear.cols, dtype_bytes
            else:
                yield blob_bytes(linear.rows, linear.cols, quantization, dtype_bytes), 1
        for tensor in self.dense:
            yield math.prod(tensor.shape), dtype_bytes

    def storage_elements(self, quantization: Quantization) -> int:
        """Elements as DeepSpeed counts them: a byte of a blob is one."""
        return sum(num for num, _ in self._stored(quantization, 1))


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A base without its weights."""

    model: str
    """As the user named it."""
    model_type: str
    hidden_size: int
    num_layers: int
    """Blocks; those of encoder and decoder together."""
    num_heads: int
    num_kv_heads: int
    """Key heads: fewer than query heads where several of those share one."""
    head_dim: int
    activation: str
    """Of the feed-forward part, as transformers names it."""
    vocab_size: int
    max_positions: int | None
    """Longest sequence, or None where positions are relative (T5). With longrope (Phi-3 of 128k), the longest of those
    that it computes as short ones: `skeleton.max_positions`."""
    is_tied: bool
    """The head is the input embedding again: its unit names the embedding's tensor, which is stored once."""
    is_encoder_decoder: bool
    units: tuple[UnitFacts, ...]
    num_decoder_layers: int = 0
    """Those of the blocks that have a cross attention beside their own: the decoder's of an encoder-decoder."""

    @property
    def stored_units(self) -> tuple[UnitFacts, ...]:
        """Every tensor once: all units, or all but a tied head."""
        return tuple(unit for unit in self.units if not (self.is_tied and unit.kind == "head"))

    @property
    def num_parameters(self) -> int:
        return sum(unit.num_parameters for unit in self.stored_units)

    @property
    def prefix_width(self) -> int:
        """Numbers of one virtual token of a prefix: keys and values of all attention layers."""
        return (self.num_layers + self.num_decoder_layers) * 2 * self.num_kv_heads * self.head_dim

    def packed_bytes(self, quantization: Quantization, dtype_bytes: int, world: int = 1) -> int:
        """Stored bytes of the whole base; with `world`, including its padding."""
        return sum(unit.packed_bytes(quantization, dtype_bytes, world) for unit in self.stored_units)


def sorted_unit(name: str, kind: Kind, linears: list[LinearFacts], dense: list[TensorFacts]) -> UnitFacts:
    """A unit with its tensors in the order of their names."""
    by_name = sorted(linears, key=lambda x: x.name)
    return UnitFacts(name, kind, tuple(by_name), tuple(sorted(dense, key=lambda x: x.name)))


def in_order(units: list[UnitFacts]) -> tuple[UnitFacts, ...]:
    """Embeddings first, head last, blocks as they stand."""
    return tuple(sorted(units, key=lambda unit: KINDS.index(unit.kind)))
