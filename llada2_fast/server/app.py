"""The routes."""

import asyncio
import time
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse

from .. import __version__
from ..config import DecodeParams, ServerConfig
from ..engine import AsyncEngine, Engine
from ..viewer import page
from . import answers
from .completions import Completions
from .errors import ApiError, ended, invalid, shutting_down
from .guard import OPEN, Guard
from .jobs import chat_of
from .metrics import Metrics
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .text import Texts

STATS_S = 10.0  # how long /metrics waits for the engine's step to end
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFUSALS = {
    400: "what cannot be honoured, by name",
    401: "no API key, or a wrong one",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "too many requests are waiting",
    500: "the request has failed; the log says why",
    503: "the server is shutting down, or its engine has ended",
}
# Each event's data is a chunk of JSON; that of the last one is [DONE].
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM = {"content": {"text/event-stream": {"schema": EVENT}}}


class Server:
    """One model behind HTTP: `app` is the ASGI application.

    serving: AsyncEngine of an Engine with a tokenizer. It is closed when the app's lifespan ends.
    config: ServerConfig.
    names: the model's.
    defaults: DecodeParams' fields for requests that do not say.
    Raises ValueError for a max_model_len that model and cache do not have.
    """

    def __init__(self, serving: AsyncEngine, config: ServerConfig, names: tuple[str, ...], defaults: dict):
        engine = serving.engine
        most = min(engine.model.config.max_position_embeddings, engine.cache.num_pages * engine.cache.block_length)
        if config.max_model_len is not None and config.max_model_len > most:
            raise ValueError(
                f"max_model_len={config.max_model_len}: expected at most {most}, what model and cache have"
            )
        self.serving, self.config, self.names = serving, config, names
        self.texts = Texts(engine.tokenizer, config.template_timeout_s)
        self.metrics = Metrics(engine.cache.block_length)
        self.completions = Completions(
            serving, self.texts, config, names, config.max_model_len or most, defaults, self.metrics
        )
        self.bodies: set[asyncio.Task] = set()  # that somebody waits for
        self.created = int(time.time())
        self.app = self._app()

    async def warm_up(self):
        """One answer, so that the first client does not wait for what is made once, and what is broken shows now."""
        engine, serving = self.serving.engine, self.serving
        params = DecodeParams(**self.completions.defaults | {"gen_length": engine.cache.block_length})
        output = await serving.generate([0], params)
        if output.error is not None:
            raise RuntimeError(f"the model cannot answer: {output.error}")
        if engine.tokenizer.chat_template is not None:
            await self.texts.encode_chat([{"role": "user", "content": "Hello"}])
        self.metrics.begin(await serving.call(Engine.stats))

    async def drain(self, seconds: float):
        """No new requests; those that run have so many seconds to end by themselves, and are cancelled then."""
        self.completions.draining = True
        await asyncio.sleep(seconds)
        for body in list(self.bodies):
            body.cancel()
        while self.completions.running:
            await self.completions.cancel_all()
            await asyncio.sleep(0.05)  # for them to be told, and for those that the engine is yet to take

    def _app(self):
        @asynccontextmanager
        async def lifespan(app):
            yield
            await self.serving.aclose()
            self.texts.close()

        app = FastAPI(
            title="llada2-fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
            redirect_slashes=False,
        )  # fmt: skip
        app.add_middleware(
            Guard, config=self.config, metrics=self.metrics, is_draining=lambda: self.completions.draining,
            bodies=self.bodies,
        )  # fmt: skip
        if self.config.allowed_origins:  # outermost: a browser asks for leave without a key
            app.add_middleware(
                CORSMiddleware, allow_origins=self.config.allowed_origins, allow_methods=["*"], allow_headers=["*"]
            )
        self._tell_errors(app)
        self._add_completions(app)
        self._add_models(app)
        self._add_operations(app)
        _describe(app, bool(self.config.api_key))
        return app

    def _add_completions(self, app):
        refusals = _refusals(*REFUSALS)

        def route(path, answer):
            described = {200: {"model": answer, "description": "the answer, or its stream"} | STREAM}
            return app.post(path, responses=described | refusals, response_class=JSONResponse)

        @route("/v1/chat/completions", answers.ChatCompletion)
        async def chat_completions(body: ChatRequest, request: Request):
            return await self.completions.answer(body, request)

        @route("/v1/completions", answers.Completion)
        async def completions(body: CompletionRequest, request: Request):
            return await self.completions.answer(body, request)

        @app.post("/v1/requests/{request_id}/cancel", responses=refusals)
        async def cancel(request_id: str) -> answers.Cancelled:
            """End a request as it stands; its stream ends as it would by itself, with finish_reason "abort"."""
            return {"id": request_id, "cancelled": await self.completions.cancel(request_id)}

        @app.post("/tokenize", responses=refusals)
        async def tokenize(body: TokenizeRequest) -> answers.Tokens:
            self.completions.check_model(body.model)
            if (body.prompt is None) == (body.messages is None):
                raise ApiError(400, "prompt: expected either prompt or messages", "prompt", "invalid_value")
            if body.prompt is not None:
                (ids,) = await self.texts.encode([body.prompt])
            else:
                ids = await self.texts.encode_chat(chat_of(body.messages, self.config))
            return {"count": len(ids), "max_model_len": self.completions.max_model_len, "tokens": ids}

        @app.post("/detokenize", responses=refusals)
        async def detokenize(body: DetokenizeRequest) -> answers.Prompt:
            self.completions.check_model(body.model)
            known = self.serving.engine.model.config.vocab_size
            if any(token >= known for token in body.tokens):
                raise ApiError(400, f"tokens: expected ids in 0..{known - 1}", "tokens", "invalid_value")
            return {"prompt": await self.texts.decode(body.tokens)}

    def _add_models(self, app):
        def told(name):
            length = self.completions.max_model_len
            head = {"id": name, "object": "model", "created": self.created, "owned_by": "llada2_fast"}
            return head | {"max_model_len": length}

        @app.get("/v1/models", responses=_refusals(401))
        async def models() -> answers.ModelList:
            return {"object": "list", "data": [told(name) for name in self.names]}

        @app.get("/v1/models/{name:path}", responses=_refusals(401, 404))
        async def model(name: str) -> answers.Model:
            return told(self.completions.check_model(name))

    def _add_operations(self, app):
        @app.head("/health", include_in_schema=False)
        @app.get("/health", responses=_refusals(503))
        async def health() -> answers.Status:
            """The process lives, and its engine."""
            if not self.serving.is_alive:
                raise ended()
            return {"status": "ok"}

        @app.head("/ready", include_in_schema=False)
        @app.get("/ready", responses=_refusals(401, 503))
        async def ready() -> answers.Status:
            """New requests are taken."""
            if self.completions.draining:
                raise shutting_down()
            return await health()

        @app.get("/version", responses=_refusals(401))
        async def version() -> answers.Version:
            return {"version": __version__}

        @app.get("/metrics", responses=_refusals(401, 503), response_class=PlainTextResponse)
        async def metrics():
            """In Prometheus' text format."""
            self.completions.observe()
            try:
                stats = await asyncio.wait_for(self.serving.call(Engine.stats), STATS_S)
            except asyncio.TimeoutError:
                raise ApiError(503, "the engine's step takes long", code="busy") from None
            return PlainTextResponse(self.metrics.text(stats), headers={"Content-Type": CONTENT_TYPE_LATEST})

        @app.get("/", include_in_schema=False)
        async def root():
            return RedirectResponse("/playground")

        live = page()

        @app.get("/playground", include_in_schema=False)
        async def playground():
            """A page on which a person types a prompt and watches the blocks resolve."""
            return HTMLResponse(live, headers={"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff"})

    def _tell_errors(self, app):
        """Everything that goes wrong is told in OpenAI's envelope."""

        @app.exception_handler(ApiError)
        async def of_ours(request, error):
            return error.response()

        @app.exception_handler(RequestValidationError)
        async def of_pydantic(request, error):
            return invalid(error.errors()).response()

        @app.exception_handler(HTTPException)
        async def of_starlette(request, error):
            message, code = {
                400: ("the body is not valid JSON", "invalid_json"), 404: ("there is no such route", "not_found"),
                405: ("the route has no such method", "method_not_allowed"),
            }.get(error.status_code, ("the request cannot be served", "invalid_request"))  # fmt: skip
            return ApiError(error.status_code, message, code=code, headers=error.headers).response()

        @app.exception_handler(RuntimeError)
        async def of_the_engine(request, error):
            if self.serving.is_alive:
                raise error
            return ended().response()

        @app.exception_handler(Exception)
        async def of_nobody(request, error):  # starlette raises it again for the log
            return ApiError(500, "the server has failed; its log says why", code="internal_error").response()


def _refusals(*statuses):
    """What a route's document says of them."""
    return {status: {"model": answers.Error, "description": REFUSALS[status]} for status in statuses}


def _describe(app, asks_for_key):
    """The document without FastAPI's own 422, which nobody gets, and with the keys."""

    def document():
        if app.openapi_schema is None:
            made = FastAPI.openapi(app)
            for path, methods in made["paths"].items():
                for method in methods.values():
                    method["responses"].pop("422", None)
                    if asks_for_key and path not in OPEN:
                        method["security"] = [{"key": []}]
            if asks_for_key:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document
