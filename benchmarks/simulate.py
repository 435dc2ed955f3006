"""The engine at scale, in simulated time: forwards cost what a model of them says, everything else is real.

    python -m benchmarks.simulate [--requests N] [--cost cpu|h200] [--quick] [--json] [--save]

Only the network is replaced, by one that commits random tokens of random confidences and moves the clock. A forward
costs what was fitted here to forwards of the small network, linear in tokens and query-key pairs (cpu), or the roofline
of LLaDA2-mini in bfloat16 (h200). Two loads of the same requests, with common system prompts, prompts of 32 to 4096
tokens, three priorities: a backlog, where throughput is held against the ideal packing (all lanes full in every
forward, nothing computed twice), and arrivals at 80 % of that throughput, where nobody may wait for ever. Exit code 1
where packing is below 90 % of the ideal, a request starves or memory grows; a lost request or page is an
AssertionError.
"""

import argparse
import random
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from llada2_fast.cache import PagedKVCache
from llada2_fast.config import DecodeParams, EngineConfig, ModelConfig
from llada2_fast.engine import Engine
from llada2_fast.kernels.attention import Span

from . import harness
from .models import SMALL, random_model
from .roofline import GPUS, MINI, floor_ms, step_costs

LENGTH = 32
RUNNING = 64  # rows decoded together
PREFILL = {"cpu": 512, "h200": 2048}  # prompt tokens in one step
TEXT, OTHER, EOS, MASK = range(4)  # the vocabulary
STAND_IN = ModelConfig(
    vocab_size=4, hidden_size=2, num_hidden_layers=1, intermediate_size=2, first_k_dense_replace=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=2, num_experts=2, num_experts_per_tok=1, n_group=1,
    topk_group=1, partial_rotary_factor=1.0, max_position_embeddings=8192, block_size=LENGTH, mask_token_id=MASK,
    eos_token_id=EOS, pad_token_id=EOS,
)  # fmt: skip


class Clock:
    """Seconds of simulated time."""

    now = 0.0

    def __call__(self):
        return self.now


class StandIn:
    """A network for Engine whose forwards take no time but on its clock. cost: (tokens, query-key pairs) -> seconds."""

    config, dtype, device, block_length = STAND_IN, torch.float32, torch.device("cpu"), LENGTH
    release = None
    special_ids = {}

    def __init__(self, cost, clock, seed=0):
        self.cost, self.clock, self.forwards = cost, clock, 0
        self.generator = torch.Generator().manual_seed(seed)

    def new_cache(self, num_pages, block_length):
        return PagedKVCache(self.config, num_pages, block_length, self.dtype, self.device)

    def forward_blocks(self, tokens, positions, runs, cache, read=None):
        self.forwards += 1
        self.clock.now += self.cost(len(tokens), sum(pairs(run.first_block, run.num_blocks) for run in runs))
        if read is not None:
            tokens = tokens.view(-1, LENGTH)[read.blocks].flatten()[read.rows]
        return tokens[:, None].float()

    def lm_logits(self, hidden):
        """A third of the candidates have a confidence above 0.9; one in 4000 is EOS, and sure of it."""
        count = hidden.shape[0]
        logits = torch.full((count, 4), -20.0)
        logits[:, OTHER] = 0
        logits[:, TEXT] = torch.randn(count, generator=self.generator) * 1.7 + 1.5
        logits[:, EOS].masked_fill_(torch.rand(count, generator=self.generator) < 1 / 4000, 20.0)
        return logits


