"""A request's body -> what the engine is asked for."""

from dataclasses import dataclass, replace

from ..config import PRESETS, PROFILES, DecodeParams, RequestOptions, longest, parse_json
from ..engine.intake import sample
from ..structured import parse_canvas
from ..viewer import ALTERNATIVES
from .errors import ApiError, refused
from .guard import is_deeper
from .schema import DECODING, ChatRequest, CompletionRequest, Generation, Message

_POLICY = "policy", "entropy_bound", "entropy_decay"  # that, and its two numbers
COMPLETION_TOKENS = 16  # of /v1/completions where nothing is asked for, as everywhere


@dataclass(frozen=True)
class Job:
    """What a body asks for, but for its prompts.

    params: of the decoding; gen_length is a default where max_tokens is None.
    options: of the engine's requests.
    max_tokens: as asked for, or those of the canvas.
    n: answers to each prompt.
    names: by the field of DecodeParams that says what an answer has to be, the body's that did.
    """

    params: DecodeParams
    options: RequestOptions
    max_tokens: int | None
    n: int
    names: dict[str, str]

    @classmethod
    def of(cls, body: Generation, config, defaults: dict, edits: bool = False) -> "Job":
        """config: ServerConfig; defaults: DecodeParams' fields for requests that do not say; edits: the model deletes
        and inserts where it edits (LLaDA2.2). ApiError naming the field that cannot be honoured."""
        _check(body, config)
        given = {name: getattr(body, name) for name in (*DECODING, "seed") if getattr(body, name) is not None}
        if body.top_k is not None:
            given["top_k"] = max(0, body.top_k)
        if body.ignore_eos:
            given["eos_ids"] = ()
        language, names = _language(body, config)
        preset = PRESETS[body.mode] if body.mode else {}
        asked = {**preset, **given, **language}
        defaults = _with_a_place(defaults, asked, bool(language), body.canvas is not None, edits)
        chat = isinstance(body, ChatRequest)
        max_tokens = body.max_tokens
        if chat and body.max_completion_tokens is not None:
            if max_tokens not in (None, body.max_completion_tokens):
                raise _invalid("max_tokens", "expected the same as max_completion_tokens, or neither")
            max_tokens = body.max_completion_tokens
        if max_tokens is not None and body.canvas is not None:
            name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
            raise _invalid(name, "expected none with a canvas, which says how long the answer is")
        if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
            raise _invalid("min_tokens", "expected at most max_tokens")
        usual = config.default_max_tokens if chat else COMPLETION_TOKENS
        longest = config.request_timeout_s
        deadline_s = longest if body.deadline_s is None else min(body.deadline_s, longest)
        try:
            params = DecodeParams(**{**defaults, **asked, "gen_length": max_tokens or usual})
            options = RequestOptions(
                stop=body.stop, stop_token_ids=body.stop_token_ids, include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False, min_tokens=body.min_tokens,
                deadline_s=deadline_s, cache_salt=body.cache_salt, trace=bool(body.trace),
                top_logprobs=_top_logprobs(body), canvas=body.canvas,
            )  # fmt: skip
        except ValueError as error:
            raise refused(error, names) from error
        return cls(params, options, max_tokens, body.n or 1, names)

    async def read(self, texts) -> "Job":
        """With the canvas as ids. texts: Texts. ApiError for a text without gaps, or with too large ones."""
        canvas = self.options.canvas
        if canvas is None:
            return self
        if isinstance(canvas, str):
            try:
                canvas = await texts.run(len(canvas), parse_canvas, canvas, texts.tokenizer)
            except ValueError as error:
                raise refused(error) from error
        return replace(self, options=replace(self.options, canvas=tuple(canvas)), max_tokens=len(canvas))

    def fit(
        self, prompts: list[list[int]], max_model_len: int, field: str, cache
    ) -> list[tuple[list[int], DecodeParams]]:
        """(prompt, params) of each answer: n for each prompt. ApiError for a prompt that is empty or too long.

        field: of the body, where the prompts are.
        cache: PagedKVCache; where nobody says how long an answer may be, it leaves room there for windows and checks.
        """
        each, own = [], self.params
        held = min(max_model_len, longest(cache.num_pages, cache.block_length, own.edit_window, own.checks))
        for prompt in prompts:
            if not prompt:
                raise _invalid(field, "expected at least one token")
            room, asked = max_model_len - len(prompt), self.max_tokens or 1
            if asked > room:
                raise ApiError(
                    400,
                    f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                    f"{len(prompt) + asked} tokens ({len(prompt)} in the {field}, {asked} in the completion).",
                    field, "context_length_exceeded",
                )  # fmt: skip
            most = room if self.max_tokens else max(1, held - len(prompt))
            params = replace(own, gen_length=min(own.gen_length, most))
            each += [(prompt, sample(params, len(each) + i)) for i in range(self.n)]
        return each


