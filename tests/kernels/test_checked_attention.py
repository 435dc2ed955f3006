"""Attention of checked blocks against the definition written out, kernels against the reference, and the network over
them against its forward with a mask."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from llada2_fast.kernels import attention
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.attention import CLEAN, MASKED, BlockBatch, Span
from llada2_fast.model import LLaDA2Model
from tests.kernels.interpreter import interpreted
from tests.kernels.test_attention import TOLERANCE, bits, kernel, make

CHECK = (CLEAN, MASKED)
ROWS = [  # first block, orders of the blocks from there on, how many positions the last page lacks
    (5, CHECK, 1), (3, (0,), 0), (0, CHECK, 0), (2, (0, *CHECK), 0), (0, (0, 0), 2), (0, CHECK, 1), (9, CHECK, 0),
]  # fmt: skip
SHAPES = {"L=4": (4, 4, 2, 16), "L=16": (16, 6, 2, 20), "L=32": (32, 2, 1, 16), "L=7": (7, 2, 2, 16)}
WAYS = {"whole": 1, "some whole": 3, "split": 10**6}  # and how many multiprocessors make it


def checked(rows, *shape, dtype=torch.float32, device="cpu"):
    """q, k_cache, v_cache, BlockBatch of rows as above; what nobody may read is NaN."""
    q, k, v, spans = make([(first, len(orders), lacks) for first, orders, lacks in rows], *shape, dtype, device)
    order = [one for _, orders, _ in rows for one in orders]
    batch = BlockBatch.from_spans(spans, device)
    return q, k, v, batch._replace(order=torch.tensor(order, dtype=torch.int32, device=device))


def sees(length, block, order, i, other, j):
    """Whether position i of a row's page `block` sees position j of page `other`: the definition in its own words."""
    if order == 0:
        return other <= block
    if order == CLEAN:
        return other < block or (other == block and j <= i)
    draft = block - 1
    return other < draft or (other == draft and j < i) or (other == block and j == i)


