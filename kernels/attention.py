"""Block attention over a paged cache of keys and values.

    o = softmax(q k^T / sqrt(D)) v          q [T, nq, D] -> o [T, nq, D]; KV head h serves q heads h*g .. h*g+g-1

A *span* is a number of consecutive whole blocks of one row, forwarded together: one for a denoise step, two when the
finished block is carried along, many in prefill. Each block of a span sees all earlier blocks of its row and itself,
bidirectionally, and nothing later. Its own keys and values are already in its pages (write_pages).

    k_cache, v_cache [pages, L, nk, D]      page = one block of K/V

On a GPU a block's keys are cut into at most MAX_SPLITS splits by their number alone; each split has its own programs,
and their results are added in the order of the splits. So a block's bits depend on its own row and on nothing else.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._ambient import run_kernel
from ._triton import FLOATS, tl, triton, use_triton
from ._tuned import measured

# Keys of a split at most (more beyond 4096 keys), splits of a block. By 128, 256, 512 and 1024 keys an H100 takes 11.9,
# 13.2, 16.8 and 21.5 µs for a row of 1024 keys of mini, but 97, 71, 57 and 49 µs for 32 of them.
SPLIT, MAX_SPLITS = 256, 16
SCRATCH_BYTES = 2**28  # partial results of one launch; more query blocks than fit take several
_TABLES = ["BLOCK_ROW", "BLOCK_INDEX", "PAGE_TABLE", "LIMIT"]  # compiled alike wherever they begin


class Span(NamedTuple):
    """num_blocks blocks of one row from block first_block on; pages: the row's pages from block 0 on.

    limit: how many positions of the row exist; later ones in the last page are never attended to.
    """

    pages: tuple[int, ...]
    first_block: int
    num_blocks: int
    limit: int


def pinned(numbers, device):
    """Ints as int32 [n] on the CPU, to be copied to `device` without waiting for what runs there."""
    return torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=torch.device(device).type == "cuda")


class BlockBatch(NamedTuple):
    """Query blocks described by tensors, so that a CUDA graph holds them. NB blocks, R rows, P pages of a row.

    Query block i is block block_index[i] of row block_row[i]. Row -1 = unused: its tokens go to no page, its output is
    zero, its index is any of 0 .. P-1. Pages behind a row's last query block are never read.
    """

    block_row: torch.Tensor  # int32 [NB]
    block_index: torch.Tensor  # int32 [NB]
    page_table: torch.Tensor  # int32 [R, P]: the row's pages from block 0 on
    limit: torch.Tensor  # int32 [R]: how many positions of the row exist

    @classmethod
    def from_spans(cls, spans, device):
        """The blocks of a list of Span, in order; a row per span."""
        ends = [span.first_block + span.num_blocks for span in spans]
        width = max(ends, default=0)
        blocks = [(i, b) for i, span in enumerate(spans) for b in range(span.first_block, ends[i])]
        table = [page for span in spans for page in (span.pages[:width] + (0,) * width)[:width]]
        numbers = [row for row, _ in blocks] + [index for _, index in blocks] + table + [span.limit for span in spans]
        flat = pinned(numbers, device).to(device, non_blocking=True)  # one copy to the device, not four
        row, index, table, limit = flat.split([len(blocks), len(blocks), len(table), len(spans)])
        return cls(row, index, table.view(len(spans), width), limit)

    def slots(self, length):
        """Cache slots of all tokens for blocks of `length` tokens: int64 [NB * length], -1 in unused blocks."""
        row = self.block_row.long()[:, None]
        page = self.page_table[row, self.block_index.long()[:, None]]  # of the last row where it is -1
        slot = torch.add(torch.arange(length, device=row.device), page, alpha=length)
        return slot.masked_fill_(row < 0, -1).flatten()

    def spans(self):
        """The used blocks as a list of (query block, Span of one block); for the reference."""
        limits, tables = self.limit.tolist(), self.page_table.tolist()  # sync: reference
        blocks = zip(self.block_row.tolist(), self.block_index.tolist(), strict=True)  # sync: reference
        return [
            (i, Span(tuple(tables[row][: index + 1]), index, 1, limits[row]))
            for i, (row, index) in enumerate(blocks)
            if row >= 0
        ]


def write_pages(k, v, k_cache, v_cache, slot):
    """Store k, v [T, nk, D] at slots [T] int64 (page * L + offset) of the caches [pages, L, nk, D]."""
    k_cache.flatten(0, 1).index_copy_(0, slot, k)
    v_cache.flatten(0, 1).index_copy_(0, slot, v)


def span_slots(spans, block_length):
    """Cache slots of all tokens of the spans, in order: a list of ints."""
    return [
        span.pages[block] * block_length + offset
        for span in spans
        for block in range(span.first_block, span.first_block + span.num_blocks)
        for offset in range(block_length)
    ]


def single_blocks(spans, ordinals):
    """Spans of one block each: those of the blocks with these ordinals among the blocks of all spans."""
    singles = [
        span._replace(first_block=span.first_block + i, num_blocks=1) for span in spans for i in range(span.num_blocks)
    ]
    return [singles[i] for i in ordinals]


def place_blocks(blocks, length, x):
    """blocks (list of Span or BlockBatch) as block_attention takes them for tensors like x, and their tokens' slots."""
    if not isinstance(blocks, BlockBatch):
        if not use_triton(x):
            return blocks, torch.tensor(span_slots(blocks, length), dtype=torch.int64, device=x.device)
        blocks = BlockBatch.from_spans(blocks, x.device)
    return blocks, blocks.slots(length)


