"""R3: clients that leave. Nothing of them stays, and nobody else notices."""

import itertools

from .crowd import Crowd
from .gate import Verdict
from .wire import idle_after

DRAIN_S = 2.0


async def cuts(server, jobs, requests: int = 2000, clients: int = 48) -> Verdict:
    """So many requests, half of which are cut off at a random point."""
    crowd, left = Crowd(server.port, jobs), itertools.count(1)
    await crowd.run(clients, lambda: next(left) <= requests, cut=0.55)  # some have their answer before they leave
    drained = await idle_after(server.port, 30.0)
    counts = crowd.counts
    cut = counts["cut off"] + counts["cut off in the request"]
    verdict = Verdict(
        "R3", f"{requests} requests of {clients} clients, cut off at random",
        f"{counts['answered']} right, {cut} cut off, idle after {'-' if drained is None else f'{drained:.2f} s'}",
        f"all right, no page left after {DRAIN_S:.0f} s", {**counts, "drain_s": drained}, crowd.wrong,
    )  # fmt: skip
    verdict.demand(server.lives, "the server has ended")
    verdict.demand(counts["answered"] + cut == requests, f"{counts} do not add up to {requests}")
    verdict.demand(cut >= requests // 3, f"only {cut} were cut off")
    verdict.demand(drained is not None and drained <= DRAIN_S, f"rows or pages are left {DRAIN_S:.0f} s later")
    return verdict
