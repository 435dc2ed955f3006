"""ServerConfig: where `llada2-fast serve` listens, and what it lets a client ask for."""

import math
from dataclasses import dataclass

from .checks import as_flag, as_float, as_int, bad, check, described, doc, put
from .request import MAX_LISTED, MAX_SAMPLES


def _as_names(name, value):
    names = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(one, str) and one.strip() == one and 0 < len(one) <= 256 for one in names):
        raise bad(name, "...", "strings of 1..256 characters, without spaces around them")
    return names


@described
@dataclass(frozen=True)
class ServerConfig:
    """How a model is served over HTTP; ValueError naming field, value and what is allowed. All limits are on."""

    host: str = doc("127.0.0.1", "address to listen at; 0.0.0.0 or :: for all of the machine's")
    port: int = doc(8000, "port to listen at; 0 = a free one")
    api_key: tuple[str, ...] = doc(
        (), "keys, any of which every route but /health asks for; also from LLADA2_FAST_API_KEY"
    )
    served_model_name: tuple[str, ...] = doc((), "the model's names; that of its folder or hub id unless given")
    allowed_origins: tuple[str, ...] = doc((), "other sites whose pages may call the server from a browser, * = all")
    max_model_len: int | None = doc(None, "most tokens of prompt and answer; what model and cache have unless given")
    default_max_tokens: int = doc(2048, "most tokens of a chat's answer where the request says nothing")
    max_samples: int = doc(8, "answers to a prompt (n), at most")
    max_prompts: int = doc(64, "prompts of a completion, at most")
    max_messages: int = doc(1024, "messages of a chat, at most")
    max_body_bytes: int = doc(1 << 20, "a request's body, at most")
    max_depth: int = doc(32, "nesting of a request's JSON, at most")
    max_connections: int = doc(1024, "open connections, at most")
    request_timeout_s: float = doc(600.0, "seconds after which an answer ends as it stands")
    body_timeout_s: float = doc(30.0, "seconds for a request's headers, and for its body")
    client_timeout_s: float = doc(30.0, "seconds that a client may leave unread what was sent before it is cut off")
    template_timeout_s: float = doc(5.0, "seconds for rendering a chat")
    drain_s: float = doc(30.0, "seconds for running requests to end by themselves after SIGTERM")
    log_prompts: bool = doc(False, "prompts and answers are logged")

    def __post_init__(self):
        if not isinstance(self.host, str) or not self.host:
            raise bad("host", self.host, "an address or a name")
        check(self, "port", as_int, 0, 65535)
        for name in ("api_key", "served_model_name", "allowed_origins"):
            put(self, name, _as_names(name, getattr(self, name)))
        if self.max_model_len is not None:
            check(self, "max_model_len", as_int, 1)
        counts = ("default_max_tokens", "max_body_bytes", "max_depth", "max_connections")
        for name in counts:
            check(self, name, as_int, 1)
        for name, most in (("max_samples", MAX_SAMPLES), ("max_messages", MAX_LISTED), ("max_prompts", MAX_LISTED)):
            check(self, name, as_int, 1, most)
        for name in ("request_timeout_s", "body_timeout_s", "client_timeout_s", "template_timeout_s", "drain_s"):
            check(self, name, as_float, "above 0 and finite", lambda x: 0 < x < math.inf)
        check(self, "log_prompts", as_flag)
