"""The paged cache: its bookkeeping against a plain model of it, and cached forwards against whole ones."""

import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llada2_fast.cache import PagedKVCache
from llada2_fast.config import ModelConfig
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.attention import Span
from llada2_fast.model import LLaDA2Model, Read
from tests.kernels.interpreter import interpreted
from tests.thinned import thinned

GOLDEN = Path(__file__).parent / "golden"
SMALL = ModelConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    moe_intermediate_size=4,
)  # fmt: skip
NEAR = 5e-5  # the same product at another height: matrix products round differently, nothing else may


def cache_of(pages):
    return PagedKVCache(SMALL, pages, 4, torch.float32, "cpu")


def test_one_page_holds_one_block_of_every_layer():
    cache = PagedKVCache(SMALL, 5, 4, torch.bfloat16, "cpu")
    assert cache.k.shape == cache.v.shape == (3, 5, 4, 1, 4)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert (cache.num_pages, cache.num_free, cache.block_length) == (5, 5, 4)


def test_pages_are_given_out_lowest_first_and_side_by_side_where_possible():
    cache = cache_of(8)
    assert cache.allocate(2) == (0, 1) and cache.allocate(1) == (2,) and cache.allocate(2) == (3, 4)
    cache.free((2,))
    assert cache.allocate(2) == (5, 6)  # page 2 stands alone
    assert cache.allocate(1) == (2,)
    cache.free((1, 4))
    assert cache.allocate(3) == (1, 4, 7)  # no three side by side
    assert cache.num_free == 0 and cache.allocate(0) == ()


def test_a_request_that_does_not_fit_takes_nothing():
    cache = cache_of(3)
    held = cache.allocate(2)
    with pytest.raises(ValueError, match="2 pages needed, 1 of 3 are free"):
        cache.allocate(2)
    assert cache.num_free == 1
    cache.check_integrity([held])


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    cache = cache_of(3)
    pages = cache.allocate(2)
    cache.incref(pages[:1])
    cache.free(pages)
    assert cache.num_free == 2 and cache.allocate(1) == (1,)
    cache.free(pages[:1])
    assert cache.num_free == 2


def test_faults_of_the_bookkeeping_are_caught():
    cache = cache_of(3)
    pages = cache.allocate(2)
    cache.free(pages)
    with pytest.raises(AssertionError, match="free already"):
        cache.free(pages)
    held = cache.allocate(2)
    for wrong in ([], [held, held], [held[:1]], [(1, 2)]):
        with pytest.raises(AssertionError):
            cache.check_integrity(wrong)
    cache.check_integrity([held])
    cache.check_integrity([held[:1], held[1:]])


class Bookkeeping(RuleBasedStateMachine):
    """Any sequence of operations against a list of who holds what."""

    def __init__(self):
        super().__init__()
        self.cache, self.held = cache_of(9), []

    @rule(n=st.integers(0, 12))
    def allocate(self, n):
        free = 9 - len({page for pages in self.held for page in pages})
        if n > free:
            with pytest.raises(ValueError):
                self.cache.allocate(n)
            return
        pages = self.cache.allocate(n)
        assert len(set(pages)) == n and not set(pages) & {page for own in self.held for page in own}
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.sampled_from(self.held))
        pages = pages[: data.draw(st.integers(0, len(pages)))]
        self.cache.incref(pages)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        self.cache.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def counts_agree(self):
        self.cache.check_integrity(self.held)
        assert self.cache.num_free == 9 - len({page for pages in self.held for page in pages})


Bookkeeping.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
test_any_sequence_of_operations = Bookkeeping.TestCase


@functools.cache
def load(name):
    return LLaDA2Model.from_pretrained(GOLDEN / name, dtype=torch.float32, progress=False)


def new_cache(model, pages, length):
    cache = PagedKVCache(model.config, pages, length, model.dtype, model.device)
    cache.k.fill_(float("nan"))  # what nobody wrote must not be read
    cache.v.fill_(float("nan"))
    return cache


def logits_of(model, cache, spans, pages, rows, length):
    """Forward blocks begin..end-1 of row r for each (r, begin, end): logits [T, V] and where they stand in the rows."""
    tokens, position, runs = [], [], []
    for r, begin, end in spans:
        tokens.append(rows[r][begin * length : end * length])
        position.append(torch.arange(begin * length, end * length))
        runs.append(Span(pages[r], begin, end - begin, len(rows[r])))
    hidden = model.forward_blocks(torch.cat(tokens), torch.cat(position), runs, cache)
    return model.lm_logits(hidden).split([len(t) for t in tokens])


@pytest.mark.parametrize(
    "plan",
    [
        [[(0, 0, 6), (1, 0, 3)]],  # all at once
        [[(0, b, b + 1)] for b in range(6)] + [[(1, b, b + 1)] for b in range(3)],  # block by block
        [[(0, 0, 4), (1, 0, 1)], [(1, 1, 3), (0, 4, 5)], [(0, 5, 6)]],  # chunks, rows mixed
        [[(0, 0, 1)], [(0, 0, 2)], [(0, 1, 3), (1, 0, 2)], [(1, 1, 3), (0, 2, 6)]],  # blocks carried along again
    ],
    ids=["at once", "block by block", "chunks", "carried"],
)
@pytest.mark.parametrize("name", ["tiny", "group", "variant", "flat", "moe256", "block22"])
def test_cached_forwards_equal_whole_ones(name, plan):
    """Two rows over scattered pages, in any split: the logits of `forward` over the whole rows."""
    model, length = load(name), 8
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in (48, 24)]
    pages = [(7, 2, 3, 4, 0, 9), (1, 8, 5)]
    cache = new_cache(model, 10, length)
    for spans in plan:
        for (r, begin, end), got in zip(spans, logits_of(model, cache, spans, pages, rows, length), strict=True):
            wanted = model(rows[r][None], block_length=length).logits[0, begin * length : end * length]
            torch.testing.assert_close(got, wanted, atol=NEAR, rtol=0)
    assert cache.k[:, 6].isnan().all() and cache.v[:, 6].isnan().all()  # nobody's page


