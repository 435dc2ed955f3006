"""Rows times weights, of one matrix or of one per expert, in float32, 16 bits, group-scaled fp8 or int4; tile sizes.

    out[p] = x[row of p] W[expert of p]^T                               x [., K], W [E, N, K], out [., N]
    gated:   silu(gate) * up of the first and the second N rows of W    W [E, 2N, K]

A pair p = t * top_k + k is token t's k-th expert. Pairs come sorted by expert, in tiles of up to TILE_M pairs of one
expert each (router.py). A shared expert, one more matrix that every token passes through, takes part as rows of its own
behind the pairs. Without pairs, it is a plain product: every token through one matrix.

Weights are the left, tall side of every product, in tiles of at least 64 rows, whatever TILE_M is. So a GPU uses the
same instruction for one pair as for a thousand, only wider, and adds up K in the same order: a row's bits depend
neither on its neighbours nor on the tile sizes. In 16 bits the instruction takes 16 of K and adds to one sum, however
many of them make a TILE_K, so that may be tuned too; in float32 it may not.

Gate and up rows are read as stored, all gate rows before all up rows: a program reads a tile of each, both in full
lines of K, so an interleaved layout would gain nothing.

In fp8 (fp8.py) TILE_K is the 128 of a scale: each tile's product starts at zero and is scaled into the sum. A gated
product then comes out quantised for the next one. In int4 (int4.py) likewise, but x and the output keep their type, and
a tile of words is widened to four tiles of weights in registers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from ._ambient import run_kernel
from ._triton import tl, triton
from ._tuned import measured_for, table
from .overlap import inputs_ready

TILE_K = 64  # unless tuned
SCALE_GROUP = 128  # rows and columns of a weight, columns of an activation, that share an fp8 scale; columns in int4
WORDS = torch.int16  # four weights in int4, see int4.py
TINY = 1e-30  # stands in for the largest magnitude of a group of zeros
_TINY = tl.constexpr(TINY)
_GROUP = tl.constexpr(SCALE_GROUP)
_LANES = tl.constexpr(SCALE_GROUP // 4)  # words of a row's group


class Wanted(NamedTuple):
    """Which of T rows are multiplied, as the device knows it."""

    order: torch.Tensor  # int32 [T], of which the first `count` are rows
    count: torch.Tensor  # int32 [1]


class QuantTensor(NamedTuple):
    """A tensor; or fp8 values (e4m3) and their scales, float32: value times scale is what they stand for; or words of
    int4 weights and their scales, see int4.py."""

    values: torch.Tensor
    scale: torch.Tensor | None = None  # weights [.., N / 128, K / 128], activations [.., K / 128], rounded up

    @property
    def quantization(self):
        """None, "fp8" or "int4"."""
        return None if self.scale is None else "int4" if self.values.dtype == WORDS else "fp8"


def num_groups(size):
    """Groups along `size` elements, the last one cut short."""
    return -(-size // SCALE_GROUP)


def scale_shape(shape, parts=1):
    """Shape of the fp8 scales of a weight [.., N, K] of `parts` matrices one above the other, each with own groups."""
    return (*shape[:-2], parts * num_groups(shape[-2] // parts), num_groups(shape[-1]))


@lru_cache(maxsize=1024)
def tiles(device, hidden, tokens, quantization=None):
    """Tiles of an MoE layer: {"tile_m", "gate_up": {"tile_n", "num_warps", "num_stages"[, "tile_k"]}, "down"}.

    device: a torch.device; hidden: the layer's H; quantization: of its weights, None, "fp8" or "int4". What was
    measured on this device for this H and as many tokens, else the first of the entries for "any" that knows of as
    many. More tokens than those know of are taken for as many as they know.
    """
    kind = quantization or "bf16"
    general = [entry for entry in table("moe") if entry["device"] == "any" and kind in entry]
    general.sort(key=lambda entry: entry["tokens"])
    tokens = min(tokens, general[-1]["tokens"])
    own = measured_for(tokens, "moe", kind, device, hidden=hidden)
    return own or next(entry[kind] for entry in general if tokens <= entry["tokens"])


@triton.jit
def rounded(x, like):
    """x in the dtype that `like` points to, as float32 again."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def scale_of(largest):
    """The scale of a group by its largest magnitude: e4m3 reaches 448."""
    return tl.div_rn(tl.maximum(largest, _TINY), 448.0)


