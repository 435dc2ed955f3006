"""What no client sees coming: templates that do not end, clients that do not read, tokens that are no characters."""

import asyncio
import contextlib
import gc
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llada2_fast import Engine, EngineConfig, load_tokenizer
from llada2_fast.config import ServerConfig
from llada2_fast.demo import path
from llada2_fast.server.errors import ApiError, invalid, refused
from llada2_fast.server.guard import is_deeper
from llada2_fast.server.jobs import Job
from llada2_fast.server.schema import ChatRequest, CompletionRequest
from llada2_fast.server.stream import EventStream, event
from llada2_fast.server.text import Texts
from tests.engine.common import demo_model, tokenizer


def nested(value):
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(nested, inner), default=0)
    return 0


TREES = st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@given(TREES, st.integers(0, 5))
def test_nesting(tree, most):
    assert is_deeper(json.dumps(tree).encode(), most) == (nested(tree) > most)


@given(st.binary())
def test_nesting_of_what_is_no_json(data):
    is_deeper(data, 32)


@contextlib.contextmanager
def within(seconds):
    """The event loop would stand still for so long, in a process that has frozen what it began with."""
    gc.collect()
    gc.freeze()
    began = time.process_time()
    try:
        yield
    finally:
        gc.unfreeze()
    assert time.process_time() - began < seconds


@pytest.mark.parametrize(
    "body",
    [b'{"":[' * 170_000, b"[" + b'"[",' * 250_000 + b"0]", b"[" + b"[]," * 340_000 + b"0]", b'"' + b"[" * 1_000_000],
)
def test_nesting_takes_no_time(body):
    with within(0.5):
        is_deeper(body, 32)


LONG_BODIES = {
    "wrong ids": {"prompt": [1] * 300_000 + ["x"]},
    "numbers": {"prompt": [1.5] * 200_000},
    "wrong ids of several": {"prompt": [[1] * 100_000 + [None]]},
    "prompts": {"prompt": [[]] * 340_000},
    "one id each": {"prompt": [[1]] * 250_000},
    "texts": {"prompt": [""] * 340_000},
    "fields": {"prompt": "x"} | {f"a{i}": 1 for i in range(90_000)},
    "stops": {"prompt": "x", "stop": ["x"] * 250_000},
    "stop ids": {"prompt": "x", "stop_token_ids": [1] * 500_000},
    "messages": {"messages": [{"role": "user", "content": ""}] * 27_000},
    "wrong gaps": {"prompt": "x", "canvas": [None] * 150_000 + ["x"]},
    "choices": {"prompt": "x", "guided_choice": ["x"] * 250_000},
    "choices of vLLM's": {"prompt": "x", "structured_outputs": {"choice": ["x"] * 250_000}},
    "fields of a format": {"prompt": "x", "response_format": {f"a{i}": 1 for i in range(90_000)}},
    "wrong messages": {"messages": [{"role": "x"}] * 50_000},
    "fields of a message": {"messages": [{"role": "user", "content": ""} | {f"a{i}": 1 for i in range(90_000)}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 30_000}]},
}


@pytest.mark.parametrize("name", LONG_BODIES)
def test_what_is_too_long_is_told_at_once(name):
    body = LONG_BODIES[name]
    with within(0.3), pytest.raises(ValidationError) as errors:
        (ChatRequest if "messages" in body else CompletionRequest).model_validate(body)
    assert invalid(errors.value.errors()).status == 400


@pytest.mark.parametrize(
    "text, message, param",
    [
        ("gen_length=-1: expected an integer >= 1", "max_tokens: expected an integer >= 1", "max_tokens"),
        ("stop='a: b': expected strings", "stop: expected strings", "stop"),
        ("stop_token_ids[3]=9: expected ids in 0..8", "stop_token_ids: expected ids in 0..8", "stop_token_ids"),
        ("canvas: expected at least one gap", "canvas: expected at least one gap", "canvas"),
        ("/models/mine: no such file", "the request cannot be served as it is", None),
    ],
)
def test_values_are_not_told_again(text, message, param):
    error = refused(ValueError(text))
    assert (error.status, error.message, error.param) == (400, message, param)


def templated(template):
    tokenizer = load_tokenizer(path())
    tokenizer.chat_template = template
    return Texts(tokenizer, template_timeout_s=0.3)


