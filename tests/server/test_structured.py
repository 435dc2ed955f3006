"""Answers of a given form over HTTP: schemas, regular expressions, choices and canvases."""

import asyncio
import json
import re
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from benchmarks.chaos import wire
from llada2_fast import DecodeParams, Engine, EngineConfig
from llada2_fast.server.errors import missing
from tests.engine.common import chat as prompt
from tests.engine.common import demo_model, tokenizer
from tests.server.common import LONG, MODEL, QUESTIONS, chat, client_of, flawless_server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "done": {"type": "boolean"}},
    "required": ["name", "count", "done"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
DIGITS = "[0-9]{4}"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
SLOWLY = {"threshold": 2.0, "steps": 16}
SLOW = "[ab]*a[ab]{18}"  # takes seconds until it is refused


@pytest.fixture(scope="module")
def server():
    with flawless_server("--max-num-seqs", 4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def ask(client, **rest):
    given = {"model": MODEL, "messages": chat(QUESTIONS[0]), "max_tokens": 64} | rest
    return client.chat.completions.create(**given)


def texts(answer):
    return [choice.message.content for choice in answer.choices]


def engines(*, n=1, canvas=None, **decoding):
    """The texts that an engine gives without any server."""
    params = DecodeParams(**{"gen_length": 64, "eos_early_stop": True} | decoding)
    engine = Engine(demo_model(), EngineConfig(cache_tokens=8192), tokenizer())
    return [one.text for one in engine.generate([prompt(QUESTIONS[0])], params, n=n, canvas=canvas)]


def is_thing(text):
    found = json.loads(text)
    kinds = {name: type(value) for name, value in found.items()}
    return kinds == {"name": str, "count": int, "done": bool}


def test_a_schema_is_an_engines(client):
    decoding = {"temperature": 2.0, "seed": 3}
    want = engines(n=2, json_schema=SCHEMA, threshold=0.3, **decoding)
    assert all(map(is_thing, want)) and want[0] != want[1]
    got = ask(client, n=2, response_format=FORMAT, extra_body={"threshold": 0.3}, **decoding)
    assert texts(got) == want
    stream = ask(client, n=2, response_format=FORMAT, stream=True, extra_body={"threshold": 0.3}, **decoding)
    pieces = ["", ""]
    for chunk in stream:
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == want


@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_fallback": True, "grammar": None}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": None}}},
    ],
)
def test_other_names_of_a_schema(client, extra):
    assert texts(ask(client, extra_body=extra)) == engines(json_schema=SCHEMA)


@pytest.mark.parametrize("name", ["structured_outputs", "guided"])
def test_regular_expressions_and_choices(client, name):
    for kind, field, value, pattern in (
        ("regex", "regex", DIGITS, DIGITS),
        ("choice", "choices", ["moon", "crow."], r"moon|crow\."),
    ):
        extra = {name: {kind: value}} if name == "structured_outputs" else {f"{name}_{kind}": value}
        (text,) = texts(ask(client, extra_body=extra))
        assert [text] == engines(**{field: value}) and re.fullmatch(pattern, text)
        given = {"model": MODEL, "prompt": prompt(QUESTIONS[0]), "extra_body": extra}
        assert client.completions.create(**given).choices[0].text == text


def test_a_pydantic_model_is_parsed(client):
    class Thing(BaseModel):
        kind: Literal["moon", "crow"]
        done: bool

    got = client.chat.completions.parse(model=MODEL, messages=chat("x"), max_tokens=64, response_format=Thing)
    assert isinstance(got.choices[0].message.parsed, Thing) and got.choices[0].finish_reason == "stop"


def test_the_documents_example(server, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", OPERATIONS.read_text("utf-8"), re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), OPERATIONS.name, "exec"), {})
    form, parsed, choice = capsys.readouterr().out.splitlines()
    assert set(json.loads(form)) == {"sum"} and parsed.startswith("sure=") and choice in ("yes", "no")


def test_an_answer_that_its_budget_ends_is_valid(client):
    got = ask(client, response_format=FORMAT, max_tokens=24, extra_body={"threshold": 2.0})
    assert is_thing(texts(got)[0]) and got.usage.completion_tokens <= 24


def test_a_canvas(client):
    canvas, ids = "The sum is {gap:6}.", tokenizer()("The sum is", add_special_tokens=False)["input_ids"]
    (text,) = texts(ask(client, max_tokens=None, extra_body={"canvas": canvas}))
    assert [text] == engines(canvas=canvas) and text.startswith("The sum is") and text.endswith(".")
    given = {"model": MODEL, "prompt": prompt(QUESTIONS[0]), "extra_body": {"canvas": [*ids, *[None] * 6]}}
    got = client.completions.create(**given, n=2)
    assert [choice.text for choice in got.choices] == 2 * engines(canvas=[*ids, *[None] * 6])
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**given, stream=True)) in texts_of(got)
    digits = {"canvas": "{gap:5} and {gap:8}", "guided_regex": DIGITS, "trace": True}
    assert re.fullmatch(f"{DIGITS} and {DIGITS}", texts(ask(client, max_tokens=None, extra_body=digits))[0])


def texts_of(answer):
    return [choice.text for choice in answer.choices]


