"""The refinement step rule by rule, on logits made by hand: each test states one sentence of the decoding semantics.

Vocabulary of ten tokens 0..9; 9 is the mask id `M`, 8 the end of the sequence `E`. `peaks` builds logits that give a
wanted token a wanted probability, and the rest evenly to all others.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from llada2_fast.kernels import candidates, refine
from tests.thinned import thinned

V, M, E = 10, 9, 8
IDS = refine.SpecialIds(M)
GENERATED, PROMPT, TAIL, PADDING = refine.GENERATED, refine.PROMPT, refine.TAIL, refine.PADDING
DEFAULT = refine.BAN_MASK
EDIT = refine.BAN_MASK | refine.EDITING
NONE = float("-inf")

RULES = dict(
    temperature=0.0, top_k=0, top_p=1.0, seed=0, threshold=2.0, edit_threshold=2.0, steps=1_000, min_transfer=1,
    max_steps=2**30, max_post_steps=16, entropy_bound=0.0, entropy_decay=1.0, flags=DEFAULT,
)  # fmt: skip
TYPES = dict(
    temperature=torch.float32, top_k=torch.int32, top_p=torch.float32, seed=torch.int64, threshold=torch.float32,
    edit_threshold=torch.float32, steps=torch.int32, min_transfer=torch.int32, max_steps=torch.int32,
    max_post_steps=torch.int32, entropy_bound=torch.float32, entropy_decay=torch.float32, flags=torch.int32,
)  # fmt: skip


def params(rows=1, eos=(E,), **rules):
    """RefineParams of `rows` rows; a rule is one value for all or a list with one for each."""
    values = {}
    for name, value in (RULES | rules).items():
        values[name] = torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=TYPES[name])
    ids = eos if eos and isinstance(eos[0], (list, tuple)) else [eos] * rows
    width = max(1, *map(len, ids))
    padded = [[*row, *[-1] * (width - len(row))] for row in ids]
    return refine.RefineParams(**values, eos_ids=torch.tensor(padded, dtype=torch.int64))


def state(*blocks, kind=None, start=0, prior_flags=0, step=0, post=0, frozen=0):
    """BlockState of one row per block (a list of ids); the other arguments are one for all rows or a list."""
    tokens = torch.tensor(blocks)

    def per_row(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * len(blocks), dtype=dtype)

    kinds = torch.tensor(kind, dtype=torch.int8) if kind else torch.zeros_like(tokens, dtype=torch.int8)
    kinds = kinds.expand(tokens.shape).clone()
    made = refine.BlockState.fresh(tokens, kinds, per_row(start, torch.int64), per_row(prior_flags, torch.int32))
    made.step, made.post_steps = per_row(step, torch.int32), per_row(post, torch.int32)
    made.frozen = per_row(frozen, torch.int32)
    return made


def peaks(*positions):
    """[1, L, V] logits from (token, probability) pairs."""
    out = torch.empty(1, len(positions), V)
    for i, (token, p) in enumerate(positions):
        out[0, i] = math.log((1 - p) / (V - 1))
        out[0, i, token] = math.log(p)
    return out


def step(logits, before, rules):
    """One step on a row alone; everything it did as plain numbers."""
    out = refine.refine_step(logits, before, rules, IDS)
    status = out.status[0].tolist()
    return SimpleNamespace(
        tokens=before.tokens[0].tolist(),
        commit=torch.where(out.commit[0])[0].tolist(),
        edit=torch.where(out.edit[0])[0].tolist(),
        candidate=out.token[0].tolist(),
        confidence=out.confidence[0].tolist(),
        done=bool(status[refine.FLAGS] & refine.BLOCK_DONE),
        finished=bool(status[refine.FLAGS] & refine.FINISHED),
        error=bool(status[refine.FLAGS] & refine.ERROR),
        changed=bool(status[refine.FLAGS] & refine.CHANGED),
        left=status[refine.MASKS_LEFT],
        commits=status[refine.COMMITS],
        edits=status[refine.EDITS],
        eos_at=status[refine.EOS_AT],
        step=status[refine.STEP],
        post=status[refine.POST_STEPS],
        before=status[refine.MASKS_BEFORE],
    )


# Candidates of greedy rows


def test_the_confidence_is_the_softmax_over_the_whole_vocabulary_mask_included():
    logits = torch.zeros(1, 1, V)
    logits[0, 0, 3], logits[0, 0, M] = 2.0, 3.0
    got = step(logits, state([M]), params())
    assert got.candidate == [3] and got.tokens == [3]
    assert got.confidence[0] == pytest.approx(math.exp(2) / (math.exp(2) + math.exp(3) + 8), rel=1e-6)


def test_the_mask_id_is_no_candidate_unless_the_row_says_so():
    banned = step(peaks((M, 0.99)), state([M]), params())
    assert banned.tokens == [0] and banned.left == 0 and banned.done
    allowed = step(peaks((M, 0.99)), state([M]), params(flags=0))
    assert allowed.candidate == [M] and allowed.tokens == [M] and allowed.commit == [0]
    assert allowed.left == 1 and not allowed.done


@pytest.mark.parametrize("vocab", [2, 10, 1023, 1025, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_id_wins_ties(vocab, dtype):
    logits = torch.zeros(1, 3, vocab, dtype=dtype)
    logits[0, 1, vocab // 2 :] = 3.0
    logits[0, 2, vocab - 1] = 3.0
    made = state([vocab, vocab, vocab])  # a mask id outside the logits
    out = refine.refine_step(logits, made, params(), refine.SpecialIds(vocab))
    assert out.token[0].tolist() == [0, vocab // 2, vocab - 1]
    wanted = torch.softmax(logits[0].float(), -1).gather(1, out.token[0][:, None])[:, 0]
    torch.testing.assert_close(out.confidence[0], wanted, rtol=1e-5, atol=0)


def test_probabilities_are_float32_whatever_the_logits_are():
    logits = (torch.randn(1, 4, V, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    low = refine.refine_step(logits, state([M] * 4), params(), IDS)
    wide = refine.refine_step(logits.float(), state([M] * 4), params(), IDS)
    assert low.confidence.dtype == torch.float32
    assert torch.equal(low.token, wide.token) and torch.equal(low.confidence, wide.confidence)


def test_minus_infinity_is_a_legal_logit():
    logits = peaks((3, 0.9), (4, 0.9))
    logits[0, 0, [0, 1, M]] = NONE
    logits[0, 1] = NONE
    logits[0, 1, 6] = -1e30  # the only token left is certain
    got = step(logits, state([M, M]), params(threshold=0.5))
    assert got.tokens == [3, 6] and not got.error and got.confidence[1] == 1.0


# Candidates of rows that draw


NARROW = [dict(temperature=1e-6), dict(temperature=1.0, top_k=1), dict(temperature=2.0, top_p=1e-6)]


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_a_draw_s_probability_nears_one_as_the_draw_narrows_but_not_under_own_softmax(narrow):
    logits = torch.randn(1, 4, V, generator=torch.Generator().manual_seed(5))
    logits[0, 1, M] = 4.0  # no candidate, but it counts for the model's own softmax
    logits[0, 2, :M] = NONE
    logits[0, 2, 6] = 0.0
    greedy = refine.refine_step(logits, state([M] * 4), params(), IDS)
    drawn = refine.refine_step(logits, state([M] * 4), params(**narrow), IDS)
    assert torch.equal(drawn.token, greedy.token) and (drawn.confidence == 1).all()
    own = refine.refine_step(logits, state([M] * 4), params(flags=DEFAULT | refine.OWN_SOFTMAX, **narrow), IDS)
    assert torch.equal(own.token, greedy.token) and torch.equal(own.confidence, greedy.confidence)


SAMPLING = [dict(), dict(top_k=4), dict(top_p=0.8), dict(top_k=6, top_p=0.9)]


@pytest.mark.parametrize("temperature, sampling, ban", thinned(3, [0.3, 1.0, 2.5], SAMPLING, [0, DEFAULT]), ids=str)
def test_under_own_softmax_the_draw_is_the_same_and_its_confidence_the_model_s(temperature, sampling, ban):
    logits = torch.randn(1, 6, V, generator=torch.Generator().manual_seed(6)).bfloat16() * 3
    rules = dict(temperature=temperature, seed=11, **sampling)
    wanted = refine.refine_step(logits, state([M] * 6), params(flags=ban, **rules), IDS)
    got = refine.refine_step(logits, state([M] * 6), params(flags=ban | refine.OWN_SOFTMAX, **rules), IDS)
    assert torch.equal(got.token, wanted.token)
    shares = torch.softmax(logits[0].float(), -1).gather(1, got.token[0][:, None])[:, 0]
    torch.testing.assert_close(got.confidence[0], shares, rtol=1e-5, atol=0)


def test_own_softmax_over_the_threshold_and_in_the_order_of_the_quota():
    logits = peaks((1, 0.4), (2, 0.95), (3, 0.6))
    rules = dict(temperature=1e-6, threshold=0.9, flags=DEFAULT | refine.OWN_SOFTMAX)
    assert step(logits, state([M] * 3), params(**rules)).commit == [1]
    assert step(logits, state([M] * 3), params(**rules | dict(min_transfer=2))).commit == [1, 2]
    assert step(logits, state([M] * 3), params(**rules | dict(flags=DEFAULT))).commit == [0, 1, 2]
    edit = dict(edit_threshold=0.5, flags=EDIT | refine.OWN_SOFTMAX)
    assert step(logits, state([5, 5, 5]), params(**rules | edit)).edit == [1, 2]


# Commits


def test_the_threshold_is_strict():
    first = step(peaks((3, 0.7), (4, 0.2)), state([M, M]), params(threshold=0.1))
    p = first.confidence[0]
    assert first.commit == [0, 1]
    at = step(peaks((3, 0.7), (3, 0.7), (3, 0.7)), state([M] * 3), params(threshold=p))
    assert at.commit == [0]  # nothing above it: the quota's one
    below = math.nextafter(p, 0.0) - 1e-7
    assert step(peaks((3, 0.7), (3, 0.7), (3, 0.7)), state([M] * 3), params(threshold=below)).commit == [0, 1, 2]


def test_all_above_the_threshold_are_committed_when_the_quota_is_met():
    logits = peaks((1, 0.9), (2, 0.3), (3, 0.8), (4, 0.7))
    assert step(logits, state([M] * 4), params(threshold=0.6, steps=2)).commit == [0, 2, 3]
    assert step(logits, state([M] * 4), params(threshold=0.75, steps=2)).commit == [0, 2]


def test_the_most_confident_are_committed_when_too_few_are_above_the_threshold():
    logits = peaks((1, 0.4), (2, 0.3), (3, 0.95), (4, 0.35))
    got = step(logits, state([M] * 4), params(threshold=0.9, min_transfer=2))
    assert got.commit == [0, 2] and got.tokens == [1, M, 3, M] and got.left == 2 and got.commits == 2


def test_ties_in_confidence_go_to_the_lowest_position():
    logits = peaks((1, 0.5), (1, 0.7), (1, 0.5), (1, 0.7), (1, 0.5))
    assert step(logits, state([M] * 5), params(min_transfer=1)).commit == [1]
    assert step(logits, state([M] * 5), params(min_transfer=3)).commit == [0, 1, 3]
    assert step(logits, state([M] * 5), params(min_transfer=4)).commit == [0, 1, 2, 3]


def test_fewer_are_committed_if_fewer_are_masked():
    got = step(peaks((1, 0.4), (2, 0.9), (3, 0.4)), state([M, 5, M]), params(min_transfer=3))
    assert got.commit == [0, 2] and got.tokens == [1, 5, 3] and got.done


@pytest.mark.parametrize(
    "length, steps, least, quotas",
    [
        (7, 3, 1, [3, 2, 2]),
        (7, 3, 3, [3, 3, 1]),
        (8, 8, 1, [1] * 8),
        (5, 2, 1, [3, 2]),
        (4, 6, 1, [1] * 4),
        (6, 1, 1, [6]),
        (6, 4, 2, [2, 2, 2]),
        (8, 3, 1, [3, 3, 2]),
    ],
)
def test_the_schedule_spreads_the_block_over_the_steps(length, steps, least, quotas):
    made, rules = state([M] * length), params(steps=steps, min_transfer=least)
    logits = peaks(*[(1, 0.3 + 0.01 * i) for i in range(length)])
    got = [step(logits, made, rules) for _ in quotas]
    assert [g.commits for g in got] == quotas
    assert [g.done for g in got] == [False] * (len(quotas) - 1) + [True]


def test_after_its_last_step_the_schedule_s_last_quota_holds():
    """Steps 3, L 7: 3, 2, 2 and then 2 for ever."""
    for late in (3, 4, 50):
        got = step(peaks(*[(1, 0.4)] * 7), state([M] * 7, step=late), params(steps=3))
        assert got.commits == 2 and got.step == late + 1


def test_a_quota_of_zero_commits_nothing_below_the_threshold():
    """The 2.0 card's schedule alone: more steps than positions leave late steps without a quota."""
    rules = params(steps=6, min_transfer=0, threshold=0.5)
    low, high = peaks(*[(1, 0.4)] * 4), peaks((1, 0.4), (1, 0.6), (1, 0.4), (1, 0.6))
    nothing = step(low, state([M] * 4, step=5), rules)
    assert nothing.commit == [] and not nothing.changed and not nothing.done and nothing.step == 6
    assert step(high, state([M] * 4, step=5), rules).commit == [1, 3]
    assert step(low, state([M] * 4, step=3), rules).commit == [0]


