"""What a step launches, priced: the counts behind it, and how far the prices are from what was measured."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import estimate, harness, launches
from benchmarks.estimate import CARDS, UNKNOWN, Rate, Work
from benchmarks.lines import lines_of
from benchmarks.roofline import BLOCK, CAPACITY, GPUS, MINI, MODELS, floor_ms, step_costs, touched_experts


@pytest.fixture(scope="module")
def saved():
    return {name: lines_of(harness.RESULTS / f"{name}.jsonl") for name in ("counts", "gpu")}


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_a_step_reads_the_weights_that_the_floor_counts(quantization):
    """And some activations; scales of fp8 the floor leaves out."""
    found = {work.kernel: work for work in launches.works(quantization, 1)}
    costs = step_costs(MINI, 1, 1024, quantization)
    experts = sum(work.bytes for kernel, work in found.items() if {"gate_up", "down"} & {*kernel.split()})
    floor = costs["routed experts"].bytes + costs["shared expert"].bytes
    assert floor < experts < 1.02 * floor
    head = next(work for kernel, work in found.items() if kernel.endswith("157184x2048"))
    assert (head.launches, head.operations) == (1, costs["LM head"].operations)
    assert costs["LM head"].bytes < head.bytes < 1.04 * costs["LM head"].bytes
    assert found["_qk_norm_rope_kernel"].launches == MINI.num_hidden_layers
    assert found["aten::embedding"].bytes == 2 * 64 * MINI.hidden_size * 2  # of a block and a place


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("capacity", [None, 48])
def test_experts_that_blocks_touch(capacity, blocks):
    """Against blocks that are admitted to experts, and tokens that choose among these, at random."""
    config, generator = replace(MODELS["flash"], expert_capacity=capacity), torch.Generator().manual_seed(0)
    race = torch.rand(200, blocks, 1, 256, generator=generator)
    outside = race < race.topk(capacity or 256).values[..., -1:]
    choice = torch.rand(200, blocks, BLOCK, 256, generator=generator).masked_fill(outside, -1.0)
    ids = choice.topk(8).indices.flatten(1)
    touched = torch.zeros(200, 256).scatter_(1, ids, 1.0).sum(1).mean().item()
    assert touched_experts(config, blocks * BLOCK) == pytest.approx(touched, rel=0.02)


def test_a_step_of_2_2_reads_the_experts_of_its_capacity():
    """A block behind 1024 tokens on an H200."""
    costs = step_costs(replace(MODELS["flash"], expert_capacity=CAPACITY), 1, 1024)
    assert sum(cost.bytes for cost in costs.values()) == pytest.approx(42.2e9, rel=0.002)
    assert floor_ms(costs, *GPUS["h200"]) == pytest.approx(9.82, rel=0.002)


def test_what_is_left_of_pytorchs_operators_beside_products():
    """Once a step: tokens looked up, counters of who has arrived."""
    left = {work.kernel: work.launches for work in launches.works(None, 8) if work.kernel.startswith("aten")}
    assert left == {"aten::embedding": 1, "aten::new_zeros": 1}


def test_the_estimates_are_near_what_was_measured(saved):
    rows = estimate.residuals(estimate.before_and_after(saved["counts"]), saved["gpu"])
    before = [row for row in rows if row["line"] == "before"]
    assert len({(row["card"], row["point"]) for row in before}) == len(before) == 12
    after = [row for row in rows if row["line"] == "after" and " bf16 " in row["point"]]
    assert {row["point"].split()[3] for row in after if row["card"] == "h100"} == {"b1", "b8", "b32"}
    assert all(abs(row["off"]) < (0.05 if row["card"] == "h100" else 0.1) for row in before + after), before + after


@given(st.builds(Work, st.just("k"), st.integers(1, 99), st.integers(0, 10**10), st.integers(0, 10**12)))
def test_prices(work):
    for card in CARDS:
        fixed = work.us(Rate(2.0, share=1e9, rate=1e9), card)
        assert fixed == pytest.approx(2.0 * work.launches, abs=1e-3)
        alone = [work._replace(**{field: 0}).us(Rate(0.0), card) for field in ("operations", "bytes")]
        assert work.us(Rate(0.0), card) == pytest.approx(max(alone))
        assert work.us(Rate(0.0, hidden=False), card) == pytest.approx(sum(alone))
    through = [work._replace(operations=0).us(Rate(1.0, through=2.0), card) for card in CARDS]
    assert through[0] == through[1]


def line(commit, time, *works):
    rows = [{"dtype": "bf16", "batch": 1} | work._asdict() for work in works]
    return {"benchmark": "counts", "part": "kernels", "commit": commit, "time": time, "launches": rows}


def step_of(time, ms):
    return {"device": "NVIDIA H200", "point": "step mini bf16 b1 p1024 carried", "commit": "c", "time": time, "ms": ms,
            "experts_touched": 163.0}  # fmt: skip


def test_two_lines_side_by_side_and_beside_what_was_measured(monkeypatch):
    monkeypatch.setattr(estimate, "SINCE", {"_faster": Rate(0.7)})
    works = Work("_faster_kernel", 10, 0, 0), Work("_new_kernel", 1, 0, 0)
    lines = [line("f74eaf5", "2", *works), line("aaa", "3"), line("bbb", "5", *works)]
    named = estimate.before_and_after(lines)
    assert named == {"before": lines[0], "after": lines[2]}
    (row,) = estimate.compared(named)
    assert row["before"]["h100"]["ms"] == pytest.approx(11 * (UNKNOWN.us + estimate.GAP) / 1e3)
    assert row["after"]["h200"]["ms"] == pytest.approx((10 * 0.7 + UNKNOWN.us + 11 * estimate.EARLY) / 1e3)
    assert estimate.gap_us("cuBLAS 2x2", lines[2]) == estimate.GAP
    measured = [step_of("1", 1.0), step_of("2", 2.0), step_of("4", 3.0)]
    rows = estimate.residuals(named, measured)
    assert [(row["line"], row["measured_ms"]) for row in rows] == [("before", 2.0), ("after", 3.0)]
    text = list(estimate.show(named, measured))
    guesses = [part for part in text if "a guess" in part]
    assert len(guesses) == 1 and "_new_kernel" in guesses[0]


def test_experts_touched_change_their_bytes_alone():
    works = [Work("_gemm_kernel down fp8", 19, 1000, 7), Work("_gemm_kernel plain fp8 8x8", 1, 1000, 7)]
    half = estimate.with_touched(works, 1, estimate.touched_experts(MINI, 32) / 2)
    assert [work.bytes for work in half] == [500, 1000]


def test_calls_tell_what_they_launch():
    found = []
    with launches._Noted(found):
        x = torch.ones(4, 8)
        torch.nn.functional.embedding(torch.tensor([1, 2]), x)
    assert [work for work in found if work.kernel == "aten::embedding"] == [Work("aten::embedding", 1, 128, 0)]