@pytest.mark.parametrize(
    "given, param, told",
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "expected json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None, "json_schema.schema"),
        ({"response_format": FORMAT | {"type": "text"}}, "response_format", "expected json_schema"),
        ({"response_format": FORMAT, "max_tokens": 5}, "max_tokens", "expected at least"),
        ({"response_format": FORMAT, "extra_body": {"guided_regex": "a"}}, "guided_regex", "response_format"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs", "one thing"),
        ({"extra_body": {"structured_outputs": {"regex": "a("}}}, "structured_outputs", "NFA"),
        ({"extra_body": {"structured_outputs": {"grammar": "root ::= 1"}}}, "grammar", "not supported"),
        ({"extra_body": {"structured_outputs": {"json_object": True}}}, "json_object", "not supported"),
        ({"extra_body": {"structured_outputs": {"structural_tag": "x"}}}, "structural_tag", "not supported"),
        ({"extra_body": {"structured_outputs": {"xml": "x"}}}, "xml", "Unrecognized"),
        ({"extra_body": {"structured_outputs": {"json": "{"}}}, "structured_outputs", "expected a JSON schema"),
        ({"extra_body": {"structured_outputs": {"json": {"type": "foo"}}}}, "structured_outputs", "foo"),
        ({"extra_body": {"guided_json": '{"a":' * 40 + "1" + "}" * 40}}, "guided_json", "nesting"),
        ({"extra_body": {"guided_regex": "x" * 70_000}}, "guided_regex", "65536"),
        ({"extra_body": {"guided_regex": "[ab]*a[ab]{14}"}}, "guided_regex", "states"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice", "texts"),
        ({"extra_body": {"guided_choice": ["a"], "ignore_eos": True}}, "guided_choice", "EOS"),
        ({"extra_body": {"guided_choice": ["a"], "min_tokens": 2}}, "min_tokens", "expected 0"),
        ({"extra_body": {"guided_choice": ["a"], "profile": "hf-2.0"}}, "guided_choice", "masks"),
        ({"extra_body": {"guided_grammar": "root ::= 1"}}, "guided_grammar", "not supported"),
        ({"extra_body": {"canvas": "{gap:4}"}}, "max_tokens", "canvas"),
        ({"max_tokens": None, "max_completion_tokens": 4, "extra_body": {"canvas": "{gap:4}"}}, None, "canvas"),
        ({"max_tokens": None, "extra_body": {"canvas": "no gap"}}, "canvas", "at least one gap"),
        ({"max_tokens": None, "extra_body": {"canvas": "{gap:1000000}" * 2000}}, "canvas", "tokens in all"),
        ({"max_tokens": None, "extra_body": {"canvas": [461, None]}}, "canvas", "0..460"),
        ({"max_tokens": None, "extra_body": {"canvas": "{gap:5000}"}}, "messages", "5000 in the completion"),
        (
            {"max_tokens": None, "extra_body": {"canvas": "{gap:4} {gap:2}", "guided_regex": DIGITS}},
            "canvas",
            "in each gap at least",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(client, given, param, told):
    with pytest.raises(openai.BadRequestError, match=re.escape(told)) as refused:
        ask(client, **given)
    assert param in (None, refused.value.param)
    assert len(refused.value.body["message"]) < 500


def test_nothing_is_asked_for(client):
    plain = texts(ask(client))
    assert texts(ask(client, response_format={"type": "text"}, extra_body={"structured_outputs": {}})) == plain


def test_a_missing_package_is_told():
    error = missing(ModuleNotFoundError("outlines-core is not installed"), "guided_json")
    assert (error.status, error.param) == (400, "guided_json") and "outlines-core" in error.message


def test_nobody_waits_while_a_language_is_made(server):
    """While two languages are made that are refused in the end, and a third waits: streams go on, known languages and
    plain requests are answered; what is cancelled by its id, or whose client has gone, is no more."""

    async def main():
        async with client_of(server, kind=openai.AsyncOpenAI) as client:
            known = {"extra_body": {"guided_choice": ["yes", "no"]}}
            await ask(client, **known)
            stream = await ask(client, max_tokens=4000, stream=True, extra_body=LONG | {"draft": True})
            slow, left, cancelled = [
                asyncio.ensure_future(
                    ask(client, extra_body=SLOWLY | {"guided_regex": pattern, "request_id": name}, **rest)
                )
                for pattern, name, rest in (
                    (SLOW, "slow", {}),
                    (f"c{SLOW}", "left", {"stream": True}),
                    ("c[ab]{500}", "late", {"max_tokens": 600}),
                )
            ]
            await asyncio.sleep(0.3)
            events = 0

            async def others():
                await ask(client)
                return await ask(client, **known)

            others = asyncio.ensure_future(others())
            async for _ in stream:
                events += 1
                if others.done() and events > 20:
                    break
            await stream.close()
            assert (await others).choices[0].message.content in ("yes", "no")
            assert (await client.post("/requests/late/cancel", cast_to=object))["cancelled"] is True
            assert not any(one.done() for one in (slow, left, cancelled))  # all of that was meanwhile
            left.cancel()
            while "left" not in [line.get("id") for line in server.told()]:  # its end is in the log
                await asyncio.sleep(0.05)
            assert not slow.done()
            with pytest.raises(openai.BadRequestError, match="takes more than|states"):
                await slow
            assert (await cancelled).choices[0].finish_reason == "abort"

    asyncio.run(main())
    assert asyncio.run(wire.idle_after(server.port, 5.0)) is not None
