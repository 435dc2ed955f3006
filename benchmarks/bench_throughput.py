"""Many requests through the engine: tokens per second, and how long a request waits for what.

    llada2-fast bench throughput [--num-prompts N] [--max-concurrency N] [--request-rate R] [--input-len N]
                                 [--model PATH_OR_ID] [--quick] [--json] [--save [FOLDER]] [--plot FILE]

First the gate: what the engine gives the first requests, all of the warm-up in flight, must be what generate() gives
each of them alone. Then rounds of new prompts each through the same engine; the figures are those of the round with the
median throughput. Without --request-rate a request is sent as soon as another has ended, with it they arrive as a
Poisson process and wait for their turn. Key names and meanings are those of `vllm bench`, tokens arrive block by block:
ttft: until the first block; itl: from block to block; tpot: (e2el - ttft) / (tokens - 1); e2el: the whole request.
"""

import argparse
import random
import time
from itertools import pairwise
from typing import NamedTuple

from llada2_fast.cli import options
from llada2_fast.config import EngineConfig
from llada2_fast.engine import Engine, Event

from . import harness
from .workload import Workload, add_options, positive, print_table, require_equal

NAMES = {
    "ttft_ms": "first block, ms",
    "itl_ms": "each next block, ms",
    "tpot_ms": "token after the first, ms",
    "e2el_ms": "whole request, ms",
}
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
    def seconds(self):
        return self.events[-1].time - self.arrived


def serve(engine, jobs, in_flight=None, rate=None):
    """Run (prompt, DecodeParams) pairs, `in_flight` at a time or arriving at `rate` per second; a list of Served.

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


def latencies(served):
    """{name: seconds} of the requests that did not fail: ttft, tpot, itl, e2el, as lists."""
    done = [one for one in served if one.output.error is None]
    several = [one for one in done if len(one.output.token_ids) > 1]
    return {
        "ttft": [at for one in done for at in one.commits[:1]],
        "tpot": [(one.seconds - one.commits[0]) / (len(one.output.token_ids) - 1) for one in several],
        "itl": [b - a for one in done for a, b in pairwise(one.commits)],
        "e2el": [one.seconds for one in done],
    }


def summary(served, seconds):
    """What a round of so many seconds says, as it stands in the JSON line."""
    outputs = [one.output for one in served]
    done = [output for output in outputs if output.error is None]
    tokens, forwards = sum(len(o.token_ids) for o in done), sum(o.counters.denoise_forwards for o in done)
    blocks = sum(len(o.counters.forwards_per_block) for o in done)
    figures = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(outputs) - len(done),
        "total_input_tokens": sum(output.prompt_length for output in done),
        "total_output_tokens": tokens,
        "request_throughput": len(done) / seconds,
        "output_throughput": tokens / seconds,
        "tokens_per_forward": tokens / max(1, forwards),
        "steps_per_block": forwards / max(1, blocks),
        "shared_tokens": sum(output.shared_tokens for output in done),
    }
    for name, values in latencies(served).items():
        figures |= harness.spread(f"{name}_ms", [1e3 * value for value in values])
    return figures


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


def plot(served, file):
    """How the requests' latencies are distributed: the share that has waited at most so long."""
    with harness.drawing(file, figsize=(7, 4.5)) as axes:
        for name, values in latencies(served).items():
            if values:
                axes.ecdf([1e3 * value for value in values], label=name)
        axes.set(xlabel="ms", ylabel="share", xscale="log")
        axes.legend()
        axes.grid(alpha=0.3)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_options(parser)
    add = parser.add_argument
    add("--num-prompts", type=positive, metavar="N", help="requests per round (64, with --quick 16)")
    add("--num-rounds", type=positive, metavar="N", help="timed rounds (3, with --quick 1)")
    add("--max-concurrency", type=positive, default=16, metavar="N", help="requests in flight at most (16)")
    add("--request-rate", type=float, metavar="R", help="arrivals per second; else as fast as others end")
    harness.add_plot_option(parser, "the distribution of the latencies")
    args = parser.parse_args(argv)
    if args.request_rate is not None and not 0 < args.request_rate < float("inf"):
        parser.error(f"--request-rate {args.request_rate}: expected a number above 0")
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
    print_table(results, NAMES)
    if args.plot:
        plot(served, args.plot)
    head = {
        "max_concurrency": args.max_concurrency, "request_rate": args.request_rate, "equal_tokens": share,
        "output_throughput_rounds": [round["output_throughput"] for round, _ in figures],
    }  # fmt: skip
    harness.finish("throughput", args, work.facts | head | results, work.model.device)


if __name__ == "__main__":
    main()
