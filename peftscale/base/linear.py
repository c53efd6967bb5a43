"""Frozen linear layers whose whole weight is one uint8 blob (NF4 or int8), or a dense matrix.

Holds the layout of a blob, its making and its reading. Sharding a blob is `base.shard`, filling it from
a file is `base.load`. The matrix product keeps the *module* for backward, never the weight: ZeRO-3 frees
a gathered weight by pointing the parameter elsewhere, and any view kept by autograd would keep the whole
gathered model alive (bitsandbytes' own 4-bit product does, its issue 2034).

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 (NF4, double quantisation). int8 here is
weight-only: one float32 scale a row, activations untouched.

Shapes:  O rows (out)   I columns (in)   N = O * I   G = ceil(N / 64) groups
"""

from functools import lru_cache
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor, nn

from peftscale.config import Quantization
from peftscale.facts import NF4_GROUP, NF4_NESTED, blob_bytes

_PACKED_AT_ONCE = 2**19  # weights; a multiple of NF4_GROUP


def pack_weight(weight_OI: Tensor, quantization: Quantization) -> Tensor:
    """Quantise one weight into its blob.

    Args:
        weight_OI: (O, I), any float dtype. Read, never written.
        quantization: 'nf4' or 'int8'.

    Returns:
        uint8 vector of `facts.blob_bytes` bytes: packed values first, then what is needed to read them.
    """
    if quantization == "int8":
        weight = weight_OI.float()
        scale_O = weight.abs().amax(dim=1).div(127).clamp_min(torch.finfo(torch.float32).tiny)
        values = (weight / scale_O[:, None]).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([values.flatten().view(torch.uint8), scale_O.view(torch.uint8)])
    # In pieces, because bitsandbytes takes 16 bytes a weight on the CPU meanwhile; pieces also stay in its cache. The
    # bytes are those of the whole weight at once: groups do not know each other.
    pieces = [
        quantize_4bit(piece, blocksize=NF4_GROUP, quant_type="nf4")
        for piece in weight_OI.contiguous().flatten().split(_PACKED_AT_ONCE)
    ]
    absmax_G = torch.cat([state.absmax for _, state in pieces])
    offset = absmax_G.mean()
    nested_G, state = quantize_blockwise(absmax_G - offset, blocksize=NF4_NESTED)
    return torch.cat(
        [
            *(packed.flatten() for packed, _ in pieces),
            nested_G,
            state.absmax.float().contiguous().view(torch.uint8),
            offset.float().reshape(1).view(torch.uint8),
        ]
    )


@lru_cache(maxsize=8)
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 NF4 values and the 256 values of the nested absmax: constants, one copy a device."""
    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


class _FrozenProduct(torch.autograd.Function):
    """x @ W.T with W read from the module in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "FrozenLinear") -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.weight_in(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grads
        return grad @ ctx.module.weight_in(grad.dtype), None


class FrozenLinear(nn.Module):
    """A linear layer that is never trained. Subclasses say how the weight is stored.

    Made on the meta device; `base.load` gives it storage. `bias` is dense, in the compute dtype.
    """

    def __init__(self, rows: int, cols: int, *, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, cols
        self.bias = (
            nn.Parameter(torch.empty(rows, dtype=compute_dtype, device="meta"), requires_grad=False) if bias else None
        )

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`: a new tensor, except for a dense weight of that dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class DenseFrozenLinear(FrozenLinear):
    """The weight as it is, in the compute dtype."""

    def __init__(self, rows: int, cols: int, *, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(rows, cols, bias=bias, compute_dtype=compute_dtype)
        self.weight = nn.Parameter(torch.empty(rows, cols, dtype=compute_dtype, device="meta"), requires_grad=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return self.weight.data.to(dtype)


class BlobLinear(FrozenLinear):
    """The weight as one uint8 vector, so that ZeRO-3 shards every byte of it."""

    weight: None = None
    """T5 looks at the dtype of a weight before it uses the layer; where there is none it goes on."""

    def __init__(
        self, rows: int, cols: int, *, bias: bool, compute_dtype: torch.dtype, quantization: Quantization
    ) -> None:
        super().__init__(rows, cols, bias=bias, compute_dtype=compute_dtype)
        size = blob_bytes(rows, cols, quantization, compute_dtype.itemsize)
        self.blob = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


class Int8FrozenLinear(BlobLinear):
    """Weight-only int8: [values N | row scales float32 O]."""

    def __init__(self, rows: int, cols: int, *, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(rows, cols, bias=bias, compute_dtype=compute_dtype, quantization="int8")

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        blob, size = self.blob.data, self.out_features * self.in_features
        values_OI = blob[:size].view(torch.int8).view(self.out_features, self.in_features)
        scale_O = blob[size:].clone().view(torch.float32)  # clone: float32 must start at a multiple of 4 bytes
        weight_OI = torch.empty(values_OI.shape, dtype=dtype, device=blob.device)
        return torch.mul(values_OI, scale_O[:, None], out=weight_OI)  # in float32, rounded once


class Nf4FrozenLinear(BlobLinear):
    """4-bit normal float, doubly quantised: [packed N/2 | absmax G | nested absmax float32 G/256 | offset float32]."""

    def __init__(self, rows: int, cols: int, *, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(rows, cols, bias=bias, compute_dtype=compute_dtype, quantization="nf4")

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        weight_OI: Tensor = dequantize_4bit(*self.packed_and_state(dtype))
        return weight_OI

    def packed_and_state(self, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
        """What bitsandbytes' own functions take: (N / 2, 1) bytes, and how they are read as `dtype`. Both are views of
        the blob, but for a few floats."""
        blob, size = self.blob.data, self.out_features * self.in_features
        groups, packed = -(-size // NF4_GROUP), -(-size // 2)
        code, nested_code = _nf4_tables(blob.device)
        tail = blob[packed + groups :].clone().view(torch.float32)  # clone: as in int8
        nested = QuantState(absmax=tail[:-1], code=nested_code, blocksize=NF4_NESTED, dtype=torch.float32)
        state = QuantState(
            absmax=blob[packed : packed + groups],
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype,
            blocksize=NF4_GROUP,
            code=code,
            quant_type="nf4",
            offset=tail[-1],
            state2=nested,
        )
        return blob[:packed].view(-1, 1), state


def build(rows: int, cols: int, *, bias: bool, compute_dtype: torch.dtype, quantization: Quantization) -> FrozenLinear:
    """The frozen layer of one (O, I) weight, on the meta device."""
    match quantization:
        case "nf4":
            return Nf4FrozenLinear(rows, cols, bias=bias, compute_dtype=compute_dtype)
        case "int8":
            return Int8FrozenLinear(rows, cols, bias=bias, compute_dtype=compute_dtype)
        case "none":
            return DenseFrozenLinear(rows, cols, bias=bias, compute_dtype=compute_dtype)
