"""Rows going on to their next blocks: the rule, and the kernel against its reference in the interpreter."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_fast.kernels import advance, roles
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.refine import BLOCK_DONE, ERROR, FINISHED, PRIOR_MASK, BlockState
from llada2_fast.kernels.roles import GENERATED, PADDING, PROMPT, TAIL, SpecialIds
from tests.kernels.interpreter import interpreted

MASK = 99


def slots_of(count, length, seed, device="cpu"):
    """State, bounds and pages of rows in every condition: running, ended, finished, failed, at their last block."""
    generator = torch.Generator().manual_seed(seed)

    def pick(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    tokens = torch.where(pick(4, count, length) == 0, MASK, pick(50, count, length))
    state = BlockState.fresh(tokens, pick(2, count, length).to(torch.int8), pick(5, count) * length)
    state.frozen.copy_(torch.tensor([0, BLOCK_DONE, BLOCK_DONE, BLOCK_DONE | FINISHED, ERROR])[pick(5, count)])
    for field in ("step", "post_steps", "prior_flags", "commit_step", "commit_confidence"):
        tensor = getattr(state, field)
        tensor.copy_(pick(4, *tensor.shape))
    total = state.block_start + length + pick(2 * length, count, low=1 - length)
    limit = torch.where(pick(2, count) == 0, total, -(-total // length) * length)
    state.changed.copy_(pick(2, count))
    pages = torch.randperm(count * 11, generator=generator).view(count, 11).int()  # a block's number is at most 5
    given = torch.where(pick(3, count, 2, length) == 0, pick(50, count, 2, length), MASK)
    bounds = advance.RowBounds(total.int(), limit.int(), given)
    for holder in (state, bounds):
        for field in fields(holder):
            setattr(holder, field.name, getattr(holder, field.name).to(device))
    return state, bounds, pages.to(device)


def plan_of(count, entries, seed, device="cpu"):
    """`entries` entries that name some of the lanes, the last ones repeats of the first."""
    generator = torch.Generator().manual_seed(seed)
    own = min(count, int(torch.randint(1, entries + 1, (), generator=generator)))
    lanes = torch.randperm(count, generator=generator)[:own].int()
    repeat = (torch.arange(entries) >= own).int()
    return torch.cat((lanes, lanes[:1].expand(entries - own))).to(device), repeat.to(device)


def copy(state):
    return BlockState(*(x.clone() for x in vars(state).values()))


def untouched(state, before, lanes):
    for name, tensor in vars(state).items():
        assert torch.equal(tensor[lanes], getattr(before, name)[lanes]), name


def same(seed, count, length, entries, carried, device="cpu"):
    state, bounds, pages = slots_of(count, length, seed, device)
    pages = pages[:, : max(0, 3 * seed - 1)].contiguous()  # of none, of some or of all blocks
    plan = plan_of(count, entries, seed, device)
    wanted = copy(state)
    flags = torch.tensor([0, roles.EDITING, roles.FILL_PROMPT], dtype=torch.int32, device=device)
    flags = flags[torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))]
    blocks = advance.advance_ref(wanted, bounds, pages, flags, *plan, carried, SpecialIds(MASK))
    got = advance.advance(state, bounds, pages, flags, *plan, carried, SpecialIds(MASK))
    assert int(blocks.count) <= entries * length
    got, blocks = (one._replace(order=one.order[: int(one.count)]) for one in (got, blocks))
    for name, a, b in zip(blocks._fields, got, blocks, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for name, a in vars(state).items():
        assert torch.equal(a, getattr(wanted, name)), name


@pytest.mark.parametrize("length", [1, 5, 32])
@pytest.mark.parametrize(
    "count, entries, carried",
    [(1, 1, 0), (1, 1, 1), (1, 4, 2), (7, 4, 1), (7, 8, 3), (13, 16, 9), (300, 256, 90)],  # the last in groups
)
def test_parity(count, length, entries, carried):
    with force_ops("triton"), interpreted():
        for seed in range(4):
            same(seed, count, length, entries, carried)


def test_a_table_of_pages_that_does_not_fit_is_refused():
    state, bounds, pages = slots_of(4, 8, 0)
    with force_ops("triton"), interpreted():
        for bad in (pages[:, ::2], pages.long(), pages[0]):
            with pytest.raises(ValueError, match="^page_table: "):
                advance.advance(state, bounds, bad, state.frozen, *plan_of(4, 4, 0), 1, SpecialIds(MASK))


@pytest.mark.gpu
@pytest.mark.parametrize("count, entries, carried", [(1, 1, 1), (40, 32, 8), (256, 128, 32), (256, 256, 64)])
def test_parity_on_a_gpu(count, entries, carried):
    for seed in range(4):
        same(seed, count, 32, entries, carried, "cuda")


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 4), st.sampled_from([1, 3, 8]))
def test_the_rule(seed, count, carried, length):
    state, bounds, pages = slots_of(count, length, seed)
    offset = torch.arange(length)
    lanes, repeat = plan_of(count, 8, seed)
    before = copy(state)
    flags = torch.full((count,), roles.EDITING * (seed % 2), dtype=torch.int32)
    rows, blocks, tokens, position, slot, order, number = advance.advance_ref(
        state, bounds, pages, flags, lanes, repeat, carried, SpecialIds(MASK)
    )
    masked, editable = roles.roles_ref(state.tokens, state.kind, state.frozen, flags, MASK)
    read = (masked | editable)[lanes.long()] & (repeat == 0)[:, None]
    assert order[: int(number)].tolist() == read.flatten().nonzero()[:, 0].tolist()
    for at, (row, block) in enumerate(zip(rows.tolist(), blocks.tolist(), strict=True)):
        assert torch.equal(position[at], block * length + offset)
        if row < 0:
            assert block == 0 and (slot[at] == -1).all() and (tokens[at] == MASK).all()
        else:
            assert torch.equal(slot[at], pages[row, block] * length + offset)
    used = 0
    for entry, lane in enumerate(lanes[repeat == 0].tolist()):
        block = int(before.block_start[lane]) // length
        follows = int(before.block_start[lane]) + length < int(bounds.total[lane])
        moves = before.frozen[lane] == BLOCK_DONE and follows
        if moves and before.changed[lane]:
            moves = used < carried
            if moves:
                at = 8 + used
                assert (rows[at], blocks[at]) == (lane, block) and torch.equal(tokens[at], before.tokens[lane])
                used += 1
        assert rows[entry] == lane and blocks[entry] == block + moves
        assert torch.equal(tokens[entry], state.tokens[lane])
        waits = before.frozen[lane] == BLOCK_DONE and follows and not moves
        assert state.changed[lane] == (0 if moves or waits else before.changed[lane])
        if not moves:
            before.changed[lane] = state.changed[lane]
            untouched(state, before, lane)
            continue
        assert state.block_start[lane] == before.block_start[lane] + length
        assert not state.frozen[lane] and not state.step[lane] and not state.post_steps[lane]
        assert (state.commit_step[lane] == -1).all() and not state.commit_confidence[lane].any()
        held = bool(((before.tokens[lane] == MASK) & (before.kind[lane] != PROMPT)).any())
        assert state.prior_flags[lane] == before.prior_flags[lane] | (PRIOR_MASK if held else 0)
        start = int(state.block_start[lane])
        given = bounds.given[lane, start // length % 2]
        for position, token, kind, fixed in zip(
            start + offset, state.tokens[lane], state.kind[lane], given, strict=True
        ):
            there = GENERATED if position < bounds.total[lane] else TAIL if position < bounds.limit[lane] else PADDING
            known = there == GENERATED and fixed != MASK
            assert kind == (PROMPT if known else there) and token == (fixed if known else MASK)
    spare = [*range(int((repeat == 0).sum()), 8), *range(8 + used, 8 + carried)]
    for at in spare:
        assert rows[at] == -1 and blocks[at] == 0 and (tokens[at] == MASK).all() and (slot[at] == -1).all()
    untouched(state, before, sorted(set(range(count)) - set(lanes.tolist())))
