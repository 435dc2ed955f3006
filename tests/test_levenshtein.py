"""LLaDA2.2's editing over whole blocks: denoisers that know the answer, hostile ones, and the rules in plain Python.

The rules are those of a request (decoding/rules.py). Of forty tokens 0..8 are the text, `M` is the mask, `D` a
deletion, `S` an insertion. A denoiser is a function (block, step) -> logits [L, V].
"""

import math
import random
import zlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_fast import DecodeParams
from llada2_fast.decoding.rules import batch_params, row_rule
from llada2_fast.kernels import refine
from llada2_fast.kernels.refine import BlockState, Moves, SpecialIds, refine_step

V, M, D, S = 40, 9, 10, 11
IDS = SpecialIds(M, D, S)
TEXT, CONTROL = range(M), (M, D, S)
PROFILES = ("default", "sglang-indel")
TAILS = (refine.TAIL, refine.PADDING)


def rule_of(length, edits=True, **asked):
    """The rule of a request that asks for editing, by a LLaDA2.2 model or another."""
    return row_rule(DecodeParams(**{"editing_threshold": 0.0, "threshold": 0.5} | asked), length, edits)


def block_of(tokens, prompt=0, behind=0, kind=refine.TAIL):
    """A block as tokens and kinds: so many positions are prompt, so many at its end of another kind."""
    kinds = [refine.GENERATED] * len(tokens)
    kinds[:prompt] = [refine.PROMPT] * prompt
    kinds[len(tokens) - behind :] = [kind] * behind
    return SimpleNamespace(tokens=list(tokens), kinds=kinds)


class Rows:
    """Rows in the middle of their blocks: refine_step by refine_step, each row with a denoiser of its own."""

    def __init__(self, blocks, rules):
        tokens, kinds = [one.tokens for one in blocks], [one.kinds for one in blocks]
        self.state = BlockState.fresh(
            torch.tensor(tokens), torch.tensor(kinds, dtype=torch.int8), torch.zeros(len(blocks), dtype=torch.int64)
        )
        self.params = batch_params(rules, [0] * len(rules), [()] * len(rules))
        self.moves = Moves.fresh(len(blocks), len(tokens[0]))

    def tokens(self, row=0):
        return self.state.tokens[row].tolist()

    def ended(self):
        return bool((self.state.frozen != 0).all())

    def step(self, *denoisers):
        """One step; what was done."""
        steps = self.state.step.tolist()
        logits = torch.stack([d(self.tokens(i), steps[i]) for i, d in enumerate(denoisers)])
        return refine_step(logits, self.state, self.params, IDS, moves=self.moves)


def labels(*said):
    """A denoiser that says (token, probability) by position, whatever the block is."""
    logits = torch.zeros(len(said), V)
    for at, (token, p) in enumerate(said):
        logits[at, token] = height(p)
    return lambda block, step: logits


def height(p):
    """The logit among zeros of a probability."""
    return math.log(p / (1 - p) * (V - 1))


# The report's example, and what moves


def counts(out):
    status = out.status[0].tolist()
    return [status[at] for at in (refine.MASKS_BEFORE, refine.MASKS_LEFT, refine.COMMITS, refine.EDITS)]


def test_the_report_s_example():
    no, man, step, into, the, river, twice, ever, same = TEXT
    rows = Rows([block_of([no, man, step, step, into, the, the, river, twice])], [rule_of(9)])
    rows.state.commit_step[0] = torch.arange(9)
    rows.state.commit_confidence[0] = torch.arange(9) / 10

    def keep(*tokens):
        return [(token, 0.9) for token in tokens]

    said = labels(*keep(no, man), (ever, 0.8), *keep(step, into, the, D, S, twice))
    out = rows.step(said)
    assert rows.tokens() == [no, man, ever, step, into, the, M, river, twice]
    assert counts(out) == [0, 1, 0, 3] and out.edit[0].nonzero().flatten().tolist() == [2, 6, 7]
    assert rows.state.commit_step[0].tolist() == [0, 1, 0, 3, 4, 5, -1, 7, 8]
    wanted = [0.0, 0.1, 0.8, 0.3, 0.4, 0.5, 0.0, 0.7, 0.8]
    assert rows.state.commit_confidence[0].tolist() == pytest.approx(wanted)
    assert not rows.moves.original.any() and not rows.ended()

    said = labels(*keep(no, man, ever, step, into, the, same, river, twice))
    out = rows.step(said)
    assert rows.tokens() == [no, man, ever, step, into, the, same, river, twice]
    assert counts(out) == [1, 0, 1, 0] and rows.state.commit_step[0, 6] == 1 and not rows.ended()
    wanted[6] = 0.9
    assert rows.state.commit_confidence[0].tolist() == pytest.approx(wanted)

    out = rows.step(said)
    assert counts(out) == [0, 0, 0, 0] and not out.edit.any() and not rows.state.changed.any()
    assert rows.ended() and rows.state.step.tolist() == rows.state.post_steps.tolist() == [3]


