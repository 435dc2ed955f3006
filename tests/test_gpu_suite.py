"""The GPU suite on a CPU: order, deadline, resume, error lines, goals, gates, and every path of a dry run."""

import copy
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import gates, goals, peers
from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu import suite as gpu
from benchmarks.gpu.machine import SHARP, DoesNotFit, Machine, Point, fill, random_model
from benchmarks.gpu.steps import Step
from benchmarks.harness import ROOT
from benchmarks.lines import lines_of
from benchmarks.roofline import GPUS, MINI, gpu_of, step_costs
from llada2_fast.cache import PagedKVCache
from llada2_fast.kernels import attention, int4, norm
from llada2_fast.kernels.fp8 import dequantize_weight
from llada2_fast.model import LLaDA2Model

CEILINGS = {"copy_tb_s": 4.0, "bf16_tflops": 700.0}


@pytest.fixture
def machine():
    torch.manual_seed(0)
    return Machine(dry=True)


def suite(machine, path, points, seconds=60.0, resume=False):
    """Run some points behind given ceilings; (Outcome, lines by point)."""
    results = gpu.Results(machine, path, resume)
    first = Point("ceilings", "ceilings", 0.1, lambda machine: CEILINGS, gate=None)
    outcome = gpu.run([first, *points], machine, results, time.monotonic() + seconds)
    return outcome, results.lines


def fails(machine):
    raise ZeroDivisionError("one\n  two")


