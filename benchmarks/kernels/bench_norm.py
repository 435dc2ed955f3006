"""RMSNorm behind a residual addition, of T tokens."""

from functools import partial

import torch.nn.functional as F

from llada2_fast.kernels import norm

from ..gpu.gates import norm_case
from .cases import Case


def plain(x, delta, weight, eps):
    total = x + delta
    return total, F.rms_norm(total, weight.shape, weight, eps)


def case_of(machine, config, tokens):
    tokens = machine.size(tokens, 64)
    size = 4 * tokens * machine.config(config).hidden_size * machine.dtype.itemsize  # x, delta in; sum, norm out
    buffers = machine.rotated(partial(norm_case, machine, tokens, config), size)
    return Case(norm.add_rms_norm, plain, "F.rms_norm", buffers, size)


CASES = {
    f"{config} t{tokens}": (config, tokens)
    for config, tokens in (("small", 32), ("mini", 32), ("mini", 1024), ("flash", 32))
}


def test_norm(timed):
    timed()
