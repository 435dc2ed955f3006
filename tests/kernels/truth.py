"""What candidates must be, in float64 and one position at a time, straight from the words of the rule."""

import math

import torch

from llada2_fast.kernels.philox import uniform_ref
from llada2_fast.kernels.roles import BAN_MASK, OWN_SOFTMAX

NOT_SURE = 3e-6  # decisions closer than this, as a share of the mass, may go either way in float32


def _pick(weight, uniform):
    """Index and how far, as a share of the total, the draw was from picking another one."""
    cumulative = weight.cumsum(0)
    target = uniform * cumulative[-1]
    index = int(((cumulative > target) & (weight > 0)).nonzero()[0])
    ends = cumulative[weight > 0][:-1]
    return index, math.inf if not len(ends) else float((ends - target).abs().min() / cumulative[-1])


def candidate(x, temperature, top_k, top_p, seed, position, step, mask_id, flags, tile_v, may=None):
    """Token, confidence, runner-up and its confidence, margin, of one position's logits x [V]; None for an error.

    may: bool [V], the ids that it may take, None for all.
    """
    x = x.double() if may is None else x.double().masked_fill(~may, -math.inf)
    if bool((x.isnan() | (x == math.inf)).any()):
        return None
    y = x.clone()
    if flags & BAN_MASK and 0 <= mask_id < len(x):
        y[mask_id] = -math.inf
    if y.max() == -math.inf:
        return None
    if temperature == 0:
        token, margin = int((y == y.max()).nonzero()[0]), math.inf
        share = torch.softmax(x, 0)
    else:
        weight = torch.exp((y - y.max()) / temperature)
        margin = math.inf
        if 0 < top_k < len(x):
            weight[y < y.sort(descending=True).values[top_k - 1]] = 0
        if top_p < 1:
            p = torch.tensor(top_p, dtype=torch.float32).double() * weight.sum()
            value, group = y[weight > 0].unique(return_inverse=True)  # ascending
            mass = torch.zeros_like(value).index_add_(0, group, weight[weight > 0])
            above = mass.flip(0).cumsum(0).flip(0) - mass
            weight[y < value[above <= p].min()] = 0
            margin = float((above[above > 0] - p).abs().min() / p * top_p) if bool((above > 0).any()) else math.inf
        tiles = [part.sum() for part in weight.split(tile_v)]
        tile, at_tile = _pick(torch.stack(tiles), _uniform(seed, position, step, 0))
        inside, at_inside = _pick(weight.split(tile_v)[tile], _uniform(seed, position, step, 1 + tile))
        token, margin = tile * tile_v + inside, min(margin, at_tile, at_inside)
        share = torch.softmax(x, 0) if flags & OWN_SOFTMAX else weight / weight.sum()
        y[weight == 0] = -math.inf
    others = y.clone()
    others[token] = -math.inf
    second = int((others == others.max()).nonzero()[0]) if others.max() > -math.inf else -1
    return token, float(share[token]), second, float(share[second]) if second >= 0 else 0.0, margin


def _uniform(seed, position, step, stream):
    return float(uniform_ref(*(torch.tensor(value) for value in (seed, position, step, stream))))
