"""R5: minutes of everything at once, after which the process is what it was."""

import asyncio
import time

from ..soak import MAX_MB_PER_MINUTE, WARM_UP, megabytes_per_minute
from .crowd import Crowd
from .fuzz import Bodies, check
from .gate import Verdict
from .wire import Connection, ask, idle_after

LONG_S = 300.0  # a run that is shorter tells nothing of memory
WARM_UP_S = 5.0  # until everything that is made once has been; threads for long texts are made as they are needed
LONG_TEXT = {"prompt": "word " * 10_000}
CLIENTS = 24
PATIENCE_S = 30.0


async def _others(port, crowd, seed, go_on):
    """What else comes: bodies that nobody should send, cancelled requests, questions, connections without a request."""
    bodies = iter(Bodies(seed))
    while go_on():
        kind = crowd.random.choice(["body", "body", "cancel", "metrics", "models", "nothing"])
        if kind == "body":
            path, body, headers = next(bodies)
            if len(body) > 100_000:  # would take the time of all others
                continue
            response = await ask(port, "POST", path, body, headers, PATIENCE_S)
            if problem := check(response.status, response.body):
                crowd.wrong.append(f"{path}: {problem}")
        elif kind == "cancel":
            name = crowd.random.choice([*crowd.running, "nobody"])
            crowd.cancelled.add(name)
            ended = (await ask(port, "POST", f"/v1/requests/{name}/cancel")).json()["cancelled"]
            crowd.counts["cancelled"] += ended
        elif kind == "nothing":
            connection = await Connection.open(port)
            await asyncio.sleep(crowd.random.random() / 10)
            connection.cut()
        else:
            await ask(port, "GET", {"metrics": "/metrics", "models": "/v1/models"}[kind])
        crowd.counts["others"] += 1


async def _load(server, crowd, seconds, samples):
    until = time.monotonic() + seconds

    def go_on():
        return time.monotonic() < until

    async def watch():
        while go_on():
            samples.append((time.monotonic(), server.usage().memory))
            await asyncio.sleep(1.0)

    others = (_others(server.port, crowd, seed, go_on) for seed in range(CLIENTS // 4))
    await asyncio.gather(crowd.run(CLIENTS - CLIENTS // 4, go_on, cut=0.5), *others, watch())


async def soak(server, jobs, seconds: float) -> Verdict:
    """server: with an answer's length for bodies that do not say, that of fuzz.OPTIONS."""
    crowd, samples = Crowd(server.port, jobs), []
    await _load(server, crowd, min(WARM_UP_S, seconds), [])
    await asyncio.gather(*(ask(server.port, "POST", "/tokenize", LONG_TEXT) for _ in range(8)))
    await idle_after(server.port, 10.0)
    await asyncio.sleep(0.5)  # for connections that are cut off to be seen so
    before = server.usage()
    await _load(server, crowd, seconds, samples)
    drained = await idle_after(server.port, 10.0)
    await asyncio.sleep(0.5)
    after = server.usage()
    begun = samples[0][0] + WARM_UP * seconds
    slope = megabytes_per_minute([sample for sample in samples if sample[0] >= begun])
    files, threads, long = after.files - before.files, after.threads - before.threads, seconds >= LONG_S
    counts = crowd.counts
    verdict = Verdict(
        "R5", f"{seconds / 60:.2g} minutes, {CLIENTS} clients",
        f"{slope or 0.0:.2f} MB a minute, descriptors {files:+d}, threads {threads:+d}; {counts['answered']} right, "
        f"{crowd.cut} cut off, {counts['others']} others",
        f"{MAX_MB_PER_MINUTE} MB a minute{'' if long else ' (too short to tell)'}, +0, +0",
        {**counts, "mb_per_minute": slope, "files": files, "threads": threads, "memory_mb": after.memory / 1e6},
        crowd.wrong,
    )  # fmt: skip
    verdict.demand(not long or slope < MAX_MB_PER_MINUTE, f"memory grows by {slope or 0.0:.2f} MB a minute")
    verdict.demand(files <= 0, f"descriptors: {before.files} before, {after.files} after")
    verdict.demand(threads <= 0, f"threads: {before.threads} before, {after.threads} after")
    verdict.demand_idle(server, drained)
    return verdict
