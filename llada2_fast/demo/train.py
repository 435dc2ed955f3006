"""Train the embedded model from random weights: `python -m llada2_fast.demo.train --out DIR`.

Objective, block diffusion: one forward over [clean blocks | noisy copy 1 | noisy copy 2] of a sequence. A noisy block
sees itself and the clean blocks before it, which is what decoding does with a prefix cache. Answer tokens are masked at
a random rate per block; in half of the blocks some visible ones are replaced by plausible wrong tokens, so that the
model also learns to edit. Weights are bf16 with fp32 masters.

`--variant 2.2` has LLaDA2.2's block routing, and in half of the blocks tokens are left out or put in, too: there the
model learns to predict INSERT where one is missing before a token, DELETE where one is too many.

`--block-sizes mixed` trains block size 1 in the same forward: behind the noisy copies the answer blocks come again,
clean and as masks. Such a mask sees the clean blocks before its own, the clean tokens before it in its block and
itself, so that the same weights can check a drafted block token by token. Its loss weighs half. Refused with 2.2: the
experts that a block's tokens share would tell a mask of what comes after it.

The run is defined by its number of steps, not by a clock: the same seed, steps and build of torch on the same kind of
CPU give the same weights, whatever `--threads`; one that is wanted for `--undertrained` alone may be stopped once that
is written. With glibc, MALLOC_MMAP_THRESHOLD_=1000000000 and MALLOC_TRIM_THRESHOLD_=10000000000 in the environment save
a third of the time (page faults).
"""

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llada2_fast.demo import tasks
from llada2_fast.demo import tokenizer as tokenizers
from llada2_fast.demo.evaluate import evaluate
from llada2_fast.demo.export import export, model_card
from llada2_fast.demo.network import (
    BLOCK,
    EOS_ID,
    EXPERTS,
    LAYERS,
    MASK_ID,
    VARIANTS,
    Variant,
    forward,
    initial_parameters,
)

STEPS = 9000
UNDERTRAINED_STEP = 2500  # before the cooldown: confidences are spread, for tests of thresholds and editing
MICRO_BATCHES, MICRO_TOKENS = 2, 2048
WEIGHTS = {"spell": 1.2, "add": 2.0, "reverse": 0.8, "json": 0.8, "story": 0.8, tasks.OFF_TASK: 0.5}
SYSTEM_MESSAGES = ("Be brief.", "You are a helpful assistant.", "Answer the user.")


# Data: conversations grouped into batches of one shape, then noise.


