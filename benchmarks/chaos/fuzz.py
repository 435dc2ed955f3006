"""R1: bodies that nobody should send, each of them answered, and none by a failure of the server's."""

import asyncio
import json
import random
import re
import time
from collections import Counter

from .gate import Verdict, p99, tally
from .wire import Connection, ask

SECONDS, CLIENTS = 90.0, 8
PATIENCE_S = 30.0  # an answer that takes longer hangs
OPTIONS = ("--default-max-tokens", 8)  # nobody waits for the 2048 tokens of who does not say how many
MAX_MESSAGE = 500  # characters
SECRET = "sk-chaos-0123456789-planted"  # in bodies as value, prompt, and with its hyphens a field that nobody knows
# A file's path, an address or a class of an object in memory, a traceback.
TELLTALE = re.compile(r"\.py\b|0x[0-9a-f]{4,}|<\w+[. ]|Traceback|(?<![\w/])/(?!v1/|metrics|health)\w+/\w+")
ROUTES = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Add 8 and 9."}], "max_tokens": 4, "temperature": 0.0, "stop": ["x"],
        "stream": False, "n": 1, "seed": 1, "threshold": 0.5, "top_p": 1.0, "logprobs": True, "top_logprobs": 2,
    },
    "/v1/completions": {
        "prompt": "Add 8 and 9.", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
        "draft": True, "trace": True, "logprobs": 1, "cache_salt": "s", "request_id": None, "deadline_s": 5.0,
    },
    "/tokenize": {"prompt": "Add 8 and 9.", "model": None},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/requests/nobody/cancel": {},
}  # fmt: skip
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324, "", " ", "\0", "a\0b",
    "\ud800", "x\udfffy", "\uffff\u202e\U0010ffff", "null", "💥" * 50, SECRET, "x" * 5000, [], [[]], [[[[]]]], [None],
    [1, "a"], [SECRET], [[1, 2], "a"], [[1], [-1]], [2**31 - 1], list(range(3000)), ["a"] * 300, {}, {"a": SECRET},
    {"role": "user"}, [{"role": SECRET, "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": SECRET}, {}]}], [{"role": "assistant", "content": ""}] * 40,
]  # fmt: skip
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 5000, "0x10", "1_000", "01", "+1", ".5", "1.", "1e"]
UNKNOWN = ["foo", "__proto__", "__class__", "", "\0", SECRET, "a" * 3000, "model_config", "self", "messages.0", "N"]
TYPES = [
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "json",
    "application/json; charset=utf-16", "APPLICATION/JSON", "application/json;", "", "a" * 2000, "image/png",
]  # fmt: skip


