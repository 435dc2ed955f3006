"""Which experts a token goes to, with which weights, and which tokens an expert gets.

s = sigmoid(h32 W32^T);  c = s + bias                        h [T, H], W [E, H] -> [T, E] float32
2.0/2.1: group score = sum of the two largest c of a group; keep the topk_group best groups; top-k of the rest by c
2.2:     per block, admit the `capacity` experts with the largest max_t c, padding left out; top-k of those by c
w = s[ids] (without bias), normalised over the K if K > 1, times `scale`;  ties: the lower expert id

On a GPU also, for grouped products, the pairs p = t * K + k sorted by expert and token, cut into tiles of pairs of one
expert. Two launches up to AT_ONCE tokens (scores; selection, whose last program to finish lists the tiles), else three
(tiles on their own). Nothing is read back and the size of every buffer depends on T alone.
"""

from typing import NamedTuple

import torch

from . import gemm
from ._ambient import run_kernel
from ._triton import tl, triton, use_triton
from .arrivals import arrives_last
from .overlap import inputs_ready
from .product import linear

CHUNK = 512  # of H summed up on its own: a constant, so that a token's bits do not depend on how work was split
# Tokens selected for at a time by one program of 8 warps. A warp executes 1200 instructions for 4 of them, 3500 for 16
# and 6800 for 32 (sm_90), so few go to T / 4 programs: up to FEW, one for each of the 132 multiprocessors. As many
# programs then read the counts of all, 1 KiB at 256 experts: (T / 4)^2 KiB are 16 MiB at FEW, as (T / 16)^2 are at four
# times as many. An H100 routes 32, 64 and 320 tokens of mini in 12.4, 12.6, 19.7 µs by 4, in 11.5, 13.0, 38.3 by 2, in
# 14.0, 14.3, 18.4 by 8. A block's experts are admitted by all of its tokens, at best in one go.
TOKENS = {"few": 4, "many": 16, "block": 32}
FEW = 512
AT_ONCE = 128  # tokens whose pairs one program sorts: more, and a launch of many programs is sooner done
SPLIT_BELOW = 512  # tokens: for fewer, chunks are summed by programs of their own, to occupy the GPU
_LOWEST = tl.constexpr(-(2**63))


class TokenBlocks(NamedTuple):
    """How T packed tokens make blocks: each token's block, and each block's first token.

    Padding has no say in which experts its block is admitted to, and chooses among these.
    """

    ids: torch.Tensor  # [T] int64, ascending
    starts: torch.Tensor  # [blocks] int64
    real: torch.Tensor | None = None  # [T] bool: False for padding; None where there is none


class Routing(NamedTuple):
    """Experts and weights of T tokens; on a GPU also the tiles of pairs for grouped products, else None and 0."""

    ids: torch.Tensor  # [T, K] int64, in descending order of choice
    weights: torch.Tensor  # [T, K] float32
    order: torch.Tensor | None = None  # [T * K] int32: pairs t * K + k by expert, then by token
    tiles: torch.Tensor | None = None  # [bound, 3] int32: expert, first place in order, end of that expert's places
    num_tiles: torch.Tensor | None = None  # [1] int32: how many there are
    tile_m: int = 0  # pairs per tile


