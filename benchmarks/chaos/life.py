"""R6, R16: a server that is killed comes back as it was; one that is asked to end lets its streams end."""

import asyncio
import json
import random
import time
from contextlib import ExitStack

from .gate import Verdict, median
from .process import started
from .wire import Connection, Response, ask

HEALTHY_S = 25.0
TOLD_S, EXIT_S = 1.0, 10.0  # beside the grace: for the last stream to be told, and for the process to end
PATH = "/v1/chat/completions"
LOAD = {
    "messages": [{"role": "user", "content": "Tell a story about Max the goat near the lake."}], "max_tokens": 256,
    "ignore_eos": True, "threshold": 2.0, "stream": True,
}  # fmt: skip
FIRST = {"messages": [{"role": "user", "content": "Add 847 and 96."}], "max_tokens": 64, "logprobs": True}


async def kills(server, count: int, clients: int = 8) -> Verdict:
    """kill -9 under load and a start at the same port, so many times. The servers that it starts, it ends."""
    rng, seconds, wrong = random.Random(0), [], []

    async def client(port):
        while True:
            await ask(port, "POST", PATH, LOAD)  # ends with an exception, as the server does

    right = (await ask(server.port, "POST", PATH, FIRST)).json()["choices"]
    with ExitStack() as servers:
        for number in range(count):
            crowd = [asyncio.ensure_future(client(server.port)) for _ in range(clients)]
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            server.kill()
            ends = await asyncio.gather(*crowd, return_exceptions=True)
            wrong += [f"kill {number}: {end!r}" for end in ends if not isinstance(end, (OSError, EOFError))]
            begun = time.monotonic()
            server = servers.enter_context(await asyncio.to_thread(started, port=server.port))
            health = await ask(server.port, "GET", "/health")
            seconds.append(time.monotonic() - begun)
            first = (await ask(server.port, "POST", PATH, FIRST)).json()["choices"]
            if health.status != 200 or first != right:
                wrong.append(f"start {number}: /health {health.status}, {first!r:.300} instead of {right!r:.300}")
        code = server.stop()
    verdict = Verdict(
        "R6", f"{count} x kill -9 under load", f"healthy after {median(seconds):.1f} s, at most {max(seconds):.1f} s",
        f"{HEALTHY_S:.0f} s, first answer as before", {"seconds": seconds}, wrong,
    )  # fmt: skip
    verdict.demand(max(seconds) <= HEALTHY_S, f"{max(seconds):.1f} s until it was healthy")
    verdict.demand(code == 0, f"exit code {code}")
    return verdict


async def sigterm(server, drain_s: float, enough: bool, streams: int = 16) -> Verdict:
    """SIGTERM while so many streams run. enough: they can come to their end within drain_s, that of the server."""
    connections = [await Connection.open(server.port) for _ in range(streams + 1)]
    *running, idle = connections
    idle.send("GET", "/health")
    await idle.response()
    parts = [asyncio.ensure_future(_begin(connection)) for connection in running]
    begun = await asyncio.gather(*parts)
    server.terminate()
    asked = time.monotonic()
    rests = asyncio.gather(*(_rest(*one) for one in begun), return_exceptions=True)
    refused = await _ask_meanwhile(server.port, idle, rests)
    ends = await rests
    ended = time.monotonic() - asked
    code = await asyncio.to_thread(server.process.wait, EXIT_S)
    exited = time.monotonic() - asked
    whole, told, wrong = 0, 0, []
    for end in ends:
        kind = end if isinstance(end, str) else repr(end)
        whole, told = whole + (kind == "length"), told + (kind == "shutting_down")
        if kind not in (("length",) if enough else ("length", "shutting_down")):
            wrong.append(f"a stream has ended with {kind:.200}")
    verdict = Verdict(
        "R16", f"SIGTERM under {streams} streams, {drain_s:g} s to end",
        f"{whole} whole, {told} told; {ended:.1f} s, exit code {code} after {exited:.1f} s; new ones: {refused}",
        f"all end in {drain_s + TOLD_S:g} s, exit code 0",
        {"whole": whole, "told": told, "ended_s": ended, "exited_s": exited, "exit_code": code, "refused": refused},
        wrong,
    )  # fmt: skip
    verdict.demand(code == 0, f"exit code {code}")
    verdict.demand(enough or told, "the grace was long enough for all of them")
    verdict.demand(ended <= drain_s + TOLD_S, f"the last stream has ended after {ended:.1f} s")
    verdict.demand(set(refused) <= {"503", "refused", "closed"} and sum(refused.values()) > 1, f"new ones: {refused}")
    for connection in connections:
        connection.cut()
    return verdict


async def _begin(connection):
    """(the parts of a stream's body, its first part)."""
    connection.send("POST", PATH, json.dumps(LOAD).encode())
    _, headers = await connection.head()
    parts = connection.parts(headers)
    return parts, await anext(parts)


async def _rest(parts, first) -> str:
    """How a stream ends: its finish_reason or the code of its error; what else there is where it does not end well."""
    *events, last = Response(200, {}, first + b"".join([part async for part in parts])).events()
    if last != "[DONE]":
        return f"{last!r} instead of [DONE]"
    if "error" in events[-1]:
        return events[-1]["error"]["code"]
    return events[-1]["choices"][0]["finish_reason"]


async def _ask_meanwhile(port, idle, running):
    """What becomes of requests until the running ones have ended: {how they were refused: how often}."""
    counts = {}

    async def count(asking):
        try:
            response = await asyncio.wait_for(asking, 5)
            kind = str(response.status)
        except ConnectionRefusedError:
            kind = "refused"
        except (ConnectionError, asyncio.IncompleteReadError):
            kind = "closed"
        counts[kind] = counts.get(kind, 0) + 1

    await asyncio.sleep(0.3)  # the signal is seen within a tenth
    idle.send("POST", PATH, json.dumps(FIRST).encode())
    await count(idle.response())
    while not running.done():
        await count(ask(port, "POST", PATH, FIRST))
        await asyncio.sleep(0.1)
    return counts
