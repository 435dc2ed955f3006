"""A linear layer in block-scaled fp8, its activations quantised on the fly, for T tokens.

The peer multiplies the weight that was quantised, in the activations' dtype: what fp8 is to be faster than. Parity
is against the product of what weight and activations stand for, in float32.
"""

import torch.nn.functional as F

from llada2_fast.kernels import fp8

from .cases import Case, agree


def case_of(machine, config, rows, columns, tokens):
    c = machine.config(config)
    sizes = {"hidden": c.hidden_size, "inner": c.intermediate_size}
    rows, columns = sizes[rows], sizes[columns]

    def make():
        weight = machine.random(rows, columns, std=columns**-0.5)
        return machine.random(tokens, columns), *fp8.quantize_weight(weight), weight

    def ours(x, values, scale, _weight):
        return fp8.linear(x, values, scale)

    def plain(x, _values, _scale, weight):
        return F.linear(x, weight)

    first = make()

    def check():
        x, values, scale, _ = first
        wide = fp8.dequantize_weight(*fp8.quantize_ref(x[:, None]))[:, 0]  # every token a weight of one row
        agree("fp8", (fp8.linear(x, values, scale),), (F.linear(wide, fp8.dequantize_weight(values, scale)),))

    x, values, scale, _ = first
    size = values.nbytes + scale.nbytes + x.nbytes + tokens * rows * x.element_size()
    operations = 2.0 * tokens * rows * columns
    return Case(ours, plain, "F.linear, unquantised", machine.rotated(make, size), size, operations, check)


CASES = {
    "small t32": ("small", "inner", "hidden", 32),
    "mini up t32": ("mini", "inner", "hidden", 32),
    "mini down t32": ("mini", "hidden", "inner", 32),
    "mini up t512": ("mini", "inner", "hidden", 512),
}


def test_fp8(timed):
    timed()