def block_attention_ref(q, k_cache, v_cache, spans):
    """q [T, nq, D], T = sum of the spans' blocks times L; caches [pages, L, nk, D] -> [T, nq, D].

    Each block has a call of its own, so that its bits do not depend on the span it is in: how a prompt was cut into
    chunks, or how much of it was found in the cache. Larger masked calls are no faster at L = 32 (measured, CPU).
    """
    length = k_cache.shape[1]
    out = torch.empty_like(q)
    begin = 0
    for span in spans:
        keys = _row(k_cache, span, length)
        values = _row(v_cache, span, length)
        for block in range(span.first_block, span.first_block + span.num_blocks):
            seen = min((block + 1) * length, span.limit)
            out[begin : begin + length] = _attend(q[begin : begin + length], keys[:seen], values[:seen])
            begin += length
    return out


def _row(cache, span, length):
    """The row's keys or values up to the span's end, [S, nk, D]; a view where its pages stand side by side."""
    end = span.first_block + span.num_blocks
    if _side_by_side(span.pages):
        return cache[span.pages[0] : span.pages[0] + end].flatten(0, 1)
    return cache[torch.tensor(span.pages[:end], dtype=torch.int64, device=cache.device)].flatten(0, 1)


@lru_cache(maxsize=4096)  # asked for every layer and step of a row, a tenth of a millisecond at 2000 tokens
def _side_by_side(pages):
    return pages == tuple(range(pages[0], pages[0] + len(pages)))


