"""Decoding under a language and with a canvas: whatever the model says, in any batch, by every path."""

import asyncio
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.decoding.guide import gaps_of
from llada2_fast.engine import AsyncEngine, Engine, QueueFull
from llada2_fast.generate import generate
from llada2_fast.model import LLaDA2Model
from tests.engine.common import prompt_of, random_model
from tests.structured.common import EOS, MASK, OTHER_EOS, automaton, is_answer, regex_of, word_tokenizer

TOKENIZER, OTHER_TOKENIZER = word_tokenizer(), word_tokenizer(97)
FORBIDDEN = 0  # no text
LIKES = {"anything": None, "nothing more": None, "the forbidden": FORBIDDEN, "the end": EOS, "masks": MASK, "a": 2}


class Stubborn(LLaDA2Model):
    """A network that says the same everywhere, as much as it can; `likes`: None = whatever its weights do."""

    likes: str = "anything"

    def lm_logits(self, *args, **kwargs):
        logits = super().lm_logits(*args, **kwargs)
        if self.likes == "nothing more":
            return torch.zeros_like(logits)
        if LIKES[self.likes] is not None:
            logits[..., LIKES[self.likes]] += 200.0
        return logits


def model_that_likes(what):
    model = random_model(seed=5)
    stubborn = Stubborn(model.config)
    stubborn.load_state_dict(model.state_dict())
    stubborn.likes = what
    return stubborn


MODELS = {what: model_that_likes(what) for what in LIKES}


def language_of(rng, room):
    """(a random expression, how many tokens its shortest text takes), at most `room`."""
    while True:
        regex = regex_of(rng)
        try:
            fewest = automaton(regex).fewest
        except ValueError:
            continue
        if fewest <= room:
            return regex, fewest


def rules_of(rng):
    """Arguments of generate() of every kind."""
    rules = {
        "threshold": rng.choice([0.0, 0.3, 0.9, 2.0]), "steps": rng.choice([1, 3, 32]),
        "editing_threshold": rng.choice([None, None, 0.0, 0.3]), "max_post_steps": rng.choice([0, 1, 4]),
        "eos_early_stop": rng.random() < 0.5, "attend_tail": rng.random() < 0.7,
        "block_length": rng.choice([1, 2, 4, 8, 32]), "profile": rng.choice(["default", "default", "diffusers"]),
    }  # fmt: skip
    if rng.random() < 0.5:
        rules |= {"temperature": rng.choice([0.3, 1.0, 4.0]), "seed": rng.randrange(99)}
        rules |= rng.choice([{}, {"top_k": 2}, {"top_p": 0.5}])
    return rules


def canvas_of(rng, length, fewest):
    """A canvas of so many positions whose gaps have room for a text; None in one of three cases: nothing is given."""
    if rng.random() < 0.34:
        return None
    canvas = [None] * length
    while rng.random() < 0.7:
        more = list(canvas)
        at = rng.randrange(length)
        more[at : at + 2] = [rng.choice([0, 1, 2, EOS, 12])] * len(more[at : at + 2])
        gaps = gaps_of(more, length)
        if gaps and all(gap.end - gap.begin >= fewest for gap in gaps):
            canvas = more
    return canvas if any(token is not None for token in canvas) else None


def check_answer(ids, regex, canvas, length):
    """That each gap is a text of the language (None: anything), and what is given stands where it was."""
    gaps = gaps_of(canvas or [], length)
    for at, token in enumerate(canvas or ()):
        assert token is None or at >= len(ids) or ids[at] == token
    for gap in gaps:
        if regex is not None and gap.begin < len(ids):
            own = list(ids[gap.begin : gap.end])  # an answer that has ended is cut behind its end
            assert is_answer(regex, own + [EOS] * (gap.end - gap.begin - len(own)) if gap.end > len(ids) else own)


