"""Block attention against its reference: in Triton's interpreter, and on a GPU at the real sizes.

Everything a kernel may not read is NaN: pages of nobody, positions behind a row's limit, fresh outputs and scratch.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from llada2_fast.cache import PagedKVCache
from llada2_fast.kernels import attention
from llada2_fast.kernels._triton import force_ops, tl, triton
from llada2_fast.kernels.attention import BlockBatch, Span
from llada2_fast.model import LLaDA2Model
from tests.kernels.interpreter import interpreted

# Against float32 truth. Probabilities are rounded to 16 bits before they meet the values.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(rows, length, heads, kv_heads, dim, dtype=torch.float32, device="cpu", seed=0):
    """q, k_cache, v_cache, runs for rows of (first_block, num_blocks, how many positions its last page lacks)."""
    generator = torch.Generator().manual_seed(seed)
    needed = [first + count for first, count, _ in rows]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    k, v = torch.randn(2, len(order), length, kv_heads, dim, generator=generator)
    exists = torch.zeros(len(order), length, dtype=torch.bool)
    runs = []
    for (first, count, lacks), pages in zip(rows, needed, strict=True):
        run = Span(tuple(order[:pages]), first, count, pages * length - lacks)
        order = order[pages:]
        exists[list(run.pages)] = (torch.arange(pages * length) < run.limit).view(pages, length)
        runs.append(run)
    for cache in (k, v):
        cache[~exists] = float("nan")
    q = torch.randn(sum(run.num_blocks for run in runs) * length, heads, dim, generator=generator)
    return *(x.to(device, dtype) for x in (q, k, v)), runs


def kernel(q, k_cache, v_cache, blocks):
    with force_ops("triton"), interpreted():
        return attention.block_attention(q, k_cache, v_cache, blocks)


def compare(got, q, k_cache, v_cache, runs):
    wanted = attention.block_attention_ref(*(x.float().cpu() for x in (q, k_cache, v_cache)), runs)
    assert got.shape == q.shape and got.dtype == q.dtype
    torch.testing.assert_close(got.float().cpu(), wanted, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


@pytest.fixture
def small_splits(monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", 16)
    monkeypatch.setattr(attention, "MAX_SPLITS", 4)


SHAPES = {  # length, heads, kv_heads, dim
    "one token": (1, 2, 1, 16),
    "odd": (3, 3, 3, 20),
    "group of two": (8, 4, 2, 32),
    "group of four": (7, 4, 1, 64),
    "several query tiles": (32, 3, 1, 16),
    "longest": (64, 2, 2, 16),
}
ROWS = [(3, 1, 0), (0, 1, 0), (2, 2, 0), (0, 3, 0), (1, 1, 0)]  # a step, no prefix, carried along, prefill, a step


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_parity(shape, dtype):
    """Short rows: one split each. The last block of every row lacks its last positions."""
    rows = [(first, count, shape[0] // 2) for first, count, _ in ROWS[:3]]
    args = make(rows, *shape, dtype)
    compare(kernel(*args), *args)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_parity_over_many_splits(shape, small_splits):
    length = shape[0]
    rows = [(150 // length, 1, length // 3), (40 // length, 2, 0), (0, 1, 0)]  # splits of 48, of 16, one
    args = make(rows, *shape)
    compare(kernel(*args), *args)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(0, 7)), min_size=1, max_size=3),
    length=st.integers(1, 9),
    group=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 2),
    dim=st.integers(1, 40),
)
def test_parity_of_anything(rows, length, group, kv_heads, dim):
    rows = [(first, count, min(lacks, length - 1)) for first, count, lacks in rows]
    args = make(rows, length, group * kv_heads, kv_heads, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SPLIT", 32)
        compare(kernel(*args), *args)


def test_no_blocks():
    q, k, v, _ = make([(0, 1, 0)], 4, 2, 1, 16)
    assert kernel(q[:0], k, v, []).shape == (0, 2, 16)


def test_caches_that_are_one_layer_of_many_and_a_query_that_is_a_view():
    q, k, v, runs = make(ROWS[:3], 4, 4, 2, 16)
    layers = torch.full((2, 3, *k.shape), float("nan"))
    layers[0, 1], layers[1, 1] = k, v
    wide = torch.full((q.shape[0], 2, 4, 16), float("nan"))
    wide[:, 1] = q
    assert torch.equal(kernel(wide[:, 1], layers[0, 1], layers[1, 1], runs), kernel(q, k, v, runs))


def test_nan_stays_in_its_row(small_splits):
    q, k, v, runs = make([(5, 1, 0), (4, 1, 0)], 8, 2, 1, 16)
    clean = kernel(q, k, v, runs)
    k[runs[0].pages[1], 3] = float("nan")
    got = kernel(q, k, v, runs)
    assert got[:8].isnan().all() and torch.equal(got[8:], clean[8:])


def alone(args, i):
    """The arguments of run i alone, and where its queries lie among all."""
    q, k, v, runs = args
    length = k.shape[1]
    begin = sum(run.num_blocks for run in runs[:i]) * length
    where = slice(begin, begin + runs[i].num_blocks * length)
    return (q[where], k, v, [runs[i]]), where


def test_a_row_does_not_depend_on_the_others(small_splits):
    args = make([(11, 1, 2), (0, 1, 0), (3, 2, 1), (0, 4, 0)], 8, 4, 2, 16)
    together = kernel(*args)
    for i in range(4):
        own, where = alone(args, i)
        assert torch.equal(kernel(*own), together[where])


def test_a_block_does_not_depend_on_how_it_is_forwarded(small_splits):
    """Prefill, carried along, by itself: the same bits."""
    q, k, v, (run,) = make([(0, 9, 0)], 8, 2, 1, 16)
    whole = kernel(q, k, v, [run])
    for first, count in ((0, 1), (3, 2), (8, 1)):
        part = run._replace(first_block=first, num_blocks=count)
        where = slice(first * 8, (first + count) * 8)
        assert torch.equal(kernel(q[where], k, v, [part]), whole[where])


@pytest.mark.parametrize("extra", [1, 30])
def test_width_of_the_table_and_order_of_pages_change_nothing(extra, small_splits):
    q, k, v, runs = make([(9, 1, 2), (0, 1, 0), (2, 2, 1)], 8, 2, 1, 16)
    plain = kernel(q, k, v, runs)
    batch = BlockBatch.from_spans(runs, "cpu")
    wider = torch.nn.functional.pad(batch.page_table, (0, extra), value=2**30)  # reading these pages would crash
    assert torch.equal(kernel(q, k, v, batch._replace(page_table=wider)), plain)
    order = torch.randperm(k.shape[0])
    moved_k, moved_v = torch.empty_like(k), torch.empty_like(v)
    moved_k[order], moved_v[order] = k, v
    moved = [run._replace(pages=tuple(order[list(run.pages)].tolist())) for run in runs]
    assert torch.equal(kernel(q, moved_k, moved_v, moved), plain)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    rows=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 2), st.integers(0, 7)), min_size=1, max_size=3),
    length=st.sampled_from([1, 5, 8]),
    max_splits=st.integers(1, 6),
    processors=st.lists(st.integers(1, 12), min_size=2, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_no_bit_depends_on_who_adds_the_splits_up(rows, length, max_splits, processors, dtype):
    """A program for each split, one for all of a unit's, or these for some units and those for others."""
    rows = [(first, count, min(lacks, length - 1)) for first, count, lacks in rows]
    args = make(rows, length, 4, 2, 16, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SPLIT", 32)
        patch.setattr(attention, "MAX_SPLITS", max_splits)
        results = []
        for count in (*processors, 10**6):
            patch.setattr(attention, "multiprocessors", lambda device, count=count: count)
            results.append(kernel(*args))
    compare(results[0], *args)
    assert all(torch.equal(bits(result), bits(results[-1])) for result in results)


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def test_ways():
    """Units of work by the number of blocks, mini's on a GPU of 132 multiprocessors."""
    wanted = {1: ("split", 64), 21: ("split", 64), 22: ("whole", 128)}
    for blocks, (way, rows) in wanted.items():
        found, meta = attention.attention_tiles(torch.device("cpu"), torch.bfloat16, 32, 16, 4, 128, blocks)
        assert (found, meta["TILE_M"]) == (way, rows)
    # of four units each: the first 33, and the others if they are 22 or more
    whole = {22: 22, 33: 33, 40: 33, 54: 33, 55: 55, 75: 66}
    assert {blocks: attention.whole_blocks(blocks, 4, 132) for blocks in whole} == whole


def test_one_launch(small_splits, monkeypatch):
    count = []
    q, k, v, runs = make([(2, 1, 0), (0, 1, 0)], 8, 2, 1, 16)
    with force_ops("triton"), interpreted():
        run = triton.JITFunction.run
        monkeypatch.setattr(triton.JITFunction, "run", lambda *a, **kw: (count.append(a[0]), run(*a, **kw)))
        attention.block_attention(q, k, v, runs)
        assert len(count) == 1
        monkeypatch.undo()


@triton.jit
def _splits_kernel(
    BLOCK_ROW, BLOCK_INDEX, LIMIT, OUT, L: tl.constexpr, TILE_N: tl.constexpr, SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _row, _tiles, _seen, each, count = attention._splits(
        BLOCK_ROW, BLOCK_INDEX, LIMIT, block, L, TILE_N, SPLIT, MAX_SPLITS
    )
    tl.store(OUT + block * 2, each)
    tl.store(OUT + block * 2 + 1, count)


def test_splits_are_few_and_even():
    """By the number of keys alone, in tiles of 32: at most 512 keys each, from 8192 keys on 16 splits of more."""
    wanted = {32: (1, 1), 512: (16, 1), 544: (9, 2), 1056: (11, 3), 4096: (16, 8), 8224: (17, 16),
              32800: (65, 16)}  # fmt: skip
    keys = torch.tensor([*wanted, 40, 64], dtype=torch.int32)
    row = torch.tensor([*range(len(wanted) + 1), -1], dtype=torch.int32)  # one that ends within a page, one unused
    index, out = (keys - 1) // 32, torch.zeros(len(keys), 2, dtype=torch.int32)
    with interpreted():
        _splits_kernel[(len(keys),)](row, index, keys, out, 32, 32, attention.SPLIT, attention.MAX_SPLITS)
    assert out.tolist() == [[*wanted[n]] for n in wanted] + [[2, 1], [1, 0]]


def test_batch_of_runs():
    runs = [Span((5, 2, 7, 9), 1, 2, 11), Span((3,), 0, 1, 4), Span((6, 1, 8), 2, 1, 12)]
    batch = BlockBatch.from_spans(runs, "cpu")
    assert all(x.dtype == torch.int32 for x in batch[:-1]) and batch.order is None
    assert batch.block_row.tolist() == [0, 0, 1, 2] and batch.block_index.tolist() == [1, 2, 0, 2]
    assert batch.page_table.shape == (3, 3) and batch.limit.tolist() == [11, 4, 12]
    assert batch.slots(4).tolist() == attention.span_slots(runs, 4)
    single = [(0, Span((5, 2), 1, 1, 11)), (1, Span((5, 2, 7), 2, 1, 11)), (2, runs[1]), (3, runs[2])]
    assert batch.spans() == single
    empty = BlockBatch.from_spans([], "cpu")
    assert empty.slots(4).shape == (0,) and empty.spans() == []


def with_unused(batch, used):
    """The batch spread over len(used) query blocks: those that are not used are of no row."""
    row = torch.full((len(used),), -1, dtype=torch.int32)
    index = torch.zeros_like(row)
    used = torch.tensor(used)
    row[used], index[used] = batch.block_row, batch.block_index
    return batch._replace(block_row=row, block_index=index)


@pytest.mark.parametrize("processors", [1, 3, 10**6])
def test_unused_blocks(processors, small_splits, monkeypatch):
    """Their output is zero, their tokens have no slot, the others' bits stay: as the reference has it."""
    monkeypatch.setattr(attention, "multiprocessors", lambda device: processors)
    q, k, v, runs = make([(5, 1, 0), (0, 2, 0)], 8, 2, 1, 16)
    used = [False, True, False, True, True, False]
    batch = with_unused(BlockBatch.from_spans(runs, "cpu"), used)
    spread = torch.full((6, 8, 2, 16), float("nan"))
    spread[used] = q.view(3, 8, 2, 16)
    got = kernel(spread.flatten(0, 1), k, v, batch)
    assert torch.equal(got.view(6, 8, 2, 16)[used].flatten(0, 1), kernel(q, k, v, runs))
    assert not got.view(6, 8, 2, 16)[[not u for u in used]].any()
    reference = attention.block_attention(spread.flatten(0, 1), k, v, batch)
    torch.testing.assert_close(got, reference, atol=1e-5, rtol=1e-5)
    slots = batch.slots(8).view(6, 8)
    assert slots[used].flatten().tolist() == attention.span_slots(runs, 8)
    assert (slots[[not u for u in used]] == -1).all()


def test_reference_of_a_batch_is_the_reference_of_its_runs():
    q, k, v, runs = make([(3, 1, 2), (0, 2, 0), (1, 2, 1)], 4, 4, 2, 16)
    batch = BlockBatch.from_spans(runs, "cpu")
    got = attention.batch_attention_ref(q, k, v, batch)
    torch.testing.assert_close(got, attention.block_attention_ref(q, k, v, runs), atol=1e-6, rtol=1e-6)


def test_place_blocks():
    runs = [Span((5, 2, 7), 1, 2, 11), Span((3,), 0, 1, 4)]
    x = torch.zeros(1)
    blocks, slot = attention.place_blocks(runs, 4, x)
    assert blocks is runs and slot.tolist() == attention.span_slots(runs, 4)
    with force_ops("triton"):
        batch, slot = attention.place_blocks(runs, 4, x)
    assert isinstance(batch, BlockBatch) and slot.tolist() == attention.span_slots(runs, 4)
    again, slot = attention.place_blocks(batch, 4, x)
    assert again is batch and slot.tolist() == attention.span_slots(runs, 4)


def test_the_network_over_a_batch_with_unused_blocks(golden):
    """forward_blocks: a list of runs and a BlockBatch, references and kernels, give one result and write one cache."""
    model = LLaDA2Model.from_pretrained(golden / "tiny", progress=False)
    length, used = 8, [True, False, True, True]
    runs = [Span((3,), 0, 1, 8), Span((5, 0, 2), 1, 2, 22)]
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(2, model.config.num_hidden_layers, 6, length, 2, 16, generator=generator)
    tokens = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    positions = torch.tensor([0, 0, 1, 2])[:, None] * length + torch.arange(length)

    def forward(choice, keep, blocks):
        cache = PagedKVCache(model.config, 6, length, torch.float32, "cpu")
        cache.k, cache.v = history.clone()
        with force_ops(choice), interpreted():
            hidden = model.forward_blocks(tokens[keep].flatten(), positions[keep].flatten(), blocks, cache)
        return hidden.view(-1, length, hidden.shape[-1]), cache.k, cache.v

    batch = with_unused(BlockBatch.from_spans(runs, "cpu"), used)
    wanted, *pages = forward("torch", used, runs)
    for got, *written in (
        forward("triton", used, runs), forward("torch", [True] * 4, batch), forward("triton", [True] * 4, batch),
    ):  # fmt: skip
        got = got if len(got) == 3 else got[used]
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(written, pages, atol=2e-5, rtol=2e-5)


def test_what_does_not_fit_is_refused():
    q, k, v, runs = make([(1, 1, 0), (0, 1, 0)], 4, 4, 2, 16)
    batch = BlockBatch.from_spans(runs, "cpu")
    turned_q, turned_v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, v))
    bad = {
        "q": [(q[:7], k, v, batch), (q[:, :3], k, v, batch), (turned_q, k, v, batch),
              (q.double(), k.double(), v.double(), batch)],
        "k_cache": [(q, k[..., :8], v, batch), (q, k.half(), v, batch), (q, k[0], v, batch)],
        "v_cache": [(q, k, v[:2], batch), (q, k, turned_v, batch)],
        "block_row": [(q, k, v, batch._replace(block_row=batch.block_row.long()))],
        "block_index": [(q, k, v, batch._replace(block_index=batch.block_index[:1]))],
        "page_table": [(q, k, v, batch._replace(page_table=batch.page_table.T.contiguous().T))],
        "limit": [(q, k, v, batch._replace(limit=batch.limit[:1]))],
    }  # fmt: skip
    for name, calls in bad.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name}: "):
                kernel(*call)


