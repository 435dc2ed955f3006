"""The timings of single ops: all ops are there, a wrong op is refused, and the figures are those of one call."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import bench_decoding, bench_model, cases
from llada2_fast.kernels import advance, attention, candidates, fp8, moe, norm, rope, router, top_logprobs
from llada2_fast.kernels._triton import force_ops
from tests.kernels.interpreter import interpreted

OPS = {path.stem for path in (Path(kernels.__file__).parents[2] / "kernels").glob("[!_]*.py")}
# of other ops, and timed with them
PARTS = {"roles", "state", "commit", "levenshtein", "combine", "arrivals", "overlap"}


def test_every_op_is_timed():
    assert set(kernels.OPS) == OPS - PARTS


def test_quick_line(capsys, tmp_path):
    kernels.main(["--quick", "--json", "--save", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    line = json.loads(lines[-1])
    assert line["benchmark"] == "kernels" and line["threads"] == 1
    assert [entry["op"] for entry in line["ops"]] == sorted(kernels.OPS)
    for entry in line["ops"]:
        assert next(iter(kernels.OPS[entry["op"]][1])) == entry["case"]
        assert entry["us"] > 0 and entry["peer_us"] > 0 and entry["us_iqr"] >= 0 and entry["peer"]
        assert entry["ratio"] == pytest.approx(entry["peer_us"] / entry["us"], rel=2e-3)
        assert entry["gb_s"] == pytest.approx(entry["bytes"] / entry["us"] / 1e3, rel=2e-3)
    assert len(lines) == 2 + len(line["ops"])  # heading and JSON line
    assert (tmp_path / "kernels.jsonl").read_text("utf-8") == lines[-1] + "\n"


def off(op):
    """The op with a small error in its first output."""

    def wrong(*args):
        out = op(*args)
        first = out if isinstance(out, torch.Tensor) else out[0]
        first.add_(1) if not first.is_floating_point() else first.mul_(1.01)
        return out

    return wrong


WRONG = [  # op, where the benchmark finds it, or its peer
    ("advance", advance, "advance"),
    ("attention", attention, "block_attention"),
    ("candidates", candidates, "candidates"),
    ("filters", candidates, "candidates"),
    ("fp8", fp8, "linear"),
    ("gemm", bench_model, "grouped_gemm"),
    ("moe", moe, "experts"),
    ("norm", norm, "add_rms_norm"),
    ("philox", bench_decoding, "philox_reference"),
    ("refine", bench_decoding, "plain_refine"),
    ("rope", rope, "qk_norm_rope_write"),
    ("router", router, "route"),
    ("top_logprobs", top_logprobs, "top_logprobs"),
]


@pytest.mark.parametrize("op, place, name", WRONG, ids=[op for op, *_ in WRONG])
@torch.inference_mode()
def test_a_wrong_op_is_not_timed(op, place, name, monkeypatch):
    case_of, arguments = kernels.OPS[op]
    build = partial(case_of, cases.Here(), *next(iter(arguments.values())))
    build().gate(op)
    monkeypatch.setattr(place, name, off(getattr(place, name)))
    with pytest.raises(ArithmeticError, match=r"allowed|differ"):
        build().gate(op)


def test_nothing_is_reported_when_a_timing_fails(tmp_path):
    file = tmp_path / "bench_broken.py"
    file.write_text("def test_broken():\n    assert False\n", "utf-8")
    with pytest.raises(SystemExit, match="nothing is reported"):
        kernels.run(file, quick=False)


def test_figures_are_those_of_one_call():
    def record(who, median, calls):
        info = {"op": "norm", "case": "t32", "who": who, "peer": "F.rms_norm", "calls": calls}
        info |= {"bytes": 4000, "operations": 8.0}
        return {"extra_info": info, "stats": {"median": median, "iqr": median / 10}}

    entry = {"op": "norm", "case": "t32", "peer": "F.rms_norm", "bytes": 4000, "operations": 8.0}
    entry |= {"us": 2.0, "us_iqr": 0.2, "peer_us": 10.0, "peer_us_iqr": 1.0, "ratio": 5.0, "gb_s": 2.0}
    assert kernels.by_case([record("ours", 32e-6, 16), record("peer", 20e-6, 2)]) == [entry]


@pytest.mark.parametrize("only", ["norm,nothing", ""])
def test_unknown_ops_are_refused(only, capsys):
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--only", only])
    assert "expected some of" in capsys.readouterr().err


@torch.inference_mode()
def test_what_only_a_gpu_times_is_right_in_the_interpreter():
    machine = cases.Here()
    h, *rest = bench_model.router_arguments(machine, "small", 5)
    weight = bench_model.expert_weights(machine, len(rest[0]), 2 * 24, h.shape[1])
    with force_ops("triton"), interpreted():
        routing = router.route(h, *rest)
        product = bench_model.gemm_kernel(h, routing, weight)
        draws = bench_decoding.philox_kernel(torch.tensor([-7]), torch.arange(300) * 3, torch.tensor([5]))
    cases.agree("gemm", (product,), (bench_model.plain_gemm(h, routing, weight),))
    truth = [bench_decoding.philox_in_integers(-7, 3 * at, 5) for at in range(300)]
    assert draws.tolist() == torch.tensor(truth, dtype=torch.float32).tolist()
