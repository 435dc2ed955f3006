"""What can be tuned in the plain fp8 products, one matrix each: tiles, warps and stages.

Tiles go by the tokens, so outputs must have the bits that the defaults give, whatever the tiles, see moe.py. With few
tokens a small matrix is too few programs to keep memory busy: lower tiles make more of them, more stages let each have
more on its way. With many tokens wide tiles share what they load.
"""

import itertools
from functools import partial

from llada2_fast.kernels import fp8
from llada2_fast.kernels.gemm import QuantTensor, gemm

from .cases import Case, Group, concluded, every, fp8_products, gains

# What decode runs, the telling first: blocks of 1, 8 and 32 rows with those carried along, logits of 1, 8 and 32.
CASES = (
    ("LM head", 1024), ("QKV", 64), ("dense", 64), ("LM head", 32), ("QKV", 1280), ("dense", 1280), ("LM head", 256),
    ("QKV", 320), ("dense", 320), ("QKV", 32), ("dense", 32),
    ("gate_up", 64), ("down", 64), ("gate_up", 1280), ("down", 1280),
)  # fmt: skip
FEW = 64  # tokens
NARROW = [  # of small matrices
    *every(tile_n=(64,), num_warps=(4, 8), num_stages=(4, 6, 8)),
    *every(tile_n=(128,), num_warps=(8,), num_stages=(4, 6)),
]
LARGE = [
    *every(tile_n=(128,), num_warps=(8, 4), num_stages=(4, 3, 6)),
    *every(tile_n=(64,), num_warps=(4,), num_stages=(4, 6, 8)),
]
MANY = {  # by height; 128 x 128 spills in four warps
    64: every(tile_n=(64, 128), num_warps=(4, 8), num_stages=(4, 3, 2)),
    128: [
        *every(tile_n=(64,), num_warps=(4, 8), num_stages=(4, 3, 2)),
        *every(tile_n=(128,), num_warps=(8, 16), num_stages=(4, 3, 2)),
    ],
}
GATED = every(tile_n=(128,), num_warps=(8, 4), num_stages=(3, 4, 5))


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


def tries(rows, gated, tokens):
    """Heights as far as there are tokens; a gated product has no registers for 128."""
    if tokens > FEW and not gated:
        return [{"tile_m": height} | width for height, widths in MANY.items() for width in widths]
    widths = GATED if gated else LARGE if rows > 8192 else NARROW
    heights = [height for height in (64, 32, 16) if tokens <= FEW or height > 16]
    return [{"tile_m": height} | width for height in heights if height <= tokens for width in widths]


def _product(machine, model, matrix, tokens):
    rows, columns, gated = matrices(machine.config(model))[matrix]
    tokens = machine.size(tokens, 32)
    weight = fp8.quantize_weight(machine.random(rows, columns, std=columns**-0.5), 2 if gated else 1)
    copies = [QuantTensor(*(part.clone() for part in weight)) for _ in range(machine.copies(weight.values.nbytes) - 1)]
    h = machine.random(tokens, columns)
    x, defaults = fp8.quantize(h), fp8.default_tiles(rows, gated, tokens)

    def call(weight, parameters):
        out = gemm(x, weight, None, None, gated, h, **(parameters or defaults))
        return [part for part in out if part is not None]

    return Case([partial(call, weight)], [[partial(call, one) for one in (weight, *copies)]])


def groups(machine, models=("mini",)):
    """By model, matrix and tokens; none where the GPU has no fp8."""
    found = []
    cases = CASES[: machine.size(len(CASES), 1)] if fp8_products(machine) else ()
    for model, (matrix, tokens) in itertools.product(models, cases):
        rows, columns, gated = matrices(machine.config(model))[matrix]
        shape = {"rows": rows, "columns": columns, "gated": gated, "tokens": tokens}
        build = partial(_product, model=model, matrix=matrix, tokens=tokens)
        found.append(Group(f"fp8 {model} {matrix} m{tokens}", "fp8", shape, "tiles", tries(rows, gated, tokens), build))
    return found


def entries(groups, lines, device):
    """Entries of the table, one of each group that was measured.

    Where nothing gains it holds the defaults, for an entry measured at more tokens would be taken instead.
    """
    found = []
    for group in groups:
        line = lines.get(group.name, {})
        if concluded(line):
            rows, _, gated, tokens = group.shape.values()
            best = line["fastest"] if gains(line) else fp8.default_tiles(rows, gated, tokens)
            found.append({"device": device} | group.shape | {group.part: best})
    return found
