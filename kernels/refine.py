"""One refinement step of a batch of blocks: everything between the logits and the next block.

    candidates  c, p per position                                       (candidates.py)
    commit M2T  masked positions with p > threshold, or with ENTROPY those whose entropies add up to no more than a
                bound, if at least q of them, else the q most confident, or least entropies (ties: lowest position);
                q = max(L // steps + (min(t, steps-1) < L % steps), min_transfer)
    edit T2T    non-prompt positions holding a token, c != x and p > edit_threshold
    block end   the step that fills the last mask; with editing, the first mask-free step that edits nothing or the
                max_post_steps-th mask-free step; never after more than max_steps
    EOS         a row is finished as soon as a generated position holds an EOS with no mask before it

A GUIDED row's step ends with its candidates: they are in the report, and the host that knows what the row may hold
decides and writes before the next one. So does that of a row that SPECULATES, unless its commits fill the block or
an EOS ends it.

Each row has its own block, parameters and counters and is computed by itself. Frozen rows (state.frozen != 0) change
nothing. Shapes: R rows, L block_length, V vocab. Source: the LLaDA2.0/2.1 model cards' generate; diffusers'
BlockRefinementScheduler; where they differ the flags of RefineParams say which rule holds.

On a GPU: the launch or two of candidates.py that read the logits, and one that does all the rest, one program per row
(commit.py). Nothing is read back; a step can be captured in a CUDA graph.
"""

from dataclasses import fields

import torch

from ._ambient import run_kernel
from ._triton import register_op, use_triton
from .candidates import TILE_V, SampleParams, block_candidates_ref, entropies_ref, launch_parts, row_layout
from .commit import _commit_kernel, commit_ref
from .levenshtein import MAX_POST_STEPS, Moves  # noqa: F401  for callers
from .roles import (  # noqa: F401  some for callers, beside the others
    BAN_EDITS,
    BAN_MASK,
    EDITING,
    ENTROPY,
    FILL_PROMPT,
    GENERATED,
    GUIDED,
    ID_ARGUMENTS,
    LEVENSHTEIN,
    MAX_CLASSES,
    OWN_SOFTMAX,
    PADDING,
    PROMPT,
    SPECULATES,
    TAIL,
    WORDS,
    Allowed,
    SpecialIds,
    needed_ref,
)
from .state import (  # noqa: F401  likewise
    BLOCK_DONE,
    CHANGED,
    COMMITS,
    EDITS,
    EOS_AT,
    EOS_CLEAN,
    EOS_COMMIT,
    EOS_END,
    EOS_HOLDS,
    EOS_STEP,
    ERROR,
    FINISHED,
    FLAGS,
    MASKS_BEFORE,
    MASKS_LEFT,
    NUM_STATUS,
    POST_STEPS,
    PRIOR_EOS,
    PRIOR_MASK,
    STEP,
    BlockState,
    ParamTensors,
    RefineOutput,
    RefineParams,
    StateTensors,
    report_width,
)


def needed_positions(state: BlockState, params: RefineParams, ids: SpecialIds) -> torch.Tensor:
    """bool [R, L]: the positions whose logits a step reads (masked; editable where editing). False on frozen rows."""
    return needed_ref(state.tokens, state.kind, state.frozen, params.flags, ids.mask)


def refine_step_ref(
    logits: torch.Tensor,
    state: BlockState,
    params: RefineParams,
    ids: SpecialIds,
    index: torch.Tensor | None = None,
    only_needed: bool = False,
    tile_v: int = TILE_V,
    allowed: Allowed | None = None,
    moves: Moves | None = None,
) -> RefineOutput:
    """One step in PyTorch; see refine_step. tile_v: ids that a draw takes together, smaller in tests alone."""
    sampling = SampleParams(params.temperature, params.top_k, params.top_p, params.seed)
    wanted = needed_positions(state, params, ids) if only_needed else None
    token, confidence = block_candidates_ref(
        logits, state.block_start, state.step, sampling, ids, params.flags, index, wanted, tile_v, allowed=allowed
    )  # fmt: skip
    entropy = None
    if bool((params.flags & ENTROPY).any()):  # sync: the reference alone
        entropy = entropies_ref(logits, index, wanted, allowed, params.flags)
    return commit_ref(token, confidence, state, params, ids, moves=moves, logits=logits, index=index, entropy=entropy)


def launch(
    logits: torch.Tensor,
    state: BlockState,
    params: RefineParams,
    ids: SpecialIds,
    index: torch.Tensor | None,
    filters: bool,
    only_needed: bool,
    tile_v: int = TILE_V,
    allowed: Allowed | None = None,
    moves: Moves | None = None,
) -> RefineOutput:
    """refine_step's launches. Raises ValueError where a tensor of state, params, allowed, moves or index is not
    contiguous."""
    rows, length = state.tokens.shape
    output = _empty(state.tokens, moves is not None)
    if rows * length == 0:
        return output
    tables = {name: part for table in (allowed, moves) if table is not None for name, part in table._asdict().items()}
    for name, tensor in (vars(state) | vars(params) | {"index": index} | tables).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    sampling = (params.temperature, params.top_k, params.top_p, params.seed)
    roles = (state.tokens, state.kind, state.frozen) if only_needed else None
    parts, part_ids, tiles = launch_parts(
        logits, index, roles, params.flags, state.block_start, state.step, sampling, ids, filters, tile_v=tile_v,
        allowed=allowed,
    )  # fmt: skip
    columns, num_warps = row_layout(length)
    if moves is not None and columns == 16:
        num_warps = 4  # with more ptxas gives a thread fewer registers than it needs, and spills
    run_kernel(
        _commit_kernel, (rows,),
        None if moves is None else logits, index, parts, part_ids, StateTensors(**vars(state)),
        ParamTensors(**vars(params)), output, moves, ids, tiles, logits.shape[-1],
        logits.stride(0), logits.stride(1) if index is None else 0, logits.stride(-1),
        L=length, TILES=parts.shape[2], COLUMNS=columns, ONLY_NEEDED=only_needed, NUM_EOS=params.eos_ids.shape[1],
        STEPS=0 if moves is None else moves.seen.shape[1], ANY_GUIDED=allowed is not None,
        num_warps=num_warps,
    )  # fmt: skip
    return output