def test_a_block_s_pages_hold_its_last_forward():
    """The K/V that later blocks see are those of the tokens forwarded last, not of an earlier state of the block."""
    model, length = load("tiny"), 8
    generator = torch.Generator().manual_seed(6)
    row = torch.randint(model.config.vocab_size, (24,), generator=generator)
    draft = row.clone()
    draft[8:16] = 255
    cache = new_cache(model, 3, length)
    logits_of(model, cache, [(0, 0, 2)], [(0, 1, 2)], [draft], length)
    stale = logits_of(model, cache, [(0, 2, 3)], [(0, 1, 2)], [row], length)[0]
    logits_of(model, cache, [(0, 1, 2)], [(0, 1, 2)], [row], length)
    settled = logits_of(model, cache, [(0, 2, 3)], [(0, 1, 2)], [row], length)[0]
    wanted = model(row[None], block_length=length).logits[0, 16:]
    torch.testing.assert_close(settled, wanted, atol=NEAR, rtol=0)
    assert (stale - wanted).abs().max() > 0.1


@pytest.mark.parametrize("name", ["tiny", "flat", "block22"])
def test_positions_beyond_the_limit_do_not_exist(name):
    """A row of 13 in blocks of 8: the last three positions of its second page change nothing."""
    model, length = load(name), 8
    row = torch.randint(model.config.vocab_size, (16,), generator=torch.Generator().manual_seed(7))
    wanted = model(row[None, :13], block_length=length).logits[0]
    other = row.clone()
    other[13:] = (other[13:] + 1) % model.config.vocab_size
    for tokens in (row, other):
        hidden = model.forward_blocks(tokens, torch.arange(16), [Span((1, 0), 0, 2, 13)], new_cache(model, 2, length))
        torch.testing.assert_close(model.lm_logits(hidden)[:13], wanted, atol=NEAR, rtol=0)
        assert hidden.isfinite().all()


READS = [{1: (0, 5), 3: (7,)}, {0: range(8), 3: range(8)}, {2: (3,)}, {}]


@pytest.mark.parametrize(  # experts by token, and by block
    "name, ops, reads", thinned(2, ["tiny", "block22"], ["torch", "triton"], READS), ids=str
)
def test_what_is_read_and_written_does_not_depend_on_what_else_is_read(name, ops, reads):
    """reads: {block of the four that are forwarded: offsets}; a prompt's two blocks, and two rows' active ones."""
    model, length = load(name), 8
    tokens = torch.randint(model.config.vocab_size, (32,), generator=torch.Generator().manual_seed(3))
    positions = torch.cat((torch.arange(16), torch.arange(16)))
    runs = [Span((0, 1), 0, 2, 16), Span((2, 3), 0, 2, 16)]
    rows = [i * length + offset for i, offsets in enumerate(reads.values()) for offset in offsets]
    read = Read(list(reads), torch.tensor(rows, dtype=torch.int64))
    with force_ops(ops), interpreted() if ops == "triton" else nullcontext():
        whole, part = new_cache(model, 4, length), new_cache(model, 4, length)
        everything = model.forward_blocks(tokens, positions, runs, whole)
        some = model.forward_blocks(tokens, positions, runs, part, read)
    wanted = everything[[block * length + offset for block, offsets in reads.items() for offset in offsets]]
    torch.testing.assert_close(some, wanted, atol=0 if ops == "torch" and model.exact_rows else NEAR, rtol=0)
    assert torch.equal(part.k, whole.k) and torch.equal(part.v, whole.v)


def test_pages_come_back_as_stretches_of_neighbours():
    """Freed in any order they stand side by side again; the lowest stretch that fits goes first, else the lowest."""
    cache = cache_of(12)
    a, b, c, d = (cache.allocate(3) for _ in range(4))
    assert (a, b, c, d) == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    for pages in (d, b):
        cache.free(pages)
    assert cache.allocate(2) == (3, 4) and cache.allocate(3) == (9, 10, 11) and cache.num_free == 1
    cache.free(a)
    assert cache.allocate(4) == (0, 1, 2, 5) and cache.num_free == 0
    with pytest.raises(ValueError, match="1 pages needed, 0 of 12 are free"):
        cache.allocate(1)
    cache.check_integrity([(3, 4), (9, 10, 11), (0, 1, 2, 5), c])


def test_tables_of_angles_stay_where_they_are():
    """A CUDA graph reads the one that it was captured with, while longer rows come."""
    model = load("tiny")
    first, longer = model._angle_table(40), model._angle_table(1000)
    assert [len(x) for x in (*first, *longer)] == [64, 64, 1024, 1024]
    assert all(own is same for own, same in zip(first, model._angle_table(64), strict=True))
    assert all(torch.equal(own, more[:64]) for own, more in zip(first, longer, strict=True))
    half = model.to(torch.bfloat16)._angle_table(40)
    assert all(torch.equal(own.bfloat16(), narrow) for own, narrow in zip(first, half, strict=True))
