"""What the engine's host does: to admit a prompt, to take a step, and to answer others while a request runs.

    llada2-fast bench host [--quick] [--json] [--save [FOLDER]]

The network is a tiny one of random weights. Milliseconds and microseconds are CPU time of the engine's thread, without
what it spends in the network, so that neither that nor other processes tell; gaps and steps/s are by the clock.
First the gate: the tokens of a request that is new, of one whose prefix is cached and of one beside other traffic, and
their confidences, as the tokens of such a network hardly tell one prompt from another, must be those of generate().

admission: from add_request until the request has its place: checks, copy, hashes, match, pages. cold: its prompt is
    new; cached: its whole blocks are in the cache; queued: it is new and goes before many that wait. us_per_token: what
    a token adds to a prompt of BASE tokens.
head: a step after some request has ended, while another of that prompt, all of it cached, waits for more pages than are
    free; without_ms: the same step with nobody waiting.
steps: a step of one row against max_num_seqs.
serving: steps of the one request that runs in an AsyncEngine whose queue is full, beside clients that are refused and
    try again at once and others that ask for stats(), against the same request alone; gap: the longest time without a
    step. arriving and leaving: the gap when many calls that wait for room come at once, and when they are cancelled.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from contextlib import asynccontextmanager
from itertools import pairwise

import torch

from llada2_fast.config import DecodeParams, EngineConfig, ModelConfig
from llada2_fast.engine import AsyncEngine, Engine, QueueFull

from . import harness
from .models import BLOCK, random_model
from .workload import require_equal

TINY = ModelConfig(
    vocab_size=256, hidden_size=16, num_hidden_layers=2, intermediate_size=16, moe_intermediate_size=8,
    first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, n_group=2, topk_group=1, use_bias=False, block_size=BLOCK,
    max_position_embeddings=40000, mask_token_id=255, pad_token_id=254, eos_token_id=(254,),
)  # fmt: skip
CACHE = 65536  # tokens of the engines' caches
BASE = 2 * BLOCK
CHECKED = 2 * BLOCK  # tokens that the gate looks at
QUOTA = {"steps": BLOCK, "threshold": 2.0}  # a token a step
SHORT, LONG = (DecodeParams(gen_length=n, eos_ids=(), **QUOTA) for n in (BLOCK, 20000))
LOADS = {  # pollers, clients that are refused, tokens of their prompts
    "alone": (0, 0, 0),
    "refused, 100 tokens": (0, 8, 100),
    "refused, 30000 tokens": (0, 8, 30000),
    "pollers": (256, 0, 0),
    "pollers and refused, 30000 tokens": (256, 8, 30000),
}
SMALL_LOAD = (2, 1, 100)  # beside which the gate looks


class Network:
    """A model for Engine with clocks in it. seconds: CPU time spent in it; forwards: perf_counter() as each began."""

    def __init__(self, model):
        self.model, self.seconds, self.forwards = model, 0.0, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def forward_blocks(self, *args):
        self.forwards.append(time.perf_counter())
        return self._timed(self.model.forward_blocks, *args)

    def lm_logits(self, hidden):
        return self._timed(self.model.lm_logits, hidden)

    def _timed(self, call, *args):
        started = time.thread_time()
        result = call(*args)
        self.seconds += time.thread_time() - started
        return result

    def host_ms(self, call):
        """Milliseconds of this thread in call(), outside of the network."""
        started, inside = time.thread_time(), self.seconds
        call()
        return 1e3 * (time.thread_time() - started - (self.seconds - inside))


def prompt_of(size, seed=0):
    """Random ids, neither EOS nor mask."""
    return random.Random(f"{size} {seed}").choices(range(TINY.vocab_size - 2), k=size)


def new_engine(network, **config):
    return Engine(network, EngineConfig(**{"max_num_seqs": 1, "cache_tokens": CACHE, "trace": False} | config))


def require(what, found, wanted):
    """SystemExit unless something is as it has to be for the figures to mean what they say."""
    if found != wanted:
        raise SystemExit(f"{what}: {found}, expected {wanted}; nothing of this run counts")


def check(network):
    """The gate: the share of the tokens that generate() gives, too, with the same confidences."""
    prompts = [prompt_of(size) for size in (16 * BLOCK, 16 * BLOCK, BLOCK // 4)]
    params = DecodeParams(gen_length=CHECKED, eos_ids=(), **QUOTA)
    alone = []
    for prompt in prompts:
        told = network.generate([prompt], gen_length=CHECKED, eos_id=(), trace=True, return_dict=True, **QUOTA)
        writes = told.trace[0].commits()
        alone.append([(writes[at].token, writes[at].confidence) for at in range(len(prompt), len(prompt) + CHECKED)])
    engine = new_engine(network)
    outputs = [engine.generate([prompt], params)[0] for prompt in prompts[:2]]
    require("tokens found in the cache", [output.shared_tokens for output in outputs], [0, len(prompts[1])])

    async def beside_others():
        async with serving(network, SMALL_LOAD, prompts[2]) as (_, written, _):
            while len(written) < CHECKED:
                await asyncio.sleep(0.01)
            return written[:CHECKED]

    found = [list(zip(output.token_ids, output.confidences, strict=True)) for output in outputs]
    found.append(asyncio.run(beside_others()))
    return require_equal(found, alone, "requests cold, cached and beside others against generate()", torch.float32)


# Admission


def admission(network, sizes, queued, rounds):
    """A point for each kind of request and size of its prompt, BASE first."""
    engines = {
        "cold": new_engine(network, max_num_batched_tokens=BLOCK),
        "cached": new_engine(network, max_num_batched_tokens=4096),
        "queued": new_engine(network, max_num_batched_tokens=BLOCK, max_waiting=queued + 1),
    }
    sizes, times = [BASE, *sizes], {}
    engines["cached"].generate([prompt_of(size) for size in sizes], SHORT)
    for i in range(queued):
        engines["queued"].add_request(prompt_of(512, i + 1), SHORT)
    for _ in range(rounds):
        for size in sizes:
            for kind, engine in engines.items():
                ms, request = admit(network, engine, prompt_of(size))
                times.setdefault((kind, size), []).append(ms)
                require("tokens found in the cache", request.shared_tokens, size if kind == "cached" else 0)
                engine.cancel(request.request_id)
    points = []
    for kind in engines:
        base = statistics.median(times[kind, BASE])
        for size in sizes:
            figures = harness.spread("ms", times[kind, size])
            adds = None if size == BASE else 1e3 * (figures["median_ms"] - base) / (size - BASE)
            waiting = queued if kind == "queued" else 0
            points.append({"kind": kind, "waiting": waiting, "prompt": size, "us_per_token": adds} | figures)
    return points


def admit(network, engine, prompt):
    """(milliseconds until the request has its place, the request)."""
    made = []

    def place():
        made.append(engine.add_request(prompt, SHORT, priority=1))
        engine.step()

    ms = network.host_ms(place)
    require("a request that fits", made[0].status, "running")
    return ms, made[0]


def head(network, sizes, rounds):
    """A point for each size of the prompt that waits."""
    points = []
    for size in sizes:
        prompt, times = prompt_of(size), {True: [], False: []}
        engines = {waits: _engine_with_head(network, prompt, waits) for waits in times}
        for _ in range(rounds):
            for waits, engine in engines.items():
                small = engine.add_request([1], SHORT, priority=1)
                engine.step()
                require("a small request", small.status, "running")
                engine.cancel(small.request_id)
                times[waits].append(network.host_ms(engine.step))
        without = statistics.median(times[False])
        figures = harness.spread("ms", times[True])
        adds = 1e3 * (figures["median_ms"] - without) / size
        points.append({"prompt": size, "without_ms": without, "us_per_token": adds} | figures)
    return points


def _engine_with_head(network, prompt, waits):
    """An engine in which a request of this prompt runs and, if it `waits`, one more waits for pages."""
    pages = 64
    engine = new_engine(
        network, max_num_seqs=4, max_num_batched_tokens=4096, cache_tokens=(len(prompt) // BLOCK + pages) * BLOCK
    )
    engine.generate([prompt], SHORT)
    engine.add_request(prompt, DecodeParams(gen_length=(pages - 4) * BLOCK, eos_ids=(), **QUOTA))
    engine.step()
    if waits:
        request = engine.add_request(prompt, DecodeParams(gen_length=8 * BLOCK, eos_ids=(), **QUOTA))
        engine.step()
        require("a request that does not fit", request.status, "waiting")
    return engine


# Steps


def steps(network, places, rounds):
    """A point for each max_num_seqs: a step of one row."""
    engines, times = [new_engine(network, max_num_seqs=count) for count in places], [[] for _ in places]
    for engine in engines:
        engine.add_request(prompt_of(BLOCK // 4), LONG)
    for _ in range(rounds):
        for engine, seen in zip(engines, times, strict=True):
            seen.append(1e3 * network.host_ms(engine.step))
    least = statistics.median(times[0])
    return [
        {"max_num_seqs": count, "over_fewest": statistics.median(seen) / least} | harness.spread("us", seen)
        for count, seen in zip(places, times, strict=True)
    ]


# Serving


@asynccontextmanager
async def serving(network, load, prompt):
    """An AsyncEngine beside a load, an entry of LOADS; one request runs in it, and one waits, which is all that may.

    Yields it, the running request's tokens so far with their confidences, and a Counter of refusals and polls.
    """
    pollers, clients, size = load
    written, seen = [], Counter()
    async with AsyncEngine(new_engine(network, max_waiting=1)) as engine:

        async def run():
            async for event in engine.stream(prompt, LONG):
                written.extend(zip(event.token_ids, event.confidences, strict=True))

        async def poll():
            while True:
                await engine.call(Engine.stats)
                seen["polls"] += 1

        async def retry(long):
            while True:
                try:
                    await engine.generate(long, SHORT)
                except QueueFull:
                    seen["refusals"] += 1
                else:
                    raise SystemExit("a full queue has taken a request; nothing of this run counts")
                await asyncio.sleep(0)  # whatever refuses it may do so without waiting

        network.forwards.clear()
        own = [asyncio.create_task(run())]
        while not network.forwards:  # it runs when the next one comes, which would find no room otherwise
            await asyncio.sleep(0.01)
        own.append(asyncio.create_task(engine.generate(prompt, SHORT)))
        while (await engine.call(Engine.stats)).num_waiting == 0:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(poll()) for _ in range(pollers)]
        others += [asyncio.create_task(retry(prompt_of(size, i))) for i in range(clients)]
        try:
            yield engine, written, seen
        finally:
            await _cancel(others)
            await _cancel(own)


async def _cancel(tasks):
    """End tasks; what one of them has raised is raised here."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, asyncio.CancelledError):
            raise result


