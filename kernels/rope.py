"""QK-norm and partial rotary embedding of a fused projection.

qkv [T, nq + 2 nk, D] -> q [T, nq, D], k [T, nk, D], v [T, nk, D]
q, k = rms_norm over D (if there are weights), then the first `rot` dims rotated, half-split pairing:
[a, b] -> [a cos - b sin, b cos + a sin]; dims rot..D-1 pass through
"""

import torch

from .norm import rms_norm_ref


def rope_angles(position, rotary_dim, theta, factor, dtype):
    """cos and sin [T, rotary_dim] in dtype for int64 positions [T]; angles in float32 whatever the dtype."""
    exponent = torch.arange(0, rotary_dim, 2, device=position.device).float() / rotary_dim
    angle = (position.float() / factor)[:, None] * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, eps, num_heads, num_kv_heads):
    """qkv [T, nq + 2 nk, D]; q_weight, k_weight [D] or None; cos, sin [T, rot] -> q, k, v as above."""
    heads = num_heads + num_kv_heads
    qk, v = qkv[:, :heads], qkv[:, heads:]
    if q_weight is not None:  # both norms in one pass: [nq + nk, D] weights
        weight = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
        qk = rms_norm_ref(qk, weight, eps)
    rot = cos.shape[-1]
    turned = qk[..., :rot]
    half = torch.cat((-turned[..., rot // 2 :], turned[..., : rot // 2]), -1)
    turned = turned * cos[:, None] + half * sin[:, None]
    qk = torch.cat((turned, qk[..., rot:]), -1) if rot < qk.shape[-1] else turned
    return qk[:, :num_heads], qk[:, num_heads:], v


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, eps, num_heads, num_kv_heads):
    """QK-norm and rotary embedding; see qk_norm_rope_ref for shapes."""
    return qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, eps, num_heads, num_kv_heads)
