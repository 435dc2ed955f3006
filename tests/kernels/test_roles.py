"""Where a position's logits are, far beyond what 32 bits count; what positions are is tested with the step's rules."""

import pytest
import torch

from llada2_fast.kernels import roles
from llada2_fast.kernels._triton import tl, triton
from tests.kernels.interpreter import interpreted

ROWS, LENGTH, VOCAB = 70, 8, 157184


@triton.jit
def _locate_kernel(LOGITS, INDEX, START, stride_r, stride_l, L: tl.constexpr):
    n = tl.program_id(0)
    base, _wanted = roles._locate(LOGITS, INDEX, None, None, None, 0, 0, n, stride_r, stride_l, L, False)
    tl.store(START + n, base.to(tl.int64) - LOGITS.to(tl.int64))


def starts(index, stride_r, stride_l):
    """[R, L]: how many elements each position's logits lie behind the first ones; none of them is read."""
    found = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    with interpreted():
        _locate_kernel[(ROWS * LENGTH,)](torch.zeros(1, dtype=torch.int8), index, found, stride_r, stride_l, LENGTH)
    return found


@pytest.mark.parametrize("stride_r, stride_l", [(256 * VOCAB, VOCAB), (VOCAB, 2240 * VOCAB)])
def test_offsets_are_int64(stride_r, stride_l):
    """Either stride alone leads beyond 2^31, then rows of packed logits do."""
    row, position = torch.arange(ROWS)[:, None], torch.arange(LENGTH)
    wanted = row * stride_r + position * stride_l  # [R, L]
    index = (row * LENGTH + position) * 32
    assert wanted.max() > 2**31 < index.max() * VOCAB
    assert torch.equal(starts(None, stride_r, stride_l), wanted)
    assert torch.equal(starts(index, VOCAB, 0), index * VOCAB)
