"""What the server's tests ask, and what the embedded model answers without a server."""

import openai

from llada2_fast import DecodeParams, Engine, EngineConfig
from tests.engine.common import demo_model, tokenizer

MODEL = "llada2-fast-demo"
QUESTIONS = ("Add 847 and 96.", "Spell 4071, 22, 608.", "Reverse moon crow bread lamp seal.")
LONG = {"ignore_eos": True, "threshold": 2.0, "steps": 16}  # a token a step


def chat(text):
    return [{"role": "user", "content": text}]


def client_of(server, key="none", kind=openai.OpenAI):
    """OpenAI's own, of a server's process."""
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def alone(ids, *, n=1, **decoding):
    """The outputs that an engine gives a prompt without any server."""
    params = DecodeParams(**{"gen_length": 64, "eos_early_stop": True} | decoding)
    return Engine(demo_model(), EngineConfig(cache_tokens=8192), tokenizer()).generate([ids], params, n=n)
