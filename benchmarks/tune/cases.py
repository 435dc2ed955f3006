"""What can be tuned, and the inputs to try it on: groups of parameters by family of kernels.

attention   rows, warps and stages of the attention kernel, for each way in which a batch shares out its work; heads of
            mini and flash, one entry for all batches and prefixes
refine      warps, tiles per program and stages of the vocabulary pass; warps, values tried in a pass and stages of the
            filter pass; one entry for all batches
moe         tiles of the expert products in bf16, int4 and, where the GPU has it, fp8. For every number of tokens and
            tile height gate_up and down are timed on their own; the height at which both together save most is kept
dense       tiles of the products with one matrix, in fp8 and, for networks that are `exact`, in bf16

Tiles go by the number of tokens. Whatever they are, outputs must have the bits that the defaults give, so that a
token's bits do not depend on its batch.
"""

import copy
import itertools
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from llada2_fast.kernels import attention, dense, fp8, int4, refine, router
from llada2_fast.kernels._tuned import tried
from llada2_fast.kernels.gemm import QuantTensor, gemm, tiles

from ..gpu.gates import attention_case, refine_case
from ..roofline import BLOCK


class Case(NamedTuple):
    """Calls that take parameters, None for the defaults, and return tensors."""

    checks: list  # calls whose results are compared bit for bit
    timed: list  # per workload a list of calls that do the same on memory of their own


class Group(NamedTuple):
    """One kernel at one shape: `tries` are put into key `part` of the entry of `shape` in the table of `family`."""

    name: str
    family: str
    shape: dict
    part: str
    tries: list
    build: Callable  # machine -> Case
    defaults: dict | None = None  # what the entry holds where nothing gains; None: nothing


def gains(line):
    """Whether a group's line has parameters that beat the defaults by more than the noise."""
    return "share" in line and line["share"] < 1 - line["noise"]


