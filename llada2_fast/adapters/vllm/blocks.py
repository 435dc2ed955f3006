"""The active block of every request slot of vLLM's model runner, and the step that refines them.

Nothing here knows vLLM. A slot's block begins on the request's block grid, so its first `lead` tokens may be the end
of the prompt. A block is handed out once a forward has seen its final tokens: that forward wrote its keys and values.
"""

from dataclasses import replace

import numpy as np
import torch

from ...config import DecodeParams
from ...decoding.decoder import row_rules
from ...refinement import (
    BLOCK_DONE,
    CHANGED,
    ERROR,
    FINISHED,
    FLAGS,
    GENERATED,
    PADDING,
    PROMPT,
    BlockState,
    SpecialIds,
    refine_params,
    refine_step,
)

MAX_EOS = 8  # EOS ids that end a block early; vLLM stops at any others once the block is handed out
_ENDED = BLOCK_DONE | FINISHED | ERROR


class Blocks:
    """One block of L positions for each of S slots, on `device`; a closed slot takes no part.

    width: numpy int64 [S], the leading positions of a slot's blocks that exist (L but at the end of the context).
    """

    def __init__(self, slots, length, mask_id, device):
        self.length, self.mask_id = length, mask_id
        tokens = torch.full((slots, length), mask_id, dtype=torch.int64, device=device)
        start = torch.zeros(slots, dtype=torch.int64, device=device)
        self.state = BlockState.fresh(tokens, torch.zeros_like(tokens, dtype=torch.int8), start)
        self.state.frozen.fill_(FINISHED)
        unused = [[-1] * MAX_EOS] * slots
        self.params = refine_params([DecodeParams()] * slots, length, [0] * slots, unused, device)
        self.lead = torch.zeros_like(start)
        self.count = torch.full_like(start, length)  # positions to hand out: width - lead
        self.width = np.full(slots, length)
        self.filters = np.zeros(slots, dtype=bool)  # draws with top-k or top-p

    def open(self, slot, prompt, start, width, params, seed, eos_ids):
        """Lay out a slot's first block: the ids `prompt` (fewer than L), then masks, of which `width` positions exist.

        start: position of the block's first token; params: DecodeParams; eos_ids: the first MAX_EOS are looked for.
        """
        lead = len(prompt)
        tokens = [*prompt, *[self.mask_id] * (self.length - lead)]
        kind = [PROMPT] * lead + [GENERATED] * (width - lead) + [PADDING] * (self.length - width)
        eos = [*eos_ids[:MAX_EOS], *[-1] * (MAX_EOS - len(eos_ids))]
        device = self.lead.device
        tokens, kind = (torch.tensor(ints, dtype=torch.int64, device=device) for ints in (tokens, kind))
        self.state.reset_block(slot, tokens, kind, start, 0)
        for name, value in (row_rules(params, self.length) | {"seed": seed}).items():
            getattr(self.params, name)[slot] = value
        self.params.eos_ids[slot] = torch.tensor(eos, dtype=torch.int64, device=device)
        self.lead[slot] = lead
        self.count[slot] = width - lead
        self.width[slot] = width
        self.filters[slot] = bool(params.top_k or params.top_p)

    def close(self, slot):
        self.state.frozen[slot] = FINISHED

    def step(self, logits, slots, first):
        """Refine the blocks of some open slots and hand out those that are settled.

        logits [M, V]; slots, first: numpy int64 [n], distinct slots and the rows of logits of their first positions.
        Returns (sampled int64 [S, L]: the settled blocks' tokens behind the prompt, left-aligned; num_sampled int64
        [S], 0 where nothing is settled; error bool [S]: the logits held NaN or infinity). Settled slots go on to their
        next block.
        """
        state, device = self.state, logits.device
        lane = np.arange(self.length)
        rows = np.full(state.tokens.shape, -1)
        rows[slots] = np.where(lane < self.width[slots, None], first[:, None] + lane, -1)
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        here = index[:, 0] >= 0
        frozen = torch.where(here, state.frozen, FINISHED)
        filters = bool(self.filters[slots].any())
        now = replace(state, frozen=frozen)
        output = refine_step(logits, now, self.params, SpecialIds(self.mask_id), index, filters, only_needed=True)
        flags = output.status[:, FLAGS]
        state.frozen.copy_(torch.where(here, frozen, state.frozen))
        settled = here & ((flags & _ENDED) != 0) & ((flags & CHANGED) == 0)

        lane = torch.arange(self.length, device=device)
        sampled = state.tokens.gather(1, (self.lead[:, None] + lane).clamp(max=self.length - 1))
        num_sampled = torch.where(settled, self.count, 0)
        self._next(settled)
        return sampled, num_sampled, here & ((flags & ERROR) != 0)

    def _next(self, settled):
        """Lay out the block behind the settled ones."""
        state = self.state
        state.block_start += settled * self.length
        for target, value in (
            (state.tokens, self.mask_id), (state.kind, GENERATED), (state.commit_step, -1),
            (state.commit_confidence, 0),
        ):  # fmt: skip
            target.masked_fill_(settled[:, None], value)
        for target, value in (
            (state.step, 0), (state.post_steps, 0), (state.frozen, 0), (self.lead, 0), (self.count, self.length),
        ):  # fmt: skip
            target.masked_fill_(settled, value)


def block_segments(starts, lengths, split, length):
    """The queries of a batch as segments that each lie in one block, so that attention without a mask inside a segment,
    to all keys up to its end, is block-causal.

    starts, lengths: numpy int [n], position of each row's first query and number of its queries; split: bool [n], the
    rows to cut at multiples of `length`. Returns numpy int64 (row, queries, behind) per segment: the row it belongs to,
    its queries, and the queries of its row behind it.
    """
    row, queries, behind = [], [], []
    for i, (start, total, cut) in enumerate(zip(starts, lengths, split, strict=True)):
        at, end = int(start), int(start) + int(total)
        while at < end:
            stop = min(end, (at // length + 1) * length) if cut else end
            row.append(i)
            queries.append(stop - at)
            behind.append(end - stop)
            at = stop
    return np.array(row, dtype=np.int64), np.array(queries, dtype=np.int64), np.array(behind, dtype=np.int64)
