"""QK-norm + RoPE + page writes against the reference: in Triton's interpreter, and on a GPU at the real sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada2_fast.kernels import rope
from llada2_fast.kernels._triton import force_ops
from tests.kernels.interpreter import interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A norm's sum is added in another order, so its rounding may go the other way; the rotation adds two such numbers.
TOLERANCE = {torch.float32: 8e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}
SHAPES = {  # heads, kv_heads, dim, rotated dims, normed
    "half": (4, 2, 16, 8, True),
    "whole": (3, 1, 8, 8, True),
    "odd": (2, 2, 10, 4, True),
    "little": (5, 1, 36, 2, True),
    "unnormed": (4, 2, 16, 8, False),
    "none": (2, 1, 8, 0, True),
}


def inputs(tokens, heads, kv_heads, dim, rot, normed, dtype=torch.float32, device="cpu"):
    """Arguments of qk_norm_rope; the angles are those of a table."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = (torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator) * 3).to(device, dtype)
    weights = torch.randn(2, dim, generator=generator).to(device, dtype) if normed else (None, None)
    position = torch.randint(5000, (tokens,), generator=generator).to(device)
    table = rope.rope_angles(torch.arange(5000, device=device), rot, 6e5, 1.0, dtype)
    return qkv, *weights, rope.Angles(*table, position), 1e-6, heads, kv_heads


def caches(pages, length, kv_heads, dim, dtype, device="cpu"):
    """One layer's pages out of a cache of three layers, full of NaN."""
    shape = (2, 3, pages, length, kv_heads, dim)
    return torch.full(shape, float("nan"), dtype=dtype, device=device)[:, 1]


def compare(got, wanted):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype], equal_nan=True)
    if got.numel() and got.dtype != torch.float32:
        assert ((got == wanted) | wanted.isnan()).float().mean() >= 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_parity(shape, tokens, dtype):
    args = inputs(tokens, *shape, dtype)
    with force_ops("triton"), interpreted():
        got = rope.qk_norm_rope(*args)
    for part, wanted in zip(got, rope.qk_norm_rope_ref(*args), strict=True):
        compare(part, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_page_writes(length, dtype):
    """Slots in any order, some tokens nowhere; every other slot keeps what it held."""
    shape = SHAPES["half"]
    args = inputs(3 * length, *shape, dtype)
    got, wanted = (caches(7, length, shape[1], shape[2], dtype) for _ in range(2))
    slot = torch.randperm(7 * length, generator=torch.Generator().manual_seed(0))[: 3 * length]
    slot[length : 2 * length] = -1
    with force_ops("triton"), interpreted():
        q = rope.qk_norm_rope_write(*args, *got, slot)
    compare(q, rope.qk_norm_rope_write_ref(*args, *wanted, slot))
    for cache, expected in zip(got, wanted, strict=True):
        compare(cache, expected)
        assert (~cache.flatten(0, 1).isnan()).all(-1).all(-1).sum() == 2 * length
    assert got._base[:, ::2].isnan().all()  # the layers beside this one


def test_reference_writes_what_the_parts_do():
    args = inputs(6, *SHAPES["half"])
    k_cache, v_cache = caches(4, 2, 2, 16, torch.float32)
    slot = torch.tensor([7, -1, 0, 1, -1, 4])
    q, k, v = rope.qk_norm_rope_ref(*args)
    assert torch.equal(rope.qk_norm_rope_write_ref(*args, k_cache, v_cache, slot), q)
    kept = torch.tensor([0, 2, 3, 5])
    for cache, part in ((k_cache, k), (v_cache, v)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slot[kept]], part[kept])
        assert flat[[2, 3, 5, 6]].isnan().all()


def test_a_token_does_not_depend_on_the_others():
    args = inputs(20, *SHAPES["half"])
    with force_ops("triton"), interpreted():
        together = rope.qk_norm_rope(*args)
        for t in (0, 11, 19):
            angles = args[3]._replace(row=args[3].row[t : t + 1])
            alone = rope.qk_norm_rope(args[0][t : t + 1], *args[1:3], angles, *args[4:])
            assert all(torch.equal(a, b[t : t + 1]) for a, b in zip(alone, together, strict=True))