def every(**values):
    """All combinations: a list of dicts."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


# Attention and the refinement step

_WIDE, _NARROW = {"TILE_M": (128,), "num_warps": (8,)}, {"TILE_M": (64,), "num_warps": (4,)}
ATTENTION = {  # by way
    "split": every(**_NARROW, num_stages=(4, 3, 5, 6, 8)),
    "whole": every(**_WIDE, num_stages=(4, 3, 5, 6, 8)) + every(**_NARROW, num_stages=(4, 3)),
}
VOCAB = every(SPAN=(1,), STAGES=(1,), num_warps=(8, 4, 16)) + every(SPAN=(2, 4), STAGES=(1, 2, 3), num_warps=(8, 4, 16))
FILTER = every(PIVOTS=(4, 8, 2), STAGES=(1, 2), num_warps=(8, 4, 16))
STEPS = {"split": ((1, 1024), (8, 1024), (8, 32768)), "whole": ((32, 1024), (32, 8192))}
MODES = ["greedy", "sampling", "filters", "greedy"]


def _attend(args, part, parameters):
    with tried("attention", {} if parameters is None else {part: parameters}):
        return [attention.block_attention(*args)]


def _attention(machine, config, part):
    """Checks: rows of mixed lengths, an empty prefix, an unused block, a row that ends within its last page; as many
    rows as are timed. Timed: rows and prefixes of STEPS."""

    def case(prefixes, **unused):
        q, k, v, blocks = attention_case(machine, prefixes, **unused)
        return machine.random(len(q), config.num_attention_heads, config.head_dim), k, v, blocks

    points = STEPS[part]
    prefixes = itertools.cycle(machine.size(prefix, 96) for prefix in (0, 1024, 5024, 9 * 1024))
    mixed = case(list(itertools.islice(prefixes, machine.size(points[0][0], 2) + 1)), unused=1)
    mixed[-1].limit[1] -= 5
    timed = []
    for rows, prefix in points[: machine.size(len(points), 2)]:
        q, k, v, blocks = case([machine.size(prefix, 64)] * machine.size(rows, 2))
        caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(machine.copies(k.nbytes + v.nbytes) - 1)]
        timed.append([partial(_attend, (q, *cache, blocks), part) for cache in caches])
    return Case([partial(_attend, mixed, part)], timed)


def _refine(case, part, filters, packed, parameters):
    """All that a step returns and changes. packed: as the decode loop calls it, else all positions and no index."""
    logits, state, params, ids = case
    state, index = copy.deepcopy(state), None
    if packed:
        logits, index = logits.flatten(0, 1), torch.arange(state.tokens.numel(), device=logits.device)
        index = index.view(state.tokens.shape)
    with tried("refine", {} if parameters is None else {part: parameters}):
        out = refine.launch(logits, state, params, ids, index, filters, packed)
    return [*out, *vars(state).values()]


def _step(case, part, filters, parameters):
    """A step that commits nothing and can be repeated; no copies beside it."""
    with tried("refine", {} if parameters is None else {part: parameters}):
        return [*refine.launch(*case, None, filters, False)]


def _refinement(machine, part, points):
    """Checks: rows of every mode in one batch that commits and edits, with and without rows that filter."""
    checks = []
    for modes in (MODES, MODES[:2])[: machine.size(2, 1)]:  # the interpreter is slow
        _, state, params, _ = case = refine_case(machine, modes * machine.size(4, 1))
        state.tokens[1::4, :16] = 7  # editable
        params.flags[1::4] |= refine.EDITING
        for threshold in (params.threshold, params.edit_threshold):
            threshold.fill_(0.5)
        params.min_transfer.fill_(3)
        checks += [
            partial(_refine, case, part, "filters" in modes, packed) for packed in (True, False)[: machine.size(2, 1)]
        ]
    timed = []
    for mode, rows in points[: machine.size(len(points), 1)]:
        logits, *rest = refine_case(machine, [mode] * machine.size(rows, 1))
        buffers = [logits] + [logits.clone() for _ in range(machine.copies(logits.nbytes) - 1)]
        timed.append([partial(_step, (x, *rest), part, mode == "filters") for x in buffers])
    return Case(checks, timed)


def attention_groups(machine, models=("mini",)):
    found = []
    for model in models:
        config = machine.config(model)
        shape = {
            "dtype": str(machine.dtype), "length": BLOCK, "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads, "dim": config.head_dim,
        }  # fmt: skip
        for part, tries in ATTENTION.items():
            build = partial(_attention, config=config, part=part)
            found.append(Group(f"attention {model} {part}", "attention", shape, part, tries, build))
    return found


def refine_groups(machine, models=("mini",)):
    shape = {"dtype": str(machine.dtype), "vocab": machine.config("mini").vocab_size}  # of all models
    vocab_points, filter_points = (("greedy", 1), ("sampling", 8), ("greedy", 32)), (("filters", 1), ("filters", 8))
    return [
        Group(f"refine {part}", "refine", shape, part, tries, partial(_refinement, part=part, points=points))
        for part, tries, points in (("vocab_pass", VOCAB, vocab_points), ("filter_pass", FILTER, filter_points))
    ]


# Products: of the experts, and of one fp8 matrix

# Decode's, the telling first: blocks of 1, 8 and 32 rows with those carried along, and of 1 and 32 without; prefill's.
TOKENS = (64, 32, 320, 1280, 1024, 4096)
HEIGHTS = (16, 32, 64, 128)
PRODUCTS = ("gate_up", "down")
WIDE = every(tile_n=(128,), num_warps=(4, 8), num_stages=(3, 4, 2, 5, 6))
_FP8 = {"gate_up": WIDE, "down": every(tile_n=(64,), num_warps=(4, 8), num_stages=(4, 3, 2, 5, 6)) + WIDE}
DEEP = every(tile_k=(128,), tile_n=(64, 128), num_warps=(4, 8), num_stages=(3, 2, 4))
EXPERT_TRIES = {  # of the experts
    "bf16": {product: _FP8["down"] + DEEP for product in PRODUCTS}, "fp8": _FP8,
    "int4": {product: _FP8["down"] for product in PRODUCTS},
}  # fmt: skip

# The matrices that decode multiplies, the telling first: logits are of 1, 8 and 32 rows.
MATRICES = (
    ("LM head", 1024), ("QKV", 64), ("dense", 64), ("LM head", 32), ("QKV", 1280), ("dense", 1280), ("LM head", 256),
    ("QKV", 320), ("dense", 320), ("QKV", 32), ("dense", 32),
    ("gate_up", 64), ("down", 64), ("gate_up", 1280), ("down", 1280),
)  # fmt: skip
FEW = 64  # tokens
# With few tokens a small matrix is too few programs to keep memory busy: lower tiles make more of them, more stages let
# each have more on its way. With many tokens wide tiles share what they load.
NARROW = every(tile_n=(64,), num_warps=(4, 8), num_stages=(4, 6, 8))
NARROW += every(tile_n=(128,), num_warps=(8,), num_stages=(4, 6))
LARGE = every(tile_n=(128,), num_warps=(8, 4), num_stages=(4, 3, 6))
LARGE += every(tile_n=(64,), num_warps=(4,), num_stages=(4, 6, 8))
GATED = every(tile_n=(128,), num_warps=(8, 4), num_stages=(3, 4, 5))
MANY = every(tile_m=(64,), tile_n=(64, 128), num_warps=(4, 8), num_stages=(4, 3, 2))
MANY += every(tile_m=(128,), tile_n=(64,), num_warps=(4, 8), num_stages=(4, 3, 2))
MANY += every(tile_m=(128,), tile_n=(128,), num_warps=(8, 16), num_stages=(4, 3, 2))  # this spills in four warps
# In bf16 a deeper tile is fewer waits, and there is room for high ones: no scales fill the registers.
TALL = every(tile_m=(128,), tile_n=(128,), tile_k=(64,), num_warps=(8,), num_stages=(3, 4))
TALL += every(tile_m=(256,), tile_n=(128,), tile_k=(64,), num_warps=(8,), num_stages=(2, 3, 4))
DEEPER = every(tile_n=(64,), tile_k=(128,), num_warps=(4,), num_stages=(2, 3, 4))
DEEPER_LARGE = every(tile_n=(128,), tile_k=(128,), num_warps=(4,), num_stages=(3, 4))


def fp8_products(machine):
    """Whether the machine multiplies fp8; in a dry run it does."""
    return machine.device.type != "cuda" or torch.cuda.get_device_capability() >= fp8.CAPABILITY


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
    elif kind == "int4":
        weights = [int4.quantize_weight(weight) for weight in weights]
    if kind != "bf16":
        return gate, weights, [QuantTensor(weight.values[0], weight.scale[0]) for weight in weights]
    return gate, [QuantTensor(weight) for weight in weights], [QuantTensor(weight[0]) for weight in weights]


def _product(*args, **parameters):
    return [part for part in gemm(*args, **parameters) if part is not None]


def _experts(machine, model, kind, tokens, tile_m, product):
    c, i, tokens = machine.config(model), PRODUCTS.index(product), machine.size(tokens, 32)
    gate, weights, shared = layer(machine, model, kind)
    h = machine.random(tokens, c.hidden_size)
    x = h if i == 0 else machine.random(tokens * (c.num_experts_per_tok + 1), c.moe_intermediate_size)
    x = fp8.quantize(x) if kind == "fp8" else QuantTensor(x)
    rule = c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor
    defaults = default_tiles(c.hidden_size, tokens, kind)
    bias = h.new_zeros(c.num_experts, dtype=torch.float32)
    routings = {height: router.route(h, gate, bias, *rule, tile_m=height) for height in {tile_m, defaults["tile_m"]}}

    def call(parameters):
        height = defaults["tile_m"] if parameters is None else tile_m
        own = parameters or defaults[product]
        return _product(x, weights[i], shared[i], routings[height], i == 0, h, height, **own)

    return Case([call], [[call]])  # the layer's weights are far larger than a cache


def default_tiles(hidden, tokens, kind):
    """Those of the experts on any device."""
    return tiles(torch.device("cpu"), hidden, tokens, None if kind == "bf16" else kind)


def _heights(config, tokens, default):
    """Tile heights worth trying, the default first: half to twice the pairs of an expert."""
    pairs = max(HEIGHTS[0] / 2, tokens * config.num_experts_per_tok / config.num_experts)
    return [default, *(height for height in HEIGHTS if pairs / 2 <= height <= 2 * pairs and height != default)]


def moe_groups(machine, models=("mini",)):
    """By model and tokens, in bf16, fp8 and int4 side by side."""
    found, kinds = [], [kind for kind in EXPERT_TRIES if kind != "fp8" or fp8_products(machine)]
    counts = TOKENS[: machine.size(len(TOKENS), 1)]
    for model, tokens, kind in itertools.product(models, counts, kinds):
        config = machine.config(model)
        heights = _heights(config, tokens, default_tiles(config.hidden_size, tokens, kind)["tile_m"])
        for tile_m, product in itertools.product(heights[: machine.size(len(HEIGHTS), 1)], PRODUCTS):
            name = f"moe {model} {kind} m{tokens} tile_m {tile_m} {product}"
            shape = {"hidden": config.hidden_size, "tokens": tokens, "tile_m": tile_m, "kind": kind}
            build = partial(_experts, model=model, kind=kind, tokens=tokens, tile_m=tile_m, product=product)
            found.append(Group(name, "moe", shape, product, EXPERT_TRIES[kind][product], build))
    return found


def moe_entries(measured, device):
    """Entries of the table from (group, line) of all that was measured, one for each kind at each number of tokens.

    Where nothing gains it holds the defaults, for an entry measured at more tokens would be taken instead.
    """
    cells = {}
    for group, line in measured:
        hidden, tokens, tile_m, kind = group.shape.values()
        cells.setdefault((hidden, tokens, kind), {}).setdefault(tile_m, {})[group.part] = line
    found = []
    for (hidden, tokens, kind), heights in cells.items():
        best = _best(default_tiles(hidden, tokens, kind), heights)
        found.append({"device": device, "hidden": hidden, "tokens": tokens, kind: best})
    return found


def _best(defaults, heights):
    """{"tile_m", "gate_up", "down"} of the height that saves most time; the defaults if none saves more than noise.

    heights: {tile_m: {product: line}}. At the defaults' own height a product may keep its defaults.
    """
    most, found = 0.0, defaults
    for tile_m, lines in heights.items():
        own = tile_m == defaults["tile_m"]
        lines = {product: line for product, line in lines.items() if (gains(line) if own else "fastest" in line)}
        if not own and len(lines) < len(PRODUCTS):
            continue
        default_us = sum(line["default_us"][0] for line in lines.values())
        saved = default_us - sum(line["default_us"][0] * line["share"] for line in lines.values())
        noise = 0 if own else max(line["noise"] for line in lines.values())
        if saved > max(most, noise * default_us):
            most = saved
            found = defaults | {"tile_m": tile_m} | {product: line["fastest"] for product, line in lines.items()}
    return found


def matrices(config):
    """{name: (rows, columns, gated)} of a model's matrices outside its experts."""
    c = config
    heads = c.num_attention_heads * c.head_dim
    return {
        "QKV": (heads + 2 * c.num_key_value_heads * c.head_dim, c.hidden_size, False),
        "dense": (c.hidden_size, heads, False),
        "LM head": (c.vocab_size, c.hidden_size, False),
        "gate_up": (2 * c.intermediate_size, c.hidden_size, True),
        "down": (c.hidden_size, c.intermediate_size, False),
    }


