"""Minutes of an AsyncEngine under everything at once: its answers stay right, and nothing of it is left behind.

    llada2-fast bench soak [--minutes M] [--clients N] [--seed N] [--quick] [--json] [--save [FOLDER]]

Clients ask the embedded model for answers of every kind: greedy, edited and drawn ones, streamed or whole, several of
one prompt, with stop strings, deadlines, priorities, salts and shared beginnings, waiting for room or turned away. Half
of them are cut off at a random moment. Meanwhile forwards and the tokenizer raise now and then, the weights are said to
have changed, and the engine is paused and put to sleep.

Exit code 1 unless every answer that was not cut off is what a request gets alone, tokens, confidences and text, what
was ended early is the beginning of it, all faults were injected ones, no call was left without an answer, all pages
came back, no thread and no file is left open, and the process grew by less than MAX_MB_PER_MINUTE after its warm-up,
which a run of less than LONG_MINUTES is too short to tell.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy

from llada2_fast import DecodeParams, LLaDA2Model, demo
from llada2_fast.config import EngineConfig
from llada2_fast.decoding.inputs import row_seed
from llada2_fast.engine import AsyncEngine, Engine, QueueFull
from llada2_fast.weights.special_tokens import load_tokenizer

from . import harness
from .harness import positive
from .own_server import usage

MAX_MB_PER_MINUTE, LONG_MINUTES = 0.5, 2.0
# Of PyTorch, of 1024 shapes each, which else take minutes and 200 MB to fill.
SMALL_CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
WARM_UP = 0.25  # of the run, whose memory is not looked at
PATIENCE_S = 120.0  # for an answer
FORWARD_FAILS, TEXT_FAILS = 1 / 400, 1 / 4000  # how often
SAMPLES = 3  # answers to one prompt, where a client asks for several
KINDS = [
    DecodeParams(gen_length=24, threshold=0.9),
    DecodeParams(gen_length=32, threshold=0.6, editing_threshold=0.5, max_post_steps=4, eos_early_stop=True),
    DecodeParams(gen_length=40, threshold=0.9, eos_early_stop=True),
    DecodeParams(gen_length=20, temperature=0.9, seed=5, threshold=0.4, steps=8),
    DecodeParams(gen_length=32, temperature=1.3, top_k=20, top_p=0.9, seed=-3, threshold=0.5, eos_early_stop=True),
    DecodeParams(gen_length=16, threshold=2.0, steps=4),
    DecodeParams(gen_length=24, profile="hf-2.1", threshold=0.7, max_post_steps=2, eos_early_stop=True),
]
OPTIONS = [{}, {}, {"stop": (" a", "1", ".")}, {"stop": ("e", "\n"), "include_stop": True}, {"min_tokens": 12}]


class Injected(RuntimeError):
    """A fault that the soak has made."""


class Shaky(LLaDA2Model):
    """Forwards raise now and then."""

    chance, count, random = 0.0, 0, random.Random(0)

    def forward_blocks(self, *args, **kwargs):
        if self.random.random() < self.chance:
            self.count += 1
            raise Injected("forward")
        return super().forward_blocks(*args, **kwargs)


class ShakyTokenizer:
    """A tokenizer whose decode raises now and then."""

    def __init__(self, tokenizer, rng):
        self.tokenizer, self.random, self.chance, self.count = tokenizer, rng, 0.0, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, *args, **kwargs):
        if self.random.random() < self.chance:
            self.count += 1
            raise Injected("tokenizer")
        return self.tokenizer.decode(*args, **kwargs)


class Job(NamedTuple):
    """A request, and what it gets alone: for each number of a sample (tokens, confidences, text, finish_reason)."""

    prompt: list[int]
    params: DecodeParams
    options: dict
    alone: list[tuple]


@dataclass
class Tally:
    """What has happened: counts by name, and a line for everything that was wrong."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, job, output, number=0):
        """Compare an output with what its job gets alone."""
        tokens, confidences, text, reason = job.alone[number]
        count = len(output.token_ids)
        self.counts[output.finish_reason] += 1
        if output.finish_reason in ("error", "cancelled", "deadline"):
            right = (output.token_ids, output.confidences) == (tokens[:count], confidences[:count])
            right = right and text.startswith(output.text)
            if output.finish_reason == "error":
                right = right and ("Injected: " in output.error or "weights have been changed" in output.error)
        else:
            told = output.token_ids, output.confidences, output.text, output.finish_reason
            right = told == job.alone[number]
        if not right:
            self.wrong.append(f"{job.params} {job.options}: {output}"[:1000])


def _prompts(tokenizer, rng):
    """Some alike, some that begin alike, one of two tokens and one of many."""
    begins = [
        " ".join(rng.choices(["two", "four", "seven", "add", "story", "twenty", "reverse"], k=n)) for n in (40, 90)
    ]
    texts = ["What is 3 + 4?", "Tell me a story.", *(f"{begin} {n}" for begin in begins for n in range(3))]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return [*prompts, prompts[0][:2]]