def test_what_belongs_to_a_token_moves_with_it():
    """A deletion ahead of a mask that is filled, an insertion ahead of one that is not."""
    rows = Rows([block_of([0, 1, M, 2, M, 3])], [rule_of(6, threshold=2.0)])
    rows.state.commit_step[0] = torch.tensor([20, 21, -1, 23, -1, 25])
    rows.step(labels((D, 0.9), (1, 0.9), (5, 0.6), (S, 0.9), (6, 0.5), (3, 0.9)))
    assert rows.tokens() == [1, 5, M, 2, M, 3]
    assert rows.moves.original.tolist() == [[0, 1, 0, 0, 1, 0]]
    assert rows.state.commit_step[0].tolist() == [21, 0, -1, 23, -1, 25]
    assert rows.state.commit_confidence[0].tolist() == pytest.approx([0, 0.6, 0, 0, 0, 0])
    assert rows.state.post_steps.tolist() == [0]
    out = rows.step(labels((1, 0.9), (5, 0.9), (7, 0.5), (2, 0.9), (8, 0.6), (3, 0.9)))  # a mask more than the quota's
    assert rows.tokens() == [1, 5, 7, 2, 8, 3] and counts(out) == [2, 0, 2, 0]
    rows.step(labels((1, 0.9), (S, 0.9), (7, 0.9), (2, 0.9), (8, 0.9), (3, 0.9)))
    assert rows.tokens() == [1, M, 5, 7, 2, 8] and rows.moves.original.tolist() == [[0, 0, 1, 0, 0, 1]]
    assert rows.state.commit_step[0].tolist() == [21, -1, 0, 1, 23, 1] and rows.state.post_steps.tolist() == [1]


def test_what_a_last_step_leaves_as_it_is_has_not_been_written():
    """A deletion in the last step, where the best text is what stands there: no edit, and the record stays."""
    rows = Rows([block_of([0, 1])], [rule_of(2, max_post_steps=1)])
    rows.state.commit_step[0] = torch.tensor([20, 21])
    logits = torch.zeros(2, V)
    logits[:, D], logits[0, 0], logits[1, 4] = 5.0, 2.0, 2.0
    out = rows.step(lambda *_: logits)
    assert rows.tokens() == [0, 4] and counts(out) == [0, 0, 0, 1] and rows.ended()
    assert rows.state.commit_step[0].tolist() == [20, 0]
    assert out.report[0, -2:].tolist() == [-1, 4]


# Denoisers that know the answer


def aligned(block, target):
    """What turns a block into a target of its length, by position: the token itself, another, D, S, a mask's token.

    As few substitutions, deletions and insertions as will do. A mask stands for any token. What is missing at the end
    is filled up with masks, what is too much there is cut off by insertions.
    """
    size = len(block)
    cost = [[0] * (size + 1) for _ in range(size + 1)]  # of block[i:] and target[j:]

    def ways(i, j):
        fits = block[i] in (target[j], M)
        yield cost[i + 1][j + 1] + (not fits), "keep" if fits else "substitute"
        yield cost[i][j + 1] + 1, "insert"
        yield cost[i + 1][j] + 1, "delete"

    for i in reversed(range(size)):
        for j in reversed(range(size)):
            cost[i][j] = min(way[0] for way in ways(i, j))
    said, i, j, missing = [], 0, 0, False
    while i < size:
        _, way = min(ways(i, j), key=lambda way: way[0]) if j < size else (0, "surplus")
        if way == "insert":
            missing = True
        elif way == "delete":
            said.append(D)
        elif way == "surplus":
            said.append(S if missing else block[i] if block[i] != M else 0)
        else:
            said.append(S if missing and way == "keep" and block[i] != M else target[j])
        missing &= way in ("insert", "delete")
        i, j = i + (way != "insert"), j + (way != "delete")
    return said


