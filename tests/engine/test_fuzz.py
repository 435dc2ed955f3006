"""Values of every type and size in every field of every public call: refused by name, or right; nobody else is hurt."""

import asyncio
import itertools
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_fast.config import DecodeParams, RequestOptions
from llada2_fast.engine import AsyncEngine, Engine, QueueFull
from llada2_fast.engine.worker import StopIterationRaised
from tests.engine.common import PARAMS, assert_as_alone, assert_empty, prompt_of, random_model, small_engine, tokenizer
from tests.engine.test_cuts import Injected
from tests.thinned import thinned

PROMPT = prompt_of(6)
SLOW = pytest.mark.slow


class Mine(Exception):
    """What a value of the caller's raises by itself."""

    def __str__(self):
        raise Mine


def raising(base, *names, error=Mine):
    """A class, a kind of `base`, whose methods of these names raise."""

    def fail(self, *args, **kwargs):
        raise error

    return type("Raising", (base,), dict.fromkeys(names, fail))


class Row(Sequence):
    """A list that is none."""

    def __init__(self, *ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        return self.ids[at]


RAISING = [
    raising(object, "__str__", "__repr__")(),
    raising(object, "__len__", "__getitem__", "__iter__", "__contains__")(),
    raising(object, "tolist", "item", "__array__", "__float__", "__int__", "__index__", "__bool__")(),
    raising(object, "__eq__", "__hash__", "__lt__", "__call__")(),
    raising(str, "__len__", "__repr__", "__str__")("x"),
    raising(list, "__len__", "__iter__", "__getitem__")([1, 2]),
    raising(Row, "__getitem__")(1, 2),
    raising(int, "__int__", "__index__", "__le__", "__repr__")(3),
    raising(float, "__float__", "__repr__")(0.5),
    raising(dict, "items", "keys", "__iter__", "__getitem__")(a=1),
]
PLAIN = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, -(10**400),
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-45, 5e-324, 1e39, -1e39, 1e308, math.nan, math.inf, -math.inf, 1j, Fraction(1, 3),
    "", "x", "\ud800", "a\udc80b", "\0", "1", "request-1", "greedy", "auto", "hf-2.1", "finish", "restart", "x" *
    10**6, b"", b"12", bytearray(b"1"), (), [], {}, set(), [1, 2], (1, 2), {1, 2}, {"a": 1}, {"gen_length": 3}, [[1,
    2], [3]], [[]], [None], ["x"], ["x"] * 17, [""], ["\ud800"], [b"x"], [1.0], [True], [math.nan], [10**30], [{}],
    [[[1]]], list(range(2000)), range(3), range(10**9), iter([1, 2]), (x for x in ()), object(), object, len, print,
    lambda *a: None, ..., NotImplemented, Mine(), KeyboardInterrupt, np.int8(3), np.int64(3), np.uint64(2**64 - 1),
    np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("x"), np.bytes_(b"x"), np.array([1, 2]),
    np.array([[1, 2]]), np.array(3), np.array([]), np.array([1.5]), np.array(["a"]), np.array([object()]),
    np.array([1, 2], dtype=np.uint16), np.ma.masked_array([1, 2], [0, 1]), np.datetime64("2020-01-01"),
    torch.tensor(3), torch.tensor([1, 2]), torch.tensor([[1, 2]]), torch.tensor([]), torch.tensor([1.5]),
    torch.tensor([True]), torch.tensor([1, 2], dtype=torch.int8), torch.tensor([1], dtype=torch.complex64),
    torch.tensor([1.0], dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64, device="meta"), torch.tensor([1,
    2]).to_sparse(), torch.tensor(math.nan), torch.tensor([1.0], requires_grad=True), torch.float32,
    torch.device("cpu"), Row(1, 2), Row(), DecodeParams(gen_length=4), PARAMS[0], [PARAMS[0]], RequestOptions(),
]  # fmt: skip
HOSTILE = PLAIN + RAISING
WHOLE = pytest.mark.parametrize("whole", [pytest.param(False, id="some"), pytest.param(True, id="all", marks=SLOW)])


def hostile(name, whole):
    """All values for a field; or all that raise and every other one, for some fields the even, for some the odd."""
    return HOSTILE if whole else PLAIN[sum(name.encode()) % 2 :: 2] + RAISING


