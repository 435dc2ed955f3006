"""Every kernel alone at the shapes of LLaDA2-mini: first all gates, then times.

refine      one step of B blocks, vocabulary 157184, bf16 logits; greedy, sampling (temperature 1), filters (top-k 50,
            top-p 0.95). One id per position is planted 8 to 16 above normal logits of deviation 2, so rows are peaked
attention   32 queries of B rows over P cached tokens in pages of random order
moe         router, expert MLPs and shared expert of one layer for M tokens; bytes: the experts that were touched
norm, rope  residual addition with RMSNorm; QK-norm, rotation and page writes

us is a call's share of a CUDA graph that holds many, over buffers that no cache still holds; us_in_cache the same over
one buffer, where that fits; reference_us our PyTorch reference, eager. Bytes count every input and output once.
"""

from functools import partial

import torch

from llada2_fast.kernels import attention, norm, refine, rope
from llada2_fast.kernels._triton import force_ops

from .gpu_gates import GATES, attention_case, moe_layer, norm_case, refine_case, rope_case
from .gpu_machine import Point
from .roofline import BLOCK

BATCHES, PREFIXES, TOKENS = (1, 8, 32, 128), (1024, 8192, 32768), (32, 64, 256, 1024, 4096)
MODES = ("greedy", "sampling", "filters")


def time_refine(machine, batch, mode, reference):
    batch = machine.size(batch, 2)
    logits, state, params, ids = refine_case(machine, [mode] * batch)
    buffers = [logits] + [logits.clone() for _ in range(machine.copies(logits.nbytes) - 1)]
    calls = [partial(refine.refine_step, x, state, params, ids, filters=mode == "filters") for x in buffers]
    result = machine.account(machine.kernel_us(calls), logits.nbytes)
    if len(buffers) > 1:
        result["us_in_cache"] = machine.kernel_us(calls[:1])
    if reference:
        with force_ops("torch"):
            result["reference_us"] = machine.call_us(calls[0], rounds=3)
    return result


def time_attention(machine, batch, prefix, reference):
    batch, prefix = machine.size(batch, 2), machine.size(prefix, 64)
    q, k, v, blocks = attention_case(machine, [prefix] * batch)
    size = k.nbytes + v.nbytes + 2 * q.nbytes
    caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(machine.copies(size) - 1)]
    calls = [partial(attention.block_attention, q, *cache, blocks) for cache in caches]
    config = machine.config("mini")
    operations = 4.0 * config.num_attention_heads * config.head_dim * batch * BLOCK * (prefix + BLOCK)
    result = machine.account(machine.kernel_us(calls), size, operations)
    if reference:
        with force_ops("torch"):
            result["reference_us"] = machine.call_us(calls[0], rounds=3)
    return result


@torch.no_grad()
def time_moe(machine, tokens, fp8, reference):
    tokens = machine.size(tokens, 16)
    layer, config = moe_layer(machine, fp8), machine.config("mini", fp8)
    h = machine.random(tokens, config.hidden_size)
    touched = layer(h)[1].unique().numel()
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    width = 1 if fp8 else 2
    size = (touched + config.num_shared_experts) * expert * width + layer.router.weight.nbytes + 2 * h.nbytes
    operations = 2.0 * expert * tokens * (config.num_experts_per_tok + config.num_shared_experts)
    result = machine.account(machine.kernel_us([partial(layer, h)]), size, operations)
    result |= {"experts_touched": touched, "router_us": machine.kernel_us([partial(layer.router, h, None)])}
    if reference:
        with force_ops("torch"):
            result["reference_us"] = machine.call_us(partial(layer, h), rounds=3)
    return result


def time_small(machine, case, op, tokens, passes):
    """norm and rope: `passes` times the bytes of the first argument are read and written."""
    tokens = machine.size(tokens, 64)
    cases = [case(machine, tokens)]
    size = passes * cases[0][0].nbytes
    cases += [case(machine, tokens) for _ in range(machine.copies(size) - 1)]
    return machine.account(machine.kernel_us([partial(op, *args) for args in cases]), size)


def points():
    """All points of the section, the most telling shapes first; a gate for each kernel ahead of its times."""
    found = [Point(f"gate {name}", "kernels", 3, gate) for name, gate in GATES.items()]

    def add(kernel, name, measure, first):
        found.append(Point(name, "kernels", 1, measure, not first, f"gate {kernel}"))

    for batch in BATCHES:
        for mode in MODES:
            first = batch in (1, 8) and mode != "sampling"
            measure = partial(time_refine, batch=batch, mode=mode, reference=first)
            add("refine", f"refine {mode} b{batch}", measure, first)
    for batch in BATCHES[:3]:
        for prefix in PREFIXES:
            first = (batch, prefix) in ((1, 1024), (1, 32768), (8, 32768))
            measure = partial(time_attention, batch=batch, prefix=prefix, reference=first)
            add("attention", f"attention b{batch} p{prefix}", measure, first)
    for tokens in TOKENS:
        for kernel, fp8 in (("moe", False), ("moe fp8", True)):
            first = tokens in (32, 1024)
            measure = partial(time_moe, tokens=tokens, fp8=fp8, reference=first and not fp8)
            add(kernel, f"{kernel} m{tokens}", measure, first)
    small = {
        "norm": partial(time_small, case=norm_case, op=norm.add_rms_norm, passes=4),  # x, delta in, sum and norm out
        "rope": partial(time_small, case=rope_case, op=rope.qk_norm_rope_write, passes=2),
    }
    for kernel, measure in small.items():
        for tokens in (32, 4096):
            add(kernel, f"{kernel} t{tokens}", partial(measure, tokens=tokens), tokens == 32)
    return found
