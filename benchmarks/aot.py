"""Compiles every kernel in every specialisation that is in use, for every GPU we name, without a GPU.

    python -m benchmarks.aot [--targets sm_80,sm_90,sm_100,gfx942] [--names refine,norm] [--json]

A *scenario* calls an op's launcher on tensors of its real shapes and no data; what it would launch is compiled instead.
The table has registers per thread, bytes spilled to memory and shared memory per program. Exit 1 if anything does not
compile, wants more shared memory than the GPU has, spills on sm_80 or sm_90, or multiplies and adds 16-bit numbers in
one instruction (sm_90 and later), where the reference rounds in between. A scenario that only some targets must hold
says so when it fails and why (gfx942).
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from itertools import starmap
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction, create_function_from_signature

from llada2_fast.kernels import advance, attention, candidates, moe, norm, refine, rope, router
from llada2_fast.kernels._ambient import settle_key
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.fp8 import FP8, linear, scale_shape
from llada2_fast.kernels.gemm import QuantTensor

VOCAB, IDS = 157184, refine.SpecialIds(156895)  # LLaDA2.0 and 2.1

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
NO_SPILLS = ("sm_80", "sm_90")  # spilling fails there
MAY_FAIL = ("gfx942",)  # never run; kept compiling as far as Triton goes
FMA_FOR_MUL = ("sm_80",)  # its only product of bfloat16 is an fma, which adds -0
NO_FP8 = ("sm_80",)  # kernels on fp8 are not compiled there, and refused at run time


class Launch(NamedTuple):
    """A kernel with everything that decides what is compiled."""

    kernel: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    @property
    def name(self):
        """The same for all launches that one compiled kernel serves."""
        return repr(self.__reduce__()[1])

    def __reduce__(self):
        """Pickled, it names its kernel."""
        return _named_launch, (self.kernel.__module__, self.kernel.__name__, *self[1:])


def _named_launch(module, name, *rest):
    return Launch(getattr(import_module(module), name), *rest)


class Result(NamedTuple):
    """One kernel of one scenario on one target; the numbers are None if it failed, error is None if it did not."""

    scenario: str
    kernel: str
    target: str
    warps: int
    registers: int | None
    spilled: int | None
    shared: int | None
    error: str | None

    @property
    def fault(self):
        """Why this result fails the run, or None."""
        if self.target in MAY_FAIL:
            return None
        if self.error:
            return self.error
        if self.spilled and self.target in NO_SPILLS:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"wants {self.shared} bytes of shared memory, {SHARED_LIMIT[self.target]} are allowed"
        return None


# Scenarios: name -> call that launches. Tensors are on the device "meta": shapes, types and strides alone.


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _state(rows, length):
    whole = _meta(rows, dtype=torch.int32)
    return refine.BlockState(
        _meta(rows, length, dtype=torch.int64), _meta(rows, length, dtype=torch.int8), _meta(rows, dtype=torch.int64),
        *[whole] * 4, _meta(rows, length, dtype=torch.int32), _meta(rows, length),
    )  # fmt: skip


def _advance(entries, carried, length=32):
    whole, plan = _meta(256, dtype=torch.int32), _meta(entries, dtype=torch.int32)
    advance.launch(_state(256, length), advance.RowBounds(whole, whole, whole), plan, plan, carried, IDS)


def _refine(dtype, length=32, vocab=VOCAB, rows=8, packed=False, only_needed=False, filters=False, layout=None):
    whole, real, long = _meta(rows, dtype=torch.int32), _meta(rows), _meta(rows, dtype=torch.int64)
    params = refine.RefineParams(real, whole, real, long, real, real, *[whole] * 5, eos_ids=long[:, None])
    logits = _meta(rows * length, vocab, dtype=dtype) if packed else _meta(rows, length, vocab, dtype=dtype)
    if layout == "transposed":
        logits = _meta(rows, vocab, length, dtype=dtype).transpose(1, 2)
    index = _meta(rows, length, dtype=torch.int64) if packed else None
    refine.launch(logits, _state(rows, length), params, IDS, index, filters, only_needed)


def _candidates(dtype, runner_up, filters):
    rows, length = 8, 32
    real, whole, long = _meta(rows), _meta(rows, dtype=torch.int32), _meta(rows, dtype=torch.int64)
    candidates.launch(
        _meta(rows, length, VOCAB, dtype=dtype), long, whole, candidates.SampleParams(real, whole, real, long),
        IDS, whole, None, filters, runner_up,
    )  # fmt: skip


def _attention(dtype, heads, kv_heads=4, dim=128, length=32, pages=64):
    cache = _meta(3, pages, length, kv_heads, dim, dtype=dtype)[1]
    numbers = [_meta(*shape, dtype=torch.int32) for shape in ((8,), (8,), (8, pages), (8,))]
    with force_ops("triton"):
        q = _meta(8 * length, heads, dim, dtype=dtype)
        attention.block_attention(q, cache, cache, attention.BlockBatch(*numbers))


def _qk_norm_rope(dtype, heads, kv_heads=4, dim=128, rot=64, length=32, write=True, norms=True):
    cache = _meta(3, 64, length, kv_heads, dim, dtype=dtype)[1]
    weight = _meta(dim, dtype=dtype) if norms else None
    cos, qkv = _meta(64, rot, dtype=dtype), _meta(64, heads + 2 * kv_heads, dim, dtype=dtype)
    args = (qkv, weight, weight, cos, cos, 1e-6, heads, kv_heads)
    with force_ops("triton"):
        if write:
            rope.qk_norm_rope_write(*args, cache, cache, _meta(64, dtype=torch.int64))
        else:
            rope.qk_norm_rope(*args)


def _norm(dtype, size, add):
    x, weight = _meta(64, size, dtype=dtype), _meta(size, dtype=dtype)
    with force_ops("triton"):
        norm.add_rms_norm(x, x, weight, 1e-6) if add else norm.rms_norm(x, weight, 1e-6)


def _weight(*shape, dtype, fp8=False, parts=1):
    scale = _meta(*scale_shape(shape, parts)) if fp8 else None
    return QuantTensor(_meta(*shape, dtype=FP8 if fp8 else dtype), scale)


def _moe(dtype, hidden, inner, tokens, capacity=None, gate=None, shared=True, fp8=False, experts=256, top_k=8):
    h, blocks = _meta(tokens, hidden, dtype=dtype), _meta(tokens // 32, dtype=torch.int64)
    router_weight, bias = _meta(experts, hidden, dtype=gate or dtype), _meta(experts)
    kind = dict(dtype=dtype, fp8=fp8)
    weights = _weight(experts, 2 * inner, hidden, parts=2, **kind), _weight(experts, hidden, inner, **kind)
    beside = _weight(2 * inner, hidden, parts=2, **kind), _weight(hidden, inner, **kind)
    with force_ops("triton"):
        block = capacity and router.TokenBlocks(None, blocks)
        routing = router.route(h, router_weight, bias, top_k, 8, 4, 2.5, capacity, block, fp8=fp8)
        moe.experts(h, routing, *weights, beside if shared else None)


def _fp8_linear(tokens, rows, columns):
    with force_ops("triton"):
        linear(_meta(tokens, columns, dtype=torch.bfloat16), *_weight(rows, columns, dtype=None, fp8=True))


def _fp8_mlp(tokens, hidden, inner):
    kind = dict(dtype=None, fp8=True)
    with force_ops("triton"):
        gate_up, down = _weight(2 * inner, hidden, parts=2, **kind), _weight(hidden, inner, **kind)
        moe.mlp(_meta(tokens, hidden, dtype=torch.bfloat16), gate_up, down)


_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCENARIOS = {
    **{f"refine {name} filters": lambda t=dtype: _refine(t, filters=True) for name, dtype in _TYPES.items()},
    **{f"refine {name}": lambda t=dtype: _refine(t) for name, dtype in _TYPES.items()},
    "refine bf16 packed": lambda: _refine(torch.bfloat16, packed=True),
    "refine bf16 packed filters": lambda: _refine(torch.bfloat16, packed=True, filters=True),
    "refine fp32 packed filters": lambda: _refine(torch.float32, packed=True, filters=True),
    "refine bf16 needed": lambda: _refine(torch.bfloat16, only_needed=True),
    "refine bf16 needed filters": lambda: _refine(torch.bfloat16, only_needed=True, filters=True),
    **{f"refine bf16 L={length}": lambda n=length: _refine(torch.bfloat16, n) for length in (1, 4, 8, 16, 48, 64, 128)},
    "refine bf16 V=2^18": lambda: _refine(torch.bfloat16, vocab=2**18, filters=True),
    "refine fp32 V=4096": lambda: _refine(torch.float32, length=16, vocab=4096, filters=True),
    "refine fp32 V=5003": lambda: _refine(torch.float32, vocab=5003, filters=True),
    "refine bf16 transposed": lambda: _refine(torch.bfloat16, layout="transposed", filters=True),
    "candidates bf16": lambda: _candidates(torch.bfloat16, runner_up=False, filters=False),
    "candidates bf16 runner-up filters": lambda: _candidates(torch.bfloat16, runner_up=True, filters=True),
    **{f"advance A={a} C={c}": lambda a=a, c=c: _advance(a, c) for a, c in ((1, 0), (1, 1), (32, 8), (256, 64))},
    "advance L=128": lambda: _advance(64, 16, length=128),
    **{f"attention mini {name}": lambda t=dtype: _attention(t, 16) for name, dtype in _TYPES.items()},
    "attention flash bf16": lambda: _attention(torch.bfloat16, 32),
    "attention mini bf16 one split": lambda: _attention(torch.bfloat16, 16, pages=4),
    **{f"attention mini bf16 L={n}": lambda n=n: _attention(torch.bfloat16, 16, length=n) for n in (1, 16, 48)},
    "attention bf16 D=64": lambda: _attention(torch.bfloat16, 8, dim=64),
    "attention fp32 D=80": lambda: _attention(torch.float32, 8, dim=80),
    "attention fp32 D=16": lambda: _attention(torch.float32, 4, 2, 16, 8),
    "qk_norm_rope mini bf16": lambda: _qk_norm_rope(torch.bfloat16, 16),
    "qk_norm_rope mini fp32": lambda: _qk_norm_rope(torch.float32, 16),
    "qk_norm_rope flash bf16": lambda: _qk_norm_rope(torch.bfloat16, 32),
    "qk_norm_rope mini bf16 no pages": lambda: _qk_norm_rope(torch.bfloat16, 16, write=False),
    "qk_norm_rope mini bf16 no norms": lambda: _qk_norm_rope(torch.bfloat16, 16, norms=False),
    **{f"rms_norm bf16 H={size}": lambda n=size: _norm(torch.bfloat16, n, add=False) for size in (2048, 4096)},
    **{f"add_rms_norm bf16 H={size}": lambda n=size: _norm(torch.bfloat16, n, add=True) for size in (2048, 4096)},
    "add_rms_norm fp32 H=2048": lambda: _norm(torch.float32, 2048, add=True),
    "add_rms_norm fp32 H=64": lambda: _norm(torch.float32, 64, add=True),
    **{f"moe mini bf16 T={t}": lambda t=t: _moe(torch.bfloat16, 2048, 512, t) for t in (32, 512, 4096)},
    **{f"moe flash bf16 T={t}": lambda t=t: _moe(torch.bfloat16, 4096, 1024, t) for t in (32, 512, 4096)},
    **{f"moe flash 2.2 T={t}": lambda t=t: _moe(torch.bfloat16, 4096, 1024, t, capacity=48) for t in (32, 256)},
    "moe mini bf16 fp32 gate": lambda: _moe(torch.bfloat16, 2048, 512, 32, gate=torch.float32),
    "moe mini fp32 nothing shared": lambda: _moe(torch.float32, 2048, 512, 32, shared=False),
    **{f"moe mini fp8 T={t}": lambda t=t: _moe(torch.bfloat16, 2048, 512, t, fp8=True) for t in (32, 512, 4096)},
    **{f"moe flash fp8 T={t}": lambda t=t: _moe(torch.bfloat16, 4096, 1024, t, fp8=True) for t in (32, 512, 4096)},
    "fp8 qkv mini": lambda: _fp8_linear(32, 3072, 2048),
    **{f"fp8 LM head mini T={tokens}": lambda t=tokens: _fp8_linear(t, VOCAB, 2048) for tokens in (32, 1024)},
    "fp8 qkv flash T=4096": lambda: _fp8_linear(4096, 5120, 4096),
    "fp8 LM head flash": lambda: _fp8_linear(256, VOCAB, 4096),
    **{f"fp8 dense MLP mini T={tokens}": lambda t=tokens: _fp8_mlp(t, 2048, 5120) for tokens in (32, 4096)},
    "fp8 dense MLP flash T=4096": lambda: _fp8_mlp(4096, 4096, 9216),
}


# Compiling


@contextmanager
def recorded():
    """Within it a launch is not run but noted; yields the list of Launches."""
    found = []

    def note(kernel, *args, grid, warmup, **kwargs):
        found.append(_launch_of(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", note):
        yield found


def _launch_of(kernel, args, kwargs):
    """What Triton makes of a launch; a tensor on "meta" is as aligned as it would be in memory of its own."""
    backend = make_backend(TARGETS["sm_90"])  # what it knows of arguments is the same for every NVIDIA GPU
    bound, special, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, special, None)
    return Launch(kernel, signature, constants, attributes, options)


def target_here():
    """The target that the GPU of this machine is, or None."""
    if not torch.cuda.is_available():
        return None
    name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return name if name in TARGETS else None


def triton_build():
    """What machines have in common that can share compiled kernels, in 16 digits."""
    return sha256(triton_key().encode()).hexdigest()[:16]


FAILURES = triton.CompilationError, triton.runtime.errors.PTXASError, RuntimeError


def compiled(launch, target):
    """Triton's CompiledKernel for TARGETS[target], from its cache on disk or put there, under the name that a launch
    looks for. Raises one of FAILURES."""
    settle_key(launch.kernel)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def reason(failure):
    """One of FAILURES in a line."""
    return f"{type(failure).__name__}: {(str(failure).strip() or 'no reason given').splitlines()[-1]}"


def compile_launch(launch, scenario, target):
    """Compile for TARGETS[target]; a Result."""
    head = (scenario, launch.kernel.__name__, target, launch.options["num_warps"])
    try:
        found = compiled(launch, target)
    except FAILURES as failure:
        return Result(*head, None, None, None, reason(failure))
    usage = _amd_usage if TARGETS[target].backend == "hip" else _nvidia_usage
    skipped = _skipped_rounding(found) if target not in FMA_FOR_MUL else None
    return Result(*head, *usage(found), found.metadata.shared, skipped)


def _skipped_rounding(compiled):
    """Where two 16-bit numbers are multiplied and added in one, the reference rounds in between. A kernel that came
    without its PTX passes."""
    fused = re.search(r"\bfma\.rn(\.(ftz|sat|relu|oob))*\.(bf16|f16)(x2)?\b", compiled.asm.get("ptx", ""))
    return f"{fused[0]}: a rounding of the reference is skipped" if fused else None


def compile_each(work, processes=None, call=compile_launch):
    """Yields call(*arguments) for each of `work`, in order; all of it is compiled side by side.

    call: a function of a module. processes: at most so many, by default one per core. Not threads: Triton compiles in
    Python, where threads take turns, and Python 3.11's ast.parse fails in them (SystemError: AST constructor recursion
    depth mismatch). Whoever stops early waits for nothing that has not begun.
    """
    processes = min(len(work), processes or len(os.sched_getaffinity(0)))
    if processes < 2:
        yield from starmap(call, work)
        return
    context = multiprocessing.get_context("forkserver")  # the caller's process may hold a GPU and threads: no fork
    context.set_forkserver_preload(["torch", "triton"])
    pool = ProcessPoolExecutor(processes, context)
    try:
        yield from pool.map(call, *zip(*work, strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _nvidia_usage(compiled):
    """Registers per thread and bytes of its stack, which spills alone take, as the binary says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", log).groups()))