def mask_of(length, orders, limit):
    """bool [S, S] of a row whose pages have these orders; S = limit."""
    return torch.tensor([
        [sees(length, query // length, orders[query // length], query % length, *divmod(key, length))
         for key in range(limit)]
        for query in range(limit)
    ])  # fmt: skip


def written_out(q, k_cache, v_cache, batch):
    """Each row densely, in float32, and which tokens [NB * L] are positions of their rows."""
    length = k_cache.shape[1]
    out, real = torch.zeros(q.shape), torch.zeros(len(q), dtype=torch.bool)
    for row, (pages, limit) in enumerate(zip(batch.page_table.tolist(), batch.limit.tolist(), strict=True)):
        own = (batch.block_row == row).nonzero().flatten().tolist()
        where = {int(batch.block_index[i]): i for i in own}
        orders = [int(batch.order[where[block]]) if block in where else 0 for block in range(len(pages))]
        ahead = [block * length + i for block in where for i in range(length) if block * length + i < limit]
        places = [where[at // length] * length + at % length for at in ahead]
        keys, values = (x[pages].flatten(0, 1)[:limit].float().transpose(0, 1)[None] for x in (k_cache, v_cache))
        mask = mask_of(length, orders, limit)[ahead][None, None]
        queries = q[places].float().transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        out[places], real[places] = o[0].transpose(0, 1), True
    return out, real


def compare(got, q, k_cache, v_cache, batch):
    wanted, real = written_out(*(x.cpu() for x in (q, k_cache, v_cache)), BlockBatch(*(x.cpu() for x in batch)))
    assert got.shape == q.shape and got.dtype == q.dtype and got.isfinite().all()
    torch.testing.assert_close(got.float().cpu()[real], wanted[real], atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


def only(args, blocks):
    """The arguments with these query blocks alone."""
    q, k, v, batch = args
    kept = {name: getattr(batch, name)[blocks] for name in ("block_row", "block_index", "order")}
    return q.unflatten(0, (-1, k.shape[1]))[blocks].flatten(0, 1), k, v, batch._replace(**kept)


@pytest.fixture
def small_splits(monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", 32)
    monkeypatch.setattr(attention, "MAX_SPLITS", 4)
    monkeypatch.setattr(attention, "TILE_N", 16)  # less than a block: a query may see nothing of a split's first tiles


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_reference(shape):
    """It is the definition, and a block's bits do not depend on the others."""
    args = checked(ROWS, *shape)
    got = attention.block_attention(*args)
    compare(got, *args)
    for block, own in enumerate(got.split(shape[0])):
        assert torch.equal(attention.block_attention(*only(args, [block])), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_kernel(shape, dtype, small_splits, monkeypatch):
    """Several splits, whoever adds them up; blocks with an order and without in one batch, no bit of which depends on
    the others."""
    args = checked(ROWS, *shape, dtype=dtype)
    results = []
    for processors in WAYS.values():
        monkeypatch.setattr(attention, "multiprocessors", lambda device, count=processors: count)
        results.append(kernel(*args))
    compare(results[0], *args)
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)
    for block in (0, 1, 3, 8):
        own = slice(block * shape[0], (block + 1) * shape[0])
        assert torch.equal(kernel(*only(args, [block])), results[0][own])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_kernel_with_one_split(shape):
    args = checked(ROWS[:4], *shape)
    compare(kernel(*args), *args)


@pytest.mark.parametrize("processors", WAYS.values(), ids=WAYS.keys())
def test_blocks_without_an_order_have_the_same_bits_beside_those_with_one(processors, small_splits, monkeypatch):
    monkeypatch.setattr(attention, "multiprocessors", lambda device: processors)
    args = checked(ROWS, *SHAPES["L=4"])
    plain = (args[3].order == 0).nonzero().flatten()
    q, k, v, batch = only(args, plain)
    wanted = kernel(q, k, v, batch._replace(order=None))
    for got in (kernel(q, k, v, batch), kernel(*args).unflatten(0, (-1, 4))[plain].flatten(0, 1)):
        assert torch.equal(bits(got), bits(wanted))


@pytest.mark.parametrize("ops", ["torch", "triton"])
def test_unused_blocks(ops, small_splits):
    """Of whatever order: zeros, no slots; the pages of the others' slots are those of their index."""
    q, k, v, batch = args = checked([(2, CHECK, 0), (0, CHECK, 1)], *SHAPES["L=4"])
    with force_ops(ops), interpreted() if ops == "triton" else nullcontext():
        wanted = attention.block_attention(*args).unflatten(0, (4, 4))
        used = batch.block_row.clone()
        used[1:3] = -1
        got = attention.block_attention(q, k, v, batch._replace(block_row=used)).unflatten(0, (4, 4))
    assert torch.equal(got[[0, 3]], wanted[[0, 3]]) and not got[1:3].any()
    slots = batch._replace(block_row=used).slots(4).view(4, 4)
    assert (slots[1:3] == -1).all()
    assert (slots[[0, 3], 0] == torch.stack((batch.page_table[0, 2], batch.page_table[1, 1])) * 4).all()


def test_an_order_that_does_not_fit_is_refused():
    q, k, v, batch = checked([(1, CHECK, 0)], *SHAPES["L=4"])
    for order in (batch.order[:1], batch.order.long(), batch.order.repeat(2)[::2], batch.order[:, None]):
        with pytest.raises(ValueError, match=r"^order: contiguous int32 \[2\] on cpu expected, "):
            kernel(q, k, v, batch._replace(order=order))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_a_gpu(dtype, monkeypatch):
    """mini's shape; one split and several, however the work is shared out."""
    args = checked([*ROWS, (33, (0, *CHECK), 5), (31, CHECK, 0)], 32, 16, 4, 128, dtype=dtype, device="cuda")
    results = []
    for processors in WAYS.values():
        monkeypatch.setattr(attention, "multiprocessors", lambda device, count=processors: count)
        results.append(attention.block_attention(*args))
    compare(results[0], *args)
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)
    plain = (args[3].order == 0).nonzero().flatten()
    q, k, v, batch = only(args, plain)
    wanted = attention.block_attention(q, k, v, batch._replace(order=None))
    assert torch.equal(results[0].unflatten(0, (-1, 32))[plain].flatten(0, 1), wanted)


# The network


def forwarded(model, rows, length, seed=0, padding=0):
    """Logits [NB, L, V] of the rows' blocks from their `first` on, by forward_blocks over pages that earlier blocks
    have filled; the rows' tokens and positions [S]. Between the first row and the others stands an unused block.

    padding: a seed of the tokens at positions that a row lacks.
    """
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(padding)
    counts = [first + len(orders) for first, orders, _ in rows]
    cache = model.new_cache(sum(counts) + 1, length)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    pages = torch.randperm(sum(counts) + 1, generator=generator)[: sum(counts)].split(counts)
    each = []
    for (_, orders, lacks), count in zip(rows, counts, strict=True):
        tokens = torch.randint(model.config.vocab_size, (count * length,), generator=generator)
        positions = torch.arange(count * length)
        if orders[-1] == MASKED:
            tokens[-length:], positions[-length:] = 150, positions[-2 * length : -length]
        if lacks:
            real = positions < positions.max() + 1 - lacks
            tokens[~real] = torch.randint(model.config.vocab_size, (int((~real).sum()),), generator=other)
        each.append((tokens, positions))
    ahead = [
        (Span(tuple(own.tolist()), 0, first, first * length), *(x[: first * length] for x in tensors))
        for own, (first, *_), tensors in zip(pages, rows, each, strict=True)
        if first
    ]
    spans, tokens, positions = zip(*ahead, strict=True)
    model.forward_blocks(torch.cat(tokens), torch.cat(positions), list(spans), cache)

    spans = [
        Span(tuple(own.tolist()), first, len(orders), count * length - lacks)
        for own, (first, orders, lacks), count in zip(pages, rows, counts, strict=True)
    ]
    row, index, *tables, _ = BlockBatch.from_spans(spans, "cpu")
    order = torch.tensor([one for _, orders, _ in rows for one in orders])
    tokens, positions = (
        torch.cat([x[first * length :] for x, (first, *_) in zip(of_rows, rows, strict=True)]).view(-1, length)
        for of_rows in zip(*each, strict=True)
    )
    unused = len(rows[0][1])
    row, index, order, tokens, positions = (
        torch.cat((x[:unused], torch.full_like(x[:1], nobody), x[unused:]))
        for x, nobody in ((row, -1), (index, 0), (order, CLEAN), (tokens, 0), (positions, 0))
    )
    batch = BlockBatch(row, index, *tables, order.int())
    slots = batch.slots(length)
    hidden = model.forward_blocks(tokens.flatten(), positions.flatten(), batch, cache, slots=slots)
    logits = model.lm_logits(hidden).unflatten(0, (-1, length))
    return torch.cat((logits[:unused], logits[unused + 1 :])), each


@pytest.mark.parametrize("ops", ["torch", "triton"])
@pytest.mark.parametrize("name", ["tiny", "block22"])
def test_the_network_over_checked_blocks(name, ops, golden):
    """A row at a time, without a cache: the draft and the masks behind its prefix, with the mask that is meant."""
    model = LLaDA2Model.from_pretrained(golden / name, dtype=torch.float32, progress=False)
    rows, length = [(2, CHECK, 0), (0, CHECK, 0), (1, (0,), 0), (1, (0, *CHECK), 0)], 8
    with force_ops(ops), interpreted() if ops == "triton" else nullcontext():
        logits, each = forwarded(model, rows, length)
    begin = 0
    for (first, orders, _), (tokens, positions) in zip(rows, each, strict=True):
        mask = mask_of(length, [0] * first + list(orders), len(tokens))[None, None]
        wanted = model(tokens[None], positions[None], block_length=length, attention_mask=mask).logits[0]
        got = logits[begin : begin + len(orders)].flatten(0, 1)
        torch.testing.assert_close(got, wanted[first * length :], atol=5e-5, rtol=5e-5)
        begin += len(orders)


def test_padding_of_a_checked_block_has_no_say_in_block_routing(golden):
    """In the last block of a row, of which some positions are none: what is there changes nothing at the others."""
    model = LLaDA2Model.from_pretrained(golden / "block22", dtype=torch.float32, progress=False)
    rows, real = [(1, CHECK, 3), (1, CHECK, 5)], torch.tensor([5, 5, 3, 3])[:, None] > torch.arange(8)
    first, *others = (forwarded(model, rows, 8, padding=seed)[0][real] for seed in range(4))
    for logits in others:
        torch.testing.assert_close(logits, first, atol=5e-5, rtol=5e-5)
