"""R3, R4: clients that leave. Nothing of them stays, their pages are free at once, and nobody else notices."""

import asyncio
import itertools
import json
import random
import time

from .crowd import Crowd
from .gate import Verdict, median, p99
from .wire import Connection, ask, idle_after

DRAIN_S = 2.0
CANCEL_S = 0.05  # beside a step
LONG = {"max_tokens": 1024, "ignore_eos": True, "threshold": 2.0}  # a token a step
WAYS = ("stream left", "answer not waited for", "POST cancel")


async def cuts(server, jobs, requests: int, clients: int = 48) -> Verdict:
    """So many requests, half of which are cut off at a random point."""
    crowd, left = Crowd(server.port, jobs), itertools.count(1)
    await crowd.run(clients, lambda: next(left) <= requests, cut=0.55)  # some have their answer before they leave
    drained = await idle_after(server.port, 30.0)
    counts = crowd.counts
    verdict = Verdict(
        "R3", f"{requests} requests of {clients} clients, cut off at random",
        f"{counts['answered']} right, {crowd.cut} cut off, idle after {'-' if drained is None else f'{drained:.2f} s'}",
        f"all right, no page left after {DRAIN_S:.0f} s", {**counts, "drain_s": drained}, crowd.wrong,
    )  # fmt: skip
    verdict.demand(server.lives, "the server has ended")
    verdict.demand(counts["answered"] + crowd.cut == requests, f"{counts} do not add up to {requests}")
    verdict.demand(crowd.cut >= requests // 3, f"only {crowd.cut} were cut off")
    verdict.demand(drained is not None and drained <= DRAIN_S, f"rows or pages are left {DRAIN_S:.0f} s later")
    return verdict


async def cancels(server, count: int, others: int = 4) -> Verdict:
    """From a client's leaving, or its POST to cancel, to its pages being free, while others' streams run.

    server: of the launcher, which notes in the engine's thread when that was, on the clock that is read here just
    before the socket is closed, and how long the step before took.
    """
    rng, numbers, begun = random.Random(0), iter(range(count)), {}

    async def other(number):
        while True:
            body = LONG | {"prompt": f"Add {number} and 1.", "stream": True}
            await ask(server.port, "POST", "/v1/completions", body)

    async def client():
        for number in numbers:
            way, name = WAYS[number % len(WAYS)], f"cancel-{number}"
            body = LONG | {"prompt": f"Spell {number}.", "request_id": name}
            body |= {"stream": True, "draft": True} if way != WAYS[1] else {}
            connection = await Connection.open(server.port)
            connection.send("POST", "/v1/completions", json.dumps(body).encode())
            if "stream" in body:
                _, headers = await connection.head()
                await anext(connection.parts(headers))
            await asyncio.sleep(rng.uniform(0.1, 0.2))
            begun[name] = way, time.monotonic()
            if way == "POST cancel":
                told = await ask(server.port, "POST", f"/v1/requests/{name}/cancel")
                assert told.json()["cancelled"], told
            connection.cut()
            await asyncio.sleep(0.1)

    crowd = [asyncio.ensure_future(other(number)) for number in range(others)]
    await asyncio.gather(*(client() for _ in range(3)))
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    drained = await idle_after(server.port, 5.0)
    freed = {line["request"]: line for line in server.told("freed") if line["pages"] > 0}
    took = [(way, freed[name]["at"] - at) for name, (way, at) in begun.items() if name in freed]
    seconds = [one for _, one in took]
    step, last = median([line["step_s"] for line in freed.values()]), p99(seconds)
    figures = {f"{way}, p99 ms": 1e3 * p99([one for its, one in took if its == way]) for way in WAYS}
    figures |= {"p50_ms": 1e3 * median(seconds), "p99_ms": 1e3 * last, "step_ms": 1e3 * step}
    verdict = Verdict(
        "R4", f"{count} cancelled", f"p50 {figures['p50_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms",
        f"pages free in a step ({1e3 * step:.0f} ms) + {1e3 * CANCEL_S:.0f} ms, p99", figures,
    )  # fmt: skip
    verdict.demand(len(took) == count, f"{count - len(took)} cancelled requests have freed no pages")
    verdict.demand(last <= step + CANCEL_S, f"p99 {1e3 * last:.0f} ms")
    verdict.demand_idle(server, drained)
    return verdict
