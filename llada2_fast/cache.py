"""Paged cache of keys and values: a page holds one block of one row, for all layers.

Pages are counted, so that several rows may share the page of a committed block; they are given out lowest first and
side by side where possible, because rows whose pages stand side by side are read as one view.
"""

import torch


class PagedKVCache:
    """k, v: [layers, pages, block_length, kv_heads, head_dim] in `dtype` on `device`."""

    def __init__(self, config, num_pages, block_length, dtype, device):
        shape = (config.num_hidden_layers, num_pages, block_length, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages = num_pages
        self.block_length = block_length
        self._count = [0] * num_pages

    @property
    def num_free(self):
        """Pages nobody holds."""
        return self._count.count(0)

    def allocate(self, n):
        """n pages, a tuple of ints, held once each. ValueError if fewer are free; nothing is taken then."""
        free = [page for page, count in enumerate(self._count) if count == 0]
        if n > len(free):
            raise ValueError(f"cache: {n} pages needed, {len(free)} of {self.num_pages} are free")
        at = next((i for i in range(len(free) - n + 1) if n and free[i + n - 1] - free[i] == n - 1), 0)
        pages = tuple(free[at : at + n])
        self.share(pages)
        return pages

    def share(self, pages):
        """Hold pages once more."""
        for page in pages:
            self._count[page] += 1

    def free(self, pages):
        """Let go of pages; one nobody holds any more may be given out again."""
        for page in pages:
            assert self._count[page] > 0, f"page {page} is free already"
            self._count[page] -= 1

    def check_integrity(self, held):
        """Assert that the pages held by somebody (an iterable of page tuples) are exactly the counted ones."""
        expected = [0] * self.num_pages
        for pages in held:
            for page in pages:
                expected[page] += 1
        assert expected == self._count, f"cache: counts {self._count} but held {expected}"
