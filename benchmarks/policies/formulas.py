"""What a step of each decoding policy writes, literally by its formula and with no care for speed. The kernels are held
against those that the product has (DecodeParams.policy); the others were tried, and these are all there is of them.

A rule is a function of a Step that returns the block after it, int64 [R, L]; the functions here make rules of a
policy's numbers. Each writes at least one token of a row that has masks. For the masked positions i of a block:

    c_i  the likeliest id but the mask's (ties: the lowest)
    p_i  its probability, of the softmax over all ids at temperature 1: the confidence
    H_i  the entropy of that softmax, in nats

Shapes: R rows, L block_length, V vocab.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch


class Candidates(NamedTuple):
    """By position, [R, L] each."""

    token: torch.Tensor  # int64, c
    confidence: torch.Tensor  # float32, p
    entropy: torch.Tensor  # float32, H


class Step:
    """What a rule may know.

    logits: float32 [R, L, V] of the block as it is.
    block: int64 [R, L].
    masked: bool [R, L], the positions that are to be filled.
    mask_id: of the mask token.
    number: which step of the block this is, from 1 on.
    over: bool [R], nothing is left to fill: no mask, or an end token with none before it.
    memory: {name: tensor [R, ...]} that the rule keeps from step to step of a block, empty at the first. A row whose
        "again" is True has another step though it is over.
    ends: a block [R, L] -> bool [R], whether it holds an end token with no mask before it.
    check: (rows int64 [N], draft int64 [N, L]) -> logits [N, L, V] by block size 1, each position after the draft's
        tokens before it.
    """

    def __init__(self, logits, block, masked, mask_id, number=1, over=None, memory=None, check: Callable | None = None,
                 ends: Callable | None = None):  # fmt: skip
        self.logits, self.block, self.masked, self.mask_id, self.number = logits, block, masked, mask_id, number
        self.over = ~masked.any(1) if over is None else over
        self.memory = {} if memory is None else memory
        self.check, self.ends = check, ends or (lambda block: torch.zeros_like(self.over))

    @cached_property
    def candidates(self) -> Candidates:
        return candidates(self.logits, self.mask_id)

    def written(self, commit, token=None):
        """The block with the candidates, or other tokens [R, L], where `commit` bool [R, L] says so."""
        return torch.where(commit, self.candidates.token if token is None else token, self.block)


def candidates(logits, mask_id) -> Candidates:
    share = logits.float().softmax(-1)
    token = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf).argmax(-1)
    return Candidates(token, share.gather(-1, token[..., None])[..., 0], torch.special.entr(share).sum(-1))


def _at_least_one(commit, masked, rank):
    """`commit`, or where that is empty the masked position of the highest rank (ties: the first), if there is one."""
    best = torch.zeros_like(commit).scatter_(1, rank.masked_fill(~masked, -torch.inf).argmax(1, keepdim=True), True)
    return torch.where(commit.any(1, keepdim=True), commit, best & masked)


def _in_order(cost, masked):
    """(order int64 [R, L], cost [R, L] in this order): masked positions by ascending cost (ties: the first), then the
    others at no cost."""
    order = cost.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True)
    return order, cost.masked_fill(~masked, 0.0).gather(1, order)


def _back(chosen, order, masked):
    """bool [R, L] by position of what is `chosen` in an order."""
    return torch.zeros_like(masked).scatter_(1, order, chosen) & masked


def threshold_commits(candidates, masked, tau):
    """i with p_i > tau, or the best p. Source: the LLaDA2 model cards' generate."""
    return _at_least_one(masked & (candidates.confidence > tau), masked, candidates.confidence)


def entropy_commits(candidates, masked, bound):
    """In ascending order of H the first k with H_1 + ... + H_k - max(H_1, ..., H_k) <= bound, k as large as can be: no
    more than `bound` nats between the joint distribution of what is committed and the product of its parts.

    Source: the EB-Sampler (arXiv 2505.24857); DiffusionGemma and JetEngine have it.
    """
    order, cost = _in_order(candidates.entropy, masked)
    return _back(cost.cumsum(1) - cost.cummax(1)[0] <= bound, order, masked)


def decayed_commits(candidates, masked, bound, decay):
    """i where the entropies of the positions ahead of it in the order of H, each times decay^(distance - 1), sum to no
    more than `bound`. Source: our own; with decay 1 it is entropy_commits."""
    commit = torch.zeros_like(masked)
    for row, (entropy, open_) in enumerate(zip(candidates.entropy.tolist(), masked.tolist(), strict=True)):
        ahead = []  # positions of less entropy
        for i in sorted((i for i, is_open in enumerate(open_) if is_open), key=lambda i: (entropy[i], i)):
            commit[row, i] = sum(entropy[j] * decay ** (abs(i - j) - 1) for j in ahead) <= bound
            ahead.append(i)
    return commit


