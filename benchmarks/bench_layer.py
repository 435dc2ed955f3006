"""One MoE layer of LLaDA2-mini's shape on this CPU: how much of its memory's bandwidth a denoise step reaches.

    python -m benchmarks.bench_layer [--threads N] [--quick] [--json] [--save [FOLDER]]

Random weights; 32 tokens, a block, over 1024 cached ones. A step reads the experts that some token chose, the other
weights and the prefix's keys and values; those bytes over the median time are gb_s. read_gb_s: summing up a tensor of
half a gigabyte, in turn with the steps. About 10 GB of memory in float32.
"""

import argparse
from dataclasses import replace

import torch
from tqdm import tqdm

from llada2_fast.kernels.attention import Span
from llada2_fast.model import LLaDA2Model

from . import harness
from .gpu.machine import CONFIGS
from .roofline import BLOCK

PREFIX = 1024
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def one_layer(dtype):
    """A network of a single layer, an MoE layer of mini's, behind a small vocabulary."""
    shape = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 512, "mask_token_id": 511}
    config = replace(CONFIGS["mini"], **shape, pad_token_id=510, eos_token_id=(510,))
    model = LLaDA2Model(config, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:  # rows of random numbers, again and again: the values do not matter and a billion takes a minute
            some = torch.randn(4096, weight.shape[-1], generator=generator) * weight.shape[-1] ** -0.5
            for rows in weight.view(-1, weight.shape[-1]).split(len(some)):
                rows.copy_(some[: len(rows)])
    return model


def measure(dtype, rounds):
    """The record of one dtype."""
    model = one_layer(dtype)
    layer, blocks = model.layers[0], PREFIX // BLOCK + 1
    cache = model.new_cache(blocks, BLOCK)
    run = Span(tuple(range(blocks)), blocks - 1, 1, blocks * BLOCK)
    tokens = torch.randint(0, 500, (BLOCK,), generator=torch.Generator().manual_seed(1))
    chosen = []
    hook = layer.mlp.router.register_forward_hook(lambda module, inputs, routing: chosen.append(routing.ids))

    def step():
        model.forward_blocks(tokens, torch.arange(PREFIX, PREFIX + BLOCK), [run], cache)

    step()
    hook.remove()
    touched = chosen[0].unique().numel()
    expert = (layer.mlp.experts.gate_up[0].numel() + layer.mlp.experts.down[0].numel()) * dtype.itemsize
    others = sum(p.nbytes for name, p in layer.named_parameters() if ".experts." not in name)
    size = touched * expert + others + 2 * cache.k[:, :-1].nbytes
    memory = torch.ones(2**27, dtype=torch.float32)
    seconds, read = harness.timed_rounds([step, memory.sum], rounds)
    gb_s, read_gb_s = size / seconds / 1e9, memory.nbytes / read / 1e9
    return {
        "dtype": str(dtype).removeprefix("torch."), "ms": seconds * 1e3, "bytes": size, "experts": touched,
        "gb_s": gb_s, "read_gb_s": read_gb_s, "percent_of_read": 100 * gb_s / read_gb_s, "exact_rows": model.exact_rows,
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    harness.add_options(parser)
    options = parser.parse_args(argv)
    harness.check_save(parser, options, "layer")
    torch.set_num_threads(options.threads)
    layers = [measure(DTYPES[name], 3 if options.quick else 15) for name in tqdm(DTYPES)]
    for p in layers:
        print(f"{p['dtype']:>8}: {p['ms']:6.1f} ms, {p['experts']} experts, {p['bytes'] / 1e6:.0f} MB, {p['gb_s']:.1f} "
              f"GB/s, {p['percent_of_read']:.0f}% of the {p['read_gb_s']:.1f} GB/s that a sum reads")  # fmt: skip
    harness.finish("layer", options, {"layers": layers})


if __name__ == "__main__":
    main()
