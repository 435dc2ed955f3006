"""Block attention: a step of B rows over P cached tokens each, and the prefill of a whole prompt.

The peer has keys and values of a row side by side, without pages, and is told by a mask what a block sees. shuffled:
the pages lie in random order, as in a cache that has been in use; such a case has no peer.
"""

import torch

from llada2_fast.kernels import attention
from llada2_fast.kernels.attention import BlockBatch, Span

from ..roofline import BLOCK
from .cases import Case


def case_of(machine, config, rows, prefix, prefill=False, shuffled=False):
    rows, prefix = machine.size(rows, 2), machine.size(prefix, 64)
    c, count = machine.config(config), prefix // BLOCK + 1
    first = 0 if prefill else count - 1
    pages = (torch.randperm if shuffled else torch.arange)(rows * count, device="cpu").split(count)
    runs = [Span(tuple(own.tolist()), first, count - first, count * BLOCK) for own in pages]
    blocks = runs if machine.dry else BlockBatch.from_spans(runs, machine.device)
    at = torch.arange(count * BLOCK, device=machine.device) // BLOCK
    mask = (at[first * BLOCK :, None] >= at)[None, None]

    def make():
        cache = rows * count, BLOCK, c.num_key_value_heads, c.head_dim
        q = machine.random(rows * (count - first) * BLOCK, c.num_attention_heads, c.head_dim)
        return q, machine.random(*cache), machine.random(*cache), blocks

    def plain(q, k, v, _blocks):
        row = [x.reshape(rows, -1, *x.shape[-2:]) for x in (q, k, v)]
        return attention.masked_attention(*row, mask).flatten(0, 1)

    q, k, v, _ = make()
    size = k.nbytes + v.nbytes + 2 * q.nbytes
    seen = rows * BLOCK * sum((block + 1) * BLOCK for block in range(first, count))  # pairs of query and key
    operations = 4.0 * c.num_attention_heads * c.head_dim * seen
    peer = (None, "") if shuffled else (plain, "SDPA, mask")
    return Case(attention.block_attention, *peer, machine.rotated(make, size), size, operations)


CASES = {
    "small b2 p256": ("small", 2, 256),
    "mini b1 p1024": ("mini", 1, 1024),
    "mini b8 p4096": ("mini", 8, 4096),
    "mini prefill 1024": ("mini", 1, 1024 - BLOCK, True),
    "flash b1 p1024": ("flash", 1, 1024),
}


def test_attention(timed):
    timed()
