"""The parameters of the network, or of a share of it: their names, their shapes, and which are fp8 or int4."""

import re
from typing import NamedTuple

from ..config import ModelConfig
from ..kernels import int4
from ..kernels.gemm import SCALE_GROUP, scale_shape

_FP8 = re.compile(r"(query_key_value|dense|gate_up|down|lm_head)(\.weight)?$")  # parameters held in fp8
_INT4 = re.compile(r"experts\.(gate_up|down)(\.weight)?$")  # parameters held in int4, routed and shared


class Share(NamedTuple):
    """What one of several networks holds of every layer; a range that is None means all. Dense MLPs, shared experts and
    biases of `dense` are held whole, and so are routers, which score all experts.

    kv_heads: KV heads, with the query heads that read them.
    experts: routed experts.
    """

    kv_heads: range | None = None
    experts: range | None = None

    def check(self, config: ModelConfig):
        """ValueError for a range that a network of this config cannot be cut into."""
        for name, count in (("kv_heads", config.num_key_value_heads), ("experts", config.num_experts)):
            part = getattr(self, name)
            if part is not None and (not part or part.step != 1 or part.start < 0 or part.stop > count):
                raise ValueError(f"{name}={part}: expected a range within 0..{count - 1}")
        if self.kv_heads is not None and config.fp8 and config.head_dim % SCALE_GROUP:
            allowed = f"None: in fp8 heads of {config.head_dim} share scales, which have {SCALE_GROUP} rows each"
            raise ValueError(f"kv_heads={self.kv_heads}: expected {allowed}")

    def num_heads(self, config: ModelConfig) -> tuple[int, int]:
        """Query heads and KV heads of a layer."""
        kv_heads = config.num_key_value_heads if self.kv_heads is None else len(self.kv_heads)
        return kv_heads * (config.num_attention_heads // config.num_key_value_heads), kv_heads

    def num_experts(self, config: ModelConfig) -> int:
        """Routed experts of a layer."""
        return config.num_experts if self.experts is None else len(self.experts)

    def cut(self, config: ModelConfig, param: str) -> tuple[int, tuple[range, ...] | None]:
        """A dimension of the whole parameter `param`, and which ranges of it are held, one after the other; None: all.

        The rows of query_key_value are those of all query heads, all key heads, all value heads."""
        if ".experts." in param and self.experts is not None:
            return 0, (self.experts,)
        if self.kv_heads is None or ".attention." not in param:
            return 0, None
        size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        held = range(self.kv_heads.start * size, self.kv_heads.stop * size)
        queries = range(held.start * group, held.stop * group)
        if ".query_key_value." in param:
            keys = config.num_attention_heads * size
            values = keys + config.num_key_value_heads * size
            return 0, (queries, *(range(first + held.start, first + held.stop) for first in (keys, values)))
        return 1, (queries,) if param.endswith(".dense.weight") else None


WHOLE = Share()


def parameter_shapes(config: ModelConfig, share: Share = WHOLE) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the network, in its own (fused) layout.

    config: the network's.
    share: what is held of its layers. ValueError if the config has no such share.
    """
    share.check(config)
    V, H, D, E = config.vocab_size, config.hidden_size, config.head_dim, config.num_experts
    nq, nk = share.num_heads(config)
    shapes = {"word_embeddings.weight": (V, H), "norm.weight": (H,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, H)

    def add_mlp(name, width):
        shapes[f"{name}.gate_up.weight"] = (2 * width, H)
        shapes[f"{name}.down.weight"] = (H, width)

    for i in range(config.num_hidden_layers):
        layer, attention, mlp = f"layers.{i}", f"layers.{i}.attention", f"layers.{i}.mlp"
        shapes[f"{layer}.input_layernorm.weight"] = (H,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (H,)
        shapes[f"{attention}.query_key_value.weight"] = ((nq + 2 * nk) * D, H)
        shapes[f"{attention}.dense.weight"] = (H, nq * D)
        if config.use_qkv_bias:
            shapes[f"{attention}.query_key_value.bias"] = ((nq + 2 * nk) * D,)
        if config.use_bias:
            shapes[f"{attention}.dense.bias"] = (H,)
        if config.use_qk_norm:
            shapes[f"{attention}.query_layernorm.weight"] = (D,)
            shapes[f"{attention}.key_layernorm.weight"] = (D,)
        if i < config.first_k_dense_replace:
            add_mlp(mlp, config.intermediate_size)
            continue
        width = config.moe_intermediate_size
        shapes[f"{mlp}.router.weight"] = (E, H)
        shapes[f"{mlp}.router.expert_bias"] = (E,)
        shapes[f"{mlp}.experts.gate_up"] = (share.num_experts(config), 2 * width, H)
        shapes[f"{mlp}.experts.down"] = (share.num_experts(config), H, width)
        if config.num_shared_experts:
            add_mlp(f"{mlp}.shared_experts", config.num_shared_experts * width)
    if config.int4:
        for name, shape in [(name, shape) for name, shape in shapes.items() if is_int4(config, name)]:
            shapes |= {name: int4.packed_shape(shape), scale_name(name): int4.scale_shape(shape)}
    if config.fp8:
        weights = {name: shape for name, shape in shapes.items() if is_fp8(config, name)}
        scales = {scale_name(name): scale_shape(shape, 1 + ("gate_up" in name)) for name, shape in weights.items()}
        shapes.update(scales)
    return shapes


def is_fp8(config: ModelConfig, param: str) -> bool:
    """Whether the network of a config holds the parameter of this name in fp8."""
    return config.fp8 and _FP8.search(param) is not None


def is_int4(config: ModelConfig, param: str) -> bool:
    """Whether the network of a config holds the parameter of this name as words of int4."""
    return config.int4 and _INT4.search(param) is not None


def scale_name(param: str) -> str:
    """The parameter that holds the scales of the fp8 or int4 one of this name."""
    return param.removesuffix(".weight") + (".scale" if param.endswith(".weight") else "_scale")
