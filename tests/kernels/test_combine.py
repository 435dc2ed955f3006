"""The weighted sum of what experts made: by itself and within the norm that follows, in Triton's interpreter."""

import pytest
import torch

from llada2_fast.kernels import norm
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import ExpertSum, summed, summed_ref
from tests.kernels.interpreter import interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(op, *args):
    with force_ops("triton"), interpreted():
        return op(*args)


def inputs(tokens, top_k, hidden, dtype, beside=True, device="cpu", seed=0):
    """x, an ExpertSum whose products and sums float32 holds exactly, and a norm's weight."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randint(-127, 128, shape, generator=generator) / 16

    rows = tokens * top_k + (tokens if beside else 0)  # those of the shared expert are behind the others
    outer, weights = some(rows, hidden).to(device, dtype), (some(tokens, top_k) / 8).to(device)
    delta = ExpertSum(outer, weights, outer[tokens * top_k :] if beside else None)
    return some(tokens, hidden).to(device, dtype), delta, some(hidden).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, top_k, hidden", [(0, 3, 8), (1, 1, 5), (5, 3, 70), (3, 8, 1030)])
@pytest.mark.parametrize("beside", [False, True])
def test_the_sum_and_its_norm(tokens, top_k, hidden, dtype, beside):
    x, delta, weight = inputs(tokens, top_k, hidden, dtype, beside)
    y = summed_ref(delta)
    assert torch.equal(run(summed, delta), y) and y.dtype == dtype and y.shape == x.shape
    total, normed = run(norm.add_rms_norm, x, delta, weight, 1e-6)
    alone = run(norm.add_rms_norm, x, y, weight, 1e-6)
    assert torch.equal(total, x + y) and torch.equal(total, alone[0]) and torch.equal(normed, alone[1])
    assert torch.equal(norm.add_rms_norm(x, delta, weight, 1e-6)[0], x + y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_routed_sum_is_rounded_before_the_shared_expert_is_added(dtype):
    _, delta, _ = inputs(5, 3, 70, dtype)
    routed = (delta.outer[:15].float().view(5, 3, 70) * delta.weights[..., None]).sum(1)
    expected = routed.to(dtype) + delta.beside
    assert not torch.equal((routed + delta.beside.float()).to(dtype), expected)  # once rounded is not enough
    assert torch.equal(run(summed, delta), expected)


def test_a_row_does_not_depend_on_the_others():
    x, delta, weight = inputs(9, 4, 40, torch.bfloat16)
    together = run(norm.add_rms_norm, x, delta, weight, 1e-6)
    for t in (0, 8):
        own = ExpertSum(delta.outer[4 * t : 4 * t + 4], delta.weights[t : t + 1], delta.beside[t : t + 1])
        for part, whole in zip(run(norm.add_rms_norm, x[t : t + 1], own, weight, 1e-6), together, strict=True):
            assert torch.equal(part[0], whole[t])


def test_a_tensor_is_its_own_sum():
    x = torch.ones(2, 3)
    assert summed(x) is x and run(summed, x) is x


def test_sums_that_do_not_fit_are_refused():
    x, (outer, weights, beside), weight = inputs(4, 3, 8, torch.float32)
    for bad in (
        ExpertSum(outer[:11], weights, beside),
        ExpertSum(outer[:, :7].contiguous(), weights, beside),
        ExpertSum(outer, weights[:3], beside),
        ExpertSum(outer, weights, beside[:3]),
        ExpertSum(outer.half(), weights, beside),
        ExpertSum(outer.T.contiguous().T, weights, beside),
    ):
        with pytest.raises(ValueError, match="^delta: "):
            run(norm.add_rms_norm, x, bad, weight, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden", [(1, 2048), (64, 2048), (33, 4096), (4096, 2048)])
def test_on_a_gpu(tokens, hidden, dtype):
    x, delta, weight = inputs(tokens, 8, hidden, dtype, device="cuda")
    assert torch.equal(summed(delta), summed_ref(delta))
    for part, alone in zip(
        norm.add_rms_norm(x, delta, weight, 1e-6), norm.add_rms_norm(x, summed(delta), weight, 1e-6), strict=True
    ):
        assert torch.equal(part, alone)
