"""generate() of the model that transformers' Auto classes give: settings, stopping, streamers, pipelines."""

import inspect
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import llada2_fast
from llada2_fast.adapters.transformers import LLaDA2MoeModelLM
from llada2_fast.adapters.transformers.generation import _OF_A_CALL, _SETTINGS

MASK, EOS = 255, 252  # of the golden checkpoint
ADD = "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 943."
SPELL = "4071 is four thousand seventy one"


@pytest.fixture(scope="module")
def tiny(golden):
    """Random weights: its answers are as long as they may be."""
    model = LLaDA2MoeModelLM.from_pretrained(golden / "tiny", progress=False)
    model.generation_config.mask_token_id = MASK
    model.generation_config.block_length = 8
    return model


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(llada2_fast.demo.path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(llada2_fast.demo.path())


def chat(text):
    return [{"role": "user", "content": text}]


def encode(tokenizer, *texts):
    """Left-padded input_ids and attention_mask of some chats."""
    tokenizer.padding_side = "left"
    return tokenizer.apply_chat_template(
        [chat(text) for text in texts], add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


def random_ids(rows, length, seed=0):
    return torch.randint(0, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.puts, self.drafts, self.ends = [], [], 0

    def put(self, value):
        assert not self.ends and value.device.type == "cpu" and value.ndim == 2
        self.puts.append(value[0].tolist())

    def put_draft(self, value):
        assert not self.ends and value.device.type == "cpu" and value.ndim == 2
        self.drafts.append(value[0].tolist())

    def end(self):
        self.ends += 1

    @property
    def answer(self):
        return sum(self.puts[1:], [])


# Conventions


def test_prompt_and_answer_come_back_together(tiny):
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 9:] = 0
    out = tiny.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, return_dict_in_generate=True)
    answer = llada2_fast.generate(
        tiny, ids, attention_mask=mask, gen_length=20, block_length=8, mask_id=MASK, eos_early_stop=True,
        return_dict=True,
    )  # fmt: skip
    width = max(answer.num_tokens)
    assert torch.equal(out.sequences, torch.cat([ids, answer.sequences[:, :width]], 1))
    rates = [n / c.denoise_forwards for n, c in zip(answer.num_tokens, answer.counters, strict=True)]
    assert out.tokens_per_forward.tolist() == torch.tensor(rates).tolist()
    assert out["sequences"] is out.sequences and list(out) == ["sequences", "tokens_per_forward"]
    assert torch.equal(tiny.generate(ids, attention_mask=mask, max_new_tokens=20), out.sequences)


def test_a_row_is_filled_with_pad_ids_after_its_eos(demo, tokenizer):
    batch = encode(tokenizer, "Add 847 and 96.", "Spell 4071.")
    out = demo.generate(**batch, max_new_tokens=64)
    length = batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    assert texts == [ADD, SPELL]
    short = out[1, length:].tolist()
    end = short.index(demo.generation_config.eos_token_id)
    assert set(short[end:]) == {demo.generation_config.pad_token_id} and out.shape[1] < length + 64
    other = demo.generate(**batch, max_new_tokens=64, pad_token_id=5)[1, length:].tolist()
    assert other == short[: end + 1] + [5] * (len(short) - end - 1)


def test_no_prompt_is_an_empty_one(tiny):
    out = tiny.generate(max_new_tokens=8)
    assert torch.equal(out, tiny.generate(torch.empty(1, 0, dtype=torch.int64), max_new_tokens=8))
    assert out.shape[0] == 1


def test_the_engine_and_our_pipeline_take_the_model_too(demo, tokenizer):
    params = llada2_fast.DecodeParams(gen_length=64, eos_early_stop=True)
    engine = llada2_fast.Engine(demo, llada2_fast.EngineConfig(max_num_seqs=2), tokenizer)
    prompt = tokenizer.apply_chat_template(chat("Spell 4071."), add_generation_prompt=True)["input_ids"]
    (output,) = engine.generate([prompt], params)
    assert output.text == SPELL
    pipe = llada2_fast.LLaDA2Pipeline(demo, llada2_fast.BlockRefinementScheduler(block_length=16), tokenizer)
    assert pipe(prompt="Spell 4071.", gen_length=64).texts[0].strip() == SPELL


def test_prompts_of_other_integers_and_of_numpy(tiny):
    ids = torch.tensor([[3, 5, 200], [7, 9, 9]])
    wanted = tiny.generate(ids, max_new_tokens=8)
    for prompts in (ids.int(), ids.numpy(), ids.numpy().astype("uint16")):
        out = tiny.generate(prompts, attention_mask=torch.ones_like(ids).numpy(), max_new_tokens=8)
        assert torch.equal(out, wanted) and out.dtype == torch.int64


def test_masks_of_several_answers_may_be_lists(tiny):
    ids, mask = torch.tensor([[3, 5, 200], [7, 9, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    more = dict(max_new_tokens=8, num_return_sequences=2, do_sample=True, seed=3)
    wanted = tiny.generate(ids, attention_mask=mask, **more)
    for same in (mask.tolist(), mask.numpy(), mask.bool().tolist(), mask.float()):
        assert torch.equal(tiny.generate(ids, attention_mask=same, **more), wanted)


def test_the_answers_to_a_prompt_stand_together(tiny):
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    more = dict(max_new_tokens=8, num_return_sequences=2, do_sample=True, eos_token_id=-1)
    both = tiny.generate(ids, attention_mask=mask, seed=[1, 2, 3, 4], **more)
    each = [
        tiny.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], seed=seed, **more)
        for i, seed in enumerate(([1, 2], [3, 4]))
    ]
    assert torch.equal(both, torch.cat(each))


def test_a_canvas_is_what_the_decoder_begins_with(tiny):
    """Over several blocks of 8 tokens, of prompts of different length."""
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    canvas = torch.full((2, 21), MASK)
    canvas[0, 3:5], canvas[1, 16:] = 9, torch.arange(60, 65)
    out = tiny.generate(ids, attention_mask=mask, decoder_input_ids=canvas, eos_token_id=-1)
    assert out.shape == (2, 33) and torch.equal(out[:, :12], ids) and not (out == MASK).any()
    answers = llada2_fast.generate(
        tiny, ids, attention_mask=mask, canvas=canvas.tolist(), block_length=8, mask_id=MASK, eos_id=-1
    )
    assert torch.equal(out[:, 12:], answers) and torch.equal(out[:, 12:][canvas != MASK], canvas[canvas != MASK])
    for same in (canvas.int(), canvas.numpy()):
        assert torch.equal(tiny.generate(ids, attention_mask=mask, decoder_input_ids=same, eos_token_id=-1), out)
    free = tiny.generate(ids, attention_mask=mask, max_new_tokens=21, eos_token_id=-1)
    assert not torch.equal(out[0, 12:15], free[0, 12:15])  # what is on the right in the block is seen
    one = tiny.generate(ids[:1], attention_mask=mask[:1], decoder_input_ids=canvas[0], eos_token_id=-1)
    assert torch.equal(one[0], out[0])
    several = tiny.generate(
        ids, attention_mask=mask, decoder_input_ids=canvas, eos_token_id=-1, num_return_sequences=2, do_sample=True
    )
    both = canvas.repeat_interleave(2, 0)
    assert torch.equal(several[:, 12:][both != MASK], both[both != MASK]) and not torch.equal(several[0], several[1])


def test_answers_in_a_language(demo, tokenizer):
    batch = encode(tokenizer, "Add 847 and 96.", "Spell 4071.")
    length = batch["input_ids"].shape[1]
    out = demo.generate(**batch, max_new_tokens=16, tokenizer=tokenizer, choices=["yes", "no"])
    assert {*tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)} <= {"yes", "no"}
    with pytest.raises(ValueError, match="gen_length=1: expected at least 9 tokens"):
        demo.generate(**batch, max_new_tokens=1, tokenizer=tokenizer, regex="[0-9]{9}")
    with pytest.raises(ValueError, match="json_schema: expected a tokenizer"):
        demo.generate(**batch, max_new_tokens=16, json_schema={"type": "integer"})


def test_empty_processors_change_nothing(tiny):
    ids = torch.tensor([[3, 5, 200]])
    empty = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList(), "num_beams": 1}
    assert torch.equal(tiny.generate(ids, max_new_tokens=8, **empty), tiny.generate(ids, max_new_tokens=8))