class Pick(NamedTuple):
    """HOSTILE[at]: hypothesis cannot carry what raises."""

    at: int


PICKS = st.integers(0, len(HOSTILE) - 1).map(Pick)
NESTED = st.one_of(
    st.lists(PICKS, max_size=3),
    st.lists(st.lists(PICKS, max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=2), PICKS, max_size=2),
    st.text(max_size=6),
    st.integers(),
    st.floats(),
    st.binary(max_size=4),
)


def picked(value):
    """What a value of NESTED stands for."""
    if isinstance(value, Pick):
        return HOSTILE[value.at]
    if isinstance(value, dict):
        return {key: picked(part) for key, part in value.items()}
    return [picked(part) for part in value] if isinstance(value, list) else value


NAMES = {"prompt_ids": "prompt", "prompts": "prompt"}  # what a refusal calls them
OPTIONS = [field.name for field in fields(RequestOptions)]
DECODING = [field.name for field in fields(DecodeParams)]


def shown(value):
    try:
        return f"{type(value).__name__} {value!r:.60}"
    except BaseException:
        return f"{type(value).__name__} that cannot be shown"


def holds_raising(value, depth=3):
    """It raises by itself somewhere."""
    if any(value is one for one in RAISING) or isinstance(value, Mine):
        return True
    parts = list(value.values()) if type(value) is dict else value if type(value) in (list, tuple) else ()
    return depth > 0 and any(holds_raising(part, depth - 1) for part in parts)


def assert_refused(error, name, value):
    """By an error of who called, which says what was wrong."""
    if isinstance(error, Mine) and holds_raising(value):
        return
    assert isinstance(error, (ValueError, TypeError, QueueFull)), type(error)
    assert NAMES.get(name, name) in str(error), f"{type(error).__name__}: {error}"


class Each:
    """`with each(value):` for one value after the other; done() is an AssertionError with all for which it failed."""

    def __init__(self):
        self.wrong = []

    @contextmanager
    def __call__(self, value):
        try:
            yield
        except AssertionError as error:
            self.wrong.append(f"{shown(value)}: {error}"[:400])

    def done(self):
        assert not self.wrong, f"{len(self.wrong)} values:\n" + "\n".join(self.wrong)


class Beside:
    """An engine with a bystander, whose tokens are looked at when it ends, and then there is the next one."""

    def __init__(self, **config):
        self.engine = small_engine(tokenizer=tokenizer(), **config)
        self.kinds, self.request = itertools.cycle(PARAMS), None
        self.turn()

    def turn(self):
        """One step, and a bystander is there."""
        if self.request is None or self.request.output is not None:
            self.check()
            self.request = self.engine.add_request(prompt_of(5, 9), next(self.kinds), request_id="bystander")
        self.engine.step()

    def check(self):
        if self.request is not None and self.request.output is not None:
            assert_as_alone(self.request.output, self.engine.model, self.request.prompt, self.request.params)

    def end(self, requests=()):
        """Step until nothing is left, and see that it all ended."""
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.engine.step()
        assert_empty(self.engine)
        self.check()
        for request in requests:
            assert request.output.error is None, request.output.error


def assert_right(request):
    """It ends as it does in an engine of its own."""
    alone = small_engine(tokenizer=tokenizer())
    one = alone.submit(request.prompt, request.params, request.options)
    while one.output is None:
        alone.step()
    assert one.output.error is None
    if request.params.seed is None and request.params.draws or request.options.deadline_s is not None:
        return
    for name in ("token_ids", "text", "finish_reason", "confidences", "trace"):
        assert getattr(request.output, name) == getattr(one.output, name), name


def asks_for_many(n):
    """So many answers as nobody can wait for."""
    return isinstance(n, int) and n > 100


def add(engine, name, value):
    """add_request with one field of it, or of its params, as given."""
    if name == "prompt_ids":
        return engine.add_request(value, PARAMS[0])
    if name == "params":
        return engine.add_request(PROMPT, value)
    if name in DECODING:
        return engine.add_request(PROMPT, DecodeParams(**{"gen_length": 6, "threshold": 0.3, name: value}))
    return engine.add_request(PROMPT, PARAMS[0], **{name: value})