def pairs(first, count):
    """Query-key pairs of blocks first .. first + count - 1."""
    return LENGTH * LENGTH * (count * first + count * (count + 1) // 2)


def measured_cost():
    """Fit a + b tokens + c pairs to forwards of the small network, one thread: least squares over a grid."""
    torch.set_num_threads(1)
    model, points = random_model(SMALL), []
    for rows in (1, 4, 16, 64):
        for first in (0, 15, 63):
            cache = PagedKVCache(SMALL, rows * (first + 1), LENGTH, torch.float32, "cpu")
            runs = [Span(cache.allocate(first + 1), first, 1, LENGTH * (first + 1)) for _ in range(rows)]
            tokens = torch.zeros(rows * LENGTH, dtype=torch.int64)

            def forward(tokens=tokens, runs=runs, cache=cache):
                hidden = model.forward_blocks(tokens, tokens, runs, cache)
                model.lm_logits(hidden[: len(tokens) // 2])

            forward()
            seconds = min(harness.timed_rounds([forward], 1)[0] for _ in range(3))
            points.append((1.0, rows * LENGTH, rows * pairs(first, 1), seconds))
    grid = torch.tensor(points, dtype=torch.float64)
    relative = grid / grid[:, 3:]  # the relative error counts
    a, b, c = torch.linalg.lstsq(relative[:, :3], relative[:, 3]).solution.clamp(min=0).tolist()
    return lambda tokens, pairs: a + b * tokens + c * pairs


def roofline_cost():
    """LLaDA2-mini in bfloat16 on an H200, at 1.25 times its floor."""

    def cost(tokens, pairs):
        prefix = pairs / tokens - LENGTH
        return 1.25 * floor_ms(step_costs(MINI, tokens / LENGTH, max(0.0, prefix)), *GPUS["h200"]) / 1e3

    return cost


def workload(count, seed=0):
    """[(prompt, DecodeParams, priority)]: a third of the prompts begin with one of five system prompts."""
    rng = random.Random(seed)
    systems = [[rng.getrandbits(1) for _ in range(512)] for _ in range(5)]
    jobs = []
    for _ in range(count):
        own = [rng.getrandbits(1) for _ in range(int(32 * 2 ** rng.uniform(0, 7)))]
        prompt = rng.choice(systems) + own if rng.random() < 1 / 3 else own
        params = DecodeParams(
            gen_length=rng.randint(64, 512), threshold=0.9, eos_early_stop=True, seed=0,
            editing_threshold=rng.choice((None, None, 0.95)), max_post_steps=2,
        )  # fmt: skip
        jobs.append((prompt, params, rng.choices((0, 1, 2), (80, 15, 5))[0]))
    return jobs


def figures_only(output):
    """A RequestOutput without its tokens and trace but for their number: ten thousand are kept."""
    return replace(output, token_ids=range(len(output.token_ids)), confidences=[], steps=[], trace=None)


def simulate(jobs, cost, config, rate=None):
    """Serve all jobs; rate: arrivals per second, None = as many as may wait at any time. Returns a dict of figures."""
    clock = Clock()
    engine = Engine(StandIn(cost, clock), config, clock=clock)
    rng, due, added, outputs, most, memory = random.Random(1), 0.0, 0, [], 0, []
    while added < len(jobs) or engine.has_work:
        while added < len(jobs) and engine.scheduler.has_room and (rate is None or due <= clock.now):
            prompt, params, priority = jobs[added]
            engine.add_request(prompt, params, priority=priority, request_id=str(added))
            added += 1
            due += rng.expovariate(rate) if rate else 0.0
        if not engine.has_work:
            clock.now = due
        outputs += [figures_only(event.output) for event in engine.step() if event.output is not None]
        most = max(most, len(engine.requests))
        if engine.num_steps % 500 == 0:
            engine.check_integrity()
            memory.append(int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * resource.getpagesize() / 2**20)
    engine.check_integrity()
    assert sorted(int(output.request_id) for output in outputs) == list(range(len(jobs))), "a request was lost"
    assert engine.finished["error"] == 0, engine.finished
    outputs.sort(key=lambda output: int(output.request_id))
    return {"engine": engine, "outputs": outputs, "seconds": clock.now, "most": most, "memory": memory or [0.0]}


def ideal_seconds(outputs, cost, lanes):
    """What the same denoise forwards, carried blocks and prompts would take in the fewest steps, all lanes full.

    A lower bound: where editing may have settled a block for nothing, it is not counted as carried.
    """
    tokens = work = forwards = 0
    for output in outputs:
        first, shared = output.prompt_length // LENGTH, output.shared_tokens // LENGTH
        tokens += max(0, first - shared) * LENGTH
        work += pairs(shared, first - shared) if first > shared else 0
        for block, steps in enumerate(output.counters.forwards_per_block, first):
            carried = block > first and output.counters.edits == 0  # with editing a block may settle by itself
            forwards += steps
            tokens += (steps + carried) * LENGTH
            work += (steps + carried) * pairs(block, 1)
    steps = -(-forwards // lanes)
    return steps * cost(tokens / steps, work / steps)


def summary(result, jobs, cost, lanes):
    """Figures of one simulated load; times in simulated seconds."""
    outputs, seconds = result["outputs"], result["seconds"]
    waits = {0: 0.0, 1: 0.0, 2: 0.0}
    for output, (_, _, priority) in zip(outputs, jobs, strict=True):
        waits[priority] = max(waits[priority], output.queue_s)
    return {
        "simulated_hours": seconds / 3600,
        "tok_s": sum(len(output.token_ids) for output in outputs) / seconds,
        "vs_ideal": ideal_seconds(outputs, cost, lanes) / seconds,
        "shared_tokens": sum(output.shared_tokens for output in outputs),
        "preemptions": sum(output.preemptions for output in outputs),
        "max_queue_s": waits,
        "max_service_s": max(output.prefill_s + output.decode_s for output in outputs),
        "max_unfinished": result["most"],
        "leaked_pages": result["engine"].cache.num_pages - result["engine"].cache.num_free,
        "memory_growth_mb": result["memory"][-1] - result["memory"][len(result["memory"]) // 4],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    harness.add_options(parser)
    parser.add_argument("--requests", type=int, help="per load (10000; quick: 500)")
    parser.add_argument("--cost", choices=("cpu", "h200"), default="cpu")
    options = parser.parse_args(argv)
    harness.check_save(parser, options, "simulate")
    count = options.requests or (500 if options.quick else 10_000)
    cost = measured_cost() if options.cost == "cpu" else roofline_cost()
    jobs = workload(count)
    config = EngineConfig(
        max_num_seqs=RUNNING, max_waiting=256, cache_tokens=RUNNING * 2048, max_num_batched_tokens=PREFILL[options.cost]
    )
    results, started, rate = {}, time.perf_counter(), None
    for load in ("backlog", "arrivals"):
        figures = results[load] = summary(simulate(jobs, cost, config, rate), jobs, cost, RUNNING)
        rate = rate or 0.8 * count / (figures["simulated_hours"] * 3600)
        print(
            f"{load}: {figures['simulated_hours']:.2f} h simulated, {figures['tok_s']:.0f} tok/s, "
            f"{figures['vs_ideal']:.3f} of ideal packing, waits at most "
            f"{', '.join(f'{s:.0f} s (priority {p})' for p, s in figures['max_queue_s'].items())}, "
            f"{figures['preemptions']} preemptions, +{figures['memory_growth_mb']:.0f} MB"
        )
    arrivals = results["arrivals"]
    # whoever waits for two levels of priority is the first of all; then only rows that run already are before it
    starved = max(arrivals["max_queue_s"].values()) > 2 * config.priority_s + arrivals["max_service_s"]
    grown = max(figures["memory_growth_mb"] for figures in results.values()) > 64
    passed = results["backlog"]["vs_ideal"] >= 0.9 and not starved and not grown
    card = {"cost": options.cost, "requests": count, "wall_s": time.perf_counter() - started, "passed": passed}
    harness.finish("simulate", options, card | results)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
