"""Every kernel compiles for an H100, without a spill; `python -m benchmarks.aot` does all specialisations and GPUs."""

import multiprocessing
from itertools import starmap

import pytest

from benchmarks import aot
from llada2_fast.kernels import gemm, moe

ONE_EACH = [
    "refine bf16 filters", "refine bf16 guided", "refine fp32 guided", "candidates bf16 runner-up filters",
    "moe mini bf16 T=512", "moe mini fp8 T=32",
    "advance A=256 C=64", "qk_norm_rope mini bf16", "moe flash bf16 T=32",  # what Triton 3.6 is the first to spill
    "moe mini int4 T=32", "top log-probabilities bf16", "moe flash 2.2 T=32", "attention mini bf16 order",
]  # fmt: skip


@pytest.mark.parametrize("scenario", ONE_EACH)
def test_compiles_without_spills(scenario):
    results = aot.compile_all(["sm_90"], [scenario])
    assert [(result.kernel, result.fault) for result in results if result.fault] == []
    assert all(result.registers > 0 and result.shared >= 0 for result in results)


def test_a_skipped_rounding_is_a_fault():
    """LLVM makes one fma.rn.bf16 of the rotation's product and sum, unless it is told not to."""
    with aot.recorded() as launches:
        aot.SCENARIOS["qk_norm_rope mini bf16"]()
    (launch,) = launches
    assert launch.options.pop("enable_fp_fusion") is False
    assert "a rounding of the reference is skipped" in aot.compile_launch(launch, "", "sm_90").fault


def test_more_tensor_memory_than_there_is_is_a_fault(monkeypatch):
    """Triton makes a kernel of it that traps, and no error."""
    wide = {"tile_n": 128, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(moe, "tiles", lambda *args: {"tile_m": 64, "gate_up": wide, "down": wide})
    with aot.recorded() as launches:
        aot.SCENARIOS["moe mini int4 T=4096"]()
    gate_up = next(launch for launch in launches if launch.kernel is gemm._gemm_kernel)
    assert "columns of tensor memory, 512 are allowed" in aot.compile_launch(gate_up, "", "sm_100").fault
    assert aot.compile_launch(gate_up, "", "sm_90").fault is None


def test_side_by_side_is_as_one_after_the_other_and_in_processes():
    scenario = "attention fp32 D=16"
    with aot.recorded() as launches:
        aot.SCENARIOS[scenario]()
    work = [(launch, scenario, target) for launch in launches for target in ("sm_90", "sm_80")]
    results = aot.compile_each(work, processes=2)
    first = next(results)
    assert multiprocessing.active_children()
    assert [first, *results] == list(starmap(aot.compile_launch, work))
