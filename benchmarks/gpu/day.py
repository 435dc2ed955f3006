"""Everything a GPU is wanted for, unattended: from its first light to tuned tables, within some minutes.

    python -m benchmarks.gpu.day --minutes 6.5 --out DIR
    python -m benchmarks.gpu.day --minutes 4.5 --out DIR --only prewarm,tune,decode,steps --changed step,moe

Phases, each a command of its own that may fail, hang or lose the device without ending the others:

    prewarm    all kernels of the day compiled side by side          benchmarks.gpu.prewarm
    light      every kernel, a step, a text, an engine               benchmarks.gpu.first_light, beside the next one
    tests      the tests marked gpu                                  pytest -m gpu, a process per core
    decode     ceilings, tokens/s, a step kernel by kernel           benchmarks.gpu --only decode,profile
    steps      whole steps, then single kernels                      benchmarks.gpu --only steps,kernels
    tune       launch parameters: tables in kernels/ and in DIR      benchmarks.tune
    peers      PyTorch alone at the same step, if named              benchmarks.gpu --only peers
    memcheck, racecheck   of kernels at small sizes, if named        compute-sanitizer

They run in this order, or in that of --only. Needs a checkout, pytest with xdist and timeout; no network. What a phase
prints goes to DIR/log.txt and, cut to a line's width, to the terminal. DIR/day.jsonl has a line for every phase, check
of first light and failed test, as soon as it ends; DIR/gpu.jsonl and DIR/tune.jsonl have what was measured.
DIR/cache.tar.xz, if it is there, is a pack of compiled kernels made by benchmarks.gpu.prewarm.

A phase that loses the device is started again with what it has left to do. A second run on the same DIR measures what
the first did not. After an edit, and new tuned tables are one, that would be everything; with --changed NAMES (parts of
points' names, "none" for no point) lines measured before it are kept but for these points'. The tuner starts anew.

Exit codes: 0 all phases passed or ran out of time; 1 some failed, or ran out of time though named; 2 no CUDA device, or
bad arguments. --dry-run takes the same paths on a CPU with tiny shapes.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from llada2_fast.kernels import _tuned

from ..harness import ROOT
from ..lines import append_line
from ..tune import tuner as tune
from . import suite as gpu

OUT_OF_TIME = "out of time"
LEAST_S = 3.0  # with less left nothing is started
MINUTES = "{minutes}"
WIDTH = 160
GRACE_S = 10.0  # what a command that is told its minutes may take beyond them
PREWARMED = "steps,kernels,scenarios,tests"  # the tuner compiles beside its timing
SANITIZED = {  # small sizes, for tools are slow
    "files": [f"tests/kernels/test_{name}.py" for name in ("refine", "attention", "moe", "advance")],
    "names": "parity_on_a_gpu or uneven or 33-2048 or (2-7-contiguous and bfloat16) or rows_give",
}


class Phase(NamedTuple):
    """One command: `words`, where MINUTES is what it is given to spend."""

    name: str
    limit: float  # seconds it may take at most
    words: list
    beside: str = ""  # phases next to one another that share it run side by side
    named: bool = False  # runs only if --only names it
    environment: dict = {}


def phases(folder, dry=False, changed=None):
    """All phases, in their order. folder: where results go; changed: see --changed."""
    python, tried, day = [sys.executable, "-m"], ["--dry-run"] * dry, folder / "day.jsonl"
    tests = [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout-method", "thread"]
    side_by_side = ["-n", "auto", "--dist", "loadfile", "--timeout", "60", "-p", "benchmarks.gpu.failed_tests"]
    side_by_side.append(f"--failed-to={day}")  # one word: a path by itself could become pytest's root
    packed = folder / "cache.tar.xz"
    unpacked = ["--unpack", str(packed)] * packed.is_file()
    kept = ["--resume"] if changed is None else ["--resume-any", "--anew", changed]
    told = ["--minutes", MINUTES, "--results"]

    def gpu(only):
        return [*python, "benchmarks.gpu", "--only", only, *told, str(folder / "gpu.jsonl"), *kept, *tried]

    def sanitizer(tool):
        found = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "1"]
        return [*found, *tests, "--timeout", "3600", *SANITIZED["files"], "-k", SANITIZED["names"]]

    # without PyTorch's memory pool each tensor is bounded by itself; graphs cannot do without
    bounded = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Phase("prewarm", 90, [*python, "benchmarks.gpu.prewarm", "--only", PREWARMED, *unpacked, *tried]),
        Phase("light", 120, [*python, "benchmarks.gpu.first_light", "--out", str(day), *tried], "checks"),
        Phase("tests", 150, [*tests, *side_by_side, *["--collect-only", "tests/test_graphs.py"] * dry], "checks"),
        Phase("decode", 150, gpu("decode,profile")),
        Phase("steps", 600, gpu("steps,kernels")),
        Phase("tune", 150, [*python, "benchmarks.tune", *told, str(folder / "tune.jsonl"), "--resume", *tried]),
        Phase("peers", 300, gpu("peers"), named=True),
        Phase("memcheck", 1800, sanitizer("memcheck"), named=True, environment=bounded),
        Phase("racecheck", 1800, sanitizer("racecheck"), named=True, environment=bounded),
    ]


class Day:
    """A run of phases that ends at `end` (of time.monotonic) and keeps what they say in a folder."""

    def __init__(self, folder, end):
        self.folder, self.end = folder, end
        self.lines, self._running = [], []
        self._lock = threading.Lock()

    def run(self, some):
        """Run phases in order, those that share `beside` side by side. Whether none failed."""
        for _, group in groupby(some, key=lambda phase: phase.beside or phase.name):
            with ThreadPoolExecutor() as pool:
                try:
                    self.lines += pool.map(self._run, group)
                except BaseException:  # somebody's interrupt
                    self.stop()
                    raise
        return all(line["ok"] for line in self.lines)

    def _run(self, phase):
        started = time.monotonic()
        end = min(self.end, started + phase.limit)
        least = LEAST_S + (GRACE_S + gpu.RESERVE_S) * (MINUTES in phase.words)
        error, code, starts = OUT_OF_TIME, None, 0
        while end - time.monotonic() > least and (starts == 0 or code == gpu.LOST):
            error, code = self._start(phase, end)
            starts += 1
        if phase.name == "tune":
            for family in tune.FAMILIES:
                shutil.copy(_tuned.table_path(family), self.folder)
        ok = error is None or (error == OUT_OF_TIME and not phase.named)
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "phase": phase.name, "ok": ok}
        line |= {"error": error, "starts": starts, "seconds": round(time.monotonic() - started, 1)}
        append_line(self.folder / "day.jsonl", line)
        return line

    def _start(self, phase, end):
        """(what went wrong or None, exit code or None if it was killed)."""
        seconds = end - time.monotonic()
        words = [f"{(seconds - GRACE_S) / 60}" if word == MINUTES else word for word in phase.words]
        self._say(phase.name, f"{seconds:.0f} s: {' '.join(words)}")
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=os.environ | phase.environment | {"PYTHONUNBUFFERED": "1"}, text=True,
                errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return str(error), None
        self._running.append(process)

        def listen():
            for line in process.stdout:
                self._say(phase.name, line.rstrip("\n"))

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        kill_group(process)  # what it has left behind, too: the next phase wants the device for itself
        listener.join()
        errors = {0: None, None: f"killed after {seconds:.0f} s", gpu.LEFT_OUT: OUT_OF_TIME}
        return errors.get(code, f"exit code {code}"), code

    def stop(self):
        """End what runs and start nothing more."""
        self.end = time.monotonic()
        for process in self._running:
            kill_group(process)

    def _say(self, name, text):
        """To the log, and cut to a line's width to the terminal."""
        with self._lock, open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{name:8} {text}\n")
            print(f"{name:8} {text}"[:WIDTH], flush=True)


def kill_group(process):
    """Kill a process that was started in a session of its own, or what is left of it, and all it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.5, help="the run ends within them (default: %(default)g)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go; made if need be")
    parser.add_argument("--only", help="comma-separated phases, in the order they are to run")
    parser.add_argument("--changed", metavar="NAMES", help="measure these points anew, keep others whatever was edited")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: tries the day, not the machine")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu.day: needs a CUDA device, found none (--dry-run tries it on a CPU)", file=sys.stderr)
        return 2
    folder = options.out.resolve()
    known = {phase.name: phase for phase in phases(folder, options.dry_run, options.changed)}
    names = options.only.split(",") if options.only else [name for name, phase in known.items() if not phase.named]
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(known)}")
    if options.minutes * 60 <= LEAST_S:
        parser.error(f"--minutes {options.minutes:g}: expected some")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception: phases end with the day
    day = Day(folder, time.monotonic() + 60 * options.minutes)
    passed = day.run([known[name] for name in names])
    for line in day.lines:
        print(f"{line['phase']:10} {line['seconds']:7.1f} s  {line['error'] or 'passed'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
