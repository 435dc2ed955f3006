"""Rows times a matrix: y = x W^T (+ b), on a CPU so that a row's bits do not depend on the rows beside it.

    x [M, K], W [N, K], b [N] -> y [M, N]

A library may round a row by how many there are: small heights have kernels of their own, several threads cut the rows
or add up K in another way. What this machine's libraries do is found by a probe, for each shape, type and number of
threads: the heights at which rows come out as they do among 512. A product of another height is padded to the next of
them. Measured with one and two threads, K from 10 to 2048:

    float32, oneDNN, AMD              any height from 2 on, also with its AVX2 and SSE kernels
    float32, MKL, AMD                 from 4 on for most shapes, from 17 on for some; two threads: 4, 8, from 12 on
    float32, MKL, Intel AVX-512       from 3 on at K = 64, from 16 on at K = 2048; two threads: none there
      under MKL_CBWR=AVX512,STRICT    any height
    bfloat16, oneDNN, AMD             any height from 2 on; PyTorch, which computes small products itself, from 3 or 5
                                      on, or at no height where N and K are below 32
    bfloat16, Intel AMX               hardly any height at K >= 512; all under ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16

Where no height will do nothing is padded and `Rows.least` is None: there a row's bits depend on its batch. On a GPU
these products are cuBLAS's, which picks kernels by M; a network that is `exact` takes those of dense.py instead.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

TALL = 512  # rows of the product that the others are compared with
# Tried: the first, and where one fails the others as well. A single row has a routine of its own: it is always padded.
_SMALL = 32
_FIRST = (2, 3, 5, 8, 13, 21, 33, 64, 100, 255)
_HEIGHTS = (*range(2, _SMALL + 1), 33, 40, 47, 48, 63, 64, 100, 128, 255, 256, 384)
_MOST = 64  # rows that anything is padded to
_SIZE = 2**22  # elements of the largest matrix that is tried; of larger ones that many
_LITTLE = 2**16  # elements of a matrix for which MKL's call takes half the time of oneDNN's at 8 rows (8 and 15 us)


class Rows(NamedTuple):
    """How products of one shape are computed on this machine, and at which heights a row's bits are the same."""

    library: str  # "onednn" or "torch"
    product: Callable  # (x [M, K], W [N, K], b [N] or None) -> [M, N]
    least: int | None  # any height from this on will do; None: no height does
    padded: tuple[int, ...]  # M -> the height that M rows are padded to, for M < least

    def __call__(self, x, weight, bias=None):
        """x [M, K], weight [N, K], bias [N] or None -> [M, N]."""
        count = x.shape[0]  # len(x) takes a microsecond
        if count < len(self.padded) and self.padded[count] > count:
            return self.product(F.pad(x, (0, 0, 0, self.padded[count] - count)), weight, bias)[:count]
        return self.product(x, weight, bias)

    def into(self, x, weight, out):
        """The same, without a bias, to out [M, N]."""
        if self.library == "torch" and x.shape[0] >= len(self.padded):
            torch.mm(x, weight.T, out=out)
        else:
            out.copy_(self(x, weight))


def _onednn_takes(dtype):
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _onednn(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_UNKNOWN = Rows("torch", F.linear, None, ())
_forced = None  # "padded" or "as they are": PyTorch's own products


@contextmanager
def torch_products(padded=True):
    """For comparisons: within it all products are PyTorch's own; unpadded they make the same calls on every machine."""
    global _forced
    before, _forced = _forced, "padded" if padded else "as they are"
    try:
        yield
    finally:
        _forced = before


def linear(x, weight, bias=None):
    """x [.., K], weight [N, K], bias [N] or None, all of one float type -> x W^T (+ b) [.., N]."""
    y = rows_of(weight)(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def rows_of(weight, dtype=None):
    """Rows for products with weight [.., N, K] in `dtype`, None = its own, with as many threads as now. On a GPU
    and under torch.compile nothing is known and nothing padded."""
    if weight.device.type != "cpu" or _forced == "as they are" or torch.compiler.is_compiling():
        return _UNKNOWN
    onednn = torch.backends.mkldnn.enabled and _forced is None
    setting = torch.get_num_threads(), torch.get_float32_matmul_precision(), onednn
    return _rows(*weight.shape[-2:], dtype or weight.dtype, *setting)


@cache
def _rows(width, depth, dtype, threads, precision, onednn):
    """The first library that needs next to no padding, else the one that needs the least.

    In 16 bits PyTorch asks oneDNN by itself, but for the smallest products, which is what makes their rows differ."""
    libraries = [("torch", F.linear)]
    if onednn and _onednn_takes(dtype):
        first = dtype == torch.float32 and width * depth > _LITTLE
        libraries.insert(0 if first else 1, ("onednn", _onednn))
    tried = []
    for library, product in libraries:
        tried.append(Rows(library, product, *_probe(product, width, depth, dtype)))
        if (tried[-1].least or TALL) <= 4:
            return tried[-1]
    return min(tried, key=lambda rows: rows.least or TALL)


@torch.no_grad()
def _probe(product, width, depth, dtype):
    """(least, padded) of Rows for products of this shape.

    Half of a row's terms cancel the other half, so that what is left is what rounding has made: of random rows, 16 bits
    hide nearly every difference.
    """
    generator, half = torch.Generator().manual_seed(0), depth // 2
    order = torch.randperm(depth, generator=generator, device="cpu")
    x, weight = (
        torch.randn(rows, depth, generator=generator, dtype=torch.float32, device="cpu")
        for rows in (TALL, min(width, max(1, _SIZE // max(1, depth))))
    )
    x[:, half : 2 * half], weight[:, half : 2 * half] = -x[:, :half], weight[:, :half]
    x, weight = (rows[:, order].to(dtype) for rows in (x, weight))
    tall = product(x, weight, None)

    def alike(height):
        begins = range((TALL - height) % 3 + 1, TALL - height, max(height, TALL // max(1, 64 // height)))
        return all(torch.equal(product(x[i : i + height].clone(), weight, None), tall[i : i + height]) for i in begins)

    tried = _FIRST
    good = {height for height in tried if alike(height)}
    if len(good) < len(tried):
        tried = _HEIGHTS
        good |= {height for height in tried if height not in _FIRST and alike(height)}
    least = next(h for h in (*tried, TALL) if good.issuperset(other for other in tried if other >= h))
    if least > _MOST:
        return None, ()
    usable = sorted(good | {least})
    return least, tuple(0 if count == 0 else next(h for h in usable if h >= count) for count in range(least))
