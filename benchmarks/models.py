"""Random-weight networks of the shapes the benchmarks talk about. Speed does not depend on the weights' values."""

import copy

import torch

from llada2_fast.config import ModelConfig
from llada2_fast.model import LLaDA2Model

# The small shape of the CPU comparison; expert width is half of hidden, as wide as LLaDA2-mini's is in proportion to
# its experts per token.
SMALL = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=4, intermediate_size=640, moe_intermediate_size=128,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16,
    num_experts_per_tok=4, num_shared_experts=1, n_group=4, topk_group=2, use_bias=False, rms_norm_eps=1e-6,
    rope_theta=600000.0, max_position_embeddings=16384, mask_token_id=4095, pad_token_id=4094, eos_token_id=(4094,),
)  # fmt: skip


def random_model(config, seed=0, dtype=torch.float32, device="cpu"):
    """A network of this shape with weights scaled so that activations and confidences stay in a usual range.

    The head's rows of the mask and EOS ids are zero: neither is ever the most likely token.
    """
    model = LLaDA2Model(config, dtype=dtype, device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("expert_bias"):
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1.0)
        else:
            p.normal_(std=1.0 if "embeddings" in name else p.shape[-1] ** -0.5, generator=generator)
    model.lm_head.weight.mul_(3.0)
    model.lm_head.weight[[config.mask_token_id, *config.eos_token_id]] = 0
    model.products()  # probed now and not within what is measured
    return model


def with_experts(model, make):
    """A network on the same weights whose routed experts are make(its own), a module called as layers.Experts is."""
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for layer in twin.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = make(layer.mlp.experts)
    return twin
