"""Temperature, top-k and top-p: which ids of a row may be drawn, and how much each weighs.

    weight of v   exp((x_v - max x) / temperature)
    top-k         keeps x_v >= the k-th largest logit; ties kept; off where k <= 0 or k >= V
    top-p         of what is left keeps v iff the mass strictly above x_v is <= p * its mass; ties kept; off at p >= 1

So what is kept is all that reaches one logit, the cut. The kernel finds it exactly, without sorting: a bound from the
maxima and masses of chunks of CHUNK ids, which the pass over the vocabulary left behind, tells which chunks can matter;
the cut is then searched in those alone, PIVOTS values tried in every pass. Passes over them: at most 8 each for top-k
and top-p on bfloat16, 16 on float32, usually half as many, and one more that weighs what is kept.
"""

import torch

from ._triton import tl, triton
from .overlap import inputs_ready
from .philox import _pick, _uniform
from .roles import BAN_EDITS, BAN_MASK, GUIDED, LEVENSHTEIN, WORDS, _locate

CHUNK = 64  # ids; a tile of the vocabulary pass is a whole number of chunks
PIVOTS = 4
GROUP = 32  # chunks that are looked at together
STEP_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # float32 bits that are always zero

_GUIDED, _WORDS = tl.constexpr(GUIDED), tl.constexpr(WORDS)
_HIDE_MASK, _HIDE_EDITS = tl.constexpr(BAN_MASK | LEVENSHTEIN), tl.constexpr(BAN_EDITS | LEVENSHTEIN)
_NONE = tl.constexpr(float("-inf"))
_LOG2E = tl.constexpr(1.4426950408889634)


def cut_ref(x, temperature, top_k, top_p):
    """x [M, V] float32, the others [M] -> cut [M, 1]: the smallest logit kept, -inf where nothing is filtered."""
    vocab = x.shape[1]
    limit = torch.where((top_k > 0) & (top_k < vocab), top_k, 0).long()[:, None]  # 0: off
    temperature, top_p = temperature[:, None], top_p[:, None]
    top = x.amax(-1, keepdim=True)
    total = torch.exp((x - top) / temperature).sum(-1, keepdim=True).double()
    few = min(vocab, max(512, int(limit.max()) + 1))  # sync: the reference alone; enough for most rows
    cut, sure = _cut_among(x.topk(few, -1).values, few == vocab, total, temperature, limit, top_p)
    unsure = torch.where(~sure)[0]
    if unsure.shape[0]:
        ordered = x[unsure].sort(-1, descending=True).values
        rest = (tensor[unsure] for tensor in (total, temperature, limit, top_p))
        cut[unsure] = _cut_among(ordered, True, *rest)[0]
    return cut


def _cut_among(ordered, complete, total, temperature, limit, top_p):
    """The cut [M, 1] as far as each row's largest logits [M, N] tell, and whether they tell all (complete: yes) [M]."""
    at_limit = ordered.gather(1, (limit - 1).clamp(min=0)).masked_fill(limit == 0, float("-inf"))
    mass = torch.exp((ordered - ordered[:, :1]) / temperature).double().masked_fill(ordered < at_limit, 0)
    total = torch.where(limit > 0, mass.sum(-1, keepdim=True), total)
    keep = (mass.cumsum(-1) - mass <= top_p.double() * total) & (ordered >= at_limit)
    keep[:, 0] = True
    nucleus = ordered.gather(1, keep.sum(-1, keepdim=True) - 1)
    cut = torch.where(top_p < 1, nucleus, at_limit)
    all_seen = ordered[:, -1:] < torch.where(limit > 0, at_limit, cut)  # ties at the limit count for the mass
    return cut, (all_seen | ((limit == 0) & (top_p >= 1)) | complete)[:, 0]


@triton.jit
def _scale(temperature):
    """exp((x - y) / temperature) = exp2((x - y) * scale); 0, greedy, counts as 1."""
    return tl.minimum(1.0 / tl.where(temperature > 0, temperature, 1.0) * _LOG2E, 3e38)


@triton.jit
def _finite(top):
    """A maximum to subtract: 0 in place of -inf, so that exp2(-inf - top) is 0."""
    return tl.where(top == _NONE, 0.0, top)


