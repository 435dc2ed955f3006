"""Products with one matrix: a row's bits at any height, their values, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.machine import poisoned
from llada2_fast.kernels import dense, fp8, int4, moe
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.gemm import QuantTensor, Wanted
from tests.kernels.interpreter import interpreted, products_in_order

HEIGHTS = (1, 2, 16, 17, 33, 64, 65, 130)  # of every default tile, whole and not
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture
def on_gpu():
    """Ops as on a GPU, products in the order of one."""
    with interpreted(), products_in_order(), force_ops("triton"):
        yield


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(shape[-1] ** -0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_rows_are_alike_at_every_height(on_gpu, dtype):
    x, weight, bias = random(140, 200, dtype=dtype) * 14, random(72, 200, seed=1, dtype=dtype), random(72, dtype=dtype)
    tall = fp8.linear(x, weight, bias=bias, exact=True)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert (tall - wanted).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-6) * wanted.norm()
    for height in HEIGHTS:
        assert torch.equal(fp8.linear(x[3 : 3 + height], weight, bias=bias, exact=True), tall[3 : 3 + height])
    tiles = {tuple(dense.tiles(x.device, 72, 200, False, height).items()) for height in HEIGHTS}
    assert len(tiles) == 2


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("count", [0, 1, 16, 37, 90])
def test_only_wanted_rows_are_multiplied(on_gpu, count, kind):
    """Each in its own place, with its own bits."""
    x, weight = random(95, 200, dtype=torch.bfloat16) * 14, (random(72, 200, seed=1, dtype=torch.bfloat16),)
    if kind == "fp8":
        x, weight = fp8.quantized(x), fp8.quantize_weight(*weight)
    x = x[:90]
    order = torch.randperm(90, generator=torch.Generator().manual_seed(count), dtype=torch.int32)
    wanted = Wanted(order, torch.tensor([count], dtype=torch.int32))
    want = fp8.linear(x, *weight, exact=True)
    with poisoned():
        got = fp8.linear(x, *weight, exact=True, wanted=wanted)
    rows = order[:count].long()
    assert torch.equal(got[rows], want[rows])
    assert got[order[count:].long()].isnan().all()


def test_tiles_change_no_bit(on_gpu):
    x, weight = random(90, 300, dtype=torch.bfloat16) * 17, random(256, 300, seed=1, dtype=torch.bfloat16)
    tried = ((16, 64, 64), (256, 128, 64), (16, 64, 128), (64, 128, 128))
    first, *others = (
        dense.dense(
            QuantTensor(x), QuantTensor(weight), False, x,
            {"tile_m": tile_m, "tile_n": tile_n, "tile_k": tile_k, "num_warps": 4, "num_stages": 3},
        ).values for tile_m, tile_n, tile_k in tried
    )  # fmt: skip
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_rows_of_an_mlp(on_gpu, dtype):
    x, gate_up, down = random(70, 96, dtype=dtype) * 9, random(80, 96, seed=1, dtype=dtype), random(96, 40, dtype=dtype)
    weights = QuantTensor(gate_up), QuantTensor(down)
    tall = moe.mlp(x, *weights, exact=True)
    with force_ops("torch"):
        wanted = moe.mlp(x, *weights)
    assert (tall - wanted).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-6) * wanted.norm()
    for height in (1, 17, 64):
        assert torch.equal(moe.mlp(x[5 : 5 + height], *weights, exact=True), tall[5 : 5 + height])


def test_rows_whose_elements_are_not_side_by_side(on_gpu):
    x, weight = random(64, 5).T, random(40, 64, seed=1)
    assert (fp8.linear(x, weight, exact=True) - F.linear(x, weight)).norm() < 1e-5
    gate_up, down = QuantTensor(random(20, 64, seed=2)), QuantTensor(random(64, 10, seed=3))
    assert torch.equal(moe.mlp(x, gate_up, down, exact=True), moe.mlp(x.contiguous(), gate_up, down, exact=True))


@pytest.mark.parametrize("quantize", [None, fp8.quantize_weight, int4.quantize_weight])
def test_one_row_of_one_dimension(on_gpu, quantize):
    x, weight = random(3, 64, dtype=torch.bfloat16), random(40, 64, seed=1, dtype=torch.bfloat16)
    own = (weight,) if quantize is None else quantize(weight)
    assert torch.equal(fp8.linear(x[1], *own, exact=True), fp8.linear(x, *own, exact=True)[1])


def test_rows_of_a_wider_tensor_and_leading_dimensions(on_gpu):
    x, weight = random(2, 3, 5, 64, dtype=torch.bfloat16), random(40, 48, dtype=torch.bfloat16)
    got = fp8.linear(x[..., 7:55], weight, exact=True)
    assert torch.equal(got, fp8.linear(x[..., 7:55].reshape(30, 48).contiguous(), weight, exact=True).view(2, 3, 5, 40))


def test_what_does_not_fit_is_refused(on_gpu):
    x, weight = random(4, 64), random(40, 64)
    with pytest.raises(ValueError, match=r"weight: contiguous \[N, 64\] expected, got \[40, 32\]"):
        fp8.linear(x, weight[:, :32].contiguous(), exact=True)
    with pytest.raises(ValueError, match="weight: torch.float32 expected, as x, got torch.bfloat16"):
        fp8.linear(x, weight.bfloat16(), exact=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3072, 2048, 157184])
def test_gpu_rows_are_alike_at_every_height(rows):
    """With the tiles of each height, whole and not."""
    x, weight = (random(n, 2048, seed=n).to("cuda", torch.bfloat16) for n in (1280, rows))
    tall = fp8.linear(x, weight, exact=True)
    for height in (1, 32, 33, 64, 256, 320, 1024):
        assert torch.equal(fp8.linear(x[-height:], weight, exact=True), tall[-height:])
