"""Compiles what the GPU benchmarks, the decode loop and the gpu tests launch, into Triton's cache on disk.

    python -m benchmarks.gpu.prewarm [--only steps,kernels,scenarios,tests,tune] [--jobs N] [--target sm_90]
                                 [--device-name NAME] [--unpack FILE] [--pack FILE] [--dry-run]

All cores compile side by side, without a GPU. What launches is run on tensors of real shapes and no data, at the launch
parameters that the tuned tables hold for the GPU that is there, or for --device-name. The last line counts what was
compiled, what was there already and what failed; exit 1 if something did.

--pack FILE leaves the compiled kernels in a tar.xz for another machine: there --unpack FILE puts them into the cache
first, if FILE is of the same build of Triton and the same target, and says why not otherwise.
"""

import argparse
import io
import json
import re
import sys
import tarfile
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime.cache import FileCacheManager

from llada2_fast import demo
from llada2_fast.config import MAX_TOP_LOGPROBS, DecodeParams, ModelConfig
from llada2_fast.decoding.graph_runner import StepGraph
from llada2_fast.decoding.inputs import special_ids
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.decoding.rules import row_rule
from llada2_fast.decoding.speculation import Check, check
from llada2_fast.demo import network
from llada2_fast.kernels import _tuned, attention, norm, refine, rope
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import summed
from llada2_fast.model import LLaDA2Model, read_nothing

from .. import aot
from ..harness import ROOT
from ..roofline import BLOCK
from ..tune import tuner as tune
from . import gates
from . import kernels as gpu_kernels
from . import steps as gpu_steps
from .machine import QUANTIZATIONS, Shapes

