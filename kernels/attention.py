"""Block attention over a paged cache of keys and values.

    o = softmax(q k^T / sqrt(D)) v          q [T, nq, D] -> o [T, nq, D]; KV head h serves q heads h*g .. h*g+g-1

A *run* is a number of consecutive whole blocks of one row, forwarded together: one for a denoise step, two when the
finished block is carried along, many in prefill. Each block of a run sees all earlier blocks of its row and itself,
bidirectionally, and nothing later. Its own keys and values are already in its pages (write_pages).

    k_cache, v_cache [pages, L, nk, D]      page = one block of K/V
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

QUERY_TILE = 256  # tokens of a long run that share one masked call


class Run(NamedTuple):
    """num_blocks blocks of one row from block first_block on; pages: the row's pages from block 0 on.

    limit: how many positions of the row exist; later ones in the last page are never attended to.
    """

    pages: tuple[int, ...]
    first_block: int
    num_blocks: int
    limit: int


def write_pages(k, v, k_cache, v_cache, slot):
    """Store k, v [T, nk, D] at slots [T] int64 (page * L + offset) of the caches [pages, L, nk, D]."""
    k_cache.flatten(0, 1).index_copy_(0, slot, k)
    v_cache.flatten(0, 1).index_copy_(0, slot, v)


def run_slots(runs, block_length):
    """Cache slots of all tokens of the runs, in order: a list of ints."""
    return [
        run.pages[block] * block_length + offset
        for run in runs
        for block in range(run.first_block, run.first_block + run.num_blocks)
        for offset in range(block_length)
    ]


def block_attention_ref(q, k_cache, v_cache, runs):
    """q [T, nq, D], T = sum of the runs' blocks times L; caches [pages, L, nk, D] -> [T, nq, D]."""
    length = k_cache.shape[1]
    out = torch.empty_like(q)
    begin = 0
    for run in runs:
        size = run.num_blocks * length
        keys = _row(k_cache, run, length)
        values = _row(v_cache, run, length)
        tile = max(1, QUERY_TILE // length) if run.num_blocks > 2 else 1
        for block in range(0, run.num_blocks, tile):
            blocks = min(tile, run.num_blocks - block)
            rows = slice(begin + block * length, begin + (block + blocks) * length)
            seen = min((run.first_block + block + blocks) * length, run.limit)
            mask = None
            if blocks > 1:
                where = (run.first_block + block) * length + torch.arange(blocks * length, device=q.device)
                mask = where[:, None] // length >= torch.arange(seen, device=q.device) // length
            out[rows] = _attend(q[rows], keys[:seen], values[:seen], mask)
        begin += size
    return out


def _row(cache, run, length):
    """The row's keys or values up to the run's end, [S, nk, D]; a view where its pages stand side by side."""
    pages = run.pages[: run.first_block + run.num_blocks]
    if pages[-1] - pages[0] + 1 == len(pages) and all(b == a + 1 for a, b in zip(pages, pages[1:], strict=False)):
        return cache[pages[0] : pages[-1] + 1].flatten(0, 1)
    return cache[torch.tensor(pages, device=cache.device)].flatten(0, 1)


def _attend(q, k, v, mask):
    """q [Q, nq, D], k, v [S, nk, D], mask bool [Q, S] or None. Heads of a KV group are folded into the queries."""
    count, heads, dim = q.shape
    groups = k.shape[1]
    folded = q.view(count, groups, -1, dim).permute(1, 2, 0, 3).reshape(1, groups, -1, dim)
    if mask is not None:
        mask = mask.repeat(heads // groups, 1)
    o = F.scaled_dot_product_attention(folded, k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask)
    return o.view(groups, -1, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)


def block_attention(q, k_cache, v_cache, runs):
    """Block attention of packed runs; see block_attention_ref for shapes."""
    return block_attention_ref(q, k_cache, v_cache, runs)


def masked_attention(q, k, v, mask):
    """Attention without a cache: q [B, S, nq, D], k, v [B, S, nk, D], mask [B or 1, 1 or nq, S, S] bool or additive."""
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    return o.transpose(1, 2)
