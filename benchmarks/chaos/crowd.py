"""Clients that ask in every way there is, some of whom leave before they have their answer."""

import asyncio
import itertools
import json
import random
from collections import Counter
from typing import Any, NamedTuple

from ..soak import SAMPLES
from .jobs import Job
from .wire import PATIENCE_S, Connection, Response, request

RETRY_S = 0.05  # before who was turned away asks again
LAST = 50  # answers that the typical time is made of


class Told(NamedTuple):
    """choices: by index {"text", "reason", "tokens", "logprobs"}, the last two None where not told. error: a message in
    place of them. ended: as an answer should end."""

    choices: dict[int, dict[str, Any]]
    error: str | None
    ended: bool


def read(response: Response, stream: bool) -> Told:
    """What a response with status 200 tells."""
    if not stream:
        choices = {}
        for one in response.json()["choices"]:
            text = one["message"]["content"] if "message" in one else one["text"]
            choices[one["index"]] = {
                "text": text, "reason": one["finish_reason"], "tokens": None, "logprobs": _logprobs(one),
            }  # fmt: skip
        return Told(choices, None, True)
    choices, error, events = {}, None, response.events()
    for event in events[:-1]:
        if "error" in event:
            error = event["error"]["message"]
        for one in event.get("choices", ()):
            told = choices.setdefault(one["index"], {"text": "", "reason": None, "tokens": None, "logprobs": None})
            told["text"] += one["delta"].get("content", "") if "delta" in one else one["text"]
            told["reason"] = one["finish_reason"] or told["reason"]
            for name, more in (("tokens", one.get("commit", {}).get("token_ids")), ("logprobs", _logprobs(one))):
                if more is not None:
                    told[name] = (told[name] or []) + more
    return Told(choices, error, bool(events) and events[-1] == "[DONE]")


def _logprobs(choice):
    told = choice.get("logprobs")
    if not told:
        return None
    return told["token_logprobs"] if "token_logprobs" in told else [one["logprob"] for one in told["content"]]


class Crowd:
    """Asks a server for the answers of jobs, and compares.

    counts: how many requests ended how. wrong: a line for everything that was. failed: names of the requests that the
    server said have failed, which is wrong unless faults are expected. running: names of those that nobody has left;
    cancelled: of those that somebody has asked the server to end, whose answers may be no more than a beginning.
    """

    def __init__(self, port: int, jobs: list[Job], faults: bool = False):
        self.port, self.jobs, self.random, self.faults = port, jobs, random.Random(0), faults
        self.counts, self.wrong = Counter(), []
        self.failed, self.running, self.cancelled = set(), set(), set()
        self._numbers, self._seconds = itertools.count(), [0.3]

    @property
    def cut(self) -> int:
        """How many have left before they had their answer."""
        return self.counts["cut off"] + self.counts["cut off in the request"]

    async def run(self, clients: int, go_on, cut: float):
        """clients at a time ask while go_on(); cut: the share of them that leaves early."""

        async def client():
            while go_on():
                await self.ask(self.random.choice(self.jobs), self.random.random() < cut)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def ask(self, job: Job, cut: bool = False):
        """One request, again and again where it is turned away; cut: the client leaves before it is answered."""
        path, body = self._way(job)
        while not await self._once(job, path, body, cut):
            self.counts["turned away"] += 1
            await asyncio.sleep(RETRY_S)

    def _way(self, job):
        rng, chat = self.random, self.random.random() < 0.6
        body = job.fields | {"request_id": f"chaos-{next(self._numbers)}", "stream": rng.random() < 0.5}
        body["n"] = rng.choice([1, 1, 1, 2, SAMPLES])
        if body["stream"]:
            body["draft"] = rng.random() < 0.4
        if rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": rng.randrange(4)} if chat else {"logprobs": rng.randrange(4)}
        if rng.random() < 0.1:
            body["trace"] = True
        if rng.random() < 0.2:
            body["cache_salt"] = rng.choice(["one", "two"])
        if chat:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": job.question}]}
        return "/v1/completions", body | {"prompt": job.prompt}

    async def _once(self, job, path, body, cut):
        """False if it was turned away."""
        loop, rng = asyncio.get_running_loop(), self.random
        data, begun = request("POST", path, json.dumps(body).encode()), loop.time()
        whole = not cut or rng.random() > 0.1
        patience = rng.uniform(0, sum(self._seconds) / len(self._seconds)) if cut else PATIENCE_S
        connection = await Connection.open(self.port)
        self.running.add(body["request_id"])
        try:
            connection.writer.write(data if whole else data[: rng.randrange(len(data))])
            response = await asyncio.wait_for(connection.response(), patience)
        except asyncio.TimeoutError:
            self._left(body, "cut off" if whole else "cut off in the request", cut)
            return True
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self.wrong.append(f"{body['request_id']}: {type(error).__name__} {error}")
            return True
        finally:
            self.running.discard(body["request_id"])
            connection.writer.close() if rng.random() < 0.5 else connection.cut()
        if response.status == 429:
            return False
        self._seconds = [*self._seconds[-LAST:], loop.time() - begun]
        self._check(job, body, response)
        return True

    def _left(self, body, how, meant):
        self.counts[how] += 1
        if not meant:
            self.wrong.append(f"{body['request_id']}: no answer in {PATIENCE_S:.0f} s")

    def _check(self, job, body, response):
        name, stream = body["request_id"], body["stream"]
        if response.status != 200:
            self._fail(name, response.status == 500, f"status {response.status}: {response.body[:300]!r}")
            return
        told = read(response, stream)
        if not told.ended:
            self.wrong.append(f"{name}: the stream does not end with [DONE]")
        if told.error is not None:
            self._fail(name, name in told.error, f"an error in the stream: {told.error}")
        elif sorted(told.choices) != list(range(body["n"])):
            self.wrong.append(f"{name}: choices {sorted(told.choices)} of {body['n']}")
        else:
            self.counts["answered"] += 1
        for number, one in told.choices.items():
            begun = told.error is not None or (name in self.cancelled and one["reason"] == "abort")
            reason = None if begun else one["reason"]
            problem = job.check(number, one["text"], reason, one["tokens"], one["logprobs"], begun)
            if problem:
                self.wrong.append(f"{name}: {problem}")

    def _fail(self, name, properly, what):
        self.failed.add(name)
        self.counts["failed"] += 1
        if not (self.faults and properly):
            self.wrong.append(f"{name}: {what}")
