"""RMSNorm, alone or behind a residual addition.

    y = cast(x32 * rsqrt(mean(x32^2) + eps), dtype(x)) * weight        x [..., H], weight [H]
    add_rms_norm:  s = x + delta, y = RMSNorm(s); both are returned

Computed in float32 and cast back before the multiplication by the weight, as the model's authors do.
"""

import torch

from ._ambient import run_kernel
from ._triton import FLOATS, tl, triton, use_triton

MAX_SIZE = 16384  # a row is one tile of registers


def rms_norm_ref(x, weight, eps):
    """x [..., H] any float type, weight [H] -> [..., H] in x's dtype."""
    wide = x.float()
    return (wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).to(x.dtype) * weight


def add_rms_norm_ref(x, delta, weight, eps):
    """x, delta [..., H], weight [H] -> x + delta and its RMSNorm, both [..., H] in x's dtype."""
    x = x + delta
    return x, rms_norm_ref(x, weight, eps)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    X, DELTA, WEIGHT, SUM, OUT, eps, rows, x_stride, delta_stride,
    H: tl.constexpr, TILE_R: tl.constexpr, TILE_H: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows,). DELTA and SUM are None where nothing is added. Roundings are those of the reference."""
    r = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)[:, None]
    h = tl.arange(0, TILE_H)[None, :]
    inside = (r < rows) & (h < H)
    x = tl.load(X + r * x_stride + h, mask=inside, other=0.0).to(tl.float32)
    if DELTA is not None:
        x += tl.load(DELTA + r * delta_stride + h, mask=inside, other=0.0).to(tl.float32)
        total = x.to(OUT.dtype.element_ty)
        tl.store(SUM + r * H + h, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(WEIGHT + h, mask=h < H, other=0.0).to(tl.float32)
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
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(
            f"delta: {x.dtype} {list(x.shape)} expected, as x, got {delta.dtype} {list(delta.shape)}"
        )  # fmt: skip
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if delta is None else torch.empty_like(out)
    if x.numel() == 0:
        return total, out
    x, delta = _rows(x), None if delta is None else _rows(delta)
    meta = norm_tile(size)
    run_kernel(
        _rms_norm_kernel, (triton.cdiv(x.shape[0], meta["TILE_R"]),),
        x, delta, weight, total, out, eps, x.shape[0], x.stride(0), 0 if delta is None else delta.stride(0), **meta
    )  # fmt: skip
    return total, out


def _rows(x):
    """[..., H] -> [N, H] with the elements of a row side by side; copies only what is not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def norm_tile(size):
    """Compile-time arguments of the kernel for rows of `size` elements; a program takes 2048 elements or one row."""
    tile = triton.next_power_of_2(size)
    return {"H": size, "TILE_R": max(1, 2048 // tile), "TILE_H": tile, "num_warps": min(max(tile // 512, 4), 16)}