def chance(*of):
    """A number between 0 and 1 that is always the same."""
    return zlib.crc32(repr(of).encode()) / 2**32


def knowing(target, own):
    """A denoiser that has the target at positions `own` in mind, and is more or less sure."""

    def denoiser(block, step):
        logits = torch.zeros(len(block), V)
        for at, token in zip(own, aligned([block[at] for at in own], target), strict=True):
            logits[at, token] = height(0.75 + 0.24 * chance(block, at))
        return logits

    return denoiser


def test_an_alignment_is_the_shortest():
    assert aligned([0, 1, 2, 2, 3, 4, 4, 5, 6], [0, 1, 7, 2, 3, 4, 8, 5, 6]) == [0, 1, 7, 2, 3, 4, 8, 5, 6]
    assert aligned([0, 1, 1, 2, 4, 6, 5, 8], [0, 1, 2, 4, 6, 3, 5, 8]) == [0, 1, D, 2, 4, 6, S, 8]
    assert aligned([0, 1, 2, 3], [1, 2, 3, 4]) == [D, 1, 2, 3]
    assert aligned([1, 2, 3, 4], [0, 1, 2, 3]) == [S, 2, 3, 4]
    assert aligned([M, 2, M, 0], [1, 2, 3, 4]) == [1, 2, 3, 4]


@st.composite
def drafts(draw, target):
    """Random tokens and masks, or the target with some left out, some twice, some masked and some others."""
    if draw(st.booleans()):
        return draw(st.lists(st.sampled_from([*TEXT, M, M, M]), min_size=len(target), max_size=len(target)))
    made = []
    for token in target:
        made += draw(st.sampled_from([[token]] * 4 + [[], [token, token], [M], [M, token], [(token + 1) % M]]))
    return (made + [M] * len(target))[: len(target)]


THRESHOLDS = [0.0, 0.5, 0.9, 2.0]


@settings(max_examples=150)
@given(st.data())
def test_a_denoiser_that_knows_the_answer_gets_it_from_any_draft(data):
    length, prompt = data.draw(st.integers(4, 16)), data.draw(st.integers(0, 3))
    behind, kind = data.draw(st.integers(0, min(3, length - prompt - 1))), data.draw(st.sampled_from(TAILS))
    own = range(prompt, length - (behind if kind == refine.PADDING else 0))
    target = data.draw(st.lists(st.sampled_from(TEXT), min_size=len(own), max_size=len(own)))
    block = block_of([7] * prompt + data.draw(drafts(target)) + [M] * (length - own.stop), prompt, behind, kind)
    rule = rule_of(
        length, profile=data.draw(st.sampled_from(PROFILES)), threshold=data.draw(st.sampled_from(THRESHOLDS)),
        editing_threshold=data.draw(st.sampled_from([0.0, 0.3, 0.7])), max_post_steps=data.draw(st.integers(20, 64)),
    )  # fmt: skip
    rows, steps = Rows([block], [rule]), 0
    while not rows.ended():
        rows.step(knowing(target, own))
        steps += 1
    assert rows.tokens() == block.tokens[:prompt] + target + block.tokens[own.stop :]
    assert steps <= rule.max_steps == length + rule.max_post_steps + 1 and not rows.state.changed.any()


# Hostile ones


def everywhere(*tokens):
    """One token at all positions, another with each step."""

    def denoiser(block, step):
        logits = torch.randn(len(block), V, generator=torch.Generator().manual_seed(step))
        logits[:, tokens[step % len(tokens)]] = 9.0
        return logits

    return denoiser