def _amd_usage(compiled):
    """Vector registers and bytes of them spilled; scalar registers spill to vector lanes, not to memory."""
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
    return int(found["vgpr_count"]), 4 * int(found["vgpr_spill_count"])


def compile_all(targets=tuple(TARGETS), names=None, report=lambda result: None, processes=1):
    """Compile the scenarios whose names contain one of `names` (all if None); a list of Results.

    One kernel in one specialisation is compiled once per target, however many scenarios launch it, in as many
    processes as compile_each is told. report(result) is called as each is done. Raises ValueError on unknown targets
    and on names that match nothing.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"targets: expected some of {', '.join(TARGETS)}, got {target!r}")
    work, seen = [], set()
    for scenario, call in SCENARIOS.items():
        if names is not None and not any(name in scenario for name in names):
            continue
        with recorded() as launches:
            call()
        for launch in launches:
            fp8 = any("fp8" in kind for kind in launch.signature.values())
            for target in targets if launch.name not in seen else ():
                if not (fp8 and target in NO_FP8):
                    work.append((launch, scenario, target))
            seen.add(launch.name)
    if not work:
        raise ValueError(f"names: expected parts of {', '.join(SCENARIOS)}, got {names}")
    results = []
    for result in compile_each(work, processes):
        report(result)
        results.append(result)
    return results


def _line(result):
    numbers = [result.registers, result.spilled, result.shared]
    cells = "".join(f"{'-' if number is None else number:>8}" for number in numbers)
    verdict = result.fault or (f"allowed to fail: {result.error}" if result.error else "")
    return f"{result.target:8}{result.kernel:24}{result.scenario:36}{result.warps:>6}{cells}  {verdict}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--names", help="comma-separated parts of scenario names (default: all)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version}")
    print(f"{'target':8}{'kernel':24}{'scenario':36}{'warps':>6}{'regs':>8}{'spilled':>8}{'shared':>8}")
    results = compile_all(
        options.targets.split(","),
        options.names and options.names.split(","),
        lambda result: print(_line(result), flush=True),
        processes=None,
    )
    faults = [result for result in results if result.fault]
    print(f"{len(results)} compiled, {len(faults)} at fault")
    if options.json:
        worst = {t: max((r.registers for r in results if r.target == t and r.registers), default=None) for t in TARGETS}
        print(json.dumps({"benchmark": "aot", "compiled": len(results), "faults": len(faults), "max_registers": worst}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
