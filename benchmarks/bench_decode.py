"""Decoding on a CPU, side by side with the diffusers package on the same weights, in one run.

    python -m benchmarks.bench_decode [--quick] [--json] [--save]

Both sides run our LLaDA2Model with the same operations, dtype and one thread. diffusers' LLaDA2Pipeline and
BlockRefinementScheduler drive it as they drive any model: the whole window at every step, without a cache, through an
adapter that makes attention block-causal. Ours is generate(). The tokens of both must be equal before anything is
timed; then rounds of both alternate and the medians are compared.
"""

import argparse
import statistics
import time

import torch

from benchmarks.harness import finish, timed_rounds
from benchmarks.models import SMALL, random_model

STEPS, BLOCK = 8, 32


class BlockCausal(torch.nn.Module):
    """Our network as diffusers calls a model: its 2D mask becomes the block-causal one the weights are trained for."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.dtype, self.device, self.config = model.dtype, model.device, None

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.inner(input_ids, position_ids=position_ids, block_length=BLOCK)


def diffusers_run(model, prompt, gen_length):
    """A call of diffusers' own pipeline that commits by quota alone (threshold 2), greedy, without editing."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    pipe = LLaDA2Pipeline(model=BlockCausal(model), scheduler=BlockRefinementScheduler(block_length=BLOCK))
    pipe.set_progress_bar_config(disable=True)

    def call():
        return pipe(
            input_ids=prompt, use_chat_template=False, gen_length=gen_length, block_length=BLOCK,
            num_inference_steps=STEPS, threshold=2.0, editing_threshold=None, eos_early_stop=False,
            mask_token_id=model.config.mask_token_id, output_type="seq",
        ).sequences  # fmt: skip

    return call


def our_run(model, prompt, gen_length):
    """The same with generate(); returns its GenerateOutput."""

    def call():
        return model.generate(
            prompt, gen_length=gen_length, block_length=BLOCK, steps=STEPS, threshold=2.0, return_dict=True
        )

    return call


def compare(model, prompt_length, gen_length, rounds):
    """One point: {tokens/s of both, their ratio, forwards per block, ms per forward}."""
    generator = torch.Generator().manual_seed(prompt_length)
    prompt = torch.randint(0, SMALL.vocab_size - 2, (1, prompt_length), generator=generator)
    ours, theirs = our_run(model, prompt, gen_length), diffusers_run(model, prompt, gen_length)
    output = ours()
    if not torch.equal(output.sequences, theirs()):
        raise SystemExit(f"tokens differ at prompt {prompt_length}: nothing is timed")
    mine, peer = timed_rounds([ours, theirs], rounds)
    counters = output.counters[0]
    return {
        "prompt": prompt_length,
        "generated": gen_length,
        "tok_s": gen_length / mine,
        "diffusers_tok_s": gen_length / peer,
        "ratio_vs_diffusers": peer / mine,
        "forwards_per_block": statistics.mean(counters.forwards_per_block),
        "ms_per_forward": mine * 1e3 / counters.denoise_forwards,
    }


def block_cost(model, positions, rounds):
    """Seconds of one block (STEPS forwards) at each position, median over rounds; prefill is not counted."""
    calls = []
    for at in positions:
        prompt = torch.randint(0, SMALL.vocab_size - 2, (1, at), generator=torch.Generator().manual_seed(at))

        def call(prompt=prompt):
            marks = []
            model.generate(
                prompt, gen_length=BLOCK, block_length=BLOCK, steps=STEPS, threshold=2.0,
                on_step=lambda *_: marks.append(time.perf_counter()),
            )  # fmt: skip
            return marks[-1] - marks[0]  # all forwards but the first, which would count the prefill

        calls.append(call)
    times = [[] for _ in positions]
    for _ in range(rounds):
        for at, call in enumerate(calls):
            times[at].append(call())
    return [statistics.median(t) for t in times]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one timed round, no 2048-token prompt")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--save", action="store_true", help="append the JSON line to benchmarks/results/")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = random_model(SMALL)
    points = [compare(model, 512, 512, 1 if args.quick else 3)]
    if not args.quick:
        points.append(compare(model, 2048, 512, 1))
    near, far = block_cost(model, (64, 2048), 5 if args.quick else 15)
    for point in points:
        print(
            f"prompt {point['prompt']:5d}: {point['tok_s']:8.1f} tok/s, diffusers {point['diffusers_tok_s']:6.1f}, "
            f"ratio {point['ratio_vs_diffusers']:.1f}, {point['ms_per_forward']:.2f} ms per forward"
        )
    print(f"block at position 2048 costs {far / near:.2f}x the block at 64")
    finish("decode", args, {**points[0], "points": points, "block_2048_over_64": far / near})


if __name__ == "__main__":
    main()
