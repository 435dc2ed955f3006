"""Self-speculation (DecodeParams.policy self_speculative): the model with block size 1 checks what it has drafted.

A step of such a row drafts: every mask has a candidate, and if the policy entropy would commit them all, or as many as
end the answer with an EOS, it does. If not, none is written, and a *check* follows before anything else is done with
the row: one forward of 2 L positions, the block as drafted, each position seeing what is before it, and as many masks
at the same positions, each seeing the draft before it and itself. A mask's likeliest token is what the model with block
size 1 would write after that. Such tokens are committed from the block's first mask on as long as they are the draft's,
and so is the first that is not: at least one, and each the one that block size 1 writes behind those before it.

A draft and its check are two steps of the block and two denoise forwards. K/V of the check go to scratch pages.

Source: S2D2 (arXiv 2603.25702), in a greedy form that draws nothing. Shapes: L block_length, N checks, M positions with
logits, V vocab.
"""

from typing import NamedTuple

import torch

from ..config import CHECK_PAGES
from ..kernels.attention import CLEAN, MASKED, BlockBatch
from ..kernels.refine import ENTROPY, SPECULATES, BlockState, RefineOutput, SpecialIds, refine_step
from ..kernels.top_logprobs import top_logprobs
from .rules import Rule, batch_params
from .window import sent


class Check(NamedTuple):
    """The check of one row's draft, ints alone.

    pages: of the blocks before it, then the scratch ones.
    limit: of its row, as of kernels.attention.Span.
    block: its number.
    tokens: of its positions, -1 at masks; draft: the same with the candidates there.
    kinds: of its positions (kernels.roles).
    rule: of the row.
    top: how many of the likeliest ids the row wants for each token, 0 = none.
    """

    pages: tuple[int, ...]
    limit: int
    block: int
    tokens: list[int]
    draft: list[int]
    kinds: list[int]
    rule: Rule
    top: int


def everything(rule: Rule) -> Rule:
    """The rule that commits all masks, of a row that speculates."""
    return rule._replace(flags=rule.flags & ~(ENTROPY | SPECULATES), threshold=-1.0)


def check(
    model, cache, checks: list[Check], ids: SpecialIds
) -> tuple[RefineOutput, tuple[torch.Tensor, torch.Tensor] | None]:
    """The checks of N rows, in one forward.

    model: LLaDA2Model.
    cache: PagedKVCache.
    checks: of each row.
    ids: the model's special ids.
    Returns the blocks with all masks written as the model with block size 1 would, each after the draft before it, and
    the likeliest ids at their positions as of kernels.top_logprobs, None where no row wants them.
    """
    device, length = model.device, cache.block_length
    hidden = _forward(model, cache, checks, ids.mask)
    read, index = [], []
    for number, one in enumerate(checks):
        begin = (2 * number + 1) * length  # of its masks among the forwarded tokens
        for at, token in enumerate(one.tokens):
            index.append(len(read) if token < 0 else -1)
            if token < 0:
                read.append(begin + at)
    tokens = [ids.mask if token < 0 else token for one in checks for token in one.tokens]
    starts = [one.block * length for one in checks]
    tokens, index, starts, read = sent((tokens, index, starts, read), device, torch.int64)
    (kinds,) = sent(([kind for one in checks for kind in one.kinds],), device, torch.int32)
    tokens, index, kinds = (part.view(-1, length) for part in (tokens, index, kinds))
    logits = model.lm_logits(hidden[read])

    rules = [everything(one.rule) for one in checks]
    params = batch_params(rules, [0] * len(checks), [()] * len(checks), device)
    most = max(one.top for one in checks)
    listed = top_logprobs(logits, index, params.flags, ids.mask, most) if most else None
    state = BlockState.fresh(tokens, kinds.to(torch.int8), starts)
    return refine_step(logits, state, params, ids, index, filters=False), listed


def _forward(model, cache, checks, mask_id):
    """Hidden states [N * 2 L, H]: of each draft and of the masks behind it."""
    device, length = model.device, cache.block_length
    width = max(len(one.pages) for one in checks)
    row, block, order, position, slot, tokens = [], [], [], [], [], []
    for number, one in enumerate(checks):
        row += [number] * CHECK_PAGES
        block += [one.block, one.block + 1]
        order += [CLEAN, MASKED]
        position += [*range(one.block * length, (one.block + 1) * length)] * CHECK_PAGES
        slot += [page * length + at for page in one.pages[-CHECK_PAGES:] for at in range(length)]
        tokens += [*one.draft, *[mask_id] * length]
    table = [page for one in checks for page in (*one.pages, *[0] * (width - len(one.pages)))]
    limit = [one.limit + length for one in checks]  # the masks' page, too
    row, block, order, table, limit = sent((row, block, order, table, limit), device, torch.int32)
    tokens, position, slot = sent((tokens, position, slot), device, torch.int64)
    blocks = BlockBatch(row, block, table.view(-1, width), limit, order)
    return model.forward_blocks(tokens, position, blocks, cache, slots=slot)