# Settings


def test_every_argument_of_the_cards_generate_has_its_place():
    own = set(inspect.signature(llada2_fast.generate).parameters)
    renamed = {"gen_length", "eos_id", "pad_id", "mask_id", "canvas"}
    shared = {"temperature", "top_k", "top_p", "use_cache", "attention_mask", "inputs", "tokenizer"}
    elsewhere = {"model", "return_dict", "trace", "on_step", "others", "sampling_method"}  # do_sample says the last one
    assert own == renamed | shared | elsewhere | {*_SETTINGS, *_OF_A_CALL}


@pytest.mark.parametrize("given", [
    {"gen_length": 20}, {"max_new_tokens": 20}, {"max_length": 32}, {"max_new_tokens": 20, "max_length": 7},
    {"generation_config": GenerationConfig(max_new_tokens=20)},
    {"generation_config": GenerationConfig(max_new_tokens=7), "max_new_tokens": 20},
    {"generation_config": GenerationConfig(max_new_tokens=7), "max_length": 32},
    {"generation_config": GenerationConfig(max_length=9), "gen_length": 20},
])  # fmt: skip
def test_lengths(tiny, given):
    ids = random_ids(1, 12)
    expected = llada2_fast.generate(tiny, ids, gen_length=20, block_length=8, mask_id=MASK, eos_id=-1)
    assert torch.equal(tiny.generate(ids, eos_token_id=-1, **given)[:, 12:], expected)


