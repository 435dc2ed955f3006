"""Every op of kernels/ alone, at small and real shapes, beside a plain PyTorch peer with which it first has to agree.

    python -m benchmarks.kernels [--quick] [--only norm,rope] [--json] [--save [FOLDER]]

Timed by pytest-benchmark, medians and their interquartile ranges, one thread; `pytest benchmarks/kernels/__main__.py
[--quick] [--only norm,rope]` does as much. On a GPU the Triton kernels in bfloat16, in CUDA graphs over buffers that no
cache holds; on a CPU the references, which are the product there, in float32. GB/s counts every input and output once;
operations, 2 per multiply-add, are in the JSON line. A peer that is faster is printed as such: ratio = peer / ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from ..harness import add_options, check_save, finish
from . import bench_decoding, bench_model

# By op: build(machine, *arguments) -> Case, {name of a case: its arguments}, the smallest first.
OPS = bench_model.OPS | bench_decoding.OPS
# Relative imports need this file's package, in a checkout and in a wheel.
PYTEST = ["--import-mode=importlib", "-o", "consider_namespace_packages=true", "-p", "no:cacheprovider", "-v"]
EFFORT = {True: ("0.05", "3"), False: ("0.5", "5")}  # of --quick: seconds and rounds, at least, per timing


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--only", default=",".join(sorted(OPS)), metavar="OPS", help="comma-separated (default: all)")
    options = parser.parse_args(argv)
    check_save(parser, options, "kernels")
    ops = options.only.split(",")
    if not set(ops) <= set(OPS):
        parser.error(f"--only {options.only}: expected some of {', '.join(sorted(OPS))}")
    if find_spec("pytest_benchmark") is None:
        parser.error('needs pytest-benchmark: pip install "llada2-fast[test]"')
    torch.set_num_threads(1)  # as in conftest.py; stands in the JSON line
    records = run(__file__, options.quick, f"--only={options.only}", *(["--quick"] if options.quick else []))
    entries = sorted(by_case(records), key=lambda entry: ops.index(entry["op"]))
    print(table(entries))
    result = {"ops": entries, "peak_memory_bytes": None}  # the ops ran in another process
    finish("kernels", options, result, "cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def test_op(benchmark, case, who):
    """Times ours or the peer; the figures and what they are of go into pytest-benchmark's report."""
    op, name, case = case
    call, calls = case.target(who)
    benchmark.group = f"{op} {name}"
    benchmark.extra_info.update(
        op=op, case=name, who=who, peer=case.peer_name, calls=calls, bytes=case.bytes, operations=case.operations
    )
    benchmark(call)


def run(file, quick, *options):
    """pytest-benchmark's records of a file's timings. SystemExit if one failed: then nothing is reported."""
    seconds, rounds = EFFORT[quick]
    # not the settings of a pytest around this one; as a worker of pytest-xdist nothing would be timed
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pytest", str(file), *PYTEST, *options,
            f"--benchmark-json={report}", f"--benchmark-max-time={seconds}", f"--benchmark-min-rounds={rounds}",
            "--benchmark-disable-gc", "--benchmark-columns=median,iqr",
        ]  # fmt: skip
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as p:
            for line in p.stdout:
                print(line, end="", file=sys.stderr, flush=True)
        if p.returncode:
            raise SystemExit(f"kernels: pytest ended with {p.returncode}, see above; nothing is reported")
        return json.loads(report.read_text("utf-8"))["benchmarks"]


def by_case(records):
    """Entries of the JSON line: an op's figures and its peer's, from the two records of each case."""
    found = {}
    for record in records:
        info, stats = record["extra_info"], record["stats"]
        found.setdefault((info["op"], info["case"]), {})[info["who"]] = info, stats
    entries = []
    for (op, case), both in found.items():
        (info, ours), (peer_info, peer) = both["ours"], both["peer"]
        us, us_iqr = (ours[name] / info["calls"] * 1e6 for name in ("median", "iqr"))
        peer_us, peer_us_iqr = (peer[name] / peer_info["calls"] * 1e6 for name in ("median", "iqr"))
        times = {"us": us, "us_iqr": us_iqr, "peer_us": peer_us, "peer_us_iqr": peer_us_iqr, "ratio": peer_us / us}
        times["gb_s"] = info["bytes"] / us / 1e3
        rounded = {name: float(f"{value:.4g}") for name, value in times.items()}
        work = {name: info[name] for name in ("bytes", "operations")}
        entries.append({"op": op, "case": case, "peer": info["peer"]} | work | rounded)
    return entries


def table(entries):
    """The entries as text."""
    lines = [f"{'op':<12}{'case':<24}{'µs':>10}{'± IQR':>10}{'GB/s':>9}{'peer µs':>11}{'ratio':>8}  peer"]
    for e in entries:
        figures = f"{e['us']:>10.5g}{e['us_iqr']:>10.3g}{e['gb_s']:>9.3g}{e['peer_us']:>11.5g}{e['ratio']:>8.2f}"
        lines.append(f"{e['op']:<12}{e['case']:<24}{figures}  {e['peer']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
