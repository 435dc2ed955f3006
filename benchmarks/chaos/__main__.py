"""The server's scorecard: real processes, real sockets, the embedded model, and everything that clients do wrong.

    python -m benchmarks.chaos [--quick] [--only R1,R3,...] [--json] [--save [FOLDER]]        or: make chaos

Each gate starts `llada2-fast serve` on a free port of 127.0.0.1, or chaos' own launcher of the same server around an
engine that fails on a schedule, and prints what it has measured. Exit code 1 unless all gates are held. Times depend on
what else the machine does, which is told at the end: gates are meant for one that does nothing else. All together take
a quarter of an hour, ten minutes of it R5; --quick is a smaller run of the same.
"""

import argparse
import asyncio
import functools
import resource
import time

import torch

from .. import harness
from ..own_server import busy_seconds
from . import cuts, faults, fuzz, life, load, slow
from . import soak as soaking
from .jobs import make_jobs
from .process import LAUNCHER, started

ROOMY = ("--max-queue", 256)  # nobody is turned away


@functools.cache
def jobs():
    return make_jobs(20)


def r1(quick):
    with started(*fuzz.OPTIONS) as server:
        yield asyncio.run(fuzz.fuzz(server, 1000 if quick else 10_000))


def r3(quick):
    with started(*ROOMY) as server:
        yield asyncio.run(cuts.cuts(server, jobs(), 300 if quick else 2000))


def r4(quick):
    with started("--max-num-seqs", 8, command=LAUNCHER) as server:
        yield asyncio.run(cuts.cancels(server, 60 if quick else 300))


def r5(quick):
    with started(*ROOMY, *fuzz.OPTIONS) as server:
        yield asyncio.run(soaking.soak(server, jobs(), 20 if quick else 600))


def r6(quick):
    with started() as server:
        yield asyncio.run(life.kills(server, 2 if quick else 20))


def r9(quick):
    with started(*load.OPTIONS) as server:
        yield asyncio.run(load.overload(server, 4 if quick else 16))


def r14(quick):
    count = 10 if quick else 50
    with started("--max-num-seqs", 8, "--faults", count, command=LAUNCHER) as server:
        yield asyncio.run(faults.faults(server, jobs(), count))


def r16(quick):
    for seconds, enough in ((60, True), (1, False)):
        with started("--drain-s", seconds) as server:
            yield asyncio.run(life.sigterm(server, seconds, enough))


def slow_clients(quick):
    with started(*slow.OPTIONS) as server:
        yield asyncio.run(slow.slow(server, stream=not quick))


GATES = {"R1": r1, "R3": r3, "R4": r4, "R5": r5, "R6": r6, "R9": r9, "R14": r14, "R16": r16, "slow": slow_clients}


def _names(text):
    names = text.split(",")
    if not set(names) <= GATES.keys():
        raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(GATES)}")
    return names


def _own_s():
    """CPU seconds of this process and of those that it has ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _show(verdict):
    print(f"{verdict.name:5}{'held' if verdict.held else 'NOT HELD':10}{verdict.what}", flush=True)
    print(f"{'':15}measured: {verdict.measured}\n{'':15}gate:     {verdict.limit}", flush=True)
    for line in verdict.wrong[:10]:
        print(f"{'':15}wrong:    {line[:500]}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", type=_names, default=list(GATES), help=f"some of {','.join(GATES)} (default: all)")
    harness.add_options(parser)
    args = parser.parse_args(argv)
    harness.check_save(parser, args, "chaos")
    torch.set_num_threads(1)  # as the servers
    begun, others, verdicts = time.monotonic(), busy_seconds() - _own_s(), []
    for name in args.only:
        for verdict in GATES[name](args.quick):
            _show(verdict)
            verdicts.append(verdict)
    seconds = time.monotonic() - begun
    others = max(0.0, busy_seconds() - _own_s() - others) / seconds
    held = sum(verdict.held for verdict in verdicts)
    print(f"{held} of {len(verdicts)} gates held, {seconds:.0f} s; others have used {others:.2f} processors meanwhile")
    lines = [vars(verdict) | {"held": verdict.held, "wrong": len(verdict.wrong)} for verdict in verdicts]
    harness.finish("chaos", args, {"seconds": seconds, "others_processors": others, "gates": lines})
    return 0 if held == len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