@pytest.mark.parametrize("size", [10, 100_000])  # in the event loop's thread, and in one of its own
def test_a_template_that_does_not_end_is_ended(size):
    texts = templated("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    began = time.monotonic()
    with pytest.raises(ApiError, match="too long"):
        asyncio.run(texts.encode_chat([{"role": "user", "content": "x" * size}]))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].missing.other }}", "template says"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_refuses(template, told):
    with pytest.raises(ApiError, match=told) as error:
        asyncio.run(templated(template).encode_chat([{"role": "user", "content": "x"}]))
    assert (error.value.status, error.value.param) == (400, "messages")


def test_templates_reach_nothing_of_python():
    with pytest.raises(ApiError):
        asyncio.run(templated("{{ messages.__class__.__mro__ }}{{ ''.__class__.x() }}").encode_chat([]))


class Vocabulary:
    """Tokens as byte-level and byte-fallback tokenizers have them."""

    raw = ("Ġthe", "Ã", "©", "<0xE2>", "plain")

    def decode(self, ids):
        (token,) = ids
        return " the" if token == 0 else "plain" if token == 4 else "\ufffd"

    def convert_ids_to_tokens(self, token):
        return self.raw[token]


def test_bytes_of_tokens_that_are_no_characters():
    texts = Texts(Vocabulary(), 1.0)
    assert [texts.token(i)[1] for i in range(5)] == [list(b" the"), [0xC3], [0xA9], [0xE2], list(b"plain")]
    assert bytes(texts.token(1)[1] + texts.token(2)[1]).decode() == "é"


def test_a_client_that_goes_ends_its_stream():
    ended = []

    async def events():
        try:
            yield event({"x": 1})
            await asyncio.sleep(60)
        finally:
            ended.append("events")

    async def main():
        async def send(message):
            pass

        async def receive():
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        await EventStream(events(), lambda: ended.append("end"))({"type": "http"}, receive, send)

    asyncio.run(main())
    assert ended == ["events", "end"]


@pytest.mark.parametrize(
    "asked, window",
    [
        ({}, 1), ({"edit_window": 2}, 2), ({"profile": "sglang-joint"}, 1), ({"profile": "hf-2.1"}, 0),
        ({"guided_regex": "[0-9]+"}, 0), ({"canvas": [None] * 4}, 0),
    ],
)  # fmt: skip
def test_a_window_that_is_only_usual_gives_way(asked, window):
    """`serve --edit-window 1`: requests for which there is none have none."""
    body = ChatRequest(messages=[{"role": "user", "content": "Hi"}], **asked)
    job = Job.of(body, ServerConfig(), {"editing_threshold": 0.5, "edit_window": 1})
    assert job.params.edit_window == window


SPECULATING = {"policy": "self_speculative", "entropy_bound": 2.0}
BY_ENTROPY = {"policy": "entropy", "entropy_bound": 2.0, "entropy_decay": 0.5}


@pytest.mark.parametrize(
    "usual, asked, policy",
    [
        (BY_ENTROPY, {}, ("entropy", 2.0, 0.5)),
        (BY_ENTROPY, {"entropy_bound": 1}, ("entropy", 1.0, 0.5)),
        (BY_ENTROPY, {"policy": "entropy", "entropy_decay": 1.0}, ("entropy", 2.0, 1.0)),
        (BY_ENTROPY, {"policy": "threshold"}, ("threshold", None, 1.0)),
        (BY_ENTROPY, {"policy": "self_speculative"}, ("self_speculative", None, 1.0)),
        (BY_ENTROPY, {"temperature": 0.7, "editing_threshold": 0.5}, ("entropy", 2.0, 0.5)),
        (BY_ENTROPY, {"canvas": [None] * 4}, ("entropy", 2.0, 0.5)),
        (BY_ENTROPY, {"guided_regex": "[0-9]+"}, ("threshold", None, 1.0)),
        (BY_ENTROPY, {"profile": "hf-2.1"}, ("threshold", None, 1.0)),
        (BY_ENTROPY, {"threshold": 0.7}, ("threshold", None, 1.0)),
        (BY_ENTROPY, {"threshold": 0.7, "policy": "entropy"}, ("entropy", 2.0, 0.5)),
        (BY_ENTROPY, {"threshold": 0.7, "entropy_bound": 1.0}, ("entropy", 1.0, 0.5)),
        (BY_ENTROPY, {"mode": "speed"}, ("threshold", None, 1.0)),
        (BY_ENTROPY, {"mode": "speed", "policy": "entropy"}, ("entropy", 2.0, 0.5)),
        (SPECULATING, {}, ("self_speculative", 2.0, 1.0)),
        (SPECULATING, {"temperature": 0.7}, ("threshold", None, 1.0)),
        (SPECULATING, {"temperature": 0.7, "sampling_method": "greedy"}, ("self_speculative", 2.0, 1.0)),
        (SPECULATING, {"editing_threshold": 0.5}, ("threshold", None, 1.0)),
        (SPECULATING, {"mode": "quality"}, ("threshold", None, 1.0)),
        (SPECULATING, {"canvas": [None] * 4}, ("threshold", None, 1.0)),
        (SPECULATING, {"policy": "entropy"}, ("entropy", None, 1.0)),
        ({"temperature": 0.7}, {"policy": "self_speculative", "temperature": 0}, ("self_speculative", None, 1.0)),
    ],
)
def test_a_policy_that_is_only_usual_gives_way(usual, asked, policy):
    """`serve --policy entropy`: a request may say otherwise, also by what the policy has no place beside."""
    params = job_of(asked, usual).params
    assert (params.policy, params.entropy_bound, params.entropy_decay) == policy


