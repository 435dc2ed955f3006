"""Multi-block editing (DecodeParams.edit_window): blocks that have ended are revised in the light of later ones.

When block b of a row has ended by its own rules, w = min(edit_window, b - first generated block). Where w is not 0 a
*window pass* follows before anything else is done with the row: one forward of blocks b-w .. b, the window, in which
each of its positions sees the blocks before the window and all of the window; then one T2T step at all its positions at
once, by the row's own rule. Every block that ends has one pass, the last one, too. Where block f is the first that is
edited, K/V from f on are not final any more, and are made again with the next block; else they stay as they are: those
of the window's forward go to scratch pages.

What ends a row is judged after the pass. Draws of block b's pass have the step FIRST_STEP + b, which no other draw has.

Shapes: L block_length, N window blocks of all rows, T forwarded tokens, M positions with logits, V vocab.
"""

from itertools import chain
from typing import NamedTuple

import torch

from ..kernels.attention import BlockBatch, pinned
from ..kernels.refine import GENERATED, TAIL, BlockState, RefineOutput, SpecialIds, refine_step
from ..kernels.top_logprobs import top_logprobs
from .rules import Rule, batch_params

FIRST_STEP = 1 << 20  # blocks take fewer steps


class Window(NamedTuple):
    """One row's window pass, ints alone.

    pages: of the blocks 0 .. block, scratch ones in the window.
    limit: of its row, as of kernels.attention.Span.
    first: the first block that is forwarded: those in front of the window whose K/V are not final are, too.
    begin, block: the window's first block and its last one.
    tokens: of the blocks first .. block.
    kinds: of the window's positions (kernels.roles).
    rule, seed: of the row.
    top: how many of the likeliest ids it wants for each token, 0 = none.
    """

    pages: tuple[int, ...]
    limit: int
    first: int
    begin: int
    block: int
    tokens: list[int]
    kinds: list[int]
    rule: Rule
    seed: int
    top: int


def check_size(sequence, most_tokens: int):
    """ValueError for a sequence with windows of more tokens than a forward may have."""
    blocks, length = sequence.edit_window + 1, sequence.block_length
    if sequence.edit_window and blocks * length > most_tokens:
        raise ValueError(
            f"edit_window={sequence.params.edit_window}: expected at most {max(0, most_tokens // length - 1)}, for its "
            f"windows of {blocks} blocks of {length} tokens are more than the {most_tokens} of one forward"
        )


def revise(
    model, cache, windows: list[Window], ids: SpecialIds
) -> tuple[RefineOutput, tuple[torch.Tensor, torch.Tensor] | None]:
    """The window passes of some rows, in one forward.

    model: LLaDA2Model.
    cache: PagedKVCache.
    windows: of each row.
    ids: the model's special ids.
    Returns what the step did to the N window blocks, row by row, and the likeliest ids at their positions as of
    kernels.top_logprobs, None where no row wants them.
    """
    device, length = model.device, cache.block_length
    hidden = _forward(model, cache, windows)
    read, index = _editable(windows, length)
    each = [(window, block) for window in windows for block in range(window.begin, window.block + 1)]
    tokens = [token for window in windows for token in window.tokens[-len(window.kinds) :]]
    starts, steps = [block * length for _, block in each], [FIRST_STEP + window.block for window, _ in each]
    tokens, index, starts, read = sent((tokens, index, starts, read), device, torch.int64)
    kinds, steps = sent(([kind for window in windows for kind in window.kinds], steps), device, torch.int32)
    tokens, index, kinds = (part.view(-1, length) for part in (tokens, index, kinds))
    logits = model.lm_logits(hidden[read])

    state = BlockState.fresh(tokens, kinds.to(torch.int8), starts)
    state.step = steps
    rules, seeds = [window.rule for window, _ in each], [window.seed for window, _ in each]
    params = batch_params(rules, seeds, [()] * len(each), device)
    filters = any(rule.top_k > 0 or rule.top_p < 1 for rule in rules)
    most = max(window.top for window in windows)
    listed = top_logprobs(logits, index, params.flags, ids.mask, most) if most else None
    return refine_step(logits, state, params, ids, index, filters), listed


def sent(lists, device, dtype):
    """A tensor of each of some lists, in one copy for which nobody waits."""
    return pinned([*chain(*lists)], device, dtype).to(device, non_blocking=True).split([*map(len, lists)])


def _forward(model, cache, windows):
    """Hidden states [T, H]."""
    device, length = model.device, cache.block_length
    width = max(len(window.pages) for window in windows)
    row, seen, position, slot = [], [], [], []
    for number, window in enumerate(windows):
        for block in range(window.first, window.block + 1):
            row.append(number)
            seen.append(window.block if block >= window.begin else block)  # the window's see up to its end
            position += range(block * length, (block + 1) * length)
            slot += range(window.pages[block] * length, (window.pages[block] + 1) * length)
    table = [page for window in windows for page in (*window.pages, *[0] * (width - len(window.pages)))]
    limit = [window.limit for window in windows]
    row, seen, table, limit = sent((row, seen, table, limit), device, torch.int32)
    blocks = BlockBatch(row, seen, table.view(-1, width), limit)
    tokens = [token for window in windows for token in window.tokens]
    tokens, position, slot = sent((tokens, position, slot), device, torch.int64)
    return model.forward_blocks(tokens, position, blocks, cache, slots=slot)


def _editable(windows, length):
    """The window's positions that may be edited, as numbers of forwarded tokens [M], and each window position's row of
    their logits, -1 for none [N * L]."""
    read, index, begin = [], [], 0
    for window in windows:
        ahead = begin + (window.begin - window.first) * length
        for at, kind in enumerate(window.kinds):
            editable = kind in (GENERATED, TAIL)
            index.append(len(read) if editable else -1)
            if editable:
                read.append(ahead + at)
        begin += len(window.tokens)
    return read, index
