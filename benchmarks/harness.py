"""What every benchmark shares: its options, its clock, the card of the machine it ran on, and its one JSON line."""

import json
import platform
import statistics
import subprocess
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import llada2_fast

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def add_options(parser):
    """The options that all benchmarks have."""
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same kind")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--save", action="store_true", help="append the JSON line to benchmarks/results/")


def card(device="cpu"):
    """Where and on what a number was measured: a dict of device, threads, versions and commit."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "llada2-fast": llada2_fast.__version__} | _versions(),
        "commit": commit(),
    }


def commit():
    """The checkout's commit, with -dirty where tracked files differ from it; None without git or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def timed_rounds(calls, rounds):
    """Median seconds of each call, all of them made in turn in every round, so that a slow spell hits them alike."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, seen in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in times]


def finish(name, options, results, device="cpu", folder=RESULTS):
    """End a benchmark: append its JSON line to `folder`/`name`.jsonl if options.save, print it if options.json."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"benchmark": name, "time": now, "quick": options.quick} | card(device) | results)
    if options.save:
        folder.mkdir(exist_ok=True)
        with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    if options.json:
        print(line)


def _cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions():
    installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    return {name: installed.get(name) for name in ("torch", "triton", "transformers", "diffusers")}
