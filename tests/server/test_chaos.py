"""The scorecard's gates in short, two processes for all of them, and what they would say of a server that is worse."""

import asyncio
import json
import sys

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import cuts, faults, fuzz, life, slow
from benchmarks.chaos import soak as soaking
from benchmarks.chaos.crowd import Crowd
from benchmarks.chaos.gate import Verdict
from benchmarks.chaos.jobs import make_jobs
from benchmarks.chaos.process import LAUNCHER, started
from benchmarks.chaos.wire import Response, ask
from llada2_fast.cli import commands as cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
DRAIN_S = 0.5


@pytest.fixture(scope="module")
def jobs():
    return make_jobs(4)


@pytest.fixture(scope="module")
def server():
    """What `llada2-fast serve` starts; kill -9 is its last test."""
    with started(*fuzz.OPTIONS, *slow.OPTIONS, *chaos.ROOMY) as server:
        yield server


@pytest.fixture(scope="module")
def launched():
    """The same around an engine that fails; the last test of it ends it."""
    with started("--max-num-seqs", 8, "--faults", 4, "--drain-s", DRAIN_S, command=LAUNCHER) as server:
        yield server


def held(verdict):
    assert verdict.held, verdict


def test_bodies_that_nobody_should_send(server):
    held(asyncio.run(fuzz.fuzz(server, 400)))


def test_clients_that_leave(server, jobs):
    held(asyncio.run(cuts.cuts(server, jobs, 60, clients=24)))


def test_clients_that_are_slow(server):
    held(asyncio.run(slow.slow(server, stream=False)))


def test_everything_at_once(server, jobs):
    held(asyncio.run(soaking.soak(server, jobs, 1.0)))


def test_forwards_that_fail(launched, jobs):
    verdict = asyncio.run(faults.faults(launched, jobs, 4, clients=8))
    held(verdict)
    assert verdict.figures["failed"] >= 4


def test_cancelled_requests_free_their_pages(launched):
    """At once, that is; how soon is for a machine that does nothing else."""
    verdict = asyncio.run(cuts.cancels(launched, 15, others=2))
    assert [line for line in verdict.wrong if not line.startswith("p99")] == []
    assert verdict.figures["p99_ms"] < 2000


def test_streams_are_told_when_the_server_ends(launched):
    held(asyncio.run(life.sigterm(launched, DRAIN_S, enough=False, streams=8)))


def test_a_page_that_is_left_is_seen(server):
    """A stream that goes on is what a leak looks like from outside."""

    async def main():
        running = asyncio.ensure_future(ask(server.port, "POST", life.PATH, life.LOAD | {"max_tokens": 2048}))
        await asyncio.sleep(0.5)
        left = await cuts.idle_after(server.port, 0.2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return left

    assert asyncio.run(main()) is None


@pytest.mark.slow  # it is started twice
def test_a_server_that_is_killed_comes_back(server):
    held(asyncio.run(life.kills(server, 1, clients=2)))


# What the gates are made of


@pytest.mark.parametrize(
    "status, message, found",
    [
        (200, "", None), (400, "n: expected at most 8", None), (404, "expected one that /v1/models names", None),
        (500, "the server has failed", "status 500"), (503, "the engine has ended", "status 503"),
        (400, "x" * 501, "501 characters"), (400, f"stop: {fuzz.SECRET} is too long", "too much"),
        (400, "no file /opt/models/tokenizer", "too much"), (400, "<object at 0x7f00aa>", "too much"),
        (400, 'File "app.py"', "too much"), (400, None, "no envelope"),
    ],
)  # fmt: skip
def test_a_response_that_is_not_as_it_should_be(status, message, found):
    detail = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_value"}
    told = fuzz.check(status, json.dumps({"error": detail}).encode())
    assert told is None if found is None else found in told


@pytest.mark.parametrize("body", [b"Internal Server Error", b"{}", b"[]", b'{"error": "x"}', b'{"detail": []}'])
def test_a_refusal_without_an_envelope(body):
    assert "no envelope" in fuzz.check(400, body)


def test_the_same_bodies_every_time():
    first, second = ([one for one, _ in zip(fuzz.Bodies(3), range(300), strict=False)] for _ in range(2))
    assert first == second
    assert {path for path, *_ in first} >= fuzz.ROUTES.keys()


def crowd_told(jobs, text, **rest):
    """What a crowd finds wrong with a whole answer to the first job."""
    crowd = Crowd(0, jobs)
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    body = {"request_id": "chaos-0", "stream": False, "n": 1}
    crowd._check(jobs[0], body, Response(200, {}, json.dumps({"choices": [choice | rest]}).encode()))
    return crowd.wrong


def test_an_answer_that_is_not_right(jobs):
    _, _, right, _ = jobs[0].alone[0]
    assert crowd_told(jobs, right) == []
    assert len(crowd_told(jobs, right + ".")) == len(crowd_told(jobs, right, finish_reason="length")) == 1
    assert len(crowd_told(jobs, right, index=1)) == 1


@pytest.mark.parametrize("wrong, code, told", [([], 0, "1 of 1 gates held"), (["it leaks"], 1, "wrong:    it leaks")])
def test_the_table(monkeypatch, capsys, tmp_path, wrong, code, told):
    verdict = Verdict("R1", "bodies", "400 x 200", "no 5xx", {"statuses": {200: 400}}, wrong)
    monkeypatch.setitem(chaos.GATES, "R1", lambda quick: [verdict])
    assert chaos.main(["--only", "R1", "--json", "--save", str(tmp_path)]) == code
    out = capsys.readouterr().out
    assert told in out
    line = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "chaos.jsonl").read_text("utf-8")) == line
    assert line["gates"][0]["held"] is (not wrong) and line["gates"][0]["wrong"] == len(wrong)


def test_a_gate_that_there_is_not(capsys):
    assert cli.main(["bench", "chaos", "--only", "R1,R99"]) == 2
    assert "expected some of R1,R3" in capsys.readouterr().err
