"""Each policy under networks that mean harm, and what short answers cost. The networks are scripts: a function says the
logits of a position from the tokens that its forward has seen."""

import math

import pytest
import torch

from llada2_fast.generate import generate
from llada2_fast.model import LLaDA2Model
from tests.engine.common import EOS, MASK, VOCAB, prompt_of, random_model

BOUNDS = 0.0, 0.3, math.inf
POLICIES = {
    "threshold": {"threshold": 0.9},
    **{f"entropy {b}": {"policy": "entropy", "entropy_bound": b} for b in BOUNDS},
    "entropy, decay": {"policy": "entropy", "entropy_bound": 1.0, "entropy_decay": 0.5},
    **{f"self_speculative {b}": {"policy": "self_speculative", "entropy_bound": b} for b in BOUNDS},
}
each = pytest.mark.parametrize("rules", POLICIES.values(), ids=POLICIES)


def scripted(monkeypatch, say):
    """A model whose logits at a position are say(position, tokens by position that this forward has seen, its number
    among the forwards that are read, from 0)."""
    forwards = []

    def forward_blocks(self, tokens, positions, spans, cache, read=None, slots=None):
        hidden = positions.float()[:, None]
        if read is not None and not read.blocks:  # a prefill
            return hidden[:0]
        forwards.append(dict(zip(positions.tolist(), tokens.tolist(), strict=True)))
        if read is None:
            return hidden
        begins = torch.tensor(read.blocks)[:, None] * cache.block_length
        return hidden[(begins + torch.arange(cache.block_length)).flatten()[read.rows]]

    def lm_logits(self, hidden):
        number = len(forwards) - 1
        rows = [say(int(position), forwards[-1], number) for position in hidden[:, 0]]
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)

    monkeypatch.setattr(LLaDA2Model, "forward_blocks", forward_blocks)
    monkeypatch.setattr(LLaDA2Model, "lm_logits", lm_logits)
    return random_model()


def one_hot(token, height, others=0.0):
    logits = torch.full((VOCAB,), float(others))
    logits[token] = height
    return logits


def any_token(position, number, allowed=VOCAB):
    return (position * 7919 + number * 104729) // 3 % allowed


HOSTILE = {
    "uniform": lambda position, tokens, number: torch.zeros(VOCAB),
    "always the mask": lambda position, tokens, number: one_hot(MASK, 90.0),
    "garbage": lambda position, tokens, number: one_hot(any_token(position, number), 1e4),
    "garbage, others impossible": lambda position, tokens, number: one_hot(
        any_token(position, number, MASK), 5.0, -math.inf
    ),
    "huge": lambda position, tokens, number: torch.full((VOCAB,), 3e38),
}


@each
@pytest.mark.parametrize("say", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("length, steps", [(8, 32), (8, 1), (32, 32)])
def test_a_hostile_network_ends_and_every_step_progresses(rules, say, length, steps, monkeypatch):
    model, checks = scripted(monkeypatch, say), rules.get("policy") == "self_speculative"
    for early in (False, True):
        out = generate(
            model, [prompt_of(5)], gen_length=40, block_length=length, steps=steps, eos_early_stop=early,
            return_dict=True, trace=True, **rules,
        )  # fmt: skip
        counters, events = out.counters[0], out.trace[0].events
        row = out.sequences[0, : out.num_tokens[0]].tolist()
        assert MASK not in row and (early or counters.commits >= 40)
        writes = {event.step for event in events}
        if checks:
            assert all(n <= 2 * length for n in counters.forwards_per_block)
            assert counters.denoise_forwards <= len(writes) + counters.check_forwards
        else:
            assert all(n <= min(length, steps) for n in counters.forwards_per_block)
            assert counters.check_forwards == 0 and counters.denoise_forwards == len(writes)


@pytest.mark.parametrize("rules", [r for r in POLICIES.values() if r.get("policy") != "self_speculative"])
@pytest.mark.parametrize("say", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_network_ends_where_it_may_edit(rules, say, monkeypatch):
    out = generate(
        scripted(monkeypatch, say), [prompt_of(5)], gen_length=40, block_length=8, editing_threshold=0.0,
        max_post_steps=3, edit_window=1, return_dict=True, **rules,
    )  # fmt: skip
    assert MASK not in out.sequences[0].tolist()
    assert all(n <= 8 + 3 + 1 for n in out.counters[0].forwards_per_block)


@each
@pytest.mark.parametrize("first", range(5))
def test_nan_names_its_step(rules, first, monkeypatch):
    """In a draft and in its check."""

    def say(position, tokens, number):
        logits = one_hot(any_token(position, number, EOS), 1.0)
        return logits + math.nan if number == first and position % 8 == 7 else logits

    block, step = (1 + first, 0) if rules.get("entropy_bound") == math.inf else (1, first)
    model = scripted(monkeypatch, say)
    with pytest.raises(RuntimeError, match=f"^row 0: logits hold NaN or infinity at step {step} of block {block}$"):
        generate(model, [prompt_of(8)], gen_length=40, block_length=8, **rules)


TEXT = [3, 1, 4, 1, 5, EOS]


def certain(position, tokens, known, behind):
    """TEXT from position 4 on, each token of which is certain once the one before it is there; the first `known` are
    from the beginning on. What comes behind it is `behind`."""
    at = position - 4
    if at < 0 or at >= len(TEXT):
        return behind(position)
    return one_hot(TEXT[at], 12.0 if at < known or tokens[position - 1] == TEXT[at - 1] else 2.0)


def unsure(position):
    return one_hot(position % 5, 0.5)


@each
@pytest.mark.parametrize("known", [0, 2, len(TEXT)])
def test_a_short_answer_costs_what_its_own_tokens_need(rules, known, monkeypatch):
    """Where what comes behind it is not certain."""

    def cost(behind, **how):
        model = scripted(monkeypatch, lambda position, tokens, number: certain(position, tokens, known, behind))
        out = generate(model, [prompt_of(4)], gen_length=60, block_length=32, return_dict=True, **rules | how)
        assert out.sequences[0, : len(TEXT)].tolist() == TEXT and out.num_tokens[0] == len(TEXT)
        return out.counters[0]

    alone = cost(lambda position: one_hot(EOS, 12.0), eos_early_stop=True)
    short = cost(unsure, eos_early_stop=True)
    assert short.denoise_forwards <= alone.denoise_forwards and short.check_forwards <= alone.check_forwards
    assert alone.denoise_forwards < cost(unsure).denoise_forwards
