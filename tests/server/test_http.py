"""A real server, asked by the official client and by schemathesis."""

import asyncio
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from benchmarks.chaos import wire
from tests.engine.common import chat as prompt
from tests.engine.common import tokenizer
from tests.server.common import LONG, MODEL, QUESTIONS, alone, chat, client_of, flawless_server

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def server():
    with flawless_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def metrics(server):
    """{name with labels: value}"""
    return asyncio.run(wire.metrics(server.port))


def post(server, path, data, content_type="application/json"):
    """(status, body) of a raw request."""
    request = urllib.request.Request(server.url + path, data, {"Content-Type": content_type}, method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(client, text=QUESTIONS[0], **rest):
    return client.chat.completions.create(**{"model": MODEL, "messages": chat(text), "max_tokens": 64} | rest)


def test_a_server_that_nobody_has_asked_has_done_nothing(server):
    told = metrics(server)
    counts = {name for name in told if name.startswith(("llada2:requests", "vllm:")) and not name.endswith("_created")}
    assert {told[name] for name in counts} == {0.0}
    assert sum(told[name] for name in told if name.startswith("llada2:requests_total")) == 0
    assert told["llada2:generation_tokens_total"] == told["llada2:engine_steps_total"] == 0


def test_the_model_is_listed(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.max_model_len) == (MODEL, 4096)
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize("text", QUESTIONS)
def test_a_chat_gets_the_tokens_of_an_engine(client, text):
    (want,) = alone(prompt(text))
    got = ask(client, text, logprobs=True, top_logprobs=2)
    choice, usage = got.choices[0], got.usage
    assert choice.message.content == want.text and choice.finish_reason == "stop"
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(want.logprobs)
    assert [one.token for one in choice.logprobs.content] == [tokenizer().decode([i]) for i in want.token_ids]
    for one in choice.logprobs.content:
        assert bytes(one.bytes).decode() == one.token and len(one.top_logprobs) == 2
        assert one.top_logprobs[0].token == one.token  # greedy
    assert (usage.prompt_tokens, usage.completion_tokens) == (want.prompt_length, len(want.token_ids))
    assert usage.denoise_forwards == want.counters.denoise_forwards
    assert usage.tokens_per_forward == pytest.approx(want.tokens_per_forward)


def test_streams_of_many_clients_at_once(server):
    async def one(client, text):
        stream = await client.chat.completions.create(
            model=MODEL, messages=chat(text), max_tokens=64, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        first, *_, last, usage = chunks
        assert first.choices[0].delta.role == "assistant" and last.choices[0].finish_reason == "stop"
        assert usage.choices == [] and usage.usage.completion_tokens > 0
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        return "".join(pieces), sum(map(bool, pieces))

    async def main():
        async with client_of(server, kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, text) for text in QUESTIONS * 8))

    wanted = {text: alone(prompt(text))[0].text for text in QUESTIONS}
    for (text, pieces), question in zip(asyncio.run(main()), QUESTIONS * 8, strict=True):
        assert text == wanted[question]
        assert pieces > 1  # by block


def test_samples_are_those_of_an_engine(client):
    decoding = {"temperature": 8.0, "seed": 7}
    want = alone(prompt(QUESTIONS[2]), n=3, threshold=0.3, **decoding)
    got = ask(client, QUESTIONS[2], n=3, extra_body={"threshold": 0.3}, **decoding)
    assert [choice.message.content for choice in got.choices] == [output.text for output in want]
    assert len({output.text for output in want}) > 1
    stream = ask(client, QUESTIONS[2], n=3, stream=True, extra_body={"threshold": 0.3}, **decoding)
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [output.text for output in want]


def test_a_stop_string_is_held_back(client):
    (whole,) = alone(prompt(QUESTIONS[0]))
    stop = whole.text[18:27]
    stream = ask(client, stop=stop, stream=True, extra_body={"draft": True})
    pieces = [chunk.choices[0] for chunk in stream]
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text == whole.text[: whole.text.index(stop)]
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", stop)
    included = ask(client, stop=[stop], extra_body={"include_stop_str_in_output": True})
    assert included.choices[0].message.content == text + stop


def test_tokens_found_in_the_cache_count_once(client):
    for _ in range(2):
        usage = ask(client, QUESTIONS[1], n=3).usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (len(prompt(QUESTIONS[1])), 16)


