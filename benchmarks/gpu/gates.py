"""Inputs of every kernel at the shapes of LLaDA2-mini, fresh at each call, and the gate it passes before it is timed.

A gate runs the kernel into poisoned memory and holds it against the PyTorch reference: on the same values in float32
where the kernel's own type is bf16, by relative norm.
"""

import copy
from functools import partial

import torch
from torch.utils._pytree import tree_map_only

from llada2_fast.decoding.rules import NEVER, Rule, batch_params
from llada2_fast.kernels import attention, norm, refine, rope
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import ExpertSum, summed
from llada2_fast.layers import MoE

from ..roofline import BLOCK
from .machine import fill, poisoned

BF16_ERROR = 1e-2
IDLE = Rule(  # greedy rows whose every step does all its work, commits nothing and edits nothing
    temperature=0.0, top_k=0, top_p=1.0, threshold=2.0, edit_threshold=2.0, steps=NEVER, min_transfer=0,
    max_steps=NEVER, max_post_steps=16, entropy_bound=0.0, entropy_decay=1.0, flags=refine.BAN_MASK,
)  # fmt: skip
MODES = {  # of drawing a token
    "greedy": {},
    "sampling": {"temperature": 1.0},
    "filters": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
}


def relative(out, reference):
    """||out - reference|| / ||reference||; NaN if out holds one."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def require(what, value, most):
    """Raise unless value <= most; NaN never is."""
    if not value <= most:
        raise ArithmeticError(f"{what}: {value:.3g}, at most {most:g} allowed")


def close(what, pairs, most=BF16_ERROR):
    """A gate's line for pairs of (out, reference); ArithmeticError where their relative error is above `most`."""
    errors = [relative(*pair) for pair in pairs]
    for error in errors:  # each, for max() may pass over a NaN
        require(f"{what}, relative error", error, most)
    return {"relative_error": max(errors)}


def both_ways(op, args):
    """What an op makes of these arguments in poisoned memory; the reference's result and arguments, in float32."""
    wide = [tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, arg) for arg in args]
    with poisoned():
        out = op(*args)
    with force_ops("torch"):
        return out, op(*wide), wide


def params_of(rules, device):
    """RefineParams of rows without EOS ids and with seeds of their own, each tensor in memory of its own."""
    params = batch_params(rules, range(len(rules)), [()] * len(rules), device)
    return refine.RefineParams(*(column.clone() for column in vars(params).values()))


def refine_case(machine, modes):
    """Logits [R, 32, V], a BlockState of masks, RefineParams that commit nothing, SpecialIds; a row per mode."""
    config, rows = machine.config("mini"), len(modes)
    vocab, mask_id, device = config.vocab_size, config.mask_token_id, machine.device
    logits = machine.random(rows, BLOCK, vocab, std=2.0)
    planted = torch.randint(vocab - 1, (rows, BLOCK, 1), device=device)
    logits.scatter_add_(2, planted, (8 + 8 * torch.rand(planted.shape, device=device)).to(machine.dtype))
    tokens = torch.full((rows, BLOCK), mask_id, device=device)
    kind = torch.full_like(tokens, refine.GENERATED, dtype=torch.int8)
    state = refine.BlockState.fresh(tokens, kind, torch.full((rows,), 1024, device=device))
    flags = refine.BAN_MASK | refine.OWN_SOFTMAX
    params = params_of([IDLE._replace(flags=flags, **MODES[mode]) for mode in modes], device)
    return logits, state, params, refine.SpecialIds(mask_id)


def allowed_case(machine, rows):
    """Allowed of rows of refine_case: half of the classes may stand at a position."""
    vocab, device = machine.config("mini").vocab_size, machine.device
    classes = torch.randint(refine.MAX_CLASSES, (rows, vocab), device=device).to(torch.int16)
    bits = torch.randint(-(2**31), 2**31, (rows, BLOCK, refine.WORDS), device=device).int()
    return refine.Allowed(classes, bits)


def gate_refine(machine, guided=False):
    """All modes in one batch that commits and edits; guided: three in four rows are. Greedy rows: everything equal.
    Draws may differ where rounding moves a boundary between two ids: 3 in 100 at most."""
    modes = ["greedy", "sampling", "filters", "greedy"] * machine.size(4, 1)
    logits, state, params, ids = refine_case(machine, modes)
    state.tokens[3::4, :16] = 7  # editable
    params.flags[3::4] |= refine.EDITING
    params.flags[::4] |= refine.ENTROPY
    params.entropy_bound.fill_(2.0)
    params.threshold.fill_(0.5)
    params.edit_threshold.fill_(0.5)
    params.min_transfer.fill_(3)
    allowed = None
    if guided:
        params.flags[torch.arange(len(modes)) % 4 < 3] |= refine.GUIDED
        allowed = allowed_case(machine, len(modes))
    twin = copy.deepcopy(state)
    with poisoned():
        out = refine.refine_step(logits, state, params, ids, allowed=allowed)
    with force_ops("torch"):
        wanted = refine.refine_step(logits, twin, params, ids, allowed=allowed)
    greedy = params.temperature == 0
    for name in ("status", "token", "commit", "edit"):
        if not torch.equal(getattr(out, name)[greedy], getattr(wanted, name)[greedy]):
            raise ArithmeticError(f"{name} of greedy rows differs from the reference")
    for name, tensor in vars(state).items():
        if name != "commit_confidence" and not torch.equal(tensor[greedy], getattr(twin, name)[greedy]):
            raise ArithmeticError(f"state.{name} of greedy rows differs from the reference")
    same = out.token == wanted.token
    error = ((out.confidence - wanted.confidence).abs() / wanted.confidence)[same].max().item()
    differing = (~same[~greedy]).float().mean().item()
    require("confidences, relative error", error, 1e-5)
    require("share of draws that differ", differing, 0.03)
    return {"confidence_error": error, "draws_differing": differing, "commits": int(out.commit.sum())}