@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.integers(0, 2**32), st.sampled_from([*LIKES]))
def test_every_answer_is_in_the_language(seed, likes):
    rng = random.Random(seed)
    length = rng.randint(1, 14)
    regex, fewest = language_of(rng, length)
    rules, canvas = rules_of(rng), canvas_of(rng, length, fewest)
    prompts = [prompt_of(rng.randint(0, 9), seed % 1000 + i) for i in range(rng.randint(1, 3))]
    how = rules | {"canvas": canvas, "regex": regex, "tokenizer": TOKENIZER, "gen_length": length}
    how |= {"eos_id": (EOS, OTHER_EOS), "return_dict": True}
    out = generate(MODELS[likes], prompts, use_cache=rng.random() < 0.7, **how)
    for row, count in zip(out.sequences.tolist(), out.num_tokens, strict=True):
        check_answer(row[:count], regex, canvas, length)
    alone = generate(MODELS[likes], prompts[:1], **how)
    assert alone.sequences[0].tolist() == out.sequences[0].tolist()
    assert alone.counters[0].denoise_forwards == out.counters[0].denoise_forwards


def jobs(count, seed=0):
    """Requests of an engine: (prompt, DecodeParams, canvas, regex)."""
    rng, made = random.Random(seed), []
    for i in range(count):
        length = rng.randint(2, 14)
        regex, fewest = language_of(rng, length)
        regex = rng.choice([regex, regex, None])
        rules = rules_of(rng) | {"block_length": None, "gen_length": length, "eos_ids": (EOS, OTHER_EOS)}
        canvas = canvas_of(rng, length, fewest)
        made.append((prompt_of(rng.randint(0, 9), i), DecodeParams(**rules | {"regex": regex}), canvas, regex))
    return made


def by_itself(model, prompt, params, canvas):
    how = {name: getattr(params, name) for name in params.__dataclass_fields__ if name not in ("eos_ids",)}
    out = generate(
        model, [prompt], **how, eos_id=params.eos_ids, canvas=canvas, tokenizer=TOKENIZER, return_dict=True, trace=True
    )
    return out.sequences[0, : out.num_tokens[0]].tolist(), out.counters[0], out.trace[0]


@pytest.mark.parametrize(
    "config",
    [{}, {"graphs": True, "capture": False, "overlap": False}, {"graphs": True, "capture": False, "overlap": True}],
    ids=["eager", "graphs", "overlap"],
)
def test_an_engine_gives_each_request_what_it_gets_alone(config):
    """In languages, with canvases, with both and with neither, in one batch, with pages for half of them."""
    model, todo = random_model(), jobs(24)
    engine = Engine(model, EngineConfig(max_num_seqs=6, cache_tokens=128, trace=True, **config), TOKENIZER)
    requests = [
        engine.add_request(prompt, params, canvas=canvas, priority=i % 3)
        for i, (prompt, params, canvas, _) in enumerate(todo)
    ]
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    for request, (prompt, params, canvas, regex) in zip(requests, todo, strict=True):
        ids, counters, trace = by_itself(model, prompt, params, canvas)
        output = request.output
        assert output.error is None and output.token_ids == ids and output.trace == trace
        assert output.counters.denoise_forwards == counters.denoise_forwards
        check_answer(ids, regex, canvas, len(canvas) if canvas else params.gen_length)


def test_a_row_that_goes_on_later_gets_the_same_tokens():
    """Suspended in the middle of a block under a language with a canvas, by a request of higher priority."""
    model = random_model()
    params = DecodeParams(gen_length=16, threshold=2.0, steps=4, regex="(?:a|b)*c", eos_ids=(EOS,))
    canvas = [None, None, None, 1, None, None, None, None, None, 2, None, None, None, None, None, None]
    wanted, _, _ = by_itself(model, [3, 4], params, canvas)
    engine = Engine(model, EngineConfig(max_num_seqs=1, cache_tokens=64), TOKENIZER)
    low = engine.add_request([3, 4], params, canvas=canvas)
    for _ in range(6):
        engine.step()
    high = engine.add_request([5], DecodeParams(gen_length=8, eos_ids=(EOS,)), priority=5)
    while engine.has_work:
        engine.step()
    assert low.output.preemptions == 1 and high.output.error is None
    assert low.output.token_ids == wanted


def test_what_stands_to_the_right_inside_the_block_is_seen():
    model = random_model()
    prompt, several = [4, 5, 6, 7], range(2, 10)
    answers = [generate(model, [prompt], canvas=[None, None, None, right], eos_id=-1)[0].tolist() for right in several]
    assert [answer[3] for answer in answers] == [*several]
    assert len({tuple(answer[:3]) for answer in answers}) > 1
    later = [generate(model, [prompt], canvas=[None] * 7 + [right], eos_id=-1)[0].tolist() for right in several]
    assert len({tuple(answer[:4]) for answer in later}) == 1  # of an earlier block, by which it is not seen


