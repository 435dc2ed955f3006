"""The counts of benchmarks.counts are those of the committed line, and a higher one is noticed."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, counts


@pytest.fixture(scope="module")
def line():
    torch.set_num_threads(1)
    return {"benchmark": "counts"} | counts.steps()


def saved(part):
    return [line for line in counts.baseline() if line["part"] == part]


def test_no_count_has_grown(line):
    findings, gone = compare.compare(counts.baseline(), [line], counted=True)
    worse = [compare.show(finding) for finding in findings if finding.verdict == "worse"]
    assert worse + [f"gone: {metric}" for metric in gone] == []
    assert len(findings) >= 35


def test_the_saved_line_is_what_the_code_gives(line):
    """An improvement is saved too: `python -m benchmarks.counts --save`."""
    findings, _ = compare.compare(counts.baseline(), [line], counted=True)
    assert [compare.show(finding) for finding in findings if finding.verdict == "better"] == []


def test_what_the_kernels_ask_of_a_gpu(line):
    points = {point["what"]: point for point in line["kernels"]}
    refinement = [point["launches"] for what, point in points.items() if what.startswith("refinement")]
    steps = [point for what, point in points.items() if what.startswith("denoise step")]
    assert refinement == [2, 2, 3, 2, 2, 2, 3]  # the fourth deletes and inserts, the fifth commits by entropy
    assert all(point["syncs"] == 0 and point["launches_outside_graph"] <= 2 for point in steps)
    assert steps[0]["bytes"] > 1.8 * steps[1]["bytes"]  # bf16, fp8


def test_golden_decodings_take_the_recorded_forwards(line):
    known = json.loads((counts.GOLDEN / "generate.json").read_bytes())["cases"]
    wanted = {f"golden tiny, {case['label']}": case["num_forwards"] for case in known}
    counted = {point["decoding"]: point["denoise_forwards"] for point in line["decodings"]}
    assert [counted[f"golden tiny, {label}"] for label in counts.RECORDED] == [
        wanted[f"golden tiny, {label}"] for label in counts.RECORDED
    ]


def test_views_and_allocations_are_no_launches():
    x = torch.ones(4, 6)
    with counts.Calls() as counted:
        y = x.view(24)[2:].unflatten(0, (2, 11)).t()
        y += 1
        torch.empty(3)
        z = y @ y.t()
        z.reshape(-1).split(3)
    assert counted.launched.total() == 2 and counted.names.total() > 6


def test_a_host_sync_ends_the_run_without_data():
    with pytest.raises(RuntimeError):
        bool(torch.zeros(3, device=counts.Shapes().device).any())


def test_check_fails_on_a_count_above_the_saved_one(monkeypatch, capsys):
    part = saved("steps")[-1]
    more = json.loads(json.dumps(part))
    more["kernels"][0]["launches"] += 1
    monkeypatch.setattr(counts, "steps", lambda: {key: more[key] for key in ("part", "decodings", "calls", "kernels")})
    monkeypatch.setattr(counts.harness, "finish", lambda *args: SimpleNamespace())
    assert counts.main(["--parts", "steps", "--check"]) == 1
    assert "worse" in capsys.readouterr().out.splitlines()[1]
    more["kernels"][0]["launches"] -= 1
    assert counts.main(["--parts", "steps", "--check"]) == 0


def test_the_newest_line_of_a_part_is_the_baseline_alone():
    """A launch that an older one has may be gone for good."""
    lines = compare.select(str(counts.harness.RESULTS / "counts.jsonl"))
    times = [max(line["time"] for line in lines if line["part"] == part) for part in counts.PARTS]
    assert [line["time"] for part in counts.PARTS for line in saved(part)] == times and len(lines) > len(times)


@pytest.mark.slow
def test_compiled_kernels_have_not_grown():
    findings, gone = compare.compare(counts.baseline(), [{"benchmark": "counts"} | counts.aot()], counted=True)
    assert [compare.show(finding) for finding in findings if finding.verdict == "worse"] + gone == []
