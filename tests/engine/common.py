"""What the engine's tests share: small networks, requests, and what a request gives alone."""

import functools
from dataclasses import asdict
from pathlib import Path

import torch

from llada2_fast import demo
from llada2_fast.config import DecodeParams, EngineConfig, ModelConfig
from llada2_fast.engine import Engine
from llada2_fast.generate import generate
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights.special_tokens import load_tokenizer

LENGTH, VOCAB, MASK, EOS = 4, 24, 23, 22
UNDERTRAINED = Path(__file__).parent.parent / "data" / "undertrained"


@functools.cache
def random_model(seed=0, layers=2):
    """Random weights with confidences spread over (0, 1)."""
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=layers, intermediate_size=16, moe_intermediate_size=8,
        first_k_dense_replace=layers - 1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4,
        num_experts_per_tok=2, num_shared_experts=1, n_group=2, topk_group=1, use_bias=False, block_size=LENGTH,
        max_position_embeddings=512, mask_token_id=MASK, pad_token_id=EOS, eos_token_id=(EOS,),
    )  # fmt: skip
    model = LLaDA2Model(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(0, 0.1 if name.endswith("bias") else weight.shape[-1] ** -0.5, generator=generator)
        if "norm" in name:
            weight.add_(1.0)
    model.lm_head.weight.mul_(2.5)
    return model


@functools.cache
def demo_model(folder=None):
    """The embedded model, or its less trained sibling, whose confidences are spread."""
    return LLaDA2Model.from_pretrained(folder or demo.path(), dtype=torch.float32, progress=False)


@functools.cache
def tokenizer():
    return load_tokenizer(demo.path())


def chat(text):
    """Token ids of one turn for the embedded model."""
    turn = [{"role": "user", "content": text}]
    return tokenizer().apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def small_engine(model=None, tokenizer=None, clock=None, **config):
    """An engine with few places and pages unless told otherwise."""
    config = EngineConfig(**{"max_num_seqs": 4, "cache_tokens": 256, "max_num_batched_tokens": 16} | config)
    kwargs = {} if clock is None else {"clock": clock}
    return Engine(random_model() if model is None else model, config, tokenizer, **kwargs)


def prompt_of(size, seed=0):
    return torch.randint(VOCAB - 2, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.cache
def _alone(model, prompt, params):
    fields = asdict(params)
    eos = fields.pop("eos_ids")
    return generate(model, [list(prompt)], eos_id=eos, return_dict=True, trace=True, **fields)


def alone(model, prompt, params):
    """The GenerateOutput of one request by itself."""
    return _alone(model, tuple(prompt), params)


def tokens_alone(model, prompt, params):
    out = alone(model, prompt, params)
    return out.sequences[0, : out.num_tokens[0]].tolist()


def assert_as_alone(output, model, prompt, params, traced=True):
    """Tokens, reason, trace with its confidences, and forwards of an engine's output are those of generate()."""
    wanted, counters = alone(model, prompt, params), output.counters
    assert output.error is None
    assert output.token_ids == tokens_alone(model, prompt, params)
    assert output.finish_reason == wanted.finish_reasons[0]
    assert output.trace == (wanted.trace[0] if traced else None)
    for name in ("denoise_forwards", "window_forwards", "check_forwards", "commits", "edits", "forwards_per_block"):
        assert getattr(counters, name) == getattr(wanted.counters[0], name), name
    writes = wanted.trace[0].commits()
    told = [writes[len(prompt) + i] for i in range(len(output.token_ids))]
    assert output.token_ids == [event.token for event in told]
    assert output.steps == [event.step for event in told]
    assert output.confidences == [event.confidence for event in told]


def run(engine):
    """To the end of all that it has."""
    while engine.has_work:
        engine.step()
        engine.check_integrity()


def assert_the_same_where_the_place_is_lost(prompt, params, other, config, what):
    """Ahead of any step of a request beside another one. what: "suspended", "recovered" or "recomputed"."""
    for number in range(1, alone(random_model(), prompt, params).counters[0].denoise_forwards + 2):
        engine = small_engine(**config)
        requests = [engine.add_request(prompt, params), engine.add_request(prompt_of(9), other)]
        for _ in range(number):
            engine.step()
        if what == "suspended" and requests[0] in engine.scheduler.running:
            engine.scheduler.suspend(requests[0])
        elif what == "recovered":
            engine._recover()
        elif what == "recomputed":
            engine.weights_changed("recompute")
        run(engine)
        assert_as_alone(requests[0].output, random_model(), prompt, params)
        assert_as_alone(requests[1].output, random_model(), prompt_of(9), other)
        assert_empty(engine)


def assert_empty(engine):
    """Nobody is left and every page is free."""
    engine.check_integrity()
    assert not engine.has_work and not engine.scheduler.running and not engine.scheduler.waiting
    assert engine.cache.num_free == engine.cache.num_pages


PARAMS = [  # a request of every kind
    DecodeParams(gen_length=13, threshold=0.4, steps=4),
    DecodeParams(gen_length=20, threshold=0.3, editing_threshold=0.3, max_post_steps=3, eos_early_stop=True),
    DecodeParams(gen_length=9, temperature=0.9, seed=5, threshold=0.3, steps=2),
    DecodeParams(gen_length=16, temperature=1.3, top_k=5, top_p=0.9, seed=-3, eos_early_stop=True),
    DecodeParams(gen_length=12, threshold=2.0, steps=3, minimal_topk=2, eos_early_stop=True, eos_ids=(1, 5, 9)),
    DecodeParams(gen_length=8, attend_tail=False, threshold=0.2, editing_threshold=0.0, max_post_steps=2),
    DecodeParams(gen_length=10, profile="hf-2.0", steps=4, threshold=0.4, eos_early_stop=True, eos_ids=(3, 7)),
    DecodeParams(gen_length=10, profile="hf-2.1", threshold=0.4, max_post_steps=2, eos_early_stop=True, eos_ids=(3, 7)),
    DecodeParams(gen_length=14, policy="entropy", entropy_bound=2.0, entropy_decay=0.8, editing_threshold=0.3),
    DecodeParams(gen_length=13, policy="self_speculative", entropy_bound=0.2, eos_early_stop=True),
]
