"""How long one batch takes through generate(), step by step.

    llada2-fast bench latency [--batch-size N] [--input-len N] [--gen-length N] [--model PATH_OR_ID]
                              [--quick] [--json] [--save [FOLDER]] [--plot FILE]

First the gate: the batch must give its first row the tokens that it gets alone and without cache. Then iterations on
new prompts each, after a warm-up. ttft: from the call to the end of a row's first block, when its first tokens are
final; itl: from the end of a block to that of the next, per row; e2el: the whole call; forward: from step to step,
without the first, which holds the prefill. Key names are those of `vllm bench`.
"""

import argparse
import time
from itertools import pairwise, zip_longest
from typing import NamedTuple

from llada2_fast.generate import GenerateOutput

from . import harness
from .harness import positive, spread
from .latencies import print_table
from .workload import Workload, add_options, require_equal

NAMES = {
    "e2el_ms": "whole call, ms",
    "ttft_ms": "first block, ms",
    "itl_ms": "each next block, ms",
    "forward_ms": "forward, ms",
    "output_throughput": "tokens/s",
}


class Iteration(NamedTuple):
    """A call of generate() and when, in seconds since, what had ended: its steps, and the blocks of each row."""

    output: GenerateOutput
    seconds: float
    steps: list[float]
    blocks: list[list[float]]


def iterate(model, prompts, decoding):
    """One call of generate() with a clock in it."""
    steps, blocks, started = [], [[] for _ in prompts], time.perf_counter()

    def on_step(decoder, _):
        steps.append(time.perf_counter() - started)
        for row, ends in zip(decoder.sequences, blocks, strict=True):
            if row.block_ended and len(ends) < len(row.counters.forwards_per_block):
                ends.append(steps[-1])

    output = model.generate(prompts, return_dict=True, on_step=on_step, **decoding)
    return Iteration(output, time.perf_counter() - started, steps, blocks)


def check(work, batch):
    """The gate: the share of the first row's tokens that it gets alone and without cache, too."""
    output = iterate(work.model, batch, work.decoding).output
    eager = work.decoding | {"graphs": False, "use_cache": False}
    alone = work.model.generate(batch[:1], **eager)[0].tolist()
    return require_equal(
        [output.sequences[0, : output.num_tokens[0]].tolist()], [alone],
        "first row of the batch against the row alone, without cache", work.model.dtype,
    )  # fmt: skip


def summary(iterations):
    """What the iterations say, as it stands in the JSON line; times in ms."""
    rows = [[1e3 * end for end in ends] for iteration in iterations for ends in iteration.blocks]
    counters = [counters for iteration in iterations for counters in iteration.output.counters]
    tokens = [sum(iteration.output.num_tokens) for iteration in iterations]
    forwards = sum(c.denoise_forwards for c in counters)
    lengths = [[b - a for a, b in pairwise((0.0, *ends))] for ends in rows]
    at = [[ms for ms in place if ms is not None] for place in zip_longest(*lengths)]
    return {
        **spread("e2el_ms", [1e3 * iteration.seconds for iteration in iterations]),
        **spread("ttft_ms", [ends[0] for ends in lengths]),
        **spread("itl_ms", [ms for ends in lengths for ms in ends[1:]]),
        **spread("forward_ms", [1e3 * (b - a) for i in iterations for a, b in pairwise(i.steps)]),
        **spread("output_throughput", [n / i.seconds for n, i in zip(tokens, iterations, strict=True)]),
        "total_output_tokens": sum(tokens),
        "forwards": sum(len(iteration.steps) for iteration in iterations),
        "tokens_per_forward": sum(tokens) / forwards,
        "steps_per_block": forwards / sum(len(c.forwards_per_block) for c in counters),
        "block_ms_by_position": [spread("ms", place) | {"blocks": len(place)} for place in at],
    }


def plot(results, file):
    """Time of a block by its place in the answer: the median, and from the 10th to the 90th percentile."""
    blocks = results["block_ms_by_position"]
    low, middle, high = ([block[f"{key}_ms"] for block in blocks] for key in ("p10", "median", "p90"))
    with harness.drawing(file, figsize=(7, 4.5)) as axes:
        axes.plot(middle, "o-", label="median")
        axes.fill_between(range(len(blocks)), low, high, alpha=0.25, label="p10 to p90")
        axes.set(xlabel="block of the answer", ylabel="ms", ylim=(0, None), title=f"batch {results['batch_size']}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="prompts per call (1)")
    parser.add_argument("--num-iters", type=positive, metavar="N", help="timed calls (10, with --quick 3)")
    harness.add_plot_option(parser, "the time of each block of an answer")
    args = parser.parse_args(argv)
    harness.check_save(parser, args, "latency")
    count = args.num_iters or (3 if args.quick else 10)
    work = Workload.of(args, 2 + count, args.batch_size)
    if args.graphs:
        work.decoding["graphs"] = True
    share = check(work, work.batches[0])
    iterate(work.model, work.batches[1], work.decoding)
    iterations = [iterate(work.model, batch, work.decoding) for batch in work.batches[2:]]
    results = {"batch_size": args.batch_size, "iterations": count, "equal_tokens": share} | summary(iterations)
    print_table(results, NAMES)
    print(
        f"{results['total_output_tokens']} tokens in {results['forwards']} forwards of batch {args.batch_size}: "
        f"TPF {results['tokens_per_forward']:.2f}, {results['steps_per_block']:.2f} steps per block"
    )
    if args.plot:
        plot(results, args.plot)
    harness.finish("latency", args, work.facts | results, work.model.device)


if __name__ == "__main__":
    main()
