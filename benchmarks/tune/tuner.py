"""Finds the fastest launch parameters on this GPU and writes the tuned tables, kernels/<family>_tuned.json.

    python -m benchmarks.tune [--ops moe,attention,refine,dense] [--models mini,flash] [--names PARTS]
                              [--minutes 6] [--device-name NAME] [--resume] [--results FILE] [--tables FOLDER]
                              [--dry-run]

For one kernel at one shape, a *group*, all parameters worth trying are compiled side by side and ahead; what does not
compile, spills or wants too much shared memory is left out and says so in a line. What is left must give the bits of
the defaults on random inputs, in poisoned memory, and is then timed roughly on several workloads, as benchmarks.gpu
times kernels. The best are timed twice more in turn with the defaults; the fastest enters the table if it beats them by
more than the noise: what their own two times differ by, and 1 % at least. A share is a mean over workloads.

Groups go in order of importance; with --names, those alone whose names have one of its parts, as in "int4 m64,fp8 m64".
Each is one JSON line, printed and appended to benchmarks/results/tune.jsonl, and is in the tables as soon as its line
is there; what was never measured keeps its entry. The run ends within its minutes; --resume goes on where a run of the
same sources on the same device ended. --device-name: under which name, if another than the device's own. Exit codes and
--dry-run (on a CPU, in Triton's interpreter, in a checkout): as benchmarks.gpu; a dry run writes tables only into
--tables.
"""

import argparse
import itertools
import json
import os
import sys
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
import triton

from llada2_fast.kernels import _tuned
from llada2_fast.kernels._triton import force_ops

from .. import aot
from ..gpu import suite as gpu
from ..gpu.machine import Machine, Point, Shapes, poisoned
from ..harness import RESULTS
from .cases import attention_groups, dense_groups, gains, moe_entries, moe_groups, refine_groups

FAMILIES = {"moe": moe_groups, "attention": attention_groups, "refine": refine_groups, "dense": dense_groups}
MODELS = ("mini", "flash")
KEYS = {  # what an entry is found by; the rest of it are parameters
    "attention": ("device", "dtype", "length", "heads", "kv_heads", "dim"),
    "refine": ("device", "dtype", "vocab"),
    "moe": ("device", "hidden", "tokens"),
    "dense": ("device", "rows", "columns", "gated", "tokens"),
}
LEAST_GAIN = 0.01  # share of the defaults' time
ROUGHLY = {"rounds": 3, "least": 4}  # how all tries are timed; the best are timed better
FINALISTS = 4
CORES_LEFT = 2  # by compilation to what is timed beside it
DRY_TRIES = 2


def groups(machine, ops=tuple(FAMILIES), models=MODELS[:1], names=("",)):
    """The groups of a run in their order, those whose names have one of `names` in them."""
    found = [group for family in ops for group in FAMILIES[family](machine, models)]
    return [group for group in found if any(name in group.name for name in names)]


def launches(shapes, groups):
    """All that tuning these groups of Shapes launches, what makes their inputs included: aot.Launch, each once."""
    return list(_each_once(itertools.chain(*(launch for group in groups for launch in recorded(shapes, group)))))


def recorded(machine, group):
    """What a group launches on Shapes: [for its inputs and with the defaults, with its first try, its second, ..]."""
    found = []
    with aot.recorded() as noted:
        case = group.build(machine)
        calls = [*case.checks, *(workload[0] for workload in case.timed)]
        for parameters in (None, *_tries(machine, group)):
            for call in calls:
                call(parameters)
            found.append(noted.copy())
            noted.clear()
    return found


def _tries(machine, group):
    return group.tries[: machine.size(len(group.tries), DRY_TRIES)]


def _each_once(launches):
    return {launch.name: launch for launch in launches}.values()