def test_a_projection_that_is_a_view():
    args = inputs(5, *SHAPES["half"])
    wide = torch.randn(5, 3, 8, 16)
    wide[:, 1] = args[0]
    with force_ops("triton"), interpreted():
        for got, wanted in zip(rope.qk_norm_rope(wide[:, 1], *args[1:]), rope.qk_norm_rope(*args), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_of_a_table_and_a_row_each_give_the_same_bits(dtype):
    args = inputs(7, *SHAPES["half"], dtype)
    each = rope.look_up(*args[3])  # the reference's
    assert each.row is None and each.cos.shape == (7, 8)
    for run in (rope.qk_norm_rope_ref, rope.qk_norm_rope):
        with force_ops("triton"), interpreted():
            parts = zip(run(*args), run(*args[:3], each, *args[4:]), strict=True)
        assert all(torch.equal(*part) for part in parts)
    with force_ops("triton"):
        assert rope.look_up(*args[3]) == args[3]  # the kernel looks them up by itself


@given(st.integers(1, 300), st.integers(0, 2**15), st.sampled_from(DTYPES))
def test_a_tables_angles_have_the_bits_of_those_made_alone(count, first, dtype):
    position = torch.arange(first, first + count)
    table = rope.rope_angles(torch.arange(first + count), 64, 6e5, 1.0, dtype)
    alone = rope.rope_angles(position, 64, 6e5, 1.0, dtype)
    assert all(torch.equal(part, own) for part, own in zip(rope.look_up(*table, position).each(), alone, strict=True))


def test_what_does_not_fit_is_refused():
    args = list(inputs(6, *SHAPES["half"]))
    cos, sin, row = args[3]
    k_cache, v_cache = caches(4, 2, 2, 16, torch.float32)
    pages = [k_cache, v_cache, torch.arange(6)]
    bad = {
        "qkv": [(0, args[0][:, :7]), (0, args[0].double()), (0, args[0].transpose(1, 2).contiguous().transpose(1, 2))],
        "q_weight": [(1, args[1][:8]), (1, args[1].half())],
        "k_weight": [(2, torch.ones(32)[::2])],
        "cos": [
            (3, rope.Angles(cos[:5], sin[:5])),
            (3, rope.Angles(cos.double(), sin, row)),
            (3, rope.Angles(*(x[:, :7].contiguous() for x in (cos, sin)), row)),
        ],
        "sin": [(3, rope.Angles(cos, sin[:, :4].contiguous(), row)), (3, rope.Angles(cos, sin[:9], row))],
        "angles.row": [(3, rope.Angles(cos, sin, row[:5])), (3, rope.Angles(cos, sin, row.int()))],
        "k_cache": [(7, k_cache[:, :, :1]), (7, k_cache.half())],
        "v_cache": [(8, v_cache[:3]), (8, v_cache[..., :8])],
        "slot": [(9, torch.arange(5)), (9, torch.arange(6, dtype=torch.int32))],
    }
    with force_ops("triton"), interpreted():
        for name, changes in bad.items():
            for place, value in changes:
                call = [*args, *pages]
                call[place] = value
                with pytest.raises(ValueError, match=f"^{name}: "):
                    rope.qk_norm_rope_write(*call)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 4, 128, 64, True), (32, 4, 128, 64, True), (4, 2, 36, 20, False)])
@pytest.mark.parametrize("tokens", [32, 4096])
def test_on_a_gpu(tokens, shape, dtype):
    args = inputs(tokens, *shape, dtype, device="cuda")
    got, wanted = (caches(tokens // 32 + 3, 32, shape[1], shape[2], dtype, "cuda") for _ in range(2))
    slot = torch.randperm(tokens + 96, device="cuda")[:tokens]
    slot[::5] = -1
    compare(rope.qk_norm_rope_write(*args, *got, slot), rope.qk_norm_rope_write_ref(*args, *wanted, slot))
    for cache, expected in zip(got, wanted, strict=True):
        compare(cache, expected)
