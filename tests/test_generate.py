"""generate(): the recorded decodings of the model cards, shapes, ragged batches, special ids, seeds and bad input."""

import copy
import functools
import inspect
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from llada2_fast.config import DecodeParams
from llada2_fast.decoding.inputs import resolve_ids
from llada2_fast.generate import GenerateOutput, generate
from llada2_fast.kernels.refine import COMMITS
from llada2_fast.model import LLaDA2Model
from tests.rounding import undecided_from

GOLDEN = Path(__file__).parent / "golden"
MASK, PAD, VOCAB = 255, 252, 256  # of the golden set "tiny"; its EOS id is its pad id
SHORT = dict(gen_length=12, block_length=8, threshold=0.5, mask_id=MASK)


@functools.cache
def load(name="tiny"):
    return LLaDA2Model.from_pretrained(GOLDEN / name, dtype=torch.float32, progress=False)


@functools.cache
def recorded(name):
    return json.loads((GOLDEN / name / "generate.json").read_text())["cases"]


def prompt_of(n, fill=0):
    """n random ids, none of them special."""
    return torch.randint(250, (n,), generator=torch.Generator().manual_seed(1000 * n + fill)).tolist()


def check_recorded(name, case, **how):
    got = generate(
        load(name),
        torch.tensor(case["prompt"]),
        profile="hf-" + case["version"],
        return_dict=True,
        **case["params"],
        **how,
    )
    what = (name, case["version"], case["label"], how)
    if got.sequences.tolist() != [case["output"]] and undecided_from(load(name), case) < math.inf:
        return  # it hangs on a rounding, which another processor may do otherwise; test_decoder.py says from where on
    assert got.sequences.tolist() == [case["output"]] and got.num_tokens == [len(case["output"])], what
    assert got.counters[0].denoise_forwards == case["num_forwards"], what


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_cards_tokens_and_forwards(version, stride):
    """Every recorded case of a set, or every third, one call each; test_decoder.py has all of them, step by step."""
    cases = [case for case in recorded("tiny") if case["version"] == version]
    for i, case in enumerate(cases[::stride]):
        check_recorded("tiny", case)
        if i % 8 == 0:
            check_recorded("tiny", case, use_cache=False)
            check_recorded("tiny", case, settle="separate")


@pytest.mark.parametrize("name", ["group", "variant", "flat", "moe256", "bf16"])
def test_the_cards_tokens_and_forwards_of_other_sets(name):
    cases = recorded(name)
    for case in cases[::7] + [case for case in cases if case["label"].startswith("quirk")]:
        check_recorded(name, case)


def test_the_model_s_own_method_and_the_cards_positional_order():
    case = recorded("tiny")[0]
    p = case["params"]
    got = load().generate(
        torch.tensor([case["prompt"]]), p["temperature"], p["block_length"], p["steps"], p["gen_length"], None, None,
        False, 1, p["threshold"], None, 16, p["eos_id"], p["mask_id"], 1, profile="hf-2.0",
    )  # fmt: skip
    assert got.tolist() == [case["output"]] and got.dtype == torch.int64


def test_signature_and_defaults_are_the_cards():
    parameters = inspect.signature(generate).parameters
    card = dict(
        inputs=inspect.Parameter.empty, temperature=0.0, block_length=None, steps=32, gen_length=2048, top_p=None,
        top_k=None, eos_early_stop=False, minimal_topk=1, threshold=0.95, editing_threshold=None, max_post_steps=16,
        eos_id=None, mask_id=None, num_to_transfer=1,
    )  # fmt: skip
    positional = {k: p.default for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items())[1:] == list(card.items())
    params = DecodeParams()
    for name, default in list(card.items())[1:]:
        if name not in ("eos_id", "mask_id"):
            assert getattr(params, name) == default
    assert DecodeParams(profile="hf-2.1").editing_threshold == 0.9


def test_block_length_defaults_to_the_model_s():
    model = copy.copy(load())
    model.block_length = 8
    rules = SHORT | dict(block_length=None)
    assert torch.equal(
        generate(model, torch.tensor(prompt_of(5)), **rules), generate(load(), torch.tensor(prompt_of(5)), **SHORT)
    )


# What comes back


def token_first_seen(row, at):
    """A token of the row that stands nowhere before index `at` or, failing that, a later index; and that index."""
    return next((token, i) for i, token in enumerate(row) if i >= at and token not in row[:i])


def test_one_prompt_gives_one_row_cut_after_the_first_eos():
    prompt = torch.tensor(prompt_of(5))
    full = generate(load(), prompt, eos_id=-1, **SHORT)
    assert full.shape == (1, 12) and full.dtype == torch.int64
    eos, at = token_first_seen(full[0].tolist(), 4)
    for inputs in (prompt, prompt[None], [prompt.tolist()], prompt.tolist(), (tuple(prompt.tolist()),)):
        for early in (False, True):
            got = generate(load(), inputs, eos_id=eos, eos_early_stop=early, **SHORT)
            assert torch.equal(got, full[:, : at + 1])


def test_one_padded_prompt_of_one_dimension():
    prompt = torch.tensor(prompt_of(5))
    padded = torch.cat((torch.full((3,), PAD), prompt, torch.full((2,), PAD)))
    mask = torch.tensor([0] * 3 + [1] * 5 + [0] * 2)
    wanted = generate(load(), prompt, eos_id=-1, **SHORT)
    assert torch.equal(generate(load(), padded, attention_mask=mask, eos_id=-1, **SHORT), wanted)
    assert not torch.equal(generate(load(), padded, eos_id=-1, **SHORT), wanted)


