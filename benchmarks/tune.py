"""Finds the fastest launch parameters on this GPU and writes the tuned tables, kernels/<family>_tuned.json.

    python -m benchmarks.tune [--ops attention,refine,moe] [--minutes 6] [--device-name NAME] [--resume]
                              [--results FILE] [--tables FOLDER] [--dry-run]

For one kernel at one shape, a *group*: all parameters worth trying are compiled for this GPU, side by side; what does
not compile, spills or wants too much shared memory is left out. What is left must give the bits of the defaults on
random inputs, in poisoned memory, and is then timed on several workloads like the kernels of benchmarks.gpu (one CUDA
graph, rotated buffers). A share of the defaults' time is a mean over workloads. The fastest is timed once more beside
the defaults and enters the table if it beats them by more than the noise: what their own two times differ by, and 1 %
at least. What is left out says so in a line.

Groups go in order of importance and each is one JSON line, printed and appended to benchmarks/results/tune.jsonl; the
run ends within its minutes and --resume goes on where a run of the same sources on the same device ended. The tables
are written at the end from all lines; what was never measured keeps its entry. --device-name: under which name, if
another than the device's own. Exit codes and --dry-run (on a CPU, in Triton's interpreter, in a checkout): as
benchmarks.gpu; a dry run writes tables only into --tables.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import triton

from llada2_fast.kernels import _tuned
from llada2_fast.kernels._triton import force_ops

from . import aot, gpu, tune_moe
from .gpu_machine import Machine, Point, poisoned
from .harness import RESULTS
from .tune_cases import attention_groups, refine_groups

FAMILIES = {"attention": attention_groups, "refine": refine_groups, "moe": tune_moe.groups}
KEYS = {  # what an entry is found by; the rest of it are parameters
    "attention": ("device", "dtype", "length", "heads", "kv_heads", "dim"),
    "refine": ("device", "dtype", "vocab"),
    "moe": ("device", "hidden", "tokens"),
}
LEAST_GAIN = 0.01  # share of the defaults' time
DRY_TRIES = 2


def target_of(machine):
    """The target of benchmarks.aot that this machine is, or None."""
    name = "sm_90" if machine.dry else "sm_{}{}".format(*torch.cuda.get_device_capability())
    return name if name in aot.TARGETS else None


def faults(tries, calls, target):
    """Why some of the tries cannot be launched on a target of benchmarks.aot: {place in the list: reason}.

    All that the calls would launch is compiled, side by side, and left in Triton's cache on disk.
    """
    needed, launches = [], {}
    for parameters in tries:
        with aot.recorded() as noted:
            for call in calls:
                call(parameters)
        needed.append({repr((launch.kernel.__name__, *launch[1:])) for launch in noted})
        launches |= {repr((launch.kernel.__name__, *launch[1:])): launch for launch in noted}
    work = [(launch, "tune", target) for launch in launches.values()]
    fault = {key: result.fault for key, result in zip(launches, aot.compile_each(work), strict=True)}
    found = {i: sorted(fault[key] for key in keys if fault[key]) for i, keys in enumerate(needed)}
    return {i: reasons[0] for i, reasons in found.items() if reasons}


def bits(call, parameters):
    """The bytes of all that a call returns, from memory that was poisoned ahead of it."""
    with poisoned():
        return [x.contiguous().view(torch.uint8) for x in call(parameters)]


def times(machine, case, parameters):
    """µs of each workload of a case."""
    return [machine.kernel_us([partial(call, parameters) for call in calls]) for calls in case.timed]


def share(us, default_us):
    return sum(a / b for a, b in zip(us, default_us, strict=True)) / len(us)


def kernels_of(machine):
    """Within it kernels run: on the GPU as they are, in a dry run in Triton's interpreter."""
    if not machine.dry:
        return nullcontext()
    from tests.kernels.interpreter import interpreted

    return interpreted()


def tune(machine, group):
    """What goes into a group's line: the fastest parameters, their µs and the defaults', share and noise, counts."""
    tries = group.tries[: machine.size(len(group.tries), DRY_TRIES)]
    with force_ops("triton"):
        with kernels_of(machine):
            case = group.build(machine)
        target = target_of(machine)
        wrong = faults(tries, case.checks, target) if target else {}
        with kernels_of(machine):
            return _fastest(machine, group, case, tries, wrong)