def by_block(*tokens):
    """One of the tokens at each position, by what the block holds."""

    def denoiser(block, step):
        logits = torch.randn(len(block), V, generator=torch.Generator().manual_seed(3))
        for at in range(len(block)):
            logits[at, tokens[int(len(tokens) * chance(block, at))]] = 3.0 + 6.0 * chance(at, block)
        return logits

    return denoiser


def noise(block, step):
    return 4 * torch.randn(len(block), V, generator=torch.Generator().manual_seed(step))


HOSTILE = {
    "insert": everywhere(S), "delete": everywhere(D), "mask": everywhere(M), "alternate": everywhere(S, D),
    "all three": everywhere(D, M, S), "delete and write": everywhere(D, 4), "flip": everywhere(4, 5),
    "by block": by_block(S, D), "all by block": by_block(S, D, M, 0, 1), "noise": noise,
}  # fmt: skip
LENGTH = 9
BLOCKS = [
    block_of([M] * LENGTH), block_of([3, M, *[M] * (LENGTH - 2)], prompt=2), block_of([*range(LENGTH)], prompt=1),
    block_of([4, M, 0, M, M, 1, 1, M, M], behind=2), block_of([4, M, 0, M, M, 1, 2, M, M], 1, 2, refine.PADDING),
    block_of([M] * LENGTH, prompt=LENGTH - 1), block_of([2] * LENGTH, behind=LENGTH - 1, kind=refine.PADDING),
]  # fmt: skip
ASKED = [
    dict(profile=profile, max_post_steps=most, threshold=threshold)
    for profile in PROFILES
    for most in (0, 1, 4, 16)
    for threshold in (0.2, 2.0)
]
ASKED += [dict(temperature=0.8, minimal_topk=2, max_post_steps=3), dict(editing_threshold=0.9), dict(steps=3)]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_denoiser_ends_within_its_bound_and_leaves_a_text(name):
    """Rows by all rules and of all kinds of blocks, by ones of other models between; some of them once more alone."""
    denoiser = HOSTILE[name]
    plain = [rule_of(LENGTH, edits=False), rule_of(LENGTH, edits=False, editing_threshold=None, threshold=0.9)]
    rules = [rule for i, asked in enumerate(ASKED) for rule in (rule_of(LENGTH, **asked), plain[i % 2])]
    blocks = [BLOCKS[i % len(BLOCKS)] for i in range(len(rules))]
    rows, steps = Rows(blocks, rules), 0
    while not rows.ended():
        rows.step(*[denoiser] * len(rules))
        steps += 1
        for at, block in enumerate(blocks):
            given = [i for i, kind in enumerate(block.kinds) if kind in (refine.PROMPT, refine.PADDING)]
            assert [rows.tokens(at)[i] for i in given] == [block.tokens[i] for i in given]
    assert steps == max(rows.state.step.tolist())
    for at, (block, rule) in enumerate(zip(blocks, rules, strict=True)):
        own = [i for i, kind in enumerate(block.kinds) if kind in (refine.GENERATED, refine.TAIL)]
        assert not {rows.tokens(at)[i] for i in own} & set(CONTROL)
        assert rows.state.step[at] <= LENGTH + rule.max_post_steps + 1
        assert rows.state.post_steps[at] <= max(rule.max_post_steps, 1)
    for at in range(0, len(rules), 5):
        alone = Rows([blocks[at]], [rules[at]])
        while not alone.ended():
            alone.step(denoiser)
        for field, value in vars(alone.state).items():
            assert torch.equal(value[0], getattr(rows.state, field)[at]), (at, field)


# Cycles


def flipping(block, step):
    """At positions 1 and 2 the one of two tokens that is not there, less surely at 2; then 5, 6, 7 and 8."""
    logits = torch.zeros(len(block), V)
    for at, token in enumerate(block):
        logits[at, token] = 9.0
    for at, sure in ((1, 9.0), (2, 7.0)):
        logits[at, :9] = torch.tensor([6.0, sure, 0, 0, 0, 5, 4, 3, 2])
        if block[at] != 0:
            logits[at, :2] = torch.tensor([sure, 6.0])
    return logits


