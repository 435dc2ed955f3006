"""Rows times one matrix by our own product (gemm.py): in fp8, int4, and in the model's dtype where a row must have the
same bits at any height.

    y = x W^T                        x [T, K], W [N, K] -> [T, N]
    gated:  silu(gate) * up          W [2N, K], gate rows first

K is added up in one order whatever the tiles, so on a GPU a row's bits do not depend on the rows beside it: cuBLAS,
which multiplies in 16 bits and float32 where a network is not `exact`, picks its kernels by their number.
"""

from functools import lru_cache

from . import int4
from ._triton import triton
from ._tuned import measured_for
from .gemm import QuantTensor, gemm, scale_shape

PROGRAMS = 256  # about two for each multiprocessor of a large GPU


@lru_cache(maxsize=1024)
def tiles(device, rows, columns, gated, tokens, quantization=None):
    """Tiles of a product with a matrix of this shape, as gemm takes them: as measured on this torch.device for as many
    tokens, else default_tiles. quantization: of the matrix, as in gemm.QuantTensor."""
    shape = {"rows": rows, "columns": columns, "gated": gated}
    found = measured_for(tokens, "dense", quantization or "bf16", device, **shape)
    return found or default_tiles(rows, gated, tokens, quantization)


def default_tiles(rows, gated, tokens, quantization=None):
    """Too few programs would read a small matrix in large tiles; a gated product has no registers for 128 tokens, and
    none that widens its weights. In 16 bits few tokens are best cut into many programs, as an H100 has it."""
    tile_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    if quantization == "int4":
        return {"tile_m": tile_m, "tile_n": 64, "num_warps": 4, "num_stages": 4}
    large = rows > 8192
    if quantization is None and not gated and tokens <= 64:
        tile = {"tile_m": min(tile_m, 32), "tile_n": 128} if large else {"tile_m": 16, "tile_n": 64}
        return tile | {"tile_k": 128, "num_warps": 4, "num_stages": 3 if large else 4}
    if quantization is None and not gated and triton.cdiv(tokens, 128) * triton.cdiv(rows, 128) >= PROGRAMS // 2:
        return {"tile_m": 128, "tile_n": 128, "num_warps": 8, "num_stages": 3}
    tile_n = 128 if gated or large else 64
    if tokens > 64 and not gated and triton.cdiv(tokens, 128) * triton.cdiv(rows, tile_n) >= PROGRAMS:
        tile_m = 128
    warps, stages = 8 if tile_m * tile_n >= 8192 else 4, 3 if gated else 4
    return {"tile_m": tile_m, "tile_n": tile_n, "num_warps": warps, "num_stages": stages}


def dense(x, weight, gated, like, own=None, wanted=None):
    """x [T, K] times one matrix, both QuantTensor -> QuantTensor [T, N], in the dtype of `like`, but fp8 if gated with
    fp8 weights. One launch. ValueError if shapes do not fit.

    own: its tiles, None = the table's; wanted: the Wanted rows, None = all: what comes out for others is undefined.
    """
    if x.scale is None and x.values.stride(1) != 1:
        x = QuantTensor(x.values.contiguous())
    (tokens, columns), rows = x.values.shape, weight.values.shape[-2]
    _check(x, weight, gated)
    own = own or tiles(like.device, rows, columns, gated, tokens, weight.quantization)
    return gemm(x, weight, None, None, gated, like, **own, wanted=wanted)


def _check(x, weight, gated):
    if weight.quantization == "int4":
        int4.check("weight", weight, (weight.values.shape[-2], x.values.shape[1]))
        return
    if weight.values.shape[1] != x.values.shape[1] or not weight.values.is_contiguous():
        raise ValueError(f"weight: contiguous [N, {x.values.shape[1]}] expected, got {list(weight.values.shape)}")
    if weight.quantization == "fp8":
        expected = scale_shape(weight.values.shape, 2 if gated else 1)
        if weight.scale.shape != expected or not weight.scale.is_contiguous():
            raise ValueError(f"scale: contiguous {list(expected)} expected, got {list(weight.scale.shape)}")
    elif weight.values.dtype != x.values.dtype:
        raise ValueError(f"weight: {x.values.dtype} expected, as x, got {weight.values.dtype}")
