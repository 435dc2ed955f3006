"""RMSNorm, alone or behind a residual addition.

    y = cast(x32 * rsqrt(mean(x32^2) + eps), dtype(x)) * weight        x [..., H], weight [H]
    add_rms_norm:  s = x + delta, y = RMSNorm(s); both are returned

Computed in float32 and cast back before the multiplication by the weight, as the model's authors do. delta may be an
ExpertSum (combine.py), which is summed up on the way. All of it is one launch on a GPU.
"""

import torch

from ._ambient import run_kernel
from ._triton import FLOATS, tl, triton, use_triton
from .combine import ExpertSum, sum_experts, summed_ref
from .overlap import inputs_ready

MAX_SIZE = 16384  # a row is one tile of registers


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
    X, DELTA, PAIR_WEIGHTS, BESIDE, WEIGHT, SUM, OUT, eps, rows, x_stride, delta_stride,
    H: tl.constexpr, K: tl.constexpr, TILE_R: tl.constexpr, TILE_H: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows,). DELTA and SUM are None where nothing is added. Of an ExpertSum of K, DELTA is its outer,
    PAIR_WEIGHTS are its weights. Roundings are those of the reference."""
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
        total = x.to(OUT.dtype.element_ty)
        tl.store(SUM + r * H + h, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    unit = (x * scale).to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + r * H + h, (unit * weight).to(OUT.dtype.element_ty), mask=inside)


def rms_norm(x, weight, eps):
    """RMSNorm over the last dimension; see rms_norm_ref for shapes. One launch. ValueError if they do not fit."""
    return launch(x, None, weight, eps)[1] if use_triton(x) else rms_norm_ref(x, weight, eps)


def add_rms_norm(x, delta, weight, eps):
    """x + delta and its RMSNorm; see add_rms_norm_ref for shapes. One launch. ValueError if they do not fit."""
    return launch(x, delta, weight, eps) if use_triton(x) else add_rms_norm_ref(x, delta, weight, eps)


def launch(x, delta, weight, eps):
    size = x.shape[-1]
    if not 0 < size <= MAX_SIZE or x.dtype not in FLOATS:
        raise ValueError(f"x: {FLOATS} of 1 to {MAX_SIZE} in the last dimension expected, got {x.dtype} of {size}")
    if weight.shape != (size,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight: contiguous {x.dtype} [{size}] expected, got {weight.dtype} {list(weight.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if delta is None else torch.empty_like(out)
    added, stride = _addends(x, delta)
    if x.numel() == 0:
        return total, out
    x, meta = _rows(x), norm_tile(size)
    run_kernel(
        _rms_norm_kernel, (triton.cdiv(x.shape[0], meta["TILE_R"]),),
        x, *added, weight, total, out, eps, x.shape[0], x.stride(0), stride,
        K=delta.weights.shape[1] if isinstance(delta, ExpertSum) else 0, **meta
    )  # fmt: skip
    return total, out


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


def norm_tile(size):
    """Compile-time arguments of the kernel for rows of `size` elements; a program takes 2048 elements or one row."""
    tile = triton.next_power_of_2(size)
    return {"H": size, "TILE_R": max(1, 2048 // tile), "TILE_H": tile, "num_warps": min(max(tile // 256, 4), 16)}