def test_what_a_window_reaches_is_not_streamed(tiny):
    ids, rules = random_ids(1, 12), dict(threshold=0.2, editing_threshold=0.1, max_post_steps=0, block_length=8)
    expected = llada2_fast.generate(tiny, ids, gen_length=40, edit_window=2, mask_id=MASK, eos_id=-1, **rules)
    plain = llada2_fast.generate(tiny, ids, gen_length=40, mask_id=MASK, eos_id=-1, **rules)
    streamer = Recorder()
    got = tiny.generate(ids, max_new_tokens=40, edit_window=2, eos_token_id=-1, streamer=streamer, **rules)
    assert torch.equal(got[:, 12:], expected) and not torch.equal(expected, plain)
    assert streamer.answer == expected[0].tolist()


@pytest.mark.parametrize("rules", [
    {"policy": "entropy", "entropy_bound": 2.0, "entropy_decay": 0.7},
    {"policy": "self_speculative", "entropy_bound": 0.0},
], ids=["entropy", "self_speculative"])  # fmt: skip
def test_policies(tiny, rules):
    """As arguments, or of a GenerationConfig; a streamer is told what is written."""
    ids, streamer = random_ids(2, 12), Recorder()
    expected = llada2_fast.generate(tiny, ids, gen_length=40, block_length=8, mask_id=MASK, eos_id=-1, **rules)
    plain = llada2_fast.generate(tiny, ids, gen_length=40, block_length=8, mask_id=MASK, eos_id=-1)
    got = tiny.generate(ids, max_new_tokens=40, eos_token_id=-1, **rules)
    assert torch.equal(got[:, 12:], expected) and not torch.equal(expected, plain)
    config = GenerationConfig(max_new_tokens=40, eos_token_id=-1, **rules)
    assert torch.equal(tiny.generate(ids[:1], config, streamer=streamer)[:, 12:], expected[:1])
    assert streamer.answer == expected[0].tolist()


def test_the_default_length_is_the_cards(tiny):
    with pytest.raises(ValueError, match="gen_length=2048: prompt 0 has 4 tokens and the model 1024 positions"):
        tiny.generate(random_ids(1, 4))


@pytest.mark.parametrize("given, expected", [
    ({}, {}),
    ({"do_sample": False}, {}),
    ({"temperature": 0.0}, {}),
    ({"do_sample": False, "temperature": None, "top_p": None}, {}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "temperature": 0.5, "top_k": 5}, {"temperature": 0.5, "top_k": 5}),
    ({"generation_config": GenerationConfig(temperature=0.7, top_p=0.9)}, {"temperature": 0.7, "top_p": 0.9}),
    ({"generation_config": GenerationConfig(do_sample=False, temperature=0.7)}, {}),
    ({"generation_config": GenerationConfig(do_sample=True, temperature=0.7), "do_sample": False}, {}),
    ({"threshold": 0.01, "minimal_topk": 2}, {"threshold": 0.01, "minimal_topk": 2}),
    ({"generation_config": GenerationConfig(threshold=0.01), "editing_threshold": 0.2, "max_post_steps": 2},
     {"threshold": 0.01, "editing_threshold": 0.2, "max_post_steps": 2}),
    ({"steps": 3, "block_length": 5, "attend_tail": False}, {"steps": 3, "block_length": 5, "attend_tail": False}),
    ({"use_cache": False, "settle": "separate"}, {"use_cache": False, "settle": "separate"}),
    ({"profile": "hf-2.1"}, {"profile": "hf-2.1", "eos_early_stop": False}),
    ({"profile": "hf-2.0", "eos_early_stop": True}, {"profile": "hf-2.0"}),
])  # fmt: skip
def test_sampling_and_thresholds(tiny, given, expected):
    ids = random_ids(2, 12)
    asked = {"gen_length": 20, "block_length": 8, "mask_id": MASK, "seed": 3, "eos_early_stop": True} | expected
    answer = llada2_fast.generate(tiny, ids, **asked)
    assert torch.equal(tiny.generate(ids, max_new_tokens=20, seed=3, **given)[:, 12:], answer)


