"""The LLaDA2 MoE network in the form that trains fastest on a CPU, used by `train` and `evaluate` only.

The same function as `llada2_fast.model`, without a cache: experts and shared expert are one wide MLP whose hidden
units are scaled by a mostly-zero routing matrix. That computes every expert for every token, but with constant shapes
and few operations.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, LAYERS, DENSE, EXPERT = 128, 4, 384, 64
HEADS, KV_HEADS, HEAD_DIM, ROTARY = 4, 2, 32, 16
EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 8, 2, 4, 2
BLOCK, EPS, THETA, ROUTED_SCALE = 16, 1e-6, 10000.0, 2.5
EOS_ID, MASK_ID = 0, 1


class Variant(NamedTuple):
    """A generation of the family, as the embedded model has it.

    capacity: experts that the tokens of a block may go to, all of them together; None = chosen token by token.
    edits: it deletes tokens and inserts masks, too, by two ids of their own.
    """

    capacity: int | None
    edits: bool


VARIANTS = {"2.1": Variant(None, False), "2.2": Variant(4, True)}


class RMSNorm(torch.autograd.Function):
    """w * cast(x * rsqrt(mean(x^2) + eps)), cast to x's dtype before the weight; hand-written for few memory passes."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)
        y = (x32 * scale).to(x.dtype)
        ctx.save_for_backward(y, scale, w)
        return y * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, scale, w = ctx.saved_tensors
        y32, g32 = y.float(), (grad * w).float()
        grad_x = scale * (g32 - y32 * (g32 * y32).mean(-1, keepdim=True))
        return grad_x.to(grad.dtype), (grad * y).sum_to_size(w.shape)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [T, 2, I] -> [T, I], without the zero-filled gradients that slicing would make."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x[:, 0]) * x[:, 1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        out[:, 0] = torch.ops.aten.silu_backward(grad * x[:, 1], x[:, 0])
        out[:, 1] = grad * F.silu(x[:, 0])
        return out


def initial_parameters(vocab: int, generator: torch.Generator) -> dict[str, Tensor]:
    """fp32 masters. `in` is [gate, up], `out` the transposed down projection; the shared expert is the last expert."""

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    p = {"embed": normal(vocab, HIDDEN, std=0.3), "head": normal(vocab, HIDDEN, std=0.05), "norm": torch.ones(HIDDEN)}
    for i in range(LAYERS):
        wide = (DENSE,) if i == 0 else (EXPERTS + 1, EXPERT)
        p[f"{i}.qkv"] = normal((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, std=0.06)
        p[f"{i}.dense"] = normal(HIDDEN, HEADS * HEAD_DIM, std=0.02)
        p[f"{i}.norm1"], p[f"{i}.norm2"] = torch.ones(HIDDEN), torch.ones(HIDDEN)
        p[f"{i}.q_norm"], p[f"{i}.k_norm"] = torch.ones(HEAD_DIM), torch.ones(HEAD_DIM)
        p[f"{i}.in"], p[f"{i}.out"] = normal(2, *wide, HIDDEN, std=0.06), normal(*wide, HIDDEN, std=0.02)
        if i:
            p[f"{i}.gate"] = normal(EXPERTS, HIDDEN, std=0.05)
    return {name: w.requires_grad_() for name, w in p.items()}


def route(x: Tensor, gate: Tensor, bias: Tensor, capacity: int | None) -> Tensor:
    """x [T, H] -> fp32 routing weights [T, E], zero outside the top-k of the best groups, or with a capacity of the
    experts that its block of tokens admits."""
    scores = torch.sigmoid(x.float() @ gate.float().T)
    with torch.no_grad():
        choice = scores + bias
        if capacity is None:
            grouped = choice.view(-1, GROUPS, EXPERTS // GROUPS)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(TOP_GROUPS, dim=-1).indices  # [T, topk_group]
        else:
            grouped = choice.view(-1, EXPERTS, 1)
            best = choice.view(-1, BLOCK, EXPERTS).amax(1).topk(capacity, dim=-1).indices  # [T / BLOCK, capacity]
            best = best.repeat_interleave(BLOCK, 0)
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~kept[..., None], -math.inf).view(-1, EXPERTS)
        chosen = torch.zeros_like(choice).scatter_(1, choice.topk(TOP_K, dim=-1).indices, 1.0)
    weights = scores * chosen
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * ROUTED_SCALE


def rotary(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [T, 1, ROTARY / 2] of integer positions [T]."""
    frequency = THETA ** (-torch.arange(0, ROTARY, 2).float() / ROTARY)
    angle = positions.float()[:, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def forward(
    w: dict[str, Tensor],
    biases: Tensor,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor,
    first: int,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits from position `first` on, fp32 [B, T - first, V], and how often each expert was chosen [LAYERS, E].

    ids [B, T], whole blocks; positions [T]; mask [T, T], additive; biases [LAYERS, E], row 0 (the dense layer) unused;
    capacity: of Variant.
    """
    dtype, (rows, length) = w["head"].dtype, ids.shape
    cos, sin = rotary(positions, dtype)
    group = HEADS // KV_HEADS
    mask = mask.to(dtype).repeat(group, 1)
    load = torch.zeros(LAYERS, EXPERTS)
    half, qk = ROTARY // 2, HEADS + KV_HEADS
    x = F.embedding(ids, w["embed"]).to(dtype)
    for i in range(LAYERS):
        h = F.linear(RMSNorm.apply(x, w[f"{i}.norm1"]), w[f"{i}.qkv"]).view(rows, length, qk + KV_HEADS, HEAD_DIM)
        norms = torch.cat([w[f"{i}.q_norm"].expand(HEADS, -1), w[f"{i}.k_norm"].expand(KV_HEADS, -1)])
        r = RMSNorm.apply(h[:, :, :qk], norms)
        a, b = r[..., :half], r[..., half:ROTARY]
        r = torch.cat([a * cos - b * sin, b * cos + a * sin, r[..., ROTARY:]], -1)
        # Query heads of one KV head are folded into the rows of one matmul: [B * KV, group * T, D].
        q = r[:, :, :HEADS].reshape(rows, length, KV_HEADS, group, HEAD_DIM).permute(0, 2, 3, 1, 4)
        q = q.reshape(rows * KV_HEADS, -1, HEAD_DIM)
        k = r[:, :, HEADS:].transpose(1, 2).reshape(rows * KV_HEADS, length, HEAD_DIM)
        v = h[:, :, qk:].transpose(1, 2).reshape(rows * KV_HEADS, length, HEAD_DIM)
        attention = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=HEAD_DIM**-0.5).softmax(-1)
        o = (attention @ v).view(rows, KV_HEADS, group, length, HEAD_DIM).permute(0, 3, 1, 2, 4)
        x = x + F.linear(o.reshape(rows, length, -1), w[f"{i}.dense"])
        h = RMSNorm.apply(x, w[f"{i}.norm2"]).view(rows * length, HIDDEN)
        hidden = SwiGLU.apply(F.linear(h, w[f"{i}.in"].view(-1, HIDDEN)).view(len(h), 2, -1))
        if i:
            weights = route(h, w[f"{i}.gate"], biases[i], capacity)
            load[i] = (weights > 0).sum(0)
            weights = F.pad(weights, (0, 1), value=1.0).to(dtype)  # the shared expert is always on
            hidden = (hidden.view(len(h), EXPERTS + 1, EXPERT) * weights[..., None]).view(len(h), -1)
        x = x + (hidden @ w[f"{i}.out"].view(-1, HIDDEN)).view_as(x)
    return F.linear(RMSNorm.apply(x[:, first:], w["norm"]), w["head"]).float(), load
