"""The refinement step as a library, for engines with a model, a cache and a scheduler of their own. These names, their
shapes and meanings are stable.

    state = BlockState.fresh(tokens, kind, block_start)  # one block per row: int64 [R, L], int8 [R, L], int64 [R]
    params = refine_params([DecodeParams(threshold=0.7)] * R, L, seeds, eos_ids)
    output = refine_step(logits, state, params, SpecialIds(mask_id))  # logits [R, L, V]; edits state.tokens in place
    flags = output.status[:, FLAGS]                      # BLOCK_DONE | FINISHED | ERROR | CHANGED

Two launches on a GPU (three with top-k or top-p), no host sync, nothing allocated by data: it can be captured in a CUDA
graph. A row whose block is done, finished or in error is frozen until state.reset_block() lays its next block out. A
block's keys and values are final once a forward has seen it after a step without CHANGED. README has a whole loop.

    lanes = Lanes(R, L, SpecialIds(mask_id), device)  # the same as lanes: open, step, advance, close
"""

from .decoding.lanes import Lanes
from .decoding.rules import refine_params, row_rule
from .kernels.refine import (
    BLOCK_DONE,
    CHANGED,
    COMMITS,
    EDITS,
    EOS_AT,
    ERROR,
    FINISHED,
    FLAGS,
    MASKS_BEFORE,
    MASKS_LEFT,
    POST_STEPS,
    STEP,
    BlockState,
    RefineOutput,
    RefineParams,
    SpecialIds,
    needed_positions,
    refine_step,
)
from .kernels.roles import GENERATED, PADDING, PROMPT, TAIL

__all__ = [
    "BLOCK_DONE", "CHANGED", "COMMITS", "EDITS", "EOS_AT", "ERROR", "FINISHED", "FLAGS", "GENERATED", "Lanes",
    "MASKS_BEFORE", "MASKS_LEFT", "PADDING", "POST_STEPS", "PROMPT", "STEP", "TAIL", "VALID", "BlockState",
    "RefineOutput", "RefineParams", "SpecialIds", "needed_positions", "refine_params", "refine_step", "row_rule",
]  # fmt: skip

VALID = GENERATED  # its older name
