"""An exception at every line of schedule, step and delivery: whose it is ends, everybody else gets what he gets alone.

The lines are those that a scenario executes, found by tracing it; each is cut at its first, middle and last execution.
`make test-slow` takes all of them, the usual run every so many-th, others for each kind of exception.
"""

import functools
import itertools
import logging
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import llada2_fast
from llada2_fast.config import DecodeParams
from llada2_fast.engine import Request
from tests.engine.common import PARAMS, assert_empty, prompt_of, small_engine, tokenizer

ROOT = Path(llada2_fast.__file__).parent
FILES = {str(path): path.name for path in (*ROOT.glob("engine/*.py"), *ROOT.glob("decoding/*.py"), ROOT / "cache.py")}
MOST_STEPS = 300
SAMPLED = 4  # cuts of a scenario in the usual run
CHANGE = {
    "_give",
    "_end",
    "_forget",
    "_place",
    "suspend",
    "resume",
}  # where most would be left half done: every third one


class Injected(RuntimeError):
    """A fault of ours."""


class Alarm(Exception):
    """What a watchdog's signal handler raises."""


class Job(NamedTuple):
    """A request of the scenario. at: the step it comes ahead of; cancelled: the one it is cancelled ahead of."""

    prompt: list[int]
    params: DecodeParams
    at: int = 0
    cancelled: int | None = None
    options: dict = {}


SHARED = prompt_of(9, 1)
JOBS = {
    "plain": Job(SHARED + prompt_of(3, 2), PARAMS[0], options={"priority": -1.0}),
    "editing": Job(SHARED, replace(PARAMS[1], edit_window=1)),
    "stopped": Job(prompt_of(6, 3), PARAMS[2], options={"stop": ("'", "+,")}),
    "alike": Job(SHARED + prompt_of(2, 4), PARAMS[6]),
    "left": Job(prompt_of(5, 5), PARAMS[4], at=1, cancelled=7),
    "late": Job(prompt_of(7, 6), PARAMS[0], at=2, options={"deadline_s": 0.0120}),
    "checked": Job(prompt_of(4, 8), PARAMS[9], at=2),
    "urgent": Job(SHARED + prompt_of(18, 7), PARAMS[3], at=3, options={"priority": 5.0, "stop_token_ids": [3]}),
}
CONFIGS = {
    "eager": {},
    "graphs": {"graphs": True, "capture": False, "trace": True},
    "together": {"graphs": True, "capture": False, "overlap": False, "trace": True},
}


def new_engine(config, model=None):
    """Two places and few pages, so that some wait and one has to give up its place; its clock ticks when it is read."""
    ticks = itertools.count(1)
    return small_engine(
        model, tokenizer(), lambda: next(ticks) * 1e-4, max_num_seqs=2, cache_tokens=56, max_num_batched_tokens=8,
        **CONFIGS[config],
    )  # fmt: skip


@functools.cache
def expected(name, config):
    """What a job of the scenario gives alone, with nothing that ends it early."""
    job, engine = JOBS[name], new_engine(config)
    options = {key: value for key, value in job.options.items() if key != "deadline_s"}
    request = engine.add_request(job.prompt, job.params, **options)
    while request.output is None:
        engine.step()
    assert request.output.error is None
    return request.output


class Tracer:
    """Counts how often each line is executed in `with tracer:`, and calls `fire` ahead of one of these executions."""

    def __init__(self, cut=None, fire=None):
        self.cut, self.fire, self.hits, self.functions, self.stack = cut, fire, Counter(), {}, None

    @contextmanager
    def __call__(self):
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame, event, arg):
        name = frame.f_code.co_filename
        return self._line if (name in FILES if self.cut is None else name == self.cut[0]) else None

    def _line(self, frame, event, arg):
        if event == "line" and (self.cut is None or frame.f_lineno == self.cut[1]):
            where = frame.f_code.co_filename, frame.f_lineno
            self.hits[where] += 1
            self.functions[where] = frame.f_code.co_name
            if self.cut == (*where, self.hits[where]) and self.stack is None:
                self.stack = [outer.f_code.co_name for outer in _outwards(frame)]
                self.fire()
        return self._line


def _outwards(frame):
    while frame is not None:
        yield frame
        frame = frame.f_back


