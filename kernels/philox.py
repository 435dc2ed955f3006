"""Counter-based random draws: Philox4x32-10, the same bits in PyTorch and Triton.

    key     = 64-bit seed of the row
    counter = (absolute position, block step, stream, 0)
    uniform = (word >> 8) * 2^-24 + 2^-25          exact in float32, never 0 or 1

A draw depends on its own row's seed, position and step alone: not on batch, slot, cache layout or scheduling.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); known answers of Random123.
"""

import torch

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
    """float32 in (0, 1), shape of the broadcast int64 inputs: the first word of the counter (position, step, stream)."""
    seed, position, step, stream = torch.broadcast_tensors(seed, position, step, stream)
    word = philox4x32_ref(seed, position & _M32, step & _M32, stream & _M32, torch.zeros_like(position))[0]
    return (word >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25
