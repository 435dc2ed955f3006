"""The server that `llada2-fast serve` runs, around an engine that fails on a schedule and says when pages are free.

    python -m benchmarks.chaos.launcher [--faults N] [--max-num-seqs N] [--drain-s S] [--port N]

Its log has, beside what the server says: "fault" with the requests that it hits, and "freed" with the moment at which a
cancelled request's pages were free, and how long the last step's forward took. Moments are time.monotonic(), one clock
for all processes of the machine.
"""

import argparse
import random
import time

import torch

from llada2_fast import LLaDA2Model, demo
from llada2_fast.config import EngineConfig, ServerConfig
from llada2_fast.decoding.runner import CachedForward, EagerRunner
from llada2_fast.engine import AsyncEngine, Engine
from llada2_fast.server import Server, bind, serve
from llada2_fast.server.log import log
from llada2_fast.weights.special_tokens import load_tokenizer

NAME = "chaos-"  # of requests that may be hit
EVERY = 25
KINDS = ("exception", "out of memory", "nan", "exception behind it")


class Injected(RuntimeError):
    """A fault that was asked for."""


class Faulty(CachedForward):
    """Forwards of which some fail: before anything is computed, when K/V are written, or with NaN in a row's logits.

    engine: the Watched one whose forwards they are.
    left: how many faults are to come, one in EVERY forwards, about.
    """

    def __init__(self, engine, left: int):
        super().__init__(engine.model, engine.cache)
        self.engine, self.left, self.random = engine, left, random.Random(0)

    def __call__(self, plan, state, needed):
        kind = self._draw(KINDS)
        row = self.random.choice(plan.lanes)
        if kind is not None:
            lanes = {id(one.sequence): one.request_id for one in self.engine.requests.values()}
            alone = [lanes[id(self.engine.decoder.sequences[row])]]
            log("fault", kind=kind, requests=alone if kind == "nan" else self.engine.in_step)
        _raise(kind, behind=False)
        logits, index = super().__call__(plan, state, needed)
        _raise(kind, behind=True)
        if kind == "nan":
            logits = logits.clone()  # it was made in inference mode
            logits[index[row][index[row] >= 0]] = float("nan")
        return logits, index

    def prefill(self, blocks):
        kind = self._draw(KINDS[:2])
        if kind is not None:
            log("fault", kind=kind, requests=self.engine.in_step)
        _raise(kind, behind=False)
        super().prefill(blocks)

    def _draw(self, kinds):
        others = not all(name.startswith(NAME) for name in self.engine.in_step)  # as the server's own first request
        if others or not self.left or self.random.random() * EVERY > 1:
            return None
        self.left -= 1
        return self.random.choice(kinds)


def _raise(kind, behind):
    if kind == "exception behind it" if behind else kind == "exception":
        raise Injected(kind)
    if kind == "out of memory" and not behind:
        raise torch.OutOfMemoryError("not enough memory: a fault that was asked for")


class Watched(Engine):
    """Notes how long steps take, who is in them, and when pages are free."""

    def __init__(self, *args):
        super().__init__(*args)
        self.in_step, self.step_s = [], 0.0  # names of requests; of the last forward

    def fail(self, faults: int):
        self.decoder.runner = EagerRunner(Faulty(self, faults), self.decoder.lanes)

    def forward(self, work):
        self.in_step, begun = [request.request_id for request in work.requests()], time.monotonic()
        try:
            return super().forward(work)
        finally:
            if work.denoise:
                self.step_s = time.monotonic() - begun

    def cancel(self, request_id):
        before = self.cache.num_free
        done = super().cancel(request_id)
        now, pages = time.monotonic(), self.cache.num_free - before
        log("freed", request=request_id, at=now, pages=pages, step_s=self.step_s)
        return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0, help="where to listen (default: a free one)")
    parser.add_argument("--faults", type=int, default=0, help="how many (default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="rows decoded together (default: %(default)s)")
    parser.add_argument("--drain-s", type=float, default=30.0, help="for streams to end (default: %(default)s)")
    args = parser.parse_args()
    config = ServerConfig(port=args.port, drain_s=args.drain_s)
    port = bind(config)
    model = LLaDA2Model.from_pretrained(demo.path(), torch.float32, progress=False)
    engine = Watched(model, EngineConfig(max_num_seqs=args.max_num_seqs), load_tokenizer(demo.path()))
    engine.fail(args.faults)
    server = Server(AsyncEngine(engine), config, ("chaos",), {"eos_early_stop": True})
    try:
        serve(server, port)
    finally:
        server.serving.close()


if __name__ == "__main__":
    main()
