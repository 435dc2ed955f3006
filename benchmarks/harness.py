"""What every benchmark shares: its options, its clock, the card of the machine it ran on, and its one JSON line."""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy
import torch

import llada2_fast
from llada2_fast.cli import options
from llada2_fast.decoding.inputs import resolve_ids
from llada2_fast.demo import tasks

from .lines import append_line

ROOT = Path(__file__).resolve().parent.parent  # of the repository; in a wheel the folder of the package
RESULTS = Path(__file__).resolve().parent / "results"  # in a checkout alone
IN_CHECKOUT = (ROOT / "setup.py").is_file()


def add_options(parser):
    """The options that all benchmarks have. `save` is then the folder to append to, or None."""
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same kind")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument(
        "--save", nargs="?", const="", type=_results_folder, metavar="FOLDER",
        help="append the JSON line to a file of this folder, in a checkout benchmarks/results/ unless given",
    )  # fmt: skip


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

    metadata: of the file, as matplotlib's savefig takes it."""
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
        args.save.mkdir(parents=True, exist_ok=True)
        append_line(args.save / f"{name}.jsonl", line)
    if args.json:
        print(json.dumps(line))


def _told(file, name):
    """What a file of /proc says under a name, where it is first; None where there is no such file or name."""
    lines = Path(file).read_text("utf-8").splitlines() if Path(file).is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


# `llada2-fast bench latency` and `throughput`: prompts, decoding, the gate before the clock, the table


def add_workload_options(parser):
    """The options of both: those of every benchmark, prompts, model and decoding."""
    add_options(parser)
    parser.add_argument(
        "--input-len", type=positive, metavar="N",
        help="prompts of N random tokens, answered to full length; else questions of the embedded model's tasks",
    )  # fmt: skip
    parser.add_argument("--graphs", action="store_true", help="each step as a CUDA graph, on a GPU")
    options.add_model_options(parser)


@dataclass
class Workload:
    """model: LLaDA2Model; decoding: generate()'s keyword arguments; batches: lists of prompts, token ids, all
    different, so that no cache has seen one before; facts: what the JSON line says of them."""

    model: object
    decoding: dict
    batches: list[list[list[int]]]
    facts: dict

    @classmethod
    def of(cls, args, count, size):
        """`count` batches of `size` prompts. ValueError if options, model and prompts do not go together."""
        decoding = {"seed": 0} | options.decoding(args)
        if args.input_len is not None:
            decoding = {"eos_id": ()} | decoding
        model, folder = options.load_model(args)
        if args.input_len is None:
            rows = _questions(folder, count * size)
        else:
            rows = _random(model, decoding, count * size, args.input_len)
        decoding = options.fit(decoding, model, rows)
        facts = {
            "model": args.model or "embedded", "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.config.quantization, "graphs": args.graphs,
            "prompts": "questions" if args.input_len is None else "random tokens", "input_len": args.input_len,
            "decoding": decoding,
        }  # fmt: skip
        return cls(model, decoding, [rows[at : at + size] for at in range(0, len(rows), size)], facts)


def _questions(folder, count):
    """Prompts of the tasks in turn, as chats."""
    from llada2_fast.weights.special_tokens import load_tokenizer  # half a second that other benchmarks are spared

    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: expected --input-len N, for random tokens")
    each = -(-count // len(tasks.TASKS))
    turns = chain.from_iterable(zip(*(tasks.sample(task, each, seed=0) for task in tasks.TASKS), strict=True))
    return [options.encode(tokenizer, [{"role": "user", "content": text}]) for text in islice(turns, count)]


def _random(model, decoding, count, length):
    """Prompts of random ids, the mask and the pad id not among them."""
    mask, _, pad = resolve_ids(model, options.params(decoding))
    ids, rng = [i for i in range(model.config.vocab_size) if i not in (mask, pad)], random.Random(decoding["seed"])
    return [rng.choices(ids, k=length) for _ in range(count)]


def require_equal(tokens, wanted, what, dtype):
    """Nothing is timed before this has passed: the share of tokens that are those wanted, row by row.

    In float32 it is 1.0, or SystemExit ends the benchmark. Other types round, a near tie then falls either way and all
    behind it differs, so there the share is only reported.
    """
    rows = list(zip(tokens, wanted, strict=True))
    equal = sum(a == b for got, want in rows for a, b in zip(got, want, strict=False))
    share = equal / max(1, sum(max(len(got), len(want)) for got, want in rows))
    if dtype == torch.float32 and share < 1.0:
        raise SystemExit(f"{what}: {share:.1%} of the tokens are equal, expected all of them; nothing is timed")
    print(f"{what}: {share:.1%} of the tokens are equal")
    return share


def print_table(results, names):
    """Median, 10th and 90th percentile of the figures whose keys are in `names` (key -> what to call it)."""
    print(f"{'':24}{'median':>10}{'p10':>10}{'p90':>10}")
    for key, name in names.items():
        figures = [results[f"{which}_{key}"] for which in ("median", "p10", "p90")]
        print(f"{name:24}" + "".join(f"{'-' if x is None else format(x, '.2f'):>10}" for x in figures))