def tried(beside, name, value):
    beside.turn()
    waiting = len(beside.engine.requests)
    try:
        request = add(beside.engine, name, value)
    except BaseException as error:
        assert_refused(error, name, value)
        assert len(beside.engine.requests) == waiting and not beside.engine._cut
    else:
        while request.output is None:
            beside.turn()
        assert request.output.error is None, (name, shown(value), request.output.error)
        assert_right(request)
    beside.engine.check_integrity()


@WHOLE
@pytest.mark.parametrize("name", ["prompt_ids", "params", *OPTIONS, *DECODING])
def test_every_field_of_add_request(name, whole):
    beside, each = Beside(), Each()
    for value in hostile(name, whole):
        with each(value):
            tried(beside, name, value)
    each.done()
    beside.end()


def check_within(name, value):
    beside, each = Beside(), Each()
    with each(picked(value)):
        tried(beside, name, picked(value))
    each.done()
    beside.end()


WITHIN = st.sampled_from(["prompt_ids", "params", *OPTIONS, *DECODING]), NESTED
test_values_within_values = settings(max_examples=50)(given(*WITHIN)(check_within))
test_many_values_within_values = SLOW(settings(max_examples=1000)(given(*WITHIN)(check_within)))


@WHOLE
@pytest.mark.parametrize("name", ["prompts", "params", "n", "stop", "stop_token_ids", *OPTIONS])
def test_every_field_of_generate(name, whole):
    beside, each = Beside(), Each()
    for value in hostile(name, whole):
        beside.turn()
        arguments = {"prompts": [PROMPT, PROMPT[:3]], "params": PARAMS[0]} | {name: value}
        if (name == "n" and asks_for_many(value)) or (name == "prompts" and type(value) is range):
            continue
        with each(value):
            try:
                outputs = beside.engine.generate(**arguments)
            except BaseException as error:
                assert_refused(error, name, value)
            else:
                assert all(output.error is None for output in outputs)
            beside.engine.check_integrity()
            assert set(beside.engine.requests) <= {"bystander"}
    each.done()
    beside.end()


@pytest.mark.parametrize(
    ("call", "name"),
    [(Engine.cancel, "request_id"), (Engine.stream, "request"), (Engine.weights_changed, "running"),
     (Engine.update_weights, "weights")],
    ids=lambda one: getattr(one, "__name__", one),
)  # fmt: skip
def test_every_other_call(call, name):
    beside, each = Beside(), Each()
    for value in HOSTILE:
        if isinstance(value, str) and call is Engine.update_weights:
            continue  # it may name something on the hub
        if call is Engine.weights_changed and isinstance(value, str) and value == "restart":
            continue  # the bystander has been told tokens, so that it would end
        beside.turn()
        with each(value):
            try:
                call(beside.engine, value)
            except BaseException as error:
                assert_refused(error, name, value)
            beside.engine.check_integrity()
            assert not beside.engine.paused
    each.done()
    beside.end()


def weights_of(name, value):
    return {name: value, "lm_head.weight": random_model().lm_head.weight}


def test_every_weight_that_is_none():
    beside = Beside()
    before = {name: weight.clone() for name, weight in beside.engine.model.named_parameters()}
    for value in HOSTILE:
        for weights in (weights_of("word_embeddings.weight", value), {"lm_head.weight": value}):
            with pytest.raises((ValueError, TypeError, Mine)):
                beside.engine.update_weights(weights)
        beside.turn()
    for name in ["", "x", "\ud800", 1, None, (), b"lm_head.weight"]:
        with pytest.raises(ValueError, match="weights"):
            beside.engine.update_weights(weights_of(name, torch.zeros(1)))
    beside.end()
    assert all(torch.equal(before[name], weight) for name, weight in beside.engine.model.named_parameters())


def test_unknown_fields_are_refused():
    beside = Beside()
    for call in (
        beside.engine.add_request,
        lambda *args, **kwargs: beside.engine.generate([args[0]], *args[1:], **kwargs),
    ):
        with pytest.raises(TypeError, match="best_of"):
            call(PROMPT, PARAMS[0], best_of=2)
    beside.end()