def dense_defaults(rows, gated, tokens, kind):
    return dense.default_tiles(rows, gated, tokens, None if kind == "bf16" else kind)


def dense_tries(rows, gated, tokens, kind):
    """Heights as far as there are tokens; a gated product has no registers for 128."""
    if tokens > FEW and not gated:
        return MANY + TALL * (kind == "bf16")
    deeper = () if kind == "fp8" or gated else DEEPER_LARGE if rows > 8192 else DEEPER
    widths = (GATED if gated else LARGE if rows > 8192 else NARROW) + [*deeper]
    heights = [height for height in (64, 32, 16) if height <= tokens and (tokens <= FEW or height > 16)]
    return [{"tile_m": height} | width for height in heights for width in widths]


def _matrix(machine, rows, columns, gated, tokens, kind):
    tokens = machine.size(tokens, 32)
    x = h = machine.random(tokens, columns)
    weight = machine.random(rows, columns, std=columns**-0.5)
    if kind == "fp8":
        x, weight = fp8.quantize(h), fp8.quantize_weight(weight, 2 if gated else 1)
    else:
        x, weight = QuantTensor(h), QuantTensor(weight)
    parts, copies = [part for part in weight if part is not None], machine.copies(weight.values.nbytes)
    copies = [QuantTensor(*(part.clone() for part in parts)) for _ in range(copies - 1)]
    defaults = dense_defaults(rows, gated, tokens, kind)

    def call(weight, parameters):
        return [part for part in dense.dense(x, weight, gated, h, parameters or defaults) if part is not None]

    return Case([partial(call, weight)], [[partial(call, one) for one in (weight, *copies)]])


def dense_groups(machine, models=("mini",)):
    """By kind, model, matrix and tokens; without fp8 where the GPU has none."""
    found = []
    kinds = ("fp8", "bf16") if fp8_products(machine) else ("bf16",)
    for kind, model, (matrix, tokens) in itertools.product(kinds, models, MATRICES[: machine.size(len(MATRICES), 1)]):
        rows, columns, gated = matrices(machine.config(model))[matrix]
        shape = {"rows": rows, "columns": columns, "gated": gated, "tokens": tokens}
        tries, defaults = dense_tries(rows, gated, tokens, kind), dense_defaults(rows, gated, tokens, kind)
        build = partial(_matrix, **shape, kind=kind)
        found.append(Group(f"dense {model} {kind} {matrix} m{tokens}", "dense", shape, kind, tries, build, defaults))
    return found
