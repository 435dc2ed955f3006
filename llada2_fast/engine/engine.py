"""Engine: add requests, step, read events. All requests share one BlockDecoder, the refinement loop of the project.

What goes wrong hurts whose it is. A step may be cut short at any line, by a fault or by Ctrl-C: what counts of it are
the entries of the requests' logs, everything else is made again from them (`_recover`).
"""

import heapq
import itertools
import logging
import sys
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from functools import wraps

from tqdm.auto import tqdm

from ..config import DecodeParams, EngineConfig, RequestOptions, as_flag, choice
from ..decoding.decoder import PREFILL_TOKENS, BlockDecoder
from ..decoding.graph_runner import GraphRunner
from ..decoding.lanes import Lanes
from ..decoding.runner import CachedForward, EagerRunner
from ..decoding.sequence import Phase
from .gate import Gate, is_callers
from .intake import Intake
from .output_processor import draft, end_early, finish, process
from .request import DEFAULTS, Event, Request, check_params
from .scheduler import Scheduler
from .stats import EngineStats
from .stream import Stream
from .weights import prepare

ON_CHANGE = ("finish", "recompute", "restart", "fail")  # what becomes of requests that have begun under other weights
_logger = logging.getLogger(__name__)


def _call(method):
    """A public method that changes an engine: one at a time, on an engine that is whole, which it leaves whole."""

    @wraps(method)
    def call(self, *args, **kwargs):
        self._gate.enter(sys._getframe())
        try:
            self._mend()
            return method(self, *args, **kwargs)
        finally:
            self._mend()
            self._gate.leave()

    return call


