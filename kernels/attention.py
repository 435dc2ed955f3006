"""Block attention over a paged cache of keys and values.

    o = softmax(q k^T / sqrt(D)) v          q [T, nq, D] -> o [T, nq, D]; KV head h serves q heads h*g .. h*g+g-1

A *span* is a number of consecutive whole blocks of one row, forwarded together: one for a denoise step, two when the
finished block is carried along, many in prefill. Each block of a span sees all earlier blocks of its row and itself,
bidirectionally, and nothing later. Its own keys and values are already in its pages (write_pages).

    k_cache, v_cache [pages, L, nk, D]      page = one block of K/V

A drafted block may be checked as the same network writes with block length 1 (S2D2, arXiv 2603.25702): as two query
blocks, CLEAN, the draft, and MASKED, L mask tokens at the same positions, whose page is behind the draft's in the row's
page table. Both see all blocks before the draft. Beyond these position i of CLEAN sees the draft up to i, position i of
MASKED sees the draft before i and, of its own block, itself.

On a GPU a block's keys are cut into at most MAX_SPLITS splits by their number alone, and the sums over the splits are
merged in their order. Whether one program takes all splits of a block or each has its own, the same numbers are added
up in the same order. So a block's bits depend on its own row and on nothing else.
"""

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._ambient import run_kernel
from ._triton import FLOATS, tl, triton, use_triton
from ._tuned import measured
from .arrivals import arrives_last, counters
from .overlap import inputs_ready

# Keys of a split at most (more beyond 8192 keys), splits of a block. By 128, 256 and 512 keys an H100 takes 13.8, 12.7
# and 13.4 µs for a row of 1024 keys of mini, 42, 32 and 23 for 8 of them and 71, 66 and 58 for 40.
SPLIT, MAX_SPLITS = 512, 16
TILE_N = 32  # keys that are weighed at once
PROCESSORS = 132  # multiprocessors where there is no GPU to ask
CLEAN, MASKED = 1, 2  # orders of a query block; 0 = it sees itself as a whole
_CLEAN, _MASKED = tl.constexpr(CLEAN), tl.constexpr(MASKED)
_TABLES = ["BLOCK_ROW", "BLOCK_INDEX", "PAGE_TABLE", "LIMIT", "ORDER", "ARRIVED"]  # compiled alike wherever they begin


class Span(NamedTuple):
    """num_blocks blocks of one row from block first_block on; pages: the row's pages from block 0 on.

    limit: how many positions of the row exist; later ones in the last page are never attended to.
    """

    pages: tuple[int, ...]
    first_block: int
    num_blocks: int
    limit: int


def pinned(numbers, device, dtype=torch.int32):
    """Numbers as a tensor on the CPU, to be copied to `device` without waiting for what runs there."""
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=torch.device(device).type == "cuda")


class BlockBatch(NamedTuple):
    """Query blocks described by tensors, so that a CUDA graph holds them. NB blocks, R rows, P pages of a row.

    Query block i is block block_index[i] of row block_row[i]. Row -1 = unused: its tokens go to no page, its output is
    zero, its index is any of 0 .. P-1. Pages behind a row's last query block are never read.

    A checked block is the last of its row: a CLEAN query block, of index b, and a MASKED one, of index b + 1. The limit
    of its row counts both, so it is L more than the row has positions.
    """

    block_row: torch.Tensor  # int32 [NB]
    block_index: torch.Tensor  # int32 [NB]
    page_table: torch.Tensor  # int32 [R, P]: the row's pages from block 0 on
    limit: torch.Tensor  # int32 [R]: how many positions of the row exist
    order: torch.Tensor | None = None  # int32 [NB]: 0, CLEAN or MASKED; None = all 0

    @classmethod
    def from_spans(cls, spans, device):
        """The blocks of a list of Span, in order; a row per span."""
        ends = [span.first_block + span.num_blocks for span in spans]
        width = max(ends, default=0)
        blocks = [(i, b) for i, span in enumerate(spans) for b in range(span.first_block, ends[i])]
        table = [page for span in spans for page in (span.pages[:width] + (0,) * width)[:width]]
        lists = [row for row, _ in blocks], [index for _, index in blocks], table, [span.limit for span in spans]
        flat = pinned([*itertools.chain(*lists)], device).to(device, non_blocking=True)  # one copy, not four
        row, index, table, limit = flat.split([*map(len, lists)])
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