def product_commits(candidates, masked, bound):
    """In descending order of p as many as keep the product of their confidences, were they independent the probability
    that all are right, at `bound` or above."""
    order, cost = _in_order(-candidates.confidence.log(), masked)
    commit = _back((-cost.cumsum(1)).exp() >= bound, order, masked)
    return _at_least_one(commit, masked, candidates.confidence)


def threshold(tau):
    """See threshold_commits."""
    return lambda step: step.written(threshold_commits(step.candidates, step.masked, tau))


def entropy(bound, decay=1.0):
    """See entropy_commits, and decayed_commits where there is a decay."""
    return lambda step: step.written(_by_entropy(step, bound, decay))


def _by_entropy(step, bound, decay):
    if decay == 1:
        return entropy_commits(step.candidates, step.masked, bound)
    return decayed_commits(step.candidates, step.masked, bound, decay)


def product(bound):
    """See product_commits."""
    return lambda step: step.written(product_commits(step.candidates, step.masked, bound))


def anneal(tau, least, steps):
    """The threshold falls from `tau` to `least` over `steps` steps of a block: at step s it is
    tau - (tau - least) (s - 1) / max(1, steps - 1).

    Source: mlx-vlm (mlx_vlm/models/llada2_moe/language.py), min_threshold, without max_transfer_per_step.
    """

    def rule(step):
        progress = min(1.0, (step.number - 1) / max(1, steps - 1))
        return step.written(threshold_commits(step.candidates, step.masked, tau - (tau - least) * progress))

    return rule


def credit(tau, alpha=0.7, beta=0.8, gamma=0.2):
    """A token that keeps winning gets credit C [L, V], 0 at first: at each step C <- beta C, then at masked positions
    C_i[c_i] += p_i^gamma. Candidates and confidences are those of the logits f + alpha ln(1 + C); threshold as ever.

    Source: arXiv 2510.06133, in the form and with the numbers of dInfer's CreditThresholdParallelDecoder.
    """

    def rule(step):
        token, confidence, _ = step.candidates
        kept = step.memory.get("credit", torch.zeros_like(step.logits)) * beta
        kept.scatter_add_(2, token[..., None], (confidence**gamma * step.masked)[..., None])
        step.memory["credit"] = kept
        fused = candidates(step.logits + alpha * kept.log1p(), step.mask_id)
        return step.written(threshold_commits(fused, step.masked, tau), fused.token)

    return rule


def remask(inner, bound):
    """A block that is over by the rule `inner` is looked at once more: of the tokens it has written, those whose
    probability under the final context is below `bound` become masks, and `inner` fills these.

    Source: none literally; WINO (arXiv 2507.18578), Saber (2510.18165) and ReMDM (2503.00307) are relatives.
    """

    def rule(step):
        memory = step.memory
        own = memory.setdefault("own", step.masked.clone())
        again = memory.get("again", torch.ones_like(step.over))
        held = step.logits.float().softmax(-1).gather(-1, step.block[..., None])[..., 0]
        doubted = own & ~step.masked & (held < bound) & (step.over & again)[:, None]
        memory["again"] = again & ~step.over
        filled = torch.where(step.over[:, None], step.block, inner(step))
        return filled.masked_fill(doubted, step.mask_id)

    return rule


def self_speculative(bound, decay=1.0):
    """The candidates at all masks are a draft. If `entropy` would commit them all, or as many as end the answer, it
    does. Else block size 1 says a token at each mask, after the draft before it: these are written from the first mask
    on as long as they are the draft's, and so is the first that is not.

    Source: S2D2 (arXiv 2603.25702), in a greedy form: what is checked is what block size 1 would say by itself.
    """

    def rule(step):
        draft = torch.where(step.masked, step.candidates.token, step.block)
        commit = _by_entropy(step, bound, decay)
        settled = step.written(commit)
        unsure = torch.where((step.masked & ~commit).any(1) & ~step.ends(settled))[0]
        if not len(unsure):
            return settled
        said = candidates(step.check(unsure, draft[unsure]), step.mask_id).token
        wrong = step.masked[unsure] & (said != draft[unsure])
        wrong_before = wrong.cumsum(1) - wrong.long()
        block = settled.clone()
        block[unsure] = torch.where(step.masked[unsure] & (wrong_before == 0), said, step.block[unsure])
        return block

    return rule