# Edits


def test_edits_happen_in_the_same_step_as_commits():
    logits = peaks((1, 0.9), (2, 0.9), (3, 0.9), (4, 0.6))
    got = step(logits, state([M, 7, 3, 5]), params(flags=EDIT, edit_threshold=0.7, threshold=0.5))
    assert got.commit == [0] and got.edit == [1]  # position 2 holds its candidate already, 3 is not sure enough
    assert got.tokens == [1, 2, 3, 5] and (got.commits, got.edits) == (1, 1)
    assert not got.done  # this step filled the last mask: mask-free steps follow


def test_edits_happen_while_masks_remain():
    got = step(peaks((1, 0.4), (2, 0.9), (3, 0.3)), state([M, 7, M]), params(flags=EDIT, edit_threshold=0.5))
    assert got.edit == [1] and got.commit == [0] and got.left == 1


def test_the_editing_threshold_is_strict():
    p = step(peaks((3, 0.7)), state([5]), params(flags=EDIT, edit_threshold=0.0)).confidence[0]
    assert step(peaks((3, 0.7)), state([5]), params(flags=EDIT, edit_threshold=p)).edit == []
    assert step(peaks((3, 0.7)), state([5]), params(flags=EDIT, edit_threshold=p - 1e-6)).edit == [0]


