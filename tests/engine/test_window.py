"""Multi-block editing in the engine: what is given out when, what is shared, and that nothing that happens to a request
changes its tokens."""

from dataclasses import replace

import pytest
import torch

from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.decoding import decoder as decoder_module
from llada2_fast.decoding import window as window_module
from llada2_fast.engine import Engine
from llada2_fast.engine import engine as engine_module
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
    small_engine,
    tokenizer,
    tokens_alone,
)
from tests.thinned import thinned

PARAMS = [
    DecodeParams(gen_length=24, threshold=0.3, editing_threshold=0.3, max_post_steps=0, edit_window=1, eos_ids=()),
    DecodeParams(gen_length=21, threshold=0.3, editing_threshold=0.1, max_post_steps=2, edit_window=2, eos_ids=()),
    DecodeParams(
        gen_length=18, temperature=0.9, seed=5, threshold=0.3, editing_threshold=0.2, edit_window=9,
        eos_early_stop=True,
    ),
]  # fmt: skip
CONFIGS = {
    "eager": {},
    "graphs": {"graphs": True, "capture": False, "overlap": False, "trace": True},
    "graphs, read a step late": {"graphs": True, "capture": False, "trace": True},
}
LOSSES = ["suspended", "recovered", "recomputed"]
each = pytest.mark.parametrize("params", PARAMS, ids=["one", "two", "all"])
everywhere = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@everywhere
@each
def test_what_is_given_out_is_never_taken_back(params, config):
    """After block b's pass blocks up to b - edit_window are given out, all others at the end."""
    for n in range(4, 9):
        engine, prompt = small_engine(**config), prompt_of(n, n)
        request = engine.add_request(prompt, params)
        request.drafts = True
        given, edits = [], []
        while (output := request.output) is None:
            engine.step()
            sequence = request.sequence
            while (event := request.next_event()) is not None and event.kind != "finish":
                assert event.start == len(given)
                shown = sequence.ids[n + event.start :]
                if event.kind == "commit":
                    given += event.token_ids
                    edits += event.edits
                    assert all(n + event.start <= edit.position < n + len(given) for edit in event.edits)
                else:
                    assert event.token_ids[: len(shown)] == shown
                    assert len(event.token_ids) == len(event.confidences) == len(event.steps) > len(shown)
            if request.output is None:
                kept = max(0, (sequence.block + sequence.block_ended - sequence.edit_window) * LENGTH - n)
                assert len(given) == sequence.num_delivered == kept
        assert given == output.token_ids and sorted(edits) == sorted(output.edits)
        assert_as_alone(output, random_model(), prompt, params)
        assert_empty(engine)


def test_texts_of_the_embedded_model_are_their_pieces():
    engine = Engine(demo_model(), EngineConfig(cache_tokens=4096), tokenizer())
    params = DecodeParams.preset("speed", gen_length=48, eos_early_stop=True, max_post_steps=0, edit_window=2)
    for text in ("Add 847 and 96.", "Tell a story about Max the goat near the lake."):
        request = engine.add_request(chat(text), params)
        pieces = [event.text for event in engine.stream(request, drafts=False)]
        assert "".join(pieces) == request.output.text and len(pieces) > 1
        assert request.output.token_ids == tokens_alone(demo_model(), chat(text), params)
        counters = request.output.counters
        assert counters.window_forwards == len(counters.forwards_per_block) - 1
        assert request.output.tokens_per_forward == len(request.output.token_ids) / counters.denoise_forwards


@pytest.mark.parametrize(
    "number, config, what", thinned(3, range(3), CONFIGS, ["suspended", "recovered", "recomputed"])
)
def test_who_loses_the_place_gets_the_same(number, config, what):
    assert_the_same_where_the_place_is_lost(prompt_of(6, 3), PARAMS[number], PARAMS[1], CONFIGS[config], what)


@each
def test_a_pass_that_nobody_was_told_of_is_undone(params, monkeypatch):
    """Ctrl-C between a pass and its entry in the log: the pass comes again, over the tokens there were."""
    prompt, process = prompt_of(6, 3), engine_module.process
    for number in range(1, alone(random_model(), prompt, params).counters[0].window_forwards + 1):
        pending = [KeyboardInterrupt()]

        def interrupted(request, now, number=number, pending=pending):
            if pending and request.sequence.counters.window_forwards == number:
                raise pending.pop()
            return process(request, now)

        monkeypatch.setattr(engine_module, "process", interrupted)
        engine = small_engine()
        request = engine.add_request(prompt, params)
        while engine.has_work:
            try:
                engine.step()
            except KeyboardInterrupt:
                engine.check_integrity()
        assert not pending
        assert_as_alone(request.output, random_model(), prompt, params)


