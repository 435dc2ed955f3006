"""The benchmark of the refinement step: its line on a CPU, and its GPU part as a dry run."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.machine import Machine
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


def test_gpu_part_dry():
    with torch.inference_mode():
        points, counted = bench_refine.on_gpu(SimpleNamespace(quick=True), Machine(dry=True))
    assert len(points) == 2 * len(bench_refine.MODES)
    assert all(point["ours_us"] > 0 and point["over_greedy"] > 0 for point in points)
    assert counted["host_syncs"] == 0


def test_nothing_is_timed_when_the_gate_fails(monkeypatch):
    run = bench_refine.Step.run

    def wrong(step):
        output = run(step)
        return output._replace(token=output.token + 1)

    monkeypatch.setattr(bench_refine.Step, "run", wrong)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench_refine.gate(300, torch.float32, "cpu")


def test_a_plot_asks_for_its_package(monkeypatch, capsys):
    monkeypatch.setattr(bench_refine, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench_refine.main(["--plot", "steps.png"])
    assert "llada2-fast[plot]" in capsys.readouterr().err