def test_given_positions_cost_no_step_and_end_nothing():
    model = random_model()
    out = generate(
        model, [[4]], canvas=[None, EOS, None, 3, EOS, None], eos_id=EOS, eos_early_stop=True, return_dict=True,
        trace=True, threshold=2.0, block_length=8,
    )  # fmt: skip
    answer = out.sequences[0].tolist()
    assert [answer[1], answer[3], answer[4]] == [EOS, 3, EOS]
    assert {event.position for event in out.trace[0].events} == {1, 3, 6, 7} and out.counters[0].commits == 4


@pytest.mark.parametrize(
    "how, says",
    [
        ({"regex": "a{9}"}, "gen_length=4: expected at least 9 tokens, what the shortest text of regex takes"),
        ({"regex": "aaa", "canvas": [None, 3, None, None, None]}, "at least 3 tokens, what the shortest text"),
        ({"regex": "a", "eos_id": -1}, "regex: expected EOS ids in the vocabulary"),
        ({"regex": "xyz"}, "no text of it can be made of the tokenizer's tokens"),
        ({"regex": "("}, "regex='(': "),
        ({"regex": "a", "choices": ["b"]}, "choices=('b',): expected one of regex, json_schema, choices"),
        ({"regex": "a", "tokenizer": None}, "regex: expected a tokenizer"),
        ({"regex": "a", "profile": "hf-2.1"}, "regex='a': expected none under profile='hf-2.1'"),
        ({"canvas": [None, 3], "profile": "hf-2.0"}, "canvas: expected none under profile='hf-2.0'"),
        ({"canvas": [2, 3]}, "canvas: expected at least one gap"),
        ({"canvas": [None, 24]}, "canvas: expected ids in 0..23 and None, got 24 at 1"),
        ({"canvas": [None, 1.5]}, "canvas: expected ids in 0..23 and None, got 1.5 at 1"),
        ({"canvas": "a"}, "canvas='a': expected at least one gap"),
        ({"canvas": "a {gap:0}"}, "expected gaps of 1.."),
        ({"canvas": "a {gap:2}", "tokenizer": None}, "expected ids, or a tokenizer"),
        ({"canvas": "a{gap:1}", "tokenizer": OTHER_TOKENIZER}, "canvas: expected ids in 0..23 and None, got 99 at 0"),
        ({"canvas": "a\ud800{gap:1}"}, "expected a text without surrogates"),
        ({"canvas": [[None], [None]]}, "canvas: expected one for all, or one for each of 1 prompts, got 2"),
        ({"canvas": [None] * 600}, "gen_length=600"),
        ({"choices": []}, "choices=[]: expected texts that are not empty"),
        ({"choices": ["a\0"]}, "choices=['a\\x00']: expected"),
        ({"json_schema": {"type": "foo"}}, "json_schema"),
        ({"json_schema": "{}"}, "json_schema='{}': expected a JSON schema, a dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_before_any_forward(how, says):
    with pytest.raises(ValueError) as error:
        generate(None_Model(), [[4]], **{"gen_length": 4, "tokenizer": TOKENIZER, "eos_id": EOS} | how)
    assert says in str(error.value)


class None_Model(Stubborn):
    """A network that must not be asked."""

    def __init__(self):
        model = random_model()
        super().__init__(model.config)

    def forward_blocks(self, *args, **kwargs):
        raise AssertionError("a forward")


def test_a_mask_in_a_text_is_a_gap():
    out = generate(random_model(), [[4]], canvas="a<mask>b{gap:2}ab<mask>", tokenizer=TOKENIZER, regex="a+", eos_id=EOS)
    check_answer(out[0].tolist(), "a+", [2, None, 3, None, None, 2, 3, None], 8)


async def _while_a_language_is_made():
    slow = DecodeParams(gen_length=8, regex="[ab]*a[ab]{18}", eos_ids=(EOS,))  # some seconds until it is refused
    quick = DecodeParams(gen_length=8, eos_ids=(EOS,))
    serving = AsyncEngine(Engine(random_model(), EngineConfig(cache_tokens=64), TOKENIZER))
    with pytest.raises(asyncio.TimeoutError):
        await serving.generate([4], slow, deadline_s=0.2)
    waiting = [asyncio.ensure_future(serving.generate([4], replace(slow, regex=f"{slow.regex}{i}"))) for i in range(16)]
    await asyncio.sleep(0.1)
    others = await asyncio.gather(*waiting[15:], return_exceptions=True)  # the first is in the making still
    assert [type(other) for other in others] == [QueueFull]
    assert (await serving.generate([4], quick)).error is None
    await serving.aclose()
    ends = await asyncio.gather(*waiting[8:15], return_exceptions=True)  # two at a time, they would take a while
    assert {str(end) for end in ends} == {"the engine is closed"}
    with pytest.raises(RuntimeError, match="the engine is closed"):
        await serving.generate([4], replace(slow, regex="[ab]*a[ab]{18}z"))
    await asyncio.gather(*waiting, return_exceptions=True)


async def _wait_for_one_language(serving):
    params = DecodeParams(gen_length=30, regex="[ab]{3}", eos_ids=(EOS,))
    outputs = await asyncio.gather(*(serving.generate([4], params) for _ in range(24)))
    assert len({tuple(output.token_ids) for output in outputs}) == 1 and outputs[0].error is None
    others = [replace(params, regex=f"[ab]{{3}}{'c' * i}") for i in range(1, 24)]
    outputs = await asyncio.gather(*(serving.generate([4], one, wait=True) for one in others))
    assert all(output.error is None for output in outputs)


def test_a_new_language_is_made_once_and_those_who_may_wait_do():
    with AsyncEngine(Engine(random_model(), EngineConfig(cache_tokens=512), TOKENIZER)) as serving:
        asyncio.run(_wait_for_one_language(serving))


def test_nobody_waits_for_a_language_but_who_wants_it():
    asyncio.run(_while_a_language_is_made())


def test_an_engine_refuses_alike_and_goes_on():
    engine = Engine(random_model(), EngineConfig(max_num_seqs=2, cache_tokens=64, max_states=8), TOKENIZER)
    fine = engine.add_request([3], DecodeParams(gen_length=8, regex="a+", eos_ids=(EOS,)))
    for params, options, says in (
        (DecodeParams(gen_length=8, regex="a{30}"), {}, "states, expected at most 8"),
        (DecodeParams(gen_length=2, regex="a{5}"), {}, "at least 5 tokens"),
        (DecodeParams(gen_length=8, regex="a"), {"min_tokens": 2}, "min_tokens=2: expected 0"),
        (DecodeParams(gen_length=8), {"canvas": [2]}, "at least one gap"),
        (DecodeParams(gen_length=8), {"canvas": 7}, "canvas=7: expected"),
    ):
        with pytest.raises(ValueError) as error:
            engine.add_request([4], params, **options)
        assert says in str(error.value)
    while engine.has_work:
        engine.step()
    assert is_answer("a+", fine.output.token_ids)


def test_an_engine_takes_one_canvas_for_all_or_one_for_each():
    engine = Engine(random_model(), EngineConfig(max_num_seqs=4, cache_tokens=128), TOKENIZER)
    params, one, other = DecodeParams(regex="a+", eos_ids=(EOS,)), [None, 3, None], [4, None]
    first, second = engine.generate([[3], [4]], params, canvas=one)
    both = engine.generate([[3], [4]], params, canvas=[one, other])
    assert both[0].token_ids == first.token_ids and len(second.token_ids) == 3 and both[1].token_ids[0] == 4
    assert first.finish_reason == "length" and [*first.token_ids] == [2, 3, 2]
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 3"):
        engine.generate([[3], [4]], params, canvas=[one, other, one])


@pytest.mark.parametrize("editing", [None, 0.3])
def test_an_end_behind_the_last_given_token_ends_the_answer(editing):
    """At once, or with editing when its block ends; one in a gap before it does not."""
    params = DecodeParams(threshold=0.9, eos_ids=(EOS,), eos_early_stop=True, editing_threshold=editing)
    canvas = [None, None, 3, *[None] * 30]
    ids, counters, _ = by_itself(MODELS["the end"], [4], params, canvas)
    assert ids == [EOS, EOS, 3, EOS] and counters.denoise_forwards == (2 if editing is None else 4)  # of two blocks
    engine = Engine(MODELS["the end"], EngineConfig(cache_tokens=64), TOKENIZER)
    (output,) = engine.generate([[4]], params, canvas=canvas)
    assert (output.token_ids, output.finish_reason) == (ids, "eos")
    assert output.counters.denoise_forwards == counters.denoise_forwards