# active blocks, places for carried ones
SIZES = sorted({(batch, carried) for batch, _ in gpu_steps.GRID for carried in (0, -(-batch // 4))})
SMALL_SIZES = [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 4), (8, 0), (8, 1), (8, 2), (8, 4), (8, 8)]
PAGES = sorted({4, 64} | {prefix // BLOCK + 1 for _, prefix in gpu_steps.GRID})  # of a row; 4, 64: of texts
PREFILL = (1024, 4096)  # tokens of a forward
MANIFEST = "manifest.json"
ENTRY = re.compile(r"([A-Z2-7]{52})/(\w+\.(?:cubin|json))")  # a file of Triton's cache: folder, name


# What is launched: functions that launch it on Shapes, or return the Launches.


def steps_of(config, dtype, sizes, pages, prefill, length=BLOCK):
    """Steps of a network as the decode loop's graphs hold them, with and without top-k and top-p, also of rows under a
    language, a check of drafts, and its prefill."""
    model = LLaDA2Model(config, dtype=dtype, device="meta").eval()
    cache = model.new_cache(max(pages), length)
    for active, carried in sizes:
        for width in pages:
            lanes = Lanes(active, length, special_ids(config, config.mask_token_id), model.device, pages=width)
            step = StepGraph(model, cache, lanes, active, carried)
            step.run()
    step.filters = True
    step.run()
    lanes.guide(0, np.zeros(config.vocab_size, np.int16))
    step.guided = True
    for step.filters in (False, True):
        step.run()
    rule = row_rule(DecodeParams(policy="self_speculative"), length)
    draft = Check((0, 1, 2), 2 * length, 1, [-1] * length, [0] * length, [0] * length, rule, MAX_TOP_LOGPROBS)
    check(model, cache, [draft, draft._replace(block=0, pages=(1, 2))], lanes.ids)
    for tokens in prefill:
        count = tokens // length
        ids = torch.zeros(tokens, dtype=torch.int64, device=model.device)
        run = attention.Span(tuple(i % cache.num_pages for i in range(count)), 0, count, tokens)
        model.forward_blocks(ids, ids, [run], cache, read_nothing(model.device))


def steps(machine):
    """Of LLaDA2-mini; all of its layers but the first and the last are alike."""
    for quantization in QUANTIZATIONS.values():
        config = replace(machine.config("mini", quantization), num_hidden_layers=3)
        steps_of(config, machine.dtype, SIZES, PAGES, PREFILL)


def kernels(machine):
    """Those of benchmarks.gpu.kernels, which take other paths than a step."""
    for batch in gpu_kernels.BATCHES:
        for mode in gates.MODES:
            case = gates.refine_case(machine, [mode] * batch)
            for allowed in (None, gates.allowed_case(machine, batch)):
                refine.refine_step(*case, filters=mode == "filters", allowed=allowed)
        for prefix in gpu_kernels.PREFIXES:
            attention.block_attention(*gates.attention_case(machine, [prefix] * batch))
    for quantization in QUANTIZATIONS.values():
        layer = gates.moe_layer(machine, quantization)
        for tokens in gpu_kernels.TOKENS:
            summed(layer(machine.random(tokens, layer.router.weight.shape[1]))[0])
    for tokens in (32, 1000, 4096):
        norm.add_rms_norm(*gates.norm_case(machine, tokens))
        norm.add_rms_norm(*gates.norm_case(machine, tokens, experts=True))
    for tokens in (32, 1024, 4096):
        rope.qk_norm_rope_write(*gates.rope_case(machine, tokens))


def scenarios(machine):
    """Those of benchmarks.aot; flash has no place on a GPU of 80 GB."""
    for name, call in aot.SCENARIOS.items():
        if "flash" not in name:
            call()


def tests(machine):
    """Steps of the embedded model and, in a checkout, of the networks with recorded decodings."""

    def small(folder, mask_id, dtype, length, sizes=SMALL_SIZES):
        config = ModelConfig.from_hf(folder)
        config = replace(config, mask_token_id=config.vocab_size - 1 if mask_id is None else mask_id)
        steps_of(config, dtype, sizes, (8,), (4 * length,), length)

    for variant in demo.FOLDERS:
        for dtype in (torch.float32, torch.bfloat16):
            small(demo.path(variant), network.MASK_ID, dtype, network.BLOCK)
    for path in sorted(ROOT.glob("tests/golden/*/config.json")):
        small(path.parent, None, torch.float32, 8)
        for length in (4, 32):  # recorded decodings alone, one row each
            small(path.parent, None, torch.float32, length, [(1, 0), (1, 1)])


PARTS = {
    "steps": steps, "kernels": kernels, "scenarios": scenarios, "tests": tests,
    "tune": lambda machine: tune.launches(machine, tune.groups(machine)),
}  # fmt: skip


@contextmanager
def without_gpu():
    """Within it ops on tensors without data take the way of a GPU."""
    with force_ops("triton"), torch.no_grad():
        yield


def launches(parts=tuple(PARTS), gpu="any"):
    """(aot.Launches of some of PARTS, each kernel once; why parts failed). gpu: as the tuned tables name it."""
    failures = []
    with aot.recorded() as noted, without_gpu(), _tuned.named(gpu):
        for part in parts:
            try:
                noted += PARTS[part](Shapes()) or []
            except Exception as error:  # what it has launched is compiled, and so are the others
                failures.append(f"{part}: {aot.reason(error)}")
    return list({launch.name: launch for launch in noted}.values()), failures


# Compiling


def compile_one(launch, target, launcher):
    """(whether Triton's cache had it, paths of what another machine needs of it, why it failed or None).

    launcher: build the C code that launches it too, which Triton 3.6 leaves to gcc; needs NVIDIA's driver.
    """
    had = []
    knobs.compilation.listener = lambda cache_hit, **_: had.append(cache_hit)
    try:
        found = aot.compiled(launch, target)
        if launcher:
            driver.CudaLauncher(found.src, found.metadata)
    except Exception as error:  # one kernel must not stop the others
        return False, [], f"{launch.kernel.__name__}: {aot.reason(error)}"
    finally:
        knobs.compilation.listener = None
    return had[0], [path for name, path in found.metadata_group.items() if name.endswith((".cubin", ".json"))], None


def compile_all(found, target, jobs=None):
    """(number compiled, number that was there, reasons of failures, paths as of compile_one) of aot.Launches."""
    failures, paths, hits = [], [], []
    first_of = {tuple(launch.signature.values()): launch.name for launch in reversed(found)}  # they share a launcher
    launchers = set(first_of.values()) if torch.cuda.is_available() and hasattr(driver, "make_launcher") else ()
    work = [(launch, target, launch.name in launchers) for launch in found]
    try:
        for done, (hit, files, error) in enumerate(aot.compile_each(work, jobs, compile_one), 1):
            paths += files
            if error:
                failures.append(error)
            else:
                hits.append(hit)
            if done % 50 == 0:
                print(f"{done} of {len(found)}", flush=True)
    except BrokenProcessPool:
        left = len(found) - len(hits) - len(failures)
        failures.append(f"a process died, {left} kernels are not compiled")
    return hits.count(False), hits.count(True), failures, paths


# Carrying


def build(target):
    """What must agree where compiled kernels are carried to: Triton's build and version, and the target."""
    return {"key": aot.triton_build(), "triton": triton.__version__, "target": target}


def pack(file, paths, target):
    """Write files of Triton's cache to a tar.xz, behind a manifest."""
    with tarfile.open(file, "w:xz") as tar:
        manifest = json.dumps(build(target)).encode()
        head = tarfile.TarInfo(MANIFEST)
        head.size = len(manifest)
        tar.addfile(head, io.BytesIO(manifest))
        for path in map(Path, paths):
            tar.add(path, f"{path.parent.name}/{path.name}")


def unpack(file, target):
    """Put the kernels of a packed file into Triton's cache; what is there already stays. Returns how many are new.

    ValueError, and nothing is unpacked, if the file is of another build or target or holds anything but kernels.
    """
    try:
        with tarfile.open(file, "r:xz") as tar:
            held = {member.name: tar.extractfile(member).read() if member.isfile() else None for member in tar}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    manifest, expected = held.pop(MANIFEST, None), build(target)
    found = json.loads(manifest) if manifest else "no manifest"
    if found != expected:
        raise ValueError(f"{file}: expected {expected}, found {found}")
    folders = {}
    for name, data in held.items():
        entry = ENTRY.fullmatch(name)
        if entry is None or data is None:
            raise ValueError(f"{file}: expected files FOLDER/NAME.cubin and .json of Triton's cache, found {name!r}")
        folders.setdefault(entry[1], {})[entry[2]] = data
    new = 0
    for folder, files in folders.items():
        manager = FileCacheManager(folder)
        head = next((name for name in files if name.endswith(".json")), None)
        if head and manager.get_group(head) is None:
            manager.put_group(head, {name: manager.put(data, name) for name, data in files.items()})
            new += 1
    return new


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    targets = [name for name in aot.TARGETS if name.startswith("sm")]
    parser.add_argument("--target", choices=targets, default=aot.target_here() or "sm_90", help="default: %(default)s")
    parser.add_argument(
        "--device-name", metavar="NAME", default=torch.cuda.get_device_name() if torch.cuda.is_available() else "any",
        help="the GPU whose tuned tables hold (default: the one that is there, else none)",
    )  # fmt: skip
    parser.add_argument("--unpack", metavar="FILE", help="take compiled kernels from FILE first")
    parser.add_argument("--pack", metavar="FILE", help="leave the compiled kernels in FILE")
    parser.add_argument("--dry-run", action="store_true", help="compile one kernel of the first part")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    started = time.perf_counter()
    if options.unpack:
        try:
            print(f"{unpack(options.unpack, options.target)} kernels unpacked from {options.unpack}", flush=True)
        except ValueError as error:
            print(f"nothing unpacked: {error}", flush=True)
    most = 1 if options.dry_run else None
    found, broken = launches(parts[:most], options.device_name)
    compiled, there, failures, paths = compile_all(found[:most], options.target, options.jobs)
    failures = broken + failures
    if options.pack:
        pack(options.pack, paths, options.target)
    for failure in failures:
        print(failure)
    seconds = time.perf_counter() - started
    print(f"{compiled} compiled, {there} already there, {len(failures)} failed, {seconds:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
