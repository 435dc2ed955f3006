"""Exact match of a freshly trained model on held-out prompts, by a plain uncached decoder: `train` reports with it.

The project's own decoder is the real evaluation (`benchmarks/quality.py`); this one needs nothing but the training
network.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from llada2_fast.demo import tasks
from llada2_fast.demo import tokenizer as tokenizers
from llada2_fast.demo.network import BLOCK, EOS_ID, MASK_ID, Variant, forward
from llada2_fast.demo.tokenizer import EDIT_TOKENS

MAX_BLOCKS = 8


@torch.no_grad()
def decode(
    weights: dict[str, Tensor], biases: Tensor, variant: Variant, prompts: list[list[int]], threshold: float
) -> list[tuple[list[int], int]]:
    """Greedy block decoding without editing -> (answer ids before the first EOS, denoise forwards) per prompt."""
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[len(prompt) // BLOCK].append(i)
    results: list[tuple[list[int], int]] = [([], 0)] * len(prompts)
    for first, members in groups.items():
        canvas = torch.full((len(members), (first + MAX_BLOCKS) * BLOCK), MASK_ID)
        for row, i in enumerate(members):
            canvas[row, : len(prompts[i])] = torch.tensor(prompts[i])
        lengths = torch.tensor([len(prompts[i]) for i in members])
        forwards, finished = torch.zeros(len(members), dtype=torch.long), torch.zeros(len(members), dtype=torch.bool)
        for end in range((first + 1) * BLOCK, canvas.shape[1] + 1, BLOCK):
            open_rows = (~finished).nonzero()[:, 0]
            while len(open_rows):
                window = canvas[open_rows, :end]
                canvas[open_rows, end - BLOCK : end] = _step(weights, biases, variant, window, threshold)
                forwards[open_rows] += 1
                generated = torch.arange(end) >= lengths[open_rows, None]
                masked = (canvas[open_rows, :end] == MASK_ID) & generated
                ended = (canvas[open_rows, :end] == EOS_ID) & generated & (masked.cumsum(1) == 0)
                finished[open_rows] = ended.any(1)
                open_rows = open_rows[~ended.any(1) & masked.any(1)]
        for row, i in enumerate(members):
            ids = canvas[row, len(prompts[i]) :].tolist()
            results[i] = (ids[: ids.index(EOS_ID)] if finished[row] else ids, int(forwards[row]))
    return results


def _step(weights: dict[str, Tensor], biases: Tensor, variant: Variant, window: Tensor, threshold: float) -> Tensor:
    """The last block of `window` [R, W] after one step: masks above the threshold are filled, or else the surest."""
    positions = torch.arange(window.shape[1])
    block = positions // BLOCK
    mask = torch.zeros(len(block), len(block)).masked_fill_(block[:, None] < block, -math.inf)
    logits = forward(weights, biases, window, positions, mask, len(block) - BLOCK, variant.capacity)[0]
    probabilities = logits.softmax(-1)
    probabilities[..., MASK_ID] = -1.0
    if variant.edits:
        probabilities[..., -len(EDIT_TOKENS) :] = -1.0
    confidence, token = probabilities.max(-1)
    current = window[:, -BLOCK:]
    confidence = torch.where(current == MASK_ID, confidence, -1.0)
    commit = confidence > threshold
    surest = confidence.argmax(1, keepdim=True)
    commit.scatter_(1, surest, confidence.gather(1, surest) > -1.0)
    return torch.where(commit, token, current)


def evaluate(
    parameters: dict[str, Tensor], biases: Tensor, variant: Variant, per_task: int, seed: int, threshold: float = 0.9
) -> dict[str, tuple[float, float, list[tuple[str, str]]]]:
    """Per task: accuracy, tokens per forward (first EOS included), (prompt, wrong answer) pairs; held out, in fp32."""
    weights = {name: p.detach().bfloat16().float() for name, p in parameters.items()}
    tokenizer, results = tokenizers.build(variant.edits), {}
    for task in (*tasks.TASKS, tasks.OFF_TASK):
        prompts = tasks.sample(task, per_task, seed)
        ids = [tokenizer.encode(tokenizers.render([{"role": "user", "content": prompt}])).ids for prompt in prompts]
        decoded = decode(weights, biases, variant, ids, threshold)
        answers = [tokenizer.decode(answer, skip_special_tokens=False) for answer, _ in decoded]
        wrong = [(p, a) for p, a in zip(prompts, answers, strict=True) if not tasks.check(task, p, a)]
        tokens, forwards = sum(len(a) + 1 for a, _ in decoded), sum(n for _, n in decoded)
        results[task] = (1 - len(wrong) / per_task, tokens / forwards, wrong)
    return results
