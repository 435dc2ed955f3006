"""What goes wrong hits the request it belongs to, by name; others finish with unchanged tokens, the pages come back."""

import asyncio
import contextlib
import math
import signal

import numpy as np
import pytest
import torch

from llada2_fast import AsyncEngine
from llada2_fast.config import DecodeParams
from llada2_fast.model import LLaDA2Model
from tests.engine.common import (
    MASK,
    PARAMS,
    VOCAB,
    assert_as_alone,
    assert_empty,
    prompt_of,
    random_model,
    small_engine,
    tokens_alone,
)

POISON = 20  # a token whose embedding is NaN in the poisoned model
SLOW = DecodeParams(gen_length=16, threshold=2.0, steps=4, eos_ids=())


def copy_of_model():
    model = LLaDA2Model(random_model().config)
    model.load_state_dict(random_model().state_dict())
    return model


def poisoned_model():
    model = copy_of_model()
    model.word_embeddings.weight[POISON] = float("nan")
    model.lm_head.weight[POISON] = model.lm_head.weight[POISON - 1]  # of equal logits the lower id is taken
    return model


def clean(prompt):
    return [token if token != POISON else 0 for token in prompt]


class Failing(LLaDA2Model):
    """Raises `error` in forward number `at`."""

    at, error, forwards = None, None, 0

    def forward_blocks(self, *args):
        self.forwards += 1
        if self.forwards == self.at:
            raise self.error
        return super().forward_blocks(*args)


def failing_model(at, error):
    model = Failing(random_model().config)
    model.load_state_dict(random_model().state_dict())
    model.at, model.error = at, error
    return model


