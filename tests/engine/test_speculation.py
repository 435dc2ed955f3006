"""Drafts and their checks in the engine: pages, faults, and that nothing that happens to a request changes its text."""

from dataclasses import replace

import pytest
import torch

from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.decoding import speculation as speculation_module
from llada2_fast.engine import Engine
from llada2_fast.generate import generate
from tests.engine.common import (
    LENGTH,
    alone,
    assert_as_alone,
    assert_empty,
    assert_the_same_where_the_place_is_lost,
    chat,
    demo_model,
    prompt_of,
    random_model,
    run,
    small_engine,
    tokenizer,
    tokens_alone,
)
from tests.engine.test_window import CONFIGS, LOSSES, everywhere
from tests.thinned import thinned

CHECKED = DecodeParams(gen_length=24, policy="self_speculative", entropy_bound=0.1, eos_ids=())
PARAMS = [
    CHECKED,
    replace(CHECKED, gen_length=21, entropy_bound=0.0, attend_tail=False, eos_ids=None, eos_early_stop=True),
]
PLAIN = DecodeParams(gen_length=30, threshold=2.0, steps=4, eos_ids=())
BY_ENTROPY = DecodeParams(gen_length=22, policy="entropy", entropy_bound=2.0, temperature=0.8, seed=3, eos_ids=())
JOBS = [(prompt_of(12), CHECKED), (prompt_of(8), CHECKED), (prompt_of(5), PLAIN), (prompt_of(9), BY_ENTROPY)]
FIRST = 36  # positions of the first one of JOBS


def has_first(checks):
    return any(check.limit == FIRST for check in checks)


@everywhere
def test_a_check_with_nan_ends_its_request_alone(config, monkeypatch):
    """By the number of the step that was the check; nothing of it counts as written."""
    forward, checks_of_first = speculation_module._forward, []

    def poisoned(model, cache, checks, mask_id):
        hidden = forward(model, cache, checks, mask_id).unflatten(0, (len(checks), -1)).clone()
        for row, check in enumerate(checks):
            if check.limit == FIRST:
                checks_of_first.append(check)
                if len(checks_of_first) == 3:
                    hidden[row] = torch.nan
        return hidden.flatten(0, 1)

    answers = [alone(random_model(), *job) for job in JOBS]
    monkeypatch.setattr(speculation_module, "_forward", poisoned)
    engine = small_engine(**config)
    first, *others = [engine.add_request(*job) for job in JOBS]
    run(engine)
    counters = answers[0].counters[0]
    assert counters.forwards_per_block[0] == 4 and counters.check_forwards > 2  # two checks in its first block
    assert first.output.finish_reason == "error"
    assert first.output.error == f"request {first.request_id}: logits hold NaN or infinity at step 1 of block 4"
    assert first.output.counters.commits == LENGTH and first.output.counters.check_forwards == 3
    for request, job in zip(others, JOBS[1:], strict=True):
        assert_as_alone(request.output, random_model(), *job)
    assert_empty(engine)


def test_a_check_with_nan_names_row_and_step(monkeypatch):
    forward = speculation_module._forward
    monkeypatch.setattr(speculation_module, "_forward", lambda *args: forward(*args) * torch.nan)
    with pytest.raises(RuntimeError, match="row 0: logits hold NaN or infinity at step 1 of block 2"):
        generate(random_model(), [prompt_of(8)], gen_length=24, policy="self_speculative", entropy_bound=0.0)


@everywhere
@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_exception_in_a_check_ends_whose_check_it_is(config, at, monkeypatch, caplog):
    """Of two requests with checks, too, one ends alone where their checks are apart."""
    forward, seen = speculation_module._forward, []

    def failing(model, cache, checks, mask_id):
        seen.extend([None] * has_first(checks))
        if len(seen) >= at and has_first(checks):
            raise torch.OutOfMemoryError("no memory")
        return forward(model, cache, checks, mask_id)

    answers = [alone(random_model(), *job) for job in JOBS]
    assert all(answer.counters[0].check_forwards >= at for answer in answers[:2])
    monkeypatch.setattr(speculation_module, "_forward", failing)
    engine = small_engine(**config)
    engine.decoder._most_tokens = 2 * LENGTH  # a check apart
    first, *others = [engine.add_request(*job) for job in JOBS]
    run(engine)
    assert first.output.finish_reason == "error"
    assert first.output.error == f"request {first.request_id}: OutOfMemoryError: no memory"
    for request, job in zip(others, JOBS[1:], strict=True):
        assert_as_alone(request.output, random_model(), *job)
    (record,) = [record for record in caplog.records if record.name.startswith("llada2_fast")]
    assert "1 requests end" in record.getMessage() and record.exc_info[2] is not None
    assert_empty(engine)


