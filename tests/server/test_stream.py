"""A stream ends with its client, at whatever moment that goes."""

import asyncio

import pytest

from llada2_fast.server.stream import EventStream

MANY = 1000  # events, of which a client that has gone gets but a few


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("work", range(1, 4))
def test_a_client_that_goes_while_an_event_is_sent_ends_its_stream(work, turns):
    """The news comes so many turns of the event loop after the sending has begun, which itself takes some turns."""
    gone, ended, told = asyncio.Event(), [], []

    async def events():
        for number in range(MANY):
            told.append(number)
            yield b"data: 1\n\n"

    async def receive():
        await gone.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message):
        if len(told) == 3:
            gone.set()
        for _ in range(work):
            await asyncio.sleep(0)

    async def main():
        stream = EventStream(events(), lambda: ended.append(True))
        await asyncio.wait_for(stream({"type": "http"}, receive, send), 60)

    asyncio.run(main())
    assert ended == [True]
    assert len(told) < MANY
