"""The decoder's lanes: what the device knows of the row in each of them, and what happens to it.

    open      a row's first block is laid out: the end of its prompt, then masks, then what lies behind its text
    step      one refinement step of the blocks that are not frozen
    advance   rows whose block has ended begin their next one
    judge     where somebody has rewritten a block after a step, what is over is decided again

All tensors stay at their addresses, so that a CUDA graph may hold them. Shapes: S lanes, L block_length, P pages of a
row. vLLM's adapter, the engine and generate() all have one.
"""

from contextlib import contextmanager

import numpy as np
import torch

from ..kernels import refine
from ..kernels._ambient import lasting
from ..kernels.advance import RowBounds, advance, begin_next
from ..kernels.attention import pinned
from ..kernels.commit import judge_ref
from ..kernels.refine import (
    WORDS,
    Allowed,
    BlockState,
    Moves,
    RefineOutput,
    RefineParams,
    SpecialIds,
    needed_positions,
    refine_step,
)
from ..kernels.roles import block_kinds, block_tokens
from ..kernels.top_logprobs import top_logprobs
from .rules import REAL, WHOLE, Rule

HELD = 16  # of BlockState.frozen, beside its own bits


class Lanes:
    """S lanes, all closed.

    count: S.
    block_length: L.
    ids: SpecialIds, those that mean something to the rules.
    device: of all tensors.
    max_eos: EOS ids that a row may have.
    pages: P, 0 where no table of pages is needed.
    """

    @lasting
    def __init__(self, count: int, block_length: int, ids: SpecialIds, device="cpu", max_eos: int = 1, pages: int = 0):
        self.count, self.block_length, self.ids = count, block_length, ids
        self.device = torch.device(device)
        self.state = BlockState.fresh(
            self._new((count, block_length), ids.mask, torch.int64), self._new((count, block_length), 0, torch.int8),
            self._new(count, 0, torch.int64),
        )  # fmt: skip
        self._open: set[int] = set()
        self._given: set[int] = set()  # lanes for which `give` has left something
        self.close_all()
        # a row's numbers are entered by the column, which is one copy
        self._whole = self._new((len(WHOLE), count), 0, torch.int32)
        self._real = self._new((len(REAL), count), 0, torch.float32)
        self._bounds = self._new((2, count), 0, torch.int32)
        self.params = RefineParams(
            **dict(zip(WHOLE, self._whole.unbind(), strict=True)),
            **dict(zip(REAL, self._real.unbind(), strict=True)),
            seed=self._new(count, 0, torch.int64),
            eos_ids=self._new((count, max_eos), -1, torch.int64),
        )
        self.bounds = RowBounds(*self._bounds.unbind(), self._new((count, 2, block_length), ids.mask, torch.int64))
        self.page_table = self._new((count, pages), 0, torch.int32)
        self._allowed: Allowed | None = None  # from the first lane on that is guided
        self._moves = Moves.fresh(count, block_length, self.device) if ids.edits else None
        self._leading = {}  # views of the first n lanes, as they are asked for

    def _new(self, shape, value, dtype):
        return torch.full((shape,) if isinstance(shape, int) else shape, value, dtype=dtype, device=self.device)

    @property
    def mask_id(self) -> int:
        return self.ids.mask

    @property
    def changing(self) -> list[torch.Tensor]:
        """All that a step changes."""
        return [*vars(self.state).values(), *(self._moves or ())]

    @property
    def max_eos(self) -> int:
        return self.params.eos_ids.shape[1]

    @property
    def in_use(self) -> int:
        """A power of two, or all: the open lanes are among the first so many, and nothing happens to the others."""
        return min(self.count, 1 << max(self._open, default=0).bit_length())

    @lasting
    def leading(self, count: int) -> tuple[BlockState, RefineParams]:
        """State and parameters of the first lanes, views."""
        if count == self.count:
            return self.state, self.params
        if count not in self._leading:
            whole = (self.state, self.params)
            self._leading[count] = tuple(type(part)(*(x[:count] for x in vars(part).values())) for part in whole)
        return self._leading[count]

    def open(
        self, lane: int, block_start: int, given: list[int | None], total: int, limit: int, rule: Rule, seed: int = 0,
        eos_ids: tuple[int, ...] = (), prior_flags: int = 0, pages: tuple[int, ...] = (),
    ):  # fmt: skip
        """Lay out a row's block.

        lane: which; whatever was in it is forgotten.
        block_start: position of the block's first token.
        given: the ids that the block begins with, of the prompt or given in the answer, None in gaps; at most L.
        total: the row's positions that are prompt or generated; later ones are tail.
        limit: its positions that exist; later ones are padding.
        rule: how its blocks are refined; seed: of its draws; eos_ids: at most max_eos.
        prior_flags: what is known of what comes before the block.
        pages: of the row's K/V from position 0 on, where runners read them here.
        """
        self._open.add(lane)
        kind = block_kinds(given, block_start, self.block_length, total, limit)
        tokens = block_tokens(given, self.block_length, self.mask_id)
        tokens, kind = torch.tensor([tokens, kind], dtype=torch.int64, device="cpu").to(self.device).unbind()
        self.state.reset_block(lane, tokens, kind, block_start, prior_flags)
        unused = [-1] * (self.max_eos - len(eos_ids))
        whole, real = ([getattr(rule, name) for name in names] for names in (WHOLE, REAL))
        for table, column in ((self._whole, whole), (self._real, real), (self._bounds, [total, limit])):
            table[:, lane] = torch.tensor(column, dtype=table.dtype, device="cpu")
        self.params.seed[lane] = seed
        self.params.eos_ids[lane] = torch.tensor([*eos_ids, *unused], dtype=torch.int64, device="cpu")
        if self.page_table.shape[1]:
            self.page_table[lane, : len(pages)].copy_(pinned(pages, self.device), non_blocking=True)
        if lane in self._given:
            self.bounds.given[lane] = self.mask_id
            self._given.remove(lane)

    def give(self, lane: int, block: int, given: list[int | None]):
        """The ids that are given in a later block of a lane's row, as of `open`. Two blocks' are held, of the next one
        and of the one behind it: so many may begin before the host has read that the first did."""
        ids = block_tokens(given, self.block_length, self.mask_id)
        self.bounds.given[lane, block % 2] = torch.tensor(ids, dtype=torch.int64, device="cpu")
        self._given.add(lane)

    @lasting
    def guide(self, lane: int, classes: np.ndarray):
        """A lane's row is guided: its steps propose, within what `allow` allows.

        classes: int16 [V], each id's class.
        """
        if self._allowed is None:
            bits = self._new((self.count, self.block_length, WORDS), 0, torch.int32)
            self._allowed = Allowed(self._new((self.count, len(classes)), 0, torch.int16), bits)
        self._allowed.classes[lane] = self._sent(torch.from_numpy(classes))
        self.params.flags[lane] |= refine.GUIDED

    def allow(self, lanes: list[int], words: np.ndarray):
        """What may stand in the blocks that the next step refines in some guided lanes: int32 [n, L, WORDS]."""
        at = self._sent(torch.tensor(lanes, dtype=torch.int64, device="cpu"))
        self._allowed.bits[at] = self._sent(torch.from_numpy(words))

    def write(self, lanes: list[int], state: BlockState):
        """What the host has decided for some lanes: their blocks after a step, on the CPU."""
        at, length = torch.tensor(lanes, dtype=torch.int64, device="cpu"), self.block_length
        blocks = (state.tokens.int(), state.commit_step, state.commit_confidence.view(torch.int32))
        names = ("step", "post_steps", "frozen", "changed")
        rows = (at.int(), *(getattr(state, name) for name in names))
        sent = self._sent(torch.cat((*blocks, torch.stack(rows, 1)), 1))  # in one copy
        tokens, steps, confidences, rows = sent.split([length, length, length, len(names) + 1], 1)
        at, *rows = rows.unbind(1)
        at = at.long()
        self.state.tokens[at], self.state.commit_step[at] = tokens.long(), steps
        self.state.commit_confidence[at] = confidences.contiguous().view(torch.float32)
        for name, row in zip(names, rows, strict=True):
            getattr(self.state, name)[at] = row

    @contextmanager
    def held(self, lanes: list[int]):
        """Nothing happens to some lanes by what is launched while it lasts."""
        if lanes:
            at = self._sent(torch.tensor(lanes, dtype=torch.int64, device="cpu"))
            self.state.frozen[at] |= HELD
        yield
        if lanes:
            self.state.frozen[at] &= ~HELD

    def end_blocks(self, lanes: list[int], tokens: list[list[int]], changed: list[bool]):
        """The blocks of some lanes have ended, and their rows have not, whatever the last step says.

        tokens: of each block, as somebody has left it.
        changed: its K/V are not final, so that it has to be carried.
        """
        tokens = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        state = BlockState.fresh(tokens, torch.zeros_like(tokens, dtype=torch.int8), tokens.new_zeros(len(lanes)))
        state.frozen.fill_(refine.BLOCK_DONE)
        state.changed = torch.tensor(changed, dtype=torch.int32, device="cpu")
        self.write(lanes, state)

    def _sent(self, tensor):
        """A tensor of the CPU on the lanes' device, without waiting for what runs there."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def close(self, lane: int):
        """Nothing happens to a closed lane."""
        self.state.frozen[lane] = refine.FINISHED
        self._open.discard(lane)

    def close_all(self):
        """Nothing happens to any lane."""
        self.state.frozen.fill_(refine.FINISHED)
        self._open.clear()

    def needed(self) -> torch.Tensor:
        """bool [n, L]: the positions of the lanes in use whose logits a step reads."""
        return needed_positions(*self.leading(self.in_use), self.ids)

    def step(
        self, logits, index=None, filters: bool = True, only_needed: bool = False, guided: bool = False
    ) -> RefineOutput:
        """One refinement step of all lanes, or of the leading ones that `index` has; arguments as of
        kernels.refine.refine_step. guided: some lane is."""
        count = self.count if index is None else len(index)
        state, params = self.leading(count)
        allowed = Allowed(*(part[:count] for part in self._allowed)) if guided else None
        moves = None if self._moves is None else self._moves.leading(count)
        return refine_step(logits, state, params, self.ids, index, filters, only_needed, allowed, moves)

    def top_logprobs(self, logits, index, lanes: torch.Tensor, k: int):
        """The k likeliest ids at the positions of some lanes' blocks, as of kernels.top_logprobs.

        logits: [M, V] of a step.
        index: int64 [n, L], each position's row of them, -1 for none.
        lanes: int64 [n].
        """
        return top_logprobs(logits, index, self.params.flags[lanes], self.mask_id, k)

    def judge(self, lanes: list[int], earlier: list[list[int]], output: RefineOutput) -> list[int]:
        """Decide again what is over in lanes whose tokens somebody has rewritten after a step.

        lanes: which; earlier: for each the generated ids of its blocks before, without masks, as they are now.
        output: what the step did, whose edits and masks count as before.
        Returns the bits BLOCK_DONE and FINISHED of each lane, as they are in state.frozen now.
        """
        rows = torch.tensor(lanes, dtype=torch.int64, device="cpu").to(self.device)
        width = max(map(len, earlier))
        before = [[*ids, *[self.mask_id] * (width - len(ids))] for ids in earlier]
        kind = [[refine.GENERATED] * len(ids) + [refine.PADDING] * (width - len(ids)) for ids in earlier]
        before, kind = torch.tensor([before, kind], dtype=torch.int64, device="cpu").to(self.device).unbind()
        state = self.state.rows(rows)  # as if each row were in one wide block, of which the step has written the end
        state.tokens, state.kind = torch.cat((before, state.tokens), 1), torch.cat((kind.to(torch.int8), state.kind), 1)
        output = RefineOutput(*(part[rows] for part in output))
        commit = torch.cat((torch.zeros_like(before, dtype=torch.bool), output.commit), 1)
        over = judge_ref(commit, output.status, state, self.params.rows(rows), self.ids)
        self.state.frozen[rows] = over
        return over.tolist()  # sync: after a callback, which has read the step

    def begin_next(self, lanes: list[int]):
        """Begin the next blocks of lanes whose block has ended; what has to be carried is somebody else's to see to."""
        if lanes:
            begin_next(self.state, self.bounds, lanes, self.ids)

    def advance(self, lanes: torch.Tensor, repeat: torch.Tensor, carried: int):
        """Begin the next blocks of some lanes; arguments and what it returns as of kernels.advance.advance."""
        return advance(self.state, self.bounds, self.page_table, self.params.flags, lanes, repeat, carried, self.ids)
