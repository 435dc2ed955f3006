"""A Server on a port, from its start to the end of its last stream."""

import asyncio
import gc
import logging
import signal
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..config import ServerConfig
from .app import Server
from .log import log, to_stderr

MAX_HEADER_BYTES = 16384


class _Connection(H11Protocol):
    """One client's. It is cut off where it does not come up with a request's headers in time, or for too long reads
    nothing of what was sent: `send` comes back then, and `receive` tells that it has gone. h11, for httptools takes
    headers of any size."""

    max_connections = header_timeout_s = client_timeout_s = None  # set by serve
    _late = _unread = None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._late = self.loop.call_later(self.header_timeout_s, transport.abort)

    def data_received(self, data):
        super().data_received(data)
        answered = self.cycle is None or self.cycle.response_complete
        if not answered:
            self._set("_late")
        elif self._late is None:
            self._set("_late", self.loop.call_later(self.header_timeout_s, self.transport.abort))

    def pause_writing(self):
        super().pause_writing()  # nothing more is written until there is room
        self._await_reader()

    def resume_writing(self):
        super().resume_writing()
        self._set("_unread")
        if self.cycle is not None and self.cycle.response_complete:
            self._await_reader()

    def on_response_complete(self):
        super().on_response_complete()
        self._await_reader()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._set("_late")
        self._set("_unread")

    def _await_reader(self, before=None):
        """While nothing is written: what was sent has to become less, or to close would wait for it without end."""
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            self.transport.abort()
        elif left:
            self._set("_unread", self.loop.call_later(self.client_timeout_s, self._await_reader, left))

    def _set(self, name, timer=None):
        """Another timer in place of the one of this name that runs, or none."""
        if (before := getattr(self, name)) is not None:
            before.cancel()
        setattr(self, name, timer)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config, server: Server):
        super().__init__(config)
        self._server, self.failed = server, False

    async def startup(self, sockets=None):
        await self._server.warm_up()
        gc.collect()
        gc.freeze()  # else each collection looks through all of PyTorch: 1 MiB of JSON took 0.47 s for 0.05
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            log("serving", url=f"http://{host}:{port}", playground=f"http://{host}:{port}/playground")

    async def on_tick(self, counter):
        """Whether to end: also where there is no engine any more, for whoever starts servers to start another."""
        if not self._server.serving.is_alive and not self.should_exit:
            log("the engine has ended")
            self.failed = True
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None):
        """Streams end by themselves, or are ended when their time is over."""
        running = len(self._server.completions.running)
        log("draining", running=running, seconds=self._server.config.drain_s)
        draining = asyncio.create_task(self._server.drain(self._server.config.drain_s))
        await super().shutdown(sockets)
        draining.cancel()
        log("ended")


def bind(config: ServerConfig) -> socket.socket:
    """The port, before it takes long to find out what for. OSError where it cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen at {config.host}:{config.port}: {error.strerror or error}") from error
    return bound


def serve(server: Server, port: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then until running requests have ended; a second SIGINT waits for nobody. All
    logging of the process goes to stderr, as lines of JSON.

    port: of `bind`.
    Raises RuntimeError where the engine has ended by itself.
    """
    to_stderr()
    config = server.config
    connection = type(
        "Connection", (_Connection,),
        {
            "max_connections": config.max_connections, "header_timeout_s": config.body_timeout_s,
            "client_timeout_s": config.client_timeout_s,
        },
    )  # fmt: skip
    uvicorn_config = uvicorn.Config(
        server.app, http=connection, ws="none", proxy_headers=False, lifespan="on", log_config=None,
        access_log=False, server_header=False, h11_max_incomplete_event_size=MAX_HEADER_BYTES, backlog=1024,
        timeout_graceful_shutdown=int(config.drain_s) + 5,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    for one in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises again, when all is over, what it was ended by
        signal.signal(one, lambda *_: None)
    running = _Uvicorn(uvicorn_config, server)
    running.run(sockets=[port])
    if running.failed:
        raise RuntimeError("the engine has ended; the log says why")
