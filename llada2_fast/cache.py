"""Paged cache of keys and values: a page holds one block of one row, for all layers.

Pages are counted, so that several rows may share the page of a committed block. A page can be published under a key
that names its content: the block's tokens and all before them (`content_keys`). A published page that nobody holds
keeps its content and can be found and held again, until the room is needed; then the least recently used goes first.
Blank pages are given out lowest first and side by side where possible, because rows whose pages stand side by side are
read as one view.
"""

import hashlib
from array import array

import torch

from .kernels._ambient import lasting


def content_keys(tokens, block_length, keys=()):
    """Keys of the full blocks of a row, a list of bytes: hashes of a block's tokens and the key of the block before.

    tokens: list of ints from position 0 on; keys: those of the leading blocks, where they are known already.
    """
    keys = list(keys)
    for at in range(len(keys) * block_length, len(tokens) - block_length + 1, block_length):
        before = keys[-1] if keys else b""
        block = array("q", tokens[at : at + block_length]).tobytes()
        keys.append(hashlib.blake2b(before + block, digest_size=16).digest())
    return keys


class PagedKVCache:
    """k, v: [layers, pages, block_length, kv_heads, head_dim] in `dtype` on `device`.

    kv_heads: how many a layer holds, None = the config's. num_free: pages nobody holds, published ones among them.
    num_evicted: published pages given out again so far.
    """

    @lasting
    def __init__(self, config, num_pages, block_length, dtype, device, kv_heads=None):
        kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
        shape = (config.num_hidden_layers, num_pages, block_length, kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages = num_pages
        self.num_free = num_pages
        self.num_evicted = 0
        self.block_length = block_length
        self._count = [0] * num_pages
        self._page = {}  # key -> its published page
        self._key = {}  # published page -> its key
        self._idle = {}  # published pages nobody holds, least recently used first (values unused)

    def allocate(self, n):
        """n pages, a tuple of ints, held once each. ValueError if fewer are free; nothing is taken then."""
        if n > self.num_free:
            raise ValueError(f"cache: {n} pages needed, {self.num_free} of {self.num_pages} are free")
        for page in list(self._idle)[: max(0, n - (self.num_free - len(self._idle)))]:
            self._evict(page)
        blank = [page for page, count in enumerate(self._count) if count == 0 and page not in self._idle]
        at = next((i for i in range(len(blank) - n + 1) if n and blank[i + n - 1] - blank[i] == n - 1), 0)
        pages = tuple(blank[at : at + n])
        self.share(pages)
        return pages

    def share(self, pages):
        """Hold pages once more."""
        for page in pages:
            if self._count[page] == 0:
                self.num_free -= 1
                self._idle.pop(page, None)
            self._count[page] += 1

    def free(self, pages):
        """Let go of pages; one nobody holds any more may be given out again."""
        for page in reversed(pages):  # a row's last block is the first to go: without the earlier ones it is of no use
            assert self._count[page] > 0, f"page {page} is free already"
            self._count[page] -= 1
            if self._count[page] == 0:
                self.num_free += 1
                if page in self._key:
                    self._idle[page] = None

    def count(self, page):
        """How often a page is held."""
        return self._count[page]

    def publish(self, page, key):
        """Let others find a held page whose K/V are final; the first page of a key stays the one that is found."""
        assert self._count[page] > 0, f"page {page} is nobody's"
        if key not in self._page and page not in self._key:
            self._page[key], self._key[page] = page, key

    def find(self, keys):
        """The published pages of the leading keys, as far as they are known: a tuple of ints, not held yet."""
        pages = []
        for key in keys:
            if key not in self._page:
                break
            pages.append(self._page[key])
        return tuple(pages)

    def clear(self):
        """Forget the content of all published pages."""
        for page in list(self._idle):
            self._evict(page)
        self._page, self._key = {}, {}

    def _evict(self, page):
        del self._page[self._key.pop(page)], self._idle[page]
        self.num_evicted += 1

    def check_integrity(self, held):
        """Assert that the pages held by somebody (an iterable of page tuples) are exactly the counted ones, and that
        the published ones are known alike from either side."""
        expected = [0] * self.num_pages
        for pages in held:
            for page in pages:
                expected[page] += 1
        assert expected == self._count, f"cache: counts {self._count} but held {expected}"
        assert self.num_free == self._count.count(0), f"cache: num_free {self.num_free} of counts {self._count}"
        assert {page: key for key, page in self._page.items()} == self._key, "cache: keys and pages disagree"
        idle = {page for page in self._key if self._count[page] == 0}
        assert idle == self._idle.keys(), f"cache: idle pages {list(self._idle)} but unheld ones {sorted(idle)}"