def test_several_prompts_give_rows_filled_with_the_pad_id():
    prompts = [prompt_of(5), prompt_of(9), prompt_of(16)]
    full = [generate(load(), p, eos_id=-1, **SHORT)[0].tolist() for p in prompts]
    eos, _ = token_first_seen(full[0], 3)
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    width = max(map(len, cut))
    assert min(map(len, cut)) < width
    for pad_id, pad in ((None, PAD), (7, 7)):
        got = generate(load(), prompts, eos_id=eos, pad_id=pad_id, **SHORT)
        assert got.tolist() == [row + [pad] * (width - len(row)) for row in cut]
        whole = generate(load(), prompts, eos_id=eos, pad_id=pad_id, return_dict=True, **SHORT)
        assert whole.sequences.tolist() == [row + [pad] * (12 - len(row)) for row in cut]
        assert whole.num_tokens == [len(row) for row in cut]


def test_return_dict():
    prompts = [prompt_of(5), prompt_of(9)]
    got = generate(load(), prompts, eos_id=-1, return_dict=True, trace=True, **SHORT)
    assert isinstance(got, GenerateOutput) and got.sequences.shape == (2, 12) and got.sequences.dtype == torch.int64
    assert got.finish_reasons == ["length", "length"] and got.num_tokens == [12, 12]
    assert got.tokens_per_forward == 24 / sum(c.denoise_forwards for c in got.counters)
    for row, counters, trace, prompt in zip(got.sequences, got.counters, got.trace, prompts, strict=True):
        assert sum(counters.forwards_per_block) == counters.denoise_forwards
        assert counters.prefill_forwards == len(prompt) // 8 and counters.settle_forwards == 0
        commits = trace.first_commits()
        blocks = -(-(len(prompt) + 12) // 8)
        assert sorted(commits) == list(range(len(prompt), 8 * blocks)) and len(commits) == counters.commits
        assert [commits[len(prompt) + i].token for i in range(12)] == row.tolist()
        assert all(event.block == event.position // 8 and event.old == MASK for event in commits.values())
        assert trace.logprobs()[len(prompt)] == pytest.approx(
            torch.tensor(commits[len(prompt)].confidence).log().item()
        )
    assert generate(load(), prompts, eos_id=-1, return_dict=True, **SHORT).trace is None


def test_finish_reasons():
    prompt = prompt_of(5)
    full = generate(load(), prompt, eos_id=-1, **SHORT)[0].tolist()
    eos, _ = token_first_seen(full, 2)
    stopped = generate(load(), prompt, eos_id=eos, eos_early_stop=True, return_dict=True, **SHORT)
    whole = generate(load(), prompt, eos_id=-1, eos_early_stop=True, return_dict=True, **SHORT)
    assert stopped.finish_reasons == ["eos"] and whole.finish_reasons == ["length"]
    assert stopped.counters[0].denoise_forwards < whole.counters[0].denoise_forwards


@pytest.mark.parametrize("editing", [None, 2.0])
def test_an_eos_in_the_prompt_or_the_tail_ends_nothing(editing):
    rules = SHORT | dict(gen_length=6, return_dict=True, trace=True, editing_threshold=editing)
    tails = 0
    for fill in range(4):
        prompt = prompt_of(5, fill)
        full = generate(load(), prompt, eos_id=-1, **rules)
        row = full.sequences[0].tolist()
        tail = [full.trace[0].first_commits()[at].token for at in range(11, 16)]
        tails += len(set(tail) - set(row))
        for eos in {prompt[0], prompt[4], *tail} - set(row):
            got = generate(load(), prompt, eos_id=eos, eos_early_stop=True, **rules)
            assert got.sequences.tolist() == [row] and got.finish_reasons == ["length"]
            assert got.counters[0].denoise_forwards == full.counters[0].denoise_forwards
    assert tails > 0


def test_several_eos_ids_and_ids_beyond_the_vocabulary():
    prompt = prompt_of(5)
    full = generate(load(), prompt, eos_id=-1, **SHORT)[0].tolist()
    first, at = token_first_seen(full, 3)
    second, later = token_first_seen(full, at + 1)
    assert generate(load(), prompt, eos_id=[second, first], **SHORT)[0].tolist() == full[: at + 1]
    got = generate(load(), prompt, eos_id=(second, 10**6, -1), eos_early_stop=True, **SHORT)
    assert got[0].tolist() == full[: later + 1]
    for none in (-1, 10**6, [], (VOCAB,), [-5, 2**40]):
        assert generate(load(), prompt, eos_id=none, eos_early_stop=True, **SHORT)[0].tolist() == full
    rows = generate(load(), [prompt, prompt_of(6)], eos_id=[10**6, first], pad_id=None, **SHORT)
    assert rows.max() < VOCAB and rows.min() >= 0


# Edges


def test_the_empty_prompt():
    """At threshold 0: all positions of a first block of masks are equal, so that roundings alone would rank them."""
    rules = SHORT | dict(threshold=0.0)
    alone = generate(load(), torch.empty(0, dtype=torch.int64), eos_id=-1, **rules)
    assert alone.shape == (1, 12) and not (alone == MASK).any()
    padded = torch.zeros(2, 3, dtype=torch.int64)
    for inputs, mask in (
        (torch.empty(1, 0, dtype=torch.int64), None),
        (torch.empty(2, 0, dtype=torch.int64), None),
        ([[]], None),
        ([[], []], None),
        (padded, torch.zeros(2, 3)),
    ):
        got = generate(load(), inputs, eos_id=-1, attention_mask=mask, **rules)
        assert all(torch.equal(row, alone[0]) for row in got)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16])