def _with_a_place(defaults, asked, has_language, has_canvas, edits):
    """The usual settings without a window or a policy that has no place beside what a request asks for. What it asks
    for itself stays, to be refused by name. A threshold, a mode's too, is the threshold rule's."""
    wanted, usual = defaults | asked, defaults.get("policy")
    traits = PROFILES.get(wanted.get("profile", DecodeParams.profile))
    editing = wanted.get("editing_threshold") is not None
    draws = wanted.get("temperature", 0) > 0 and wanted.get("sampling_method") != "greedy"
    left_out = {
        ("edit_window",): has_language or has_canvas or not (traits and traits.windows),
        _POLICY: has_language or not (traits and traits.policies) or (editing and edits)
        or (usual == "self_speculative" and (has_canvas or draws or editing))
        or asked.get("policy", usual) != usual or ("threshold" in asked and asked.keys().isdisjoint(_POLICY)),
    }  # fmt: skip
    dropped = {name for names, drops in left_out.items() if drops for name in names}
    return {name: value for name, value in defaults.items() if name not in dropped}


def _language(body, config):
    """What an answer has to be as a field of DecodeParams, and that field's name in the body: dicts of one entry, or of
    none. ApiError for several."""
    form, outputs = body.response_format, body.structured_outputs
    asked = [
        one
        for one in (
            ("json_schema", "response_format", form and form.json_schema and form.json_schema.json_schema),
            ("json_schema", "structured_outputs", outputs and outputs.json_schema),
            ("regex", "structured_outputs", outputs and outputs.regex),
            ("choices", "structured_outputs", outputs and outputs.choice),
            ("json_schema", "guided_json", body.guided_json),
            ("regex", "guided_regex", body.guided_regex),
            ("choices", "guided_choice", body.guided_choice),
        )
        if one[2] is not None
    ]
    if len(asked) > 1:
        raise _invalid(asked[1][1], f"expected one thing that the answer has to be, and {asked[0][1]} says one")
    if not asked:
        return {}, {}
    ((field, name, value),) = asked
    if field == "json_schema" and isinstance(value, str):
        value = _parsed(name, value, config.max_depth)
    return {field: value}, {field: name}


def _parsed(name, text, max_depth):
    """A schema that came as text."""
    if is_deeper(text.encode(), max_depth):
        raise ApiError(400, f"{name}: expected nesting of at most {max_depth}", name, "too_deep")
    try:
        return parse_json(text.encode(), name)
    except ValueError:  # which quotes it
        raise _invalid(name, "expected a JSON schema, an object, or its text") from None


def _check(body, config):
    for wanted, name, why in (
        (body.stream_options is not None and not body.stream, "stream_options", "is for streams"),
        (body.draft and not body.stream, "draft", "is for streams"),
        (body.n is not None and body.n > config.max_samples, "n", f"expected at most {config.max_samples}"),
        (body.top_p is not None and body.top_p > 1, "top_p", "expected at most 1"),
    ):
        if wanted:
            raise _invalid(name, why)
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise _invalid("top_logprobs", "expected logprobs to be true, too")


def _invalid(name, why):
    return ApiError(400, f"{name}: {why}", name, "invalid_value")


def _top_logprobs(body):
    """How many likeliest tokens are told beside each one; those of a trace are for whoever looks at it."""
    asked = (body.logprobs if isinstance(body, CompletionRequest) else body.top_logprobs) or 0
    return max(asked, ALTERNATIVES) if body.trace else asked


def chat_of(messages: list[Message], config) -> list[dict]:
    """A chat as a template takes it. ApiError if it is too long."""
    if len(messages) > config.max_messages:
        raise _invalid("messages", f"expected at most {config.max_messages}")
    return [message.as_template_takes_it() for message in messages]


def prompts_of(body: CompletionRequest, config) -> list[str] | list[list[int]]:
    """The prompts of a completion: all texts, or all ids. ApiError if there are none, or too many."""
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= config.max_prompts:
        raise _invalid("prompt", f"expected 1..{config.max_prompts} prompts")
    return given
