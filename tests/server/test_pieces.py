"""What no client sees coming: templates that do not end, clients that do not read, tokens that are no characters."""

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llada2_fast import load_tokenizer
from llada2_fast.demo import path
from llada2_fast.server.errors import ApiError, invalid, refused
from llada2_fast.server.guard import depth
from llada2_fast.server.schema import CompletionRequest
from llada2_fast.server.stream import EventStream, event
from llada2_fast.server.text import Texts


def nested(value):
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(nested, inner), default=0)
    return 0


TREES = st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@given(TREES, st.booleans())
def test_nesting_is_known_before_anything_is_parsed(tree, ascii_only):
    assert depth(json.dumps(tree, ensure_ascii=ascii_only).encode()) == nested(tree)


@given(st.binary())
def test_nesting_of_what_is_no_json(data):
    assert depth(data) >= 0


def test_nesting_takes_no_time():
    began = time.perf_counter()
    assert depth(b'{"":[' * 200_000) == 400_000 and depth(b'["[[[",' * 150_000) == 150_000
    assert depth(b'"' + b"[" * 1_000_000) == 0
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("prompt", [[1] * 300_000 + ["x"], [1.5] * 200_000, [[1] * 100_000 + [None]]])
def test_a_long_list_that_is_wrong_takes_no_time(prompt):
    began = time.perf_counter()
    with pytest.raises(ValidationError) as errors:
        CompletionRequest.model_validate({"prompt": prompt})
    assert invalid(errors.value.errors()).param.startswith("prompt[0]")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "text, message, param",
    [
        ("gen_length=-1: expected an integer >= 1", "max_tokens: expected an integer >= 1", "max_tokens"),
        ("stop='a: b': expected strings", "stop: expected strings", "stop"),
        ("stop_token_ids[3]=9: expected ids in 0..8", "stop_token_ids: expected ids in 0..8", "stop_token_ids"),
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


async def stream_to(send, gone, events, timeout_s):
    """(whether it was cut off, whether it was ended) of an EventStream. gone: an Event, set when the client has gone."""
    cut, ended = [], []

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    def abort():  # as of a connection: who waits for it learns that it is lost
        cut.append(True)
        gone.set()

    scope = {"type": "http", "state": {"abort": abort}}
    await EventStream(events, lambda: ended.append(True), timeout_s)(scope, receive, send)
    return bool(cut), bool(ended)


def test_a_client_that_does_not_read_is_cut_off():
    closed = []

    async def events():
        try:
            while True:
                yield event({"x": 1})
        finally:
            closed.append(True)

    async def main():
        async def stuck(message):
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        return await stream_to(stuck, asyncio.Event(), events(), 0.2)

    assert asyncio.run(main()) == (True, True) and closed == [True]


def test_a_client_that_goes_ends_its_stream():
    async def events():
        yield event({"x": 1})
        await asyncio.sleep(60)

    async def main():
        async def send(message):
            pass

        gone = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, gone.set)
        return await stream_to(send, gone, events(), 5.0)

    assert asyncio.run(main()) == (False, True)
