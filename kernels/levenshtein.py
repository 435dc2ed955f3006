"""LLaDA2.2's editing: what a step of a LEVENSHTEIN row does beside commits and edits of single tokens.

    original    a mask that the block began with; the mark goes where its position goes, and stays when it is filled
    open        masked and original; introduced: masked and not original
    candidates  beside text the ids of deletions and insertions where they are the likeliest, and the mask where nothing
                bans it and the position is not open; in the last step the best text instead of what is none
    quota       q + the introduced masks, so that an open one is among them, and with none open all masks are
    last step   the one after max_post_steps - 1 without open masks; where these are to be none, the one that leaves
                none open; at the latest the max_steps-th
    cycle       a block that has been seen before: where it would change, the least confident position gets the best
                token that has not been written there yet
    splice      all of it against the step's input: a DELETE drops its position, a SPLIT puts a mask before the token
                that was there; masks fill the block up, what is behind its end is cut off
    block end   the last step, or one that chooses nothing

Deletions and insertions are not drawn: text is, among text. Source: SGLang's JointThresholdInDel, which this is under
the profile sglang-indel; the LLaDA2.2 report.

Each rule is there twice, in PyTorch for all rows (_ref) and for one row inside the kernel of commit.py. Shapes: R rows,
L block_length, T steps that are remembered, V vocab.
"""

from typing import NamedTuple

import torch

from ._triton import tl, triton
from .roles import BAN_MASK, LEVENSHTEIN, PADDING, PROMPT

MAX_POST_STEPS = 64  # of a LEVENSHTEIN row, so that T is bounded
_TILE = 1024  # ids that the search for a token not written yet takes together
_STEPS = 8  # of the past that are compared with a block together

NO_ID = 2**31 - 1

_NO_ID = tl.constexpr(NO_ID)
_NONE = tl.constexpr(float("-inf"))
_BAN_MASK, _LEVENSHTEIN = tl.constexpr(BAN_MASK), tl.constexpr(LEVENSHTEIN)
_PROMPT, _PADDING = tl.constexpr(PROMPT), tl.constexpr(PADDING)
_AT_ONCE, _PAST = tl.constexpr(_TILE), tl.constexpr(_STEPS)


class Moves(NamedTuple):
    """What LEVENSHTEIN rows remember of their block; what was there before its first step is not read."""

    original: torch.Tensor  # int8 [R, L]
    seen: torch.Tensor  # int32 [R, T, L]: by step the tokens that it began with
    written: torch.Tensor  # int32 [R, T, L]: by step the candidates that it chose, -1 elsewhere

    @classmethod
    def fresh(cls, rows: int, length: int, device: torch.device | str = "cpu") -> "Moves":
        """For R rows of blocks of L positions."""
        steps = length + MAX_POST_STEPS + 1
        return cls(
            torch.zeros((rows, length), dtype=torch.int8, device=device),
            *(torch.zeros((rows, steps, length), dtype=torch.int32, device=device) for _ in range(2)),
        )

    def leading(self, count: int) -> "Moves":
        """Of the first rows, views."""
        return Moves(*(part[:count] for part in self))


class Round(NamedTuple):
    """How a step stands before it chooses."""

    on: torch.Tensor  # bool [R]: a LEVENSHTEIN row that is refined
    original: torch.Tensor  # bool [R, L]
    open: torch.Tensor  # bool [R, L]
    introduced: torch.Tensor  # int32 [R]
    last: torch.Tensor  # bool [R]


def begin_ref(masked, live, state, params, moves) -> Round:
    """masked: bool [R, L]; live: bool [R]; state, params: BlockState, RefineParams; moves: Moves."""
    on = live & ((params.flags & LEVENSHTEIN) != 0)
    original = torch.where(state.step[:, None] == 0, masked, moves.original != 0)
    unfilled = masked & original
    none_open = ~unfilled.any(-1)
    post = state.post_steps + none_open.int()
    spent = torch.where(params.max_post_steps > 0, post >= params.max_post_steps, none_open)
    introduced = masked.sum(-1, dtype=torch.int32) - unfilled.sum(-1, dtype=torch.int32)
    most = params.max_steps.clamp(max=moves.seen.shape[1])
    return Round(on, original, unfilled, introduced * on, on & (spent | (state.step + 1 >= most)))


