"""As much of HTTP/1.1 as `llada2-fast serve` speaks, over sockets that can be cut, read late, or not read at all."""

import asyncio
import json
import socket
from typing import NamedTuple

from ..sse import EventStream

HOST = "127.0.0.1"
PATIENCE_S = 60.0  # for an answer: what takes longer hangs
JSON = {"Content-Type": "application/json"}


class Response(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of its server-sent events, JSON parsed; the last one is "[DONE]" where all has come."""
        return [one if one == "[DONE]" else json.loads(one) for one in EventStream().feed(self.body)]


class Connection:
    """One connection. `cut` may be called at any time, by anybody."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, receive_buffer: int | None = None):
        """receive_buffer: bytes the kernel takes that have not been read, about; its own idea unless given."""
        client = socket.socket()
        client.setblocking(False)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(client, (HOST, port))
        except BaseException:
            client.close()
            raise
        limit = 2**16 if receive_buffer is None else receive_buffer
        return cls(*await asyncio.open_connection(sock=client, limit=limit))

    def send(self, method: str, path: str, body: bytes = b"", headers=JSON):
        self.writer.write(request(method, path, body, headers))

    async def response(self) -> Response:
        """ConnectionError, or IncompleteReadError, where it ends before the response does."""
        status, headers = await self.head()
        return Response(status, headers, b"".join([part async for part in self.parts(headers)]))

    async def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        named = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in named}

    async def parts(self, headers):
        """The body as it comes."""
        if headers.get("transfer-encoding") != "chunked":
            left = int(headers.get("content-length", 0))
            while left:
                part = await self.reader.read(left)
                if not part:
                    raise ConnectionResetError("the response is not whole")
                left -= len(part)
                yield part
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    def cut(self):
        """Nothing more is sent or read: the server gets a reset."""
        self.writer.transport.abort()

    async def ended(self, seconds: float) -> bool:
        """Whether the server ends the connection within so many seconds. What it still sends is thrown away."""

        async def read():
            while await self.reader.read(2**16):
                pass

        try:
            await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            return False
        except ConnectionError:
            pass
        return True


def request(method: str, path: str, body: bytes = b"", headers=JSON) -> bytes:
    """The bytes of a request; with a Content-Length unless the headers say one, or say how else it ends."""
    named = {"Host": HOST, **headers}
    if not {"Content-Length", "Transfer-Encoding"} & named.keys():
        named["Content-Length"] = str(len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


async def ask(port, method, path, data=None, headers=JSON, patience_s=PATIENCE_S) -> Response:
    """One request on a connection of its own. data: bytes as they are, None = no body, else sent as JSON.

    TimeoutError if the response takes longer than patience_s.
    """
    body = data if isinstance(data, bytes) else b"" if data is None else json.dumps(data).encode()
    connection = await Connection.open(port)
    try:
        connection.send(method, path, body, headers)
        return await asyncio.wait_for(connection.response(), patience_s)
    finally:
        connection.cut()


async def metrics(port) -> dict[str, float]:
    """What /metrics says, by name and labels as they stand there."""
    lines = (await ask(port, "GET", "/metrics")).body.decode().splitlines()
    told = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in told}


LEFT = ("num_requests_running", "num_requests_waiting", "num_pages_used")


async def idle_after(port, patience_s: float) -> float | None:
    """Seconds until nothing is left of any request: no row, no page; None if that takes longer than patience_s."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while loop.time() - begun <= patience_s:
        told = await metrics(port)
        if not any(told[f"llada2:{name}"] for name in LEFT):
            return loop.time() - begun
        await asyncio.sleep(0.01)
    return None
