"""Logits -> one candidate token and its confidence per position.

    greedy     c = argmax_{v != mask} x_v                  lowest id on ties
               p = exp(x_c) / sum_v exp(x_v)               the mask logit counts in the normaliser
    2.2        the ids of deletions and insertions are left out like the mask: where they count, levenshtein.py sees to
               them
    sampling   the mask logit removed; temperature, top-k, top-p (filters.py); draw c; p = its renormalised probability,
               which a low temperature, k = 1 or a small p makes 1 for every c; under OWN_SOFTMAX p as in greedy
    runner-up  the best id but c of what is left, lowest id on ties, and its probability by the same normaliser

    entropy    H = -sum_v p_v ln p_v of the softmax over all ids at temperature 1, whatever is drawn; of ENTROPY rows

    guided     the same where the ids of classes that the position does not allow have the logit -inf: they are no
               candidates, and p is a share of those that are allowed

    logits [R, L, V], or [M, V] with an index [R, L]; any float type and strides; parameters per row [R]
    -> token [R, L] int64, confidence [R, L] float32. Logits that are an error (NaN, +inf, all that are allowed -inf)
    give token -1 and confidence NaN; positions that were not asked for token -1 and confidence -inf

The draw is a two-level inverse CDF over tiles of TILE_V ids in id order: stream 0 picks the tile, stream 1 + tile the
id inside it. So one pass over the logits can draw without knowing the normaliser; under OWN_SOFTMAX it adds up the mass
at temperature 1, too, and the drawn token's own logit does the rest.

Kernels: _vocab_kernel reads the logits once and leaves each tile's maximum, mass and candidate, its *parts*; where rows
filter, filters.py draws anew and replaces the parts of those positions; whoever wants the candidates combines a
position's parts (_combine): refine.py's commit, or _candidates_kernel. Reads of the logits: 1 for greedy and for
temperature alone; with filters 1, and the chunks of them that reach the cut again. The reference reads them twice.
"""

from typing import NamedTuple

import torch

from ._ambient import run_kernel
from ._triton import register_op, tl, triton, use_triton
from ._tuned import measured
from .filters import (
    _LOG2E,
    CHUNK,
    GROUP,
    PIVOTS,
    STEP_BITS,
    _draw,
    _filter_kernel,
    _filters,
    _finite,
    _hidden,
    _may_stand,
    _scale,
    _table,
    cut_ref,
)
from .overlap import inputs_ready
from .philox import _pick, _uniform, pick_ref, uniform_ref
from .roles import BAN_EDITS, BAN_MASK, ENTROPY, GUIDED, ID_ARGUMENTS, LEVENSHTEIN, OWN_SOFTMAX, SpecialIds, _locate

TILE_V = 4096  # part of the definition of a draw: the same in the reference and in every kernel
_SLAB = 2**19  # logits whose probabilities the reference holds at a time: they stay in a CPU's cache
_WIDTH = 256  # the reference takes maxima of so many ids first: argmax, slow on a CPU, then sees one such tile

NO_ENTROPY = 1e30  # of a position without logits: above every entropy

_OWN_SOFTMAX, _ENTROPY, _NO_ENTROPY = tl.constexpr(OWN_SOFTMAX), tl.constexpr(ENTROPY), tl.constexpr(NO_ENTROPY)
_NONE = tl.constexpr(float("-inf"))
_NO_ID = tl.constexpr(2**31 - 1)


class SampleParams(NamedTuple):
    """Per-row sampling parameters, tensors [R]. temperature 0 = greedy, top_k 0 = off, top_p >= 1 = off."""

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int32
    top_p: torch.Tensor  # float32
    seed: torch.Tensor  # int64


