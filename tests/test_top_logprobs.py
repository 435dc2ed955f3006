"""The likeliest ids of every token, at the write that put it there."""

import math
from collections import Counter

import pytest
import torch

from benchmarks.counts import Calls
from llada2_fast.decoding.decoder import decode_all, prefill_all
from llada2_fast.decoding.graph_runner import StepGraph
from llada2_fast.decoding.sequence import MAX_TOP_LOGPROBS, Phase, Sequence
from llada2_fast.kernels.refine import SpecialIds
from llada2_fast.model import LLaDA2Model
from tests.test_fake_cuda import fake_cuda, move
from tests.test_graphs import LENGTHS, PARAMS, decode, decoder_of, facts
from tests.test_properties import window_mask
from tests.thinned import thinned

PARAMS = PARAMS | {
    "tempered, and its confidences as well": {"temperature": 0.5, "threshold": 0.4, "profile": "sglang-lowconf"},
    "editing draws": {"temperature": 1.5, "threshold": 0.1, "editing_threshold": 0.05, "max_post_steps": 3},
}
RUNNERS = {"eager": None, "graphs": 0, "graphs, read a step late": 1}


@pytest.fixture(scope="module")
def model(golden):
    return LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)


def logprobs_of_writes(model, row):
    """{position: log-probabilities [V] at its last write} and whether each is an edit, from forwards over the whole row
    as it stood before the step of that write."""
    length, found, edits = row.block_length, {}, Counter()
    ends = [sum(row.counters.forwards_per_block[: i + 1]) - 1 for i in range(row.num_blocks - row.first_block)]
    passes = dict(zip(ends[1:], range(row.first_block + 1, row.num_blocks), strict=True)) if row.edit_window else {}
    end = row.num_blocks * length
    now = (row.prompt + [row.mask_id] * (end - len(row.prompt)))[:end]
    for step in sorted({event.step for event in row.events}):
        events = [event for event in row.events if event.step == step]
        block = passes.get(step, events[0].block)
        stop, begin = min((block + 1) * length, row.limit), block
        if step in passes:
            begin -= min(row.edit_window, block - row.first_block)
        mask = window_mask(stop, length, begin)
        logits = model(torch.tensor([now[:stop]]), attention_mask=mask).logits[0].double()
        for event in events:
            found[event.position] = torch.log_softmax(logits[event.position], -1)
            edits[event.position] += event.kind == "edit"
            now[event.position] = event.token
    return found, edits


# What a check has written is in test_speculation.py.
@pytest.mark.parametrize("name, runner", thinned(3, [name for name in PARAMS if name != "checked"], RUNNERS))
def test_they_are_those_of_the_forward_that_wrote_the_token(model, name, runner):
    edited, params = 0, PARAMS[name]
    for row in decode(model, LENGTHS[2], params, RUNNERS[runner], trace=True, top=4):
        known, edits = logprobs_of_writes(model, row)
        banned = [] if params.get("profile", "").startswith("hf") else [row.mask_id]
        assert len(row.token_top) == len(row.token_steps) >= len(row.answer())
        for position, listed in enumerate(row.token_top, row.prompt_length):
            if row.token_steps[position - row.prompt_length] < 0:  # hf-2.0 leaves masks
                assert listed == []
                continue
            logprobs = known[position].index_fill(0, torch.tensor(banned, dtype=torch.int64), -math.inf)
            assert [p for _, p in listed] == pytest.approx(logprobs.topk(4).values.tolist(), abs=1e-4)
            assert [p for _, p in listed] == pytest.approx([float(logprobs[v]) for v, _ in listed], abs=1e-4)
            edited += edits[position]
    assert (edited > 0) == ("editing_threshold" in params)


@pytest.mark.parametrize("name, runner", thinned(3, PARAMS, RUNNERS))
def test_a_tokens_own_is_the_logarithm_of_its_confidence(model, name, runner):
    equal, total, first, params = 0, 0, 0, PARAMS[name]
    for row in decode(model, LENGTHS[2], params, RUNNERS[runner], top=MAX_TOP_LOGPROBS):
        for token, confidence, listed in zip(
            row.ids[row.prompt_length :], row.token_confidences, row.token_top, strict=True
        ):
            total += bool(listed)
            first += bool(listed) and listed[0][0] == token
            own = dict(listed).get(token)
            equal += own is not None and own == pytest.approx(math.log(confidence), abs=1e-5)
    if params.get("profile") == "sglang-lowconf":
        assert equal < total  # its confidences are those of the tempered draw
    elif "temperature" in params:
        assert equal >= total * 0.8 and first < total  # what is drawn need not be listed
    else:
        assert equal == first == total > 50


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_the_same_by_all_runners_and_whatever_is_beside(model, params):
    alone = [decode(model, [n], params, top=3)[0] for n in LENGTHS[2]]
    for runner in RUNNERS.values():
        rows = decode(model, LENGTHS[2], params, runner, top=3)
        assert [row.token_top for row in rows] == [row.token_top for row in alone]


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_each_row_has_as_many_as_it_asks_for(model, runner):
    """A row that wants none has none, and nobody's tokens change."""
    asked = [2, 0, 5, 20, 0]
    decoder, rows = decoder_of(model, LENGTHS[2], PARAMS["editing"], runner)
    for row, k in zip(rows, asked, strict=True):
        row.top_logprobs = k
        row.detailed = k > 0
    decode_all(decoder, rows)
    assert facts(rows) == facts(decode(model, LENGTHS[2], PARAMS["editing"], runner))
    whole = decode(model, LENGTHS[2], PARAMS["editing"], runner, top=20)
    for row, k, other in zip(rows, asked, whole, strict=True):
        assert row.token_top == ([listed[:k] for listed in other.token_top] if k else [])


