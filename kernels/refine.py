"""One refinement step of a batch of blocks: everything between the logits and the next block.

    candidates  c, p per position                                       (candidates.py)
    commit M2T  masked positions with p > threshold if at least q of them, else the q most confident (ties: lowest
                position); q = max(L // steps + (min(t, steps-1) < L % steps), min_transfer)
    edit T2T    non-prompt positions holding a token, c != x and p > edit_threshold
    block end   the step that fills the last mask; with editing, the first mask-free step that edits nothing or the
                max_post_steps-th mask-free step; never after more than max_steps
    EOS         a row is finished as soon as a generated position holds an EOS with no mask before it

Each row has its own block, parameters and counters and is computed by itself. Frozen rows (state.frozen != 0) change
nothing. Shapes: R rows, L block_length, V vocab. Source: the LLaDA2.0/2.1 model cards' generate; diffusers'
BlockRefinementScheduler; where they differ the flags of RefineParams say which rule holds.

On a GPU: the launch or two of candidates.py that read the logits, and one that does all the rest, one program per row
(_commit_kernel). Nothing is read back; a step can be captured in a CUDA graph.
"""

from dataclasses import fields
from functools import reduce
from operator import or_

import torch

from ._ambient import run_kernel
from ._triton import register_op, tl, triton, use_triton
from .candidates import TILE_V, SampleParams, _combine, block_candidates_ref, launch_parts, row_layout
from .roles import (  # noqa: F401  some for callers, beside the others
    BAN_MASK,
    EDITING,
    FILL_PROMPT,
    GENERATED,
    ID_ARGUMENTS,
    OWN_SOFTMAX,
    PADDING,
    PROMPT,
    TAIL,
    SpecialIds,
    _roles,
    roles_ref,
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
    POST_STEPS,
    PRIOR_EOS,
    PRIOR_MASK,
    STEP,
    BlockState,
    ParamTensors,
    RefineOutput,
    RefineParams,
    StateTensors,
)


def needed_positions(state: BlockState, params: RefineParams, ids: SpecialIds) -> torch.Tensor:
    """bool [R, L]: the positions whose logits a step reads (masked; editable where editing). False on frozen rows."""
    masked, editable = roles_ref(state.tokens, state.kind, state.frozen, params.flags, ids.mask)
    return masked | editable


def refine_step_ref(
    logits: torch.Tensor,
    state: BlockState,
    params: RefineParams,
    ids: SpecialIds,
    index: torch.Tensor | None = None,
    only_needed: bool = False,
    tile_v: int = TILE_V,
) -> RefineOutput:
    """One step in PyTorch; see refine_step. tile_v: ids that a draw takes together, smaller in tests alone."""
    sampling = SampleParams(params.temperature, params.top_k, params.top_p, params.seed)
    wanted = needed_positions(state, params, ids) if only_needed else None
    token, confidence = block_candidates_ref(
        logits, state.block_start, state.step, sampling, ids, params.flags, index, wanted, tile_v
    )  # fmt: skip
    return _commit_ref(token, confidence, state, params, ids)


def _commit_ref(token, confidence, state, params, ids):
    """All that follows the candidates, in the order of _commit_kernel; token, confidence [R, L]."""
    asked = reduce(or_, params.flags.tolist(), 0)  # sync: the reference alone; what no row asks for is skipped
    masked, editable = roles_ref(state.tokens, state.kind, state.frozen, params.flags, ids.mask, asked)  # [R, L]
    before = masked.sum(-1, dtype=torch.int32)  # [R, L] -> [R]
    live = state.frozen == 0
    error = None
    if bool(confidence.sum().isnan()):  # sync: the reference alone; there is no +inf
        error = live & (confidence.isnan() & (masked | editable)).any(-1)
        live = live & ~error
        masked, editable = masked & live[:, None], editable & live[:, None]

    commit = _select_ref(masked, confidence, state, params)
    edit = _edit_ref(editable, token, confidence, state.tokens, params, asked)
    written = commit | edit
    torch.where(written, token, state.tokens, out=state.tokens)
    torch.where(written, confidence, state.commit_confidence, out=state.commit_confidence)
    torch.where(written, state.step[:, None], state.commit_step, out=state.commit_step)
    # what moves tokens within the block, as LLaDA2.2's deletions and insertions do, belongs here

    left, edits, done = _block_end_ref(state.tokens, state.kind, live, before, edit, state, params, ids, asked)
    finished, eos_at = _eos_ref(state.tokens, state.kind, live, commit, done, state, params, ids, asked)
    state.frozen |= done * BLOCK_DONE
    state.frozen |= finished * FINISHED
    if error is not None:
        state.frozen |= error * ERROR
    commits = commit.sum(-1, dtype=torch.int32)  # [R, L] -> [R]
    flags = state.frozen | (commits + edits).sign() * CHANGED
    status = (flags, left, commits, edits, eos_at, state.step, state.post_steps, before)
    return RefineOutput(torch.stack(status, 1), token, confidence, commit, edit)


