"""Rows times one matrix with the same bits at any height, of T tokens: the query, key and value projection.

On a CPU alone: on a GPU both sides are cuBLAS's product.
"""

import torch.nn.functional as F

from llada2_fast.kernels import product

from .cases import Case


def case_of(machine, config, tokens):
    c = machine.config(config)
    width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    size = (width * c.hidden_size + tokens * (c.hidden_size + width)) * machine.dtype.itemsize

    def make():
        return machine.random(tokens, c.hidden_size), machine.random(width, c.hidden_size, std=c.hidden_size**-0.5)

    flops = 2.0 * tokens * width * c.hidden_size
    return Case(product.linear, F.linear, "F.linear", machine.rotated(make, size), size, flops)


CASES = {
    f"{config} t{tokens}": (config, tokens)
    for config, tokens in (("small", 32), ("small", 1), ("small", 512), ("mini", 32))
}


def test_product(timed):
    timed()
