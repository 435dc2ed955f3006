"""What the server answers, for its OpenAPI document alone: the answers themselves are made as dicts."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    """denoise_forwards, tokens_per_forward: of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    denoise_forwards: int
    tokens_per_forward: float


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """stop_reason: the stop string or id that ended it, or "deadline". trace: its trace document, where asked for."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | int | None
    trace: dict[str, Any] | None = None


class ChatChoice(Choice):
    message: AssistantMessage


class TextChoice(Choice):
    text: str


class _Completion(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(_Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(_Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str


class Cancelled(BaseModel):
    id: str
    cancelled: bool


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Prompt(BaseModel):
    prompt: str
