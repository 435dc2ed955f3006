"""What a client may send: OpenAI's fields, vLLM's names for what both have, and the model's own decoding."""

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from ..config import MAX_LISTED, MAX_SAMPLES, MAX_TOP_LOGPROBS, PRESETS, DecodeParams, RequestOptions

INT32, INT64 = 2**31 - 1, 2**63 - 1
Count = Annotated[int, Field(ge=1, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]


class _FirstError(FailFast):
    __hash__ = object.__hash__  # which unions ask for


Item = TypeVar("Item")
Ids = Annotated[list[TokenId], _FirstError()]  # a long list that is wrong all through: one error will do
Several = Annotated[list[Item], _FirstError(), Field(max_length=MAX_LISTED)]
Gapped = Annotated[list[TokenId | None], _FirstError()]
Json = dict[str, Any]


def _characters(text: str) -> str:
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
        raise PydanticCustomError("surrogate", "text with half a surrogate pair is no text")
    return text


Text = Annotated[str, AfterValidator(_characters)]

DECODING = (  # DecodeParams' fields that a request may give by their own names
    "block_length", "steps", "temperature", "top_p", "sampling_method", "threshold", "editing_threshold",
    "max_post_steps", "edit_window", "minimal_topk", "num_to_transfer", "attend_tail", "profile",
    "policy", "entropy_bound", "entropy_decay",
)  # fmt: skip
# Fields of OpenAI's that this server has not, and values that ask for nothing; null always does.
NOTHING_ASKED = {
    "audio": (), "best_of": (1,), "chat_template": (), "chat_template_kwargs": ({},), "echo": (False,),
    "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "guided_decoding_backend": (),
    "guided_grammar": (), "guided_whitespace_pattern": (), "logit_bias": ({},), "metadata": ({},), "min_p": (0,),
    "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (), "presence_penalty": (0,),
    "priority": (0,), "reasoning_effort": (), "repetition_penalty": (1,), "service_tier": ("auto", "default"),
    "store": (False,), "suffix": ("",), "tool_choice": ("none", "auto", {"type": "none"}), "tools": ([],),
    "verbosity": (), "web_search_options": (),
}  # fmt: skip


# The same of vLLM's structured_outputs. Objects have the properties that are listed alone, asked for or not.
NOTHING_OUTPUT = {
    "grammar": (), "json_object": (False,), "structural_tag": (), "disable_any_whitespace": (False,),
    "whitespace_pattern": (), "disable_fallback": (True, False), "disable_additional_properties": (True, False),
}  # fmt: skip
# The same of a message's: answers are sent back as they came.
NOTHING_TOLD = {name: ([],) for name in ("annotations", "audio", "function_call", "name", "refusal", "tool_calls")}


class Strict(BaseModel):
    """nothing: fields that it does not have, and values of them that it takes all the same, null always. Others are
    refused at the first one: pydantic would tell all of them."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False)
    nothing: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any):
        if not isinstance(data, dict):
            return data
        kept = dict(data)
        for name in data.keys() - {field.alias or name for name, field in cls.model_fields.items()}:
            if name not in cls.nothing:
                raise PydanticCustomError("unknown", "Unrecognized request argument", {"name": name})
            value = kept.pop(name)
            if value is not None and value not in cls.nothing[name]:
                raise PydanticCustomError("unsupported", "{name} is not supported by this server", {"name": name})
        return kept


def _described(owner, *names):
    """Fields of a dataclass of ours as fields of a request, none of them set; its checks are those of the dataclass."""
    return {
        one.name: (one.type | None, Field(None, description=one.metadata["help"]))
        for one in fields(owner)
        if one.name in names
    }


Decoding = create_model(
    "Decoding",
    __base__=Strict,
    **_described(DecodeParams, *DECODING),
)
Options = create_model(
    "Options", __base__=Strict,
    **_described(RequestOptions, "min_tokens", "skip_special_tokens", "cache_salt", "deadline_s"),
)  # fmt: skip


class StreamOptions(Strict):
    nothing = {"include_obfuscation": (False,)}
    include_usage: bool | None = None


class NamedSchema(Strict):
    name: Text | None = Field(None, description="taken, and of no effect")
    description: Text | None = Field(None, description="taken, and of no effect")
    json_schema: Json = Field(alias="schema", description="a JSON schema that the answer is valid by")
    strict: bool | None = Field(None, description="taken, and of no effect: answers are valid always")


class ResponseFormat(Strict):
    """OpenAI's."""

    type: Literal["text", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_any_json(cls, data: Any):
        if isinstance(data, dict) and data.get("type") == "json_object":
            raise PydanticCustomError(
                "unsupported",
                "{name} of type json_object is not supported by this server: any JSON is no regular language, give a "
                "json_schema",
                {"name": "response_format"},
            )
        return data

    @model_validator(mode="after")
    def _check_type(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("value", "expected json_schema with type json_schema, and with it alone")
        return self


class StructuredOutputs(Strict):
    """vLLM's."""

    nothing = NOTHING_OUTPUT
    json_schema: Json | Text | None = Field(
        None, alias="json", description="a JSON schema that the answer is valid by, or its text"
    )
    regex: Text | None = Field(None, description="a regular expression that the whole answer matches")
    choice: Several[Text] | None = Field(None, description="texts of which the answer is one")


class Generation(Decoding, Options):
    """What both kinds of completions take."""

    nothing = NOTHING_ASKED
    model: str | None = Field(None, description="one of the names of /v1/models")
    max_tokens: Count | None = Field(None, description="most tokens to generate")
    top_k: int | None = Field(None, ge=-1, le=INT32, description="draw among the k likeliest tokens; off = -1 or 0")
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64, description="of the draws; drawn itself unless given")
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="answers to each prompt; 1 unless given")
    stop: Text | Several[Text] | None = Field(None, description="strings that end the text, not part of it")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=128, description="ids that end the tokens, part of them"
    )
    include_stop_str_in_output: bool | None = Field(None, description="a stop string is part of the text it ends")
    ignore_eos: bool | None = Field(None, description="no token is an end")
    response_format: ResponseFormat | None = Field(None, description="a JSON schema that the answer is valid by")
    structured_outputs: StructuredOutputs | None = Field(None, description="what the answer has to be, one of three")
    guided_json: Json | Text | None = Field(None, description="structured_outputs.json by an older name")
    guided_regex: Text | None = Field(None, description="structured_outputs.regex by an older name")
    guided_choice: Several[Text] | None = Field(None, description="structured_outputs.choice by an older name")
    canvas: Text | Gapped | None = Field(
        None,
        description="what is given of the answer, which is as long: a text with {gap:n} for n tokens, or ids and null",
    )
    mode: Literal[tuple(PRESETS)] | None = Field(None, description="a preset of the fields that are not given")
    stream: bool | None = Field(None, description="send blocks as they are committed, as server-sent events")
    stream_options: StreamOptions | None = None
    draft: bool | None = Field(None, description="of a stream: also the open block as it stands")
    trace: bool | None = Field(None, description="tell every commit and edit at the end")
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.:-]{1,64}$", description="a name to cancel it by; made up unless given"
    )
    user: str | None = Field(None, description="taken, and of no effect")
    safety_identifier: str | None = Field(None, description="taken, and of no effect")
    prompt_cache_key: str | None = Field(None, description="taken, and of no effect: prefixes are shared by content")


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    nothing = NOTHING_TOLD
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Several[TextPart]

    def as_template_takes_it(self) -> dict:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    messages: Several[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = Field(None, description="most tokens to generate, as max_tokens")
    logprobs: bool | None = Field(None, description="tell each token's log-probability when it was written")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens told beside each")


class CompletionRequest(Generation):
    prompt: Text | Several[Text] | Ids | Several[Ids] = Field(description="text or ids, one or several")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="tell each token's log-probability, and so many likeliest tokens"
    )


class TokenizeRequest(Strict):
    """Either a prompt, or messages."""

    model: str | None = None
    prompt: Text | None = None
    messages: Several[Message] | None = Field(None, min_length=1)


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Ids