@pytest.mark.parametrize("size", [3, 9, 30])
def test_nan_in_one_row_fails_that_request_alone(size):
    """In the open block, in a carried one, in prefill. Nobody finds the poisoned pages afterwards."""
    model = poisoned_model()
    engine = small_engine(model=model, max_num_batched_tokens=8)
    jobs = [(clean(prompt_of(n, n)), params) for n, params in zip((5, 12, 7), (PARAMS[1], *PARAMS[4:6]), strict=True)]
    good = [engine.add_request(*job) for job in jobs[:2]]
    bad = engine.add_request([*clean(prompt_of(size)), POISON, 1], PARAMS[0], request_id="bad")
    good.append(engine.add_request(*jobs[2]))
    events = list(engine.stream(bad))
    assert bad.output.finish_reason == "error" and events[-1].output is bad.output and not bad.output.token_ids
    assert bad.output.error == "request bad: logits hold NaN or infinity at step 0 of block " + str((size + 2) // 4)
    while engine.has_work:
        engine.step()
    for request, (prompt, params) in zip(good, jobs, strict=True):
        assert_as_alone(request.output, model, prompt, params)
    assert_empty(engine)
    assert engine.cache.match_prefix(bad.block_hashes) == ()
    again = engine.generate([bad.prompt, *(prompt for prompt, _ in jobs)], [PARAMS[0], *(p for _, p in jobs)])
    assert [output.finish_reason == "error" for output in again] == [True, False, False, False]
    for output, (prompt, params) in zip(again[1:], jobs, strict=True):
        assert_as_alone(output, model, prompt, params)


ERRORS = [
    AssertionError("x"),
    IndexError("x"),
    KeyError("x"),
    MemoryError("x"),
    OSError("x"),
    TypeError("x"),
    ZeroDivisionError("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_a_forward_raises_its_requests_end_with_it(error):
    engine = small_engine(model=failing_model(1, error))
    outputs = [engine.generate([prompt_of(5)], SLOW)[0] for _ in range(2)]
    assert outputs[0].error.endswith(f": {type(error).__name__}: {error}")
    assert_as_alone(outputs[1], random_model(), prompt_of(5), SLOW)


def test_a_failed_step_is_logged_with_its_traceback(caplog):
    engine = small_engine(model=failing_model(2, RuntimeError("boom")))
    request = engine.add_request(prompt_of(5), SLOW)
    while engine.has_work:
        engine.step()
    assert request.output.finish_reason == "error"
    (record,) = [record for record in caplog.records if record.name.startswith("llada2_fast")]
    assert record.levelname == "ERROR" and "1 requests end" in record.getMessage()
    assert record.exc_info[1].args == ("boom",) and record.exc_info[2] is not None


@pytest.mark.parametrize("error", [RuntimeError("boom"), torch.OutOfMemoryError("no memory"), ValueError("x")])
@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_an_exception_in_a_forward_fails_the_requests_of_that_step(at, error):
    engine = small_engine(model=failing_model(at, error), max_num_seqs=2)
    requests = [engine.add_request(prompt_of(n, n), SLOW) for n in (5, 9, 4, 6)]
    outputs = {}
    while engine.has_work:
        for event in engine.step():
            if event.output is not None:
                outputs[event.request_id] = event.output
        engine.check_integrity()
    hit = requests[:2]
    for request in requests:
        assert request.output is outputs[request.request_id]
        if request in hit:
            assert request.output.finish_reason == "error"
            assert request.output.error == f"request {request.request_id}: {type(error).__name__}: {error}"
            expected = tokens_alone(random_model(), request.prompt, SLOW)
            assert expected[: len(request.output.token_ids)] == request.output.token_ids
        else:
            assert_as_alone(request.output, random_model(), request.prompt, SLOW)
    assert engine.finished == {"error": 2, "length": 2}
    assert_empty(engine)


def test_an_exception_in_prefill_fails_who_was_prefilled():
    engine = small_engine(model=failing_model(2, RuntimeError("boom")), max_num_batched_tokens=8)
    long = engine.add_request(prompt_of(40), SLOW)
    while long.output is None:
        engine.step()
    assert long.output.error == "request request-1: RuntimeError: boom"
    assert_as_alone(engine.generate([prompt_of(40)], SLOW)[0], random_model(), prompt_of(40), SLOW)
    assert_empty(engine)


def test_no_room_is_refused_at_once_and_leaves_nothing():
    engine = small_engine(cache_tokens=40)
    with pytest.raises(ValueError, match="11 pages of 4 tokens are needed, the whole cache has 10"):
        engine.add_request(prompt_of(30), DecodeParams(gen_length=11))
    assert_empty(engine)
    assert engine.generate([prompt_of(30)], DecodeParams(gen_length=10, threshold=0.0))[0].error is None


@pytest.mark.parametrize("read", [0, 1, 4])
def test_closing_a_stream_cancels_its_request(read):
    engine = small_engine()
    other = engine.add_request(prompt_of(6), PARAMS[1])
    request = engine.add_request(prompt_of(5), SLOW)
    stream = engine.stream(request)
    next(stream)
    for _ in range(read):
        next(stream)
    stream.close()
    assert request.output.finish_reason == "cancelled" and request.status == "finished"
    engine.check_integrity()
    while engine.has_work:
        engine.step()
    assert_as_alone(other.output, random_model(), prompt_of(6), PARAMS[1])
    assert_empty(engine)


@pytest.mark.parametrize("steps", range(12))
def test_cancelling_at_any_step_frees_pages_at_once(steps):
    engine = small_engine(max_num_batched_tokens=8)
    request = engine.add_request(prompt_of(18), SLOW, request_id="x")
    for _ in range(steps):
        engine.step()
    assert engine.cancel("x") and not engine.cancel("x")
    assert_empty(engine)
    output = request.output
    assert output.finish_reason == "cancelled" and output.error is None
    assert tokens_alone(random_model(), prompt_of(18), SLOW)[: len(output.token_ids)] == output.token_ids
    assert request.log[-1].event.output is output


def test_generate_that_fails_half_way_cancels_what_it_added():
    engine = small_engine()
    with pytest.raises(ValueError, match="outside"):
        engine.generate([[1, 2], [VOCAB]], SLOW)
    assert_empty(engine)


def test_a_model_that_always_predicts_the_mask_ends():
    model = copy_of_model()
    model.lm_head.weight[MASK] = 50 * model.lm_head.weight[:MASK].abs().amax(0)
    engine = small_engine(model=model)
    jobs = [(prompt_of(n), params) for n, params in zip((5, 9, 4), PARAMS[:3], strict=True)]
    outputs = engine.generate([prompt for prompt, _ in jobs], [params for _, params in jobs])
    for output, (prompt, params) in zip(outputs, jobs, strict=True):
        assert MASK not in output.token_ids
        assert_as_alone(output, model, prompt, params)
    assert_empty(engine)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, AssertionError])
def test_what_a_call_raises_is_its_callers_alone(error):
    def fail(engine):
        raise error("mine")

    async def main():
        async with AsyncEngine(small_engine()) as engine:
            bystander = asyncio.create_task(engine.generate(prompt_of(5), PARAMS[0]))
            with pytest.raises(error, match="mine"):
                await asyncio.wait_for(engine.call(fail), 30)
            return await bystander, await engine.generate(prompt_of(5), PARAMS[0])

    for output in asyncio.run(main()):
        assert output.token_ids == tokens_alone(random_model(), prompt_of(5), PARAMS[0])


@pytest.mark.parametrize("ids", [["x"], [math.nan], 1.5, [[1]], [torch.tensor(3)], [True]], ids=repr)
def test_stop_ids_that_are_none_are_refused(ids):
    with pytest.raises(ValueError, match="stop_token_ids"):
        small_engine().add_request(prompt_of(5), PARAMS[0], stop_token_ids=ids)


def test_stop_ids_in_any_form():
    engine = small_engine()
    plain = engine.generate([prompt_of(5)], PARAMS[0])[0].token_ids
    stop = plain[len(plain) // 2]
    outputs = []
    for ids in ([stop], {stop}, torch.tensor([stop]), np.array([stop], dtype=np.int32), stop):
        request = engine.add_request(prompt_of(5), PARAMS[0], stop_token_ids=ids)
        while engine.has_work:
            engine.step()
        outputs.append((request.output.token_ids, request.output.finish_reason))
    assert outputs == [(plain[: plain.index(stop) + 1], "stop")] * 5


class Watchdog:
    """Puts the old handler back before it raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        signal.signal(signal.SIGUSR1, self.before)
        raise self.error

    def __enter__(self):
        self.before = signal.signal(signal.SIGUSR1, self)

    def __exit__(self, *_):
        signal.signal(signal.SIGUSR1, self.before)


class Inherited(Watchdog):
    pass


class Signalling(LLaDA2Model):
    forwards = 0

    def forward_blocks(self, *args):
        self.forwards += 1
        if self.forwards == 3:
            signal.raise_signal(signal.SIGUSR1)
        return super().forward_blocks(*args)


@pytest.mark.parametrize("kind", [Watchdog, Inherited])
@pytest.mark.parametrize("error", [TimeoutError, RuntimeError, KeyError])
def test_what_a_signal_handler_raises_is_the_caller_s(kind, error):
    model = Signalling(random_model().config)
    model.load_state_dict(random_model().state_dict())
    engine = small_engine(model=model)
    request = engine.add_request(prompt_of(5), SLOW)
    with kind(error("watchdog")), pytest.raises(error, match="watchdog"):
        while engine.has_work:
            engine.step()
    while engine.has_work:
        engine.step()
    assert_as_alone(request.output, random_model(), prompt_of(5), SLOW)
    assert_empty(engine)


class Late:
    """A tokenizer that is not there in time."""

    def decode(self, ids, skip_special_tokens=True):
        raise TimeoutError("the tokenizer's")


def test_a_tokenizer_s_own_timeout_is_its_request_s():
    engine = small_engine(tokenizer=Late())
    output = engine.generate([prompt_of(5)], SLOW)[0]
    assert output.error == "request request-1: TimeoutError: the tokenizer's"
    assert_empty(engine)


def test_every_event_is_told_once_by_step_though_steps_are_cut_short():
    """Also the "finish" of a request that is cancelled."""
    for at in range(1, 12):
        engine = small_engine(model=failing_model(at, KeyboardInterrupt()))
        requests = [engine.add_request(prompt_of(n), SLOW) for n in (5, 6, 7)]
        events = []
        while engine.has_work:
            with contextlib.suppress(KeyboardInterrupt):
                events += engine.step()
            if len(events) > 4 and requests[2].output is None:
                engine.cancel(requests[2].request_id)
        events += engine.step()
        for request in requests:
            own = [event for event in events if event.request_id == request.request_id and event.kind != "draft"]
            assert [token for event in own for token in event.token_ids] == request.output.token_ids
            assert [event.output for event in own][-1] is request.output


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stream_that_was_never_read_cancels_its_request_too(how):
    engine = small_engine()
    request = engine.add_request(prompt_of(5), SLOW)
    stream = engine.stream(request)
    stream.close() if how == "close" else None
    del stream
    assert request.output.finish_reason == "cancelled"
    assert_empty(engine)
