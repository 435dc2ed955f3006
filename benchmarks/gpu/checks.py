"""The checks of first_light, from small to large: the gates of all kernels, a step, a text, an engine."""

import os
import platform
from dataclasses import replace
from functools import partial

import torch
import torch._inductor.config  # noqa: F401  torch.use_deterministic_algorithms imports it, in every check anew
import triton

from llada2_fast import Engine, EngineConfig
from llada2_fast.config import DecodeParams

from .. import aot
from . import decode as gpu_decode
from . import gates, steps
from .machine import Machine


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


def step(machine, fp8, captured):
    """A step launched piece by piece; or captured, and its replay held against that bit by bit."""
    made = steps.Step(machine, machine.shallow(fp8), machine.size(2, 2), machine.size(1024, 64))
    if captured:
        return made.check()
    output, _ = made.graph.run()
    if not bool(output.confidence.isfinite().all()):
        raise ArithmeticError("the step's confidences are not finite")


def decode(machine, fp8):
    """Two texts of the same prompts have the same tokens."""
    model = machine.shallow(fp8)
    inputs = gpu_decode.prompts(machine, model, 2)
    texts = [gpu_decode.text(model, inputs, machine.size(64, 32), 4) for _ in range(2)]
    if not torch.equal(*[text.sequences for text in texts]):
        raise ArithmeticError("the same prompts gave other tokens")
    return {"forwards": texts[0].counters[0].denoise_forwards}


def engine(machine):
    """Rows that come and go through fewer slots, one of them drawing with top-k."""
    model = machine.shallow()
    mask_id, length = model.config.mask_token_id, machine.size(48, 16)
    params = DecodeParams(gen_length=length, steps=4, threshold=2.0, mask_id=mask_id, eos_ids=(-1,))
    kinds = [params, params, replace(params, temperature=0.8, top_k=7, seed=3), params]
    slots = EngineConfig(
        block_length=32, mask_id=mask_id, max_num_seqs=2, cache_tokens=4096, graphs=not machine.dry, trace=False
    )  # fmt: skip
    served = Engine(model, slots)
    prompt = gpu_decode.prompts(machine, model, 1)[0].cpu()
    outputs = served.generate([prompt[: 64 - 3 * i] for i in range(len(kinds))], kinds)
    served.check_integrity()
    if any(output.error or len(output.token_ids) != length for output in outputs):
        raise ArithmeticError(f"expected {length} tokens each, got {[(o.error, len(o.token_ids)) for o in outputs]}")


def checks():
    """{name: function(machine) -> values for its line, or None}, from small to large."""
    found = {"versions": versions} | {f"gate {name}": gate for name, gate in gates.GATES.items()}
    for kind, fp8 in (("bf16", False), ("fp8", True)):
        found[f"step {kind} launched"] = partial(step, fp8=fp8, captured=False)
        found[f"step {kind} captured"] = partial(step, fp8=fp8, captured=True)
        found[f"decode {kind}"] = partial(decode, fp8=fp8)
    return found | {"engine bf16": engine}


def check(name, dry):
    """Run one check here; the values of its line."""
    torch.manual_seed(0)
    machine = Machine(dry)
    values = checks()[name](machine)
    machine.synchronize()
    return values or {}