# the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line_and_exits_2(capsys, tmp_path):
    assert gpu.main(["--results", str(tmp_path / "gpu.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "needs a CUDA device" in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "kernels,speed"])
    assert f"--only speed: expected some of {', '.join(gpu.SECTIONS)}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--points", "step mini,speed"])
    assert "--points speed: no point of these sections" in capsys.readouterr().err


def test_chosen_points_come_with_their_gates():
    points = gpu.all_points()
    names = [point.name for point in gpu.chosen(points, ["step mini bf16 b1 p1024", "moe fp8"])]
    assert names[:3] == ["ceilings", "step mini bf16 b1 p1024", "gate moe fp8"]
    assert names[3:] == [f"moe fp8 m{tokens}" for tokens in (32, 1024, 64, 256, 4096)]
    assert len(gpu.chosen(points, ["b1 p1024 carried real"])) == 4


def test_dry_run_of_the_kernels_is_kept_and_resumed(capsys, tmp_path, monkeypatch):
    path = tmp_path / "results" / "gpu.jsonl"
    command = ["--dry-run", "--only", "kernels", "--results", str(path), "--resume"]
    assert gpu.main(command) == 0
    lines, printed = lines_of(path), capsys.readouterr().out.splitlines()
    names = [line["point"] for line in lines]
    assert names == [point.name for point in gpu.all_points(["kernels"])] and names[0] == "ceilings"
    assert all(line["dry_run"] and line["benchmark"] == "gpu" and "error" not in line for line in lines)
    assert {"device", "threads", "versions", "commit", "sources", "time", "seconds"} <= set(lines[0])
    timed = [line for line in lines[1:] if not line["point"].startswith("gate ")]
    assert all(line["us"] > 0 and line["percent_of_copy"] > 0 and line["over_floor"] > 0 for line in timed)
    assert [json.loads(line)["point"] for line in printed[1 : len(lines) + 1]] == names
    assert json.loads(printed[-1])["measured"] == len(lines)

    def added(*more):
        before = len(lines_of(path))
        assert gpu.main([*command, *more]) == 0
        return [line["point"] for line in lines_of(path)[before:]]

    assert added() == ["ceilings"] and json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == 1
    monkeypatch.setattr(gpu, "sources", lambda section: f"{section} changed")
    assert added("--resume-any") == ["ceilings"] and added() == names


def test_dry_run_of_steps_and_peers(capsys, tmp_path):
    path = tmp_path / "gpu.jsonl"
    names = "peer,step mini bf16 b1 p1024,step mini fp8 b32 p1024 carried,step flash fp8 b1 p65504"
    assert gpu.main(["--dry-run", "--points", names, "--results", str(path)]) == 0
    lines = {line["point"]: line for line in lines_of(path)}
    step = lines["step mini bf16 b1 p1024"]
    assert step["floor_default_ms"] > 0 and step["over_floor"] == pytest.approx(step["ms"] / step["floor_ms"], rel=1e-3)
    assert 0 < step["experts_touched"] <= 16 and step["experts_expected"] <= 16
    assert {f"peer {name}" for name in ("eager", "compile", "grouped_mm")} < lines.keys()
    assert "step flash fp8 b1 p65504" in lines
    *_, summary = printed = capsys.readouterr().out.splitlines()
    verdicts = json.loads(summary)["goals"]
    assert [text.split(", at ")[0] for text in verdicts] == [goal.text for goal in goals.GOALS]
    assert verdicts["host syncs in a step, at most 0"] == "met"
    for line, (text, verdict) in zip(printed[-1 - len(verdicts) : -1], verdicts.items(), strict=True):
        assert line.startswith(verdict) and line.endswith(text)


def test_rounding_alone_does_not_fail_the_gate_of_the_peers(machine):
    """A GPU's kernels round otherwise than PyTorch's; here float32 does. In all twenty layers nothing would agree."""
    deep = replace(machine.config("mini"), num_hidden_layers=20, hidden_size=512, moe_intermediate_size=128)
    machine.config = lambda name, quantization=None: deep
    step = Step(machine, machine.shallow(), 1, 1024, in_order=True)
    wide = copy.deepcopy(step)
    wide.model.float()
    wide.cache = PagedKVCache(wide.model.config, step.cache.num_pages, 32, torch.float32, machine.device)
    wide.cache.k.copy_(step.cache.k)
    wide.cache.v.copy_(step.cache.v)
    with torch.no_grad():
        assert peers.agreeing(step, peers.reference_step(wide)) > 0.7 > peers.AGREE
        wide.model.layers[1].mlp.router.weight.mul_(-1)  # other experts: another network
        assert peers.agreeing(step, peers.reference_step(wide)) < peers.AGREE


def test_a_profile_names_each_kernel_with_its_count_and_times():
    gemm = "_gemm_kernel"
    fill = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul>>(int)"
    )
    events = [(gemm, "2x1x1", us) for us in (200.0, 100.0)]
    events += [(gemm, "4x1x1", 50.0), (fill, "", 2.0), ("Memcpy DtoD (Device -> Device)", "", 1.5)]
    events += [(f"nvjet_{i}", "", 0.5) for i in range(24)]
    kernels, rest = gpu_steps.summed(events)
    assert kernels[0] == {
        "name": gemm, "grid": "2x1x1", "count": 2, "us": 150.0, "total_us": 300.0, "least_us": 100.0, "most_us": 200.0,
    }  # fmt: skip
    assert kernels[1]["us"] == 50.0 and kernels[3]["name"] == "Memcpy DtoD"
    assert kernels[2]["name"] == "vectorized_elementwise_kernel<4, FillFunctor<int>, std::a..."
    assert len(kernels) == 25 and (rest["count"], rest["total_us"]) == (3, 1.5)
    line = {"ms": 0.4, "kernels_ms": 0.3655, "gaps_ms": 0.0345, "launches": 29, "kernels": kernels, "rest": rest}
    text = list(gpu_steps.show(line))
    assert text[1].split() == ["2", "150.00", "100.00", "200.00", "300.0", gemm, "2x1x1"]
    assert text[-1].endswith("365.5  in all; the replay takes 400.0, gaps are 34.5") and len(text) == 28


def test_without_diffusers_its_ratio_is_null(machine, monkeypatch):
    from benchmarks.gpu import decode

    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    line = decode.time_diffusers(machine)
    assert line["ratio_vs_diffusers"] is None and line["diffusers_tok_s"] is None and line["call_tok_s"] > 0


# order, deadline, failures


