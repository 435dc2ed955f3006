"""Self-speculation: what a check computes, what it leaves alone, what it costs, and what it makes of drafts.

That tokens, traces and forwards are by the book is in test_properties.py, for generate(); here for every runner.
"""

import functools

import pytest
import torch

from llada2_fast import Engine, EngineConfig
from llada2_fast.config import DecodeParams
from llada2_fast.decoding import speculation
from llada2_fast.decoding.decoder import decode_all
from llada2_fast.decoding.rules import row_rule
from llada2_fast.decoding.runner import CachedForward, Prefill
from llada2_fast.decoding.speculation import Check
from llada2_fast.kernels.roles import SpecialIds, block_kinds
from tests.engine.common import demo_model
from tests.test_fake_cuda import fake_cuda, held, load, move
from tests.test_graphs import decode, decoder_of
from tests.test_properties import by_the_book, golden_model, token_by_token

MASK, EOS = 255, 252  # of the golden set "tiny"
RUNNERS = {"eager": None, "graphs": 0, "graphs, read a step late": 1}
POLICY = {"policy": "self_speculative"}
RULES = {
    "seldom": POLICY | {"entropy_bound": 12.0},
    "always": POLICY | {"entropy_bound": 0.0},
    "near ones count more": POLICY | {"entropy_bound": 3.0, "entropy_decay": 0.5},
    "no tail": POLICY | {"entropy_bound": 4.0, "attend_tail": False},
    "ends": POLICY | {"entropy_bound": 6.0, "eos_early_stop": True},
}
LENGTHS = [3, 40, 8, 17]
CHECKED = row_rule(DecodeParams(policy="self_speculative"), 8)


@pytest.fixture(scope="module")
def model():
    return golden_model("tiny")


def written(row):
    return [(event.step, event.position, event.kind, event.token, event.old) for event in row.events]


def prompt_of(length):
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@functools.cache
def book(length, name, eos):
    """by_the_book of a row of test_graphs.decoder_of."""
    rules = {"gen_length": 19, "block_length": 8, "steps": 32, "minimal_topk": 1, "eos_early_stop": False}
    rules |= {"attend_tail": True, "mask_id": MASK, "eos_id": eos, "max_post_steps": 16} | RULES[name]
    return by_the_book(golden_model("tiny"), prompt_of(length), rules)


# The check itself


@pytest.mark.parametrize("name", ["tiny", "group", "embedded"])
def test_a_check_says_what_the_model_says_token_by_token(name):
    """Rows of other lengths beside it, with given tokens in the block, without a tail. What was in the rows' own pages
    stays."""
    model, length = demo_model() if name == "embedded" else golden_model(name), 8
    mask = model.config.mask_token_id or (1 if name == "embedded" else MASK)
    cache = model.new_cache(40, length)
    generator, checks, rows, own = torch.Generator().manual_seed(1), [], [], []
    for block, given, missing in ((0, 1, 0), (2, 0, 0), (1, 3, 0), (3, 2, 3)):
        tokens = torch.randint(2, 250, ((block + 1) * length,), generator=generator).tolist()
        limit, begin = (block + 1) * length - missing, block * length
        pages, scratch = cache.allocate(block + 1), cache.allocate(2)
        if block:
            CachedForward(model, cache).prefill([Prefill(pages, limit, 0, tokens[:begin])])
        known = [token if at < given else -1 for at, token in enumerate(tokens[begin:])]
        kinds = block_kinds(tokens[begin : begin + given], begin, length, limit, limit)
        rule = CHECKED
        checks.append(Check(pages[:block] + scratch, limit, block, known, tokens[begin:], kinds, rule, 0))
        rows.append((tokens, begin, given, limit))
        own += pages
    before = cache.k.clone(), cache.v.clone()
    with torch.inference_mode():
        output, _ = speculation.check(model, cache, checks, SpecialIds(mask))
    for (tokens, begin, given, limit), found in zip(rows, output.token.tolist(), strict=True):
        for at in range(begin + given, limit):
            assert found[at - begin] == token_by_token(model, tokens, begin, at, length, mask)
    assert torch.equal(cache.k[:, own], before[0][:, own]) and torch.equal(cache.v[:, own], before[1][:, own])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", RULES)
