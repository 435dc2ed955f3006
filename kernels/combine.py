"""What an MoE layer adds to the residual: the weighted sum of what experts made of a token, plus the shared expert's.

y = cast(sum_k w_k outer_k) + beside        outer [T * K, H], w [T, K] float32, beside [T, H] or None -> y [T, H]

Products and their sum are float32, in order of k, with one cast; the last addition is in outer's dtype. On a GPU the
norm that follows makes the sum on its way (norm.py), so that y is neither written nor read again.
"""

from typing import NamedTuple

import torch

from ._ambient import run_kernel
from ._triton import tl, triton, use_triton
from .gemm import rounded
from .overlap import inputs_ready


class ExpertSum(NamedTuple):
    """y before it is summed up."""

    outer: torch.Tensor  # [T * K, H] or more rows: what expert k made of token t is row t * K + k
    weights: torch.Tensor  # [T, K] float32
    beside: torch.Tensor | None = None  # [T, H]


def summed_ref(delta):
    """An ExpertSum -> its y [T, H]; a tensor is itself."""
    if isinstance(delta, torch.Tensor):
        return delta
    outer, weights, beside = delta
    products = outer[: weights.numel()].view(*weights.shape, outer.shape[1]).float() * weights[..., None]
    y = products.sum(1).to(outer.dtype)
    return y if beside is None else y + beside


@triton.jit
def sum_experts(OUTER, WEIGHTS, BESIDE, t, h, real, inside, H: tl.constexpr, K: tl.constexpr):
    """y of tokens t [R, 1], if `real`, at columns h [1, C] where `inside` [R, C], else 0; [R, C] float32."""
    if BESIDE is not None:
        beside = tl.load(BESIDE + t * H + h, mask=inside, other=0.0)
    rows = ()
    weights = ()
    for k in tl.static_range(K - 1, -1, -1):  # the first to be used last: else two or three are asked for at a time
        weights = (tl.load(WEIGHTS + t * K + k, mask=real, other=0.0),) + weights
        rows = (tl.load(OUTER + (t * K + k) * H + h, mask=inside, other=0.0),) + rows
    total = tl.zeros(inside.shape, tl.float32)
    for k in tl.static_range(K):
        total += weights[k] * rows[k].to(tl.float32)
    total = rounded(total, OUTER)
    if BESIDE is not None:
        total = rounded(total + beside.to(tl.float32), OUTER)
    return total


@triton.jit
def _combine_kernel(
    OUTER, WEIGHTS, BESIDE, OUT, H: tl.constexpr, K: tl.constexpr, TILE_H: tl.constexpr, EARLY: tl.constexpr
):
    """Grid (T, H / TILE_H)."""
    inputs_ready(EARLY)
    t = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    h = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)[None, :]
    total = sum_experts(OUTER, WEIGHTS, BESIDE, t, h, tl.full((1, 1), True, tl.int1), h < H, H, K)
    tl.store(OUT + t * H + h, total.to(OUT.dtype.element_ty), mask=h < H)


def summed(delta):
    """An ExpertSum -> its y [T, H]; a tensor is itself. One launch or none."""
    if isinstance(delta, torch.Tensor) or not use_triton(delta.outer):
        return summed_ref(delta)
    (tokens, top_k), hidden = delta.weights.shape, delta.outer.shape[1]
    out = delta.outer.new_empty(tokens, hidden)
    if out.numel():
        run_kernel(
            _combine_kernel, (tokens, triton.cdiv(hidden, 1024)),
            *delta, out, H=hidden, K=top_k, TILE_H=1024, num_warps=4
        )  # fmt: skip
    return out
