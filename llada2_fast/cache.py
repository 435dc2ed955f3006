"""Paged cache of keys and values: a page holds one block of one row, for all layers.

Pages are counted, so that several rows may share the page of a committed block. A page can be entered under a hash that
names its content: the block's tokens and all before them (`block_hashes`). An entered page that nobody holds keeps its
content and can be matched and held again, until the room is needed; then the least recently used goes first. Blank
pages are given out lowest first and side by side where possible, because rows whose pages stand side by side are read
as one view on a CPU.
"""

import hashlib
from array import array

import torch

from .kernels._ambient import lasting


def block_hashes(tokens: list[int], block_length: int, known: list[bytes] = (), salt: bytes = b"") -> list[bytes]:
    """The hashes of a row's full blocks behind the known ones, each of a block's tokens and the hash before it.

    tokens: from position 0 on.
    block_length: L.
    known: hashes of the leading blocks.
    salt: what stands before the first block: rows of different salts have no hash in common.
    """
    before = known[-1] if known else hashlib.blake2b(salt, digest_size=16).digest()
    hashes, begin = [], len(known) * block_length
    data, size = array("q", tokens[begin:]).tobytes(), block_length * 8
    for at in range(0, len(data) - size + 1, size):
        before = hashlib.blake2b(before + data[at : at + size], digest_size=16).digest()
        hashes.append(before)
    return hashes


class _BlankPages:
    """Pages without content, as stretches of neighbours: by their first page, the page behind their last one, and the
    other way round."""

    def __init__(self, count):
        self.count = count
        self._end, self._begin = ({0: count}, {count: 0}) if count else ({}, {})

    def take(self, count):
        """So many pages, a list: the lowest that stand side by side, else the lowest."""
        stretches = sorted(self._end.items())
        fitting = [(begin, end) for begin, end in stretches if end - begin >= count][:1]
        pages = []
        for begin, end in fitting or stretches:
            stop = min(end, begin + count - len(pages))
            del self._end[begin], self._begin[end]
            if stop < end:
                self._end[stop], self._begin[end] = end, stop
            pages += range(begin, stop)
            if len(pages) == count:
                break
        self.count -= len(pages)
        return pages

    def give(self, page):
        begin, end = self._begin.pop(page, page), self._end.pop(page + 1, page + 1)
        self._end[begin], self._begin[end] = end, begin
        self.count += 1

    def pages(self):
        return [page for begin, end in sorted(self._end.items()) for page in range(begin, end)]


class PagedKVCache:
    """Pages of keys and values, and who holds them.

    config: ModelConfig.
    num_pages: P.
    block_length: L.
    dtype, device: of k and v.
    kv_heads: how many a layer holds; None = the config's.

    k, v: [layers, P, L, kv_heads, head_dim]. num_evicted: entered pages given out again so far. epoch: how often all
    were forgotten; K/V computed before that must not be entered any more.
    """

    def __init__(self, config, num_pages: int, block_length: int, dtype, device, kv_heads: int | None = None):
        kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
        shape = (config.num_hidden_layers, num_pages, block_length, kv_heads, config.head_dim)
        self._like = shape, dtype, device
        self.num_pages = num_pages
        self.num_evicted = self.epoch = 0
        self.block_length = block_length
        self._count = [0] * num_pages
        self._blank = _BlankPages(num_pages)
        self._page = {}  # hash -> the page entered under it
        self._hash = {}  # entered page -> its hash
        self._idle = {}  # entered pages nobody holds, least recently used first (values unused)
        self.take()

    @lasting
    def take(self):
        """Take the memory of all pages, zeros; nothing is known of what was in them."""
        self.clear()
        shape, dtype, device = self._like
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def drop(self):
        """Free the memory until take(), and forget what was in it."""
        self.clear()
        self.k = self.v = None

    @property
    def num_free(self) -> int:
        """Pages nobody holds, entered ones among them."""
        return self._blank.count + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages nobody holds whose content can still be matched."""
        return len(self._idle)

    def allocate(self, count: int) -> tuple[int, ...]:
        """So many pages, held once each. ValueError if fewer are free; nothing is taken then."""
        if count > self.num_free:
            raise ValueError(f"cache: {count} pages needed, {self.num_free} of {self.num_pages} are free")
        while self._blank.count < count:
            self._evict(next(iter(self._idle)))
            self.num_evicted += 1
        pages = self._blank.take(count)
        for page in pages:
            self._count[page] = 1
        return tuple(pages)

    def incref(self, pages):
        """Hold pages that have content once more."""
        for page in pages:
            if self._count[page] == 0:
                del self._idle[page]
            self._count[page] += 1

    def free(self, pages):
        """Let go of pages; one nobody holds any more may be given out again."""
        for page in reversed(pages):  # a row's last block is the first to go: without the earlier ones it is of no use
            assert self._count[page] > 0, f"page {page} is free already"
            self._count[page] -= 1
            if self._count[page] == 0:
                if page in self._hash:
                    self._idle[page] = None
                else:
                    self._blank.give(page)

    def count(self, page: int) -> int:
        """How often a page is held."""
        return self._count[page]

    def insert(self, page: int, block_hash: bytes):
        """Let others match a held page whose K/V are final; the first page of a hash stays the one that is matched."""
        assert self._count[page] > 0, f"page {page} is nobody's"
        if block_hash not in self._page and page not in self._hash:
            self._page[block_hash], self._hash[page] = page, block_hash

    def match_prefix(self, hashes) -> tuple[int, ...]:
        """The pages entered under the leading hashes, as far as they are known; they are not held yet."""
        pages = []
        for block_hash in hashes:
            if block_hash not in self._page:
                break
            pages.append(self._page[block_hash])
        return tuple(pages)

    def clear(self):
        """Forget the content of all entered pages, as ahead of a change of the weights."""
        self.epoch, self._page = self.epoch + 1, {}  # from here on nothing is found, even if an exception comes now
        self._take_over(self._count, {})

    def reclaim(self):
        """Take all pages back, whatever an exception has left half done; those entered can still be matched."""
        entered = {page: one for one, page in self._page.items() if self._hash.get(page) == one}
        self._take_over([0] * self.num_pages, entered)

    def _take_over(self, count, entered):
        """How often each page is held, and hashes by the pages entered under them: all of it at once."""
        idle, blank = {page: None for page in entered if count[page] == 0}, _BlankPages(0)
        for page in range(self.num_pages):
            if count[page] == 0 and page not in entered:
                blank.give(page)
        pages = {one: page for page, one in entered.items()}
        self._count, self._hash, self._page, self._idle, self._blank = count, entered, pages, idle, blank

    def _evict(self, page):
        del self._page[self._hash.pop(page)], self._idle[page]
        self._blank.give(page)

    def check_integrity(self, held):
        """Assert that the pages held by somebody (an iterable of page tuples) are exactly the counted ones, that the
        entered ones are known alike from either side, and that all others are blank."""
        expected = [0] * self.num_pages
        for pages in held:
            for page in pages:
                expected[page] += 1
        assert expected == self._count, f"cache: counts {self._count} but held {expected}"
        assert {page: one for one, page in self._page.items()} == self._hash, "cache: hashes and pages disagree"
        idle = {page for page in self._hash if self._count[page] == 0}
        assert idle == self._idle.keys(), f"cache: idle pages {list(self._idle)} but unheld ones {sorted(idle)}"
        blank = [page for page, count in enumerate(self._count) if count == 0 and page not in idle]
        assert blank == self._blank.pages() and len(blank) == self._blank.count, "cache: blank pages are lost"
