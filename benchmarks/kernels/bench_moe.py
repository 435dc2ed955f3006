"""Expert MLPs, weighted sum and shared expert of one layer for T tokens whose routing is known.

Bytes: the experts that were touched, once.
"""

from functools import partial

import torch
import torch.nn.functional as F

from llada2_fast.kernels import moe, router
from llada2_fast.kernels.gemm import QuantTensor

from .bench_router import arguments
from .cases import Case, Shapes


def plain(h, routing, gate_up, down, shared):
    """A loop over the experts that some token chose, as transformers writes it."""
    out = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for expert in routing.ids.unique().tolist():
        token, k = torch.where(routing.ids == expert)
        y = F.linear(moe.gated(F.linear(h[token], gate_up.values[expert])), down.values[expert])
        out.index_add_(0, token, routing.weights[token, k, None] * y)
    return out.to(h.dtype) + F.linear(moe.gated(F.linear(h, shared[0].values)), shared[1].values)


def case_of(config, tokens):
    shapes = Shapes(config)
    c = shapes.config()
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    routed = arguments(shapes, tokens)
    routing = router.route(*routed)
    expert = 3 * hidden * inner
    touched = routing.ids.unique().numel()
    size = (touched + 1) * expert * shapes.dtype.itemsize + 2 * routed[0].nbytes

    def make():
        shared = shapes.random(2 * inner, hidden, std=hidden**-0.5), shapes.random(hidden, inner, std=inner**-0.5)
        weights = QuantTensor(shapes.experts(2 * inner, hidden)), QuantTensor(shapes.experts(hidden, inner))
        return routed[0], routing, *weights, tuple(map(QuantTensor, shared))

    operations = 2.0 * expert * tokens * (c.num_experts_per_tok + 1)
    return Case(moe.experts, plain, "loop over experts", shapes.rotated(make, size), size, operations, graph=False)


CASES = {
    f"{config} t{tokens}": partial(case_of, config, tokens)
    for config, tokens in (("small", 32), ("small", 512), ("mini", 32))
}


def test_moe(timed):
    timed()