@triton.jit
def _sums(
    x_rows, inside, weight, x_scales, w_scale, n, N: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Sums over K of rows `n` of a matrix with rows of x and, if GATED, of the rows N below: [TILE_N, TILE_M] each."""
    GROUPS: tl.constexpr = (K + _GROUP - 1) // _GROUP
    ROW_GROUPS: tl.constexpr = (N + _GROUP - 1) // _GROUP
    k = tl.arange(0, TILE_K)
    x_at = x_rows + k[None, :]
    w_at = weight + n[:, None] * K + k[None, :]
    real = (n < N)[:, None] if N % TILE_N else tl.full((TILE_N, 1), True, tl.int1)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    up = tl.zeros((TILE_N, TILE_M), tl.float32)
    for done in range(0, K, TILE_K):
        within = (k < K - done)[None, :] if K % TILE_K else tl.full((1, TILE_K), True, tl.int1)
        x = tl.trans(tl.load(x_at + done, mask=inside & within, other=0.0))
        w = tl.load(w_at + done, mask=real & within, other=0.0)
        if x_scales is None:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            group = done // TILE_K
            g = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :]
            x_scale = tl.sum(tl.where(g == group, x_scales, 0.0), 1)[None, :]
            acc += tl.dot(w, x) * (tl.load(w_scale + group) * x_scale)
        if GATED:
            w = tl.load(w_at + (N * K + done), mask=real & within, other=0.0)
            if x_scales is None:
                up = tl.dot(w, x, up, input_precision="ieee")
            else:
                up += tl.dot(w, x) * (tl.load(w_scale + ROW_GROUPS * GROUPS + group) * x_scale)
    return acc, up


@triton.jit
def _digits(words, i: tl.constexpr, like):
    """The i-th weight of all words of int4.py, -8 .. 7, in the type that `like` points to; two words come in one int32.

    In 16 bits a digit becomes the last bits of 128 (bfloat16) or 1024 (float16), two at a time: exact, no conversion.
    """
    dtype: tl.constexpr = like.dtype.element_ty
    pair = (words >> (4 * i)) & 0x000F000F
    if dtype == tl.bfloat16:
        pair |= 0x43004300
    elif dtype == tl.float16:
        pair |= 0x64006400
    halves = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    digit = tl.reshape(halves, [words.shape[0], 2 * words.shape[1]])  # as they lie: nothing moves
    if dtype == tl.bfloat16:
        weight = digit.to(tl.bfloat16, bitcast=True) - 136.0
    elif dtype == tl.float16:
        weight = digit.to(tl.float16, bitcast=True) - 1032.0
    else:
        weight = digit.to(dtype) - 8.0
    return weight.to(dtype)


@triton.jit
def _int4_sums(
    x_rows, inside, weight, scale, n, like, N: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """_sums with rows `n` of a matrix in int4."""
    ROWS: tl.constexpr = 2 * N if GATED else N
    GROUPS: tl.constexpr = (K + _GROUP - 1) // _GROUP
    PAIRS: tl.constexpr = _LANES // 2  # of words
    lane = tl.arange(0, _LANES)[None, :]
    real = n < N
    x_at = x_rows + lane
    w_at = weight + n[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    up = tl.zeros((TILE_N, TILE_M), tl.float32)
    for group in range(GROUPS):
        at = w_at + group * (ROWS * PAIRS)
        words = tl.load(at, mask=real[:, None], other=0)
        own = tl.load(scale + n * GROUPS + group, mask=real, other=0.0).to(tl.float32)  # early: nothing waits for it
        part = tl.zeros_like(acc)
        up_part = tl.zeros_like(acc)
        if GATED:
            up_words = tl.load(at + N * PAIRS, mask=real[:, None], other=0)
            up_own = tl.load(scale + (N + n) * GROUPS + group, mask=real, other=0.0).to(tl.float32)
        for i in tl.static_range(4):
            done = group * _GROUP + i * _LANES
            within = inside & (lane < K - done) if GROUPS * _GROUP > K else inside
            x = tl.trans(tl.load(x_at + done, mask=within, other=0.0))
            part = tl.dot(_digits(words, i, like), x, part, input_precision="ieee")
            if GATED:
                up_part = tl.dot(_digits(up_words, i, like), x, up_part, input_precision="ieee")
        acc += part * own[:, None]
        if GATED:
            up += up_part * up_own[:, None]
    return acc, up


@triton.jit(do_not_specialize=["tokens"])
def _gemm_kernel(
    X, W, SHARED, OUT, X_SCALE, W_SCALE, SHARED_SCALE, OUT_SCALE, LIKE, ORDER, TILES, COUNT, tokens, x_stride,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the shared expert, then a bound on the routed ones) * (N / TILE_N), the latter fastest; of a plain
    product the former, so that a tile of weights, of which there are far more than of rows, comes from memory once.

    GATED: a row of X is a token, else a row of OUT. SHARED: one more matrix, or None. COUNT: of TILES. TILES None: one
    matrix, W, and every row, or those COUNT that ORDER names. Scales None: neither fp8 nor int4, which has none of X.
    OUT_SCALE: OUT is fp8 too, TILE_N 128. LIKE: of the type of activations.
    """
    inputs_ready(EARLY)
    INT4: tl.constexpr = W_SCALE is not None and X_SCALE is None
    ROWS: tl.constexpr = 2 * N if GATED else N
    GROUPS: tl.constexpr = (K + _GROUP - 1) // _GROUP  # of a row's K that share a scale
    ROW_GROUPS: tl.constexpr = (N + _GROUP - 1) // _GROUP  # of a matrix's rows; gate and up have their own
    SPAN: tl.constexpr = ROWS * GROUPS * (_LANES // 2) if INT4 else ROWS * K
    if TILES is None:
        tile = tl.program_id(0) % tl.cdiv(tokens, TILE_M)
        first = tl.program_id(0) // tl.cdiv(tokens, TILE_M) * TILE_N
    else:
        tile = tl.program_id(0) // tl.cdiv(N, TILE_N)
        first = tl.program_id(0) % tl.cdiv(N, TILE_N) * TILE_N
    n = first + tl.arange(0, TILE_N)
    m = tl.arange(0, TILE_M)
    weight = W
    w_scale = W_SCALE
    if TILES is None:
        row = tile * TILE_M + m
        inside = row < tokens
        if ORDER is not None:
            count = tl.load(COUNT)
            if tile * TILE_M >= count:
                return
            inside = row < count
            row = tl.load(ORDER + row, mask=inside, other=0)
        source = row
    else:
        if SHARED is not None:
            tile -= tl.cdiv(tokens, TILE_M)
        entry = TILES + tl.maximum(tile, 0) * 3  # within its allocation even where nothing was listed
        expert = tl.load(entry).to(tl.int64)
        begin = tl.load(entry + 1)
        end = tl.load(entry + 2)
        if tile >= tl.load(COUNT):
            return
        inside = (begin + m < end) & (tile >= 0)
        row = tl.load(ORDER + begin + m, mask=inside, other=0)
        source = row // TOP_K if GATED else row
        weight += expert * SPAN
        if W_SCALE is not None:
            w_scale += expert * ((ROWS if INT4 else 2 * ROW_GROUPS if GATED else ROW_GROUPS) * GROUPS)
        if SHARED is not None:
            if tile < 0:
                token = (tile + tl.cdiv(tokens, TILE_M)) * TILE_M + m
                inside = token < tokens
                row = tokens * TOP_K + token
                source = token if GATED else row
                weight = SHARED
                w_scale = SHARED_SCALE
    if X_SCALE is not None:
        w_scale += first // _GROUP * GROUPS  # one group of rows holds all of the tile
    x_rows = X + source[:, None].to(tl.int64) * x_stride
    inside_rows = inside[:, None]
    if INT4:
        acc, up = _int4_sums(x_rows, inside_rows, weight, w_scale, n, LIKE, N, K, GATED, TILE_M, TILE_N)
    else:
        x_scales = None
        if X_SCALE is not None:  # all of them at once: read one by one, their addresses fill the registers
            g = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :]
            at = X_SCALE + source[:, None].to(tl.int64) * GROUPS + g
            x_scales = tl.load(at, mask=inside_rows & (g < GROUPS), other=0.0)
        acc, up = _sums(x_rows, inside_rows, weight, x_scales, w_scale, n, N, K, GATED, TILE_M, TILE_N, TILE_K)
    real = (n < N)[:, None] if N % TILE_N else tl.full((TILE_N, 1), True, tl.int1)
    if GATED:
        gate = rounded(acc, LIKE)
        acc = rounded(rounded(gate / (1.0 + tl.exp(-gate)), LIKE) * rounded(up, LIKE), LIKE)
    mask = real & inside[None, :]
    place = row[None, :].to(tl.int64) * N + n[:, None]
    if OUT_SCALE is None:
        tl.store(OUT + place, acc.to(OUT.dtype.element_ty), mask=mask)
    else:
        scale = scale_of(tl.max(tl.abs(acc), 0))
        tl.store(OUT + place, tl.div_rn(acc, scale[None, :]).to(OUT.dtype.element_ty), mask=mask)
        tl.store(OUT_SCALE + row.to(tl.int64) * ROW_GROUPS + first // _GROUP, scale, mask=inside)


def _loaded(weight):
    """A weight's values as the kernel reads them: of int4 two words at a time."""
    return weight.values.view(torch.int32) if weight.quantization == "int4" else weight.values


def gemm(
    x, weight, shared, routing, gated, like, tile_m, tile_n, num_warps, num_stages, tile_k=TILE_K, wanted=None
):  # fmt: skip
    """All pairs of a Routing and, behind them, all tokens through `shared`; or routing None: x W^T. One launch.

    x [T, K] if gated or without routing, else [T * top_k (+ T), K]; weight [E, N or 2N, K], without routing no E;
    shared [N or 2N, K] or None; all QuantTensor, contiguous but for the rows of an x that is not fp8. Returns a
    QuantTensor: [T * top_k (+ T), N], or [T, N], in the dtype of the tensor `like`, but fp8 if gated with fp8 weights.
    tile_m must be the routing's if there is one; tile_n and tile_k are those of 16 bits. With weights in int4 x is of
    the dtype of `like`. wanted: without routing, the Wanted rows, None = all; others' results are not written.
    """
    (tokens, top_k), bound = (routing.ids.shape, len(routing.tiles)) if routing else ((len(x.values), 1), 0)
    rows, depth = weight.values.shape[-2], x.values.shape[1]
    width = rows // 2 if gated else rows
    alone = shared is not None or routing is None
    count = tokens * (top_k if routing else 0) + (tokens if alone else 0)
    fp8 = weight.quantization == "fp8"
    narrow = fp8 and gated
    out = like.new_empty(count, width, dtype=weight.values.dtype if narrow else like.dtype)
    out_scale = like.new_empty(count, triton.cdiv(width, SCALE_GROUP), dtype=torch.float32) if narrow else None
    if weight.scale is not None:
        tile_k = SCALE_GROUP
    if fp8:
        tile_n = SCALE_GROUP if gated else tile_n
    else:
        # Triton multiplies float32 in TF32 on sm_100 if the left side has 64 rows or more, whatever the precision asked
        tile_n, tile_k = (32, 32) if like.dtype == torch.float32 else (tile_n, tile_k)
    tiles = bound + (triton.cdiv(tokens, tile_m) if alone else 0)
    if count == 0:
        return QuantTensor(out, out_scale)
    order = listed = number = None
    if routing:
        order, listed, number = routing.order, routing.tiles, routing.num_tiles
    elif wanted:
        order, number = wanted
    run_kernel(
        _gemm_kernel, (tiles * triton.cdiv(width, tile_n),),
        x.values, _loaded(weight), shared and _loaded(shared), out,
        x.scale, weight.scale, shared and shared.scale, out_scale, like,
        order, listed, number, tokens, x.values.stride(0),
        N=width, K=depth, TOP_K=top_k, GATED=gated, TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return QuantTensor(out, out_scale)
