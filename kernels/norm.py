"""RMSNorm.

    y = cast(x32 * rsqrt(mean(x32^2) + eps), dtype(x)) * weight        x [..., H], weight [H]

Computed in float32 and cast back before the multiplication by the weight, as the model's authors do.
"""

import torch


def rms_norm_ref(x, weight, eps):
    """x [..., H] any float type, weight [H] -> [..., H] in x's dtype."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x, weight, eps):
    """RMSNorm over the last dimension; see rms_norm_ref for shapes."""
    return rms_norm_ref(x, weight, eps)
