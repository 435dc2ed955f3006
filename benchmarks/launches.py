"""What a denoise step of LLaDA2-mini launches, at its real shapes, on tensors without data.

Each kernel has its launches, and of all of them the bytes of what they are given, each tensor once, and operations
(2 per multiply-add). Of experts' weights those count that independent routing touches; keys and values are those of the
rows. Prices are benchmarks.estimate's.
"""

import re
from collections import Counter
from dataclasses import replace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from llada2_fast import LLaDA2Model
from llada2_fast.config.model import QUANTIZATIONS
from llada2_fast.kernels._triton import force_ops

from .aot import recorded
from .estimate import BATCHES, PREFIX, Work
from .gpu.machine import CONFIGS, Shapes
from .gpu.steps import Step
from .roofline import BLOCK, touched_experts

UNREAD = ("LIKE",)  # arguments of which a kernel takes the type alone
KINDS = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}  # of weights; those of int4 are in words
_ALLOCATES = re.compile(r"^aten::(new_)?empty")


class Calls(TorchDispatchMode):
    """Counts calls of PyTorch's operators, and of these what a GPU would have to launch: no views, no allocations."""

    def __init__(self):
        super().__init__()
        self.names, self.launched = Counter(), Counter()

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        result = op(*arguments, **(keywords or {}))
        name = op._schema.name
        self.names[name] += 1
        made = _storages(result) - _storages((arguments, keywords))
        if op._schema.is_mutable or (made and not _ALLOCATES.match(name)):
            self.launched[name] += 1
            self.launch(name, arguments, result)
        return result

    def launch(self, name, arguments, result):
        """Called for what would be launched."""


def _storages(values):
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class _Noted(Calls):
    """Works of PyTorch's operators, a launch each, go to `found`."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def launch(self, name, arguments, result):
        size, operations = sum(x.nbytes for x in (*arguments, result) if isinstance(x, torch.Tensor)), 0
        if name == "aten::linear":
            x, weight = arguments[:2]
            name, operations = "cuBLAS {}x{}".format(*weight.shape), 2 * x.numel() * len(weight)
        elif name == "aten::embedding":  # of the table its rows alone
            size = 2 * result.nbytes
        self.found.append(Work(name, 1, round(size), operations))


def _work(kernel, given, touched):
    """The Work of a launch. given: its arguments by name; touched: the share of the experts that is read."""
    name, operations = kernel.__name__, 0
    tensors = {key: x for key, x in given.items() if isinstance(x, torch.Tensor) and key not in UNREAD}
    experts = given.get("TILES") is not None
    size = sum(x.nbytes * (touched if experts and key in ("W", "W_SCALE") else 1) for key, x in tensors.items())
    if name == "_gemm_kernel":
        weight, gated = given["W"], given["GATED"]
        part = ("gate_up" if gated else "down") if experts else "plain"
        name = f"{name} {part} {KINDS.get(weight.dtype, 'int4')}"
        if not experts:
            name += " {}x{}".format(*weight.shape)
        operations = 2 * (1 + gated) * given["OUT"].numel() * given["K"]
    elif name == "_combine_kernel":
        name += " experts" if "OUTER" in given else " attention"
    elif given.get("PAIR_WEIGHTS") is not None:  # a norm that sums up what experts made
        name += " experts"
    elif name == "_scores_kernel":
        operations = 2 * given["X"].numel() * len(given["W"])
    elif name == "_attention_kernel":
        operations = 4 * given["Q"].numel() * given["PAGE_TABLE"].shape[1] * given["L"]
    elif name == "_qk_norm_rope_kernel":  # of angles and pages the rows of the tokens alone
        size = 2 * given["QKV"].nbytes
    return Work(name, 1, round(size), operations)


def works(quantization, batch):
    """[Work] of a step as decoding replays it, over PREFIX tokens, with places for ended blocks."""
    machine, config = Shapes(), replace(CONFIGS["mini"], quantization=quantization)
    model = LLaDA2Model(config, dtype=machine.dtype, device=machine.device)
    step = Step(machine, model, batch, PREFIX, variant="carried")
    touched, found = touched_experts(config, batch * BLOCK) / config.num_experts, []

    def note(kernel, *args, grid, warmup, **more):
        found.append(_work(kernel, dict(zip(kernel.arg_names, args, strict=False)) | more, touched))

    with torch.inference_mode():
        with recorded():
            step.graph.run()  # what is made once is there then, as when a graph is captured
        with mock.patch.object(JITFunction, "run", note), force_ops("triton"), _Noted(found):
            step.graph.run()
    sums = {}
    for kernel, *figures in found:
        sums[kernel] = [a + b for a, b in zip(sums.get(kernel, (0, 0, 0)), figures, strict=True)]
    return [Work(kernel, *figures) for kernel, figures in sums.items()]


def steps_of_mini(batches=BATCHES):
    """A result line's points: dict(dtype, batch, and the fields of a Work) of each kernel of each step."""
    return [
        {"dtype": quantization or "bf16", "batch": batch} | work._asdict()
        for quantization in (None, *QUANTIZATIONS)
        for batch in batches
        for work in works(quantization, batch)
    ]
