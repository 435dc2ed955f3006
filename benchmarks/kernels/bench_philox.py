"""Uniform draws by counter: N positions of one row. Operations are those on 32-bit integers.

The peer is torch.rand, whose draws depend on what was drawn before; parity is against Philox in plain Python integers.
"""

import torch

from llada2_fast.kernels._triton import tl, triton
from llada2_fast.kernels.philox import _uniform, uniform_ref

from .cases import Case, agree

TILE = 256


@triton.jit
def _uniform_kernel(SEED, POSITION, STEP, OUT, n, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(POSITION + at, mask=at < n, other=0)
    draw = _uniform(tl.load(SEED), position, tl.load(STEP), tl.full([], 0, tl.int32))
    tl.store(OUT + at, draw, mask=at < n)


def kernel(seed, position, step):
    out = torch.empty(position.shape, dtype=torch.float32, device=position.device)
    _uniform_kernel[(triton.cdiv(len(out), TILE),)](seed, position, step, out, len(out), TILE=TILE)
    return out


def reference(seed, position, step):
    return uniform_ref(seed, position, step, torch.zeros_like(step))


def in_integers(seed, position, step):
    """The draw of one counter, from the definition of Philox4x32-10."""
    low = 2**32 - 1
    c0, c1, c2, c3, k0, k1 = position & low, step & low, 0, 0, seed & low, seed >> 32 & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return (c0 >> 8) * 2.0**-24 + 2.0**-25


def case_of(machine, count):

    def make():
        each = torch.tensor([-3_141_592_653_589_793, 5], device=machine.device)
        return each[:1], torch.randint(2**32, (count,), device=machine.device), each[1:]

    first = make()
    ours = reference if machine.dry else kernel

    def check():
        seed, position, step = (x[:64].tolist() for x in first)
        truth = torch.tensor([in_integers(seed[0], at, step[0]) for at in position], dtype=torch.float32)
        agree("philox", (ours(*first)[:64].cpu().view(torch.int32),), (truth.view(torch.int32),))

    def plain(_seed, position, _step):
        return torch.rand(len(position), device=position.device)

    size = count * (8 + 4)
    return Case(ours, plain, "torch.rand", machine.rotated(make, size), size, 100.0 * count, check)


CASES = {f"n{count}": (count,) for count in (256, 2**18)}


def test_philox(timed):
    timed()
