"""The parameters of the network: their names, their shapes, and which of them are fp8."""

import re

from ..config import ModelConfig
from ..kernels.fp8 import scale_shape

_FP8 = re.compile(r"(query_key_value|dense|gate_up|down|lm_head)(\.weight)?$")  # parameters held in fp8


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the network, in its own (fused) layout."""
    V, H, D, E = config.vocab_size, config.hidden_size, config.head_dim, config.num_experts
    nq, nk = config.num_attention_heads, config.num_key_value_heads
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
        shapes[f"{mlp}.experts.gate_up"] = (E, 2 * width, H)
        shapes[f"{mlp}.experts.down"] = (E, H, width)
        if config.num_shared_experts:
            add_mlp(f"{mlp}.shared_experts", config.num_shared_experts * width)
    if config.fp8:
        weights = {name: shape for name, shape in shapes.items() if is_fp8(config, name)}
        scales = {scale_name(name): scale_shape(shape, 1 + ("gate_up" in name)) for name, shape in weights.items()}
        shapes.update(scales)
    return shapes


def is_fp8(config: ModelConfig, param: str) -> bool:
    """Whether the network holds this parameter in fp8."""
    return config.fp8 and _FP8.search(param) is not None


def scale_name(param):
    """The parameter that holds the scales of an fp8 one."""
    return param.removesuffix(".weight") + (".scale" if param.endswith(".weight") else "_scale")