class Compiled:
    """Launches compiled for a target of benchmarks.aot, into Triton's cache on disk, and what is wrong with them.

    ahead: groups whose launches are begun, side by side and in their order, as soon as the first is asked for; later
    ones are compiled while earlier ones are timed. target None: nothing is compiled or known.
    """

    def __init__(self, target, dry=False, ahead=()):
        self.target, self._shapes = target, Shapes(dry)
        self._recorded = {}  # by the name of a group
        self._fault = {}  # by the name of a launch
        everything = (launch for group in ahead for launches in self._launches(group) for launch in launches)
        self._coming = self._compile(everything)

    def _launches(self, group):
        if group.name not in self._recorded:
            self._recorded[group.name] = recorded(self._shapes, group)
        return self._recorded[group.name]

    def _compile(self, launches):
        launches = _each_once(launches)
        work = [(launch, "tune", self.target) for launch in launches]
        results = aot.compile_each(work, max(1, len(os.sched_getaffinity(0)) - CORES_LEFT))
        for launch, result in zip(launches, results, strict=True):
            yield launch.name, result.fault

    def faults(self, group):
        """Why some of a group's tries cannot be launched: {place in the list: reason}."""
        if self.target is None:
            return {}
        _, *tries = self._launches(group)
        wanted = {launch.name: launch for launches in tries for launch in launches}
        while not wanted.keys() <= self._fault.keys() and (found := next(self._coming, None)):
            self._fault.update([found])
        self._fault |= self._compile(launch for name, launch in wanted.items() if name not in self._fault)
        found = [sorted(filter(None, (self._fault[launch.name] for launch in launches))) for launches in tries]
        return {i: reasons[0] for i, reasons in enumerate(found) if reasons}

    def close(self):
        """Nothing more is compiled."""
        self._coming.close()


def bits(call, parameters):
    """The bytes of all that a call returns, from memory that was poisoned ahead of it."""
    with poisoned():
        return [x.contiguous().view(torch.uint8) for x in call(parameters)]


def times(machine, case, parameters, **how):
    """µs of each workload of a case; how: arguments of Machine.kernel_us."""
    return [machine.kernel_us([partial(call, parameters) for call in calls], **how) for calls in case.timed]


def share(us, default_us):
    return sum(a / b for a, b in zip(us, default_us, strict=True)) / len(us)


def tune(machine, group, compiled):
    """What goes into a group's line: the fastest parameters, their µs and the defaults', share and noise, counts."""
    wrong = compiled.faults(group)
    with force_ops("triton"), ExitStack() as stack:
        if machine.dry:  # products as on a GPU
            from ..interpreter import interpreted, products_in_order

            stack.enter_context(interpreted())
            stack.enter_context(products_in_order())
        tries = _tries(machine, group)
        case = group.build(machine)
        rough = _screened(machine, group, case, tries, wrong)
        measured = {"shape": group.shape, "part": group.part, "tried": len(tries), "left_out": len(wrong)}
        if not rough:
            return measured | {"kept": "nothing that may be used instead of the defaults"}
        best = sorted(rough, key=rough.get)[: machine.size(FINALISTS, 1)]
        return measured | _fastest(machine, case, [tries[i] for i in best])


def _screened(machine, group, case, tries, wrong):
    """{place in the list: share of the defaults' time, roughly} of the tries that may be used; adds to `wrong`."""
    expected = [bits(call, None) for call in case.checks]
    default_us = times(machine, case, None, **ROUGHLY)
    found = {}
    for i, parameters in enumerate(tries):
        try:
            if i not in wrong and not _same(expected, [bits(call, parameters) for call in case.checks]):
                wrong[i] = "other bits than the defaults"
            if i not in wrong:
                found[i] = share(times(machine, case, parameters, **ROUGHLY), default_us)
        except triton.runtime.errors.OutOfResources as error:
            wrong[i] = str(error)
        if i in wrong:
            print(f"{group.name}: left out {parameters}: {wrong[i]}", flush=True)
    return found


def _fastest(machine, case, finalists):
    """All are timed twice, in turn with the defaults; what counts is the worse time."""
    default_us, *first = [times(machine, case, parameters, rounds=5) for parameters in (None, *finalists)]
    default_again, *second = [times(machine, case, parameters, rounds=5) for parameters in (None, *finalists)]
    shares = [max(share(a, default_us), share(b, default_again)) for a, b in zip(first, second, strict=True)]
    i = shares.index(min(shares))
    noise = max(LEAST_GAIN, *(abs(b / a - 1) for a, b in zip(default_us, default_again, strict=True)))
    found = {"fastest": finalists[i], "us": first[i], "default_us": default_us}
    return found | {"share": shares[i], "noise": noise}


def _same(expected, got):
    return all(torch.equal(a, b) for x, y in zip(expected, got, strict=True) for a, b in zip(x, y, strict=True))


def entries(groups, lines, device):
    """{family: entries} for the tables from the groups' lines."""
    measured = {}
    for group in groups:
        if _concluded(line := lines.get(group.name, {})):
            measured.setdefault(group.family, []).append((group, line))
    return {
        family: moe_entries(own, device) if family == "moe" else [_entry(*pair, device) for pair in own]
        for family, own in measured.items()
    }


