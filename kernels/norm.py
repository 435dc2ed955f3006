"""RMSNorm, alone or behind a residual addition.

    y = cast(x32 * rsqrt(mean(x32^2) + eps), dtype(x)) * weight        x [..., H], weight [H]
    add_rms_norm:  s = x + delta, y = RMSNorm(s); both are returned

Computed in float32 and cast back before the multiplication by the weight, as the model's authors do. delta may be an
ExpertSum (combine.py), which is summed up on the way, and y is quantised (fp8.py) where it is read in fp8: all of it
is one launch on a GPU.
"""

import torch

from ._ambient import run_kernel
from ._triton import FLOATS, tl, triton, use_triton
from .combine import ExpertSum, sum_experts, summed_ref
from .fp8 import FP8, QuantRows, num_groups, quantize_groups
from .gemm import SCALE_GROUP, rounded
from .overlap import inputs_ready

MAX_SIZE = 16384  # a row is one tile of registers
_GROUP = tl.constexpr(SCALE_GROUP)


def rms_norm_ref(x, weight, eps):
    """x [..., H] any float type, weight [H] -> [..., H] in x's dtype."""
    wide = x.float()
    return (wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).to(x.dtype) * weight


def add_rms_norm_ref(x, delta, weight, eps):
    """x, delta [..., H] or, if x is [T, H], an ExpertSum, weight [H] -> x + delta and its RMSNorm, both as x is."""
    x = x + summed_ref(delta)
    return x, rms_norm_ref(x, weight, eps)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    X, DELTA, PAIR_WEIGHTS, BESIDE, WEIGHT, SUM, OUT, VALUES, SCALES, eps, rows, x_stride, delta_stride,
    H: tl.constexpr, K: tl.constexpr, TILE_R: tl.constexpr, TILE_H: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows,). DELTA and SUM are None where nothing is added. Of an ExpertSum of K, DELTA is its outer,
    PAIR_WEIGHTS are its weights. OUT, or VALUES and SCALES in fp8, may be None. Roundings are those of the reference.
    """
    inputs_ready(EARLY)
    r = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)[:, None]
    h = tl.arange(0, TILE_H)[None, :]
    real = r < rows if TILE_R > 1 else tl.full((1, 1), True, tl.int1)
    within = h < H if H < TILE_H else tl.full((1, TILE_H), True, tl.int1)
    inside = real & within
    weight = tl.load(WEIGHT + h, mask=within, other=0.0).to(tl.float32)
    x = tl.load(X + r * x_stride + h, mask=inside, other=0.0).to(tl.float32)
    if DELTA is not None:
        if PAIR_WEIGHTS is None:
            x += tl.load(DELTA + r * delta_stride + h, mask=inside, other=0.0).to(tl.float32)
        else:
            x += sum_experts(DELTA, PAIR_WEIGHTS, BESIDE, r, h, real, inside, H, K)
        total = x.to(X.dtype.element_ty)
        tl.store(SUM + r * H + h, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    y = (rounded(x * scale, X) * weight).to(X.dtype.element_ty)
    if OUT is not None:
        tl.store(OUT + r * H + h, y, mask=inside)
    if VALUES is not None:
        TILE_G: tl.constexpr = TILE_H // _GROUP
        GROUPS: tl.constexpr = (H + _GROUP - 1) // _GROUP
        values, scales = quantize_groups(tl.reshape(y.to(tl.float32), (TILE_R * TILE_G, _GROUP)))
        tl.store(VALUES + r * H + h, tl.reshape(values, (TILE_R, TILE_H)).to(VALUES.dtype.element_ty), mask=inside)
        g = tl.arange(0, TILE_G)[None, :]
        tl.store(SCALES + r * GROUPS + g, tl.reshape(scales, (TILE_R, TILE_G)), mask=real & (g < GROUPS))


def rms_norm(x, weight, eps, fp8=False, wide=True):
    """RMSNorm over the last dimension; see rms_norm_ref for shapes. One launch. ValueError if they do not fit.

    fp8: x is [T, H] and y is to be read in fp8; on a GPU it comes as QuantRows, unquantised as well if `wide`.
    """
    return launch(x, None, weight, eps, fp8, wide)[1] if use_triton(x) else rms_norm_ref(x, weight, eps)


def add_rms_norm(x, delta, weight, eps, fp8=False, wide=True):
    """x + delta and its RMSNorm; see add_rms_norm_ref for shapes. One launch. ValueError if they do not fit.

    fp8, wide: as of rms_norm.
    """
    return launch(x, delta, weight, eps, fp8, wide) if use_triton(x) else add_rms_norm_ref(x, delta, weight, eps)


def launch(x, delta, weight, eps, fp8=False, wide=True):
    size = x.shape[-1]
    if not 0 < size <= MAX_SIZE or x.dtype not in FLOATS:
        raise ValueError(f"x: {FLOATS} of 1 to {MAX_SIZE} in the last dimension expected, got {x.dtype} of {size}")
    if weight.shape != (size,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight: contiguous {x.dtype} [{size}] expected, got {weight.dtype} {list(weight.shape)}")
    added, stride = _addends(x, delta)
    new = x.new_empty
    total = None if delta is None else new(x.shape)
    out = new(x.shape) if wide or not fp8 else None
    values = new(x.shape, dtype=FP8) if fp8 else None
    scales = new(*x.shape[:-1], num_groups(size), dtype=torch.float32) if fp8 else None
    if x.numel():
        x, meta = _rows(x), norm_tile(size, fp8)
        run_kernel(
            _rms_norm_kernel, (triton.cdiv(x.shape[0], meta["TILE_R"]),),
            x, *added, weight, total, out, values, scales, eps, x.shape[0], x.stride(0), stride,
            K=delta.weights.shape[1] if isinstance(delta, ExpertSum) else 0, **meta
        )  # fmt: skip
    return total, QuantRows(values, scales, weight if out is None else out) if fp8 else out


def _addends(x, delta):
    """The kernel's (DELTA, PAIR_WEIGHTS, BESIDE) and the stride of DELTA's rows; ValueError if they do not fit x."""
    if delta is None:
        return (None, None, None), 0
    if isinstance(delta, ExpertSum):
        outer, weights, beside = delta
        fits = weights.dim() == 2 and x.shape == (len(weights), outer.shape[-1]) and len(outer) >= weights.numel()
        fits &= beside is None or beside.shape == x.shape
        if not fits or not all(part is None or part.is_contiguous() for part in delta) or outer.dtype != x.dtype:
            shapes = [None if part is None else (part.dtype, *part.shape) for part in delta]
            raise ValueError(f"delta: contiguous sums for {x.dtype} {list(x.shape)} expected, got {shapes}")
        return delta, 0
    if delta.shape != x.shape or delta.dtype != x.dtype:
        raise ValueError(f"delta: {x.dtype} {list(x.shape)} expected, as x, got {delta.dtype} {list(delta.shape)}")
    delta = _rows(delta)
    return (delta, None, None), delta.stride(0)


def _rows(x):
    """[..., H] -> [N, H] with the elements of a row side by side; copies only what is not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def norm_tile(size, fp8=False):
    """Compile-time arguments of the kernel for rows of `size` elements; a program takes 2048 elements or one row."""
    tile = max(triton.next_power_of_2(size), SCALE_GROUP if fp8 else 1)
    return {"H": size, "TILE_R": max(1, 2048 // tile), "TILE_H": tile, "num_warps": min(max(tile // 256, 4), 16)}