def sequences(tokenizer, rng: random.Random) -> Iterator[tuple[list[int], int]]:
    """Endless (ids, prompt length); ids end with EOS and are filled with it up to a whole block."""
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    while True:
        tasks_drawn = rng.choices(names, weights, k=1 if rng.random() < 0.93 else 2)
        messages = [{"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}] if rng.random() < 0.03 else []
        for task in tasks_drawn:
            prompt = tasks.draw(task, rng)
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": tasks.answer(task, prompt, rng)})
        prompt_ids = tokenizer.encode(tokenizers.render(messages[:-1])).ids
        ids = prompt_ids + tokenizer.encode(messages[-1]["content"]).ids + [EOS_ID]
        yield ids + [EOS_ID] * (-len(ids) % BLOCK), len(prompt_ids)


def micro_batches(tokenizer, rng: random.Random) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Endless (clean ids [B, T], prompt lengths [B], first answer block), one shape each: no padding, one mask."""
    buckets: dict[tuple[int, int], list[tuple[list[int], int]]] = defaultdict(list)
    for ids, prompt_length in sequences(tokenizer, rng):
        blocks, first = len(ids) // BLOCK, prompt_length // BLOCK
        bucket = buckets[blocks, first]
        bucket.append((ids, prompt_length))
        per_sequence = (blocks - 1 + 2 * (blocks - first)) * BLOCK
        if len(bucket) >= round(MICRO_TOKENS / per_sequence):
            yield torch.tensor([s for s, _ in bucket]), torch.tensor([n for _, n in bucket]), first
            bucket.clear()


def layout(blocks: int, first: int, mixed: bool = False) -> tuple[Tensor, Tensor]:
    """Positions [T] and additive mask [T, T] of [clean blocks 0..blocks-2 | noisy answer blocks, twice].

    mixed: behind them [clean answer blocks | masks], where each token sees, beside the clean blocks before its own, the
    clean ones before it in its block and itself.
    """
    clean, noisy = torch.arange(blocks - 1), torch.arange(first, blocks)
    copies = range(1, 5 if mixed else 3)
    block = torch.cat([clean, *(noisy for _ in copies)]).repeat_interleave(BLOCK)
    copy = torch.cat([clean * 0, *(noisy * 0 + number for number in copies)]).repeat_interleave(BLOCK)
    positions = block * BLOCK + torch.arange(BLOCK).repeat(len(block) // BLOCK)
    earlier, same = block[None] < block[:, None], block[None] == block[:, None]
    to_clean = (copy[None] == 0) & torch.where(copy[:, None] == 0, earlier | same, earlier)
    causal = (copy[None] == 3) & same & (positions[None] < positions[:, None])
    causal |= torch.eye(len(block), dtype=torch.bool)
    own = torch.where(copy[:, None] < 3, (copy[:, None] == copy[None]) & same, causal)
    return positions, torch.zeros(len(block), len(block)).masked_fill_(~(to_clean | own), -math.inf)


class Noise:
    """Draws noisy answers, what they should be and loss weights. edits: tokens are left out and put in, too; mixed: of
    `layout`, without edits only."""

    def __init__(self, tokenizer, generator: torch.Generator, edits: bool, mixed: bool = False):
        self.generator, self.edits, self.mixed = generator, edits, mixed
        self.delete, self.split = (tokenizer.token_to_id(token) for token in tokenizers.EDIT_TOKENS)
        vocab = tokenizer.get_vocab_size()
        self.sizes = torch.zeros(vocab, dtype=torch.long)  # of each token's class; 0: none
        self.members = torch.zeros(vocab, 64, dtype=torch.long)
        words = []
        for members in tokenizers.token_classes().values():
            ids = [tokenizer.encode(word).ids[0] for word in members]
            words += ids
            self.sizes[ids] = len(ids)
            self.members[ids, : len(ids)] = torch.tensor(ids)
        words += tokenizer.encode("\n=+,. is The answer").ids
        self.words = torch.tensor(words + [EOS_ID] * (len(words) // 9))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def corrupt(self, answer: Tensor) -> Tensor:
        """A plausible wrong token for each of [B, A]: half of its class, else of the answer, shifted, or any word."""
        kind, pick = self.uniform(*answer.shape), self.uniform(*answer.shape)
        anywhere = self.words[(pick * len(self.words)).long()]
        same_row = answer.gather(1, (self.uniform(*answer.shape) * answer.shape[1]).long())
        shifted = answer.roll(1, dims=1)
        shifted = torch.where(pick < 0.5, shifted, answer.roll(-1, dims=1))
        sizes = self.sizes[answer]
        same_class = self.members[answer, (pick * sizes).long()]
        other = torch.where(kind < 0.7, same_row, torch.where(kind < 0.8, shifted, anywhere))
        return torch.where((kind < 0.5) & (sizes > 1), same_class, other)

    def misplaced(self, answer: Tensor, is_answer: Tensor, fill: Tensor, rate: Tensor) -> list[Tensor]:
        """Blocks in which tokens are missing and others too many, so that what follows comes early or late: up to BLOCK
        tokens of the next block move into one, its own last ones drop out.

        answer, is_answer, fill: [B, A]; rate: [B, 2, A / BLOCK], of either fault.
        Returns [B, 2, A] each: the ids, what each position should say, is_answer and fill of its token, and whether it
        is to be left as it is.
        """
        rows, length = answer.shape
        behind = ((answer, EOS_ID), (is_answer, True), (fill, True))
        windows = (F.pad(x, (0, BLOCK), value=value).unfold(1, 2 * BLOCK, BLOCK) for x, value in behind)
        right, inside, filling = (x[:, None].expand(-1, 2, -1, -1) for x in windows)  # [B, 2, A / BLOCK, 2 BLOCK]
        may, rate = inside & ~filling, rate[..., None]
        missing = may & (right != EOS_ID) & (self.uniform(*right.shape) < rate)
        after = missing.roll(1, -1)
        after[..., 0] = False
        extra = may & ~missing & ~after & (self.uniform(*right.shape) < rate)  # ahead of a token
        count = (~missing).int() + extra
        end = count.cumsum(-1)
        at = torch.arange(BLOCK)
        source = (end[..., None, :] <= at[:, None]).sum(-1).clamp(max=2 * BLOCK - 1)  # [B, 2, A / BLOCK, BLOCK]
        token, inside, filling, after, begin, extra = (
            x.gather(-1, source) for x in (right, inside, filling, after, end - count, extra)
        )
        extra &= begin == at
        wrong = self.corrupt(token.reshape(-1, length)).view_as(token)
        says = torch.where(extra, self.delete, torch.where(after, self.split, token))
        token = torch.where(extra & (self.uniform(*token.shape) < 0.5), wrong, token)  # else it is there twice
        return [x.reshape(rows, 2, length) for x in (token, says, inside, filling, extra | after)]

    def __call__(self, ids: Tensor, prompt_lengths: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> noisy ids, targets, loss weights, masked positions, each [B, 2, A]: two copies of the A positions of
        answer blocks. mixed: [B, 4, A], with a clean copy, of no weight, and one of masks behind them."""
        answer = ids[:, first * BLOCK :]
        rows, length = answer.shape
        position = torch.arange(first * BLOCK, first * BLOCK + length)
        is_answer = position >= prompt_lengths[:, None]
        fill = (is_answer & (answer == EOS_ID)).cumsum(1) > 1  # EOS after the first one
        rate = self.uniform(rows, 1, length // BLOCK)
        rate = torch.cat([rate, (rate + 0.5) % 1], 1)  # stratified over the copies
        rate[self.uniform(*rate.shape) < 0.1] = 1.0
        if self.edits:
            faults = self.uniform(*rate.shape) * 0.15 * ((self.uniform(*rate.shape) < 0.5) & (rate < 1))
            clean, says, is_answer, fill, kept = self.misplaced(answer, is_answer, fill, faults)
        else:
            clean, is_answer, fill = answer[:, None].expand(-1, 2, -1), is_answer[:, None], fill[:, None]
            says, kept = clean, torch.zeros((), dtype=torch.bool)
        masked = (self.uniform(rows, 2, length) < rate.repeat_interleave(BLOCK, 2)) & is_answer & ~kept
        edit_rate = self.uniform(*rate.shape) * 0.4 * (self.uniform(*rate.shape) < 0.5)
        edited = (self.uniform(rows, 2, length) < edit_rate.repeat_interleave(BLOCK, 2)) & is_answer & ~masked & ~kept
        wrong = torch.stack([self.corrupt(copy) for copy in clean.unbind(1)], 1)
        noisy = torch.where(masked, MASK_ID, torch.where(edited, wrong, clean))
        weights = torch.where(masked | (noisy != says), 1.0, 0.1) * is_answer * torch.where(fill, 0.2, 1.0)
        if self.mixed:
            single = 0.5 * is_answer * torch.where(fill, 0.2, 1.0)
            noisy = torch.cat([noisy, answer[:, None], torch.full_like(answer[:, None], MASK_ID)], 1)
            says, weights = torch.cat([says, clean], 1), torch.cat([weights, torch.zeros_like(single), single], 1)
            masked = F.pad(masked, (0, 0, 0, 2))  # the loss that is shown stays that of whole blocks
        return noisy, says, weights, masked


def loss_and_gradients(
    parameters: dict[str, Tensor], biases: Tensor, capacity: int | None, mixed: bool, batch: tuple
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the weighted loss sum; (weight sum, loss sum on masks, number of masks); expert load [LAYERS, E]."""
    ids, noisy, says, weights, masked, first = batch
    blocks = ids.shape[1] // BLOCK
    positions, mask = layout(blocks, first, mixed)
    tokens = torch.cat([ids[:, :-BLOCK], noisy.flatten(1)], 1)
    # The embedding is cast after the lookup: the same values, and its gradient is summed over positions in fp32.
    low = {name: p if name == "embed" else p.bfloat16() for name, p in parameters.items()}
    logits, load = forward(low, biases, tokens, positions, mask, (blocks - 1) * BLOCK, capacity)
    loss = F.cross_entropy(logits.flatten(0, 1), says.flatten(), reduction="none")
    gradients = torch.autograd.grad((loss * weights.flatten()).sum(), list(parameters.values()))
    counted = masked.flatten() & (weights.flatten() == 1.0)
    return list(gradients), torch.stack([weights.sum(), loss.detach()[counted].sum(), counted.sum()]), load


class Optimizer:
    """Muon with weight decay on the matrices, AdamW without on embeddings, head, norms and routers."""

    def __init__(self, parameters: dict[str, Tensor]):
        matrices = [n for n in parameters if n.split(".")[-1] in ("qkv", "dense", "in", "out")]
        self.by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for name in matrices:
            self.by_shape[tuple(parameters[name].shape[-2:])].append(parameters[name])
        self.momentum = {p: torch.zeros_like(p) for ps in self.by_shape.values() for p in ps}
        rest = [p for n, p in parameters.items() if n not in matrices]
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rates .02 (Muon) and .003 (AdamW), times `rate`."""
        for group in self.adam.param_groups:
            group["lr"] = 0.003 * rate
        self.adam.step()
        for (rows, columns), parameters in self.by_shape.items():
            updates = []
            for p in parameters:
                momentum = self.momentum[p].lerp_(p.grad, 0.05)
                updates.append(p.grad.lerp(momentum, 0.95).view(-1, rows, columns))
            counts = [len(u) for u in updates]
            scale = 0.02 * rate * max(1.0, rows / columns) ** 0.5
            for p, update in zip(parameters, orthogonalize(torch.cat(updates)).split(counts), strict=True):
                p.mul_(1 - 0.02 * rate * 0.05).sub_(update.view_as(p).float(), alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps in bf16 towards the nearest semi-orthogonal matrix of each of [n, rows, columns]."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


def train(
    variant: Variant,
    steps: int,
    seed: int,
    threads: int,
    save: Callable[[dict[str, Tensor], Tensor, int], None],
    mixed: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train from scratch; returns (fp32 masters, expert biases), and calls `save` with both and the step every 500.
    mixed: of `layout`."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tokenizers.build(variant.edits)
    parameters = initial_parameters(tokenizer.get_vocab_size(), generator)
    biases = torch.zeros(LAYERS, EXPERTS)
    optimizer, noise = Optimizer(parameters), Noise(tokenizer, generator, variant.edits, mixed)
    batches = micro_batches(tokenizer, random.Random(seed))
    work = partial(loss_and_gradients, parameters, biases, variant.capacity, mixed)
    masked_loss = None
    # The micro-batches of a step run in threads of their own, one core each: a busy neighbour then slows one of them,
    # instead of stalling every operation as a team of OpenMP threads would.
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=steps, unit="step") as bar,
    ):
        for step in range(1, steps + 1):
            drawn = [next(batches) for _ in range(MICRO_BATCHES)]
            results = list(pool.map(work, [(ids, *noise(ids, lengths, first), first) for ids, lengths, first in drawn]))
            sums, load = sum(r[1] for r in results), sum(r[2] for r in results)
            for p, *gradients in zip(parameters.values(), *(r[0] for r in results), strict=True):
                p.grad = sum(gradients) / sums[0]
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            rate = min(step / 100, 1.0, 0.005 + 0.995 * (steps - step) / (steps * 0.5))
            optimizer.step(rate)
            biases.add_(torch.sign(load.mean(1, keepdim=True) - load), alpha=0.003 * rate)
            mean = (sums[1] / sums[2]).item()
            masked_loss = mean if masked_loss is None else 0.98 * masked_loss + 0.02 * mean
            bar.update()
            bar.set_postfix(masked_loss=f"{masked_loss:.3f}", refresh=False)
            if step % 500 == 0:
                save(parameters, biases, step)
    return parameters, biases


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llada2_fast.demo.train", description="Train the embedded model.")
    parser.add_argument("--steps", type=int, default=STEPS, help="length of the whole schedule (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="2.1", choices=VARIANTS, help="LLaDA2.1 or 2.2 (default %(default)s)")
    parser.add_argument(
        "--block-sizes",
        default="block",
        choices=("block", "mixed"),
        help=f"mixed: {BLOCK} and 1, for checks of a draft by the same weights (default: {BLOCK})",
    )
    parser.add_argument("--out", default="demo_model", help="checkpoint folder, refreshed every 500 steps")
    parser.add_argument("--threads", type=int, default=2, choices=range(1, MICRO_BATCHES + 1))
    parser.add_argument("--undertrained", help=f"folder for a second checkpoint, taken at step {UNDERTRAINED_STEP}")
    args = parser.parse_args()
    mixed = args.block_sizes == "mixed"
    if mixed and args.variant == "2.2":
        parser.error("--block-sizes mixed --variant 2.2: expected --variant 2.1, which routes token by token")
    torch.set_num_threads(1)
    variant = VARIANTS[args.variant]

    def save(parameters: dict[str, Tensor], biases: Tensor, step: int) -> None:
        export(args.out, parameters, biases, variant)
        if step == UNDERTRAINED_STEP and args.undertrained:
            export(args.undertrained, parameters, biases, variant)

    start = time.perf_counter()
    parameters, biases = train(variant, args.steps, args.seed, args.threads, save, mixed)
    minutes = (time.perf_counter() - start) / 60
    results = evaluate(parameters, biases, variant, per_task=500, seed=1)
    run = f"{args.steps} steps, seed {args.seed}, {minutes:.0f} minutes on {args.threads} CPU cores"
    export(args.out, parameters, biases, variant, card=model_card(results, run, args.variant, mixed))
    print(f"{args.out}: {run}")
    for task, (accuracy, tpf, _) in results.items():
        print(f"{task:10} exact match {accuracy:.3f}  tokens per forward {tpf:.2f}")


if __name__ == "__main__":
    main()
