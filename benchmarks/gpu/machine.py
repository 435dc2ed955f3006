"""The machine under test: its clock, counters, ceilings and random networks. Here alone a GPU and a dry run differ.

A dry run takes the same paths on a CPU with tiny shapes, one repetition and perf_counter for events; what it measures
means nothing.
"""

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from llada2_fast.kernels.gemm import SCALE_GROUP, WORDS
from llada2_fast.model import LLaDA2Model

from ..models import SMALL
from ..roofline import MODELS

CONFIGS = {name: replace(config, mask_token_id=156895) for name, config in MODELS.items()}  # that of LLaDA2.0 and 2.1
TINY = replace(
    SMALL, vocab_size=512, hidden_size=64, num_hidden_layers=2, intermediate_size=128, moe_intermediate_size=32,
    head_dim=32, mask_token_id=511, pad_token_id=510, eos_token_id=(510,),
)  # fmt: skip
LAYERS = 2  # a dense one and one of experts: all others are like that. There rounding costs a token in ten
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperative", "cudaMemcpyAsync", "cudaMemsetAsync")
_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
SHARP = 4.0  # of the QK-norms' weights: attention scores of standard deviation 16, so a query has few keys
MASK_SCALE = 0.02  # of the mask's embedding
FP8_STD = 64.0  # of fp8 values, which reach 448
INT4_STD = 4.6  # of whole numbers from -8 to 7, all as likely
QUANTIZATIONS = {"bf16": None, "fp8": "fp8", "int4": "int4"}  # by what a point's name says
_CHUNK = 2**26


class Point(NamedTuple):
    """One measurement: measure(machine) returns what goes into its line."""

    name: str
    section: str  # one of gpu.SECTIONS
    seconds: float  # what it is expected to take, compilation included
    measure: Callable
    later: bool = False  # second round: after all other sections' first
    gate: str | None = "ceilings"  # the point that must have passed
    memory: float = 0.0  # bytes that the device must have


class DoesNotFit(Exception):
    """A point needs more memory than the device has free; raised ahead of the allocation."""


