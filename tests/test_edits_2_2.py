"""LLaDA2.2 through the faces: deletions and insertions alone and in a batch, streamed, traced, and what is refused."""

import functools
import warnings
from pathlib import Path

import pytest
import torch

from llada2_fast import Engine, EngineConfig, LLaDA2Model, demo
from llada2_fast.config import DecodeParams
from llada2_fast.decoding.decoder import BlockDecoder, prefill_all
from llada2_fast.decoding.graph_runner import GraphRunner
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.decoding.sequence import Sequence
from llada2_fast.demo import tasks
from llada2_fast.generate import generate
from llada2_fast.kernels.refine import SpecialIds
from llada2_fast.weights.special_tokens import load_tokenizer, release_in

GOLDEN = Path(__file__).parent / "golden"
MASK, DELETE, SPLIT, LENGTH = 155, 153, 154, 8  # of the golden set "block22"
CHANGES = {"mask_id": MASK, "eos_ids": ()}


@functools.cache
def load(name="block22"):
    folder = demo.path("2.2") if name == "demo" else GOLDEN / name
    return LLaDA2Model.from_pretrained(folder, dtype=torch.float32, progress=False)


def prompt_of(n):
    return torch.randint(150, (n,), generator=torch.Generator().manual_seed(n)).tolist()


JOBS = [
    (3, dict(gen_length=30, threshold=0.3, editing_threshold=0.0)),
    (8, dict(gen_length=17, threshold=0.1, editing_threshold=0.05, max_post_steps=3)),
    (13, dict(gen_length=21, threshold=0.5)),  # no editing: neither id is ever written
    (16, dict(gen_length=16, threshold=0.2, editing_threshold=0.1, max_post_steps=0)),
    (1, dict(gen_length=24, threshold=0.2, editing_threshold=0.0, temperature=1.0, seed=5)),
    (21, dict(gen_length=20, threshold=0.2, editing_threshold=0.0, temperature=0.7, top_k=9, top_p=0.9, seed=6)),
    (5, dict(gen_length=24, profile="sglang-indel", threshold=0.4)),
    (11, dict(gen_length=24, profile="hf-2.1", threshold=0.5, editing_threshold=0.3)),
    (9, dict(gen_length=14, threshold=0.4, editing_threshold=0.0, attend_tail=False, max_post_steps=2)),
    (40, dict(gen_length=16, threshold=2.0, editing_threshold=2.0, steps=3)),
    (7, dict(gen_length=16, profile="sglang-lowconf", threshold=0.2)),
]


def engine_of(**changes):
    return Engine(load(), EngineConfig(mask_id=MASK, cache_tokens=2048, **changes))


@functools.cache
def alone():
    """What each job gets by itself."""
    outputs = []
    for n, params in JOBS:
        (output,) = engine_of(trace=True).generate([prompt_of(n)], DecodeParams(**CHANGES | params))
        outputs.append(output)
    return outputs


def facts(output):
    return output.token_ids, output.confidences, output.steps, output.trace.events, output.counters.forwards_per_block


@pytest.mark.parametrize(
    "config", [dict(), dict(graphs=True, capture=False), dict(graphs=True, capture=False, overlap=False)], ids=str
)
def test_a_row_gets_in_a_batch_what_it_gets_alone(config):
    params = [DecodeParams(**CHANGES | params) for _, params in JOBS]
    outputs = engine_of(trace=True, max_num_seqs=7, **config).generate([prompt_of(n) for n, _ in JOBS], params)
    for (_, params), got, wanted in zip(JOBS, outputs, alone(), strict=True):
        assert facts(got) == facts(wanted), params


def test_what_never_reaches_an_answer_and_how_long_it_takes():
    kinds = set()
    for (_, params), output in zip(JOBS, alone(), strict=True):
        kinds |= {event.kind for event in output.trace.events}
        if params.get("profile") == "hf-2.1":  # there the ids are tokens like others
            continue
        assert not {MASK, DELETE, SPLIT} & set(output.token_ids) and len(output.token_ids) == params["gen_length"]
        if params.get("editing_threshold") is not None:
            most = LENGTH + params.get("max_post_steps", 16) + 1
            assert max(output.counters.forwards_per_block) <= most
        written = {event.token for event in output.trace.events if event.kind in ("commit", "edit")}
        assert not {DELETE, SPLIT} & written
        assert params.get("profile") == "sglang-indel" or MASK not in written
    assert kinds == {"commit", "edit", "delete", "insert", "move"}


