"""`llada2-fast bench serve` against a server that does what servers do: cut events, refuse, fail half-way, vanish."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import llada2_fast
from benchmarks import bench_serve, http_client, http_cost, own_server, sse
from llada2_fast.cli import commands as cli

USAGE = {"prompt_tokens": 7, "completion_tokens": 10}


class Server(ThreadingHTTPServer):
    """Speaks OpenAI's API; what it does with a request is the last word of its prompt."""

    daemon_threads = True
    request_queue_size = 64  # a connection for which there is no room is tried again a second later
    usage = USAGE
    pause = 0.0  # seconds between chunks

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.now, self.most, self.lock = [], 0, 0, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "first"}, {"id": "second"}]})
        else:
            self.reply(404, {"error": {"message": "no such page"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers["Authorization"], body))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
            getattr(self, f"do_{prompt.split()[-1]}", self.do_answer)()
        finally:
            with self.server.lock:
                self.server.now -= 1

    def reply(self, status, body, content_type="application/json"):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", len(data))
        self.end_headers()
        self.wfile.write(data)

    def begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def events(self):
        texts = ["", "Grüße ", "", "aus ", "Köln"]
        parts = [{"delta": {"role": "assistant", "content": ""}}, *({"delta": {"content": text}} for text in texts[1:])]
        if self.path == "/v1/completions":
            parts = [{"text": text} for text in texts]
        parts.append({"delta": {}, "finish_reason": "stop"})
        chunks = [{"choices": [{"index": 0} | part]} for part in parts]
        if self.server.usage:
            chunks.append({"choices": [], "usage": self.server.usage})
        return [json.dumps(chunk, ensure_ascii=False) for chunk in chunks] + ["[DONE]"]

    def do_answer(self):
        self.begin()
        for event in self.events():
            self.send(f"data: {event}\n\n".encode())
            time.sleep(self.server.pause)
        self.send(b"")

    def do_bytewise(self):
        """With comments and CR LF, a byte at a time."""
        self.begin()
        for byte in b": hello\r\n\r\n" + b"".join(b"data:%b\r\n\r\n:\r\n" % event.encode() for event in self.events()):
            self.send(bytes([byte]))
        self.send(b"")

    def do_busy(self):
        self.reply(429, {"error": {"message": "the queue is full", "type": "overloaded"}})

    def do_broken(self):
        self.reply(503, "down", "text/plain")

    def do_cut(self):
        self.begin()
        self.send(f"data: {self.events()[1]}\n\n".encode())
        self.close_connection = True

    def do_short(self):
        """Ends as HTTP has it, but in the middle of the answer."""
        self.begin()
        self.send(f"data: {self.events()[1]}\n\n".encode())
        self.send(b"")

    def do_fail(self):
        self.begin()
        failure = json.dumps({"error": {"message": "logits hold NaN", "code": 500}})
        self.send(f"data: {self.events()[1]}\n\ndata: {failure}\n\ndata: [DONE]\n\n".encode())
        self.send(b"")

    def do_garbage(self):
        self.begin()
        self.send(b'data: {"choices": [{"delta": \n\n')
        self.send(b"")

    def do_whole(self):
        self.reply(200, {"choices": [{"message": {"content": "not streamed"}}]})

    def do_hang(self):
        self.begin()
        time.sleep(1.5)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def bench(capsys, tmp_path, monkeypatch):
    """`llada2-fast bench serve` with prompts of a file: (exit code, JSON line or None, stdout, stderr)."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def bench(server, prompts, *arguments):
        given = ["--base-url", server.url, "--no-progress"]
        if prompts:
            file = tmp_path / "prompts.txt"
            file.write_text("\n".join(["warm up", *prompts]), encoding="utf-8")
            given += ["--prompts", str(file), "--num-prompts", str(len(prompts))]
        code = cli.main(["bench", "serve", *given, "--json", *arguments])
        out, err = capsys.readouterr()
        lines = out.splitlines()
        return code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, out, err

    return bench


# Server-sent events


EVENTS = b'\xef\xbb\xbfdata: {"a": 1}\n: a comment\n\nevent: x\ndata:two\ndata: lines\nid: 3\n\n'
EVENTS += b"\n\ndata\n\ndata: \xc3\xbc\n\ndata: cut"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_may_be_cut_anywhere(end, size):
    data, stream = EVENTS.replace(b"\n", end), sse.EventStream()
    events = [event for at in range(0, len(data), size) for event in stream.feed(data[at : at + size])]
    assert events == ['{"a": 1}', "two\nlines", "", "ü"]


def test_an_event_is_there_once_its_blank_line_is():
    stream = sse.EventStream()
    assert stream.feed(b"data: 1\r") == [] and stream.feed(b"") == []
    assert stream.feed(b"\n\r") == ["1"]
    assert stream.feed(b"\ndata: 2\n") == [] and stream.feed(b"\n") == ["2"]


def test_no_event_fills_the_memory(monkeypatch):
    monkeypatch.setattr(sse, "MAX_BYTES", 100)
    for data in (b"data: " + b"x" * 100, b"data: 0123456789\n" * 12):
        with pytest.raises(ValueError, match="more than 100 bytes"):
            sse.EventStream().feed(data)
    stream = sse.EventStream()
    assert all(stream.feed(b"data: 0123456789\n\n") == ["0123456789"] for _ in range(20))


# What a run says


def test_a_run(server, bench, tmp_path):
    server.usage, server.pause = USAGE | {"denoise_forwards": 4}, 0.01
    plot = tmp_path / "latency.png"
    code, line, out, _ = bench(server, ["a", "b", "c"], "--save", str(tmp_path), "--plot", str(plot))
    assert code == 0 and plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "serve.jsonl").read_text("utf-8")) == line
    assert (line["completed"], line["failed"], line["errors"]) == (3, 0, {})
    assert (line["total_input_tokens"], line["total_output_tokens"], line["tokens_counted_by"]) == (21, 30, "usage")
    assert (line["denoise_forwards"], line["tokens_per_forward"]) == (12, 2.5)
    assert line["output_throughput"] == pytest.approx(30 / line["duration"])
    # The role comes first, five more follow, and all of them may be seen at once.
    assert 10 <= line["median_ttft_ms"] <= line["median_e2el_ms"] >= 60
    assert 0 <= line["median_tpot_ms"] <= line["median_e2el_ms"] / 9
    assert (line["model"], line["server"], line["request_rate"]) == ("first", None, "inf")
    assert "TPF 2.50" in out and "p10_itl_ms" in line and "mean_client_queue_ms" not in line


def test_what_is_sent(server, bench):
    extra = json.dumps({"threshold": 0.7, "max_tokens": None})
    bench(server, ["a"], "--extra-body", extra, "--api-key", "secret", "--model", "mine")
    path, key, body = server.seen[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "mine", "stream": True, "stream_options": {"include_usage": True}, "threshold": 0.7,
        "messages": [{"role": "user", "content": "a"}],
    }  # fmt: skip


def test_completions_and_a_file_of_json_lines(server, bench, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\u2028b"}\n\n{"prompt": "c"}\n', encoding="utf-8")
    arguments = ["--prompts", str(file), "--endpoint", "completions", "--max-tokens", "5", "--num-prompts", "3"]
    code, line, _, _ = bench(server, [], *arguments, "--max-concurrency", "1")
    assert code == 0 and line["completed"] == 3
    assert [body["prompt"] for _, _, body in server.seen] == ["a\u2028b", "c", "a\u2028b", "c"]
    assert server.seen[0][0] == "/v1/completions" and server.seen[0][2]["max_tokens"] == 5


def test_the_key_may_be_in_the_environment(server, bench, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    bench(server, ["a"])
    assert server.seen[-1][1] == "Bearer of the environment"


def test_without_usage_chunks_are_counted_and_the_output_says_so(server, bench):
    server.usage = None
    code, line, out, _ = bench(server, ["a", "b"])
    assert (code, line["total_output_tokens"], line["total_input_tokens"]) == (0, 6, None)
    assert line["tokens_counted_by"] == "chunks" and "tokens are chunks" in out
    assert (line["denoise_forwards"], line["tokens_per_forward"]) == (None, None)


def test_events_cut_into_bytes_are_the_same_answer(server, bench):
    code, line, _, _ = bench(server, ["bytewise"])
    assert (code, line["completed"], line["total_output_tokens"]) == (0, 1, 10)


KINDS = {
    "busy": ("429", "the queue is full"),
    "broken": ("5xx", "503"),
    "cut": ("disconnected", "ClientPayloadError"),
    "short": ("disconnected", "ended before the answer"),
    "fail": ("error in the stream", "logits hold NaN"),
    "garbage": ("malformed", "delta"),
    "whole": ("malformed", "application/json"),
    "hang": ("timeout", "no end"),
}


def test_failures_are_counted_by_kind_and_are_in_no_other_figure(server, bench):
    code, line, out, _ = bench(server, ["a", *KINDS, "b"], "--timeout", "0.75")
    assert code == 0 and (line["completed"], line["failed"]) == (2, 8)
    assert line["errors"] == Counter(kind for kind, _ in KINDS.values()) and line["total_output_tokens"] == 20
    for kind, message in set(KINDS.values()) - {KINDS["short"], KINDS["whole"]}:
        assert any(f"failed, {kind}" in row and message in row for row in out.splitlines()), kind
    assert line["p99_e2el_ms"] < 750


def test_nothing_but_failures_is_exit_code_1(server, bench, tmp_path):
    plot = tmp_path / "none.png"
    code, line, out, _ = bench(server, ["busy", "busy"], "--plot", str(plot))
    assert (code, line["completed"], line["failed"], line["errors"]) == (1, 0, 2, {"429": 2})
    assert line["median_ttft_ms"] is None and line["tokens_counted_by"] is None and not plot.exists()


def test_a_server_that_is_not_there(bench):
    with Server() as gone:
        pass
    code, line, _, err = bench(gone, ["a"])
    assert code == 1 and line is None and "/v1/models" in err
    code, line, _, _ = bench(gone, ["a"], "--model", "x")
    assert code == 1


# When requests are sent


def run(server, count, most, due=None):
    """(answers, the server) of so many requests."""

    async def run():
        import aiohttp

        async with aiohttp.ClientSession() as session:
            bodies = [{"prompt": str(i)} for i in range(count)]
            return await http_client.run(session, f"{server.url}/v1/completions", bodies, most, due)

    return asyncio.run(run())


def test_never_more_at_once_than_allowed(server):
    server.pause = 0.01
    answers = run(server, 8, 3)
    assert server.most == 3 and [answer.error for answer in answers] == [None] * 8
    assert [answer.text for answer in answers] == ["Grüße aus Köln"] * 8
    assert [answer.num_tokens for answer in answers] == [10] * 8


def test_requests_are_sent_when_they_are_due_or_when_there_is_room(server):
    server.pause = 0.1
    first, second, third = run(server, 3, 2, [0.0, 0.05, 0.06])
    first_ended = first.sent + first.seconds
    assert first.due <= first.sent and second.due <= second.sent < first_ended
    assert third.sent >= first_ended > third.due


def test_arrivals_are_a_poisson_process():
    due = http_client.arrivals(4000, 50.0, seed=1)
    assert due[0] == 0 and due == sorted(due) and due == http_client.arrivals(4000, 50.0, seed=1)
    gaps = [b - a for a, b in zip(due, due[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.02, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, rel=0.1)


def test_with_a_rate_the_wait_of_the_client_is_told(server, bench):
    code, line, out, _ = bench(server, ["a"] * 5, "--request-rate", "200", "--max-concurrency", "1")
    assert code == 0 and line["request_rate"] == 200 and line["p99_client_queue_ms"] > 0
    assert "until it was sent" in out


# Mistakes


@pytest.mark.parametrize("arguments, word", [
    (["--base-url", "localhost:8000"], "expected http://HOST:PORT"),
    (["--extra-body", "{"], "--extra-body"),
    (["--extra-body", "[1]"], "expected a JSON object"),
    (["--request-rate", "0"], "--request-rate 0.0: expected"),
    (["--timeout", "nan"], "--timeout nan: expected"),
    (["--prompts", "no/such/file"], "no/such/file"),
    (["--endpoint", "embeddings"], "embeddings"),
])  # fmt: skip
def test_mistakes(capsys, arguments, word):
    code = cli.main(["bench", "serve", *arguments])
    assert code == 2 and word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text, word", [
    ("", "expected a prompt a line"),
    ('{"prompt": "a"}\nno JSON', "prompts.jsonl:2"),
    ('{"messages": []}', 'expected an object with "prompt"'),
    ("[1]", 'expected an object with "prompt"'),
])  # fmt: skip
def test_mistakes_in_a_file_of_prompts(capsys, tmp_path, text, word):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    code = cli.main(["bench", "serve", "--prompts", str(file), "--endpoint", "completions"])
    assert code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_a_base_url_may_end_with_v1():
    assert bench_serve._base_url("http://host:1/v1/") == "http://host:1"


# Our own server


def test_the_server_of_the_embedded_model(capsys, tmp_path):
    arguments = ["--num-prompts", "6", "--max-concurrency", "3", "--extra-body", '{"threshold": 0.7}']
    code = cli.main(["bench", "serve", *arguments, "--quick", "--json", "--save", str(tmp_path), "--no-progress"])
    out, err = capsys.readouterr()
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert (line["completed"], line["failed"], line["base_url"], line["quick"]) == (6, 0, "started", True)
    assert line["server"]["version"] == llada2_fast.__version__ and line["tokens_counted_by"] == "usage"
    assert line["total_input_tokens"] > 60 and line["total_output_tokens"] > 60
    assert line["tokens_per_forward"] == line["total_output_tokens"] / line["denoise_forwards"] > 2


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(SystemExit, match="ended with exit code 2: .*--nonsense"):
        with own_server.serving("--nonsense"):
            raise AssertionError("it has started")


def stand_in(what):
    """A command that tells where it serves, and what becomes of it at SIGTERM."""
    line = json.dumps({"event": "serving", "url": "http://127.0.0.1:1"})
    code = f"signal.signal(signal.SIGTERM, {what}); print({line!r}, flush=True); time.sleep(60)"
    return [sys.executable, "-c", f"import signal, sys, time; {code}"]


def test_a_process_is_ended_and_its_exit_code_looked_at(monkeypatch):
    with own_server.ServerProcess(command=stand_in("lambda *_: sys.exit(3)")) as server:
        assert server.port == 1 and server.lives and server.stop() == 3 and not server.lives
    monkeypatch.setattr(own_server, "STOP_S", 0.2)
    with own_server.ServerProcess(command=stand_in("signal.SIG_IGN")) as server:
        with pytest.raises(subprocess.TimeoutExpired):
            server.stop()
    assert server.process.returncode == -signal.SIGKILL


def test_the_processor_time_of_a_process_and_of_all():
    before, all_before, begun = own_server.usage().cpu_s, own_server.busy_seconds(), time.process_time()
    while time.process_time() - begun < 0.2:
        pass
    assert own_server.usage().cpu_s - before == pytest.approx(0.2, abs=0.05)
    assert own_server.busy_seconds() - all_before > 0.15


def test_the_engine_alone_and_the_gate():
    chats = [[{"role": "user", "content": text}] for text in ("Add 847 and 96.", "Spell 4071.", "Spell 22, 608.")]
    with http_cost.direct_engine(2) as engine:
        said = engine.run(chats, {"gen_length": 48, "eos_early_stop": True})
        assert said["texts"][0].endswith("The answer is 943.") and said["seconds"] > 0 < said["cpu_s"]
        assert engine.run(chats[::-1], {"gen_length": 48, "eos_early_stop": True})["texts"] == said["texts"][::-1]

        def answers(rows, params):
            return [http_client.Answer(0.0, trace={"token_ids": row, "params": params}) for row in rows]

        params = {"gen_length": 48, "eos_early_stop": True}
        assert http_cost._gate(answers(said["token_ids"], params), engine, chats) == params
        wrong = [*said["token_ids"][:2], said["token_ids"][2][:-1]]
        with pytest.raises(SystemExit, match="differ in request 2; nothing is timed"):
            http_cost._gate(answers(wrong, params), engine, chats)
        with pytest.raises(SystemExit, match="429: no; nothing is timed"):
            http_cost._gate([http_client.Answer(0.0, error="429", message="no")], engine, chats)


@pytest.mark.slow
def test_against_the_engine(capsys, tmp_path):
    arguments = ["--against-engine", "--num-prompts", "8", "--num-rounds", "2", "--json", "--save", str(tmp_path)]
    code = cli.main(["bench", "serve", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "http.jsonl").read_text("utf-8")) == line
    assert line["equal_tokens"] == 1.0 and len(line["ratio_rounds"]) == 2
    assert line["ratio"] == pytest.approx(line["http_tok_s"] / line["engine_tok_s"])
    assert -0.2 < line["others_share"] < 1  # of rounds so short that the ticks of the clocks count
    assert min(line[f"{who}_cpu_us_per_token"] for who in ("server", "engine", "client")) > 0


@pytest.mark.parametrize("arguments", [["--base-url", "http://x"], ["--endpoint", "completions"], ["--model", "x"]])
def test_what_does_not_go_with_against_engine(capsys, arguments):
    code = cli.main(["bench", "serve", "--against-engine", *arguments])
    assert code == 2 and "--against-engine" in capsys.readouterr().err.splitlines()[-1]