@pytest.mark.parametrize("gen_length", [1, 7, 8, 9])
def test_prompts_and_lengths_around_a_block_boundary(n, gen_length):
    rules = SHORT | dict(gen_length=gen_length)
    got = generate(load(), [prompt_of(n)], eos_id=-1, return_dict=True, **rules)
    blocks = -(-(n + gen_length) // 8) - n // 8
    assert got.num_tokens == [gen_length] and len(got.counters[0].forwards_per_block) == blocks
    assert got.counters[0].prefill_forwards == (n >= 8) and not (got.sequences == MASK).any()
    same = generate(load(), [prompt_of(n)], eos_id=-1, use_cache=False, **rules)
    assert torch.equal(same, got.sequences)


def test_the_last_position_of_the_model_may_be_used_and_no_more():
    prompt = prompt_of(1018)
    assert load().config.max_position_embeddings == 1024
    assert generate(load(), prompt, eos_id=-1, **SHORT | dict(gen_length=6)).shape == (1, 6)
    with pytest.raises(ValueError, match="gen_length=7: prompt 0 has 1018 tokens and the model 1024 positions"):
        generate(load(), prompt, eos_id=-1, **SHORT | dict(gen_length=7))


def test_a_mask_id_in_the_prompt_is_kept_as_a_token():
    prompt = prompt_of(13)
    prompt[3] = prompt[11] = MASK
    got = generate(load(), prompt, eos_id=-1, return_dict=True, trace=True, **SHORT)
    assert min(event.position for event in got.trace[0].events) == 13 and not (got.sequences == MASK).any()


# Ragged batches


LENGTHS = [13, 8, 3, 30, 1, 16, 47]
RULES = {
    "greedy": dict(threshold=0.5),
    "quota": dict(threshold=2.0, steps=3, minimal_topk=2),
    "editing": dict(threshold=0.3, editing_threshold=0.2, max_post_steps=2),
    "sampling": dict(threshold=0.3, temperature=0.9, top_k=20, top_p=0.95, seed=[5, -1, 0, 2**63 - 1, -(2**63), 7, 5]),
    "sampling and editing": dict(threshold=0.5, editing_threshold=0.4, temperature=1.3, seed=list(range(7))),
    "absent tail": dict(threshold=0.5, attend_tail=False),
    "hf-2.0": dict(threshold=0.5, profile="hf-2.0"),
    "hf-2.1": dict(threshold=0.5, profile="hf-2.1"),
}


def everything(out, i):
    """What a GenerateOutput says of row i; confidences apart, they may differ by roundings."""
    events = [event._replace(confidence=0.0) for event in out.trace[i].events]
    counters = {k: v for k, v in vars(out.counters[i]).items() if k != "prefill_s"}
    return out.sequences[i, : out.num_tokens[i]].tolist(), out.finish_reasons[i], events, counters


def confidences(out, i):
    return [event.confidence for event in out.trace[i].events]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_ragged_rows_equal_each_alone(rules):
    """A list of lists, right padding, left padding, both: tokens, traces and counters of each row alone."""
    prompts = [prompt_of(n, fill=3) for n in LENGTHS]
    eos = [prompts[0][0], 67]  # something that the model does say, and something in a prompt
    how = SHORT | dict(eos_id=eos, eos_early_stop=True, return_dict=True, trace=True) | rules
    seeds = rules.get("seed", [None] * len(prompts))
    alone = [generate(load(), [p], **how | dict(seed=s)) for p, s in zip(prompts, seeds, strict=True)]
    right = torch.full((len(prompts), 50), eos[0])
    right_mask = torch.zeros(len(prompts), 50, dtype=torch.int64)
    left, left_mask, middle, middle_mask = (t.clone() for t in (right, right_mask, right, right_mask))
    for i, p in enumerate(prompts):
        for ids, mask, begin in ((right, right_mask, 0), (left, left_mask, 50 - len(p)), (middle, middle_mask, 2)):
            ids[i, begin : begin + len(p)], mask[i, begin : begin + len(p)] = torch.tensor(p), 1
    for inputs, mask in ((prompts, None), (right, right_mask), (left, left_mask.bool()), (middle, middle_mask.float())):
        batch = generate(load(), inputs, attention_mask=mask, **how)
        for i, own in enumerate(alone):
            assert everything(batch, i) == everything(own, 0)
            assert confidences(batch, i) == pytest.approx(confidences(own, 0), abs=1e-4)
    backwards = generate(load(), prompts[::-1], **how | dict(seed=seeds[::-1] if "seed" in rules else None))
    assert [everything(backwards, 6 - i) for i in range(7)] == [everything(own, 0) for own in alone]


def test_rows_that_end_early_do_not_keep_others_or_change():
    prompts = [prompt_of(5), prompt_of(9)]
    full = generate(load(), prompts, eos_id=-1, **SHORT).tolist()
    eos, _ = token_first_seen(full[0], 1)
    got = generate(load(), prompts, eos_id=eos, eos_early_stop=True, return_dict=True, **SHORT)
    for row, counters, reason, prompt in zip(full, got.counters, got.finish_reasons, prompts, strict=True):
        own = generate(load(), prompt, eos_id=eos, eos_early_stop=True, return_dict=True, **SHORT)
        assert (reason == "eos") == (eos in row) and counters.denoise_forwards == own.counters[0].denoise_forwards


# Seeds


SAMPLING = SHORT | dict(eos_id=-1, temperature=1.0, threshold=0.9)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    prompt = prompt_of(5)
    first = generate(load(), prompt, seed=3, **SAMPLING)
    assert torch.equal(first, generate(load(), prompt, seed=3, **SAMPLING))
    others = [generate(load(), prompt, seed=seed, **SAMPLING) for seed in (4, -3, 3 + 2**32, 3 - 2**63)]
    assert len({tuple(t.flatten().tolist()) for t in (first, *others)}) == 5


def splitmix64(seed, i):
    """Output i, from 1 on, of SplitMix64 (Steele, Lea and Flood 2014), as an int64."""
    ones = 2**64 - 1
    z = (seed + i * 0x9E3779B97F4A7C15) & ones
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ones
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ones
    return struct.unpack("q", struct.pack("Q", z ^ (z >> 31)))[0]


def test_rows_of_one_seed_draw_from_it_and_their_number():
    assert splitmix64(1234567, 1) % 2**64 == 6457827717110365317  # a published output
    for seed in (3, 0, -1, 2**63 - 1, -(2**63)):
        seeds = [seed, *(splitmix64(seed, i) for i in range(1, 4))]
        rows = generate(load(), [prompt_of(5)] * 4, seed=seed, **SAMPLING)
        assert torch.equal(rows, generate(load(), [prompt_of(5)] * 4, seed=seeds, **SAMPLING))
        assert len({tuple(row.tolist()) for row in rows}) == 4  # equal prompts differ
        assert torch.equal(rows[:1], generate(load(), prompt_of(5), seed=seed, **SAMPLING))
        assert torch.equal(rows[:2], generate(load(), [prompt_of(5)] * 2, seed=seed, **SAMPLING))


def test_seeds_of_a_list_are_as_they_are():
    rows = generate(load(), [prompt_of(5)] * 3, seed=[3, 3, 4], **SAMPLING)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    for seeds in ((3, 3, 4), torch.tensor([3, 3, 4]), np.array([3, 3, 4])):
        assert torch.equal(rows, generate(load(), [prompt_of(5)] * 3, seed=seeds, **SAMPLING))
    one = generate(load(), prompt_of(5), seed=np.int64(4), **SAMPLING)
    assert torch.equal(one, rows[2:])


@pytest.mark.parametrize(
    "greedy", [dict(), dict(temperature=0.7, sampling_method="greedy"), dict(profile="hf-2.0")], ids=str
)
def test_greedy_decoding_leaves_torch_s_generator_alone(greedy):
    before = torch.get_rng_state()
    generate(load(), [prompt_of(5), prompt_of(9)], **SHORT | greedy)
    assert torch.equal(before, torch.get_rng_state())
    generate(load(), [prompt_of(5), prompt_of(9)], **SHORT | dict(temperature=1.0))
    assert not torch.equal(before, torch.get_rng_state())


def test_one_generator_draws_one_seed_per_row_in_row_order_once_per_call():
    prompts = [prompt_of(5), prompt_of(9), prompt_of(5)]
    rows = generate(load(), prompts, generator=torch.Generator().manual_seed(8), **SAMPLING)
    assert torch.equal(rows, generate(load(), prompts, generator=torch.Generator().manual_seed(8), **SAMPLING))
    assert not torch.equal(rows[0], rows[2])  # rows have seeds of their own
    fewer = generate(load(), prompts[:2], generator=torch.Generator().manual_seed(8), **SAMPLING)
    assert torch.equal(fewer, rows[:2])
    after = []
    for rules in (SAMPLING, SAMPLING | dict(gen_length=3), SAMPLING | dict(temperature=0.0)):
        generator = torch.Generator().manual_seed(8)
        generate(load(), prompts, generator=generator, **rules)
        after.append(torch.rand(1, generator=generator).item())
    assert len(set(after)) == 1  # what a call takes from its generator is the number of rows, nothing else


def test_a_list_of_generators_draws_one_seed_each():
    prompts = [prompt_of(5), prompt_of(9)]
    rows = generate(load(), prompts, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **SAMPLING)
    for seed, prompt, row in zip((1, 2), prompts, rows, strict=True):
        own = generate(load(), prompt, generator=torch.Generator().manual_seed(seed), **SAMPLING)
        assert torch.equal(own[0], row)


def test_without_a_generator_torch_s_own_is_used():
    prompt = prompt_of(5)
    torch.manual_seed(11)
    first, second = (generate(load(), prompt, **SAMPLING) for _ in range(2))
    torch.manual_seed(11)
    again = generate(load(), prompt, **SAMPLING)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_greedy_decoding_looks_at_no_seed():
    prompt = prompt_of(5)
    rows = [generate(load(), prompt, seed=s, eos_id=-1, **SHORT) for s in (1, 2)]
    rows.append(generate(load(), prompt, seed=1, eos_id=-1, sampling_method="greedy", **SHORT | dict(temperature=1.0)))
    rows.append(generate(load(), prompt, seed=1, eos_id=-1, sampling_method="multinomial", **SHORT))
    assert all(torch.equal(row, rows[0]) for row in rows)
    sampled = [generate(load(), prompt, seed=1, sampling_method=m, **SAMPLING) for m in ("auto", "multinomial")]
    assert torch.equal(*sampled) and not torch.equal(sampled[0], rows[0])


# Confidence of drawn tokens


NARROW = [dict(temperature=1e-3), dict(temperature=1e-30), dict(temperature=1e-60), dict(temperature=1.0, top_k=1),
          dict(temperature=1.0, top_p=1e-6), dict(temperature=3.0, top_p=1e-60)]  # fmt: skip


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("rules", [dict(), dict(editing_threshold=0.3, max_post_steps=4)], ids=["", "editing"])
def test_narrow_draws_are_greedy_decoding(narrow, rules):
    how = dict(
        gen_length=29, block_length=8, threshold=0.4, mask_id=MASK, eos_id=-1, seed=7, return_dict=True, trace=True
    )
    prompts = [prompt_of(5), prompt_of(9)]
    wanted = generate(load(), prompts, **how | rules)
    got = generate(load(), prompts, **how | rules | narrow)
    assert torch.equal(got.sequences, wanted.sequences) and got.trace == wanted.trace
    assert any(count > 1 for row in wanted.counters for count in row.forwards_per_block)


@pytest.mark.parametrize(
    "rules", [dict(temperature=0.5), dict(temperature=2.0), dict(temperature=1.0, top_k=3, top_p=0.7)]
)
def test_confidences_are_the_model_s_own_probabilities(rules):
    prompt = prompt_of(9)
    out = generate(
        load(), prompt, eos_id=-1, seed=1, return_dict=True, trace=True, **SHORT | rules | dict(threshold=2.0)
    )
    canvas = torch.full((24,), MASK)
    canvas[:9] = torch.tensor(prompt)
    for event in out.trace[0].events:  # one per step: nothing exceeds the threshold
        end = 8 * (event.block + 1)
        p = torch.softmax(load()(canvas[None, :end], block_length=8).logits[0, event.position].float(), -1)
        assert event.confidence == pytest.approx(float(p[event.token]), rel=1e-4)
        canvas[event.position] = event.token
    assert len(out.trace[0].events) == out.counters[0].denoise_forwards


@pytest.mark.parametrize("profile", ["hf-2.0", "hf-2.1", "sglang-lowconf", "sglang-joint"])
def test_under_the_profiles_confidences_are_those_of_the_draw(profile):
    how = dict(eos_id=-1, seed=1, profile=profile, return_dict=True, trace=True)
    out = generate(load(), prompt_of(8), temperature=1.0, top_k=1, **SHORT | dict(threshold=0.9) | how)
    commits = out.trace[0].first_commits().values()
    assert {event.confidence for event in commits} == {1.0} and len({event.step for event in commits}) == 2


# Special ids


def checkpoint_with(folder, config=None, generation=None, tokenizer=None):
    """A copy of "tiny" whose config.json, generation_config.json and tokenizer_config.json name these special ids."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "tiny" / "model.safetensors", folder)
    raw = json.loads((GOLDEN / "tiny" / "config.json").read_text())
    del raw["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(raw | (config or {})))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer is not None:
        names = {name.removesuffix("_id"): f"<{i}>" for name, i in tokenizer.items()}
        added = {str(i): {"content": f"<{i}>"} for i in tokenizer.values()}
        (folder / "tokenizer_config.json").write_text(json.dumps(names | {"added_tokens_decoder": added}))
    return LLaDA2Model.from_pretrained(folder, dtype=torch.float32, progress=False)


def ids(mask, eos, pad):
    return {"mask_token_id": mask, "eos_token_id": eos, "pad_token_id": pad}


@pytest.mark.parametrize(
    "sources, arguments, wanted",
    [
        (dict(config=ids(1, 2, 3)), {}, (1, (2,), 3)),
        (dict(config=ids(1, 2, 3), tokenizer=ids(11, 12, 13)), {}, (11, (12,), 13)),
        (
            dict(config=ids(1, 2, 3), tokenizer=ids(11, 12, 13), generation=ids(21, [22, 24], 23)),
            {},
            (21, (22, 24), 23),
        ),
        (dict(config=ids(1, 2, 3), generation=dict(eos_token_id=22)), {}, (1, (22,), 3)),
        (dict(config=ids(1, 2, 3), tokenizer=dict(mask_token_id=11)), {}, (11, (2,), 3)),
        (dict(generation=ids(21, 22, 23)), dict(mask_id=31, eos_ids=(32,), pad_id=33), (31, (32,), 33)),
        (dict(generation=ids(21, 22, 23)), dict(eos_ids=()), (21, (), 23)),
        (dict(config=dict(mask_token_id=1, eos_token_id=2)), {}, (1, (2,), 2)),  # without a pad id the EOS id
        (dict(config=dict(mask_token_id=1)), dict(eos_ids=(999, 5)), (1, (999, 5), 5)),
    ],
    ids=[
        "config",
        "tokenizer",
        "generation_config",
        "each alone",
        "each alone too",
        "argument",
        "no eos",
        "pad",
        "pad 2",
    ],
)
def test_special_ids_argument_generation_config_tokenizer_config(tmp_path, sources, arguments, wanted):
    assert resolve_ids(checkpoint_with(tmp_path, **sources), DecodeParams(**arguments)) == wanted


@pytest.mark.parametrize("source, file", [
    ("generation", "generation_config.json"), ("tokenizer", "tokenizer_config.json"), ("config", "config.json"),
])  # fmt: skip
def test_special_ids_of_a_folder_lie_in_the_vocabulary(tmp_path, source, file):
    for name in ("mask_token_id", "pad_token_id"):
        for bad in (256, 10**9):
            with pytest.raises(ValueError, match=f"{file}: {name}={bad}: expected .*0..255"):
                checkpoint_with(tmp_path, **{source: {name: bad}})
    assert checkpoint_with(tmp_path, **{source: {"mask_token_id": 255}}).special_ids == {"mask_token_id": 255}


def test_an_end_id_outside_the_vocabulary_means_none(tmp_path):
    model = checkpoint_with(tmp_path, config=ids(1, 2, 3), generation=dict(eos_token_id=256))
    assert resolve_ids(model, DecodeParams()) == (1, (), 3)
    model.save_pretrained(tmp_path / "again")
    assert LLaDA2Model.from_pretrained(tmp_path / "again", progress=False).special_ids == model.special_ids
    assert checkpoint_with(tmp_path, generation=dict(eos_token_id=[5, -1, 256])).special_ids["eos_token_id"] == (5,)


@pytest.mark.parametrize("config", [
    {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": {"content": "a"}}},
    {"added_tokens_decoder": {"1": "a"}}, {"added_tokens_decoder": {"1": {}}},
])  # fmt: skip
def test_tokenizer_files_that_make_no_sense_are_named(tmp_path, config):
    checkpoint_with(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokenizer_config.json .*added tokens without ids"):
        LLaDA2Model.from_pretrained(tmp_path, progress=False)


def test_special_ids_that_nobody_names_are_errors(tmp_path):
    model = checkpoint_with(tmp_path)
    with pytest.raises(ValueError, match="mask_id"):
        generate(model, [1, 2], gen_length=4, eos_id=3)
    with pytest.raises(ValueError, match="eos_id"):
        generate(model, [1, 2], gen_length=4, mask_id=3)
    assert generate(model, [1, 2], gen_length=4, mask_id=3, eos_id=-1).shape == (1, 4)


# LLaDA2.2


def test_a_2_2_checkpoint_decodes_as_plain_2_1():
    model, prompt = load("block22"), [t % 150 for t in prompt_of(11)]
    rules = dict(mask_id=155, gen_length=24, profile="hf-2.1", threshold=0.5, editing_threshold=0.3, eos_id=-1)
    got = generate(model, prompt, **rules)
    assert got.shape == (1, 24)
    assert torch.equal(got, generate(model, prompt, use_cache=False, **rules))
    batch = generate(model, [prompt, prompt[:3]], **rules)
    assert torch.equal(batch[:1], got)


# Hooks


def test_on_step_sees_every_step():
    seen = []

    def note(decoder, result):
        seen.append((result.output, [row.prompt_length for row in decoder.sequences], result.status))

    out = generate(
        load(), [prompt_of(5), prompt_of(9)], eos_id=-1, return_dict=True, on_step=note, **SHORT
    )  # fmt: skip
    assert len(seen) == max(c.denoise_forwards for c in out.counters)
    commits = sum(output.commit.sum(-1) for output, *_ in seen)
    assert commits.tolist() == [c.commits for c in out.counters]
    assert [sum(status[row][COMMITS] for *_, status in seen) for row in (0, 1)] == commits.tolist()
    output, lengths, _ = seen[0]
    assert output.token.shape == (2, 8) and lengths == [5, 9]


def test_the_progress_bar_counts_blocks_and_is_off_by_default(capfd):
    generate(load(), prompt_of(5), eos_id=-1, **SHORT)
    assert capfd.readouterr() == ("", "")
    generate(load(), prompt_of(5), eos_id=-1, progress=True, **SHORT | dict(gen_length=20))
    out, err = capfd.readouterr()
    assert out == "" and "Blocks: 100%" in err and "4/4" in err
    generate(load(), prompt_of(5), eos_id=67, eos_early_stop=True, progress=True, **SHORT | dict(gen_length=20))
    assert "4/4" in capfd.readouterr().err  # blocks that need no more work count as done
    generate(load(), prompt_of(21), eos_id=-1, progress=True, **SHORT | dict(gen_length=20))
    assert "4/4" in capfd.readouterr().err  # not those of the prompt


# Bad input


NAN, INF = float("nan"), float("inf")
OK = dict(inputs=[1, 2, 3], gen_length=8, mask_id=MASK)
REFUSED = [
    ("gen_length", 0), ("gen_length", -1), ("gen_length", 2.5), ("gen_length", True), ("gen_length", None),
    ("gen_length", 1022), ("gen_length", 2**31), ("block_length", 0), ("block_length", -8), ("block_length", 8.0),
    ("steps", 0), ("steps", -3), ("steps", NAN), ("minimal_topk", 0), ("minimal_topk", "1"), ("num_to_transfer", 2),
    ("max_post_steps", -1), ("max_post_steps", 0.5), ("temperature", -0.1), ("temperature", NAN), ("temperature", INF),
    ("temperature", "hot"), ("threshold", -0.01), ("threshold", NAN), ("threshold", None), ("editing_threshold", -0.5),
    ("editing_threshold", NAN), ("top_p", 0), ("top_p", -1.0), ("top_p", NAN), ("top_k", -1), ("top_k", 1.5),
    ("sampling_method", "beam"), ("sampling_method", None), ("profile", "hf-3.0"), ("profile", None), ("eos_id", 1.5),
    ("eos_id", "end"), ("eos_id", [1, None]), ("eos_id", True), ("mask_id", -1), ("mask_id", 256), ("mask_id", 2.0),
    ("pad_id", -1), ("eos_early_stop", "yes"), ("attend_tail", 1), ("seed", 2**63), ("seed", -(2**63) - 1),
    ("seed", 0.5), ("seed", [1, 2]), ("seed", "x"), ("generator", "x"), ("generator", [torch.Generator()] * 2),
    ("settle", "never"), ("pad_id", 256), ("pad_id", 10**6), ("pad_id", -1),
    ("inputs", [1, 256]), ("inputs", [-1]), ("inputs", [[1], [2, 300]]), ("inputs", []),
    ("inputs", [[1], 2]), ("inputs", [1, [2]]), ("inputs", [1.0]), ("inputs", [True]), ("inputs", [2**64]),
    ("inputs", "text"), ("inputs", ["text"]), ("inputs", None), ("inputs", 5),
]  # fmt: skip
TENSORS = [
    ("inputs", torch.tensor([1.0, 2.0]), "float32"),
    ("inputs", torch.tensor([True, False]), "bool"),
    ("inputs", np.array([1.0, 2.0]), "float64"),
    ("inputs", np.array([1, 2], dtype=np.uint64), "uint64"),
    ("inputs", np.array([[1], [1, 2]], dtype=object), "object"),
    ("inputs", [torch.ones(2, 3).long()], "[2, 3]"),
    ("inputs", [torch.ones(3)], "float32"),
    ("inputs", [np.float32(1)], "1.0"),
    ("inputs", [[1] * 5000 + ["x"]], "at 5000, got 'x'"),
    ("inputs", [[1] * 5000, "x" * 5000], "str"),
    ("logits_processor", [print], "logits_processor=[<built-in"),
    ("max_new_tokens", 4, "max_new_tokens=4"),
    ("do_sample", True, "do_sample=True"),
    ("num_beams", 2, "num_beams=2"),
    ("eos_id", np.array([1.5]), "1.5"),
    ("inputs", torch.tensor(3), "[]"),
    ("inputs", torch.ones(1, 1, 2, dtype=torch.int64), "[1, 1, 2]"),
    ("inputs", torch.tensor([[1, 256]]), "256"),
    ("inputs", torch.empty(0, 3, dtype=torch.int64), "none"),
]
TOGETHER = [
    (dict(profile="hf-2.1", num_to_transfer=0), "num_to_transfer", "0"),
    (dict(profile="hf-2.0", num_to_transfer=2), "num_to_transfer", "2"),
    (dict(profile="hf-2.0", editing_threshold=0.5), "editing_threshold", "0.5"),
    (dict(profile="hf-2.0", attend_tail=False), "attend_tail", "False"),
    (dict(profile="hf-2.1", attend_tail=False), "attend_tail", "False"),
    (dict(seed=1, generator=torch.Generator()), "seed", "generator"),
    (dict(attention_mask=torch.ones(1, 3)), "attention_mask", ""),
    (dict(inputs=torch.ones(2, 3).long(), attention_mask=torch.ones(2, 4)), "attention_mask", "[2, 4]"),
    (dict(inputs=torch.ones(2, 3).long(), attention_mask=torch.ones(3)), "attention_mask", "[3]"),
    (dict(inputs=torch.ones(3).long(), attention_mask=torch.ones(1, 3)), "attention_mask", "[1, 3]"),
    (dict(inputs=torch.ones(3).long(), attention_mask=[1, 1]), "attention_mask", "[2]"),
    (dict(inputs=torch.ones(1, 3).long(), attention_mask=[[1, 1], [1]]), "attention_mask", "[[1, 1], [1]]"),
    (dict(inputs=torch.ones(3).long(), attention_mask="111"), "attention_mask", "str"),
    (dict(inputs=torch.ones(3).long(), attention_mask={"x": 1}), "attention_mask", "dict"),
    (dict(inputs=torch.ones(3).long(), attention_mask=["1", "1", "1"]), "attention_mask", "['1', '1', '1']"),
    *[
        (dict(inputs=torch.ones(3).long(), attention_mask=made([1, odd, 0])), "attention_mask", f"{odd}")
        for odd in (0.5, 2, -1, NAN, -INF, -1e9)
        for made in (torch.tensor, np.array, list)
    ],
    (dict(seed=[1] * 5000), "seed", "[1, 1, 1"),
    (dict(generator=[1] * 5000), "generator", "[1, 1, 1"),
    (dict(settle="x" * 5000), "settle", "'xxx"),
    (dict(mask_id=None), "mask_id", "None"),
]
BAD = [(OK | {name: value}, name, repr(value)) for name, value in REFUSED]
BAD += [(OK | {name: value}, name, text) for name, value, text in TENSORS]
BAD += [(OK | arguments, name, text) for arguments, name, text in TOGETHER]
PARTS_SAID = {"inputs", "generator", "eos_id", "logits_processor"}  # only part of the value is in the message


@pytest.mark.parametrize("arguments, name, value", BAD, ids=[f"{name}-{i}" for i, (_, name, _) in enumerate(BAD)])
def test_bad_input_is_refused_by_name_and_value_before_any_forward(monkeypatch, arguments, name, value):
    def forward(*_):
        raise AssertionError("a forward was run")

    model = load()
    for entrance in ("forward", "forward_blocks", "lm_logits"):
        monkeypatch.setattr(model, entrance, forward)
    with pytest.raises(ValueError) as refused:
        generate(model, **arguments)
    message = str(refused.value)
    assert name in message and any(
        word in message for word in ("expected", "outside", "positions", "give", "only with")
    )
    if name not in PARTS_SAID:
        assert value in message
    assert "\n" not in message and len(message) < 300


ROWS = [[3, 5, 200], [7], [4, 4]]


@pytest.mark.parametrize("inputs", [
    [torch.tensor(row, dtype=dtype) for row, dtype in zip(ROWS, (torch.int64, torch.int32, torch.uint8), strict=True)],
    [np.array(row, dtype=dtype) for row, dtype in zip(ROWS, (np.int64, np.int16, ">u4"), strict=True)],
    [[np.int32(i) for i in row] for row in ROWS],
    [[torch.tensor(i) for i in row] for row in ROWS],
    tuple(torch.tensor([row]) for row in ROWS),
    [tuple(ROWS[0]), np.array(ROWS[1]), torch.tensor(ROWS[2])],
], ids=["tensors", "arrays", "numpy integers", "single tensors", "tensors of one row", "mixed"])  # fmt: skip
def test_prompts_of_every_integer_type(inputs):
    wanted = generate(load(), ROWS, eos_id=-1, **SHORT)
    assert torch.equal(generate(load(), inputs, eos_id=-1, **SHORT), wanted)
    assert torch.equal(generate(load(), inputs[0], eos_id=-1, **SHORT), wanted[:1])


@pytest.mark.parametrize("given", [
    lambda mask: mask.bool(), lambda mask: mask.float(), lambda mask: mask.to(torch.uint8), lambda mask: mask.tolist(),
    lambda mask: mask.bool().tolist(), lambda mask: [*mask], lambda mask: mask.numpy() > 0,
    lambda mask: mask.numpy().astype(np.float32), lambda mask: np.flip(mask.flip(1).numpy(), 1),
    lambda mask: mask.numpy().astype(">u2"),
])  # fmt: skip
def test_padding_masks_of_every_type(given):
    ids, mask = torch.tensor([[3, 5, 100], [9, 9, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    wanted = generate(load(), ids, attention_mask=mask, eos_id=-1, **SHORT)
    assert torch.equal(generate(load(), ids, attention_mask=given(mask), eos_id=-1, **SHORT), wanted)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"])
def test_padded_prompts_of_every_integer_type(dtype):
    ids, mask = torch.tensor([[3, 5, 100], [9, 9, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    wanted = generate(load(), ids, attention_mask=mask, eos_id=-1, **SHORT)
    array = ids.numpy().astype(dtype)
    assert torch.equal(generate(load(), array, attention_mask=mask.numpy(), eos_id=-1, **SHORT), wanted)
    tensor = ids.to(getattr(torch, dtype))
    assert torch.equal(generate(load(), tensor, attention_mask=mask, eos_id=-1, **SHORT), wanted)


def test_numbers_of_numpy_and_arguments_that_change_nothing():
    rules = dict(eos_id=[5, 6], mask_id=255, seed=[1, 2], gen_length=8, temperature=1.5, pad_id=9)
    wanted = generate(load(), ROWS[:2], **rules)
    given = dict(eos_id=np.array([5, 6]), mask_id=np.int64(255), seed=np.array([1, 2]), gen_length=np.int32(8),
                 temperature=np.float32(1.5), pad_id=np.uint8(9))  # fmt: skip
    assert torch.equal(generate(load(), ROWS[:2], **given), wanted)
    given = rules | dict(eos_id=torch.tensor([5, 6]), seed=[np.int64(1), 2])
    assert torch.equal(generate(load(), ROWS[:2], **given), wanted)
    habits = dict(logits_processor=[], stopping_criteria=(), num_beams=1, do_sample=True, repetition_penalty=1.0)
    assert torch.equal(generate(load(), ROWS[:2], **rules, **habits), wanted)


def test_what_looks_odd_but_is_allowed():
    """Thresholds above 1 are never reached; filters that filter nothing; more steps than positions."""
    plain = generate(load(), [1, 2, 3], eos_id=-1, **SHORT | dict(threshold=2.0))
    odd_ones = (
        dict(threshold=INF), dict(steps=2**31 - 1), dict(top_k=0), dict(top_p=1.0), dict(top_p=7), dict(top_k=None),
        dict(editing_threshold=INF, max_post_steps=2**31 - 1),
    )  # fmt: skip
    for odd in odd_ones:
        assert torch.equal(generate(load(), [1, 2, 3], eos_id=-1, **SHORT | dict(threshold=2.0) | odd), plain)
    sampled = generate(load(), [1, 2, 3], seed=1, **SAMPLING)
    for odd in (dict(top_k=VOCAB), dict(top_k=2**31 - 1), dict(top_k=0), dict(top_p=1.5)):
        assert torch.equal(generate(load(), [1, 2, 3], seed=1, **SAMPLING | odd), sampled)
    rules = SHORT | dict(profile="hf-2.1", editing_threshold=2.0)
    wanted = generate(load(), [1, 2, 3], eos_id=-1, **rules)
    assert torch.equal(generate(load(), [1, 2, 3], eos_id=-1, **rules | dict(max_post_steps=2**31 - 1)), wanted)


def test_nan_logits_are_an_error_naming_row_and_step():
    model = copy.deepcopy(load())
    model.word_embeddings.weight[251] = NAN
    prompts = [prompt_of(5), [*prompt_of(5), 251], prompt_of(9)]
    with pytest.raises(RuntimeError, match="row 1: .* step 0 of block 0"):
        generate(model, prompts, eos_id=-1, **SHORT)
    assert torch.equal(
        generate(model, prompts[::2], eos_id=-1, **SHORT), generate(load(), prompts[::2], eos_id=-1, **SHORT)
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64, np.int32])
def test_lengths_of_numpy(dtype):
    model, options = load(), {"block_length": 8, "mask_id": 255, "eos_id": -1, "return_dict": True}
    wanted = generate(model, [list(range(100))], gen_length=64, **options)
    assert torch.equal(generate(model, [list(range(100))], gen_length=dtype(64), **options).sequences, wanted.sequences)
