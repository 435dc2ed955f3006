"""What every request passes before any route sees it: keys, limits, one line in the log."""

import asyncio
import base64
import hmac
import json
import time

from .errors import ApiError, shutting_down
from .log import log

OPEN = ("/health",)  # asks for no key
LINGER = 8  # times the size that may be, which is read before it is told: who is still sending does not listen
PAGES = ("/", "/playground")  # what a person opens: a browser then asks for the key


class Guard:
    """ASGI middleware around an app.

    config: ServerConfig.
    metrics: Metrics.
    is_draining: () -> bool.
    bodies: tasks that wait for a body, for whoever has to end them.
    """

    def __init__(self, app, config, metrics, is_draining, bodies):
        self.app, self.config, self.metrics, self.is_draining, self.bodies = app, config, metrics, is_draining, bodies
        self._keys = [key.encode() for key in config.api_key]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope.setdefault("state", {})["told"] = told = {}
        began, status = time.perf_counter(), [499]

        async def noting(message):
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            receive = await self._admit(scope, receive)
            await self.app(scope, receive, noting)
        except ApiError as error:
            await error.response()(scope, receive, noting)
        except Exception:
            status[0] = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.responses.labels(route, str(status[0])).inc()
            if told or route not in ("/health", "/ready", "/metrics"):
                took = round(1e3 * (time.perf_counter() - began), 1)
                log("request", method=scope["method"], route=route, status=status[0], ms=took, **told)

    async def _admit(self, scope, receive):
        """`receive` for the app, of a request that may pass. ApiError for one that may not."""
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and self._keys and not self._knows(headers.get(b"authorization", b"")):
            asked = "Basic" if scope["path"] in PAGES else "Bearer"
            raise ApiError(
                401, "expected an API key: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": f'{asked} realm="llada2-fast"'},
            )  # fmt: skip
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        if self.is_draining():
            raise shutting_down()
        body = await self._body(headers, receive)
        # Other types need no leave of the server's to be sent by other sites' pages.
        if body and headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "Content-Type: expected application/json", code="unsupported_media_type")
        if is_deeper(body, self.config.max_depth):
            raise ApiError(400, f"the body: expected nesting of at most {self.config.max_depth}", code="too_deep")
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again():
            return next(parts, None) or await receive()

        return again

    def _knows(self, header):
        """Is one of the keys in an Authorization header? All are compared, each in constant time."""
        scheme, _, given = header.partition(b" ")
        if scheme.lower() == b"basic":  # what browsers send
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return any([hmac.compare_digest(given.strip(), key) for key in self._keys])

    async def _body(self, headers, receive):
        most = self.config.max_body_bytes
        close = {"Connection": "close"}  # what else may come of the body is not read
        too_large = ApiError(413, f"the body: expected at most {most} bytes", None, "request_too_large", close)
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > LINGER * most:
            raise too_large

        async def read():
            parts, size, more = [], 0, True
            while more and size <= LINGER * most:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "the client has gone")
                part = message.get("body", b"")
                more, size = message.get("more_body", False), size + len(part)
                if size <= most:
                    parts.append(part)
            if size > most:
                raise too_large
            return b"".join(parts)

        reading = asyncio.ensure_future(read())
        self.bodies.add(reading)
        try:
            done, _ = await asyncio.wait([reading], timeout=self.config.body_timeout_s)
            if not done:
                raise ApiError(408, "the body did not come in time", None, "timeout", close)
            return reading.result()
        except asyncio.CancelledError:
            if self.is_draining():
                raise shutting_down() from None
            raise
        finally:
            reading.cancel()
            self.bodies.discard(reading)


def is_deeper(body: bytes, most: int) -> bool:
    """Are the lists and objects of a JSON text nested more deeply? What is no JSON is not."""
    try:
        level = [json.loads(body)] if body else []
    except RecursionError:
        return True
    except ValueError:
        return False
    for _ in range(most + 1):
        level = [one for one in level if isinstance(one, (list, dict))]
        if not level:
            return False
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return True
