"""What `llada2-fast bench latency` and `throughput` share: prompts, decoding, the gate before the clock."""

import random
from dataclasses import dataclass
from itertools import chain, islice

import torch

from llada2_fast.cli import options
from llada2_fast.config import LANGUAGES
from llada2_fast.decoding.inputs import resolve_ids
from llada2_fast.demo import tasks
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights.special_tokens import load_tokenizer

from . import harness
from .harness import positive


def add_options(parser):
    """The options of both: those of every benchmark, prompts, model and decoding."""
    harness.add_options(parser)
    parser.add_argument(
        "--input-len", type=positive, metavar="N",
        help="prompts of N random tokens, answered to full length; else questions of the embedded model's tasks",
    )  # fmt: skip
    parser.add_argument("--graphs", action="store_true", help="each step as a CUDA graph, on a GPU")
    options.add_model_options(parser, without=LANGUAGES)


@dataclass
class Workload:
    """model; decoding: generate()'s keyword arguments; batches: lists of prompts, token ids, all different, so that no
    cache has seen one before; facts: what the JSON line says of them."""

    model: LLaDA2Model
    decoding: dict
    batches: list[list[list[int]]]
    facts: dict

    @classmethod
    def of(cls, args, count, size):
        """`count` batches of `size` prompts. ValueError if options, model and prompts do not go together."""
        decoding = {"seed": 0} | options.decoding(args)
        if args.input_len is not None:
            decoding = {"eos_id": ()} | decoding
        model, folder = options.load_model(args)
        if args.input_len is None:
            rows = _questions(folder, count * size)
        else:
            rows = _random(model, decoding, count * size, args.input_len)
        decoding = options.fit(decoding, model, rows)
        facts = {
            "model": args.model or "embedded", "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.config.quantization, "graphs": args.graphs,
            "prompts": "questions" if args.input_len is None else "random tokens", "input_len": args.input_len,
            "decoding": decoding,
        }  # fmt: skip
        return cls(model, decoding, [rows[at : at + size] for at in range(0, len(rows), size)], facts)


def questions(count, seed=0):
    """So many different prompts of the embedded model's tasks, in turn."""
    each = -(-count // len(tasks.TASKS))
    turns = zip(*(tasks.sample(task, each, seed) for task in tasks.TASKS), strict=True)
    return list(islice(chain.from_iterable(turns), count))


def _questions(folder, count):
    """Prompts of the tasks in turn, as chats."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: expected --input-len N, for random tokens")
    return [options.encode(tokenizer, [{"role": "user", "content": text}]) for text in questions(count)]


def _random(model, decoding, count, length):
    """Prompts of random ids, the mask and the pad id not among them."""
    mask, _, pad = resolve_ids(model, options.params(decoding))
    ids, rng = [i for i in range(model.config.vocab_size) if i not in (mask, pad)], random.Random(decoding["seed"])
    return [rng.choices(ids, k=length) for _ in range(count)]


def require_equal(tokens, wanted, what, dtype):
    """Nothing is timed before this has passed: the share of tokens that are those wanted, row by row.

    In float32 it is 1.0, or SystemExit ends the benchmark. Other types round, a near tie then falls either way and all
    behind it differs, so there the share is only reported.
    """
    rows = list(zip(tokens, wanted, strict=True))
    equal = sum(a == b for got, want in rows for a, b in zip(got, want, strict=False))
    share = equal / max(1, sum(max(len(got), len(want)) for got, want in rows))
    if dtype == torch.float32 and share < 1.0:
        raise SystemExit(f"{what}: {share:.1%} of the tokens are equal, expected all of them; nothing is timed")
    print(f"{what}: {share:.1%} of the tokens are equal")
    return share