@triton.jit
def _filters(top_k, top_p, vocab):
    """Whether a row that samples filters."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1)


@triton.jit
def _table(CLASSES, BITS, flags, n, row, vocab):
    """What says which ids position n of a row may take: whether the row is guided, its classes, the position's bits."""
    return (flags & _GUIDED) != 0, CLASSES + row.to(tl.int64) * vocab, BITS + n.to(tl.int64) * _WORDS


@triton.jit
def _may_stand(base, ids, there, table):
    """Whether a position whose logits begin at base may take ids, by its _table; undefined where not there."""
    guided, CLASSES, BITS = table
    offset = ids.to(tl.int64)
    if base.dtype.element_ty.primitive_bitwidth == 32:
        # as wide a load as that of the logits: a wider one would change how they lie in threads, and the sums' order
        offset = tl.max_contiguous(offset, [4] if len(ids.shape) == 1 else [1, 4])
    number = tl.load(CLASSES + offset, mask=there & guided, other=0).to(tl.int32)
    word = tl.load(BITS + (number >> 5), mask=there & guided, other=-1)
    return ((word >> (number & 31)) & 1) != 0


@triton.jit
def _hidden(special, flags, EDITS: tl.constexpr):
    """The special ids (SpecialIds) that are no candidates of a row, -1 in place of others: the mask, and with EDITS
    those of deletions and insertions."""
    mask = tl.where((flags & _HIDE_MASK) != 0, special.mask, -1)
    hidden = (mask,)
    if EDITS:  # Triton 3.6 wants all ways to return the same type
        hide = (flags & _HIDE_EDITS) != 0
        hidden = mask, tl.where(hide, special.delete, -1), tl.where(hide, special.split, -1)
    return hidden


@triton.jit
def _load_logits(base, stride_v, ids, there, hidden, table):
    """float32: the logits of ids, -inf where not there, of _hidden ids and where the _table, if any, forbids them."""
    x = tl.load(base + ids.to(tl.int64) * stride_v, mask=there, other=_NONE).to(tl.float32)
    for i in tl.static_range(len(hidden)):
        x = tl.where(ids == hidden[i], _NONE, x)
    if table is not None:
        x = tl.where(_may_stand(base, ids, there, table), x, _NONE)
    return x


@triton.jit
def _draw(base, stride_v, first_id, vocab, hidden, table, mass, top, scale, cut, uniform, CHUNK: tl.constexpr):
    """Inverse CDF in a tile that begins at first_id, from the masses [chunks] of its chunks: the id and its logit.

    Only the chunk that is hit is read. Ids below the cut and those that are left out weigh nothing.
    """
    target = tl.sum(mass, 0) * uniform
    chunk = _pick(mass, target)
    target -= tl.sum(tl.where(tl.arange(0, mass.shape[0]) < chunk, mass, 0.0), 0)
    lane = tl.arange(0, CHUNK)
    ids = first_id + chunk * CHUNK + lane
    there = (ids >= first_id) & (ids < vocab)
    x = _load_logits(base, stride_v, ids, there, hidden, table)
    x = tl.where(x < cut, _NONE, x)
    at = _pick(tl.exp2((x - top) * scale), target)
    return first_id + chunk * CHUNK + at, tl.max(tl.where(lane == at, x, _NONE), 0)


@triton.jit
def _key(x, STEP_BITS: tl.constexpr):
    """float32 (no NaN) -> int64 in the same order; neighbours in the logits' own type differ by 1."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> STEP_BITS).to(tl.int64)


@triton.jit
def _value(key, STEP_BITS: tl.constexpr):
    """The float32 of a key. Compare floats, not keys: two keys are zero."""
    bits = key.to(tl.int32) << STEP_BITS
    return tl.where(bits < 0, bits ^ (0x7FFFFFFF >> STEP_BITS << STEP_BITS), bits).to(tl.float32, bitcast=True)


@triton.jit
def _load_chunks(base, stride_v, LIST, first, count, vocab, hidden, table, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks LIST[first : first + GROUP]: logits float32 [GROUP, CHUNK], -inf past the end; chunk numbers [GROUP]."""
    slot = first + tl.arange(0, GROUP)
    chunk = tl.load(LIST + slot, mask=slot < count, other=0)
    ids = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    there = (slot < count)[:, None] & (ids < vocab)
    return _load_logits(base, stride_v, ids, there, hidden, table), chunk


