"""RequestOptions: what a request asks of an engine beside how it is decoded."""

import math
from dataclasses import dataclass

from .checks import as_flag, as_float, as_ids, as_int, bad, check, described, doc, put

MAX_STOPS, MAX_STOP_LENGTH = 16, 1024  # stop strings of a request, and characters of each
MAX_STOP_IDS = 1024
MAX_NAME = 256  # characters of a request_id or a cache_salt
MAX_CANVAS = 2**20  # characters or tokens of a canvas
MAX_LISTED = 1024  # prompts, messages or parts of one: longer lists are refused unread
MAX_SAMPLES = 128  # of a prompt, OpenAI's limit
MAX_TOP_LOGPROBS = 20  # OpenAI's limit


def _as_text(name, value, longest):
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise bad(name, value, f"a string of 1..{longest} characters, or None")
    return str(value)


def _as_stops(value):
    stops = () if value is None else (value,) if isinstance(value, str) else value
    several = isinstance(stops, (list, tuple, set, frozenset)) and len(stops) <= MAX_STOPS
    if not several or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_LENGTH for one in stops):
        raise bad("stop", value, f"strings that are not empty, at most {MAX_STOPS} of {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _as_canvas(name, value):
    if isinstance(value, str):
        return _as_text(name, value, MAX_CANVAS)
    if hasattr(value, "tolist"):
        try:
            value = value.tolist()
        except RuntimeError:  # a tensor on the meta device, or a sparse one
            raise bad(name, value, "ids, or a dense tensor that has values") from None
    known = isinstance(value, (list, tuple)) and 0 < len(value) <= MAX_CANVAS
    if not known or any(isinstance(one, (str, list, tuple)) for one in value):
        raise bad(name, value, f"a text, or ids and None, at most {MAX_CANVAS} of them")
    return tuple(value)


@described
@dataclass(frozen=True)
class RequestOptions:
    """What a request asks of an engine; ValueError naming field, value and what is allowed. None = not set."""

    request_id: str | None = doc(None, "a name that no unfinished request has; made up unless given")
    priority: float = doc(0.0, "a finite number, higher goes first")
    stop: tuple[str, ...] = doc(
        (),
        "a string or several that end the text, not part of it. Stops count as soon as they are committed and no mask "
        "is left before them; with editing on, when their block ends, with an edit_window when no pass reaches it any "
        "more. One may be, or hold, a special token",
    )
    stop_token_ids: tuple[int, ...] = doc((), "ids that end the tokens, part of them")
    include_stop: bool = doc(False, "a stop string is part of the text that it ends")
    skip_special_tokens: bool = doc(True, "special tokens are no text")
    min_tokens: int = doc(0, "an EOS or a stop among so many of the first tokens does not end the answer")
    deadline_s: float | None = doc(
        None, 'seconds after its arrival at which it ends as it stands, with finish_reason "deadline"'
    )
    cache_salt: str | None = doc(None, "it shares cached prefixes with requests of the same salt alone")
    top_logprobs: int = doc(0, f"likeliest tokens told beside each one, at most {MAX_TOP_LOGPROBS}")
    trace: bool | None = doc(None, "keep every commit and edit; as the engine's config says unless given")
    canvas: str | tuple[int | None, ...] | None = doc(
        None,
        "what is given of the answer, which is as long: ids and gaps, None or the mask id, or a text with {gap:n} for "
        "n tokens. An EOS or a stop in front of the last given token ends nothing",
    )

    def __post_init__(self):
        for name in ("request_id", "cache_salt"):
            if getattr(self, name) is not None:
                check(self, name, _as_text, MAX_NAME)
        if self.canvas is not None:
            check(self, "canvas", _as_canvas)
        put(self, "priority", 0.0 if self.priority is None else self.priority)
        check(self, "priority", as_float, "that is finite", math.isfinite)
        put(self, "stop", _as_stops(self.stop))
        put(self, "stop_token_ids", () if self.stop_token_ids is None else self.stop_token_ids)
        put(self, "stop_token_ids", as_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS))
        for name, low, high in (("min_tokens", 0, 2**31 - 1), ("top_logprobs", 0, MAX_TOP_LOGPROBS)):
            put(self, name, 0 if getattr(self, name) is None else getattr(self, name))
            check(self, name, as_int, low, high)
        if self.deadline_s is not None:
            check(self, "deadline_s", as_float, "above 0 and finite, or None", lambda x: 0 < x < math.inf)
        for name in ("include_stop", "skip_special_tokens", *(["trace"] if self.trace is not None else [])):
            check(self, name, as_flag)
