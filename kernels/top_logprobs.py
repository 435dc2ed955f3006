"""The k ids of the largest logits of a position, and their log-probabilities.

    log p_v = x_v - log(sum_u exp(x_u))       in float32, at temperature 1, u over all ids
    the largest x_v first, lowest id on ties; under BAN_MASK the mask id counts in the sum and is not listed

So the log-probability of a greedy candidate (candidates.py) is the logarithm of its confidence, and that of a drawn one
under OWN_SOFTMAX as well. Ids of logits that are -inf are not listed. A position whose logits are an error is the
caller's to leave out; what it gets is undefined.

    logits [M, V], of any float type; index [R, L], each position's row of them, negative for none; flags per row [R]
    -> id [R, L, k] int32, log-probability [R, L, k] float32; -1 and -inf where nothing is listed

Kernels: _tile_kernel reads the logits once and leaves each tile's k best ids, its maximum and its mass;
_merge_kernel makes a position's list of them.
"""

import torch

from ._ambient import isolated, run_kernel
from ._triton import tl, triton, use_triton
from .candidates import _NO_ID, _NONE, TILE_V, _slab_rows
from .filters import _finite
from .overlap import inputs_ready
from .roles import BAN_MASK

_BAN_MASK = tl.constexpr(BAN_MASK)