@pytest.mark.parametrize("runner", [None, 0])
def test_lists_are_made_in_the_steps_of_those_who_ask(model, runner):
    counted = []
    for top in (0, 1):
        with Calls() as calls:
            (row,) = decode(model, [9], PARAMS["greedy"], runner, top=top)
        counted.append(sum(count for name, count in calls.names.items() if "topk" in name))
    assert counted[1] - counted[0] == row.counters.denoise_forwards


def test_a_step_of_graphs_lists_only_while_somebody_asks(model):
    decoder, rows = decoder_of(model, [8, 8], PARAMS["greedy"], 0)
    decoder.step(rows)
    (graph,) = decoder.runner._graphs.values()
    assert graph.top is None
    rows[0].top_logprobs, rows[0].detailed = 1, True
    decoder.step(rows)
    assert [list(part.shape) for part in graph.top] == [[2, 8, MAX_TOP_LOGPROBS]] * 2
    rows[0].top_logprobs = 0
    decoder.step(rows)
    assert graph.top is None


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_of_an_open_block_nothing_stays_when_a_row_is_suspended(model, runner):
    (wanted,) = decode(model, [21], PARAMS["editing"], runner, top=2)
    decoder, (row,) = decoder_of(model, [21], PARAMS["editing"], runner, top=2)
    mark = row.mark()
    while not (row.block > row.first_block and any(row.top)):
        decoder.step([row])
        mark = row.mark() if row.block_ended else mark
    assert row.phase is Phase.DECODE and len(row.token_top) == row.block_start - 21
    decoder.release(row)
    pages = row.pages
    row.resume(mark)
    assert len(row.token_top) == len(row.ids) - 21
    row.pages = pages
    prefill_all(decoder, [row])
    decoder.admit(row)
    assert not any(row.top)
    decode_all(decoder, [row])
    assert row.token_top == wanted.token_top and all(row.token_top)


def test_a_small_vocabulary_has_fewer(golden):
    """Asked for more ids than there are, a row gets those there are, the mask id left out."""
    model = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)
    lm_logits = model.lm_logits

    def few(hidden, wanted=None):
        return lm_logits(hidden, wanted).index_fill(-1, torch.arange(7, 255), -math.inf)

    model.lm_logits = few
    for runner in RUNNERS.values():
        (row,) = decode(model, [21], PARAMS["greedy"], runner, top=20)
        assert all(sorted(v for v, _ in listed) == list(range(7)) for listed in row.token_top)


def test_ties(model):
    """The lowest ids of equal logits, in their order."""
    model = LLaDA2Model(model.config, torch.float32).eval()
    for weight in model.parameters():
        weight.data.zero_()
    for runner in RUNNERS.values():
        (row,) = decode(model, [3], {"threshold": 0.0}, runner, top=5)
        uniform = pytest.approx(-math.log(model.config.vocab_size), abs=1e-6)
        assert all(listed == [(v, uniform) for v in range(5)] for listed in row.token_top)


@pytest.mark.parametrize("k", [-1, MAX_TOP_LOGPROBS + 1])
def test_more_than_a_graph_has(k, model):
    with pytest.raises(AssertionError):
        decode(model, [3], {}, top=k)


def test_on_a_gpu_without_a_wait(golden, model):
    params = PARAMS["editing"] | {"max_post_steps": 1}  # seven steps: the interpreter takes a second for each
    wanted = decode(model, [3, 9], params, 1, top=3)
    waits, run = [], StepGraph.run

    def counted(self):
        before = len(mode.waits)
        result = run(self)
        waits.append(mode.waits[before:])
        return result

    with fake_cuda() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraph, "replay", counted)
        rows = decode(move(LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)),
                      [3, 9], params, 1, capture=True, top=3)  # fmt: skip
    assert facts(rows) == facts(wanted) and waits and not any(waits)
    assert all(row.counters.edits for row in rows)
    for row, other in zip(rows, wanted, strict=True):
        for listed, known in zip(row.token_top, other.token_top, strict=True):
            assert [v for v, _ in listed] == [v for v, _ in known]
            assert [p for _, p in listed] == pytest.approx([p for _, p in known], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_captured_graphs_list_what_the_cpu_does(golden, model, params, overlap):
    on_gpu = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, device="cuda", progress=False)
    rows = decode(on_gpu, LENGTHS[2], params, overlap, capture=True, top=3)
    for row, other in zip(rows, decode(model, LENGTHS[2], params, top=3), strict=True):
        for listed, known in zip(row.token_top, other.token_top, strict=True):
            assert [p for _, p in listed] == pytest.approx([p for _, p in known], abs=1e-3)


def test_an_error_keeps_what_was_there(model):
    """A step whose logits are an error writes nothing."""
    row = Sequence([1, 2], decode(model, [3], {})[0].params, 0, (252,), 8, SpecialIds(255), top_logprobs=2)
    row.begin()
    row.take_step([4, 6, 0, 0, -1, 1, 0, 6], ([255] * 8, [0] * 8, [0.0] * 8), ([[-1, -1]] * 8, [[math.nan] * 2] * 8))
    assert row.error and not any(row.top) and row.token_top == []
