"""Between two steps without the host: rows whose block has ended begin their next one.

    ready      its block has ended, the row has not, and a block follows
    settled    the step that ended the block changed nothing: the keys and values in its page are final
    advance    ready, and settled or given one of the C places to be carried: the ended block then rides along with the
               next block's first forward. Places go to the rows in the order of the plan.

The next block holds masks, and the ids that are given in it: those are prompt.

A ready row that must wait stays as it is for one step, whose forward over the final tokens settles it.

Shapes: S lanes, A entries of the plan, C places, B = A + C, L block_length, P pages of a row. The plan names a lane per
entry; an entry that repeats another fills a graph of a larger size. Such an entry, and a place that nobody needs, is no
row's block: its row and slots are -1, so it is written to no page and, on a GPU, goes to no expert.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._ambient import run_kernel
from ._triton import tl, triton, use_triton
from .overlap import inputs_ready
from .roles import GENERATED, PADDING, PROMPT, TAIL, SpecialIds, _needed, needed_ref
from .state import BLOCK_DONE, PRIOR_MASK, BlockState, StateTensors

TOGETHER = 4096  # positions that the kernel holds at a time

_DONE, _MASKED = tl.constexpr(BLOCK_DONE), tl.constexpr(PRIOR_MASK)
_GENERATED, _PROMPT = tl.constexpr(GENERATED), tl.constexpr(PROMPT)
_TAIL, _PADDING = tl.constexpr(TAIL), tl.constexpr(PADDING)


@dataclass
class RowBounds:
    """What a row's blocks depend on beside BlockState; tensors at fixed addresses."""

    total: torch.Tensor  # int32 [S]: prompt and generated positions
    limit: torch.Tensor  # int32 [S]: positions that exist, with the tail where it is denoised
    given: torch.Tensor  # int64 [S, 2, L]: ids given in the row's next block and the one behind it, the mask id where
    #   none is; block b's at b % 2, so that a host that hears of a block's begin a step late is still in time


class Forwarded(NamedTuple):
    """The blocks that a step forwards: first the entries' active ones, then the carried ones."""

    row: torch.Tensor  # int32 [B]: the lane, -1 of no row's block
    block: torch.Tensor  # int32 [B]: number in its row, 0 of no row's
    tokens: torch.Tensor  # int64 [B, L]
    position: torch.Tensor  # int64 [B, L]: in the row
    slot: torch.Tensor  # int64 [B, L]: page * L + offset, -1 where the table of pages ends before the block
    order: torch.Tensor  # int32 [A * L]: the active blocks' positions, entry * L + offset, whose logits the step reads
    count: torch.Tensor  # int32 [1]: how many those are; what is behind them is undefined


