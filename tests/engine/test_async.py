"""AsyncEngine: many coroutines over one engine in its own thread."""

import asyncio
import contextlib
import gc
import math
import sys
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import pytest

from llada2_fast.config import DecodeParams
from llada2_fast.decoding.inputs import row_seed
from llada2_fast.engine import AsyncEngine, Engine, QueueFull
from llada2_fast.engine.worker import CALLS_PER_ROUND, Worker
from llada2_fast.model import LLaDA2Model
from tests.engine.common import PARAMS, assert_as_alone, assert_empty, prompt_of, random_model, small_engine
from tests.engine.test_faults import SLOW, failing_model

LONG = DecodeParams(gen_length=400, threshold=2.0, steps=4, eos_ids=())


class Unhurried(LLaDA2Model):
    """LONG takes it eight seconds, so that it still runs when a busy machine comes back to the test."""

    def forward_blocks(self, *args):
        time.sleep(0.02)
        return super().forward_blocks(*args)


def copy_of(model, cls):
    copy = cls(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def unhurried_model():
    return copy_of(random_model(), Unhurried)


def with_engine(test, **config):
    """Run the coroutine function `test` on a fresh AsyncEngine; afterwards nothing may be left."""
    engine = small_engine(**{"cache_tokens": 2048} | config)

    async def main():
        async with AsyncEngine(engine) as serving:
            await test(serving)

    asyncio.run(asyncio.wait_for(main(), 200))
    assert_empty(engine)
    assert not any(thread.name == "llada2-engine" for thread in threading.enumerate())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def test_many_at_once_give_what_they_give_alone():
    async def test(serving):
        jobs = [(prompt_of(n, n), PARAMS[n % 8]) for n in range(12)]
        outputs = await asyncio.gather(*(serving.generate(*job) for job in jobs))
        for output, (prompt, params) in zip(outputs, jobs, strict=True):
            assert_as_alone(output, random_model(), prompt, params)

    with_engine(test)


EXTREMES = [
    dict(threshold=1e39), dict(threshold=10**400), dict(threshold=1e-60), dict(editing_threshold=1e39),
    dict(editing_threshold=1e-60, max_post_steps=3), dict(temperature=3.4e38), dict(temperature=1e-60),
    dict(temperature=1.0, top_p=1e-60), dict(temperature=1.0, top_p=1 - 1e-16), dict(temperature=1.0, top_k=2**31 - 1),
    dict(steps=2**31 - 1), dict(minimal_topk=2**31 - 1), dict(editing_threshold=0.9, max_post_steps=2**31 - 1),
    dict(profile="hf-2.1", num_to_transfer=2**31 - 1), dict(eos_ids=(2**63 - 1, -(2**63))),
]  # fmt: skip


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_the_largest_and_least_numbers_do_what_they_say_and_hurt_nobody(extreme):
    params = DecodeParams(**{"gen_length": 9, "threshold": 0.4, "seed": -(2**63)} | extreme)

    async def test(serving):
        jobs = [(prompt_of(5), PARAMS[0]), (prompt_of(6), params), (prompt_of(7), PARAMS[3])]
        outputs = await asyncio.gather(*(serving.generate(*job) for job in jobs))
        for output, (prompt, its) in zip(outputs, jobs, strict=True):
            assert_as_alone(output, random_model(), prompt, its)

    with_engine(test)


def test_thresholds_beyond_float32_are_never_reached():
    outputs = small_engine().generate(
        [prompt_of(5)] * 3, [DecodeParams(gen_length=9, threshold=threshold) for threshold in (1.0, 1e39, math.inf)]
    )
    assert all(output.trace == outputs[0].trace for output in outputs)


@pytest.mark.parametrize("params", [None, {"gen_length": 8}, "speed"], ids=repr)
def test_params_that_are_none_hurt_their_caller_alone(params):
    async def test(serving):
        other = asyncio.create_task(serving.generate(prompt_of(7), PARAMS[1]))
        await asyncio.sleep(0)  # it has been sent
        with pytest.raises(ValueError, match="^params=.*: expected DecodeParams"):
            await serving.generate([1, 2], params)
        with pytest.raises(ValueError, match="^params=.*: expected DecodeParams"):
            await anext(serving.stream([1, 2], params))
        assert_as_alone(await other, random_model(), prompt_of(7), PARAMS[1])
        assert_as_alone(await serving.generate([1, 2], PARAMS[0]), random_model(), [1, 2], PARAMS[0])

    with_engine(test)


def test_params_that_are_none_are_refused_though_the_queue_is_full():
    async def test(serving):
        scheduler, others = serving.engine.scheduler, []
        for queue in ("running", "waiting"):
            others.append(asyncio.create_task(serving.generate(prompt_of(7), LONG)))
            await until(lambda queue=queue: getattr(scheduler, queue))
        with pytest.raises(ValueError, match="^params=.*: expected DecodeParams"):
            await serving.generate([1, 2], {}, wait=True)
        assert not any(other.done() for other in others)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    with_engine(test, max_num_seqs=1, max_waiting=1)


def test_a_stream_tells_everything_in_order():
    async def test(serving):
        events = [event async for event in serving.stream(prompt_of(9), SLOW, drafts=True, request_id="x")]
        tokens = [token for event in events if event.kind == "commit" for token in event.token_ids]
        assert tokens == events[-1].output.token_ids and events[-1].request_id == "x"
        assert [event.kind for event in events if event.kind != "draft"] == ["commit"] * 5 + ["finish"]

    with_engine(test)


class Paced(LLaDA2Model):
    """Makes a forward when it is told to, or after a minute."""

    def __init__(self, config):
        super().__init__(config)
        self.go_on = threading.Semaphore(1)

    def forward_blocks(self, *args):
        self.go_on.acquire(timeout=60)
        return super().forward_blocks(*args)


def test_a_reader_that_keeps_up_sees_every_draft():
    """It hears of a draft when there is one, not when the block is done."""
    model = copy_of(random_model(), Paced)

    async def test(serving):
        kinds = []
        async for event in serving.stream(prompt_of(8), SLOW, drafts=True):
            kinds.append(event.kind)
            model.go_on.release()
        assert kinds == ["draft", "draft", "draft", "commit"] * 4 + ["finish"]

    with_engine(test, model=model)


@pytest.mark.parametrize("how", ["close", "break", "task"])
def test_leaving_a_stream_cancels_its_request(how):
    async def test(serving):
        engine, other = serving.engine, asyncio.create_task(serving.generate(prompt_of(7), PARAMS[1]))

        async def read():
            async with contextlib.aclosing(serving.stream(prompt_of(5), LONG, request_id="x")) as events:
                async for event in events:
                    if how != "task" and event.start > 8:
                        return

        if how == "close":
            events = serving.stream(prompt_of(5), LONG, request_id="x")
            await anext(events)
            await events.aclose()
        elif how == "break":
            await read()
        else:
            task = asyncio.create_task(read())
            await until(lambda: "x" in engine.requests and engine.requests["x"].sequence.num_delivered)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: "x" not in engine.requests)
        assert engine.finished["cancelled"] == 1
        assert_as_alone(await other, random_model(), prompt_of(7), PARAMS[1])

    with_engine(test, model=unhurried_model())


