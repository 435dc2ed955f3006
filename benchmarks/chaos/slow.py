"""Clients that do not read, or take for ever to say what they want."""

import asyncio
import json
import time

from .gate import Verdict
from .wire import Connection, idle_after, request

TIMEOUT_S = 2  # of the server for clients that do not read, for headers and for bodies
OPTIONS = ("--client-timeout-s", TIMEOUT_S, "--body-timeout-s", TIMEOUT_S)
SLACK_S = 1.5  # beside it
RECEIVE_BUFFER = 4096  # bytes: the client's kernel takes no more, about
# What is larger than all buffers between the server and a client that does not read; the stream would take a minute.
STREAM = "/v1/completions", {
    "prompt": "Tell a story.", "n": 8, "max_tokens": 2048, "ignore_eos": True, "threshold": 2.0, "stream": True,
    "draft": True,
}  # fmt: skip
ANSWER = "/tokenize", {"prompt": "word " * 120_000}
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


async def _unread(server, path, body, before, patience_s):
    """Seconds until the descriptor of a client that does not read is gone; infinity where that takes longer."""
    connection, begun = await Connection.open(server.port, RECEIVE_BUFFER), time.monotonic()
    connection.writer.transport.pause_reading()
    connection.send("POST", path, json.dumps(body).encode())
    await asyncio.sleep(0.5)  # for the server to take it
    while server.usage().files > before and time.monotonic() < begun + patience_s:
        await asyncio.sleep(0.1)
    closed = server.usage().files <= before
    connection.cut()
    return time.monotonic() - begun if closed else float("inf")


async def slow(server, stream: bool = True) -> Verdict:
    """Requests that never come to an end; an answer that nobody reads, and a stream, unless that takes too long."""
    before = server.usage().files
    took = dict(zip(DRIPS, await asyncio.gather(*(_drip(server.port, *drip) for drip in DRIPS.values())), strict=True))
    await asyncio.sleep(0.2)
    answer_s = await _unread(server, *ANSWER, before, 20.0)
    stream_s = await _unread(server, *STREAM, before, 40.0) if stream else None
    drained = await idle_after(server.port, 5.0)
    await asyncio.sleep(0.2)  # the server may not have seen yet that this was the last question
    left, worst = server.usage().files - before, max(took.values())
    unread = f"an answer after {answer_s:.1f} s" + (f", a stream after {stream_s:.1f} s" if stream else "")
    verdict = Verdict(
        "slow", f"{len(took)} slow requests, and clients that do not read",
        f"requests cut off after {worst:.1f} s; {unread}", f"{TIMEOUT_S} s + {SLACK_S} s; unread ones end",
        {"requests_s": took, "answer_s": answer_s, "stream_s": stream_s, "files_left": left},
    )  # fmt: skip
    for name, seconds in took.items():
        verdict.demand(seconds <= TIMEOUT_S + SLACK_S, f"{name}: not cut off in {TIMEOUT_S + SLACK_S} s")
    verdict.demand(answer_s < 20, "the connection of an answer that nobody reads stays open")
    verdict.demand(stream_s is None or stream_s < 40, "a stream that nobody reads goes on")
    verdict.demand(drained is not None and left <= 0 and server.lives, f"rows, pages or {left} descriptors are left")
    return verdict
