"""Routing of T tokens; on a GPU with the tiles for the grouped products."""

from functools import partial

import torch
import torch.nn.functional as F

from llada2_fast.kernels import router

from ..gpu.gates import require
from .cases import Case, agree


def plain(h, weight, bias, top_k, n_group, topk_group, scale):
    score = torch.sigmoid(F.linear(h.float(), weight.float()))
    grouped = (score + bias).unflatten(1, (n_group, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(topk_group, -1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=h.device).scatter_(1, best, True)
    ids = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(top_k, -1).indices
    weights = score.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * scale


def arguments(machine, config, tokens):
    """What router.route is given for `tokens` random tokens and the router of a config."""
    c = machine.config(config)
    bias = torch.randn(c.num_experts, device=machine.device) * 0.01
    weight = machine.random(c.num_experts, c.hidden_size, std=c.hidden_size**-0.5)
    h = machine.random(tokens, c.hidden_size)
    return h, weight, bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor


def case_of(machine, config, tokens):
    first = arguments(machine, config, tokens)
    h, weight, top_k = first[0], first[1], first[3]
    size = h.nbytes + weight.nbytes + tokens * top_k * (8 + 4)

    def check():
        """The same experts with the same weights; rounding may decide a near-tie otherwise for 1 token in 200."""
        (ids, weights), (wanted_ids, wanted) = router.route(*first)[:2], plain(*first)
        same = (ids == wanted_ids).all(1)
        require("router, share of tokens routed otherwise", 1 - same.float().mean().item(), 0.005)
        agree("router", (weights[same],), (wanted[same],))

    buffers = machine.rotated(partial(arguments, machine, config, tokens), size)
    return Case(router.route, plain, "sigmoid, topk", buffers, size, 2.0 * tokens * weight.numel(), check)


CASES = {
    f"{config} t{tokens}": (config, tokens)
    for config, tokens in (("small", 32), ("mini", 32), ("mini", 1024), ("flash", 32))
}


def test_router(timed):
    timed()
