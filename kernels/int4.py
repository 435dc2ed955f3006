"""Group-wise int4 weights (w4a16): 16 levels for each 128 of K with a scale; activations keep their 16 bits.

    scale = the group's value of largest magnitude / -8,  q = round(w / scale) in -8 .. 7        w ~ q * scale
    y = cast(sum over groups of K of (sum_k x q) * scale)        sums in float32

The scale may be negative, so that the largest value (of two the positive one) is met exactly. It has the dtype of the
activations.

A word of 16 bits holds four weights of a row, w[k], w[k + 32], w[k + 64] and w[k + 96] from its lowest digit up, each
as q + 8: so a tile of words is four tiles of weights and nothing must be moved. Words of all rows lie side by side,
group after group, int16 [.., K / 128, N, 32]; scales [.., N, K / 128]. The last group of K may be shorter: what is
beyond it counts as zero and is never multiplied with anything else.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from . import product
from ._ambient import lasting
from .gemm import SCALE_GROUP, WORDS, QuantTensor, num_groups

ZERO = 8  # the digit that stands for 0
DIGITS = 4  # of a word
LANES = SCALE_GROUP // DIGITS  # words of a row's group


def packed_shape(shape):
    """Shape of the words of a weight [.., N, K]."""
    return (*shape[:-2], num_groups(shape[-1]), shape[-2], LANES)


def scale_shape(shape):
    """Shape of the scales of a weight [.., N, K]."""
    return (*shape[:-1], num_groups(shape[-1]))


def pack(digits):
    """digits uint8 [N, K], 0 .. 15 -> words [K / 128, N, 32]."""
    padded = F.pad(digits, (0, -digits.shape[-1] % SCALE_GROUP), value=ZERO)
    parts = padded.view(len(digits), -1, DIGITS, LANES).permute(2, 1, 0, 3).to(WORDS)
    words = parts[0]
    for i in range(1, DIGITS):
        words = words | parts[i] << 4 * i
    return words.contiguous()


def unpack(words, columns):
    """pack's digits: uint8 [N, K] of words [K / 128, N, 32]."""
    parts = [(words >> 4 * i & 15).to(torch.uint8) for i in range(DIGITS)]
    return torch.stack(parts, 2).transpose(0, 1).flatten(1)[:, :columns]


def quantize_weight(weight, dtype=None):
    """weight [.., N, K] of any float type, anywhere -> QuantTensor: words, and scales in `dtype`, None = weight's.

    A group whose scale is too small for the dtype becomes zeros.
    """
    if weight.ndim > 2:  # one after the other, for memory
        return QuantTensor(*map(torch.stack, zip(*(quantize_weight(part, dtype) for part in weight), strict=True)))
    columns = weight.shape[1]
    groups = F.pad(weight.float(), (0, -columns % SCALE_GROUP)).unflatten(1, (-1, SCALE_GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scale = (torch.where(high >= -low, high, low) / -8).to(dtype or weight.dtype)
    divisor = scale.float().masked_fill(scale == 0, torch.inf)
    digits = (groups / divisor[..., None]).round_().clamp_(-8, 7).add_(ZERO).to(torch.uint8).flatten(1)
    return QuantTensor(pack(digits[:, :columns]), scale)


@lru_cache(maxsize=8)
@lasting
def _table(device):
    """int64 [2^16]: the four weights of a word, in bfloat16, by the word + 2^15."""
    word = torch.arange(-(2**15), 2**15, device=device)
    weights = torch.stack([(word >> 4 * i & 15) - ZERO for i in range(DIGITS)], 1)
    return weights.to(torch.bfloat16).view(torch.int64).flatten()


def widen(words, scale, dtype):
    """What words [K / 128, N, 32] and scale [N, K / 128] stand for, with one rounding: `dtype` [N, whole groups of K],
    columns as the words hold them, w[0], w[32], w[64], w[96], w[1], ..

    One look-up per word takes a CPU a third of a second for 10^9 weights, shifts and differences three seconds.
    """
    index = words.transpose(0, 1).to(torch.int32, memory_format=torch.contiguous_format).add_(2**15)
    wide = _table(words.device).index_select(0, index.flatten()).view(torch.bfloat16).to(dtype)
    return wide.view(*scale.shape, SCALE_GROUP).mul_(scale[..., None]).flatten(1)


def as_words_hold(x):
    """The columns of x [.., K] as widen has those of a weight."""
    groups = F.pad(x, (0, -x.shape[-1] % SCALE_GROUP)).unflatten(-1, (-1, DIGITS, LANES))
    return groups.transpose(-1, -2).flatten(-3)


def dequantize_weight(words, scale, columns, dtype=torch.float32):
    """[.., N, K] in `dtype` of what quantize_weight gave; K is `columns`."""
    if words.ndim > 3:
        return torch.stack([dequantize_weight(*one, columns, dtype) for one in zip(words, scale, strict=True)])
    groups = widen(words, scale, dtype).unflatten(1, (-1, LANES, DIGITS))
    return groups.transpose(-1, -2).flatten(1)[:, :columns].contiguous()


def linear_ref(x, words, scale):
    """x [.., K]; words, scale from quantize_weight -> [.., N], all in x's dtype, that of what they stand for too."""
    return product.linear(as_words_hold(x), widen(words, scale, x.dtype))


def check(name, weight, shape):
    """ValueError unless a QuantTensor holds a weight of this shape, contiguous."""
    expected = packed_shape(shape), scale_shape(shape)
    found = tuple(weight.values.shape), tuple(weight.scale.shape)
    if found != expected or not (weight.values.is_contiguous() and weight.scale.is_contiguous()):
        raise ValueError(f"{name}: contiguous words {expected[0]} and scales {expected[1]} expected, got {found}")
