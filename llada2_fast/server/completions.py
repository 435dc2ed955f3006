"""The completions themselves: a checked body in, OpenAI's answer or stream out."""

import asyncio
import logging
import uuid

from starlette.responses import JSONResponse

from ..engine import QueueFull
from ..viewer import trace_document
from .errors import ApiError, failed, missing, no_place, refused, shutting_down, too_busy
from .formats import ChatFormat, CompletionFormat
from .jobs import Job, chat_of, prompts_of
from .schema import ChatRequest
from .stream import DONE, EventStream, Last, event, unless_gone

_logger = logging.getLogger(__name__)


class Completions:
    """What /v1/chat/completions and /v1/completions do.

    serving: AsyncEngine.
    texts: Texts.
    config: ServerConfig.
    names: the model's.
    max_model_len: in tokens.
    defaults: DecodeParams' fields for requests that do not say.
    metrics: Metrics.
    """

    def __init__(self, serving, texts, config, names, max_model_len, defaults, metrics):
        self.serving, self.texts, self.config, self.names = serving, texts, config, names
        self.max_model_len, self.defaults, self.metrics = max_model_len, defaults, metrics
        self.running: dict[str, _Answer] = {}  # by the request's id
        self.opening = 0  # requests that the engine is yet to take
        self._ending = []  # requests whose readers have gone
        engine = serving.engine.config
        self.most = engine.max_num_seqs + engine.max_waiting  # requests at once
        self.draining = False

    async def answer(self, body, http):
        """The response to a ChatRequest or a CompletionRequest. http: starlette's Request."""
        edits = self.serving.engine.intake.ids.edits
        model, job = self.check_model(body.model), Job.of(body, self.config, self.defaults, edits)
        kind = ChatFormat if isinstance(body, ChatRequest) else CompletionFormat
        request_id = body.request_id or f"{kind.prefix}-{uuid.uuid4().hex}"
        answer = _Answer(self, body, kind(request_id, model, body, self.texts, self._trace), http.state.told)
        if body.stream:
            if not await unless_gone(http.receive, answer.begin(job)):
                return JSONResponse({}, 499)
            return EventStream(answer.events(), answer.end, {"X-Request-Id": request_id})
        return await unless_gone(http.receive, answer.whole(job)) or JSONResponse({}, 499)

    def check_room(self, count: int):
        """ApiError if the engine would not take so many more requests: it is asked between two steps, two calls at a
        time, so that of many who come at once the last would be refused late."""
        if self.serving.room < self.opening + count:
            raise too_busy()

    async def cancel(self, request_id: str) -> bool:
        """End a running request of this id as it stands. Whether there is one."""
        answer = self.running.get(request_id)
        if answer is None:
            return False
        answer.is_cancelled = answer.is_opening
        # By name: those that were sent to the engine come to it before this does.
        found = await asyncio.gather(*(self.serving.cancel(name) for name in answer.names))
        return any(found) or answer.is_cancelled

    async def cancel_all(self):
        """End all running requests as they stand, in one go: a call each would take a step for two of them."""
        names = [name for answer in self.running.values() for name in answer.names]
        await self.serving.call(lambda engine: [engine.cancel(name) for name in names])

    async def prompts(self, body) -> list[list[int]]:
        """Token ids of a body's prompts."""
        if isinstance(body, ChatRequest):
            return [await self.texts.encode_chat(chat_of(body.messages, self.config))]
        given = prompts_of(body, self.config)
        return await self.texts.encode(given) if isinstance(given[0], str) else given

    def observe(self, requests=()):
        """Count requests that have ended; those that are about to as soon as this is called again."""
        ending, self._ending = [*self._ending, *requests], []
        for request in ending:
            if request.output is None:
                self._ending.append(request)
            else:
                self.metrics.observe(request)

    def check_model(self, name):
        """The model's name. ApiError if it is another model's."""
        if name is not None and name not in self.names:
            raise ApiError(404, "model: expected one that /v1/models names", "model", "model_not_found")
        return name or self.names[0]

    def _trace(self, body, request):
        """The trace document of a finished request."""
        said = body.messages[-1].as_template_takes_it()["content"] if isinstance(body, ChatRequest) else None
        engine = self.serving.engine
        return trace_document(
            request.output, self.texts.tokenizer, model=self.names[0], prompt=said, params=request.params,
            block_length=engine.intake.block_length, mask_id=engine.intake.mask_id,
        )  # fmt: skip


