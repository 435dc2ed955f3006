"""Expert MLPs, weighted sum and shared expert of one layer for T tokens whose routing is known.

Bytes: the experts that were touched, once.
"""

from functools import partial

import torch
import torch.nn.functional as F

from llada2_fast.kernels import moe, router
from llada2_fast.kernels.gemm import QuantTensor

from ..gpu.gates import moe_layer
from .bench_router import arguments
from .cases import Case, expert_weights


def plain(h, routing, gate_up, down, shared):
    """A loop over the experts that some token chose, as transformers writes it."""
    out = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for expert in routing.ids.unique().tolist():
        token, k = torch.where(routing.ids == expert)
        y = F.linear(moe.gated(F.linear(h[token], gate_up.values[expert])), down.values[expert])
        out.index_add_(0, token, routing.weights[token, k, None] * y)
    return out.to(h.dtype) + F.linear(moe.gated(F.linear(h, shared[0].values)), shared[1].values)


def case_of(machine, config, tokens):
    c = machine.config(config)
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    routed = arguments(machine, config, tokens)
    routing = router.route(*routed)
    expert = 3 * hidden * inner
    touched = routing.ids.unique().numel()
    size = (touched + 1) * expert * machine.dtype.itemsize + 2 * routed[0].nbytes

    def make():
        shared = machine.random(2 * inner, hidden, std=hidden**-0.5), machine.random(hidden, inner, std=inner**-0.5)
        weights = [expert_weights(machine, c.num_experts, *shape) for shape in ((2 * inner, hidden), (hidden, inner))]
        return routed[0], routing, *map(QuantTensor, weights), tuple(map(QuantTensor, shared))

    operations = 2.0 * expert * tokens * (c.num_experts_per_tok + 1)
    return Case(moe.experts, plain, "loop over experts", machine.rotated(make, size), size, operations, graph=False)


def layer_of(machine, tokens, fp8):
    """A layer of mini's, its router included, in bfloat16 or fp8. Bytes: the experts touched and the router, once."""
    layer, c, tokens = moe_layer(machine, fp8), machine.config("mini", fp8), machine.size(tokens, 16)
    h = machine.random(tokens, c.hidden_size)
    touched = layer(h)[1].unique().numel()
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    size = (touched + c.num_shared_experts) * expert * (1 if fp8 else 2) + layer.router.weight.nbytes + 2 * h.nbytes
    operations = 2.0 * expert * tokens * (c.num_experts_per_tok + c.num_shared_experts)
    return Case(
        layer, None, "", [(h,)], size, operations, facts={"experts_touched": touched},
        parts={"router_us": partial(layer.router, h, None)},
    )  # fmt: skip


CASES = {f"{config} t{tokens}": (config, tokens) for config, tokens in (("small", 32), ("small", 512), ("mini", 32))}


def test_moe(timed):
    timed()
