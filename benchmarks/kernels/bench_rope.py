"""QK-norm, rotation and page writes of T tokens."""

from functools import partial

import torch
import torch.nn.functional as F

from llada2_fast.kernels import rope

from ..gpu.gates import rope_case
from .cases import Case, agree


def plain(qkv, q_weight, k_weight, cos, sin, eps, num_heads, num_kv_heads, k_cache, v_cache, slot):
    def turned(x, weight):
        x, size = F.rms_norm(x, weight.shape, weight, eps), cos.shape[-1]
        part, rest = x[..., :size], x[..., size:]
        half = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
        return torch.cat((part * cos[:, None] + half * sin[:, None], rest), -1)

    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
    k_cache.flatten(0, 1)[slot] = turned(k, k_weight)
    v_cache.flatten(0, 1)[slot] = v
    return turned(q, q_weight)


def case_of(machine, config, tokens):
    make = partial(rope_case, machine, machine.size(tokens, 64), config)
    first = make()
    size = 2 * first[0].nbytes  # everything read is written somewhere

    def check():
        *args, k_cache, v_cache, slot = first
        outputs = []
        for op in (rope.qk_norm_rope_write, plain):
            caches = k_cache.clone(), v_cache.clone()
            outputs.append((op(*args, *caches, slot), *caches))
        agree("rope", *outputs)

    return Case(
        rope.qk_norm_rope_write, plain, "F.rms_norm, rotate_half", machine.rotated(make, size), size, check=check
    )


CASES = {
    f"{config} t{tokens}": (config, tokens)
    for config, tokens in (("small", 32), ("mini", 32), ("mini", 1024), ("flash", 32))
}


def test_rope(timed):
    timed()