class Window:
    """The time since it was opened: seconds, steps, and the longest time in milliseconds without one."""

    def __init__(self, network):
        self.network, self.first, self.begun = network, len(network.forwards), time.perf_counter()

    def close(self):
        ended, begins = time.perf_counter(), self.network.forwards[self.first :]
        self.seconds, self.steps = ended - self.begun, len(begins)
        self.gap_ms = 1e3 * max(b - a for a, b in pairwise([self.begun, *begins, ended]))


async def beside(network, load, seconds):
    """Figures of one load: steps, refusals and polls per second, and the longest gap."""
    async with serving(network, load, prompt_of(BLOCK // 4)) as (_, _, seen):
        await asyncio.sleep(0.2)
        before, window = seen.copy(), Window(network)
        await asyncio.sleep(seconds)
        window.close()
        figures = {f"{name}_s": (seen[name] - before[name]) / window.seconds for name in ("refusals", "polls")}
    return {"steps_s": window.steps / window.seconds, "gap_ms": window.gap_ms} | figures


async def crowd(network, count):
    """{arriving_gap_ms, leaving_gap_ms} of so many calls that wait for room."""
    async with serving(network, LOADS["alone"], prompt_of(BLOCK // 4)) as (engine, _, _):
        await asyncio.sleep(0.2)
        prompt, arriving = prompt_of(100), Window(network)
        calls = [asyncio.create_task(engine.generate(prompt, SHORT, wait=True)) for _ in range(count)]
        await asyncio.sleep(0)
        await engine.call(Engine.stats)
        await asyncio.sleep(0.5)
        arriving.close()
        leaving = Window(network)
        await _cancel(calls)
        await engine.call(Engine.stats)
        leaving.close()
    return {"arriving_gap_ms": arriving.gap_ms, "leaving_gap_ms": leaving.gap_ms}


def serve(network, loads, calls, seconds, rounds):
    """(a point for each of the loads, the first of which is the request alone; gaps of a crowd of calls)."""
    found, gaps = {name: [] for name in loads}, []
    for _ in range(rounds):
        for name, load in loads.items():
            found[name].append(asyncio.run(beside(network, load, seconds)))
        gaps.append(asyncio.run(crowd(network, calls)))
    alone = next(iter(found.values()))
    points = []
    for name, figures in found.items():
        ratios = [own["steps_s"] / other["steps_s"] for own, other in zip(figures, alone, strict=True)]
        rates = {key: statistics.median(own[key] for own in figures) for key in ("steps_s", "refusals_s", "polls_s")}
        gap = harness.spread("gap_ms", [own["gap_ms"] for own in figures])
        points.append({"load": name} | rates | harness.spread("ratio_vs_alone", ratios) | gap)
    figures = {"size": calls}
    for key in gaps[0]:
        figures |= harness.spread(key, [gap[key] for gap in gaps])
    return points, figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    harness.add_options(parser)
    args = parser.parse_args(argv)
    harness.check_save(parser, args, "host")
    network = Network(random_model(TINY))
    share = check(network)
    sizes, queued = ((512, 4096), 100) if args.quick else ((512, 4096, 16384, 32000), 1000)
    admitted = admission(network, sizes, queued, 3 if args.quick else 15)
    for point in admitted:
        adds = "" if point["us_per_token"] is None else f", {point['us_per_token']:.3f} us per token"
        print(f"{point['kind']:>8}, prompt of {point['prompt']:5}: {point['median_ms']:.2f} ms until its place{adds}")
    heads = head(network, sizes, 3 if args.quick else 15)
    for point in heads:
        without = f"{point['without_ms']:.2f} ms with nobody waiting"
        print(f"a step while a prompt of {point['prompt']:5} waits: {point['median_ms']:.2f} ms, {without}")
    rows = steps(network, (1, 16) if args.quick else (1, 16, 64, 256), 20 if args.quick else 200)
    for point in rows:
        over = f"{point['over_fewest']:.2f} of the first"
        print(f"a step of one row, max_num_seqs {point['max_num_seqs']:3}: {point['median_us']:.0f} us, {over}")
    if args.quick:
        loads, calls, seconds, rounds = {"alone": LOADS["alone"], "a little": SMALL_LOAD}, 100, 0.2, 1
    else:
        loads, calls, seconds, rounds = LOADS, 10000, 1.5, 5
    served, gaps = serve(network, loads, calls, seconds, rounds)
    for point in served:
        print(
            f"{point['load']:>33}: {point['steps_s']:5.0f} steps/s, {point['median_ratio_vs_alone']:.2f} of alone, gap "
            f"{point['median_gap_ms']:.0f} ms; {point['refusals_s']:.0f} refusals/s, {point['polls_s']:.0f} polls/s"
        )
    print(
        f"{calls} calls that wait: gap {gaps['median_arriving_gap_ms']:.0f} ms while they come, "
        f"{gaps['median_leaving_gap_ms']:.0f} ms while they go"
    )
    results = {"admission": admitted, "head": heads, "steps": rows, "serving": served, "crowd": gaps}
    harness.finish("host", args, {"equal_tokens": share} | results)


if __name__ == "__main__":
    main()