def test_checks_together_end_together(monkeypatch):
    """Two in one forward that raises: nobody can say whose fault it is. Who is not in it goes on."""

    def failing(*args):
        raise RuntimeError("boom")

    for job in JOBS:
        alone(random_model(), *job)
    monkeypatch.setattr(speculation_module, "_forward", failing)
    engine = small_engine()
    requests = [engine.add_request(*job) for job in JOBS]
    run(engine)
    assert [request.output.finish_reason for request in requests] == ["error", "error", "length", "length"]
    for request, job in zip(requests[2:], JOBS[2:], strict=True):
        assert_as_alone(request.output, random_model(), *job)
    assert_empty(engine)


def test_pages_of_checks_are_counted():
    need = 2 + 6 + 2  # prompt, answer, scratch
    fitting = small_engine(cache_tokens=need * LENGTH)
    request = fitting.add_request(prompt_of(8), CHECKED)
    fitting.step()
    assert fitting.cache.num_free == 0
    run(fitting)
    assert_as_alone(request.output, random_model(), prompt_of(8), CHECKED)
    both = small_engine(cache_tokens=(need + need - 1) * LENGTH)
    requests = [both.add_request(prompt_of(8, seed), CHECKED) for seed in (0, 1)]
    both.step()
    assert [request.status for request in requests] == ["running", "waiting"]
    run(both)
    assert_as_alone(requests[1].output, random_model(), prompt_of(8, 1), CHECKED)
    wanted = f"gen_length=24: .* and policy='self_speculative' {need} pages of 4 tokens are needed"
    with pytest.raises(ValueError, match=wanted):
        small_engine(cache_tokens=(need - 1) * LENGTH).add_request(prompt_of(8), CHECKED)


@pytest.mark.parametrize("number, config, what", thinned(3, range(2), CONFIGS, LOSSES))
def test_who_loses_the_place_gets_the_same(number, config, what):
    assert_the_same_where_the_place_is_lost(prompt_of(6, 3), PARAMS[number], PARAMS[0], CONFIGS[config], what)


@everywhere
def test_what_is_shared_is_final(config):
    """The next turn finds the blocks of a checked answer, and goes on as without them."""
    engine, prompt = small_engine(cache_tokens=400, **config), prompt_of(8)
    request = engine.add_request(prompt, CHECKED)
    run(engine)
    second = prompt + request.output.token_ids
    output = engine.generate([second], CHECKED)[0]
    assert output.shared_tokens >= 16
    assert_as_alone(output, random_model(), second, CHECKED)


def test_every_forward_of_a_check_counts():
    counters = alone(random_model(), *JOBS[0]).counters[0]
    assert counters.denoise_forwards == sum(counters.forwards_per_block)
    assert 0 < 2 * counters.check_forwards <= counters.denoise_forwards
    (output,) = small_engine().generate([JOBS[0][0]], CHECKED)
    assert output.counters.check_forwards == counters.check_forwards
    assert output.tokens_per_forward == len(output.token_ids) / counters.denoise_forwards
    assert alone(random_model(), *JOBS[3]).counters[0].check_forwards == 0


def test_alternatives_are_those_of_the_check():
    """Of the model with block size 1, where it has written."""
    checked = 0
    for n in range(4, 8):
        (output,) = small_engine().generate([prompt_of(n, n)], CHECKED, top_logprobs=3)
        assert_as_alone(output, random_model(), prompt_of(n, n), CHECKED)
        for token, listed, logprob in zip(output.token_ids, output.top_logprobs, output.logprobs, strict=True):
            assert listed[0] == (token, pytest.approx(logprob, abs=1e-4)) and len(listed) == 3
        checked += output.counters.check_forwards
    assert checked > 5


def test_drafts_that_wait_for_a_check_are_told_to_nobody():
    """A reader's "draft" is what is written: masks become tokens and stay."""
    engine = small_engine()
    request = engine.add_request(*JOBS[0])
    request.drafts, given, shown = True, [], []
    while request.output is None:
        engine.step()
        while (event := request.next_event()) is not None and event.kind != "finish":
            if event.kind == "commit":
                given, shown = given + event.token_ids, []
            else:
                there = [(token, step) for token, step in zip(event.token_ids, event.steps, strict=True)]
                assert all(now == before for now, before in zip(there, shown, strict=False) if before[1] >= 0)
                assert sum(step >= 0 for _, step in there) > sum(step >= 0 for _, step in shown)
                shown = there
    assert given == request.output.token_ids == tokens_alone(random_model(), *JOBS[0])


def test_texts_of_the_embedded_model_are_their_pieces():
    engine = Engine(demo_model(), EngineConfig(cache_tokens=4096), tokenizer())
    params = DecodeParams(gen_length=48, eos_early_stop=True, policy="self_speculative", entropy_bound=0.05)
    request = engine.add_request(chat("Tell a story about Max the goat near the lake."), params)
    pieces = [event.text for event in engine.stream(request, drafts=False)]
    assert "".join(pieces) == request.output.text and request.output.counters.check_forwards > 0
    assert request.output.token_ids == tokens_alone(demo_model(), request.prompt, params)
