"""What the server's tests ask, and what the embedded model answers without a server."""

from contextlib import contextmanager

import openai

from benchmarks.own_server import ServerProcess
from llada2_fast import DecodeParams, Engine, EngineConfig
from tests.engine.common import demo_model, tokenizer

MODEL = "llada2-fast-demo"
QUESTIONS = ("Add 847 and 96.", "Spell 4071, 22, 608.", "Reverse moon crow bread lamp seal.")
LONG = {"ignore_eos": True, "threshold": 2.0, "steps": 16}  # a token a step


def chat(text):
    return [{"role": "user", "content": text}]


@contextmanager
def flawless_server(*options):
    """A server's process, which has to end well, without a traceback in its log."""
    with ServerProcess(*options) as server:
        yield server
        assert server.stop() == 0
        assert not [line for line in server.told() if "traceback" in line]


def client_of(server, key="none", kind=openai.OpenAI):
    """OpenAI's own, of a server's process."""
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def alone(ids, *, n=1, **decoding):
    """The outputs that an engine gives a prompt without any server."""
    params = DecodeParams(**{"gen_length": 64, "eos_early_stop": True} | decoding)
    return Engine(demo_model(), EngineConfig(cache_tokens=8192), tokenizer()).generate([ids], params, n=n)
