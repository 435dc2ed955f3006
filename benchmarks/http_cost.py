"""What HTTP costs a token: `llada2-fast bench serve --against-engine`.

The embedded model answers the same prompts twice: in `llada2-fast serve`, streamed by this process, and in a process of
its own whose coroutines read the streams of an AsyncEngine, whose prompts are token ids already. Both are started
by the command line, with its threads and the server's engine settings, and each round's prompts are new to both.
The gate is a round of its own: the trace of every answer over HTTP must have the tokens that the engine alone gives;
in the timed rounds, which take turns at who goes first, texts and numbers of tokens must be equal.

http_us_per_token is of the clock: what a token takes longer over HTTP, while the client needs its share of the same
processors. The CPU time of all three is told beside it: server_cpu_us_per_token - engine_cpu_us_per_token is what the
HTTP layer, chat template and tokenizer included, computes, http_cpu_us_per_request the same of a request, and
client_cpu_us_per_token what this process does. others_share is what all other programs took of the processors: they
take more from the one process than from the two, so that the ratio means little unless it is near 0. Needs Linux.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

from llada2_fast.cli.machine import environment

from . import http_client
from .own_server import busy_seconds, serving

MAX_OTHERS = 0.05


def against_engine(args, rounds):
    """The results: medians of the timed rounds.

    args: bench_serve's. rounds: a list of chats for each round; the gate's comes first.
    """
    gate, *timed = rounds
    with serving() as server, direct_engine(args.max_concurrency) as engine:
        url = server.url + http_client.PATHS["chat"]

        def over_http(chats, **extra):
            async def run():
                async with http_client.open_session(None, args.timeout) as session:
                    fields = {"max_tokens": args.max_tokens} | args.extra_body | extra
                    sent = http_client.bodies("chat", chats, **fields)
                    begun = time.perf_counter()
                    answers = await http_client.run(session, url, sent, args.max_concurrency)
                    return answers, time.perf_counter() - begun

            return asyncio.run(run())

        params = _gate(over_http(gate, trace=True)[0], engine, gate)
        return _figures([_round(over_http, engine, server, chats, params, i) for i, chats in enumerate(timed)])


def _gate(answers, engine, chats):
    """Params of the server's answers, as the engine takes them. SystemExit if the tokens are not equal."""
    for answer in answers:
        if answer.error:
            raise SystemExit(f"over HTTP, {answer.error}: {answer.message}; nothing is timed")
    documents = [answer.trace for answer in answers]
    params = documents[0]["params"]
    alone = engine.run(chats, params)
    for i, (document, tokens) in enumerate(zip(documents, alone["token_ids"], strict=True)):
        if document["token_ids"] != tokens:
            raise SystemExit(f"tokens over HTTP and of the engine differ in request {i}; nothing is timed")
    print(f"{len(documents)} answers over HTTP have the tokens of the engine alone")
    return params


def _round(over_http, engine, server, chats, params, number):
    """Seconds by the clock and of CPU time of both ways, and how much they were of."""
    found, busy, begun = {}, busy_seconds(), time.perf_counter()

    def http():
        server_cpu, own_cpu = server.usage().cpu_s, time.process_time()
        found["answers"], found["http_s"] = over_http(chats)
        found["client_cpu_s"] = time.process_time() - own_cpu
        found["server_cpu_s"] = server.usage().cpu_s - server_cpu

    def alone():
        found["alone"] = engine.run(chats, params)

    for way in (http, alone) if number % 2 == 0 else (alone, http):
        way()
    answers, alone = found.pop("answers"), found.pop("alone")
    own = found["server_cpu_s"] + found["client_cpu_s"] + alone["cpu_s"]
    others = (busy_seconds() - busy - own) / (os.cpu_count() * (time.perf_counter() - begun))
    told = [(answer.error, answer.text, answer.num_tokens) for answer in answers]
    if told != [(None, text, len(ids)) for text, ids in zip(alone["texts"], alone["token_ids"], strict=True)]:
        raise SystemExit(f"round {number}: texts over HTTP and of the engine differ")
    return found | {
        "requests": len(chats), "tokens": sum(map(len, alone["token_ids"])), "threads": alone["threads"],
        "others_share": others, "engine_s": alone["seconds"], "engine_cpu_s": alone["cpu_s"],
    }  # fmt: skip


