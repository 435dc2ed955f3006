"""The floor under a denoise step: bytes and operations that cannot be avoided, per operation, and the time they take.

    python -m benchmarks.roofline [--gpu h200|h100|b200|a100] [--bandwidth TB/s --tflops N]
    python -m benchmarks.roofline --estimate        # what a step takes, see estimate.py

One step forwards one block of every row over its cached prefix and refines it. Every weight that is touched is read
once, keys and values of the prefix once, activations and logits stay on chip. Experts: T tokens that choose K of E
independently touch E (1 - (1 - K/E)^T) of them; real routing inside a block is correlated and touches fewer. Where a
block is admitted to C of them (LLaDA2.2), it touches no more, and blocks are admitted independently. fp8 stores all
weights but the router in one byte (scales not counted); int4 those of experts in half a byte with scales of 16 bits per
128; operations are priced at the bf16 rate.
"""

import argparse
import re
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from llada2_fast.config import ModelConfig

BLOCK = 32
GPUS = {  # reachable copy bandwidth in TB/s and dense bf16 rate in TFLOP/s, below the data sheets' peaks
    "h200": (4.3, 790.0),
    "h100": (3.0, 790.0),
    "b200": (7.2, 1800.0),
    "a100": (1.75, 270.0),
}
_NAMES = {  # what CUDA calls them; others of the name have other memory
    "h200": r"NVIDIA H200( NVL)?",
    "h100": r"NVIDIA H100 80GB HBM3",
    "b200": r"NVIDIA B200",
    "a100": r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)",
}
_COMMON = dict(
    vocab_size=157184, head_dim=128, num_key_value_heads=4, num_experts=256, num_experts_per_tok=8,
    num_shared_experts=1, n_group=8, topk_group=4, first_k_dense_replace=1, use_bias=False, rms_norm_eps=1e-6,
    rope_theta=600000.0, max_position_embeddings=32768, pad_token_id=156892, dtype="bfloat16",
)  # fmt: skip
MODELS = {
    "mini": ModelConfig(
        hidden_size=2048, num_hidden_layers=20, num_attention_heads=16, intermediate_size=5120,
        moe_intermediate_size=512, **_COMMON,
    ),
    "flash": ModelConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=9216,
        moe_intermediate_size=1024, **_COMMON,
    ),
}  # fmt: skip
MINI = MODELS["mini"]
CAPACITY = 48  # experts that a block of LLaDA2.2-flash is admitted to


class Cost(NamedTuple):
    """bytes read and operations (2 per multiply-add) of one op over a whole step."""

    bytes: float
    operations: float


def gpu_of(name):
    """The key in GPUS of the device that CUDA calls `name`; None where none is meant: another GPU, or a part of one."""
    return next((gpu for gpu, known in _NAMES.items() if re.fullmatch(known, name)), None)


def touched_experts(config, tokens, block=BLOCK):
    """Expected number of distinct experts of one layer for `tokens` tokens in blocks of `block`."""
    capacity = config.expert_capacity or config.num_experts
    by_block = capacity * (1 - (1 - config.num_experts_per_tok / capacity) ** block)
    return config.num_experts * (1 - (1 - by_block / config.num_experts) ** (tokens / block))


def expert_bytes(quantization):
    """Of a weight of an expert, routed or shared: quantization None, "fp8" or "int4"."""
    return {None: 2, "fp8": 1, "int4": 0.5 + 2 / 128}[quantization]


def step_costs(config, batch, prefix, quantization=None, block=BLOCK, carried=0):
    """{op: Cost} of one step of `batch` blocks, each over `prefix` cached tokens; quantization: as ModelConfig's.

    carried: ended blocks, of as many of the rows, that are forwarded too: nothing of them is refined, and their keys
    and values are among those that their rows read."""
    c, tokens = config, (batch + carried) * block
    weight_bytes, of_experts = 1 if quantization == "fp8" else 2, expert_bytes(quantization)
    heads, kv_heads, dim, hidden = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace

    def matmul(weights, rows, layers=1, width=weight_bytes):
        return Cost(weights * width * layers, 2.0 * weights * rows * layers)

    projections = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden
    expert = 3 * hidden * c.moe_intermediate_size
    costs = {
        "qkv and output projections": matmul(projections, tokens, c.num_hidden_layers),
        "attention": Cost(
            2 * kv_heads * dim * 2 * prefix * batch * c.num_hidden_layers,
            4.0 * heads * dim * tokens * (prefix + block) * c.num_hidden_layers,
        ),
        "router": matmul(hidden * c.num_experts, tokens, moe_layers, 2),
        "routed experts": Cost(
            touched_experts(c, tokens, block) * expert * of_experts * moe_layers,
            2.0 * expert * c.num_experts_per_tok * tokens * moe_layers,
        ),
        "shared expert": matmul(expert * c.num_shared_experts, tokens, moe_layers, of_experts),
        "dense MLP": matmul(3 * hidden * c.intermediate_size, tokens, c.first_k_dense_replace),
        "LM head": matmul(hidden * c.vocab_size, batch * block),
    }
    return {op: cost for op, cost in costs.items() if cost.bytes}


def floor_ms(costs, bandwidth, tflops):
    """The step's floor in ms: all bytes at `bandwidth` TB/s or all operations at `tflops`, whichever takes longer."""
    total_bytes = sum(cost.bytes for cost in costs.values())
    operations = sum(cost.operations for cost in costs.values())
    return max(total_bytes / bandwidth, operations / tflops) / 1e9


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--bandwidth", type=float, help="TB/s, in place of the GPU's")
    parser.add_argument("--tflops", type=float, help="bf16 TFLOP/s, in place of the GPU's")
    parser.add_argument(
        "--estimate", action="store_true", help="a step as the sum of its kernels, on an H100 and an H200"
    )
    args = parser.parse_args(argv)
    if args.estimate:
        from . import estimate  # it stands on this module

        return estimate.main()
    bandwidth, tflops = args.bandwidth or GPUS[args.gpu][0], args.tflops or GPUS[args.gpu][1]
    if bandwidth <= 0 or tflops <= 0:
        parser.error("--bandwidth and --tflops must be above 0")
    print(f"{args.gpu}: {bandwidth} TB/s, {tflops} TFLOP/s; one step of blocks of {BLOCK}")
    models = {**MODELS, "flash 2.2": replace(MODELS["flash"], expert_capacity=CAPACITY)}
    for (name, config), quantization, prefix in product(models.items(), (None, "fp8", "int4"), (1024, 32768)):
        for batch in (1, 8, 32, 128):
            costs = step_costs(config, batch, prefix, quantization)
            floor = floor_ms(costs, bandwidth, tflops)
            print(f"\n{name} {quantization or 'bf16'}, batch {batch}, prefix {prefix}: floor {floor:.2f} ms")
            for op, cost in costs.items():
                ms = floor_ms({op: cost}, bandwidth, tflops)
                print(f"  {op:28s}{cost.bytes / 1e9:9.3f} GB{cost.operations / 1e12:9.3f} TFLOP{ms:9.3f} ms")


if __name__ == "__main__":
    main()
