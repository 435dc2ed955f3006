"""What every benchmark shares: its options, its clock, the card of the machine it ran on, and its one JSON line."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import numpy
import torch

import llada2_fast

from .lines import append_line

ROOT = Path(__file__).resolve().parent.parent  # of the repository; in a wheel the folder of the package
RESULTS = Path(__file__).resolve().parent / "results"  # in a checkout alone
IN_CHECKOUT = (ROOT / "setup.py").is_file()


def add_options(parser):
    """The options that all benchmarks have. `save` is then the folder to append to, or None; see check_save."""
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same kind")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument(
        "--save", nargs="?", const="", type=_results_folder, metavar="FOLDER",
        help="append the JSON line to a file of this folder, in a checkout benchmarks/results/ unless given",
    )  # fmt: skip


def check_save(parser, args, name):
    """Ends with the parser's error, before anything is measured, if `finish` could not append under this name.

    args: with `save` of add_options; its folder is made if it is missing.
    """
    if args.save is None:
        return
    path = args.save / f"{name}.jsonl"
    try:
        args.save.mkdir(parents=True, exist_ok=True)
        # a file without a name, where this one is not there yet: another process may be about to make it
        with open(path, "ab+") if path.exists() else tempfile.TemporaryFile(dir=args.save):
            pass
    except OSError as error:
        parser.error(f"--save {args.save}: expected a folder where {path.name} can be written: {error}")


def add_plot_option(parser, what, name="--plot", default=None):
    """--plot FILE, or another name for it; what: a few words on what is drawn."""
    text = f"draw {what}; needs llada2-fast[plot]"
    parser.add_argument(name, metavar="FILE", type=_image_file, default=default, help=text)


def positive(text):
    """A count, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer >= 1")
    return int(text)


def _results_folder(text):
    if not text and not IN_CHECKOUT:
        raise argparse.ArgumentTypeError("expected --save FOLDER: only a checkout has benchmarks/results/")
    return Path(text or RESULTS)


def _image_file(text):
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError('needs matplotlib: pip install "llada2-fast[plot]"')
    from matplotlib.backend_bases import FigureCanvasBase

    path, formats = Path(text), FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends with .{', .'.join(sorted(formats))}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


@contextmanager
def drawing(file, metadata=None, **layout):
    """Yields what pyplot.subplots(**layout) gives as axes, then writes the figure to an image file.

    metadata: of the file, as matplotlib's savefig takes it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(**layout)
    yield axes
    figure.tight_layout()
    figure.savefig(file, dpi=150, metadata=metadata)
    pyplot.close(figure)


def card(device="cpu"):
    """Where and on what a number was measured: a dict of device, cores, threads, versions and commit."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _told("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    versions = {name: installed.get(name) for name in ("torch", "triton", "transformers", "diffusers")}
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "llada2-fast": llada2_fast.__version__} | versions,
        "commit": commit(),
    }


def commit():
    """The checkout's commit, with -dirty where tracked code differs from it; None without git or outside a checkout."""
    if not IN_CHECKOUT:  # some other repository may be around an installed package
        return None

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    try:
        known = git("describe", "--always", "--exclude=*").stdout.strip()
    except FileNotFoundError:
        return None
    # what benchmarks and report write themselves says nothing of the code that was measured
    changed = git("diff", "--quiet", "HEAD", "--", ":/", ":!benchmarks/results", ":!benchmarks/plots", ":!*.md")
    return known + "-dirty" * (changed.returncode == 1) or None


def timed_rounds(calls, rounds):
    """Median seconds of each call, all of them made in turn in every round, so that a slow spell hits them alike."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, seen in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in times]


def spread(name, values):
    """{mean_<name>, median_<name>, std_<name>, p10_<name>, p90_<name>, p99_<name>}: the key names of `vllm bench`.

    values: numbers in the unit that `name` says; without any, all are None.
    """
    what = {"mean": numpy.mean, "median": numpy.median, "std": numpy.std}
    what |= {f"p{p}": lambda values, p=p: numpy.percentile(values, p) for p in (10, 90, 99)}
    return {f"{key}_{name}": float(of(values)) if len(values) else None for key, of in what.items()}


def peak_memory(device="cpu"):
    """Most bytes so far: allocated by torch on a GPU, else resident of this process; None where nobody counts them."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = _told("/proc/self/status", "VmHWM")
    return resident and int(resident.split()[0]) * 1024  # it says kB


def peak_bytes(call):
    """(what call() returns, the most tensor bytes allocated at once while it ran, on a CPU). Not while it is timed.

    Running sum of what PyTorch's profiler notes of the CPU allocator, inside operators too: exact, the same call gives
    the same number. What was made before the call does not count, nor does its release; what libraries keep for
    themselves (MKL's packing buffers, Python objects) is no tensor and is not seen.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler writes two lines to stderr at every use otherwise
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profile:
        torch.autograd._enable_record_function(False)  # operators are not noted, which would take gigabytes
        try:
            result = call()
        finally:
            torch.autograd._enable_record_function(True)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, max(accumulate(changes, initial=0))


def finish(name, args, results, device="cpu"):
    """End a benchmark: append its JSON line to args.save/`name`.jsonl, a folder or None, print it if args.json.

    results: what was measured, beside the card, the time and the peak memory in bytes.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    head = {"benchmark": name, "time": now, "quick": args.quick} | card(device)
    line = head | {"peak_memory_bytes": peak_memory(device)} | results
    if args.save:
        append_line(args.save / f"{name}.jsonl", line)
    if args.json:
        print(json.dumps(line))


def _told(file, name):
    """What a file of /proc says under a name, where it is first; None where there is no such file or name."""
    lines = Path(file).read_text("utf-8").splitlines() if Path(file).is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
