"""What a refinement step reads and writes of each row: its parameters, its active block's state, what was done.

Shapes: R rows, L block_length, K EOS ids a row.
"""

from collections import namedtuple
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

# RefineParams.flags beside those of roles.py
EOS_STEP = 8  # judge EOS after every step
EOS_END = 16  # judge EOS when the block ends
EOS_COMMIT = 32  # LLaDA2.0 card: judge when this step committed an EOS, prompt and tail included
EOS_HOLDS = 64  # LLaDA2.0 card: a block that ends and holds an EOS at a generated position ends the row
EOS_CLEAN = 128  # LLaDA2.1 card: the same, but only if the generated window holds no mask

# BlockState.prior_flags
PRIOR_MASK, PRIOR_EOS = 1, 2  # an earlier generated block holds a mask; the prompt holds an EOS

# columns of the status tensor, and the bits of its FLAGS
FLAGS, MASKS_LEFT, COMMITS, EDITS, EOS_AT, STEP, POST_STEPS, MASKS_BEFORE = range(8)
NUM_STATUS = 8
BLOCK_DONE, FINISHED, ERROR, CHANGED = 1, 2, 4, 8


def report_width(length, moves=False):
    """Columns of a step's report, see report_ref; moves: with what was chosen."""
    return NUM_STATUS + 1 + (4 if moves else 3) * length


@dataclass
class RefineParams:
    """Per-row parameters, tensors [R] on the device of the logits; eos_ids is [R, number of ids], -1 where unused."""

    temperature: torch.Tensor  # float32, 0 = greedy
    top_k: torch.Tensor  # int32, 0 = off
    top_p: torch.Tensor  # float32, >= 1 = off
    seed: torch.Tensor  # int64
    threshold: torch.Tensor  # float32
    edit_threshold: torch.Tensor  # float32, read where EDITING is set
    steps: torch.Tensor  # int32, the quota spreads L over them
    min_transfer: torch.Tensor  # int32, least quota
    max_steps: torch.Tensor  # int32, the block ends as it is after so many steps
    max_post_steps: torch.Tensor  # int32
    entropy_bound: torch.Tensor  # float32, read where ENTROPY is set, as is the next
    entropy_decay: torch.Tensor  # float32
    flags: torch.Tensor  # int32
    eos_ids: torch.Tensor  # int64 [R, K]

    def rows(self, index: torch.Tensor) -> "RefineParams":
        """The parameters of some rows (index: int64 [n])."""
        return RefineParams(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass
class BlockState:
    """Per-row state of the active block; refine_step updates all but kind, block_start and prior_flags in place."""

    tokens: torch.Tensor  # int64 [R, L]
    kind: torch.Tensor  # int8 [R, L]: GENERATED, PROMPT, TAIL, PADDING
    block_start: torch.Tensor  # int64 [R]: absolute position of the block's first token
    step: torch.Tensor  # int32 [R]: steps done in this block
    post_steps: torch.Tensor  # int32 [R]: mask-free steps done in this block
    frozen: torch.Tensor  # int32 [R]: the row's BLOCK_DONE | FINISHED | ERROR bits; non-zero rows are left alone
    prior_flags: torch.Tensor  # int32 [R]: PRIOR_MASK | PRIOR_EOS
    commit_step: torch.Tensor  # int32 [R, L]: step of the commit or edit that put the token there, -1 before
    commit_confidence: torch.Tensor  # float32 [R, L]: its confidence
    changed: torch.Tensor  # int32 [R]: non-zero: the last step changed the block, whose keys and values are not final

    def rows(self, index: torch.Tensor) -> "BlockState":
        """A copy of some rows (index: int64 [n])."""
        return BlockState(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def fresh(
        cls,
        tokens: torch.Tensor,
        kind: torch.Tensor,
        block_start: torch.Tensor,
        prior_flags: torch.Tensor | None = None,
    ) -> "BlockState":
        """State of blocks nobody has touched yet, of the tensors given and zeros.

        tokens: int64 [R, L]
        kind: int8 [R, L]
        block_start: int64 [R]
        prior_flags: int32 [R], None for no bits
        """
        rows = tokens.shape[0]
        count = torch.zeros(rows, dtype=torch.int32, device=tokens.device)
        return cls(
            tokens, kind, block_start, count.clone(), count.clone(), count.clone(),
            count.clone() if prior_flags is None else prior_flags,
            torch.full_like(tokens, -1, dtype=torch.int32),
            torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device), count.clone(),
        )  # fmt: skip

    def reset_block(
        self,
        rows: int | torch.Tensor,
        tokens: torch.Tensor,
        kind: torch.Tensor,
        block_start: int | torch.Tensor,
        prior_flags: int | torch.Tensor,
    ) -> None:
        """Lay a new block out in some rows.

        rows: int, or int64 [n]
        tokens: int64 [L], or [n, L]
        kind: int8, like tokens
        block_start: int, or int64 [n] or one for all
        prior_flags: int, or int32 [n] or one for all
        """
        self.tokens[rows], self.kind[rows] = tokens, kind
        self.block_start[rows], self.prior_flags[rows] = block_start, prior_flags
        for counter in (self.step, self.post_steps, self.frozen, self.commit_confidence, self.changed):
            counter[rows] = 0
        self.commit_step[rows] = -1


class RefineOutput(NamedTuple):
    """What one step did. The report is the only thing a host ever needs to read."""

    report: torch.Tensor  # int32 [R, 9 + 3 L or 9 + 4 L], see report_ref
    token: torch.Tensor  # int64 [R, L]: candidate, -1 where none was computed
    confidence: torch.Tensor  # float32 [R, L]: its confidence, -inf where none was computed
    commit: torch.Tensor  # bool [R, L]: written by M2T
    edit: torch.Tensor  # bool [R, L]: written by T2T

    @property
    def status(self) -> torch.Tensor:
        """int32 [R, 8], columns FLAGS .. MASKS_BEFORE of the report."""
        return self.report[:, :NUM_STATUS]


def report_ref(status: tuple[torch.Tensor, ...], state: BlockState, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """The report int32 [R, 9 + 3 L] of the columns of a status: these, the number of the block in its row, and after
    the step its tokens, their steps of commit and the bits of their confidences at commit [L each]; of a GUIDED row
    token and confidence of the candidates at masked and editable positions (commit.py). With `chosen` int64 [R, L] also
    this: by position ahead of the step the candidate that was written there, deletions and insertions among them, -1
    for none."""
    block = (state.block_start // state.tokens.shape[1]).int()
    each = [state.tokens.int(), state.commit_step, state.commit_confidence.view(torch.int32)]
    if chosen is not None:
        each.append(chosen.int())
    return torch.cat((torch.stack((*status, block), 1), *each), 1)


# Their tensors by the same names, as kernels take them
StateTensors = namedtuple("StateTensors", [field.name for field in fields(BlockState)])
ParamTensors = namedtuple("ParamTensors", [field.name for field in fields(RefineParams)])
