"""Products with one matrix: a row's bits at any height, their values, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.machine import poisoned
from llada2_fast.kernels import dense, fp8, moe
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
    tiles = {height: dense.tiles(x.device, 72, 200, False, height, False)["tile_m"] for height in HEIGHTS}
    assert len(set(tiles.values())) == 3


@pytest.mark.parametrize("count", [0, 1, 16, 37, 90])
def test_only_wanted_rows_are_multiplied(on_gpu, count):
    """Each in its own place, with its own bits."""
    x, weight = random(90, 64, dtype=torch.bfloat16), random(72, 64, seed=1, dtype=torch.bfloat16)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(count), dtype=torch.int32)
    wanted = Wanted(order, torch.tensor([count], dtype=torch.int32))
    want = fp8.linear(x, weight, exact=True)
    with poisoned():
        got = fp8.linear(x, weight, exact=True, wanted=wanted)
    rows = order[:count].long()
    assert torch.equal(got[rows], want[rows])
    assert got[order[count:].long()].isnan().all()


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
