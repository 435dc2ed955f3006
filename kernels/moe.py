"""Mixture of experts: the grouped expert MLP behind a router, and the shared expert beside it.

y = cast(sum_k w_k * expert_k(h)) + shared(h)                h [T, H] -> [T, H], w from router.py
expert(h) = down( silu(gate(h)) * up(h) )                    gate_up [E, 2I, H] gate rows first, down [E, H, I]

Products of w_k and their sum are float32, in descending order of choice, with one cast; the shared expert is neither
scaled nor gated and is added in h's dtype. On a GPU three launches: gate_up with its activation for all pairs and the
shared expert, down likewise, and the sum. No atomics; only the experts that some token chose are read.
"""

import torch
import torch.nn.functional as F

from ._triton import tl, triton, use_triton
from .gemm import expert_gemm, rounded, tiles

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


@triton.jit
def _combine_kernel(OUTER, WEIGHTS, SHARED, OUT, H: tl.constexpr, K: tl.constexpr, TILE_H: tl.constexpr):
    """Grid (T, H / TILE_H). OUTER [T * K, H]: what each expert made of its tokens; SHARED [T, H] or None."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    real = h < H
    total = tl.zeros((TILE_H,), tl.float32)
    for k in range(K):
        one = tl.load(OUTER + (t * K + k) * H + h, mask=real, other=0.0).to(tl.float32)
        total += tl.load(WEIGHTS + t * K + k) * one
    if SHARED is not None:
        total = rounded(total, OUT) + tl.load(SHARED + t * H + h, mask=real, other=0.0).to(tl.float32)
    tl.store(OUT + t * H + h, total.to(OUT.dtype.element_ty), mask=real)


def mlp(h, gate_up, down):
    """Dense MLP: h [T, H], gate_up [2I, H] gate rows first, down [H, I] -> [T, H]."""
    return F.linear(gated(F.linear(h, gate_up)), down)


def experts(h, routing, gate_up, down, shared=None):
    """Grouped expert MLP of h [T, H] with weighted sum, plus the shared expert's MLP if shared = (gate_up, down).

    routing: what router.route returned for h; weights as in experts_ref. Returns [T, H] in h's dtype. ValueError if
    shapes do not fit.
    """
    if not use_triton(h):
        y = experts_ref(h, routing.ids, routing.weights, gate_up, down)
        return y if shared is None else y + mlp(h, *shared)
    _check(h, routing, gate_up, down)
    if h.shape[0] == 0:
        return torch.empty_like(h)
    # a shared expert of another width (several in one) is not one more expert of the same product
    alike = shared is not None and shared[0].shape == gate_up.shape[1:]
    size = tiles(h.device, h.shape[1], h.shape[0])
    inner = expert_gemm(h, gate_up, shared[0] if alike else None, routing, True, **size["gate_up"])
    outer = expert_gemm(inner, down, shared[1] if alike else None, routing, False, **size["down"])
    pairs = routing.ids.numel()
    beside = outer[pairs:] if alike else None if shared is None else mlp(h, *shared)
    out = torch.empty_like(outer[: h.shape[0]])
    _combine_kernel[(h.shape[0], triton.cdiv(h.shape[1], 1024))](
        outer, routing.weights, beside, out, H=h.shape[1], K=routing.ids.shape[1], TILE_H=1024, num_warps=4
    )  # fmt: skip
    return out


def _check(h, routing, gate_up, down):
    count, rows, hidden = gate_up.shape
    if h.shape[1] != hidden or h.stride(1) != 1 or h.dtype != gate_up.dtype:
        raise ValueError(f"h: {gate_up.dtype} [T, {hidden}] expected, got {h.dtype} {list(h.shape)}")
    if down.shape != (count, hidden, rows // 2) or down.dtype != gate_up.dtype:
        raise ValueError(f"down: [{count}, {hidden}, {rows // 2}] expected, as gate_up, got {list(down.shape)}")
    if not gate_up.is_contiguous() or not down.is_contiguous():
        raise ValueError("gate_up, down: contiguous weights expected")
    if routing.order is None or len(routing.ids) != len(h):
        raise ValueError(f"routing: one of {len(h)} tokens with tiles expected, as route makes them on a GPU")
