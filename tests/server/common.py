"""What the embedded model answers without a server."""

import functools

import torch

from llada2_fast import DecodeParams, Engine, EngineConfig, LLaDA2Model, demo, load_tokenizer

MODEL = "llada2-fast-demo"
QUESTIONS = ("Add 847 and 96.", "Spell 4071, 22, 608.", "Reverse moon crow bread lamp seal.")


def chat(text):
    return [{"role": "user", "content": text}]


@functools.cache
def model():
    return LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)


@functools.cache
def tokenizer():
    return load_tokenizer(demo.path())


def prompt(text):
    return tokenizer().apply_chat_template(chat(text), add_generation_prompt=True, return_dict=False)


def alone(ids, *, n=1, **decoding):
    """The outputs that an engine gives a prompt without any server."""
    params = DecodeParams(**{"gen_length": 64, "eos_early_stop": True} | decoding)
    return Engine(model(), EngineConfig(cache_tokens=8192), tokenizer()).generate([ids], params, n=n)
