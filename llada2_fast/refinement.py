"""The refinement step as a library, for engines with a model, a cache and a scheduler of their own. These names, their
shapes and meanings are stable.

    state = BlockState.fresh(tokens, kind, start)     # one block per row: int64 [R, L], int8 [R, L], int64 [R]
    params = refine_params([DecodeParams(threshold=0.7)] * R, L, seeds, eos_ids)
    output = refine_step(logits, state, params, SpecialIds(mask_id))    # logits [R, L, V]; edits state.tokens in place
    flags = output.status[:, FLAGS]                         # BLOCK_DONE | FINISHED | ERROR | CHANGED

Two launches on a GPU (three with top-k or top-p), no host sync, nothing allocated by data: it can be captured in a CUDA
graph. A row whose block is done, finished or in error is frozen until state.reset_block() lays its next block out. A
block's keys and values are final once a forward has seen it after a step without CHANGED. README has a whole loop.
"""

import torch

from .config import DecodeParams
from .decoding.decoder import row_rules
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
    "BLOCK_DONE", "CHANGED", "COMMITS", "EDITS", "EOS_AT", "ERROR", "FINISHED", "FLAGS", "GENERATED", "MASKS_BEFORE",
    "MASKS_LEFT", "PADDING", "POST_STEPS", "PROMPT", "STEP", "TAIL", "VALID", "BlockState", "RefineOutput",
    "RefineParams", "SpecialIds", "needed_positions", "refine_params", "refine_step",
]  # fmt: skip

VALID = GENERATED  # its older name

_DTYPES = {"temperature": torch.float32, "top_p": torch.float32, "threshold": torch.float32,
           "edit_threshold": torch.float32}  # fmt: skip


def refine_params(params, block_length, seeds, eos_ids, device="cpu"):
    """RefineParams of R rows.

    params: a DecodeParams per row (sampling, thresholds, steps, profile, eos_early_stop; lengths and ids in it are not
    read); seeds: an int64 per row, read where tokens are drawn; eos_ids: a list of ids per row, which may be empty.
    Raises ValueError where the three differ in length.
    """
    if not len(params) == len(seeds) == len(eos_ids):
        raise ValueError(f"seeds, eos_ids: expected {len(params)} each, as of params, got {len(seeds)}, {len(eos_ids)}")
    for one in params:
        if not isinstance(one, DecodeParams):
            raise ValueError(f"params: expected DecodeParams, got {type(one).__name__}")
    rules = [row_rules(one, block_length) for one in params]
    width = max([1, *map(len, eos_ids)])
    columns = {
        name: torch.tensor([rule[name] for rule in rules], dtype=_DTYPES.get(name, torch.int32), device=device)
        for name in row_rules(DecodeParams(), block_length)
    }
    padded = [[*ids, *[-1] * (width - len(ids))] for ids in eos_ids]
    return RefineParams(
        **columns,
        seed=torch.tensor(seeds, dtype=torch.int64, device=device),
        eos_ids=torch.tensor(padded, dtype=torch.int64, device=device).view(len(padded), width),
    )
