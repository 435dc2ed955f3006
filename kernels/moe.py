"""Mixture of experts: the grouped expert MLP behind a router, and the shared expert beside it.

y = cast(sum_k w_k * expert_k(h)) + shared(h)                h [T, H] -> [T, H], w from router.py
expert(h) = down( silu(gate(h)) * up(h) )                    gate_up [E, 2I, H] gate rows first, down [E, H, I]

Products of w_k and their sum are float32, in descending order of choice, with one cast; the shared expert is neither
scaled nor gated and is added in h's dtype. On a GPU two launches: gate_up with its activation for all pairs and the
shared expert, and down likewise; with fp8 weights (fp8.py) one more, for quantising h if it is no QuantRows. The sum is
left to the norm that follows, see combine.py. No atomics; only the experts that some token chose are read. In int4
(int4.py) the reference widens one of them at a time.
"""

import torch
import torch.nn.functional as F

from . import int4
from ._triton import use_triton
from .combine import ExpertSum
from .dense import dense
from .fp8 import QuantRows, linear_ref, quantized, unquantised
from .gemm import WORDS, QuantTensor, gemm, tiles
from .product import linear, rows_of


def experts_ref(h, ids, weights, gate_up, down, gate_up_scale=None, down_scale=None):
    """h [T, H], ids, weights [T, K] -> [T, H] in h's dtype. Tokens sorted by expert; only touched experts are read.

    A token's bits do not depend on how many others share its expert, see product.py.
    """
    tokens, top_k = ids.shape
    if tokens == 0:
        return torch.empty_like(h)
    flat = ids.flatten()
    count = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()  # sync: CPU reference
    touched = [(expert, size) for expert, size in enumerate(count) if size]
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    outer = _products(  # nothing here has a name for longer than it is needed: in prefill these are the largest tensors
        gated(_products(h[order // top_k], touched, gate_up, gate_up_scale, parts=2)),
        touched,
        down,
        down_scale,
        parts=1,
    )[place]
    return outer.view(tokens, top_k, -1).float().mul_(weights[..., None]).sum(1).to(h.dtype)


def _products(rows, touched, weight, scale, parts):
    """Each expert's rows times its weights, one below the other: [N, .] in the rows' dtype."""
    out = rows.new_empty(rows.shape[0], weight.shape[-2])
    sizes, matrices = [size for _, size in touched], weight.unbind()
    product = rows_of(weight) if scale is None else None
    packed = weight.dtype == WORDS
    rows = int4.as_words_hold(rows) if packed else rows
    for x, y, (e, _) in zip(rows.split(sizes), out.split(sizes), touched, strict=True):
        if scale is None:
            product.into(x, matrices[e], y)
        elif packed:
            wide = int4.widen(matrices[e], scale[e], x.dtype)
            rows_of(wide).into(x, wide, y)
        else:
            y.copy_(linear_ref(x, matrices[e], scale[e], parts))
    return out


def gated(x):
    """[..., 2I] -> [..., I]: silu of the first half times the second.

    Where a row is no multiple of the CPU's vectors, two threads may share one, and torch.nn.functional.silu rounds what
    is left over at its end unlike the rest: exp does not.
    """
    gate, up = x.chunk(2, -1)
    if gate.shape[-1] % 64 == 0 or use_triton(x):
        return F.silu(gate).mul_(up)
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype).mul_(up)


def mlp(h, gate_up, down, exact=False):
    """Dense MLP: h [T, H] or QuantRows, gate_up [2I, H] gate rows first, down [H, I], both QuantTensor -> [T, H].

    exact: as of fp8.linear. Our own products on a GPU are two launches, in fp8 three unless h comes as QuantRows.
    """
    if isinstance(h, QuantRows) or (use_triton(h) and (exact or gate_up.scale is not None)):
        h = quantized(h) if gate_up.quantization == "fp8" else h
        x, like = h if isinstance(h, QuantRows) else QuantTensor(h), unquantised(h)
        return dense(dense(x, gate_up, True, like), down, False, like).values
    if gate_up.quantization == "int4":
        return int4.linear_ref(gated(int4.linear_ref(h, *gate_up)), *down)
    if gate_up.quantization == "fp8":
        return linear_ref(gated(linear_ref(h, *gate_up, parts=2)), *down)
    return linear(gated(linear(h, gate_up.values)), down.values)


def experts(h, routing, gate_up, down, shared=None):
    """Grouped expert MLP of h with weighted sum, plus the shared expert's MLP if shared = (gate_up, down).

    h: [T, H] or QuantRows; routing: what router.route returned for it; weights QuantTensor, shapes as in experts_ref
    and mlp. Returns [T, H] in h's dtype, on a GPU an ExpertSum of it. ValueError if shapes do not fit.
    """
    if isinstance(h, torch.Tensor) and not use_triton(h):
        scales = gate_up.scale, down.scale
        y = experts_ref(h, routing.ids, routing.weights, gate_up.values, down.values, *scales)
        return y if shared is None else y + mlp(h, *shared)
    _check(h, routing, gate_up, down, *(shared or ()))
    h = quantized(h) if gate_up.quantization == "fp8" else h
    x, like = h if isinstance(h, QuantRows) else QuantTensor(h), unquantised(h)
    tokens, hidden = x.values.shape
    if tokens == 0:
        return like.new_empty(0, hidden)
    # a shared expert of another width (several in one) is not one more expert of the same product
    alike = shared is not None and shared[0].values.shape == gate_up.values.shape[1:]
    size = tiles(like.device, hidden, tokens, gate_up.quantization)
    inner = gemm(x, gate_up, shared[0] if alike else None, routing, True, like, routing.tile_m, **size["gate_up"])
    outer = gemm(inner, down, shared[1] if alike else None, routing, False, like, routing.tile_m, **size["down"]).values
    beside = outer[routing.ids.numel() :] if alike else None if shared is None else mlp(h, *shared, exact=True)
    return ExpertSum(outer, routing.weights, beside)


def _check(h, routing, gate_up, down, *shared):
    count, rows, dtype = gate_up.values.shape[0], gate_up.values.shape[-2], gate_up.values.dtype
    h = h.values if isinstance(h, QuantRows) else h
    if gate_up.quantization == "int4":
        int4.check("gate_up", gate_up, (count, rows, h.shape[1]))
        int4.check("down", down, (count, h.shape[1], rows // 2))
    else:
        hidden = gate_up.values.shape[2]
        if h.shape[1] != hidden or (gate_up.scale is None and h.dtype != dtype):
            raise ValueError(f"h: [T, {hidden}] in the weights' {dtype} expected, got {h.dtype} {list(h.shape)}")
        if down.values.shape != (count, hidden, rows // 2) or down.values.dtype != dtype:
            raise ValueError(f"down: {dtype} [{count}, {hidden}, {rows // 2}] expected, got {list(down.values.shape)}")
    if h.stride(1) != 1:
        raise ValueError(f"h: the elements of a row side by side expected, got strides {h.stride()}")
    for name, x in zip(("gate_up", "down", "shared gate_up", "shared down"), (gate_up, down, *shared), strict=False):
        if not all(part is None or part.is_contiguous() for part in x):
            raise ValueError(f"{name}: contiguous weights and scales expected")
    if routing.order is None or len(routing.ids) != len(h):
        raise ValueError(f"routing: one of {len(h)} tokens with tiles expected, as route makes them on a GPU")