def _figures(rounds):
    def per_token(name):
        return [1e6 * one[name] / one["tokens"] for one in rounds]

    def median(name):
        return statistics.median(per_token(name))

    http, engine = median("http_s"), median("engine_s")
    more = [1e6 * (one["server_cpu_s"] - one["engine_cpu_s"]) / one["requests"] for one in rounds]
    return {
        "ratio": engine / http,
        "ratio_rounds": [a / b for a, b in zip(per_token("engine_s"), per_token("http_s"), strict=True)],
        "http_tok_s": 1e6 / http,
        "engine_tok_s": 1e6 / engine,
        "http_us_per_token": http - engine,
        **{f"{who}_cpu_us_per_token": median(f"{who}_cpu_s") for who in ("server", "engine", "client")},
        "http_cpu_us_per_request": statistics.median(more),
        "tokens_per_round": statistics.mean(one["tokens"] for one in rounds),
        "others_share": statistics.median(one["others_share"] for one in rounds),
        "engine_threads": rounds[0]["threads"],
        "equal_tokens": 1.0,
    }


def report(results):
    print(
        f"over HTTP {results['http_tok_s']:.0f} tokens/s, engine alone {results['engine_tok_s']:.0f}: "
        f"{100 * results['ratio']:.1f} %, {results['http_us_per_token']:.0f} us a token"
    )
    server, engine, client = (results[f"{who}_cpu_us_per_token"] for who in ("server", "engine", "client"))
    print(
        f"CPU time, us a token: server {server:.0f}, engine alone {engine:.0f}, client {client:.0f}; "
        f"us a request, of HTTP: {results['http_cpu_us_per_request']:.0f}"
    )
    if results["others_share"] > MAX_OTHERS:
        print(f"other programs took {100 * results['others_share']:.0f} % of the processors: the ratio means little")


# The engine's process


class DirectEngine:
    """A process in which an AsyncEngine answers, asked in lines of JSON."""

    def __init__(self, process):
        self._process = process

    def run(self, chats, params):
        """What `answer_lines` says of these chats."""
        self._process.stdin.write(json.dumps({"chats": chats, "params": params}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine's process ended with exit code {self._process.wait()}")
        return json.loads(line)


@contextmanager
def direct_engine(streams):
    """Yields a DirectEngine that reads so many streams at a time."""
    command = [sys.executable, "-m", "llada2_fast", "bench", "serve", "--direct-engine", "--max-concurrency"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, str(streams)], env=environment(), **pipes)
    with process:  # leaving it closes stdin, which ends the process
        yield DirectEngine(process)


def answer_lines(lines, streams):
    """Answer each line of JSON, {"chats", "params"}, by one: {"token_ids", "texts", "seconds", "cpu_s", "threads"}.

    Only what lies between the first request and the last answer is timed.
    """
    import torch

    from llada2_fast.cli import options
    from llada2_fast.config import DecodeParams, EngineConfig, ServerConfig
    from llada2_fast.engine import AsyncEngine, Engine
    from llada2_fast.weights.special_tokens import encode_chat, load_tokenizer

    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    model, folder = options.load_model(parser.parse_args(["--no-progress"]))
    tokenizer, config = load_tokenizer(folder), EngineConfig(graphs=model.device.type == "cuda")
    deadline_s = ServerConfig().request_timeout_s  # as the server gives them

    async def read(serving, prompts, params):
        outputs, jobs = [None] * len(prompts), iter(enumerate(prompts))

        async def one_after_another():
            for index, prompt in jobs:
                async for event in serving.stream(prompt, params, deadline_s=deadline_s, trace=False):
                    outputs[index] = event.output

        await asyncio.gather(*(one_after_another() for _ in range(streams)))
        return outputs

    async def answer_all():
        async with AsyncEngine(Engine(model, config, tokenizer)) as serving:
            for line in lines:
                asked = json.loads(line)
                prompts = [encode_chat(tokenizer, chat) for chat in asked["chats"]]
                cpu, begun = time.process_time(), time.perf_counter()
                outputs = await read(serving, prompts, DecodeParams(**asked["params"]))
                seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
                said = {
                    "token_ids": [output.token_ids for output in outputs], "texts": [output.text for output in outputs],
                    "seconds": seconds, "cpu_s": cpu, "threads": torch.get_num_threads(),
                }  # fmt: skip
                print(json.dumps(said), flush=True)

    asyncio.run(answer_all())