def test_every_runner_goes_by_the_book(model, name, runner):
    """Rows whose blocks end together and apart, in one decoder."""
    rows, checks = decode(model, LENGTHS, RULES[name], RUNNERS[runner], trace=True), 0
    for length, row in zip(LENGTHS, rows, strict=True):
        tokens, events, per_block = book(length, name, (EOS,))
        assert row.answer() == tokens and row.counters.forwards_per_block == per_block
        assert written(row) == events
        steps = {event.step for event in row.events}
        assert row.counters.denoise_forwards == sum(per_block)
        assert row.counters.check_forwards == sum(per_block) - len(steps)  # a draft has written nothing
        checks += row.counters.check_forwards
    assert checks > 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_checks_go_in_groups(model, runner, monkeypatch):
    """Of as many rows as there is room for, one at least; what they do is the same."""
    forward, sizes = speculation._forward, []

    def measured(model, cache, checks, mask_id):
        sizes.append(len(checks))
        return forward(model, cache, checks, mask_id)

    monkeypatch.setattr(speculation, "_forward", measured)
    found = {}
    for most in (8, 40, 512):
        sizes.clear()
        decoder, rows = decoder_of(model, LENGTHS, RULES["always"], RUNNERS[runner], trace=True)
        decoder._most_tokens = most
        decode_all(decoder, rows)
        found[most] = [(row.answer(), written(row), row.counters.forwards_per_block) for row in rows]
        assert max(sizes) == {8: 1, 40: 2, 512: 4}[most]
    assert found[8] == found[40] == found[512]


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_likeliest_ids_are_those_of_the_check(model, runner):
    """At the write that put a token there: the token is the first of them, with its confidence."""
    rows = decode(model, LENGTHS, RULES["always"], RUNNERS[runner], top=3)
    for row in rows:
        assert row.counters.check_forwards
        for token, p, listed in zip(row.answer(), row.token_confidences, row.token_top, strict=False):
            assert len(listed) == 3 and listed[0][0] == token
            assert listed[0][1] == pytest.approx(torch.tensor(p).log().item(), abs=1e-4)


def test_pages_of_checks_are_given_back(model):
    config = EngineConfig(max_num_seqs=2, block_length=8, mask_id=MASK, cache_tokens=200)
    engine = Engine(model, config)
    params = DecodeParams(gen_length=20, eos_ids=(), mask_id=MASK, **RULES["always"])
    request = engine.add_request(prompt_of(17), params)
    assert request.sequence.num_pages == request.sequence.num_blocks + 2
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert engine.cache.num_free == engine.cache.num_pages


# On a GPU, as far as a CPU can tell

ALWAYS = {"gen_length": 4, "block_length": 8, "mask_id": MASK, "policy": "self_speculative", "entropy_bound": 0.0}


def test_the_same_on_a_gpu(golden):
    def outputs(model, **how):
        prompts = [prompt_of(length) for length in (3, 7)]
        out = model.generate(prompts, eos_id=-1, return_dict=True, **ALWAYS, **how)
        return held(out.sequences).tolist(), [row.check_forwards for row in out.counters]

    wanted = outputs(load(golden))
    with fake_cuda():
        assert outputs(move(load(golden)), graphs=True) == wanted
    assert all(checks for checks in wanted[1])


def test_nothing_waits_in_a_check(golden, monkeypatch):
    """The host waits for what it has done, and for nothing else."""
    runs, run = [], CachedForward.check

    def check(self, checks, ids):
        before = len(mode.waits)
        result = run(self, checks, ids)
        runs.append((len(checks), mode.waits[before:]))
        return result

    monkeypatch.setattr(CachedForward, "check", check)
    with fake_cuda() as mode:
        config = EngineConfig(block_length=8, mask_id=MASK, cache_tokens=128, graphs=True)
        engine = Engine(move(load(golden)), config)
        outputs = engine.generate([[1, 2, 3]], DecodeParams(eos_ids=(), **ALWAYS), top_logprobs=2)
    assert outputs[0].error is None and runs and not any(waits for _, waits in runs)
    assert sum(count for count, _ in runs) == sum(output.counters.check_forwards for output in outputs)


def test_other_weights(golden):
    """In fp8 the head's input is, too."""
    with fake_cuda():
        model = move(load(golden, quantization="fp8"))
        out = model.generate([[1, 2, 3]], eos_id=-1, return_dict=True, **ALWAYS)
    assert out.counters[0].check_forwards > 0 and MASK not in held(out.sequences)