def test_an_editing_threshold_of_zero_edits_whenever_the_candidate_differs():
    got = step(peaks((3, 0.11), (4, 0.11)), state([5, 4]), params(flags=EDIT, edit_threshold=0.0))
    assert got.tokens == [3, 4] and got.edit == [0]


def test_without_editing_no_token_changes():
    got = step(peaks((1, 0.9), (2, 0.99)), state([M, 7]), params(edit_threshold=0.0))
    assert got.tokens == [1, 7] and got.edit == [] and got.edits == 0 and got.done


def test_prompt_positions_are_never_edited_tail_positions_are():
    kind = [PROMPT, GENERATED, TAIL, PADDING]
    logits = peaks(*[(1, 0.9)] * 4)
    got = step(logits, state([5, 5, 5, 5], kind=kind), params(flags=EDIT, edit_threshold=0.0))
    assert got.tokens == [5, 1, 1, 5]


# Kinds of positions


def test_a_mask_id_in_the_prompt_is_an_ordinary_prompt_token():
    got = step(peaks(*[(1, 0.9)] * 3), state([M, M, M], kind=[PROMPT, GENERATED, GENERATED]), params(threshold=0.5))
    assert got.tokens == [M, 1, 1] and got.done and (got.before, got.left) == (2, 0)


