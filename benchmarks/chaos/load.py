"""R9: ten times what the server takes. It says so at once, keeps what it has taken, and its streams keep their speed."""

import asyncio
import json
import random
import time
from collections import Counter

from .gate import Verdict, median, p99
from .wire import Connection, Response, ask, idle_after

PLACES, QUEUE = 4, 4
OPTIONS = ("--max-num-seqs", PLACES, "--max-queue", QUEUE)
CLIENTS = 10 * (PLACES + QUEUE)
REFUSAL_S, SPEED = 0.05, 0.8
PATH = "/v1/chat/completions"
STREAM = {"max_tokens": 320, "ignore_eos": True, "threshold": 2.0, "stream": True, "logprobs": True}  # a token a step
ASKED = {"messages": [{"role": "user", "content": "Add 847 and 96."}], "max_tokens": 64}


class Load:
    """Who asks while there is no room, as a client that does what Retry-After says.

    refused: seconds until a 429 was there, of those that came one by one and of a burst. late: by how much this
    process's own event loop came too late for a timer, all of it in seconds.
    """

    def __init__(self, port, seed=0):
        self.port, self.random = port, random.Random(seed)
        self.statuses, self.wrong, self.refused, self.burst, self.late = Counter(), [], [], [], []
        self.right = None

    async def ask(self, times):
        """Seconds to wait before the next try."""
        begun = time.perf_counter()
        response = await ask(self.port, "POST", PATH, ASKED)
        self.statuses[response.status] += 1
        if response.status == 429:
            times.append(time.perf_counter() - begun)
            return self._retry_s(response)
        if response.status == 200 and response.json()["choices"] != self.right:
            self.wrong.append(f"an answer is not right: {response.body[:300]!r}")
        return 0.0

    def _retry_s(self, response: Response):
        told = response.headers.get("retry-after", "")
        if not told.isdigit() or response.json()["error"]["type"] != "rate_limit_error":
            self.wrong.append(f"a 429 without its words: {response.headers} {response.body[:200]!r}")
            return 1.0
        return int(told) * self.random.uniform(0.5, 1.5)

    async def run(self, over: asyncio.Event):
        """Until it is over, and what the server has taken by then is answered."""
        ticking = asyncio.ensure_future(self._tick())
        await asyncio.gather(*(self._client(over) for _ in range(CLIENTS)))
        ticking.cancel()

    async def all_at_once(self):
        await asyncio.gather(*(self.ask(self.burst) for _ in range(CLIENTS)))

    async def _client(self, over):
        delay = self.random.random()
        while not over.is_set():
            try:
                await asyncio.wait_for(over.wait(), delay)
            except asyncio.TimeoutError:
                delay = await self.ask(self.refused)

    async def _tick(self):
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.01)
            self.late.append(time.perf_counter() - begun - 0.01)


async def _stream(port, number, runs: asyncio.Event) -> float:
    """Seconds from the first block of a stream to its last."""
    connection = await Connection.open(port)
    body = STREAM | {"messages": [{"role": "user", "content": f"Tell a story about goat {number}."}]}
    connection.send("POST", PATH, json.dumps(body).encode())
    _, headers = await connection.head()
    times = []
    async for part in connection.parts(headers):
        if b'"content":[{' in part:  # log-probabilities: every block has them, whether it shows text or not
            times.append(time.perf_counter())
            runs.set()
    connection.cut()
    return times[-1] - times[0]


async def _measure(port, load: Load | None) -> float:
    """Seconds that streams in all places take, with as much load as there is."""
    running, over = [asyncio.Event() for _ in range(PLACES)], asyncio.Event()
    streams = asyncio.gather(*(_stream(port, number, runs) for number, runs in enumerate(running)))
    await asyncio.gather(*(runs.wait() for runs in running))
    loading = asyncio.ensure_future(load.run(over)) if load else None
    seconds = sum(await streams)
    over.set()
    if loading:
        await loading
    return seconds


async def overload(server, rounds: int = 3) -> Verdict:
    """Streams in all places, alone and with ten times as many clients as places and queue hold, in turn; and then all
    of these at the same moment. server: with OPTIONS."""
    load, alone, loaded = Load(server.port), [], []
    load.right = (await ask(server.port, "POST", PATH, ASKED)).json()["choices"]
    await _measure(server.port, None)  # a warm-up
    for number in range(rounds):
        for seconds, own in ((alone, None), (loaded, load))[:: 1 if number % 2 else -1]:
            seconds.append(await _measure(server.port, own))
    await load.all_at_once()
    drained = await idle_after(server.port, 5.0)
    kept, refusal = sum(alone) / sum(loaded), p99(load.refused)
    inside = [line["ms"] / 1e3 for line in server.told("request") if line["status"] == 429]
    figures = {
        "statuses": load.statuses, "kept": kept, "429_p50_ms": 1e3 * median(load.refused), "429_p99_ms": 1e3 * refusal,
        "429_p99_ms_in_the_server": 1e3 * p99(inside), "429_p99_ms_all_at_once": 1e3 * p99(load.burst),
        "client_late_p99_ms": 1e3 * p99(load.late), "alone_s": alone, "loaded_s": loaded,
    }  # fmt: skip
    told = ", ".join(f"{count} x {status}" for status, count in sorted(load.statuses.items()))
    verdict = Verdict(
        "R9", f"{CLIENTS} clients for {PLACES} places and a queue of {QUEUE}",
        f"{told}; p99 of a 429 {1e3 * refusal:.0f} ms (in the server {1e3 * p99(inside):.0f} ms, the client itself was "
        f"{1e3 * p99(load.late):.0f} ms late); streams keep {100 * kept:.0f} %",
        f"only 200 and 429, {1e3 * REFUSAL_S:.0f} ms, {100 * SPEED:.0f} %", figures, load.wrong,
    )  # fmt: skip
    verdict.demand(set(load.statuses) == {200, 429}, f"statuses {dict(load.statuses)}")
    verdict.demand(refusal <= REFUSAL_S, f"p99 of a 429: {1e3 * refusal:.0f} ms")
    verdict.demand(kept >= SPEED, f"running streams keep {100 * kept:.0f} % of their speed")
    verdict.demand(drained is not None and server.lives, "rows or pages are left, or the server has ended")
    return verdict