def test_a_usual_policy_gives_way_where_a_model_deletes_and_inserts():
    assert job_of({"editing_threshold": 0.5}, BY_ENTROPY, True).params.policy == "threshold"
    assert job_of({}, BY_ENTROPY, True).params.policy == "entropy"


@pytest.mark.parametrize(
    "usual, asked, name",
    [
        ({}, {"policy": "greedy"}, "policy"),
        ({}, {"entropy_bound": 0.5}, "entropy_bound"),
        ({}, {"entropy_decay": 0.5}, "entropy_decay"),
        ({}, {"policy": "entropy", "entropy_bound": -1.0}, "entropy_bound"),
        ({}, {"policy": "entropy", "guided_regex": "[0-9]+"}, "policy"),
        (BY_ENTROPY, {"policy": "threshold", "entropy_bound": 0.5}, "entropy_bound"),
        (BY_ENTROPY, {"guided_regex": "[0-9]+", "entropy_bound": 0.5}, "entropy_bound"),
        (BY_ENTROPY, {"profile": "hf-2.1", "policy": "entropy"}, "policy"),
        (BY_ENTROPY, {"profile": "hf-3"}, "profile"),
        (SPECULATING, {"temperature": 0.7, "policy": "self_speculative"}, "policy"),
        (SPECULATING, {"mode": "quality", "policy": "self_speculative"}, "policy"),
        (SPECULATING, {"editing_threshold": 0.5, "entropy_decay": 0.5}, "entropy_decay"),
        ({"editing_threshold": 0.5}, {"policy": "self_speculative"}, "policy"),
    ],
)
def test_what_a_request_says_of_policies_itself_is_refused_by_name(usual, asked, name):
    with pytest.raises(ApiError) as refused:
        job_of(asked, usual)
    assert (refused.value.status, refused.value.param) == (400, name)
    assert refused.value.message.startswith(f"{name}: expected ")


def test_an_answer_of_the_usual_length_leaves_room_for_windows():
    engine = Engine(demo_model(), EngineConfig(cache_tokens=256), tokenizer())
    for size, pages in ((3, 16), (100, 16), (200, 16)):
        ((prompt, params),) = job_of({}, {"editing_threshold": 0.5, "edit_window": 1}).fit(
            [[1] * size], 256, "messages", engine.cache
        )
        assert engine.add_request(prompt, params).sequence.num_pages == pages


@pytest.mark.parametrize("usual", [{}, SPECULATING, BY_ENTROPY])
def test_an_answer_of_the_usual_length_leaves_room_for_checks(usual):
    """In a small cache; one that is too long for it by what the request says is refused by name."""
    engine = Engine(demo_model(), EngineConfig(cache_tokens=256), tokenizer())
    for size in (3, 16, 100, 200):
        (((prompt, params),), ((_, asked),)) = (
            job_of(length, usual).fit([[1] * size], 256, "messages", engine.cache)
            for length in ({}, {"max_tokens": 256 - size})
        )
        request = engine.add_request(prompt, params)
        assert request.sequence.num_pages == engine.cache.num_pages
        engine.cancel(request.request_id)
        assert asked.gen_length == 256 - size == params.gen_length + (32 if usual is SPECULATING else 0)
        if usual is SPECULATING:
            with pytest.raises(
                ValueError, match=f"^gen_length={256 - size}: .* and policy='self_speculative' 18 pages"
            ):
                engine.add_request(prompt, asked)


def job_of(asked, usual, edits=False):
    body = ChatRequest(messages=[{"role": "user", "content": "Hi"}], **asked)
    return Job.of(body, ServerConfig(), usual, edits)
