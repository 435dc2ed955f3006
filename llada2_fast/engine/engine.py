"""Engine: add requests, step, read events. All requests share one BlockDecoder, the refinement loop of the project."""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace

from ..config import DecodeParams, EngineConfig, as_float, as_ids
from ..decoding.decoder import BlockDecoder
from ..decoding.graph_runner import GraphRunner
from ..decoding.inputs import check_fit, resolve_ids, row_seed, row_seeds, split_prompts
from ..decoding.lanes import Lanes
from ..decoding.rules import row_rule
from ..decoding.runner import CachedForward, EagerRunner
from ..decoding.sequence import Sequence
from ..kernels.refine import SpecialIds
from .detokenizer import IncrementalDetokenizer
from .output_processor import make_output, process
from .request import DEFAULTS, Event, Request, check_params
from .scheduler import Scheduler
from .stats import EngineStats

# What a forward may raise: all requests in it fail, the engine goes on. AssertionErrors are bugs of ours and raised.
FAULTS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching of block diffusion over a shared paged cache. Not for use from several threads.

    model: LLaDA2Model.
    config: places, pages and how steps are run; None = EngineConfig()'s.
    tokenizer: needed for text and stop strings.
    clock: () -> seconds, for times and fairness.
    Raises ValueError for a config that the model or its device cannot have.

    Tokens, confidences and traces of a request are those of `generate()` with its prompt, parameters and seed, whatever
    else is running; on a float32 CPU bit for bit where block_length is a multiple of 4.
    """

    def __init__(self, model, config: EngineConfig | None = None, tokenizer=None, clock=time.perf_counter):
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        self.config = config = config or EngineConfig()
        if config.graphs and config.capture and model.device.type != "cuda":
            raise ValueError(f"graphs=True: expected a model on a GPU, not on {model.device}")
        self.block_length = length = config.block_length or model.block_length
        self.mask_id = resolve_ids(model, DecodeParams(mask_id=config.mask_id, eos_ids=()))[0]
        pages = max(1, config.cache_tokens // length)
        widest = min(pages, -(-model.config.max_position_embeddings // length))
        self.cache = model.new_cache(pages, length)
        ids, table = SpecialIds(self.mask_id), widest if config.graphs else 0
        lanes = Lanes(config.max_num_seqs, length, ids, model.device, config.max_eos_ids, table)
        if config.graphs:
            self.decoder = BlockDecoder(GraphRunner(model, self.cache, lanes, config.capture), int(config.overlap))
        else:
            self.decoder = BlockDecoder(EagerRunner(CachedForward(model, self.cache), lanes))
        self.scheduler = Scheduler(config, self.decoder, self.cache, clock)
        self.requests: dict[str, Request] = {}  # the unfinished ones
        self.finished = Counter()  # how many requests ended for which reason
        self.num_steps = 0
        self._totals = Counter()  # of finished requests; see EngineStats
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self.requests)

    def add_request(
        self, prompt_ids, params: DecodeParams = DEFAULTS, *, request_id=None, priority=0, stop=(), stop_token_ids=(),
        trace: bool | None = None,
    ) -> Request:  # fmt: skip
        """Let a request wait for its turn; returns its handle.

        prompt_ids: ints, or a tensor or array [n] of them.
        params: how it is decoded.
        request_id: a name that no unfinished request has; made up unless given.
        priority: a finite number, higher goes first.
        stop: a string or several that end the text, not part of it. Stops count as soon as they are committed and no
            mask is left before them; with editing on, when their block ends.
        stop_token_ids: ids that end the tokens, part of them.
        trace: keep every commit and edit; None = as the engine's config says.
        Raises ValueError for what can never be done, QueueFull if too many requests wait.
        """
        check_params(params)
        as_float("priority", priority, "that is finite", math.isfinite)
        stop_token_ids = () if stop_token_ids is None else as_ids("stop_token_ids", stop_token_ids)
        self._arrivals += 1
        if request_id is None:
            names = (f"request-{number}" for number in itertools.count(self._arrivals))
            request_id = next(name for name in names if name not in self.requests)
        if request_id in self.requests:
            raise ValueError(f"request_id={request_id!r:.80}: expected another id than those of unfinished requests")
        prompt = self._check_prompt(prompt_ids, params)
        mask_id, eos_ids, _ = resolve_ids(self.model, params)
        for name, value, own in (
            ("block_length", params.block_length, self.block_length), ("mask_id", mask_id, self.mask_id),
        ):  # fmt: skip
            if value not in (None, own):
                raise ValueError(f"{name}={value!r:.80}: expected {own}, the engine's, or None")
        if len(eos_ids) > self.config.max_eos_ids:
            raise ValueError(f"eos_ids={eos_ids!r:.80}: expected at most max_eos_ids={self.config.max_eos_ids} ids")
        if row_rule(params, self.block_length).max_steps == 0:
            raise ValueError(
                f"minimal_topk={params.minimal_topk}: expected at most gen_length={params.gen_length} under "
                f"profile='hf-2.0', which takes no step otherwise"
            )
        traced = self.config.trace if trace is None else trace
        seed = row_seeds(params.seed, None, 1, params.draws)[0]
        sequence = Sequence(prompt, params, seed, eos_ids, self.block_length, self.mask_id, traced, detailed=True)
        if sequence.num_blocks > self.cache.num_pages:
            raise ValueError(
                f"gen_length={params.gen_length}: with {len(prompt)} prompt tokens {sequence.num_blocks} pages of "
                f"{self.block_length} tokens are needed, the whole cache has {self.cache.num_pages} (cache_tokens)"
            )
        now = self.clock()
        request = Request(
            request_id, sequence, priority, (now - priority * self.config.priority_s, self._arrivals), now,
            frozenset(stop_token_ids), self._detokenizer(stop),
        )  # fmt: skip
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self) -> list[Event]:
        """Schedule, one forward for all, deliver. Returns the events of this step."""
        work, events, result = self.scheduler.schedule(), [], None
        with self._failing(work.requests(), events):
            result = self.forward(work)
        return events + self._deliver(result)

    def forward(self, work):
        """A step's work done. Returns the result of the step whose results have come, None if none has."""
        self.num_steps += bool(work.requests())
        prefill = [(request.sequence, blocks) for request, blocks in work.prefill]
        return self.decoder.step([request.sequence for request in work.denoise], prefill)

    def _deliver(self, result):
        """Events of the requests whose step has been read."""
        if result is None:
            return []
        now, events, refined = self.clock(), [], set(result.sequences)
        for request in [request for request in self.scheduler.running if request.sequence in refined]:
            request.prefilled = now if request.prefilled is None else request.prefilled
            if request.sequence.error:
                events.append(self._fail(request, request.sequence.error))
                continue
            with self._failing([request], events):
                fresh, reason = process(request, now)
                self.scheduler.insert(request)
                events += fresh
                if reason:
                    events.append(self._finish(request, reason))
        return events

    @contextmanager
    def _failing(self, requests, events):
        """What goes wrong inside ends these requests, and no others."""
        try:
            yield
        except FAULTS as error:
            _logger.exception("a step failed: %d requests end", len(requests))
            what = f"{type(error).__name__}: {error}"
            events += [self._fail(request, what) for request in requests if request.output is None]

    def stats(self) -> EngineStats:
        """What the engine has done and holds."""
        return EngineStats(
            num_running=len(self.scheduler.running), num_waiting=len(self.scheduler.waiting),
            num_finished=dict(self.finished), num_preemptions=self.scheduler.preemptions, num_steps=self.num_steps,
            prompt_tokens=self._totals["prompt"], generated_tokens=self._totals["generated"],
            shared_tokens=self._totals["shared"], denoise_forwards=self._totals["forwards"],
            num_pages=self.cache.num_pages, num_free_pages=self.cache.num_free, num_idle_pages=self.cache.num_idle,
            num_evicted_pages=self.cache.num_evicted,
        )  # fmt: skip

    def stream(self, request, drafts=True):
        """Events of a request as they come; the engine steps while there are none. Closing the iterator cancels it.

        request: a handle of add_request.
        drafts: whether "draft" events, the open block as it stands, are among them.
        """
        request.drafts = drafts
        try:
            while request.events or request.output is None:
                event = request.next_event()
                if event is None:
                    self.step()
                else:
                    yield event
        finally:
            if request.output is None:
                self.cancel(request.request_id)

    def generate(self, prompts, params=DEFAULTS, **options):
        """RequestOutputs of several prompts, in their order; one that failed has its `error` set.

        prompts: a list of what add_request takes, a tensor or array [B, n], or one prompt of either kind.
        params: one DecodeParams for all, whose seed each prompt but the first mixes with its number, or one for each;
        options: as of add_request. More prompts than may wait are added as there is room.
        """
        if not (isinstance(prompts, (list, tuple)) and not prompts):
            prompts = split_prompts(prompts, name="prompts")
        each = self._params_of_each(params, len(prompts))
        handles = []
        try:
            while len(handles) < len(prompts) or any(handle.output is None for handle in handles):
                while len(handles) < len(prompts) and self.scheduler.has_room:
                    handles.append(self.add_request(prompts[len(handles)], each[len(handles)], **options))
                self.step()
        finally:
            for handle in handles:
                if handle.output is None:
                    self.cancel(handle.request_id)
        return [handle.output for handle in handles]

    def cancel(self, request_id):
        """End a request now: its pages are free when this returns. False if no such request is unfinished."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, "cancelled")
        return request is not None

    def check_integrity(self):
        """Assert that every page, lane and request is where it belongs."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self.cache.check_integrity([request.sequence.pages for request in running])
        assert {id(r) for r in self.requests.values()} == {id(r) for r in running + waiting}
        in_lanes = [request.sequence for request in running if request.sequence.lane is not None]
        assert [s for s in self.decoder.sequences if s is not None] == sorted(in_lanes, key=lambda s: s.lane)
        assert waiting == sorted(waiting, key=lambda r: r.order)
        for request in waiting:
            assert request.sequence.lane is None and not request.sequence.pages

    def _fail(self, request, what):
        return self._finish(request, "error", f"request {request.request_id}: {what}")

    def _finish(self, request, reason, error=None):
        now, tail = self.clock(), request.detokenizer.take(final=True) if request.detokenizer else ""
        self.scheduler.remove(request)
        output = request.output = make_output(request, reason, error, now)
        del self.requests[request.request_id]
        request.draft = None
        self.finished[reason] += 1
        self._totals.update(
            prompt=output.prompt_length, generated=len(output.token_ids), shared=output.shared_tokens,
            forwards=output.counters.denoise_forwards,
        )  # fmt: skip
        event = Event(request.request_id, "finish", now, text=tail, output=output)
        request.events.append(event)
        return event

    @staticmethod
    def _params_of_each(params, count):
        several = isinstance(params, (list, tuple))
        each = list(params) if several else [params] * count
        if len(each) != count or not all(isinstance(one, DecodeParams) for one in each):
            raise ValueError(f"params={params!r:.80}: expected DecodeParams, or one for each of {count} prompts")
        if several or params.seed is None:
            return each
        return [replace(params, seed=row_seed(params.seed, i)) for i in range(count)]

    def _check_prompt(self, prompt_ids, params):
        prompts = split_prompts([prompt_ids] if isinstance(prompt_ids, SequenceOf) else prompt_ids, name="prompt_ids")
        if len(prompts) != 1:
            raise ValueError(f"prompt_ids: one prompt expected, got {len(prompts)}")
        check_fit(self.model.config, prompts, params)
        return prompts[0].tolist()

    def _detokenizer(self, stop):
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        several = isinstance(stop, (list, tuple, set, frozenset))
        if not several or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={stop!r:.80}: expected strings that are not empty")
        if stop and self.tokenizer is None:
            raise ValueError(f"stop={stop!r:.80}: stop strings need an Engine with a tokenizer")
        return None if self.tokenizer is None else IncrementalDetokenizer(self.tokenizer, tuple(stop))
