"""What can be tuned in the expert products, and what comes of it: `python -m benchmarks.tune --ops moe`.

One MoE layer of the true shape with random weights, in bf16 and, where the GPU has it, in fp8. For every number of
tokens, type and tile height, gate_up and down are timed on their own over all tile widths, warps and stages, in bf16
over steps through K as well; the height at which both together save most is kept. Outputs must have the bits that the
defaults give, whatever the tiles: that makes a token's bits independent of its batch, by which tiles are chosen.
"""

import itertools
from functools import lru_cache, partial

import torch

from llada2_fast.kernels import fp8, router
from llada2_fast.kernels.gemm import QuantTensor, gemm, tiles

from .cases import Case, Group, concluded, every, fp8_products, gains

# Decode's, the telling first: blocks of 1, 8 and 32 rows with those carried along, and of 1 and 32 without; prefill's.
TOKENS = (64, 32, 320, 1280, 1024, 4096)
HEIGHTS = (16, 32, 64, 128)
PRODUCTS = ("gate_up", "down")
WIDE = every(tile_n=(128,), num_warps=(4, 8), num_stages=(3, 4, 2, 5, 6))
FP8_TRIES = {"gate_up": WIDE, "down": every(tile_n=(64,), num_warps=(4, 8), num_stages=(4, 3, 2, 5, 6)) + WIDE}
DEEP = every(tile_k=(128,), tile_n=(64, 128), num_warps=(4, 8), num_stages=(3, 2, 4))
TRIES = {"bf16": {product: FP8_TRIES["down"] + DEEP for product in PRODUCTS}, "fp8": FP8_TRIES}


@lru_cache(maxsize=2)  # gigabytes, and the next groups want the same two
def layer(machine, model, kind):
    """(router weight, (gate_up, down), the same of the shared expert), random, weights QuantTensor."""
    c = machine.config(model)
    hidden, inner = c.hidden_size, c.moe_intermediate_size

    def random(*shape):
        return machine.random(*shape, std=shape[-1] ** -0.5)

    machine.require_memory(3 * c.num_experts * hidden * inner * machine.dtype.itemsize * 2, "a layer's experts")
    gate = random(c.num_experts, hidden)
    weights = random(c.num_experts, 2 * inner, hidden), random(c.num_experts, hidden, inner)
    if kind == "fp8":
        weights = [fp8.quantize_weight(weight, parts) for weight, parts in zip(weights, (2, 1), strict=True)]
        return gate, weights, [QuantTensor(weight.values[0], weight.scale[0]) for weight in weights]
    return gate, [QuantTensor(weight) for weight in weights], [QuantTensor(weight[0]) for weight in weights]


def _product(machine, model, kind, tokens, tile_m, product):
    c, i, tokens = machine.config(model), PRODUCTS.index(product), machine.size(tokens, 32)
    gate, weights, shared = layer(machine, model, kind)
    h = machine.random(tokens, c.hidden_size)
    x = h if i == 0 else machine.random(tokens * (c.num_experts_per_tok + 1), c.moe_intermediate_size)
    x = fp8.quantize(x) if kind == "fp8" else QuantTensor(x)
    rule = c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor
    defaults = _defaults(c.hidden_size, tokens, kind)
    bias = h.new_zeros(c.num_experts, dtype=torch.float32)
    routings = {height: router.route(h, gate, bias, *rule, tile_m=height) for height in {tile_m, defaults["tile_m"]}}

    def call(parameters):
        height = defaults["tile_m"] if parameters is None else tile_m
        parameters = parameters or defaults[product]
        out = gemm(x, weights[i], shared[i], routings[height], i == 0, h, height, **parameters)
        return [part for part in out if part is not None]

    return Case([call], [[call]])  # the layer's weights are far larger than a cache


def _defaults(hidden, tokens, kind):
    """Tiles for any device."""
    return tiles(torch.device("cpu"), hidden, tokens, kind == "fp8")


def _heights(config, tokens, default):
    """Tile heights worth trying, the default first: half to twice the pairs of an expert."""
    pairs = max(HEIGHTS[0] / 2, tokens * config.num_experts_per_tok / config.num_experts)
    return [default, *(height for height in HEIGHTS if pairs / 2 <= height <= 2 * pairs and height != default)]


def groups(machine, models=("mini",)):
    """By model and tokens, in bf16 and fp8 side by side."""
    found = []
    counts = TOKENS[: machine.size(len(TOKENS), 1)]
    for model, tokens, kind in itertools.product(models, counts, TRIES if fp8_products(machine) else ("bf16",)):
        config = machine.config(model)
        heights = _heights(config, tokens, _defaults(config.hidden_size, tokens, kind)["tile_m"])
        for tile_m, product in itertools.product(heights[: machine.size(len(HEIGHTS), 1)], PRODUCTS):
            name = f"moe {model} {kind} m{tokens} tile_m {tile_m} {product}"
            shape = {"hidden": config.hidden_size, "tokens": tokens, "tile_m": tile_m, "kind": kind}
            build = partial(_product, model=model, kind=kind, tokens=tokens, tile_m=tile_m, product=product)
            found.append(Group(name, "moe", shape, product, TRIES[kind][product], build))
    return found


def entries(groups, lines, device):
    """Entries of the table, each of one kind at one number of tokens of which something was measured.

    Where nothing gains it holds the defaults, for an entry measured at more tokens would be taken instead.
    """
    measured = {}
    for group in groups:
        line = lines.get(group.name, {})
        if concluded(line):
            hidden, tokens, tile_m, kind = group.shape.values()
            heights = measured.setdefault((hidden, tokens, kind), {})
            heights.setdefault(tile_m, {})[group.part] = line
    return [
        {"device": device, "hidden": hidden, "tokens": tokens, kind: _best(_defaults(hidden, tokens, kind), heights)}
        for (hidden, tokens, kind), heights in measured.items()
    ]


def _best(defaults, heights):
    """{"tile_m", "gate_up", "down"} of the height that saves most time; the defaults if none saves more than noise.

    heights: {tile_m: {product: line}}. At the defaults' own height a product may keep its defaults.
    """
    most, found = 0.0, defaults
    for tile_m, lines in heights.items():
        lines = {product: line for product, line in lines.items() if "fastest" in line}
        if tile_m == defaults["tile_m"]:
            lines = {product: line for product, line in lines.items() if gains(line)}
        elif len(lines) < len(PRODUCTS):
            continue
        default_us = sum(line["default_us"][0] for line in lines.values())
        saved = default_us - sum(line["default_us"][0] * line["share"] for line in lines.values())
        noise = max((line["noise"] for line in lines.values()), default=0) if tile_m != defaults["tile_m"] else 0
        if saved > max(most, noise * default_us):
            most = saved
            found = defaults | {"tile_m": tile_m} | {product: line["fastest"] for product, line in lines.items()}
    return found
