"""AsyncEngine: an Engine in a thread of its own, driven from asyncio.

Only that thread touches the engine: coroutines send it calls, which run between two steps, and read the events of
their requests from the handles. A reader that is slow misses drafts, never commits: an unread draft gives way to the
next, and what is committed is bounded by the request's budget.
"""

import asyncio
import os
import warnings

from ..config import MAX_SAMPLES, RequestOptions, as_flag, as_int
from .engine import Engine
from .intake import sample
from .request import DEFAULTS, check_params
from .worker import Kind, Reader, Worker


class AsyncEngine:
    """For `async with` or `with`, or closed by `aclose()` or `close()`, which cancel what is not finished.

    engine: an Engine that nobody else uses from now on: it steps in a thread of its own. RuntimeError if somebody does.

    One that is dropped ends its thread and frees its engine, with a ResourceWarning. In a forked child every call is a
    RuntimeError.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._worker = Worker(engine)

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
        as_flag("drafts", drafts)
        opened = []
        try:
            request, news = await self._open(opened, prompt_ids, params, options, wait, drafts)
            while True:
                news.clear()
                while (event := request.next_event()) is not None:
                    yield event
                    if event.kind == "finish":
                        return
                await self._wait(news, lambda: request.has_news)
        finally:
            self._worker.leave(opened)

    async def generate(self, prompt_ids, params=DEFAULTS, *, n=None, wait=False, **options):
        """The RequestOutput of a new request; arguments as of `stream`.

        n: the list of so many outputs of one prompt, whose seed is mixed with their number; None: one output.
        """
        if n is None:
            return await self._generate(prompt_ids, params, wait, options)
        check_params(params)
        if as_int("n", n, 1, MAX_SAMPLES) > 1 and options.get("request_id") is not None:
            raise ValueError(f"request_id={options['request_id']!r:.80}: expected None for {n} requests")
        several = [self._generate(prompt_ids, sample(params, i), wait, options) for i in range(n)]
        tasks = [asyncio.ensure_future(one) for one in several]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(self, prompt_ids, params, wait, options):
        opened = []
        try:
            request, news = await self._open(opened, prompt_ids, params, options, wait, until_end=True)
            while request.output is None:
                news.clear()
                await self._wait(news, lambda: request.output is not None)
            return request.output
        finally:
            self._worker.leave(opened)

    async def _open(self, opened, prompt_ids, params, options, wait, drafts=False, until_end=False):
        """(handle, its news) of a new request, which is in `opened` from the moment on in which it exists."""
        check_params(params)
        as_flag("wait", wait)
        options, arrived = RequestOptions(**options), self.engine.clock()
        reader = Reader(asyncio.get_running_loop(), asyncio.Event(), until_end)

        def open_request():
            request = self.engine.submit(prompt_ids, params, options, arrived)
            request.drafts, request.awaited = drafts, until_end
            self._worker.readers[request] = reader
            opened.append(request)

        call = self._call(open_request, Kind.ROOM if wait else Kind.REQUEST, options.priority)
        await asyncio.wait_for(call, options.deadline_s if wait else None)
        return opened[0], reader.news

    async def _wait(self, news, is_told):
        ended = self._worker.ended  # looked at before the log: what has been told until then is there
        if not is_told():
            if ended:
                raise RuntimeError("the engine's thread has ended before the request; its log says why")
            await news.wait()

    async def cancel(self, request_id) -> bool:
        """End a request; its stream gets the "finish" event. False if no such request is unfinished."""
        return await self._call(lambda: self.engine.cancel(request_id), Kind.REQUEST)

    async def call(self, function):
        """function(engine) in the engine's thread, between two steps; returns what it returns. So
        `await serving.call(Engine.pause)`, `resume`, `sleep`, `wake`, `weights_changed` and `update_weights`."""
        return await self._call(lambda: function(self.engine))

    async def _call(self, function, kind=Kind.OTHER, priority=0.0):
        return await asyncio.wrap_future(self._worker.send(function, kind, priority))

    def close(self):
        """Cancel all requests, and wait until the thread has ended."""
        self._worker.stop()
        self._worker.join()

    async def aclose(self):
        """close(), without holding up the event loop."""
        self._worker.stop()
        await asyncio.to_thread(self._worker.join)
