"""Random weights of any LLaDA2 shape, made in place on the device: never a second copy of a tensor.

Speed depends on weights through one thing, which experts the tokens of a block choose. Published floors assume that
they choose independently. In a plain random network the masks of a block, all one embedding, would choose almost alike
and read a fraction of the experts. So queries and keys are sharpened and the mask's embedding is small: what a masked
position holds is then what it attended to, and that differs by position. How many experts are touched is measured and
stands beside every figure it decides.
"""

import torch

from llada2_fast.model import LLaDA2Model

SHARP = 4.0  # of the QK-norms' weights: attention scores of standard deviation 16, so a query has few keys
MASK_SCALE = 0.02  # of the mask's embedding
FP8_STD = 64.0  # of fp8 values, which reach 448
_CHUNK = 2**26


def random_model(config, dtype, device):
    """LLaDA2Model of this config, fp8 where it says so."""
    model = LLaDA2Model(config, dtype=dtype, device="meta").to_empty(device=device).eval()
    fill(model)
    model.word_embeddings.weight[config.mask_token_id] *= MASK_SCALE
    return model


@torch.no_grad()
def fill(module):
    """Give every parameter of a network, or of a part of one, values that keep activations in a usual range."""
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        if name.endswith("expert_bias"):
            p.zero_()
        elif name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
            p.fill_(SHARP)
        elif p.ndim == 1:
            p.fill_(1.0)
        elif p.dtype != torch.float8_e4m3fn:
            p.normal_(std=1.0 if "embeddings" in name else p.shape[-1] ** -0.5)
    for name, p in parameters.items():  # behind the others, for their scales were filled as if they were weights
        if p.dtype == torch.float8_e4m3fn:
            for part in p.view(-1).split(_CHUNK):
                part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=p.device).mul_(FP8_STD))
            stem = name.removesuffix(".weight")
            scale = parameters[f"{stem}.scale" if stem != name else f"{stem}_scale"]
            scale.fill_(p.shape[-1] ** -0.5 / FP8_STD)
