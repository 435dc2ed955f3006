"""The benchmark of the refinement step."""

import json
from importlib.util import find_spec

import pytest

from benchmarks.kernels import bench_refine


def test_quick_line(capsys):
    bench_refine.main(["--quick", "--json"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["launches"], line["launches_temperature"], line["launches_sampling"]) == (2, 2, 3)
    assert line["host_syncs"] == 0
    assert line["passes_over_logits"] == 1 and 1 <= line["passes_temperature"] < 1.05
    assert line["passes_sampling"] < 2
    ratio = line["ratio_vs_diffusers_step"]
    assert ratio > 1 if find_spec("diffusers") else ratio is None
    assert {(point["rows"], point["vocab"]) for point in line["points"]} >= {(8, 32768)}


def test_nothing_is_timed_when_the_gate_fails(monkeypatch):
    run = bench_refine.Step.run

    def wrong(step):
        output = run(step)
        return output._replace(token=output.token + 1)

    monkeypatch.setattr(bench_refine.Step, "run", wrong)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench_refine.gate(300)