def _attend(q, k, v, mask=None):
    """q [Q, nq, D], k, v [S, nk, D], mask bool [Q, S], None = all is seen -> [Q, nq, D]. Heads of a KV group are folded
    into the queries."""
    count, heads, dim = q.shape
    groups = k.shape[1]
    folded = q.view(count, groups, -1, dim).permute(1, 2, 0, 3).reshape(1, groups, -1, dim)
    mask = None if mask is None else mask.repeat(heads // groups, 1)
    o = F.scaled_dot_product_attention(folded, k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask)
    return o.view(groups, -1, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)


def batch_attention_ref(q, k_cache, v_cache, batch):
    """block_attention_ref for a BlockBatch: q [NB * L, nq, D] -> [NB * L, nq, D], zeros in unused blocks."""
    length = k_cache.shape[1]
    orders = [0] * len(batch.block_row) if batch.order is None else batch.order.tolist()  # sync: reference
    out = torch.zeros_like(q)
    for block, span in batch.spans():
        rows = slice(block * length, (block + 1) * length)
        if orders[block] == 0:
            out[rows] = block_attention_ref(q[rows], k_cache, v_cache, [span])
        else:
            keys, values = (_row(cache, span, length)[: span.limit] for cache in (k_cache, v_cache))
            mask = _checked_mask(orders[block], span.first_block * length, length, len(keys), q.device)
            out[rows] = _attend(q[rows], keys, values, mask)
    return out


def _checked_mask(order, own, length, size, device):
    """bool [length, size]: which of the row's first keys are seen by a CLEAN or MASKED block whose page begins with key
    `own`."""
    key = torch.arange(size, device=device)
    i = torch.arange(length, device=device)[:, None]
    if order == CLEAN:
        return key <= own + i
    return (key < own - length + i) | (key == own + i)


@triton.jit
def _splits(BLOCK_ROW, BLOCK_INDEX, LIMIT, block, L, TILE_N, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """row of a query block, the keys it sees and their tiles (none if unused), tiles of a split, splits: part of the
    definition. As few splits as there can be, as even as whole tiles go."""
    row = tl.load(BLOCK_ROW + block)
    used = row >= 0
    row = tl.maximum(row, 0)
    seen = tl.where(used, tl.minimum((tl.load(BLOCK_INDEX + block) + 1) * L, tl.load(LIMIT + row)), 0)
    most = tl.minimum(tl.cdiv(tl.maximum(seen, 1), SPLIT), MAX_SPLITS)
    tiles = tl.cdiv(seen, TILE_N)
    each = tl.maximum(tl.cdiv(tiles, most), 1)
    return row.to(tl.int64), tiles, seen, each, tl.cdiv(tiles, each)


@triton.jit
def _merge(top, total, acc, next_top, next_total, next_acc):
    """Sums over some splits, or none, and those over the split behind them: part of the definition.

    In explicit operations that no compiler can fuse otherwise, so that whoever adds splits up gets the same bits.
    """
    new_top = tl.maximum(top, next_top)
    kept, added = tl.exp2(top - new_top), tl.exp2(next_top - new_top)
    total = tl.fma(total, kept, next_total * added)
    return new_top, total, tl.fma(acc, kept[:, None], next_acc * added[:, None])


@triton.jit
def _write(total, acc, OUT, block, kv_head, m, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
           L: tl.constexpr):  # fmt: skip
    """Outputs of the queries m of a KV head by their sums."""
    d = tl.arange(0, acc.shape[1])[None, :]
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None] + 0.0  # no -0.0, which merging into nothing would lose
    OUT += (block.to(tl.int64) * (L * HEADS) + kv_head * GROUP) * D
    vector = m + m // GROUP * (HEADS - GROUP)
    mask = (m < L * GROUP)[:, None] & (d < D)
    tl.store(OUT + vector[:, None] * D + d, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_TABLES, "whole", "splits", "table_stride"])
