"""The day on a GPU, tried on a CPU: nothing that a phase or a check does ends the others."""

import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from benchmarks.gpu import day as gpu_day
from benchmarks.gpu import first_light
from benchmarks.gpu import suite as gpu
from benchmarks.gpu.day import Day, Phase
from benchmarks.gpu.first_light import apart
from benchmarks.harness import ROOT
from benchmarks.lines import lines_of
from tests import unruly


def script(name, text, limit=60.0, **more):
    return Phase(name, limit, [sys.executable, "-c", text], **more)


def run(folder, *phases, seconds=60.0):
    """Whether none failed; lines by phase."""
    day = Day(folder, time.monotonic() + seconds)
    passed = day.run(phases)
    lines = {line["phase"]: line for line in lines_of(folder / "day.jsonl") if "phase" in line}
    assert lines.keys() == {phase.name for phase in phases}
    return passed, lines


def test_dry_run(tmp_path, capsys):
    """What only a GPU would show is left out: no kernel is compiled but one, no gpu test is run."""
    assert (
        gpu_day.main(["--dry-run", "--minutes", "20", "--out", str(tmp_path), "--only", "prewarm,light,tests,decode"])
        == 0
    )
    day = lines_of(tmp_path / "day.jsonl")
    assert [line["phase"] for line in day if "phase" in line][-1] == "decode" and all(line["ok"] for line in day)
    assert {line["check"] for line in day if "check" in line} == set(first_light.checks())
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-4:]] == [
        [name, ANY, "s", "passed"] for name in ("prewarm", "light", "tests", "decode")
    ]
    lines = {line["point"]: line for line in lines_of(tmp_path / "gpu.jsonl")}
    decode, peer = lines["decode mini bf16 b1"], lines["decode diffusers"]["ratio_vs_diffusers"]
    assert decode["tok_s"] > 0 and decode["host_syncs_per_step"] == decode["launches_per_step"] == 0
    assert peer > 0 if find_spec("diffusers") else peer is None
    profile = lines["profile mini bf16 b1 carried"]
    rows = [*profile["kernels"], profile["rest"]]
    assert len(rows) == 26 and sum(row["count"] for row in rows) == profile["launches"] > 26
    assert sum(row["total_us"] for row in rows) == pytest.approx(1e3 * profile["kernels_ms"], rel=1e-3)
    assert profile["ms"] == pytest.approx(profile["kernels_ms"] + profile["gaps_ms"], rel=1e-3)


# processes


def test_a_call_apart_returns_raises_dies_or_hangs():
    assert apart(partial(max, 3, 4), 60) == (4, None, "")
    value, error, output = apart(partial(unruly.raises, "seen"), 60)
    assert value is None and error == "ArithmeticError: two lines"
    assert output.startswith("seen") and "in raises" in output
    assert apart(partial(time.sleep, 60), 0.5).error == "killed after 0.5 s"
    assert apart(unruly.dies, 60).error == f"ended with {-signal.SIGSEGV}"


def test_a_failed_check_of_first_light_costs_no_other(tmp_path, capsys):
    lines = first_light.run(["nonsense", "gate norm"], dry=True, jobs=2, limit=120, out=tmp_path / "day.jsonl")
    assert [line["ok"] for line in lines] == [False, True] and lines[1]["relative_error"] < 1e-2
    assert lines[0]["error"] == "KeyError: 'nonsense'" and "Traceback" in lines[0]["output"]
    assert sorted(line["check"] for line in lines_of(tmp_path / "day.jsonl")) == ["gate norm", "nonsense"]
    assert "FAILED nonsense" in capsys.readouterr().out


# phases


def test_what_hangs_dies_or_fails_ends_no_other_phase(tmp_path, capsys):
    hangs = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('in it'); time.sleep(99)"
    passed, lines = run(
        tmp_path,
        script("hangs", hangs, limit=4.0, beside="checks"),
        script("dies", "import os; os.kill(os.getpid(), 11)", beside="checks"),
        script("raises", "1 / 0"),
        Phase("missing", 60.0, ["no-such-command"]),
        script("fine", "print('so far {minutes}', 'x' * 300)"),
    )
    assert not passed and {name for name, line in lines.items() if line["ok"]} == {"fine"}
    assert lines["hangs"]["error"] == "killed after 4 s" and 3.5 < lines["hangs"]["seconds"] < 30
    assert lines["dies"]["error"] == "exit code -11" and lines["raises"]["error"] == "exit code 1"
    assert "no-such-command" in lines["missing"]["error"] and lines["fine"]["error"] is None
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert "hangs    in it" in log and "ZeroDivisionError" in log and "x" * 300 in log
    assert max(map(len, capsys.readouterr().out.splitlines())) == gpu_day.WIDTH