def _select_ref(masked, confidence, state, params):
    """M2T -> commit bool [R, L]: the masked positions above the threshold if they are enough, else the quota's best."""
    length = masked.shape[1]
    steps = params.steps.clamp(min=1)
    late = torch.minimum(state.step, steps - 1)
    quota = torch.maximum(length // steps + (late < length % steps), params.min_transfer)[:, None]  # [R] -> [R, 1]
    high = masked & (confidence > params.threshold[:, None])
    enough = high.sum(-1, keepdim=True) >= quota
    if bool(enough.all()):  # sync: the reference alone
        return high
    ranked = torch.where(masked, confidence.clamp(min=-1), -2.0)  # whatever is masked comes before all else
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(masked).scatter_(1, order, torch.arange(length, device=order.device) < quota)
    return torch.where(enough, high, best & masked)


def _edit_ref(editable, token, confidence, held, params, asked):
    """T2T -> edit bool [R, L]: the editable positions whose candidate is another token and above the threshold."""
    if not asked & EDITING:
        return editable  # none is
    return editable & (token != held) & (confidence > params.edit_threshold[:, None])


def _block_end_ref(tokens, kind, live, before, edit, state, params, ids, asked):
    """How many masks are left and how many tokens were edited, int32 [R], and whether the block has ended, bool [R];
    counts the step in `state`. tokens: those after this step; before: the masks ahead of it."""
    fillable = kind != PROMPT
    if asked & FILL_PROMPT:
        fillable = fillable | ((params.flags & FILL_PROMPT) != 0)[:, None]
    left = ((tokens == ids.mask) & (kind != PADDING) & fillable).sum(-1, dtype=torch.int32)  # [R, L] -> [R]
    edits = edit.sum(-1, dtype=torch.int32)  # [R, L] -> [R]
    mask_free = before == 0
    state.step += live
    state.post_steps += live & mask_free
    ended = left == 0
    if asked & EDITING:
        one_phase = ((params.flags & EDITING) == 0) | (params.max_post_steps == 0)
        settled = mask_free & ((edits == 0) | (state.post_steps >= params.max_post_steps))
        ended = torch.where(one_phase, ended, settled)
    return left, edits, live & (ended | (state.step >= params.max_steps))


def _eos_ref(tokens, kind, live, commit, done, state, params, ids, asked):
    """Whether the row is finished, bool [R], and at which position its answer ends, int32 [R], -1 where that is open.
    tokens: those after this step."""
    present = kind != PADDING
    is_eos = (tokens[:, :, None] == params.eos_ids[:, None, :]).any(-1) & present  # [R, L, K] -> [R, L]
    if not bool(is_eos.any()):  # sync: the reference alone
        return torch.zeros_like(done), torch.full_like(done, -1, dtype=torch.int32)
    length, flags, generated = tokens.shape[1], params.flags, kind != PROMPT
    first_mask = _first((tokens == ids.mask) & generated & present)  # [R, L] -> [R], as is all from here on
    first = _first(is_eos & (kind == GENERATED))
    judged = ((flags & EOS_STEP) != 0) | (((flags & EOS_END) != 0) & done)
    resolved = judged & (first < length) & (first_mask > first)
    finished, eos_at = resolved & live, torch.where(resolved, first, -1)
    if not asked & (EOS_COMMIT | EOS_HOLDS | EOS_CLEAN):
        return finished, eos_at.int()

    # the cards' rules
    prior_clean = (state.prior_flags & PRIOR_MASK) == 0
    first = _first(is_eos)
    is_prompt = ~generated.gather(1, first.clamp(max=length - 1)[:, None])[:, 0]  # [R, L] -> [R]
    in_prompt = ((state.prior_flags & PRIOR_EOS) != 0) | is_prompt
    counts = in_prompt | (prior_clean & (first_mask > first))
    early = ((flags & EOS_COMMIT) != 0) & (is_eos & commit).any(-1) & counts
    clean = ((flags & EOS_CLEAN) != 0) & (first_mask == length) & prior_clean
    ended = done & (is_eos & generated).any(-1) & (((flags & EOS_HOLDS) != 0) | clean)
    return finished | early | ended, torch.where(early & ~resolved, first, eos_at).int()


def _first(mask):
    """[R, L] bool -> [R] int64: index of the first True, L where there is none."""
    return torch.where(mask.any(-1), mask.to(torch.uint8).argmax(-1), mask.shape[1])


_GENERATED, _PROMPT, _PADDING = tl.constexpr(GENERATED), tl.constexpr(PROMPT), tl.constexpr(PADDING)
_FILL_PROMPT, _EDITING = tl.constexpr(FILL_PROMPT), tl.constexpr(EDITING)
_EOS_STEP, _EOS_END, _EOS_COMMIT = tl.constexpr(EOS_STEP), tl.constexpr(EOS_END), tl.constexpr(EOS_COMMIT)
_EOS_HOLDS, _EOS_CLEAN = tl.constexpr(EOS_HOLDS), tl.constexpr(EOS_CLEAN)
_PRIOR_MASK, _PRIOR_EOS = tl.constexpr(PRIOR_MASK), tl.constexpr(PRIOR_EOS)
_BLOCK_DONE, _FINISHED = tl.constexpr(BLOCK_DONE), tl.constexpr(FINISHED)
_ERROR, _CHANGED = tl.constexpr(ERROR), tl.constexpr(CHANGED)


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _first_lane(mask, lane, L: tl.constexpr):
    """Index of the first True of a row's positions, L where there is none."""
    return tl.min(tl.where(mask, lane, L), 0)


@triton.jit
def _select(masked, confidence, STATE, PARAMS, row, lane, L: tl.constexpr):
    """_select_ref of one row's positions."""
    steps = tl.maximum(tl.load(PARAMS.steps + row), 1)
    extra = (tl.minimum(tl.load(STATE.step + row), steps - 1) < L % steps).to(tl.int32)
    quota = tl.maximum(L // steps + extra, tl.load(PARAMS.min_transfer + row))
    high = masked & (confidence > tl.load(PARAMS.threshold + row))
    ranked = tl.where(masked, tl.maximum(confidence, -1.0), -2.0)  # whatever is masked comes before all else
    tied = (ranked[None, :] == ranked[:, None]) & (lane[None, :] < lane[:, None])  # [L] -> [L, L]
    ahead = (ranked[None, :] > ranked[:, None]) | tied
    rank = tl.sum(ahead.to(tl.int32), 1)  # [L, L] -> [L]
    return tl.where(_count(high) >= quota, high, masked & (rank < quota))


@triton.jit
def _edit(editable, token, confidence, held, PARAMS, row):
    """_edit_ref of one row's positions."""
    return editable & (token != held) & (confidence > tl.load(PARAMS.edit_threshold + row))


@triton.jit
def _block_end(tokens, kind, live, before, edit, STATE, PARAMS, ids, row):
    """_block_end_ref of one row, whose counters it returns as well."""
    flags = tl.load(PARAMS.flags + row)
    fillable = (kind != _PROMPT) | ((flags & _FILL_PROMPT) != 0)
    left = _count((tokens == ids.mask) & (kind != _PADDING) & fillable)
    edits = _count(edit)
    mask_free = before == 0
    step = tl.load(STATE.step + row) + live.to(tl.int32)
    post_steps = tl.load(STATE.post_steps + row) + (live & mask_free).to(tl.int32)
    max_post_steps = tl.load(PARAMS.max_post_steps + row)
    one_phase = ((flags & _EDITING) == 0) | (max_post_steps == 0)
    settled = mask_free & ((edits == 0) | (post_steps >= max_post_steps))
    ended = tl.where(one_phase, left == 0, settled)
    return left, edits, step, post_steps, live & (ended | (step >= tl.load(PARAMS.max_steps + row)))


@triton.jit
def _eos(
    tokens, kind, live, commit, done, STATE, PARAMS, ids, row, lane, L: tl.constexpr, NUM_EOS: tl.constexpr
):  # fmt: skip
    """_eos_ref of one row."""
    flags, prior_flags = tl.load(PARAMS.flags + row), tl.load(STATE.prior_flags + row)
    present = kind != _PADDING
    is_eos = lane < 0
    for k in tl.static_range(NUM_EOS):
        is_eos |= tokens == tl.load(PARAMS.eos_ids + row * NUM_EOS + k)
    is_eos &= present
    generated = kind != _PROMPT
    first_mask = _first_lane((tokens == ids.mask) & generated & present, lane, L)
    first = _first_lane(is_eos & (kind == _GENERATED), lane, L)
    judged = ((flags & _EOS_STEP) != 0) | (((flags & _EOS_END) != 0) & done)
    resolved = judged & (first < L) & (first_mask > first)

    # the cards' rules
    prior_clean = (prior_flags & _PRIOR_MASK) == 0
    first_any = _first_lane(is_eos, lane, L)
    in_prompt = ((prior_flags & _PRIOR_EOS) != 0) | (_count((kind == _PROMPT) & (lane == first_any)) > 0)
    counts = in_prompt | (prior_clean & (first_mask > first_any))
    early = ((flags & _EOS_COMMIT) != 0) & (_count(is_eos & commit) > 0) & counts
    holds = done & (_count(is_eos & generated) > 0)
    clean = (first_mask == L) & prior_clean
    ended = holds & (((flags & _EOS_HOLDS) != 0) | (((flags & _EOS_CLEAN) != 0) & clean))
    eos_at = tl.where(resolved, first, tl.where(early, first_any, -1))
    return (resolved | early | ended) & live, eos_at


@triton.jit
def _commit_kernel(
    INDEX, PART, PART_ID,  # see candidates.py
    STATE, PARAMS, OUT,  # BlockState, RefineParams, RefineOutput
    ids, tiles,
    L: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, ONLY_NEEDED: tl.constexpr, NUM_EOS: tl.constexpr,
):  # fmt: skip
    """Grid (R,): one row from its parts to its next block, as _commit_ref; a frozen row only reports."""
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    inside = lane < L
    n = row * L + lane
    held = tl.load(STATE.tokens + n, mask=inside, other=-1)
    kind = tl.load(STATE.kind + n, mask=inside, other=_PADDING)
    frozen = tl.load(STATE.frozen + row)
    flags = tl.load(PARAMS.flags + row)
    old_step = tl.load(STATE.step + row)
    masked, editable = _roles(held, kind, frozen, flags, ids.mask)
    before = _count(masked)
    wanted = inside
    if INDEX is not None:
        wanted &= tl.load(INDEX + n, mask=inside, other=-1) >= 0
    if ONLY_NEEDED:
        wanted &= masked | editable
    token, confidence, _top, _mass, _scale_ = _combine(
        PART, PART_ID, n, wanted, tl.num_programs(0) * L * TILES, tiles, tl.load(PARAMS.temperature + row), flags,
        tl.load(PARAMS.seed + row), tl.load(STATE.block_start + row) + lane, old_step, TILES,
    )  # fmt: skip
    token = token.to(tl.int64)
    confidence = tl.where(wanted, confidence, float("-inf"))
    error = (frozen == 0) & (_count((confidence != confidence) & (masked | editable)) > 0)
    live = (frozen == 0) & (error == 0)

    commit = _select(masked, confidence, STATE, PARAMS, row, lane, L) & live
    edit = _edit(editable, token, confidence, held, PARAMS, row) & live
    written = commit | edit
    new = tl.where(written, token, held)
    # what moves tokens within the block, as LLaDA2.2's deletions and insertions do, belongs here

    left, edits, step, post_steps, done = _block_end(new, kind, live, before, edit, STATE, PARAMS, ids, row)
    finished, eos_at = _eos(new, kind, live, commit, done, STATE, PARAMS, ids, row, lane, L, NUM_EOS)
    now = frozen | done.to(tl.int32) * _BLOCK_DONE | finished.to(tl.int32) * _FINISHED | error.to(tl.int32) * _ERROR

    tl.debug_barrier()  # every thread has read the state
    tl.store(STATE.tokens + n, new, mask=inside & written)
    tl.store(STATE.commit_step + n, tl.zeros([LANES], tl.int32) + old_step, mask=inside & written)
    tl.store(STATE.commit_confidence + n, confidence, mask=inside & written)
    tl.store(STATE.step + row, step)
    tl.store(STATE.post_steps + row, post_steps)
    tl.store(STATE.frozen + row, now)
    tl.store(OUT.token + n, token, mask=inside)
    tl.store(OUT.confidence + n, confidence, mask=inside)
    tl.store(OUT.commit + n, commit, mask=inside)
    tl.store(OUT.edit + n, edit, mask=inside)
    STATUS = OUT.status + row * 8
    tl.store(STATUS + 0, now | (_count(written) > 0).to(tl.int32) * _CHANGED)
    tl.store(STATUS + 1, left)
    tl.store(STATUS + 2, _count(commit))
    tl.store(STATUS + 3, edits)
    tl.store(STATUS + 4, eos_at)
    tl.store(STATUS + 5, step)
    tl.store(STATUS + 6, post_steps)
    tl.store(STATUS + 7, before)


def launch(
    logits: torch.Tensor,
    state: BlockState,
    params: RefineParams,
    ids: SpecialIds,
    index: torch.Tensor | None,
    filters: bool,
    only_needed: bool,
    tile_v: int = TILE_V,
) -> RefineOutput:
    """refine_step's launches. Raises ValueError where a tensor of state or params, or index, is not contiguous."""
    rows, length = state.tokens.shape
    output = _empty(state.tokens)
    if rows * length == 0:
        return output
    for name, tensor in (vars(state) | vars(params) | {"index": index}).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    sampling = (params.temperature, params.top_k, params.top_p, params.seed)
    roles = (state.tokens, state.kind, state.frozen) if only_needed else None
    parts, part_ids, tiles = launch_parts(
        logits, index, roles, params.flags, state.block_start, state.step, sampling, ids, filters, tile_v=tile_v
    )  # fmt: skip
    lanes, num_warps = row_layout(length)
    run_kernel(
        _commit_kernel, (rows,),
        index, parts, part_ids, StateTensors(**vars(state)), ParamTensors(**vars(params)), output, ids, tiles,
        L=length, TILES=parts.shape[2], LANES=lanes, ONLY_NEEDED=only_needed, NUM_EOS=params.eos_ids.shape[1],
        num_warps=num_warps,
    )  # fmt: skip
    return output


def _empty(tokens):
    rows, length = tokens.shape
    new = tokens.new_empty
    return RefineOutput(
        new((rows, 8), dtype=torch.int32), new((rows, length)), new((rows, length), dtype=torch.float32),
        new((rows, length), dtype=torch.bool), new((rows, length), dtype=torch.bool),
    )  # fmt: skip


def _dispatch(logits, *arguments):
    state = BlockState(*arguments[:_NUM_STATE])
    params = RefineParams(*arguments[_NUM_STATE:_NUM_TENSORS])
    index, filters, only_needed, *ids = arguments[_NUM_TENSORS:]
    ids = SpecialIds(*ids)
    if use_triton(logits):
        return tuple(launch(logits, state, params, ids, index, filters, only_needed))
    return tuple(refine_step_ref(logits, state, params, ids, index, only_needed))


_ALIAS = {  # what a step writes, in the notation of torch.library
    "tokens": "(a!)", "step": "(b!)", "post_steps": "(c!)", "frozen": "(d!)", "commit_step": "(e!)",
    "commit_confidence": "(f!)",
}  # fmt: skip
_NUM_STATE = len(fields(BlockState))
_NUM_TENSORS = _NUM_STATE + len(fields(RefineParams))
_op = register_op(
    "refine_step(Tensor logits, "
    + ", ".join(f"Tensor{_ALIAS.get(f.name, '')} {f.name}" for f in (*fields(BlockState), *fields(RefineParams)))
    + f", Tensor? index, bool filters, bool only_needed, {ID_ARGUMENTS})"
    + " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    lambda logits, tokens, *arguments: tuple(_empty(tokens)),
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
) -> RefineOutput:
    """One refinement step of R rows; updates `state` in place.

    logits: [R, L, V] for all positions, or [M, V] for some; of any float type
    state: the rows' blocks
    params: the rows' rules
    ids: the model's special ids
    index: int64 [R, L], each position's row of logits [M, V], -1 for none; needed_positions says which must be there
    filters: False promises that no row has top_k or top_p, which saves a launch on a GPU
    only_needed: leave out the positions that the step does not need, whatever logits there are

    Returns what was done. A row whose needed logits hold NaN or +inf, or -inf alone, gets the ERROR bit, is frozen and
    keeps its block. Raises ValueError on shapes that do not fit, and on ids of another type.
    """
    if not isinstance(ids, SpecialIds):
        raise ValueError(f"ids: expected SpecialIds(mask, ...), got {ids!r}")
    rows, length = state.tokens.shape
    if index is None and logits.shape[:2] != (rows, length):
        raise ValueError(f"logits: expected [{rows}, {length}, V] without an index, got {tuple(logits.shape)}")
    if index is not None and (logits.ndim != 2 or index.shape != (rows, length)):
        raise ValueError(f"logits, index: expected [M, V], [{rows}, {length}], got {tuple(logits.shape)}, "
                         f"{tuple(index.shape)}")  # fmt: skip
    tensors = (logits, *_values(state), *_values(params))
    return RefineOutput(*_op(*tensors, index, filters, only_needed, *ids))
