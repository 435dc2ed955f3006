"""Rows whose block has ended beginning their next one: S rows, half of which go on, half of those carried along.

What is timed is the step in which no block has ended, most of them: the others change the state they are timed on. The
peer is the same rule on the host, row by row.
"""

from functools import partial

import torch

from llada2_fast.kernels import advance
from llada2_fast.kernels.refine import BLOCK_DONE, PRIOR_MASK, BlockState
from llada2_fast.kernels.roles import GENERATED, PADDING, PROMPT, TAIL, SpecialIds

from ..roofline import BLOCK
from .cases import Case, agree

MASK = 1000


def plain(state, bounds, slot, repeat, carried, ids):
    device, length = slot.device, state.tokens.shape[1]
    active, riding = [], []
    for row in slot.tolist():
        start, total = int(state.block_start[row]), int(bounds.total[row])
        ready = int(state.frozen[row]) == BLOCK_DONE and start + length < total
        changed = bool(bounds.changed[row])
        if ready and (not changed or len(riding) < carried):
            if changed:
                riding.append((row, start // length, state.tokens[row].clone()))
            masked = ((state.tokens[row] == ids.mask) & (state.kind[row] != PROMPT)).any()
            start += length
            position = torch.arange(start, start + length, device=device)
            kind = torch.where(position < bounds.limit[row], TAIL, PADDING).masked_fill_(position < total, GENERATED)
            prior_flags = state.prior_flags[row] | masked.int() * PRIOR_MASK
            state.reset_block(row, torch.full_like(position, ids.mask), kind.to(state.kind.dtype), start, prior_flags)
        active.append((row, start // length, state.tokens[row]))
    rows, index, laid = zip(*active, *riding, *active[:1] * (carried - len(riding)), strict=True)
    return *(torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, index)), torch.stack(laid)


def case_of(machine, rows):
    each = partial(torch.arange, device=machine.device, dtype=torch.int32)
    carried = rows // 4

    def make(ended=False):
        tokens = torch.randint(MASK + 1, (rows, BLOCK), device=machine.device)
        start = each(rows).long() * BLOCK
        state = BlockState.fresh(tokens, torch.full_like(tokens, GENERATED, dtype=torch.int8), start)
        if ended:
            state.frozen[::2] = BLOCK_DONE
        total = start.int() + 2 * BLOCK - 5
        bounds = advance.RowBounds(total, total + 3, (each(rows) // 2 % 2).contiguous())
        return state, bounds, each(rows), torch.zeros_like(total), carried, SpecialIds(MASK)

    def check():
        first = make(ended=True)
        twin = BlockState(*(x.clone() for x in vars(first[0]).values()))
        got, wanted = advance.advance(*first), plain(twin, *first[1:])
        agree("advance", (*got, *vars(first[0]).values()), (*wanted, *vars(twin).values()))

    state = make()[0]
    size = 2 * state.tokens.nbytes + state.kind.nbytes
    buffers = machine.rotated(make, size)
    return Case(advance.advance, plain, "row by row, on the host", buffers, size, check=check, graph=False)


CASES = {f"rows {rows}": (rows,) for rows in (8, 128)}


def test_advance(timed):
    timed()