def test_a_reader_that_leaves_late_does_not_cancel_who_has_its_id_now():
    async def test(serving):
        async for event in serving.stream(prompt_of(5), SLOW, request_id="x"):
            if event.kind == "finish":
                second = asyncio.create_task(serving.generate(prompt_of(6), SLOW, request_id="x"))
                await until(lambda: "x" in serving.engine.requests)
        assert (await second).finish_reason == "length"

    with_engine(test, model=unhurried_model())


def test_a_request_that_has_ended_is_let_go():
    async def test(serving):
        known = None
        async for event in serving.stream(prompt_of(5), SLOW, request_id="x"):
            if event.kind == "commit":
                known = weakref.ref(serving.engine.requests["x"]) if known is None else known
        for _ in range(2):  # the stream's leaving is a call, too, and the thread holds the last one
            await serving.call(lambda engine: gc.collect())
        assert known() is None

    with_engine(test, model=unhurried_model())


def test_an_event_loop_that_is_closed_with_a_reader_ends_its_request_alone():
    serving = AsyncEngine(small_engine(model=unhurried_model(), cache_tokens=2048))
    loop = asyncio.new_event_loop()
    events = serving.stream(prompt_of(5), LONG, request_id="x")
    loop.run_until_complete(anext(events))
    loop.close()

    async def other():
        async with serving:
            assert_as_alone(await serving.generate(prompt_of(6), SLOW), random_model(), prompt_of(6), SLOW)
            await until(lambda: "x" not in serving.engine.requests)

    asyncio.run(asyncio.wait_for(other(), 200))
    assert serving.engine.finished == {"length": 1, "cancelled": 1}
    assert_empty(serving.engine)