@pytest.mark.parametrize("profile", PROFILES)
def test_a_cycle_is_broken_at_the_least_confident_position_by_the_best_token_that_is_new_there(profile):
    block = block_of([0, 0, 0, 0])
    for _ in range(2):
        rows, seen = Rows([block], [rule_of(4, profile=profile, max_post_steps=7)]), []
        while not rows.ended():
            out = rows.step(flipping)
            seen.append(rows.tokens())
            if len(seen) == 3:
                p = torch.softmax(flipping([0, 0, 0, 0], 2)[2], -1)[5]
                assert out.token[0, 2] == 5 and out.confidence[0, 2] == pytest.approx(float(p))
        assert seen == [
            [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 5, 0], [0, 0, 0, 0], [0, 1, 6, 0], [0, 0, 0, 0], [0, 1, 1, 0],
        ]  # fmt: skip


def test_equally_unsure_positions_change_by_the_lowest():
    def denoiser(block, step):
        logits = flipping(block, step)
        logits[2] = logits[1]
        return logits

    rows = Rows([block_of([0, 0, 0, 0])], [rule_of(4)])
    for _ in range(3):
        rows.step(denoiser)
    assert rows.tokens() == [0, 5, 1, 0]


@pytest.mark.parametrize("profile, broken", [("default", 5), ("sglang-indel", M)])
def test_a_cycle_is_broken_by_a_mask_only_where_one_may_be_chosen(profile, broken):
    def denoiser(block, step):
        logits = flipping(block, step)
        logits[2, M] = 5.5
        return logits

    rows = Rows([block_of([0, 0, 0, 0])], [rule_of(4, profile=profile)])
    for _ in range(3):
        rows.step(denoiser)
    assert rows.tokens() == [0, 1, broken, 0]


# The rules in plain Python


class Plain:
    """One row's block by the sentences of kernels/levenshtein.py, for greedy rows without EOS."""

    def __init__(self, block, rule):
        self.tokens, self.rule, self.length = list(block.tokens), rule, len(block.tokens)
        self.kinds = block.kinds
        own = [at for at, kind in enumerate(block.kinds) if kind in (refine.GENERATED, refine.TAIL)]
        self.own = range(own[0], own[-1] + 1) if own else range(0)
        self.original = [at in self.own and token == M for at, token in enumerate(self.tokens)]
        self.records = [(-1, 0.0)] * self.length
        self.step = self.post_steps = 0
        self.seen, self.written = [], [set() for _ in self.tokens]
        self.done = False

    def masked(self):
        return [at for at in self.own if self.tokens[at] == M]

    def open(self):
        return [at for at in self.masked() if self.original[at]]

    def quota(self):
        base, more = divmod(self.length, self.rule.steps)
        return max(base + (min(self.step, self.rule.steps - 1) < more), self.rule.min_transfer)

    def best(self, logits, at, without):
        """The position's best candidate: (token, confidence)."""
        if self.rule.flags & refine.BAN_MASK or at in self.open():
            without = {M, *without}
        token = max((token for token in range(V) if token not in without), key=lambda token: logits[at][token])
        return token, math.exp(logits[at][token]) / sum(map(math.exp, logits[at]))

    def choose(self, logits, last):
        """{position: (token, confidence)} of commits and of edits."""
        best = {at: self.best(logits, at, ()) for at in self.own}
        masked, open_ = self.masked(), self.open()
        count = self.quota() + len(masked) - len(open_) if open_ and not last else len(masked)
        commits = [at for at in masked if best[at][1] > self.rule.threshold]
        if len(commits) < count or not open_ or last:
            commits = sorted(masked, key=lambda at: -best[at][1])[:count]
        edits = [
            at for at in self.own
            if self.tokens[at] != M and best[at][0] != self.tokens[at] and best[at][1] > self.rule.edit_threshold
        ]  # fmt: skip
        return {at: best[at] for at in commits}, {at: best[at] for at in edits}

    def advance(self, logits):
        """A step; how many were committed and edited."""
        open_ = self.open()
        self.post_steps += not open_
        most, last = self.rule.max_post_steps, self.step + 1 >= self.rule.max_steps
        last |= self.post_steps >= most if most else not open_
        commits, edits = self.choose(logits, last)
        if not most and not last and set(open_) <= set(commits):
            last = True
            commits, edits = self.choose(logits, last)
        chosen = commits | edits
        self.done = last or not chosen
        if last:
            chosen = {at: self.best(logits, at, CONTROL) if one[0] in CONTROL else one for at, one in chosen.items()}
        changing = [at for at, one in chosen.items() if one[0] != self.tokens[at]]
        if self.tokens in self.seen and changing and not last:
            at = min(changing, key=lambda at: (chosen[at][1], at))
            chosen[at] = self.best(logits, at, self.written[at])
        self.seen.append(list(self.tokens))
        for at, (token, _) in chosen.items():
            self.written[at].add(token)
        edits = [at for at in edits if chosen[at][0] != self.tokens[at]]
        self.splice({at: chosen[at] for at in (*commits, *edits)})
        self.step += 1
        return len(commits), len(edits)

    def splice(self, chosen):
        new = []
        for at in self.own:
            here = self.tokens[at], self.original[at], self.records[at]
            token, confidence = chosen.get(at, (None, None))
            if token == S:
                new += [(M, False, (-1, 0.0)), here]
            elif token is None:
                new.append(here)
            elif token != D:
                new.append((token, self.original[at], (self.step, confidence)))
        new = (new + [(M, False, (-1, 0.0))] * self.length)[: len(self.own)]
        for at, (token, original, record) in zip(self.own, new, strict=True):
            self.tokens[at], self.original[at], self.records[at] = token, original, record


