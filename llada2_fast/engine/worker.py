"""The thread that an AsyncEngine drives its engine in: calls between two steps, news to readers."""

import asyncio
import atexit
import heapq
import itertools
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from .request import Request

CALLS_PER_ROUND = 2  # at most: answering them costs their threads time, too, which a step does not get
ATTEMPTS = 3  # steps in a row that may raise: the engine has recovered from everything else
MAX_SLEEP_S = 3600.0
EXIT_S = 60.0  # how long the interpreter's exit waits for a step
_logger = logging.getLogger(__name__)
_ALL: "weakref.WeakSet[Worker]" = weakref.WeakSet()


class StopIterationRaised(RuntimeError):
    """A caller's function has raised StopIteration."""


class Call(NamedTuple):
    """function() for the engine's thread, its result for whoever waits for `future`.

    order: its place among the calls that wait until there is room in the engine's queue; None: it does not wait.
    """

    future: Future
    function: Callable
    order: tuple[float, int] | None = None

    def run(self):
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.function())
            except StopIteration as error:  # which no coroutine can raise
                self.future.set_exception(StopIterationRaised(*error.args))
            except BaseException as error:  # whatever a caller's function raises is that caller's
                self.future.set_exception(error)

    def refuse(self, why="the engine is closed"):
        if self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(RuntimeError(why))


class Reader(NamedTuple):
    """Who is told of a request: `news` is set in its event loop. until_end: only when the request has ended."""

    loop: asyncio.AbstractEventLoop
    news: asyncio.Event
    until_end: bool


