"""The GPU suite: ceilings of the device, decoding, whole steps, every kernel, peers; each beside floor and goal.

    python -m benchmarks.gpu [--minutes 8] [--only SECTION,...] [--points NAME,...] [--results FILE] [--dry-run]
                             [--resume | --resume-any [--anew NAME,...]]

Runs unattended; without diffusers its ratios are null. Points go in order of importance, in two rounds: the telling
ones of every section first, the rest of the grids behind them, peers last. Each is one JSON line, printed and appended
to benchmarks/results/gpu.jsonl as soon as it is there; one that fails leaves its error and the next one runs. A point
starts only if it is expected to end in time, and what has not ended then, or takes much longer than it should, is
broken off. --resume leaves out what has been measured on the same device with the same sources: those that the section
uses, tuned tables among them; --resume-any what was measured with any sources, but for points with one of --anew in the
name. Ceilings are always measured. At the end stand the goals, met or missed, and one JSON line with them and counts.

Exit codes: 0 all points measured; 1 some failed; 2 no CUDA device, or bad arguments; 3 the device was lost, or hangs
(run again with --resume, which leaves that point out); 4 it hangs and the time is over; 5 out of time, points are left.
--dry-run takes the same paths on a CPU with tiny shapes, where neither figures nor verdicts mean anything; it keeps no
lines unless --results names a file.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from ..harness import RESULTS, ROOT, card
from ..lines import append_line, lines_of
from . import decode, kernels, peers, steps
from .goals import judge
from .machine import DoesNotFit, Machine, Point, ceilings

SECTIONS = ("ceilings", "decode", "profile", "steps", "kernels", "peers")
RESERVE_S = 10.0  # of the minutes, for what surrounds the points
SLOW, LEAST_S = 6.0, 60.0  # a point is broken off when it takes so many times what is expected, and so many seconds
GRACE_S = 8.0  # until a point that has been broken off is out of what it was doing
LOST, HUNG_AT_END, LEFT_OUT = 3, 4, 5  # exit codes
OUT_OF_TIME = {"error": "broken off: out of time"}
_INPUTS = ("gpu/machine", "gpu/gates", "roofline")
SOURCES = {  # section -> modules of benchmarks, beside the package itself, that decide its figures; * as in file names
    "ceilings": ("gpu/machine",),
    "decode": (*_INPUTS, "gpu/decode", "models"),
    "profile": (*_INPUTS, "gpu/steps"),
    "steps": (*_INPUTS, "gpu/steps"),
    "kernels": (*_INPUTS, "gpu/kernels", "kernels/*"),
    "peers": (*_INPUTS, "gpu/steps", "gpu/peers"),
    "tune": (*_INPUTS, "tune/*"),
}


def all_points(only=SECTIONS):
    """The points of some sections in the order they are run: ceilings, then two rounds through the sections."""
    modules = (decode, steps, kernels, peers)
    found = [point for module in modules for point in module.points() if point.section in only]
    found.sort(key=lambda point: (point.later, SECTIONS.index(point.section)))
    return [Point("ceilings", "ceilings", 3, ceilings, gate=None), *found]


def chosen(points, names):
    """Those of the points whose name is one of `names` or, where a name is no point's, has it in it; with their gates.
    ValueError for a name that fits none."""
    known, wanted = {point.name for point in points}, set()
    for name in names:
        fitting = {name} & known or {one for one in known if name in one}
        if not fitting:
            raise ValueError(f"{name}: no point of these sections has it in its name")
        wanted |= fitting
    wanted |= {point.gate for point in points if point.name in wanted} | {"ceilings"}
    return [point for point in points if point.name in wanted]


def sources(section, tables=True):
    """Fingerprint of what decides a section's figures: the package and those modules of the benchmarks that make the
    section's inputs, or time them. A commit would not do, for result lines themselves change the tree.

    tables: with the tuned tables; the tuner, which writes them and measures against the defaults, goes without.
    """
    files = [path for name in SOURCES[section] for path in (ROOT / "benchmarks").glob(f"{name}.py")]
    if section != "ceilings":
        for folder in ("kernels", "llada2_fast"):
            files += (ROOT / folder).rglob("*.py")
            files += (ROOT / folder).rglob("*_tuned.json") if tables else ()
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Lines of this run and of earlier ones like it, by point; new ones go to the file at once.

    resume: take lines of the file that were measured on this device with the same sources, with any_sources also those
    that others have measured without an error, but of no point with one of `anew` in its name. fingerprint: of the
    sources of all points, in place of their section's.
    """

    def __init__(self, machine, path, resume, benchmark="gpu", fingerprint=None, any_sources=False, anew=()):
        self.path = path
        self.sources = {section: fingerprint or sources(section) for section in SOURCES}
        self.common = {"benchmark": benchmark, "dry_run": machine.dry} | card(machine.device)
        self.lines = {}
        if resume and path is not None and path.is_file():
            for line in lines_of(path):
                if line["section"] == "ceilings":  # half a second, and the card may be another of its name
                    continue
                same = line.get("sources") == self.sources.get(line["section"])
                kept = any_sources and "error" not in line and not any(part in line["point"] for part in anew)
                if all(line.get(key) == self.common[key] for key in ("device", "dry_run")) and (same or kept):
                    self.lines[line["point"]] = line

    def done(self, name):
        """Whether nothing is left to do: measured, does not fit, took the device down, or hangs."""
        line = self.lines.get(name)
        return line is not None and ("error" not in line or bool(line.keys() & {"device_lost", "hung"}))

    def passed(self, name):
        return name in self.lines and "error" not in self.lines[name]

    def add(self, point, seconds, values):
        """Keep a point's line, in the file and on the terminal (there without what all lines share)."""
        own = {
            "point": point.name, "section": point.section, "sources": self.sources[point.section],
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": seconds,
        } | values  # fmt: skip
        own = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in own.items()}
        self.lines[point.name] = self.common | own
        print(json.dumps(own), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, self.lines[point.name])