class Run:
    """The scenario under a tracer: what was raised, and the events that each request's handle has told."""

    def __init__(self, config, tracer, model=None):
        self.config, self.tracer, self.engine = config, tracer, new_engine(config, model)
        self.requests: dict[str, Request] = {}
        self.told, self.raised = {}, []

    def attempt(self, call, *args, **kwargs):
        """What a call returns, None if it raises what was injected."""
        try:
            with self.tracer():
                return call(*args, **kwargs)
        except (Injected, torch.OutOfMemoryError, KeyboardInterrupt, TimeoutError, Alarm) as error:
            self.raised.append(error)

    def add(self, name):
        job = JOBS[name]
        request = self.attempt(self.engine.add_request, job.prompt, job.params, request_id=name, **job.options)
        if request is None:  # a call that was cut short may have begun the request
            self.engine.check_integrity()
            request = self.engine.requests.get(name)
        self.requests[name] = request or self.engine.add_request(job.prompt, job.params, request_id=name, **job.options)

    def read(self):
        for name, request in self.requests.items():
            while (event := request.next_event()) is not None:
                self.told.setdefault(name, []).append(event)

    def steps(self):
        """Requests come, one is cancelled, the engine steps until all is done."""
        for number in range(MOST_STEPS):
            for name, job in JOBS.items():
                if job.at == number:
                    self.add(name)
                if job.cancelled == number:
                    self.attempt(self.engine.cancel, name)
            if number > max(job.at for job in JOBS.values()) and not self.engine.has_work:
                return
            self.attempt(self.engine.step)
            self.engine.check_integrity()
            self.read()
        raise AssertionError(f"there is still work after {MOST_STEPS} steps")

    def stream(self):
        """One request is streamed, another one waits beside it, and both are stepped to their ends."""
        for name in ("editing", "stopped", "plain"):
            self.add(name)
        stream = self.engine.stream(self.requests["editing"])
        events = self.told["editing"] = []
        while (event := self.attempt(next, stream, None)) is not None:
            events.append(event)
        for _ in range(MOST_STEPS):
            if self.engine.has_work:
                self.attempt(self.engine.step)
        self.engine.check_integrity()
        self.read()
        if self.raised:  # one may have been lost on its way out of the stream; the log has it
            events[:] = [entry.event for entry in self.requests["editing"].log if entry.event]

    def generate(self):
        """Some prompts by generate() beside a request of somebody else."""
        self.add("alike")
        names = ["plain", "editing", "stopped"]
        jobs = [JOBS[name] for name in names]
        self.outputs = self.attempt(
            self.engine.generate, [job.prompt for job in jobs], [job.params for job in jobs],
            stop=[job.options.get("stop", ()) for job in jobs],
        )  # fmt: skip
        self.engine.check_integrity()
        assert self.outputs or self.raised
        assert set(self.engine.requests) <= {"alike"}, "requests of generate() are left"
        for name, output in zip(names, self.outputs or (), strict=bool(self.outputs)):
            assert output.finish_reason == "error" or self.is_right(name, output), name
        for _ in range(MOST_STEPS):
            if self.engine.has_work:
                self.engine.step()
        self.read()

    def is_right(self, name, output):
        """It is what its job gives alone, or the beginning of it where it was ended early."""
        whole, count = expected(name, self.config), len(output.token_ids)
        if output.finish_reason in ("cancelled", "deadline", "error"):
            assert output.token_ids == whole.token_ids[:count] and output.confidences == whole.confidences[:count]
            assert whole.text.startswith(output.text)
        else:
            for one in ("token_ids", "confidences", "steps", "text", "finish_reason", "stop_reason", "trace"):
                assert getattr(output, one) == getattr(whole, one), (name, one)
            for one in ("denoise_forwards", "check_forwards", "commits", "edits", "forwards_per_block"):
                assert getattr(output.counters, one) == getattr(whole.counters, one), (name, one)
        return True

    def failed(self):
        """Names of the requests that ended with an error. What every request gave and told is right."""
        for name, request in self.requests.items():
            output, events = request.output, self.told[name]
            assert output is not None, f"{name} has not ended"
            assert self.is_right(name, output)
            tokens, text = [], ""
            for event in events:
                if event.kind == "commit":
                    assert event.start == len(tokens), f"{name}: a commit at {event.start} after {len(tokens)} tokens"
                    tokens += event.token_ids
                text += event.text
            assert tokens == output.token_ids and text == output.text, name
            assert [event.output for event in events if event.output] == [output]
        return {name for name, request in self.requests.items() if request.output.finish_reason == "error"}

    def check_reuse(self):
        """The engine is empty, and used again it gives what is right."""
        assert_empty(self.engine)
        for name in ("editing", "plain"):
            assert self.is_right(name, self.engine.generate([JOBS[name].prompt], JOBS[name].params)[0])
        assert_empty(self.engine)


