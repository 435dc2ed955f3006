"""Rows times one matrix by our own product (gemm.py): in fp8, and in the model's dtype where a row must have the same
bits at any height.

    y = x W^T                        x [T, K], W [N, K] -> [T, N]
    gated:  silu(gate) * up          W [2N, K], gate rows first

K is added up in one order whatever the tiles, so on a GPU a row's bits do not depend on the rows beside it: cuBLAS,
which else multiplies in 16 bits and float32, picks its kernels by their number.
"""

from functools import lru_cache

from ._triton import triton
from ._tuned import measured_for
from .gemm import gemm, scale_shape

PROGRAMS = 256  # about two for each multiprocessor of a large GPU


@lru_cache(maxsize=1024)
def tiles(device, rows, columns, gated, tokens, fp8):
    """Tiles of a product with a matrix of this shape, as gemm takes them: as measured on this torch.device for as many
    tokens, else default_tiles."""
    shape = {"rows": rows, "columns": columns, "gated": gated}
    kind = "fp8" if fp8 else "bf16"
    return measured_for(tokens, "dense", kind, device, **shape) or default_tiles(rows, gated, tokens)


def default_tiles(rows, gated, tokens):
    """Too few programs would read a small matrix in large tiles; a gated product has no registers for 128 tokens."""
    tile_n = 128 if gated or rows > 8192 else 64
    tile_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    if tokens > 64 and not gated and triton.cdiv(tokens, 128) * triton.cdiv(rows, tile_n) >= PROGRAMS:
        tile_m = 128
    warps, stages = 8 if tile_m * tile_n >= 8192 else 4, 3 if gated else 4
    return {"tile_m": tile_m, "tile_n": tile_n, "num_warps": warps, "num_stages": stages}


def dense(x, weight, gated, like, own=None, wanted=None):
    """x [T, K] times one matrix, both QuantTensor -> QuantTensor [T, N], in the dtype of `like`, but fp8 if gated with
    fp8 weights. One launch. ValueError if shapes do not fit.

    own: its tiles, None = the table's; wanted: the Wanted rows, None = all: what comes out for others is undefined.
    """
    if weight.values.shape[1] != x.values.shape[1] or not weight.values.is_contiguous():
        raise ValueError(f"weight: contiguous [N, {x.values.shape[1]}] expected, got {list(weight.values.shape)}")
    fp8 = weight.scale is not None
    if fp8:
        expected = scale_shape(weight.values.shape, 2 if gated else 1)
        if weight.scale.shape != expected or not weight.scale.is_contiguous():
            raise ValueError(f"scale: contiguous {list(expected)} expected, got {list(weight.scale.shape)}")
    elif weight.values.dtype != x.values.dtype:
        raise ValueError(f"weight: {x.values.dtype} expected, as x, got {weight.values.dtype}")
    own = own or tiles(like.device, *weight.values.shape, gated, len(x.values), fp8)
    return gemm(x, weight, None, None, gated, like, **own, wanted=wanted)