def spread(rng, length, favourites):
    """Logits whose order within a position, and whose confidences among positions, are far from ties."""
    scales = rng.sample([0.3 * 1.12**i for i in range(24)], length)
    out = []
    for scale in scales:
        order = rng.sample(range(V), V)
        liked = rng.choice(favourites)
        order.remove(liked)
        order.append(liked)
        heights = dict(zip(order, range(V), strict=True))
        out.append([scale * heights[token] for token in range(V)])
    return out


@settings(max_examples=400)
@given(st.data())
def test_the_reference_does_what_the_sentences_say(data):
    length = data.draw(st.integers(1, 10))
    prompt = data.draw(st.integers(0, min(3, length - 1)))
    behind = data.draw(st.integers(0, min(2, length - prompt - 1)))
    tokens = data.draw(st.lists(st.sampled_from([*TEXT, M, M, M, M, M]), min_size=length, max_size=length))
    block = block_of(tokens, prompt, behind, data.draw(st.sampled_from(TAILS)))
    rule = rule_of(
        length, profile=data.draw(st.sampled_from(PROFILES)), threshold=data.draw(st.sampled_from(THRESHOLDS)),
        editing_threshold=data.draw(st.sampled_from([0.0, 0.3, 0.7])), steps=data.draw(st.sampled_from([1, 3, 32])),
        minimal_topk=data.draw(st.integers(1, 3)), max_post_steps=data.draw(st.sampled_from([0, 1, 2, 5, 16])),
    )  # fmt: skip
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    favourites = data.draw(st.sampled_from([[*TEXT], [0, 1], [0, M, D, S], [0, 1, S], [0, 1, D, M]]))
    some = [spread(rng, length, favourites) for _ in range(data.draw(st.integers(1, 4)))]
    rows, plain = Rows([block], [rule]), Plain(block, rule)
    for step in range(rule.max_steps):
        logits = some[step % len(some)]
        before = len(plain.masked())
        commits, edits = plain.advance(logits)
        out = rows.step(lambda *_, logits=logits: torch.tensor(logits))
        status = out.status[0].tolist()
        assert rows.tokens() == plain.tokens
        assert rows.moves.original[0].bool().tolist() == plain.original
        assert (status[refine.COMMITS], status[refine.EDITS]) == (commits, edits)
        assert (status[refine.MASKS_BEFORE], status[refine.MASKS_LEFT]) == (before, len(plain.masked()))
        assert (status[refine.STEP], status[refine.POST_STEPS]) == (plain.step, plain.post_steps)
        assert rows.state.commit_step[0].tolist() == [at for at, _ in plain.records]
        assert rows.state.commit_confidence[0].tolist() == pytest.approx([p for _, p in plain.records], rel=1e-4)
        assert rows.ended() == plain.done
        if plain.done:
            return
    raise AssertionError("the block does not end")