@triton.jit
def _search(
    base, stride_v, LIST, count, vocab, hidden, table, top, scale, low, least,
    BY_COUNT: tl.constexpr, STEP_BITS: tl.constexpr, PIVOTS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The largest key that enough logits reach, and their mass: in number `least` (BY_COUNT), in mass more than that.

    low: a key known to be reached by enough. The listed chunks hold every logit that reaches it.
    """
    j = tl.arange(0, PIVOTS)
    high = _key(top, STEP_BITS) + 1
    mass_low = tl.full([], 0.0, tl.float32)
    passes = 0
    while (high - low > 1) | (passes == 0):  # keys alone decide, one part in PIVOTS stays: no mass, not NaN, goes on
        pivot = low + (high - low) * j // PIVOTS  # the first is low itself
        value = _value(pivot, STEP_BITS)[:, None, None]
        mass = tl.zeros([PIVOTS], tl.float32)
        number = tl.zeros([PIVOTS], tl.int32)
        for first in tl.range(0, count, GROUP, num_stages=STAGES):
            x, _chunk = _load_chunks(base, stride_v, LIST, first, count, vocab, hidden, table, GROUP, CHUNK)
            weight = tl.exp2((x - top) * scale)
            reach = x[None, :, :] >= value
            mass += tl.sum(tl.sum(tl.where(reach, weight[None, :, :], 0.0), 2), 1)
            if BY_COUNT:
                number += tl.sum(tl.sum(reach.to(tl.int32), 2), 1)
        if BY_COUNT:
            enough = (number >= least) | (j == 0)
        else:
            enough = (mass > least) | (j == 0)
        high = tl.min(tl.where(enough, high, pivot), 0)
        low = tl.max(tl.where(enough, pivot, low), 0)
        mass_low = tl.max(tl.where(enough & (pivot == low), mass, -1.0), 0)
        passes += 1
    return low, mass_low


@triton.jit
def _filter_kernel(
    LOGITS, INDEX, TOKENS, KIND, FROZEN,  # see _locate
    FLAGS, START, STEP, TEMPERATURE, TOP_K, TOP_P, SEED,  # [R]
    CLASSES, BITS,  # Allowed, or None
    PART, PART_ID, CHUNK_MAX, CHUNK_MASS,  # see _vocab_kernel
    CHUNK_LIST,  # int32 [R*L, chunks]: the memory of CHUNK_MAX
    vocab, special, stride_r, stride_l, stride_v, tiles,
    L: tl.constexpr, TILE_V: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
    ONLY_NEEDED: tl.constexpr, RUNNER_UP: tl.constexpr, EDITS: tl.constexpr,
    STEP_BITS: tl.constexpr, PIVOTS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R*L,): draws one position anew among what its row's filters keep; its first part replaces all its parts."""
    inputs_ready(EARLY)
    n = tl.program_id(0)
    row = n // L
    flags = tl.load(FLAGS + row).to(tl.int32)
    base, wanted = _locate(
        LOGITS, INDEX, TOKENS, KIND, FROZEN, flags, special.mask, n, stride_r, stride_l, L, ONLY_NEEDED
    )  # fmt: skip
    temperature = tl.load(TEMPERATURE + row)
    top_k = tl.load(TOP_K + row)
    top_p = tl.load(TOP_P + row)
    if not (wanted & (temperature > 0) & _filters(top_k, top_p, vocab)):
        return
    scale = _scale(temperature)
    hidden = _hidden(special, flags, EDITS)
    table = None
    if CLASSES is not None:
        table = _table(CLASSES, BITS, flags, n, row, vocab)
    plane = tl.num_programs(0) * TILES
    PART += n * TILES
    lane = tl.arange(0, TILES)
    tops = tl.load(PART + lane, mask=lane < tiles, other=_NONE)
    masses = tl.load(PART + plane + lane, mask=lane < tiles, other=0.0)
    top = _finite(tl.max(tops, 0))
    total = tl.sum(masses * tl.exp2((tops - top) * scale), 0)
    if not ((total > 0) & (total < float("inf"))):
        return  # the logits are an error, and the parts say so

    # A lower bound of the cut: k chunks reach it, or all that lies below weighs less than 1 - p
    PER_TILE: tl.constexpr = TILE_V // CHUNK
    by_count = (top_k > 0) & (top_k < vocab)
    chunk = tl.arange(0, TILES * PER_TILE)
    there = chunk < tiles * PER_TILE
    CHUNK_MAX += n * tiles * PER_TILE
    CHUNK_MASS += n * tiles * PER_TILE
    CHUNK_LIST += n * tiles * PER_TILE
    highest = tl.load(CHUNK_MAX + chunk, mask=there, other=_NONE)
    mass = tl.load(CHUNK_MASS + chunk, mask=there, other=0.0)
    mass *= tl.exp2((tl.load(PART + chunk // PER_TILE, mask=there, other=_NONE) - top) * scale)
    low = _key(tl.full([], _NONE, tl.float32), STEP_BITS)
    high = _key(top, STEP_BITS) + 1
    for _ in range(16):  # any lower bound will do
        middle = low + (high - low) // 2
        bound = _value(middle, STEP_BITS)
        reached = tl.sum((highest >= bound).to(tl.int32), 0)
        below = tl.sum(tl.minimum(mass, CHUNK * tl.exp2((bound - top) * scale)), 0)
        holds = tl.where(by_count, reached >= top_k, below < 0.999 * (1 - top_p) * total)
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle)

    listed = there & (highest >= _value(low, STEP_BITS))
    count = tl.sum(listed.to(tl.int32), 0)
    tl.debug_barrier()  # CHUNK_MAX has been read by all threads
    tl.store(CHUNK_LIST + tl.cumsum(listed.to(tl.int32), 0) - 1, chunk, mask=listed)
    tl.debug_barrier()
    if by_count:
        low, total = _search(
            base, stride_v, CHUNK_LIST, count, vocab, hidden, table, top, scale, low, top_k,
            True, STEP_BITS, PIVOTS, GROUP, CHUNK, STAGES,
        )  # fmt: skip
    if top_p < 1:
        low, total = _search(
            base, stride_v, CHUNK_LIST, count, vocab, hidden, table, top, scale, low, top_p * total,
            False, STEP_BITS, PIVOTS, GROUP, CHUNK, STAGES,
        )  # fmt: skip
    cut = _value(low, STEP_BITS)

    kept = tl.zeros([TILES], tl.float32)  # mass of each tile
    for first in tl.range(0, count, GROUP, num_stages=STAGES):
        y, number = _load_chunks(base, stride_v, CHUNK_LIST, first, count, vocab, hidden, table, GROUP, CHUNK)
        part = tl.sum(tl.where(y >= cut, tl.exp2((y - top) * scale), 0.0), 1)
        kept += tl.sum(tl.where((number // PER_TILE)[:, None] == lane[None, :], part[:, None], 0.0), 0)
    seed = tl.load(SEED + row)
    position = tl.load(START + row) + n % L
    step = tl.load(STEP + row)
    total = tl.sum(kept, 0)
    tile = _pick(kept, total * _uniform(seed, position, step, tl.full([], 0, tl.int32)))
    local = tl.arange(0, PER_TILE)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    ids = tile * TILE_V + local
    x = _load_logits(base, stride_v, ids, ids < vocab, hidden, table)
    x = tl.where(x < cut, _NONE, x)
    token, logit = _draw(
        base, stride_v, tile * TILE_V, vocab, hidden, table, tl.sum(tl.exp2((x - top) * scale), 1), top, scale, cut,
        _uniform(seed, position, step, tile + 1), CHUNK,
    )  # fmt: skip

    tl.debug_barrier()  # the parts have been read by all threads
    only = lane == 0
    tl.store(PART + lane, tl.where(only, top, _NONE), mask=lane < tiles)
    tl.store(PART + plane + lane, tl.where(only, total, 0.0), mask=lane < tiles)
    tl.store(PART + 2 * plane, logit)
    tl.store(PART_ID + n * TILES, token)
    if RUNNER_UP:
        for level in tl.static_range(5, 7):
            best = tl.load(PART + level * plane + lane, mask=lane < tiles, other=_NONE)
            tl.store(PART + level * plane + lane, tl.where(best >= cut, best, _NONE), mask=lane < tiles)
