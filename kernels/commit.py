"""From a step's candidates to the next block, row by row: the rules of refine.py, each a function of its own.

    select      M2T: what is committed
    edit        T2T: what is edited
    moves       LLaDA2.2's deletions and insertions (levenshtein.py)
    block end   whether the block has ended, and the row's counters
    EOS         whether the row has

A GUIDED row is only looked at: its report holds the candidates in place of what the block has at masked and editable
positions, and a host decides by commit_ref what is written. So is a row that SPECULATES, unless it fills its block or
an EOS ends it.

Each is there twice, with the same arguments first: for all rows in PyTorch (_ref), and for one row inside the kernel,
which is one launch. Shapes: R rows, L block_length, K EOS ids a row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch

from . import levenshtein
from ._triton import tl, triton
from .candidates import _combine
from .levenshtein import Moves, _begin, _best_new, _cycle, _splice
from .levenshtein import _candidates as _with_edits
from .overlap import inputs_ready
from .roles import (
    BAN_MASK,
    EDITING,
    ENTROPY,
    FILL_PROMPT,
    GENERATED,
    GUIDED,
    PADDING,
    PROMPT,
    SPECULATES,
    SpecialIds,
    _roles,
    roles_ref,
)
from .state import (
    BLOCK_DONE,
    CHANGED,
    EDITS,
    EOS_CLEAN,
    EOS_COMMIT,
    EOS_END,
    EOS_HOLDS,
    EOS_STEP,
    ERROR,
    FINISHED,
    MASKS_BEFORE,
    NUM_STATUS,
    PRIOR_EOS,
    PRIOR_MASK,
    BlockState,
    RefineOutput,
    RefineParams,
    report_ref,
)


def commit_ref(
    token: torch.Tensor,
    confidence: torch.Tensor,
    state: BlockState,
    params: RefineParams,
    ids: SpecialIds,
    check: Callable | None = None,
    moves: Moves | None = None,
    logits: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> RefineOutput:
    """All that follows the candidates, in the order of _commit_kernel.

    token, confidence: the candidates [R, L].
    state, params, ids: as of refine_step.
    check: has the last word on what is written: of commits and edits, bool [R, L] each, it makes those that are.
        None for those that the rules select.
    moves: as of refine_step; with them logits and index, as there, are read.
    entropy: of the positions of ENTROPY rows, float32 [R, L] in nats; None if no row is.
    """
    asked = reduce(or_, params.flags.tolist(), 0)  # sync: the reference alone; what no row asks for is skipped
    masked, editable = roles_ref(state.tokens, state.kind, state.frozen, params.flags, ids.mask, asked)  # [R, L]
    before = masked.sum(-1, dtype=torch.int32)  # [R, L] -> [R]
    live = state.frozen == 0
    error = None
    if bool(confidence.sum().isnan()):  # sync: the reference alone; there is no +inf
        error = live & (confidence.isnan() & (masked | editable)).any(-1)
        live = live & ~error
    wanted, proposes = masked | editable, None
    if asked & (GUIDED | SPECULATES):
        proposes = (params.flags & GUIDED) != 0
        if asked & SPECULATES:
            would = _select_ref(masked, confidence, entropy, state, params)
            tokens, open_end = torch.where(would, token, state.tokens), torch.zeros_like(live)
            ends, _ = _eos_ref(tokens, state.kind, live, would, open_end, state, params, ids, asked)
            proposes |= live & ((params.flags & SPECULATES) != 0) & ~ends & (would.sum(-1) < before)
        live = live & ~proposes
    if error is not None or proposes is not None:
        masked, editable = masked & live[:, None], editable & live[:, None]

    mask_free, own = before == 0, None
    if moves is None:
        commit = _select_ref(masked, confidence, entropy, state, params)
        edit = _edit_ref(editable, token, confidence, state.tokens, params, asked)
        if check is not None:
            commit, edit = check(commit, edit)
        written = commit | edit
        torch.where(written, token, state.tokens, out=state.tokens)
        torch.where(written, confidence, state.commit_confidence, out=state.commit_confidence)
        torch.where(written, state.step[:, None], state.commit_step, out=state.commit_step)
    else:
        token, confidence, commit, edit, own = _move_ref(
            masked, editable, token, confidence, live, state, params, asked, ids, moves, logits, index, entropy
        )
        written, mask_free = commit | edit, torch.where(own.on, own.mask_free, mask_free)

    left, edits, done = _block_end_ref(state.tokens, state.kind, live, mask_free, edit, state, params, ids, asked)
    changed = written.any(-1)
    if own is not None:
        done, changed = torch.where(own.on, own.done, done), torch.where(own.on, own.changed, changed)
    finished, eos_at = _eos_ref(state.tokens, state.kind, live, commit, done, state, params, ids, asked)
    state.frozen |= done * BLOCK_DONE
    state.frozen |= finished * FINISHED
    if error is not None:
        state.frozen |= error * ERROR
    commits, changed = commit.sum(-1, dtype=torch.int32), changed.int()  # [R, L] -> [R]
    torch.where(live, changed, state.changed, out=state.changed)
    told = state
    if proposes is not None:
        shown = wanted & proposes[:, None]
        eos_at = eos_at.masked_fill(proposes, -1)
        told = replace(
            state, tokens=torch.where(shown, token, state.tokens),
            commit_confidence=torch.where(shown, confidence, state.commit_confidence),
        )  # fmt: skip
    status = (state.frozen | changed * CHANGED, left, commits, edits, eos_at, state.step, state.post_steps, before)
    chosen = None if moves is None else torch.where(written, token, -1)
    return RefineOutput(report_ref(status, told, chosen), token, confidence, commit, edit)


def judge_ref(
    commit: torch.Tensor, status: torch.Tensor, state: BlockState, params: RefineParams, ids: SpecialIds
) -> torch.Tensor:
    """What is over in rows whose tokens somebody has rewritten after a step: its block end and EOS, once more.

    commit: bool [R, L]; status: int32 [R, 8]; what the step did.
    state: after the step, with the tokens as they are now; it is left alone. Masks that were put back are for the next
        step to fill: with them a block is no longer free of masks.
    params, ids: as of refine_step.
    Returns BLOCK_DONE | FINISHED, int32 [R].
    """
    live = torch.ones_like(state.frozen, dtype=torch.bool)
    masked, _ = roles_ref(state.tokens, state.kind, torch.zeros_like(state.frozen), params.flags, ids.mask)
    before = torch.where(masked.any(-1), 1, status[:, MASKS_BEFORE])  # [R, L] -> [R]
    state = replace(state, step=state.step - 1, post_steps=state.post_steps - (before == 0).int())  # it was counted
    edits = status[:, EDITS, None]
    _, _, done = _block_end_ref(state.tokens, state.kind, live, before == 0, edits, state, params, ids, asked=~0)
    finished, _ = _eos_ref(state.tokens, state.kind, live, commit, done, state, params, ids, asked=~0)
    return done.int() * BLOCK_DONE | finished.int() * FINISHED


class _Moved(NamedTuple):
    """How LEVENSHTEIN rows stand after a step; bool [R] each."""

    on: torch.Tensor  # which these are
    mask_free: torch.Tensor
    done: torch.Tensor
    changed: torch.Tensor


def _move_ref(masked, editable, token, confidence, live, state, params, asked, ids, moves, logits, index, entropy):
    """Commits, edits, deletions and insertions of a batch with LEVENSHTEIN rows, in `state` and `moves`. Returns the
    candidates, what was committed and edited, and how those rows stand."""
    now = levenshtein.begin_ref(masked, live, state, params, moves)
    text, held = (token, confidence), state.tokens.clone()
    wanted = masked | editable
    token, confidence = levenshtein.candidates_ref(token, confidence, wanted, now, params, ids, logits, index)
    commit = _select_ref(masked, confidence, entropy, state, params, now.introduced)
    commit, now = levenshtein.finish_ref(masked, commit, now, params)
    edit = _edit_ref(editable, token, confidence, held, params, asked)
    chosen = commit | edit
    done = now.last | ~chosen.any(-1)
    token, confidence = levenshtein.settle_ref(
        token, confidence, text, chosen, now, state, params, ids, moves, logits, index
    )
    edit &= token != held
    levenshtein.splice_ref(token, confidence, commit | edit, now, state, ids, moves)
    changed = (state.tokens != held).any(-1)
    return token, confidence, commit, edit, _Moved(now.on, ~now.open.any(-1), done, changed)


def _select_ref(masked, confidence, entropy, state, params, introduced=0):
    """M2T -> commit bool [R, L]: the masked positions that the row's policy chooses if they are enough, else the
    quota's best. entropy: as of commit_ref; introduced: int32 [R], masks that make the quota larger.

    threshold  the confidence is above the threshold; best is the most confident
    entropy    (ENTROPY) in the order of entropies, ties to the lowest position: those ahead of it, the entropy of each
               times decay ** (distance - 1), sum to no more than the bound; best is the least entropy
    """
    length = masked.shape[1]
    steps = params.steps.clamp(min=1)
    late = torch.minimum(state.step, steps - 1)
    quota = torch.maximum(length // steps + (late < length % steps), params.min_transfer) + introduced
    quota = quota[:, None]  # [R] -> [R, 1]
    high = masked & (confidence > params.threshold[:, None])
    rank = confidence.clamp(min=-1)
    if entropy is not None:
        on = ((params.flags & ENTROPY) != 0)[:, None]
        rank = torch.where(on, -entropy, rank)
        high = torch.where(on, masked & (_ahead_ref(masked, entropy, params) <= params.entropy_bound[:, None]), high)
    enough = high.sum(-1, keepdim=True) >= quota
    if bool(enough.all()):  # sync: the reference alone
        return high
    ranked = torch.where(masked, rank, float("-inf"))  # whatever is masked comes before all else
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(masked).scatter_(1, order, torch.arange(length, device=order.device) < quota)
    return torch.where(enough, high, best & masked)


def _ahead_ref(masked, entropy, params):
    """float32 [R, L]: what the entropies ahead of each position add up to."""
    length = masked.shape[1]
    place = torch.arange(length, device=masked.device)
    key = torch.where(masked, entropy, float("inf"))
    tied = (key[:, None, :] == key[:, :, None]) & (place < place[:, None])
    ahead = ((key[:, None, :] < key[:, :, None]) | tied) & masked[:, None, :]  # [R, L, L]
    distance = (place - place[:, None]).abs()
    weight = params.entropy_decay[:, None, None] ** (distance - 1).clamp(min=0)
    return torch.where(ahead, weight * entropy[:, None, :], 0.0).sum(-1)


def _edit_ref(editable, token, confidence, held, params, asked):
    """T2T -> edit bool [R, L]: the editable positions whose candidate is another token and above the threshold."""
    if not asked & EDITING:
        return editable  # none is
    return editable & (token != held) & (confidence > params.edit_threshold[:, None])


def _block_end_ref(tokens, kind, live, mask_free, edit, state, params, ids, asked):
    """How many masks are left and how many tokens were edited, int32 [R], and whether the block has ended, bool [R];
    counts the step in `state`. tokens: those after this step; mask_free: it is a post step."""
    fillable = kind != PROMPT
    if asked & FILL_PROMPT:
        fillable = fillable | ((params.flags & FILL_PROMPT) != 0)[:, None]
    left = ((tokens == ids.mask) & (kind != PADDING) & fillable).sum(-1, dtype=torch.int32)  # [R, L] -> [R]
    edits = edit.sum(-1, dtype=torch.int32)  # [R, L] -> [R]
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
_FILL_PROMPT, _EDITING, _GUIDED = tl.constexpr(FILL_PROMPT), tl.constexpr(EDITING), tl.constexpr(GUIDED)
_BAN_MASK, _ENTROPY, _SPECULATES = tl.constexpr(BAN_MASK), tl.constexpr(ENTROPY), tl.constexpr(SPECULATES)
_EOS_STEP, _EOS_END, _EOS_COMMIT = tl.constexpr(EOS_STEP), tl.constexpr(EOS_END), tl.constexpr(EOS_COMMIT)
_EOS_HOLDS, _EOS_CLEAN = tl.constexpr(EOS_HOLDS), tl.constexpr(EOS_CLEAN)
_PRIOR_MASK, _PRIOR_EOS = tl.constexpr(PRIOR_MASK), tl.constexpr(PRIOR_EOS)
_BLOCK_DONE, _FINISHED = tl.constexpr(BLOCK_DONE), tl.constexpr(FINISHED)
_ERROR, _CHANGED = tl.constexpr(ERROR), tl.constexpr(CHANGED)
_NUM_STATUS = tl.constexpr(NUM_STATUS)
_TOGETHER = tl.constexpr(32)  # positions that are weighed together, more of long blocks would not fit into registers


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _first_column(mask, column, L: tl.constexpr):
    """Index of the first True of a row's positions, L where there is none."""
    return tl.min(tl.where(mask, column, L), 0)


