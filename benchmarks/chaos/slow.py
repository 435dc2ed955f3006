"""Clients that do not read, or take for ever to say what they want."""

import asyncio
import json
import time

from .gate import Verdict
from .wire import Connection, idle_after, metrics, request

TIMEOUT_S = 2  # of the server for clients that do not read, for headers and for bodies
OPTIONS = ("--client-timeout-s", TIMEOUT_S, "--body-timeout-s", TIMEOUT_S)
SLACK_S = 1.5  # beside it
KEEP_ALIVE_S = 5.0  # uvicorn's, of a connection without a request
RECEIVE_BUFFER = 4096  # bytes: the client's kernel takes no more, about
LARGE = {  # an answer larger than all buffers between the engine and a client that does not read, and 60 s long
    "prompt": "Tell a story.", "n": 8, "max_tokens": 2048, "ignore_eos": True, "threshold": 2.0, "trace": True,
}  # fmt: skip
DRIPS = {
    "nothing sent": (b"", b""),
    "headers, a byte at a time": (b"GET /health HTTP/1.1\r\nX: ", b"x"),
    "a body, a byte at a time": (request("POST", "/v1/completions", headers={"Content-Length": "9999"}), b" "),
    "chunks, a byte at a time": (
        request("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked"}), b"1\r\n \r\n",
    ),
    "a second request's headers": (request("GET", "/health") + b"GET /health HTTP/1.1\r\nX: ", b"x"),
}  # fmt: skip


async def _drip(port, begin, more):
    """Seconds until the server ends the connection; infinity if it does not."""
    connection, begun = await Connection.open(port), time.monotonic()
    ended = asyncio.ensure_future(connection.ended(TIMEOUT_S + SLACK_S))
    connection.writer.write(begin)
    while more and not ended.done():
        await asyncio.wait([ended], timeout=0.2)
        if not connection.writer.is_closing():
            connection.writer.write(more)
    closed = await ended
    connection.cut()
    return time.monotonic() - begun if closed else float("inf")


async def _unread(server, body, before):
    """(seconds until the rows of a client that does not read are gone, seconds until its descriptor is); infinity where
    that takes too long."""
    connection = await Connection.open(server.port, RECEIVE_BUFFER)
    connection.writer.transport.pause_reading()
    connection.send("POST", "/v1/completions", json.dumps(body).encode())
    begun, rows = time.monotonic(), float("inf")
    while time.monotonic() < begun + 10 and not (await metrics(server.port))["llada2:num_requests_running"]:
        await asyncio.sleep(0.02)
    if await idle_after(server.port, 30.0) is not None:
        rows = time.monotonic() - begun
    while server.usage().files > before and time.monotonic() < begun + rows + KEEP_ALIVE_S + TIMEOUT_S + SLACK_S:
        await asyncio.sleep(0.1)
    files = time.monotonic() - begun if server.usage().files <= before else float("inf")
    connection.cut()
    return rows, files


async def slow(server) -> Verdict:
    """Streams and answers that are not read, requests that never come to an end."""
    before = server.usage().files
    took = dict(zip(DRIPS, await asyncio.gather(*(_drip(server.port, *drip) for drip in DRIPS.values())), strict=True))
    stream, whole = LARGE | {"stream": True, "draft": True}, LARGE | {"threshold": 0.0}
    # The stream is stopped once its buffers are full; the answer is made first, and then lies in them.
    stream_s, stream_closed_s = await _unread(server, stream, before)
    answer_s, answer_closed_s = await _unread(server, whole, before)
    drained = await idle_after(server.port, 5.0)
    await asyncio.sleep(0.2)  # the server may not have seen yet that this was the last question
    left = server.usage().files - before
    worst = max(took.values())
    verdict = Verdict(
        "slow", f"{len(took)} slow requests, 2 that do not read",
        f"cut off after {worst:.1f} s; unread stream after {stream_s:.1f} s, answer {answer_closed_s - answer_s:.1f} s "
        "behind its end", f"{TIMEOUT_S} s + {SLACK_S} s, nothing left",
        {"drips_s": took, "stream_s": stream_s, "stream_closed_s": stream_closed_s, "answer_s": answer_s,
         "answer_closed_s": answer_closed_s, "files_left": left},
    )  # fmt: skip
    for name, seconds in took.items():
        verdict.demand(seconds <= TIMEOUT_S + SLACK_S, f"{name}: not cut off in {TIMEOUT_S + SLACK_S} s")
    verdict.demand(stream_s < 20, f"the rows of a stream that nobody reads go on for {stream_s:.0f} s")
    verdict.demand(stream_closed_s - stream_s < SLACK_S, "the connection of a stream that nobody reads stays open")
    limit = KEEP_ALIVE_S + TIMEOUT_S + SLACK_S
    verdict.demand(answer_closed_s - answer_s < limit, "the connection of an answer that nobody reads stays open")
    verdict.demand(drained is not None and left <= 0 and server.lives, f"rows, pages or {left} descriptors are left")
    return verdict