def attention_case(machine, prefixes, unused=0):
    """q, k_cache, v_cache, BlockBatch: the block behind each row's prefix, and unused blocks; pages in random order."""
    config, device = machine.config("mini"), machine.device
    count = [prefix // BLOCK + 1 for prefix in prefixes]
    shape = (sum(count), BLOCK, config.num_key_value_heads, config.head_dim)
    table = torch.zeros(len(prefixes), max(count), dtype=torch.int32, device=device)
    pages = torch.randperm(shape[0], device=device).int()
    for row, own in enumerate(pages.split(count)):
        table[row, : len(own)] = own
    whole = partial(torch.tensor, dtype=torch.int32, device=device)
    blocks = attention.BlockBatch(
        whole([*range(len(prefixes)), *[-1] * unused]), whole([n - 1 for n in count] + [0] * unused), table,
        whole([n * BLOCK for n in count]),
    )  # fmt: skip
    q = machine.random((len(prefixes) + unused) * BLOCK, config.num_attention_heads, config.head_dim)
    return q, machine.random(*shape), machine.random(*shape), blocks


def gate_attention(machine):
    """Rows of mixed lengths, an empty prefix and an unused block among them."""
    args = attention_case(machine, [machine.size(n, 96) for n in (0, 1024, 5024, 33 * 1024)], unused=1)
    args[-1].limit[1] -= 5  # a row that ends within its last page
    out, wanted, _ = both_ways(attention.block_attention, args)
    return close("attention", [(out, wanted)])


def moe_layer(machine, quantization=None):
    layer = MoE(machine.config("mini", quantization), dtype=machine.dtype, device=machine.device).requires_grad_(False)
    fill(layer)
    return layer


@torch.no_grad()
def gate_moe(machine, quantization=None):
    """Against float32 on the same weights; if quantised, its own reference. Near-ties may route 1 in 200 otherwise."""
    layer = moe_layer(machine, quantization)
    pairs, rerouted, counts = [], 0, (32, machine.size(1000, 48))
    for tokens in counts:
        h = machine.random(tokens, layer.router.weight.shape[1])
        with poisoned():
            out, ids = layer(h)
            out = summed(out)
        with force_ops("torch"):
            wanted, wanted_ids = layer(h) if quantization else copy.deepcopy(layer).float()(h.float())
        same = (ids == wanted_ids).all(1)
        pairs.append((out[same], wanted[same]))
        rerouted += int((~same).sum()) / sum(counts)
    line = close("experts", pairs, 2 * BF16_ERROR if quantization else BF16_ERROR)
    require("share of tokens routed otherwise", rerouted, 0.005)
    return line | {"rerouted": rerouted}


def norm_case(machine, tokens, model="mini", experts=False):
    """Arguments of add_rms_norm; experts: what is added is the sum of what the experts of a layer made."""
    config = machine.config(model)
    hidden, top_k = config.hidden_size, config.num_experts_per_tok
    if experts:
        weights = torch.rand(tokens, top_k, device=machine.device)
        added = ExpertSum(machine.random(tokens * top_k, hidden), weights, machine.random(tokens, hidden))
    else:
        added = machine.random(tokens, hidden)
    return machine.random(tokens, hidden), added, machine.random(hidden), 1e-6


def rope_case(machine, tokens, model="mini"):
    """Arguments of qk_norm_rope_write for whole blocks at pages in random order."""
    config = machine.config(model)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    position = torch.randint(32768, (tokens,), device=machine.device)
    every = torch.arange(32768, device=machine.device)
    table = rope.rope_angles(every, config.rotary_dim, config.rope_theta, 1.0, machine.dtype)
    angles = rope.Angles(*table, position)
    caches = [machine.random(tokens // BLOCK, BLOCK, kv_heads, dim) for _ in range(2)]
    slot = torch.randperm(tokens, device=machine.device)
    weights = machine.random(dim), machine.random(dim)
    return machine.random(tokens, heads + 2 * kv_heads, dim), *weights, angles, 1e-6, heads, kv_heads, *caches, slot


def gate_norm(machine):
    pairs = []
    for experts in (False, True):
        out, wanted, _ = both_ways(norm.add_rms_norm, norm_case(machine, machine.size(1000, 64), experts=experts))
        pairs += zip(out, wanted, strict=True)
    return close("norm", pairs)


def gate_rope(machine):
    args = rope_case(machine, machine.size(1024, 64))
    q, wanted, wide = both_ways(rope.qk_norm_rope_write, args)
    return close("rope and pages", [(q, wanted), *zip(args[7:9], wide[7:9], strict=True)])


GATES = {
    "refine": gate_refine,
    "refine guided": partial(gate_refine, guided=True),
    "attention": gate_attention,
    "moe": gate_moe,
    "moe fp8": partial(gate_moe, quantization="fp8"),
    "moe int4": partial(gate_moe, quantization="int4"),
    "norm": gate_norm,
    "rope": gate_rope,
}
