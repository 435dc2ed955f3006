"""The same step by PyTorch alone: what our own step is held against. Mini, bf16, batch 1, prefix 1024.

    eager       our reference model: every op's PyTorch reference, the page reads included
    compile     torch.compile of it. The expert MLPs stay outside the graphs: which products they make depends on data,
                and every new set of experts would be compiled anew
    grouped_mm  the most that PyTorch offers, one graph for torch.compile: contiguous keys and values, experts by
                torch's grouped matrix product, refinement by thresholds alone. Stronger than what the goal asks

Gate: in a network of two layers (Machine.shallow) each must choose the same tokens as our step at half of the positions
at least; what is timed is the whole network.
"""

from functools import partial

import torch
import torch.nn.functional as F

from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.attention import Span
from llada2_fast.kernels.norm import rms_norm_ref
from llada2_fast.kernels.rope import Angles, qk_norm_rope_ref, rope_angles
from llada2_fast.kernels.router import route_ref

from ..models import with_experts
from ..roofline import BLOCK
from .machine import Point
from .steps import Step

AGREE = 0.5


class OuterExperts(torch.nn.Module):
    """In place of a network's routed experts: the same, outside of what torch.compile makes."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    @torch.compiler.disable
    def forward(self, x, routing, shared):
        return self.own(x, routing, shared)


def reference_step(step):
    """A call for the tokens [32]: forward over the cache, LM head, refinement; references under force_ops("torch")."""
    state, model = step.state, with_experts(step.model, OuterExperts)
    pages = tuple(step.page_table[0].tolist())
    runs = [Span(pages, len(pages) - 1, 1, len(pages) * BLOCK)]
    positions = step.prefix + torch.arange(BLOCK, device=state.tokens.device)

    def call():
        hidden = model.forward_blocks(state.tokens[0], positions, runs, step.cache)
        logits = model.lm_logits(hidden)[None]
        return refine.refine_step(logits, state, step.params, refine.SpecialIds(step.mask_id), filters=False).token[0]

    return call


def grouped_step(step):
    """The same call over contiguous keys and values, without a line that torch.compile cannot take."""
    state, model, config = step.state, step.model, step.model.config
    positions = step.prefix + torch.arange(BLOCK, device=state.tokens.device)
    keys, values = (x.flatten(1, 2)[:, : step.prefix] for x in (step.cache.k, step.cache.v))

    def call():
        angles = rope_angles(positions, config.rotary_dim, config.rope_theta, config.rope_factor, model.dtype)
        x = F.embedding(state.tokens[0], model.word_embeddings.weight)
        for i, layer in enumerate(model.layers):
            h = rms_norm_ref(x, layer.input_layernorm.weight, config.rms_norm_eps)
            x = x + _attention(layer.attention, h, Angles(*angles), keys[i], values[i], config)
            h = rms_norm_ref(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
            x = x + (_experts(layer.mlp, h) if hasattr(layer.mlp, "router") else _mlp(layer.mlp, h))
        x = rms_norm_ref(x, model.norm.weight, config.rms_norm_eps)
        logits = F.linear(x, model.lm_head.weight).float()
        own = logits.index_fill(1, torch.tensor([step.mask_id], device=x.device), float("-inf"))
        best, token = own.max(-1)
        confidence = (best - logits.logsumexp(-1)).exp()
        held = state.tokens[0]
        commit = (held == step.mask_id) & (confidence > step.params.threshold)
        edit = (held != step.mask_id) & (held != token) & (confidence > step.params.edit_threshold)
        state.tokens.copy_(torch.where(commit | edit, token, held)[None])
        return token

    return call


def _attention(a, h, angles, keys, values, config):
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv = F.linear(h, a.query_key_value.weight).unflatten(-1, (-1, config.head_dim))
    weights = a.query_layernorm.weight, a.key_layernorm.weight
    q, k, v = qk_norm_rope_ref(qkv, *weights, angles, config.rms_norm_eps, heads, kv_heads)
    k, v = torch.cat((keys, k)), torch.cat((values, v))
    folded = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # a KV group's heads are more queries
    o = F.scaled_dot_product_attention(folded[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])[0]
    o = o.unflatten(1, (-1, len(h))).permute(2, 0, 1, 3).flatten(1)
    return F.linear(o, a.dense.weight)


def _mlp(mlp, h):
    gate, up = F.linear(h, mlp.gate_up.weight).chunk(2, -1)
    return F.linear(F.silu(gate) * up, mlp.down.weight)


def _experts(layer, h):
    ids, weights = route_ref(h, layer.router.weight, layer.router.expert_bias, *layer.router.rule)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    count = torch.zeros(len(layer.router.weight), dtype=torch.int32, device=h.device)
    ends = count.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    x = h[order // ids.shape[1]]
    gate, up = torch._grouped_mm(x, layer.experts.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    outer = torch._grouped_mm(F.silu(gate) * up, layer.experts.down.transpose(1, 2), offs=ends)
    by_token = outer[order.argsort()].unflatten(0, ids.shape)
    return (by_token.float() * weights[..., None]).sum(1).to(h.dtype) + _mlp(layer.shared_experts, h)


def agreeing(step, call):
    """Share of the block's tokens that a peer's call chooses as our step does."""
    step.reset()
    ours = step.call().token[0].clone()
    step.reset()
    with force_ops("torch"):
        return (call() == ours).float().mean().item()


@torch.no_grad()
def time_peer(machine, name):
    make, prefix = grouped_step if name == "grouped_mm" else reference_step, machine.size(1024, 64)

    def peer(step):
        if name == "eager":
            return make(step)
        torch.compiler.reset()
        return torch.compile(make(step), backend="eager" if machine.dry else "inductor", fullgraph=name == "grouped_mm")

    step = Step(machine, machine.shallow(), 1, prefix, in_order=True)
    share = agreeing(step, peer(step))
    if share < AGREE:
        raise ArithmeticError(f"{share:.0%} of the tokens agree with our step, at least {AGREE:.0%} must")
    step = Step(machine, machine.network("mini"), 1, prefix, in_order=True)
    with force_ops("torch"):
        ms = machine.call_us(peer(step), rounds=10, before=step.reset) / 1e3
    return {"ms": ms, "tokens_agreeing": share}


def points():
    cases = ("eager", 8), ("compile", 80), ("grouped_mm", 100)
    return [Point(f"peer {name}", "peers", seconds, partial(time_peer, name=name), True) for name, seconds in cases]
