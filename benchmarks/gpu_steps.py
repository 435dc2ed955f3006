"""A whole denoise step, forward and refinement, of a random-weight network of the true shape, by CUDA graph.

    step <model> <bf16|fp8> b<batch> p<prefix>

Every row refines the block behind `prefix` cached tokens; keys and values of the prefix are random, its pages in random
order. The block holds random tokens, all editable and none sure enough to be edited: the step then does all its work,
the tokens route independently, as the floor assumes, and what little state changes is put back ahead of each replay.

floor_ms is benchmarks.roofline's with the ceilings measured in this run, floor_default_ms with its H200 defaults,
floor_touched_ms with the experts really touched in place of the expected number. launched_ms is the same work launched
piece by piece. Gate: both give the same bits.
"""

from functools import partial

import torch

from llada2_fast.cache import PagedKVCache
from llada2_fast.graphs import Slots, StepGraph
from llada2_fast.kernels import refine

from .gpu_gates import each_row
from .gpu_machine import Point
from .roofline import BLOCK, GPUS, floor_ms, step_costs, touched_experts

GRID = [(batch, prefix) for prefix in (1024, 8192, 32768) for batch in (1, 8, 32, 128)]
FIRST = [(1, 1024), (32, 1024)]
FLASH_ROOM = 65536  # tokens of cache that must fit beside flash in fp8 on a GPU of 141 GB


class Step:
    """One step of `batch` rows over `prefix` tokens: call() makes it, by graph on a GPU; reset() makes it repeatable.

    in_order: pages side by side, for the peers, which have no paged attention.
    """

    def __init__(self, machine, model, batch, prefix, in_order=False):
        config, device = model.config, machine.device
        width = prefix // BLOCK + 1
        kept = 4 * batch * width * BLOCK * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        logits = 2 * batch * BLOCK * config.vocab_size
        machine.require_memory(kept + 3 * logits, f"cache and logits of batch {batch}, prefix {prefix}")
        self.model, self.prefix, self.mask_id = model, prefix, config.mask_token_id
        self.cache = PagedKVCache(config, batch * width, BLOCK, machine.dtype, device)
        self.cache.k.normal_()
        self.cache.v.normal_()
        tokens = torch.randint(config.mask_token_id, (batch, BLOCK), device=device)
        kind = torch.full_like(tokens, refine.VALID, dtype=torch.int8)
        self.state = refine.BlockState.start_block(tokens, kind, torch.full((batch,), prefix, device=device))
        self.params = each_row(
            batch, device, edit_threshold=2.0, max_steps=2**30, flags=refine.BAN_MASK | refine.EDITING
        )
        pages = (torch.arange if in_order else torch.randperm)(batch * width, device=device)
        slots = Slots(batch, width, device)
        self.page_table = slots.page_table.copy_(pages.view(batch, width))
        slots.bounds.total.fill_(width * BLOCK)
        slots.bounds.limit.fill_(width * BLOCK)
        self.graph = StepGraph(model, self.cache, self.state, self.params, self.mask_id, slots, active=batch, carried=0)
        self.load()
        self.call = self.graph.run if machine.dry else self.graph.replay

    def load(self):
        """What the host does ahead of a step."""
        self.graph.load(list(range(len(self.page_table))), False)

    def reset(self):
        for counter in (self.state.frozen, self.state.step, self.state.post_steps):
            counter.zero_()

    def check(self):
        """The gate. ArithmeticError where replay and single launches differ, or a confidence is not finite."""
        self.reset()
        replayed = [x.clone() for x in self.call()[0]]
        self.reset()
        launched, _ = self.graph.run()
        for name, a, b in zip(launched._fields, replayed, launched, strict=True):
            if not torch.equal(a, b):
                raise ArithmeticError(f"{name}: the replayed step differs from the launched one")
        if not bool(launched.confidence.isfinite().all()) or bool((launched.status[:, 0] & refine.ERROR).any()):
            raise ArithmeticError("the step's confidences are not finite")

    def touched(self):
        """Experts whose weights the step reads, mean over the MoE layers."""
        routers = [layer.mlp.router for layer in self.model.layers if hasattr(layer.mlp, "router")]
        counts = []
        hooks = [
            router.register_forward_hook(lambda _module, _args, routing: counts.append(routing.ids.unique().numel()))
            for router in routers
        ]
        self.reset()
        self.graph.run()
        for hook in hooks:
            hook.remove()
        return sum(counts) / len(counts)


def time_step(machine, name, float8, batch, prefix):
    batch, prefix = machine.size(batch, 2), machine.size(prefix, 64)
    model = machine.network(name, float8)
    if not machine.dry:
        torch.cuda.reset_peak_memory_stats()
    step = Step(machine, model, batch, prefix)
    step.check()
    ms = machine.call_us(step.call, rounds=20, before=step.reset) / 1e3
    launched = machine.call_us(step.graph.run, rounds=5, before=step.reset) / 1e3
    peak = None if machine.dry else torch.cuda.max_memory_allocated() / 1e9
    step.reset()
    asked = machine.counted(lambda: (step.load(), step.call()))
    touched = step.touched()
    costs = step_costs(model.config, batch, prefix, 1 if float8 else 2)
    floor, default = floor_ms(costs, machine.bandwidth, machine.tflops), floor_ms(costs, *GPUS["h200"])
    expected = touched_experts(model.config, batch * BLOCK)
    read = costs["routed experts"]
    costs["routed experts"] = read._replace(bytes=read.bytes * touched / expected)
    return {
        "ms": ms, "launched_ms": launched, "floor_ms": floor, "over_floor": ms / floor,
        "floor_default_ms": default, "over_floor_default": ms / default,
        "floor_touched_ms": floor_ms(costs, machine.bandwidth, machine.tflops),
        "experts_touched": touched, "experts_expected": expected,
        "gb": sum(cost.bytes for cost in costs.values()) / 1e9, "peak_gb": peak,
        "host_syncs": asked["syncs"], "launches_outside_graph": asked["launches"],
    }  # fmt: skip


def points():
    """Steps of mini in both precisions, batch 1 and 32 first; flash in fp8 last, which takes the whole device."""
    found = []
    for batch, prefix in sorted(GRID, key=lambda size: size not in FIRST):
        for kind, float8 in (("bf16", False), ("fp8", True)):
            measure = partial(time_step, name="mini", float8=float8, batch=batch, prefix=prefix)
            later = (batch, prefix) not in FIRST
            found.append(Point(f"step mini {kind} b{batch} p{prefix}", "steps", 8 if later else 20, measure, later))
    found.sort(key=lambda point: (point.later, "fp8" in point.name))  # change networks once a round, not at every point
    for prefix in (1024, FLASH_ROOM - BLOCK):
        measure = partial(time_step, name="flash", float8=True, batch=1, prefix=prefix)
        found.append(Point(f"step flash fp8 b1 p{prefix}", "steps", 30, measure, True))
    return found
