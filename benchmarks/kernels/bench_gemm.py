"""The grouped, gated product of T tokens and the experts they chose: [T * K, I] for gate_up [E, 2I, H].

On a GPU the kernel; it has no reference of its own, so on a CPU what moe.experts_ref does in its place. The peer goes
through the experts that some token chose, one after the other.
"""

import torch
import torch.nn.functional as F

from llada2_fast.kernels import gemm, moe, router
from llada2_fast.kernels.gemm import QuantTensor

from .bench_router import arguments
from .cases import Case, expert_weights


def plain(h, routing, gate_up):
    flat, top_k = routing.ids.flatten(), routing.ids.shape[1]
    out = h.new_empty(len(flat), gate_up.shape[1] // 2)
    for expert in flat.unique().tolist():
        pair = torch.where(flat == expert)[0]
        out[pair] = moe.gated(F.linear(h[pair // top_k], gate_up[expert]))
    return out


def grouped(h, routing, gate_up):
    """Pairs sorted by expert, a product for each expert, one activation for all."""
    flat, top_k = routing.ids.flatten(), routing.ids.shape[1]
    order = flat.argsort(stable=True)
    touched = [(e, size) for e, size in enumerate(torch.bincount(flat).tolist()) if size]
    out = h.new_empty(len(flat), gate_up.shape[1] // 2)
    out[order] = moe.gated(moe._products(h[order // top_k], touched, gate_up, None, 2))
    return out


def kernel(h, routing, gate_up):
    tile = gemm.tiles(h.device, *reversed(h.shape))["gate_up"]
    return gemm.gemm(QuantTensor(h), QuantTensor(gate_up), None, routing, True, h, routing.tile_m, **tile).values


def case_of(machine, config, tokens):
    c = machine.config(config)
    routed = arguments(machine, config, tokens)
    routing = router.route(*routed)
    pairs, expert = routing.ids.numel(), 2 * c.moe_intermediate_size * c.hidden_size
    out = pairs * c.moe_intermediate_size * machine.dtype.itemsize
    size = routing.ids.unique().numel() * expert * machine.dtype.itemsize + routed[0].nbytes + out

    def make():
        return routed[0], routing, expert_weights(machine, c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size)

    ours = grouped if machine.dry else kernel
    return Case(ours, plain, "loop over experts", machine.rotated(make, size), size, 2.0 * expert * pairs, graph=False)


CASES = {f"{config} t{tokens}": (config, tokens) for config, tokens in (("small", 32), ("small", 512), ("mini", 32))}


def test_gemm(timed):
    timed()