class Engine:
    """Continuous batching of block diffusion over a shared paged cache. Used by one thread at a time, which is checked.

    model: LLaDA2Model.
    config: places, pages and how steps are run; None = EngineConfig()'s.
    tokenizer: needed for text and stop strings.
    clock: () -> seconds, for times and fairness.
    Raises ValueError for a config that the model or its device cannot have.

    Tokens, confidences and traces of a request are those of `generate()` with its prompt, parameters and seed, whatever
    else is running; on a float32 CPU bit for bit where block_length is a multiple of 4.

    What a request brings ends that request alone, with finish_reason "error": its tokenizer, NaN in its logits, no
    memory for it. A forward that raises ends the requests in it, be it a step's, a window pass's or a check's. Faults
    are logged with their traceback. Ctrl-C, TimeoutError and what a signal handler raises reach the caller at whatever
    line they come: requests of generate() are cancelled then, others go on from their last finished block.
    """

    def __init__(self, model, config: EngineConfig | None = None, tokenizer=None, clock=time.perf_counter):
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        self.config = config = config or EngineConfig()
        if config.graphs and config.capture and model.device.type != "cuda":
            raise ValueError(f"graphs=True: expected a model on a GPU, not on {model.device}")
        length = config.block_length or model.block_length
        pages = max(1, config.cache_tokens // length)
        widest = min(pages, -(-model.config.max_position_embeddings // length))
        self.cache = model.new_cache(pages, length)
        most = max(config.max_num_batched_tokens, PREFILL_TOKENS[model.device.type])
        self.intake = Intake(model, config, tokenizer, clock, pages, most)
        table = widest if config.graphs else 0
        lanes = Lanes(config.max_num_seqs, length, self.intake.ids, model.device, config.max_eos_ids, table)
        if config.graphs:
            runner, overlap = GraphRunner(model, self.cache, lanes, config.capture), int(config.overlap)
        else:
            runner, overlap = EagerRunner(CachedForward(model, self.cache), lanes), 0
        self.decoder = BlockDecoder(runner, overlap, most)
        self.scheduler = Scheduler(config, self.decoder, self.cache, clock)
        self.requests: dict[str, Request] = {}  # the unfinished ones
        self.finished = Counter()  # how many requests ended for which reason
        self.num_steps = 0
        self.paused = self.asleep = False
        self.interruptible = True  # exceptions may come from outside; not in a thread that nobody else knows
        self._totals = Counter()  # of finished requests; see EngineStats
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._untold: dict[Request, int] = {}  # by request, from where on step() has not told its log yet
        self._drafts: list[Request] = []  # that have a new draft since the step that is under way began
        self.told: list[Request] = []  # to whom the last step has given something
        self._gate = Gate()
        self._cut = False  # a change has begun and is not over
        self._orphans: deque[Request] = deque()  # who ends with the call that is under way
        self._strikes = 0  # faults in a row that are no request's

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self.requests)

    @property
    def idle(self) -> bool:
        """A step would do nothing: no request, or it is paused or asleep."""
        return self.paused or self.asleep or not self.requests

    def next_deadline(self) -> float | None:
        """When, on the clock, a request has to end as it stands; None if none has to."""
        while self._deadlines and not self._holds(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _holds(self, request):
        """A request is one of the unfinished ones."""
        return self.requests.get(request.request_id) is request

    # requests

    def add_request(self, prompt_ids, params: DecodeParams = DEFAULTS, **options) -> Request:
        """Let a request wait for its turn; returns its handle.

        prompt_ids: ints, or a tensor or array [n] of them.
        params: how it is decoded.
        options: fields of RequestOptions.
        Raises ValueError for what can never be done, QueueFull if too many requests wait.
        """
        return self.submit(prompt_ids, params, RequestOptions(**options))

    @_call
    def submit(
        self, prompt_ids, params: DecodeParams, options: RequestOptions, arrived: float | None = None, form=None
    ) -> Request:
        """add_request with its options in one. arrived: when it did, on the clock, None = now; form: intake.form's of
        params and options, None = not made yet."""
        check_params(params)
        if not isinstance(options, RequestOptions):
            raise ValueError(f"options={options!r:.80}: expected RequestOptions")
        self.scheduler.check_room()  # before the work that a long prompt is
        prompt = self.intake.prompt(prompt_ids, params, options)
        request = self.intake.request(prompt, params, options, arrived=arrived, form=form)
        self._queue(request)
        return request

    def _queue(self, request):
        name = request.request_id
        if request.options.request_id is None:  # made up, and maybe somebody else's by now
            names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(1)))
            request.request_id = next(one for one in names if one not in self.requests)
        elif name in self.requests:
            raise ValueError(f"request_id={name!r:.80}: expected another id than those of unfinished requests")
        self.scheduler.hash(request)  # a refusal must not cost the others a recovery
        with self._change():
            if request.options.deadline_s is not None:
                self._await_deadline(request)
            self.scheduler.add(request)
            self.requests[request.request_id] = request

    def _await_deadline(self, request):
        if len(self._deadlines) > 2 * len(self.requests) + 64:  # most of them have ended before
            self._deadlines = [entry for entry in self._deadlines if entry[2].output is None]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.arrived + request.options.deadline_s, request.order[1], request))

    @_call
    def cancel(self, request_id) -> bool:
        """End a request now: its pages are free when this returns. False if no such request is unfinished.

        request_id: its name. ValueError for what is none.
        """
        if not isinstance(request_id, str):
            raise ValueError(f"request_id={request_id!r:.80}: expected a string")
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request, "cancelled")
        return request is not None

    # steps

    @_call
    def step(self) -> list[Event]:
        """Schedule, one forward for all, deliver. Returns the events since the last step, each of them once; none of
        generate()'s requests.
        """
        return self._step()

    def _step(self):
        self._drafts = []
        try:
            with self._change():
                self._end_overdue()
                if not self.idle:
                    self._deliver(self.forward(self.scheduler.schedule()))
                self.scheduler.turn = []
            self._strikes = 0
        except BaseException as error:
            if self._is_callers(error) or (self.interruptible and isinstance(error, TimeoutError)):
                raise
            self._fault(error)
        told = [(request, begin) for request, begin in self._untold.items() if not request.awaited]
        events = [entry.event for request, begin in told for entry in request.log[begin:] if entry.event is not None]
        events += [request.draft for request in self._drafts if request.draft is not None]
        self.told, self._untold = [*self._untold, *self._drafts], {}
        return events

    def forward(self, work):
        """A step's work done. Returns the result of the step whose results have come, None if none has."""
        prefill = [(request.sequence, blocks) for request, blocks in work.prefill]
        result = self.decoder.step([request.sequence for request in work.denoise], prefill)
        self.num_steps += self.decoder.has_launched
        return result

    def _end_overdue(self):
        while (due := self.next_deadline()) is not None and due <= self.clock():
            request = self._deadlines[0][2]
            self.scheduler.turn = [request]
            self._end(request, "deadline")

    def _deliver(self, result):
        """Give the requests whose step has been read what it gives them."""
        self.scheduler.turn = []
        if result is None:
            return
        now, refined = self.clock(), set(result.sequences)
        for request in [request for request in self.scheduler.running if request.sequence in refined]:
            self.scheduler.turn = [request]
            request.prefilled = now if request.prefilled is None else request.prefilled
            if request.sequence.error:
                self._end(request, "error", request.sequence.error)
            else:
                self._give(request, now)

    def _give(self, request, now):
        try:
            entries = process(request, now)
        except BaseException as error:  # of its tokenizer: nothing has been changed yet
            if self._is_callers(error):
                raise
            _logger.error("request %s ends by a fault", request.request_id, exc_info=error)
            self._end(request, "error", describe(error))
            return
        self.scheduler.insert(request)
        self._tell(request, entries)
        request.draft = None if entries else draft(request, now)
        if request.draft is not None:
            self._drafts.append(request)
        if request.output is not None:
            self._forget(request)

    def _tell(self, request, entries):
        """Enter into a request's log what it is given: in one go, so that an exception comes before it or after."""
        told = len(request.log)
        self._untold.setdefault(request, told)
        request.log.extend(entries)
        request.sequence.num_delivered = request.log[-1].mark.num_delivered
        for i in range(max(1, told - 1), len(request.log) - 1):  # long texts are held once
            mark = request.log[i].mark._replace(revisable=())
            request.log[i] = request.log[i]._replace(mark=mark, detokenizer=None)

    def _end(self, request, reason, error=None):
        """End an unfinished request where it stands. error: what happened."""
        with self._change():
            now, last = self.clock(), request.log[-1]
            what = None if error is None else f"request {request.request_id}: {error}"
            try:
                entries = [finish(request, last, reason, now, error=what)] if what else end_early(request, reason, now)
            except BaseException as fault:  # of its tokenizer, which an error's end does not ask
                if self._is_callers(fault):
                    raise
                _logger.error("request %s ends by a fault", request.request_id, exc_info=fault)
                what = f"request {request.request_id}: {describe(fault)}"
                entries = [finish(request, last, "error", now, error=what)]
            self._tell(request, entries)
            request.draft = None
            self._forget(request)

    def _forget(self, request):
        """A request that has ended leaves the engine."""
        self.scheduler.remove(request)
        del self.requests[request.request_id]
        self._count(request.output)

    def _count(self, output):
        self.finished[output.finish_reason] += 1
        self._totals.update(
            prompt=output.prompt_length, generated=len(output.token_ids), shared=output.shared_tokens,
            forwards=output.counters.denoise_forwards,
        )  # fmt: skip

    # what goes wrong

    @contextmanager
    def _change(self):
        """Around what must not be left half done: if an exception comes out of it, `_mend` has to recover."""
        outer, self._cut = self._cut, True
        yield
        self._cut = outer

    def _mend(self):
        """Make whole what an exception has cut short, and end those nobody waits for any more."""
        if self._cut:
            self._recover()
        while self._orphans:
            if self._holds(self._orphans[0]):
                self._end(self._orphans[0], "cancelled")
            self._orphans.popleft()

    def _recover(self):
        """Make everything again from the requests' logs: all lanes and pages are free, all unfinished requests wait and
        go on from their last finished block, which they find in the cache if it was entered there."""
        self.decoder.clear()
        self.cache.reclaim()
        for name, request in list(self.requests.items()):
            if request.output is None:
                request.rewind()
            else:
                del self.requests[name]
                self._count(request.output)
        self.scheduler.restart(list(self.requests.values()))
        self._cut = False

    def _is_callers(self, error):
        return self.interruptible and is_callers(error)

    def _fault(self, error):
        """A step has failed: those whose work was being done end. If it was nobody's, it is tried once more, and then
        everybody ends."""
        revised, turn = set(self.decoder.revised), self.scheduler.turn
        if revised:  # a window pass or a check, behind the step itself
            turn = [request for request in self.scheduler.running if request.sequence in revised]
        theirs = [request for request in turn if request.output is None]
        if not theirs:
            self._strikes += 1
            theirs = list(self.requests.values()) if self._strikes > 1 else []
        _logger.error("a step failed: %d requests end", len(theirs), exc_info=error)
        self._recover()
        for request in theirs:
            self._end(request, "error", describe(error))

    @_call
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

    # faces

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

    def stream(self, request, drafts=True) -> Stream:
        """Events of a request as they come; the engine steps while there are none. Closing the iterator, or dropping
        it, cancels the request.

        request: a handle of add_request. ValueError if it is another engine's.
        drafts: whether "draft" events, the open block as it stands, are among them.
        Raises RuntimeError where the engine is paused or asleep and has nothing to tell.
        """
        if getattr(request, "home", None) is not self.intake.home:
            raise ValueError(f"request={request!r:.80}: expected a handle of this engine's add_request")
        as_flag("drafts", drafts)
        request.drafts = drafts
        return Stream(self, request)

    def leave(self, request):
        """End a request whose reader has gone: at once, or, where the garbage collector has found that in the middle of
        a call, when this is over."""
        self._orphans.append(request)
        if self._gate.is_free:
            self._settle()

    @_call
    def _settle(self):
        """Nothing more than what every call does."""

    @contextmanager
    def owned(self):
        """While it lasts this thread alone may use the engine, and nobody else knows it: no exception comes from
        outside."""
        self._gate.owner, self.interruptible = threading.get_ident(), False
        try:
            yield
        finally:
            self._gate.owner, self.interruptible = None, True

    def check_awake(self):
        """RuntimeError where steps do nothing."""
        if self.paused or self.asleep:
            raise RuntimeError(f"the engine is {'asleep: wake() it' if self.asleep else 'paused: resume() it'} first")

    @_call
    def generate(self, prompts, params=DEFAULTS, *, n=1, progress=False, stop=(), stop_token_ids=(), **options):
        """RequestOutputs of several prompts, in their order; one that failed has its `error` set.

        prompts: a list of what add_request takes, a tensor or array [B, P], or one prompt of either kind.
        params: one DecodeParams for all, whose seed each answer but the first mixes with its number, or one for each
            prompt.
        n: answers to each prompt, side by side in what is returned. Of a prompt's own seed they mix their number, too.
        progress: show a bar over answers.
        stop, stop_token_ids, canvas: as of RequestOptions, or a list with those of each prompt.
        options: further fields of RequestOptions, for all.
        More prompts than may wait are added as there is room. Everything is checked before anything is begun:
        ValueError names the prompt.
        """
        self.check_awake()
        requests = self.intake.batch(prompts, params, n, stop, stop_token_ids, options)
        for request in requests:
            request.awaited = True
        self._orphans.extend(requests)
        ahead, begun = deque(requests), deque()
        with tqdm(total=len(requests), desc="Answers", unit="answer", disable=not progress) as bar:
            while ahead or begun:
                while ahead and self.scheduler.has_room:
                    self._queue(ahead[0])
                    begun.append(ahead.popleft())
                self._step()
                while begun and begun[0].output is not None:
                    begun.popleft()
                    bar.update()
        return [request.output for request in requests]

    # weights and memory

    @_call
    def pause(self):
        """Steps do nothing until resume(); requests keep their places, and further ones may wait."""
        self.paused = True

    @_call
    def resume(self):
        """Go on after pause()."""
        self.paused = False

    @_call
    def weights_changed(self, running: str = "recompute"):
        """To be called between two steps when somebody has changed the model's weights: nothing that was computed under
        the old ones is found in the cache after it.

        running: what becomes of requests that have begun. "finish": they go on with the K/V they have. "recompute":
            they go on from their last finished block, with K/V made again. "restart": they begin again; those that have
            been given tokens fail, but for those of generate(), which nobody sees before the end. "fail": they all do.
        """
        choice("running", running, ON_CHANGE)
        with self._change():
            self.cache.clear()
            self._carry_on(running)

    def _carry_on(self, how):
        for request in list(self.requests.values()):
            if request.sequence.phase is not Phase.WAITING or len(request.log) > 1:  # it has begun
                self._carry_on_with(request, how)

    def _carry_on_with(self, request, how):
        told = request.sequence.num_delivered > 0 and not request.awaited
        if how == "fail" or (how == "restart" and told):
            self._end(request, "error", "the weights have been changed while it ran")
        elif how != "finish":
            if request.sequence.phase is not Phase.WAITING:
                self.scheduler.suspend(request)
            if how == "restart":
                self._untold.pop(request, None)
                del request.log[1:]
                request.num_read = 1
                request.rewind()

    @_call
    def update_weights(self, weights, running: str = "recompute"):
        """Give the model other weights, in place, and do as weights_changed(running).

        weights: the folder of a checkpoint of the same architecture, or {name: tensor} of some or all of
            model.state_dict(), of any float dtype.
        Raises ValueError or CheckpointError before anything is changed where names, shapes or values do not fit. If it
        is cut short, as by a file that turns out to be broken half way, all requests that have begun fail, and the
        engine is paused.
        """
        choice("running", running, ON_CHANGE)
        put = prepare(self.model, weights)
        with self._change():
            self.cache.clear()  # first: whatever comes now, nothing old is found
            self.paused, paused = True, self.paused
            try:
                put()
            except BaseException:
                running = "fail"
                raise
            finally:
                self._carry_on(running)
            self.paused = paused

    @_call
    def sleep(self):
        """Free the cache's memory, and that of captured graphs, until wake(). Requests wait meanwhile; those that have
        begun go on from their last finished block."""
        with self._change():
            for request in list(self.scheduler.running):
                self.scheduler.suspend(request)
            self.asleep = True
            self.decoder.clear()
            self.decoder.runner.forget()
            self.cache.drop()

    @_call
    def wake(self):
        """Take the memory back after sleep(). An error, e.g. of memory that is not there, leaves it asleep."""
        if self.asleep:
            self.decoder.runner.forget()  # again: sleep() may have been cut short
            self.cache.take()
            self.asleep = False


def describe(error: BaseException) -> str:
    """An exception as an output's `error` tells it."""
    try:
        text = str(error)
    except Exception:  # its own __str__ may be what is broken
        text = "no text can be made of it"
    return f"{type(error).__name__}: {text:.500}"