def _attend(q, k, v):
    """q [Q, nq, D], k, v [S, nk, D] -> [Q, nq, D]. Heads of a KV group are folded into the queries."""
    count, heads, dim = q.shape
    groups = k.shape[1]
    folded = q.view(count, groups, -1, dim).permute(1, 2, 0, 3).reshape(1, groups, -1, dim)
    o = F.scaled_dot_product_attention(folded, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    return o.view(groups, -1, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)


def batch_attention_ref(q, k_cache, v_cache, batch):
    """block_attention_ref for a BlockBatch: q [NB * L, nq, D] -> [NB * L, nq, D], zeros in unused blocks."""
    length = k_cache.shape[1]
    out = torch.zeros_like(q)
    for block, span in batch.spans():
        rows = slice(block * length, (block + 1) * length)
        out[rows] = block_attention_ref(q[rows], k_cache, v_cache, [span])
    return out


@triton.jit
def _splits(BLOCK_ROW, BLOCK_INDEX, LIMIT, block, L, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """row of a query block, the keys it sees (none if unused), keys of a split, splits: part of the definition.

    As few splits as there can be, then whole pages for each, as evenly as that goes.
    """
    row = tl.load(BLOCK_ROW + block)
    used = row >= 0
    row = tl.maximum(row, 0)
    seen = tl.where(used, tl.minimum((tl.load(BLOCK_INDEX + block) + 1) * L, tl.load(LIMIT + row)), 0)
    most = tl.minimum(tl.cdiv(tl.maximum(seen, 1), SPLIT), MAX_SPLITS)
    size = tl.maximum(tl.cdiv(tl.cdiv(seen, most), L), 1) * L
    return row.to(tl.int64), seen, size, tl.cdiv(seen, size)


@triton.jit(do_not_specialize=[*_TABLES, "first", "splits", "table_stride"])
def _attention_kernel(
    Q, K, V, OUT, PART, TOP, TOTAL, BLOCK_ROW, BLOCK_INDEX, PAGE_TABLE, LIMIT,
    first, splits, scale, table_stride, q_stride, page_stride, token_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads * query tiles, splits, query blocks from `first` on).

    The L queries of the GROUP heads that share a KV head are the rows of one matrix. A block's only split goes to OUT;
    of several each leaves exp2-sums relative to its largest score: PART [blocks, splits, L * HEADS, D], TOP and TOTAL.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (L * GROUP + TILE_M - 1) // TILE_M
    kv_head = tl.program_id(0) // TILES
    m = tl.program_id(0) % TILES * TILE_M + tl.arange(0, TILE_M)
    split = tl.program_id(1)
    block = first + tl.program_id(2)
    row, seen, size, count = _splits(BLOCK_ROW, BLOCK_INDEX, LIMIT, block, L, SPLIT, MAX_SPLITS)
    if split >= tl.maximum(count, 1):
        return
    d = tl.arange(0, TILE_D)
    n = tl.arange(0, TILE_N)
    in_head = (d < D)[None, :]
    asks = (m < L * GROUP)[:, None] & in_head
    head = kv_head * GROUP + m % GROUP
    query = block.to(tl.int64) * L + m // GROUP
    q = tl.load(Q + (query * q_stride + head * D)[:, None] + d[None, :], mask=asks, other=0.0)
    pages = PAGE_TABLE + row * table_stride
    inner = kv_head * head_stride + d[None, :]

    top = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    end = tl.minimum((split + 1) * size, seen)
    for begin in range(split * size, end, TILE_N):
        at = begin + n
        exists = at < end
        page = tl.load(pages + at // L, mask=exists, other=0).to(tl.int64)
        place = (page * page_stride + at % L * token_stride)[:, None] + inner
        k = tl.load(K + place, mask=exists[:, None] & in_head, other=0.0)
        v = tl.load(V + place, mask=exists[:, None] & in_head, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = tl.where(exists[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    if count <= 1:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(OUT + ((query * HEADS + head) * D)[:, None] + d[None, :], out.to(OUT.dtype.element_ty), mask=asks)
    else:
        part = (tl.program_id(2).to(tl.int64) * splits + split) * (L * HEADS) + m // GROUP * HEADS + head
        tl.store(PART + (part * D)[:, None] + d[None, :], acc, mask=asks)
        tl.store(TOP + part, top, mask=m < L * GROUP)
        tl.store(TOTAL + part, total, mask=m < L * GROUP)


@triton.jit(do_not_specialize=[*_TABLES, "first", "splits"])
def _combine_kernel(
    PART, TOP, TOTAL, OUT, BLOCK_ROW, BLOCK_INDEX, LIMIT, first, splits,
    HEADS: tl.constexpr, D: tl.constexpr, L: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    TILE_R: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the L * HEADS query vectors, query blocks from `first` on): adds a block's splits in order."""
    r = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    block = first + tl.program_id(1)
    _row, _seen, _size, count = _splits(BLOCK_ROW, BLOCK_INDEX, LIMIT, block, L, SPLIT, MAX_SPLITS)
    if count <= 1:
        return
    d = tl.arange(0, TILE_D)
    s = tl.arange(0, MAX_SPLITS)
    real = r < L * HEADS
    part = tl.program_id(1).to(tl.int64) * splits * (L * HEADS) + r  # the vector's first split
    both = real[:, None] & (s < count)[None, :]
    each = part[:, None] + s[None, :] * (L * HEADS)
    tops = tl.load(TOP + each, mask=both, other=float("-inf"))
    top = tl.max(tops, 1)
    total = tl.sum(tl.exp2(tops - top[:, None]) * tl.load(TOTAL + each, mask=both, other=0.0), 1)
    acc = tl.zeros([TILE_R, TILE_D], tl.float32)
    mask = real[:, None] & (d < D)[None, :]
    for _ in tl.range(0, count, num_stages=4):  # three loads ahead of the sum, or each waits for the one before
        weight = tl.exp2(tl.load(TOP + part, mask=real, other=0.0) - top)
        acc += weight[:, None] * tl.load(PART + (part * D)[:, None] + d[None, :], mask=mask, other=0.0)
        part += L * HEADS
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + ((block.to(tl.int64) * (L * HEADS) + r) * D)[:, None] + d[None, :], out, mask=mask)


def block_attention(q, k_cache, v_cache, blocks):
    """Block attention of packed query blocks: q [NB * L, nq, D], caches [pages, L, nk, D] -> [NB * L, nq, D].

    blocks: list of Span or a BlockBatch; the latter on a GPU, where a list costs a copy to the device at every call.
    ValueError if shapes, dtypes or strides do not fit.
    """
    if use_triton(q):
        batch = blocks if isinstance(blocks, BlockBatch) else BlockBatch.from_spans(blocks, q.device)
        return launch(q, k_cache, v_cache, batch)
    if isinstance(blocks, BlockBatch):
        return batch_attention_ref(q, k_cache, v_cache, blocks)
    return block_attention_ref(q, k_cache, v_cache, blocks)


def launch(q, k_cache, v_cache, batch):
    check_caches(q, k_cache, v_cache, k_cache.shape[-2])
    _, length, kv_heads, dim = k_cache.shape
    tokens, heads, _ = q.shape
    rows, width = batch.page_table.shape
    count = batch.block_row.shape[0]
    if tokens != count * length or q.stride()[1:] != (dim, 1) or heads % kv_heads or q.dtype not in FLOATS:
        raise ValueError(
            f"q: [{count} * {length}, a multiple of {kv_heads}, {dim}] of {FLOATS} expected, a token's heads side by "
            f"side, got {q.dtype} {list(q.shape)} with strides {q.stride()}"
        )
    shapes = BlockBatch((count,), (count,), (rows, width), (rows,))
    for name, x, shape in zip(batch._fields, batch, shapes, strict=True):
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous() or x.device != q.device:
            raise ValueError(
                f"{name}: contiguous int32 {list(shape)} on {q.device} expected, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    splits = min(MAX_SPLITS, triton.cdiv(width * length, SPLIT))  # more than a row of this table has are never made
    at_once = max(1, min(count, 65535, SCRATCH_BYTES // (4 * splits * length * heads * (dim + 2))))
    vectors = at_once * splits * length * heads if splits > 1 else 1
    part = torch.empty(vectors, dim, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, vectors, dtype=torch.float32, device=q.device)
    meta, combine = attention_tiles(q.device, q.dtype, length, heads, kv_heads, dim)
    tiles = triton.cdiv(length * heads // kv_heads, meta["TILE_M"])
    for first in range(0, count, at_once):
        grid = min(at_once, count - first)
        run_kernel(
            _attention_kernel, (kv_heads * tiles, splits, grid),
            q, k_cache, v_cache, out, part, top, total, *batch, first, splits, dim**-0.5 * 1.4426950408889634,
            width, q.stride(0), *k_cache.stride()[:3], **meta,
        )  # fmt: skip
        if splits > 1:
            run_kernel(
                _combine_kernel, (triton.cdiv(length * heads, combine["TILE_R"]), grid),
                part, top, total, out, batch.block_row, batch.block_index, batch.limit, first, splits, **combine
            )  # fmt: skip
    return out


def check_caches(x, k_cache, v_cache, kv_heads):
    """ValueError unless k_cache and v_cache are [pages, L, kv_heads, D] of x's D, dtype and device, laid out alike."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4 or cache.shape[2:] != (kv_heads, x.shape[-1]) or cache.stride(3) != 1:
            raise ValueError(
                f"{name}: [pages, L, {kv_heads}, {x.shape[-1]}] expected, an element beside the next, "
                f"got {list(cache.shape)} with strides {cache.stride()}"
            )
        if cache.dtype != x.dtype or cache.device != x.device:
            raise ValueError(f"{name}: {x.dtype} on {x.device} expected, got {cache.dtype} on {cache.device}")
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        raise ValueError(f"v_cache: laid out as k_cache expected: {list(k_cache.shape)}, {k_cache.stride()}; "
                         f"got {list(v_cache.shape)}, {v_cache.stride()}")  # fmt: skip


def attention_tiles(device, dtype, length, heads, kv_heads, dim):
    """Compile-time arguments of the attention kernel and of the combine kernel: those of the tuned table, or defaults.

    On an H100 nothing beat the defaults by more than the noise. 128 rows by 32 keys: 122 registers and 80 KiB on sm_90,
    so two programs share a multiprocessor and one's exponentials hide behind the other's products. Five stages: two are
    spent on looking the pages up. By 64 keys there are 28 % fewer instructions per key, but 170 registers: one program,
    which waits for its own products; held to 128 registers, ptxas makes the products one after the other.

    Tuned are the rows of a program (TILE_M, TILE_R), its warps and its stages: a query's sums run over keys and splits,
    never over rows. TILE_N is not: keys are weighed against the largest score so far and added up tile by tile, so
    another TILE_N is another rounding, as another SPLIT would be. One entry serves all batches and prefixes of a shape:
    were it chosen by them, a row's bits would hang on the others.
    """
    shared = {"HEADS": heads, "D": dim, "L": length, "SPLIT": SPLIT, "MAX_SPLITS": MAX_SPLITS}
    shared["TILE_D"] = max(16, triton.next_power_of_2(dim))
    tile = max(16, triton.next_power_of_2(length * heads // kv_heads))
    if dtype == torch.float32:  # no tensor cores at full precision: the products are made in registers
        own = {"TILE_M": min(tile, 32), "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    else:
        tile = min(tile, 128)
        own = {"TILE_M": tile, "PRECISION": "tf32", "num_warps": max(4, tile // 16), "num_stages": 5}
    own |= {"KV_HEADS": kv_heads, "TILE_N": 32}
    combine = {"TILE_R": 8, "num_warps": 4}
    shape = {"dtype": str(dtype), "length": length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    tuned = measured("attention", device, **shape)
    return shared | own | tuned.get("attention", {}), shared | combine | tuned.get("combine", {})


def masked_attention(q, k, v, mask):
    """Attention without a cache: q [B, S, nq, D], k, v [B, S, nk, D], mask [B or 1, 1 or nq, S, S] bool or additive."""
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    return o.transpose(1, 2)
