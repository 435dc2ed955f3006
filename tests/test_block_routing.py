"""LLaDA2.2's block routing: however a block comes to the router, its tokens have the experts that it has alone."""

import functools
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.engine import Engine
from llada2_fast.generate import generate
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.attention import BlockBatch, Span
from llada2_fast.model import LLaDA2Model, Read
from tests.kernels.interpreter import interpreted

GOLDEN = Path(__file__).parent / "golden" / "block22"
LENGTH, MASK, NEAR = 8, 155, 5e-5
NOBODY = (-1, 0)  # a place of a graph that no row needs
LENGTHS = [21, 8, 3, 30]  # of rows: their last blocks are shorter, but for one


@functools.cache
def network():
    """The golden one, which is decoded as a network without DELETE and INSERT."""
    model = LLaDA2Model.from_pretrained(GOLDEN, dtype=torch.float32, progress=False)
    model.config = replace(model.config, delete_token_id=None, split_token_id=None, mask_token_id=MASK)
    return model


def tokens_of(length):
    return torch.randint(150, (length,), generator=torch.Generator().manual_seed(length))


def num_blocks(length):
    return -(-length // LENGTH)


@contextmanager
def watched(model):
    """Yields what the routers are given and say from now on, a list of (router, h [T, H], Routing)."""
    seen = []
    routers = [layer.mlp.router for layer in model.layers if hasattr(layer.mlp, "router")]
    hooks = [
        router.register_forward_hook(lambda router, given, out: seen.append((router, given[0], out)))
        for router in routers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def written_out(router, h):
    """The experts of one block's tokens h [n, H], a list of lists in order of choice: the rule in its own words."""
    top_k, *_, capacity = router.rule
    score = torch.sigmoid(h.double() @ router.weight.double().T)
    choice = (score + router.expert_bias.double()).tolist()
    best = [max(of_expert) for of_expert in zip(*choice, strict=True)]
    pool = sorted(range(len(best)), key=lambda e: -best[e])[:capacity]
    return [sorted(sorted(pool), key=lambda e: -own[e])[:top_k] for own in choice]


@functools.cache
def alone(length):
    """A row by itself, as long as it is: its logits, and of each router the experts of its tokens."""
    model = network()
    with watched(model) as seen:
        logits = model(tokens_of(length)[None], block_length=LENGTH).logits[0]
    for router, h, routing in seen:
        wanted = [ids for block in h.split(LENGTH) for ids in written_out(router, block)]
        assert routing.ids.tolist() == wanted
    return logits, [routing.ids for *_, routing in seen]


def check_experts(seen, blocks):
    """blocks: of each router in `seen` the (length of a row, number in it) of the blocks that it was given."""
    for layer, ((router, h, routing), own) in enumerate(zip(seen, blocks, strict=True)):
        parts = (x.unflatten(0, (-1, LENGTH)) for x in (h, routing.ids))
        for (length, number), hidden, ids in zip(own, *parts, strict=True):
            if (length, number) == NOBODY:
                continue
            real = min(LENGTH, length - number * LENGTH)
            assert ids[:real].tolist() == written_out(router, hidden[:real])
            assert torch.equal(ids[:real], alone(length)[1][layer][number * LENGTH :][:real])
            assert len(ids.unique()) <= router.rule[-1]  # padding asks for no further expert


def forward(model, cache, spans, pages, read=None):
    """Forward blocks first .. first + n - 1 of rows, spans (length, first, n): hidden states and the blocks' names.

    pages: by the length of a row. read: a Read, of the blocks of all spans.
    """
    tokens, positions, runs, blocks = [], [], [], []
    for length, first, count in spans:
        place = torch.arange(first * LENGTH, (first + count) * LENGTH)
        row = torch.full((num_blocks(length) * LENGTH,), MASK)
        row[:length] = tokens_of(length)
        tokens.append(row[place])
        positions.append(place)
        runs.append(Span(pages[length], first, count, length))
        blocks += [(length, number) for number in range(first, first + count)]
    hidden = model.forward_blocks(torch.cat(tokens), torch.cat(positions), runs, cache, read)
    return hidden, blocks


def pages_of(model, lengths):
    cache = model.new_cache(sum(map(num_blocks, lengths)), LENGTH)
    cache.k.fill_(float("nan"))  # what nobody wrote must not be read
    cache.v.fill_(float("nan"))
    return cache, {length: cache.allocate(num_blocks(length)) for length in lengths}


@given(st.lists(st.integers(1, 37), min_size=1, max_size=3, unique=True), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_ragged_batches_chunks_and_blocks_carried_along(lengths, rng):
    """Rows in chunks of any size, together with those of others or not, a finished block once more or not, and in the
    last layer some blocks alone, where only some tokens are read."""
    model = network()
    cache, pages = pages_of(model, lengths)
    ends = dict.fromkeys(lengths, 0)
    while left := [length for length in lengths if ends[length] < num_blocks(length)]:
        spans = []
        for length in rng.sample(left, rng.randint(1, len(left))):
            carried = rng.randint(0, min(1, ends[length]))
            more = rng.randint(1, num_blocks(length) - ends[length])
            spans.append((length, ends[length] - carried, more + carried))
            ends[length] += more
        names = [(length, first + i) for length, first, count in spans for i in range(count)]
        wanted = sorted(rng.sample(range(len(names)), rng.randint(0, len(names))))
        places = [
            (i, offset) for i, at in enumerate(wanted) for offset in range(LENGTH)
            if names[at][1] * LENGTH + offset < names[at][0] and rng.random() < 0.7
        ]  # fmt: skip
        rows = torch.tensor([i * LENGTH + offset for i, offset in places], dtype=torch.int64)
        with watched(model) as seen:
            hidden, blocks = forward(model, cache, spans, pages, Read(wanted, rows))
        assert blocks == names
        check_experts(seen, [names] * (len(seen) - 1) + [[names[at] for at in wanted]])
        for (i, offset), logits in zip(places, model.lm_logits(hidden), strict=True):
            length, number = names[wanted[i]]
            torch.testing.assert_close(logits, alone(length)[0][number * LENGTH + offset], atol=NEAR, rtol=0)


@pytest.mark.parametrize("ops", ["torch", "triton"])
def test_places_of_a_graph_that_no_row_needs(ops):
    """Whole rows between such places, which hold anything and on a GPU go to no expert."""
    model = network()
    cache, pages = pages_of(model, LENGTHS)
    spans = [Span(pages[length], 0, num_blocks(length), length) for length in LENGTHS]
    names = [(length, number) for length in LENGTHS for number in range(num_blocks(length))]
    row, index, *tables = BlockBatch.from_spans(spans, "cpu")
    at = [0, 2, 2, 9, len(names)]  # ahead of which block a place stands
    names, row, index = list(names), row.tolist(), index.tolist()
    for place in reversed(at):
        names.insert(place, NOBODY)
        row.insert(place, -1)
        index.insert(place, 0)
    batch = BlockBatch(*(torch.tensor(x, dtype=torch.int32) for x in (row, index)), *tables)
    tokens = torch.full((len(names), LENGTH), MASK)
    for length in LENGTHS:
        own = torch.tensor([i for i, name in enumerate(names) if name[0] == length])
        tokens[own] = torch.cat((tokens_of(length), tokens.new_full((-length % LENGTH,), MASK))).view(-1, LENGTH)
    positions = torch.tensor(index)[:, None] * LENGTH + torch.arange(LENGTH)
    with force_ops(ops), interpreted() if ops == "triton" else nullcontext(), watched(model) as seen:
        slots = batch.slots(LENGTH)
        hidden = model.forward_blocks(tokens.flatten(), positions.flatten(), batch, cache, slots=slots)
        logits = model.lm_logits(hidden).view(len(names), LENGTH, -1)
    check_experts(seen, [names] * len(seen))
    for (length, number), got in zip(names, logits, strict=True):
        if (length, number) != NOBODY:
            wanted = alone(length)[0][number * LENGTH :][:LENGTH]
            torch.testing.assert_close(got[: len(wanted)], wanted, atol=NEAR, rtol=0)
    if ops == "triton":
        nobody = torch.tensor(row) < 0
        assert all((routing.ids.view(len(row), -1)[nobody] == -1).all() for *_, routing in seen)
        assert all(set(expert_ids(routing)) == set(routing.ids.flatten().tolist()) - {-1} for *_, routing in seen)


def expert_ids(routing):
    """Of the tiles of a grouped product."""
    return routing.tiles[: routing.num_tiles, 0].tolist()


# Whole decodings


def decoded(prompt, gen_length, attend_tail):
    """A block a step, by forwards over the whole row."""
    model, row = network(), [*prompt, *[MASK] * gen_length]
    total = num_blocks(len(row)) * LENGTH if attend_tail else len(row)
    row += [MASK] * (total - len(row))
    for number in range(len(prompt) // LENGTH, num_blocks(total)):
        end = min((number + 1) * LENGTH, total)
        logits = model(torch.tensor([row[:end]]), block_length=LENGTH).logits[0]
        logits[:, MASK] = -torch.inf
        begin = max(number * LENGTH, len(prompt))
        row[begin:end] = logits[begin:end].argmax(-1).tolist()
    return row[len(prompt) :][:gen_length]


SIZES = [11, 0, 24, 24, 5]  # of prompts; two are alike


@pytest.mark.parametrize("attend_tail", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(attend_tail, use_cache):
    rules = {"threshold": 0.0, "gen_length": 19, "eos_id": -1, "attend_tail": attend_tail}
    prompts = [tokens_of(size).tolist() for size in SIZES]
    wanted = [decoded(prompt, 19, attend_tail) for prompt in prompts]
    assert generate(network(), prompts, use_cache=use_cache, **rules).tolist() == wanted
    for prompt, row in zip(prompts, wanted, strict=True):
        assert generate(network(), [prompt], use_cache=use_cache, **rules).tolist() == [row]


@pytest.mark.parametrize("attend_tail", [True, False])
@pytest.mark.parametrize("graphs", [False, True])
def test_an_engine(attend_tail, graphs):
    """Prompts in chunks along with the steps of others, prefixes that are found, three rows in a graph of four with
    places for ended blocks."""
    config = EngineConfig(
        max_num_seqs=3, cache_tokens=512, max_num_batched_tokens=LENGTH, graphs=graphs, capture=False, trace=False
    )  # fmt: skip
    engine = Engine(network(), config)
    params = DecodeParams(gen_length=19, threshold=0.0, eos_ids=(), attend_tail=attend_tail)
    prompts = [tokens_of(size).tolist() for size in SIZES]
    wanted = [decoded(prompt, 19, attend_tail) for prompt in prompts]
    first, again = engine.generate(prompts, params), engine.generate(prompts, params)
    assert [output.token_ids for output in first] == [output.token_ids for output in again] == wanted
    assert first[3].shared_tokens > 0
    assert [output.shared_tokens for output in again] == [size // LENGTH * LENGTH for size in SIZES]
