"""Rows times weights of one matrix per expert, and how large its tiles are.

    out[p] = x[row of p] W[expert of p]^T                               x [., K], W [E, N, K], out [., N]
    gated:   silu(gate) * up of the first and the second N rows of W    W [E, 2N, K]

A pair p = t * top_k + k is token t's k-th expert. Pairs come sorted by expert, in tiles of up to TILE_M pairs of one
expert each (router.py). A shared expert, one more matrix that every token passes through, takes part as rows of its own
behind the pairs.

Weights are the left, tall side of every product, in tiles of at least 64 rows, whatever TILE_M is. So a GPU uses the
same instruction for one pair as for a thousand, only wider, and adds up K in the same order, TILE_K at a time: a row's
bits depend neither on its neighbours nor on the tile sizes. TILE_K is therefore never tuned.

Gate and up rows are read as stored, all gate rows before all up rows: a program reads a tile of each, both in full
lines of K, so an interleaved layout would gain nothing.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch

from ._triton import tl, triton

TUNED = Path(__file__).with_name("moe_tuned.json")  # written by benchmarks/tune_moe.py
TILE_K = 64


@lru_cache(maxsize=1024)
def tiles(device, hidden, tokens):
    """Tile sizes of an MoE layer: {"tile_m", "gate_up": {"tile_n", "num_warps", "num_stages"}, "down": the same}.

    device: a torch.device; hidden: the layer's H. Entries measured on this device for this H win over those for "any";
    among either the first that is meant for as many tokens.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "any"
    table = _table()
    entries = [entry for entry in table if entry["device"] == name and entry["hidden"] == hidden]
    entries = entries or [entry for entry in table if entry["device"] == "any"]
    entries.sort(key=lambda entry: entry["tokens"])
    return next((entry for entry in entries if tokens <= entry["tokens"]), entries[-1])


@lru_cache(maxsize=1)
def _table():
    return json.loads(TUNED.read_text("utf-8"))


@triton.jit
def rounded(x, like):
    """x in the dtype that `like` points to, as float32 again."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _expert_gemm_kernel(
    X, W, SHARED, OUT, ORDER, TILES, NUM_TILES, tokens, x_stride,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the shared expert, then a bound on the routed ones) * (N / TILE_N), the latter fastest.

    GATED: a row of X is a token, else a row of OUT. SHARED: one more matrix, or None.
    """
    SPAN: tl.constexpr = (2 * N if GATED else N) * K
    tile = tl.program_id(0) // tl.cdiv(N, TILE_N)
    n = tl.program_id(0) % tl.cdiv(N, TILE_N) * TILE_N + tl.arange(0, TILE_N)
    m = tl.arange(0, TILE_M)
    if SHARED is not None:
        tile -= tl.cdiv(tokens, TILE_M)
    entry = TILES + tl.maximum(tile, 0) * 3  # within its allocation even where nothing was listed
    expert = tl.load(entry)
    begin = tl.load(entry + 1)
    end = tl.load(entry + 2)
    if tile >= tl.load(NUM_TILES):
        return
    inside = (begin + m < end) & (tile >= 0)
    row = tl.load(ORDER + begin + m, mask=inside, other=0)
    source = row // TOP_K if GATED else row
    weight = W + expert.to(tl.int64) * SPAN
    if SHARED is not None:
        if tile < 0:
            token = (tile + tl.cdiv(tokens, TILE_M)) * TILE_M + m
            inside = token < tokens
            row = tokens * TOP_K + token
            source = token if GATED else row
            weight = SHARED
    k = tl.arange(0, TILE_K)
    x_at = X + source[:, None].to(tl.int64) * x_stride + k[None, :]
    w_at = weight + n[:, None] * K + k[None, :]
    real = (n < N)[:, None] if N % TILE_N else tl.full((TILE_N, 1), True, tl.int1)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    up = tl.zeros((TILE_N, TILE_M), tl.float32)
    for done in range(0, K, TILE_K):
        within = (k < K - done)[None, :] if K % TILE_K else tl.full((1, TILE_K), True, tl.int1)
        x = tl.trans(tl.load(x_at + done, mask=inside[:, None] & within, other=0.0))
        w = tl.load(w_at + done, mask=real & within, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            w = tl.load(w_at + (N * K + done), mask=real & within, other=0.0)
            up = tl.dot(w, x, up, input_precision="ieee")
    if GATED:
        gate = rounded(acc, OUT)
        acc = rounded(gate / (1.0 + tl.exp(-gate)), OUT) * rounded(up, OUT)
    place = OUT + row[None, :].to(tl.int64) * N + n[:, None]
    tl.store(place, acc.to(OUT.dtype.element_ty), mask=real & inside[None, :])


def expert_gemm(x, weight, shared, routing, gated, tile_n, num_warps, num_stages):
    """x [T, K] if gated, else [T * top_k (+ T), K]; weight [E, N or 2N, K] -> [T * top_k (+ T), N] in x's dtype.

    shared [N or 2N, K] adds the T rows in brackets, or is None; routing: a Routing with its tiles. All contiguous, but
    for the rows of x. One launch.
    """
    tokens, top_k = routing.ids.shape
    experts, rows, depth = weight.shape
    width = rows // 2 if gated else rows
    out = x.new_empty(tokens * top_k + (0 if shared is None else tokens), width)
    # Triton multiplies float32 in TF32 on sm_100 if the left side has 64 rows or more, whatever input_precision says
    tile_n, tile_k = (32, 32) if x.dtype == torch.float32 else (tile_n, TILE_K)
    count = len(routing.tiles) + (0 if shared is None else triton.cdiv(tokens, routing.tile_m))
    _expert_gemm_kernel[(count * triton.cdiv(width, tile_n),)](
        x, weight, shared, out, routing.order, routing.tiles, routing.num_tiles, tokens, x.stride(0),
        N=width, K=depth, TOP_K=top_k, GATED=gated, TILE_M=routing.tile_m, TILE_N=tile_n, TILE_K=tile_k,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
