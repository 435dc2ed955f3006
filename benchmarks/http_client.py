"""Streamed requests to a server of OpenAI's API, many at once: what came when, and what went wrong."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy

from .sse import EventStream

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ERROR_CHARACTERS = 300  # of a server's message


@dataclass
class Answer:
    """One request and what came back.

    due: when it was to be sent, on time.perf_counter, as are sent. commits: when text came, seconds since it was sent.
    seconds: from then until the stream's end. usage: as the server tells it at the end, or None. trace: as
    llada2_fast's server tells it where it is asked to, or None. error: what kind of failure, or None; message: what it
    said.
    """

    due: float
    sent: float = 0.0
    commits: list[float] = field(default_factory=list)
    seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None
    finish_reason: str | None = None
    error: str | None = None
    message: str = ""

    @property
    def text(self):
        return "".join(self.texts)

    @property
    def num_tokens(self):
        """As the server counts them, else as many as there were chunks with text."""
        told = _count(self.usage, "completion_tokens")
        return len(self.commits) if told is None else told

    def fail(self, kind, message):
        self.error, self.message = kind, " ".join(str(message).split())[:ERROR_CHARACTERS]


def _count(usage, name):
    """A count of a server's usage; None where it does not tell one."""
    value = (usage or {}).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def total(answers, name):
    """The sum of a count over all answers; None unless every one of them tells it."""
    counts = [_count(answer.usage, name) for answer in answers]
    return None if not counts or None in counts else sum(counts)


def open_session(key, timeout_s):
    """An aiohttp session. key: sent as a bearer token, or None; timeout_s: for a request and its answer."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers={"Authorization": f"Bearer {key}"} if key else None,
    )  # fmt: skip


def bodies(endpoint, prompts, **fields):
    """What is posted: a streamed request for each prompt, a conversation, or a text where the endpoint is of
    completions. fields: of all of them; one that is None is not there."""
    common = {"stream": True, "stream_options": {"include_usage": True}} | fields
    common = {name: value for name, value in common.items() if value is not None}
    return [common | {"messages" if endpoint == "chat" else "prompt": prompt} for prompt in prompts]


class _Failed(Exception):
    """The server has said inside the stream that the request has failed."""


def _read(answer, event, now):
    """Note in `answer` what an event of its stream says; now: seconds since it was sent. True if it is the last.
    ValueError for what OpenAI's API does not send."""
    if event == "[DONE]":
        return True
    try:
        chunk = json.loads(event)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error} in {event[:80]!r}") from None
    if not isinstance(chunk, dict):
        raise ValueError(f"expected an object, got {event[:80]!r}")
    if chunk.get("error") is not None:
        raise _Failed(_message(chunk))
    if isinstance(chunk.get("usage"), dict):
        answer.usage = chunk["usage"]
    came, choices = False, chunk.get("choices") or []
    for choice in choices if isinstance(choices, list) else [None]:
        delta = choice.get("delta", choice) if isinstance(choice, dict) else None
        if not isinstance(delta, dict):
            raise ValueError(f"expected a list of choices with text, got {event[:80]!r}")
        parts = [delta.get(name) for name in ("content", "text", "reasoning", "reasoning_content")]
        text = "".join(part for part in parts if isinstance(part, str))
        if text:
            answer.texts.append(text)
        came = came or bool(text or delta.get("tool_calls"))
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        answer.trace = choice.get("trace", answer.trace)
    if came:
        answer.commits.append(now)
    return False


def _message(body):
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", error) if isinstance(error, dict) else error or body)


async def ask(session, url, body, answer):
    """POST `body` and read the stream into `answer`. Whatever the server or the network does wrong is noted there."""
    import aiohttp

    answer.sent = time.perf_counter()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                _refused(answer, response.status, await response.text(errors="replace"))
            elif response.content_type != "text/event-stream":
                answer.fail("malformed", f"expected text/event-stream, got {response.content_type}")
            else:
                await _read_all(answer, response)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        answer.fail("timeout", "no end of the answer in time")
    except _Failed as error:
        answer.fail("error in the stream", error)
    except ValueError as error:  # of _read, or bytes that are no events
        answer.fail("malformed", error)
    except aiohttp.ClientConnectorError as error:
        answer.fail("unreachable", error)
    except (aiohttp.ClientError, OSError) as error:
        answer.fail("disconnected", f"{type(error).__name__}: {error}")
    answer.seconds = time.perf_counter() - answer.sent


async def _read_all(answer, response):
    events, done = EventStream(), False
    async for data in response.content.iter_any():
        now = time.perf_counter() - answer.sent
        for event in events.feed(data):
            done = _read(answer, event, now) or done
    if not done and answer.finish_reason is None:
        answer.fail("disconnected", "the stream ended before the answer did")


def _refused(answer, status, text):
    try:
        text = _message(json.loads(text))
    except ValueError:  # no JSON: then as it is
        pass
    answer.fail("429" if status == 429 else f"{status // 100}xx", f"{status}: {text}")


def arrivals(count, rate, seed):
    """Seconds after the first at which requests are due: a Poisson process of `rate` per second, inf: all at once."""
    gaps = numpy.random.default_rng(seed).exponential(1 / rate, count)
    return (gaps.cumsum() - gaps[:1]).tolist()


async def run(session, url, bodies, max_concurrency, due=None, on_end=lambda answer: None):
    """Send all bodies, at most `max_concurrency` at a time; a list of Answer, in their order.

    due: seconds from now at which each is to be sent, ascending, else at once. on_end: called with each answer as it
    ends.
    """
    begun = time.perf_counter()
    answers = [Answer(begun + after) for after in (due if due is not None else [0.0] * len(bodies))]
    jobs = iter(zip(bodies, answers, strict=True))

    async def one_after_another():  # whoever is free takes the next that is due: as many as there may be at a time
        for body, answer in jobs:
            await asyncio.sleep(max(0.0, answer.due - time.perf_counter()))
            await ask(session, url, body, answer)
            on_end(answer)

    await asyncio.gather(*(one_after_another() for _ in range(min(max_concurrency, len(bodies)))))
    return answers