def test_a_token_that_is_pushed_onto_an_equal_one_has_moved():
    """What stands there is another token, with a confidence of its own; masks behind masks are as they were."""
    row = Sequence([], DecodeParams(8, editing_threshold=0.0), 0, (), 8, SpecialIds(MASK, DELETE, SPLIT), trace=True)
    row.begin()
    masks, none = [MASK] * 4, [-1] * 4
    row.take_step(
        [0, 4, 4, 0, -1, 1, 0, 8], ([2, 2, 3, 4, *masks], [0] * 4 + none, [0.5, 0.6, 0.7, 0.8] + [0.0] * 4, none * 2)
    )
    chosen = [DELETE, -1, -1, -1, *none]
    row.take_step(
        [0, 5, 0, 1, -1, 2, 0, 4], ([2, 3, 4, MASK, *masks], [0] * 3 + [-1, *none], [0.6, 0.7, 0.8] + [0.0] * 5, chosen)
    )
    moved = [(event.position, event.token, event.confidence) for event in row.events if event.kind == "move"]
    assert moved == [(0, 2, 0.6), (1, 3, 0.7), (2, 4, 0.8), (3, MASK, 0.0)]
    assert [event.position for event in row.events if event.kind == "delete"] == [0]


def test_what_a_capture_tries_out_leaves_no_trace():
    """A graph is captured by a step that is taken back, in the middle of blocks, too."""
    cache, lanes = load().new_cache(8, LENGTH), Lanes(2, LENGTH, SpecialIds(MASK, DELETE, SPLIT), pages=4)
    decoder, taken_back = BlockDecoder(GraphRunner(load(), cache, lanes, capture=False)), 0
    for n in (8, 16):
        row = Sequence(prompt_of(n), DecodeParams(16, threshold=0.3, editing_threshold=0.0), n, (), LENGTH, lanes.ids)
        row.pages = cache.allocate(row.num_blocks)
        prefill_all(decoder, [row])
        decoder.admit(row)
    while rows := decoder.running():
        kept = [tensor.clone() for tensor in lanes.changing]
        graph = decoder.runner.graph(2, 0)
        graph.load([row.lane for row in rows], False)
        with torch.inference_mode():
            graph.run()
        taken_back += sum(not torch.equal(a, b) for a, b in zip(kept, lanes.changing, strict=True))
        for tensor, before in zip(lanes.changing, kept, strict=True):
            tensor.copy_(before)
        decoder.step(rows)
    ids = [row.answer() for row in decoder.sequences if row]
    wanted = [
        generate(load(), prompt_of(n), gen_length=16, threshold=0.3, editing_threshold=0.0, mask_id=MASK, eos_id=-1)
        for n in (8, 16)
    ]
    assert ids == [tokens[0].tolist() for tokens in wanted] and taken_back > 20


def test_the_events_make_up_the_answer():
    for (n, _), output in zip(JOBS, alone(), strict=True):
        last = output.trace.commits()
        assert [last[n + i].token for i in range(len(output.token_ids))] == output.token_ids
        assert [last[n + i].confidence for i in range(len(output.token_ids))] == output.confidences


def test_no_cache_and_separate_settling_give_the_same():
    for n, params in JOBS:
        rules = {k: v for k, v in params.items() if k != "seed"} | dict(
            mask_id=MASK, eos_id=-1, seed=params.get("seed")
        )
        wanted = generate(load(), prompt_of(n), **rules)
        assert torch.equal(wanted, generate(load(), prompt_of(n), use_cache=False, **rules))
        assert torch.equal(wanted, generate(load(), prompt_of(n), settle="separate", **rules))


@pytest.mark.parametrize("n, params", [JOBS[0], JOBS[4]])
def test_a_stream_never_takes_anything_back(n, params):
    engine = engine_of()
    request = engine.add_request(prompt_of(n), DecodeParams(**CHANGES | params), top_logprobs=3)
    given, listed, own = [], [], 0
    for event in engine.stream(request):
        if event.kind == "commit":
            assert event.start == len(given)
            given += event.token_ids
            listed += event.top_logprobs
    assert given == request.output.token_ids
    for token, confidence, top in zip(given, request.output.confidences, listed, strict=True):
        if params.get("temperature"):
            continue
        known = {i: logprob for i, logprob in top if i not in (DELETE, SPLIT)}  # a token's list moves with it
        likeliest = max(known, key=known.get)
        if token == likeliest:  # else it was written where text came second to nothing
            assert known[token] == pytest.approx(torch.tensor(confidence).log().item(), abs=1e-4)
        own += token == likeliest
    assert params.get("temperature") or own >= len(given) - 2


def test_editing_repairs_what_fast_decoding_breaks():
    """The embedded variant: at a low threshold words are left out and come twice."""
    tokenizer, prompts = load_tokenizer(demo.path("2.2")), tasks.sample("spell", 24, seed=3)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    right, kinds = {}, set()
    for name, editing in (("off", {}), ("on", {"editing_threshold": 0.5})):
        rules = dict(threshold=0.4, gen_length=64, eos_early_stop=True, return_dict=True, trace=True)
        out = load("demo").generate(rows, **rules, **editing)
        texts = [tokenizer.decode(ids[: n - 1]) for ids, n in zip(out.sequences, out.num_tokens, strict=True)]
        right[name] = sum(tasks.check("spell", *pair) for pair in zip(prompts, texts, strict=True))
        kinds |= {event.kind for trace in out.trace for event in trace.events}
    assert right["on"] >= right["off"] + 3 and kinds >= {"delete", "insert"}