@pytest.mark.parametrize("window", [0, 1])
def test_drafts_and_a_trace(client, window):
    own = {"threshold": 2.0, "steps": 16, "editing_threshold": 0.9, "edit_window": window}
    extra = own | {"draft": True, "trace": True}
    choices = [chunk.choices[0] for chunk in ask(client, stream=True, extra_body=extra)]
    drafts = [choice.draft for choice in choices if hasattr(choice, "draft")]
    commits = [choice.commit for choice in choices if hasattr(choice, "commit")]
    assert any(-1 in draft["steps"] for draft in drafts)  # masks
    for draft in drafts:
        assert all((step < 0) == (text == "") for step, text in zip(draft["steps"], draft["tokens"], strict=True))
    (want,) = alone(prompt(QUESTIONS[0]), **own)
    assert [token for commit in commits for token in commit["token_ids"]] == want.token_ids
    trace = choices[-1].trace
    tokens = {event["position"]: event["token"] for event in trace["events"]}
    assert [tokens[i] for i in range(len(want.token_ids))] == want.token_ids == trace["token_ids"]
    assert trace["prompt"] == QUESTIONS[0] and len(trace["alternatives"]) == len(want.token_ids)
    plain = ask(client, extra_body=extra | {"draft": None})
    assert plain.choices[0].trace["events"] == trace["events"]


def test_completions_of_texts_and_ids(client):
    ids = prompt(QUESTIONS[1])
    (want,) = alone(ids)
    got = client.completions.create(model=MODEL, prompt=ids, max_tokens=64, logprobs=1)
    told = got.choices[0].logprobs
    assert got.choices[0].text == want.text
    assert told.token_logprobs == pytest.approx(want.logprobs)
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    both = client.completions.create(model=MODEL, prompt=[ids, prompt(QUESTIONS[0])], max_tokens=64, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[:2]] == [want.text] * 2
    assert both.usage.prompt_tokens == len(ids) + len(prompt(QUESTIONS[0]))
    stream = client.completions.create(model=MODEL, prompt=ids, max_tokens=64, logprobs=0, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == want.text
    assert [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset] == told.text_offset
    short = client.completions.create(model=MODEL, prompt="Once", extra_body={"ignore_eos": True})
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 16)


def test_parts_and_roles(client):
    parts = [{"type": "text", "text": "Add 847"}, {"type": "text", "text": " and 96."}]
    got = ask(client, messages=[{"role": "user", "content": parts}])
    assert got.choices[0].message.content == alone(prompt(QUESTIONS[0]))[0].text
    again = [*chat(QUESTIONS[0]), got.choices[0].message, *chat(QUESTIONS[1])]  # as it came
    assert ask(client, messages=again).usage.prompt_tokens > got.usage.total_tokens
    with_system = [{"role": "developer", "content": "Be brief."}, *chat(QUESTIONS[0])]
    assert ask(client, messages=with_system).usage.prompt_tokens > got.usage.prompt_tokens