def test_the_cards_fill_mask_ids_in_the_prompt():
    made = state([M, M, 4], kind=[PROMPT, GENERATED, PROMPT])
    got = step(peaks(*[(1, 0.9)] * 3), made, params(threshold=0.5, flags=refine.FILL_PROMPT))
    assert got.tokens == [1, 1, 4] and (got.before, got.left) == (2, 0)


def test_the_tail_is_denoised_where_it_is_attended_to_and_left_alone_where_it_is_absent():
    logits = peaks((1, 0.9), (2, 0.9), (3, 0.9))
    tail = step(logits, state([M, M, M], kind=[GENERATED, TAIL, TAIL]), params(threshold=0.5))
    assert tail.tokens == [1, 2, 3] and tail.before == 3
    absent = step(logits, state([M, M, M], kind=[GENERATED, PADDING, PADDING]), params(threshold=0.5))
    assert absent.tokens == [1, M, M] and absent.done and (absent.before, absent.left) == (1, 0)


def test_needed_positions_are_the_masked_and_where_editing_the_editable():
    made = state([M, 5, M, M, M, 5], [M, 5, M, M, M, 5], [M, 5, M, M, M, 5], [M, 5, M, M, M, 5],
                 kind=[GENERATED, GENERATED, TAIL, PADDING, PROMPT, PROMPT], frozen=[0, 0, 0, 1])  # fmt: skip
    rules = params(4, flags=[DEFAULT, EDIT, refine.FILL_PROMPT, EDIT])
    needed = refine.needed_positions(made, rules, IDS).tolist()
    assert [[i for i, n in enumerate(row) if n] for row in needed] == [[0, 2], [0, 1, 2], [0, 2, 4], []]


# End of a block


def test_without_editing_the_block_ends_with_the_step_that_fills_the_last_mask():
    got = step(peaks((1, 0.9), (2, 0.9)), state([M, 7]), params())
    assert got.done and not got.finished and (got.step, got.post) == (1, 0)


@pytest.mark.parametrize("flags", [EDIT, DEFAULT])
def test_without_post_steps_the_block_ends_with_the_step_that_fills_the_last_mask(flags):
    got = step(peaks((1, 0.9), (2, 0.9)), state([M, 7]), params(flags=flags, edit_threshold=0.0, max_post_steps=0))
    assert got.done and got.tokens == [1, 2 if flags == EDIT else 7]


def test_editing_goes_on_until_a_mask_free_step_edits_nothing():
    made, rules = state([M, 7]), params(flags=EDIT, edit_threshold=0.5, max_post_steps=16)
    one, two = peaks((1, 0.9), (2, 0.9)), peaks((3, 0.9), (2, 0.9))
    got = [step(logits, made, rules) for logits in (one, two, two)]
    assert [g.done for g in got] == [False, False, True]
    assert [g.edit for g in got] == [[1], [0], []] and [g.post for g in got] == [0, 1, 2]
    assert [g.changed for g in got] == [True, True, False]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_max_post_steps_counts_mask_free_steps_exactly(most):
    """Logits that want another token every time: the block ends after `most` mask-free steps, edited in each."""
    made, rules = state([M]), params(flags=EDIT, edit_threshold=0.0, max_post_steps=most)
    got = [step(peaks((i % 2, 0.9)), made, rules) for i in range(most + 1)]
    assert [g.done for g in got] == [False] * most + [True]
    assert [g.edits for g in got] == [0] + [1] * most and got[-1].post == most


def test_a_block_without_masks_from_the_start_is_edited_too():
    got = step(peaks((1, 0.9)), state([5]), params(flags=EDIT, edit_threshold=0.5, max_post_steps=1))
    assert got.tokens == [1] and got.done and got.post == 1


def test_max_steps_ends_a_block_as_it_is():
    rules = params(max_steps=2, min_transfer=1)
    made = state([M] * 4)
    first, second = (step(peaks(*[(1, 0.3)] * 4), made, rules) for _ in range(2))
    assert not first.done and second.done and second.tokens == [1, 1, M, M] and second.left == 2


def test_progress_is_guaranteed_whatever_the_model_says():
    """A model that wants nothing but the mask, for ever: every step still commits one position."""
    made = state([M] * 6)
    for masks in range(6, 0, -1):
        got = step(peaks(*[(M, 0.999)] * 6), made, params())
        assert (got.before, got.left) == (masks, masks - 1)
    assert got.done and M not in got.tokens


# End of a row


STOP = DEFAULT | refine.EOS_STEP
STOP_END = EDIT | refine.EOS_END


def test_an_eos_at_the_first_position_counts():
    got = step(peaks((E, 0.9), (1, 0.2)), state([M, M]), params(flags=STOP))
    assert got.finished and got.eos_at == 0 and not got.done and got.tokens == [E, M]


def test_an_eos_behind_a_mask_waits():
    got = step(peaks((1, 0.2), (E, 0.9), (1, 0.2)), state([M] * 3), params(flags=STOP))
    assert got.tokens == [M, E, M] and not got.finished and got.eos_at == -1