@functools.cache
def cuts(config, scenario):
    """(file, line, number of the execution) of a scenario, and the name of the function that each line is in."""
    tracer = Tracer()
    run = Run(config, tracer)
    getattr(run, scenario)()
    assert not run.failed() and not run.raised
    run.check_reuse()
    found = [(*where, n) for where, most in sorted(tracer.hits.items()) for n in sorted({1, (most + 1) // 2, most})]
    return found, tracer.functions


def sample(config, scenario, kind, whole):
    """All cuts, or some of them, others for each kind."""
    found, functions = cuts(config, scenario)
    if whole:
        return found
    stride, first = max(1, len(found) // SAMPLED), sum(kind.encode())
    change = [cut for cut in found if functions[cut[:2]] in CHANGE and (config, scenario) == ("eager", "steps")]
    return found[first % stride :: stride] + change[first % 3 :: 3]


def each_cut(config, scenario, kind, whole, fire, check):
    """Run a scenario once for each cut; AssertionError with those at which `check(run)` or the run itself fails."""
    wrong = []
    for cut in sample(config, scenario, kind, whole):
        tracer = Tracer(cut, fire)
        run = Run(config, tracer)
        try:
            getattr(run, scenario)()
            assert tracer.stack, "the line was not reached"
            check(run)
            run.check_reuse()
        except BaseException as error:
            wrong.append(f"{FILES[cut[0]]}:{cut[1]} number {cut[2]}: {type(error).__name__}: {error}"[:300])
    assert not wrong, f"{len(wrong)} cuts:\n" + "\n".join(wrong)


def cases(usual):
    """Every scenario under every config with every kind of exception, all cuts; and some cuts of the usual ones.

    usual: {kind: config}.
    """
    every = list(itertools.product(CONFIGS, SCENARIOS, usual))
    some = [pytest.param(*case, False, id="-".join((*case, "some"))) for case in every if case[0] == usual[case[2]]]
    return some + [pytest.param(*case, True, id="-".join((*case, "all")), marks=pytest.mark.slow) for case in every]


SCENARIOS = ("steps", "generate", "stream")
FAULTS = {"fault": Injected("injected"), "memory": torch.OutOfMemoryError("injected")}
GATE = {"call", "enter", "leave", "_mend", "step", "_step"}  # the last to know of a fault: their own are their caller's


@pytest.mark.parametrize(("config", "scenario", "kind", "whole"), cases({"fault": "eager", "memory": "graphs"}))
def test_a_fault_ends_whose_it_is(config, scenario, kind, whole, caplog):
    caplog.set_level(logging.ERROR, "llada2_fast")
    error = FAULTS[kind]

    def fire():
        caplog.clear()
        raise error.with_traceback(None)

    def check(run):
        failed = run.failed()
        outputs = [*(request.output for request in run.requests.values()), *(getattr(run, "outputs", None) or ())]
        ended = [output for output in outputs if output.finish_reason == "error"]
        assert all("injected" in output.error for output in ended)
        assert failed <= set(run.requests) and len(ended) <= run.engine.config.max_num_seqs
        if "_give" in run.tracer.stack or "_place" in run.tracer.stack:
            assert len(ended) <= 1, f"{len(ended)} requests end by the fault of one"
        if run.raised:
            assert run.raised == [error] and not ended
            own = next(name for name in run.tracer.stack if not name.startswith("<"))  # a comprehension's function
            assert own in GATE or "_step" not in run.tracer.stack
        else:
            logged = [record for record in caplog.records if record.exc_info and record.exc_info[1] is error]
            assert logged and logged[0].exc_info[2] is not None, "the fault is not in the log"

    each_cut(config, scenario, kind, whole, fire, check)


def _handler(error):
    def handler(number, frame):
        raise error

    return handler


INTERRUPTS = {"ctrl-c": KeyboardInterrupt(), "timeout": TimeoutError("late"), "alarm": Alarm("late")}


@pytest.mark.parametrize(
    ("config", "scenario", "kind", "whole"), cases({"ctrl-c": "eager", "timeout": "together", "alarm": "graphs"})
)
def test_an_interrupt_reaches_its_caller_and_hurts_nobody(config, scenario, kind, whole):
    """Requests of generate() are cancelled by it, and the one that is streamed where it comes out of the stream."""
    error = INTERRUPTS[kind]

    def fire():
        if kind == "ctrl-c":
            raise error.with_traceback(None)
        signal.raise_signal(signal.SIGUSR1)

    def check(run):
        assert run.raised == [error], "it did not reach the caller"
        assert not run.failed()
        cancelled = {name for name, request in run.requests.items() if request.output.finish_reason == "cancelled"}
        assert cancelled <= ({"editing"} if scenario == "stream" else {"left"})

    before = signal.signal(signal.SIGUSR1, _handler(error))
    try:
        each_cut(config, scenario, kind, whole, fire, check)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_scenario_goes_everywhere():
    """Or cuts would prove little."""
    wanted = {
        "_admit", "_passing", "_fits", "_victims", "_place", "_share", "suspend", "remove", "rewind", "insert",
        "_take_away", "_evict", "process", "finish", "draft", "_entry", "_end_overdue", "_deliver", "_give", "_end",
        "_forget", "_stops_inside", "find_stop", "release", "take_step", "begin_next", "prefill_of", "execute", "open",
        "resume", "cancel", "submit", "_queue", "_await_deadline", "prompt", "_check_options", "allocate", "incref",
        "_check_together", "take_draft", "accept", "_revise_together", "take_window",
    }  # fmt: skip
    reached = {*cuts("eager", "steps")[1].values(), *cuts("eager", "stream")[1].values()}
    assert not wanted - reached