class Outcome(NamedTuple):
    """What became of the points of this run."""

    measured: int = 0  # or found not to fit the device
    failed: int = 0
    left_out: int = 0  # for want of time
    device_lost: bool = False

    @property
    def exit_code(self):
        return LOST if self.device_lost else 1 if self.failed else LEFT_OUT if self.left_out else 0


def run(points, machine, results, end):
    """Measure the points that are not done until `end` (of time.monotonic), in order. Returns an Outcome."""
    counts = {"measured": 0, "failed": 0, "left_out": 0}
    spent = expected = 5.0  # what points have taken and what they were expected to; 5 s so that the first do not decide
    for point in points:
        if results.passed("ceilings"):
            line = results.lines["ceilings"]
            machine.bandwidth, machine.tflops = line["copy_tb_s"], line["bf16_tflops"]
        if results.done(point.name):
            continue
        started = time.monotonic()
        if started + point.seconds * max(1.0, spent / expected) > end:
            counts["left_out"] += 1
            continue
        values = in_time(point, machine, results, end)
        took = time.monotonic() - started
        spent, expected = spent + took, expected + point.seconds
        results.add(point, took, values)
        counts["left_out" if values == OUT_OF_TIME else "failed" if "error" in values else "measured"] += 1
        if values.get("device_lost"):
            return Outcome(**counts, device_lost=True)
    return Outcome(**counts)


class _Over(BaseException):
    """A point's time is over; not an Exception, for it strikes wherever the point is."""


def in_time(point, machine, results, end):
    """measure(), broken off at `end` or when it takes SLOW times what is expected. Where the main thread does not come
    out, being inside a call that never returns, the point's line is written and the process ends."""
    started, limit = time.monotonic(), max(LEAST_S, SLOW * point.seconds)
    last = end - started <= limit
    broken_off = OUT_OF_TIME if last else {"error": f"hangs: not over after {limit:.0f} s", "hung": True}

    def give_up():
        faulthandler.dump_traceback(sys.__stderr__)
        stuck = {"error": "hangs: the device does not answer", "hung": True, "device_lost": True}
        results.add(point, time.monotonic() - started, stuck)
        os._exit(HUNG_AT_END if last else LOST)

    values = broken_off
    try:
        with _watched(min(limit, end - started), give_up):
            try:
                values = measure(point, machine, results)
            except _Over:
                values = broken_off | ({"device_lost": True} if machine.lost() else {})
    except _Over:  # it struck between the last line of the point and the end of the watch
        pass
    return values


@contextmanager
def _watched(seconds, give_up):
    """Raises _Over after `seconds` in whatever the main thread does within, by a signal, for it may be asleep; where it
    is still within GRACE_S later, give_up() is called in another thread."""
    over, main_thread = threading.Event(), threading.main_thread().ident

    def stop(number, frame):
        raise _Over

    def watch():
        if not over.wait(max(0.0, seconds)):
            signal.pthread_kill(main_thread, signal.SIGUSR1)
            if not over.wait(GRACE_S):
                give_up()

    before = signal.signal(signal.SIGUSR1, stop)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            over.set()
    finally:  # again, for the signal may strike there; it comes once
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def measure(point, machine, results):
    """A point's values; {"error": ...}; {"skipped": ...} where the device is too small."""
    machine.to_default_stream()
    if point.gate is not None and not results.passed(point.gate):
        return {"error": f"{point.gate} did not pass"}
    try:
        return point.measure(machine)
    except DoesNotFit as reason:
        return {"skipped": str(reason)}
    # Every failure is caught here: minutes on a GPU are few, and a kernel that does not compile must not cost the
    # figures of all the others. It is recorded and fails the run.
    except Exception as error:
        traceback.print_exc(limit=-4)
        line = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        return line | ({"device_lost": True} if machine.lost() else {})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="the suite ends within them (default: %(default)g)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: %(default)s)")
    parser.add_argument("--points", metavar="NAME,...", help="these alone: names of points or parts of them")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has already")
    parser.add_argument("--resume-any", action="store_true", help="the same, whatever the sources were")
    parser.add_argument("--anew", metavar="NAME,...", default="", help="but for points with one of these in the name")
    parser.add_argument("--results", type=Path, help="file of result lines (default: benchmarks/results/gpu.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: tries the suite, not the machine")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    unknown = sorted(set(only) - set(SECTIONS))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    points = all_points(only)
    try:
        points = chosen(points, options.points.split(",")) if options.points else points
    except ValueError as reason:
        parser.error(f"--points {reason}")
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu: needs a CUDA device, found none (--dry-run tries the suite on a CPU)", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes - (0 if options.dry_run else RESERVE_S)
    machine = Machine(options.dry_run)
    path = options.results or (None if options.dry_run else RESULTS / "gpu.jsonl")
    resume, anew = options.resume or options.resume_any, list(filter(None, options.anew.split(",")))
    results = Results(machine, path, resume, any_sources=options.resume_any, anew=anew)
    print(json.dumps(results.common))
    outcome = run([point for point in points if point.memory <= machine.memory], machine, results, end)
    goals = {}
    for goal in judge(results.lines):
        text = f"{goal.text}, {goal.limit}"
        print(f"{goal.verdict:12} {'-' if goal.value is None else f'{goal.value:.4g}':>8}  {text}")
        goals[text] = goal.verdict
    summary = {"benchmark": "gpu", "dry_run": machine.dry, "goals": goals}
    print(json.dumps(summary | outcome._asdict()))
    return outcome.exit_code
