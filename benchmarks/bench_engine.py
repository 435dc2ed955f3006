"""The batch engine: throughput and latency under load, against the same requests one by one and against diffusers.

    python -m benchmarks.bench_engine [--quick] [--json] [--save] [--plot FILE]

The small random network, float32, on as many threads as torch uses. Requests have prompts of 64 to 256 tokens and
answers of 64 to 192, quota decoding, 4 tokens a forward. Before anything is timed, all tokens of the engine must be
those of generate(), later also those of diffusers. Measured are: 16 requests in flight against generate() one by one;
requests of one prompt length against lock-step batches of diffusers' LLaDA2Pipeline, which drives the same network as
it drives any model; latencies at 1 to 64 in flight and at several arrival rates; and what the engine itself costs per
step and row, everything but forward and refinement.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy
import torch

from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.engine import Engine

from . import harness
from .bench_throughput import latencies, serve
from .models import SMALL, random_model
from .peers import BLOCK, Task, diffusers
from .simulate import Clock, StandIn

STEPS, IN_FLIGHT = 8, 16


def workload(count, seed=0):
    """[(prompt, DecodeParams)] without common prefixes."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(SMALL.vocab_size - 2) for _ in range(rng.choice((64, 128, 256)))],
            DecodeParams(gen_length=rng.choice((64, 128, 192)), block_length=BLOCK, steps=STEPS, threshold=2.0),
        )
        for _ in range(count)
    ]


def new_engine(model, running=IN_FLIGHT):
    return Engine(model, EngineConfig(max_num_seqs=running, cache_tokens=running * 512, enable_prefix_caching=False))


def one_by_one(model, jobs):
    """The tokens of each job by itself."""
    outputs = []
    for prompt, params in jobs:
        rules = dict(gen_length=params.gen_length, block_length=BLOCK, steps=STEPS, threshold=params.threshold)
        outputs.append(model.generate([prompt], **rules)[0].tolist())
    return outputs


def figures(served):
    """{name: {p50, p95, p99}} in ms: first block after arrival, between blocks, whole request."""
    seconds = latencies(served)
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
        kept["served"] = serve(new_engine(model), jobs, IN_FLIGHT)

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
    call = diffusers(model, Task(torch.tensor([prompt for prompt, _ in jobs]), longest, STEPS, threshold=2.0))
    kept = {}

    def lock_step():
        kept["theirs"] = call().sequences

    def together():
        kept["ours"] = tokens_of(serve(new_engine(model), jobs, IN_FLIGHT))

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


def plot(results, file):
    """Throughput and latency over requests in flight and over arrival rates, to an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    levels = results["in_flight"]
    axes[0].plot([level["in_flight"] for level in levels], [level["tok_s"] for level in levels], "o-", label="engine")
    axes[0].axhline(results["serial_tok_s"], color="gray", linestyle="--", label="one by one")
    axes[0].set(xlabel="requests in flight", ylabel="tokens/s", xscale="log", ylim=0)
    axes[0].legend()
    for axis, points, name, label in (
        (axes[1], levels, "in_flight", "requests in flight"),
        (axes[2], results["rates"], "rate", "arrivals per second"),
    ):
        for i, what in enumerate(("first_block_ms", "inter_block_ms", "request_ms")):
            for p, style in (("p50", "o-"), ("p99", "o:")):
                place, ms = [x[name] for x in points], [x[what][p] for x in points]
                axis.plot(place, ms, style, color=f"C{i}", label=f"{what[:-3]} {p}")
        axis.set(xlabel=label, ylabel="ms", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(file), dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    harness.add_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw throughput and latencies; needs llada2-fast[plot]")
    options = parser.parse_args(argv)
    model = random_model(SMALL)
    jobs = workload(32 if options.quick else 64)
    tok_s, serial_tok_s, at_16 = against_serial(model, jobs, 3)
    print(f"{IN_FLIGHT} in flight {tok_s:.0f} tok/s, one by one {serial_tok_s:.0f}: {tok_s / serial_tok_s:.2f}x")
    alike = [([*prompt[:64]], params) for prompt, params in jobs[:IN_FLIGHT]]
    if options.quick:
        alike = [(prompt, DecodeParams(**{**vars(params), "gen_length": 64})) for prompt, params in alike]
    batch_tok_s, diffusers_tok_s = against_diffusers(model, alike)
    print(f"diffusers in lock-step {diffusers_tok_s:.0f} tok/s, engine {batch_tok_s:.0f}")
    levels, rates, engine = [], [], None
    for in_flight in (1, 16) if options.quick else (1, 2, 4, 8, 16, 32, 64):
        engine, started = new_engine(model, in_flight), time.perf_counter()
        served = serve(engine, jobs[: max(8, len(jobs) * min(in_flight, 16) // 16)], in_flight)
        count = sum(map(len, tokens_of(served)))
        levels.append({"in_flight": in_flight, "tok_s": count / (time.perf_counter() - started)} | figures(served))
    per_second = tok_s * len(jobs) / sum(params.gen_length for _, params in jobs)
    for load in (0.8,) if options.quick else (0.2, 0.4, 0.6, 0.8, 0.95):
        rates.append({"rate": load * per_second} | figures(serve(new_engine(model), jobs, rate=load * per_second)))
    for point in (*levels, *rates):
        where = f"{point['in_flight']} in flight" if "in_flight" in point else f"{point['rate']:.2f} per second"
        spread = ", ".join(f"{name[:-3]} {point[name]['p50']:.0f}/{point[name]['p99']:.0f} ms" for name in at_16)
        print(f"{where:>16s}: p50/p99 {spread}")
    host = {rows: host_cost(rows) for rows in (4, 16, 64, 256)}
    print("engine itself, us per step and row: " + ", ".join(f"{us:.0f} at {rows} rows" for rows, us in host.items()))
    results = {
        "speedup_vs_serial": tok_s / serial_tok_s, "speedup_vs_diffusers": batch_tok_s / diffusers_tok_s,
        "p99_inter_block_ms": at_16["inter_block_ms"]["p99"], "scheduler_us_per_row": host[64],
        "leaked_pages": engine.cache.num_pages - engine.cache.num_free,
        "tok_s": tok_s, "serial_tok_s": serial_tok_s, "diffusers_tok_s": diffusers_tok_s, "requests": len(jobs),
        "at_16": at_16, "in_flight": levels, "rates": rates, "scheduler_us_per_row_at": host,
    }  # fmt: skip
    if options.plot:
        plot(results, options.plot)
    harness.finish("engine", options, results)


if __name__ == "__main__":
    main()