def test_an_eos_is_resolved_late_by_the_step_that_fills_the_mask_before_it():
    got = step(peaks((1, 0.9), (E, 0.1), (1, 0.2)), state([M, E, M]), params(flags=STOP))
    assert got.commit == [0] and got.finished and got.eos_at == 1 and got.tokens == [1, E, M]


def test_the_first_eos_decides():
    assert step(peaks(*[(1, 0.9)] * 4), state([3, E, M, E]), params(flags=STOP)).eos_at == 1
    assert not step(peaks(*[(1, 0.2)] * 4), state([M, M, 2, E]), params(flags=STOP)).finished


def test_a_mask_in_the_prompt_does_not_stand_before_an_eos():
    got = step(peaks(*[(E, 0.9)] * 3), state([M, M, M], kind=[PROMPT, GENERATED, GENERATED]), params(flags=STOP))
    assert got.finished and got.eos_at == 1 and got.tokens == [M, E, M]


@pytest.mark.parametrize("kind", [PROMPT, TAIL, PADDING])
@pytest.mark.parametrize("flags", [STOP, STOP_END])
def test_an_eos_in_prompt_or_tail_does_not_count(kind, flags):
    made = state([E, 3], kind=[kind, GENERATED]) if kind == PROMPT else state([3, E], kind=[GENERATED, kind])
    keep = peaks((E, 0.9), (3, 0.9)) if kind == PROMPT else peaks((3, 0.9), (E, 0.9))
    got = step(keep, made, params(flags=flags, edit_threshold=0.5))
    assert got.done and not got.finished and got.eos_at == -1


def test_several_eos_ids():
    for eos, finished in (
        ((E,), False),
        ((4,), True),
        ((E, 4), True),
        ((4, E), True),
        ((-1, 1000), False),
        ((), False),
    ):
        assert step(peaks((4, 0.9), (1, 0.2)), state([M, M]), params(flags=STOP, eos=eos)).finished == finished


def test_nothing_stops_without_the_flag():
    got = step(peaks((E, 0.9)), state([M]), params())
    assert got.done and not got.finished and got.eos_at == -1


def test_editing_delays_the_eos_to_the_end_of_the_block_so_that_an_edit_may_take_it_back():
    made, rules = state([M, 5]), params(flags=STOP_END, edit_threshold=0.5)
    first = step(peaks((E, 0.9), (5, 0.9)), made, rules)
    assert first.tokens == [E, 5] and not first.finished and not first.done
    second = step(peaks((1, 0.9), (5, 0.9)), made, rules)
    assert second.tokens == [1, 5] and not second.finished
    third = step(peaks((1, 0.9), (5, 0.9)), made, rules)
    assert third.done and not third.finished

    made = state([M, 5])
    step(peaks((E, 0.9), (5, 0.9)), made, rules)
    kept = step(peaks((E, 0.9), (5, 0.9)), made, rules)
    assert kept.done and kept.finished and kept.eos_at == 0


def test_the_2_0_card_ends_at_once_when_an_eos_is_committed_now():
    rules = params(flags=refine.FILL_PROMPT | refine.EOS_COMMIT)
    assert step(peaks((E, 0.9), (1, 0.2)), state([M, M]), rules).finished
    assert not step(peaks((1, 0.9), (1, 0.2)), state([M, M]), rules).finished
    late = step(peaks((1, 0.9), (E, 0.2), (1, 0.2)), state([M, E, M]), rules)
    assert late.tokens == [1, E, M] and not late.finished  # resolved late: the card does not see it
    assert step(peaks((E, 0.9), (1, 0.2)), state([M, M], kind=[TAIL, TAIL]), rules).finished  # the tail counts
    behind_mask = peaks((1, 0.2), (E, 0.9))
    assert not step(behind_mask, state([M, M]), rules).finished
    assert step(
        behind_mask, state([M, M], prior_flags=refine.PRIOR_EOS), rules
    ).finished  # the first EOS is the prompt's
    assert not step(peaks((E, 0.9), (1, 0.2)), state([M, M], prior_flags=refine.PRIOR_MASK), rules).finished


def test_the_cards_end_a_row_with_a_block_that_holds_an_eos():
    full, keep = [3, E], peaks((3, 0.9), (E, 0.9))
    holds, clean = params(flags=refine.EOS_HOLDS), params(flags=refine.EOS_CLEAN)
    for rules in (holds, clean):
        assert step(keep, state([M, E]), rules).finished
        assert step(keep, state([M, E], kind=[GENERATED, TAIL]), rules).finished  # the tail counts
        assert not step(keep, state([M, E], kind=[GENERATED, PROMPT]), rules).finished
        assert not step(peaks((3, 0.9), (E, 0.9), (1, 0.2)), state([M, E, M]), rules).finished  # not its end yet
    assert step(keep, state(full, prior_flags=refine.PRIOR_MASK), holds).finished
    assert not step(keep, state(full, prior_flags=refine.PRIOR_MASK), clean).finished
    left = dict(max_steps=1, min_transfer=0, steps=9, threshold=2.0)
    masks = state([M, E], step=9), state([M, E], step=9)
    assert step(keep, masks[0], params(flags=refine.EOS_HOLDS, **left)).finished
    assert not step(keep, masks[1], params(flags=refine.EOS_CLEAN, **left)).finished


# Rows


