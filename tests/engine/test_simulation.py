"""The simulation of scale, small: what `python -m benchmarks.simulate` asserts over hours of simulated time."""

import pytest

from benchmarks.simulate import LENGTH, ideal_seconds, pairs, roofline_cost, simulate, summary, workload
from llada2_fast.config import EngineConfig


def linear_cost(tokens, pairs):
    return 1e-3 + 1e-4 * tokens + 1e-8 * pairs


@pytest.mark.parametrize("rate", [None, 1.0])
def test_every_request_is_served_and_packing_is_near_the_ideal(rate):
    jobs = workload(80, seed=3)
    config = EngineConfig(max_num_seqs=16, max_waiting=8, cache_tokens=32768)
    figures = summary(simulate(jobs, linear_cost, config, rate), jobs, linear_cost, 16)
    assert figures["leaked_pages"] == 0 and figures["max_unfinished"] <= 16 + 8 + figures["preemptions"]
    assert 0.9 < figures["vs_ideal"] <= 1.001 or (rate and figures["vs_ideal"] <= 1.001)
    assert figures["shared_tokens"] > 0


def test_pairs_and_ideal_of_one_request():
    assert pairs(0, 1) == LENGTH**2 and pairs(3, 2) == LENGTH**2 * (4 + 5)
    jobs = workload(1)
    result = simulate(jobs, linear_cost, EngineConfig(cache_tokens=8192))
    [output] = result["outputs"]
    assert ideal_seconds([output], linear_cost, 1) == pytest.approx(
        result["seconds"], abs=1e-3 * (output.counters.prefill_forwards + 1)
    )


def test_the_roofline_s_cost_grows_with_tokens_and_prefix():
    cost = roofline_cost()
    assert 5e-3 < cost(32, pairs(32, 1)) < 1e-2 and cost(2048, 64 * pairs(32, 1)) > cost(32, pairs(32, 1))
    assert cost(32, pairs(1000, 1)) > cost(32, pairs(32, 1))