@pytest.mark.parametrize("profile", ["hf-2.0", "hf-2.1"])
def test_the_cards_profiles_go_on_behind_an_eos_unless_told_otherwise(tiny, profile):
    """Which the forwards tell: the tokens behind an EOS are cut in any case."""
    ids, more = random_ids(1, 12), dict(gen_length=24, threshold=2.0, profile=profile)
    own, rates = dict(block_length=8, mask_id=MASK), []
    eos = llada2_fast.generate(tiny, ids, eos_id=-1, **more, **own)[0, 4].item()
    for said, early in (({}, False), ({"eos_early_stop": True}, True)):
        out = tiny.generate(ids, eos_token_id=eos, return_dict_in_generate=True, **more, **said)
        answer = llada2_fast.generate(tiny, ids, eos_id=eos, eos_early_stop=early, return_dict=True, **more, **own)
        assert torch.equal(out.sequences[:, 12:], answer.sequences)
        rates.append(out.tokens_per_forward.item())
        assert rates[-1] == pytest.approx(answer.tokens_per_forward)
    assert rates[0] < rates[1]


def test_seeds(tiny):
    ids = random_ids(1, 12)

    def draw(**kwargs):
        return tiny.generate(ids, max_new_tokens=24, do_sample=True, **kwargs).tolist()

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(generator=torch.Generator().manual_seed(4)) == draw(generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    several = tiny.generate(ids, max_new_tokens=24, do_sample=True, num_return_sequences=3)
    torch.manual_seed(5)
    assert torch.equal(several, tiny.generate(ids.expand(3, -1), max_new_tokens=24, do_sample=True))
    assert len({tuple(row) for row in several.tolist()}) == 3
    named = draw(num_return_sequences=2, seed=[1, 2])
    assert [[row] for row in named] == [draw(seed=1), draw(seed=2)]
    mixed = draw(num_return_sequences=3, seed=1)
    assert mixed == tiny.generate(ids.expand(3, -1), max_new_tokens=24, do_sample=True, seed=1).tolist()
    assert [mixed[0]] == draw(seed=1) and len({tuple(row) for row in mixed}) == 3


def test_what_the_checkpoint_says_is_the_default(golden, tmp_path):
    shutil.copytree(golden / "tiny", tmp_path, dirs_exist_ok=True)
    said = {"eos_token_id": [EOS, 7], "mask_token_id": MASK, "max_new_tokens": 9, "threshold": 0.3, "temperature": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(model.generation_config, name) for name in said} == said
    assert model.generation_config.do_sample is True and model.generation_config.pad_token_id == EOS
    ids = random_ids(1, 12)
    expected = llada2_fast.generate(model, ids, gen_length=9, threshold=0.3, temperature=0.5, seed=1)
    assert torch.equal(model.generate(ids, seed=1)[:, 12:], expected)
    model.generation_config.max_new_tokens = 5
    assert model.generate(ids, do_sample=False).shape[1] <= 17
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"repetition_penalty": 1.1}), encoding="utf-8")
    with pytest.raises(ValueError, match="repetition_penalty=1.1"):
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids)


