"""`llada2-fast serve` as a program: keys, limits, its log, and how it ends."""

import asyncio
import base64
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import openai
import pytest

from benchmarks.own_server import ServerProcess
from llada2_fast.cli import main
from tests.engine.common import chat as prompt
from tests.server.common import LONG, MODEL, QUESTIONS, alone, chat, client_of

client = partial(client_of, key="first")


@pytest.fixture(scope="module")
def server():
    """One that is narrow in every way."""
    options = (
        "--api-key", "first", "--max-num-seqs", "1", "--max-queue", "1", "--max-body-bytes", "2000", "--max-model-len",
        "600", "--body-timeout-s", "0.5", "--drain-s", "0.5", "--max-samples", "2", "--threshold", "0.5",
        "--policy", "entropy", "--entropy-bound", "0",
        "--served-model-name", "narrow", "--served-model-name", "other", "--allowed-origins", "http://localhost:3000",
    )  # fmt: skip
    with ServerProcess(*options, variables={"LLADA2_FAST_API_KEY": "second"}) as server:
        yield server


def get(server, path, **headers):
    """(status, headers, body) of a raw request."""
    request = urllib.request.Request(server.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def basic(key):
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


@pytest.mark.parametrize("path", ["/ready", "/metrics", "/version", "/playground", "/openapi.json", "/v1/models", "/x"])
def test_every_route_but_health_asks_for_a_key(server, path):
    status, headers, body = get(server, path)
    assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
    assert headers["WWW-Authenticate"].startswith("Basic" if path == "/playground" else "Bearer")
    for wrong in (
        "Bearer third",
        "Bearer firstsecond",
        "Bearer",
        "first",
        basic("third"),
        "Basic !",
        "Bearer f\xefrst",
    ):
        assert get(server, path, Authorization=wrong)[0] == 401
    for right in ("Bearer first", "Bearer second", "bearer second", basic("first")):
        assert get(server, path, Authorization=right)[0] == (404 if path == "/x" else 200)
    assert get(server, "/health")[0] == 200


def test_the_client_with_a_key(server):
    with pytest.raises(openai.AuthenticationError):
        client(server, key="third").models.list()
    listed = client(server, key="second").models.list().data
    assert [(model.id, model.max_model_len) for model in listed] == [("narrow", 600), ("other", 600)]


def test_defaults_of_decoding_are_those_it_was_started_with(server):
    quality = {"threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16}
    by_entropy = {"policy": "entropy", "entropy_bound": 0}
    for extra, same in (
        ({}, by_entropy),
        ({"entropy_bound": 0.3}, {"policy": "entropy"}),
        ({"threshold": 0.95}, {}),
        ({"policy": "threshold"}, {"threshold": 0.5}),
        ({"mode": "quality"}, quality),
        ({"mode": "quality", "policy": "entropy"}, quality | by_entropy),
        ({"policy": "self_speculative"}, {"policy": "self_speculative"}),
        ({"policy": "self_speculative", "entropy_bound": 0}, by_entropy | {"policy": "self_speculative"}),
    ):
        (want,) = alone(prompt(QUESTIONS[0]), **same)
        got = client(server).chat.completions.create(
            model="other", messages=chat(QUESTIONS[0]), max_tokens=64, logprobs=True, extra_body=extra
        )
        assert [one.logprob for one in got.choices[0].logprobs.content] == pytest.approx(want.logprobs)
        assert got.usage.denoise_forwards == want.counters.denoise_forwards, extra
    assert alone(prompt(QUESTIONS[0]), **by_entropy)[0].counters.denoise_forwards > 30  # unlike those by threshold


def test_limits(server):
    def refused(**rest):
        with pytest.raises(openai.APIStatusError) as error:
            asked = {"model": "narrow", "messages": chat("x"), "max_tokens": 8} | rest
            client(server).chat.completions.create(**asked)
        return error.value.status_code, error.value.param

    assert refused(n=3) == (400, "n")
    assert refused(max_tokens=600) == (400, "messages")
    assert refused(messages=chat("x" * 2000)) == (413, None)


def test_other_sites_are_let_in_by_name(server):
    key = {"Authorization": "Bearer first"}
    for origin, allowed in (("http://localhost:3000", "http://localhost:3000"), ("http://evil.example", None)):
        assert get(server, "/v1/models", Origin=origin, **key)[1]["Access-Control-Allow-Origin"] == allowed
    preflight = urllib.request.Request(
        server.url + "/v1/chat/completions", method="OPTIONS",
        headers={"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"},
    )  # fmt: skip
    with urllib.request.urlopen(preflight) as answer:
        assert answer.status == 200


def test_a_full_queue_is_told(server):
    async def main():
        async with client(server, kind=openai.AsyncOpenAI) as serving:

            async def one():
                asked = {"model": "narrow", "messages": chat("x"), "max_tokens": 100, "extra_body": LONG}
                return await serving.chat.completions.create(**asked)

            return await asyncio.gather(*(one() for _ in range(8)), return_exceptions=True)

    answers = asyncio.run(main())
    refused = [one for one in answers if isinstance(one, openai.RateLimitError)]
    assert len(refused) in (6, 7)  # what the engine is just taking may count twice, never not at all
    assert refused[0].code == "queue_full" and refused[0].response.headers["Retry-After"] == "1"
    assert all(one.usage.completion_tokens == 100 for one in answers if one not in refused)


def test_a_deadline_that_is_over_in_the_queue_is_no_answer(server):
    asked = {"model": "narrow", "messages": chat("x")}
    with client(server).chat.completions.create(**asked, max_tokens=500, stream=True, extra_body=LONG) as stream:
        assert next(stream).choices
        with pytest.raises(openai.InternalServerError) as error:
            client(server).chat.completions.create(**asked, max_tokens=8, extra_body={"deadline_s": 0.05})
    assert (error.value.status_code, error.value.code) == (503, "deadline")


@pytest.mark.parametrize(
    "sent, answer",
    [
        (b"", b""),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b""),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: 9\r\n\r\n{", b"408"),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000, b"400"),
    ],
)  # fmt: skip
def test_who_does_not_come_up_with_a_request_is_cut_off(server, sent, answer):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent)
        got, began = connection.recv(65536), time.monotonic()
        assert answer in got.partition(b"\r\n")[0]
        while got:
            try:
                got = connection.recv(65536)
            except ConnectionResetError:
                break
        assert time.monotonic() - began < 5


def test_the_log_has_no_prompts_and_tells_each_request(server):
    answer = client(server).chat.completions.create(model="narrow", messages=chat("XYZZY"), max_tokens=16)
    get(server, "/nowhere")
    line = server.wait_for(id=answer.id)
    assert line["event"] == "request" and line["status"] == 200 and line["ms"] > 0
    assert line["completion_tokens"] == answer.usage.completion_tokens and line["finish_reasons"] == ["length"]
    line = server.wait_for(method="GET", route="other", status=401)
    assert line.keys() == {"time", "level", "event", "method", "route", "status", "ms"}
    assert "XYZZY" not in server.log() and "first" not in server.log()


def test_what_runs_is_ended_when_the_time_to_drain_is_over(server):
    """Last in this file: the server is gone then."""
    stream = client(server).chat.completions.create(
        model="narrow", messages=chat("x"), max_tokens=580, stream=True, extra_body=LONG | {"steps": 100}
    )
    assert next(stream).choices
    ended = threading.Thread(target=server.stop)
    began = time.monotonic()
    ended.start()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    ended.join()
    assert server.process.returncode == 0 and time.monotonic() - began < 10
    assert [line["event"] for line in server.told()][-3:] == ["draining", "request", "ended"]


def test_streams_end_by_themselves_after_sigterm():
    with ServerProcess("--log-prompts") as server:

        async def main():
            async with client(server, kind=openai.AsyncOpenAI) as serving:

                async def one(text):
                    asked = {"model": MODEL, "messages": chat(text), "max_tokens": 64, "extra_body": {"steps": 16}}
                    stream = await serving.chat.completions.create(**asked, stream=True)
                    running.append(text)
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

                tasks = [asyncio.create_task(one(text)) for text in (*QUESTIONS, *QUESTIONS)]
                while len(running) < len(tasks):
                    await asyncio.sleep(0)
                server.terminate()
                return await asyncio.gather(*tasks)

        running = []
        texts = asyncio.run(main())
        assert texts == [alone(prompt(text), steps=16)[0].text for text in (*QUESTIONS, *QUESTIONS)]
        assert server.process.wait(30) == 0
        assert "943" in json.dumps([line.get("answers") for line in server.told()])


@pytest.mark.parametrize(
    "options, told",
    [
        (["--port", "70000"], "port=70000"),
        (["--drain-s", "0"], "drain_s=0.0"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
        (["--max-samples", "1000"], "max_samples=1000"),
        (["--threshold", "-1"], "threshold=-1.0"),
        (["--api-key", ""], "api_key="),
        (["--nothing"], "--nothing"),
        (["no/such/model"], "no/such/model"),
        (["--max-model-len", "5000", "--no-progress"], "max_model_len=5000"),
    ],
)
def test_a_mistake_is_told_in_a_line(capsys, options, told):
    assert main(["serve", "--port", "0", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("llada2-fast: error: ") and told in line


def test_a_port_that_is_taken_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "Address already in use" in capsys.readouterr().err


def test_help_says_what_every_option_is_by_default(capsys):
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--max-num-seqs N rows decoded together, at most (default: 16)", "--host", "(default: 127.0.0.1)",
        "--max-queue N requests that may wait for a place (default: 1024)", "--api-key NAME", "--threshold X",
    ):  # fmt: skip
        assert words in text
    docs = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    of_others = {"--base-url", "--num-prompts", "--max-concurrency"}  # bench serve's
    assert [
        flag
        for flag in re.findall(r"--[a-z][a-z-]+", docs)
        if flag not in {*text.replace(",", " ").split(), *of_others}
    ] == []
