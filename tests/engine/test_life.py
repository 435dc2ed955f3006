"""Life and death of engines: closed, dropped, forked, left at exit; and nobody uses one that is somebody else's."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from llada2_fast.config import DecodeParams
from llada2_fast.engine import AsyncEngine, Engine
from tests.engine.common import (
    PARAMS,
    assert_as_alone,
    assert_empty,
    prompt_of,
    random_model,
    small_engine,
    tokenizer,
    tokens_alone,
)
from tests.engine.test_async import LONG, unhurried_model, until

ROOT = Path(__file__).parents[2]
PROMPT = prompt_of(6)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "llada2-engine"]


def busy_engine(**config):
    return small_engine(unhurried_model(), **{"cache_tokens": 2048} | config)


def assert_usable(engine):
    """It gives what is right, and nothing is left in it."""
    assert_as_alone(engine.generate([PROMPT], PARAMS[1])[0], engine.model, PROMPT, PARAMS[1])
    assert_empty(engine)


# close


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("busy", [False, True])
def test_close(busy, times):
    """From outside any event loop; whoever waits in one gets an answer; the engine can be used by itself afterwards."""
    engine = busy_engine() if busy else small_engine()
    serving = AsyncEngine(engine)

    async def main():
        task = asyncio.create_task(serving.generate(PROMPT, LONG))
        await until(lambda: serving.engine.num_steps > 3)
        for _ in range(times):
            serving.close()
        return await asyncio.wait_for(task, 60)

    if busy:
        assert asyncio.run(main()).finish_reason == "cancelled"
    else:
        for _ in range(times):
            serving.close()
    assert not threads()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        asyncio.run(serving.generate(PROMPT, PARAMS[0]))
    engine.model = random_model()
    assert_empty(engine)


def test_close_from_several_threads_at_once():
    for _ in range(5):
        serving = AsyncEngine(small_engine())
        closers = [threading.Thread(target=serving.close) for _ in range(8)]
        for thread in closers:
            thread.start()
        for thread in closers:
            thread.join(60)
            assert not thread.is_alive()
        assert not threads()


def test_with():
    with AsyncEngine(small_engine()) as serving:
        output = asyncio.run(serving.generate(PROMPT, PARAMS[0]))
    assert_as_alone(output, random_model(), PROMPT, PARAMS[0])
    assert not threads()
    assert_usable(serving.engine)


def test_async_with_and_what_is_raised_in_it():
    engine = small_engine()

    async def main():
        async with AsyncEngine(engine) as serving:
            assert len(threads()) == 1
            await serving.aclose()
            await asyncio.gather(serving.aclose(), serving.aclose())
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        asyncio.run(main())
    assert not threads()
    assert_usable(engine)


def test_close_in_its_own_thread_is_refused():
    """There it would wait for itself."""

    async def main():
        async with AsyncEngine(small_engine()) as serving:
            with pytest.raises(RuntimeError):
                await asyncio.wait_for(serving.call(lambda engine: serving.close()), 60)

    asyncio.run(main())
    assert not threads()


def test_aclose_does_not_hold_up_the_event_loop():
    async def main():
        serving = AsyncEngine(busy_engine())
        task = asyncio.create_task(serving.generate(PROMPT, LONG))
        await until(lambda: serving.engine.num_steps > 3)
        ticks, closing = 0, asyncio.create_task(serving.aclose())
        while not closing.done():
            await asyncio.sleep(0)
            ticks += 1
        assert (await task).finish_reason == "cancelled"
        return ticks

    assert asyncio.run(main()) > 1


# dropped


async def read(serving):
    async for _ in serving.stream(PROMPT, PARAMS[0]):
        pass


USES = {
    "not at all": None,
    "generate": lambda serving: serving.generate(PROMPT, PARAMS[0]),
    "stream": read,
    "call": lambda serving: serving.call(Engine.stats),
    "cancel": lambda serving: serving.cancel("nobody"),
}


@pytest.mark.parametrize("used", USES)
def test_a_dropped_one_is_freed_with_a_warning(used):
    serving = AsyncEngine(small_engine())
    if USES[used] is not None:
        asyncio.run(USES[used](serving))
    cache, (thread,) = weakref.ref(serving.engine.cache), threads()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del serving
        gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    gc.collect()
    assert cache() is None


def test_a_closed_one_is_freed_without_a_warning():
    serving = AsyncEngine(small_engine())
    asyncio.run(serving.generate(PROMPT, PARAMS[0]))
    serving.close()
    cache = weakref.ref(serving.engine.cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del serving
        gc.collect()
    assert cache() is None


def test_a_plain_engine_is_freed_at_once():
    engine = small_engine()
    engine.generate([PROMPT], PARAMS[0])
    cache = weakref.ref(engine.cache)
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


# exit

SCRIPT = """
import asyncio
from llada2_fast.engine import AsyncEngine
from tests.engine.common import *

