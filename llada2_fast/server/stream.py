"""Server-sent events to a client that may be gone."""

import asyncio
import json

from starlette.responses import Response

DONE = b"data: [DONE]\n\n"


class Last(bytes):
    """What a stream ends with, sent in one piece with its end."""


def event(data: dict) -> bytes:
    return b"data: %s\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


async def disconnected(receive):
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive, work):
    """What the coroutine `work` gives; None if the client goes first, and work is cancelled then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class EventStream(Response):
    """events: an async generator of bytes, the last of them a Last, closed when the client goes; end: called then, and
    behind the last event."""

    media_type = "text/event-stream"

    def __init__(self, events, end, headers=None):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | (headers or {}))
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope, receive, send):
        try:
            await unless_gone(receive, self._send_all(send))
        finally:
            self._end()

    async def _send_all(self, send):
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": not isinstance(data, Last)})
        finally:
            await self._events.aclose()
