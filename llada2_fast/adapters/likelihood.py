"""How likely a text is under block diffusion: a bound, estimated or exact, for evaluation by likelihood."""

import math

import torch
import torch.nn.functional as F

from ..decoding.decoder import PREFILL_TOKENS
from ..decoding.inputs import check_prompts
from ..kernels._ambient import isolated
from ..kernels.attention import Span
from ..model import Read, read_nothing

_REAL = {"dtype": torch.float64, "device": "cpu"}


@isolated
def likelihood_bound(
    model, prompt, continuation, mask_id, block_length=None, mc_num=128, seed=0, batch_size=16, attend_tail=True
):
    """A lower bound of log p(continuation | prompt) in nats, the negative training loss of block diffusion.

    model: LLaDA2Model.
    prompt, continuation: lists of token ids; the prompt may be empty.
    mask_id: the model's mask token.
    block_length: None = the model's.
    mc_num: samples of a block, at most.
    seed: of the samples.
    batch_size: samples forwarded together, of no influence on the result on a float32 CPU.
    attend_tail: whether masks stand behind the continuation in its last block, as while generating.

    With the grid of `generate`, the sum over the blocks that hold continuation of

        E over l ~ U{1..k}, M ~ U{subsets of l}  of  k / l * sum over i in M of log p(x_i | x without M, earlier blocks)

    k: the block's positions that hold continuation, M: those of them that are masked. That is the cross entropy of the
    masked positions weighted by 1 / t at a mask ratio t ~ U(0, 1), and the mean over all orders in which k tokens can
    be committed one by one. Earlier blocks and prompt positions are clean.

    If 2^k - 1 <= mc_num the expectation is summed over all M exactly, so one token needs one forward. Otherwise mc_num
    M are drawn from torch.Generator(seed), a new one per call so that answers are compared on the same masks; l is
    stratified over 1..k. ValueError for no continuation, ids outside the vocabulary and too many positions.
    Source: LLaDA (arXiv 2502.09992), its likelihood for tasks, by blocks (arXiv 2503.09573).
    """
    if not continuation:
        raise ValueError("continuation: expected at least one token, got none")
    length = block_length or model.block_length
    ids = torch.tensor([*prompt, *continuation], dtype=torch.int64, device="cpu")
    n, total = len(prompt), len(ids)
    check_prompts([ids], 0, model.config.vocab_size, model.config.max_position_embeddings, "continuation")
    blocks = -(-total // length)
    canvas = torch.full((blocks, length), mask_id, dtype=torch.int64, device="cpu")
    canvas.view(-1)[:total] = ids
    canvas, where = canvas.to(model.device), torch.arange(blocks * length, device=model.device).view(blocks, length)
    limit = blocks * length if attend_tail else total
    cache = model.new_cache(blocks - 1 + batch_size, length)
    chunk = max(1, PREFILL_TOKENS[model.device.type] // length)
    for begin in range(0, blocks - 1, chunk):
        end = min(begin + chunk, blocks - 1)
        span = Span(tuple(range(end)), begin, end - begin, limit)
        nothing = read_nothing(model.device)
        model.forward_blocks(canvas[begin:end].flatten(), where[begin:end].flatten(), [span], cache, nothing)

    generator, bound = torch.Generator().manual_seed(seed), 0.0
    for block in range(n // length, blocks):
        scored = slice(max(0, n - block * length), min(length, total - block * length))
        samples, weights = _masks(scored.stop - scored.start, mc_num, generator)
        logs = []
        for rows in samples.to(model.device).split(batch_size):
            tokens = canvas[block].repeat(len(rows), 1)
            tokens[:, scored].masked_fill_(rows, mask_id)
            spans = [Span((*range(block), blocks - 1 + row), block, 1, limit) for row in range(len(rows))]
            read = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            read[:, scored] = rows
            read = Read(list(range(len(rows))), torch.where(read.flatten())[0])
            hidden = model.forward_blocks(tokens.flatten(), where[block].repeat(len(rows)), spans, cache, read)
            logits = model.lm_logits(hidden)
            target = canvas[block, scored].expand(rows.shape)[rows]
            log_p = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
            log_p[rows] = -F.cross_entropy(logits.float(), target, reduction="none").double()
            logs.append(log_p.sum(1).cpu())
        bound += float(weights @ torch.cat(logs))
    return bound


def _masks(count, mc_num, generator):
    """Masks bool [S, count], none of them empty, and weights float64 [S], so that the weighted sum of the masks' summed
    log-probabilities is the expectation in `likelihood_bound`, or an unbiased estimate of it."""
    if 2**count - 1 <= mc_num:
        masks = (torch.arange(1, 2**count, device="cpu")[:, None] >> torch.arange(count, device="cpu")) & 1 == 1
        sizes = masks.sum(1).tolist()
        return masks, torch.tensor([1 / (size * math.comb(count, size)) for size in sizes], **_REAL)
    at = (torch.arange(mc_num, device="cpu") + torch.rand((), generator=generator, **_REAL)) / mc_num
    sizes = (at * count).long().clamp(max=count - 1) + 1
    draws = torch.rand(mc_num, count, generator=generator, dtype=torch.float32, device="cpu")
    ranks = draws.argsort(1).argsort(1)
    return ranks < sizes[:, None], count / (mc_num * sizes.double())
