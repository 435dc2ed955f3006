"""Candidates of B blocks of 32 positions and V ids, drawn under top-k and top-p; the peer sorts, as samplers do."""

import torch

from .bench_candidates import case_of as case_of  # of a module of cases
from .bench_candidates import unfiltered


def filtered(logits, start, step, params, ids, *_rest):
    """Probabilities [R, L, V] of what both filters keep."""
    p = unfiltered(logits, start, step, params, ids)
    ordered = p.sort(-1, descending=True).values
    top_k, top_p = params.top_k.long()[:, None, None], params.top_p[:, None, None]
    limit = torch.where(top_k > 0, top_k, p.shape[-1])
    at_limit = ordered.gather(2, (limit - 1).expand(-1, p.shape[1], -1))
    ordered = ordered.masked_fill(ordered < at_limit, 0)
    mass = ordered.cumsum(-1)
    count = (mass - ordered <= top_p * mass[..., -1:]).logical_and(ordered > 0).sum(-1, keepdim=True)
    p = p.masked_fill(p < ordered.gather(2, count - 1), 0)
    return p / p.sum(-1, keepdim=True)


_PEER = filtered, "sort, multinomial"
CASES = {
    "top_k_top_p b1 v4096": ("top_k_top_p", 1, 4096, *_PEER),
    "top_p b1 v32768": ("top_p", 1, 32768, *_PEER),
    "top_k_top_p b8 v32768": ("top_k_top_p", 8, 32768, *_PEER),
    "top_k_top_p b1 v157184": ("top_k_top_p", 1, 157184, *_PEER),
}


def test_filters(timed):
    timed()
