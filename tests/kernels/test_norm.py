"""The norm kernels against their references: in Triton's interpreter, and on a GPU at the real sizes."""

import pytest
import torch

from llada2_fast.kernels import fp8, norm
from llada2_fast.kernels._triton import force_ops
from tests.kernels.interpreter import interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The sum of squares is added in another order, so a rounding may go the other way. In 16 bits there are two, before and
# after the weight: two units in the last place.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def inputs(shape, dtype, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(2, *shape, generator=generator) * 3).to(device, dtype)
    return x, delta, torch.randn(shape[-1], generator=generator).to(device, dtype)


def compare(got, wanted):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[got.dtype], atol=1e-6)
    if got.numel() and got.dtype != torch.float32:
        assert (got == wanted).float().mean() >= 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 8), (2, 0, 5), (1, 1), (3, 7), (5, 37), (2, 5, 64), (70, 130), (1, 2048), (3, 2049)]
)
def test_parity(shape, dtype):
    x, delta, weight = inputs(shape, dtype)
    with force_ops("triton"), interpreted():
        alone = norm.rms_norm(x, weight, 1e-5)
        total, normed = norm.add_rms_norm(x, delta, weight, 1e-5)
    compare(alone, norm.rms_norm_ref(x, weight, 1e-5))
    assert torch.equal(total, x + delta)
    compare(normed, norm.add_rms_norm_ref(x, delta, weight, 1e-5)[1])


@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_eps_and_rows_of_zeros(eps):
    x, _, weight = inputs((4, 16), torch.float32)
    x[1] = 0
    with force_ops("triton"), interpreted():
        got = norm.rms_norm(x, weight, eps)
    compare(got, norm.rms_norm_ref(x, weight, eps))
    assert not got[1].any()


def test_strided_views():
    x, delta, weight = inputs((6, 40), torch.float32)
    pairs = [(x[::2], delta[1::2]), (x[:, 3:20], delta[:, 20:37]), (x[:, ::2], delta[:, 1::2]), (x.T, delta.T)]
    for a, b in pairs:
        w = weight[: a.shape[1]]
        with force_ops("triton"), interpreted():
            total, got = norm.add_rms_norm(a, b, w, 1e-6)
            alone = norm.rms_norm(a, w, 1e-6)
        assert torch.equal(total, a + b)
        compare(got, norm.rms_norm_ref(a + b, w, 1e-6))
        compare(alone, norm.rms_norm_ref(a, w, 1e-6))


def test_a_row_does_not_depend_on_the_others():
    x, delta, weight = inputs((50, 96), torch.float32)
    with force_ops("triton"), interpreted():
        together = norm.add_rms_norm(x, delta, weight, 1e-6)[1]
        for i in (0, 7, 49):
            assert torch.equal(norm.add_rms_norm(x[i], delta[i], weight, 1e-6)[1], together[i])


def same_rows(got, y):
    """QuantRows of what a norm gave, unquantised, are those of quantising it."""
    values, scale = fp8.quantize_ref(y)
    assert torch.equal(got.values.view(torch.uint8), values.view(torch.uint8)) and torch.equal(got.scale, scale)
    assert got.like.dtype == y.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (17, 128), (70, 130), (1, 2048), (3, 2049)])
def test_rows_in_fp8(shape, dtype):
    """The bits of quantising the norm, whether it is kept as well or not."""
    x, delta, weight = inputs(shape, dtype)
    x[: shape[0] // 2, :128] = 0
    delta[: shape[0] // 2, :128] = 0
    with force_ops("triton"), interpreted():
        total, y = norm.add_rms_norm(x, delta, weight, 1e-5)
        for wide in (False, True):
            added, got = norm.add_rms_norm(x, delta, weight, 1e-5, fp8=True, wide=wide)
            assert torch.equal(added, total)
            same_rows(got, y)
            assert got.like is weight or (wide and torch.equal(got.like, y))
        same_rows(norm.rms_norm(x, weight, 1e-5, fp8=True, wide=False), norm.rms_norm(x, weight, 1e-5))
    same = norm.rms_norm(x, weight, 1e-5, fp8=True, wide=False)
    assert torch.equal(same, norm.rms_norm_ref(x, weight, 1e-5))  # a CPU quantises where it multiplies


def test_what_does_not_fit_is_refused():
    x, delta, weight = inputs((3, 8), torch.float32)
    cases = [
        ("weight", (x, weight[:7])),
        ("weight", (x, weight.half())),
        ("weight", (x, torch.ones(16)[::2])),
        ("x", (x[:, :0], weight[:0])),
        ("x", (x.double(), weight.double())),
        ("x", (torch.ones(1, norm.MAX_SIZE + 1), torch.ones(norm.MAX_SIZE + 1))),
    ]
    with force_ops("triton"), interpreted():
        for name, args in cases:
            with pytest.raises(ValueError, match=f"^{name}: "):
                norm.rms_norm(*args, 1e-6)
        for bad in (delta[:2], delta.double()):
            with pytest.raises(ValueError, match="^delta: "):
                norm.add_rms_norm(x, bad, weight, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 2048), (33, 4096), (4096, 2048), (7, 1000)])
def test_on_a_gpu(shape, dtype):
    x, delta, weight = inputs(shape, dtype, device="cuda")
    compare(norm.rms_norm(x, weight, 1e-6), norm.rms_norm_ref(x, weight, 1e-6))
    total, normed = norm.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    compare(normed, norm.add_rms_norm_ref(x, delta, weight, 1e-6)[1])
    assert torch.equal(norm.rms_norm(x[5:6], weight, 1e-6), norm.rms_norm(x, weight, 1e-6)[5:6])
    if torch.cuda.get_device_capability() >= fp8.CAPABILITY:
        for wide in (False, True):
            added, got = norm.add_rms_norm(x, delta, weight, 1e-6, fp8=True, wide=wide)
            assert torch.equal(added, total)
            if dtype != torch.float32:
                same_rows(got, normed)
                continue
            # a row of float32 that is cut into groups may be summed up in another order than one that is not
            scale = got.scale.repeat_interleave(128, -1)[:, : shape[1]]
            assert ((got.values.float() * scale - normed).abs() <= 0.0626 * normed.abs() + scale / 512).all()
