"""The first minute on a GPU nobody has seen: every kernel, a step, a text, an engine, each in a process of its own.

    python -m benchmarks.gpu.first_light [--only gate,step] [--jobs 4] [--limit 45] [--out FILE] [--dry-run]

A check that hangs is killed after --limit seconds, one that takes the device down takes its own process with it: the
others go on. Each is a line as it ends, printed, and in JSON with what went wrong appended to --out. They go from small
to large, so that the first failure names the culprit. Exit codes: 0 all passed; 1 some did not; 2 no CUDA device, or
bad arguments. --dry-run takes the same paths on a CPU with tiny shapes.
"""

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._inductor.config  # noqa: F401  torch.use_deterministic_algorithms imports it, in every check anew
import triton

from llada2_fast import Engine, EngineConfig
from llada2_fast.config import DecodeParams

from .. import aot
from ..lines import append_line
from . import decode as gpu_decode
from . import gates, steps
from .machine import QUANTIZATIONS, Machine

EXIT_S = 10.0  # for the end of a process that is done
# What takes long of this module's own imports; the module itself may be __main__.
PRELOADED = ["torch._inductor.config", Engine.__module__, *(part.__name__ for part in (aot, gpu_decode, steps))]


def versions(machine):
    """What the figures of this machine depend on. triton_key: machines that share it can share compiled kernels."""
    found = {
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "triton_key": aot.triton_build(), "cores": os.cpu_count(),
    }  # fmt: skip
    if machine.dry:
        return found
    card = torch.cuda.get_device_properties(machine.device)
    return found | {
        "device": card.name, "capability": f"{card.major}.{card.minor}", "multiprocessors": card.multi_processor_count,
        "memory_gb": card.total_memory / 1e9, "l2_mb": card.L2_cache_size / 1e6, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def step(machine, quantization, captured):
    """A step launched piece by piece; or captured, and its replay held against that bit by bit."""
    made = steps.Step(machine, machine.shallow(quantization), machine.size(2, 2), machine.size(1024, 64))
    if captured:
        return made.check()
    output = made.graph.run()
    if not bool(output.confidence.isfinite().all()):
        raise ArithmeticError("the step's confidences are not finite")


def decode(machine, quantization):
    """Two texts of the same prompts have the same tokens."""
    model = machine.shallow(quantization)
    inputs = gpu_decode.prompts(machine, model, 2)
    texts = [gpu_decode.text(model, inputs, machine.size(64, 32), 4) for _ in range(2)]
    if not torch.equal(*[text.sequences for text in texts]):
        raise ArithmeticError("the same prompts gave other tokens")
    return {"forwards": texts[0].counters[0].denoise_forwards}


def engine(machine):
    """Rows that come and go through fewer lanes, one of them drawing with top-k."""
    model = machine.shallow()
    mask_id, length = model.config.mask_token_id, machine.size(48, 16)
    params = DecodeParams(gen_length=length, steps=4, threshold=2.0, mask_id=mask_id, eos_ids=(-1,))
    kinds = [params, params, replace(params, temperature=0.8, top_k=7, seed=3), params]
    config = EngineConfig(
        block_length=32, mask_id=mask_id, max_num_seqs=2, cache_tokens=4096, graphs=not machine.dry, trace=False
    )  # fmt: skip
    served = Engine(model, config)
    prompt = gpu_decode.prompts(machine, model, 1)[0].cpu()
    outputs = served.generate([prompt[: 64 - 3 * i] for i in range(len(kinds))], kinds)
    served.check_integrity()
    if any(output.error or len(output.token_ids) != length for output in outputs):
        raise ArithmeticError(f"expected {length} tokens each, got {[(o.error, len(o.token_ids)) for o in outputs]}")


def checks():
    """{name: function(machine) -> values for its line, or None}, from small to large."""
    found = {"versions": versions} | {f"gate {name}": gate for name, gate in gates.GATES.items()}
    for kind, quantization in QUANTIZATIONS.items():
        found[f"step {kind} launched"] = partial(step, quantization=quantization, captured=False)
        found[f"step {kind} captured"] = partial(step, quantization=quantization, captured=True)
        found[f"decode {kind}"] = partial(decode, quantization=quantization)
    return found | {"engine bf16": engine}


def check(name, dry):
    """Run one check here; the values of its line."""
    torch.manual_seed(0)
    machine = Machine(dry)
    values = checks()[name](machine)
    machine.synchronize()
    return values or {}


class Ended(NamedTuple):
    """How a call in a process of its own ended."""

    value: object  # what it returned, None if it did not
    error: str | None  # why it did not
    output: str  # what it printed, to the traceback


def apart(call, limit):
    """call() in a process of its own, killed after `limit` seconds: an Ended.

    The process comes from a server that has imported PRELOADED and touched no GPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(call, theirs, output.name), daemon=True)
        process.start()
        theirs.close()
        try:
            value, error = ours.recv() if ours.poll(limit) else (None, f"killed after {limit:g} s")
        except EOFError:
            process.join(EXIT_S)
            value, error = None, f"ended with {process.exitcode}"
        else:
            process.join(EXIT_S if error is None else 0)
        process.kill()
        process.join()
        return Ended(value, error, output.read())


def _send(call, pipe, output):
    """In the process: (value, None) or (None, error); what is printed goes to the file `output`."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        value = call()
        sys.stdout.flush()
        pipe.send((value, None))
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        raise SystemExit(1) from None


def run(names, dry, jobs, limit, out=None):
    """Run the checks side by side; their lines, each kept and printed as it ends."""

    def one(name):
        started = time.monotonic()
        ended = apart(partial(check, name, dry), limit)
        line = {"check": name, "ok": ended.error is None, "seconds": round(time.monotonic() - started, 1)}
        line |= ended.value if line["ok"] else {"error": ended.error, "output": ended.output[-3000:]}
        if out is not None:
            append_line(out, line)
        verdict = "ok" if line["ok"] else "FAILED"
        print(f"{verdict:6} {name:20} {line['seconds']:6.1f} s  {line.get('error', '')}", flush=True)
        return line

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="comma-separated parts of the checks' names (default: all)")
    parser.add_argument("--jobs", type=int, default=4, help="checks at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds a check may take (default: %(default)g)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines to it")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: tries the checks alone")
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
