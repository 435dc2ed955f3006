"""Finds the fastest tiles of the expert products on this GPU and writes them to kernels/moe_tuned.json.

    python -m benchmarks.tune_moe [--models mini,flash] [--tokens 32,64,...] [--quick] [--json] [--save]

One MoE layer of the true shape with random weights. For every number of tokens and every tile height, gate_up and down
are timed on their own over all tile widths, warps and stages; the fastest pair is kept. Gate: all outputs for the same
tokens must have the same bits, whatever the tiles, for that makes a token's bits independent of its batch; what differs
is named and left out. Exits 2 without a GPU.
"""

import argparse
import itertools
import json
import sys

import torch
import triton

from benchmarks.harness import add_options, finish
from benchmarks.roofline import MODELS
from llada2_fast.kernels import gemm, router

TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TILE_M, TILE_N, WARPS, STAGES = (16, 32, 64, 128), (64, 128), (4, 8), (2, 3, 4, 5, 6)


def candidates(quick):
    """Tiles of one product to try."""
    sizes = itertools.product((64, 128), (4, 8), (3, 4)) if quick else itertools.product(TILE_N, WARPS, STAGES)
    return [dict(zip(("tile_n", "num_warps", "num_stages"), size, strict=True)) for size in sizes]


def time_us(call, rounds=20):
    """Median time of one call, from CUDA events around replays of a graph that holds it."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events))
    return times[len(times) // 2]


def fastest(x, weight, shared, routing, gated, tries, expected):
    """(µs, tiles) of the fastest of `tries` that runs and gives the bits in `expected`, or the first's if it is empty."""
    found = None
    for tiles in tries:
        try:
            out = gemm.expert_gemm(x, weight, shared, routing, gated, **tiles)
            us = time_us(lambda tiles=tiles: gemm.expert_gemm(x, weight, shared, routing, gated, **tiles))
        except triton.runtime.errors.OutOfResources:  # too much shared memory: not a candidate on this GPU
            continue
        if not expected:
            expected.append(out)
        if not torch.equal(out, expected[0]):
            print(f"  left out, other bits: tile_m {routing.tile_m}, {tiles}")
        elif found is None or us < found[0]:
            found = us, tiles
    return found


def tune(config, counts, quick):
    """Table entries for one model on this GPU, and what they took in µs."""
    hidden, inner, experts, top_k = (
        config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok,
    )  # fmt: skip

    def random(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda") / shape[-1] ** 0.5

    gate_up, down, gate = random(experts, 2 * inner, hidden), random(experts, hidden, inner), random(experts, hidden)
    shared, bias = (random(2 * inner, hidden), random(hidden, inner)), torch.zeros(experts, device="cuda")
    entries, times = [], {}
    for tokens in counts:
        h, inside = random(tokens, hidden) * hidden**0.5, random(tokens * (top_k + 1), inner)
        best, bits = None, ([], [])
        for tile_m in TILE_M if not quick else TILE_M[:3]:
            if tile_m > max(TILE_M[0], 2 * tokens * top_k // experts):
                continue  # taller than twice the pairs of an expert: most rows would be empty
            routing = router.route(h, gate, bias, top_k, config.n_group, config.topk_group, 2.5, tile_m=tile_m)
            first = fastest(h, gate_up, shared[0], routing, True, candidates(quick), bits[0])
            second = fastest(inside, down, shared[1], routing, False, candidates(quick), bits[1])
            if first and second and (best is None or first[0] + second[0] < best[0] + best[1]):
                best = first[0], second[0], tile_m, first[1], second[1]
        us = best[0] + best[1]
        touched = routing.ids.unique().numel() + 1
        rate = touched * 3 * hidden * inner * 2 / us / 1e3
        print(f"{tokens:5} tokens: {best[0]:8.1f} + {best[1]:7.1f} us, {rate:7.0f} GB/s, tile_m {best[2]}", flush=True)
        name = torch.cuda.get_device_name()
        entry = {"device": name, "hidden": hidden, "tokens": tokens, "tile_m": best[2]}
        entries.append(entry | {"gate_up": best[3], "down": best[4]})
        times[tokens] = round(us, 1)
    return entries, times


def write_table(new, path=gemm.TUNED):
    """Put entries into the table, in place of those for the same device, hidden size and tokens."""

    def key(entry):
        return entry["device"], entry["hidden"], entry["tokens"]

    table = {key(entry): entry for entry in json.loads(path.read_text("utf-8"))} | {key(entry): entry for entry in new}
    lines = [json.dumps(table[name]) for name in sorted(table)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="mini,flash", help="comma-separated (default: %(default)s)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated (default: %(default)s)")
    add_options(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune_moe: needs a CUDA device, found none", file=sys.stderr)
        return 2
    results = {}
    for name in options.models.split(","):
        print(f"{name} on {torch.cuda.get_device_name()}")
        entries, results[f"{name}_us"] = tune(MODELS[name], [int(n) for n in options.tokens.split(",")], options.quick)
        write_table(entries)
    finish("tune_moe", results, options, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