def test_neutral_values_are_accepted_and_nothing_is_changed(tiny):
    ids = random_ids(1, 12)
    neutral = dict(num_beams=1, repetition_penalty=1.0, length_penalty=1.0, min_length=0, no_repeat_ngram_size=0,
                   output_scores=False, synced_gpus=False, logits_processor=None, assistant_model=None,
                   custom_generate=None, use_cache=True, num_return_sequences=1, early_stopping=False)  # fmt: skip
    before = tiny.generation_config.to_dict()
    config = GenerationConfig(max_new_tokens=12, **{k: v for k, v in neutral.items() if hasattr(GenerationConfig(), k)})
    kept = config.to_dict()
    expected = tiny.generate(ids, max_new_tokens=12)
    assert torch.equal(tiny.generate(ids, max_new_tokens=12, **neutral), expected)
    assert torch.equal(tiny.generate(ids, config), expected)
    assert tiny.generation_config.to_dict() == before and config.to_dict() == kept


@pytest.mark.parametrize("kwargs, message", [
    ({"num_beams": 4}, "num_beams=4"),
    ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor="),
    ({"prefix_allowed_tokens_fn": len}, "prefix_allowed_tokens_fn="),
    ({"assistant_model": object()}, "assistant_model="),
    ({"custom_generate": "x/y"}, "custom_generate='x/y'"),
    ({"negative_prompt_ids": torch.ones(1, 2)}, "negative_prompt_ids="),
    ({"past_key_values": ()}, "past_key_values="),
    ({"inputs_embeds": torch.ones(1, 2, 64)}, "inputs_embeds="),
    ({"synced_gpus": True}, "synced_gpus=True"),
    ({"output_scores": True}, "output_scores=True"),
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
    ({"min_new_tokens": 3}, "min_new_tokens=3"),
    ({"bad_words_ids": [[3]]}, "bad_words_ids="),
    ({"forced_bos_token_id": 0}, "forced_bos_token_id=0"),
    ({"cache_implementation": "static"}, "cache_implementation='static'"),
    ({"generation_config": GenerationConfig(min_p=0.1)}, "min_p=0.1"),
    ({"generation_config": GenerationConfig(canvas=3)}, "canvas=3"),
    ({"generation_config": {"max_new_tokens": 3}}, "generation_config: dict"),
    ({"gen_lenght": 3}, "gen_lenght=3"),
    ({"sampling_method": "greedy"}, "sampling_method='greedy'"),
    ({"trace": True}, "trace=True"),
    ({"return_dict": True}, "return_dict=True"),
    ({"gen_length": 3, "max_new_tokens": 3}, "gen_length=3: give it or max_new_tokens, not both"),
    ({"eos_id": 3, "eos_token_id": 3}, "eos_id=3: give it or eos_token_id"),
    ({"max_length": 12}, "max_length=12: expected more than the prompt's 12 tokens"),
    ({"do_sample": True, "temperature": 0.0}, "temperature=0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": "warm"}, "temperature='warm'"),
    ({"num_return_sequences": 2}, "`num_return_sequences` different than 1"),
    ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ({"stop_strings": ["x"]}, r"stop_strings=\['x'\]: needs the argument tokenizer"),
    ({"threshold": -1}, "threshold=-1"),
    ({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, "input_ids: give it or inputs"),
    ({"decoder_input_ids": [MASK]}, r"decoder_input_ids: a tensor \[1, G\] or \[G\] of token ids expected, got list"),
    ({"decoder_input_ids": torch.full((2, 3), MASK)}, r"decoder_input_ids: .* got \[2, 3\]"),
    ({"decoder_input_ids": torch.ones(3)}, "decoder_input_ids: int64"),
    ({"decoder_input_ids": torch.ones(3, dtype=torch.int64)}, "canvas: expected at least one gap"),
    ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
    ({"attention_mask": "1" * 12}, "attention_mask: .* got str"),
    *[({"attention_mask": made([[odd] * 12])} | more, f"attention_mask: bool, or 0 and 1, expected, got {odd}")
      for odd in (0.5, 2, -1, float("-inf"), float("nan")) for made in (torch.tensor, np.array, list)
      for more in ({}, {"num_return_sequences": 2, "do_sample": True})],
    ({"pad_token_id": 10**6}, "pad_id=1000000: expected an id in 0.."),
    ({"streamer": TextDiffusionStreamer(None), "inputs": torch.ones(2, 3, dtype=torch.int64)}, "streamer: .* not 2"),
    ({"inputs": torch.ones(3, dtype=torch.int64)}, r"inputs: a tensor \[B, P\]"),
    ({"inputs": [[1, 2]]}, r"inputs: a tensor \[B, P\] of token ids expected, got list"),
    ({"inputs": torch.ones(1, 3)}, "inputs: int64"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(**{"inputs": random_ids(1, 12)} | kwargs)


# Stopping


@settings(max_examples=10)
@given(seed=st.integers(0, 99), length=st.integers(1, 30), editing=st.sampled_from([None, 0.0]), rows=st.integers(1, 3))
def test_max_length_criteria_cut_where_max_length_does(tiny, seed, length, editing, rows):
    ids = random_ids(rows, 5, seed)
    kwargs = dict(max_new_tokens=30, eos_token_id=-1, editing_threshold=editing, max_post_steps=2)
    whole = tiny.generate(ids, **kwargs)
    cut = tiny.generate(ids, **kwargs, stopping_criteria=[MaxLengthCriteria(5 + length)])
    assert torch.equal(cut, whole[:, : 5 + length])


def test_a_criterion_sees_each_row_alone_and_ends_it_alone(tiny):
    ids = random_ids(2, 6)
    whole = tiny.generate(ids, max_new_tokens=32, eos_token_id=-1)
    asked = []

    def third_of_the_second(given, scores):
        assert scores is None and given.shape[0] == 1
        asked.append(given[0].tolist())
        return torch.tensor([torch.equal(given[0, :6], ids[1]) and given.shape[1] == 9])

    out = tiny.generate(
        ids, max_new_tokens=32, eos_token_id=-1, pad_token_id=9, return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([third_of_the_second]),
    )  # fmt: skip
    assert torch.equal(out.sequences[0], whole[0])
    assert out.sequences[1].tolist() == whole[1, :9].tolist() + [9] * 29
    rows = [[r for r in asked if r[:6] == ids[i].tolist()] for i in range(2)]
    assert rows == [[whole[0, : 6 + n].tolist() for n in range(1, 33)], [whole[1, : 6 + n].tolist() for n in (1, 2, 3)]]


def test_a_criterion_may_end_a_row_ahead_of_its_eos(tiny):
    """Under hf-2.0, too, which has a rule of its own where to cut a row that an EOS has ended."""
    ids, kwargs = random_ids(1, 8), dict(max_new_tokens=16, profile="hf-2.0", threshold=0.0, pad_token_id=9)
    free = tiny.generate(ids, eos_token_id=-1, **kwargs)[0].tolist()
    end = next(at for at in range(10, 15) if free[at] not in free[:at])
    stops = {"eos_token_id": free[end], "eos_early_stop": True}
    assert tiny.generate(ids, **stops, **kwargs)[0].tolist() == free[: end + 1]
    cut = tiny.generate(ids, stopping_criteria=[MaxLengthCriteria(end)], **stops, **kwargs)
    assert cut[0].tolist() == free[:end]


def test_a_stopped_row_costs_no_further_steps(tiny):
    kwargs = dict(max_new_tokens=64, eos_token_id=-1, return_dict_in_generate=True, threshold=1.0)
    out = tiny.generate(random_ids(1, 8), **kwargs, stopping_criteria=[MaxLengthCriteria(16)])
    assert out.tokens_per_forward.tolist() == [8 / 8]  # one block of 8, a token a step


def test_stop_strings(demo, tokenizer):
    batch = encode(tokenizer, "Add 847 and 96.", "Spell 4071.")
    out = demo.generate(**batch, max_new_tokens=64, stop_strings=["The ans", "thousand"], tokenizer=tokenizer)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for text, whole, stop in zip(texts, (ADD, SPELL), ("The ans", "thousand"), strict=True):
        assert stop in text and whole.startswith(text) and len(text) < len(whole)


def test_max_time_ends_rows_with_their_block(tiny):
    ids = random_ids(2, 8)
    whole = tiny.generate(ids, max_new_tokens=64, eos_token_id=-1)
    assert torch.equal(tiny.generate(ids, max_new_tokens=64, eos_token_id=-1, max_time=1e-9), whole[:, :16])
    assert torch.equal(tiny.generate(ids, max_new_tokens=64, eos_token_id=-1, max_time=1e9), whole)


# Streamers


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    prompt=st.integers(0, 20),
    length=st.integers(1, 40),
    block=st.sampled_from([1, 5, 8, 32]),
    eos=st.sampled_from([-1, EOS, list(range(0, 256, 7))]),
    kwargs=st.sampled_from([
        {}, {"threshold": 0.0}, {"editing_threshold": 0.0, "max_post_steps": 3}, {"eos_early_stop": False},
        {"profile": "hf-2.0"}, {"profile": "hf-2.0", "eos_early_stop": True}, {"profile": "hf-2.1"},
        {"profile": "hf-2.1", "eos_early_stop": True}, {"attend_tail": False}, {"do_sample": True},
    ]),
)  # fmt: skip
def test_what_is_streamed_is_what_is_returned(tiny, seed, prompt, length, block, eos, kwargs):
    recorder, ids = Recorder(), random_ids(1, prompt, seed)
    out = tiny.generate(
        ids, streamer=recorder, max_new_tokens=length, block_length=block, eos_token_id=eos, seed=seed,
        return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    answer = out.sequences[0, prompt:].tolist()
    assert recorder.puts[0] == ids[0].tolist() and recorder.answer == answer and recorder.ends == 1
    assert all(recorder.puts[1:])
    if answer:
        assert len(recorder.drafts) == round(len(answer) / out.tokens_per_forward.item())
    if kwargs.get("profile") != "hf-2.0" and recorder.answer:
        first = -(prompt + 1) % block + 1  # the rest of the block that the prompt ends in
        assert len(recorder.puts[1]) <= first and all(len(put) <= block for put in recorder.puts[1:])
        assert len(recorder.puts) - 1 == 1 + max(0, -(-(len(answer) - first) // block))


def test_streaming_changes_nothing(tiny):
    ids = random_ids(1, 12)
    kwargs = dict(max_new_tokens=30, editing_threshold=0.1, max_post_steps=2)
    assert torch.equal(tiny.generate(ids, streamer=Recorder(), **kwargs), tiny.generate(ids, **kwargs))


def test_drafts_are_the_best_guess_of_the_open_block(tiny):
    recorder = Recorder()
    tiny.generate(random_ids(1, 12), streamer=recorder, max_new_tokens=18, eos_token_id=-1, threshold=1.0)
    assert [len(put) for put in recorder.puts] == [12, 4, 8, 6]
    assert [len(draft) for draft in recorder.drafts] == [4] * 4 + [8] * 8 + [6] * (len(recorder.drafts) - 12)
    assert all(MASK not in draft for draft in recorder.drafts)
    assert recorder.drafts[3] == recorder.puts[1] and recorder.drafts[11] == recorder.puts[2]


def test_a_stopping_criterion_ends_the_stream(tiny):
    recorder = Recorder()
    out = tiny.generate(
        random_ids(1, 5), streamer=recorder, max_new_tokens=40, eos_token_id=-1,
        stopping_criteria=[MaxLengthCriteria(16)],
    )  # fmt: skip
    assert out.shape[1] == 16 and recorder.answer == out[0, 5:].tolist() and recorder.ends == 1


def test_text_streamer_prints_the_answer(demo, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    demo.generate(**encode(tokenizer, "Add 847 and 96."), max_new_tokens=64, streamer=streamer)
    assert capsys.readouterr().out == ADD + "\n"


def test_text_iterator_streamer_in_a_thread(demo, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    kwargs = dict(encode(tokenizer, "Add 847 and 96."), max_new_tokens=64, streamer=streamer)
    thread = threading.Thread(target=demo.generate, kwargs=kwargs)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == ADD and sum(map(bool, pieces)) > 1  # 46 tokens in blocks of 16


def test_text_diffusion_streamer_shows_drafts(demo, tokenizer, capsys):
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    batch = encode(tokenizer, "Add 847 and 96.")
    out = demo.generate(**batch, max_new_tokens=64, streamer=streamer, return_dict_in_generate=True)
    printed = capsys.readouterr().out
    answer = out.sequences[0, batch["input_ids"].shape[1] :]
    assert printed.count("\033[33m") == round(len(answer) / out.tokens_per_forward.item())  # a draft for each step
    kept = "".join(part.partition("\0338\033[J")[2] if i else part for i, part in enumerate(printed.split("\0337")))
    assert kept == ADD + "\n"


class Failing(Recorder):
    def put(self, value):
        super().put(value)
        if len(self.puts) == 2:
            raise OSError("nobody listens")


@pytest.mark.parametrize("streamer, kwargs, error", [
    (Recorder(), {"num_beams": 3}, ValueError),  # before anything is done
    (Recorder(), {"max_new_tokens": 3, "block_length": 0}, ValueError),
    (Failing(), {"max_new_tokens": 40, "eos_token_id": -1}, OSError),  # in the middle
])  # fmt: skip
def test_the_stream_ends_with_an_error_too(tiny, streamer, kwargs, error):
    with pytest.raises(error):
        tiny.generate(random_ids(1, 4), streamer=streamer, **kwargs)
    assert streamer.ends == 1


def test_a_reader_does_not_wait_for_a_failed_generate(tiny, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=1)  # then queue.Empty
    with pytest.raises(ValueError, match="num_beams=3"):
        tiny.generate(random_ids(1, 4), streamer=streamer, num_beams=3)
    assert "".join(streamer) == ""


def test_streamers_that_cannot_be_served_are_refused(tiny, tokenizer):
    streamer = TextDiffusionStreamer(tokenizer)
    streamer._takes_logits = True
    with pytest.raises(ValueError, match="streamer: expected one that takes the ids of drafts"):
        tiny.generate(random_ids(1, 4), streamer=streamer, max_new_tokens=8)


# Pipelines


@pytest.fixture(scope="module")
def pipe(tokenizer):
    path = str(llada2_fast.demo.path())
    return pipeline("text-generation", model=path, tokenizer=tokenizer, dtype=torch.float32, device="cpu")


def test_pipeline_of_a_folder_answers_chats(pipe):
    assert type(pipe.model) is LLaDA2MoeModelLM
    (answer,) = pipe(chat("Add 847 and 96."), max_new_tokens=64)
    assert answer["generated_text"] == chat("Add 847 and 96.") + [{"role": "assistant", "content": ADD}]
    (answer,) = pipe(chat("Add 847 and 96."), max_new_tokens=64, return_full_text=False)
    assert answer["generated_text"] == ADD
    assert "LLaDA2MoeModelLM" in repr(pipe)


def test_pipeline_continues_plain_prompts(pipe, tokenizer):
    prompt = tokenizer.apply_chat_template(chat("Spell 4071."), add_generation_prompt=True, tokenize=False)
    assert pipe(prompt)[0]["generated_text"] == prompt + SPELL
    assert pipe(prompt, return_full_text=False)[0]["generated_text"] == SPELL
    assert pipe("", max_new_tokens=4)[0]["generated_text"] is not None


def test_pipeline_batches(pipe):
    texts = ("Add 847 and 96.", "Spell 4071.", "Add 1 and 2.")
    alone = [pipe(chat(text), max_new_tokens=64, return_full_text=False) for text in texts]
    batched = pipe([chat(t) for t in texts], max_new_tokens=64, return_full_text=False, batch_size=2)
    assert batched == alone and [answer["generated_text"] for (answer,) in batched[:2]] == [ADD, SPELL]


def test_pipeline_of_a_model_with_settings(demo, tokenizer):
    pipe = pipeline("text-generation", model=demo, tokenizer=tokenizer, max_new_tokens=64, threshold=-1.0)
    with pytest.raises(ValueError, match="threshold=-1.0"):
        pipe(chat("Spell 4071."))
    pipe = pipeline("text-generation", model=demo, tokenizer=tokenizer, max_new_tokens=64, threshold=0.7)
    assert pipe(chat("Spell 4071."), return_full_text=False)[0]["generated_text"] == SPELL
    assert not hasattr(demo.generation_config, "threshold") and demo.generation_config.max_new_tokens is None
    config = GenerationConfig(max_new_tokens=5, eos_token_id=-1)
    pipe = pipeline("text-generation", model=demo, tokenizer=tokenizer, generation_config=config)
    (answer,) = pipe(chat("Spell 4071."), return_tensors=True)
    prompt = tokenizer.apply_chat_template(chat("Spell 4071."), add_generation_prompt=True)["input_ids"]
    assert len(answer["generated_token_ids"]) == len(prompt) + 5


def test_pipeline_samples_several_answers_and_streams(pipe, tokenizer, capsys):
    answers = pipe(chat("Spell 4071."), do_sample=True, num_return_sequences=3, return_full_text=False)
    assert len(answers) == 3
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pipe(chat("Spell 4071."), max_new_tokens=64, streamer=streamer)
    assert capsys.readouterr().out == SPELL + "\n"
    with pytest.raises(ValueError, match="num_beams=2"):
        pipe(chat("Spell 4071."), num_beams=2)


def test_pipeline_is_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("text-generation", model=str(tmp_path))
    assert again(chat("Spell 4071."), max_new_tokens=64, return_full_text=False)[0]["generated_text"] == SPELL