# the asynchronous face


def serve(test, **config):
    """Run the coroutine function on an AsyncEngine with a bystander; the thread is alive and right after it."""

    async def main():
        engine = small_engine(tokenizer=tokenizer(), **config)
        async with AsyncEngine(engine) as serving:
            bystander = asyncio.create_task(serving.generate(prompt_of(5, 9), PARAMS[1]))
            await test(serving)
            assert serving._thread.is_alive()
            for params, output in (
                (PARAMS[1], await asyncio.wait_for(bystander, 60)),
                (PARAMS[0], await asyncio.wait_for(serving.generate(PROMPT, PARAMS[0]), 60)),
            ):
                prompt = prompt_of(5, 9) if params is PARAMS[1] else PROMPT
                assert_as_alone(output, engine.model, prompt, params)
        assert_empty(engine)
        return engine

    return asyncio.run(main())


async def read(stream):
    return [event async for event in stream][-1].output


@WHOLE
@pytest.mark.parametrize("face", ["generate", "stream"])
@pytest.mark.parametrize("name", ["prompt_ids", "params", "n", "drafts", "wait", *OPTIONS])
def test_every_field_of_the_async_engine(name, face, whole):
    if (name, face) in {("n", "stream"), ("drafts", "generate")}:
        return

    each = Each()

    async def test(serving):
        for value in hostile(name + face, whole):
            if name == "n" and asks_for_many(value):
                continue
            arguments = {"prompt_ids": PROMPT, "params": PARAMS[0]} | {name: value}
            prompt, params = arguments.pop("prompt_ids"), arguments.pop("params")
            call = getattr(serving, face)(prompt, params, **arguments)
            with each(value):
                try:
                    output = await asyncio.wait_for(call if face == "generate" else read(call), 60)
                except BaseException as error:
                    assert not isinstance(error, asyncio.TimeoutError), "no answer"
                    assert_refused(error, name, value)
                else:
                    assert all(one.error is None for one in (output if isinstance(output, list) else [output]))

    serve(test)
    each.done()


def test_every_value_cancelled_and_called():
    each = Each()

    async def test(serving):
        for value in HOSTILE:
            for call in (serving.cancel, serving.call):
                with each(value):
                    try:
                        await asyncio.wait_for(call(value), 60)
                    except BaseException as error:
                        assert not isinstance(error, asyncio.TimeoutError), "no answer"
                        assert isinstance(error, (ValueError, TypeError, Mine)), type(error)

    serve(test)
    each.done()


THROWN = [
    Injected("x"), Mine(), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), StopIteration(1), StopAsyncIteration(),
    TimeoutError("x"), MemoryError(), RecursionError(), type("Own", (BaseException,), {})(),
]  # fmt: skip


THROWN_TO_CALLERS = [one for one in THROWN if not isinstance(one, GeneratorExit)]  # which no await passes on


@pytest.mark.parametrize("error", THROWN_TO_CALLERS, ids=lambda error: type(error).__name__)
def test_what_a_called_function_raises_is_its_caller_s(error):
    def throw(engine):
        raise error

    async def test(serving):
        with pytest.raises(BaseException) as raised:
            await serving.call(throw)  # in no task of its own: asyncio ends with one that raises KeyboardInterrupt
        assert type(raised.value) is (StopIterationRaised if isinstance(error, StopIteration) else type(error))

    serve(test)


# what a request brings that raises later


class Tokenizer:
    """The embedded model's, whose decode raises `error` where wrong(number of the call, ids) holds."""

    def __init__(self, error, wrong):
        self.error, self.wrong, self.calls, self.raised = error, wrong, 0, 0

    def __getattr__(self, name):
        return getattr(tokenizer(), name)

    def decode(self, ids, **options):
        self.calls += 1
        if self.wrong(self.calls, ids):
            self.raised += 1
            raise self.error
        return tokenizer().decode(ids, **options)


def _panic():
    error = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    return error("index out of range")


OF_REQUESTS = [error for error in THROWN if isinstance(error, Exception)]