def test_a_caller_that_leaves_before_it_is_added_leaves_nothing():
    async def test(serving):
        tasks = [asyncio.create_task(serving.generate(prompt_of(5), LONG)) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await until(lambda: not serving.engine.has_work)

    with_engine(test, model=unhurried_model())


def test_cancel_by_id_ends_the_stream():
    async def test(serving):
        task = asyncio.create_task(serving.generate(prompt_of(5), LONG, request_id="x"))
        await until(lambda: "x" in serving.engine.requests)
        assert await serving.cancel("x") and not await serving.cancel("x")
        assert (await task).finish_reason == "cancelled"

    with_engine(test, model=unhurried_model())


def test_errors_reach_the_caller():
    async def test(serving):
        with pytest.raises(ValueError, match="outside 0..23"):
            await serving.generate([99], SLOW)
        with pytest.raises(TypeError):
            await serving.generate([1], SLOW, colour="red")
        holder = asyncio.create_task(serving.generate([1], LONG, request_id="x"))
        await until(lambda: "x" in serving.engine.requests)
        with pytest.raises(ValueError, match="request_id='x'"):
            await serving.generate([1], SLOW, request_id="x")
        assert "x" in serving.engine.requests  # the refused one must not take the first with it
        holder.cancel()

    with_engine(test, model=unhurried_model())


def test_a_full_queue_refuses_or_lets_wait():
    async def test(serving):
        running = asyncio.create_task(serving.generate([1], LONG))
        await until(lambda: serving.engine.scheduler.running)
        waiting = [asyncio.create_task(serving.generate([n], SLOW)) for n in (2, 3)]
        await until(lambda: len(serving.engine.scheduler.waiting) == 2)
        with pytest.raises(QueueFull, match="max_waiting=2"):
            await serving.generate([4], SLOW)
        patient = [asyncio.create_task(serving.generate(prompt_of(n), PARAMS[0], wait=True)) for n in range(6)]
        await asyncio.sleep(0.05)
        assert len(serving.engine.scheduler.waiting) == 2
        patient[3].cancel()
        running.cancel()
        for n, task in enumerate(patient):
            if n != 3:
                assert_as_alone(await task, random_model(), prompt_of(n), PARAMS[0])
        await asyncio.gather(*waiting)

    with_engine(test, model=unhurried_model(), max_num_seqs=1, max_waiting=2)


def test_who_has_waited_longest_is_next_when_a_call_makes_room():
    async def test(serving):
        engine, ended = serving.engine, []

        async def ask(name, params=SLOW):
            output = await serving.generate([1], params, wait=True, request_id=name)
            ended.append((name, output.finish_reason))

        tasks = [asyncio.create_task(ask("running", LONG))]
        await until(lambda: engine.scheduler.running)
        tasks += [asyncio.create_task(ask(name)) for name in ("queued", "patient")]
        await until(lambda: engine.scheduler.waiting)
        tasks += [asyncio.create_task(serving.cancel("queued")), asyncio.create_task(ask("late"))]
        await until(lambda: ended)
        await serving.cancel("running")
        await asyncio.gather(*tasks)
        assert ended == [("queued", "cancelled"), ("running", "cancelled"), ("patient", "length"), ("late", "length")]

    with_engine(test, model=unhurried_model(), max_num_seqs=1, max_waiting=1)


def test_the_highest_priority_is_let_in_first():
    async def test(serving):
        ended = []

        async def ask(name, params=SLOW, priority=0):
            await serving.generate([1], params, wait=True, request_id=name, priority=priority)
            ended.append(name)

        tasks = [asyncio.create_task(ask("running", LONG))]
        await until(lambda: serving.engine.scheduler.running)
        asked = [("queued", 3), ("low", 0), ("lower", -1), ("high", 1), ("late", 0), ("highest", 2)]
        tasks += [asyncio.create_task(ask(name, priority=priority)) for name, priority in asked]
        await until(lambda: len(serving._worker._waiting) == 5)
        await serving.cancel("running")
        await asyncio.gather(*tasks)
        assert ended == ["running", "queued", "highest", "high", "low", "late", "lower"]

    with_engine(test, model=unhurried_model(), max_num_seqs=1, max_waiting=1)


class Untouchable(list):
    """A prompt that tells when it is looked at."""

    def __iter__(self):
        raise AssertionError("looked at")

    __getitem__ = __len__ = __iter__


def test_a_full_queue_refuses_before_it_looks_at_a_prompt():
    async def test(serving):
        running = asyncio.create_task(serving.generate([1], LONG))
        await until(lambda: serving.engine.scheduler.running)
        waiting = asyncio.create_task(serving.generate([1], SLOW))
        await until(lambda: serving.engine.scheduler.waiting)
        with pytest.raises(QueueFull):
            await serving.generate(Untouchable(), SLOW)
        running.cancel()
        await waiting

    with_engine(test, model=unhurried_model(), max_num_seqs=1, max_waiting=1)


def test_calls_between_two_steps_are_few_however_many_come():
    """Pollers, refused requests and such that leave; but requests for which there is a place all come in at once."""

    async def test(serving):
        at = []
        running = asyncio.create_task(serving.generate([1], LONG))
        await until(lambda: serving.engine.num_steps)

        async def poll():
            while not running.done():
                await serving.call(lambda engine: at.append(engine.num_steps))

        pollers = [asyncio.create_task(poll()) for _ in range(50)]
        await until(lambda: len(at) > 200)
        running.cancel()
        await asyncio.gather(*pollers)
        most = Counter(at[:200]).most_common(1)[0][1]
        assert most <= CALLS_PER_ROUND

        several = [asyncio.create_task(serving.generate([n], LONG)) for n in range(1, 4)]
        await until(lambda: len(serving.engine.scheduler.running) == 3)
        assert serving.engine.num_steps - max(at) < 10
        for task in several:
            task.cancel()

    with_engine(test, model=unhurried_model(), max_waiting=8)


def test_kinds_of_calls_take_turns_and_those_that_nobody_waits_for_cost_nothing():
    """A cancel and a request, which is refused, beside crowds of pollers, of callers that wait and of gone ones."""

    async def test(serving):
        engine = serving.engine
        running = asyncio.create_task(serving.generate([1], LONG, request_id="running"))
        await until(lambda: engine.num_steps)

        async def poll():
            while not running.done():
                await serving.call(Engine.stats)

        pollers = [asyncio.create_task(poll()) for _ in range(100)]
        crowd = [asyncio.create_task(serving.generate([2], LONG, wait=True)) for _ in range(100)]
        gone = [asyncio.create_task(serving.call(Engine.stats)) for _ in range(100)]
        await until(lambda: len(serving._worker._waiting) > 90)
        for task in gone:
            task.cancel()
        begin = engine.num_steps
        assert await serving.cancel("nobody") is False
        with pytest.raises(QueueFull):
            await serving.generate([4], SLOW)
        assert engine.num_steps - begin < 30
        for task in crowd:
            task.cancel()
        await until(lambda: not serving._worker._waiting)
        running.cancel()
        await asyncio.gather(*pollers)

    with_engine(test, model=unhurried_model(), max_num_seqs=1, max_waiting=1)


def test_an_answer_for_a_call_that_a_fault_came_before():
    """The fault is the worker's own: it is logged, the call is answered, and serving goes on."""
    fault = []

    class Faulty(Worker):
        def _next(self):
            call = super()._next()
            if call is not None and fault:
                self._call = call
                raise fault.pop()
            return call

    async def main():
        serving = AsyncEngine(small_engine(model=unhurried_model(), cache_tokens=2048))
        serving.close()
        serving._worker = Faulty(serving.engine)
        async with serving:
            for kind in (Engine.stats, Engine.pause):
                fault.append(RuntimeError("ours"))
                with pytest.raises(RuntimeError, match="came before the call"):
                    await asyncio.wait_for(serving.call(kind), 30)
            assert (await serving.generate([1], SLOW)).finish_reason == "length"

    asyncio.run(asyncio.wait_for(main(), 100))


def test_a_deadline_counts_while_the_caller_waits_for_room():
    async def test(serving):
        running = asyncio.create_task(serving.generate([1], LONG))
        queued = asyncio.create_task(serving.generate([2], LONG))
        await until(lambda: serving.engine.scheduler.waiting)
        with pytest.raises(TimeoutError if sys.version_info >= (3, 11) else asyncio.TimeoutError):
            await serving.generate([3], LONG, wait=True, deadline_s=0.1)
        late = asyncio.create_task(serving.generate([4], LONG, wait=True, deadline_s=2.0))
        await until(lambda: serving._worker._waiting)
        running.cancel()
        output = await late
        assert output.finish_reason == "deadline" and output.queue_s <= 2.5
        queued.cancel()

    with_engine(test, model=unhurried_model(), max_num_seqs=1, max_waiting=1)


@pytest.mark.parametrize("n", [1, 3])
def test_samples_of_one_prompt(n):
    async def test(serving):
        params = replace(PARAMS[3], seed=4)
        outputs = await serving.generate(prompt_of(21), params, n=n)
        for number, output in enumerate(outputs):
            assert_as_alone(output, random_model(), prompt_of(21), replace(params, seed=row_seed(4, number)))
        assert len(outputs) == n
        with pytest.raises(ValueError, match="^n=0"):
            await serving.generate([1], params, n=0)
        with pytest.raises(ValueError, match="stop_token_ids"):
            await serving.generate([1], params, n=3, stop_token_ids=[99])
        await until(lambda: not serving.engine.has_work)

    with_engine(test)


def test_who_is_cancelled_just_when_there_is_room_is_cancelled():
    async def test(serving):
        for turns in range(60):
            task = asyncio.ensure_future(serving.open(prompt_of(5), SLOW, wait=True, deadline_s=60.0))
            while not (serving.engine.requests or task.done()):
                await asyncio.sleep(0)
            for _ in range(turns % 6):  # until what the engine's thread has done is known here, and a bit more
                await asyncio.sleep(0)
            if task.cancel():
                (end,) = await asyncio.gather(task, return_exceptions=True)
                assert isinstance(end, asyncio.CancelledError)
            else:
                task.result().close()
            await until(lambda: not serving.engine.requests)

    with_engine(test)


def test_a_deadline_of_ages_hence_and_one_of_a_request_that_has_ended():
    """Neither ends the thread, nor keeps it busy when there is nothing to do."""
    asked = []

    def clock():
        asked.append(None)
        return time.perf_counter()

    async def test(serving):
        await serving.call(Engine.pause)
        far = asyncio.create_task(serving.generate([1], SLOW, deadline_s=1e300))
        await until(lambda: serving.engine.requests)
        await serving.call(Engine.resume)
        assert (await far).finish_reason == "length"
        assert (await serving.generate([1], SLOW, deadline_s=0.5)).finish_reason == "length"
        await asyncio.sleep(0.6)
        before = len(asked)
        await asyncio.sleep(0.2)
        assert len(asked) - before < 5

    with_engine(test, clock=clock)


def test_a_reader_that_is_slow_misses_drafts_but_no_commit():
    async def test(serving):
        kinds, params = [], replace(LONG, gen_length=80)
        async for event in serving.stream(prompt_of(5), params, drafts=True):
            kinds.append(event.kind)
            if event.kind == "draft":
                step = serving.engine.num_steps
                while serving.engine.has_work and serving.engine.num_steps < step + 4:
                    time.sleep(0.001)  # blocks the loop: the engine's thread goes on
        assert kinds.count("commit") == 21 and kinds.count("draft") < 42 and kinds[-1] == "finish"

    with_engine(test)


def test_a_fault_hits_the_requests_of_the_step_and_serving_goes_on():
    async def test(serving):
        output = await serving.generate(prompt_of(5), SLOW, request_id="x")
        assert output.error == "request x: RuntimeError: boom"
        assert_as_alone(await serving.generate(prompt_of(5), SLOW), random_model(), prompt_of(5), SLOW)

    with_engine(test, model=failing_model(3, RuntimeError("boom")))


def test_an_engine_that_cannot_recover_closes_and_every_caller_hears_of_it(caplog):
    engine = small_engine(model=unhurried_model(), cache_tokens=2048)

    async def main():
        serving = AsyncEngine(engine)
        tasks = [asyncio.create_task(serving.generate(prompt_of(n), LONG)) for n in (5, 6)]
        await until(lambda: len(engine.requests) == 2)
        await serving.call(lambda engine: setattr(engine, "cache", None))
        await serving.call(lambda engine: setattr(engine.scheduler, "cache", None))
        for task in tasks:
            with pytest.raises(RuntimeError, match="closed|thread has ended"):
                await task
        assert "the engine's thread ends" in caplog.text
        with pytest.raises(RuntimeError, match="closed"):
            await serving.generate([1], SLOW)
        await serving.aclose()

    asyncio.run(asyncio.wait_for(main(), 200))


def test_closing_ends_what_runs():
    engine = small_engine(model=unhurried_model(), cache_tokens=2048)

    async def main():
        serving = AsyncEngine(engine)
        tasks = [asyncio.create_task(serving.generate(prompt_of(n), LONG)) for n in range(6)]
        await until(lambda: len(engine.requests) == 6)
        await serving.aclose()
        assert {(await task).finish_reason for task in tasks} == {"cancelled"}
        await serving.aclose()

    asyncio.run(asyncio.wait_for(main(), 200))
    assert_empty(engine)


def test_closing_refuses_whoever_waits_for_room():
    engine = small_engine(model=unhurried_model(), cache_tokens=2048, max_num_seqs=1, max_waiting=1)

    async def main():
        serving = AsyncEngine(engine)
        tasks = [asyncio.create_task(serving.generate(prompt_of(n), LONG, wait=True)) for n in range(3)]
        await until(lambda: engine.scheduler.running and engine.scheduler.waiting)
        await serving.aclose()
        *added, refused = await asyncio.gather(*tasks, return_exceptions=True)
        assert [output.finish_reason for output in added] == ["cancelled", "cancelled"]
        assert isinstance(refused, RuntimeError) and str(refused) == "the engine is closed"

    asyncio.run(asyncio.wait_for(main(), 200))
    assert_empty(engine)


def test_calls_run_between_steps_in_the_engine_s_thread():
    async def test(serving):
        assert await serving.call(lambda engine: threading.current_thread().name) == "llada2-engine"
        assert await serving.call(lambda engine: engine.cache.num_free) == 512

    with_engine(test)
