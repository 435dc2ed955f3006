"""Candidates of B blocks of 32 positions and V ids without filters: the most likely id, or a draw; one read of them."""

import torch

from llada2_fast.kernels import candidates

from ..gpu.gates import require
from .bench_refine import LENGTH, Step
from .cases import Case, agree


def arguments(step):
    """What candidates.candidates is given for a bench_refine.Step."""
    p = step.params
    sample = candidates.SampleParams(p.temperature, p.top_k, p.top_p, p.seed)
    ban = torch.full_like(p.flags, candidates.BAN_MASK)
    return step.logits, step.state.block_start, step.state.step, sample, step.ids, ban, None, step.filters


def wide(logits):
    """In float32; float64 where they are that already, for the truth: float32 softmax is off by 1e-5 at V = 157184."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def greedy(logits, *_rest):
    confidence, token = torch.softmax(wide(logits), -1).max(-1)
    return token, confidence


def unfiltered(logits, start, step, params, ids, *_rest):
    """Probabilities [R, L, V] without the mask id."""
    x = wide(logits) / params.temperature[:, None, None]
    x[..., ids.mask] = float("-inf")
    return torch.softmax(x, -1)


def drawn(probabilities):
    """The peer that draws with torch.multinomial from what probabilities(*arguments) gives."""

    def plain(*args):
        weight = probabilities(*args).flatten(0, 1)
        token = torch.multinomial(weight, 1)
        return token, weight.gather(1, token)

    return plain


def case_of(machine, mode, rows, vocab, probabilities=None, name="softmax, max"):
    """probabilities: None = greedy; name: the peer's."""

    def make():
        return arguments(Step(rows, vocab, machine.dtype, machine.device.type, mode, steady=True))

    first = make()

    def check():
        token, confidence = candidates.candidates(*first)
        truth = first[0].double(), *first[1:]
        if probabilities is not None:  # draws of others differ; what ours drew must be as likely as it says
            wanted = probabilities(*truth).gather(2, token[..., None])[..., 0]
        else:
            known, wanted = greedy(*truth)
            # in 16 bits the largest logit may be there twice
            require("share of tokens that differ", (token != known).float().mean().item(), 0.0 if machine.dry else 0.05)
        agree("candidates", (confidence,), (wanted,))

    plain = greedy if probabilities is None else drawn(probabilities)
    size = first[0].nbytes + rows * LENGTH * (8 + 4)
    buffers = machine.rotated(make, size)
    return Case(candidates.candidates, plain, name, buffers, size, check=check, graph=probabilities is None)


_PEER = unfiltered, "softmax, multinomial"
CASES = {
    "greedy b1 v4096": ("greedy", 1, 4096),
    "greedy b8 v32768": ("greedy", 8, 32768),
    "temperature b8 v32768": ("temperature", 8, 32768, *_PEER),
    "greedy b1 v157184": ("greedy", 1, 157184),
    "temperature b1 v157184": ("temperature", 1, 157184, *_PEER),
}


def test_candidates(timed):
    timed()
