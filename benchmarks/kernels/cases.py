"""What the timings of single ops share: the machine at hand, a case, and the parity it needs to be timed.

The GPU suite builds its points with the same case_of_<op> functions, on a machine of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ..gpu.gates import BF16_ERROR, relative, require
from ..gpu.machine import CONFIGS, Machine
from ..models import SMALL

F32_ERROR = 1e-5
IN_A_GRAPH = 16  # calls at least, so that the wait at its end weighs little


class Here(Machine):
    """The machine at hand, with real sizes wherever it is, and configurations "small", "mini" and "flash".

    bfloat16 on a GPU, where buffers take turns so that no cache holds them. Float32 and one buffer on a CPU, where the
    references are the product; small cases are then timed within its caches.
    """

    def __init__(self):
        super().__init__(dry=not torch.cuda.is_available())
        self.dtype = torch.float32 if self.dry else torch.bfloat16

    def config(self, name):
        return (CONFIGS | {"small": SMALL})[name]

    def size(self, real, most):
        return real

    def copies(self, size):
        return 1 if self.dry else super().copies(size)


def agree(what, got, wanted):
    """ArithmeticError unless all tensors are alike: floats by relative norm, to F32_ERROR or where one of the two has
    16 bits to BF16_ERROR, all others exactly."""
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        name = f"{what}, output {at}"
        if one.shape != other.shape:
            raise ArithmeticError(f"{name}: {list(other.shape)} expected, got {list(one.shape)}")
        if torch.equal(one, other):
            continue
        if one.is_floating_point():
            narrow = min(one.element_size(), other.element_size()) < 4
            require(f"{name}, relative error", relative(one, other), BF16_ERROR if narrow else F32_ERROR)
        else:
            raise ArithmeticError(f"{name}: {(one != other).float().mean():.2%} of the elements differ")


@dataclass
class Case:
    """An op at one shape, as a machine runs it, beside a plain PyTorch peer; without one the GPU suite alone times it.

    ours, peer: called with the arguments of a buffer. bytes: every input and output once; operations: 2 per
    multiply-add. check: () -> None, raises where the two disagree; None = their outputs on the first buffer must
    agree. graph: whether the peer can be captured in a CUDA graph, which one that asks the device cannot. facts: what
    else a line says of it; parts: calls for single parts of ours, by the name under which a line has their µs.
    """

    ours: Callable
    peer: Callable | None
    peer_name: str
    buffers: list[tuple]
    bytes: float
    operations: float = 0.0
    check: Callable | None = None
    graph: bool = True
    facts: dict = field(default_factory=dict)
    parts: dict[str, Callable] = field(default_factory=dict)

    def gate(self, name):
        """ArithmeticError unless ours and the peer agree."""
        if self.check is not None:
            self.check()
            return
        outputs = [call(*self.buffers[0]) for call in (self.ours, self.peer)]
        agree(name, *((out,) if isinstance(out, torch.Tensor) else tuple(out) for out in outputs))

    def target(self, who):
        """(what to time, how many calls of the op it makes) of "ours" or "peer"."""
        op = {"ours": self.ours, "peer": self.peer}[who]
        calls = [partial(op, *buffer) for buffer in self.buffers]
        if not torch.cuda.is_available():
            return calls[0], 1
        calls *= math.ceil(IN_A_GRAPH / len(calls))

        def all_calls():
            for call in calls:
                call()

        all_calls()  # compiles
        torch.cuda.synchronize()
        launch = all_calls
        if who == "ours" or self.graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                all_calls()
            launch = captured.replay

        def timed():
            launch()
            torch.cuda.synchronize()

        return timed, len(calls)