class Bodies:
    """Yields (path, body, headers), without end."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.ways = [
            self.odd_value, self.odd_value, self.odd_value, self.unknown, self.truncated, self.flipped, self.number,
            self.nested, self.duplicate, self.long_prompt, self.content_type, self.deep_prompt, self.other_json,
            self.garbage, self.right, self.name,
        ]  # fmt: skip

    def __iter__(self):
        while True:
            path, fields = self.random.choice(list(ROUTES.items()))
            kept = {name: value for name, value in fields.items() if self.random.random() < 0.7}
            if "messages" in fields or "prompt" in fields:  # mostly there, so that what is behind them is reached
                kept = {name: fields[name] for name in ("messages", "prompt") if name in fields} | kept
            made = self.random.choice(self.ways)(path, kept)
            path, body, headers = made if len(made) == 3 else (*made, {"Content-Type": "application/json"})
            yield path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers

    def odd_value(self, path, fields):
        for _ in range(self.random.choice([1, 1, 2])):
            fields[self.random.choice([*ROUTES[path], "model"])] = self.random.choice(ODD)
        return path, fields

    def unknown(self, path, fields):
        return path, fields | {self.random.choice(UNKNOWN): self.random.choice(ODD)}

    def truncated(self, path, fields):
        text = json.dumps(fields).encode()
        return path, text[: self.random.randrange(len(text))]

    def flipped(self, path, fields):
        text = bytearray(json.dumps(fields | {"user": SECRET}).encode())
        for _ in range(self.random.randrange(1, 5)):
            text[self.random.randrange(len(text))] = self.random.randrange(256)
        return path, bytes(text)

    def number(self, path, fields):
        name = self.random.choice([*ROUTES[path], "model"])
        text = json.dumps(fields | {name: "@"}).replace('"@"', self.random.choice(NUMBERS))
        return path, text.encode()

    def nested(self, path, fields):
        depth = self.random.choice([5, 31, 33, 500, 100_000])
        opening, closing = self.random.choice([("[", "]"), ('{"a":', "}")])
        inner = opening * depth + "1" + closing * self.random.choice([depth, 0])
        return path, self.random.choice([inner, json.dumps(fields)[:-1] + f', "messages": {inner}}}']).encode()

    def duplicate(self, path, fields):
        text = json.dumps(fields)
        return path, (text[:-1] + ("," if fields else "") + '"max_tokens":2,"max_tokens":"' + SECRET + '"}').encode()

    def long_prompt(self, path, fields):
        (count,) = self.random.choices([750, 3000, 4200, 30_000, 300_000], [8, 8, 8, 2, 1])  # the last take a second
        text = self.random.choice(["word ", "a", "💥", "\0", SECRET]) * count
        fields.update({"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text})
        return path, fields

    def content_type(self, path, fields):
        kind = self.random.choice([*TYPES, None])
        return path, fields | {"user": SECRET}, {} if kind is None else {"Content-Type": kind}

    def deep_prompt(self, path, fields):
        deep = 1
        for _ in range(self.random.randrange(2, 30)):
            deep = [deep]
        name = "messages" if "chat" in path else "tokens" if "detokenize" in path else "prompt"
        return path, fields | {name: deep}

    def other_json(self, path, fields):
        return path, self.random.choice([
            b"", b"null", b"1", b'"x"', b"[]", b"{}", b"[{}]", b"\xef\xbb\xbf{}", b"{} {}", b"\0", b"tru", b'"\xff"',
            "{}".encode("utf-16"), b'{"messages":[{"role":"user","content":"\\ud83d"}]}', b"[" * 1000, b"}" * 9,
        ])  # fmt: skip

    def garbage(self, path, fields):
        return path, self.random.randbytes(self.random.randrange(200))

    def right(self, path, fields):
        return path, ROUTES[path]

    def name(self, path, fields):
        odd = self.random.choice(["%00", "%ff", "..%2f..%2fetc", "a" * 300, "%F0%9F%92%A5", "x%0d%0aX:1", SECRET, "-"])
        return self.random.choice([f"/v1/requests/{odd}/cancel", f"/v1/{odd}", f"{path}/", f"{path}?a={odd}"]), fields


def check(status: int, body: bytes) -> str | None:
    """What is wrong with a response."""
    if status >= 500 or not 200 <= status:
        return f"status {status}: {body[:200]!r}"
    if status < 400:
        return None
    try:
        (detail,) = json.loads(body).values()
        message, *rest = (detail.pop(name) for name in ("message", "type", "param", "code"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no envelope of OpenAI's ({error}): {body[:200]!r}"
    if detail or not isinstance(message, str) or not all(one is None or isinstance(one, str) for one in rest):
        return f"no envelope of OpenAI's: {body[:200]!r}"
    if len(message) > MAX_MESSAGE:
        return f"{len(message)} characters: {message[:200]!r}"
    if SECRET in body.decode() or TELLTALE.search(message):
        return f"it tells too much: {message!r}"
    return None


async def fuzz(server, bodies: int) -> Verdict:
    """So many bodies on every POST route."""
    documented = {path for path, item in (await ask(server.port, "GET", "/openapi.json")).json()["paths"].items()
                  if "post" in item}  # fmt: skip
    statuses, wrong, seconds, source = Counter(), [], [], zip(range(bodies), Bodies(0), strict=False)

    async def client():
        connection = None
        for number, (path, body, headers) in source:
            connection = connection or await Connection.open(server.port)
            begun = time.perf_counter()
            try:
                connection.send("POST", path, body, headers)
                response = await asyncio.wait_for(connection.response(), PATIENCE_S)
            except (asyncio.TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
                wrong.append(f"body {number}, {path}: {type(error).__name__} {error}: {body[:100]!r}")
                connection.cut()
                connection = None
                continue
            seconds.append(time.perf_counter() - begun)
            statuses[response.status] += 1
            if problem := check(response.status, response.body):
                wrong.append(f"body {number}, {path}, {body[:100]!r}: {problem}")
            if response.headers.get("connection") == "close":
                connection = connection.cut()
        if connection:
            connection.cut()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    took = time.perf_counter() - begun
    figures = {"statuses": statuses, "seconds": took, "p99_ms": 1e3 * p99(seconds), "longest_s": max(seconds)}
    verdict = Verdict(
        "R1", f"{bodies} fuzzed bodies", f"{tally(statuses)}; {took:.0f} s",
        f"no 5xx, no hang, 4xx in OpenAI's envelope, {SECONDS:.0f} s", figures, wrong,
    )  # fmt: skip
    patterns = [re.sub(r"\{\w+\}", r"[^/]+", path) for path in documented]
    unmet = [path for path in patterns if not any(re.fullmatch(path, route) for route in ROUTES)]
    verdict.demand(not unmet, f"POST routes that no body is for: {unmet}")
    verdict.demand(server.lives and (await ask(server.port, "GET", "/health")).status == 200, "the server has ended")
    verdict.demand(took <= SECONDS, f"{took:.0f} s")
    failures = [line for line in server.told() if line["level"] == "error"]
    verdict.demand(not failures, f"{len(failures)} errors in its log: {str(failures[:1])[:500]}")
    return verdict
