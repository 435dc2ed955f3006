"""Compiles every kernel in every specialisation that is in use, for every GPU we name, without a GPU.

    python -m benchmarks.aot [--targets sm_80,sm_90,sm_100,gfx942] [--names refine,norm]

A *scenario* calls an op's launcher on tensors of its real shapes and no data; what it would launch is compiled instead.
The table has registers per thread, bytes spilled to memory and shared memory per program. Exit 1 if anything does not
compile, wants more shared memory than the GPU has, spills on sm_80 or sm_90, or multiplies and adds 16-bit numbers in
one instruction (sm_90 and later), where the reference rounds in between. gfx942 may fail, and says why.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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

from llada2_fast.kernels import advance, attention, candidates, refine, rope, top_logprobs
from llada2_fast.kernels._ambient import settle_key
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import summed
from llada2_fast.kernels.fp8 import quantized
from llada2_fast.kernels.gemm import Wanted
from llada2_fast.kernels.router import TokenBlocks
from llada2_fast.layers import MLP, Linear, MoE, RMSNorm

from .roofline import CAPACITY, MODELS

VOCAB, IDS = 157184, refine.SpecialIds(156895)  # LLaDA2.0 and 2.1
EDIT_IDS = refine.SpecialIds(156895, 156930, 156931)  # LLaDA2.2

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_MEMORY = 512  # columns of it that a program of sm_100 may have
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
NO_SPILLS = ("sm_80", "sm_90")  # spilling fails there
MAY_FAIL = ("gfx942",)  # never run; kept compiling as far as Triton goes
FMA_FOR_MUL = ("sm_80",)  # its only product of bfloat16 is an fma, which adds -0
KINDS = {"bf16": None, "fp8": "fp8"}  # and what quantises them
EARLY_TARGETS = ("sm_90", "sm_100")  # where a launch may start before the one ahead is over
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


BF16, FP32 = torch.bfloat16, torch.float32
TYPES = {"bf16": BF16, "fp16": torch.float16, "fp32": FP32}


def _meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


_int32, _int64 = partial(_meta, dtype=torch.int32), partial(_meta, dtype=torch.int64)


def _state(rows, length):
    return refine.BlockState(
        _int64(rows, length), _meta(rows, length, dtype=torch.int8), _int64(rows), *[_int32(rows)] * 4,
        _int32(rows, length), _meta(rows, length), _int32(rows),
    )  # fmt: skip


def _advance(entries, carried, length=32):
    bounds, plan = advance.RowBounds(*[_int32(256)] * 2, _int64(256, 2, length)), _int32(entries)
    advance.launch(_state(256, length), bounds, _int32(256, 33), _int32(256), plan, plan, carried, IDS)


def _refine(
    dtype, length=32, vocab=VOCAB, rows=8, packed=False, only_needed=False, filters=False, transposed=False,
    guided=False, edits=False,
):  # fmt: skip
    whole, real, long = _int32(rows), _meta(rows), _int64(rows)
    params = refine.RefineParams(real, whole, real, long, *[real] * 2, *[whole] * 4, *[real] * 2, whole, long[:, None])
    logits = _meta(rows, vocab, length, dtype=dtype).mT if transposed else _meta(rows, length, vocab, dtype=dtype)
    index = _int64(rows, length) if packed else None
    logits = logits.flatten(0, 1) if packed else logits
    classes, bits = _meta(rows, vocab, dtype=torch.int16), _int32(rows, length, refine.WORDS)
    allowed = refine.Allowed(classes, bits) if guided else None
    moves = refine.Moves.fresh(rows, length, "meta") if edits else None
    ids = EDIT_IDS if edits else IDS
    refine.launch(logits, _state(rows, length), params, ids, index, filters, only_needed, allowed=allowed, moves=moves)


def _candidates(dtype, runner_up, filters):
    real, whole, long = _meta(8), _int32(8), _int64(8)
    params = candidates.SampleParams(real, whole, real, long)
    candidates.launch(_meta(8, 32, VOCAB, dtype=dtype), long, whole, params, IDS, whole, None, filters, runner_up)


def _top_logprobs(dtype, k, vocab=VOCAB):
    top_logprobs.launch(_meta(64, vocab, dtype=dtype), _int64(2, 32), _int32(2), IDS.mask, k)


def _attention(dtype, heads, kv_heads=4, dim=128, length=32, pages=64, rows=40, order=False):
    cache, q = _meta(3, pages, length, kv_heads, dim, dtype=dtype)[1], _meta(rows * length, heads, dim, dtype=dtype)
    blocks = attention.BlockBatch(_int32(rows), _int32(rows), _int32(rows, pages), _int32(rows))
    if order:
        blocks = blocks._replace(order=_int32(rows))
    attention.block_attention(q, cache, cache, blocks)


def _qk_norm_rope(dtype, heads, kv_heads=4, dim=128, rot=64, length=32, write=True, norms=True):
    cache = _meta(3, 64, length, kv_heads, dim, dtype=dtype)[1]
    weight = _meta(dim, dtype=dtype) if norms else None
    cos, qkv = _meta(64, rot, dtype=dtype), _meta(64, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = rope.Angles(cos, cos, _int64(64) if write else None)
    args = (qkv, weight, weight, angles, 1e-6, heads, kv_heads)
    if write:
        rope.qk_norm_rope_write(*args, cache, cache, _int64(64))
    else:
        rope.qk_norm_rope(*args)


def _norm(dtype, size, add, fp8=False, wide=True):
    layer, x = RMSNorm(size, 1e-6, fp8, wide, dtype=dtype, device="meta"), _meta(64, size, dtype=dtype)
    layer.add(x, x) if add else layer(x)


def _moe(model, tokens, dtype=BF16, gate=None, **changes):
    """gate: dtype of the router's weight, if another one; changes: of the model's config."""
    config = replace(MODELS[model], **changes)
    layer = MoE(config, dtype=dtype, device="meta")
    layer.router.to(gate)
    block = config.expert_capacity and TokenBlocks(None, _int64(tokens // 32), _meta(tokens, dtype=torch.bool))
    x = _meta(tokens, config.hidden_size, dtype=dtype)
    delta, _ = layer(quantized(x) if config.fp8 else x, block, _int64(tokens))
    RMSNorm(config.hidden_size, 1e-6, config.fp8, dtype=dtype, device="meta").add(x, delta)
    summed(delta)


def _dense(tokens, rows, columns, quantization=None, dtype=BF16, wanted=False):
    linear = Linear(columns, rows, quantization=quantization, dtype=dtype, device="meta")
    linear(_meta(tokens, columns, dtype=dtype), Wanted(_int32(tokens), _int32(1)) if wanted else None)


def _mlp(model, tokens, quantization=None):
    config = replace(MODELS[model], quantization=quantization)
    layer = MLP(config, config.intermediate_size, quantization, dtype=BF16, device="meta")
    layer(_meta(tokens, config.hidden_size, dtype=BF16))


ROWS = 1, 8, 40  # of attention: each batch has another way to share out its work

SCENARIOS = {
    **{f"refine {name} filters": partial(_refine, dtype, filters=True) for name, dtype in TYPES.items()},
    **{f"refine {name}": partial(_refine, dtype) for name, dtype in TYPES.items()},
    "refine bf16 packed": partial(_refine, BF16, packed=True),
    "refine bf16 packed filters": partial(_refine, BF16, packed=True, filters=True),
    "refine fp32 packed filters": partial(_refine, FP32, packed=True, filters=True),
    "refine bf16 needed": partial(_refine, BF16, only_needed=True),
    "refine bf16 needed filters": partial(_refine, BF16, only_needed=True, filters=True),
    **{
        f"refine {name} guided{' filters' * filters}": partial(
            _refine, TYPES[name], packed=True, only_needed=True, filters=filters, guided=True
        )
        for name in ("bf16", "fp32")
        for filters in (False, True)
    },
    **{
        f"refine 2.2 {name}{' guided' * guided}{' filters' * filters}": partial(
            _refine, TYPES[name], packed=True, only_needed=True, filters=filters, guided=guided, edits=True
        )
        for name in ("bf16", "fp32")
        for guided, filters in ((False, False), (False, True), (True, True))
    },
    **{f"refine 2.2 bf16 L={length}": partial(_refine, BF16, length, edits=True) for length in (8, 16, 64)},
    **{f"refine bf16 L={length}": partial(_refine, BF16, length) for length in (1, 4, 8, 16, 48, 64, 128)},
    "refine bf16 V=2^18": partial(_refine, BF16, vocab=2**18, filters=True),
    "refine fp32 V=4096": partial(_refine, FP32, length=16, vocab=4096, filters=True),
    "refine fp32 V=5003": partial(_refine, FP32, vocab=5003, filters=True),
    "refine bf16 transposed": partial(_refine, BF16, transposed=True, filters=True),
    "candidates bf16": partial(_candidates, BF16, runner_up=False, filters=False),
    "candidates bf16 runner-up filters": partial(_candidates, BF16, runner_up=True, filters=True),
    **{f"top log-probabilities {name}": partial(_top_logprobs, dtype, 20) for name, dtype in TYPES.items()},
    "top log-probabilities bf16 V=2^18": partial(_top_logprobs, BF16, 20, 2**18),
    **{f"advance A={a} C={c}": partial(_advance, a, c) for a, c in ((1, 0), (1, 1), (32, 8), (256, 64))},
    "advance L=128": partial(_advance, 64, 16, length=128),
    **{f"attention mini {name} B={n}": partial(_attention, TYPES[name], 16, rows=n) for name in TYPES for n in ROWS},
    **{f"attention mini bf16 order B={n}": partial(_attention, BF16, 16, rows=n, order=True) for n in ROWS},
    **{f"attention flash bf16 B={n}": partial(_attention, BF16, 32, rows=n) for n in ROWS},
    **{f"attention mini bf16 L={n}": partial(_attention, BF16, 16, length=n) for n in (1, 16, 48)},
    "attention bf16 D=64": partial(_attention, BF16, 8, dim=64),
    "attention fp32 D=80": partial(_attention, FP32, 8, dim=80),
    "attention fp32 D=16": partial(_attention, FP32, 4, 2, 16, 8),
    "qk_norm_rope mini bf16": partial(_qk_norm_rope, BF16, 16),
    "qk_norm_rope mini fp32": partial(_qk_norm_rope, FP32, 16),
    "qk_norm_rope flash bf16": partial(_qk_norm_rope, BF16, 32),
    "qk_norm_rope mini bf16 no pages": partial(_qk_norm_rope, BF16, 16, write=False),
    "qk_norm_rope mini bf16 no norms": partial(_qk_norm_rope, BF16, 16, norms=False),
    **{f"rms_norm bf16 H={size}": partial(_norm, BF16, size, add=False) for size in (2048, 4096)},
    **{f"add_rms_norm bf16 H={size}": partial(_norm, BF16, size, add=True) for size in (2048, 4096)},
    **{f"rms_norm fp8 H={size}": partial(_norm, BF16, size, add=False, fp8=True, wide=False) for size in (2048, 4096)},
    **{f"add_rms_norm fp8 H={size}": partial(_norm, BF16, size, add=True, fp8=True) for size in (2048, 4096)},
    **{f"add_rms_norm fp32 H={size}": partial(_norm, FP32, size, add=True) for size in (2048, 64)},
    **{f"moe {model} bf16 T={t}": partial(_moe, model, t) for model in MODELS for t in (32, 64, 128, 512, 4096)},
    **{f"moe flash 2.2 T={t}": partial(_moe, "flash", t, expert_capacity=CAPACITY) for t in (32, 256)},
    "moe mini bf16 fp32 gate": partial(_moe, "mini", 32, gate=FP32),
    "moe mini fp32 nothing shared": partial(_moe, "mini", 32, FP32, num_shared_experts=0),
    **{f"moe mini fp8 T={t}": partial(_moe, "mini", t, quantization="fp8") for t in (32, 512, 4096)},
    **{f"moe flash fp8 T={t}": partial(_moe, "flash", t, quantization="fp8") for t in (32, 512, 4096)},
    **{f"moe mini int4 T={t}": partial(_moe, "mini", t, quantization="int4") for t in (32, 512, 4096)},
    **{f"moe flash int4 T={t}": partial(_moe, "flash", t, quantization="int4") for t in (32, 512, 4096)},
    "moe mini int4 fp16": partial(_moe, "mini", 32, torch.float16, quantization="int4"),
    "moe mini int4 two shared": partial(_moe, "mini", 512, quantization="int4", num_shared_experts=2),
    **{
        f"dense qkv mini {kind} T={t}": partial(_dense, t, 3072, 2048, name)
        for kind, name in KINDS.items()
        for t in (32, 64, 320, 4096)
    },
    **{
        f"dense LM head mini {kind} T={t}": partial(_dense, t, VOCAB, 2048, name, wanted=True)
        for kind, name in KINDS.items()
        for t in (32, 1024)
    },
    **{f"dense qkv flash {kind} T=4096": partial(_dense, 4096, 5120, 4096, name) for kind, name in KINDS.items()},
    **{f"dense LM head flash {kind}": partial(_dense, 256, VOCAB, 4096, name) for kind, name in KINDS.items()},
    "dense qkv mini fp32": partial(_dense, 64, 3072, 2048, dtype=FP32),
    **{
        f"dense MLP {model} {kind} T={t}": partial(_mlp, model, t, name)
        for kind, name in KINDS.items()
        for model, t in (("mini", 32), ("mini", 4096), ("flash", 4096))
    },
}


# Compiling


@contextmanager
def recorded():
    """Within it ops take the way of a GPU, and a launch is not run but noted; yields the list of Launches."""
    found = []

    def note(kernel, *args, grid, warmup, **kwargs):
        found.append(_launch_of(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", note), force_ops("triton"):
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


def not_early(launch):
    """The launch as a GPU has it whose kernels do not start before the one ahead is over."""
    if "EARLY" not in launch.kernel.arg_names:
        return launch
    constants = launch.constants | {(launch.kernel.arg_names.index("EARLY"),): False}
    return launch._replace(constants=constants, options=launch.options | {"launch_pdl": False})


def compiled(launch, target):
    """Triton's CompiledKernel for TARGETS[target], from its cache on disk or put there, under the name that a launch
    looks for. Raises one of FAILURES."""
    settle_key(launch.kernel)
    if target not in EARLY_TARGETS:
        launch = not_early(launch)
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
    fault = _skipped_rounding(found) if target not in FMA_FOR_MUL else None
    if target in EARLY_TARGETS and "EARLY" in launch.kernel.arg_names:
        fault = fault or _too_early(found)
    if getattr(found.metadata, "tmem_size", 0) > TENSOR_MEMORY:
        fault = f"wants {found.metadata.tmem_size} columns of tensor memory, {TENSOR_MEMORY} are allowed"
    return Result(*head, *usage(found), found.metadata.shared, fault)


def _skipped_rounding(compiled):
    """Where two 16-bit numbers are multiplied and added in one, the reference rounds in between. A kernel that came
    without its PTX passes."""
    fused = re.search(r"\bfma\.rn(\.(ftz|sat|relu|oob))*\.(bf16|f16)(x2)?\b", compiled.asm.get("ptx", ""))
    return f"{fused[0]}: a rounding of the reference is skipped" if fused else None


def _too_early(compiled):
    """What a kernel does with memory ahead of its wait for the launch ahead. One that came without its PTX passes."""
    ahead, wait, _ = compiled.asm.get("ptx", "griddepcontrol.wait").partition("griddepcontrol.wait")
    if not wait:
        return "it does not wait for the launch ahead"
    access = re.search(r"\b((ld|st|atom|red)\.(global|relaxed|acq_rel)|cp\.async\S*global)\S*", ahead)
    return f"{access[0]} ahead of the wait for the launch ahead" if access else None


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
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"targets: expected some of {', '.join(TARGETS)}, got {unknown[0]!r}")
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
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version}")
    print(f"{'target':8}{'kernel':24}{'scenario':36}{'warps':>6}{'regs':>8}{'spilled':>8}{'shared':>8}")
    names = options.names and options.names.split(",")
    results = compile_all(options.targets.split(","), names, lambda result: print(_line(result), flush=True), None)
    faults = [result for result in results if result.fault]
    print(f"{len(results)} compiled, {len(faults)} at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
