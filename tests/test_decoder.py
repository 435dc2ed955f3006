"""The refinement loop: every recorded decoding step by step, caches, counters, failures and what it never touches."""

import copy
import functools
import json
import math
import time
from collections import Counter
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path

import pytest
import torch

from llada2_fast.cache import PagedKVCache
from llada2_fast.config import DecodeParams
from llada2_fast.decoding import decoder as decoder_module
from llada2_fast.decoding.decoder import BlockDecoder, decode_all, prefill_all
from llada2_fast.decoding.inputs import special_ids
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.decoding.runner import CachedForward, EagerRunner
from llada2_fast.decoding.sequence import Phase, Sequence
from llada2_fast.decoding.trace import Trace
from llada2_fast.kernels import refine
from llada2_fast.model import LLaDA2Model
from tests.rounding import rules_of, undecided_from

GOLDEN = Path(__file__).parent / "golden"
MASK, EOS, VOCAB = 255, 252, 256  # of the golden set "tiny"


@functools.cache
def load(name="tiny"):
    return LLaDA2Model.from_pretrained(GOLDEN / name, dtype=torch.float32, progress=False)


@functools.cache
def recorded(name):
    return json.loads((GOLDEN / name / "generate.json").read_text())["cases"]


class Watched(CachedForward):
    """Keeps what every row was fed: fed[lane] = [[end of the block, its tokens], ...], and each plan's `filters`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fed, self.filters = {}, []

    def __call__(self, plan, state, needed):
        self.filters.append(plan.filters)
        for step in plan.steps:
            end = (step.block + 1) * self.cache.block_length
            self.fed.setdefault(step.lane, []).append([end, state.tokens[step.lane].tolist()])
        return super().__call__(plan, state, needed)


class Made:
    """A decoder and the rows that were made for it; close() and open() take a row out of its lane and put it in."""

    def __init__(self, decoder, rows, settle, eos):
        self.decoder, self.rows, self.settle, self.eos = decoder, rows, settle, eos
        self.forward, self.state, self.cache = decoder.runner.forward, decoder.lanes.state, decoder.runner.forward.cache

    def running(self):
        return [row for row in self.rows if row.running]

    def run(self):
        decode_all(self.decoder, self.rows, settle=self.settle)

    def step(self, rows):
        return self.decoder.step(rows)

    def open(self, row):
        row.pages = self.cache.allocate(row.num_blocks)
        if self.forward.cached:
            prefill_all(self.decoder, [row])
        self.decoder.admit(row)

    def close(self, row):
        self.decoder.release(row)
        self.cache.free(row.pages)
        row.pages = ()


def sequence(job, length=8, ids=None):
    prompt, params, seed, eos = job
    return Sequence(list(prompt), params, seed, eos, length, ids or refine.SpecialIds(MASK), trace=True)


def start(model, jobs, length=8, settle="carry", cached=True, mask=MASK, spare=0):
    """A decoder with one row per job (prompt, DecodeParams, seed, eos ids); every page is its own and none is left."""
    ids = special_ids(model.config, mask)
    rows = [sequence(job, length, ids) for job in jobs]
    cache = PagedKVCache(model.config, spare + sum(r.num_blocks for r in rows), length, model.dtype, model.device)
    cache.k.fill_(float("nan"))  # what nobody wrote must not be read
    cache.v.fill_(float("nan"))
    lanes = Lanes(len(jobs), length, ids, max_eos=max(1, *(len(eos) for *_, eos in jobs)))
    made = Made(BlockDecoder(EagerRunner(Watched(model, cache, cached), lanes)), rows, settle, [job[3] for job in jobs])
    for row in rows:
        row.pages = cache.allocate(row.num_blocks)
    if cached:
        prefill_all(made.decoder, rows)
    for row in rows:
        made.decoder.admit(row)
    return made


def finished(*args, **kwargs):
    made = start(*args, **kwargs)
    made.run()
    return made


def golden_job(case):
    rules = {k: v for k, v in rules_of(case).items() if k not in ("mask_id", "eos_id", "block_length")}
    return case["prompt"], DecodeParams(**rules), 0, (case["params"]["eos_id"],)


def modes(name):
    yield dict()
    if name == "tiny":
        yield dict(settle="separate")
        yield dict(cached=False)


@pytest.mark.parametrize("name", ["tiny", "group", "variant", "flat", "moe256", "bf16"])
def test_recorded_decodings_step_by_step(name):
    """All cases of a set with one block length at once: what every forward is fed, their number, canvas, output."""
    seen = 0
    for length in (4, 8, 32):
        cases = [case for case in recorded(name) if case["params"]["block_length"] == length]
        for mode in modes(name):
            made = finished(
                load(name), [golden_job(c) for c in cases], length, mask=cases[0]["params"]["mask_id"], **mode
            )
            for lane, (row, case) in enumerate(zip(made.rows, cases, strict=True)):
                what = (name, case["version"], case["label"], mode)
                fed = made.forward.fed.get(lane, [])
                if fed != case["trace"]:  # the step before the first that was fed otherwise has written otherwise
                    unlike = next(i for i, pair in enumerate(zip_longest(fed, case["trace"])) if pair[0] != pair[1])
                    assert undecided_from(load(name), case) < unlike, what
                    continue
                assert row.answer() == case["output"], what
                assert row.counters.denoise_forwards == len(fed) == case["num_forwards"], what
                assert row.canvas[: len(case["final_canvas"])] == case["final_canvas"], what
        seen += len(cases)
    assert seen == 88


@pytest.mark.parametrize("mode", [dict(), dict(settle="separate"), dict(cached=False)], ids=str)
def test_recorded_decodings_of_2_2_step_by_step(mode):
    """Deletions and insertions as SGLang's JointThresholdInDel decides them, 32 rows at once; it spends one forward
    more on a block that its last step has changed. The events alone give the blocks that are fed, too."""
    cases = recorded("block22")
    made = finished(load("block22"), [golden_job(case) for case in cases], 8, mask=155, **mode)
    kinds = Counter()
    for lane, (row, case) in enumerate(zip(made.rows, cases, strict=True)):
        fed, theirs = made.forward.fed[lane], case["trace"]
        if row.answer() != case["output"]:
            assert undecided_from(load("block22"), case) < math.inf, case["label"]
            continue
        assert row.canvas[: len(case["final_canvas"])] == case["final_canvas"], case["label"]
        assert row.counters.denoise_forwards == len(fed)
        replayed, forward = list(prompt_and_masks(row)), 0
        for block, group in groupby(fed, key=lambda step: step[0]):
            own, wanted = list(group), [step for step in theirs if step[0] == block]
            assert own == wanted[: len(own)], case["label"]
            assert len(wanted) - len(own) in (0, 1)
            for _, tokens in own:
                assert replayed[block - 8 : block] == tokens
                for event in row.events:
                    if event.step == forward and event.kind not in ("delete", "insert"):
                        assert event.old == replayed[event.position] or event.kind != "move"
                        replayed[event.position] = event.token
                forward += 1
            if len(wanted) > len(own):
                assert wanted[-1][1] == row.ids[block - 8 : block]
        kinds.update(event.kind for event in row.events)
    assert min(kinds[kind] for kind in ("commit", "edit", "delete", "insert", "move")) > 5


def prompt_and_masks(row):
    return [*row.prompt, *[row.mask_id] * (row.num_blocks * row.block_length - len(row.prompt))]


def job(n=13, gen_length=21, seed=0, eos=(), fill=0, **rules):
    """A random prompt of n tokens, without special ids, and how to continue it."""
    generator = torch.Generator().manual_seed(1000 * n + fill)
    return torch.randint(250, (n,), generator=generator).tolist(), DecodeParams(gen_length, **rules), seed, eos


MIXED = [
    job(13, 21, threshold=0.5),
    job(8, 16, threshold=0.3, steps=3, eos=(EOS, 17), eos_early_stop=True),
    job(2, 9, threshold=0.6, editing_threshold=0.3, max_post_steps=3),
    job(30, 5, threshold=0.4, attend_tail=False),
    job(47, 24, threshold=0.2, temperature=0.8, top_k=5, top_p=0.9, seed=77),
    job(1, 40, threshold=0.7, editing_threshold=0.0, max_post_steps=2, temperature=1.0, seed=-3),
    job(16, 17, threshold=2.0, minimal_topk=3),
    job(21, 11, profile="hf-2.1", threshold=0.5, editing_threshold=0.4),
    job(5, 19, profile="hf-2.0", threshold=0.5, steps=5, eos_early_stop=True, eos=(EOS,)),
]


def story(row):
    """All that a row's decoding says of it; confidences may differ by roundings."""
    events = [event._replace(confidence=None) for event in row.events]
    counters = {k: v for k, v in vars(row.counters).items() if k not in ("settle_forwards", "prefill_s")}
    confidences = pytest.approx([event.confidence for event in row.events], abs=1e-4)
    return row.answer(), row.finish_reason, events, counters, confidences


