"""Philox against Random123's known answers, the kernel's words and draws against the reference's, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from llada2_fast.kernels.philox import _philox4x32, _pick, _uniform, philox4x32_ref, pick_ref, uniform_ref
from tests.kernels.interpreter import interpreted

# Random123, kat_vectors: philox4x32, 10 rounds: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _words_kernel(SEED, COUNTER, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    words = _philox4x32(
        tl.load(SEED + n), tl.load(COUNTER + n).to(tl.uint32), tl.load(COUNTER + N + n).to(tl.uint32),
        tl.load(COUNTER + 2 * N + n).to(tl.uint32), tl.load(COUNTER + 3 * N + n).to(tl.uint32),
    )  # fmt: skip
    for k in tl.static_range(4):
        tl.store(OUT + k * N + n, words[k].to(tl.int64))


@triton.jit
def _uniform_kernel(SEED, POSITION, STEP, STREAM, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(OUT + n, _uniform(tl.load(SEED + n), tl.load(POSITION + n), tl.load(STEP + n), tl.load(STREAM + n)))


@triton.jit
def _pick_kernel(WEIGHT, UNIFORM, OUT, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    weight = tl.load(WEIGHT + m[:, None] * N + tl.arange(0, N)[None, :])
    target = tl.load(UNIFORM + m) * tl.sum(weight, 1)
    tl.store(OUT + m, _pick(weight, target[:, None]))
    for row in tl.static_range(M):  # one row alone
        one = tl.load(WEIGHT + row * N + tl.arange(0, N))
        tl.store(OUT + M + row, _pick(one, tl.load(UNIFORM + row) * tl.sum(one, 0)))


def key(low, high):
    """The int64 whose two halves are the key."""
    return (high << 32 | low) - (1 << 64 if high >= 1 << 31 else 0)


@pytest.mark.parametrize("counter, halves, words", KNOWN)
def test_known_answers(counter, halves, words):
    seed, counters = torch.tensor([key(*halves)] * 2), torch.tensor([counter] * 2).T.contiguous()
    assert [int(word[0]) for word in philox4x32_ref(seed, *counters)] == list(words)
    out = torch.empty(4, 2, dtype=torch.int64)
    with interpreted():
        _words_kernel[(1,)](seed, counters, out, 2)
    assert out.T.tolist() == [list(words)] * 2


def test_uniforms_are_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    seed, position, step, stream = torch.randint(-(2**63), 2**63 - 1, (4, 256), generator=generator)
    step, stream = step.to(torch.int32), stream.to(torch.int32)
    seed[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    out = torch.empty(256)
    with interpreted():
        _uniform_kernel[(1,)](seed, position, step, stream, out, 256)
    wanted = uniform_ref(seed, position, step.long(), stream.long())
    assert torch.equal(out, wanted)
    assert 0 < wanted.min() and wanted.max() < 1
    assert abs(wanted.mean() - 0.5) < 0.1


def test_a_draw_depends_on_every_part_of_its_key():
    base = [torch.tensor([value]) for value in (7, 5, 3, 1)]
    drawn = {float(uniform_ref(*base))}
    for part in range(4):
        for change in (1, 1 << 31):
            changed = [value + change if i == part else value for i, value in enumerate(base)]
            drawn.add(float(uniform_ref(*changed)))
    drawn.add(float(uniform_ref(base[0] + (1 << 40), *base[1:])))
    assert len(drawn) == 10


@pytest.mark.parametrize(
    "weight, uniform, index",
    [
        ([1, 1, 1, 1], 1e-7, 0),
        ([1, 1, 1, 1], 0.2499, 0),
        ([1, 1, 1, 1], 0.25, 1),
        ([1, 1, 1, 1], 0.9999999, 3),
        ([0, 0, 2, 0], 1e-7, 2),
        ([0, 0, 2, 0], 0.9999999, 2),
        ([3, 0, 0, 1], 0.75, 3),
        ([1e-30, 0, 1e30, 0], 1e-7, 2),
        ([1, 2, 3, 0], 1.0, 2),  # a uniform may be rounded to 1
    ],
)
def test_pick(weight, uniform, index):
    assert pick_ref(torch.tensor([weight]).float(), torch.tensor([uniform])).tolist() == [index]
    out = torch.empty(4, dtype=torch.int32)
    with interpreted():
        _pick_kernel[(1,)](torch.tensor([weight] * 2).float(), torch.tensor([uniform] * 2), out, 2, 4)
    assert out.tolist() == [index] * 4


def test_pick_of_nothing():
    out = torch.empty(2, dtype=torch.int32)
    with interpreted():
        _pick_kernel[(1,)](torch.zeros(1, 4), torch.tensor([0.5]), out, 1, 4)
    assert out.tolist() == [-1, -1]