def candidates_ref(token, confidence, wanted, now, params, ids, logits, index):
    """Candidates with what is no text: token [R, L] int64 and confidence [R, L] float32 of text alone, -> the same.

    wanted: bool [R, L], whose logits count; logits, index: as of refine_step.
    """
    at = torch.where((wanted & now.on[:, None]).flatten())[0]
    length = token.shape[1]
    row = at.div(length, rounding_mode="floor")
    x = _logits_of(logits, index, at)
    special = torch.tensor(ids, dtype=torch.int64, device=x.device)
    each = x[:, special]  # [M, 3], mask first
    text = x.index_fill(1, special, float("-inf"))
    drawn = (params.temperature > 0)[row]
    best = torch.where(drawn, text.amax(-1), text.gather(1, token.flatten()[at].clamp(min=0)[:, None])[:, 0])
    banned = ((params.flags & BAN_MASK) != 0)[row] | (now.open.flatten()[at] & ~now.last[row])
    each[:, 0].masked_fill_(banned, float("-inf"))
    logit = each.amax(-1)
    chosen = torch.where(each == logit[:, None], special, NO_ID).amin(-1)  # the lowest id of the best
    held = token.flatten()[at]
    better = ((logit > best) | ((logit == best) & (chosen < held) & ~drawn)) & ~confidence.flatten()[at].isnan()
    top = x.amax(-1)
    share = torch.exp(logit - top) / torch.exp(x - top[:, None]).sum(-1)
    token = token.flatten().index_copy(0, at, torch.where(better, chosen, held)).view_as(token)
    kept = confidence.flatten()[at]
    confidence = confidence.flatten().index_copy(0, at, torch.where(better, share, kept)).view_as(confidence)
    return token, confidence


def _logits_of(logits, index, at):
    """float32 [M, V]: the logits of positions r * L + l, int64 [M]."""
    rows = logits.flatten(0, 1) if index is None else logits
    return rows[at if index is None else index.flatten()[at]].float()


def finish_ref(masked, commit, now, params) -> tuple[torch.Tensor, Round]:
    """(commits, the round) where the choice itself has made the step the last one."""
    leaves = (now.open & ~commit).any(-1)
    late = now.on & (params.max_post_steps == 0) & ~leaves
    now = now._replace(last=now.last | late)
    return torch.where((now.on & now.last)[:, None], masked, commit), now


def settle_ref(token, confidence, text, chosen, now, state, params, ids, moves, logits, index):
    """What is written of what was chosen: (token, confidence), [R, L] each, and `moves` know of it.

    token, confidence: the candidates; text: the same of text alone; chosen: bool [R, L].
    """
    control = (token == ids.mask) | (token == ids.delete) | (token == ids.split)
    scrubbed = now.last[:, None] & control
    token = torch.where(scrubbed, text[0], token)
    confidence = torch.where(scrubbed, text[1], confidence)
    for row in torch.where(now.on)[0].tolist():  # sync: the reference alone
        step, held = int(state.step[row]), state.tokens[row]
        changing = chosen[row] & (token[row] != held)
        if not now.last[row] and bool(changing.any()) and bool((moves.seen[row, :step] == held).all(-1).any()):
            at = int(torch.where(changing, confidence[row], float("inf")).argmin())
            x = _logits_of(logits, index, changing.new_full((1,), row * len(held) + at, dtype=torch.int64))[0]
            share = torch.softmax(x, -1)
            past = moves.written[row, :step, at]
            x[past[past >= 0].long()] = float("-inf")
            if now.open[row, at] or params.flags[row] & BAN_MASK:
                x[ids.mask] = float("-inf")
            if bool(x.amax() > float("-inf")):  # something is left that is new
                token[row, at] = x.argmax()
                confidence[row, at] = share[token[row, at]]
        moves.seen[row, step] = held.int()
        moves.written[row, step] = torch.where(chosen[row], token[row], -1).int()
    return token, confidence


def splice_ref(token, confidence, chosen, now, state, ids, moves):
    """Write what was chosen, and move what stands behind deletions and insertions; `state` and `moves` in place."""
    remove = chosen & now.on[:, None] & (token == ids.delete)
    insert = chosen & now.on[:, None] & (token == ids.split)
    put = chosen & ~remove & ~insert
    own = (
        (state.tokens, torch.where(put, token, state.tokens), ids.mask),
        (state.commit_step, torch.where(put, state.step[:, None], state.commit_step), -1),
        (state.commit_confidence, torch.where(put, confidence, state.commit_confidence), 0.0),
        (moves.original, now.original.to(moves.original.dtype), 0),
    )
    there = state.kind != PADDING
    count = (1 - remove.int() + insert.int()) * there  # what becomes of a position
    end = count.cumsum(-1)
    place = torch.arange(token.shape[1], device=token.device)
    source = (end[:, None, :] <= place[:, None]).sum(-1).clamp(max=token.shape[1] - 1)  # [R, L]
    first = place == (end - count).gather(1, source)
    blank = (insert.gather(1, source) & first) | (place >= end[:, -1:])
    keeps = ~(remove | insert).any(-1, keepdim=True) | ~there  # where nothing moves
    for target, new, empty in own:
        moved = new.gather(1, source).masked_fill(blank, empty)
        torch.where(keeps, new, moved, out=target)