def test_points_go_in_two_rounds_through_the_sections_with_gates_first():
    points = gpu.all_points()
    assert len({point.name for point in points}) == len(points) and points[0].name == "ceilings"
    order = [(point.later, gpu.SECTIONS.index(point.section)) for point in points]
    assert order == sorted(order)
    at = {point.name: i for i, point in enumerate(points)}
    assert all(at[point.gate] < at[point.name] for point in points[1:])
    telling = {name for goal in goals.GOALS for name in goal.points if not name.startswith("peer ")}
    assert all(not points[at[name]].later for name in telling)
    assert [point.name for point in points[1:4]] == [
        f"decode mini {kind}" for kind in ("bf16 b1", "bf16 b32", "fp8 b1")
    ]
    assert [point.name for point in points[-3:]] == [f"peer {name}" for name in ("eager", "compile", "grouped_mm")]
    steps = [point.name for point in points if point.section == "steps" and not point.later]
    assert steps[:4] == [f"step mini bf16 {size}" for size in gpu_steps.FIRST] and len(steps) == 12
    assert sum(point.seconds for point in points if not point.later) < 8 * 60 - gpu.RESERVE_S


def test_a_device_without_the_memory_is_not_asked_for_flash(capsys, monkeypatch):
    class Small(Machine):
        def __init__(self, dry):
            super().__init__(dry)
            self.memory = 80e9

    monkeypatch.setattr(gpu, "Machine", Small)
    assert gpu.main(["--dry-run", "--points", "step flash"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == 1  # the ceilings


def test_what_would_not_end_in_time_is_left_out_and_the_rest_is_not(machine):
    ran = []
    points = [
        Point(name, "kernels", seconds, lambda machine, name=name: ran.append(name) or {})
        for name, seconds in (("long", 1000.0), ("short", 1.0), ("too long", 70.0), ("last", 2.0))
    ]
    outcome, _ = suite(machine, None, points, seconds=60.0)
    assert ran == ["short", "last"] and outcome == gpu.Outcome(measured=3, failed=0, left_out=2)


def test_slower_machines_are_given_less_to_do(machine):
    points = [Point("slow", "kernels", 0.01, lambda machine: time.sleep(0.5) or {})]
    points += [Point("next", "kernels", 4.0, lambda machine: {})]
    assert suite(machine, None, points, seconds=4.6)[0].left_out == 1  # 4.1 s are left, but all takes a tenth longer
    assert suite(machine, None, points, seconds=600.0)[0].left_out == 0


def test_what_has_not_ended_at_the_deadline_is_broken_off(machine, tmp_path):
    path = tmp_path / "gpu.jsonl"
    points = [Point("hangs", "steps", 0.1, lambda machine: time.sleep(60)), Point("never", "steps", 0.1, fails)]
    started = time.monotonic()
    outcome, lines = suite(machine, path, points, seconds=1.5)
    assert time.monotonic() - started < 50
    assert outcome == gpu.Outcome(measured=1, failed=0, left_out=2)
    assert lines["hangs"]["error"] == "broken off: out of time" and "never" not in lines
    assert [line["point"] for line in lines_of(path)] == ["ceilings", "hangs"]
    assert suite(machine, None, points, seconds=-1.0)[0] == gpu.Outcome(left_out=3)


def test_a_point_that_takes_much_too_long_is_broken_off_and_not_tried_again(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_S", 0.2)
    path = tmp_path / "gpu.jsonl"
    points = [Point("hangs", "steps", 0.01, lambda machine: time.sleep(60)), Point("next", "steps", 0.01, lambda _: {})]
    outcome, lines = suite(machine, path, points)
    assert outcome == gpu.Outcome(measured=2, failed=1)
    assert lines["hangs"]["error"] == "hangs: not over after 0 s" and lines["hangs"]["hung"]
    assert suite(machine, path, points, resume=True)[0] == gpu.Outcome(measured=1)  # ceilings


def test_a_call_that_never_returns_leaves_a_line_and_ends_the_process(tmp_path):
    path = tmp_path / "gpu.jsonl"
    program = f"""
import os, pathlib, signal, time
from benchmarks.gpu import suite as gpu
from benchmarks.gpu.machine import Machine, Point

def never(machine):  # like a driver's call that waits for a kernel: no signal is handled
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    time.sleep(60)

gpu.LEAST_S = gpu.GRACE_S = 0.6
machine = Machine(True)
results = gpu.Results(machine, pathlib.Path({str(path)!r}), False)
for seconds in (0.5, 60):  # the time of all points is over, the point's own is
    child = os.fork()
    if child == 0:
        gpu.run([Point("never", "steps", 0.01, never, gate=None)], machine, results, time.monotonic() + seconds)
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=50)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 4", "exit code 3"], done.stderr
    for line in lines_of(path):
        assert line["error"] == "hangs: the device does not answer" and line["hung"] and line["device_lost"]
        assert 1 < line["seconds"] < 30
    assert done.stderr.count("in never") == 2  # where it stood


def test_a_persons_interrupt_ends_the_suite(machine):
    def interrupted(machine):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite(machine, None, [Point("a", "steps", 0.1, interrupted)])


def test_a_failure_is_recorded_tried_again_and_costs_no_other_point(machine, tmp_path, capsys):
    def too_large(machine):
        raise DoesNotFit("cache needs 172.0 GB, 100.0 GB are free")

    path = tmp_path / "gpu.jsonl"
    points = [Point("bad", "steps", 0.1, fails), Point("large", "steps", 0.1, too_large)]
    points.append(Point("good", "steps", 0.1, lambda machine: {"ms": 1 / 3}))
    outcome, lines = suite(machine, path, points)
    assert outcome == gpu.Outcome(measured=3, failed=1) and "ZeroDivisionError" in capsys.readouterr().err
    assert lines["bad"]["error"] == "ZeroDivisionError: one two"
    assert lines["large"]["skipped"].startswith("cache needs") and lines["good"]["ms"] == 0.33333
    assert suite(machine, path, points, resume=True)[0] == gpu.Outcome(measured=1, failed=1)


def test_sources_name_files_that_there_are():
    for name in {name for names in gpu.SOURCES.values() for name in names}:
        assert list((ROOT / "benchmarks").glob(f"{name}.py")), name


def test_lines_are_resumed_by_the_sources_of_their_section(machine, tmp_path, monkeypatch):
    path = tmp_path / "gpu.jsonl"
    points = [Point("a step", "steps", 0.1, lambda machine: {"ms": 1.0}), Point("a bad step", "steps", 0.1, fails)]
    points.append(Point("decode", "decode", 0.1, lambda machine: {"ms": 1.0}))
    suite(machine, path, points)

    def again(**options):
        return sorted(gpu.Results(machine, path, True, **options).lines)

    assert again() == ["a bad step", "a step", "decode"]
    root = tmp_path / "root"
    for folder in ("benchmarks", "kernels", "llada2_fast"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.safetensors", "results", "__pycache__")
        )
    monkeypatch.setattr(gpu, "ROOT", root)
    for unrelated in ("benchmarks/gpu/suite.py", "benchmarks/report/tables.py", "benchmarks/tune/tuner.py"):
        (root / unrelated).write_text("# another one")
    assert len(again()) == 3
    (root / "benchmarks" / "gpu" / "steps.py").write_text("# another one")
    assert again() == ["decode"]
    assert again(any_sources=True) == ["a step", "decode"]  # what failed may be mended
    assert again(any_sources=True, anew=["step"]) == ["decode"]
    tuned = gpu.sources("tune", tables=False)
    (root / "kernels" / "moe_tuned.json").write_text("[]")
    assert again() == [] and gpu.sources("tune", tables=False) == tuned
    (root / "kernels" / "moe.py").write_text("# another one")
    assert gpu.sources("tune", tables=False) != tuned


def test_nothing_is_timed_whose_gate_has_not_passed(machine):
    timed = []
    points = [Point("gate a", "kernels", 0.1, fails)]
    points.append(Point("a", "kernels", 0.1, lambda machine: timed.append(1) or {}, gate="gate a"))
    outcome, lines = suite(machine, None, points)
    assert not timed and outcome.failed == 2 and lines["a"]["error"] == "gate a did not pass"


def test_a_lost_device_ends_the_run_and_its_point_is_not_tried_again(machine, tmp_path):
    path = tmp_path / "gpu.jsonl"
    machine.lost = lambda: True
    points = [Point("kills", "kernels", 0.1, fails), Point("next", "kernels", 0.1, lambda machine: {})]
    outcome, lines = suite(machine, path, points)
    assert outcome.device_lost and "next" not in lines
    machine.lost = lambda: False
    assert suite(machine, path, points, resume=True)[0] == gpu.Outcome(measured=2)


# goals


def test_goals_are_met_missed_or_not_measured():
    step, one, many = "step mini bf16 b1 p1024", "decode mini bf16 b1", "decode mini bf16 b32"
    lines = {step: {"over_floor_default": 1.25, "host_syncs": 1, "launches_outside_graph": 2, "peak_gb": None}}
    lines |= {one: {"tok_s": 1099.0}, many: {"tok_s": 9000.0}, "attention b8 p32768": {"error": "no", "us": 1.0}}
    by_start = {goal.text: goal.verdict for goal in goals.judge(lines)}
    assert len(by_start) == len(goals.GOALS)
    assert by_start["mini bf16 b1 p1024: step over its default floor"] == "met"
    assert by_start["host syncs in a step"] == "missed"
    assert by_start["launches outside the graph in a step"] == "met"
    assert by_start["mini bf16 b1: tokens/s at TPF 6.63"] == "missed"
    assert by_start["mini bf16: tokens/s of batch 32 over batch 1"] == "met"
    assert by_start["attention b8 p32768: percent of copy bandwidth"] == "not measured"
    assert by_start["mini fp8 b1: tokens/s at TPF 6.63"] == "not measured"
    assert by_start["mini bf16 b1 p1024: peak memory in GB"] == "not measured"


def test_each_card_is_judged_by_its_own_floor():
    def verdicts(device, **ceilings):
        lines = {"ceilings": {"device": device, **ceilings}, "decode mini bf16 b1": {"device": device, "tok_s": 900.0}}
        return {goal.text: goal for goal in goals.judge(lines)}

    speed, step = "mini bf16 b1: tokens/s at TPF 6.63", "mini bf16 b1 p1024: step over its default floor"
    h200, h100 = verdicts("NVIDIA H200"), verdicts("NVIDIA H100 80GB HBM3")
    assert h200[speed][1:] == ("at least 1100 (H200)", 900.0, "missed")
    assert h100[speed][1:] == ("at least 767.4 (H100; H200: 1100)", 900.0, "met")
    assert (h200[step].limit, h100[step].limit) == ("at most 1.25 (H200)", "at most 1.25 (H100)")
    measured = verdicts("NVIDIA H100 PCIe", copy_tb_s=4.3 / 2, bf16_tflops=700.0)[speed]
    assert measured[1:] == ("at least 550 (this device; H200: 1100)", 900.0, "met")
    assert verdicts("NVIDIA H100 PCIe")[speed].limit == "at least 1100 (unknown device, H200's floor)"
    assert {text: goal.limit for text, goal in h200.items() if goal.limit != h100[text].limit}.keys() == {
        speed, step, "mini fp8 b1: tokens/s at TPF 6.63", "mini fp8 b1 p1024: step over its default floor",
    }  # fmt: skip


@pytest.mark.parametrize("name, gpu", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", "h200"), ("NVIDIA B200", "b200"),
    ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None),
    ("NVIDIA GH200 480GB", None), ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ("AMD EPYC", None),
])  # fmt: skip
def test_the_roofline_knows_a_gpu_by_its_name(name, gpu):
    assert gpu_of(name) == gpu and (gpu is None or gpu in GPUS)


def test_every_goal_reads_points_that_exist():
    names = {point.name for point in gpu.all_points()}
    assert {name for goal in goals.GOALS for name in goal.points} <= names
    assert {prediction.point for prediction in goals.PREDICTIONS} <= names


# gates and steps


def test_gates_find_wrong_kernels(machine, monkeypatch):
    right_norm, right_attention = norm.add_rms_norm, attention.block_attention

    def wrong_norm(x, *args):
        total, out = right_norm(x, *args)
        return total, out * (1.05 if x.dtype == torch.bfloat16 else 1.0)

    def unwritten(q, *args):
        out = right_attention(q, *args)
        if q.dtype == torch.bfloat16:
            out[3] = torch.empty_like(out[3])
        return out

    monkeypatch.setattr(norm, "add_rms_norm", wrong_norm)
    monkeypatch.setattr(attention, "block_attention", unwritten)
    with pytest.raises(ArithmeticError, match=r"norm, relative error: 0\.0[45]"):
        gates.gate_norm(machine)
    with pytest.raises(ArithmeticError, match="attention, relative error: nan"):
        gates.gate_attention(machine)
    one = torch.ones(2)
    with pytest.raises(ArithmeticError, match="both, relative error: nan"):
        gates.close("both", [(one, one), (one * float("nan"), one)])


def test_poison_ends_with_its_block():
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with gpu_machine.poisoned():
            assert torch.empty(3).isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_step_does_all_its_work_and_can_be_repeated(machine):
    step = Step(machine, machine.network("mini"), batch=2, prefix=64)
    tokens = step.state.tokens.clone()
    step.check()
    step.reset()
    out = step.call()
    assert (out.token >= 0).all() and not out.commit.any() and not out.edit.any()
    assert torch.equal(step.state.tokens, tokens) and (step.state.frozen != 0).all()
    assert 0 < step.touched() <= machine.config("mini").num_experts


@pytest.mark.parametrize("variant, real", [("carried", 0), ("carried real", 2)])
def test_carried_places_are_empty_or_take_ended_blocks_along(machine, variant, real, monkeypatch):
    step = Step(machine, machine.network("mini"), batch=6, prefix=64, variant=variant)
    begun, forward = [], step.model.forward_blocks

    def noted(tokens, positions, blocks, *rest, **more):
        begun.append((blocks.block_row.tolist(), blocks.block_index.tolist(), step.state.tokens.clone()))
        return forward(tokens, positions, blocks, *rest, **more)

    monkeypatch.setattr(step.model, "forward_blocks", noted)
    step.check()
    for rows, blocks, tokens in begun:
        assert rows == [*range(6), *(range(2) if real else [-1, -1])] and blocks == [2] * 6 + [1 if real else 0] * 2
        assert (tokens == step.mask_id).all(1).tolist() == [True] * real + [False] * (6 - real)
    assert step.carried == real and len(begun) == 2
    step.reset()
    assert (step.state.block_start == 64).tolist() == [False] * real + [True] * (6 - real)


def test_a_carried_block_adds_experts_to_the_floor_and_no_logits():
    plain, more = (step_costs(MINI, 8, 1024, carried=carried) for carried in (0, 2))
    assert more["routed experts"] == step_costs(MINI, 10, 1024)["routed experts"]
    assert more["LM head"] == plain["LM head"] and more["attention"].bytes == plain["attention"].bytes


def test_one_network_is_kept_at_a_time(machine):
    bf16 = machine.network("mini")
    assert machine.network("mini") is bf16
    fp8 = machine.network("mini", "fp8")
    assert fp8.lm_head.weight.dtype == torch.float8_e4m3fn and machine.network("mini") is not bf16


def test_masks_of_a_random_network_choose_almost_as_many_experts_as_other_tokens():
    torch.manual_seed(1)
    config = replace(
        gpu_machine.TINY, hidden_size=128, num_hidden_layers=4, num_experts=64, num_experts_per_tok=4, head_dim=64,
        n_group=8, topk_group=4,
    )  # fmt: skip
    sharp = random_model(config, torch.float32, "cpu")
    plain = LLaDA2Model(config)
    fill(plain)
    for name, p in plain.named_parameters():
        if "_layernorm.weight" in name:
            p.fill_(1.0)
    ids = torch.randint(500, (1, 512 + 32))
    masks = ids.clone()
    masks[0, -32:] = config.mask_token_id

    def touched(model, ids):
        chosen = model(ids, output_router_indices=True).router_indices
        counts = [layer[-32:].unique().numel() for layer in chosen if layer is not None]
        return sum(counts) / len(counts)

    assert sharp.layers[0].attention.query_layernorm.weight[0] == SHARP
    assert touched(sharp, masks) > 0.8 * touched(sharp, ids)
    assert touched(plain, masks) < 0.7 * touched(plain, ids)


def test_quantised_weights_stand_for_values_of_the_usual_size(machine):
    layer = gates.moe_layer(machine, "fp8")
    for weight, scale, parts in (
        (layer.experts.gate_up, layer.experts.gate_up_scale, 2),
        (layer.shared_experts.down.weight, layer.shared_experts.down.scale, 1),
    ):
        values = dequantize_weight(weight, scale, parts)
        assert values.std().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.05) and values.mean().abs() < 0.01
    experts, config = gates.moe_layer(machine, "int4").experts, machine.config("mini")
    for weight, columns in zip(experts.weights, (config.hidden_size, config.moe_intermediate_size), strict=True):
        values = int4.dequantize_weight(*weight, columns)
        assert values.mean().abs() < 0.01 and values.std().item() < 1.1 * columns**-0.5
