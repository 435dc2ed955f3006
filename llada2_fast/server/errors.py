"""What is told of a request that cannot be served: OpenAI's error envelope."""

import re
from types import MappingProxyType

from starlette.responses import JSONResponse

# OpenAI's and vLLM's names of what DecodeParams and RequestOptions call otherwise.
THEIR_NAMES = {
    "gen_length": "max_tokens",
    "include_stop": "include_stop_str_in_output",
    "eos_ids": "ignore_eos",
    "prompt_ids": "prompt",
}
KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_NAMED = re.compile(r"(\w+)(?:\[\d+\])?(?:=.*?)?: ((?:expected|with|prompt) .*)", re.S)


class ApiError(Exception):
    """message: for the client: no prompt, path or repr of anything it sent. param: the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def refused(error: ValueError, names: dict[str, str] = MappingProxyType({})) -> ApiError:
    """A ValueError of our own form, ``name=value: expected ...``, without the value.

    names: those of the body's fields that have others than THEIR_NAMES here.
    """
    found = _NAMED.match(str(error))
    if found is None:
        return ApiError(400, "the request cannot be served as it is", code="invalid_value")
    name = names.get(found[1]) or THEIR_NAMES.get(found[1], found[1])
    return ApiError(400, f"{name}: {found[2]:.300}", name, "invalid_value")


def invalid(errors: list[dict]) -> ApiError:
    """What pydantic found wrong with a body: of several alternatives the one that came furthest."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    where = [part for part in worst["loc"] if part != "body"]
    if worst["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    path = ""
    for part in where:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"\w{1,64}", part):  # pydantic's names of alternatives, as list[Part], are no fields
            path += f".{part}" if path else part
    name = path.removesuffix(".str") or None
    if worst["type"] == "unsupported":
        return ApiError(400, worst["msg"], worst["ctx"]["name"], "unsupported_parameter")
    if worst["type"] == "unknown":
        field = worst["ctx"]["name"]
        known = re.fullmatch(r"[A-Za-z0-9_]{1,64}", field) is not None  # else it is no name of a field
        message = f"{worst['msg']} supplied: {field}" if known else worst["msg"]
        return ApiError(400, message, field if known else None, "unknown_parameter")
    if worst["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {name or 'body'}", name, "missing_required_parameter")
    return ApiError(400, f"{name or 'body'}: {worst['msg']:.300}", name, "invalid_value")


def missing(error: ModuleNotFoundError, field: str) -> ApiError:
    """A package that the field needs. 400, for clients try again what is answered with 501."""
    return ApiError(400, f"{field} is not supported by this server: {error}", field, "unsupported_parameter")


def too_busy() -> ApiError:
    return ApiError(429, "too many requests are waiting", code="queue_full", headers={"Retry-After": "1"})


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def ended() -> ApiError:
    return ApiError(503, "the engine has ended; the server's log says why", code="engine_ended")


def no_place() -> ApiError:
    return ApiError(503, "the deadline was over before there was a place", None, "deadline", {"Retry-After": "5"})


def failed(request_id: str) -> ApiError:
    """What has happened is in the log, under the request's name."""
    return ApiError(500, f"request {request_id} failed; the server's log says why", code="internal_error")
