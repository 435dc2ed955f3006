"""Whether a row's bits depend on the rows beside it, on the machine and under the settings this runs with.

python tests/rows.py THREADS      prints one JSON object; exit code 1 if something promised does not hold
"""

import functools
import json
import sys
from pathlib import Path

import torch

from llada2_fast.config import ModelConfig
from llada2_fast.generate import generate
from llada2_fast.kernels.moe import gated
from llada2_fast.kernels.product import linear, rows_of
from llada2_fast.model import LLaDA2Model

SHAPES = [(N, K) for K in (10, 16, 64, 512, 2048) for N in (16, 64, 461)]
DTYPES = (torch.float32, torch.bfloat16)
WIDE = ModelConfig(  # K up to 2048, experts that few rows share, odd widths
    vocab_size=61, hidden_size=512, num_hidden_layers=2, intermediate_size=2048, moe_intermediate_size=20,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
    num_experts_per_tok=3, num_shared_experts=1, n_group=4, topk_group=2, use_bias=False, mask_token_id=60,
    pad_token_id=59, eos_token_id=(59,),
)  # fmt: skip


def unlike(width, depth, dtype, heights=(*range(1, 35), 47, 64, 97, 200)):
    """Heights at which some row of a product comes out otherwise than among 300."""
    x, weight = cancelling(300, width, depth, dtype)
    tall = linear(x, weight)
    begins = {height: (0, 3, 300 - height) for height in heights}
    return [
        h for h, begin in begins.items() if any(unequal(linear(x[i : i + h], weight), tall[i : i + h]) for i in begin)
    ]


def cancelling(count, width, depth, dtype):
    """x [count, depth] and a weight [width, depth] whose products are next to nothing but roundings."""
    generator, pairs = torch.Generator().manual_seed(1), depth // 2
    x = torch.randn(count, pairs, generator=generator)
    weight = torch.randn(width, pairs, generator=generator)
    order = torch.randperm(2 * pairs, generator=generator)
    x, weight = torch.cat((x, -x), 1)[:, order], torch.cat((weight, weight), 1)[:, order]
    rest = torch.full((1, depth - 2 * pairs), 1e-3)
    return tuple(torch.cat((t, rest.expand(len(t), -1)), 1).to(dtype) for t in (x, weight))


def unequal(a, b):
    return not torch.equal(a, b)


def unlike_gated(width, dtype):
    """Heights at which some row of silu(gate) * up comes out otherwise than among 3001."""
    x = torch.randn(3001, 2 * width, generator=torch.Generator().manual_seed(2)).to(dtype)
    tall = gated(x.clone())
    return [h for h in (1, 2, 7, 333, 1639, 2500) if unequal(gated(x[5 : 5 + h].clone()), tall[5 : 5 + h])]


def promised(width, depth, dtype):
    return rows_of(torch.empty(width, depth, dtype=dtype)).least is not None


@functools.cache
def model(config=WIDE, dtype=torch.float32):
    """Random weights with confidences spread over (0, 1)."""
    network = LLaDA2Model(config, dtype)
    generator = torch.Generator().manual_seed(3)
    for name, weight in network.named_parameters():
        weight.data.normal_(0, 0.1 if name.endswith("bias") else weight.shape[-1] ** -0.5, generator=generator)
        if "norm" in name:
            weight.data.add_(1.0)
    network.lm_head.weight.data.mul_(3.0)
    return network


def decode(network, prompts, length, **rules):
    """Tokens and trace of each prompt, all in one batch."""
    out = generate(
        network, prompts, gen_length=11, block_length=length, threshold=0.3, eos_id=-1, return_dict=True, trace=True,
        **rules,
    )  # fmt: skip
    return [(out.sequences[i].tolist(), out.trace[i].events) for i in range(len(prompts))]


def differing(network, length):
    """Prompts whose tokens or trace in a batch are not those they have alone; greedy, drawn and edited."""
    generator = torch.Generator().manual_seed(length)
    prompts = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in (3, 0, 7, 12, 1)]
    found = []
    for rules in ({}, {"temperature": 0.8, "top_k": 9}, {"editing_threshold": 0.2, "max_post_steps": 2}):
        alone = [decode(network, [prompt], length, seed=[i], **rules)[0] for i, prompt in enumerate(prompts)]
        batch = decode(network, prompts, length, seed=list(range(len(prompts))), **rules)
        found += [(length, i, *rules) for i in range(len(prompts)) if batch[i] != alone[i]]
    return found


def main(threads):
    torch.set_num_threads(threads)
    kept, broken = {}, []
    for dtype in DTYPES:
        for shape in SHAPES:
            kept[f"{shape} {dtype}"] = promised(*shape, dtype)
            if promised(*shape, dtype) and (heights := unlike(*shape, dtype)):
                broken.append(f"{shape} {dtype}: heights {heights}")
        broken += [f"gated, {width}, {dtype}" for width in (33, 128, 250) if unlike_gated(width, dtype)]
        network = model(dtype=dtype)
        if network.exact_rows:
            broken += [f"decoding in {dtype}: {which}" for which in differing(network, length=3)]
        kept[f"decoding {dtype}"] = network.exact_rows
    print(json.dumps({"promised": kept, "broken": broken}))
    return bool(broken)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main(int(sys.argv[1])))
