"""Answers under JSON schemas of kinds that people use: all of them valid, by models good and bad."""

import json
from dataclasses import replace

import jsonschema
import pytest

from benchmarks.models import random_model
from benchmarks.schemas import SCHEMAS
from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.engine import Engine
from llada2_fast.structured import automaton_of
from tests.engine.common import UNDERTRAINED, chat, demo_model, tokenizer

HOW = [  # what answers are decoded by, in turn
    {"threshold": 0.95}, {"threshold": 0.05}, {"threshold": 0.3, "temperature": 1.5, "seed": 3},
    {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 4},
    {"threshold": 2.0, "steps": 4, "temperature": 0.8, "top_p": 0.9, "seed": 5},
    {"threshold": 0.0, "attend_tail": False},
]  # fmt: skip


def model_of(kind):
    if kind == "random":
        return random_model(replace(demo_model().config, **demo_model().special_ids))
    return demo_model(UNDERTRAINED if kind == "undertrained" else None)


@pytest.mark.parametrize("kind", ["embedded", "undertrained", "random"])
def test_every_answer_is_valid(kind):
    """All schemas in one batch with free rows, each decoded another way under each model."""
    engine = Engine(model_of(kind), EngineConfig(max_num_seqs=16, trace=False, max_states=8192), tokenizer())
    shift = ["embedded", "undertrained", "random"].index(kind)
    prompt = chat("Tell a story about Max the goat near the lake.")
    free = engine.add_request(prompt, DecodeParams(gen_length=48))
    requests = [
        engine.add_request(prompt, DecodeParams(gen_length=64, eos_early_stop=True, json_schema=schema, **HOW[at % 6]))
        for at, schema in enumerate(SCHEMAS.values(), shift)
    ]
    while engine.has_work:
        engine.step()
    assert free.output.error is None and len(requests) >= 30
    for (name, schema), request in zip(SCHEMAS.items(), requests, strict=True):
        answer = json.loads(request.output.text)
        jsonschema.Draft202012Validator(schema).validate(answer)
        assert request.output.finish_reason in ("eos", "length"), name


def test_a_budget_that_no_answer_fits_is_refused_with_the_least_that_would_do():
    engine = Engine(demo_model(), EngineConfig(max_num_seqs=16, trace=False, max_states=8192), tokenizer())
    prompt, least = chat("Spell 7."), {}
    for name, schema in SCHEMAS.items():
        params = DecodeParams(gen_length=64, eos_early_stop=True, json_schema=schema)
        eos_ids = (tokenizer().eos_token_id,)
        fewest = automaton_of(
            params, tokenizer(), eos_ids, tokenizer().mask_token_id, demo_model().config.vocab_size, 8192
        ).fewest
        if fewest > 1:
            with pytest.raises(ValueError, match=f"at least {fewest} tokens"):
                engine.add_request(prompt, DecodeParams(gen_length=fewest - 1, json_schema=schema))
        least[name] = engine.add_request(prompt, DecodeParams(gen_length=fewest, json_schema=schema))
    while engine.has_work:
        engine.step()
    for name, request in least.items():
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(request.output.text))
