"""The first minute on a GPU nobody has seen: every kernel, a step, a text, each in a process of its own.

    python -m benchmarks.gpu.first_light [--only gate,step] [--jobs 4] [--limit 45] [--out FILE] [--dry-run]

A check that hangs is killed after --limit seconds, one that takes the device down takes its own process with it: the
others go on. Each is a line as it ends, printed, and in JSON with what went wrong appended to --out. They go from small
to large, so that the first failure names the culprit. Exit codes: 0 all passed; 1 some did not; 2 no CUDA device, or
bad arguments. --dry-run takes the same paths on a CPU with tiny shapes.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from ..lines import append_line
from .apart import apart
from .checks import check, checks


def run(names, dry, jobs, limit, out=None):
    """Run the checks side by side, a line each as it ends. Returns the lines."""

    def one(name):
        started = time.monotonic()
        ended = apart(partial(check, name, dry), limit)
        line = {"check": name, "ok": ended.error is None, "seconds": round(time.monotonic() - started, 1)}
        line |= ended.value if line["ok"] else {"error": ended.error, "output": ended.output[-3000:]}
        if out is not None:
            append_line(out, line)
        print(
            f"{'ok' if line['ok'] else 'FAILED':6} {name:20} {line['seconds']:6.1f} s  {line.get('error', '')}",
            flush=True,
        )
        return line

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="comma-separated parts of the checks' names (default: all)")
    parser.add_argument("--jobs", type=int, default=4, help="checks at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds a check may take (default: %(default)g)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines to it")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on a CPU: tries the checks, not the machine"
    )
    options = parser.parse_args(arguments)
    names = [name for name in checks() if not options.only or any(part in name for part in options.only.split(","))]
    if not names:
        parser.error(f"--only {options.only}: expected parts of {', '.join(checks())}")
    if not options.dry_run and not torch.cuda.is_available():
        print("first_light: needs a CUDA device, found none (--dry-run tries it on a CPU)", file=sys.stderr)
        return 2
    lines = run(names, options.dry_run, options.jobs, options.limit, options.out)
    passed = sum(line["ok"] for line in lines)
    print(f"{passed} of {len(lines)} checks passed")
    return 0 if passed == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