@pytest.mark.parametrize(
    "error, number",
    thinned(3, [*OF_REQUESTS, _panic()], [1, 2, 3, 5, 8, 13]),
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_a_tokenizer_that_raises_ends_one_request(error, number):
    broken = Tokenizer(error, lambda calls, ids: calls == number)
    engine = small_engine(tokenizer=broken)
    requests = [engine.add_request(PROMPT, params, stop=("never",)) for params in PARAMS[:4]]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert broken.raised == 1
    wrong = [request.output for request in requests if request.output.finish_reason == "error"]
    assert len(wrong) == 1 and type(error).__name__ in wrong[0].error
    for request in requests:
        if request.output.error is None:
            assert_as_alone(request.output, engine.model, PROMPT, request.params)
    assert_empty(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_an_interrupt_out_of_a_tokenizer_reaches_the_caller(error, number):
    engine = small_engine(tokenizer=Tokenizer(error, lambda calls, ids: calls == number))
    requests = [engine.add_request(PROMPT, params) for params in PARAMS[:4]]
    raised = []
    while engine.has_work:
        try:
            engine.step()
        except type(error) as one:
            raised.append(one)
    assert raised == [error]
    for request in requests:
        assert_as_alone(request.output, engine.model, PROMPT, request.params)
    assert_empty(engine)


@pytest.mark.parametrize("error", [*THROWN, _panic()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("number", [None, 1, 4])
def test_whatever_a_tokenizer_raises_the_async_engine_goes_on(error, number):
    """number: of the call that raises; None: all with the token that the bystander has not."""

    async def main():
        broken = Tokenizer(error, lambda calls, ids: calls == number if number else True)
        engine = small_engine(tokenizer=broken)
        async with AsyncEngine(engine) as serving:
            first = serving.generate(PROMPT, PARAMS[0])
            outputs = await asyncio.wait_for(asyncio.gather(first, read(serving.stream(PROMPT, PARAMS[1]))), 60)
            assert serving._thread.is_alive()
            wrong = [output for output in outputs if output.finish_reason == "error"]
            assert len(wrong) == (1 if number else 2) and all(type(error).__name__ in one.error for one in wrong)
            broken.wrong = lambda calls, ids: False
            assert_as_alone(
                await asyncio.wait_for(serving.generate(PROMPT, PARAMS[0]), 60), engine.model, PROMPT, PARAMS[0]
            )
        assert_empty(engine)

    asyncio.run(main())


class Clock:
    """Ticks, but for one call, which raises."""

    def __init__(self, number):
        self.number, self.calls = number, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.number:
            raise Injected("clock")
        return self.calls * 1e-3


@pytest.mark.parametrize("number", range(1, 40, 3))
def test_a_clock_that_raises_once(number):
    engine = small_engine(clock=Clock(number), tokenizer=tokenizer())
    requests = []
    for params in PARAMS[:3]:
        try:
            requests.append(engine.add_request(PROMPT, params, deadline_s=1e6))
        except Injected:
            engine.check_integrity()
    while engine.has_work:
        engine.step()
    wrong = [request.output for request in requests if request.output.finish_reason == "error"]
    assert len(wrong) <= 1 and all("Injected: clock" in output.error for output in wrong)
    for request in requests:
        if request.output.error is None:
            assert_as_alone(request.output, engine.model, PROMPT, request.params)
    assert_empty(engine)


@pytest.mark.parametrize("number", range(1, 40, 3))
def test_a_clock_that_raises_once_in_the_engine_s_thread(number):
    async def main():
        engine = small_engine(clock=Clock(number), tokenizer=tokenizer())
        async with AsyncEngine(engine) as serving:
            calls = [serving.generate(PROMPT, params, deadline_s=1e6, wait=True) for params in PARAMS[:3]]
            outputs = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
            assert serving._thread.is_alive()
            again = await asyncio.wait_for(serving.generate(PROMPT, PARAMS[0]), 60)
            for params, output in zip((*PARAMS[:3], PARAMS[0]), (*outputs, again), strict=True):
                if isinstance(output, Exception):
                    assert isinstance(output, (Injected, RuntimeError)), output
                elif output.error is None:
                    assert_as_alone(output, engine.model, PROMPT, params)
                else:
                    assert "Injected: clock" in output.error
        assert_empty(engine)

    asyncio.run(main())