@pytest.mark.parametrize(
    "given, param, code",
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"extra_body": {"min_tokens": 65}}, "min_tokens", "invalid_value"),
        ({"extra_body": {"request_id": "\u65e5\u672c"}}, "request_id", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", "invalid_value"),
        (
            {"messages": [*chat("x"), {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "tool_calls",
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "user", "content": ""}] * 1025}, "messages", "invalid_value"),
        ({"max_tokens": 100_000}, "messages", "context_length_exceeded"),
        ({"messages": chat("7" * 5000)}, "messages", "context_length_exceeded"),
        ({"max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"extra_body": {"draft": True}}, "draft", "invalid_value"),
        ({"extra_body": {"block_length": 7}}, "block_length", "invalid_value"),
        ({"extra_body": {"mode": "slow"}}, "mode", "invalid_value"),
        ({"extra_body": {"policy": "greedy"}}, "policy", "invalid_value"),
        ({"extra_body": {"entropy_bound": 0.5}}, "entropy_bound", "invalid_value"),
        ({"extra_body": {"policy": "entropy", "entropy_decay": 2}}, "entropy_decay", "invalid_value"),
        ({"temperature": 0.5, "extra_body": {"policy": "self_speculative"}}, "policy", "invalid_value"),
        (
            {"extra_body": {"policy": "self_speculative", "canvas": "a{gap:3}"}, "max_tokens": None},
            "policy",
            "invalid_value",
        ),
        ({"extra_body": {"profile": "hf-3"}}, "profile", "invalid_value"),
        ({"extra_body": {"threshold": "high"}}, "threshold", "invalid_value"),
        ({"extra_body": {"editing_threshold": 0.5, "profile": "hf-2.0"}}, "editing_threshold", "invalid_value"),
        ({"extra_body": {"edit_window": 1}}, "edit_window", "invalid_value"),
        (
            {"extra_body": {"edit_window": 1, "editing_threshold": 0.5, "canvas": "a{gap:3}"}, "max_tokens": None},
            "edit_window",
            "invalid_value",
        ),
        ({"extra_body": {"deadline_s": 0}}, "deadline_s", "invalid_value"),
        ({"extra_body": {"request_id": "a b"}}, "request_id", "invalid_value"),
        ({"extra_body": {"treshold": 0.5}}, "treshold", "unknown_parameter"),
        ({"extra_body": {"stop_token_ids": [461]}}, "stop_token_ids", "invalid_value"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, given, param, code):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **given)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.type == "invalid_request_error"
    name = "context length" if code == "context_length_exceeded" else param.partition("[")[0]
    assert name in refused.value.body["message"]


def test_what_asks_for_nothing_is_taken(client):
    nothing = {"tools": [], "frequency_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "user": "me"}
    assert ask(client, **nothing, extra_body={"best_of": None, "top_k": -1, "policy": "threshold"}).choices


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-4")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


ASKING = b'{"messages": [{"role": "user", "content": "SECRET"}], '


@pytest.mark.parametrize(
    "data, status, code",
    [
        (b"{", 400, "invalid_json"),
        (ASKING + b'"n": "SECRET"}', 400, "invalid_value"),
        (b"[" * 100_000, 400, "too_deep"),
        (b'{"a":' * 100_000, 400, "too_deep"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_value"),
        (ASKING + b'"temperature": NaN}', 400, "invalid_value"),
        (ASKING + b'"seed": 1e400}', 400, "invalid_value"),
        (ASKING + b'"n": ' + b"1" * 5000 + b"}", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"", 400, "missing_required_parameter"),
        (b'"SECRET"', 400, "invalid_value"),
        (b" " * (1 << 20) + b"{}", 413, "request_too_large"),
    ],
)
def test_a_bad_body_is_told_in_openais_envelope(server, data, status, code):
    got, body = post(server, "/v1/chat/completions", data)
    assert got == status and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert "SECRET" not in json.dumps(body) and len(json.dumps(body)) < 500


def test_other_sites_cannot_send_what_needs_no_leave(server):
    assert post(server, "/v1/chat/completions", b"{}", "text/plain")[1]["error"]["code"] == "unsupported_media_type"


def test_other_routes_and_methods(server):
    assert post(server, "/v1/embeddings", b"{}")[0] == 404
    assert post(server, "/v1/models", b"{}")[0] == 405
    with urllib.request.urlopen(f"{server.url}/") as page:  # leads to the playground
        assert page.url.endswith("/playground") and "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert b"</html>" in page.read()


def test_tokenize_and_back(server):
    _, told = post(server, "/tokenize", json.dumps({"messages": chat(QUESTIONS[0])}).encode())
    assert told == {"count": 17, "max_model_len": 4096, "tokens": prompt(QUESTIONS[0])}
    _, told = post(server, "/tokenize", b'{"prompt": "Add 847"}')
    assert post(server, "/detokenize", json.dumps({"tokens": told["tokens"]}).encode())[1] == {"prompt": "Add 847"}
    for data in (b"{}", b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}'):
        assert post(server, "/tokenize", data)[1]["error"]["param"] == "prompt"
    assert post(server, "/detokenize", b'{"tokens": [461]}')[1]["error"]["param"] == "tokens"


def wait_until_idle(server):
    assert asyncio.run(wire.idle_after(server.port, 5.0)) is not None


def test_a_client_that_leaves_costs_nothing_more(server, client):
    stream = ask(client, max_tokens=2000, stream=True, extra_body=LONG)
    assert next(stream).choices
    told = metrics(server)
    assert any(told[f"llada2:{name}"] for name in wire.LEFT)
    steps = told["vllm:diffusion_num_denoising_steps_total"]
    stream.close()
    wait_until_idle(server)
    told = metrics(server)
    assert told["vllm:diffusion_num_denoising_steps_total"] > steps  # of what nobody waits for
    before = told['llada2:requests_total{finish_reason="cancelled"}']
    with pytest.raises(openai.APITimeoutError):
        ask(client, max_tokens=2000, timeout=0.3, extra_body=LONG)
    wait_until_idle(server)
    assert metrics(server)['llada2:requests_total{finish_reason="cancelled"}'] == before + 1


def test_cancel_by_id(server, client):
    stream = ask(client, max_tokens=2000, stream=True, n=2, extra_body=LONG | {"request_id": "mine"})
    assert next(stream).id == "mine"
    with pytest.raises(openai.BadRequestError, match="request_id"):
        ask(client, extra_body={"request_id": "mine"})
    assert post(server, "/v1/requests/mine/cancel", b"") == (200, {"id": "mine", "cancelled": True})
    ends = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices[0].finish_reason]
    assert ends == ["abort", "abort"]
    assert post(server, "/v1/requests/mine/cancel", b"")[1]["cancelled"] is False
    wait_until_idle(server)


def test_a_deadline_ends_an_answer_as_it_stands(client):
    got = ask(client, max_tokens=2000, extra_body=LONG | {"deadline_s": 0.2}).choices[0]
    assert (got.finish_reason, got.stop_reason) == ("length", "deadline")


def test_metrics_count_what_was_done(server, client):
    before = metrics(server)
    (want,) = alone(prompt(QUESTIONS[0]))
    ask(client)
    after = metrics(server)

    def more(name):
        return after[name] - before[name]

    forwards, blocks = want.counters.denoise_forwards, len(want.counters.forwards_per_block)
    assert more("llada2:generation_tokens_total") == len(want.token_ids)
    assert more("llada2:denoise_forwards_total") == forwards
    assert more("llada2:tokens_per_forward_count") == more("llada2:e2e_request_latency_seconds_count") == 1
    assert more("llada2:time_to_first_block_seconds_count") == 1
    assert more("llada2:inter_block_seconds_count") == blocks - 1
    assert more('llada2:requests_total{finish_reason="eos"}') == 1
    # as `vllm bench serve` reads them
    steps = more("vllm:diffusion_num_denoising_steps_total")
    length = more("vllm:diffusion_num_canvas_positions_total") / steps
    canvases = more("vllm:diffusion_num_committed_tokens_total") / length
    assert (length, canvases, steps - canvases) == (16, blocks, forwards)


def test_the_dashboard_and_the_docs_name_what_there_is(server):
    metrics(server)  # whose response is counted
    told = {name.partition("{")[0] for name in metrics(server)}
    boards = re.findall(r"llada2:\w+", (DOCS / "grafana.json").read_text("utf-8"))
    assert len(boards) > 20 and set(boards) <= told
    text = (DOCS / "operations.md").read_text("utf-8")
    named = set(re.findall(r"(?:llada2|vllm):\w+", text))
    assert {name for name in named if not any(one.startswith(name) for one in told)} == set()
    with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
        routes = set(json.load(answer)["paths"])
    named = set(re.findall(r"`(?:GET|POST) (/[^`]*)`", text)) | set(re.findall(r", `(/\w+)`", text))
    known = {re.sub(r"\{\w+\}", lambda m: {"{request_id}": "ID", "{name}": "NAME"}[m[0]], path) for path in routes}
    assert {path for path in named if path.startswith("/v1") or path in known} == known


def test_nothing_but_what_the_document_says(server, tmp_path):
    """Schemathesis makes requests of the app's own OpenAPI document. That a request is valid by its schema does not
    make it fit the model, which is the one check left out; and one that is not may be too large as well."""
    config = tmp_path / "schemathesis.toml"
    config.write_text('[checks.negative_data_rejection]\nexpected-statuses = ["400", "404", "413"]\n', "utf-8")
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{server.url}/openapi.json",
        "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--max-examples", "10", "--seed", "1",
        "--no-color", "--request-timeout", "60",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
