"""Mixture of experts: router and grouped expert MLP.

s = sigmoid(h32 W32^T);  c = s + bias                        h [T, H], W [E, H] -> [T, E] float32
2.0/2.1: group score = sum of the two largest c of a group; keep the topk_group best groups; top-k of the rest by c
2.2:     per block, admit the `capacity` experts with the largest max_t c; top-k of those by c
w = s[ids] (without bias), normalised over the K if K > 1, times `scale`;  ties: the lower expert id
y = cast(sum_k w_k * expert_k(h)), products and sum in float32, in descending order of c
expert(h) = down( silu(gate(h)) * up(h) )                    gate_up [E, 2I, H] gate rows first, down [E, H, I]
"""

import torch
import torch.nn.functional as F


def route_ref(h, weight, bias, top_k, n_group, topk_group, scale, capacity=None, block=None):
    """h [T, H]; weight [E, H]; bias [E] float32 -> ids [T, K] int64, weights [T, K] float32.

    capacity selects block routing; block int64 [T] is then each token's block, 0 .. max.
    """
    if h.shape[0] == 0:
        return h.new_empty(0, top_k, dtype=torch.int64), h.new_empty(0, top_k, dtype=torch.float32)
    score = torch.sigmoid(F.linear(h.float(), weight.float()))
    choice = score + bias
    if capacity is not None:
        best = choice.new_full((int(block[-1]) + 1, choice.shape[1]), float("-inf"))  # sync: CPU reference
        best.scatter_reduce_(0, block[:, None].expand_as(choice), choice, "amax")
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


def route(h, weight, bias, top_k, n_group, topk_group, scale, capacity=None, block=None):
    """Experts and weights of every token; see route_ref for shapes."""
    return route_ref(h, weight, bias, top_k, n_group, topk_group, scale, capacity, block)


ROWS = 4  # a CPU's sgemm rounds a row alike at any height that is a multiple of this (measured: MKL, AVX-512)


def experts_ref(h, ids, weights, gate_up, down):
    """h [T, H], ids, weights [T, K] -> [T, H] in h's dtype. Tokens sorted by expert; only touched experts are read.

    Each expert's rows are padded to a multiple of ROWS, so that a token's bits do not depend on how many share its expert.
    """
    tokens, top_k = ids.shape
    if tokens == 0:
        return torch.empty_like(h)
    flat = ids.flatten()
    count = torch.bincount(flat, minlength=gate_up.shape[0])
    padded = (count + ROWS - 1) // ROWS * ROWS
    order = flat.argsort(stable=True)
    shift = (padded.cumsum(0) - padded) - (count.cumsum(0) - count)  # how far padding moves each expert's rows
    slot = torch.empty_like(flat)
    slot[order] = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    sizes = padded.tolist()  # sync: CPU reference
    touched = [(expert, size) for expert, size in enumerate(sizes) if size]
    sizes = [size for _, size in touched]
    x = h.new_zeros(sum(sizes), h.shape[1])
    x[slot] = h.repeat_interleave(top_k, 0)
    inner = torch.cat([F.linear(part, gate_up[e]) for part, (e, _) in zip(x.split(sizes), touched, strict=True)])
    inner = gated(inner)
    outer = torch.cat([F.linear(part, down[e]) for part, (e, _) in zip(inner.split(sizes), touched, strict=True)])
    by_token = outer[slot].view(tokens, top_k, -1)
    return (by_token.float() * weights[..., None]).sum(1).to(h.dtype)


def gated(x):
    """[..., 2I] -> [..., I]: silu of the first half times the second."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def experts(h, ids, weights, gate_up, down):
    """Grouped expert MLP with weighted combine; see experts_ref for shapes."""
    return experts_ref(h, ids, weights, gate_up, down)
