"""Requests while the engine is yet to take them: cancelled, refused, of one name."""

import asyncio
import json

import pytest

from llada2_fast import AsyncEngine, Engine, EngineConfig
from llada2_fast.config import ServerConfig
from llada2_fast.engine import QueueFull
from llada2_fast.server import Server
from tests.engine.common import demo_model, tokenizer
from tests.server.common import MODEL, chat

LONG = {"messages": chat("Tell a story."), "max_tokens": 2000, "ignore_eos": True, "threshold": 2.0}


class Client:
    """An app's, in its own process and event loop."""

    def __init__(self, app):
        self.app = app

    async def post(self, path, data, until=None):
        """(status, body); until: an asyncio.Event at which the client goes, else it stays."""
        parts = [{"type": "http.request", "body": json.dumps(data).encode(), "more_body": False}]
        status, body = None, b""

        async def receive():
            if parts:
                return parts.pop()
            await (until or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            nonlocal status, body
            status, body = message.get("status", status), body + message.get("body", b"")

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
            "root_path": "", "query_string": b"", "scheme": "http", "server": ("127.0.0.1", 1), "client": None,
            "headers": [(b"content-type", b"application/json")], "state": {},
        }  # fmt: skip
        await self.app(scope, receive, send)
        return status, body


def serve(main, kind=AsyncEngine, **limits):
    """asyncio.run(main(server, client)) around an engine of the embedded model."""

    async def run():
        engine = Engine(demo_model(), EngineConfig(cache_tokens=32768, **limits), tokenizer())
        async with kind(engine) as serving:
            server = Server(serving, ServerConfig(), (MODEL,), {"eos_early_stop": True})
            result = await asyncio.wait_for(main(server, Client(server.app)), 60)
            await asyncio.sleep(0.05)
            assert await serving.call(lambda engine: len(engine.requests)) == 0
            assert not server.completions.running
            server.texts.close()
            return result

    return asyncio.run(run())


async def until_taken(server, name):
    """A request of this name is known to the server, whatever the engine knows of it."""
    while name not in server.completions.running:
        await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_cancelled_before_the_engine_has_it(stream, n):
    async def main(server, client):
        body = LONG | {"request_id": "mine", "stream": stream, "n": n}
        asked = asyncio.ensure_future(client.post("/v1/chat/completions", body))
        await until_taken(server, "mine")
        told = await client.post("/v1/requests/mine/cancel", {})
        return told, await asked

    (status, told), (answered, body) = serve(main)
    assert (status, json.loads(told)) == (200, {"id": "mine", "cancelled": True})
    assert answered == 200 and body.count(b'"finish_reason":"abort"') == n


def test_a_drain_ends_who_waits_in_one_go():
    async def main(server, client):
        engine = server.serving.engine
        bodies = [LONG | {"request_id": f"r{number}", "stream": True} for number in range(100)]
        asked = [asyncio.ensure_future(client.post("/v1/chat/completions", body)) for body in bodies]
        while len(engine.requests) < 100:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # for the last of them to be told so
        before = engine.num_steps
        await server.drain(1e-6)
        return engine.num_steps - before, await asyncio.gather(*asked)

    steps, ends = serve(main, max_num_seqs=2)
    assert {(status, b"shutting_down" in body) for status, body in ends} == {(200, True)}
    assert steps < 20  # two calls go along with a step: a call for each of them would take 50


class Reluctant(AsyncEngine):
    """Has no room for the first choice, and takes the others later."""

    opened = 0

    async def open(self, *args, **options):
        self.opened += 1
        if self.opened == 1:
            raise QueueFull("no room")
        await asyncio.sleep(0.02)
        return await super().open(*args, **options)


def test_of_a_request_for_which_there_is_no_room_nothing_is_left():
    async def main(server, client):
        return await client.post("/v1/chat/completions", LONG | {"n": 4})

    status, body = serve(main, Reluctant)
    assert status == 429 and json.loads(body)["error"]["code"] == "queue_full"


class Counting(AsyncEngine):
    """Knows how often it was asked for a request."""

    opened = 0

    async def open(self, *args, **options):
        self.opened += 1
        return await super().open(*args, **options)


def test_of_many_who_come_at_once_the_last_are_refused_without_the_engine():
    async def main(server, client):
        asked = [asyncio.ensure_future(client.post("/v1/chat/completions", LONG | {"n": n})) for n in [1] * 20 + [3]]
        while sum(task.done() for task in asked) < 17:
            await asyncio.sleep(0.01)
        waiting = [task for task in asked if not task.done()]
        refused = [task.result() for task in asked if task.done()]
        await server.drain(1e-6)
        await asyncio.gather(*waiting)
        return refused, len(waiting), server.serving.opened

    refused, taken, opened = serve(main, Counting, max_num_seqs=2, max_waiting=2)
    assert taken == opened == 4
    assert [status for status, _ in refused] == [429] * 17


@pytest.mark.parametrize("stream", [False, True])
def test_two_requests_of_one_name_at_once(stream):
    """One of them is refused, and the other goes on to be known by it, and ends with its client."""

    async def main(server, client):
        gone, body = asyncio.Event(), LONG | {"request_id": "mine", "stream": stream}
        asked = [asyncio.ensure_future(client.post("/v1/chat/completions", body, gone)) for _ in range(2)]
        (first,), (other,) = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert list(server.completions.running) == ["mine"]
        gone.set()
        await other
        return first.result()

    status, body = serve(main)
    assert status == 400 and json.loads(body)["error"]["param"] == "request_id"
