"""R9: ten times what the server takes. It says so at once, keeps what it has, and its streams keep their speed."""

import asyncio
import json
import random
import time
from collections import Counter
from typing import NamedTuple

from .gate import Verdict, median, p99, tally
from .wire import PATIENCE_S, Connection, Response, ask, idle_after

PLACES, QUEUE = 4, 4
OPTIONS = ("--max-num-seqs", PLACES, "--max-queue", QUEUE)
CLIENTS = 10 * (PLACES + QUEUE)
REFUSAL_S, SPEED = 0.05, 0.8
SETTLE_S, WINDOW_S = 0.25, 1.0
IDLE_S = 3.0  # a connection that rests for longer is not used again: the server is about to close it
PATH = "/v1/chat/completions"
STREAM = {"max_tokens": 2048, "ignore_eos": True, "threshold": 2.0, "stream": True, "draft": True}  # a token a step
ASKED = {"messages": [{"role": "user", "content": "Add 847 and 96."}], "max_tokens": 64}


class Load:
    """Clients that ask while there is no room and do what Retry-After says, each on a connection that it keeps, as the
    usual ones do; nobody begins to ask while it is `off`.

    refused: seconds until a 429 was there, of those who came one by one; burst: of those who came all at once. late: by
    how many seconds this process's own event loop came too late for a timer.
    """

    def __init__(self, port, right):
        self.port, self.right, self.random = port, right, random.Random(0)
        self.off, self.over = True, False
        self.statuses, self.wrong, self.refused, self.burst, self.late = Counter(), [], [], [], []

    async def run(self):
        """Until it is over, and what the server has taken by then is answered."""
        ticking = asyncio.ensure_future(self._tick())
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))
        ticking.cancel()

    async def all_at_once(self):
        connections = await asyncio.gather(*(Connection.open(self.port) for _ in range(CLIENTS)))
        await asyncio.gather(*(self._ask(connection, self.burst) for connection in connections))
        for connection in connections:
            connection.cut()

    async def _client(self):
        connection, used = await Connection.open(self.port), time.monotonic()
        while not self.over:
            if self.off:
                await asyncio.sleep(self.random.random())
                continue
            if time.monotonic() > used + IDLE_S:
                connection.cut()
                connection = await Connection.open(self.port)
            delay = await self._ask(connection, self.refused)
            used = time.monotonic()
            await asyncio.sleep(delay)
        connection.cut()

    async def _ask(self, connection, times):
        """Seconds to wait before the next try."""
        begun = time.perf_counter()
        connection.send("POST", PATH, json.dumps(ASKED).encode())
        response = await asyncio.wait_for(connection.response(), PATIENCE_S)
        self.statuses[response.status] += 1
        if response.status == 429:
            times.append(time.perf_counter() - begun)
            return self._retry_s(response)
        if response.status == 200 and response.json()["choices"] != self.right:
            self.wrong.append(f"an answer is not right: {response.body[:300]!r}")
        return self.random.random()

    def _retry_s(self, response: Response):
        told = response.headers.get("retry-after", "")
        if not told.isdigit() or response.json()["error"]["type"] != "rate_limit_error":
            self.wrong.append(f"a 429 without its words: {response.headers} {response.body[:200]!r}")
            return 1.0
        return int(told) * self.random.uniform(0.5, 1.5)

    async def _tick(self):
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.01)
            self.late.append(time.perf_counter() - begun - 0.01)


async def _stream(port, number, steps: Counter):
    """A stream for as long as it is not cancelled, again and again; its steps are counted."""
    body = STREAM | {"messages": [{"role": "user", "content": f"Tell a story about goat {number}."}]}
    while True:
        connection = await Connection.open(port)
        try:
            connection.send("POST", PATH, json.dumps(body).encode())
            status, headers = await connection.head()
            assert status == 200, status
            async for part in connection.parts(headers):
                steps[number] += part.count(b'"draft":{')
        finally:
            connection.cut()


class Window(NamedTuple):
    """steps: of all streams; cpu_s: of the server."""

    steps: int
    cpu_s: float


async def _windows(server, load: Load, steps: Counter, count: int) -> tuple[list[Window], list[Window]]:
    """So many windows each without and with the load, in turn, so that a slow spell of the machine hits both."""
    without, loaded = [], []
    for _ in range(count):
        for seen, off in ((without, True), (loaded, False)):
            load.off = off
            await asyncio.sleep(SETTLE_S)
            before, cpu_s = steps.total(), server.usage().cpu_s
            await asyncio.sleep(WINDOW_S)
            seen.append(Window(steps.total() - before, server.usage().cpu_s - cpu_s))
    return without, loaded


async def overload(server, windows: int) -> Verdict:
    """Streams in all places, and ten times as many clients as places and queue hold now and then; in the end all of
    these at the same moment. server: with OPTIONS."""
    right = (await ask(server.port, "POST", PATH, ASKED)).json()["choices"]
    load, steps = Load(server.port, right), Counter()
    streams = [asyncio.ensure_future(_stream(server.port, number, steps)) for number in range(PLACES)]
    while len(steps) < PLACES:
        await asyncio.sleep(0.05)
    loading = asyncio.ensure_future(load.run())
    without, loaded = await _windows(server, load, steps, windows)
    load.over = True
    for task in streams:
        task.cancel()
    ends = await asyncio.gather(*streams, return_exceptions=True)
    await loading
    inside = [line["ms"] / 1e3 for line in server.told("request") if line["status"] == 429]
    await load.all_at_once()
    drained = await idle_after(server.port, 5.0)
    kept = median([one.steps / max(1, other.steps) for one, other in zip(loaded, without, strict=True)])
    busy = median([one.steps / max(0.01, one.cpu_s) for one in loaded])
    cost, refusal = busy / median([one.steps / max(0.01, one.cpu_s) for one in without]), p99(load.refused)
    figures = {
        "statuses": load.statuses, "kept": kept, "kept_a_cpu_second": cost, "429_p50_ms": 1e3 * median(load.refused),
        "429_p99_ms": 1e3 * refusal, "429_p99_ms_in_the_server": 1e3 * p99(inside),
        "429_p99_ms_all_at_once": 1e3 * p99(load.burst), "client_late_p99_ms": 1e3 * p99(load.late),
        "steps_without": [one.steps for one in without], "steps_loaded": [one.steps for one in loaded],
    }  # fmt: skip
    verdict = Verdict(
        "R9", f"{CLIENTS} clients for {PLACES} places and a queue of {QUEUE}",
        f"{tally(load.statuses)}; p99 of a 429 {1e3 * refusal:.0f} ms (in the server {1e3 * p99(inside):.0f} ms, the "
        f"client itself was {1e3 * p99(load.late):.0f} ms late); streams keep {100 * kept:.0f} % ({100 * cost:.0f} % a "
        "CPU second)",
        f"only 200 and 429, {1e3 * REFUSAL_S:.0f} ms, {100 * SPEED:.0f} %", figures, load.wrong,
    )  # fmt: skip
    lost = [end for end in ends if not isinstance(end, asyncio.CancelledError)]
    verdict.demand(not lost, f"streams have ended: {lost}")
    verdict.demand(set(load.statuses) == {200, 429}, f"statuses {dict(load.statuses)}")
    verdict.demand(refusal <= REFUSAL_S, f"p99 of a 429: {1e3 * refusal:.0f} ms")
    verdict.demand(kept >= SPEED, f"running streams keep {100 * kept:.0f} % of their speed")
    verdict.demand_idle(server, drained)
    return verdict
