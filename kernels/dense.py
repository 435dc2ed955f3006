"""Rows times one matrix by our own product (gemm.py): in fp8, and in the model's dtype where a row must have the same
bits at any height.

    y = x W^T                        x [T, K], W [N, K] -> [T, N]
    gated:  silu(gate) * up          W [2N, K], gate rows first

K is added up in one order whatever the tiles, so on a GPU a row's bits do not depend on the rows beside it: cuBLAS,
which else multiplies in 16 bits and float32, picks its kernels by their number. Where a matrix has few rows, K is cut
into parts, by its shape alone, which are summed up on their own and then added in order: with few tokens by a program
each, so that enough of them keep memory busy.
"""

from functools import lru_cache

from ._triton import triton
from ._tuned import measured_for
from .gemm import gemm, scale_shape

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
SMALL = 2**24  # elements of a matrix, with more the parts of one program fill its registers and bring little
PART = 512  # of K at least
FEW = 64  # tokens: with more, what parts leave each other in memory takes longer than it saves


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


def parts_of(rows, columns, gated):
    """Into how many parts K is cut: part of the definition of a row's bits."""
    parts, small = 1, not gated and rows * columns <= SMALL
    while small and 2 * parts * triton.cdiv(rows, 64) <= PROGRAMS and columns % (2 * parts * PART) == 0:
        parts *= 2
    return parts


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
    tokens, (rows, columns) = len(x.values), weight.values.shape
    own = own or tiles(like.device, rows, columns, gated, tokens, fp8)
    parts = parts_of(rows, columns, gated)
    together = parts == 1 or tokens > FEW
    return gemm(x, weight, None, None, gated, like, **own, parts=parts, together=together, wanted=wanted)