class _Answer:
    """One request of a client's: as many of the engine's as it has choices."""

    def __init__(self, service, body, form, told):
        self.service, self.body, self.form, self.told = service, body, form, told
        self.names, self.readings = [], []  # names: those of the engine's requests
        self.is_cancelled = False  # while it was opening
        told["id"] = form.request_id

    @property
    def requests(self):
        return [reading.request for reading in self.readings]

    @property
    def is_opening(self):
        """The engine is yet to take some of it."""
        return None in self.readings

    async def begin(self, job):
        """The engine has taken all of it when this returns, True; ApiError, and it has none of it, where it cannot."""
        service = self.service
        service.check_room(1)  # before the work that a long prompt is
        job = await job.read(service.texts)
        prompts = await service.prompts(self.body)
        field = "messages" if isinstance(self.body, ChatRequest) else "prompt"
        each = job.fit(prompts, service.max_model_len, field, service.serving.engine.cache)
        if len(each) > service.most:
            raise ApiError(400, f"n: expected at most {service.most} answers to all prompts", "n", "invalid_value")
        base = self.form.request_id
        self.names = [f"{base}-{index}" for index in range(len(each))] if len(each) > 1 else [base]
        self.readings = [None] * len(each)

        async def open_one(index, prompt, params):
            self.readings[index] = await service.serving.open(
                prompt, params, drafts=bool(self.body.draft), until_end=not self.body.stream, form=form,
                arrived=arrived, **vars(job.options) | {"request_id": self.names[index]},
            )  # fmt: skip

        service.check_room(len(each))
        if base in service.running:
            raise ApiError(400, "request_id: expected one that no running request has", "request_id", "invalid_value")
        service.running[base] = self
        opening, arrived = [], service.serving.engine.clock()
        try:
            form = await service.serving.prepare(job.params, job.options)  # once for all, which do not count meanwhile
            service.check_room(len(each))
            service.opening += len(each)
            opening += [asyncio.ensure_future(open_one(index, *one)) for index, one in enumerate(each)]
            await asyncio.gather(*opening)
            if self.is_cancelled:
                await asyncio.gather(*map(service.serving.cancel, self.names))
        except BaseException as error:
            for task in opening:  # gather leaves them alone where one of them has failed
                task.cancel()
            await asyncio.gather(*opening, return_exceptions=True)
            self.end()
            if isinstance(error, QueueFull):
                raise too_busy() from error
            if isinstance(error, asyncio.TimeoutError):
                raise no_place() from error
            if isinstance(error, ValueError):
                raise refused(error, job.names) from error
            if isinstance(error, ModuleNotFoundError):
                raise missing(error, job.names[job.params.language]) from error
            raise
        finally:
            service.opening -= len(opening)
        return True

    async def whole(self, job):
        """The plain response."""
        await self.begin(job)
        try:
            outputs = await asyncio.gather(*(reading.output() for reading in self.readings))
            for problem in filter(None, map(self._problem, self.requests)):
                raise problem
            return await self.service.texts.run(sum(map(_size, outputs)), self._response)
        finally:
            self.end()

    def _response(self):
        return JSONResponse(self.form.answer(self.requests), headers={"X-Request-Id": self.form.request_id})

    async def events(self):
        """The stream, as bytes. Its end is sent in one piece: in short answers to send is much of the work."""
        extra, tail, running = {"usage": None} if self._tells_usage else {}, [], len(self.readings)
        for index in range(len(self.readings)):
            choice = self.form.first(index)
            if choice:
                yield event(self.form.chunk([choice], **extra))
        try:
            async for index, happened in self._merged():
                problem = happened.output and self._problem(self.readings[index].request)
                if problem:
                    tail.append(event(problem.body()))
                    break
                size = _size(happened.output) if happened.output and self.body.trace else 0
                data = await self.service.texts.run(size, self._event, index, happened, extra)
                running -= happened.kind == "finish"
                if not running:
                    tail.append(data)
                elif data:
                    yield data
            else:
                if self._tells_usage:
                    tail.append(event(self.form.chunk([], usage=self.form.usage(self.requests))))
        except RuntimeError:  # of the engine's thread, which has ended
            _logger.exception("request %s is lost", self.form.request_id)
            tail.append(event(failed(self.form.request_id).body()))
        self.end()  # first: who has the last of it finds it counted
        yield Last(b"".join((*tail, DONE)))

    @property
    def _tells_usage(self):
        return bool(self.body.stream_options and self.body.stream_options.include_usage)

    async def _merged(self):
        """(index of the choice, event) as they come."""
        if len(self.readings) == 1:
            async for happened in self.readings[0]:
                yield 0, happened
            return
        waiting = {asyncio.ensure_future(anext(reading)): i for i, reading in enumerate(self.readings)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = waiting.pop(task)
                    happened = task.result()
                    if happened.kind != "finish":
                        waiting[asyncio.ensure_future(anext(self.readings[index]))] = index
                    yield index, happened
        finally:
            for task in waiting:
                task.cancel()

    def _event(self, index, happened, extra):
        if happened.kind == "draft":
            choice = self.form.draft(index, happened)
        elif happened.kind == "commit":
            choice = self.form.commit(index, happened)
        else:
            choice = self.form.last(index, self.readings[index].request, happened)
        return choice and event(self.form.chunk([choice], **extra))

    def _problem(self, request):
        """What is told instead of an output that is none."""
        reason = request.output.finish_reason
        if reason == "error" or (reason == "cancelled" and not self.service.serving.is_alive):
            return failed(self.form.request_id)
        if reason == "cancelled" and self.service.draining:
            return shutting_down()
        return no_place() if reason == "deadline" and request.admitted is None else None

    def end(self):
        """Nobody waits for it any more: the engine ends what is unfinished."""
        if self.service.running.get(self.form.request_id) is not self:
            return
        del self.service.running[self.form.request_id]
        opened = [reading for reading in self.readings if reading is not None]
        for reading in opened:
            reading.close()
        requests = [reading.request for reading in opened]
        self.service.observe(requests)
        self.told["prompt_tokens"] = sum(len(request.prompt) for request in requests[:: self.body.n or 1])
        self.told["completion_tokens"] = sum(request.sequence.num_delivered for request in requests)
        # None: its reader has gone, and the engine is yet to end it
        self.told["finish_reasons"] = [request.output and request.output.finish_reason for request in requests]
        if self.service.config.log_prompts:
            self.told["prompts"] = [request.prompt for request in requests]
            self.told["answers"] = [request.output and request.output.text for request in requests]


def _size(output):
    """How many tokens are told of an output, with those beside them."""
    return len(output.token_ids) * (1 + len((output.top_logprobs or [()])[0]))