def top_logprobs_ref(
    logits: torch.Tensor, index: torch.Tensor, flags: torch.Tensor, mask_id: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See top_logprobs."""
    rows, length = index.shape
    ids, logprobs = _empty(index, k)
    ids.fill_(-1)
    logprobs.fill_(float("-inf"))
    at = torch.where(index.flatten() >= 0)[0]  # its size is known to the host then: the reference alone
    ban = ((flags & BAN_MASK) != 0)[at // length]
    size = _slab_rows(logits)
    for part, source, hidden in zip(at.split(size), index.flatten()[at].split(size), ban.split(size), strict=True):
        row, rank, token, logprob = _list_ref(logits[source].float(), hidden, mask_id, k)
        ids.view(rows * length, k)[part[row], rank] = token.int()
        logprobs.view(rows * length, k)[part[row], rank] = logprob
    return ids, logprobs


def _list_ref(x, hidden, mask_id, k):
    """What is listed of logits x float32 [N, V], which it changes: row, place in its list, id and log-probability of
    each entry; hidden [N]: the mask id is not listed."""
    top = x.amax(-1, keepdim=True)
    mass = x.sub(top).exp_().sum(-1, keepdim=True).log_()
    if 0 <= mask_id < x.shape[1]:
        x[:, mask_id].masked_fill_(hidden, float("-inf"))
    least = x.topk(min(k, x.shape[1]), -1).values[:, -1:]
    row, token = torch.where((x >= least) & (x > float("-inf")))  # by rising id; more than k where logits tie
    logit = x[row, token]
    order = logit.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, token, logit = row[order], token[order], logit[order]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    row, rank, token, logit = (part[rank < k] for part in (row, rank, token, logit))
    return row, rank, token, logit - top[row, 0] - mass[row, 0]


@triton.jit
def _tile_kernel(
    LOGITS, INDEX, FLAGS,
    TOP, MASS,  # float32 [R*L, TILES]: a tile's largest logit, and what its logits weigh against that
    LOGIT, ID,  # float32, int32 [R*L, TILES, K]: its best, -inf where there are no more
    vocab, mask_id, stride_r, stride_v,
    L: tl.constexpr, TILE_V: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R*L, TILES)."""
    inputs_ready(EARLY)
    n, tile = tl.program_id(0), tl.program_id(1)
    source = tl.load(INDEX + n)
    if source < 0:
        return
    ids = tile * TILE_V + tl.arange(0, TILE_V)
    x = tl.load(LOGITS + source * stride_r + ids.to(tl.int64) * stride_v, mask=ids < vocab, other=_NONE).to(tl.float32)
    at = n.to(tl.int64) * tl.num_programs(1) + tile
    top = tl.max(x)
    tl.store(TOP + at, top)
    tl.store(MASS + at, tl.sum(tl.exp(x - _finite(top))))
    if (tl.load(FLAGS + n // L).to(tl.int32) & _BAN_MASK) != 0:
        x = tl.where(ids == mask_id, _NONE, x)
    for i in tl.range(0, K):
        best = tl.max(x)
        first = tl.min(tl.where(x == best, ids, _NO_ID))
        tl.store(LOGIT + at * K + i, best)
        tl.store(ID + at * K + i, first)
        x = tl.where(ids == first, _NONE, x)


@triton.jit
def _merge_kernel(
    INDEX, TOP, MASS, LOGIT, ID,  # of _tile_kernel
    IDS, LOGPROBS,  # int32, float32 [R*L, K]
    tiles, ROOM: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R*L,): ROOM >= tiles and COLUMNS >= tiles * K are powers of two."""
    inputs_ready(EARLY)
    n = tl.program_id(0).to(tl.int64)
    there = tl.load(INDEX + n) >= 0
    tile, column = tl.arange(0, ROOM), tl.arange(0, COLUMNS)
    tops = tl.load(TOP + n * tiles + tile, mask=there & (tile < tiles), other=_NONE)
    masses = tl.load(MASS + n * tiles + tile, mask=there & (tile < tiles), other=0.0)
    top = tl.max(tops)
    mass = tl.log(tl.sum(masses * tl.exp(tops - _finite(top))))
    inside = there & (column < tiles * K)
    logits = tl.load(LOGIT + n * tiles * K + column, mask=inside, other=_NONE)
    ids = tl.load(ID + n * tiles * K + column, mask=inside, other=_NO_ID)
    for i in tl.range(0, K):
        best = tl.max(logits)
        first = tl.min(tl.where(logits == best, ids, _NO_ID))
        listed = best > _NONE
        tl.store(IDS + n * K + i, tl.where(listed, first, -1))
        tl.store(LOGPROBS + n * K + i, tl.where(listed, best - top - mass, _NONE))
        logits = tl.where(ids == first, _NONE, logits)


def launch(
    logits: torch.Tensor, index: torch.Tensor, flags: torch.Tensor, mask_id: int, k: int, tile_v: int = TILE_V
) -> tuple[torch.Tensor, torch.Tensor]:
    """top_logprobs's launches. tile_v: ids of a tile, a power of two."""
    ids, logprobs = _empty(index, k)
    if not ids.numel():
        return ids, logprobs
    positions, vocab = index.numel(), logits.shape[1]
    tiles = triton.cdiv(vocab, tile_v)
    top, mass = (logprobs.new_empty((positions, tiles)) for _ in range(2))
    logit, own = logprobs.new_empty((positions, tiles, k)), ids.new_empty((positions, tiles, k))
    run_kernel(
        _tile_kernel, (positions, tiles),
        logits, index, flags, top, mass, logit, own, vocab, mask_id, *logits.stride(),
        L=index.shape[1], TILE_V=tile_v, K=k, num_warps=8,
    )  # fmt: skip
    run_kernel(
        _merge_kernel, (positions,),
        index, top, mass, logit, own, ids, logprobs, tiles,
        ROOM=triton.next_power_of_2(tiles), COLUMNS=triton.next_power_of_2(tiles * k), K=k, num_warps=4,
    )  # fmt: skip
    return ids, logprobs


def _empty(index, k):
    shape = (*index.shape, k)
    return index.new_empty(shape, dtype=torch.int32), index.new_empty(shape, dtype=torch.float32)


@isolated
def top_logprobs(
    logits: torch.Tensor, index: torch.Tensor, flags: torch.Tensor, mask_id: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists of the positions of R blocks; two launches on a GPU, which can be captured in a CUDA graph.

    logits: [M, V], of any float type
    index: int64 [R, L], contiguous, each position's row of logits, negative for none
    flags: int32 [R], of which BAN_MASK is read
    mask_id: what BAN_MASK bans
    k: ids of a list, at least 1

    Returns ids int32 [R, L, k], -1 where nothing is listed, and log-probabilities float32 [R, L, k], -inf there. The
    first ones of a list do not depend on k, nor on other positions.
    Raises ValueError on shapes that do not fit, and on k below 1.
    """
    if logits.ndim != 2 or index.ndim != 2 or flags.shape != index.shape[:1] or not index.is_contiguous():
        raise ValueError(
            f"logits, index, flags: expected [M, V], contiguous [R, L], [R], got {list(logits.shape)}, "
            f"{list(index.shape)} with strides {index.stride()}, {list(flags.shape)}"
        )
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1")
    run = launch if use_triton(logits) else top_logprobs_ref
    return run(logits, index, flags, mask_id, k)
