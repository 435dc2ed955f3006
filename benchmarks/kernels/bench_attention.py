"""Block attention: a step of B rows over P cached tokens each, and the prefill of a whole prompt.

The peer has keys and values of a row side by side, without pages, and is told by a mask what a block sees.
"""

from functools import partial

import torch

from llada2_fast.kernels import attention
from llada2_fast.kernels.attention import BlockBatch, Span

from ..roofline import BLOCK
from .cases import Case, Shapes


def case_of(config, rows, prefix, prefill=False):
    shapes = Shapes(config)
    c, count = shapes.config(), prefix // BLOCK + 1
    first = 0 if prefill else count - 1
    runs = [
        Span(tuple(range(row * count, (row + 1) * count)), first, count - first, count * BLOCK) for row in range(rows)
    ]
    blocks = runs if shapes.dry else BlockBatch.from_runs(runs, shapes.device)
    at = torch.arange(count * BLOCK, device=shapes.device) // BLOCK
    mask = (at[first * BLOCK :, None] >= at)[None, None]

    def make():
        cache = rows * count, BLOCK, c.num_key_value_heads, c.head_dim
        q = shapes.random(rows * (count - first) * BLOCK, c.num_attention_heads, c.head_dim)
        return q, shapes.random(*cache), shapes.random(*cache), blocks

    def plain(q, k, v, _blocks):
        row = [x.reshape(rows, -1, *x.shape[-2:]) for x in (q, k, v)]
        return attention.masked_attention(*row, mask).flatten(0, 1)

    q, k, v, _ = make()
    size = k.nbytes + v.nbytes + 2 * q.nbytes
    seen = rows * BLOCK * sum((block + 1) * BLOCK for block in range(first, count))  # pairs of query and key
    operations = 4.0 * c.num_attention_heads * c.head_dim * seen
    return Case(attention.block_attention, plain, "SDPA, mask", shapes.rotated(make, size), size, operations)


CASES = {
    "small b2 p256": partial(case_of, "small", 2, 256),
    "mini b1 p1024": partial(case_of, "mini", 1, 1024),
    "mini b8 p4096": partial(case_of, "mini", 8, 4096),
    "mini prefill 1024": partial(case_of, "mini", 1, 1024 - BLOCK, True),
    "flash b1 p1024": partial(case_of, "flash", 1, 1024),
}


def test_attention(timed):
    timed()