class Worker:
    """Steps an engine while it has work, and sleeps while it has none. Between two steps it runs at most
    CALLS_PER_ROUND calls, so that no number of callers stops what runs; new requests for which a place is free do not
    count among them.

    engine: an Engine that nobody else uses. RuntimeError if somebody does.
    """

    def __init__(self, engine):
        self.engine, self.process = engine, os.getpid()
        self.readers: dict[Request, Reader] = {}
        self.closed = self.ended = False  # to calls; and nothing will be told any more
        self._calls = queue.SimpleQueue()  # of Call, None to wake the thread
        self._waiting: list[tuple[tuple[float, int], Call]] = []  # a heap
        self._call: Call | None = None  # the one that is being run
        self._leaving: deque[list[Request]] = deque()  # whose readers have gone
        self._numbers = itertools.count()
        self._lock, self._stopping = threading.Lock(), False
        begun = queue.SimpleQueue()  # None when the thread has the engine, else why it cannot
        self.thread = threading.Thread(target=self._run, args=(begun,), name="llada2-engine", daemon=True)
        self.thread.start()
        refused = begun.get()
        if refused is not None:
            raise refused
        _ALL.add(self)

    # for callers, in any thread

    def send(self, function, priority: float | None = None) -> Future:
        """function() between two steps. RuntimeError if the thread has ended, or is another process's.

        priority: it waits for room in the engine's queue, before those of a lower one; None: it does not wait.
        """
        if os.getpid() != self.process:
            raise RuntimeError(
                f"this AsyncEngine belongs to process {self.process}, and its thread is not in this one, a fork of it: "
                "make Engine and AsyncEngine where they are used"
            )
        order = None
        if priority is not None:
            order = self.engine.clock() - priority * self.engine.config.priority_s, next(self._numbers)
        call = Call(Future(), function, order)
        with self._lock:
            if self.closed:
                raise RuntimeError("the engine is closed")
            self._calls.put(call)
        return call.future

    def leave(self, requests: list[Request]):
        """Nobody reads these requests any more, nor those that are put into the list by calls sent before."""
        if os.getpid() == self.process:
            self._leaving.append(requests)
            self._calls.put(None)

    def stop(self):
        """End the thread after the step that it is in; unfinished requests are cancelled."""
        if os.getpid() == self.process:
            self._stopping = True
            self._calls.put(None)

    def join(self, timeout: float | None = None):
        """Wait until it has ended. RuntimeError in the thread itself."""
        if os.getpid() == self.process:
            self.thread.join(timeout)

    # in the thread

    def _run(self, begun):
        try:
            self.engine.check_integrity()
        except BaseException as error:  # it is somebody else's, or broken
            self.closed = True
            begun.put(error)
            return
        with self.engine.owned():
            begun.put(None)
            try:
                self._serve()
            except BaseException:
                _logger.exception("the engine's thread ends")
            finally:
                self._end()

    def _serve(self):
        failed = 0
        while not self._stopping:
            try:
                self._take_calls()
                if self.engine.has_work:
                    self.engine.step()
                self._tell()
                failed = 0
            except Exception:
                failed += 1
                if failed == ATTEMPTS:
                    raise
                _logger.exception("what should have mended a fault has failed: it is tried again")
                self._refuse()

    def _refuse(self):
        """A call that was not run to its end gets an answer."""
        call, self._call = self._call, None
        if isinstance(call, Call) and not call.future.done():
            call.refuse("a fault of the engine's, which its log tells of, came before the call")

    def _end(self):
        with self._lock:
            self.closed = True
        self._refuse()
        for name in list(self.engine.requests):  # before anybody who waits for room is let in
            try:
                self.engine.cancel(name)
            except Exception:
                _logger.exception("request %s is left as it is", name)
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call.refuse()
        for _, call in self._waiting:
            call.refuse()
        self.ended = True
        self._tell(everybody=True)

    def _take_calls(self):
        """Run what has come in, and sleep while there is nothing else to do."""
        taken = 0
        while taken < CALLS_PER_ROUND and not self._stopping:
            while self._leaving:
                self._forget(self._leaving.popleft())
            scheduler = self.engine.scheduler
            has_seat = len(self.engine.requests) < self.engine.config.max_num_seqs
            if self._waiting and scheduler.has_room:
                call = self._call = heapq.heappop(self._waiting)[1]
            else:
                call = self._call = self._next()
                if call is _NOTHING:
                    return
                if call is None:
                    continue
            if call.order is not None and not scheduler.has_room:
                heapq.heappush(self._waiting, (call.order, call))
            else:
                before = len(self.engine.requests)
                call.run()
                taken -= has_seat and len(self.engine.requests) > before
            self._call, taken = None, taken + 1

    def _next(self):
        """The next call, None for a mere wake-up, _NOTHING where a step comes first."""
        engine = self.engine
        try:
            if not engine.idle:
                return self._calls.get_nowait()
            if self._calls.empty():
                self._tell()  # of what calls have ended, before the thread sleeps
            due = engine.next_deadline()
            return self._calls.get(timeout=None if due is None else min(max(0.0, due - engine.clock()), MAX_SLEEP_S))
        except queue.Empty:
            return _NOTHING

    def _forget(self, requests):
        for request in requests:
            self.readers.pop(request, None)
            if self.engine.requests.get(request.request_id) is request:
                self.engine.cancel(request.request_id)

    def _tell(self, everybody=False):
        """Wake the readers there is something for, each event loop once."""
        loops = {}
        for request, reader in self.readers.items():
            told = request.output is not None if reader.until_end else request.has_news
            if told or everybody:
                loops.setdefault(reader.loop, []).append((request, reader.news))
        for loop, told in loops.items():
            try:
                loop.call_soon_threadsafe(_wake, [news for _, news in told])
            except RuntimeError:  # the loop is closed: nobody reads in it any more
                self._forget([request for request, _ in told])


_NOTHING = object()


def _wake(news):
    for event in news:
        event.set()


@atexit.register
def _stop_all():
    """A thread that is in a step while the interpreter goes would abort the process."""
    workers = [worker for worker in _ALL if worker.process == os.getpid()]
    for worker in workers:
        worker.stop()
    end = time.monotonic() + EXIT_S
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
