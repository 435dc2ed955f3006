"""Group-scaled fp8 (e4m3): weights with a scale per group of 128 x 128, activations with one per 1 x 128.

    scale = largest magnitude of the group / 448,  q = cast(x / scale)        x ~ q * scale
    y = cast(sum over groups of K of (sum_k q_x q_w) * scale_x * scale_w)        sums in float32

Weights are quantised when they are loaded, activations on the fly, best by the kernel that makes them, as QuantRows.
The layout is that of published checkpoints, whose `weight_scale_inv` is our scale. Linear layers in any precision go
through `linear`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import int4, product
from ._ambient import run_kernel
from ._triton import tl, triton, use_triton
from .dense import dense
from .gemm import SCALE_GROUP, TINY, WORDS, QuantTensor, num_groups, scale_of
from .overlap import inputs_ready

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
_GROUP = tl.constexpr(SCALE_GROUP)
CAPABILITY = (8, 9)  # the first NVIDIA GPUs that multiply fp8


@dataclass(eq=False)
class QuantRows:
    """Activations in fp8, as a kernel that made them has left them for the products that read them."""

    values: torch.Tensor  # e4m3 [T, K]
    scale: torch.Tensor  # float32 [T, K / 128]
    like: torch.Tensor  # [T, K] what was quantised, where something reads that too; else any tensor of its dtype

    def __getitem__(self, rows):
        """Some of the rows, in fp8 alone."""
        return QuantRows(self.values[rows], self.scale[rows], self.like[:0])


def unquantised(x):
    """A tensor is itself, QuantRows are what they were made of."""
    return x.like if isinstance(x, QuantRows) else x


def check_device(device):
    """ValueError if fp8 products cannot run on `device`. On a CPU the reference runs."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, CAPABILITY))
        raise ValueError(f"device: {name} has no fp8 products, compute capability {needed} or higher expected")


def scale_ref(largest):
    """gemm.scale_of for float32 of any shape. A tensor divides: by a number, CUDA multiplies with its reciprocal."""
    return largest.clamp_min(TINY) / largest.new_full((), LARGEST)


def quantize_weight(weight, parts=1):
    """weight [.., N, K] of any float type, anywhere -> QuantTensor: e4m3 [.., N, K], float32 [.., N / 128, K / 128].

    parts: matrices one above the other, each with its own groups: 2 for gate and up.
    """
    if weight.ndim > 2:  # one after the other, for memory
        return QuantTensor(*map(torch.stack, zip(*(quantize_weight(part, parts) for part in weight), strict=True)))
    rows, columns = weight.shape[0] // parts, weight.shape[1]
    size = SCALE_GROUP
    padded = F.pad(weight.float().unflatten(0, (parts, rows)), (0, -columns % size, 0, -rows % size))
    tiles = padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [.., parts, N / 128, 128, K / 128, 128]
    scale = scale_ref(tiles.abs().amax((-3, -1)))
    values = (tiles / scale[..., None, :, None]).to(FP8).flatten(-4, -3).flatten(-2)
    return QuantTensor(values[..., :rows, :columns].flatten(-3, -2).contiguous(), scale.flatten(-3, -2).contiguous())


def dequantize_weight(weight, scale, parts=1):
    """float32 [.., N, K] of what quantize_weight gave."""
    rows, columns = weight.shape[-2] // parts, weight.shape[-1]
    spread = scale.unflatten(-2, (parts, -1)).repeat_interleave(SCALE_GROUP, -2)[..., :rows, :].flatten(-3, -2)
    return weight.float() * spread.repeat_interleave(SCALE_GROUP, -1)[..., :columns]


def quantize_ref(x):
    """x [.., K] -> QuantTensor: e4m3 [.., K], float32 [.., K / 128]."""
    columns = x.shape[-1]
    groups = F.pad(x.float(), (0, -columns % SCALE_GROUP)).unflatten(-1, (-1, SCALE_GROUP))
    scale = scale_ref(groups.abs().amax(-1))
    return QuantTensor((groups / scale[..., None]).to(FP8).flatten(-2)[..., :columns], scale)


def linear_ref(x, weight, scale, parts=1):
    """x [.., K]; weight, scale from quantize_weight -> [.., N] in x's dtype: the product of what they stand for."""
    q = quantize_ref(x)
    wide = q.values.float() * q.scale.repeat_interleave(SCALE_GROUP, -1)[..., : x.shape[-1]]
    return product.linear(wide, dequantize_weight(weight, scale, parts)).to(x.dtype)


@triton.jit
def quantize_groups(x):
    """x [N, 128] float32 -> what is to be cast to e4m3 [N, 128], scales [N]."""
    scale = scale_of(tl.max(tl.abs(x), 1))
    return tl.div_rn(x, scale[:, None]), scale


@triton.jit
def _quantize_kernel(
    X, OUT, SCALE, x_stride, K: tl.constexpr, GROUPS: tl.constexpr, TILE_G: tl.constexpr, EARLY: tl.constexpr
):
    """Grid (rows, GROUPS / TILE_G)."""
    inputs_ready(EARLY)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE_G + tl.arange(0, TILE_G)
    k = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    x = tl.load(X + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    values, scale = quantize_groups(x)
    tl.store(OUT + row * K + k, values.to(OUT.dtype.element_ty), mask=k < K)
    tl.store(SCALE + row * GROUPS + group, scale, mask=group < GROUPS)


def quantize(x):
    """x [T, K] -> QuantTensor; see quantize_ref. One launch."""
    if not use_triton(x):
        return quantize_ref(x)
    rows, columns = x.shape
    groups = num_groups(columns)
    out, scale = x.new_empty(rows, columns, dtype=FP8), x.new_empty(rows, groups, dtype=torch.float32)
    if x.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        tile = min(8, triton.next_power_of_2(groups))
        run_kernel(
            _quantize_kernel, (rows, triton.cdiv(groups, tile)),
            x, out, scale, x.stride(0), K=columns, GROUPS=groups, TILE_G=tile, num_warps=4
        )  # fmt: skip
    return QuantTensor(out, scale)


def quantized(x):
    """x [T, K] in fp8 as QuantRows, which it may be already. One launch or none."""
    return x if isinstance(x, QuantRows) else QuantRows(*quantize(x), x)


def linear(x, weight, scale=None, bias=None, exact=False, wanted=None):
    """x [.., K] -> x W^T (+ bias) [.., N] in x's dtype; weight [N, K] in x's dtype, e4m3 with its scale, or int4.py's.

    exact: on a GPU by our own product, whose rows do not depend on one another; in fp8 there is no other. fp8 on a GPU:
    the product's launch, and one for quantisation unless x comes as QuantRows. wanted: the gemm.Wanted rows, None =
    all; what comes out for others is undefined.
    """
    if isinstance(x, QuantRows):
        y = dense(x, QuantTensor(weight, scale), False, x.like, wanted=wanted).values
    elif use_triton(x) and (exact or scale is not None):
        rows, weight = x.reshape(-1, x.shape[-1]), QuantTensor(weight, scale)
        own = quantize(rows) if weight.quantization == "fp8" else QuantTensor(rows)
        y = dense(own, weight, False, rows, wanted=wanted).values
        y = y.view(*x.shape[:-1], y.shape[1])
    elif scale is None:
        return product.linear(x, weight, bias)
    elif weight.dtype == WORDS:
        y = int4.linear_ref(x, weight, scale)
    else:
        y = linear_ref(x, weight, scale)
    return y if bias is None else y + bias