def _begin_ref(state, bounds, lane, ids):
    """Lay the next blocks of some lanes [n] out."""
    start, tokens = state.block_start[lane] + state.tokens.shape[1], state.tokens[lane]
    masked = ((tokens == ids.mask) & (state.kind[lane] != PROMPT)).any(-1)
    prior_flags = state.prior_flags[lane] | masked.int() * PRIOR_MASK
    position = start[:, None] + torch.arange(tokens.shape[1], device=lane.device)  # [n, L]
    behind, absent = position >= bounds.total[lane][:, None], position >= bounds.limit[lane][:, None]
    tokens = bounds.given[lane, start // tokens.shape[1] % 2].masked_fill(behind, ids.mask)
    kind = behind * TAIL + absent * (PADDING - TAIL) + (tokens != ids.mask) * PROMPT  # GENERATED is 0
    state.reset_block(lane, tokens, kind.to(state.kind.dtype), start, prior_flags)


def advance_ref(
    state: BlockState, bounds: RowBounds, page_table: torch.Tensor, flags: torch.Tensor, lane: torch.Tensor,
    repeat: torch.Tensor, carried: int, ids: SpecialIds,
) -> Forwarded:  # fmt: skip
    """See advance."""
    lane, length = lane.long(), state.tokens.shape[1]
    block, tokens = state.block_start[lane] // length, state.tokens[lane]  # [S] -> [A], [S, L] -> [A, L]
    end = (block + 1) * length
    ready = (repeat == 0) & (state.frozen[lane] == BLOCK_DONE) & (end < bounds.total[lane])
    unsettled = ready & (state.changed[lane] != 0)
    given = unsettled & (unsettled.cumsum(0) <= carried)
    going = ready & (given | ~unsettled)

    state.changed[lane[ready]] = 0
    _begin_ref(state, bounds, lane[going], ids)

    rows = lane.new_full((len(lane) + carried,), -1)  # [A + C]
    index, laid = torch.zeros_like(rows), tokens.new_full((len(rows), length), ids.mask)
    own = (repeat == 0).nonzero()[:, 0]  # sync: reference
    rows[own], index[own], laid[own] = lane[own], state.block_start[lane[own]] // length, state.tokens[lane[own]]
    places = len(lane) + torch.arange(int(given.sum()), device=lane.device)
    rows[places], index[places], laid[places] = lane[given], block[given], tokens[given]
    offset = torch.arange(length, device=lane.device)
    slot, there = torch.full_like(laid, -1), (rows >= 0) & (index < page_table.shape[1])
    slot[there] = page_table[rows[there], index[there]].long()[:, None] * length + offset
    needed = needed_ref(state.tokens[lane], state.kind[lane], state.frozen[lane], flags[lane], ids.mask)
    needed = (needed & (repeat == 0)[:, None]).flatten().nonzero()[:, 0].int()  # sync: reference
    order, count = needed.new_zeros(len(lane) * length), needed.new_full((1,), len(needed))
    order[: len(needed)] = needed
    return Forwarded(rows.int(), index.int(), laid, index[:, None] * length + offset, slot, order, count)


@triton.jit
def _forward(OUT, PAGE_TABLE, pages, at, row, block, tokens, mask, L: tl.constexpr, COLUMNS: tl.constexpr):
    """Forwarded of blocks `at` [N] where mask: row, block [N] and tokens [N, COLUMNS], all int32."""
    column = tl.arange(0, COLUMNS)[None, :]
    n = at[:, None] * L + column
    inside = mask[:, None] & (column < L)
    paged = mask & (row >= 0) & (block < pages)
    page = tl.load(PAGE_TABLE + row.to(tl.int64) * pages + block, mask=paged, other=-1)[:, None]
    tl.store(OUT.row + at, row, mask=mask)
    tl.store(OUT.block + at, block, mask=mask)
    tl.store(OUT.tokens + n, tokens.to(tl.int64), mask=inside)
    tl.store(OUT.position + n, (block[:, None] * L + column).to(tl.int64), mask=inside)
    tl.store(OUT.slot + n, tl.where(page < 0, -1, page.to(tl.int64) * L + column), mask=inside)


@triton.jit
def _list_needed(
    LANE, REPEAT, FLAGS, STATE, OUT, mask_id, entry, listed, A: tl.constexpr, L: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Forwarded's order of some entries behind the first `listed` positions, and how many it has then; from a state
    that is read again: kept, it would fill the registers."""
    column = tl.arange(0, COLUMNS)[None, :]
    lane = tl.load(LANE + entry, mask=entry < A, other=0)
    own = tl.load(REPEAT + entry, mask=entry < A, other=1) == 0
    frozen = tl.load(STATE.frozen + lane, mask=own, other=1)[:, None]
    flags = tl.load(FLAGS + lane, mask=own, other=0)[:, None]
    n, inside = lane[:, None] * L + column, own[:, None] & (column < L)
    tokens = tl.load(STATE.tokens + n, mask=inside, other=0)
    kind = tl.load(STATE.kind + n, mask=inside, other=0)
    needed = (inside & _needed(tokens, kind, frozen, flags, mask_id)).to(tl.int32)
    each = tl.sum(needed, 1)
    place = listed + (tl.cumsum(each, 0) - each)[:, None] + tl.cumsum(needed, 1) - 1
    tl.store(OUT.order + place, entry[:, None] * L + column, mask=needed > 0)
    return listed + tl.sum(each, 0)


@triton.jit(do_not_specialize=["pages"])
def _advance_kernel(
    LANE, REPEAT, TOTAL, LIMIT, GIVEN, FLAGS, PAGE_TABLE,
    STATE, OUT,  # BlockState, Forwarded
    pages, mask_id,
    A: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    GROUP: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (1,): the entries in their order, [GROUP, COLUMNS] at a time: all of them would fill the registers."""
    inputs_ready(EARLY)
    column = tl.arange(0, COLUMNS)
    used, listed = 0, 0  # places asked for, and needed positions
    for first in range(0, A, GROUP):
        entry = first + tl.arange(0, GROUP)
        there = entry < A
        lane = tl.load(LANE + entry, mask=there, other=0)
        own = there & (tl.load(REPEAT + entry, mask=there, other=1) == 0)
        n = lane[:, None] * L + column[None, :]
        inside = own[:, None] & (column < L)[None, :]
        start = tl.load(STATE.block_start + lane, mask=there, other=0).to(tl.int32)
        total = tl.load(TOTAL + lane, mask=own, other=0)
        limit = tl.load(LIMIT + lane, mask=own, other=0)
        prior_flags = tl.load(STATE.prior_flags + lane, mask=own, other=0)
        tokens = tl.load(STATE.tokens + n, mask=inside, other=0).to(tl.int32)
        kind = tl.load(STATE.kind + n, mask=inside, other=0)
        ready = own & (tl.load(STATE.frozen + lane, mask=own, other=0) == _DONE) & (start + L < total)
        unsettled = ready & (tl.load(STATE.changed + lane, mask=own, other=0) != 0)
        place = used + tl.cumsum(unsettled.to(tl.int32), 0) - 1
        used += tl.sum(unsettled.to(tl.int32), 0)
        given = unsettled & (place < C)
        going = ready & (given | (unsettled == 0))

        # the ended blocks that ride along
        at = A + tl.where(given, place, 0)
        _forward(OUT, PAGE_TABLE, pages, at, lane, start // L, tokens, given, L, COLUMNS)

        # the next blocks
        holds_mask = tl.sum((inside & (tokens == mask_id) & (kind != _PROMPT)).to(tl.int32), 1) > 0
        start = tl.where(going, start + L, start)
        text, tail = (total - start)[:, None], (limit - start)[:, None]  # up to their ends
        fresh = tl.where(column[None, :] < text, _GENERATED, tl.where(column[None, :] < tail, _TAIL, _PADDING))
        new = inside & going[:, None]
        known = (lane * 2 + start // L % 2)[:, None] * L + column[None, :]
        known = tl.load(GIVEN + known, mask=new & (column[None, :] < text), other=mask_id).to(tl.int32)
        fresh = tl.where(known != mask_id, _PROMPT, fresh)
        tokens = tl.where(going[:, None], known, tokens)
        tl.debug_barrier()  # every thread has read the state
        tl.store(STATE.tokens + n, tokens.to(tl.int64), mask=new)
        tl.store(STATE.kind + n, fresh.to(tl.int8), mask=new)
        tl.store(STATE.commit_step + n, tl.full([GROUP, COLUMNS], -1, tl.int32), mask=new)
        tl.store(STATE.commit_confidence + n, tl.zeros([GROUP, COLUMNS], tl.float32), mask=new)
        none = tl.zeros([GROUP], tl.int32)
        tl.store(STATE.block_start + lane, start.to(tl.int64), mask=going)
        tl.store(STATE.step + lane, none, mask=going)
        tl.store(STATE.post_steps + lane, none, mask=going)
        tl.store(STATE.frozen + lane, none, mask=going)
        tl.store(STATE.changed + lane, none, mask=ready)  # a row that waits is settled by this step
        tl.store(STATE.prior_flags + lane, prior_flags | tl.where(holds_mask, _MASKED, 0), mask=going)

        # what is forwarded: the entries that are no repeats
        row, block = tl.where(own, lane, -1), tl.where(own, start // L, 0)
        _forward(OUT, PAGE_TABLE, pages, entry, row, block, tl.where(own[:, None], tokens, mask_id), there, L, COLUMNS)
        tl.debug_barrier()  # every thread has written the state
        listed = _list_needed(LANE, REPEAT, FLAGS, STATE, OUT, mask_id, entry, listed, A, L, COLUMNS)
    tl.store(OUT.count, listed)
    if C > 0:
        spare = tl.arange(0, PLACES)
        free = (spare >= used) & (spare < C)
        none = tl.zeros([PLACES], tl.int32)
        blank = tl.zeros([PLACES, COLUMNS], tl.int32) + mask_id
        _forward(OUT, PAGE_TABLE, pages, A + spare, none - 1, none, blank, free, L, COLUMNS)


def launch(
    state: BlockState, bounds: RowBounds, page_table: torch.Tensor, flags: torch.Tensor, lane: torch.Tensor,
    repeat: torch.Tensor, carried: int, ids: SpecialIds,
) -> Forwarded:  # fmt: skip
    """advance's launch. ValueError where the table of pages does not fit."""
    if page_table.dtype != torch.int32 or page_table.ndim != 2 or not page_table.is_contiguous():
        raise ValueError(
            f"page_table: contiguous int32 [S, P] expected, got {page_table.dtype} {list(page_table.shape)} with "
            f"strides {page_table.stride()}"
        )
    entries, length = lane.shape[0], state.tokens.shape[1]
    output = _empty(state.tokens, entries, carried)
    columns = triton.next_power_of_2(length)
    group = min(triton.next_power_of_2(entries), max(1, TOGETHER // columns))
    run_kernel(
        _advance_kernel, (1,),
        lane, repeat, bounds.total, bounds.limit, bounds.given, flags, page_table, StateTensors(**vars(state)), output,
        page_table.shape[1], ids.mask,
        A=entries, C=carried, L=length, GROUP=group, PLACES=triton.next_power_of_2(max(carried, 1)), COLUMNS=columns,
        num_warps=min(16, max(1, group * columns // 256)),
    )  # fmt: skip
    return output


def _empty(tokens, entries, carried):
    length, blocks = tokens.shape[1], entries + carried
    long = [tokens.new_empty(blocks, length) for _ in range(3)]
    row, block, order, count = (tokens.new_empty(n, dtype=torch.int32) for n in (blocks, blocks, entries * length, 1))
    return Forwarded(row, block, *long, order, count)


def advance(
    state: BlockState, bounds: RowBounds, page_table: torch.Tensor, flags: torch.Tensor, lane: torch.Tensor,
    repeat: torch.Tensor, carried: int, ids: SpecialIds,
) -> Forwarded:  # fmt: skip
    """Begin the next blocks of a plan's rows; updates `state` in place.

    state: the blocks of S lanes
    bounds: how far their rows go, and what is given in their next blocks
    page_table: int32 [S, P]: their rows' pages from block 0 on; P may be 0
    flags: int32 [S]: of their rules
    lane: int32 [A], A at least 1: the lane of each entry of the plan
    repeat: int32 [A], non-zero where an entry repeats another
    carried: C, the places for ended blocks
    ids: the model's special ids

    Returns what is to be forwarded.
    """
    run = launch if use_triton(state.tokens) else advance_ref
    return run(state, bounds, page_table, flags, lane, repeat, carried, ids)


def begin_next(state, bounds, lanes, ids):
    """Begin the next blocks of lanes whose block has ended, whatever their last steps changed: of the plan's three, for
    a host that sees to what is carried by itself. Updates `state` in place.

    bounds: RowBounds; lanes: a list of ints; ids: SpecialIds.
    """
    lane = torch.tensor(lanes, dtype=torch.int64, device="cpu").to(state.tokens.device)
    if use_triton(state.tokens):
        lane = lane.int()
        pages, flags = lane.new_empty((len(state.tokens), 0)), torch.zeros_like(state.frozen)
        launch(state, bounds, pages, flags, lane, torch.zeros_like(lane), len(lanes), ids)
    else:
        _begin_ref(state, bounds, lane, ids)