def test_a_request_that_is_preempted_gets_the_same():
    engine = small_engine(max_num_seqs=1)
    low = engine.add_request(prompt_of(6), PARAMS[0], priority=0)
    while not low.sequence.counters.window_forwards:
        engine.step()
    high = engine.add_request(prompt_of(7), PARAMS[1], priority=1)
    while engine.has_work:
        engine.step()
    assert low.output.preemptions == 1
    assert_as_alone(low.output, random_model(), prompt_of(6), PARAMS[0])
    assert_as_alone(high.output, random_model(), prompt_of(7), PARAMS[1])


@everywhere
@each
def test_what_is_revisable_is_not_shared(params, config):
    """Until it cannot change any more; then it is what the next turn finds."""
    engine, prompt = small_engine(cache_tokens=400, **config), prompt_of(8)
    request = engine.add_request(prompt, params)
    sequence, shared = request.sequence, set()
    while engine.has_work:
        engine.step()
        entered = {block for block, page in enumerate(sequence.pages) if page in engine.cache._hash}
        assert entered <= set(range(sequence.num_kept_blocks))
        shared |= entered
    assert (max(shared) >= sequence.first_block) == (params is not PARAMS[2])
    second = prompt + request.output.token_ids
    output = engine.generate([second], params)[0]
    assert output.shared_tokens >= len(shared) * LENGTH
    assert_as_alone(output, random_model(), second, params)


def test_a_stop_that_is_edited_away_ends_nothing():
    """Stops are judged on what is given out."""
    params, gone = PARAMS[0], 0
    for n in range(4, 16):
        prompt = prompt_of(n, n)
        tokens, trace = tokens_alone(random_model(), prompt, params), alone(random_model(), prompt, params).trace[0]
        once = {event.token for event in trace.events if event.position < n + len(tokens)}
        for stop in sorted(once)[:4]:
            output = small_engine().generate([prompt], params, stop_token_ids=[stop])[0]
            count = tokens.index(stop) + 1 if stop in tokens else len(tokens)
            assert output.token_ids == tokens[:count]
            assert output.finish_reason == ("stop" if stop in tokens else "length")
            gone += stop not in tokens
    assert gone > 5


def test_ends_among_the_first_tokens_do_not_count():
    for n in range(4, 10):
        prompt, params = prompt_of(n, n), PARAMS[0]
        tokens = tokens_alone(random_model(), prompt, params)
        eos = tokens[2]
        ending = DecodeParams(**{**vars(params), "eos_ids": (eos,), "eos_early_stop": True})
        output = small_engine().generate([prompt], ending, min_tokens=5)[0]
        assert len(output.token_ids) > 3 and eos not in output.token_ids[5:-1]


def test_ends_behind_the_first_tokens_are_judged_as_without_them():
    """After a pass, which may edit them away or bring them: not when they are given out."""
    compared = 0
    for n in range(4, 12):
        prompt, params = prompt_of(n, n), PARAMS[n % 2]
        for eos in sorted(set(tokens_alone(random_model(), prompt, params)))[:4]:
            ending = DecodeParams(**{**vars(params), "eos_ids": (eos,), "eos_early_stop": True})
            whole, early = (small_engine().generate([prompt], ending, min_tokens=m)[0] for m in (0, 3))
            if len(whole.token_ids) > 3:
                compared += whole.finish_reason == "eos"
                assert (early.token_ids, early.finish_reason) == (whole.token_ids, whole.finish_reason)
    assert compared >= 3


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_who_is_ended_early_has_what_is_there(reason):
    """Also what was revisable: no pass will come."""
    params, prompt, time = PARAMS[1], prompt_of(8), [0.0]
    engine = small_engine(clock=lambda: time[0])
    request = engine.add_request(prompt, params, deadline_s=1.0)
    while request.sequence.block < 5:
        engine.step()
    there = request.sequence.ids[8:]
    given = request.sequence.num_delivered
    time[0] = 2.0
    engine.cancel(request.request_id) if reason == "cancelled" else engine.step()
    assert request.output.finish_reason == reason
    assert request.output.token_ids == there and len(there) > given
    events = [event for event in iter(request.next_event, None) if event.kind == "commit"]
    assert [token for event in events for token in event.token_ids] == there
    assert len(request.output.confidences) == len(request.output.steps) == len(there)
    assert_empty(engine)


