"""The active block of every request of vLLM's model runner, and the step that refines them.

Nothing here knows vLLM. A request's number in the runner is its lane here. Its block begins on the request's own grid,
so its first tokens may be the end of the prompt. A block is handed out once a forward has seen its final tokens: that
forward wrote its keys and values.
"""

from dataclasses import replace

import numpy as np
import torch

from ...config import DecodeParams
from ...decoding.lanes import Lanes
from ...decoding.rules import NEVER, row_rule
from ...kernels.refine import BLOCK_DONE, CHANGED, ERROR, FINISHED, FLAGS, SpecialIds, refine_step
from ...kernels.roles import GENERATED, PROMPT

MAX_EOS = 8  # EOS ids that end a block early; vLLM stops at any others once the block is handed out
_ENDED = BLOCK_DONE | FINISHED | ERROR


class Blocks:
    """One block in each lane; a closed lane takes no part.

    count: S lanes.
    length: L, positions of a block.
    mask_id: the id of what is still to be written.
    device: of all tensors.

    lanes: the Lanes. width: numpy int64 [S], the leading positions of a lane's blocks that exist (L but at the end of
    the context).
    """

    def __init__(self, count: int, length: int, mask_id: int, device: torch.device):
        self.length = length
        self.lanes = Lanes(count, length, SpecialIds(mask_id), device, MAX_EOS)
        self.width = np.full(count, length)
        self.filters = np.zeros(count, dtype=bool)  # draws with top-k or top-p
        self._all = torch.arange(count, dtype=torch.int32, device=device)
        self._no_repeat = torch.zeros_like(self._all)

    def open(
        self, lane: int, prompt: list[int], start: int, width: int, params: DecodeParams, seed: int, eos_ids: list[int]
    ):
        """Lay out a lane's first block.

        lane: which; whatever was in it is forgotten.
        prompt: the ids it begins with, fewer than L; masks follow.
        start: position of its first token.
        width: its positions that exist; nothing follows a block of fewer than L.
        params, seed: how it is refined.
        eos_ids: the first MAX_EOS of them are looked for.
        """
        rule = row_rule(params, self.length)
        end = NEVER if width == self.length else start + width
        self.lanes.open(lane, start, list(prompt), end, end, rule, seed, tuple(eos_ids[:MAX_EOS]))
        self.width[lane] = width
        self.filters[lane] = params.filters

    def close(self, lane: int):
        """It takes no part any more."""
        self.lanes.close(lane)

    def step(self, logits: torch.Tensor, lanes: np.ndarray, first: np.ndarray):
        """Refine the blocks of some open lanes and hand out those that are settled, without a read-back.

        logits: [M, V].
        lanes: int64 [n], distinct.
        first: int64 [n], the rows of logits of their first positions.
        Returns (sampled int64 [S, L]: the settled blocks' tokens behind the prompt, left-aligned; num_sampled int64
        [S], 0 where nothing is settled; error bool [S]: the logits held NaN or infinity). Settled lanes go on to their
        next block.
        """
        state, device = self.lanes.state, logits.device
        offset = np.arange(self.length)
        rows = np.full(state.tokens.shape, -1)
        rows[lanes] = np.where(offset < self.width[lanes, None], first[:, None] + offset, -1)
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        here = index[:, 0] >= 0
        now = replace(state, frozen=torch.where(here, state.frozen, FINISHED))  # the others may be amid their blocks
        filters = bool(self.filters[lanes].any())
        output = refine_step(logits, now, self.lanes.params, self.lanes.ids, index, filters, only_needed=True)
        flags = output.status[:, FLAGS]
        settled = here & ((flags & _ENDED) != 0) & ((flags & CHANGED) == 0)

        at = (state.kind == PROMPT).sum(-1, keepdim=True) + torch.arange(self.length, device=device)
        sampled = state.tokens.gather(1, at.clamp(max=self.length - 1))
        num_sampled = torch.where(settled, (state.kind == GENERATED).sum(-1), 0)
        # whether EOS ends a request is vLLM's to say: here the next block follows
        frozen = torch.where(here, now.frozen, state.frozen)
        state.frozen.copy_(torch.where(settled, BLOCK_DONE, frozen))
        state.changed.copy_(~settled)
        self.lanes.advance(self._all, self._no_repeat, 0)
        return sampled, num_sampled, here & ((flags & ERROR) != 0)


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