def _attention_kernel(
    Q, K, V, OUT, PART, TOP, TOTAL, BLOCK_ROW, BLOCK_INDEX, PAGE_TABLE, LIMIT, ORDER, ARRIVED,
    whole, splits, scale, table_stride, q_stride, page_stride, token_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, WHOLE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_R: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: UNITS of each of the first `whole` query blocks, then those of every split of each other block.

    The L queries of the GROUP heads that share a KV head are the rows of one matrix. A unit is a tile of it, of a KV
    head, the tiles fastest. A program of a whole block takes the splits one after the other; WHOLE: there are such. Of
    other blocks each program leaves its exp2-sums, relative to its largest score, in PART [programs * TILE_M, TILE_D],
    TOP and TOTAL, and whichever comes last of a unit merges them.

    Where blocks have an ORDER, a query may see no key of a tile, or of a split. Its largest score is then LEAST, a
    number, so that the differences that are exponents are numbers, too; what is merged with that is multiplied by zero.
    """
    inputs_ready(EARLY)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (L * GROUP + TILE_M - 1) // TILE_M
    UNITS: tl.constexpr = TILES * KV_HEADS
    LEAST: tl.constexpr = float("-inf") if ORDER is None else -1e38
    start = tl.program_id(0) % TILES * TILE_M
    kv_head = tl.program_id(0) // TILES % KV_HEADS
    behind = tl.program_id(0) // UNITS - whole  # the whole blocks
    alone = behind < 0
    block = whole + tl.where(alone, behind, behind // splits)
    split = tl.where(alone, 0, behind % splits)
    row, tiles, seen, each, count = _splits(BLOCK_ROW, BLOCK_INDEX, LIMIT, block, L, TILE_N, SPLIT, MAX_SPLITS)
    if split >= tl.maximum(count, 1):
        return
    first = split * each
    last = tl.where(alone, tiles, tl.minimum(first + each, tiles))
    m = start + tl.arange(0, TILE_M)
    d = tl.arange(0, TILE_D)
    in_head = (d < D)[None, :]
    asks = (m < L * GROUP)[:, None] & in_head
    Q += block.to(tl.int64) * L * q_stride + kv_head * (GROUP * D)
    q = tl.load(Q + (m * D + m // GROUP * (q_stride - GROUP * D))[:, None] + d[None, :], mask=asks, other=0.0)
    pages = PAGE_TABLE + row * table_stride
    K += kv_head * head_stride
    V += kv_head * head_stride
    if ORDER is not None:
        order = tl.load(ORDER + block)
        itself = tl.load(BLOCK_INDEX + block) * L + m // GROUP  # the key of a query's own position
        before = tl.where(order == _MASKED, itself - L, tl.where(order == _CLEAN, itself, seen))  # and all before this

    top = tl.full([TILE_M], LEAST, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    if WHOLE:  # over the splits before this one
        all_top, all_total, all_acc = top, total, acc
        end = first + each  # of the split at hand
    at = first * TILE_N + tl.arange(0, TILE_N)
    page = tl.load(pages + at // L, mask=at < seen, other=0)
    for tile in range(first, last):
        exists = at < seen
        if ORDER is not None:
            visible = (at[None, :] < before[:, None]) | (at[None, :] == itself[:, None])
        place = (page.to(tl.int64) * page_stride)[:, None] + ((at % L * token_stride)[:, None] + d[None, :])
        at += TILE_N
        page = tl.load(pages + at // L, mask=at < seen, other=0)  # a tile ahead, or the next keys would wait for it
        k = tl.load(K + place, mask=exists[:, None] & in_head, other=0.0)
        v = tl.load(V + place, mask=exists[:, None] & in_head, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = tl.where(exists[None, :], score, float("-inf"))
        if ORDER is not None:
            score = tl.where(visible, score, float("-inf"))
        if WHOLE:
            if tile == end:  # a split is complete; what it leaves in acc and total is multiplied by zero
                all_top, all_total, all_acc = _merge(all_top, all_total, all_acc, top, total, acc)
                top = tl.full([TILE_M], LEAST, tl.float32)
                end += each
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(tl.fma(score, scale, -new_top[:, None]))
        shrink = tl.exp2(top - new_top)
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    if WHOLE:
        top = tl.where(count == 0, 0.0, top)  # of an unused block, whose sums of nothing are nothing
        top, total, acc = _merge(all_top, all_total, all_acc, top, total, acc)
    if alone | (count <= 1):
        _write(total, acc, OUT, block, kv_head, m, HEADS, GROUP, D, L)
        return

    program = (tl.program_id(0) - whole * UNITS).to(tl.int64)
    part = program * TILE_M + tl.arange(0, TILE_M)
    tl.store(PART + part[:, None] * TILE_D + d[None, :], acc)
    tl.store(TOP + part, top)
    tl.store(TOTAL + part, total)
    if not arrives_last(ARRIVED + behind // splits * UNITS + tl.program_id(0) % UNITS, count):
        return
    for begin in tl.static_range(0, TILE_M, TILE_R):
        r = begin + tl.arange(0, TILE_R)
        part = (program - split * UNITS) * TILE_M + r  # of the first split
        top = tl.full([TILE_R], LEAST, tl.float32)
        total = tl.zeros([TILE_R], tl.float32)
        acc = tl.zeros([TILE_R, TILE_D], tl.float32)
        for _ in tl.range(0, count, num_stages=3):  # loads ahead of the sum, or each waits for the one before
            next_acc = tl.load(PART + part[:, None] * TILE_D + d[None, :])
            top, total, acc = _merge(top, total, acc, tl.load(TOP + part), tl.load(TOTAL + part), next_acc)
            part += UNITS * TILE_M
        _write(total, acc, OUT, block, kv_head, start + r, HEADS, GROUP, D, L)


def block_attention(q, k_cache, v_cache, blocks):
    """Block attention of packed query blocks: q [NB * L, nq, D], caches [pages, L, nk, D] -> [NB * L, nq, D].

    blocks: list of Span or a BlockBatch; the latter on a GPU, where a list costs a copy to the device at every call,
        and if there are CLEAN and MASKED ones.
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
    shapes = BlockBatch((count,), (count,), (rows, width), (rows,), None if batch.order is None else (count,))
    for name, x, shape in zip(batch._fields, batch, shapes, strict=True):
        if shape is None:
            continue
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous() or x.device != q.device:
            raise ValueError(
                f"{name}: contiguous int32 {list(shape)} on {q.device} expected, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    way, meta = attention_tiles(q.device, q.dtype, length, heads, kv_heads, dim, count)
    units = kv_heads * triton.cdiv(length * heads // kv_heads, meta["TILE_M"])  # of work, of a block
    whole = whole_blocks(count, units, multiprocessors(q.device)) if way == "whole" else 0
    splits = min(MAX_SPLITS, triton.cdiv(width * length, SPLIT))  # more than a row of this table has are never made
    parts = (count - whole) * splits * units
    vectors = parts * meta["TILE_M"] if splits > 1 else 0
    arrived = counters(q, (count - whole) * units if splits > 1 else 0)
    part = torch.empty(vectors, meta["TILE_D"], dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, vectors, dtype=torch.float32, device=q.device)
    run_kernel(
        _attention_kernel, (whole * units + parts,),
        q, k_cache, v_cache, out, part, top, total, *batch, arrived, whole, splits,
        dim**-0.5 * 1.4426950408889634, width, q.stride(0), *k_cache.stride()[:3], WHOLE=whole > 0, **meta,
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


@lru_cache(maxsize=64)
def multiprocessors(device):
    """Of a torch.device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def whole_blocks(blocks, units, processors):
    """How many of the blocks, of so many units each, are not split: as many as fill the multiprocessors once or several
    times, and the others if they nearly do."""
    rest = blocks - blocks * units // processors * processors // units
    return blocks if 3 * rest * units >= 2 * processors else blocks - rest


def attention_tiles(device, dtype, length, heads, kv_heads, dim, blocks):
    """(way, compile-time arguments of the attention kernel): those of the tuned table, or defaults.

    way, by the number of blocks alone:
    split    a program for every split, in 16 bits of half the rows: twice the programs, also when the last ones merge
    whole    units for two thirds of the multiprocessors: a program takes all splits, no partial sums in memory

    128 rows by 32 keys: 128 registers and 96 KiB on sm_90, so two programs share a multiprocessor and one's
    exponentials hide behind the other's products; whole, which has sums of the split at hand beside those of all, 208
    registers, one program. By 64 keys there are a quarter fewer instructions per key, but 232 to 250 registers, and
    spills on sm_80.

    Tuned are the rows of a program (TILE_M), its warps and its stages: a query's sums run over keys and splits, never
    over rows. TILE_N is not: keys are weighed against the largest score so far and added up tile by tile, so another
    TILE_N is another rounding, as another SPLIT would be. An entry serves all batches and prefixes of a shape, with a
    part for each way.
    """
    rows = length * heads // kv_heads
    tile = max(16, triton.next_power_of_2(rows))
    full = dtype == torch.float32  # no tensor cores at full precision: the products are made in registers
    tile = min(tile, 32 if full else 128)
    units, processors = blocks * kv_heads * triton.cdiv(rows, tile), multiprocessors(device)
    way = "split" if 3 * units < 2 * processors else "whole"
    meta = {"PRECISION": "ieee", "num_warps": 8, "num_stages": 2} if full else {"PRECISION": "tf32", "num_stages": 4}
    if not full:
        tile = min(tile, 64) if way == "split" else tile
        meta["num_warps"] = max(4, tile // 16)
    meta |= {"HEADS": heads, "KV_HEADS": kv_heads, "D": dim, "L": length, "SPLIT": SPLIT, "MAX_SPLITS": MAX_SPLITS}
    meta |= {"TILE_M": tile, "TILE_N": TILE_N, "TILE_D": max(16, triton.next_power_of_2(dim))}
    shape = {"dtype": str(dtype), "length": length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    meta |= measured("attention", device, **shape).get(way, {})
    return way, meta | {"TILE_R": min(meta["TILE_M"], max(16, 8192 // meta["TILE_D"]))}


def masked_attention(q, k, v, mask):
    """Attention without a cache: q [B, S, nq, D], k, v [B, S, nk, D], mask [B or 1, 1 or nq, S, S] bool or additive."""
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    return o.transpose(1, 2)
