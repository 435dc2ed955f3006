"""One refinement step of a batch of blocks: everything between the logits and the next block.

    candidates  c, p per position                                       (candidates.py)
    commit M2T  masked positions with p > threshold if at least q of them, else the q most confident (ties: lowest
                position); q = max(L // steps + (min(t, steps-1) < L % steps), min_transfer)
    edit T2T    non-prompt positions holding a token, c != x and p > edit_threshold
    block end   the step that fills the last mask; with editing, the first mask-free step that edits nothing or the
                max_post_steps-th mask-free step; never after more than max_steps
    EOS         a row is finished as soon as a valid position holds an EOS with no mask before it

Each row has its own block, parameters and counters and is computed by itself. Frozen rows (state.frozen != 0) change
nothing. Shapes: R rows, L block_length, V vocab. Source: the LLaDA2.0/2.1 model cards' generate; diffusers'
BlockRefinementScheduler; where they differ the flags of RefineParams say which rule holds.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from .candidates import SampleParams, candidates_ref

# kind of a position
VALID, PROMPT, TAIL, ABSENT = 0, 1, 2, 3  # TAIL is denoised but never returned; ABSENT is not even denoised

# RefineParams.flags
BAN_MASK = 1  # the mask id is never a candidate
FILL_PROMPT = 2  # mask ids at prompt positions are filled like any other (model cards)
EDITING = 4  # T2T editing
EOS_STEP = 8  # judge EOS after every step
EOS_END = 16  # judge EOS when the block ends
EOS_COMMIT = 32  # LLaDA2.0 card: judge when this step committed an EOS, prompt and tail included
EOS_HOLDS = 64  # LLaDA2.0 card: a block that ends and holds an EOS at a generated position ends the row
EOS_CLEAN = 128  # LLaDA2.1 card: the same, but only if the generated window holds no mask

# RefineState.prefix
PREFIX_MASK, PREFIX_EOS = 1, 2  # an earlier generated block holds a mask; the prompt holds an EOS

# columns of the status tensor, and the bits of its FLAGS
FLAGS, MASKS_LEFT, COMMITS, EDITS, EOS_AT, STEP, POST_STEPS, MASKS_BEFORE = range(8)
BLOCK_DONE, FINISHED, ERROR, CHANGED = 1, 2, 4, 8


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
    flags: torch.Tensor  # int32
    eos_ids: torch.Tensor  # int64 [R, K]

    def rows(self, index):
        """The parameters of some rows (index: int64 [n])."""
        return RefineParams(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass
class RefineState:
    """Per-row state of the active block; refine_step updates tokens, step, post_steps, frozen and the records in place."""

    tokens: torch.Tensor  # int64 [R, L]
    kind: torch.Tensor  # int8 [R, L]: VALID, PROMPT, TAIL, ABSENT
    start: torch.Tensor  # int64 [R]: absolute position of the block's first token
    step: torch.Tensor  # int32 [R]: steps done in this block
    post_steps: torch.Tensor  # int32 [R]: mask-free steps done in this block
    frozen: torch.Tensor  # int32 [R]: the row's BLOCK_DONE | FINISHED | ERROR bits; non-zero rows are left alone
    prefix: torch.Tensor  # int32 [R]: PREFIX_MASK | PREFIX_EOS
    commit_step: torch.Tensor  # int32 [R, L]: step of commit, -1 before
    commit_confidence: torch.Tensor  # float32 [R, L]: confidence at commit

    def rows(self, index):
        """A copy of some rows (index: int64 [n])."""
        return RefineState(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def start_block(cls, tokens, kind, start, prefix=None):
        """State of blocks nobody has touched yet: tokens [R, L] int64, kind [R, L] int8, start [R] int64."""
        rows = tokens.shape[0]
        count = torch.zeros(rows, dtype=torch.int32, device=tokens.device)
        return cls(
            tokens, kind, start, count.clone(), count.clone(), count.clone(),
            count.clone() if prefix is None else prefix,
            torch.full_like(tokens, -1, dtype=torch.int32),
            torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device),
        )  # fmt: skip


class RefineOutput(NamedTuple):
    """What one step did. status is the only thing a host ever needs to read."""

    status: torch.Tensor  # int32 [R, 8], columns FLAGS .. MASKS_BEFORE
    token: torch.Tensor  # int64 [R, L]: candidate, -1 where none was computed
    confidence: torch.Tensor  # float32 [R, L]: its confidence, -inf where none was computed
    commit: torch.Tensor  # bool [R, L]: written by M2T
    edit: torch.Tensor  # bool [R, L]: written by T2T


def needed_positions(state, params, mask_id):
    """bool [R, L]: the positions whose logits a step reads (masked; editable where editing). False on frozen rows."""
    masked, editable = _roles(state, params, mask_id)
    return masked | editable


def _roles(state, params, mask_id):
    flags = params.flags[:, None]
    holds_mask = state.tokens == mask_id
    prompt = state.kind == PROMPT
    live = (state.kind != ABSENT) & (state.frozen == 0)[:, None]
    masked = live & holds_mask & (~prompt | ((flags & FILL_PROMPT) != 0))
    editable = live & ~holds_mask & ~prompt & ((flags & EDITING) != 0)
    return masked, editable


def refine_step_ref(logits, state, params, mask_id, index=None):
    """One step in PyTorch; see refine_step."""
    rows, length = state.tokens.shape
    where = torch.arange(length, device=state.tokens.device)
    if index is None:
        logits = logits.reshape(-1, logits.shape[-1])
        index = torch.arange(rows * length, device=where.device).view(rows, length)
    present = index >= 0
    row = torch.arange(rows, device=where.device)[:, None].expand(rows, length)[present]
    position = (state.start[:, None] + where)[present]
    own = index[present]
    if own.shape[0] != logits.shape[0] or bool((own.diff() < 0).any()):  # sync: saves a copy of the logits
        logits = logits[own]
    sampling = SampleParams(params.temperature, params.top_k, params.top_p, params.seed)
    picked, probability = candidates_ref(
        logits, row, position, state.step[row].long(), sampling, mask_id, (params.flags & BAN_MASK) != 0,
    )  # fmt: skip
    token = torch.full_like(state.tokens, -1)
    confidence = torch.full(token.shape, float("-inf"), device=token.device)
    token[present] = picked
    confidence[present] = probability
    return _commit_ref(token, confidence, state, params, mask_id)


def _commit_ref(token, confidence, state, params, mask_id):
    length = token.shape[1]
    where = torch.arange(length, device=token.device)
    flags = params.flags
    masked, editable = _roles(state, params, mask_id)
    before = masked.sum(-1)
    active = state.frozen == 0
    error = active & (torch.isnan(confidence) & (masked | editable)).any(-1)
    live = active & ~error

    # M2T: the threshold set, or the quota's most confident
    steps = params.steps.clamp(min=1)
    late = torch.minimum(state.step, steps - 1)
    quota = torch.maximum(length // steps + (late < length % steps), params.min_transfer)
    ranked = confidence.masked_fill(~masked, float("-inf"))
    high = masked & (ranked > params.threshold[:, None])
    beats = (ranked[:, None, :] > ranked[:, :, None]) | (
        (ranked[:, None, :] == ranked[:, :, None]) & (where[None, :] < where[:, None])
    )
    rank = (beats & masked[:, None, :]).sum(-1)  # [R, L]: how many masked positions come first
    best = masked & (rank < quota[:, None])
    commit = torch.where((high.sum(-1) >= quota)[:, None], high, best) & live[:, None]
    # T2T
    edit = editable & (token != state.tokens) & (confidence > params.edit_threshold[:, None]) & live[:, None]

    written = commit | edit
    tokens = torch.where(written, token, state.tokens)
    state.tokens.copy_(tokens)
    state.commit_confidence.copy_(torch.where(commit, confidence, state.commit_confidence))
    state.commit_step.copy_(torch.where(commit, state.step[:, None], state.commit_step))

    # counters and the end of the block
    prompt = state.kind == PROMPT
    fillable = ~prompt | ((flags & FILL_PROMPT) != 0)[:, None]
    still_masked = (tokens == mask_id) & (state.kind != ABSENT) & fillable
    left = still_masked.sum(-1)
    edits = edit.sum(-1)
    step = state.step + live
    post_steps = state.post_steps + (live & (before == 0))
    one_phase = ((flags & EDITING) == 0) | (params.max_post_steps == 0)
    settled = (before == 0) & ((edits == 0) | (post_steps >= params.max_post_steps))
    done = live & (torch.where(one_phase, left == 0, settled) | (step >= params.max_steps))

    # EOS: `first` = the first one that counts, `clear` = no mask before it
    is_eos = (tokens[:, :, None] == params.eos_ids[:, None, :]).any(-1) & (state.kind != ABSENT)
    generated_mask = (tokens == mask_id) & ~prompt & (state.kind != ABSENT)
    first_mask = _first(generated_mask)
    first_valid = _first(is_eos & (state.kind == VALID))
    judged = ((flags & EOS_STEP) != 0) | (((flags & EOS_END) != 0) & done)
    finished = judged & (first_valid < length) & (first_mask > first_valid)

    first_any = _first(is_eos)
    in_prompt = (state.prefix & PREFIX_EOS) != 0
    first_is_prompt = prompt.gather(1, first_any.clamp(max=length - 1)[:, None])[:, 0]
    clean_before = ((state.prefix & PREFIX_MASK) == 0) & (first_mask > first_any)
    early = ((flags & EOS_COMMIT) != 0) & (is_eos & commit).any(-1) & (in_prompt | first_is_prompt | clean_before)
    first_generated = _first(is_eos & ~prompt)
    holds = done & (first_generated < length)
    clean = ~generated_mask.any(-1) & ((state.prefix & PREFIX_MASK) == 0)
    ended = (((flags & EOS_HOLDS) != 0) & holds) | (((flags & EOS_CLEAN) != 0) & holds & clean)
    eos_at = torch.where(finished, first_valid, torch.where(early, first_any, -1))
    finished = (finished | early | ended) & live

    state.step.copy_(step)
    state.post_steps.copy_(post_steps)
    bits = done * BLOCK_DONE + finished * FINISHED + error * ERROR
    state.frozen.copy_(state.frozen | bits)
    status = torch.stack(
        (
            state.frozen | (written.any(-1) * CHANGED), left, commit.sum(-1), edits,
            eos_at, step, post_steps, before,
        ),
        dim=1,
    ).to(torch.int32)  # fmt: skip
    return RefineOutput(status, token, confidence, commit, edit)


def _first(mask):
    """[R, L] bool -> [R] int64: index of the first True, L where there is none."""
    length = mask.shape[1]
    return torch.where(mask.any(-1), mask.to(torch.uint8).argmax(-1), length)


def refine_step(logits, state, params, mask_id, index=None):
    """One refinement step of R rows; updates `state` in place.

    logits: [R, L, V] for all positions, or [M, V] for some: then index int64 [R, L] names each position's row of
    logits, -1 where there is none (needed_positions says which must be there). Any float type. mask_id: int.
    Returns RefineOutput. A row whose needed logits hold NaN or +inf, or -inf alone, gets the ERROR bit, is frozen and
    keeps its block. Raises ValueError on shapes that do not fit.
    """
    rows, length = state.tokens.shape
    if index is None and logits.shape[:2] != (rows, length):
        raise ValueError(f"logits: expected [{rows}, {length}, V] without an index, got {tuple(logits.shape)}")
    if index is not None and (logits.ndim != 2 or index.shape != (rows, length)):
        raise ValueError(f"logits, index: expected [M, V], [{rows}, {length}], got {tuple(logits.shape)}, "
                         f"{tuple(index.shape)}")  # fmt: skip
    return refine_step_ref(logits, state, params, mask_id, index)
