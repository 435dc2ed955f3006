"""The engine against generate(): the same tokens, traces and forwards; events; stops; what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from llada2_fast.config import PRESETS, DecodeParams, EngineConfig
from llada2_fast.demo import tasks
from llada2_fast.engine import Engine, EngineStats
from llada2_fast.model import LLaDA2Model
from tests.engine.common import (
    MASK,
    PARAMS,
    UNDERTRAINED,
    VOCAB,
    alone,
    assert_as_alone,
    assert_empty,
    chat,
    demo_model,
    prompt_of,
    random_model,
    small_engine,
    tokenizer,
    tokens_alone,
)

GOLDEN = Path(__file__).parent.parent / "golden"
JOBS = [(prompt_of(n, seed=n), params) for n, params in zip((0, 5, 8, 11, 17, 3, 6, 9, 4, 10), PARAMS, strict=True)]


@pytest.mark.parametrize("running", [1, 3, 8])
def test_every_kind_of_request_together_gives_what_it_gives_alone(running):
    engine = small_engine(max_num_seqs=running)
    outputs = engine.generate([prompt for prompt, _ in JOBS], [params for _, params in JOBS])
    for output, (prompt, params) in zip(outputs, JOBS, strict=True):
        assert_as_alone(output, random_model(), prompt, params)
    assert_empty(engine)
    assert engine.finished.total() == len(JOBS) and not engine.finished["error"]


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_embedded_models_give_what_they_give_alone(preset):
    settings = {"gen_length": 64, "eos_early_stop": True}
    params = DecodeParams.preset(preset, **settings) if preset else DecodeParams(threshold=0.7, **settings)
    prompts = [chat(prompt) for task in tasks.TASKS for prompt in tasks.sample(task, 2, 3)]
    model = demo_model(UNDERTRAINED)
    engine = Engine(model, EngineConfig(max_num_seqs=6, cache_tokens=1024, max_num_batched_tokens=32), tokenizer())
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        assert_as_alone(output, model, prompt, params)
        assert output.text == tokenizer().decode(output.token_ids, skip_special_tokens=True)
    assert_empty(engine)


@pytest.mark.parametrize("name", ["tiny", "moe256"])
def test_recorded_decodings_of_the_model_cards(name):
    """All cases of a set with one block length share an engine: the tokens and forwards that were recorded."""
    model = LLaDA2Model.from_pretrained(GOLDEN / name, dtype=torch.float32, progress=False)
    cases = json.loads((GOLDEN / name / "generate.json").read_text())["cases"]
    for length in sorted({case["params"]["block_length"] for case in cases}):
        own = [case for case in cases if case["params"]["block_length"] == length]
        engine = Engine(model, EngineConfig(length, mask_id=own[0]["params"]["mask_id"], cache_tokens=2048))
        params = [
            DecodeParams(
                profile=f"hf-{case['version']}", eos_ids=(case["params"]["eos_id"],),
                **{k: v for k, v in case["params"].items() if k != "eos_id"},
            ) for case in own
        ]  # fmt: skip
        for case, output in zip(own, engine.generate([case["prompt"] for case in own], params), strict=True):
            assert (output.token_ids, output.counters.denoise_forwards) == (case["output"], case["num_forwards"])
        assert_empty(engine)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 12, 20])
def test_it_is_exact_at_every_block_length(length):
    if not random_model().exact_rows:
        pytest.skip("this machine's libraries round a row by its batch, at any height: nothing is promised")
    jobs = [
        (prompt_of(n, n), replace(params, block_length=length))
        for n, params in zip(range(3, 53, 5), PARAMS, strict=True)
    ]
    engine = small_engine(block_length=length, cache_tokens=400)
    outputs = engine.generate([prompt for prompt, _ in jobs], [params for _, params in jobs])
    for output, (prompt, params) in zip(outputs, jobs, strict=True):
        assert_as_alone(output, random_model(), prompt, params)


@pytest.mark.parametrize("overlap", [False, True])
def test_step_graphs_give_the_same_tokens(overlap):
    """What a GPU replays, run step by step: prompts in chunks, shared pages, preemption."""
    engine = small_engine(
        max_num_seqs=4, cache_tokens=160, max_num_batched_tokens=8, graphs=True, capture=False, overlap=overlap
    )
    jobs = [(prompt_of(22)[: 10 + 2 * n], params) for n, params in enumerate(PARAMS[:6])]
    requests = [engine.add_request(*job, priority=n // 3) for n, job in enumerate(jobs)]
    for _ in range(7):
        engine.step()
    urgent = engine.add_request(prompt_of(60, 1), DecodeParams(gen_length=100, threshold=0.0), priority=3)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    for request, (prompt, params) in zip(requests, jobs, strict=True):
        assert request.output.token_ids == tokens_alone(random_model(), prompt, params)
        assert len(request.output.confidences) == len(request.output.token_ids) and min(request.output.confidences) > 0
    assert engine.scheduler.preemptions > 0 and sum(request.shared_tokens for request in requests) > 0
    assert urgent.output.token_ids == tokens_alone(random_model(), prompt_of(60, 1), urgent.params)
    assert_empty(engine)


def test_step_graphs_reach_the_models_last_position():
    """Its last block is cut short: 512 positions are ten blocks of 48 and a part of one."""
    config, params = dict(block_length=48, cache_tokens=11 * 48), DecodeParams(gen_length=30, threshold=0.0)
    outputs = [
        small_engine(**config, **graphs).generate([prompt_of(482)], params)[0]
        for graphs in ({}, {"graphs": True, "capture": False})
    ]
    assert outputs[0].error is outputs[1].error is None and outputs[0].token_ids == outputs[1].token_ids


@pytest.mark.parametrize("graphs", [{}, {"graphs": True, "capture": False}], ids=["eager", "overlap"])
def test_a_trace_is_kept_for_who_asks_for_it(graphs):
    """Also where the host learns a step late what was written; nobody else pays for it."""
    engine = small_engine(trace=False, **graphs)
    asked, other = (engine.add_request(prompt_of(9), PARAMS[1], trace=trace) for trace in (True, None))
    while engine.has_work:
        engine.step()
    assert_as_alone(asked.output, random_model(), prompt_of(9), PARAMS[1])
    assert_as_alone(other.output, random_model(), prompt_of(9), PARAMS[1], traced=False)
    assert asked.output.edits and not other.output.edits
    assert small_engine(trace=True, **graphs).generate([prompt_of(9)], PARAMS[1], trace=False)[0].trace is None


def test_an_id_that_is_made_up_is_nobody_s():
    engine = small_engine()
    params = DecodeParams(gen_length=4, steps=1, eos_ids=())
    given = ["request-2", None, "request-4", None, None]
    requests = [engine.add_request(prompt_of(3), params, request_id=name) for name in given]
    assert len({request.request_id for request in requests}) == len(given)
    assert len(engine.generate([prompt_of(3)] * 2, params)) == 2 and all(request.output for request in requests)


def test_stats_say_what_was_done_and_is_held():
    engine = small_engine(max_num_seqs=1, cache_tokens=160)
    engine.step()  # there is nothing to do
    assert engine.stats() == EngineStats(0, 0, {}, 0, 0, 0, 0, 0, 0, 40, 40, 0, 0)
    params = DecodeParams(gen_length=8, threshold=0.0, eos_ids=())
    outputs = engine.generate([prompt_of(8)] * 2, params)
    engine.add_request(prompt_of(8), DecodeParams(gen_length=8))
    engine.add_request(prompt_of(8), DecodeParams(gen_length=8))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_finished) == (1, 1, {"length": 2})
    assert (stats.prompt_tokens, stats.generated_tokens) == (16, 16)
    assert stats.shared_tokens == sum(output.shared_tokens for output in outputs) == 8
    assert stats.denoise_forwards == sum(output.counters.denoise_forwards for output in outputs) == 4
    assert stats.tokens_per_forward == 4.0 and stats.num_steps == 5
    assert (stats.num_pages, stats.num_free_pages) == (40, engine.cache.num_free) == (40, 36)
    assert stats.num_idle_pages == engine.cache.num_idle and stats.num_evicted_pages == 0


def test_events_add_up_to_the_output():
    model, engine = demo_model(UNDERTRAINED), None
    engine = Engine(model, EngineConfig(max_num_seqs=2, cache_tokens=1024), tokenizer())
    params = DecodeParams.preset("speed", gen_length=64, eos_early_stop=True)
    request = engine.add_request(chat("Spell 4071, 22, 608."), params)
    engine.add_request(chat("Add 47 and 96."), params)
    events = list(engine.stream(request))
    commits = [event for event in events if event.kind == "commit"]
    assert [event.kind for event in events].count("finish") == 1 and events[-1].output is request.output
    output = request.output
    for name, whole in (("token_ids", output.token_ids), ("confidences", output.confidences), ("steps", output.steps)):
        assert [x for event in commits for x in getattr(event, name)] == whole
    assert [event.start for event in commits] == [0, *(event.start + len(event.token_ids) for event in commits[:-1])]
    assert "".join(event.text for event in events) == output.text and len(commits) > 1
    edits = [edit for event in commits for edit in event.edits]
    assert edits == output.edits == [event for event in output.trace.events if event.kind == "edit"] and edits
    assert all(0 <= edit.position - output.prompt_length < len(output.token_ids) for edit in edits)
    writes, logprobs = output.trace.commits(), output.trace.logprobs()
    for i, token in enumerate(output.token_ids, output.prompt_length):
        assert token == writes[i].token and output.logprobs[i - output.prompt_length] == pytest.approx(logprobs[i])
    firsts, edited = output.trace.logprobs(first=True), {edit.position for edit in edits}
    assert all((firsts[i] == logprobs[i]) == (i not in edited) for i in writes)
    assert output.tokens_per_forward == len(output.token_ids) / output.counters.denoise_forwards
    assert all(a.time <= b.time for a, b in zip(events, events[1:], strict=False))
    assert min(output.queue_s, output.prefill_s, output.decode_s) >= 0


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("graphs", [{}, *({"graphs": True, "capture": False, "overlap": x} for x in (False, True))])
def test_a_token_s_numbers_are_those_of_what_wrote_it(trace, graphs):
    """Commit or edit; with a trace, without one, and where the host lags a step behind."""
    jobs = [
        (prompt_of(n), DecodeParams(gen_length=21, threshold=0.2, editing_threshold=0.2, max_post_steps=4, eos_ids=()))
        for n in range(4, 10)
    ]
    engine = small_engine(trace=trace, **graphs)
    edited = 0
    for output, (prompt, params) in zip(engine.generate(*map(list, zip(*jobs, strict=True))), jobs, strict=True):
        last = {}
        for event in alone(random_model(), prompt, params).trace[0].events:
            last[event.position - len(prompt)] = event
        edited += sum(last[i].kind == "edit" for i in range(21))
        for i in range(21):
            assert output.token_ids[i] == last[i].token and output.steps[i] == last[i].step
            assert output.confidences[i] == pytest.approx(last[i].confidence, rel=1e-5)
            assert output.logprobs[i] == pytest.approx(math.log(last[i].confidence), rel=1e-4)
    assert edited > 10


def test_edits_behind_the_answer_are_not_told():
    hidden = 0
    for n in range(12):
        engine, prompt = small_engine(), prompt_of(n + 3)
        rules = dict(threshold=0.2, editing_threshold=0.2, max_post_steps=4, eos_ids=(1, 2, 3, 4), eos_early_stop=True)
        request = engine.add_request(prompt, DecodeParams(gen_length=6, **rules))
        events, output = list(engine.stream(request, drafts=True)), request.output
        end = len(prompt) + len(output.token_ids)
        assert all(edit.position < end for edit in output.edits)
        assert all(event.kind == "commit" or event.position < end for event in output.trace.events)
        assert [edit for event in events if event.kind == "commit" for edit in event.edits] == output.edits
        shown = [edit for event in events if event.kind == "draft" for edit in event.edits]
        assert all(edit.position < len(prompt) + 6 for edit in shown)
        hidden += output.counters.edits - len(output.edits)
    assert hidden > 0


def test_drafts_show_the_open_block():
    engine = small_engine()
    prompt, params = prompt_of(6), DecodeParams(gen_length=9, threshold=2.0, steps=4)
    events = list(engine.stream(engine.add_request(prompt, params)))
    drafts = [event for event in events if event.kind == "draft"]
    commits = alone(random_model(), prompt, params).trace[0].first_commits()
    assert len(drafts) == (1 + 3 + 3)  # every step but a block's last; the first block has two prompt tokens
    at = 0
    for event in events[:-1]:
        if event.kind == "commit":
            assert event.start == at
            at += len(event.token_ids)
            continue
        assert (event.start, len(event.token_ids)) == (at, {0: 2, 2: 4, 6: 3}[at])
        for i, token in enumerate(event.token_ids):
            done = event.steps[i] >= 0
            assert (token == MASK) == (not done) and (event.confidences[i] > 0) == done
            if done:
                own = commits[len(prompt) + event.start + i]
                assert (token, event.steps[i], event.confidences[i]) == (own.token, own.step, own.confidence)


def test_a_draft_nobody_read_gives_way_to_the_next():
    engine = small_engine()
    request = engine.add_request(prompt_of(5), DecodeParams(gen_length=30, threshold=2.0, steps=4, eos_ids=()))
    request.drafts = True
    seen = 0
    while engine.has_work:
        engine.step()
        seen += request.draft is not None
    assert seen > 10 and request.draft is None and len(request.log) == 1 + 8 + 1  # its begin, blocks, finish


def test_no_draft_comes_behind_the_finish():
    engine = small_engine()
    request = engine.add_request(prompt_of(5), DecodeParams(gen_length=30, threshold=2.0, steps=4, eos_ids=()))
    request.drafts = True
    engine.step()
    assert request.draft is not None
    engine.cancel(request.request_id)
    assert request.next_event().kind == "finish" and request.next_event() is None


def test_two_streams_at_once():
    engine = small_engine()
    requests = [engine.add_request(prompt, params) for prompt, params in JOBS[:2]]
    streams = [engine.stream(request) for request in requests]
    for _ in range(3):
        for stream in streams:
            next(stream)
    for stream, request, (prompt, params) in zip(streams, requests, JOBS, strict=False):
        assert list(stream)[-1].kind == "finish"
        assert_as_alone(request.output, random_model(), prompt, params)
    assert_empty(engine)


def test_more_requests_than_may_wait():
    engine = small_engine(max_num_seqs=2, max_waiting=1)
    outputs = engine.generate([prompt_of(n) for n in range(7)], PARAMS[0])
    for n, output in enumerate(outputs):
        assert_as_alone(output, random_model(), prompt_of(n), PARAMS[0])


# --- stops


@pytest.mark.parametrize("editing, kept", [(None, True), (None, False), (0.9, True)])
def test_stop_ids(editing, kept):
    """Tokens end with the stop; without editing as soon as no mask is left before it, with it when the block ends.
    Whether a trace is kept makes no difference."""
    prompt = prompt_of(6, seed=3)
    params = DecodeParams(gen_length=24, threshold=2.0, steps=4, editing_threshold=editing, eos_ids=())
    tokens, trace = tokens_alone(random_model(), prompt, params), alone(random_model(), prompt, params).trace[0]
    for stop in sorted(set(tokens)):
        end = tokens.index(stop) + 1
        engine = small_engine(trace=kept)
        output = engine.generate([prompt], params, stop_token_ids=[stop])[0]
        assert (output.token_ids, output.finish_reason) == (tokens[:end], "stop")
        resolved = max(event.step for event in trace.first_commits().values() if event.position < len(prompt) + end)
        if editing is None:
            assert output.counters.denoise_forwards == resolved + 1
        else:
            assert output.counters.denoise_forwards == sum(output.counters.forwards_per_block) > resolved + 1
        assert_empty(engine)


def test_eos_beats_a_later_stop_and_a_stop_a_later_eos():
    model, prompt = random_model(), prompt_of(6, seed=3)
    free = DecodeParams(gen_length=24, threshold=2.0, steps=4, eos_ids=())
    tokens = tokens_alone(model, prompt, free)
    first, second = tokens[2], next(t for t in tokens[3:] if t not in tokens[:3])
    for eos, stop, reason in ((first, second, "eos"), (second, first, "stop"), (first, first, "eos")):
        params = DecodeParams(gen_length=24, threshold=2.0, steps=4, eos_early_stop=True, eos_ids=(eos,))
        output = small_engine().generate([prompt], params, stop_token_ids=[stop])[0]
        assert (output.finish_reason, output.token_ids) == (reason, tokens[: tokens.index(first) + 1])


def test_without_early_stop_nothing_is_given_out_behind_an_eos():
    model, prompt = random_model(), prompt_of(6, seed=3)
    tokens = tokens_alone(model, prompt, DecodeParams(gen_length=24, threshold=2.0, steps=4, eos_ids=()))
    params = DecodeParams(gen_length=24, threshold=2.0, steps=4, eos_ids=(tokens[7],))
    engine = small_engine()
    request = engine.add_request(prompt, params, stop_token_ids=[next(t for t in tokens[8:] if t not in tokens[:8])])
    told = [token for event in engine.stream(request) if event.kind == "commit" for token in event.token_ids]
    assert told == tokens[: tokens.index(tokens[7]) + 1] and request.output.finish_reason == "length"
    assert_as_alone(request.output, model, prompt, params)


@pytest.mark.parametrize("editing", [None, 0.9])
def test_stop_strings(editing):
    model, prompt = demo_model(), chat("Spell 4071, 22, 608.")
    params = DecodeParams(gen_length=64, threshold=0.9, editing_threshold=editing, eos_early_stop=True)
    tokens = tokens_alone(model, prompt, params)
    text = tokenizer().decode(tokens, skip_special_tokens=True)
    for stop in ("seventy", "\n", "ty t", ("zzz", "is six"), text[-6:], "e", ("thousand", "nd s")):
        engine = Engine(model, EngineConfig(max_num_seqs=2, cache_tokens=512), tokenizer())
        request = engine.add_request(prompt, params, stop=stop)
        deltas = [event.text for event in engine.stream(request)]
        first = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        output = request.output
        assert (output.text, output.finish_reason) == (text[:first], "stop")
        assert "".join(deltas) == output.text
        used = len(output.token_ids)
        whole = [tokenizer().decode(tokens[:n], skip_special_tokens=True) for n in (used - 1, used)]
        assert tokens[:used] == output.token_ids and len(whole[0]) <= len(text[:first]) + 5 and first < len(whole[1])
        assert_empty(engine)


def test_a_card_s_own_cut_is_that_of_the_text_too():
    """Under hf-2.0 an EOS of the prompt cuts the answer of a row that has ended early."""
    eos = tokenizer().eos_token_id
    engine = Engine(demo_model(), EngineConfig(cache_tokens=512), tokenizer())
    params = DecodeParams(gen_length=64, threshold=0.9, profile="hf-2.0", eos_early_stop=True)
    output = engine.generate([[eos, *chat("Add 47 and 96.")]], params)[0]
    assert output.text == tokenizer().decode(output.token_ids, skip_special_tokens=True)
    assert len(output.token_ids) < output.counters.commits


def test_a_stop_that_never_comes_changes_nothing():
    prompt = chat("Add 47 and 96.")
    params = DecodeParams(gen_length=64, threshold=0.9, eos_early_stop=True)
    text = tokenizer().decode(tokens_alone(demo_model(), prompt, params), skip_special_tokens=True)
    engine = Engine(demo_model(), EngineConfig(cache_tokens=512), tokenizer())
    stop = ["15", "answer is 1439", text[-4:] + "!"]  # the last one's beginning is held back until the end
    request = engine.add_request(prompt, params, stop=stop, stop_token_ids=[5])
    events = list(engine.stream(request))
    assert "15" not in text and "".join(event.text for event in events) == request.output.text == text
    assert_as_alone(request.output, demo_model(), prompt, params)


# --- what is refused


@pytest.mark.parametrize(
    "prompt, params, options, message",
    [
        ([1, VOCAB], {}, {}, "outside 0..23"),
        ([[1], [2]], {}, {}, "^prompt_ids: "),
        (None, {}, {}, "^prompt_ids: .*NoneType"),
        (5, {}, {}, "^prompt_ids: .*int"),
        ("text", {}, {}, "^prompt_ids: .*str"),
        ({"input_ids": [1]}, {}, {}, "^prompt_ids: .*dict"),
        (torch.tensor(5), {}, {}, r"^prompt_ids: .*\[\]"),
        ([1], dict(pad_id=VOCAB), {}, f"pad_id={VOCAB}: expected an id in 0..23"),
        *[([1], {}, dict(priority=value), f"^priority={value!r}: expected a number that is finite")
          for value in ("x", True, float("nan"), float("inf"))],
        ([1], {}, dict(stop_token_ids="x"), "^stop_token_ids='x'"),
        ([1], {}, dict(stop_token_ids=[1, 1.5]), "^stop_token_ids=1.5"),
        ([1], {}, dict(stop=5), "^stop=5: expected strings"),
        ([1], {}, dict(stop=[5]), r"^stop=\[5\]: expected strings"),
        ([*[1] * 500, 1.5], {}, {}, "an integer token id expected at 500, got 1.5$"),
        ([1.5] * 505, {}, {}, "gen_length=8: 505 prompt tokens, but the model has 512 positions"),
        ([1], dict(gen_length=600), {}, "512 positions"),
        ([1], dict(gen_length=300), {}, "76 pages of 4 tokens are needed, the whole cache has 64"),
        ([1], dict(block_length=8), {}, "block_length=8: expected 4"),
        ([1], dict(mask_id=3), {}, "mask_id=3: expected 23"),
        ([1], dict(eos_ids=tuple(range(9))), {}, "max_eos_ids=8"),
        ([1], dict(gen_length=4, minimal_topk=5, profile="hf-2.0"), {}, "minimal_topk=5"),
        ([1], {}, dict(stop="x"), "stop strings need an Engine with a tokenizer"),
        ([1], {}, dict(stop=["x", ""]), "not empty"),
        ([1], {}, dict(request_id="taken"), "request_id='taken'"),
    ],
)  # fmt: skip
def test_what_can_never_be_done_is_refused(prompt, params, options, message):
    engine = small_engine()
    engine.add_request([1], PARAMS[0], request_id="taken")
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt, DecodeParams(**{"gen_length": 8} | params), **options)
    assert list(engine.requests) == ["taken"]
    engine.cancel("taken")
    assert_empty(engine)


NO_PARAMS = [None, {}, {"gen_length": 8}, (), [], 0, "", "speed", False, DecodeParams, EngineConfig()]


@pytest.mark.parametrize("params", NO_PARAMS, ids=repr)
def test_params_that_are_none_are_refused_by_name(params):
    engine = small_engine()
    taken = engine.add_request([1, 2], PARAMS[0])
    with pytest.raises(ValueError, match="^params=.*: expected DecodeParams"):
        engine.add_request([3, 4], params)
    with pytest.raises(ValueError, match="^params=.*: expected DecodeParams"):
        engine.generate([[3, 4], [5, 6]], params)
    with pytest.raises(ValueError, match="^params=.*: expected DecodeParams"):
        engine.generate([[3, 4], [5, 6]], [PARAMS[0], params])
    assert list(engine.requests.values()) == [taken]
    while engine.has_work:
        engine.step()
    assert_as_alone(taken.output, random_model(), [1, 2], PARAMS[0])
    assert_empty(engine)


def test_a_list_of_params_has_one_for_each_prompt():
    for params in (PARAMS[:1], PARAMS[:3]):
        with pytest.raises(ValueError, match="^params=.*: expected DecodeParams, or one for each of 2 prompts"):
            small_engine().generate([[3, 4], [5, 6]], params)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="graphs=True: expected a model on a GPU"):
        small_engine(graphs=True)


def test_prompts_are_lists_tensors_or_arrays():
    engine = small_engine()
    array = np.array([4, 5, 6], dtype=np.int32)
    prompts = [[4, 5, 6], (4, 5, 6), torch.tensor([4, 5, 6]), torch.tensor([[4, 5, 6]]), array, [*array],
               torch.tensor(array), [*torch.tensor(array)]]  # fmt: skip
    first, *others = engine.generate(prompts, PARAMS[0])
    assert all(output.token_ids == first.token_ids and output.prompt_length == 3 for output in others)


@pytest.mark.parametrize("prompts", [
    [4, 5, 6], (4, 5, 6), range(4, 7), np.array([4, 5, 6]), torch.tensor([4, 5, 6]), [*torch.tensor([4, 5, 6])],
    torch.tensor([[4, 5, 6]]), [range(4, 7)],
], ids=repr)  # fmt: skip
def test_one_prompt_may_be_given_as_it_is(prompts):
    (output,) = small_engine().generate(prompts, PARAMS[0])
    assert_as_alone(output, random_model(), [4, 5, 6], PARAMS[0])
    assert small_engine().generate([], PARAMS[0]) == []


@pytest.mark.parametrize("prompts", [
    None, 5, "text", ["text"], {"input_ids": [[4, 5]]}, BatchEncoding({"input_ids": [[4, 5]]}), torch.tensor(4),
    np.array(4), [[4], 5], [4, [5]], [None], [[4], {"input_ids": [5]}], torch.ones(3), torch.ones(1, 1, 3).long(),
], ids=repr)  # fmt: skip
def test_what_is_no_prompt_is_refused_by_name(prompts):
    engine = small_engine()
    with pytest.raises(ValueError, match="^prompts: "):
        engine.generate(prompts, PARAMS[0])
    assert_empty(engine)


def test_arguments_that_say_nothing_and_priorities_of_every_kind():
    engine = small_engine()
    for priority in (None, 0, -2, 0.5, np.int64(3), np.float32(1)):
        request = engine.add_request([4, 5], PARAMS[0], priority=priority, stop=None, stop_token_ids=None)
        assert request.priority == (priority or 0) and not request.has_stops
    assert engine.add_request([4, 5], PARAMS[0], stop_token_ids=np.array([7])).stop_ids == {7}
    assert engine.add_request([4, 5], PARAMS[0], stop_token_ids={7, 8}).stop_ids == {7, 8}


def test_prompts_of_a_call_with_one_seed_draw_as_rows_of_generate_do():
    params = DecodeParams(gen_length=8, temperature=1.5, seed=42, eos_ids=())
    prompts = [[1, 2]] * 4
    wanted = random_model().generate(prompts, gen_length=8, temperature=1.5, seed=42, eos_id=(), block_length=4)
    outputs = small_engine(max_num_seqs=2).generate(prompts, params)
    assert [output.token_ids for output in outputs] == wanted.tolist()
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    assert small_engine().generate(prompts[:1], params)[0].token_ids == outputs[0].token_ids
    as_they_are = small_engine().generate(prompts, [params] * 4)
    assert all(output.token_ids == outputs[0].token_ids for output in as_they_are)


def test_greedy_requests_leave_torch_s_generator_alone():
    before = torch.get_rng_state()
    small_engine().generate([[1, 2]] * 2, DecodeParams(gen_length=8))
    small_engine().generate([[1, 2]] * 2, DecodeParams(gen_length=8, temperature=1.0, sampling_method="greedy"))
    assert torch.equal(before, torch.get_rng_state())


def test_an_unseeded_request_draws_its_seed_from_torch():
    params = DecodeParams(gen_length=8, temperature=1.0)
    torch.manual_seed(3)
    first = small_engine().generate([[1, 2]] * 3, params)
    torch.manual_seed(3)
    assert [o.token_ids for o in small_engine().generate([[1, 2]] * 3, params)] == [o.token_ids for o in first]
    assert len({tuple(output.token_ids) for output in first}) > 1


def test_as_many_eos_ids_as_a_request_may_have():
    prompt, params = JOBS[4]
    assert len(params.eos_ids) == 3
    assert_as_alone(small_engine(max_eos_ids=3).generate([prompt], params)[0], random_model(), prompt, params)


def test_presets_are_the_model_card_s():
    quality, speed = DecodeParams.preset("quality"), DecodeParams.preset("speed", gen_length=9, max_post_steps=2)
    assert (quality.threshold, quality.editing_threshold, quality.max_post_steps) == (0.7, 0.5, 16)
    assert (speed.threshold, speed.editing_threshold, speed.max_post_steps, speed.gen_length) == (0.5, 0.0, 2, 9)
    with pytest.raises(ValueError, match="preset='fast': expected one of quality, speed"):
        DecodeParams.preset("fast")
