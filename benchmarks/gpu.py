"""The GPU suite: ceilings of the device, every kernel, whole steps, decoding; each beside its floor and its goal.

    python -m benchmarks.gpu [--minutes 8] [--only ceilings,kernels,steps,decode] [--resume] [--results FILE] [--dry-run]

Runs unattended with this checkout, torch, triton, transformers and numpy; without diffusers its ratios are null. Points
go in order of importance, in two rounds: the telling ones of every section first, the rest of the grids behind them. A
point is started only if it is expected to end in time, and what has not ended then is broken off. Each is one JSON line,
printed and appended to benchmarks/results/gpu.jsonl as soon as it is there; one that fails leaves its error and the next
one runs. --resume leaves out what a run of the same sources on the same device has measured. Ceilings are always needed.

Exit codes: 0 all points measured or out of time; 1 some failed; 2 no CUDA device, or bad arguments; 3 the device was
lost (run again with --resume). --dry-run takes the same paths on a CPU, with tiny shapes; it keeps no lines unless
--results names a file.
"""

import argparse
import hashlib
import json
import signal
import sys
import threading
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import gpu_decode, gpu_goals, gpu_kernels, gpu_steps, gpu_peers
from benchmarks.gpu_machine import DoesNotFit, Machine, Point, ceilings
from benchmarks.harness import RESULTS, ROOT, card

SECTIONS = ("ceilings", "kernels", "steps", "decode")
RESERVE_S = 10.0  # of the minutes, for what surrounds the points
KEY = ("sources", "device", "dry_run")  # lines that agree in these are of one kind


def all_points(only=SECTIONS):
    """The points of some sections in the order they are run: ceilings, then two rounds through the sections."""
    found = [*gpu_kernels.points(), *gpu_steps.points(), *gpu_peers.points(), *gpu_decode.points()]
    found = [point for point in found if point.section in only]
    found.sort(key=lambda point: (point.later, SECTIONS.index(point.section)))
    return [Point("ceilings", "ceilings", 10, ceilings), *found]


def sources():
    """Fingerprint of all that decides a figure: a commit would not do, for result lines themselves change the tree."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "kernels", "llada2_fast"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix == ".py" or (folder == "kernels" and path.suffix == ".json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Lines of this run and of earlier ones like it, by point; new ones go to the file at once."""

    def __init__(self, machine, path, resume):
        self.path = path
        self.common = {"benchmark": "gpu", "dry_run": machine.dry, "sources": sources()} | card(machine.device)
        self.lines = {}
        if resume and path is not None and path.is_file():
            for line in map(json.loads, path.read_text("utf-8").splitlines()):
                if all(line.get(key) == self.common[key] for key in KEY):
                    self.lines[line["point"]] = line

    def done(self, name):
        """Whether nothing is left to do: measured, does not fit, or took the device down."""
        line = self.lines.get(name)
        return line is not None and ("error" not in line or line.get("device_lost", False))

    def passed(self, name):
        return name in self.lines and "error" not in self.lines[name]

    def add(self, point, seconds, values):
        """Keep a point's line, in the file and on the terminal (there without what all lines share)."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        own = {"point": point.name, "section": point.section, "time": now, "seconds": seconds} | values
        own = {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in own.items()}
        self.lines[point.name] = self.common | own
        print(json.dumps(own), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[point.name]) + "\n")


class Outcome(NamedTuple):
    """What became of the points of this run: how many were measured, failed, or left out for want of time."""

    measured: int
    failed: int
    left_out: int
    device_lost: bool


def run(points, machine, results, end):
    """Measure the points that are not done until `end` (of time.monotonic). Returns an Outcome."""
    measured = failed = left_out = 0
    pace = 1.0  # how much longer than expected points have taken on this machine
    breaker = threading.Timer(max(0.0, end - time.monotonic()), _interrupt, [threading.main_thread().ident])
    breaker.daemon = True
    breaker.start()
    try:
        spent = expected = 5.0  # so that the first points do not decide the pace
        for point in points:
            if results.done(point.name):
                continue
            if time.monotonic() + point.seconds * pace > end:
                left_out += 1
                continue
            started = time.monotonic()
            values = measure(point, machine, results)
            if "broken_off" in values and time.monotonic() < end:
                raise KeyboardInterrupt
            spent, expected = spent + time.monotonic() - started, expected + point.seconds
            pace = max(1.0, spent / expected)
            results.add(point, time.monotonic() - started, values)
            measured += "error" not in values
            failed += "error" in values
            if values.get("device_lost"):
                return Outcome(measured, failed, left_out, True)
            if point.section == "ceilings" and "error" not in values:
                machine.bandwidth, machine.tflops = values["copy_tb_s"], values["bf16_tflops"]
    finally:
        breaker.cancel()
    return Outcome(measured, failed, left_out, False)


def _interrupt(thread):
    """As Ctrl-C would, and waking the thread if it sleeps."""
    signal.pthread_kill(thread, signal.SIGINT)


def measure(point, machine, results):
    """A point's values, or {"error": ...}, or {"skipped": ...} where the device is too small."""
    if point.gate is not None and not results.passed(point.gate):
        return {"error": f"{point.gate} did not pass"}
    try:
        return point.measure(machine)
    except DoesNotFit as reason:
        return {"skipped": str(reason)}
    # The one place where every failure is caught: minutes on a GPU are few, and a kernel that does not compile, or a
    # shape that does not fit, must not cost the figures of all the others. It is recorded and fails the run.
    except Exception as error:
        return {"error": _one_line(error)} | ({"device_lost": True} if _device_lost(machine) else {})
