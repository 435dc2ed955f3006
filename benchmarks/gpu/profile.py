"""Where the time of a decoding step goes: one replay of its CUDA graph, kernel by kernel.

    profile mini <bf16|fp8> b<batch> carried

ms is the replay's own time, by events and without the profiler; kernels_ms the sum over what one replay under
torch.profiler ran on the device, copies and fills included; gaps_ms what is left. kernels: of each name and grid, for
products of two sizes have one name, count, mean, total, shortest and longest time in µs, for the TOP that take longest
together; rest: of all others. A dry run counts operators on the CPU.
"""

import re
from functools import partial

from .machine import Point
from .steps import Step

TOP, WIDTH = 25, 60


def short(name):
    """A kernel's name without return type, arguments and what all of PyTorch's have in common, cut to WIDTH."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|at::cuda::|^void ", "", name)
    name = re.sub(r"(?<=.)\(.*", "", name).rstrip()
    return name if len(name) <= WIDTH else name[: WIDTH - 3] + "..."


def summed(events):
    """[(name, grid, µs)] -> (kernels, rest) as above, the longest first; rest is None where there are no others."""
    launches = {}
    for name, grid, us in events:
        launches.setdefault((name, grid), []).append(us)
    ranked = sorted(launches.items(), key=lambda item: -sum(item[1]))

    others = [us for _, times in ranked[TOP:] for us in times]
    rows = [_row(short(name), grid, times) for (name, grid), times in ranked[:TOP]]
    return rows, _row("rest", "", others) if others else None


def _row(name, grid, times):
    figures = {"us": sum(times) / len(times), "total_us": sum(times), "least_us": min(times), "most_us": max(times)}
    return {"name": name, "grid": grid, "count": len(times)} | {key: round(us, 2) for key, us in figures.items()}


def show(line):
    """The profile as text, a line per kernel."""
    yield f"{'count':>6} {'mean µs':>9} {'from':>9} {'to':>9} {'total µs':>10}  kernel"
    for row in line["kernels"] + [line["rest"]] * (line["rest"] is not None):
        times = f"{row['us']:9.2f} {row['least_us']:9.2f} {row['most_us']:9.2f} {row['total_us']:10.1f}"
        yield f"{row['count']:6} {times}  {row['name']} {row['grid']}".rstrip()
    total, replay, gaps = (f"{1e3 * line[key]:.1f}" for key in ("kernels_ms", "ms", "gaps_ms"))
    yield f"{line['launches']:6} {'':29} {total:>10}  in all; the replay takes {replay}, gaps are {gaps}"


def profile_step(machine, fp8, batch):
    sizes = machine.size(batch, 2), machine.size(1024, 64)
    step = Step(machine, machine.network("mini", fp8), *sizes, variant="carried")
    ms = machine.call_us(step.call, rounds=20, before=step.reset) / 1e3
    step.reset()
    events = machine.device_events(step.call)
    kernels, rest = summed(events)
    total = sum(us for *_, us in events) / 1e3
    line = {
        "ms": ms, "kernels_ms": total, "gaps_ms": ms - total, "launches": len(events), "kernels": kernels, "rest": rest,
    }  # fmt: skip
    print("\n".join(show(line)), flush=True)
    return line


def points():
    return [
        Point(f"profile mini {kind} b{batch} carried", "profile", 4, partial(profile_step, fp8=fp8, batch=batch))
        for kind, fp8 in (("bf16", False), ("fp8", True))
        for batch in (1, 32)
    ]
