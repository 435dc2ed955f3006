"""A whole denoise step, forward and refinement, of a random-weight network of the true shape, by CUDA graph.

    step <model> <bf16|fp8|int4> b<batch> p<prefix> [carried [real]]
    profile mini <bf16|fp8|int4> b<batch> carried

carried: with a place for an ended block to every four rows, as decoding replays it at every step; the places are
empty, as they usually are. real: as many rows begin their next block and carry the one that has ended along,
as each row does once a block.

Every row refines the block behind `prefix` cached tokens; keys and values of the prefix are random, its pages in random
order. The block holds random tokens, all editable and none sure enough to be edited: the step then does all its work,
the tokens route independently, as the floor assumes, and what little state changes is put back ahead of each replay.

floor_ms is benchmarks.roofline's with the ceilings measured in this run, floor_default_ms with its row for this GPU, if
it has one, floor_touched_ms with the experts really touched in place of the expected number. launched_ms is the same
work launched piece by piece, in `launches` pieces. Gate: both give the same bits.

A profile says where a replay's time goes, kernel by kernel. ms is its own time, by events and without the profiler;
kernels_ms the sum over what one replay under torch.profiler ran on the device, copies and fills included; gaps_ms what
is left. kernels: of each name and grid, for products of two sizes have one name, count, mean, total, shortest and
longest time in µs, for the TOP that take longest together; rest: of all others. A dry run counts operators on the CPU.
"""

import re
from functools import partial

import torch

from llada2_fast.decoding.graph_runner import StepGraph
from llada2_fast.decoding.inputs import special_ids
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.kernels import refine

from ..roofline import BLOCK, GPUS, floor_ms, gpu_of, step_costs, touched_experts
from .gates import IDLE, params_of
from .machine import QUANTIZATIONS, Point

GRID = [(batch, prefix) for prefix in (1024, 8192, 32768) for batch in (1, 8, 32, 128)]
CARRIED = [(batch, 1024) for batch in (1, 8, 32)]  # of the grid, measured in all variants
VARIANTS = ("", "carried", "carried real")
FIRST = ["b1 p1024 carried", "b1 p1024", "b32 p1024 carried", "b1 p1024 carried real"]
FLASH_MEMORY = 100e9  # bytes that a GPU must have for flash in fp8 to be worth a try
FLASH_ROOM = 65536  # tokens of cache that must fit beside flash in fp8 on a GPU of 141 GB
TOP, WIDTH = 25, 60  # of a profile: kernels with a row of their own, characters of a name


