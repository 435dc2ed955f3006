"""Requests whose right answers are known: what the same model gives in this process, one request at a time."""

import random
from typing import Any, NamedTuple

import torch

from llada2_fast import DecodeParams, LLaDA2Model, demo
from llada2_fast.config import EngineConfig
from llada2_fast.decoding.trace import logprob
from llada2_fast.engine import Engine
from llada2_fast.weights.special_tokens import encode_chat, load_tokenizer

from ..soak import alone

# Fields of a body, and what DecodeParams and RequestOptions call those that they name otherwise.
KINDS = [
    {"max_tokens": 64, "threshold": 0.9},
    {"max_tokens": 40, "threshold": 0.6, "editing_threshold": 0.5, "max_post_steps": 4},
    {"max_tokens": 40, "threshold": 0.4, "temperature": 0.9, "seed": 5, "steps": 8},
    {"max_tokens": 32, "ignore_eos": True},
    {"max_tokens": 40, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": -3, "threshold": 0.5},
    {"max_tokens": 24, "threshold": 2.0, "steps": 4},
    {"max_tokens": 32, "profile": "hf-2.1", "threshold": 0.7, "max_post_steps": 2},
    {"max_tokens": 64, "stop": [" a", "1", "."]},
    {"max_tokens": 48, "stop": ["e", "\n"], "include_stop_str_in_output": True},
    {"max_tokens": 48, "min_tokens": 12},
]
OPTIONS = {"stop": "stop", "include_stop_str_in_output": "include_stop", "min_tokens": "min_tokens"}
QUESTIONS = [
    "Add 847 and 96.", "Spell 4071, 22, 608.", "Reverse moon crow bread lamp seal.", "What is 3 + 4?",
    "Tell a story about Max the goat near the lake.", "Tell a story about Kim the duck near the barn.",
    *(" ".join(["Reverse", *["moon", "crow", "lamp"] * 20, *end]) for end in ([], ["seal"])),  # they begin alike
]  # fmt: skip
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Job(NamedTuple):
    """question: the user's message; prompt: the ids that its chat becomes. fields: of a body. alone: for each number of
    a sample (tokens, confidences, text, finish_reason)."""

    question: str
    prompt: list[int]
    fields: dict[str, Any]
    alone: list[tuple]

    def check(self, number: int, text, reason=None, tokens=None, logprobs=None, begun=False) -> str | None:
        """What is wrong with an answer as far as it is told; begun: it may end early."""
        ids, confidences, right, ended = self.alone[number]
        wanted = {
            "text": (text, right), "tokens": (tokens, ids), "finish_reason": (reason, REASONS[ended]),
            "logprobs": (logprobs, [max(logprob(one), -9999.0) for one in confidences]),
        }  # fmt: skip
        for what, (told, expected) in wanted.items():
            cut = expected[: len(told)] if begun and told is not None and what != "finish_reason" else expected
            if told is not None and told != cut:
                return f"{self.question[:40]!r} {self.fields}: {what} {told!r:.300}, expected {cut!r:.300}"
        return None


def make_jobs(count: int, seed: int = 0) -> list[Job]:
    """So many jobs, of every kind in turn."""
    model = LLaDA2Model.from_pretrained(demo.path(), torch.float32, progress=False)  # as the command line loads it
    tokenizer = load_tokenizer(demo.path())
    engine = Engine(model, EngineConfig(max_num_seqs=1, cache_tokens=4096), tokenizer)
    jobs, rng = [], random.Random(seed)
    for i in range(count):
        fields, question = KINDS[i % len(KINDS)], QUESTIONS[rng.randrange(i, i + 3) % len(QUESTIONS)]
        options = {OPTIONS[name]: value for name, value in fields.items() if name in OPTIONS}
        decoding = {name: value for name, value in fields.items() if name not in OPTIONS}
        decoding["gen_length"] = decoding.pop("max_tokens")
        if decoding.pop("ignore_eos", False):
            decoding["eos_ids"] = ()
        params = DecodeParams(eos_early_stop=True, **decoding)
        prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
        jobs.append(Job(question, prompt, fields, alone(engine, prompt, params, options)))
    return jobs