def candidates_ref(logits, row, position, step, params, ids, flags, tile_v=TILE_V, runner_up=False, allowed=None):
    """Candidates of M positions. See the module's text for the rule.

    logits [M, V]; row [M] int64 into the parameters; position [M] int64 absolute; step [M] int64;
    params SampleParams [R]; ids SpecialIds; flags [R] integer, bits BAN_MASK and OWN_SOFTMAX; allowed bool [M, V], the
    ids that each position may take, None for all.
    Returns token [M] int64, confidence [M] float32; with runner_up also the runner-up's, -1 and 0 where there is none.
    """
    if logits.shape[0] == 0:
        nothing = (row.new_empty(0), logits.new_empty(0, dtype=torch.float32))
        return nothing * 2 if runner_up else nothing
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if not bool((params.temperature > 0).any()):  # sync: the reference alone
        return _greedy_ref(logits, _hidden_ref(ids, flags[row], logits.shape[1]), runner_up)
    drawn = torch.where((params.temperature > 0)[row])[0]
    own = (flags[row[drawn]], *(parameter[row[drawn]] for parameter in params))
    slabs = (
        _sample_ref(logits[at], flag, position[at], step[at], SampleParams(*parameters), ids, tile_v, runner_up)
        for at, flag, *parameters in zip(*(tensor.split(_slab_rows(logits)) for tensor in (drawn, *own)), strict=True)
    )
    found = tuple(torch.cat(parts) for parts in zip(*slabs, strict=True))
    if drawn.shape[0] < row.shape[0]:
        whole = _greedy_ref(logits, _hidden_ref(ids, flags[row], logits.shape[1]), runner_up)
        found = tuple(into.index_copy_(0, drawn, part) for into, part in zip(whole, found, strict=True))
    return found