def _fastest(machine, group, case, tries, wrong):
    expected = [bits(call, None) for call in case.checks]
    default_us = times(machine, case, None)
    found = []
    for i, parameters in enumerate(tries):
        try:
            if i not in wrong and not _same(expected, [bits(call, parameters) for call in case.checks]):
                wrong[i] = "other bits than the defaults"
            if i not in wrong:
                us = times(machine, case, parameters)
                found.append((share(us, default_us), i, us))
        except triton.runtime.errors.OutOfResources as error:
            wrong[i] = str(error)
        if i in wrong:
            print(f"{group.name}: left out {parameters}: {wrong[i]}", flush=True)
    counts = {"tried": len(tries), "left_out": len(wrong)}
    if not found:
        return {"skipped": "nothing that may be used instead of the defaults"} | counts
    gain, i, us = min(found)
    again, default_again = times(machine, case, tries[i]), times(machine, case, None)
    noise = max(LEAST_GAIN, *(abs(b / a - 1) for a, b in zip(default_us, default_again, strict=True)))
    measured = {"share": max(gain, share(again, default_again)), "noise": noise}
    return {"fastest": tries[i], "us": us, "default_us": default_us} | measured | counts


def _same(expected, got):
    return all(torch.equal(a, b) for x, y in zip(expected, got, strict=True) for a, b in zip(x, y, strict=True))


def entries(groups, lines, device):
    """{family: entries} for the tables from the groups' lines; a part that does not beat the defaults is None."""
    found = {}
    for group in groups:
        line = lines.get(group.name, {})
        if group.family == "moe" or "error" in line or not line:
            continue
        better = "share" in line and line["share"] < 1 - line["noise"]
        entry = {"device": device} | group.shape | {group.part: line["fastest"] if better else None}
        found.setdefault(group.family, []).append(entry)
    moe = tune_moe.entries([group for group in groups if group.family == "moe"], lines, device)
    return found | ({"moe": moe} if moe else {})


def write_table(family, new, folder=None):
    """Put entries into a family's table, part by part; a part that is None is taken out, so is an entry without parts.

    folder: where to, in place of the package's own.
    """
    path, keys = _tuned.table_path(family), KEYS[family]
    merged = {}
    for entry in json.loads(path.read_text("utf-8")) + new:
        key = tuple(entry[name] for name in keys)
        merged[key] = merged.get(key, {}) | entry
    whole = [{name: part for name, part in merged[key].items() if part is not None} for key in sorted(merged)]
    lines = [json.dumps(entry) for entry in whole if entry.keys() > set(keys)]
    text = "".join(["[\n", ",\n".join(lines), "\n" if lines else "", "]\n"])
    (folder or path.parent).joinpath(path.name).write_text(text, "utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", default=",".join(FAMILIES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="the run ends within them (default: %(default)g)")
    parser.add_argument("--device-name", metavar="NAME", help="name of the device in the tables (default: its own)")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has already")
    parser.add_argument("--results", type=Path, help="file of result lines (default: benchmarks/results/tune.jsonl)")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="where tables are written (default: kernels/)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: tries the tuner, not the machine")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops.split(",")) - set(FAMILIES))
    if unknown:
        parser.error(f"--ops {','.join(unknown)}: expected some of {', '.join(FAMILIES)}")
    if options.tables and not options.tables.is_dir():
        parser.error(f"--tables {options.tables}: expected a folder that exists")
    if not options.dry_run and not torch.cuda.is_available():
        print("tune: needs a CUDA device, found none (--dry-run tries the tuner on a CPU)", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes - (0 if options.dry_run else gpu.RESERVE_S)
    torch.manual_seed(0)
    machine = Machine(options.dry_run)
    path = options.results or (None if options.dry_run else RESULTS / "tune.jsonl")
    results = gpu.Results(machine, path, options.resume, "tune", gpu.sources(tables=False))
    groups = [group for family in options.ops.split(",") for group in FAMILIES[family](machine)]
    points = [
        Point(group.name, "tune", 3 + len(group.tries) / 4, partial(tune, group=group), gate=None) for group in groups
    ]
    outcome = gpu.run(points, machine, results, end)
    found = entries(groups, results.lines, options.device_name or _tuned.device_name(machine.device))
    if options.tables or not machine.dry:
        for family, new in found.items():
            write_table(family, new, options.tables)
    summary = {"benchmark": "tune", "dry_run": machine.dry, "entries": {name: len(new) for name, new in found.items()}}
    print(json.dumps(summary | outcome._asdict()))
    return 3 if outcome.device_lost else 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