def token_blocks(rows, size, length, device=None, real=None):
    """TokenBlocks of `rows` packed rows of `size` tokens in blocks of `length`, the last of a row maybe shorter."""
    blocks = -(-size // length)
    row = torch.arange(rows, device=device)[:, None]
    ids = row * blocks + torch.arange(size, device=device) // length
    return TokenBlocks(ids.flatten(), (row * size + torch.arange(0, size, length, device=device)).flatten(), real)


def route_ref(h, weight, bias, top_k, n_group, topk_group, scale, capacity=None, block=None, real=None):
    """h [T, H]; weight [E, H]; bias [E] float32 -> ids [T, K] int64, weights [T, K] float32.

    capacity selects block routing; block int64 [T] is then each token's block, 0 .. max, and real as of TokenBlocks.
    """
    if h.shape[0] == 0:
        return h.new_empty(0, top_k, dtype=torch.int64), h.new_empty(0, top_k, dtype=torch.float32)
    # not torch.sigmoid, which rounds the last elements of a tensor unlike the others on a CPU: exp does not
    score = 1 / (1 + torch.exp(-linear(h.float(), weight.float())))
    choice = score + bias
    if capacity is not None:
        best = choice.new_full((int(block[-1]) + 1, choice.shape[1]), float("-inf"))  # sync: CPU reference
        heard = choice if real is None else choice.masked_fill(~real[:, None], float("-inf"))
        best.scatter_reduce_(0, block[:, None].expand_as(choice), heard, "amax")
        admitted = _keep_best(best, capacity)[block]
        choice = choice.masked_fill(~admitted, float("-inf"))
    elif topk_group < n_group:
        grouped = choice.unflatten(1, (n_group, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = _keep_best(strength, topk_group)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = score.gather(1, ids)
    if top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def _keep_best(x, count):
    """[N, M] -> bool [N, M]: the `count` largest of each row, ties to the lower index."""
    order = x.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, order, True)


@triton.jit(do_not_specialize=["T"])
def _scores_kernel(
    X, W, LOGITS, DONE, T, x_stride, E: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    WIDEN: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, TILE_H: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (T / TILE_T, E / TILE_E, chunks / CHUNKS). LOGITS [grid 2, T, E]: sums over CHUNKS chunks of H.

    DONE becomes 0, if it is there: the selection counts in it. Products of two bfloat16 or two float16 are exact in
    float32; anything else is widened first.
    """
    inputs_ready(EARLY)
    t = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    e = tl.program_id(1) * TILE_E + tl.arange(0, TILE_E)
    part = tl.program_id(2)
    if DONE is not None:
        if tl.program_id(0) + tl.program_id(1) + part == 0:
            tl.store(DONE, 0)
    real = (e < E)[:, None]
    x_at = X + t[:, None].to(tl.int64) * x_stride
    w_at = W + e[:, None] * H
    total = tl.zeros((TILE_E, TILE_T), tl.float32)
    for chunk in range(part * CHUNKS, (part + 1) * CHUNKS):
        acc = tl.zeros((TILE_E, TILE_T), tl.float32)
        for done in range(0, CHUNK, TILE_H):
            h = chunk * CHUNK + done + tl.arange(0, TILE_H)[None, :]
            x = tl.load(x_at + h, mask=(t < T)[:, None] & (h < H), other=0.0)
            w = tl.load(w_at + h, mask=real & (h < H), other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        total += acc
    place = LOGITS + (part * T + t[None, :]).to(tl.int64) * E + e[:, None]
    tl.store(place, total, mask=real & (t < T)[None, :])


# Selection works on columns: a group's experts side by side, groups and their number filled up to powers of two
# (C = GROUPS * WIDTH columns for G groups of E / G experts).


@triton.jit
def _expert(column, E: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Expert of a column; E if it only fills up."""
    if GROUPS * WIDTH == E:
        return column
    group = column // WIDTH
    member = column % WIDTH
    return tl.where((member < E // G) & (group < G), group * (E // G) + member, E)


@triton.jit
def _column(e, E: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Column of an expert; of -1 none."""
    if GROUPS * WIDTH == E:
        return e
    return tl.where(e < 0, -1, (e // (E // G)) * WIDTH + e % (E // G))


@triton.jit
def _key(x, index, COUNT: tl.constexpr):
    """int64 keys that sort by x and, among equals, put the lower index first: the larger key wins, no two are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (COUNT - 1 - index)


@triton.jit
def _key_value(key):
    """The x of a key."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _sum_parts(LOGITS, t, e, inside, T, E: tl.constexpr, PARTS: tl.constexpr):
    """Logits of tokens t at experts e; parts are added in order."""
    at = LOGITS + t.to(tl.int64) * E + e
    logits = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        logits += tl.load(at + tl.cast(part * T, tl.int64) * E, mask=inside, other=0.0)
    return logits


@triton.jit
def _choice_keys(LOGITS, bias, t, end, column, e, T, E: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr):
    """Keys of c [TOKENS, C]; the lowest of all where there is no such token or expert."""
    inside = (t < end)[:, None] & (e < E)[None, :]
    logits = _sum_parts(LOGITS, t[:, None], e[None, :], inside, T, E, PARTS)
    return tl.where(inside, _key(1.0 / (1.0 + tl.exp(-logits)) + bias[None, :], column[None, :], C), _LOWEST)


@triton.jit
def _only(key, kept, column, C: tl.constexpr):
    """Keys with c = -inf where not kept."""
    out = _key(tl.full(key.shape, float("-inf"), tl.float32), column[None, :], C)
    return tl.where(kept | (key == _LOWEST), key, out)


@triton.jit
def _in_best_groups(
    key, TOKENS: tl.constexpr, G: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """bool [TOKENS, C]: whether a column's group is among the KEEP best of its token."""
    key = tl.reshape(key, (TOKENS, GROUPS, WIDTH))
    best = tl.max(key, 2)
    strength = _key_value(best)
    if WIDTH > 1:
        strength += _key_value(tl.max(tl.where(key == best[:, :, None], _LOWEST, key), 2))
    group = tl.arange(0, GROUPS)[None, :]
    strength_key = tl.where(group < G, _key(strength, group, GROUPS), _LOWEST)
    rank = tl.sum((strength_key[:, None, :] > strength_key[:, :, None]).to(tl.int32), 2)
    kept = tl.broadcast_to((rank < KEEP)[:, :, None], (TOKENS, GROUPS, WIDTH))
    return tl.reshape(kept, (TOKENS, GROUPS * WIDTH))


@triton.jit
def _rank(key, C: tl.constexpr):
    """int32 [C]: how many keys are larger; in slices of 32, so that no [C, C] tile arises."""
    SLICE: tl.constexpr = 32 if C > 32 else C
    slices = tl.reshape(key, (C // SLICE, SLICE))
    row = tl.arange(0, C // SLICE)[:, None]
    rank = tl.zeros((C,), tl.int32)
    for i in range(C // SLICE):
        others = tl.sum(tl.where(row == i, slices, 0), 0)
        rank += tl.sum((others[None, :] > key[:, None]).to(tl.int32), 1)
    return rank


@triton.jit
def _range(STARTS, T, groups, TOKENS: tl.constexpr):
    """First token and end of this program's: a block's if there are STARTS, else TOKENS of them."""
    own = tl.program_id(0)
    if STARTS is None:
        begin = own * TOKENS
        end = tl.minimum(begin + TOKENS, T)
    else:
        begin = tl.load(STARTS + own).to(tl.int32)
        end = tl.load(STARTS + own + 1, mask=own + 1 < groups, other=T).to(tl.int32)
    return begin, end


@triton.jit
def _place_pairs(chosen, columns, t, goes, base, ORDER, K: tl.constexpr, TILE_K: tl.constexpr):
    """Put each pair that `goes` [TOKENS, TILE_K] somewhere behind the `base` [C] of its expert, tokens ascending.

    chosen int32 [TOKENS, C]: 1 where a token chose a column's expert; columns [TOKENS, TILE_K]: of its K choices.
    """
    place = tl.gather(base[None, :] + tl.cumsum(chosen, 0) - chosen, columns, 1)
    k = tl.arange(0, TILE_K)[None, :]
    tl.store(ORDER + place, t[:, None] * K + k, mask=goes)


@triton.jit
def _list_tiles(count, begin, e, TILES, NUM_TILES, TILE_M: tl.constexpr):
    """(expert, first, end) for every TILE_M of the `count` pairs that expert e has from `begin` on."""
    tiles = tl.cdiv(count, TILE_M)
    first = tl.cumsum(tiles, 0) - tiles
    for i in range(0, tl.max(tiles, 0)):
        entry = TILES + (first + i) * 3
        listed = i < tiles
        tl.store(entry, e, mask=listed)
        tl.store(entry + 1, begin + i * TILE_M, mask=listed)
        tl.store(entry + 2, begin + count, mask=listed)
    tl.store(NUM_TILES, tl.sum(tiles, 0))


@triton.jit
def _sort_pairs(IDS, ORDER, TILES, NUM_TILES, pairs, C: tl.constexpr, TILE_P: tl.constexpr, TILE_M: tl.constexpr):
    """ORDER and TILES of all `pairs`, TILE_P at most. A token has an expert once, so pairs sort as their tokens do."""
    p = tl.arange(0, TILE_P)
    real = p < pairs
    expert = tl.load(IDS + p, mask=real, other=-1).to(tl.int32)
    expert = tl.where(expert < 0, C, expert)  # behind all that go somewhere
    count = tl.histogram(expert, C, mask=expert < C)
    _list_tiles(count, tl.cumsum(count, 0) - count, tl.arange(0, C), TILES, NUM_TILES, TILE_M)
    tl.store(ORDER + p, tl.sort(expert * TILE_P + p) % TILE_P, mask=real)


@triton.jit(do_not_specialize=["T", "groups"])
def _select_kernel(
    LOGITS, BIAS, STARTS, REAL, SLOT, IDS, WEIGHTS, COUNTS, DONE, ORDER, TILES, NUM_TILES, T, groups, scale,
    E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, KEEP: tl.constexpr, CAPACITY: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, TILE_P: tl.constexpr, TILE_M: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (groups,) of tokens: blocks if there are STARTS, else TOKENS each. CAPACITY 0: no block routing.

    REAL: as of TokenBlocks. Ids, -1 for tokens whose SLOT is negative, and weights; with COUNTS, how many tokens of the
    group chose each column; without, whoever arrives last, as DONE says, which was 0, sorts the pairs of all, TILE_P at
    most.
    """
    inputs_ready(EARLY)
    C: tl.constexpr = GROUPS * WIDTH
    column = tl.arange(0, C)
    e = _expert(column, E, G, GROUPS, WIDTH)
    bias = tl.load(BIAS + e, mask=e < E, other=0.0).to(tl.float32)
    begin, end = _range(STARTS, T, groups, TOKENS)
    if CAPACITY > 0:
        # where nobody is real all experts are tied, so that a block never has more than its capacity
        race = tl.where(e < E, _key(tl.full((C,), float("-inf"), tl.float32), column, C), _LOWEST)
        for first in range(begin, end, TOKENS):
            t = first + tl.arange(0, TOKENS)
            if REAL is not None:
                t = tl.where(tl.load(REAL + t, mask=t < end, other=0) != 0, t, end)
            race = tl.maximum(race, tl.max(_choice_keys(LOGITS, bias, t, end, column, e, T, E, PARTS, C), 0))
        admitted = (_rank(race, C) < CAPACITY)[None, :]
    counts = tl.zeros((C,), tl.int32)
    for first in range(begin, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        goes = t < end
        if SLOT is not None:
            goes &= tl.load(SLOT + t, mask=goes, other=-1) >= 0
        key = _choice_keys(LOGITS, bias, t, end, column, e, T, E, PARTS, C)
        if CAPACITY > 0:
            key = _only(key, admitted, column, C)
        elif KEEP < G:
            key = _only(key, _in_best_groups(key, TOKENS, G, KEEP, GROUPS, WIDTH), column, C)
        columns = tl.zeros((TOKENS, TILE_K), tl.int32)
        k_column = tl.arange(0, TILE_K)[None, :]
        for k in range(K):
            best = tl.max(key, 1)
            key = tl.where(key == best[:, None], _LOWEST, key)
            columns = tl.where(k_column == k, C - 1 - (best & 0xFFFFFFFF).to(tl.int32)[:, None], columns)
        if COUNTS is not None:
            counts += tl.sum(((key == _LOWEST) & goes[:, None] & (e < E)[None, :]).to(tl.int32), 0)
        inside = (t < end)[:, None] & (k_column < K)
        ids = _expert(columns, E, G, GROUPS, WIDTH)
        # read again rather than kept for all experts: half the registers
        weights = 1.0 / (1.0 + tl.exp(-_sum_parts(LOGITS, t[:, None], ids, inside, T, E, PARTS)))
        if K > 1:
            weights = weights / (tl.sum(tl.where(inside, weights, 0.0), 1) + 1e-20)[:, None]
        place = t[:, None].to(tl.int64) * K + k_column
        tl.store(IDS + place, tl.where(goes[:, None], ids, -1).to(tl.int64), mask=inside)
        tl.store(WEIGHTS + place, tl.where(goes[:, None], weights * scale, 0.0), mask=inside)
    if COUNTS is not None:
        tl.store(COUNTS + tl.program_id(0) * C + column, counts)
    else:
        if arrives_last(DONE, groups):
            _sort_pairs(IDS, ORDER, TILES, NUM_TILES, T * K, C, TILE_P, TILE_M)


@triton.jit(do_not_specialize=["T", "groups"])
def _align_kernel(
    IDS, COUNTS, STARTS, ORDER, TILES, NUM_TILES, T, groups, E: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TILE_K: tl.constexpr, TOKENS: tl.constexpr, TILE_M: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (groups,) as in the selection: every program sums all COUNTS, then places its own tokens' pairs."""
    inputs_ready(EARLY)
    C: tl.constexpr = GROUPS * WIDTH
    begin, end = _range(STARTS, T, groups, TOKENS)
    column = tl.arange(0, C)
    total = tl.zeros((C,), tl.int32)
    before = tl.zeros((C,), tl.int32)
    for first in tl.range(0, groups, 16, num_stages=4):  # three tiles on their way while one is summed
        group = first + tl.arange(0, 16)[:, None]
        counts = tl.load(COUNTS + group * C + column[None, :], mask=group < groups, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(group < tl.program_id(0), counts, 0), 0)
    pairs = tl.cumsum(total, 0) - total
    if tl.program_id(0) == 0:
        _list_tiles(total, pairs, _expert(column, E, G, GROUPS, WIDTH), TILES, NUM_TILES, TILE_M)
    base = pairs + before
    k = tl.arange(0, TILE_K)[None, :]
    for first in range(begin, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        inside = (t < end)[:, None] & (k < K)
        ids = tl.load(IDS + t[:, None].to(tl.int64) * K + k, mask=inside, other=-1).to(tl.int32)
        chosen = tl.zeros((TOKENS, C), tl.int32)
        for i in range(K):
            one = tl.load(IDS + t.to(tl.int64) * K + i, mask=t < end, other=-1).to(tl.int32)
            chosen += (_column(one, E, G, GROUPS, WIDTH)[:, None] == column[None, :]).to(tl.int32)
        _place_pairs(chosen, tl.maximum(_column(ids, E, G, GROUPS, WIDTH), 0), t, ids >= 0, base, ORDER, K, TILE_K)
        base += tl.sum(chosen, 0)


def route(
    h, weight, bias, top_k, n_group, topk_group, scale, capacity=None, block=None, tile_m=None, quantization=None,
    slot=None,
):  # fmt: skip
    """Routing of every token; see route_ref for shapes, but block is a TokenBlocks. ValueError if they do not fit.

    tile_m: most pairs in a tile on a GPU, None = the table's for experts with such weights; slot: int64 [T], negative
    for tokens that nobody reads: on a GPU they go to no expert, their ids are -1.
    """
    if use_triton(h):
        tile_m = tile_m or gemm.tiles(h.device, h.shape[1], h.shape[0], quantization)["tile_m"]
        return launch(h, weight, bias, top_k, n_group, topk_group, scale, capacity, block, tile_m, slot)
    ids, real = (None, None) if block is None else (block.ids, block.real)
    return Routing(*route_ref(h, weight, bias, top_k, n_group, topk_group, scale, capacity, ids, real))


def launch(h, weight, bias, top_k, n_group, topk_group, scale, capacity, block, tile_m, slot):
    (tokens, hidden), experts = h.shape, weight.shape[0]
    if h.stride(1) != 1:
        raise ValueError(f"h: the elements of a row side by side expected, got strides {h.stride()}")
    if weight.shape != (experts, hidden) or not weight.is_contiguous():
        raise ValueError(f"weight: contiguous [E, {hidden}] expected, got {list(weight.shape)}")
    if bias.shape != (experts,) or not bias.is_contiguous():
        raise ValueError(f"bias: contiguous [{experts}] expected, got {list(bias.shape)}")
    if slot is not None and (slot.shape != (tokens,) or slot.dtype != torch.int64 or not slot.is_contiguous()):
        raise ValueError(f"slot: contiguous int64 [{tokens}] expected, got {slot.dtype} {list(slot.shape)}")
    if capacity is not None:
        n_group = topk_group = 1
    if not 1 <= top_k <= topk_group * (experts // n_group) or experts % n_group:
        raise ValueError(f"top_k: 1 to {topk_group} groups of {experts} / {n_group} experts expected, got {top_k}")
    pairs, new = tokens * top_k, h.new_empty
    touched = min(experts, pairs)
    out = Routing(
        new(tokens, top_k, dtype=torch.int64), new(tokens, top_k, dtype=torch.float32), new(pairs, dtype=torch.int32),
        new(touched + (pairs - touched) // tile_m, 3, dtype=torch.int32), new(1, dtype=torch.int32), tile_m,
    )  # fmt: skip
    if tokens == 0:
        return out
    at_once = tokens <= AT_ONCE
    done = new(1, dtype=torch.int32) if at_once else None
    logits = _scores(h, weight, done)
    starts, real = (None, None) if capacity is None else (block.starts, block.real)
    own = TOKENS["block" if starts is not None else "few" if tokens <= FEW else "many"]
    groups = triton.cdiv(tokens, own) if starts is None else len(starts)
    tile = {
        "E": experts, "K": top_k, "G": n_group, "GROUPS": triton.next_power_of_2(n_group),
        "WIDTH": triton.next_power_of_2(experts // n_group), "TILE_K": triton.next_power_of_2(top_k),
        "TOKENS": own, "TILE_M": tile_m, "num_warps": 8,
    }  # fmt: skip
    counts = None if at_once else new(groups, tile["GROUPS"] * tile["WIDTH"], dtype=torch.int32)
    run_kernel(
        _select_kernel, (groups,),
        logits, bias, starts, real, slot, out.ids, out.weights, counts, done, out.order, out.tiles, out.num_tiles,
        tokens, groups, scale,
        KEEP=topk_group, CAPACITY=capacity or 0, PARTS=len(logits),
        TILE_P=triton.next_power_of_2(pairs) if at_once else 0, **tile,
    )  # fmt: skip
    if not at_once:
        run_kernel(
            _align_kernel, (groups,),
            out.ids, counts, starts, out.order, out.tiles, out.num_tiles, tokens, groups, **tile
        )  # fmt: skip
    return out


def _scores(h, weight, done):
    """Logits [parts, T, E] float32, to be added up in order. done: int32 [1] that is to become 0, or None."""
    (tokens, hidden), experts = h.shape, weight.shape[0]
    widen = h.dtype != weight.dtype or h.dtype == torch.float32
    # Triton multiplies float32 in TF32 on sm_100 if the left side has 64 rows or more, whatever input_precision says
    tile_e, tile_h = (32, 32) if widen else (64, 64)
    chunks = triton.cdiv(hidden, CHUNK)
    parts = chunks if tokens < SPLIT_BELOW else 1
    # weights come from memory: of a chunk's 8 steps in 16 bits, six stages ask for five at once, in 72 KiB
    logits = torch.empty(parts, tokens, experts, dtype=torch.float32, device=h.device)
    run_kernel(
        _scores_kernel, (triton.cdiv(tokens, 32), triton.cdiv(experts, tile_e), parts),
        h, weight, logits, done, tokens, h.stride(0), E=experts, H=hidden, CHUNK=CHUNK, CHUNKS=chunks // parts,
        WIDEN=widen, TILE_T=32, TILE_E=tile_e, TILE_H=tile_h, num_warps=4, num_stages=6,
    )  # fmt: skip
    return logits