# What is refused, before any forward


@pytest.mark.parametrize(
    "rules, message",
    [
        (dict(profile="sglang-joint"), "profile='sglang-joint': the checkpoint has delete_token_id and split_token_id"),
        (dict(profile="diffusers", editing_threshold=0.5), "profile='diffusers': .*'sglang-indel'"),
        (dict(profile="hf-2.0"), "profile='hf-2.0'"),
        (dict(editing_threshold=0.5, max_post_steps=65), "max_post_steps=65: expected at most 64"),
        (dict(editing_threshold=0.5, edit_window=1), "edit_window=1: expected 0 where tokens are deleted"),
        (dict(editing_threshold=0.5, policy="entropy"), "policy='entropy': expected 'threshold' where tokens"),
        (dict(policy="self_speculative"), "policy='self_speculative': expected another one where experts are chosen"),
        (dict(editing_threshold=0.5, canvas=[None] * 7 + [3]), "canvas: expected none where tokens are deleted"),
        (dict(profile="sglang-indel", temperature=0.5), "temperature=0.5: expected 0 under profile='sglang-indel'"),
        (dict(profile="sglang-indel", canvas=[None] * 7 + [3]), "canvas: expected none under profile='sglang-indel'"),
        (dict(mask_id=DELETE), "mask_id: expected other ids than the checkpoint's delete_token_id=153"),
        (dict(eos_id=(3, SPLIT)), "eos_ids: expected other ids than the checkpoint's split_token_id=154"),
    ],
)
def test_what_cannot_be_done_with_a_2_2_checkpoint_is_refused_by_name(rules, message):
    with pytest.raises(ValueError, match=message):
        generate(load(), prompt_of(3), **dict(mask_id=MASK, eos_id=-1, gen_length=8) | rules)


def test_a_checkpoint_without_the_ids_is_refused_by_name():
    tiny = load("tiny")
    rules = dict(mask_id=255, eos_id=252, gen_length=8, profile="sglang-indel")
    with pytest.raises(ValueError, match="profile='sglang-indel': .* no delete_token_id and no split_token_id"):
        generate(tiny, [1, 2], **rules)
    with pytest.raises(ValueError, match="no delete_token_id and no split_token_id"):
        Engine(tiny, EngineConfig(mask_id=255)).add_request(
            [1, 2], DecodeParams(8, profile="sglang-indel", mask_id=255, eos_ids=())
        )


def test_a_canvas_without_editing_and_the_diffusers_rules_are_there():
    canvas = [7, None, None, None, 9, None, None, None]
    got = generate(load(), prompt_of(3), mask_id=MASK, eos_id=-1, canvas=canvas)
    assert got[0, 0] == 7 and got[0, 4] == 9 and not {MASK, DELETE, SPLIT} & set(got[0].tolist())
    got = generate(load(), prompt_of(3), mask_id=MASK, eos_id=-1, gen_length=24, profile="diffusers", threshold=0.1)
    assert not {MASK, DELETE, SPLIT} & set(got[0].tolist())


# Which LLaDA2 it is


@pytest.mark.parametrize(
    "name, release",
    [
        ("inclusionAI/LLaDA2.0-mini", "2.0"), ("cache/models--inclusionAI--LLaDA2.1-flash/snapshots/1a2b", "2.1"),
        ("LLaDA2.0/llada-2.2-flash", "2.2"), ("LLaDA2.0/runs/llada21-mini", "2.1"), ("somewhere/model", None),
        ("LLaDA2-mini", None), (None, None),
    ],
)  # fmt: skip
def test_the_release_is_what_the_name_says(name, release):
    assert release_in(name) == release


def test_editing_with_a_2_0_checkpoint_is_warned_of(tmp_path):
    folder = tmp_path / "LLaDA2.0-mini"
    folder.symlink_to(GOLDEN / "tiny")
    model = LLaDA2Model.from_pretrained(folder, dtype=torch.float32, progress=False)
    rules = dict(mask_id=255, eos_id=252, gen_length=8)
    with pytest.warns(UserWarning, match="editing_threshold=0.5: the checkpoint calls itself LLaDA2.0"):
        generate(model, [1, 2], editing_threshold=0.5, **rules)
    with pytest.warns(UserWarning, match="LLaDA2.0"):
        params = DecodeParams(8, editing_threshold=0.5, mask_id=255, eos_ids=())
        Engine(model, EngineConfig(mask_id=255)).generate([[1, 2]], params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [1, 2], **rules)
        generate(load("tiny"), [1, 2], editing_threshold=0.5, **rules)