class Step:
    """One step of `batch` rows over `prefix` tokens: call() makes it, by graph on a GPU; reset() makes it repeatable.

    in_order: pages side by side, for the peers, which have no paged attention. variant: one of VARIANTS.
    """

    def __init__(self, machine, model, batch, prefix, in_order=False, variant=""):
        config, device = model.config, machine.device
        width = prefix // BLOCK + 1
        kept = 4 * batch * width * BLOCK * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        logits = 2 * batch * BLOCK * config.vocab_size
        machine.require_memory(kept + 3 * logits, f"cache and logits of batch {batch}, prefix {prefix}")
        self.model, self.prefix, self.mask_id = model, prefix, config.mask_token_id
        self.cache = model.new_cache(batch * width, BLOCK)
        self.cache.k.normal_()
        self.cache.v.normal_()
        tokens = torch.randint(config.mask_token_id, (batch, BLOCK), device=device)
        lanes = Lanes(batch, BLOCK, special_ids(config, self.mask_id), device, pages=width)
        self.state, bounds = lanes.state, lanes.bounds
        self.state.tokens.copy_(tokens)
        self.state.block_start.fill_(prefix)
        self.state.frozen.zero_()
        rule = IDLE._replace(flags=IDLE.flags | refine.EDITING | lanes.ids.edits * refine.LEVENSHTEIN)
        self.params = lanes.params = params_of([rule] * batch, device)
        pages = (torch.arange if in_order else torch.randperm)(batch * width, device=device)
        self.page_table = lanes.page_table.copy_(pages.view(batch, width))
        bounds.total.fill_(width * BLOCK)
        bounds.limit.fill_(width * BLOCK)
        places = -(-batch // 4) if variant else 0  # as GraphRunner has
        self.carried = places if variant == "carried real" else 0
        ended = slice(self.carried)
        self.state.block_start[ended] -= BLOCK
        self.state.frozen[ended] = refine.BLOCK_DONE
        self.state.changed[ended] = 1
        self._kept = [(x, x.clone()) for x in vars(self.state).values()]
        self.graph = StepGraph(model, self.cache, lanes, batch, places)
        self.load()
        self.call = self.graph.run if machine.dry else self.graph.replay

    def load(self):
        """What the host does ahead of a step."""
        self.graph.load(list(range(len(self.page_table))), False)

    def reset(self):
        for tensor, before in self._kept:
            tensor.copy_(before)

    def check(self):
        """The gate. ArithmeticError where replay and single launches differ, or a confidence is not finite."""
        self.reset()
        replayed = [x.clone() for x in self.call()]
        self.reset()
        launched = self.graph.run()
        for name, a, b in zip(launched._fields, replayed, launched, strict=True):
            if not torch.equal(a, b):
                raise ArithmeticError(f"{name}: the replayed step differs from the launched one")
        if not bool(launched.confidence.isfinite().all()) or bool((launched.status[:, 0] & refine.ERROR).any()):
            raise ArithmeticError("the step's confidences are not finite")

    def touched(self):
        """Experts whose weights the step reads, mean over the MoE layers."""
        counts = []

        def note(_module, _args, routing):
            counts.append(routing.ids[routing.ids >= 0].unique().numel())

        routers = [layer.mlp.router for layer in self.model.layers if hasattr(layer.mlp, "router")]
        hooks = [router.register_forward_hook(note) for router in routers]
        self.reset()
        self.graph.run()
        for hook in hooks:
            hook.remove()
        return sum(counts) / len(counts)


def time_step(machine, name, quantization, batch, prefix, variant=""):
    batch, prefix = machine.size(batch, 2), machine.size(prefix, 64)
    model = machine.network(name, quantization)
    if not machine.dry:
        torch.cuda.reset_peak_memory_stats()
    step = Step(machine, model, batch, prefix, variant=variant)
    step.check()
    ms = machine.call_us(step.call, rounds=20, before=step.reset) / 1e3
    launched = machine.call_us(step.graph.run, rounds=5, before=step.reset) / 1e3
    peak = None if machine.dry else torch.cuda.max_memory_allocated() / 1e9
    step.reset()
    asked = machine.counted(lambda: (step.load(), step.call()))
    step.reset()
    launches = machine.counted(step.graph.run)["launches"]
    touched = step.touched()
    costs = step_costs(model.config, batch, prefix, quantization, carried=step.carried)
    measured = machine.bandwidth, machine.tflops
    floor, default = floor_ms(costs, *measured), floor_ms(costs, *GPUS.get(gpu_of(machine.name), measured))
    expected = touched_experts(model.config, (batch + step.carried) * BLOCK)
    read = costs["routed experts"]
    costs["routed experts"] = read._replace(bytes=read.bytes * touched / expected)
    return {
        "ms": ms, "launched_ms": launched, "floor_ms": floor, "over_floor": ms / floor,
        "floor_default_ms": default, "over_floor_default": ms / default,
        "floor_touched_ms": floor_ms(costs, *measured),
        "experts_touched": touched, "experts_expected": expected,
        "gb": sum(cost.bytes for cost in costs.values()) / 1e9, "peak_gb": peak,
        "host_syncs": asked["syncs"], "launches_outside_graph": asked["launches"], "launches": launches,
    }  # fmt: skip


def short(name):
    """A kernel's name without return type, arguments and what all of PyTorch's have in common, cut to WIDTH."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|at::cuda::|^void ", "", name)
    name = re.sub(r"(?<=.)\(.*", "", name).rstrip()
    return name if len(name) <= WIDTH else name[: WIDTH - 3] + "..."


def summed(events):
    """[(name, grid, µs)] -> (kernels, rest) of a profile, the longest first; rest is None where there are no others."""
    launches = {}
    for name, grid, us in events:
        launches.setdefault((name, grid), []).append(us)
    ranked = sorted(launches.items(), key=lambda item: -sum(item[1]))
    others = [us for _, times in ranked[TOP:] for us in times]
    rows = [_row(short(name), grid, times) for (name, grid), times in ranked[:TOP]]
    return rows, _row("rest", "", others) if others else None


def _row(name, grid, times):
    figures = {"us": sum(times) / len(times), "total_us": sum(times), "least_us": min(times), "most_us": max(times)}
    return {"name": name, "grid": grid, "count": len(times)} | {key: round(us, 2) for key, us in figures.items()}


def show(line):
    """The profile as text, a line per kernel."""
    yield f"{'count':>6} {'mean µs':>9} {'from':>9} {'to':>9} {'total µs':>10}  kernel"
    for row in line["kernels"] + [line["rest"]] * (line["rest"] is not None):
        times = f"{row['us']:9.2f} {row['least_us']:9.2f} {row['most_us']:9.2f} {row['total_us']:10.1f}"
        yield f"{row['count']:6} {times}  {row['name']} {row['grid']}".rstrip()
    total, replay, gaps = (f"{1e3 * line[key]:.1f}" for key in ("kernels_ms", "ms", "gaps_ms"))
    yield f"{line['launches']:6} {'':29} {total:>10}  in all; the replay takes {replay}, gaps are {gaps}"


def profile_step(machine, quantization, batch):
    sizes = machine.size(batch, 2), machine.size(1024, 64)
    step = Step(machine, machine.network("mini", quantization), *sizes, variant="carried")
    ms = machine.call_us(step.call, rounds=20, before=step.reset) / 1e3
    step.reset()
    events = machine.device_events(step.call)
    kernels, rest = summed(events)
    total = sum(us for *_, us in events) / 1e3
    line = {
        "ms": ms, "kernels_ms": total, "gaps_ms": ms - total, "launches": len(events), "kernels": kernels, "rest": rest,
    }  # fmt: skip
    print("\n".join(show(line)), flush=True)
    return line


def points():
    """Steps of mini in all precisions, those of FIRST first; flash in fp8 last, which takes the whole device; and the
    profiles, a section of their own."""
    cases = [(*size, variant) for size in GRID for variant in (VARIANTS if size in CARRIED else VARIANTS[:1])]
    named = {f"b{batch} p{prefix} {variant}".rstrip(): (batch, prefix, variant) for batch, prefix, variant in cases}
    first = [name for name in FIRST if name in named]
    found = []
    for later, names in ((False, first), (True, [name for name in named if name not in first])):
        for kind, quantization in QUANTIZATIONS.items():  # networks change once a round, not at every point
            for name in names:
                batch, prefix, variant = named[name]
                sizes = {"batch": batch, "prefix": prefix, "variant": variant}
                measure = partial(time_step, name="mini", quantization=quantization, **sizes)
                found.append(Point(f"step mini {kind} {name}", "steps", 2 if later else 5, measure, later))
    for prefix in (1024, FLASH_ROOM - BLOCK):
        measure = partial(time_step, name="flash", quantization="fp8", batch=1, prefix=prefix)
        found.append(Point(f"step flash fp8 b1 p{prefix}", "steps", 30, measure, True, memory=FLASH_MEMORY))
    for kind, quantization in QUANTIZATIONS.items():
        for batch in (1, 32):
            measure = partial(profile_step, quantization=quantization, batch=batch)
            found.append(Point(f"profile mini {kind} b{batch} carried", "profile", 4, measure))
    return found