@triton.jit
def _some(x, at):
    """The values of a row's positions x at some of them, or at all."""
    return x if at.shape[0] == x.shape[0] else tl.gather(x, at, 0)


@triton.jit
def _ahead(rank, entropy, scale, column):
    """_ahead_ref of one row's positions by their ranks; entropy: 0 where there is no mask; scale: log2 of the decay."""
    TOGETHER: tl.constexpr = min(column.shape[0], _TOGETHER)
    load = tl.zeros(column.shape, tl.float32)
    for begin in tl.range(0, column.shape[0], TOGETHER):
        at = begin + tl.arange(0, TOGETHER)
        further = tl.maximum(tl.abs(at[None, :] - column[:, None]) - 1, 0).to(tl.float32)
        part = tl.exp2(further * scale) * _some(entropy, at)[None, :]
        load += tl.sum(tl.where(_some(rank, at)[None, :] < rank[:, None], part, 0.0), 1)
    return load


@triton.jit
def _rank(best, column):
    """How many of a row's positions have more of `best`; ties: lower ones count."""
    TOGETHER: tl.constexpr = min(column.shape[0], _TOGETHER)
    rank = tl.zeros(column.shape, tl.int32)
    for begin in tl.range(0, column.shape[0], TOGETHER):
        at = begin + tl.arange(0, TOGETHER)
        other = _some(best, at)[None, :]  # [1, part of L] beside [L, 1]
        ahead = (other > best[:, None]) | ((other == best[:, None]) & (at[None, :] < column[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    return rank


@triton.jit
def _select(masked, confidence, entropy, STATE, PARAMS, introduced, row, column, L: tl.constexpr):
    """_select_ref of one row's positions."""
    steps = tl.maximum(tl.load(PARAMS.steps + row), 1)
    extra = (tl.minimum(tl.load(STATE.step + row), steps - 1) < L % steps).to(tl.int32)
    quota = tl.maximum(L // steps + extra, tl.load(PARAMS.min_transfer + row)) + introduced
    high = masked & (confidence > tl.load(PARAMS.threshold + row))
    by_entropy = (tl.load(PARAMS.flags + row) & _ENTROPY) != 0
    best = tl.where(by_entropy, -entropy, tl.maximum(confidence, -1.0))
    rank = _rank(tl.where(masked, best, float("-inf")), column)  # whatever is masked comes before all else
    if by_entropy:
        load = _ahead(rank, tl.where(masked, entropy, 0.0), tl.log2(tl.load(PARAMS.entropy_decay + row)), column)
        high = masked & (load <= tl.load(PARAMS.entropy_bound + row))
    return tl.where(_count(high) >= quota, high, masked & (rank < quota))


@triton.jit
def _edit(editable, token, confidence, held, PARAMS, row):
    """_edit_ref of one row's positions."""
    return editable & (token != held) & (confidence > tl.load(PARAMS.edit_threshold + row))


@triton.jit
def _block_end(tokens, kind, live, mask_free, edit, STATE, PARAMS, ids, row):
    """_block_end_ref of one row, whose counters it returns as well."""
    flags = tl.load(PARAMS.flags + row)
    fillable = (kind != _PROMPT) | ((flags & _FILL_PROMPT) != 0)
    left = _count((tokens == ids.mask) & (kind != _PADDING) & fillable)
    edits = _count(edit)
    step = tl.load(STATE.step + row) + live.to(tl.int32)
    post_steps = tl.load(STATE.post_steps + row) + (live & mask_free).to(tl.int32)
    max_post_steps = tl.load(PARAMS.max_post_steps + row)
    one_phase = ((flags & _EDITING) == 0) | (max_post_steps == 0)
    settled = mask_free & ((edits == 0) | (post_steps >= max_post_steps))
    ended = tl.where(one_phase, left == 0, settled)
    return left, edits, step, post_steps, live & (ended | (step >= tl.load(PARAMS.max_steps + row)))


@triton.jit
def _eos(
    tokens, kind, live, commit, done, STATE, PARAMS, ids, row, column, L: tl.constexpr, NUM_EOS: tl.constexpr
):  # fmt: skip
    """_eos_ref of one row."""
    flags, prior_flags = tl.load(PARAMS.flags + row), tl.load(STATE.prior_flags + row)
    present = kind != _PADDING
    is_eos = column < 0
    for k in tl.static_range(NUM_EOS):
        is_eos |= tokens == tl.load(PARAMS.eos_ids + row * NUM_EOS + k)
    is_eos &= present
    generated = kind != _PROMPT
    first_mask = _first_column((tokens == ids.mask) & generated & present, column, L)
    first = _first_column(is_eos & (kind == _GENERATED), column, L)
    judged = ((flags & _EOS_STEP) != 0) | (((flags & _EOS_END) != 0) & done)
    resolved = judged & (first < L) & (first_mask > first)

    # the cards' rules
    prior_clean = (prior_flags & _PRIOR_MASK) == 0
    first_any = _first_column(is_eos, column, L)
    in_prompt = ((prior_flags & _PRIOR_EOS) != 0) | (_count((kind == _PROMPT) & (column == first_any)) > 0)
    counts = in_prompt | (prior_clean & (first_mask > first_any))
    early = ((flags & _EOS_COMMIT) != 0) & (_count(is_eos & commit) > 0) & counts
    holds = done & (_count(is_eos & generated) > 0)
    clean = (first_mask == L) & prior_clean
    ended = holds & (((flags & _EOS_HOLDS) != 0) | (((flags & _EOS_CLEAN) != 0) & clean))
    eos_at = tl.where(resolved, first, tl.where(early, first_any, -1))
    return (resolved | early | ended) & live, eos_at


@triton.jit
def _unless_drafted(
    commit, token, held, before, kind, live, flags, STATE, PARAMS, ids, row, column, L: tl.constexpr,
    NUM_EOS: tl.constexpr,
):  # fmt: skip
    """Commits and `live` of one row, both off where it only drafts, and whether it does: it SPECULATES, its commits
    leave masks, of which there were so many before, and no EOS ends it."""
    drafts = live & ((flags & _SPECULATES) != 0) & (_count(commit) < before)
    if drafts:
        new = tl.where(commit, token, held)
        ends, _at = _eos(new, kind, live, commit, False, STATE, PARAMS, ids, row, column, L, NUM_EOS)
        drafts = ends == 0
    live &= drafts == 0
    return commit & live, live, drafts


@triton.jit
def _commit_kernel(
    LOGITS, INDEX, PART, PART_ID,  # see candidates.py
    STATE, PARAMS, OUT,  # BlockState, RefineParams, RefineOutput
    MOVES,  # Moves of STEPS steps, None if no row is LEVENSHTEIN; LOGITS is read with them alone
    ids, tiles, vocab, stride_r, stride_l, stride_v,
    L: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, ONLY_NEEDED: tl.constexpr, NUM_EOS: tl.constexpr,
    STEPS: tl.constexpr, ANY_GUIDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R,): one row from its parts to its next block, as commit_ref; frozen and proposing rows only report."""
    inputs_ready(EARLY)
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < L
    n = row * L + column
    held = tl.load(STATE.tokens + n, mask=inside, other=-1)
    kind = tl.load(STATE.kind + n, mask=inside, other=_PADDING)
    frozen = tl.load(STATE.frozen + row)
    flags = tl.load(PARAMS.flags + row)
    old_step = tl.load(STATE.step + row)
    start = tl.load(STATE.block_start + row)
    masked, editable = _roles(held, kind, frozen, flags, ids.mask)
    before = _count(masked)
    wanted = inside
    if INDEX is not None:
        wanted &= tl.load(INDEX + n, mask=inside, other=-1) >= 0
    if ONLY_NEEDED:
        wanted &= masked | editable
    plane = tl.num_programs(0) * L * TILES
    temperature = tl.load(PARAMS.temperature + row)
    token, confidence, top, mass, scale, best, entropy = _combine(
        PART, PART_ID, n, wanted, plane, tiles, temperature, flags, (flags & _ENTROPY) != 0,
        tl.load(PARAMS.seed + row), start + column, old_step, TILES,
    )  # fmt: skip
    token = token.to(tl.int64)
    confidence = tl.where(wanted, confidence, float("-inf"))
    error = (frozen == 0) & (_count((confidence != confidence) & (masked | editable)) > 0)
    live = (frozen == 0) & (error == 0)
    guided = live & False
    if ANY_GUIDED:
        guided = (flags & _GUIDED) != 0
        live &= guided == 0

    mask_free = before == 0
    if MOVES is None:
        commit = _select(masked, confidence, entropy, STATE, PARAMS, 0, row, column, L) & live
        commit, live, drafts = _unless_drafted(
            commit, token, held, before, kind, live, flags, STATE, PARAMS, ids, row, column, L, NUM_EOS
        )  # fmt: skip
        edit = _edit(editable, token, confidence, held, PARAMS, row) & live
        written = commit | edit
        new = tl.where(written, token, held)
        put = written
        moved = written
    else:
        max_post_steps = tl.load(PARAMS.max_post_steps + row)
        on, original, unfilled, introduced, last = _begin(
            masked, live, flags, old_step, tl.load(STATE.post_steps + row), max_post_steps,
            tl.load(PARAMS.max_steps + row), MOVES, n, inside, STEPS,
        )  # fmt: skip
        if INDEX is None:
            begin = row.to(tl.int64) * stride_r + column.to(tl.int64) * stride_l
        else:
            begin = tl.load(INDEX + n, mask=wanted, other=0) * stride_r
        text, text_confidence = token, confidence
        banned = ((flags & _BAN_MASK) != 0) | (unfilled & (last == 0))
        token, confidence = _with_edits(
            LOGITS + begin, stride_v, token, confidence, temperature > 0,
            wanted & (masked | editable), on, banned, ids, top, mass, scale, best,
        )  # fmt: skip
        num_open = _count(unfilled)
        commit = _select(masked, confidence, entropy, STATE, PARAMS, introduced, row, column, L) & live
        commit, live, drafts = _unless_drafted(
            commit, token, held, before, kind, live, flags, STATE, PARAMS, ids, row, column, L, NUM_EOS
        )  # fmt: skip
        last |= on & (max_post_steps == 0) & (_count(unfilled & (commit == 0)) == 0)
        commit |= masked & on & last
        edit = _edit(editable, token, confidence, held, PARAMS, row) & live
        written = commit | edit
        over = last | (_count(written) == 0)

        control = on & last & ((token == ids.mask) | (token == ids.delete) | (token == ids.split))
        token, confidence = tl.where(control, text, token), tl.where(control, text_confidence, confidence)
        SEEN, WRITTEN = MOVES.seen + row.to(tl.int64) * STEPS * L, MOVES.written + row.to(tl.int64) * STEPS * L
        changing = written & (token != held) & on & (last == 0)
        at = _cycle(changing, confidence, held, old_step, SEEN, column, inside, L)
        if at < L:
            own = column == at
            hidden = tl.where(_count(own & banned) > 0, ids.mask, -1)
            own_logits = LOGITS + tl.sum(tl.where(own, begin, 0), 0)
            fresh, logit = _best_new(own_logits, stride_v, vocab, WRITTEN + at, old_step, hidden, L)
            own = tl.where(own, logit, float("-inf")) > float("-inf")  # nowhere if nothing is left that is new
            token = tl.where(own, fresh.to(tl.int64), token)
            confidence = tl.where(own, tl.exp2((logit - top) * scale) / mass, confidence)
        tl.store(SEEN + old_step * L + column, held.to(tl.int32), mask=inside & on)
        tl.store(WRITTEN + old_step * L + column, tl.where(written, token, -1).to(tl.int32), mask=inside & on)
        edit &= token != held
        written = commit | edit
        chosen = tl.where(written, token, -1).to(tl.int32)
        source, blank, apart = _splice(token, written, on, kind, ids, column, L)
        put = written & (apart == 0)
        new = tl.where(blank, ids.mask, tl.gather(tl.where(put, token, held), source, 0))
        moved = tl.where(on, inside, written)
        mask_free = tl.where(on, num_open == 0, mask_free)

    left, edits, step, post_steps, done = _block_end(new, kind, live, mask_free, edit, STATE, PARAMS, ids, row)
    changed = _count(written) > 0
    if MOVES is not None:
        done = tl.where(on, over, done)
        changed = tl.where(on, _count(inside & (new != held)) > 0, changed)
    finished, eos_at = _eos(new, kind, live, commit, done, STATE, PARAMS, ids, row, column, L, NUM_EOS)
    now = frozen | done.to(tl.int32) * _BLOCK_DONE | finished.to(tl.int32) * _FINISHED | error.to(tl.int32) * _ERROR
    changed = changed.to(tl.int32)
    # read this late for the sake of registers; where it is written below, what is there does not matter
    commit_step = tl.where(put, old_step, tl.load(STATE.commit_step + n, mask=inside, other=-1))
    commit_confidence = tl.load(STATE.commit_confidence + n, mask=inside, other=0.0)
    commit_confidence = tl.where(put, confidence, commit_confidence)
    if MOVES is not None:
        commit_step = tl.where(blank, -1, tl.gather(commit_step, source, 0))
        commit_confidence = tl.where(blank, 0.0, tl.gather(commit_confidence, source, 0))
        original = tl.where(blank, 0, tl.gather(original.to(tl.int32), source, 0))

    tl.debug_barrier()  # every thread has read the state
    tl.store(STATE.tokens + n, new, mask=inside & moved)
    tl.store(STATE.commit_step + n, commit_step, mask=inside & moved)
    tl.store(STATE.commit_confidence + n, commit_confidence, mask=inside & moved)
    if MOVES is not None:
        tl.store(MOVES.original + n, original.to(tl.int8), mask=inside & on)
    tl.store(STATE.step + row, step)
    tl.store(STATE.post_steps + row, post_steps)
    tl.store(STATE.frozen + row, now)
    tl.store(STATE.changed + row, changed, mask=live)
    tl.store(OUT.token + n, token, mask=inside)
    tl.store(OUT.confidence + n, confidence, mask=inside)
    tl.store(OUT.commit + n, commit, mask=inside)
    tl.store(OUT.edit + n, edit, mask=inside)
    proposes = drafts | guided
    shown = proposes & (masked | editable)
    new, commit_confidence = tl.where(shown, token, new), tl.where(shown, confidence, commit_confidence)
    eos_at = tl.where(proposes, -1, eos_at)
    PARTS: tl.constexpr = 3 if MOVES is None else 4
    REPORT = OUT.report + row * (_NUM_STATUS + 1 + PARTS * L)
    tl.store(REPORT + 0, now | changed * _CHANGED)
    tl.store(REPORT + 1, left)
    tl.store(REPORT + 2, _count(commit))
    tl.store(REPORT + 3, edits)
    tl.store(REPORT + 4, eos_at)
    tl.store(REPORT + 5, step)
    tl.store(REPORT + 6, post_steps)
    tl.store(REPORT + 7, before)
    tl.store(REPORT + _NUM_STATUS, (start // L).to(tl.int32))
    COLUMN = REPORT + _NUM_STATUS + 1 + column
    tl.store(COLUMN, new.to(tl.int32), mask=inside)
    tl.store(COLUMN + L, commit_step, mask=inside)
    tl.store(COLUMN + 2 * L, commit_confidence.to(tl.int32, bitcast=True), mask=inside)
    if MOVES is not None:
        tl.store(COLUMN + 3 * L, chosen, mask=inside)