@functools.cache
def alone():
    """The story of every row of MIXED, decoded alone."""
    return [story(finished(load(), [own]).rows[0]) for own in MIXED]


def stories(made):
    """As alone(), but the confidences are plain numbers: what is compared with an approx must not be one."""
    return [(*story(row)[:4], [event.confidence for event in row.events]) for row in made.rows]


def test_rows_together_equal_each_alone():
    made = finished(load(), MIXED)
    assert stories(made) == alone()
    assert {text[1] for text in alone()} <= {"eos", "length"}


def test_settle_modes_give_the_same_tokens_and_separate_settling_is_counted():
    made = finished(load(), MIXED, settle="separate")
    assert stories(made) == alone()
    for row in made.rows:
        changed_last = 0
        blocks = len(row.counters.forwards_per_block)
        for i in range(blocks - 1):  # the last block is never settled
            last = sum(row.counters.forwards_per_block[: i + 1]) - 1
            changed_last += any(event.step == last for event in row.events)
        assert row.counters.settle_forwards == changed_last
    assert sum(row.counters.settle_forwards for row in made.rows) > 0
    assert all(row.counters.settle_forwards == 0 for row in finished(load(), MIXED).rows)


def test_a_block_whose_last_step_changed_nothing_is_settled_for_free():
    rows = finished(load(), [job(8, 24, threshold=0.3, editing_threshold=0.9)], settle="separate").rows
    assert len(rows[0].counters.forwards_per_block) == 3 and rows[0].counters.settle_forwards < 2