def _empty(tokens, moves):
    rows, length = tokens.shape
    new = tokens.new_empty
    return RefineOutput(
        new((rows, report_width(length, moves)), dtype=torch.int32),
        new((rows, length)), new((rows, length), dtype=torch.float32),
        new((rows, length), dtype=torch.bool), new((rows, length), dtype=torch.bool),
    )  # fmt: skip


def _dispatch(logits, *arguments):
    state = BlockState(*arguments[:_NUM_STATE])
    params = RefineParams(*arguments[_NUM_STATE:_NUM_TENSORS])
    index, classes, bits, original, seen, written, filters, only_needed, *ids = arguments[_NUM_TENSORS:]
    ids, allowed = SpecialIds(*ids), None if classes is None else Allowed(classes, bits)
    moves = None if original is None else Moves(original, seen, written)
    if use_triton(logits):
        return tuple(launch(logits, state, params, ids, index, filters, only_needed, allowed=allowed, moves=moves))
    return tuple(refine_step_ref(logits, state, params, ids, index, only_needed, allowed=allowed, moves=moves))


_ALIAS = {  # what a step writes, in the notation of torch.library
    "tokens": "(a!)", "step": "(b!)", "post_steps": "(c!)", "frozen": "(d!)", "commit_step": "(e!)",
    "commit_confidence": "(f!)", "changed": "(g!)",
}  # fmt: skip
_NUM_STATE = len(fields(BlockState))
_NUM_TENSORS = _NUM_STATE + len(fields(RefineParams))
_op = register_op(
    "refine_step(Tensor logits, "
    + ", ".join(f"Tensor{_ALIAS.get(f.name, '')} {f.name}" for f in (*fields(BlockState), *fields(RefineParams)))
    + ", Tensor? index, Tensor? classes, Tensor? bits, Tensor(h!)? original, Tensor(i!)? seen, Tensor(j!)? written"
    + f", bool filters, bool only_needed, {ID_ARGUMENTS})"
    + " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    lambda logits, tokens, *arguments: tuple(_empty(tokens, arguments[_NUM_TENSORS + 2] is not None)),
)


def _values(of):
    """The fields of a dataclass, in order; torch.compile of PyTorch 2.11 cannot trace vars()."""
    return [getattr(of, field.name) for field in fields(of)]


def refine_step(
    logits: torch.Tensor,
    state: BlockState,
    params: RefineParams,
    ids: SpecialIds,
    index: torch.Tensor | None = None,
    filters: bool = True,
    only_needed: bool = False,
    allowed: Allowed | None = None,
    moves: Moves | None = None,
) -> RefineOutput:
    """One refinement step of R rows; updates `state` and `moves` in place.

    logits: [R, L, V] for all positions, or [M, V] for some; of any float type
    state: the rows' blocks
    params: the rows' rules
    ids: the model's special ids
    index: int64 [R, L], each position's row of logits [M, V], -1 for none; needed_positions says which must be there
    filters: False promises that no row has top_k or top_p, which saves a launch on a GPU
    only_needed: leave out the positions that the step does not need, whatever logits there are
    allowed: what GUIDED rows may choose from, rows that are not never read it; None promises that no row is GUIDED
    moves: what LEVENSHTEIN rows remember, others' is left undefined; None promises that no row is LEVENSHTEIN

    Returns what was done. A row whose needed logits hold NaN or +inf, or -inf alone where they are allowed, gets the
    ERROR bit, is frozen and keeps its block. Raises ValueError on shapes that do not fit, and on ids of another type.
    """
    if not isinstance(ids, SpecialIds):
        raise ValueError(f"ids: expected SpecialIds(mask, ...), got {ids!r}")
    rows, length = state.tokens.shape
    if index is None and logits.shape[:2] != (rows, length):
        raise ValueError(f"logits: expected [{rows}, {length}, V] without an index, got {tuple(logits.shape)}")
    if index is not None and (logits.ndim != 2 or index.shape != (rows, length)):
        raise ValueError(f"logits, index: expected [M, V], [{rows}, {length}], got {tuple(logits.shape)}, "
                         f"{tuple(index.shape)}")  # fmt: skip
    if allowed is not None:
        shapes = Allowed((rows, logits.shape[-1]), (rows, length, WORDS))
        _check_table("allowed", allowed, shapes, (torch.int16, torch.int32))
    if moves is not None:
        steps = moves.seen.shape[1] if moves.seen.ndim == 3 else 0
        shapes = Moves((rows, length), *[(rows, steps, length)] * 2)
        _check_table("moves", moves, shapes, (torch.int8, torch.int32, torch.int32))
    tensors = (logits, *_values(state), *_values(params), index, *(allowed or (None,) * 2), *(moves or (None,) * 3))
    return RefineOutput(*_op(*tensors, filters, only_needed, *ids))


def _check_table(name, table, shapes, dtypes):
    """ValueError unless the tensors of a NamedTuple have these shapes and types."""
    for field, tensor, shape, dtype in zip(table._fields, table, shapes, dtypes, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}.{field}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
