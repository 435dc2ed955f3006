"""The thread that an AsyncEngine drives its engine in: calls between two steps, news to readers."""

import asyncio
import atexit
import contextlib
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
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .request import Request

CALLS_PER_ROUND = 2  # at most: answering them costs their threads time, too, which a step does not get
SORTED_PER_ROUND = 256  # calls at most that are put in their places, which costs little
ATTEMPTS = 3  # steps in a row that may raise: the engine has recovered from everything else
MAX_SLEEP_S = 3600.0
EXIT_S = 60.0  # how long the interpreter's exit waits for a step
_logger = logging.getLogger(__name__)
_ALL: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_THREADS: set[threading.Thread] = set()  # that may not be over yet, whatever has become of their workers


class StopIterationRaised(RuntimeError):
    """A caller's function has raised StopIteration."""


class Kind(Enum):
    """Calls that take turns: nobody waits for those of another kind."""

    REQUEST = "request"  # a new one, or its end
    ROOM = "room"  # a new request that waits until there is room in the engine's queue
    OTHER = "other"


class Call(NamedTuple):
    """function() for the engine's thread, its result for whoever waits for `future`.

    order: its place among those that wait for room.
    """

    future: Future
    function: Callable
    kind: Kind
    order: tuple[float, int]

    def run(self) -> bool:
        """Whether somebody still wanted it."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            self.future.set_result(self.function())
        except StopIteration as error:  # which no coroutine can raise
            self.future.set_exception(StopIterationRaised(*error.args))
        except BaseException as error:  # whatever a caller's function raises is that caller's
            self.future.set_exception(error)
        return True

    def refuse(self, why="the engine is closed"):
        if self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(RuntimeError(why))


@dataclass(eq=False)
class Reader:
    """Who is told of a request: `news` is set in its event loop.

    until_end: only when the request has ended.
    waking: its loop has been asked to, and has not done it yet.
    """

    loop: asyncio.AbstractEventLoop
    news: asyncio.Event
    until_end: bool
    waking: bool = False


class Worker:
    """Steps an engine while it has work, and sleeps while it has none. Between two steps it runs at most
    CALLS_PER_ROUND calls, kind by kind, so that no number of callers stops what runs; new requests for which a place is
    free do not count among them.

    engine: an Engine that nobody else uses. RuntimeError if somebody does.
    """

    def __init__(self, engine):
        self.engine, self.process = engine, os.getpid()
        self.readers: dict[Request, Reader] = {}
        self.closed = self.ended = False  # to calls; and nothing will be told any more
        self._calls = queue.SimpleQueue()  # of Call as they come, None to wake the thread
        self._ready = {Kind.REQUEST: deque(), Kind.OTHER: deque()}
        self._waiting: list[tuple[tuple[float, int], Call]] = []  # a heap
        self._turns = itertools.cycle(Kind)
        self._call: Call | None = None  # the one that is being run
        self._leaving: deque[list[Request]] = deque()  # whose readers have gone
        self._numbers = itertools.count()
        self._lock, self._stopping = threading.Lock(), False
        self._num_gone = 0  # callers who have left since those that waited for room were looked through
        self._look_at = 0.0  # when to look for event loops that are closed
        begun = queue.SimpleQueue()  # None when the thread has the engine, else why it cannot
        self.thread = threading.Thread(target=self._run, args=(begun,), name="llada2-engine", daemon=True)
        _ALL.add(self)
        _THREADS.difference_update([thread for thread in _THREADS if thread.ident and not thread.is_alive()])
        _THREADS.add(self.thread)
        try:
            self.thread.start()
            refused = begun.get()
        except BaseException:
            self.stop()
            raise
        if refused is not None:
            raise refused

    # for callers, in any thread

    def send(self, function, kind: Kind = Kind.OTHER, priority: float = 0.0) -> Future:
        """function() between two steps. RuntimeError if the thread has ended, or is another process's.

        priority: of calls that wait for room, the highest comes first.
        """
        self.check_process()
        order = self.engine.clock() - priority * self.engine.config.priority_s, next(self._numbers)
        call = Call(Future(), function, kind, order)
        with self._lock:
            if self.closed:
                raise RuntimeError("the engine is closed")
            self._calls.put(call)
        return call.future

    def check_process(self):
        """RuntimeError in another process than its own."""
        if os.getpid() != self.process:
            raise RuntimeError(
                f"this AsyncEngine belongs to process {self.process}, and its thread is not in this one, a fork of it: "
                "make Engine and AsyncEngine where they are used"
            )

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

    def join(self):
        """Wait until it has ended. RuntimeError in the thread itself."""
        if os.getpid() == self.process:
            self.thread.join()

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
                self.engine.step()
                self._tell(self.engine.told)
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
        if call is not None and not call.future.done():
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
            self._sort(self._calls.get())
        for call in (*self._ready[Kind.REQUEST], *self._ready[Kind.OTHER], *(call for _, call in self._waiting)):
            call.refuse()
        self.ended = True
        self._tell(list(self.readers), everybody=True)

    def _take_calls(self):
        """Run what has come in, and sleep while there is nothing to do at all."""
        self._sort_calls()
        taken, places = 0, self.engine.config.max_num_seqs
        while taken < CALLS_PER_ROUND and not self._stopping:
            self._call = self._next()
            if self._call is None:
                break
            held = len(self.engine.requests)
            ran = self._call.run()
            seated = held < min(places, len(self.engine.requests))
            self._call = None
            taken += ran and not seated

    def _sort_calls(self):
        """Put what has come in where it waits for its turn; sleep until something comes if there is nothing to do."""
        if self._is_idle():
            due = self.engine.next_deadline()
            wait = MAX_SLEEP_S if due is None else min(max(0.0, due - self.engine.clock()), MAX_SLEEP_S)
            with contextlib.suppress(queue.Empty):
                self._sort(self._calls.get(timeout=wait))
        for _ in range(min(self._calls.qsize(), SORTED_PER_ROUND)):
            self._sort(self._calls.get())
        for _ in range(min(len(self._leaving), SORTED_PER_ROUND)):
            self._forget(self._leaving.popleft())
        if self._leaving:
            self._calls.put(None)  # not to sleep before they have gone

    def _is_idle(self):
        """Neither a step nor a call that has come can do anything."""
        waits = self._waiting and self.engine.scheduler.has_room
        return self.engine.idle and self._calls.empty() and not (any(self._ready.values()) or waits)

    def _sort(self, call):
        if call is not None and call.kind is Kind.ROOM:
            heapq.heappush(self._waiting, (call.order, call))
        elif call is not None:
            self._ready[call.kind].append(call)

    def _next(self):
        """The next call, kind by kind; None if none can be run now."""
        for kind in itertools.islice(self._turns, len(Kind)):
            if kind is not Kind.ROOM:
                if self._ready[kind]:
                    return self._ready[kind].popleft()
            elif self._waiting and self.engine.scheduler.has_room:
                return heapq.heappop(self._waiting)[1]
        return None

    def _forget(self, requests):
        """Readers have gone, and maybe calls that waited for room."""
        for request in requests:
            self.readers.pop(request, None)
            if self.engine.requests.get(request.request_id) is request:
                self.engine.cancel(request.request_id)
        if not requests:
            self._num_gone += 1
            if self._num_gone > len(self._waiting) // 2:
                self._waiting = [entry for entry in self._waiting if not entry[1].future.cancelled()]
                heapq.heapify(self._waiting)
                self._num_gone = 0

    def _tell(self, requests, everybody=False):
        """Wake the readers of these requests, each event loop once."""
        loops = {}
        for request in requests:
            reader = self.readers.get(request)
            wanted = reader is not None and not (reader.until_end and request.output is None)
            if (wanted or (everybody and reader is not None)) and not reader.waking:
                loops.setdefault(reader.loop, []).append(reader)
        for loop, readers in loops.items():
            for reader in readers:
                reader.waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: see _drop_closed
                loop.call_soon_threadsafe(_wake, readers)
        self._drop_closed()

    def _drop_closed(self):
        """Now and then: end requests whose event loop has been closed, so that nobody can read them any more."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + 0.5
            for request in [request for request, reader in self.readers.items() if reader.loop.is_closed()]:
                self._forget([request])


def _wake(readers):
    for reader in readers:
        reader.waking = False
        reader.news.set()


@atexit.register
def _stop_all():
    """A thread that is in a step while the interpreter goes would abort the process."""
    for worker in _ALL:
        worker.stop()
    end = time.monotonic() + EXIT_S
    for thread in _THREADS:
        if thread.is_alive():
            thread.join(max(0.0, end - time.monotonic()))
