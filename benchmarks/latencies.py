"""What requests that come block by block waited for: the names and meanings of `vllm bench`, a table, a picture.

ttft: until the first block; itl: from block to block; tpot: (e2el - ttft) / (tokens - 1); e2el: the whole request. An
answer whose tokens came all at once, those of one block, has no tpot.
"""

from itertools import pairwise

from . import harness

NAMES = {
    "ttft_ms": "first block, ms",
    "itl_ms": "each next block, ms",
    "tpot_ms": "token after the first, ms",
    "e2el_ms": "whole request, ms",
}


def latencies(done):
    """{name: seconds} of ttft, tpot, itl, e2el, as lists; tpot of the requests with tokens at several times.

    done: requests that did not fail, each with `commits`, when tokens came, and `seconds`, when it ended, both in
    seconds since its arrival, and `num_tokens`.
    """
    several = [one for one in done if len(one.commits) > 1 and one.num_tokens > 1]
    return {
        "ttft": [at for one in done for at in one.commits[:1]],
        "tpot": [(one.seconds - one.commits[0]) / (one.num_tokens - 1) for one in several],
        "itl": [b - a for one in done for a, b in pairwise(one.commits)],
        "e2el": [one.seconds for one in done],
    }


def figures(done):
    """The distributions of `latencies`, as they stand in the JSON line, and `tpot_left_out`, how many have no tpot."""
    times, found = latencies(done), {}
    for name, values in times.items():
        found |= harness.spread(f"{name}_ms", [1e3 * value for value in values])
    return found | {"tpot_left_out": len(done) - len(times["tpot"])}


def print_table(results, names):
    """Median, 10th and 90th percentile of the figures whose keys are in `names` (key -> what to call it)."""
    print(f"{'':24}{'median':>10}{'p10':>10}{'p90':>10}")
    for key, name in names.items():
        row = [results[f"{which}_{key}"] for which in ("median", "p10", "p90")]
        print(f"{name:24}" + "".join(f"{'-' if x is None else format(x, '.2f'):>10}" for x in row))


def print_latencies(results, more=None):
    """The table of `figures`, and whom it leaves out. more: further keys, as NAMES has them."""
    print_table(results, NAMES | (more or {}))
    if results["tpot_left_out"]:
        print(f"{NAMES['tpot_ms']}: without {results['tpot_left_out']} answers that came at once")


def plot(done, file):
    """How the requests' latencies are distributed: the share that has waited at most so long."""
    with harness.drawing(file, figsize=(7, 4.5)) as axes:
        for name, values in latencies(done).items():
            if values:
                axes.ecdf([1e3 * value for value in values], label=name)
        axes.set(xlabel="ms", ylabel="share", xscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