def alone(engine, prompt, params, options):
    """What a request gets in an engine of its own, for each number of a sample: (tokens, confidences, text,
    finish_reason). Tokens are compared with those of generate() where no option ends them."""
    told, samples = [], 1 if params.seed is None else SAMPLES
    for number in range(samples):
        own = params if params.seed is None else replace(params, seed=row_seed(params.seed, number))
        (output,) = engine.generate([prompt], own, **options)
        if not options:
            decoding = asdict(own)
            whole = engine.model.generate([prompt], eos_id=decoding.pop("eos_ids"), return_dict=True, **decoding)
            assert output.token_ids == whole.sequences[0, : whole.num_tokens[0]].tolist()
        told.append((output.token_ids, output.confidences, output.text, output.finish_reason))
    return told * (SAMPLES // samples)


def make_jobs(model, tokenizer, rng):
    """Every kind of request, with what it gets alone."""
    jobs, engine = [], Engine(model, EngineConfig(max_num_seqs=1, cache_tokens=4096), tokenizer)
    for params in KINDS:
        for prompt in rng.sample(_prompts(tokenizer, rng), 3):
            options = rng.choice(OPTIONS)
            jobs.append(Job(prompt, params, options, alone(engine, prompt, params, options)))
    return jobs


class Client:
    """Asks for one answer after the other, in every way there is."""

    def __init__(self, serving, jobs, tally, rng, until):
        self.serving, self.jobs, self.tally, self.random, self.until = serving, jobs, tally, rng, until

    async def run(self):
        while time.monotonic() < self.until:
            job, ask = self.random.choice(self.jobs), self.random.choice([self.whole, self.several, self.streamed])
            task = asyncio.create_task(ask(job, self._options(job)))
            if self.random.random() < 0.5:
                await asyncio.wait([task], timeout=self.random.expovariate(4))
                task.cancel()
            await asyncio.wait([task], timeout=PATIENCE_S)
            if not task.done():
                self.tally.wrong.append(f"no answer in {PATIENCE_S:.0f} s: {job.params} {job.options}")
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                self.tally.counts["cut off"] += 1
            except (QueueFull, asyncio.TimeoutError):  # turned away, or its deadline came before there was room
                self.tally.counts["turned away"] += 1
                await asyncio.sleep(0.05)

    def _options(self, job):
        rng = self.random
        options = dict(job.options, wait=rng.random() < 0.7, priority=rng.choice([-1.0, 0.0, 0.0, 2.0]))
        options["cache_salt"] = rng.choice([None, None, None, "one", "two"])
        options["deadline_s"] = rng.choice([None] * 6 + [rng.expovariate(1) + 1e-3])
        return options

    async def whole(self, job, options):
        self.tally.check(job, await self.serving.generate(job.prompt, job.params, **options))

    async def several(self, job, options):
        for number, output in enumerate(await self.serving.generate(job.prompt, job.params, n=SAMPLES, **options)):
            self.tally.check(job, output, number)

    async def streamed(self, job, options):
        left = self.random.randrange(6) if self.random.random() < 0.3 else None
        tokens, text, drafts = [], "", self.random.random() < 0.5
        async with contextlib.aclosing(self.serving.stream(job.prompt, job.params, drafts=drafts, **options)) as stream:
            async for event in stream:
                if left is not None and (left := left - 1) < 0:
                    self.tally.counts["left"] += 1
                    return
                if event.kind == "commit":
                    if event.start != len(tokens):
                        self.tally.wrong.append(f"a commit at {event.start} after {len(tokens)} tokens")
                    tokens += event.token_ids
                text += event.text
        self.tally.check(job, event.output)
        if (tokens, text) != (event.output.token_ids, event.output.text):
            self.tally.wrong.append(f"a stream told {tokens} {text!r}, and then {event.output}"[:1000])


async def disturb(serving, tally, rng, until):
    """What an operator does, one thing after the other."""
    while time.monotonic() < until:
        await asyncio.sleep(rng.expovariate(2))
        what = rng.choice(["weights", "pause", "sleep", "cancel"])
        tally.counts[f"{what}, of the engine"] += 1
        if what == "weights":
            mode = rng.choice(["finish", "recompute", "restart", "fail"])
            await serving.call(lambda engine, mode=mode: engine.weights_changed(mode))
        elif what == "cancel":
            await serving.call(lambda engine: engine.cancel(next(iter(engine.requests), "nobody")))
        else:
            stop, go = (Engine.pause, Engine.resume) if what == "pause" else (Engine.sleep, Engine.wake)
            await serving.call(stop)
            await asyncio.sleep(rng.expovariate(10))
            await serving.call(go)


async def watch(samples, until):
    """(seconds, bytes of memory) once a second, without what the C library's allocator keeps for later."""
    libc = ctypes.CDLL(None)
    while time.monotonic() < until:
        gc.collect()
        libc.malloc_trim(0)
        samples.append((time.monotonic(), usage().memory))
        await asyncio.sleep(min(1.0, max(0.0, until - time.monotonic())))


async def soak(engine, jobs, tally, seconds, clients, rng):
    """Returns the samples of memory behind the warm-up."""
    begun, samples = time.monotonic(), []
    until = begun + seconds
    async with AsyncEngine(engine) as serving:
        crowd = [Client(serving, jobs, tally, random.Random(rng.random()), until).run() for _ in range(clients)]
        await asyncio.gather(*crowd, disturb(serving, tally, rng, until), watch(samples, until))
        if not serving.is_alive:
            tally.wrong.append("the engine's thread has ended")
    return [sample for sample in samples if sample[0] >= begun + WARM_UP * seconds]


def megabytes_per_minute(samples):
    """Slope of a line through them, by least squares; None for fewer than two."""
    if len(samples) < 2:
        return None
    seconds, size = numpy.array(samples).T
    return float(numpy.polyfit(seconds - seconds[0], size, 1)[0]) * 60 / 1e6


@contextlib.contextmanager
def faults_logged():
    """Yields a list that grows by the exceptions that the engine logs, which are not shown meanwhile."""
    logged, logger = [], logging.getLogger("llada2_fast.engine")
    handler, propagate = logging.Handler(), logger.propagate
    handler.emit = lambda record: logged.append(type(record.exc_info[1]) if record.exc_info else None)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield logged
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def run(minutes, clients, seed):
    """(figures, lines that say what was wrong)."""
    for name, value in SMALL_CACHES.items():
        os.environ.setdefault(name, value)
    rng, tally = random.Random(seed), Tally()
    model = Shaky.from_pretrained(demo.path(), progress=False)
    tokenizer = ShakyTokenizer(load_tokenizer(demo.path()), random.Random(seed))
    jobs = make_jobs(model, tokenizer, rng)
    engine = Engine(model, EngineConfig(max_num_seqs=8, max_waiting=16, cache_tokens=2048), tokenizer)
    gc.collect()
    before, model.random = usage(), random.Random(seed)
    model.chance, tokenizer.chance = FORWARD_FAILS, TEXT_FAILS
    with faults_logged() as logged:
        samples = asyncio.run(soak(engine, jobs, tally, minutes * 60, clients, rng))
    model.chance = tokenizer.chance = 0.0
    gc.collect()
    after, slope = usage(), megabytes_per_minute(samples)
    injected = model.count + tokenizer.count
    wrong = tally.wrong
    engine.check_integrity()
    if engine.has_work or engine.cache.num_free != engine.cache.num_pages:
        wrong.append(
            f"{len(engine.requests)} requests and {engine.cache.num_pages - engine.cache.num_free} pages are left"
        )
    for what, old, new in (("threads", before.threads, after.threads), ("files", before.files, after.files)):
        if new > old:
            wrong.append(f"{what}: {old} before, {new} after")
    if minutes >= LONG_MINUTES and slope >= MAX_MB_PER_MINUTE:
        wrong.append(f"memory grew by {slope:.2f} MB a minute")
    wrong += [f"logged: {kind}" for kind in logged if kind is not Injected]
    if len(logged) < injected:
        wrong.append(f"{injected} faults, {len(logged)} of them in the log")
    for job in jobs:
        tally.check(job, engine.generate([job.prompt], job.params, **job.options)[0])
    figures = {"minutes": minutes, "clients": clients, "seed": seed, "steps": engine.num_steps, "injected": injected}
    return figures | {"counts": dict(tally.counts), "mb_per_minute": slope, "wrong": len(wrong)}, wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="how long (default: %(default)s; quick: 10 seconds)"
    )
    parser.add_argument("--clients", type=positive, default=24, help="how many at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    harness.add_options(parser)
    args = parser.parse_args(argv)
    harness.check_save(parser, args, "soak")
    if not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes {args.minutes}: expected a number above 0")
    figures, wrong = run(10 / 60 if args.quick else args.minutes, args.clients, args.seed)
    for name, count in sorted(figures["counts"].items()):
        print(f"{name:28}{count:10}")
    print(f"{'steps':28}{figures['steps']:10}\n{'faults injected':28}{figures['injected']:10}")
    print(f"{'memory, MB a minute':28}{figures['mb_per_minute'] or 0.0:10.2f}\n{'wrong':28}{len(wrong):10}")
    for line in wrong[:20]:
        print(line)
    harness.finish("soak", args, figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