def test_pages_of_passes_are_counted():
    need = 2 + 6 + 2  # prompt, answer, scratch
    fitting = small_engine(cache_tokens=need * LENGTH)
    request = fitting.add_request(prompt_of(8), PARAMS[0])
    fitting.step()
    assert fitting.cache.num_free == 0
    while fitting.has_work:
        fitting.step()
    assert_as_alone(request.output, random_model(), prompt_of(8), PARAMS[0])
    both = small_engine(cache_tokens=(need + need - 1) * LENGTH)
    requests = [both.add_request(prompt_of(8, seed), PARAMS[0]) for seed in (0, 1)]
    both.step()
    assert [request.status for request in requests] == ["running", "waiting"]
    while both.has_work:
        both.step()
    assert_as_alone(requests[1].output, random_model(), prompt_of(8, 1), PARAMS[0])
    with pytest.raises(ValueError, match=f"gen_length=24: .* and edit_window=1 {need} pages of 4 tokens are needed"):
        small_engine(cache_tokens=(need - 1) * LENGTH).add_request(prompt_of(8), PARAMS[0])


def test_alternatives_are_those_of_the_edit():
    edited = 0
    for n in range(4, 8):
        output = small_engine().generate([prompt_of(n, n)], PARAMS[0], top_logprobs=3)[0]
        assert_as_alone(output, random_model(), prompt_of(n, n), PARAMS[0])
        for token, listed, logprob in zip(output.token_ids, output.top_logprobs, output.logprobs, strict=True):
            assert listed[0] == (token, pytest.approx(logprob, abs=1e-4))  # greedy
        edited += len({edit.position for edit in output.edits})
    assert edited > 5


def test_a_bad_pass_ends_its_request_alone(monkeypatch):
    forward = window_module._forward

    def poisoned(model, cache, windows):
        hidden, begin = forward(model, cache, windows), 0
        for window in windows:
            end = begin + len(window.tokens)
            if window.limit == 36:  # the first one's
                hidden[begin:end] = torch.nan
            begin = end
        return hidden

    monkeypatch.setattr(window_module, "_forward", poisoned)
    engine = small_engine()
    first, second = engine.add_request(prompt_of(12), PARAMS[0]), engine.add_request(prompt_of(8), PARAMS[0])
    while engine.has_work:
        engine.step()
    assert first.output.finish_reason == "error" and "the window pass of block 4" in first.output.error
    assert_as_alone(second.output, random_model(), prompt_of(8), PARAMS[0])
    assert_empty(engine)


@everywhere
@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_exception_in_a_pass_ends_whose_pass_it_is(config, at, monkeypatch, caplog):
    """Of two requests with windows, too, one ends alone where their passes are apart."""
    forward, passes = window_module._forward, []

    def failing(model, cache, windows):
        passes.extend(window for window in windows if window.limit == 36)  # the first one's
        if len(passes) >= at and any(window.limit == 36 for window in windows):
            raise torch.OutOfMemoryError("no memory")
        return forward(model, cache, windows)

    plain = DecodeParams(gen_length=30, threshold=2.0, steps=4, eos_ids=())
    jobs = [(prompt_of(12), PARAMS[0]), (prompt_of(8), PARAMS[0]), (prompt_of(5), plain), (prompt_of(9), plain)]
    answers = [alone(random_model(), *job) for job in jobs]
    assert answers[0].counters[0].window_forwards >= at
    monkeypatch.setattr(window_module, "_forward", failing)
    engine = small_engine(**config)
    engine.decoder._most_tokens = 8  # a pass apart
    first, *others = [engine.add_request(*job) for job in jobs]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert first.output.finish_reason == "error"
    assert first.output.error == f"request {first.request_id}: OutOfMemoryError: no memory"
    for request, job in zip(others, jobs[1:], strict=True):
        assert_as_alone(request.output, random_model(), *job)
    (record,) = [record for record in caplog.records if record.name.startswith("llada2_fast")]
    assert "1 requests end" in record.getMessage() and record.exc_info[2] is not None
    assert_empty(engine)


def test_a_window_is_no_larger_than_a_forward(monkeypatch):
    monkeypatch.setitem(decoder_module.PREFILL_TOKENS, "cpu", 8)
    large = replace(PARAMS[0], edit_window=2)
    wanted = "edit_window=2: expected at most 1, for its windows of 3 blocks of 4 tokens are more than the 8 of one"
    engine = small_engine(max_num_batched_tokens=8)
    with pytest.raises(ValueError, match=wanted):
        engine.add_request(prompt_of(5), large)
    with pytest.raises(ValueError, match=wanted):
        generate(random_model(), [prompt_of(5)], gen_length=24, editing_threshold=0.3, edit_window=2)
    engine.add_request(prompt_of(8), replace(large, gen_length=8))  # it has no more blocks
    assert small_engine(max_num_batched_tokens=12).add_request(prompt_of(5), large).status == "waiting"
