"""Ops of a forward: norm, rope, attention, products in full precision, fp8 and int4, the router and its experts.

Each case_of_<op>(machine, ...) builds a Case whose peer is plain_<op> where that takes more than a line; OPS names them
and their arguments. T tokens, B rows, K experts per token.
"""

from functools import partial

import torch
import torch.nn.functional as F

from llada2_fast.kernels import attention, fp8, gemm, int4, moe, norm, product, rope, router
from llada2_fast.kernels.attention import BlockBatch, Span
from llada2_fast.kernels.combine import ExpertSum, summed
from llada2_fast.kernels.gemm import QuantTensor

from ..gpu.gates import moe_layer, norm_case, require, rope_case
from ..roofline import BLOCK, expert_bytes
from .cases import Case, agree


def plain_norm(x, delta, weight, eps):
    if isinstance(delta, ExpertSum):
        outer, weights, beside = delta
        delta = (outer.unflatten(0, weights.shape) * weights[..., None]).sum(1).to(x.dtype) + beside
    total = x + delta
    return total, F.rms_norm(total, weight.shape, weight, eps)


def case_of_norm(machine, config, tokens, experts=False):
    """RMSNorm behind a residual addition, of a tensor or of what experts made of the tokens."""
    tokens, c = machine.size(tokens, 64), machine.config(config)
    rows = 3 + (c.num_experts_per_tok + 1 if experts else 1)  # x, what is added; sum, norm
    size = rows * tokens * c.hidden_size * machine.dtype.itemsize
    buffers = machine.rotated(partial(norm_case, machine, tokens, config, experts), size)
    return Case(norm.add_rms_norm, plain_norm, "F.rms_norm", buffers, size)


def plain_rope(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads, k_cache, v_cache, slot):
    cos, sin = angles.each()

    def turned(x, weight):
        x, size = F.rms_norm(x, weight.shape, weight, eps), cos.shape[-1]
        part, rest = x[..., :size], x[..., size:]
        half = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
        return torch.cat((part * cos[:, None] + half * sin[:, None], rest), -1)

    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
    k_cache.flatten(0, 1)[slot] = turned(k, k_weight)
    v_cache.flatten(0, 1)[slot] = v
    return turned(q, q_weight)


def case_of_rope(machine, config, tokens):
    """QK-norm, rotation and page writes."""
    make = partial(rope_case, machine, machine.size(tokens, 64), config)
    first = make()
    size = 2 * first[0].nbytes  # everything read is written somewhere

    def check():
        *args, k_cache, v_cache, slot = first
        outputs = []
        for op in (rope.qk_norm_rope_write, plain_rope):
            caches = k_cache.clone(), v_cache.clone()
            outputs.append((op(*args, *caches, slot), *caches))
        agree("rope", *outputs)

    buffers = machine.rotated(make, size)
    return Case(rope.qk_norm_rope_write, plain_rope, "F.rms_norm, rotate_half", buffers, size, check=check)


def case_of_attention(machine, config, rows, prefix, prefill=False, shuffled=False):
    """A step of `rows` rows over `prefix` cached tokens each, or the prefill of whole prompts.

    The peer has keys and values of a row side by side, without pages, and is told by a mask what a block sees.
    shuffled: the pages lie in random order, as in a cache that has been in use; such a case has no peer.
    """
    rows, prefix = machine.size(rows, 2), machine.size(prefix, 64)
    c, count = machine.config(config), prefix // BLOCK + 1
    first = 0 if prefill else count - 1
    pages = (torch.randperm if shuffled else torch.arange)(rows * count, device="cpu").split(count)
    runs = [Span(tuple(own.tolist()), first, count - first, count * BLOCK) for own in pages]
    blocks = runs if machine.dry else BlockBatch.from_spans(runs, machine.device)
    at = torch.arange(count * BLOCK, device=machine.device) // BLOCK
    mask = (at[first * BLOCK :, None] >= at)[None, None]

    def make():
        cache = rows * count, BLOCK, c.num_key_value_heads, c.head_dim
        q = machine.random(rows * (count - first) * BLOCK, c.num_attention_heads, c.head_dim)
        return q, machine.random(*cache), machine.random(*cache), blocks

    def plain(q, k, v, _blocks):
        row = [x.reshape(rows, -1, *x.shape[-2:]) for x in (q, k, v)]
        return attention.masked_attention(*row, mask).flatten(0, 1)

    q, k, v, _ = make()
    size = k.nbytes + v.nbytes + 2 * q.nbytes
    seen = rows * BLOCK * sum((block + 1) * BLOCK for block in range(first, count))  # pairs of query and key
    operations = 4.0 * c.num_attention_heads * c.head_dim * seen
    peer = (None, "") if shuffled else (plain, "SDPA, mask")
    return Case(attention.block_attention, *peer, machine.rotated(make, size), size, operations)


