"""Counters of programs that arrive, and who is last."""

import pytest
import torch

from llada2_fast.kernels._ambient import run_kernel
from llada2_fast.kernels._triton import force_ops, tl, triton
from llada2_fast.kernels.arrivals import arrives_last, counters, counters_at_zero
from tests.kernels.interpreter import interpreted


@triton.jit
def _last_kernel(ARRIVED, PART, OUT, EACH: tl.constexpr):
    """Each program leaves its number; whoever is last adds up those of its result."""
    result = tl.program_id(0) // EACH
    tl.store(PART + tl.program_id(0), tl.program_id(0) + 1)
    if arrives_last(ARRIVED + result, EACH):
        tl.store(OUT + result, tl.sum(tl.load(PART + result * EACH + tl.arange(0, EACH)), 0))


class Twice:
    @counters_at_zero
    def run(self, x, each, results):
        return [self.launch(x, each, results) for _ in range(2)]

    def launch(self, x, each, results):
        part, out = x.new_zeros(each * results, dtype=torch.int32), x.new_full((results,), -1, dtype=torch.int32)
        run_kernel(_last_kernel, (each * results,), counters(x, results), part, out, EACH=each)
        return out, part


def same(x, each, results):
    """The last sees what all have stored, whether launches share a tensor of counters or not."""
    for out, part in (*Twice().run(x, each, results), Twice().launch(x, each, results)):
        assert torch.equal(out.long(), part.view(results, each).sum(1)) and (part > 0).all()


@pytest.mark.parametrize("results", [1, 3, 6])
@pytest.mark.parametrize("each", [1, 4])
def test_the_last_sees_what_all_have_stored(each, results):
    with force_ops("triton"), interpreted():
        same(torch.zeros(3), each, results)


@pytest.mark.gpu
def test_on_a_gpu():
    for each in (2, 16, 64):
        same(torch.zeros(3, device="cuda"), each, 2000)


def test_each_launch_has_its_own():
    class Thrice:
        @counters_at_zero
        def run(self, x):
            return [counters(x, count) for count in (5, 7, 2**16)]

    x = torch.zeros(3)
    with force_ops("triton"):
        first, second, large = Thrice().run(x)
    assert [len(one) for one in (first, second, large)] == [5, 7, 2**16]
    assert first.dtype == torch.int32 and not any(one.any() for one in (first, second, large))
    assert second.data_ptr() == first.data_ptr() + 4 * 5
    assert counters(x, 3).data_ptr() not in (first.data_ptr(), second.data_ptr())