REAL = {"mini": (32, 16, 4, 128), "flash": (32, 32, 4, 128), "uneven": (48, 6, 2, 80)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL.keys())
def test_on_a_gpu(shape, dtype, monkeypatch):
    """Steps over long and short prefixes, a carried block, prefill; each row alone has the same bits."""
    args = make([(1024, 1, 5), (0, 1, 0), (33, 2, 0), (7, 20, 0), (300, 1, 1)], *shape, dtype, "cuda")
    together = attention.block_attention(*args)
    compare(together, *args)
    for i in range(5):
        own, where = alone(args, i)
        assert torch.equal(attention.block_attention(*own), together[where])
    for processors in (1, 40, 256):  # other ways to share out the work
        monkeypatch.setattr(attention, "multiprocessors", lambda device, count=processors: count)
        assert torch.equal(attention.block_attention(*args), together)


@pytest.mark.gpu
def test_a_cuda_graph_holds_it():
    """Captured once; rows and prefixes then change under it, and nothing waits for the host."""
    q, k, v, runs = make([(40, 1, 0), (3, 1, 0)], 32, 16, 4, 128, torch.bfloat16, "cuda")
    batch = BlockBatch.from_spans(runs, "cuda")
    attention.block_attention(q, k, v, batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.block_attention(q, k, v, batch)
    for first in (0, 11, 40):
        batch.block_index[0] = first
        graph.replay()
        short = [runs[0]._replace(first_block=first), runs[1]]
        assert torch.equal(out, attention.block_attention(q, k, v, short))