def _slab_rows(logits):
    return max(1, _SLAB // logits.shape[1])


def _hidden_ref(ids, flags, vocab):
    """The special ids that are no candidates, of those that are there: [(id, bool [M]: where)]. flags [M]."""
    bans = (BAN_MASK, BAN_EDITS, BAN_EDITS)
    return [
        (token, (flags & (ban | LEVENSHTEIN)) != 0) for token, ban in zip(ids, bans, strict=True) if 0 <= token < vocab
    ]


def _greedy_ref(logits, hidden, runner_up):
    """hidden: of _hidden_ref. Where none of them is a favourite nothing but the favourite's tile is read again."""
    vocab = logits.shape[1]
    width = min(_WIDTH, vocab)
    tops = _by_parts(torch.amax, logits, width)
    best, token = _first_best(logits, tops, width)
    beaten = any(bool((token == one).any()) for one, _ in hidden)  # sync: the reference alone
    if beaten:
        for home in {one // width for one, _ in hidden}:
            tile = logits[:, home * width : (home + 1) * width].clone()
            for one, where in hidden:
                if one // width == home:
                    tile[:, one % width].masked_fill_(where, float("-inf"))
            tops[:, home] = tile.amax(-1)
        best, token = _first_best(logits, tops, width, hidden)
    confidence = _probability(logits, token)  # NaN where the logits hold NaN or +inf, or nothing but -inf
    if beaten:
        confidence.masked_fill_(best == float("-inf"), float("nan"))
    bad = confidence.isnan()
    if not runner_up:
        return token.masked_fill_(bad, -1), confidence
    others = logits.scatter(1, token[:, None], float("-inf"))
    for one, where in hidden:
        others[:, one].masked_fill_(where, float("-inf"))
    logit, second = others.max(-1)
    none = bad | (logit == float("-inf"))
    share = _probability(logits, second).masked_fill_(none, 0)
    return token.masked_fill_(bad, -1), confidence, second.masked_fill_(none, -1), share


def _first_best(logits, tops, width, hidden=()):
    """Largest logit [M] and its lowest id [M], NaN being the largest; tops [M, tiles]: maxima of `width` ids each."""
    home = tops.max(-1).indices
    ids = home[:, None] * width + torch.arange(width, device=logits.device)
    if logits.shape[1] % width:
        ids.clamp_(max=logits.shape[1] - 1)
    tile = logits.gather(1, ids)
    for one, where in hidden:
        tile.masked_fill_((ids == one) & where[:, None], float("-inf"))
    best, at = tile.max(-1)
    return best, home * width + at


def _probability(logits, token):
    """softmax(logits)[token]: float32 [M]; slab by slab into one buffer, since fresh memory costs more than exp."""
    size = _slab_rows(logits)
    if size >= logits.shape[0]:
        return _share(torch.softmax(logits, -1, dtype=torch.float32), token)
    buffer = logits.new_empty((size, logits.shape[1]), dtype=torch.float32)
    slabs = zip(logits.split(size), token.split(size), strict=True)
    return torch.cat([_share(torch.softmax(x, -1, dtype=torch.float32, out=buffer[: len(x)]), t) for x, t in slabs])


def _share(weight, token):
    """weight[token] as a share of all [M]. softmax is off by up to 3e-4 at V = 157184 on a CPU, by one factor a row."""
    return (weight.gather(1, token[:, None]) / weight.sum(-1, keepdim=True))[:, 0]


def _by_parts(reduce, x, width):
    """reduce over each part of `width` columns of x [M, N], the last may be shorter: [M, parts]."""
    whole = x.shape[1] // width * width
    if not whole:
        return reduce(x, -1, keepdim=True)
    parts = reduce(x[:, :whole].unflatten(1, (-1, width)), -1)
    return parts if whole == x.shape[1] else torch.cat((parts, reduce(x[:, whole:], -1, keepdim=True)), 1)


def _window(weight, part, width):
    """Part number part [M] of weight [M, N]: [M, width], 0 past the end; and its first column [M]."""
    ids = part[:, None] * width + torch.arange(width, device=weight.device)
    inside = weight.gather(1, ids.clamp(max=weight.shape[1] - 1))
    return inside.masked_fill_(ids >= weight.shape[1], 0), ids[:, 0]


def _sample_ref(logits, flags, position, step, params, ids, tile_v, runner_up):
    """Draw from the filtered distributions of logits [M, V]; all else but the last three is [M]."""
    vocab = logits.shape[1]
    own = (flags & OWN_SOFTMAX) != 0
    x = logits.to(torch.float32, copy=True)
    bad = torch.zeros_like(own)
    for one, where in _hidden_ref(ids, flags, vocab):
        bad |= where & ~(x[:, one] < float("inf"))
        x[:, one].masked_fill_(where, float("-inf"))
    top = x.amax(-1, keepdim=True)
    if bool((((params.top_k > 0) & (params.top_k < vocab)) | (params.top_p < 1)).any()):  # sync: the reference alone
        x.masked_fill_(x < cut_ref(x, params.temperature, params.top_k, params.top_p), float("-inf"))
    weight = torch.softmax(x.sub_(top).div_(params.temperature[:, None]), -1)  # NaN where the logits are an error
    masses = _by_parts(torch.sum, weight, CHUNK)
    per_tile = tile_v // CHUNK
    tiles = _by_parts(torch.sum, masses, per_tile)
    tile = pick_ref(tiles, uniform_ref(params.seed, position, step, torch.zeros_like(position)))
    uniform = uniform_ref(params.seed, position, step, tile + 1)
    inside, first = _window(masses, tile, per_tile)
    target = uniform * inside.sum(-1)
    at = pick_ref(inside, uniform)
    chunk = first + at
    target -= (inside.cumsum(-1) - inside).gather(1, at[:, None])[:, 0]
    inside, first = _window(weight, chunk, CHUNK)
    token = (first + pick_ref(inside, target / inside.sum(-1))).clamp_(max=vocab - 1)  # NaN picks anything
    confidence = _share(weight, token).masked_fill_(bad, float("nan"))
    bad = confidence.isnan()
    plain = bool(own.any())  # sync: the reference alone
    if plain:
        confidence = torch.where(own & ~bad, _probability(logits, token), confidence)
    if not runner_up:
        return token.masked_fill_(bad, -1), confidence
    logit, second = x.scatter(1, token[:, None], float("-inf")).max(-1)
    none = bad | (logit == float("-inf"))
    share = _share(weight, second)
    if plain:
        share = torch.where(own, _probability(logits, second), share)
    share.masked_fill_(none, 0)
    return token.masked_fill_(bad, -1), confidence, second.masked_fill_(none, -1), share


def block_candidates_ref(
    logits, start, step, params, ids, flags, index=None, wanted=None, tile_v=TILE_V, runner_up=False, allowed=None
):
    """candidates_ref of blocks: logits [R, L, V], or [M, V] and index [R, L]; start, step [R]; wanted bool [R, L];
    allowed Allowed of the rows that are GUIDED, None if none is.

    Returns tensors [R, L]; positions without logits or not wanted get -1, -inf (and -1, 0).
    """
    shape = logits.shape[:2] if index is None else index.shape
    if index is None:
        logits = logits.flatten(0, 1)
    if index is None and wanted is None:
        at = torch.arange(logits.shape[0], device=logits.device)
    else:
        present = wanted if index is None else index >= 0 if wanted is None else wanted & (index >= 0)
        at = torch.where(present.flatten())[0]
        own = at if index is None else index.flatten()[at]
        if own.shape[0] == logits.shape[0]:  # no copy of the logits: their order instead of the positions'
            at = torch.empty_like(at).index_copy_(0, own, at)
        else:
            logits = logits[own]
    row = at.div(shape[1], rounding_mode="floor")
    where = (row, start[row] + at % shape[1], step[row].long())
    rule = (params, ids, flags, tile_v, runner_up)
    guided = None if allowed is None else ((flags & GUIDED) != 0)[row]
    if guided is None or not bool(guided.any()):  # sync: the reference alone
        found = candidates_ref(logits, *where, *rule)
    else:
        halves = torch.where(~guided)[0], torch.where(guided)[0]
        parts = (
            candidates_ref(logits[half], *(tensor[half] for tensor in where), *rule, allowed=may)
            for half, may in zip(halves, (None, _allowed_ref(allowed, at[guided])), strict=True)
        )
        order = torch.cat(halves)
        both = (torch.cat(found) for found in zip(*parts, strict=True))
        found = tuple(torch.empty_like(tensor).index_copy_(0, order, tensor) for tensor in both)
    if index is None and wanted is None:
        return tuple(tensor.view(shape) for tensor in found)
    nothing = (-1, float("-inf"), -1, 0)
    return tuple(
        torch.full((shape[0] * shape[1],), value, dtype=tensor.dtype, device=at.device)
        .index_copy_(0, at, tensor)
        .view(shape)
        for value, tensor in zip(nothing, found, strict=False)
    )


def entropies_ref(logits, index, wanted, allowed, flags):
    """The entropies of the positions of ENTROPY rows, float32 [R, L] in nats: NO_ENTROPY at others, and at those
    without logits or not wanted. logits, index, allowed: as of block_candidates_ref; wanted: bool [R, L] or None."""
    shape = logits.shape[:2] if index is None else index.shape
    present = ((flags & ENTROPY) != 0)[:, None].expand(shape)
    present = present if wanted is None else present & wanted
    at = torch.where((present if index is None else present & (index >= 0)).flatten())[0]
    rows = logits.flatten(0, 1) if index is None else logits
    found = torch.full((shape[0] * shape[1],), NO_ENTROPY, dtype=torch.float32, device=logits.device)
    for part in at.split(_slab_rows(logits)):
        x = rows[part if index is None else index.flatten()[part]]
        if allowed is not None:
            guided = ((flags & GUIDED) != 0)[part.div(shape[1], rounding_mode="floor")]
            x = x.masked_fill(guided[:, None] & ~_allowed_ref(allowed, part), float("-inf"))
        weight = torch.softmax(x, -1, dtype=torch.float32)
        found[part] = torch.special.entr(weight).sum(-1)
    return found.view(shape)


def _allowed_ref(allowed, at):
    """The ids that positions r * L + l, int64 [M], may take: bool [M, V]."""
    bits = allowed.bits.flatten(0, 1)[at]  # [M, WORDS]
    bit = torch.arange(32, dtype=torch.int32, device=at.device)
    may_stand = ((bits[:, :, None] >> bit) & 1).bool().flatten(1)  # [M, MAX_CLASSES]
    found = at.new_empty((len(at), allowed.classes.shape[1]), dtype=torch.bool)
    row = at.div(allowed.bits.shape[1], rounding_mode="floor")
    for one in row.unique().tolist():  # sync: the reference alone
        own = row == one
        found[own] = may_stand[own][:, allowed.classes[one].long()]
    return found


@triton.jit
def _take_out(x, ids, token, tile, TILE_V: tl.constexpr):
    """The logits x of a tile without that of a token, and this; -inf where it is not among them."""
    logit = tl.full([], float("-inf"), tl.float32)
    if (token >= tile * TILE_V) & (token < (tile + 1) * TILE_V):
        logit = tl.sum(tl.where(ids == token, x, 0.0))  # a sum, since a maximum would lose NaN
        x = tl.where(ids == token, _NONE, x)
    return x, logit


@triton.jit
def _weight_beside(logit, top, scale, sampled):
    """What a logit that was taken out adds to the mass: nothing to that of a draw, but NaN if it is an error."""
    bad = (logit != logit) | (logit == float("inf"))
    return tl.where(sampled, tl.where(bad, float("nan"), 0.0), tl.exp2((logit - top) * scale))


@triton.jit
def _spread(x, top):
    """sum w (x - top) of the weights w = exp(x - top): what an entropy is made of; 0 of logits that weigh nothing."""
    weight = tl.exp2((x - top) * _LOG2E)
    return tl.where(weight > 0, weight * (x - top), 0.0)


@triton.jit
def _vocab_kernel(
    LOGITS, INDEX, TOKENS, KIND, FROZEN,  # see _locate
    FLAGS, START, STEP, TEMPERATURE, TOP_K, TOP_P, SEED,  # [R]
    CLASSES, BITS,  # Allowed, or None
    PART,  # float32 [6 or 7, R*L, TILES]: maximum, mass, candidate's logit; own maximum, own mass; spread (or two best)
    PART_ID,  # int32 [1 or 3, R*L, TILES]: candidate, (two best)
    CHUNK_MAX, CHUNK_MASS,  # float32 [R*L, chunks] of positions that filter; None if no row does
    vocab, special, stride_r, stride_l, stride_v,
    L: tl.constexpr, TILE_V: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
    ONLY_NEEDED: tl.constexpr, RUNNER_UP: tl.constexpr, EDITS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R*L, tiles / SPAN): what each tile of TILE_V ids says about one position, from one read of its logits."""
    inputs_ready(EARLY)
    n = tl.program_id(0)
    begin = tl.program_id(1) * SPAN
    tiles = tl.num_programs(1) if SPAN == 1 else tl.cdiv(vocab, TILE_V)
    row = n // L
    flags = tl.load(FLAGS + row).to(tl.int32)
    base, wanted = _locate(
        LOGITS, INDEX, TOKENS, KIND, FROZEN, flags, special.mask, n, stride_r, stride_l, L, ONLY_NEEDED
    )  # fmt: skip
    if not wanted:
        return
    hidden = _hidden(special, flags, EDITS)
    temperature = tl.load(TEMPERATURE + row)
    sampled = temperature > 0
    scale = _scale(temperature)
    table = None
    if CLASSES is not None:
        table = _table(CLASSES, BITS, flags, n, row, vocab)
    for i in tl.range(0, 1 if SPAN == 1 else tl.minimum(SPAN, tiles - begin), num_stages=STAGES):
        tile = begin + i
        ids = tile * TILE_V + tl.arange(0, TILE_V // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        x = tl.load(base + ids.to(tl.int64) * stride_v, mask=ids < vocab, other=_NONE).to(tl.float32)
        if CLASSES is not None:
            x = tl.where(_may_stand(base, ids, ids < vocab, table), x, _NONE)

        x, mask_logit = _take_out(x, ids, hidden[0], tile, TILE_V)
        left_out = mask_logit  # the largest of these
        if EDITS:
            x, delete_logit = _take_out(x, ids, hidden[1], tile, TILE_V)
            x, split_logit = _take_out(x, ids, hidden[2], tile, TILE_V)
            left_out = tl.maximum(left_out, tl.maximum(delete_logit, split_logit))
        best = tl.max(x)
        first = tl.min(tl.where(x == best, ids, _NO_ID))
        top = tl.where(sampled, best, tl.maximum(best, left_out))
        weight = tl.exp2((x - _finite(top)) * scale)
        beside = _weight_beside(mask_logit, _finite(top), scale, sampled)
        if EDITS:
            beside += _weight_beside(delete_logit, _finite(top), scale, sampled)
            beside += _weight_beside(split_logit, _finite(top), scale, sampled)
        mass = tl.sum(weight) + beside  # NaN if the tile holds NaN or +inf

        plane = tl.num_programs(0) * TILES
        at = n * TILES + tile
        logit = best
        token = first
        if not RUNNER_UP:
            if (flags & _ENTROPY) != 0:
                spread_top = _finite(tl.maximum(best, left_out))
                spread = tl.sum(_spread(x, spread_top)) + _spread(mask_logit, spread_top)
                if EDITS:
                    spread += _spread(delete_logit, spread_top) + _spread(split_logit, spread_top)
                tl.store(PART + 5 * plane + at, spread)
        if sampled:
            if (flags & _OWN_SOFTMAX) != 0:
                own_scale = _scale(tl.full([], 1.0, tl.float32))
                own_top = tl.maximum(best, left_out)
                own_mass = tl.sum(tl.exp2((x - _finite(own_top)) * own_scale))
                own_mass += tl.exp2((mask_logit - _finite(own_top)) * own_scale)
                if EDITS:
                    own_mass += tl.exp2((delete_logit - _finite(own_top)) * own_scale)
                    own_mass += tl.exp2((split_logit - _finite(own_top)) * own_scale)
                tl.store(PART + 3 * plane + at, own_top)
                tl.store(PART + 4 * plane + at, own_mass)
            uniform = _uniform(tl.load(SEED + row), tl.load(START + row) + n % L, tl.load(STEP + row), tile + 1)
            masses = tl.sum(weight, 1)
            token, logit = _draw(
                base, stride_v, tile * TILE_V, vocab, hidden, table, masses, _finite(top), scale, _NONE, uniform, CHUNK
            )  # fmt: skip
            if CHUNK_MAX is not None:
                if _filters(tl.load(TOP_K + row), tl.load(TOP_P + row), vocab):
                    chunk = (n * tiles + tile) * (TILE_V // CHUNK) + tl.arange(0, TILE_V // CHUNK)
                    tl.store(CHUNK_MAX + chunk, tl.max(x, 1))
                    tl.store(CHUNK_MASS + chunk, masses)

        tl.store(PART + at, top)
        tl.store(PART + plane + at, mass)
        tl.store(PART + 2 * plane + at, logit)
        tl.store(PART_ID + at, token)
        if RUNNER_UP:
            others = tl.where(ids == first, _NONE, x)
            second = tl.max(others)
            tl.store(PART + 5 * plane + at, best)
            tl.store(PART + 6 * plane + at, second)
            tl.store(PART_ID + plane + at, first)
            tl.store(PART_ID + 2 * plane + at, tl.min(tl.where(others == second, ids, _NO_ID)))


@triton.jit
def _weigh(TOPS, SPREADS, plane, at, there, scale, asked):
    """Of positions [P]: their largest logit [P], their tiles' masses relative to it [P, TILES], which are in the plane
    behind TOPS, and if asked their spread [P]."""
    tops = tl.load(TOPS + at, mask=there, other=_NONE)
    masses = tl.load(TOPS + plane + at, mask=there, other=0.0)
    top = _finite(tl.max(tops, 1))
    masses *= tl.exp2((tops - top[:, None]) * scale)
    spread = top * 0.0
    if asked:
        below = tops - top[:, None]
        own = tl.exp2(below * scale) * tl.load(SPREADS + at, mask=there, other=0.0)
        spread = tl.sum(tl.where(below == _NONE, 0.0, own + masses * below), 1)
    return top, masses, spread


@triton.jit
def _combine(
    PART, PART_ID, n, wanted, plane, tiles, temperature, flags, by_entropy, seed, position, step, TILES: tl.constexpr
):  # fmt: skip
    """Positions n [P] of one row from their parts: token int32, confidence, largest logit, mass and scale to it; the
    largest logit among those that were candidates; and the entropy, if by_entropy, of an ENTROPY row.

    Token -1 and confidence NaN where the logits are an error, or where not wanted, as is then NO_ENTROPY.
    """
    lane = tl.arange(0, TILES)[None, :]
    at = n[:, None] * TILES + lane
    there = wanted[:, None] & (lane < tiles)
    scale = _scale(temperature)
    SPREADS = PART + 5 * plane
    top, masses, spread = _weigh(PART, SPREADS, plane, at, there, scale, by_entropy & (temperature == 0))
    mass = tl.sum(masses, 1)
    logits = tl.load(PART + 2 * plane + at, mask=there, other=_NONE)
    own = logits == tl.max(logits, 1)[:, None]
    if temperature > 0:
        tile = _pick(masses, (mass * _uniform(seed, position, step, tl.full([], 0, tl.int32)))[:, None])
        own = lane == tile[:, None]
    tokens = tl.load(PART_ID + at, mask=there, other=_NO_ID)
    token = tl.min(tl.where(own, tokens, _NO_ID), 1)
    logit = tl.max(tl.where(own, logits, _NONE), 1)
    bad = (logit == _NONE) | (mass != mass)
    best = tl.where(temperature > 0, top, logit)
    if (temperature > 0) & ((flags & _OWN_SOFTMAX) != 0):
        scale = _scale(tl.full([], 1.0, tl.float32))
        top, masses, spread = _weigh(PART + 3 * plane, SPREADS, plane, at, there, scale, by_entropy)
        mass = tl.sum(masses, 1)
    entropy = tl.where(wanted, tl.log(mass) - spread / mass, _NO_ENTROPY)
    confidence = tl.where(bad, float("nan"), tl.exp2((logit - top) * scale) / mass)
    return tl.where(bad, -1, token), confidence, top, mass, scale, best, entropy


@triton.jit
def _candidates_kernel(
    INDEX, FLAGS, START, STEP, TEMPERATURE, SEED, PART, PART_ID,
    TOKEN, CONFIDENCE, SECOND, SECOND_CONFIDENCE,  # [R, L]; the last two are None without a runner-up
    tiles, L: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R,): the candidates of one row from the parts of its positions."""
    inputs_ready(EARLY)
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    n = row * L + column
    wanted = column < L
    if INDEX is not None:
        wanted &= tl.load(INDEX + n, mask=column < L, other=-1) >= 0
    plane = tl.num_programs(0) * L * TILES
    token, confidence, top, mass, scale, _best, _entropy = _combine(
        PART, PART_ID, n, wanted, plane, tiles, tl.load(TEMPERATURE + row), tl.load(FLAGS + row).to(tl.int32), False,
        tl.load(SEED + row), tl.load(START + row) + column, tl.load(STEP + row), TILES,
    )  # fmt: skip
    tl.store(TOKEN + n, token.to(tl.int64), mask=column < L)
    tl.store(CONFIDENCE + n, tl.where(wanted, confidence, _NONE), mask=column < L)
    if SECOND is not None:
        tile = tl.arange(0, TILES)[None, :]
        at = n[:, None] * TILES + tile
        there = wanted[:, None] & (tile < tiles)
        best_id = tl.load(PART_ID + plane + at, mask=there, other=_NO_ID)
        other_id = tl.load(PART_ID + 2 * plane + at, mask=there, other=_NO_ID)
        best = tl.load(PART + 5 * plane + at, mask=there, other=_NONE)
        other = tl.load(PART + 6 * plane + at, mask=there, other=_NONE)
        taken = best_id == token[:, None]  # then the tile's second best takes part
        best = tl.where(taken, other, best)
        logit = tl.max(best, 1)
        second = tl.min(tl.where(best == logit[:, None], tl.where(taken, other_id, best_id), _NO_ID), 1)
        none = (token < 0) | (logit == _NONE)
        share = tl.exp2((logit - top) * scale) / mass
        tl.store(SECOND + n, tl.where(none, -1, second).to(tl.int64), mask=column < L)
        tl.store(SECOND_CONFIDENCE + n, tl.where(none, 0.0, share), mask=column < L)


def launch_parts(
    logits, index, roles, flags, start, step, params, ids, filters, runner_up=False, tile_v=TILE_V, allowed=None
):
    """The launches that read the logits: parts float32 [6 or 7, R*L, TILES], their ids int32 [1 or 3, ...], and tiles.

    roles: (tokens, kind, frozen) to read only what a step needs, else None. flags: integer [R].
    filters: False if no row has top-k or top-p. allowed: Allowed, None if no row is GUIDED.
    """
    if logits.dtype not in STEP_BITS:
        raise ValueError(f"logits: expected one of {', '.join(map(str, STEP_BITS))}, got {logits.dtype}")
    rows, length = logits.shape[:2] if index is None else index.shape
    vocab = logits.shape[-1]
    stride_r, stride_l, stride_v = logits.stride() if index is None else (logits.stride(0), 0, logits.stride(1))
    tiles = triton.cdiv(vocab, tile_v)
    positions, device = rows * length, logits.device
    room = triton.next_power_of_2(tiles)
    parts = torch.empty((7 if runner_up else 6, positions, room), dtype=torch.float32, device=device)
    part_ids = torch.empty((3 if runner_up else 1, positions, room), dtype=torch.int32, device=device)
    chunks = None, None
    if filters:
        chunks = torch.empty((2, positions, tiles * (tile_v // CHUNK)), dtype=torch.float32, device=device)
    tokens, kind, frozen = (None, None, None) if roles is None else roles
    tables = allowed or (None, None)
    inputs = (logits, index, tokens, kind, frozen, flags, start, step, *params, *tables, parts, part_ids, *chunks)
    shape = {
        "L": length, "TILE_V": tile_v, "CHUNK": CHUNK, "TILES": room, "ONLY_NEEDED": roles is not None,
        "RUNNER_UP": runner_up, "EDITS": ids.edits,
    }  # fmt: skip
    where = (vocab, ids, stride_r, stride_l, stride_v)
    vocab_pass, filter_pass = pass_layout(device, logits.dtype, vocab)
    grid = (positions, triton.cdiv(tiles, vocab_pass["SPAN"]))
    run_kernel(_vocab_kernel, grid, *inputs, *where, **shape, **vocab_pass)
    if filters:
        run_kernel(
            _filter_kernel, (positions,),
            *inputs, chunks[0].view(torch.int32), *where, tiles, **shape,
            STEP_BITS=STEP_BITS[logits.dtype], GROUP=GROUP, **filter_pass,
        )  # fmt: skip
    return parts, part_ids, tiles


def launch(logits, start, step, params, ids, flags, index, filters, runner_up, tile_v=TILE_V, allowed=None):
    rows, length = logits.shape[:2] if index is None else index.shape
    found = _empty(logits, index, runner_up)
    if rows * length == 0:
        return found
    parts, part_ids, tiles = launch_parts(
        logits, index, None, flags, start, step, params, ids, filters, runner_up, tile_v, allowed
    )  # fmt: skip
    columns, num_warps = row_layout(length)
    run_kernel(
        _candidates_kernel, (rows,),
        index, flags, start, step, params.temperature, params.seed, parts, part_ids,
        *found, *(() if runner_up else (None, None)), tiles, length, parts.shape[2], columns, num_warps=num_warps,
    )  # fmt: skip
    return found


def pass_layout(device, dtype, vocab):
    """Launch parameters of the vocabulary pass and of the filter pass: those of the tuned table, or defaults.

    Tuned are warps, the tiles that a program takes one after the other (SPAN), how many loads are in flight (STAGES)
    and the values tried in a pass of a search (PIVOTS): each tile is summed by itself, and a search ends at the same
    cut by any path. Other warps can add a tile up in another order; the tuner then refuses them. TILE_V, CHUNK and
    GROUP are not tuned: the draw is defined over tiles and chunks, and masses are added up chunk by chunk and group by
    group. One entry serves all batches, so that a row's bits do not hang on the others.
    """
    tuned = measured("refine", device, dtype=str(dtype), vocab=vocab)
    vocab_pass = {"SPAN": 1, "STAGES": 1, "num_warps": 8} | tuned.get("vocab_pass", {})
    return vocab_pass, {"PIVOTS": PIVOTS, "STAGES": 1, "num_warps": 8} | tuned.get("filter_pass", {})


def row_layout(length):
    """Columns and warps of a kernel that has the parts of a row's positions side by side."""
    columns = max(16, triton.next_power_of_2(length))
    return columns, 8 if columns <= 32 else 16


def _empty(logits, index, runner_up):
    shape = logits.shape[:2] if index is None else index.shape
    types = (torch.int64, torch.float32) * (2 if runner_up else 1)
    return tuple(logits.new_empty(shape, dtype=dtype) for dtype in types)


def _dispatch(logits, start, step, temperature, top_k, top_p, seed, flags, index, filters, runner_up, *ids):
    params, ids = SampleParams(temperature, top_k, top_p, seed), SpecialIds(*ids)
    if use_triton(logits):
        return list(launch(logits, start, step, params, ids, flags, index, filters, runner_up))
    return list(block_candidates_ref(logits, start, step, params, ids, flags, index, runner_up=runner_up))


def _fake(logits, start, step, temperature, top_k, top_p, seed, flags, index, filters, runner_up, *ids):
    return list(_empty(logits, index, runner_up))


_op = register_op(
    "candidates(Tensor logits, Tensor start, Tensor step, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, "
    f"Tensor flags, Tensor? index, bool filters, bool runner_up, {ID_ARGUMENTS}) -> Tensor[]",
    _dispatch,
    _fake,
)


def candidates(logits, start, step, params, ids, flags, index=None, filters=True, runner_up=False):
    """Candidates of R blocks.

    logits [R, L, V]; or [M, V], and index int64 [R, L] names each position's row of logits, -1 for none.
    start [R] int64: absolute position of a block's first token; step [R] int32; params SampleParams [R];
    ids SpecialIds; flags [R] int32, bits BAN_MASK and OWN_SOFTMAX. filters=False promises that no row has top-k or
    top-p, and saves a launch on a GPU.
    Returns token int64, confidence float32 [R, L]; with runner_up also the runner-up's, -1 and 0 where there is none.
    """
    if (logits.ndim, index is None) not in ((3, True), (2, False)):
        raise ValueError(f"logits: expected [R, L, V], or [M, V] and an index, got {tuple(logits.shape)}")
    return tuple(_op(logits, start, step, *params, flags, index, filters, runner_up, *ids))