def case_of_product(machine, config, tokens, exact=False):
    """Rows times one matrix with the same bits at any height: the query, key and value projection.

    On a CPU by its libraries; exact: by our own product, which a CPU has in Triton's interpreter alone.
    """
    c = machine.config(config)
    width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    size = (width * c.hidden_size + tokens * (c.hidden_size + width)) * machine.dtype.itemsize

    def make():
        return machine.random(tokens, c.hidden_size), machine.random(width, c.hidden_size, std=c.hidden_size**-0.5)

    flops, ours = 2.0 * tokens * width * c.hidden_size, partial(fp8.linear, exact=True) if exact else product.linear
    return Case(ours, F.linear, "F.linear", machine.rotated(make, size), size, flops)


def case_of_fp8(machine, config, down, tokens):
    """A linear layer, an MLP's first or (down) second, in block-scaled fp8, its activations quantised on the fly.

    The peer multiplies the weight that was quantised, in the activations' dtype: what fp8 is to be faster than. Parity
    is against the product of what weight and activations stand for, in float32.
    """
    c = machine.config(config)
    columns, rows = (c.intermediate_size, c.hidden_size) if down else (c.hidden_size, c.intermediate_size)

    def make():
        weight = machine.random(rows, columns, std=columns**-0.5)
        return machine.random(tokens, columns), *fp8.quantize_weight(weight), weight

    x, values, scale, _ = make()

    def check():
        wide = fp8.dequantize_weight(*fp8.quantize_ref(x[:, None]))[:, 0]  # every token a weight of one row
        agree("fp8", (fp8.linear(x, values, scale),), (F.linear(wide, fp8.dequantize_weight(values, scale)),))

    size = values.nbytes + scale.nbytes + x.nbytes + tokens * rows * x.element_size()
    operations = 2.0 * tokens * rows * columns
    return Case(
        lambda x, values, scale, _weight: fp8.linear(x, values, scale),
        lambda x, _values, _scale, weight: F.linear(x, weight),
        "F.linear, unquantised", machine.rotated(make, size), size, operations, check,
    )  # fmt: skip


def case_of_int4(machine, config, down, tokens):
    """An expert's first or (down) second product, its weight in int4; the peer multiplies the one it was made of."""
    c = machine.config(config)
    columns, rows = c.hidden_size, 2 * c.moe_intermediate_size
    if down:
        columns, rows = c.moe_intermediate_size, c.hidden_size

    def make():
        weight = machine.random(rows, columns, std=columns**-0.5)
        return machine.random(tokens, columns), *int4.quantize_weight(weight), weight

    x, words, scale, _ = make()

    def check():
        wide = int4.dequantize_weight(words, scale, columns)
        agree("int4", (fp8.linear(x, words, scale),), (F.linear(x.float(), wide),))

    size = words.nbytes + scale.nbytes + x.nbytes + tokens * rows * x.element_size()
    return Case(
        lambda x, words, scale, _weight: fp8.linear(x, words, scale),
        lambda x, _words, _scale, weight: F.linear(x, weight),
        "F.linear, unquantised", machine.rotated(make, size), size, 2.0 * tokens * rows * columns, check,
    )  # fmt: skip