serving = AsyncEngine(small_engine(cache_tokens=4096))
async def main():
    long = DecodeParams(gen_length=400, threshold=2.0, steps=4, eos_ids=())
    tasks = [asyncio.create_task(serving.generate(prompt_of(5, i), long if {busy} else PARAMS[0])) for i in range(4)]
    if {busy}:
        while serving.engine.num_steps < {steps}:
            await asyncio.sleep(0.001)
    else:
        await asyncio.gather(*tasks)
    {end}
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("busy", "steps", "end", "code"),
    [
        pytest.param(True, 1, "pass", 0, marks=pytest.mark.slow),
        (True, 9, "pass", 0),
        (True, 30, "raise SystemExit(3)", 3),
        (False, 0, "pass", 0),
    ],
)
def test_exit_without_close(busy, steps, end, code):
    script = SCRIPT.format(busy=busy, steps=steps, end=end)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_exit_in_the_middle_of_a_step():
    """The interpreter waits for it, instead of aborting the process under it."""
    script = """
        import threading, time, torch
        from llada2_fast.engine import AsyncEngine
        from tests.engine.common import *
        inside = threading.Event()
        class Slow(type(random_model())):
            def forward_blocks(self, *args):
                inside.set()
                time.sleep(0.5)
                return super().forward_blocks(*args)
        model = Slow(random_model().config)
        model.load_state_dict(random_model().state_dict())
        serving = AsyncEngine(small_engine(model))
        serving._worker.send(lambda: serving.engine.add_request([1, 2, 3], PARAMS[0]))
        inside.wait()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_exit_right_after_one_was_dropped():
    """Its thread is on its way out then: the worker is gone, the thread is not. Six of eight aborted."""
    script = """
        import asyncio, warnings
        from llada2_fast.engine import AsyncEngine
        from tests.engine.common import *
        warnings.simplefilter("ignore")
        async def main():
            serving = AsyncEngine(small_engine())
            await serving.generate([1, 2, 3], PARAMS[0])
        asyncio.run(main())
    """
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert (ended.returncode, ended.stderr) == (0, "")


# fork


def in_child(check):
    """Run check() in a forked child; what it raises fails the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            check()
        except BaseException:
            os.write(write, traceback.format_exc()[-4000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text or "it hangs"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_in_a_forked_child_every_call_is_an_error_at_once(busy):
    serving = AsyncEngine(busy_engine() if busy else small_engine())

    async def last(stream):
        return [event async for event in stream][-1]

    def check():
        calls = (
            lambda: serving.generate(PROMPT, PARAMS[0]),
            lambda: serving.generate(PROMPT, PARAMS[0], n=2),
            lambda: serving.generate(PROMPT, PARAMS[0], wait=True),
            lambda: last(serving.stream(PROMPT, PARAMS[0])),
            lambda: serving.cancel("x"),
            lambda: serving.call(Engine.stats),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match="belongs to process"):
                asyncio.run(call())
        for _ in range(2):
            serving.close()
        asyncio.run(serving.aclose())

    async def main():
        task = asyncio.create_task(serving.generate(PROMPT, LONG if busy else PARAMS[0]))
        await until(lambda: serving.engine.num_steps > 2)
        await asyncio.get_running_loop().run_in_executor(None, in_child, check)
        if busy:
            await serving.aclose()
        return await asyncio.wait_for(task, 60)

    assert asyncio.run(main()).finish_reason == ("cancelled" if busy else "length")
    if not busy:
        output = asyncio.run(serving.generate(PROMPT, PARAMS[1]))
        assert_as_alone(output, random_model(), PROMPT, PARAMS[1])
    serving.close()
    assert not threads()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_plain_engine_works_in_a_forked_child():
    engine = small_engine()
    expected = tokens_alone(random_model(), PROMPT, PARAMS[1])
    request = engine.add_request(PROMPT, PARAMS[1])
    engine.step()

    def check():
        while request.output is None:
            engine.step()
        assert request.output.token_ids == expected
        assert_usable(engine)

    in_child(check)
    check()


# how it is built


@pytest.mark.parametrize("config", [{}, {"graphs": True, "capture": False}], ids=["eager", "graphs"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_built_under_any_mode(mode, config):
    """And used outside of it, in this thread and in another."""
    with mode():
        engine = small_engine(**config)
    expected = tokens_alone(random_model(), PROMPT, PARAMS[1])
    assert engine.generate([PROMPT], PARAMS[1])[0].token_ids == expected
    with AsyncEngine(engine) as serving:
        assert asyncio.run(serving.generate(PROMPT, PARAMS[1])).token_ids == expected
    assert_empty(engine)


# whose it is


def test_a_second_owner_is_refused_at_once():
    engine = small_engine()
    with AsyncEngine(engine) as serving:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="belongs to an AsyncEngine"):
                AsyncEngine(engine)
        assert len(threads()) == 1
        output = asyncio.run(serving.generate(PROMPT, PARAMS[0]))
        assert_as_alone(output, random_model(), PROMPT, PARAMS[0])
    with AsyncEngine(engine) as serving:  # when the first has gone
        asyncio.run(serving.generate(PROMPT, PARAMS[0]))


CALLS = {
    "step": lambda engine: engine.step(),
    "add_request": lambda engine: engine.add_request(PROMPT, PARAMS[0]),
    "cancel": lambda engine: engine.cancel("x"),
    "generate": lambda engine: engine.generate([PROMPT], PARAMS[0]),
    "pause": lambda engine: engine.pause(),
    "weights_changed": lambda engine: engine.weights_changed(),
    "sleep": lambda engine: engine.sleep(),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_owned_engine_is_nobody_else_s(call):
    engine = busy_engine()
    short = DecodeParams(gen_length=40, threshold=2.0, steps=4, eos_ids=())

    async def main():
        async with AsyncEngine(engine) as serving:
            task = asyncio.create_task(serving.generate(PROMPT, short))
            await until(lambda: engine.num_steps > 2)
            for _ in range(3):
                with pytest.raises(RuntimeError, match="belongs to an AsyncEngine"):
                    CALLS[call](engine)
            return await asyncio.wait_for(task, 60)

    assert_as_alone(asyncio.run(main()), engine.model, PROMPT, short)
    assert_empty(engine)


class Within:
    """A clock in which something is done, once, in the middle of a step."""

    def __init__(self, do):
        self.do, self.time, self.armed = do, 0.0, False

    def __call__(self):
        self.time += 1e-3
        if self.armed:
            self.armed = False
            self.do()
        return self.time


def stepped(engine, requests, clock):
    """Arm the clock for each step in turn, until all have ended; those at which it went off."""
    count = 0
    while any(request.output is None for request in requests):
        clock.armed = True
        engine.step()
        count += not clock.armed
        engine.check_integrity()
    for request in requests:
        assert_as_alone(request.output, engine.model, request.prompt, request.params)
    assert_empty(engine)
    return count


@pytest.mark.parametrize("call", CALLS)
def test_two_threads_at_once(call):
    """The second one gets an error, the first goes on."""
    refused = []

    def second():
        try:
            CALLS[call](engine)
        except RuntimeError as error:
            refused.append(str(error))

    def do():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    clock = Within(do)
    engine = small_engine(clock=clock)
    requests = [engine.add_request(prompt_of(n), params) for n, params in zip((5, 9), PARAMS, strict=False)]
    count = stepped(engine, requests, clock)
    assert refused == ["the engine is at work in another"] * count and count > 3


@pytest.mark.parametrize("call", CALLS)
def test_from_inside_a_step(call):
    """From its clock, as from a tokenizer."""
    refused = []

    def do():
        with pytest.raises(RuntimeError, match="at work in this thread") as raised:
            CALLS[call](engine)
        refused.append(raised.value)

    clock = Within(do)
    engine = small_engine(clock=clock)
    requests = [engine.add_request(prompt_of(n), params) for n, params in zip((5, 9), PARAMS, strict=False)]
    assert stepped(engine, requests, clock) == len(refused) > 3


def test_from_its_own_tokenizer():
    """Which ends the request whose text it makes, as whatever a tokenizer raises."""

    class Nosy:
        def __getattr__(self, name):
            return getattr(tokenizer(), name)

        def decode(self, ids, **options):
            if self.steps:
                self.steps = False
                engine.step()
            return tokenizer().decode(ids, **options)

    nosy = Nosy()
    nosy.steps = False
    engine = small_engine(tokenizer=nosy)
    requests = [engine.add_request(prompt_of(n), params) for n, params in zip((5, 9), PARAMS, strict=False)]
    nosy.steps = True
    while engine.has_work:
        engine.step()
    wrong = [request for request in requests if request.output.error]
    assert len(wrong) == 1 and "at work in this thread" in wrong[0].output.error
    (other,) = set(requests) - set(wrong)
    assert_as_alone(other.output, engine.model, other.prompt, other.params)
    nosy.steps = False
    assert_usable(engine)


def test_from_a_signal_handler():
    refused = []

    def handler(number, frame):
        try:
            engine.cancel("request-1")
        except RuntimeError as error:
            refused.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        clock = Within(lambda: signal.raise_signal(signal.SIGUSR1))
        engine = small_engine(clock=clock)
        requests = [engine.add_request(prompt_of(n), params) for n, params in zip((5, 9), PARAMS, strict=False)]
        assert stepped(engine, requests, clock) == len(refused) > 3
        assert all("at work in this thread" in text for text in refused)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handle_of_another_engine_is_refused():
    one, other = small_engine(), small_engine()
    request = one.add_request(PROMPT, PARAMS[0])
    with pytest.raises(ValueError, match="a handle of this engine"):
        other.stream(request)
    assert_as_alone(list(one.stream(request))[-1].output, one.model, PROMPT, PARAMS[0])


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_closed_in_the_middle_of_a_step(cyclic, stride):
    """By the garbage collector, or because its last name goes: its request is cancelled when the step is over."""
    kept = []

    def do():
        if kept:
            kept.clear()
            gc.collect()

    clock = Within(do)
    engine = small_engine(clock=clock)
    other = engine.add_request(prompt_of(9), PARAMS[1])
    for number in range(0, 12, stride):
        left = engine.add_request(PROMPT, LONG.preset("speed", gen_length=200, eos_ids=()), request_id=f"left-{number}")
        stream = engine.stream(left)
        for _ in range(number):
            next(stream)
        next(stream)
        kept.append([stream])
        if cyclic:
            kept[0].append(kept[0])
        del stream
        clock.armed = True
        while clock.armed:
            engine.step()
        assert left.output is not None and left.output.finish_reason == "cancelled"
        engine.check_integrity()
    while engine.has_work:
        engine.step()
    assert_as_alone(other.output, engine.model, other.prompt, other.params)
    assert_empty(engine)