def test_a_command_is_told_the_minutes_it_has(tmp_path):
    words = [sys.executable, "-c", "import sys; print('told', sys.argv[1])", gpu_day.MINUTES]
    run(tmp_path, Phase("short", 40.0, words), Phase("rest", 600.0, words))
    told = [
        float(text.split()[-1]) for text in (tmp_path / "log.txt").read_text("utf-8").splitlines() if " told " in text
    ]
    assert told == pytest.approx([(40 - gpu_day.GRACE_S) / 60, (60 - gpu_day.GRACE_S) / 60], abs=0.1)


def test_a_phase_that_loses_the_device_is_started_again(tmp_path):
    lost = "import pathlib, sys; p = pathlib.Path(r'{}'); p.mkdir() if not p.is_dir() else sys.exit(0); sys.exit(3)"
    passed, lines = run(tmp_path, script("lost", lost.format(tmp_path / "once")))
    assert passed and lines["lost"]["starts"] == 2 and lines["lost"]["error"] is None


def processes(word):
    """Command lines of the processes that have it in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace").replace("\0", " "))
        except OSError:  # it has ended
            pass
    return [line for line in found if word in line]


def test_what_a_phase_leaves_behind_ends_with_it(tmp_path):
    sleeps = f"import time; time.sleep(99)  # {tmp_path}"
    left = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeps!r}]); print('here', flush=True)"
    passed, lines = run(tmp_path, script("leaves", left))
    assert passed and lines["leaves"]["seconds"] < 50 and processes(str(tmp_path)) == []


def test_a_phase_with_points_left_is_out_of_time_and_a_named_one_then_failed(tmp_path):
    left = f"import sys; sys.exit({gpu.LEFT_OUT})"
    passed, lines = run(tmp_path, script("left", left), script("named", left, named=True))
    assert not passed and [lines[name]["error"] for name in ("left", "named")] == [gpu_day.OUT_OF_TIME] * 2
    assert lines["left"]["ok"] and not lines["named"]["ok"]


def test_a_signal_to_the_day_ends_what_it_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.day", "--dry-run", "--out", str(tmp_path), "--only", "light"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as day:
        while len(processes(str(tmp_path))) < 2:
            assert day.poll() is None
            time.sleep(0.1)
        day.terminate()
        assert day.wait(60) == 128 + signal.SIGTERM and processes(str(tmp_path)) == []


def test_what_the_time_is_over_for_is_left_out_and_said(tmp_path):
    started = time.monotonic()
    passed, lines = run(tmp_path, script("long", "import time; time.sleep(99)"), script("late", "1"), seconds=4.0)
    assert not passed and time.monotonic() - started < 30
    assert lines["long"]["error"].startswith("killed after") and lines["late"]["error"] == gpu_day.OUT_OF_TIME
    assert lines["late"]["starts"] == 0 and lines["late"]["ok"]


def test_a_failed_test_has_a_line_as_soon_as_it_failed(tmp_path):
    path = tmp_path / "failed.jsonl"
    waits = "import os, time\n\ndef test_b():\n    while not os.path.isfile({!r}):\n        time.sleep(0.1)\n"
    (tmp_path / "test_a.py").write_text("def test_a():\n    assert 1 == 2\n", "utf-8")
    (tmp_path / "test_b.py").write_text(waits.format(str(path)), "utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--rootdir", str(tmp_path)]
    words += ["-p", "benchmarks.gpu.failed_tests", "--failed-to", str(path), str(tmp_path)]
    passed, lines = run(tmp_path, Phase("tests", 120.0, words), seconds=120.0)
    failed = lines_of(path)
    assert not passed and lines["tests"]["error"] == "exit code 1"
    assert [line["test"].rpartition("/")[2] for line in failed] == ["test_a.py::test_a"]
    assert "assert 1 == 2" in failed[0]["error"]


def test_a_file_of_tests_that_cannot_be_read_has_a_line(tmp_path):
    path = tmp_path / "failed.jsonl"
    (tmp_path / "test_a.py").write_text("import nothing_of_this_name\n", "utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.failed_tests"]
    passed, _ = run(
        tmp_path, Phase("tests", 60.0, [*words, "--failed-to", str(path), "--rootdir", str(tmp_path), str(tmp_path)])
    )
    (failed,) = lines_of(path)
    assert not passed and failed["test"].endswith("test_a.py") and "nothing_of_this_name" in failed["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line_and_exits_2(capsys, tmp_path):
    for main, arguments in ((gpu_day.main, ["--out", str(tmp_path / "day")]), (first_light.main, [])):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and "needs a CUDA device" in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_phases_and_checks_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu_day.main(["--dry-run", "--out", str(tmp_path / "day"), "--only", "light,speed"])
    assert "--only speed: expected some of prewarm, light, tests" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        first_light.main(["--dry-run", "--only", "speed"])
    assert "--only speed: expected parts of versions, gate refine" in capsys.readouterr().err
