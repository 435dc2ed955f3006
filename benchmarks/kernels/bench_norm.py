"""RMSNorm behind a residual addition, of T tokens."""

from functools import partial

import torch.nn.functional as F

from llada2_fast.kernels import norm

from ..gpu.gates import norm_case
from .cases import Case, Shapes


def plain(x, delta, weight, eps):
    total = x + delta
    return total, F.rms_norm(total, weight.shape, weight, eps)


def case_of(config, tokens):
    shapes = Shapes(config)
    size = 4 * tokens * shapes.config().hidden_size * shapes.dtype.itemsize  # x, delta in; sum, norm out
    buffers = shapes.rotated(partial(norm_case, shapes, tokens), size)
    return Case(norm.add_rms_norm, plain, "F.rms_norm", buffers, size)


CASES = {
    f"{config} t{tokens}": partial(case_of, config, tokens)
    for config, tokens in (("small", 32), ("mini", 32), ("mini", 1024), ("flash", 32))
}


def test_norm(timed):
    timed()