class Machine:
    """device, name, bytes of memory, dtype of weights and activations; bandwidth in TB/s and bf16 tflops, measured."""

    def __init__(self, dry):
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.name = "" if dry else torch.cuda.get_device_name(self.device)
        self.memory = math.inf if dry else torch.cuda.get_device_properties(self.device).total_memory
        self.dtype = torch.bfloat16
        self.bandwidth = self.tflops = None
        self._network = None

    def size(self, real, most):
        """A size: the real one, in a dry run `most` at most."""
        return min(real, most) if self.dry else real

    def config(self, name, quantization=None):
        """ModelConfig of "mini" or "flash"; tiny in a dry run."""
        return replace(TINY if self.dry else CONFIGS[name], quantization=quantization)

    def random(self, *shape, std=1.0):
        """Normal random numbers in the machine's dtype, made on the device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=std)

    def copies(self, size):
        """How many buffers of `size` bytes to take in turn, so that none is found in the L2 cache again."""
        if self.dry:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(64, max(1, math.ceil(4 * cache / size)))

    def rotated(self, make, size):
        """What make() gives, as often as there must be buffers of `size` bytes."""
        return [make() for _ in range(self.copies(size))]

    def kernel_us(self, calls, rounds=10, least=16):
        """Median µs of a call, made in turn by replays of one CUDA graph that holds them all, repeated until it holds
        `least`: no launch overhead."""
        if self.dry:
            return self.call_us(calls[0])
        for call in calls:
            call()
        calls = calls * math.ceil(least / len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self.call_us(graph.replay, rounds) / len(calls)

    def call_us(self, call, rounds=10, before=lambda: None):
        """Median µs of a call as the device sees it; before() goes ahead of each and is not timed."""
        if self.dry:
            before()
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e6
        for _ in range(2):
            before()
            call()
        spans = []
        for _ in range(rounds):
            before()
            spans.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            spans[-1][0].record()
            call()
            spans[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in spans)

    def seconds(self, call):
        """Wall time of a call and what it returned, with the device idle before and behind."""
        self.synchronize()
        started = time.perf_counter()
        result = call()
        self.synchronize()
        return time.perf_counter() - started, result

    def synchronize(self):
        if not self.dry:
            torch.cuda.synchronize()

    def counted(self, call):
        """What the host asks of the device during a call, by torch.profiler, less what the profiler asks for itself:
        {"syncs", "launches"}, of kernels, copies and fills one by one. Zeros in a dry run."""
        counts = {"syncs": 0, "launches": 0}
        for sign, one in ((-1, lambda: None), (1, call)):
            for event in self._profile(one).events():
                counts["syncs"] += sign * (event.name in _SYNCS)
                counts["launches"] += sign * event.name.startswith(_LAUNCHES)
        return counts

    def device_events(self, call):
        """[(name, grid, µs)] of what the device does for a call, in a graph's replay too: kernels, copies and fills;
        grid is "" for what has none. In a dry run operators on the CPU."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile(call).export_chrome_trace(str(path))  # its file has the grids, its events have not
            events = json.loads(path.read_text("utf-8"))["traceEvents"]
        kinds = ("cpu_op",) if self.dry else ("kernel", "gpu_memcpy", "gpu_memset")
        return [
            (event["name"], "x".join(map(str, event["args"].get("grid", ()))), event["dur"])
            for event in events
            if event.get("cat") in kinds
        ]

    def _profile(self, call):
        """torch.profiler's profile of a call."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU] if self.dry else [activity.CPU, activity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.synchronize()
        return profile

    def account(self, us, size, operations=0.0):
        """A line's common part: µs, bytes that must move, what that makes of the ceilings, and the floor's distance."""
        floor = max(size / self.bandwidth, operations / self.tflops) / 1e6
        return {
            "us": us, "bytes": size, "gb_s": size / us / 1e3, "percent_of_copy": size / us / 1e4 / self.bandwidth,
            "floor_us": floor, "over_floor": us / floor,
        }  # fmt: skip

    def network(self, name, quantization=None):
        """The random-weight "mini" or "flash"; kept until another one is asked for, which takes its place."""
        config = self.config(name, quantization)
        if self._network is None or self._network.config != config:
            self._network = None
            shapes = LLaDA2Model(config, dtype=self.dtype, device="meta")
            self.require_memory(sum(p.nbytes for p in shapes.parameters()), "weights")
            self._network = random_model(config, self.dtype, self.device)
        return self._network

    def shallow(self, quantization=None):
        """A random network of mini's width and LAYERS layers, for what is compared: a random network is chaotic, and
        after its twenty layers two ways of rounding have nothing in common."""
        return random_model(
            replace(self.config("mini", quantization), num_hidden_layers=LAYERS), self.dtype, self.device
        )

    def lost(self):
        """Whether the device answers no more: after a wild memory access every call fails until the process ends."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def to_default_stream(self):
        """Make it current: where a capture fails, torch.cuda.graph leaves the stream that it captured on."""
        if not self.dry:
            torch.cuda.set_stream(torch.cuda.default_stream())

    def require_memory(self, size, what):
        """DoesNotFit unless `size` bytes are free."""
        if self.dry:
            return
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if size > free:
            raise DoesNotFit(f"{what} need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


class Shapes(Machine):
    """A GPU's sizes without a GPU: what is built on it can be recorded (aot.recorded), not run. dry: tiny shapes."""

    def __init__(self, dry=False):
        super().__init__(dry=True)
        self.dry, self.device = dry, torch.device("meta")

    def copies(self, size):
        return 1

    def require_memory(self, size, what):
        pass


def random_model(config, dtype, device):
    """LLaDA2Model of this config, quantised where it says so, made in place on the device: no second copy of a tensor.

    Speed depends on weights through one thing, which experts the tokens of a block choose. Published floors assume that
    they choose independently. In a plain random network the masks of a block, all one embedding, would choose almost
    alike and read a fraction of the experts. So queries and keys are sharpened and the mask's embedding is small: what
    a masked position holds is then what it attended to, and that differs by position. How many experts are touched is
    measured and stands beside every figure it decides.
    """
    model = LLaDA2Model(config, dtype=dtype, device="meta").to_empty(device=device).eval()
    fill(model)
    model.word_embeddings.weight[config.mask_token_id] *= MASK_SCALE
    return model


@torch.no_grad()
def fill(module):
    """Give every parameter of a network, or of a part of one, values that keep activations in a usual range."""
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        if name.endswith("expert_bias"):
            p.zero_()
        elif name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
            p.fill_(SHARP)
        elif p.ndim == 1:
            p.fill_(1.0)
        elif p.is_floating_point() and p.dtype != torch.float8_e4m3fn:
            p.normal_(std=1.0 if "embeddings" in name else p.shape[-1] ** -0.5)
    for name, p in parameters.items():  # behind the others, for their scales were filled as if they were weights
        stem = name.removesuffix(".weight")
        scale = parameters.get(f"{stem}.scale" if stem != name else f"{stem}_scale")
        if p.dtype == torch.float8_e4m3fn:
            for part in p.view(-1).split(_CHUNK):
                part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=p.device).mul_(FP8_STD))
            scale.fill_(p.shape[-1] ** -0.5 / FP8_STD)
        elif p.dtype == WORDS:
            p.random_(-(2**15), 2**15)
            scale.fill_((scale.shape[-1] * SCALE_GROUP) ** -0.5 / INT4_STD)


def ceilings(machine):
    """What the device reaches in the two things that bound everything: moving bytes and multiplying matrices."""
    source, size = machine.random(machine.size(2**31, 2**20)), machine.size(8192, 64)
    target = torch.empty_like(source)
    a, b = machine.random(size, size), machine.random(size, size)
    machine.call_us(lambda: a @ b, rounds=100)  # an idle device has to speed up first
    copy = machine.call_us(lambda: target.copy_(source), rounds=20)
    result = {
        "copy_tb_s": 2 * source.nbytes / copy / 1e6,
        "bf16_tflops": 2 * size**3 / machine.call_us(lambda: a @ b, rounds=20) / 1e6,
        "fp8_tflops": None,
    }
    if not machine.dry and torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=machine.device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        product = partial(torch._scaled_mm, a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        result["fp8_tflops"] = 2 * size**3 / machine.call_us(product, rounds=20) / 1e6
    return result


@contextmanager
def poisoned():
    """Within it new tensors hold NaN or the largest integer, so that what nobody wrote shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
