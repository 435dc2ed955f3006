"""AsyncEngine: an Engine in a thread of its own, driven from asyncio.

Only that thread touches the engine: coroutines send it calls, which run between two steps, and read the events of
their requests from the handles. A reader that is slow misses drafts, never commits: an unread draft gives way to the
next, and what is committed is bounded by the request's budget.
"""

import asyncio
import contextlib
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

from ..config import MAX_SAMPLES, RequestOptions, as_flag, as_int
from ..decoding.forms import Form
from .engine import Engine
from .intake import sample
from .request import DEFAULT_OPTIONS, DEFAULTS, QueueFull, Request, RequestOutput, check_params
from .worker import Kind, Reader, Worker

MAX_LANGUAGES = 16  # that may be in the making, two at a time


class Reading:
    """A request of an AsyncEngine's and who reads it, for `async for`: its events as they come, the last one "finish".

    request: its handle.

    For `with`, or closed by `close()`, which cancels what is not finished.
    """

    def __init__(self, worker, until_end):
        self._worker, self._opened, self._over = worker, [], False
        self._reader = Reader(asyncio.get_running_loop(), asyncio.Event(), until_end)

    def begin(self, request: Request):
        """In the engine's thread, when the request exists."""
        self._worker.readers[request] = self._reader
        self._opened.append(request)

    @property
    def request(self) -> Request:
        return self._opened[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Nobody reads it any more: it is cancelled unless it is finished."""
        self._worker.leave(self._opened)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._over:
            raise StopAsyncIteration
        while (event := self._next()) is None:
            await self._wait(lambda: self.request.has_news)
        self._over = event.kind == "finish"
        return event

    async def output(self) -> RequestOutput:
        """What it gave, when it has ended."""
        while self.request.output is None:
            self._reader.news.clear()
            await self._wait(lambda: self.request.output is not None)
        return self.request.output

    def _next(self):
        self._reader.news.clear()
        return self.request.next_event()

    async def _wait(self, is_told):
        ended = self._worker.ended  # looked at before the log: what has been told until then is there
        if not is_told():
            if ended:
                raise RuntimeError("the engine's thread has ended before the request; its log says why")
            await self._reader.news.wait()


class AsyncEngine:
    """For `async with` or `with`, or closed by `aclose()` or `close()`, which cancel what is not finished.

    engine: an Engine that nobody else uses from now on: it steps in a thread of its own. RuntimeError if somebody does.

    One that is dropped ends its thread and frees its engine, with a ResourceWarning. In a forked child every call is a
    RuntimeError.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._worker = Worker(engine)
        self._makers = ThreadPoolExecutor(2, "llada2-language")  # which has no thread until it is needed
        self._making: dict[tuple, Future] = {}  # languages, by what they are known by

    @property
    def _thread(self):
        return self._worker.thread

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.aclose()

    def __del__(self):
        worker = vars(self).get("_worker")
        if worker is not None and not worker.closed and worker.process == os.getpid():
            worker.stop()
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    async def stream(self, prompt_ids, params=DEFAULTS, *, drafts=False, wait=False, **options):
        """Events of a new request as they come, the last one "finish". Arguments and errors: Engine.add_request.

        drafts: whether "draft" events, the open block as it stands, are among them.
        wait: where too many requests wait, suspend the caller until there is room, the highest priority first, instead
            of raising QueueFull; TimeoutError if a deadline_s is over before that.
        Leaving the iteration, or cancelling its task, cancels the request.
        """
        with await self.open(prompt_ids, params, drafts=drafts, wait=wait, **options) as reading:
            async for event in reading:
                yield event

    async def open(
        self, prompt_ids, params=DEFAULTS, *, drafts=False, wait=False, until_end=False, form=None, arrived=None,
        **options,
    ):  # fmt: skip
        """The Reading of a new request, which the engine has taken when this returns. Arguments and errors: `stream`.

        until_end: its reader is woken once, at its end.
        form: what `prepare` has made of the same params, but for gen_length and seed, and options; None = not made yet.
        arrived: when it did, on the engine's clock, None = now.
        """
        check_params(params)
        for name, flag in (("drafts", drafts), ("wait", wait), ("until_end", until_end)):
            as_flag(name, flag)
        options, arrived = RequestOptions(**options), self.engine.clock() if arrived is None else arrived
        if form is None:
            form = await self.prepare(params, options, wait=wait, arrived=arrived)
        else:
            form = form.of(params)
        reading = Reading(self._worker, until_end)

        def open_request():
            request = self.engine.submit(prompt_ids, params, options, arrived, form)
            request.drafts, request.awaited = drafts, until_end
            reading.begin(request)

        try:
            call = self._send(open_request, Kind.ROOM if wait else Kind.REQUEST, options.priority)
            left = None if options.deadline_s is None else arrived + options.deadline_s - self.engine.clock()
            await _within(call, left if wait else None)
        except BaseException:
            reading.close()
            raise
        return reading

    async def prepare(self, params, options=DEFAULT_OPTIONS, *, wait=False, arrived=None) -> Form:
        """The form of the answers of requests with some DecodeParams and RequestOptions, for `open`. Where that takes
        its time, as with a new language, neither the engine nor the event loop waits, nor who wants another language.

        wait: where MAX_LANGUAGES are in the making, wait for one, instead of raising QueueFull.
        arrived: on the engine's clock, from where on a deadline_s counts, None = now.
        Raises what `open` does of it: ValueError, QueueFull, TimeoutError where the deadline is over.
        """
        self._worker.check_process()
        intake, automaton = self.engine.intake, None
        arrived = self.engine.clock() if arrived is None else arrived
        key, known = intake.known_as(params)
        if known:
            automaton = intake.language(params)
        else:
            while key not in self._making and len(self._making) >= MAX_LANGUAGES:
                if not wait:
                    raise QueueFull(f"{MAX_LANGUAGES} languages are being made, and so many may")
                with contextlib.suppress(ValueError):  # which is somebody else's
                    await self._made(next(iter(self._making.values())), options, arrived)
            automaton = await self._made(self._language(key, params), options, arrived)
        if isinstance(options.canvas, str):  # which has to be split into tokens
            return await asyncio.to_thread(intake.form, params, options, automaton)
        return intake.form(params, options, automaton)

    def _language(self, key, params):
        """The concurrent Future of a language, one for all who wait for it."""
        making = self._making.get(key)
        if making is None:
            try:
                making = self._making[key] = self._makers.submit(self.engine.intake.language, params)
            except RuntimeError:
                raise RuntimeError("the engine is closed") from None
            making.add_done_callback(lambda _: self._making.pop(key, None))
        return making

    async def _made(self, making, options, arrived):
        """The result of a concurrent Future, which others may wait for, too; TimeoutError if the deadline is over."""
        left = None if options.deadline_s is None else arrived + options.deadline_s - self.engine.clock()
        made = asyncio.wrap_future(making)
        made.add_done_callback(lambda one: one.cancelled() or one.exception())  # who asked for it may have left
        return await _within(asyncio.shield(made), left)

    async def generate(self, prompt_ids, params=DEFAULTS, *, n=None, wait=False, **options):
        """The RequestOutput of a new request; arguments as of `stream`.

        n: the list of so many outputs of one prompt, whose seed is mixed with their number; None: one output.
        """
        if n is None:
            return await self._generate(prompt_ids, params, wait, options)
        check_params(params)
        if as_int("n", n, 1, MAX_SAMPLES) > 1 and options.get("request_id") is not None:
            raise ValueError(f"request_id={options['request_id']!r:.80}: expected None for {n} requests")
        arrived = self.engine.clock()
        form = await self.prepare(params, RequestOptions(**options), wait=wait, arrived=arrived)
        known = {"form": form, "arrived": arrived}
        several = [self._generate(prompt_ids, sample(params, i), wait, options | known) for i in range(n)]
        tasks = [asyncio.ensure_future(one) for one in several]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(self, prompt_ids, params, wait, options):
        with await self.open(prompt_ids, params, wait=wait, until_end=True, **options) as reading:
            return await reading.output()

    @property
    def is_alive(self) -> bool:
        """It has neither been closed nor ended by a fault, in which its requests are cancelled."""
        return not self._worker.closed

    @property
    def room(self) -> int:
        """How many requests that come now need not be refused with QueueFull."""
        return self.engine.scheduler.room

    async def cancel(self, request_id) -> bool:
        """End a request; its stream gets the "finish" event. False if no such request is unfinished."""
        return await self._send(lambda: self.engine.cancel(request_id), Kind.REQUEST)

    async def call(self, function):
        """function(engine) in the engine's thread, between two steps; returns what it returns. So
        `await serving.call(Engine.pause)`, `resume`, `sleep`, `wake`, `weights_changed` and `update_weights`."""
        return await self._send(lambda: function(self.engine))

    def _send(self, function, kind=Kind.OTHER, priority=0.0):
        return asyncio.wrap_future(self._worker.send(function, kind, priority))

    def close(self):
        """Cancel all requests, and wait until the thread has ended."""
        self._stop()
        self._worker.join()

    async def aclose(self):
        """close(), without holding up the event loop."""
        self._stop()
        await asyncio.to_thread(self._worker.join)

    def _stop(self):
        self._worker.stop()
        self._makers.shutdown(wait=False, cancel_futures=True)


async def _within(future, seconds):
    """asyncio.wait_for, which before Python 3.12 forgets a cancellation that comes just when the future is done."""
    try:
        done, _ = await asyncio.wait([future], timeout=seconds)
    except asyncio.CancelledError:
        future.cancel()
        raise
    if not done:
        future.cancel()
        raise asyncio.TimeoutError
    if future.cancelled():
        raise RuntimeError("the engine is closed")
    return future.result()
