"""R14: forwards that fail. Who was in them is told so, nobody else notices, and the server goes on."""

import asyncio
import itertools

from .crowd import Crowd
from .gate import Verdict
from .wire import idle_after

LIMIT_S = 300.0  # for all faults to come
AFTER = 20  # requests behind the last fault


async def faults(server, jobs, count: int, clients: int = 12) -> Verdict:
    """server: of the launcher, with so many faults."""
    crowd, over = Crowd(server.port, jobs, faults=True), asyncio.Event()

    async def watch():
        for _ in range(int(LIMIT_S / 0.2)):
            if len(server.told("fault")) >= count:
                break
            await asyncio.sleep(0.2)
        over.set()

    await asyncio.gather(crowd.run(clients, lambda: not over.is_set(), cut=0.0), watch())
    left = itertools.count(1)
    answered = crowd.counts["answered"]
    await crowd.run(clients, lambda: next(left) <= AFTER, cut=0.0)
    drained, told = await idle_after(server.port, 10.0), server.told("fault")
    hit = {"-".join(name.split("-")[:2]) for fault in told for name in fault["requests"]}  # without a choice's number
    verdict = Verdict(
        "R14", f"{count} forwards that fail",
        f"{len(hit)} requests hit, {len(crowd.failed)} failed, {crowd.counts['answered']} right",
        "none but those hit fail, no page left",
        {**crowd.counts, "faults": len(told), "hit": len(hit)}, crowd.wrong,
    )  # fmt: skip
    verdict.demand(len(told) == count, f"{len(told)} faults")
    verdict.demand(crowd.failed == hit, f"failed, not hit: {crowd.failed - hit}; hit, not failed: {hit - crowd.failed}")
    verdict.demand(crowd.counts["answered"] - answered == AFTER, "not all were answered behind the last fault")
    verdict.demand_idle(server, drained)
    tracebacks = [line["traceback"] for line in server.told() if "traceback" in line]
    verdict.demand(all("asked for" in text or "Injected" in text for text in tracebacks), "other faults in its log")
    return verdict
