"""Every kernel by itself at the real shapes, beside the time its bytes and operations take at the measured ceilings.

refine      the refinement step of LLaDA2's vocabulary: greedy, sampling at temperature 1, and that with top-k and top-p
attention   a block of every row over its cached prefix, LLaDA2-mini's heads
moe         one MoE layer of mini for m tokens; bytes are those of the experts that were touched
norm, rope  residual addition with RMSNorm, also of what experts made; QK-norm, rotation and page writes

The cases are those of benchmarks/kernels/. us is a call's share of a CUDA graph that holds many, over buffers that no
cache still holds; us_in_cache the same over one buffer, where that fits; reference_us our PyTorch reference, eager.
Bytes count every input and output once.
"""

from functools import partial

import torch

from llada2_fast.kernels._triton import force_ops

from ..kernels.bench_decoding import case_of_steady
from ..kernels.bench_model import case_of_attention, case_of_moe_layer, case_of_norm, case_of_rope
from .gates import GATES, MODES
from .machine import Point

BATCHES, PREFIXES, TOKENS = (1, 8, 32, 128), (1024, 8192, 32768), (32, 64, 256, 1024, 4096)


@torch.no_grad()
def time_case(machine, build, reference):
    """The line of a case: build(machine) makes it; reference: whether the reference is timed as well."""
    case = build(machine)
    calls = [partial(case.ours, *buffer) for buffer in case.buffers]
    line = machine.account(machine.kernel_us(calls), case.bytes, case.operations) | case.facts
    if len(calls) > 1:
        line["us_in_cache"] = machine.kernel_us(calls[:1])
    line |= {name: machine.kernel_us([call]) for name, call in case.parts.items()}
    if reference:
        with force_ops("torch"):
            line["reference_us"] = machine.call_us(calls[0], rounds=3)
    return line


def points():
    """All points of the section, the most telling shapes first; a gate for each kernel ahead of its times."""
    found = [Point(f"gate {name}", "kernels", 3, gate) for name, gate in GATES.items()]

    def add(kernel, name, build, first, reference=False):
        measure = partial(time_case, build=build, reference=reference)
        found.append(Point(name, "kernels", 1, measure, not first, f"gate {kernel}"))

    for batch in BATCHES:
        for mode in MODES:
            first = batch in (1, 8) and mode != "sampling"
            add("refine", f"refine {mode} b{batch}", partial(case_of_steady, batch=batch, mode=mode), first, first)
    for batch in BATCHES[:3]:
        for prefix in PREFIXES:
            first = (batch, prefix) in ((1, 1024), (1, 32768), (8, 32768))
            build = partial(case_of_attention, config="mini", rows=batch, prefix=prefix, shuffled=True)
            add("attention", f"attention b{batch} p{prefix}", build, first, first)
    for tokens in TOKENS:
        for kernel, kind in (("moe", None), ("moe fp8", "fp8"), ("moe int4", "int4")):
            first = tokens in (32, 1024)
            build = partial(case_of_moe_layer, tokens=tokens, quantization=kind)
            add(kernel, f"{kernel} m{tokens}", build, first, first and not kind)
    for kernel, case_of in (("norm", case_of_norm), ("rope", case_of_rope)):
        for tokens in (32, 4096):
            add(kernel, f"{kernel} t{tokens}", partial(case_of, config="mini", tokens=tokens), tokens == 32)
    for tokens in (64, 1024):
        build = partial(case_of_norm, config="mini", tokens=tokens, experts=True)
        add("norm", f"norm experts t{tokens}", build, tokens == 64)
    return found