@pytest.mark.parametrize("bits", [refine.BLOCK_DONE, refine.FINISHED, refine.ERROR])
def test_a_frozen_row_changes_nothing(bits):
    made = state([M, 5, M], [M, 5, M], step=[3, 3], post=[1, 1], frozen=[bits, 0])
    made.changed[0] = 7
    rules = params(2, flags=EDIT, threshold=0.1, edit_threshold=0.1)
    out = refine.refine_step(peaks((1, 0.9), (2, 0.9), (E, 0.9)).repeat(2, 1, 1), made, rules, IDS)
    assert made.tokens.tolist() == [[M, 5, M], [1, 2, E]]
    assert made.step.tolist() == [3, 4] and made.post_steps.tolist() == [1, 1] and made.frozen.tolist() == [bits, 0]
    assert made.commit_step.tolist() == [[-1] * 3, [3] * 3] and made.changed.tolist() == [7, 1]
    assert not out.commit[0].any() and not out.edit[0].any()
    flags = out.status[0, refine.FLAGS].item()
    assert flags == bits and out.status[0, refine.COMMITS] == out.status[0, refine.EDITS] == 0


def test_an_eos_does_not_finish_a_frozen_row():
    made = state([E, 5], frozen=refine.BLOCK_DONE)
    assert not step(peaks((1, 0.9), (2, 0.9)), made, params(flags=STOP)).finished
    assert made.frozen.tolist() == [refine.BLOCK_DONE]


@pytest.mark.parametrize("poison", ["nan", "inf", "nan at the mask id", "inf at the mask id", "nothing but -inf"])
@pytest.mark.parametrize("temperature, flag", [(0.0, 0), (1.0, 0), (1.0, refine.OWN_SOFTMAX)])
@pytest.mark.parametrize("where", ["masked", "editable"])
def test_bad_logits_stop_their_own_row_and_write_nothing(poison, temperature, flag, where):
    at = 0 if where == "masked" else 1
    logits = peaks((1, 0.9), (2, 0.9)).repeat(3, 1, 1)
    value, token = {"nan": (math.nan, 3), "inf": (math.inf, 3)}.get(poison.split()[0], (NONE, slice(None)))
    logits[1, at, M if "mask id" in poison else token] = value
    made = state([M, 5], [M, 5], [M, 5])
    rules = params(
        3, flags=STOP_END | flag, edit_threshold=0.0, threshold=0.0, temperature=temperature, seed=[1, 2, 1]
    )  # fmt: skip
    out = refine.refine_step(logits, made, rules, IDS)
    assert made.tokens[1].tolist() == [M, 5] and made.step.tolist() == [1, 0, 1]
    assert made.frozen.tolist() == [0, refine.ERROR, 0] and made.commit_step[1].tolist() == [-1, -1]
    assert out.status[1, refine.FLAGS] == refine.ERROR and not out.commit[1].any() and not out.edit[1].any()
    assert M not in made.tokens[0].tolist() and made.tokens[0].tolist() == made.tokens[2].tolist()


def test_bad_logits_where_nobody_looks_are_no_error():
    logits = peaks((1, 0.9), (2, 0.9), (3, 0.9), (4, 0.9))
    logits[0, 1:] = math.nan
    made = state([M, 5, M, M], kind=[GENERATED, GENERATED, PROMPT, PADDING])
    got = step(logits, made, params())
    assert not got.error and got.done and got.tokens == [1, 5, M, M]


def test_every_row_goes_by_its_own_parameters():
    """Rows of all kinds together, against each alone."""
    logits = torch.randn(6, 5, V, generator=torch.Generator().manual_seed(3)) * 2
    blocks = [[M, M, M, M, M], [3, M, E, 5, M], [5, 4, 3, 2, 1], [M, 2, M, M, M], [M, E, 1, 1, 1], [M, M, 3, 4, 5]]
    rules = dict(
        temperature=[0.0, 1.0, 0.0, 0.7, 0.0, 2.0], top_k=[0, 0, 0, 3, 0, 4], top_p=[1.0, 1.0, 1.0, 0.8, 1.0, 0.5],
        seed=[0, 11, 0, -5, 0, 2**62],
        threshold=[0.3, 0.5, 0.1, 0.0, 0.9, 0.2], edit_threshold=[0.0, 0.2, 0.1, 0.0, 0.5, 0.0],
        steps=[3, 2, 5, 1, 4, 9], min_transfer=[1, 2, 1, 1, 3, 0], max_post_steps=[0, 1, 2, 3, 4, 5],
        flags=[DEFAULT, EDIT | refine.EOS_END, EDIT, STOP | refine.OWN_SOFTMAX, refine.FILL_PROMPT | refine.EOS_COMMIT,
               EDIT | refine.OWN_SOFTMAX],
    )  # fmt: skip
    where = dict(
        start=[0, 5, 10, 40, 5, 100], step=[0, 3, 1, 0, 2, 7], post=[0, 0, 1, 0, 0, 0], frozen=[0, 0, 0, 0, 0, 1]
    )
    eos = [(E,), (4,), (), (E, 1), (E,), (2,)]
    together = state(*blocks, **where)
    out = refine.refine_step(logits, together, params(6, eos=eos, **rules), IDS)
    for i in range(6):
        alone = state(blocks[i], **{name: [value[i]] for name, value in where.items()})
        own = refine.refine_step(
            logits[i : i + 1], alone, params(1, eos=eos[i], **{name: [value[i]] for name, value in rules.items()}), IDS
        )
        for name, got, wanted in zip(out._fields, out, own, strict=True):
            assert torch.equal(got[i], wanted[0]), (i, name)
        for name in ("tokens", "step", "post_steps", "frozen", "commit_step", "commit_confidence"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0]), (i, name)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize("flags", [DEFAULT, EDIT])
