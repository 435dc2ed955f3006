"""The layers of the network, with fp8 weights, or experts in int4, if the config says so. Shapes: T packed tokens,
H hidden, D head dim.

A layer knows the sizes of what it holds: all of what the config tells of, or a Share.
"""

import torch
from torch import nn

from .config import ModelConfig
from .kernels import int4
from .kernels.fp8 import FP8, linear, unquantised
from .kernels.gemm import WORDS, QuantTensor, scale_shape
from .kernels.moe import experts, mlp
from .kernels.norm import add_rms_norm, rms_norm
from .kernels.rope import qk_norm_rope, qk_norm_rope_write
from .kernels.router import route
from .weights.conversion import KeepsQuantized, NeverNarrower
from .weights.shapes import WHOLE, Share


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), over the last dimension.

    fp8: what follows reads it in fp8; wide: and something reads it as it is.
    """

    def __init__(self, size: int, eps: float, fp8: bool = False, wide: bool = False, **kw):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **kw))
        self.eps, self.fp8, self.wide = eps, fp8, wide

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, self.fp8, self.wide)

    def add(self, x, delta, wide=False):
        """x + delta, a tensor or an ExpertSum, and its norm; wide: this time something reads the norm as it is."""
        return add_rms_norm(x, delta, self.weight, self.eps, self.fp8, self.wide or wide)


class Linear(KeepsQuantized):
    """x W^T (+ b). In fp8, W is e4m3 with a `scale` per group; its `parts`, equal shares of its rows, share none; x may
    be QuantRows. In int4 it is words with a `scale` per group of a row.

    exact: on a GPU its rows do not depend on one another, see LLaDA2Model.exact.
    """

    exact = True

    def __init__(
        self, size_in: int, size_out: int, bias: bool = False, quantization: str | None = None, parts: int = 1, **kw
    ):  # fmt: skip
        super().__init__()
        self.weight, self.scale = _weight((size_out, size_in), quantization, parts, **kw)
        self.bias = nn.Parameter(torch.empty(size_out, **kw)) if bias else None

    def forward(self, x, wanted=None):
        """wanted: the kernels.gemm.Wanted rows, None = all."""
        return linear(x, self.weight, self.scale, self.bias, self.exact, wanted)


def _weight(shape, quantization, parts, dtype, device):
    """A weight and its scale, which is None unless quantised."""

    def parameter(size, kind):
        return nn.Parameter(torch.empty(size, dtype=kind, device=device), requires_grad=False)

    if quantization == "fp8":
        return parameter(shape, FP8), parameter(scale_shape(shape, parts), torch.float32)
    if quantization == "int4":
        return parameter(int4.packed_shape(shape), WORDS), parameter(int4.scale_shape(shape), dtype)
    return parameter(shape, dtype), None


class Attention(nn.Module):
    """QKV projection, QK-norm, RoPE, attention by the caller's `attend(q, k, v)`, output projection.

    With pages = (k_cache, v_cache, slot) k and v go to their pages instead, and attend(q) finds them there.
    """

    def __init__(self, config: ModelConfig, share: Share = WHOLE, **kw):
        super().__init__()
        self.heads, self.kv_heads = share.num_heads(config)
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        kind = "fp8" if config.fp8 else None
        self.query_key_value = Linear(config.hidden_size, width, config.use_qkv_bias, kind, **kw)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, self.eps, **kw)
            self.key_layernorm = RMSNorm(self.head_dim, self.eps, **kw)
        self.dense = Linear(self.heads * self.head_dim, config.hidden_size, config.use_bias, kind, **kw)
        self.norms = config.use_qk_norm

    def forward(self, x, angles, attend, pages=None):
        qkv = self.query_key_value(x).unflatten(-1, (-1, self.head_dim))
        q_weight = self.query_layernorm.weight if self.norms else None
        k_weight = self.key_layernorm.weight if self.norms else None
        args = (qkv, q_weight, k_weight, angles, self.eps, self.heads, self.kv_heads)
        o = attend(*qk_norm_rope(*args)) if pages is None else attend(qk_norm_rope_write(*args, *pages))
        return self.dense(o.flatten(-2))


class MLP(nn.Module):
    """down( silu(gate(x)) * up(x) ); gate and up are one projection, gate rows first."""

    def __init__(self, config: ModelConfig, inner: int, quantization: str | None = None, **kw):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * inner, quantization=quantization, parts=2, **kw)
        self.down = Linear(inner, config.hidden_size, quantization=quantization, **kw)

    @property
    def weights(self):
        return QuantTensor(self.gate_up.weight, self.gate_up.scale), QuantTensor(self.down.weight, self.down.scale)

    def forward(self, x, block=None, slot=None):
        return mlp(x, *self.weights, self.down.exact), None


class Router(NeverNarrower):
    """Which experts a token goes to, of all there are. Near-ties are decided by the last bits of its weights."""

    def __init__(self, config: ModelConfig, **kw):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, **kw))
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts, device=kw["device"], dtype=torch.float32))
        self.quantization = config.quantization  # of the experts' weights
        self.rule = (
            config.num_experts_per_tok, config.n_group, config.topk_group,
            config.routed_scaling_factor, config.expert_capacity,
        )  # fmt: skip

    def forward(self, x, block, slot=None):
        own = {"quantization": self.quantization, "slot": slot}
        return route(unquantised(x), self.weight, self.expert_bias, *self.rule, block, **own)


class Experts(KeepsQuantized):
    """The weights of the routed experts that are held, gate rows above up rows."""

    def __init__(self, config: ModelConfig, share: Share = WHOLE, **kw):
        super().__init__()
        count, inner, hidden = share.num_experts(config), config.moe_intermediate_size, config.hidden_size
        self.gate_up, self.gate_up_scale = _weight((count, 2 * inner, hidden), config.quantization, 2, **kw)
        self.down, self.down_scale = _weight((count, hidden, inner), config.quantization, 1, **kw)

    @property
    def weights(self):
        return QuantTensor(self.gate_up, self.gate_up_scale), QuantTensor(self.down, self.down_scale)

    def forward(self, x, routing, shared):
        """x [T, H] or QuantRows, its Routing, the shared expert's weights or None -> [T, H] or an ExpertSum of it."""
        return experts(x, routing, *self.weights, shared)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which is neither scaled nor gated. Of a share of the experts only the
    weights are there: what routing names is computed by who holds all."""

    def __init__(self, config: ModelConfig, share: Share = WHOLE, **kw):
        super().__init__()
        self.router = Router(config, **kw)
        self.experts = Experts(config, share, **kw)
        self.complete = share.experts is None
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config, shared, config.quantization, **kw) if shared else None

    def forward(self, x, block=None, slot=None):
        """slot: of the tokens in the cache, negative where nobody reads what comes out; None: all are read."""
        assert self.complete, "routing names experts that others hold"
        routing = self.router(x, block, slot)
        shared = None if self.shared_experts is None else self.shared_experts.weights
        return self.experts(x, routing, shared), routing.ids


class Layer(nn.Module):
    """Attention and MLP, each behind a norm; dense or MoE by its index."""

    def __init__(self, config: ModelConfig, index: int, share: Share = WHOLE, **kw):
        super().__init__()
        dense = index < config.first_k_dense_replace
        size, eps, fp8 = config.hidden_size, config.rms_norm_eps, config.fp8
        kind = "fp8" if fp8 else None
        self.input_layernorm = RMSNorm(size, eps, fp8, **kw)
        self.attention = Attention(config, share, **kw)
        self.post_attention_layernorm = RMSNorm(size, eps, fp8, wide=not dense, **kw)  # a router reads it as it is
        self.mlp = MLP(config, config.intermediate_size, kind, **kw) if dense else MoE(config, share, **kw)

    def forward(self, x, delta, angles, attend, block=None, pages=None, read=None):
        """delta: what the layer before adds to x, a tensor or an ExpertSum, None for the first layer. Returns x, its
        own delta and expert ids: each sum is made by the norm that follows it. read: the tokens that `attend` returns,
        if not all."""
        x, h = (x, self.input_layernorm(x)) if delta is None else self.input_layernorm.add(x, delta)
        attended = self.attention(h, angles, attend, pages)
        x, h = self.post_attention_layernorm.add(x if read is None else x[read], attended)
        slot = None if pages is None or read is not None else pages[2]
        return x, *self.mlp(h, block, slot)
