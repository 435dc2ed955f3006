"""What a step commits under a policy by entropy: what its paper's formula says, tried on every small case there is.

That the kernel does what the reference does is in test_refine.py.
"""

import itertools
import math

import pytest
import torch

from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.candidates import NO_ENTROPY, entropies_ref
from llada2_fast.kernels.state import report_ref
from tests.kernels.interpreter import interpreted
from tests.kernels.test_refine_rules import IDS, PADDING, PROMPT, M, V, params, peaks, state, step

ENTROPY = refine.BAN_MASK | refine.OWN_SOFTMAX | refine.ENTROPY
SPECULATES = ENTROPY | refine.SPECULATES
SURE = (0.3, 0.6, 0.9, 0.999)  # of the likeliest token; the other ids share the rest


def entropy_of(p):
    rest = (1 - p) / (V - 1)
    return -(p * math.log(p) + (V - 1) * rest * math.log(rest))


def by_formula(entropies, bound):
    """Ben-Hamu et al. (arXiv 2505.24857): of the positions by rising entropy as many as keep the sum of their entropies
    without the largest one, which bounds how far their joint distribution is from their product, within the bound."""
    order = sorted(entropies, key=lambda at: entropies[at])
    within = [n for n in range(1, len(order) + 1) if sum(entropies[at] for at in order[: n - 1]) <= bound]
    return sorted(order[: max(within, default=0)])


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.6, 1.5, 2.2, 4.0, 100.0])
def test_every_small_block_is_committed_by_the_formula(bound):
    """Four positions of any certainty, masked or not: 4 ** 4 * 2 ** 4 blocks in one batch."""
    cases = list(itertools.product(itertools.product(SURE, repeat=4), itertools.product((True, False), repeat=4)))
    logits = torch.cat([peaks(*((3, p) for p in sure)) for sure, _ in cases])
    blocks = [[M if masked else 5 for masked in holes] for _, holes in cases]
    out = refine.refine_step(logits, state(*blocks), params(len(cases), flags=ENTROPY, entropy_bound=bound), IDS)
    for (sure, holes), commit in zip(cases, out.commit.tolist(), strict=True):
        masked = {at: entropy_of(p) for at, (p, hole) in enumerate(zip(sure, holes, strict=True)) if hole}
        assert [at for at, chosen in enumerate(commit) if chosen] == by_formula(masked, bound)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_an_entropy_counts_less_from_afar(decay):
    """The two certain ones are 1 and 4 positions from the third, or beside it."""
    low, high = entropy_of(0.9), entropy_of(0.6)
    for block, distances in (([0.9, 0.6, 5, 5, 5, 0.9], (1, 4)), ([5, 5, 0.9, 0.6, 0.9, 5], (1, 1))):
        at = block.index(0.6)
        logits = peaks(*((3, p if p < 1 else 0.5) for p in block))
        before = [M if p < 1 else 5 for p in block]
        load = sum(low * decay ** (d - 1) for d in distances)
        for bound, chosen in ((load * 1.001, True), (load * 0.999, False)):
            rules = params(flags=ENTROPY, entropy_bound=bound, entropy_decay=decay)
            assert (at in step(logits, state(before), rules).commit) == chosen
    assert low < high


def test_the_entropy_is_of_the_model_s_own_softmax_mask_included():
    """At temperature 1, whatever the row draws with; nothing is told of rows under other policies."""
    logits = torch.randn(3, 2, V, generator=torch.Generator().manual_seed(1))
    logits[1, 0, 4] = float("-inf")
    flags = torch.tensor([ENTROPY, ENTROPY, refine.BAN_MASK])
    found = entropies_ref(logits, None, torch.tensor([[True, True], [True, False], [True, True]]), None, flags)
    wanted = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert found[0].tolist() == pytest.approx(wanted[0].tolist(), rel=1e-6)
    weight = torch.softmax(logits[1, 0].double(), -1)
    assert found[1, 0].item() == pytest.approx(torch.special.entr(weight).sum().item(), rel=1e-6)
    assert found[1, 1] == NO_ENTROPY and (found[2] == NO_ENTROPY).all()


def test_at_least_the_most_certain_one_is_committed_and_no_fewer_than_the_quota():
    block, sure = [M, M, M, M], peaks((1, 0.3), (2, 0.5), (3, 0.4), (4, 0.2))
    assert step(sure, state(block), params(flags=ENTROPY)).commit == [1]
    assert step(sure, state(block), params(flags=ENTROPY, min_transfer=3)).commit == [0, 1, 2]
    assert step(sure, state([5, 6, 7, M]), params(flags=ENTROPY)).done


def test_ties_go_to_the_lowest_position():
    assert step(peaks(*[(3, 0.4)] * 4), state([M] * 4), params(flags=ENTROPY)).commit == [0]


def both(logits, before, rules):
    """The report of the reference, and of the kernel in Triton's interpreter."""
    for name in ("torch", "triton"):
        own = state(*before.tokens.tolist(), kind=before.kind.tolist())
        with interpreted(), force_ops(name):
            yield refine.refine_step(logits, own, rules, IDS), own


@pytest.mark.parametrize("bound", [0.0, 1.0, 50.0])
def test_a_draft_is_only_reported_unless_it_fills_the_block(bound):
    kinds = [[PROMPT, 0, 0, PADDING], [0, 0, 0, 0]]
    logits = torch.cat((peaks((1, 0.9), (2, 0.4), (3, 0.6), (4, 0.5)), peaks((1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6))))
    before = state([6, M, M, M], [5, 5, 5, M], kind=kinds)
    fills = bound >= entropy_of(0.6)
    for out, own in both(logits, before, params(2, flags=SPECULATES, entropy_bound=bound)):
        drafted, filled = out.report[:, 9:13].tolist()
        assert drafted[1:3] == [2, 3] and filled == [5, 5, 5, 4]
        assert own.tokens[1].tolist() == filled and own.frozen[1] == refine.BLOCK_DONE and own.step[1] == 1
        assert out.status[:, refine.MASKS_BEFORE].tolist() == [2, 1]
        if fills:
            assert own.tokens[0].tolist() == [6, 2, 3, M] and own.frozen[0] and own.step[0] == 1
            continue
        assert own.tokens[0].tolist() == [6, M, M, M] and not own.frozen[0] and not out.commit[0].any()
        assert out.status[0].tolist() == [0, 2, 0, 0, -1, 0, 0, 2]
        sure = out.report[0, 17:21].contiguous().view(torch.float32).tolist()
        assert sure[1:3] == pytest.approx([0.4, 0.6], rel=1e-5)
        untouched = report_ref(out.status.unbind(1), own)[0]
        assert out.report[0, 13:17].tolist() == untouched[13:17].tolist()  # nothing was written at any step


def test_a_draft_of_logits_that_are_an_error_is_one():
    logits = peaks((1, 0.9), (2, 0.4))
    logits[0, 1, 3] = float("nan")
    got = step(logits, state([M, M]), params(flags=SPECULATES))
    assert got.error and got.tokens == [M, M]
