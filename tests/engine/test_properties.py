"""The property that sells it: whatever else runs, whenever it arrives, a request gets the tokens it would get alone."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llada2_fast.config import DecodeParams
from llada2_fast.engine import QueueFull
from tests.engine.common import (
    PARAMS,
    UNDERTRAINED,
    alone,
    assert_as_alone,
    assert_empty,
    chat,
    demo_model,
    prompt_of,
    random_model,
    small_engine,
    tokens_alone,
)

QUICK = (Phase.explicit, Phase.generate)


def allowed(edit_window, policy, entropy_bound, entropy_decay, **fields):
    """DecodeParams without what contradicts the rest."""
    edits = fields["editing_threshold"] is not None
    if policy == "self_speculative" and (edits or fields["temperature"]):
        policy = "entropy"
    if policy != "threshold":
        fields |= {"policy": policy, "entropy_bound": entropy_bound, "entropy_decay": entropy_decay}
    return DecodeParams(**fields, edit_window=edit_window if edits else 0)


params_of = st.builds(
    allowed,
    gen_length=st.sampled_from([13, 4, 20, 9, 1]),
    steps=st.sampled_from([4, 2, 8, 1]),
    threshold=st.sampled_from([0.4, 0.25, 0.7, 2.0, 0.0]),
    editing_threshold=st.sampled_from([None, 0.3, None, 0.0]),
    edit_window=st.sampled_from([0, 1, 2, 5]),
    max_post_steps=st.sampled_from([2, 0, 3]),
    minimal_topk=st.sampled_from([1, 2]),
    temperature=st.sampled_from([0.0, 0.0, 0.8, 1.5]),
    top_k=st.sampled_from([None, 4]),
    top_p=st.sampled_from([None, 0.8]),
    seed=st.integers(-(2**63), 2**63 - 1),
    eos_early_stop=st.booleans(),
    eos_ids=st.sampled_from([None, (), (1, 5, 9, 13)]),
    attend_tail=st.sampled_from([True, True, False]),
    policy=st.sampled_from(["self_speculative", "threshold", "entropy", "threshold"]),
    entropy_bound=st.sampled_from([0.3, 0.0, 2.0, 6.0]),
    entropy_decay=st.sampled_from([1.0, 0.6]),
)
# Prompts begin alike, so that they share pages; some are another one's first turn and answer.
prompts_of = st.builds(
    lambda shared, own, seed: prompt_of(40)[:shared] + prompt_of(own, seed + 1),
    st.sampled_from([0, 4, 12, 18, 40]), st.integers(0, 9), st.integers(0, 3),
)  # fmt: skip
jobs_of = st.tuples(prompts_of, params_of, st.integers(0, 2), st.integers(0, 12), st.none() | st.integers(0, 15))
engines_of = st.fixed_dictionaries(
    dict(
        max_num_seqs=st.integers(1, 5),
        cache_tokens=st.sampled_from([120, 200, 400]),
        max_num_batched_tokens=st.sampled_from([4, 16, 64]),
        enable_prefix_caching=st.sampled_from([True, True, False]),
    )
)


def play(engine, jobs):
    """Run jobs (prompt, params, priority, step of arrival, steps until it is cancelled or None); returns requests."""
    requests, at = [None] * len(jobs), 0
    while engine.has_work or None in requests:
        for i, (prompt, params, priority, arrives, _) in enumerate(jobs):
            if arrives == at:
                requests[i] = engine.add_request(prompt, params, priority=priority)
        for request, (*_, arrives, patience) in zip(requests, jobs, strict=True):
            if request is not None and patience is not None and at == arrives + patience:
                engine.cancel(request.request_id)
        engine.step()
        engine.check_integrity()
        at += 1
    return requests


def assert_ended_early(model, request, prompt, params):
    """It has what it was given; what was revisable when it ended comes at the end as it was."""
    given, output = [entry.event for entry in request.log if entry.event is not None], request.output
    count = len(output.token_ids)
    if params.edit_window:
        count -= sum(len(event.token_ids) for event in given[-2:])
    assert tokens_alone(model, prompt, params)[:count] == output.token_ids[:count]
    assert [token for event in given for token in event.token_ids] == output.token_ids


def assert_all_as_alone(model, requests, jobs):
    for request, (prompt, params, *_) in zip(requests, jobs, strict=True):
        if request.output.finish_reason == "cancelled":
            assert_ended_early(model, request, prompt, params)
            if params.edit_window:
                continue
            events = alone(model, prompt, params).trace[0].events
            if request.output.trace is not None:
                assert events[: len(request.output.trace.events)] == request.output.trace.events
        else:
            assert_as_alone(request.output, model, prompt, params)


@settings(max_examples=40, phases=QUICK)
@given(st.integers(0, 2), st.integers(1, 3), engines_of, st.lists(jobs_of, min_size=2, max_size=7))
def test_any_mix_gives_every_request_its_own_tokens(seed, layers, config, jobs):
    model = random_model(seed, layers)
    engine = small_engine(model=model, **config)
    assert_all_as_alone(model, play(engine, jobs), jobs)
    assert_empty(engine)


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=25, phases=QUICK)
@given(st.integers(0, 2), engines_of, st.lists(jobs_of, min_size=2, max_size=7))
def test_any_mix_on_step_graphs(overlap, seed, config, jobs):
    """Also where the host learns a step late what it did, while requests come, go, share pages and are preempted."""
    model = random_model(seed)
    engine = small_engine(model=model, trace=True, graphs=True, capture=False, overlap=overlap, **config)
    requests = play(engine, jobs)
    for request, (prompt, params, *_) in zip(requests, jobs, strict=True):
        if request.output.finish_reason == "cancelled":
            assert_ended_early(model, request, prompt, params)
        else:
            assert_as_alone(request.output, model, prompt, params)
    assert_empty(engine)


CHATS = [
    chat(text)
    for text in (
        "Add 47 and 96.",
        "Spell 4071, 22.",
        "Reverse moon crow bread lamp.",
        "Tell a story about Max the goat.",
    )
]


@settings(max_examples=8, phases=QUICK)
@given(
    engines_of,
    st.lists(st.tuples(st.sampled_from(CHATS), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=6),
)  # fmt: skip
def test_any_mix_on_the_embedded_model(config, picks):
    kinds = [
        DecodeParams.preset("quality", gen_length=48, eos_early_stop=True),
        DecodeParams.preset("speed", gen_length=48, eos_early_stop=True),
        DecodeParams(gen_length=48, threshold=0.9, eos_early_stop=True),
        DecodeParams(gen_length=48, temperature=1.0, top_p=0.95, seed=11, threshold=0.6, eos_early_stop=True),
        DecodeParams(gen_length=48, policy="entropy", entropy_bound=1.0, editing_threshold=0.5, eos_early_stop=True),
        DecodeParams(gen_length=48, policy="self_speculative", eos_early_stop=True),
    ]
    model = demo_model(UNDERTRAINED)
    jobs = [(prompt, kinds[kind], 0, arrives, None) for prompt, kind, arrives in picks]
    engine = small_engine(model=model, **config | {"cache_tokens": 600})
    assert_all_as_alone(model, play(engine, jobs), jobs)
    assert_empty(engine)


# --- SGLang's determinism modes


@pytest.mark.parametrize("params", [PARAMS[1], PARAMS[3]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["alone", "random batch", "cached prefix"])
def test_fifty_trials_give_one_output(mode, params):
    prompt, engine, seen = prompt_of(21), small_engine(cache_tokens=400, max_num_seqs=6), set()
    for trial in range(50):
        jobs = [(prompt, params)]
        if mode == "alone":
            engine.cache.clear()
        elif mode == "random batch":
            engine.cache.clear()
            others = [(prompt_of(3 * n + trial % 7, n + trial), PARAMS[(n + trial) % 8]) for n in range(trial % 6)]
            jobs = others[: trial % 4] + jobs + others[trial % 4 :]
        at = jobs.index((prompt, params))
        output = engine.generate([prompt for prompt, _ in jobs], [own for _, own in jobs])[at]
        seen.add((tuple(output.token_ids), tuple(output.confidences), tuple(output.steps), output.trace))
        assert (output.shared_tokens > 0) == (mode == "cached prefix" and trial > 0)
    assert len(seen) == 1
    assert_empty(engine)


# --- any sequence of operations


class Operations(RuleBasedStateMachine):
    """Adding, stepping, cancelling, reading and forgetting in any order; nothing leaks, and who finishes is right."""

    TINY = [params for params in PARAMS if params.profile == "default"]

    @initialize(config=engines_of)
    def start(self, config):
        self.engine = small_engine(model=random_model(0, 1), max_waiting=4, **config | {"cache_tokens": 120})
        self.requests = []

    @rule(shared=st.sampled_from([0, 8, 20]), own=st.integers(0, 6), kind=st.integers(0, 7), priority=st.integers(0, 2))
    def add(self, shared, own, kind, priority):
        full = len(self.engine.scheduler.waiting) >= 4
        try:
            prompt = prompt_of(20)[:shared] + prompt_of(own, own)
            self.requests.append(self.engine.add_request(prompt, self.TINY[kind], priority=priority))
            assert not full
        except QueueFull:
            assert full

    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(self.requests))
        assert self.engine.cancel(request.request_id) == (request.status != "finished") or request.output is not None

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def look(self, data):
        data.draw(st.sampled_from(self.requests)).drafts = True

    @rule()
    def forget(self):
        self.engine.cache.clear()

    @invariant()
    def everything_is_where_it_belongs(self):
        self.engine.check_integrity()
        for request in [request for request in self.requests if request.output is not None]:
            self.requests.remove(request)
            if request.output.finish_reason != "cancelled":
                assert_as_alone(request.output, random_model(0, 1), request.prompt, request.params)

    def teardown(self):
        if hasattr(self, "engine"):
            while self.engine.has_work:
                self.engine.step()
                self.everything_is_where_it_belongs()
            assert_empty(self.engine)


class LongOperations(Operations):
    pass


Operations.TestCase.settings = settings(max_examples=15, stateful_step_count=40, phases=QUICK)
LongOperations.TestCase.settings = settings(max_examples=1000, stateful_step_count=100, phases=QUICK)
test_any_sequence_of_operations = Operations.TestCase
test_100_000_operations = pytest.mark.timeout(3600)(pytest.mark.slow(LongOperations.TestCase))