@triton.jit
def _begin(
    masked, live, flags, step, post_steps, max_post_steps, max_steps, MOVES, n, inside, STEPS: tl.constexpr
):  # fmt: skip
    """begin_ref of one row: whether it is on, original, open, introduced, last."""
    on = live & ((flags & _LEVENSHTEIN) != 0)
    original = tl.load(MOVES.original + n, mask=inside, other=0) != 0
    original = tl.where(step == 0, masked, original)
    unfilled = masked & original
    num_open = tl.sum(unfilled.to(tl.int32), 0)
    post = post_steps + (num_open == 0).to(tl.int32)
    spent = tl.where(max_post_steps > 0, post >= max_post_steps, num_open == 0)
    introduced = tl.sum(masked.to(tl.int32), 0) - num_open
    return (
        on,
        original,
        unfilled,
        tl.where(on, introduced, 0),
        on & (spent | (step + 1 >= tl.minimum(max_steps, STEPS))),
    )


@triton.jit
def _candidates(
    base, stride_v, token, confidence, drawn, wanted, on, banned, ids, top, mass, scale, best
):  # fmt: skip
    """candidates_ref of one row's positions.

    base: pointers to their logits; wanted: which of these count; drawn: the tokens were; banned: the mask is no
    candidate; top, mass, scale: what makes a share of a logit; best: the largest logit of text.
    """
    logit = tl.full(token.shape, float("-inf"), tl.float32)
    chosen = tl.full(token.shape, _NO_ID, tl.int64)
    asked = wanted & on
    for i in tl.static_range(3):
        x = tl.load(base + tl.cast(ids[i], tl.int64) * stride_v, mask=asked, other=_NONE).to(tl.float32)
        if i == 0:
            x = tl.where(banned, _NONE, x)
        better = (x > logit) | ((x == logit) & (ids[i] < chosen))
        logit = tl.where(better, x, logit)
        chosen = tl.where(better, ids[i], chosen)
    better = asked & ((logit > best) | ((logit == best) & (chosen < token) & (drawn == 0)))
    better &= confidence == confidence
    share = tl.exp2((logit - top) * scale) / mass
    return tl.where(better, chosen, token), tl.where(better, share, confidence)


@triton.jit
def _cycle(changing, confidence, held, step, SEEN, column, inside, L: tl.constexpr):
    """Where a block that began an earlier step with what it holds is to change otherwise, L if it need not.

    changing: the positions that would change; SEEN: to what the block held at step 0, later ones' L apart.
    """
    at = tl.full([], L, tl.int32)
    if tl.sum(changing.to(tl.int32), 0) > 0:
        found = step < 0
        for first in range(0, step, _PAST):
            past = first + tl.arange(0, _PAST)
            there = (past < step)[:, None] & inside[None, :]
            tokens = tl.load(SEEN + past[:, None] * L + column[None, :], mask=there, other=-1)
            differ = tl.sum((there & (tokens != held[None, :])).to(tl.int32), 1)
            found |= tl.sum(((past < step) & (differ == 0)).to(tl.int32), 0) > 0
        least = tl.min(tl.where(changing, confidence, float("inf")), 0)
        first_least = tl.min(tl.where(changing & (confidence == least), column, L), 0)
        at = tl.where(found, first_least, at)
    return at


@triton.jit
def _best_new(base, stride_v, vocab, WRITTEN, step, hidden, L: tl.constexpr):
    """The best id of a position, and its logit, but for `hidden` and what earlier steps have written there.

    base: pointer to its logits; WRITTEN: to what step 0 wrote there, later ones' L apart.
    """
    logit = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    for first in range(0, vocab, _AT_ONCE):
        ids = first + tl.arange(0, _AT_ONCE)
        x = tl.load(base + ids.to(tl.int64) * stride_v, mask=ids < vocab, other=_NONE).to(tl.float32)
        x = tl.where(ids == hidden, _NONE, x)
        for past in range(0, step):
            x = tl.where(ids == tl.load(WRITTEN + past * L), _NONE, x)
        best = tl.max(x, 0)
        better = best > logit
        token = tl.where(better, tl.min(tl.where(x == best, ids, _NO_ID), 0), token)
        logit = tl.where(better, best, logit)
    return token, logit


@triton.jit
def _splice(token, chosen, on, kind, ids, column, L: tl.constexpr):
    """Where what stands at a position after a step comes from, whether it is a mask put there instead, and whether any
    position moves. token, chosen: of one row's positions."""
    remove = chosen & on & (token == ids.delete)
    insert = chosen & on & (token == ids.split)
    there = kind != _PADDING
    count = tl.where(there, 1 - remove.to(tl.int32) + insert.to(tl.int32), 0)
    end = tl.cumsum(count, 0)
    source = tl.sum((end[None, :] <= column[:, None]).to(tl.int32), 1)
    source = tl.minimum(source, L - 1)
    first = column == tl.gather(end - count, source, 0)
    blank = ((tl.gather(insert.to(tl.int32), source, 0) != 0) & first) | (column >= tl.sum(count, 0))
    moves = tl.sum((remove | insert).to(tl.int32), 0) > 0
    stays = (moves == 0) | (there == 0)
    return tl.where(stays, column, source), blank & (stays == 0), remove | insert