def test_uncached_decoding_gives_the_same_tokens():
    for own, text in zip(stories(finished(load(), MIXED, cached=False)), alone(), strict=True):
        assert own[3]["prefill_forwards"] == 0
        own[3]["prefill_forwards"] = text[3]["prefill_forwards"]
        assert own == text


def test_rows_may_be_stepped_in_any_order_and_pause_between_blocks():
    generator = torch.Generator().manual_seed(8)
    made = start(load(), MIXED)
    rows = made.running()
    while rows:
        order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        paused = [row for row in order if row.phase is Phase.BLOCK_END and torch.rand(1, generator=generator) < 0.5]
        made.step([row for row in order if row not in paused] or order)
        rows = made.running()
    assert stories(made) == alone()


def test_a_row_in_the_middle_of_a_block_cannot_be_left_out():
    made = start(load(), MIXED[:2])
    with pytest.raises(AssertionError, match="left out"):
        made.step(made.rows[:1])


def test_rows_never_wait_for_one_another():
    made, steps = start(load(), MIXED), 0
    rows = made.running()
    while rows:
        made.step(rows)
        steps += 1
        rows = made.running()
    assert steps == max(row.counters.denoise_forwards for row in made.rows)


def test_forwards_per_block_are_counted():
    for row in finished(load(), MIXED).rows:
        per_block = row.counters.forwards_per_block
        assert sum(per_block) == row.counters.denoise_forwards and min(per_block) > 0
        block_of_step = [row.first_block + i for i, count in enumerate(per_block) for _ in range(count)]
        assert all(event.position // 8 == event.block == block_of_step[event.step] for event in row.events)
        assert row.counters.commits == sum(event.kind == "commit" for event in row.events)
        assert row.counters.edits == sum(event.kind == "edit" for event in row.events)


def test_the_trace_of_an_answer_has_the_commits_behind_its_end():
    prompt, params, seed, _ = job(8, 8, threshold=0.0)
    tokens = finished(load(), [(prompt, params, seed, ())]).rows[0].answer()
    end = next(at for at in range(1, 7) if tokens[at] not in tokens[:at])
    params = replace(params, eos_early_stop=True)
    (row,) = finished(load(), [(prompt, params, seed, (tokens[end],))]).rows
    trace = Trace.of(row, len(row.answer()))
    assert len(row.answer()) == end + 1 < len(trace.first_commits()) == row.counters.commits == 8


def test_a_plan_has_filters_as_long_as_any_of_its_rows_draws_with_them():
    jobs = [job(8, 24, threshold=2.0, steps=4), job(8, 8, threshold=2.0, steps=4, temperature=0.8, top_k=5)]
    assert finished(load(), jobs).forward.filters == [True] * 4 + [False] * 8


@pytest.fixture
def counted(monkeypatch):
    """The model "tiny" with its two entrances counted: tokens of each forward, rows of each LM head product."""
    model, forwards, heads = load(), [], []
    forward_blocks, lm_logits = model.forward_blocks, model.lm_logits

    def forward(tokens, *rest):
        forwards.append(len(tokens))
        return forward_blocks(tokens, *rest)

    def head(hidden):
        heads.append(len(hidden))
        return lm_logits(hidden)

    monkeypatch.setattr(model, "forward_blocks", forward)
    monkeypatch.setattr(model, "lm_logits", head)
    return model, forwards, heads


def test_prefill_is_one_forward_of_all_full_prompt_blocks_without_lm_head(counted):
    model, forwards, heads = counted
    made = start(model, [job(29, 8), job(16, 8), job(7, 8)])
    made.step(made.rows)
    assert forwards == [24 + 16, 3 * 8] and len(heads) == 1
    assert [row.counters.prefill_forwards for row in made.rows] == [1, 1, 0]
    made.step(made.rows)
    assert forwards[2:] == [3 * 8 + 8] and len(heads) == 2  # the third row's block ended with the first step


def test_each_step_forwards_the_active_block_and_carries_a_finished_one_along_once(counted):
    model, forwards, _ = counted
    row = finished(model, [job(40, 24, threshold=2.0, steps=4)]).rows[0]
    assert row.counters.forwards_per_block == [4, 4, 4]
    assert forwards == [40, 8, 8, 8, 8, 16, 8, 8, 8, 16, 8, 8, 8]


def test_separate_settling_costs_a_forward_of_its_own(counted):
    model, forwards, heads = counted
    row = finished(model, [job(40, 24, threshold=2.0, steps=4)], settle="separate").rows[0]
    assert forwards == [40, *[8] * 14] and row.counters.settle_forwards == 2 and len(heads) == 12


def test_uncached_decoding_forwards_the_whole_window(counted):
    model, forwards, _ = counted
    finished(model, [job(16, 16, threshold=2.0, steps=2)], cached=False)
    assert forwards == [24, 24, 32, 32]


@pytest.mark.parametrize("budget", [1, 8, 20, 64])
def test_a_long_prompt_is_prefilled_in_chunks_of_whole_blocks(monkeypatch, counted, budget):
    model, forwards, _ = counted
    jobs = [job(61, 8, threshold=0.5), job(35, 8, threshold=0.5), job(3, 8, threshold=0.5)]
    wanted = [row.answer() for row in finished(load(), jobs).rows]
    forwards.clear()
    monkeypatch.setitem(decoder_module.PREFILL_TOKENS, "cpu", budget)
    made = finished(model, jobs)
    assert [row.answer() for row in made.rows] == wanted
    chunks = sum(row.counters.prefill_forwards for row in made.rows)
    prefill = forwards[: len(forwards) - max(row.counters.denoise_forwards for row in made.rows)]
    assert sum(prefill) == 56 + 32 and all(n % 8 == 0 and n <= max(budget, 8) for n in prefill)
    assert chunks >= len(prefill) >= (56 + 32) // max(budget, 8)


def test_the_seconds_of_all_chunks_count(monkeypatch, counted):
    model, forwards, _ = counted
    forward = model.forward_blocks

    def slow_at_first(*args):
        if not forwards:
            time.sleep(0.2)
        return forward(*args)

    monkeypatch.setattr(model, "forward_blocks", slow_at_first)
    monkeypatch.setitem(decoder_module.PREFILL_TOKENS, "cpu", 8)
    (row,) = start(model, [job(24, 8)]).rows
    assert len(forwards) == 3 and row.counters.prefill_s >= 0.2


@pytest.mark.parametrize("editing", [None, 0.3])
def test_logits_are_computed_for_the_needed_positions_only(counted, editing):
    """The masked ones; with editing the generated tokens too. (The product may be padded by up to three rows.)"""
    model, _, heads = counted
    jobs = [job(13, 21, threshold=0.5, editing_threshold=editing), job(5, 11, threshold=0.4, editing_threshold=editing)]
    made = start(model, jobs)
    rows = made.running()
    while rows:
        done = len(heads)
        output = made.step(rows).output
        used = (output.token >= 0).sum().item()
        assert len(heads) == done + 1 and used <= heads[-1] <= used + 3
        for row in rows:
            block = torch.tensor(made.forward.fed[row.lane][-1][1])
            behind_prompt = torch.arange(8) >= len(row.given(row.block))
            wanted = behind_prompt if editing is not None else behind_prompt & (block == MASK)
            assert torch.equal(output.token[row.lane] >= 0, wanted)
        rows = made.running()


@pytest.mark.parametrize("profile", ["default", "hf-2.0", "hf-2.1"])
def test_no_step_writes_a_prompt_position(profile):
    """Prompts that end inside a block; under the default rule with mask and EOS ids in them."""
    editing = None if profile == "hf-2.0" else 0.0
    jobs = [job(n, 10, profile=profile, threshold=0.3, editing_threshold=editing) for n in (3, 12, 23)]
    for prompt, *_ in jobs:
        if profile == "default":
            prompt[-1], prompt[-2], prompt[0] = MASK, EOS, MASK
    made = start(load(), jobs)
    rows = made.running()
    while rows:
        made.step(rows)
        for row, (prompt, *_) in zip(made.rows, jobs, strict=True):
            fed = made.forward.fed[row.lane][-1]
            begin, n = fed[0] - 8, len(prompt)
            assert fed[1][: max(0, n - begin)] == prompt[begin:n]
            assert made.state.tokens[row.lane].tolist()[: max(0, n - begin)] == prompt[begin:n]
        rows = made.running()
    for row, (prompt, *_) in zip(made.rows, jobs, strict=True):
        assert row.canvas[: len(prompt)] == prompt
        assert all(event.position >= len(prompt) for event in row.events)


def test_the_cards_fill_mask_ids_of_the_prompt_s_last_block():
    for profile in ("hf-2.0", "hf-2.1"):
        prompt, *rest = job(12, 10, profile=profile, threshold=0.3)
        prompt[9], prompt[1] = MASK, MASK
        row = finished(load(), [(prompt, *rest)]).rows[0]
        assert row.canvas[9] != MASK and row.canvas[1] == MASK  # full prompt blocks are prefilled as they are


def test_the_tail_is_denoised_or_absent():
    attended = finished(load(), [job(5, 6, threshold=0.5)]).rows[0]
    absent = finished(load(), [job(5, 6, threshold=0.5, attend_tail=False)]).rows[0]
    assert attended.counters.commits == 16 - 5 and absent.counters.commits == 6
    assert MASK not in attended.canvas and absent.canvas[11:] == [MASK] * 5
    assert len(attended.answer()) == len(absent.answer()) == 6


def test_an_absent_tail_is_neither_attended_to_nor_a_reason_to_differ():
    """The same row on a grid where its last block is exactly as long as what exists of it."""
    row = finished(load(), [job(4, 4, threshold=0.3, attend_tail=False)], length=16).rows[0]
    exact = finished(load(), [job(4, 4, threshold=0.3, attend_tail=False)], length=8).rows[0]
    assert row.answer() == exact.answer()
    assert row.counters.denoise_forwards == exact.counters.denoise_forwards


def test_pages_and_lanes_are_given_back_and_used_again():
    made = start(load(), MIXED, spare=0)
    cache = made.cache
    assert cache.num_free == 0
    cache.check_integrity([row.pages for row in made.rows])
    made.run()
    for lane in (4, 0, 7):
        made.close(made.rows[lane])
        cache.check_integrity([row.pages for row in made.rows])
        assert made.decoder.sequences[lane] is None
    for lane in (0, 7, 4):  # other rows' pages, full of their keys
        made.rows[lane] = sequence(MIXED[lane])
        made.open(made.rows[lane])
    assert [made.rows.index(row) for row in made.running()] == [0, 4, 7]
    made.run()
    assert stories(made) == alone()
    for row in made.rows:
        made.close(row)
    assert cache.num_free == cache.num_pages
    cache.check_integrity([])


def test_a_row_may_be_closed_in_the_middle_of_a_block():
    made = start(load(), MIXED)
    for _ in range(3):
        made.step(made.running())
    closed = made.rows[4]
    made.close(closed)
    made.rows.remove(closed)
    made.run()
    made.rows.insert(4, finished(load(), [MIXED[4]]).rows[0])
    assert stories(made) == alone()


def test_a_row_opened_late_equals_one_opened_early():
    made = start(load(), MIXED)
    made.close(made.rows.pop(5))
    for _ in range(4):
        made.step(made.running())
    made.rows.insert(5, sequence(MIXED[5]))
    made.open(made.rows[5])
    made.run()
    assert stories(made) == alone()


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_suspended_row_gets_the_tokens_it_would_have_got(steps):
    """Out of its lane and its pages, then in again: nothing of the open block's steps is counted."""
    made = start(load(), MIXED)
    row = made.rows[5]
    mark, at = row.mark(), row.block
    for _ in range(steps):
        made.step(made.running())
        if row.block_ended:
            mark, at = row.mark(), row.block + 1
    assert row.running
    made.close(row)
    row.resume(mark)
    assert (row.phase, row.lane, row.num_final_blocks, row.block) == (Phase.WAITING, None, 0, at)
    made.open(row)
    made.run()
    counted = row.counters.prefill_forwards
    row.counters.prefill_forwards = alone()[5][3]["prefill_forwards"]
    assert stories(made) == alone() and counted >= row.counters.prefill_forwards


def poisoned_model():
    """A copy of "tiny" in which the embedding of a token that MIXED never holds is NaN, and that token."""
    model = copy.deepcopy(load())
    used = {token for prompt, *_ in MIXED for token in prompt} | {event.token for text in alone() for event in text[2]}
    token = min(set(range(MASK)) - used)
    model.word_embeddings.weight[token] = float("nan")
    return model, token


@pytest.mark.parametrize("place", ["prefix", "active block"])
def test_nan_logits_stop_their_own_row_and_change_no_other(place):
    model, token = poisoned_model()
    prompt = job(13)[0]
    prompt[2 if place == "prefix" else -1] = token
    jobs = [*MIXED[:3], (prompt, *job(13, 21, threshold=0.5)[1:]), *MIXED[3:]]
    made = start(model, jobs)
    rows = made.running()
    while rows:
        made.step(rows)
        rows = made.running()
    bad = made.rows.pop(3)
    assert stories(made) == alone()
    assert bad.error == "logits hold NaN or infinity at step 0 of block 1" and bad.finish_reason is None
    assert bad.events == [] and bad.canvas == [*prompt, *[MASK] * 27]
    assert made.state.frozen[3] == refine.ERROR
    free = made.cache.num_free
    made.close(bad)
    assert made.cache.num_free == free + 5


def test_nan_logits_in_the_middle_of_a_row(monkeypatch):
    """Logits that turn NaN at the fourth step: the blocks and tokens of before stand."""
    model = load()
    want = alone()[0]
    lm_logits, calls = model.lm_logits, []

    def head(hidden):
        calls.append(len(hidden))
        return lm_logits(hidden) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(model, "lm_logits", head)
    made = start(model, MIXED[:1])
    with pytest.raises(RuntimeError, match=r"row 0: logits hold NaN or infinity at step \d+ of block \d"):
        made.run()
    row = made.rows[0]
    assert [e._replace(confidence=None) for e in row.events] == [event for event in want[2] if event.step < 3]
    assert row.counters.denoise_forwards == 4


def predicting(monkeypatch, token_at):
    """The checkpoint's network, sure of token_at(n) at every position of its n-th forward, from 1."""
    model = load()
    lm_logits, calls = model.lm_logits, []

    def head(hidden):
        calls.append(len(hidden))
        logits = lm_logits(hidden)
        logits[:, token_at(len(calls))] = 90.0
        return logits

    monkeypatch.setattr(model, "lm_logits", head)
    return model


def test_a_model_that_always_predicts_the_mask_ends_without_a_mask(monkeypatch):
    model = predicting(monkeypatch, lambda call: MASK)
    jobs = [
        job(13, 21, threshold=0.9),
        job(8, 16, threshold=0.9, steps=2, editing_threshold=0.0, max_post_steps=4),
        job(3, 10, temperature=1.0, threshold=0.9, seed=5),
        job(9, 10, profile="hf-2.0", steps=3),
        job(9, 10, profile="hf-2.1", max_post_steps=2),
    ]
    made = finished(model, jobs)
    for row in made.rows[:3]:
        assert MASK not in row.answer() and row.finish_reason == "length"
        assert all(n <= min(8, row.params.steps) + row.params.max_post_steps for n in row.counters.forwards_per_block)
    assert made.rows[3].counters.forwards_per_block == [3, 3]  # the cards stop with masks where the rounds are over
    assert made.rows[4].counters.forwards_per_block == [8 + 2 + 1] * 2
    assert all(row.answer() == [MASK] * 10 for row in made.rows[3:])


@pytest.mark.parametrize("profile, per_block, reason", [("hf-2.0", [2, 2], "eos"), ("hf-2.1", [9, 8, 8], "length")])
def test_the_cards_remember_a_mask_left_in_an_earlier_block(monkeypatch, profile, per_block, reason):
    """A model that wants masks in the first block and EOS from then on: the window before that EOS is not resolved."""
    model = predicting(monkeypatch, lambda call: MASK if call <= per_block[0] else EOS)
    rules = dict(profile=profile, steps=2, threshold=2.0, max_post_steps=0, eos_early_stop=True)
    row = finished(model, [job(8, 24, eos=(EOS,), **rules)]).rows[0]
    assert row.canvas[8:16] == [MASK] * 8 and row.canvas[16:24] == [EOS] * 8
    assert (row.counters.forwards_per_block, row.finish_reason) == (per_block, reason)
    assert row.answer() == [*[MASK] * 8, EOS]


@pytest.mark.parametrize("profile, forwards", [("hf-2.0", 1), ("hf-2.1", 8)])
def test_a_mask_id_in_the_prompt_stands_before_no_eos(monkeypatch, profile, forwards):
    """The cards look for masks in what is generated. A model that wants EOS ends 2.0 at once, 2.1 with the block."""
    model = predicting(monkeypatch, lambda call: EOS)
    rules = dict(profile=profile, steps=2, threshold=2.0, max_post_steps=0, eos_early_stop=True)
    prompt, *rest = job(8, 24, eos=(EOS,), **rules)
    row = finished(model, [([MASK, *prompt[1:]], *rest)]).rows[0]
    assert (row.answer(), row.counters.forwards_per_block, row.finish_reason) == ([EOS], [forwards], "eos")


def test_a_row_that_may_take_no_step_is_over_at_once_and_leaves_the_state_alone():
    """hf-2.0 with gen_length < minimal_topk: steps' is 0 and the card returns masks."""
    made = start(load(), [*MIXED[:1], job(6, 3, profile="hf-2.0", minimal_topk=4)])
    assert made.running() == made.rows[:1]
    made.run()
    row = made.rows[1]
    assert row.answer() == [MASK] * 3 and row.finish_reason == "length"
    assert row.counters.denoise_forwards == 0 and row.events == []
    assert row.lane is None and row.canvas == [*job(6)[0], *[MASK] * 10]
    assert made.rows[0].answer() == alone()[0][0]


def test_the_trace_says_what_was_written():
    """Replaying the events on the prompt and its masks gives the canvas; an edit replaces what stood there."""
    for row, (prompt, *_) in zip(finished(load(), MIXED).rows, MIXED, strict=True):
        canvas = [*prompt, *[MASK] * (len(row.canvas) - len(prompt))]
        for _, _, position, kind, token, confidence, old in row.events:
            assert canvas[position] == old and (old == MASK) == (kind == "commit") and 0 < confidence <= 1
            canvas[position] = token
        assert canvas == row.canvas