def _entry(group, line, device):
    return {"device": device} | group.shape | {group.part: line["fastest"] if gains(line) else group.defaults}


def _concluded(line):
    """Whether a group's tries were tried: not so without a line, after an error or on a device too small."""
    return bool(line) and not line.keys() & {"error", "skipped"}


class Kept(gpu.Results):
    """Results whose entries are in the tables as soon as their lines are there. folder: None for no tables."""

    def __init__(self, *arguments, groups, device, folder):
        super().__init__(*arguments)
        self.groups, self.device, self.folder = groups, device, folder

    def add(self, point, seconds, values):
        super().add(point, seconds, values)
        self.write()

    def write(self):
        """All entries there are; how many of each family."""
        found = entries(self.groups, self.lines, self.device)
        for family, new in found.items() if self.folder else ():
            write_table(family, new, self.folder)
        return {family: len(new) for family, new in found.items()}


def write_table(family, new, folder=None):
    """Put entries into a family's table, part by part; a part that is None is taken out, so is an entry without parts.

    folder: where to, in place of the package's own. The file is replaced as a whole.
    """
    path, keys = _tuned.table_path(family), KEYS[family]
    merged = {}
    for entry in json.loads(path.read_text("utf-8")) + new:
        key = tuple(entry[name] for name in keys)
        merged[key] = merged.get(key, {}) | entry
    whole = [{name: part for name, part in merged[key].items() if part is not None} for key in sorted(merged)]
    lines = [json.dumps(entry) for entry in whole if entry.keys() > set(keys)]
    text = "".join(["[\n", ",\n".join(lines), "\n" if lines else "", "]\n"])
    path = (folder or path.parent) / path.name
    draft = path.with_suffix(".tmp")
    draft.write_text(text, "utf-8")
    draft.replace(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", default=",".join(FAMILIES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--models", default="mini", help=f"some of {','.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--names", default="", metavar="PARTS", help="comma-separated parts of groups' names")
    parser.add_argument("--minutes", type=float, default=6.0, help="the run ends within them (default: %(default)g)")
    parser.add_argument("--device-name", metavar="NAME", help="name of the device in the tables (default: its own)")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has already")
    parser.add_argument("--results", type=Path, help="file of result lines (default: benchmarks/results/tune.jsonl)")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="where tables are written (default: kernels/)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: tries the tuner, not the machine")
    options = parser.parse_args(arguments)
    ops, models = options.ops.split(","), options.models.split(",")
    for name, chosen, known in (("ops", ops, FAMILIES), ("models", models, MODELS)):
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            parser.error(f"--{name} {','.join(unknown)}: expected some of {', '.join(known)}")
    if options.tables and not options.tables.is_dir():
        parser.error(f"--tables {options.tables}: expected a folder that exists")
    if not options.dry_run and not torch.cuda.is_available():
        print("tune: needs a CUDA device, found none (--dry-run tries the tuner on a CPU)", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes - (0 if options.dry_run else gpu.RESERVE_S)
    torch.manual_seed(0)
    machine = Machine(options.dry_run)
    path = options.results or (None if options.dry_run else RESULTS / "tune.jsonl")
    chosen = groups(machine, ops, models, options.names.split(","))
    if not chosen:
        parser.error(f"--names {options.names}: no group of these has one in its name")
    results = Kept(
        machine, path, options.resume, "tune", gpu.sources("tune", tables=False), groups=chosen,
        device=options.device_name or _tuned.device_name(machine.device),
        folder=options.tables or (None if machine.dry else _tuned.table_path("moe").parent),
    )  # fmt: skip
    left = [group for group in chosen if not results.done(group.name)]
    with closing(Compiled("sm_90" if machine.dry else aot.target_here(), machine.dry, left)) as compiled:
        points = []
        for group in chosen:
            seconds = 1 + 0.03 * len(group.tries)  # compiled: inputs and the best timed well, and 30 ms a try
            measure = partial(tune, group=group, compiled=compiled)
            points.append(Point(group.name, "tune", seconds, measure, gate=None))
        outcome = gpu.run(points, machine, results, end)
    summary = {"benchmark": "tune", "dry_run": machine.dry, "entries": results.write()}
    print(json.dumps(summary | outcome._asdict()))
    return outcome.exit_code