def plain_router(h, weight, bias, top_k, n_group, topk_group, scale):
    score = torch.sigmoid(F.linear(h.float(), weight.float()))
    grouped = (score + bias).unflatten(1, (n_group, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(topk_group, -1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=h.device).scatter_(1, best, True)
    ids = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(top_k, -1).indices
    weights = score.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * scale


def router_arguments(machine, config, tokens):
    """What router.route is given for `tokens` random tokens and the router of a config."""
    c = machine.config(config)
    bias = torch.randn(c.num_experts, device=machine.device) * 0.01
    weight = machine.random(c.num_experts, c.hidden_size, std=c.hidden_size**-0.5)
    h = machine.random(tokens, c.hidden_size)
    return h, weight, bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor


def case_of_router(machine, config, tokens):
    """Routing; on a GPU with the tiles for the grouped products."""
    first = router_arguments(machine, config, tokens)
    h, weight, top_k = first[0], first[1], first[3]
    size = h.nbytes + weight.nbytes + tokens * top_k * (8 + 4)

    def check():
        """The same experts with the same weights; rounding may decide a near-tie otherwise for 1 token in 200."""
        (ids, weights), (wanted_ids, wanted) = router.route(*first)[:2], plain_router(*first)
        same = (ids == wanted_ids).all(1)
        require("router, share of tokens routed otherwise", 1 - same.float().mean().item(), 0.005)
        agree("router", (weights[same],), (wanted[same],))

    buffers = machine.rotated(partial(router_arguments, machine, config, tokens), size)
    return Case(router.route, plain_router, "sigmoid, topk", buffers, size, 2.0 * tokens * weight.numel(), check)


def routed(machine, config, tokens):
    """(random tokens, their routing, how many experts that touches)."""
    arguments = router_arguments(machine, config, tokens)
    routing = router.route(*arguments)
    return arguments[0], routing, routing.ids.unique().numel()


def expert_weights(machine, experts, rows, columns):
    """Weights [E, rows, columns], different in every expert, at the price of copying them."""
    first = machine.random(rows, columns, std=columns**-0.5)
    weight = first.new_empty(experts, rows, columns)
    for expert, own in enumerate(weight):
        own.copy_(first.roll(expert, 0))
    return weight


def plain_gemm(h, routing, gate_up):
    flat, top_k = routing.ids.flatten(), routing.ids.shape[1]
    out = h.new_empty(len(flat), gate_up.shape[1] // 2)
    for expert in flat.unique().tolist():
        pair = torch.where(flat == expert)[0]
        out[pair] = moe.gated(F.linear(h[pair // top_k], gate_up[expert]))
    return out


def grouped_gemm(h, routing, gate_up):
    """Pairs sorted by expert, a product for each expert, one activation for all."""
    flat, top_k = routing.ids.flatten(), routing.ids.shape[1]
    order = flat.argsort(stable=True)
    touched = [(e, size) for e, size in enumerate(torch.bincount(flat).tolist()) if size]
    out = h.new_empty(len(flat), gate_up.shape[1] // 2)
    out[order] = moe.gated(moe._products(h[order // top_k], touched, gate_up, None, 2))
    return out


def gemm_kernel(h, routing, gate_up):
    tile = gemm.tiles(h.device, *reversed(h.shape))["gate_up"]
    return gemm.gemm(QuantTensor(h), QuantTensor(gate_up), None, routing, True, h, routing.tile_m, **tile).values


def case_of_gemm(machine, config, tokens):
    """The grouped, gated product of tokens and the experts they chose: [T * K, I] for gate_up [E, 2I, H].

    On a GPU the kernel; it has no reference of its own, so on a CPU what moe.experts_ref does in its place.
    """
    c = machine.config(config)
    h, routing, touched = routed(machine, config, tokens)
    pairs, expert = routing.ids.numel(), 2 * c.moe_intermediate_size * c.hidden_size
    size = (touched * expert + pairs * c.moe_intermediate_size) * machine.dtype.itemsize + h.nbytes

    def make():
        return h, routing, expert_weights(machine, c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size)

    ours, buffers = grouped_gemm if machine.dry else gemm_kernel, machine.rotated(make, size)
    return Case(ours, plain_gemm, "loop over experts", buffers, size, 2.0 * expert * pairs, graph=False)


def plain_moe(h, routing, gate_up, down, shared):
    """As transformers writes it."""
    out = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for expert in routing.ids.unique().tolist():
        token, k = torch.where(routing.ids == expert)
        y = F.linear(moe.gated(F.linear(h[token], gate_up.values[expert])), down.values[expert])
        out.index_add_(0, token, routing.weights[token, k, None] * y)
    return out.to(h.dtype) + F.linear(moe.gated(F.linear(h, shared[0].values)), shared[1].values)


def case_of_moe(machine, config, tokens):
    """Expert MLPs, weighted sum and shared expert of one layer for tokens whose routing is known.

    Bytes: the experts that were touched, once.
    """
    c = machine.config(config)
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    h, routing, touched = routed(machine, config, tokens)
    expert = 3 * hidden * inner
    size = (touched + 1) * expert * machine.dtype.itemsize + 2 * h.nbytes

    def make():
        shared = machine.random(2 * inner, hidden, std=hidden**-0.5), machine.random(hidden, inner, std=inner**-0.5)
        weights = [expert_weights(machine, c.num_experts, *shape) for shape in ((2 * inner, hidden), (hidden, inner))]
        return h, routing, *map(QuantTensor, weights), tuple(map(QuantTensor, shared))

    operations = 2.0 * expert * tokens * (c.num_experts_per_tok + 1)
    buffers = machine.rotated(make, size)
    return Case(
        lambda *args: summed(moe.experts(*args)), plain_moe, "loop over experts", buffers, size, operations, graph=False
    )  # fmt: skip


def case_of_moe_layer(machine, tokens, quantization=None):
    """A layer of mini's with its router, in bfloat16, fp8 or int4. Bytes: the experts touched and the router, once."""
    layer, c, tokens = moe_layer(machine, quantization), machine.config("mini"), machine.size(tokens, 16)
    h = machine.random(tokens, c.hidden_size)
    touched = layer(h)[1].unique().numel()
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    size = (
        (touched + c.num_shared_experts) * expert * expert_bytes(quantization)
        + layer.router.weight.nbytes
        + 2 * h.nbytes
    )
    operations = 2.0 * expert * tokens * (c.num_experts_per_tok + c.num_shared_experts)
    return Case(
        lambda h: summed(layer(h)[0]), None, "", [(h,)], size, operations, facts={"experts_touched": touched},
        parts={"router_us": partial(layer.router, h, None)},
    )  # fmt: skip


def _tokens(*shapes):
    return {f"{config} t{tokens}": (config, tokens) for config, tokens in shapes}


_MANY = _tokens(("small", 32), ("mini", 32), ("mini", 1024), ("flash", 32))
_EXPERTS = _tokens(("small", 32), ("small", 512), ("mini", 32))
_ATTENTION = {
    "small b2 p256": ("small", 2, 256),
    "mini b1 p1024": ("mini", 1, 1024),
    "mini b8 p4096": ("mini", 8, 4096),
    "mini prefill 1024": ("mini", 1, 1024 - BLOCK, True),
    "flash b1 p1024": ("flash", 1, 1024),
}
_FP8 = {
    "small t32": ("small", False, 32),
    "mini up t32": ("mini", False, 32),
    "mini down t32": ("mini", True, 32),
    "mini up t512": ("mini", False, 512),
}
_INT4 = {"small t32": ("small", False, 32), "mini up t32": ("mini", False, 32), "mini down t32": ("mini", True, 32)}
OPS = {
    "norm": (case_of_norm, _MANY | {"mini experts t32": ("mini", 32, True), "small experts t32": ("small", 32, True)}),
    "rope": (case_of_rope, _MANY),
    "attention": (case_of_attention, _ATTENTION),
    "product": (case_of_product, _tokens(("small", 32), ("small", 1), ("small", 512), ("mini", 32))),
    "dense": (case_of_product, {"small t32": ("small", 32, True), "mini t32": ("mini", 32, True)}),
    "fp8": (case_of_fp8, _FP8),
    "int4": (case_of_int4, _INT4),
    "router": (case_of_router, _MANY),
    "gemm": (case_of_gemm, _EXPERTS),
    "moe": (case_of_moe, _EXPERTS),
}
