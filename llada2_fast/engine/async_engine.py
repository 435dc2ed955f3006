"""AsyncEngine: an Engine in a thread of its own, driven from asyncio.

Only that thread touches the engine: coroutines send it calls, which run between two steps, and read the events of
their requests from the handles. A reader that is slow misses drafts, never commits: an unread draft gives way to the
next, and what is committed is bounded by the request's budget.
"""

import asyncio
import queue
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import aclosing
from typing import NamedTuple

from .request import DEFAULTS, Request, check_params


class Call(NamedTuple):
    """function() for the engine's thread, its result for whoever waits for `future`."""

    future: Future
    function: object
    wait: bool = False  # until there is room in the engine's queue

    def run(self):
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.function())
            except BaseException as error:  # whatever a caller's function raises is that caller's
                self.future.set_exception(error)

    def refuse(self):
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(RuntimeError("the engine is closed"))


class AsyncEngine:
    """For `async with`, or closed by `aclose()`, which cancels what is not finished.

    engine: an Engine that nobody else uses from now on: it steps in a thread of its own.
    """

    def __init__(self, engine):
        self.engine = engine
        self._calls = queue.SimpleQueue()  # of Call, or None to stop
        self._waiting: deque[Call] = deque()
        self._readers: dict[Request, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="llada2-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.aclose()

    async def stream(self, prompt_ids, params=DEFAULTS, *, drafts=False, wait=False, **options):
        """Events of a new request as they come, the last one "finish". Arguments and errors: Engine.add_request.

        drafts: whether "draft" events, the open block as it stands, are among them.
        wait: where too many requests wait, suspend the caller until there is room instead of raising QueueFull.
        Leaving the iteration, or cancelling its task, cancels the request.
        """
        check_params(params)
        loop, news, opened = asyncio.get_running_loop(), asyncio.Event(), []

        def open_request():
            request = self.engine.add_request(prompt_ids, params, **options)
            request.drafts = drafts
            self._readers[request] = loop, news
            opened.append(request)

        try:
            await self._call(open_request, wait)
            while True:
                news.clear()
                while (event := opened[0].next_event()) is not None:
                    yield event
                    if event.kind == "finish":
                        return
                if self._closed:
                    raise RuntimeError("the engine's thread has ended before the request; its traceback says why")
                await news.wait()
        finally:
            self._send(Call(Future(), lambda: [self._leave(request) for request in opened]))

    async def generate(self, prompt_ids, params=DEFAULTS, **options):
        """The RequestOutput of a new request; arguments as of `stream`."""
        async with aclosing(self.stream(prompt_ids, params, **options)) as events:
            async for event in events:
                if event.output is not None:
                    return event.output

    async def cancel(self, request_id):
        """End a request; its stream gets the "finish" event. False if no such request is unfinished."""
        return await self._call(lambda: self.engine.cancel(request_id))

    async def call(self, function):
        """function(engine) in the engine's thread, between two steps; returns what it returns."""
        return await self._call(lambda: function(self.engine))

    async def aclose(self):
        """Cancel all requests and end the thread."""
        self._send(None)
        await asyncio.to_thread(self._thread.join)

    async def _call(self, function, wait=False):
        call = Call(Future(), function, wait)
        if not self._send(call):
            raise RuntimeError("the engine is closed")
        return await asyncio.wrap_future(call.future)

    def _send(self, call):
        with self._lock:
            if not self._closed:
                self._calls.put(call)
            return not self._closed

    def _leave(self, request):
        self._readers.pop(request, None)
        if self.engine.requests.get(request.request_id) is request:
            self.engine.cancel(request.request_id)

    def _work(self):
        try:
            while self._take_calls():
                if self.engine.has_work:
                    self.engine.step()
                self._tell_readers()
        finally:
            with self._lock:
                self._closed = True
            while not self._calls.empty():
                self._waiting.append(self._calls.get())
            for call in filter(None, self._waiting):
                call.refuse()
            self._tell_readers(everybody=True)

    def _take_calls(self):
        """Run what has come in, and wait for it while there is nothing else to do. False: it is time to stop."""
        scheduler = self.engine.scheduler
        while self._waiting and scheduler.has_room:
            self._waiting.popleft().run()
        while not self._calls.empty() or not (self.engine.has_work or self._waiting):
            if self._calls.empty():
                self._tell_readers()  # of what calls have ended, before the thread sleeps
            call = self._calls.get()
            if call is None:  # in one go: who waits for room must not be let in by the requests that are cancelled
                for name in list(self.engine.requests):
                    self.engine.cancel(name)
                return False
            if call.wait and (self._waiting or not scheduler.has_room):
                self._waiting.append(call)
            else:
                call.run()
        return True

    def _tell_readers(self, everybody=False):
        for request, (loop, news) in list(self._readers.items()):
            if loop.is_closed():
                self._leave(request)
            elif everybody or request.events or request.draft:
                loop.call_soon_threadsafe(news.set)
