"""Logits -> one candidate token and its confidence per position.

    greedy    c = argmax_{v != mask} x_v                  lowest id on ties
              p = exp(x_c) / sum_v exp(x_v)               the mask logit counts in the normaliser
    sampling  z = x / temperature without the mask logit; top-k (ties at the k-th value kept); top-p over what is left
              (v stays iff the mass strictly above x_v is <= top_p; ties kept); draw c; p = its renormalised probability

    logits [M, V] any float type and strides; per-position row index into the [R] parameters
    -> token [M] int64, confidence [M] float32; confidence is NaN where the logits are an error (NaN, +inf, all -inf)

The draw is a two-level inverse CDF over tiles of TILE_V ids in id order: stream 0 picks the tile, stream 1 + tile the id
inside it. So one pass over the logits can draw without knowing the normaliser, and the split never changes the result.
"""

from typing import NamedTuple

import torch

from .philox import uniform_ref

TILE_V = 4096  # part of the definition of a draw: the same in the reference and in every kernel


class SampleParams(NamedTuple):
    """Per-row sampling parameters, tensors [R]. temperature 0 = greedy, top_k 0 = off, top_p >= 1 = off."""

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int32
    top_p: torch.Tensor  # float32
    seed: torch.Tensor  # int64


def candidates_ref(logits, row, position, step, params, mask_id, ban_mask, tile_v=TILE_V):
    """Candidates of M positions. See the module's text for the rule.

    logits [M, V]; row [M] int64 into the parameters; position [M] int64 absolute; step [M] int64;
    params SampleParams [R]; mask_id int; ban_mask [R] bool: the mask id is never a candidate of that row.
    Returns token [M] int64, confidence [M] float32 (NaN: error).
    """
    if logits.shape[0] == 0:
        return row.new_zeros(0), logits.new_zeros(0, dtype=torch.float32)
    token, confidence, top = _greedy_ref(logits, mask_id, ban_mask[row], tile_v)
    temperature = params.temperature[row]
    sampled = temperature > 0
    if bool(sampled.any()):
        at = torch.where(sampled)[0]
        own = row[at]
        token[at], confidence[at] = _sample_ref(
            logits[at].float(), temperature[at], params.top_k[own], params.top_p[own], params.seed[own],
            position[at], step[at], mask_id, ban_mask[own], tile_v,
        )  # fmt: skip
    bad = ~torch.isfinite(top) | torch.isnan(confidence)
    return token, confidence.masked_fill(bad, float("nan"))


def _tile_max(x, tile_v):
    """[M, V] -> [M, tiles]: the largest logit of each tile of ids; vectorised, unlike argmax on a CPU."""
    whole = x.shape[1] // tile_v * tile_v
    parts = [x[:, :whole].unflatten(1, (-1, tile_v)).amax(-1)] if whole else []
    if whole < x.shape[1]:
        parts.append(x[:, whole:].amax(-1, keepdim=True))
    return torch.cat(parts, 1)


def _greedy_ref(logits, mask_id, ban, tile_v):
    """token, confidence, and the largest logit a candidate may have ([M], NaN or inf marks an error)."""
    vocab = logits.shape[1]
    tile_v = min(tile_v, 1024, vocab)  # a small tile: argmax reads one tile only
    tops = _tile_max(logits, tile_v)
    finite = tops.amax(-1)  # over all ids, mask included: NaN and +inf anywhere are an error
    if 0 <= mask_id < vocab:
        home = mask_id // tile_v
        tile = logits[:, home * tile_v : (home + 1) * tile_v].clone()
        inside = tile[:, mask_id - home * tile_v]
        inside.masked_fill_(ban, float("-inf"))
        tops[:, home] = tile.amax(-1)
    best = tops.amax(-1)
    home = tops.argmax(-1)
    ids = (home[:, None] * tile_v + torch.arange(tile_v, device=logits.device)).clamp_(max=vocab - 1)
    tile = logits.gather(1, ids)
    if 0 <= mask_id < vocab:
        tile = tile.masked_fill(ban[:, None] & (ids == mask_id), float("-inf"))
    token = ids.gather(1, tile.argmax(-1, keepdim=True))
    probability = torch.softmax(logits, -1, dtype=torch.float32).gather(1, token)[:, 0]
    best = torch.where(torch.isfinite(finite), best, finite).float()
    return token[:, 0], probability, best


def _sample_ref(x, temperature, top_k, top_p, seed, position, step, mask_id, ban, tile_v):
    """Draw from the filtered distribution of x [M, V] float32; all other arguments [M] but mask_id and tile_v."""
    count, vocab = x.shape
    if 0 <= mask_id < vocab:
        x[:, mask_id] = torch.where(ban, float("-inf"), x[:, mask_id])
    top = x.amax(-1, keepdim=True)
    weight = torch.exp((x - top) / temperature[:, None])
    filters_k = (top_k > 0) & (top_k < vocab)
    filters_p = top_p < 1
    if bool((filters_k | filters_p).any()):
        ordered = torch.sort(x, -1, descending=True).values
        k_at = torch.where(filters_k, top_k, vocab).long() - 1
        cut = ordered.gather(1, k_at[:, None])
        mass = torch.exp((ordered - top) / temperature[:, None]).double().masked_fill(ordered < cut, 0)
        above = mass.cumsum(-1) - mass
        keep = (above <= top_p[:, None].double() * mass.sum(-1, keepdim=True)) & (ordered >= cut)
        keep[:, 0] = True
        nucleus = ordered.gather(1, keep.sum(-1, keepdim=True) - 1)
        cut = torch.where(filters_p[:, None], nucleus, cut)
        weight = weight.masked_fill(x < cut, 0)
    tiles = -(-vocab // tile_v)
    padded = torch.nn.functional.pad(weight, (0, tiles * tile_v - vocab)).view(count, tiles, tile_v)
    masses = padded.sum(-1)
    tile = _pick(masses, uniform_ref(seed, position, step, torch.zeros_like(position)))
    inside = padded.gather(1, tile[:, None, None].expand(-1, 1, tile_v))[:, 0]
    token = tile * tile_v + _pick(inside, uniform_ref(seed, position, step, tile + 1))
    return token, weight.gather(1, token[:, None])[:, 0] / masses.sum(-1)


def _pick(weight, uniform):
    """Inverse CDF: the first index whose cumulative weight exceeds uniform * total; never one of weight zero."""
    cumulative = weight.cumsum(-1)
    beyond = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    positive = weight > 0
    last = weight.shape[1] - 1 - positive.flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(beyond, last)
