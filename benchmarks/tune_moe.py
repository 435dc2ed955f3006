"""Finds the fastest tiles of the expert products on this GPU and writes them to kernels/moe_tuned.json.

    python -m benchmarks.tune_moe [--models mini,flash] [--tokens 32,64,...] [--quick] [--json] [--save]

One MoE layer of the true shape with random weights, in bf16 and, where the GPU has it, in fp8. For every number of
tokens and every tile height, gate_up and down are timed on their own over all tile widths, warps and stages; the
fastest pair is kept. Gate: all outputs for the same tokens must have the same bits, whatever the tiles, for that makes
a token's bits independent of its batch; what differs is named and left out. Exits 2 without a GPU.
"""

import argparse
import itertools
import json
import sys
from functools import partial

import torch
import triton

from llada2_fast.kernels import fp8, router
from llada2_fast.kernels.gemm import TUNED, Scaled, gemm

from .harness import add_options, finish
from .roofline import MODELS

TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TILE_M, TILE_N, WARPS, STAGES = (16, 32, 64, 128), (64, 128), (4, 8), (2, 3, 4, 5, 6)


def candidates(quick, widths=TILE_N):
    """Tiles of one product to try."""
    sizes = itertools.product(widths, WARPS, (3, 4) if quick else STAGES)
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


def fastest(product, tries, expected):
    """(µs, tiles) of the fastest of `tries` that runs and gives the bits in `expected`, which the first fills."""
    found = None
    for tiles in tries:
        try:
            out = product(**tiles).values.view(torch.uint8)  # float8 cannot be compared
            us = time_us(lambda tiles=tiles: product(**tiles))
        except triton.runtime.errors.OutOfResources:  # too much shared memory: not a candidate on this GPU
            continue
        if not expected:
            expected.append(out)
        if not torch.equal(out, expected[0]):
            print(f"  left out, other bits: {tiles}")
        elif found is None or us < found[0]:
            found = us, tiles
    return found


class Layer:
    """One MoE layer of a model's shape with random weights, in bfloat16 or float8."""

    def __init__(self, config):
        self.config, hidden, inner = config, config.hidden_size, config.moe_intermediate_size
        experts = config.num_experts
        self.gate = _random(experts, hidden)
        self.weights = Scaled(_random(experts, 2 * inner, hidden)), Scaled(_random(experts, hidden, inner))
        self.shared = tuple(Scaled(weight.values[0]) for weight in self.weights)

    def quantize(self):
        self.weights = tuple(
            fp8.quantize_weight(weight.values, parts) for weight, parts in zip(self.weights, (2, 1), strict=True)
        )
        self.shared = tuple(Scaled(weight.values[0], weight.scale[0]) for weight in self.weights)

    def tune(self, tokens, tile_m, quick, bits):
        """((µs, tiles) of gate_up, the same of down); None if one of them has none."""
        c, float8 = self.config, self.weights[0].scale is not None
        h = _random(tokens, c.hidden_size, seed=1) * c.hidden_size**0.5
        inner = _random(tokens * (c.num_experts_per_tok + 1), c.moe_intermediate_size, seed=2)
        rule = c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor
        routing = router.route(h, self.gate, h.new_zeros(c.num_experts, dtype=torch.float32), *rule, tile_m=tile_m)
        found = []
        for i, x in enumerate((h, inner)):
            x = fp8.quantize(x) if float8 else Scaled(x)
            product = partial(gemm, x, self.weights[i], self.shared[i], routing, i == 0, h, tile_m)
            found.append(fastest(product, candidates(quick, (128,) if float8 and i == 0 else TILE_N), bits[i]))
        return found if all(found) else None


def _random(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) / shape[-1] ** 0.5


def tune(config, counts, quick):
    """Table entries for one model on this GPU, and what they took in µs: {"<tokens> bf16" or fp8: µs}."""
    layer, entries, times = Layer(config), {}, {}
    float8 = torch.cuda.get_device_capability() >= fp8.CAPABILITY
    for kind in ("bf16", "fp8") if float8 else ("bf16",):
        if kind == "fp8":
            layer.quantize()
        for tokens in counts:
            limit = max(TILE_M[0], 2 * tokens * config.num_experts_per_tok // config.num_experts)
            # taller than twice the pairs of an expert, most rows would be empty; float8 keeps the height of bf16
            heights = [size for size in TILE_M if size <= limit] if kind == "bf16" else [entries[tokens]["tile_m"]]
            bits, best = ([], []), None
            for tile_m in heights:
                found = layer.tune(tokens, tile_m, quick, bits)
                if found and (best is None or found[0][0] + found[1][0] < best[0]):
                    best = found[0][0] + found[1][0], tile_m, {"gate_up": found[0][1], "down": found[1][1]}
            us, tile_m, products = best
            print(f"{kind} {tokens:5} tokens: {us:8.1f} us, tile_m {tile_m}, {products}", flush=True)
            head = {"device": torch.cuda.get_device_name(), "hidden": config.hidden_size, "tokens": tokens}
            entries.setdefault(tokens, head | {"tile_m": tile_m})[kind] = products
            times[f"{tokens} {kind}"] = round(us, 1)
    return list(entries.values()), times


def write_table(new, path=TUNED):
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
    finish("tune_moe", options, results, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