def test_logits_of_the_needed_positions_in_any_order_do_as_well_as_all(order, flags):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 4, V, generator=generator)
    blocks = [[M, M, M, M], [M, 1, M, 2], [M, M, M, M]]
    rules = params(3, flags=flags, threshold=0.2, edit_threshold=0.0, temperature=[0.0, 1.0, 0.0])
    full, packed = state(*blocks), state(*blocks)
    wanted = refine.refine_step(logits, full, rules, IDS)
    needed = refine.needed_positions(packed, rules, IDS)
    index, rows = torch.full((3, 4), -1), []
    for row in order:
        for position in torch.where(needed[row])[0].tolist():
            index[row, position] = len(rows)
            rows.append(logits[row, position])
    got = refine.refine_step(torch.stack(rows), packed, rules, IDS, index)
    assert torch.equal(full.tokens, packed.tokens) and torch.equal(got.status, wanted.status)
    assert torch.equal(got.token[needed], wanted.token[needed])
    assert torch.equal(got.confidence[needed], wanted.confidence[needed])
    assert (got.token[~needed] == -1).all() and (got.confidence[~needed] == NONE).all()


def test_records_are_of_what_wrote_the_token():
    made, rules = state([M, M, 5]), params(flags=EDIT, edit_threshold=0.0)
    first = step(peaks((1, 0.8), (2, 0.6), (3, 0.9)), made, rules)
    second = step(peaks((4, 0.7), (2, 0.6), (3, 0.9)), made, rules)
    assert (first.commit, first.edit, second.commit, second.edit) == ([0], [2], [1], [0])
    assert made.commit_step.tolist() == [[1, 1, 0]]
    assert made.commit_confidence[0].tolist() == pytest.approx([0.7, 0.6, 0.9], rel=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    made, rules, index = state([M, M]), params(), torch.zeros(1, 2).long()
    for shape, where in (((1, 3, V), None), ((2, 2, V), None), ((2, V), None), ((1, 2, V), index), ((2, V), index[0])):
        with pytest.raises(ValueError, match="logits"):
            refine.refine_step(torch.zeros(shape), made, rules, IDS, where)
    assert made.tokens.tolist() == [[M, M]]


def test_a_mask_id_alone_is_refused():
    with pytest.raises(ValueError, match=r"ids: expected SpecialIds\(mask, ...\), got 9"):
        refine.refine_step(peaks((1, 0.9)), state([M]), params(), M)


# Sampling


def sample(logits, draws, temperature=1.0, top_k=0, top_p=1.0, seed=0, mask=-1, position=None, step=0):
    """`draws` candidates of one position's logits [V] at positions 0, 1, ...; tokens and confidences."""
    rules = candidates.SampleParams(
        torch.tensor([temperature]), torch.tensor([top_k], dtype=torch.int32), torch.tensor([top_p]),
        torch.tensor([seed], dtype=torch.int64),
    )  # fmt: skip
    where = torch.arange(draws) if position is None else position
    return candidates.candidates_ref(
        logits.expand(draws, -1).clone(), torch.zeros(draws, dtype=torch.int64), where,
        torch.full((draws,), step), rules, refine.SpecialIds(mask), torch.tensor([mask >= 0]),
    )  # fmt: skip


def kept(logits, **how):
    """{token: confidence} of everything that 500 draws gave."""
    tokens, confidence = sample(logits, 500, **how)
    found = {}
    for token, p in zip(tokens.tolist(), confidence.tolist(), strict=True):
        assert found.setdefault(token, p) == p  # the confidence is the token's, not the draw's
    return found


def test_temperature_alone_draws_from_everything():
    logits = torch.tensor([1.0, 0.0, NONE, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        found = kept(logits, temperature=temperature)
        wanted = torch.softmax(logits / temperature, -1).tolist()
        assert found == pytest.approx({0: wanted[0], 1: wanted[1], 3: wanted[3]}, rel=1e-5)


def test_top_k_keeps_ties_at_its_last_value():
    logits = torch.tensor([1.0, 2.0, 3.0, 2.0, 0.0])
    assert set(kept(logits, top_k=1)) == {2}
    assert set(kept(logits, top_k=2)) == set(kept(logits, top_k=3)) == {1, 2, 3}
    assert set(kept(logits, top_k=4)) == {0, 1, 2, 3}
    assert set(kept(logits, top_k=5)) == set(kept(logits, top_k=99)) == {0, 1, 2, 3, 4}
    weight = [math.e, math.e**2, math.e, 0]
    assert kept(logits, top_k=2)[2] == pytest.approx(weight[1] / sum(weight), rel=1e-5)


# Weights 1, 1/2, 1/4, 1/8, 1/8 of a total of 2, exact in float32, in another order of ids.
HALVES = torch.tensor([-1.3862944, -2.0794415, 0.0, -0.6931472, -2.0794415])


@pytest.mark.parametrize(
    "top_p, tokens",
    [
        (1e-6, {2}),
        (0.4999, {2}),
        (0.5, {2, 3}),  # the mass strictly before token 3 is exactly 0.5
        (0.7499, {2, 3}),
        (0.75, {0, 2, 3}),
        (0.8749, {0, 2, 3}),
        (0.875, {0, 1, 2, 3, 4}),  # ties at the cut are all kept
        (0.93, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_a_token_iff_the_mass_before_it_is_at_most_p(top_p, tokens):
    found = kept(HALVES, top_p=top_p)
    assert set(found) == tokens
    weight = dict(enumerate([0.25, 0.125, 1, 0.5, 0.125]))
    total = sum(weight[t] for t in tokens)
    assert found == pytest.approx({t: weight[t] / total for t in tokens}, rel=1e-5)


def test_top_p_works_on_what_top_k_left():
    """Of all the mass token 2 has half; of the two that top-k leaves it has two thirds."""
    assert set(kept(HALVES, top_p=0.5)) == {2, 3}
    assert set(kept(HALVES, top_p=0.5, top_k=2)) == {2}
    assert set(kept(HALVES, top_p=0.7, top_k=2)) == {2, 3}


def test_temperature_comes_before_the_filters():
    """At temperature 1/2 the weights are 1, 1/4, 1/16, ...: three quarters and more for the first."""
    assert set(kept(HALVES, top_p=0.7)) == {2, 3}
    assert set(kept(HALVES, top_p=0.7, temperature=0.5)) == {2}
    assert set(kept(HALVES, top_p=0.7, temperature=4.0)) == {0, 1, 2, 3, 4}


def test_the_mask_logit_is_removed_before_filtering():
    logits = torch.tensor([1.0, 0.5, 9.0])
    assert set(kept(logits, top_k=1, mask=2)) == {0}
    assert set(kept(logits, top_p=0.5, mask=2)) == {0}
    assert kept(logits, mask=2) == pytest.approx(dict(enumerate(torch.softmax(logits[:2], -1).tolist())), rel=1e-5)
    assert set(kept(logits, top_k=1)) == {2}


@pytest.mark.parametrize("vocab", [4096, 9001])
def test_draws_come_from_the_kept_tokens_only_across_tiles(vocab):
    logits = torch.zeros(vocab)
    chosen = [0, 1, vocab // 2, vocab - 2, vocab - 1]
    logits[chosen] = torch.tensor([3.0, 3.5, 3.2, 3.0, 4.0])
    assert set(kept(logits, top_k=5)) == set(chosen)
    logits[chosen] += 40
    assert set(kept(logits)) <= set(chosen) and len(kept(logits)) == 5


def test_frequencies_are_the_probabilities():
    logits, draws = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, NONE]), 4000
    for how, tokens in ((dict(), range(5)), (dict(temperature=0.5), range(5)), (dict(top_k=3), (0, 2, 4))):
        weight = [math.exp(logits[t] / how.get("temperature", 1)) if t in tokens else 0.0 for t in range(6)]
        drawn, _ = sample(logits, draws, **how)
        for token in range(6):
            p = weight[token] / sum(weight)
            share = (drawn == token).float().mean().item()
            assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / draws), (how, token)


def test_seed_position_and_step_key_the_draw():
    logits = torch.zeros(50)
    first, _ = sample(logits, 200)
    assert torch.equal(first, sample(logits, 200)[0])
    for other in (dict(seed=1), dict(seed=2**33), dict(seed=-1), dict(step=1), dict(position=torch.arange(200) + 1)):
        changed, _ = sample(logits, 200, **other)
        assert (changed == first).float().mean() < 0.15, other
    shifted, _ = sample(logits, 199, position=torch.arange(199) + 1)
    assert torch.equal(shifted, first[1:])  # keyed by the position alone
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, 200, position=order)[0], first[order])


def test_a_step_draws_by_absolute_position_and_block_step():
    logits = torch.zeros(1, 4, V)
    rules = params(temperature=1.0, seed=7, threshold=0.0, min_transfer=4)
    seen = {}
    for start in (0, 4):
        for at in (0, 1):
            out = refine.refine_step(logits, state([M] * 4, start=start, step=at), rules, IDS)
            wanted, _ = sample(torch.zeros(V), 4, seed=7, mask=M, position=torch.arange(start, start + 4), step=at)
            assert out.token[0].tolist() == wanted.tolist()
            seen[start, at] = tuple(wanted.tolist())
    assert len(set(seen.values())) == 4


def test_the_confidence_of_a_draw_decides_its_commit():
    """Two equal tokens left by top-k: one half each, above a threshold of 0.49 and not above 0.51."""
    logits = torch.zeros(1, 2, V)
    logits[..., [3, 4]] = 5.0
    for threshold, committed in ((0.49, 2), (0.51, 1)):
        got = step(logits, state([M, M]), params(temperature=1.0, top_k=2, threshold=threshold, seed=5))
        assert got.commits == committed and got.confidence == [0.5, 0.5] and set(got.candidate) <= {3, 4}


def test_greedy_rows_do_not_look_at_seed_or_filters():
    logits = torch.randn(1, 4, V, generator=torch.Generator().manual_seed(9))
    plain = step(logits, state([M] * 4), params())
    for other in (dict(seed=3), dict(top_k=1), dict(top_p=0.1)):
        assert step(logits, state([M] * 4), params(**other)) == plain
