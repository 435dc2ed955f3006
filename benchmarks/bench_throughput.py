"""Many requests through the engine: tokens per second, and how long a request waits for what.

    llada2-fast bench throughput [--num-prompts N] [--max-concurrency N] [--request-rate R] [--input-len N]
                                 [--model PATH_OR_ID] [--quick] [--json] [--save [FOLDER]] [--plot FILE]
    llada2-fast bench throughput --peers [--quick] [--json] [--save [FOLDER]]

First the gate: what the engine gives the first requests, all of the warm-up in flight, must be what generate() gives
each of them alone. Then rounds of new prompts each through the same engine; the figures are those of the round with the
median throughput. Without --request-rate a request is sent as soon as another has ended, with it they arrive as a
Poisson process, at `inf` all at once, and wait for their turn. Key names and meanings are those of `vllm bench`
(latencies.py); `tpot_left_out` says how many answers had no time per token.

With --peers the small random network answers random requests by quota, 4 tokens a forward: 16 in flight against
generate() one by one; those of one prompt length against lock-step batches of diffusers' LLaDA2Pipeline; latencies at 1
to 64 in flight and at several arrival rates; and what the engine itself costs per step and row, everything but forward
and refinement. All tokens of the engine must be those of generate() before anything is timed, and those of diffusers.
"""

import argparse
import math
import random
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import numpy
import torch

from llada2_fast.cli import options
from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.engine import Engine, Event

from . import harness, latencies
from .harness import positive
from .models import BLOCK, SMALL, Task, diffusers, random_model
from .simulate import Clock, StandIn
from .workload import Workload, add_options, require_equal

CHECKED = 4  # requests that the gate decodes once more, one by one


class Served(NamedTuple):
    """A request that has ended: when it arrived, on the engine's clock, and its events."""

    arrived: float
    events: list[Event]

    @property
    def output(self):
        return self.events[-1].output

    @property
    def commits(self):
        """When tokens came, in seconds since its arrival."""
        return [event.time - self.arrived for event in self.events if event.kind == "commit"]

    @property
    def num_tokens(self):
        return len(self.output.token_ids)

    @property
    def seconds(self):
        return self.events[-1].time - self.arrived


def serve(engine, jobs, in_flight=None, rate=None):
    """Run (prompt, DecodeParams) pairs, `in_flight` at a time or arriving at `rate` per second, where inf means all at
    once; a list of Served.

    The engine's clock must be time.perf_counter. With a rate a request has arrived when it was due, also if the engine
    was in the middle of a step then.
    """
    served, rng, added, due = {}, random.Random(1), 0, time.perf_counter()
    while added < len(jobs) or engine.has_work:
        now = time.perf_counter()
        while added < len(jobs) and (len(engine.requests) < in_flight if rate is None else due <= now):
            request = engine.add_request(*jobs[added])
            served[request.request_id] = Served(now if rate is None else due, [])
            added += 1
            due += rng.expovariate(rate) if rate else 0.0
        if engine.has_work:
            for event in engine.step():
                served[event.request_id].events.append(event)
        else:
            time.sleep(max(0.0, due - time.perf_counter()))
    return list(served.values())


def finished(served):
    """Those that did not fail."""
    return [one for one in served if one.output.error is None]


def summary(served, seconds):
    """What a round of so many seconds says, as it stands in the JSON line."""
    done = finished(served)
    outputs = [one.output for one in done]
    tokens, forwards = sum(one.num_tokens for one in done), sum(o.counters.denoise_forwards for o in outputs)
    blocks = sum(len(o.counters.forwards_per_block) for o in outputs)
    figures = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(served) - len(done),
        "total_input_tokens": sum(output.prompt_length for output in outputs),
        "total_output_tokens": tokens,
        "request_throughput": len(done) / seconds,
        "output_throughput": tokens / seconds,
        "tokens_per_forward": tokens / max(1, forwards),
        "steps_per_block": forwards / max(1, blocks),
        "shared_tokens": sum(output.shared_tokens for output in outputs),
    }
    return figures | latencies.figures(done)


def check(work, served, jobs):
    """The gate: the share of the first requests' tokens that generate() gives each of them alone."""
    alone = [work.model.generate([prompt], **work.decoding)[0].tolist() for prompt, _ in jobs[:CHECKED]]
    return require_equal(
        [one.output.token_ids for one in served[:CHECKED]], alone,
        f"first {len(alone)} requests in the engine against generate() one by one", work.model.dtype,
    )  # fmt: skip


