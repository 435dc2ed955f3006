"""Multi-block editing: what a window pass computes, what it leaves alone, what it costs, and what ends by it.

That tokens, traces and forwards are by the book is in test_properties.py, for generate(); here for every runner.
"""

import functools

import pytest
import torch

from llada2_fast import Engine, EngineConfig, LLaDA2Pipeline
from llada2_fast.config import DecodeParams
from llada2_fast.decoding import window as window_module
from llada2_fast.decoding.decoder import decode_all
from llada2_fast.decoding.runner import CachedForward, Prefill
from llada2_fast.decoding.window import Window
from llada2_fast.generate import generate
from llada2_fast.kernels.roles import block_kinds
from tests.engine.common import UNDERTRAINED, chat, demo_model
from tests.test_fake_cuda import fake_cuda, held, load, move
from tests.test_graphs import decode, decoder_of
from tests.test_properties import by_the_book, golden_model, window_mask

MASK, EOS = 255, 252  # of the golden set "tiny"
RUNNERS = {"eager": None, "graphs": 0, "graphs, read a step late": 1}
EDITING = {"threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 2}
RULES = {
    "one block": EDITING | {"edit_window": 1},
    "no post steps": EDITING | {"max_post_steps": 0, "edit_window": 2},
    "few edits": EDITING | {"editing_threshold": 0.9, "max_post_steps": 0, "edit_window": 2},
    "all blocks": EDITING | {"editing_threshold": 0.0, "edit_window": 100},
    "no tail, sampled": EDITING | {"attend_tail": False, "temperature": 0.7, "top_k": 9, "edit_window": 2},
    "ends": EDITING | {"eos_early_stop": True, "edit_window": 2},
}
LENGTHS = [3, 40, 8, 17]


@pytest.fixture(scope="module")
def model():
    return golden_model("tiny")


def written(row):
    return [(event.step, event.position, event.kind, event.token, event.old) for event in row.events]


@functools.cache
def book(length, name, eos):
    """by_the_book of a row of test_graphs.decoder_of; temperature and top_k go by the row's own seed."""
    rules = {"gen_length": 19, "block_length": 8, "steps": 32, "minimal_topk": 1, "eos_early_stop": False}
    rules |= {"attend_tail": True, "mask_id": MASK, "eos_id": eos, "seed": length} | RULES[name]
    prompt = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return by_the_book(golden_model("tiny"), prompt, rules)


# The pass itself


@pytest.mark.parametrize("name", ["tiny", "group", "embedded"])
def test_a_window_is_a_forward_with_a_mask(name):
    """Rows of other windows beside it, some with blocks in front of it that are not final, and a row without its tail.
    What was in the rows' own pages stays."""
    model, length = demo_model() if name == "embedded" else golden_model(name), 8
    cache = model.new_cache(40, length)
    generator, windows, rows = torch.Generator().manual_seed(1), [], []
    for begin, block, final, missing in ((0, 2, 0, 0), (3, 4, 3, 0), (4, 6, 2, 5), (1, 3, 1, 3)):
        tokens = torch.randint(0, 250, ((block + 1) * length,), generator=generator).tolist()
        limit = (block + 1) * length - missing
        pages, scratch = cache.allocate(block + 1), cache.allocate(block + 1 - begin)
        if final:
            prefill = Prefill(pages, limit, 0, tokens[: final * length])
            CachedForward(model, cache).prefill([prefill])
        kinds = block_kinds([], begin * length, (block + 1 - begin) * length, limit, limit)
        table = pages[:begin] + scratch
        windows.append(Window(table, limit, final, begin, block, tokens[final * length :], kinds, None, 0, 0))
        rows.append((tokens, limit, begin, pages[final:]))
    before = cache.k.clone(), cache.v.clone()
    with torch.inference_mode():
        logits = model.lm_logits(window_module._forward(model, cache, windows)).split([len(w.tokens) for w in windows])
    for window, (tokens, limit, begin, own), got in zip(windows, rows, logits, strict=True):
        mask = window_mask(len(tokens), length, begin) & (torch.arange(len(tokens)) < limit)
        wanted = model(torch.tensor([tokens]), attention_mask=mask).logits[0]
        at = torch.arange(window.first * length, limit)
        torch.testing.assert_close(got[at - window.first * length], wanted[at], rtol=1e-4, atol=1e-4)
        causal = model(torch.tensor([tokens[:limit]]), block_length=length).logits[0]
        assert not torch.allclose(wanted[begin * length], causal[begin * length], atol=1e-2)
        untouched = list(own[begin - window.first :])
        assert torch.equal(cache.k[:, untouched], before[0][:, untouched])
        assert torch.equal(cache.v[:, untouched], before[1][:, untouched])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", RULES)
def test_every_runner_goes_by_the_book(model, name, runner):
    """Rows whose blocks end together and apart, in one decoder."""
    rows, late = decode(model, LENGTHS, RULES[name], RUNNERS[runner], trace=True), 0
    for length, row in zip(LENGTHS, rows, strict=True):
        tokens, events, per_block = book(length, name, (EOS,))
        assert row.answer() == tokens and row.counters.forwards_per_block == per_block
        end = row.prompt_length + len(tokens)
        assert [one for one in written(row) if one[2] == "commit" or one[1] < end] == events
        newest = 0
        for event in row.events:
            newest = max(newest, event.block)
            late += event.block < newest
        assert row.counters.window_forwards == len(per_block) - 1
        assert row.counters.denoise_forwards == sum(per_block)
        assert row.counters.edits == sum(event.kind == "edit" for event in row.events)
    assert late or name == "few edits", "no pass has edited an earlier block"


@pytest.mark.parametrize("runner", RUNNERS)
def test_passes_go_in_groups(model, runner, monkeypatch):
    """Of as many rows as there is room for, one at least; what they do is the same."""
    forward, sizes = window_module._forward, []

    def measured(model, cache, windows):
        sizes.append((len(windows), sum(len(window.tokens) for window in windows)))
        return forward(model, cache, windows)

    monkeypatch.setattr(window_module, "_forward", measured)
    found = {}
    for most in (8, 40, 512):
        sizes.clear()
        decoder, rows = decoder_of(
            model, LENGTHS, RULES["no post steps"] | {"threshold": 0.0}, RUNNERS[runner], trace=True
        )
        decoder._most_tokens = most
        decode_all(decoder, rows)
        found[most] = [(row.answer(), written(row), row.counters.forwards_per_block) for row in rows]
        assert all(count == 1 or size <= most for count, size in sizes)
        assert (max(sizes)[0] > 1) == (most > 8) and (max(size for _, size in sizes) > 40) == (most > 40)
    assert found[8] == found[40] == found[512]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("settle", ["carry", "separate"])
def test_what_is_made_again_goes_in_chunks(model, runner, settle, monkeypatch):
    """Of blocks of several rows and of parts of a row's."""
    forward, sizes = CachedForward._forward, []

    def measured(self, tokens, spans, prefill, read):
        sizes.append(sum(span.num_blocks - 1 for span in spans) * 8 + sum(len(part.tokens) for part in prefill))
        return forward(self, tokens, spans, prefill, read)

    monkeypatch.setattr(CachedForward, "_forward", measured)
    found = {}
    for most in (8, 24, 512):
        rules = RULES["all blocks"] | {"threshold": 0.0, "max_post_steps": 0, "gen_length": 40}
        decoder, rows = decoder_of(model, [3, 8, 17], rules, RUNNERS[runner], trace=True)
        decoder._most_tokens = most
        sizes.clear()
        decode_all(decoder, rows, settle=settle if RUNNERS[runner] is None else "carry")
        found[most] = max(sizes), [(row.answer(), written(row), row.counters.forwards_per_block) for row in rows]
    assert found[8][1] == found[24][1] == found[512][1]
    carried = 8 * 3 if RUNNERS[runner] is None and settle == "carry" else 0  # each with its next one
    assert found[8][0] <= 8 + carried and found[24][0] <= 24 + carried < found[512][0] + carried


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_pass_that_edits_nothing_changes_nothing(model, runner):
    """Tokens, and K/V down to the bit: those of the pass went elsewhere."""
    rules = EDITING | {"editing_threshold": 2.0}
    kept = []
    for window in (0, 2):
        decoder, rows = decoder_of(model, LENGTHS, rules | {"edit_window": window}, RUNNERS[runner], trace=True)
        decode_all(decoder, rows)
        cache = getattr(decoder.runner, "cache", None) or decoder.runner.forward.cache
        pages = [list(row.pages[: row.num_final_blocks]) for row in rows]
        kept.append([(row.answer(), [cache.k[:, own], cache.v[:, own]]) for row, own in zip(rows, pages, strict=True)])
        assert [row.counters.settle_forwards for row in rows] == [0] * len(rows)
    for (tokens, memory), (others, theirs) in zip(*kept, strict=True):
        assert tokens == others and all(map(torch.equal, memory, theirs))


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("name", ["one block", "all blocks", "few edits"])
def test_kv_are_made_again_from_the_first_edited_block_on(model, name, overlap):
    """After every step: what counts as final is what a forward of the tokens gives. What a pass leaves to be made again
    is nothing, the block that has ended, which is carried, or several."""
    decoder, rows = decoder_of(model, LENGTHS, RULES[name], overlap)
    late = set()
    while running := [row for row in rows if row.running]:
        passes = [row.counters.window_forwards for row in rows]
        decoder.step(running)
        for row, before in zip(rows, passes, strict=True):
            if row.counters.window_forwards > before and row.running:
                late.add(min(2, row.block + 1 - row.num_final_blocks))
            cache = model.new_cache(row.num_blocks, 8)
            fresh = Prefill(tuple(range(row.num_blocks)), row.limit, 0, row.ids[: row.num_final_blocks * 8])
            CachedForward(model, cache).prefill([fresh])
            own = list(row.pages[: row.num_final_blocks])
            torch.testing.assert_close(decoder.runner.cache.k[:, own], cache.k[:, : len(own)], rtol=1e-4, atol=1e-4)
    assert late == ({1} if name == "few edits" else {2})


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_block_that_is_carried_costs_no_forward(model, overlap):
    for length in LENGTHS:
        (row,) = decode(model, [length], RULES["few edits"], overlap)
        assert row.counters.settle_forwards == 0


def test_the_embedded_model_by_the_book():
    model = demo_model(UNDERTRAINED)
    ids = model.special_ids
    rules = {"gen_length": 40, "block_length": model.block_length, "steps": 32, "minimal_topk": 1, "threshold": 0.5}
    rules |= {"editing_threshold": 0.3, "max_post_steps": 0, "edit_window": 2, "eos_early_stop": True}
    rules |= {"attend_tail": True, "mask_id": ids["mask_token_id"], "eos_id": ids["eos_token_id"]}
    prompts = [chat(text) for text in ("Spell 4071, 22.", "Add 847 and 96.")]
    out = generate(model, prompts, return_dict=True, trace=True, **rules)
    uncached = generate(model, prompts, use_cache=False, **rules)
    for i, prompt in enumerate(prompts):
        tokens, events, per_block = by_the_book(model, prompt, rules)
        got = out.sequences[i, : out.num_tokens[i]].tolist()
        assert got == tokens == uncached[i, : len(tokens)].tolist()
        assert [(e.step, e.position, e.kind, e.token, e.old) for e in out.trace[i].events] == events
        assert out.counters[i].forwards_per_block == per_block
    assert out.tokens_per_forward == sum(out.num_tokens) / sum(c.denoise_forwards for c in out.counters)


# Ends


def turns(row):
    """The ids that passes have edited away and those that they have brought, which the answer had not or has not held
    before: {"gone": ids, "brought": ids}."""
    found, ends, n = {"gone": set(), "brought": set()}, [], row.prompt_length
    for count in row.counters.forwards_per_block:
        ends.append((ends[-1] if ends else 0) + count)
    canvas, seen = {}, set()
    for number, end in enumerate(ends):
        held = []
        for last in (end - 1 if number else end, end):  # before the pass, and after it
            for event in row.events:
                if event.step < last:
                    canvas[event.position] = event.token
            held.append({token for at, token in canvas.items() if n <= at < row.total})
        found["gone"] |= held[0] - held[1] - seen
        found["brought"] |= held[1] - held[0] - seen
        seen |= held[1]
    return found


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", ["gone", "brought"])
def test_an_end_is_judged_after_the_pass(model, kind, runner):
    """One that the pass edits away ends nothing, one that it brings does."""
    rows, tried = decode(model, LENGTHS, RULES["ends"] | {"eos_early_stop": False}, trace=True), 0
    for length, row in zip(LENGTHS, rows, strict=True):
        for eos in sorted(turns(row)[kind])[:2]:
            (own,) = decode(model, [length], RULES["ends"], RUNNERS[runner], eos=eos)
            tokens, _, per_block = book(length, "ends", (eos,))
            assert own.answer() == tokens and own.counters.forwards_per_block == per_block
            assert (own.finish_reason == "eos") == (eos in tokens)
            tried += 1
    assert tried > 3


# What it takes


def test_pages_of_passes(model):
    """Scratch pages for a window, no more than a row's blocks can use, none where there is no pass."""
    for window, gen_length, scratch in ((0, 30, 0), (1, 30, 2), (2, 30, 3), (50, 30, 5), (1, 3, 0), (2, 4, 2)):
        _, (row,) = decoder_of(model, [5], EDITING | {"edit_window": window, "gen_length": gen_length})
        assert row.num_pages == row.num_blocks + scratch == len(row.pages)


def test_one_block_has_no_pass(model):
    rules = dict(gen_length=3, block_length=8, mask_id=MASK, eos_id=-1, return_dict=True, trace=True, **EDITING)
    plain, windowed = (generate(model, [1, 2, 3, 4], edit_window=window, **rules) for window in (0, 2))
    assert plain.trace == windowed.trace and plain.counters[0].window_forwards == 0


def test_a_bad_pass_names_its_block(model, monkeypatch):
    forward = window_module._forward
    monkeypatch.setattr(window_module, "_forward", lambda *args: forward(*args) * torch.nan)
    with pytest.raises(RuntimeError, match="row 0: logits hold NaN or infinity at the window pass of block 1"):
        generate(model, [1, 2, 3], gen_length=20, block_length=8, mask_id=MASK, eos_id=-1, edit_window=1, **EDITING)


def test_what_cannot_have_windows_refuses_them_by_name(model):
    how = {"gen_length": 8, "block_length": 8, "mask_id": MASK, "eos_id": -1, "editing_threshold": 0.5}
    with pytest.raises(ValueError, match="edit_window=1: expected 0 with a canvas"):
        generate(model, [1, 2, 3], canvas=[4, None, 5], edit_window=1, **how)
    for changes in ({"profile": "hf-2.1"}, {"editing_threshold": None}):
        with pytest.raises(ValueError, match="edit_window=1: expected 0 "):
            generate(model, [1, 2, 3], edit_window=1, **how | changes)
    with pytest.raises(TypeError, match="edit_window"):
        LLaDA2Pipeline.__call__(None, edit_window=1)


# On a GPU


def test_kernels_give_the_tokens_of_the_reference(golden):
    """A row with windows beside one without, in an engine on graphs."""
    prompts = [list(range(1, 6)), list(range(1, 12))]
    rules = {"gen_length": 15, "threshold": 0.3, "editing_threshold": 0.2, "max_post_steps": 0, "mask_id": MASK}
    each = [DecodeParams(eos_ids=(), edit_window=window, **rules) for window in (1, 0)]

    def outputs(model, **config):
        engine = Engine(model, EngineConfig(block_length=8, mask_id=MASK, cache_tokens=96, trace=True, **config))
        found = engine.generate(prompts, each)
        engine.check_integrity()
        return [(output.token_ids, output.steps, output.counters.forwards_per_block) for output in found]

    wanted = outputs(load(golden))
    with fake_cuda():
        assert outputs(move(load(golden)), graphs=True) == wanted
    assert sum(wanted[0][2]) > len(wanted[0][2])


def test_nothing_waits_in_a_pass(golden, monkeypatch):
    """The host waits for what it has done, and for nothing else."""
    runs, run = [], CachedForward.revise
    rules = {"gen_length": 19, "threshold": 0.0, "editing_threshold": 0.0, "max_post_steps": 0, "top_k": 5}
    rules |= {"temperature": 0.5, "mask_id": MASK, "eos_ids": (), "edit_window": 2, "block_length": 8}

    def revise(self, windows, ids):
        before = len(mode.waits)
        result = run(self, windows, ids)
        runs.append((len(windows), mode.waits[before:]))
        return result

    monkeypatch.setattr(CachedForward, "revise", revise)
    with fake_cuda() as mode:
        config = EngineConfig(block_length=8, mask_id=MASK, cache_tokens=128, graphs=True)
        engine = Engine(move(load(golden)), config)
        outputs = engine.generate([[1, 2, 3], [4, 5]], DecodeParams(**rules), top_logprobs=2)
    assert [output.error for output in outputs] == [None, None]
    assert sum(count for count, _ in runs) == 4 and not any(waits for _, waits in runs)


def test_other_weights(golden):
    """In fp8 the head's input is, too."""
    rules = {"gen_length": 9, "block_length": 8, "threshold": 0.0, "editing_threshold": 0.0, "max_post_steps": 0}
    with fake_cuda():
        model = move(load(golden, quantization="fp8"))
        out = model.generate([[1, 2, 3]], edit_window=1, mask_id=MASK, eos_id=-1, return_dict=True, **rules)
    assert out.counters[0].window_forwards == 1 and MASK not in held(out.sequences)
