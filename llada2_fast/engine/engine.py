"""Engine: add requests, step, read events. All requests share one BlockDecoder, the refinement loop of the project."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..cache import PagedKVCache, content_keys
from ..config import DecodeParams, EngineConfig, as_float, as_ids
from ..decoding.decoder import BlockDecoder, CachedForward, GraphedForward, row_rules
from ..decoding.inputs import check_fit, resolve_ids, row_seed, row_seeds, split_prompts
from .detokenizer import IncrementalDetokenizer
from .output_processor import commit_block, draft_block, make_output, stops_inside
from .request import DEFAULTS, FINISHED, Event, Request, check_params
from .scheduler import Scheduler

# What a forward may raise: all requests in it fail, the engine goes on. AssertionErrors are bugs of ours and raised.
FAULTS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class Engine:
    """Continuous batching of block diffusion over a shared paged cache. Not for use from several threads.

    model: LLaDA2Model; tokenizer: needed for text and stop strings; clock: seconds, for times and fairness.
    Tokens, confidences and traces of a request are those of `generate()` with its prompt, parameters and seed, whatever
    else is running; on a float32 CPU bit for bit where block_length is a multiple of 4.
    """

    def __init__(self, model, config=None, tokenizer=None, clock=time.perf_counter):
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        self.config = config = config or EngineConfig()
        if config.graphs and model.device.type != "cuda":
            raise ValueError(f"graphs=True: expected a model on a GPU, not on {model.device}")
        self.block_length = length = config.block_length or model.block_length
        self.mask_id = resolve_ids(model, DecodeParams(mask_id=config.mask_id, eos_ids=()))[0]
        pages = max(1, config.cache_tokens // length)
        self.cache = PagedKVCache(model.config, pages, length, model.dtype, model.device)
        if config.graphs:
            most = min(pages, -(-model.config.max_position_embeddings // length))
            self.forward = GraphedForward(model, self.cache, config.max_num_seqs, most, lag=0 if config.trace else 1)
        else:
            self.forward = CachedForward(model, self.cache, ahead=False)
        self.decoder = BlockDecoder(
            self.forward, config.max_num_seqs, length, self.mask_id, model.device, config.max_eos_ids, config.trace
        )
        self.scheduler = Scheduler(config, self.decoder, self.cache, clock)
        self.requests: dict[str, Request] = {}  # the unfinished ones
        self.finished = Counter()  # how many requests ended for which reason
        self.num_steps = 0
        self._arrivals = 0

    @property
    def has_work(self):
        """Some request is not finished."""
        return bool(self.requests)

    def add_request(self, prompt_ids, params=DEFAULTS, *, request_id=None, priority=0, stop=(), stop_token_ids=()):
        """Let a request wait for its turn; returns its handle, a Request.

        prompt_ids: ints, or a tensor or array [n] of them; params: DecodeParams; priority: a finite number, higher goes
        first; stop: a string or several that end the text, not part of it; stop_token_ids: ids that end the tokens,
        part of them.
        Stops count as soon as they are committed and no mask is left before them; with editing on, when their block
        ends.
        Raises ValueError for what can never be done, QueueFull if too many requests wait.
        """
        check_params(params)
        as_float("priority", priority, "that is finite", math.isfinite)
        stop_token_ids = () if stop_token_ids is None else as_ids("stop_token_ids", stop_token_ids)
        self._arrivals += 1
        request_id = f"request-{self._arrivals}" if request_id is None else request_id
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
        if row_rules(params, self.block_length)["max_steps"] == 0:
            raise ValueError(
                f"minimal_topk={params.minimal_topk}: expected at most gen_length={params.gen_length} under "
                f"profile='hf-2.0', which takes no step otherwise"
            )
        now = self.clock()
        request = Request(
            request_id, prompt, params, row_seeds(params.seed, None, 1, params.draws)[0], eos_ids, self.block_length,
            priority, (now - priority * self.config.priority_s, self._arrivals), now, frozenset(stop_token_ids),
            self._text_stream(stop),
        )  # fmt: skip
        if request.num_blocks > self.cache.num_pages:
            raise ValueError(
                f"gen_length={params.gen_length}: with {len(prompt)} prompt tokens {request.num_blocks} pages of "
                f"{self.block_length} tokens are needed, the whole cache has {self.cache.num_pages} (cache_tokens)"
            )
        request.ids = prompt[: len(prompt) // self.block_length * self.block_length]
        if self.config.enable_prefix_caching:
            request.keys = content_keys(request.ids, self.block_length)
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self):
        """Schedule, one forward for all, deliver. Returns the events of this step."""
        plan = self.scheduler.schedule()
        prefill = [(request.row, blocks) for request, blocks in plan.prefill]
        rows = [request.row for request in plan.denoise]
        try:
            if rows:
                self.decoder.step(rows, prefill)
            elif prefill:
                self.forward.settle_ahead(prefill)
        except FAULTS as error:
            return [self._fail(request, f"{type(error).__name__}: {error}") for request in plan.requests()]
        self.num_steps += bool(rows or prefill)
        return self._deliver() if rows else []

    def stream(self, request, drafts=True):
        """Events of a request as they come; the engine steps while there are none. Closing the iterator cancels it."""
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
        """Assert that every page, slot and request is where it belongs."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self.cache.check_integrity([request.row.pages for request in running])
        assert {id(r) for r in self.requests.values()} == {id(r) for r in running + waiting}
        assert [r for r in self.decoder.rows if r is not None] == sorted((r.row for r in running), key=lambda r: r.slot)
        assert waiting == sorted(waiting, key=lambda r: r.order)
        for request in waiting:
            assert request.row is None or (request.row.slot is None and not request.row.pages)

    def _deliver(self):
        """Events of the requests that took part in the last step the decoder has a report of."""
        report = self.decoder.report
        if report is None:
            return []
        now, events = self.clock(), []
        took_part = set(report.rows)
        requests = [request for request in self.scheduler.running if request.row in took_part]
        for request in requests:
            request.prefilled = now if request.prefilled is None else request.prefilled
            if request.row.error:
                events.append(self._fail(request, request.row.error))
        told = [r for r in requests if r.output is None and (r.row.block_done or r.row.finish_reason or r.watched)]
        for request, block in zip(told, report.details([r.row for r in told]), strict=True):
            row = request.row
            if row.block_done or row.finish_reason or stops_inside(request, block[0], self.mask_id):
                event, stopped = commit_block(request, *block, now)
                request.draft = None
                if event is not None:
                    request.events.append(event)
                    events.append(event)
                if self.config.enable_prefix_caching:
                    self._publish(request)
                if stopped or row.finish_reason:
                    events.append(self._finish(request, "stop" if stopped else row.finish_reason))
            elif request.drafts and not request.closed:
                request.draft = draft_block(request, *block, now)
                events.append(request.draft)
        return events

    def _publish(self, request):
        """Let others find the blocks whose K/V are final. A denoise step without NaN has proved them all finite."""
        row = request.row
        request.keys = content_keys(request.ids, row.length, request.keys)
        for block in range(request.published, min(row.settled, row.limit // row.length)):
            self.cache.publish(row.pages[block], request.keys[block])
            request.published = block + 1

    def _fail(self, request, what):
        return self._finish(request, "error", f"request {request.request_id}: {what}")

    def _finish(self, request, reason, error=None):
        now, tail = self.clock(), request.stream.take(final=True) if request.stream else ""
        request.output = make_output(request, reason, error, now)
        self.scheduler.remove(request)
        del self.requests[request.request_id]
        request.status, request.row, request.draft = FINISHED, None, None
        self.finished[reason] += 1
        event = Event(request.request_id, "finish", now, text=tail, output=request.output)
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
        prompts = split_prompts([prompt_ids] if isinstance(prompt_ids, Sequence) else prompt_ids, name="prompt_ids")
        if len(prompts) != 1:
            raise ValueError(f"prompt_ids: one prompt expected, got {len(prompts)}")
        check_fit(self.model.config, prompts, params)
        return prompts[0].tolist()

    def _text_stream(self, stop):
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        several = isinstance(stop, (list, tuple, set, frozenset))
        if not several or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={stop!r:.80}: expected strings that are not empty")
        if stop and self.tokenizer is None:
            raise ValueError(f"stop={stop!r:.80}: stop strings need an Engine with a tokenizer")
        return None if self.tokenizer is None else IncrementalDetokenizer(self.tokenizer, tuple(stop))