def new_engine(work, running):
    """An Engine with room for `running` requests of this workload at once."""
    prompts = [prompt for batch in work.batches for prompt in batch]
    length = work.decoding.get("block_length") or work.model.block_length
    longest = max(map(len, prompts)) + work.decoding["gen_length"]
    config = EngineConfig(
        block_length=length, mask_id=work.decoding.get("mask_id"), max_num_seqs=running, max_waiting=len(prompts),
        cache_tokens=running * -(-longest // length) * length, graphs=work.facts["graphs"],
    )  # fmt: skip
    return Engine(work.model, config)


# --peers

IN_FLIGHT = 16
QUOTA = {"block_length": BLOCK, "steps": 8, "threshold": 2.0}


def random_jobs(count, seed=0):
    """[(prompt, DecodeParams)] without common prefixes."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(SMALL.vocab_size - 2) for _ in range(rng.choice((64, 128, 256)))],
            DecodeParams(gen_length=rng.choice((64, 128, 192)), **QUOTA),
        )
        for _ in range(count)
    ]


def small_engine(model, running=IN_FLIGHT):
    return Engine(model, EngineConfig(max_num_seqs=running, cache_tokens=running * 512, enable_prefix_caching=False))


def one_by_one(model, jobs):
    """The tokens of each job by itself."""
    return [model.generate([prompt], gen_length=p.gen_length, **QUOTA)[0].tolist() for prompt, p in jobs]


def figures(served):
    """{name: {p50, p95, p99}} in ms: first block after arrival, between blocks, whole request."""
    seconds = latencies.latencies(finished(served))
    return {
        name: {f"p{p}": float(numpy.percentile(seconds[key], p)) * 1e3 for p in (50, 95, 99)}
        for name, key in (("first_block_ms", "ttft"), ("inter_block_ms", "itl"), ("request_ms", "e2el"))
    }


def tokens_of(served):
    return [one.output.token_ids for one in served]


def against_serial(model, jobs, rounds):
    """(tokens/s of the engine with IN_FLIGHT requests, tokens/s one by one, latencies of the engine)."""
    kept = {}

    def together():
        kept["served"] = serve(small_engine(model), jobs, IN_FLIGHT)

    wanted = one_by_one(model, jobs)
    together()
    if tokens_of(kept["served"]) != wanted:
        raise SystemExit("tokens of the engine differ from generate()'s: nothing is timed")
    engine_s, serial_s = harness.timed_rounds([together, lambda: one_by_one(model, jobs)], rounds)
    count = sum(map(len, wanted))
    return count / engine_s, count / serial_s, figures(kept["served"])


def against_diffusers(model, jobs):
    """(tokens/s of the engine, tokens/s of diffusers): batches of 16 that run in lock-step to the longest answer."""
    longest = max(params.gen_length for _, params in jobs)
    call = diffusers(model, Task(torch.tensor([prompt for prompt, _ in jobs]), longest, QUOTA["steps"]))
    kept = {}

    def lock_step():
        kept["theirs"] = call().sequences

    def together():
        kept["ours"] = tokens_of(serve(small_engine(model), jobs, IN_FLIGHT))

    engine_s, diffusers_s = harness.timed_rounds([together, lock_step], 1)
    for i, row in enumerate(kept["theirs"].tolist()):
        if row[: jobs[i][1].gen_length] != kept["ours"][i]:
            raise SystemExit(f"tokens of diffusers and of the engine differ in request {i}")
    count = sum(params.gen_length for _, params in jobs)
    return count / engine_s, count / diffusers_s


class Timed(Engine):
    """inner: seconds of the last step that are the decoder's, not the engine's own."""

    def forward(self, work):
        started = time.perf_counter()
        result = super().forward(work)
        self.inner = time.perf_counter() - started
        return result


def host_cost(rows, steps=150):
    """Microseconds per step and row of the engine itself, at `rows` running rows; the network is a stand-in."""
    engine = Timed(
        StandIn(lambda *_: 0.0, Clock()),
        EngineConfig(max_num_seqs=rows, cache_tokens=rows * 2048, max_waiting=2 * rows),
    )
    params = DecodeParams(gen_length=1500, threshold=0.9, seed=0, eos_ids=())
    for i in range(rows):
        engine.add_request([i % 2] * 64, params)
    for _ in range(20):
        engine.step()
    own = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        own.append(time.perf_counter() - started - engine.inner)
    return statistics.median(own) * 1e6 / rows


def against_peers(quick):
    """The results of --peers."""
    model = random_model(SMALL)
    jobs = random_jobs(32 if quick else 64)
    tok_s, serial_tok_s, at_16 = against_serial(model, jobs, 3)
    print(f"{IN_FLIGHT} in flight {tok_s:.0f} tok/s, one by one {serial_tok_s:.0f}: {tok_s / serial_tok_s:.2f}x")
    alike = [([*prompt[:64]], params) for prompt, params in jobs[:IN_FLIGHT]]
    if quick:
        alike = [(prompt, replace(params, gen_length=64)) for prompt, params in alike]
    batch_tok_s, diffusers_tok_s = against_diffusers(model, alike)
    print(f"diffusers in lock-step {diffusers_tok_s:.0f} tok/s, engine {batch_tok_s:.0f}")
    levels, rates, engine = [], [], None
    for in_flight in (1, 16) if quick else (1, 2, 4, 8, 16, 32, 64):
        engine, started = small_engine(model, in_flight), time.perf_counter()
        served = serve(engine, jobs[: max(8, len(jobs) * min(in_flight, 16) // 16)], in_flight)
        count = sum(map(len, tokens_of(served)))
        levels.append({"in_flight": in_flight, "tok_s": count / (time.perf_counter() - started)} | figures(served))
    per_second = tok_s * len(jobs) / sum(params.gen_length for _, params in jobs)
    for load in (0.8,) if quick else (0.2, 0.4, 0.6, 0.8, 0.95):
        rates.append({"rate": load * per_second} | figures(serve(small_engine(model), jobs, rate=load * per_second)))
    for point in (*levels, *rates):
        where = f"{point['in_flight']} in flight" if "in_flight" in point else f"{point['rate']:.2f} per second"
        spread = ", ".join(f"{name[:-3]} {point[name]['p50']:.0f}/{point[name]['p99']:.0f} ms" for name in at_16)
        print(f"{where:>16s}: p50/p99 {spread}")
    host = {rows: host_cost(rows) for rows in (4, 16, 64, 256)}
    print("engine itself, us per step and row: " + ", ".join(f"{us:.0f} at {rows} rows" for rows, us in host.items()))
    return {
        "speedup_vs_serial": tok_s / serial_tok_s, "speedup_vs_diffusers": batch_tok_s / diffusers_tok_s,
        "p99_inter_block_ms": at_16["inter_block_ms"]["p99"], "scheduler_us_per_row": host[64],
        "leaked_pages": engine.cache.num_pages - engine.cache.num_free,
        "tok_s": tok_s, "serial_tok_s": serial_tok_s, "diffusers_tok_s": diffusers_tok_s, "requests": len(jobs),
        "at_16": at_16, "in_flight": levels, "rates": rates, "scheduler_us_per_row_at": host,
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_options(parser)
    add = parser.add_argument
    add("--num-prompts", type=positive, metavar="N", help="requests per round (64, with --quick 16)")
    add("--num-rounds", type=positive, metavar="N", help="timed rounds (3, with --quick 1)")
    add("--max-concurrency", type=positive, default=16, metavar="N", help="requests in flight at most (16)")
    add("--request-rate", type=float, metavar="R", help="arrivals per second, inf: all at once; else as others end")
    harness.add_plot_option(parser, "the distribution of the latencies")
    add("--peers", action="store_true", help="against the same requests one by one and diffusers, random network")
    args = parser.parse_args(argv)
    harness.check_save(parser, args, "engine" if args.peers else "throughput")
    if args.peers:
        harness.finish("engine", args, against_peers(args.quick))
        return
    if args.request_rate is not None and not args.request_rate > 0:
        parser.error(f"--request-rate {args.request_rate}: expected a number above 0, or inf")
    size, rounds = args.num_prompts or (16 if args.quick else 64), args.num_rounds or (1 if args.quick else 3)
    work = Workload.of(args, 1 + rounds, size)
    params = options.params(work.decoding)
    warm_up, *batches = [[(prompt, params) for prompt in batch] for batch in work.batches]
    engine = new_engine(work, args.max_concurrency)
    share = check(work, serve(engine, warm_up, args.max_concurrency), warm_up)
    figures = []
    for jobs in batches:
        started = time.perf_counter()
        served = serve(engine, jobs, args.max_concurrency, args.request_rate)
        figures.append((summary(served, time.perf_counter() - started), served))
    figures.sort(key=lambda round: round[0]["output_throughput"])
    results, served = figures[len(figures) // 2]
    print(
        f"{results['completed']} requests, {results['failed']} failed: {results['output_throughput']:.1f} tokens/s, "
        f"{results['request_throughput']:.2f} requests/s, TPF {results['tokens_per_forward']:.2f}, "
        f"{results['steps_per_block']:.2f} steps per block"
    )
    latencies.print_latencies(results)
    if args.plot:
        latencies.plot(finished(served), args.plot)
    rate = "inf" if args.request_rate == math.inf else args.request_rate  # JSON has no such number
    head = {
        "max_concurrency": args.max_concurrency, "request_rate": rate, "equal_tokens": share,
        "output_throughput_rounds": [round["output_throughput"] for round, _ in figures],
    }  # fmt: skip
    harness.finish("throughput", args, work.facts | head | results, work.model.device)


if __name__ == "__main__":
    main()
