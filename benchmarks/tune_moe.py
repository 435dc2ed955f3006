"""What can be tuned in the expert products, and what comes of it: `python -m benchmarks.tune_moe` is tune --ops moe.

One MoE layer of the true shape with random weights, in bf16 and, where the GPU has it, in fp8. For every number of
tokens and every tile height, gate_up and down are timed on their own over all tile widths, warps and stages; the height
at which both types together gain most over the defaults is kept. Outputs must have the bits that the defaults give,
whatever the tiles: that makes a token's bits independent of its batch, by which tiles are chosen.
"""

import sys
from functools import lru_cache, partial

import torch

from llada2_fast.kernels import fp8, router
from llada2_fast.kernels.gemm import Scaled, gemm, tiles

from .tune_cases import Case, Group, every

TOKENS = (32, 256, 64, 1024, 128, 512, 4096, 2048)  # the telling ones first
HEIGHTS = (16, 32, 64, 128)
PRODUCTS = ("gate_up", "down")
WIDE = every(tile_n=(128,), num_warps=(4, 8), num_stages=(3, 4, 2, 5, 6))
TRIES = every(tile_n=(64,), num_warps=(4, 8), num_stages=(4, 3, 2, 5, 6)) + WIDE


@lru_cache(maxsize=1)  # gigabytes, and the next group wants the same
def layer(machine, model, kind):
    """(router weight, (gate_up, down), the same of the shared expert), random, weights Scaled."""
    c = machine.config(model)
    hidden, inner = c.hidden_size, c.moe_intermediate_size

    def random(*shape):
        return machine.random(*shape, std=shape[-1] ** -0.5)

    gate = random(c.num_experts, hidden)
    weights = random(c.num_experts, 2 * inner, hidden), random(c.num_experts, hidden, inner)
    if kind == "fp8":
        weights = [fp8.quantize_weight(weight, parts) for weight, parts in zip(weights, (2, 1), strict=True)]
        return gate, weights, [Scaled(weight.values[0], weight.scale[0]) for weight in weights]
    return gate, [Scaled(weight) for weight in weights], [Scaled(weight[0]) for weight in weights]


def _product(machine, model, kind, tokens, tile_m, product):
    c, i = machine.config(model), PRODUCTS.index(product)
    gate, weights, shared = layer(machine, model, kind)
    h = machine.random(tokens, c.hidden_size)
    x = h if i == 0 else machine.random(tokens * (c.num_experts_per_tok + 1), c.moe_intermediate_size)
    x = fp8.quantize(x) if kind == "fp8" else Scaled(x)
    rule = c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor
    defaults = tiles(torch.device("cpu"), c.hidden_size, tokens)  # those for any device
    bias = h.new_zeros(c.num_experts, dtype=torch.float32)
    routings = {height: router.route(h, gate, bias, *rule, tile_m=height) for height in {tile_m, defaults["tile_m"]}}

    def call(parameters):
        height = defaults["tile_m"] if parameters is None else tile_m
        parameters = parameters or defaults[kind][product]
        out = gemm(x, weights[i], shared[i], routings[height], i == 0, h, height, **parameters)
        return [part for part in out if part is not None]

    return Case([call], [[call]])  # the layer's weights are far larger than a cache


def groups(machine):
    float8 = machine.dry or torch.cuda.get_device_capability() >= fp8.CAPABILITY
    found = []
    for model in ("mini",) if machine.dry else ("mini", "flash"):
        config = machine.config(model)
        for kind in ("bf16", "fp8") if float8 else ("bf16",):
            for tokens in TOKENS[:1] if machine.dry else TOKENS:
                shape = {"hidden": config.hidden_size, "tokens": tokens}
                limit = max(HEIGHTS[0], 2 * tokens * config.num_experts_per_tok // config.num_experts)
                # taller than twice the pairs of an expert, most rows would be empty
                for tile_m in [height for height in HEIGHTS if height <= limit][: machine.size(len(HEIGHTS), 1)]:
                    for product in PRODUCTS:
                        tries = WIDE if kind == "fp8" and product == "gate_up" else TRIES
                        name = f"moe {model} {kind} m{tokens} tile_m {tile_m} {product}"
                        build = partial(
                            _product, model=model, kind=kind, tokens=tokens, tile_m=tile_m, product=product
                        )  # fmt: skip
                        found.append(
                            Group(name, "moe", shape | {"tile_m": tile_m, "kind": kind}, product, tries, build)
                        )
    return found


def entries(groups, lines, device):
    """Entries of the table. A model's are for all TOKENS or none: those that gain nothing hold the defaults."""
    by_tokens = {}
    for group in groups:
        hidden, tokens, tile_m, kind = group.shape.values()
        heights = by_tokens.setdefault(hidden, {}).setdefault(tokens, {})
        heights.setdefault(tile_m, {}).setdefault(kind, {})[group.part] = lines.get(group.name, {})
    found = []
    for hidden, of_tokens in by_tokens.items():
        faster = {tokens: _fastest(heights) for tokens, heights in of_tokens.items()}
        for tokens in sorted(of_tokens) if any(faster.values()) else ():
            defaults = tiles(torch.device("cpu"), hidden, tokens)
            kinds = next(iter(of_tokens[tokens].values()))
            parameters = faster[tokens] or {name: defaults[name] for name in ("tile_m", *kinds)}
            found.append({"device": device, "hidden": hidden, "tokens": tokens} | parameters)
    return found


def _fastest(heights):
    """Parameters of the height that gains most, {} if none beats the defaults by more than the noise.

    heights: {tile_m: {kind: {product: line}}}. No kind may lose: a router has one height for both.
    """
    best, found = 1.0, {}
    for tile_m, kinds in heights.items():
        measured = [line for products in kinds.values() for line in products.values()]
        if not all("fastest" in line for line in measured):
            continue
        noise = max(line["noise"] for line in measured)
        shares = [
            sum(line["share"] * line["default_us"][0] for line in products.values())
            / sum(line["default_us"][0] for line in products.values())
            for products in kinds.values()
        ]
        mean = sum(shares) / len(shares)
        if max(shares) <= 1 + noise and mean < min(best, 1 - noise):
            best = mean
            found = {
                kind: {name: line["fastest"] for name, line in products.items()} for kind, products in kinds.items()
            }
            found = {"tile_m": tile_m} | found
    return found


def main(arguments=()):
    from .tune import main

    return main(["--ops", "moe", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
