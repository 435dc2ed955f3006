"""Counter-based random draws: Philox4x32-10, the same bits in PyTorch and Triton, and the inverse CDF.

    key     = 64-bit seed of the row
    counter = (absolute position, block step, stream, 0)
    uniform = (word >> 8) * 2^-24 + 2^-25          rounded to float32: never 0, 1 once in 2^24 draws
    pick    = the first index whose cumulative weight exceeds uniform * total; never one of weight zero

A draw depends on its own row's seed, position and step alone: not on batch, lane, cache layout or scheduling.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); known answers of Random123.
"""

import torch

from ._triton import tl, triton

_M32 = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32_ref(seed, c0, c1, c2, c3):
    """Four 32-bit words per counter.

    seed: int64 tensor (all 64 bits are the key); c0..c3: int64 tensors holding uint32 values; all broadcast together.
    Returns four int64 tensors holding uint32 values. int64 products wrap modulo 2^64, so shifts and masks give the
    high and low words of the unsigned product.
    """
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(10):
        pa, pb = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = ((pb >> 32) & _M32) ^ c1 ^ k0, pb & _M32, ((pa >> 32) & _M32) ^ c3 ^ k1, pa & _M32
        k0, k1 = (k0 + _WEYL[0]) & _M32, (k1 + _WEYL[1]) & _M32
    return c0, c1, c2, c3


def uniform_ref(seed, position, step, stream):
    """float32 in (0, 1], shape of the broadcast int64 inputs: the first word of counter (position, step, stream)."""
    seed, position, step, stream = torch.broadcast_tensors(seed, position, step, stream)
    word = philox4x32_ref(seed, position & _M32, step & _M32, stream & _M32, torch.zeros_like(position))[0]
    return (word >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25


def pick_ref(weight, uniform):
    """Inverse CDF of weight [M, N] >= 0 at uniform [M]: int64 [M], 0 where all weights are zero."""
    cumulative = weight.cumsum(-1)
    beyond = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weight > 0)
    first = beyond.to(torch.uint8).argmax(-1)
    last = weight.shape[1] - 1 - (weight > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(beyond.any(-1), first, last)


@triton.jit
def _philox4x32(seed, c0, c1, c2, c3):
    """philox4x32_ref in a kernel: int64 seed, uint32 counters (scalars or tensors that broadcast) -> uint32 words."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        low_a = c0 * a
        low_b = c2 * b
        high_a = tl.umulhi(c0, a)
        c0 = tl.umulhi(c2, b) ^ c1 ^ k0
        c2 = high_a ^ c3 ^ k1
        c1 = low_b
        c3 = low_a
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _uniform(seed, position, step, stream):
    """uniform_ref in a kernel; int64 seed, position, step, stream of any integer type -> float32."""
    zero = tl.full([], 0, tl.uint32)
    word, _w1, _w2, _w3 = _philox4x32(
        seed, position.to(tl.uint32), step.to(tl.uint32), stream.to(tl.uint32), zero
    )  # fmt: skip
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08  # 2^-24, 2^-25


@triton.jit
def _pick(weight, target):
    """Inverse CDF along the last axis: weight [N] or [A, N] >= 0, target [] or [A, 1] = uniform * total.

    int32 [] or [A]: the first index of positive weight whose cumulative weight exceeds the target, else the last of
    positive weight (a parallel prefix sum may step back by a rounding, and must not let a weight of zero through), -1
    where all weights are zero.
    """
    width: tl.constexpr = weight.shape[len(weight.shape) - 1]
    axis: tl.constexpr = len(weight.shape) - 1
    lane = tl.arange(0, width)
    if axis == 1:
        lane = lane[None, :]
    beyond = (weight > 0) & (tl.cumsum(weight, axis) > target)
    first = tl.min(tl.where(beyond, lane, width), axis)
    last = tl.max(tl.where(weight > 0, lane, -1), axis)
    return tl.where(first < width, first, last)
