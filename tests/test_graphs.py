"""The step as fixed-shape work: without a GPU run eagerly, it must give what the cached forward gives."""

import gc
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada2_fast.cache import PagedKVCache
from llada2_fast.config import DecodeParams
from llada2_fast.decoding import decoder as decoder_module
from llada2_fast.decoding import graph_runner as graphs
from llada2_fast.decoding.decoder import BlockDecoder, decode_all, prefill_all
from llada2_fast.decoding.graph_runner import GraphRunner, StepGraph
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.decoding.rules import row_rule
from llada2_fast.decoding.runner import CachedForward, EagerRunner
from llada2_fast.decoding.sequence import Sequence
from llada2_fast.kernels.refine import SpecialIds
from llada2_fast.model import LLaDA2Model
from tests.thinned import thinned


@pytest.fixture(scope="module")
def model(golden):
    return LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)


PARAMS = {
    "greedy": {"threshold": 0.6, "steps": 8},
    "editing": {"threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 3},
    "window": {"threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 0, "edit_window": 2},
    "sampling": {"temperature": 0.8, "top_k": 7, "threshold": 0.4},
    "no tail": {"threshold": 0.9, "attend_tail": False},
    "entropy": {"policy": "entropy", "entropy_bound": 5.0, "entropy_decay": 0.8},
    "checked": {"policy": "self_speculative", "entropy_bound": 8.0},
    "one step a block": {"threshold": 0.0, "eos_early_stop": True},
    "hf-2.0": {"threshold": 0.3, "steps": 2, "profile": "hf-2.0"},
    "hf-2.1": {"threshold": 0.5, "editing_threshold": 0.2, "max_post_steps": 2, "profile": "hf-2.1"},
}
LENGTHS = [[0], [21], [3, 40, 8, 17, 9]]
OPTIONS = {"gen_length": 40, "block_length": 8, "threshold": 0.6, "mask_id": 255, "eos_id": 252}  # of generate()


class Watched(GraphRunner):
    """Notes what is launched and what is read, in order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.order = []

    def execute(self, plan):
        self.order.append("launch")
        result = super().execute(plan)
        wait = result.wait
        result.wait = lambda: self.order.append("read") or wait()
        return result


def decoder_of(model, lengths, params, overlap=None, capture=False, trace=False, top=0, free=0, eos=252):
    """(a decoder, its admitted sequences); overlap: None = the eager runner, else graphs with this overlap; free: lanes
    beside theirs."""
    params = DecodeParams(**{"gen_length": 19, "block_length": 8} | params)
    rows = []
    for n in lengths:
        prompt = torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        rows.append(Sequence(prompt, params, n, (eos,), 8, SpecialIds(255), trace, top_logprobs=top))
    cache = PagedKVCache(model.config, sum(row.num_pages for row in rows), 8, model.dtype, model.device)
    lanes = Lanes(len(rows) + free, 8, SpecialIds(255), model.device, pages=max(row.num_blocks for row in rows))
    if overlap is None:
        decoder = BlockDecoder(EagerRunner(CachedForward(model, cache), lanes))
    else:
        decoder = BlockDecoder(Watched(model, cache, lanes, capture), overlap)
    for row in rows:
        row.pages = cache.allocate(row.num_pages)
    prefill_all(decoder, rows)
    for row in rows:
        decoder.admit(row)
    return decoder, rows


def decode(*args, **kwargs):
    """Finished sequences; arguments as of decoder_of."""
    decoder, rows = decoder_of(*args, **kwargs)
    decode_all(decoder, rows)
    return rows


def facts(rows):
    return [
        (row.answer(), row.finish_reason, row.counters.forwards_per_block, row.counters.commits, row.counters.edits,
         row.events)
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize("lengths, name, overlap", thinned(2, LENGTHS, PARAMS, [0, 1]), ids=str)
def test_the_graphs_work_gives_the_cached_forwards_tokens(model, lengths, name, overlap):
    assert facts(decode(model, lengths, PARAMS[name], overlap)) == facts(decode(model, lengths, PARAMS[name]))


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("overlap", [0, 1])
def test_traces_are_the_same(model, params, overlap):
    """Also where the host learns a step late what was written."""
    with_graphs = facts(decode(model, LENGTHS[2], params, overlap, trace=True))
    assert with_graphs == facts(decode(model, LENGTHS[2], params, trace=True))
    assert any(events for *_, events in with_graphs)


def test_a_row_without_a_place_waits_for_one_step(model):
    """A step fills a block: five rows end theirs at once, two find places. Three wait; then they go on freely while the
    two end their second block and find places again; and of the three one waits once more."""
    params = {"threshold": 0.0}
    rows = decode(model, [8] * 5, params, overlap=1)
    assert all(row.counters.forwards_per_block == [1, 1, 1] for row in rows)
    assert sum(row.counters.settle_forwards for row in rows) == 4
    assert sum(row.counters.settle_forwards for row in decode(model, [8] * 5, params, overlap=0)) == 0


def test_a_row_alone_always_finds_a_place(model):
    (row,) = decode(model, [8], {"threshold": 0.0}, overlap=1)
    assert row.counters.forwards_per_block == [1, 1, 1] and row.counters.settle_forwards == 0


@pytest.mark.parametrize("overlap", [0, 1])
def test_prefill_is_counted_once(model, overlap):
    """Not again with each step or block; the eager runner's counts are the same."""
    for runner in (overlap, None):
        rows = decode(model, LENGTHS[2], PARAMS["greedy"], runner)
        assert [row.counters.prefill_forwards for row in rows] == [0, 1, 1, 1, 1]


def test_the_step_a_row_waits_for_settles_its_block(model):
    """So that it needs no place any more, and others may match the block."""
    decoder, rows = decoder_of(model, [8] * 5, {"threshold": 0.0}, overlap=1)
    waited = set()
    while running := [row for row in rows if row.running]:
        before = [row.counters.settle_forwards for row in rows]
        decoder.step(running)
        for row, forwards in zip(rows, before, strict=True):
            if row.counters.settle_forwards > forwards:
                waited.add(row)
                assert row.num_final_blocks == row.block + 1
    assert len(waited) == 3


class Numbers(TorchDispatchMode):
    """Counts the numbers that operators of PyTorch give."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def test_a_steps_tensors_do_not_grow_with_the_free_lanes(model):
    """Those of the eager runner; on a GPU a frozen lane's program ends at once."""
    counts = []
    for free in (0, 1, 2, 300):
        decoder, rows = decoder_of(model, [21, 3, 9], PARAMS["editing"], free=free)
        decoder.step(decoder.running())
        with Numbers() as numbers:
            decoder.step(decoder.running())
        counts.append(numbers.count)
    assert counts[0] < counts[1] == counts[2] == counts[3]  # three lanes, four


def test_lanes_that_a_step_leaves_out_are_those_behind_the_last_open_one():
    lanes = Lanes(300, 8, SpecialIds(255))
    assert lanes.in_use == 1
    for lane, used in ((0, 1), (1, 2), (5, 8), (7, 8), (8, 16), (299, 300)):
        lanes.open(lane, 0, [1], 8, 8, row_rule(DecodeParams(), 8))
        assert lanes.in_use == used and lanes.needed().shape == (used, 8) and lanes.needed()[lane].sum() == 7
    for lane, used in ((8, 300), (299, 8), (5, 8), (7, 2), (0, 2), (1, 1)):
        lanes.close(lane)
        assert lanes.in_use == used and lanes.needed().shape == (used, 8)


def opcodes_of(call):
    """How many instructions of ours Python takes for a call; what earlier tests left to collect is not the call's."""
    count, root = 0, Path(decoder_module.__file__).parents[2]
    ours = (f"{root / 'llada2_fast'}/", f"{root / 'kernels'}/")

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(ours):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


@pytest.mark.parametrize("overlap", [None, 0, 1])
def test_a_steps_work_on_the_host_does_not_grow_with_the_free_lanes(model, overlap):
    counts = []
    for free in (30, 30, 300):  # the first one makes what is made once
        decoder, rows = decoder_of(model, [21, 3], {"threshold": 1.0}, overlap, free=free)
        for _ in range(3):
            decoder.step(decoder.running())
        counts.append(opcodes_of(lambda decoder=decoder: decoder.step(decoder.running())))
        result = decoder.step(decoder.running())
        assert sorted(result.rows) == [row.lane for row in rows]
    assert counts[1] == counts[2] > 1000


def test_steps_are_launched_before_the_last_one_is_read(model):
    decoder, rows = decoder_of(model, [21], PARAMS["greedy"], overlap=1)
    decode_all(decoder, rows)
    assert decoder.runner.order[:6] == ["launch", "launch", "read", "launch", "read", "launch"]


@pytest.mark.parametrize("places, runs", [(0, (5, 5, 5)), (3, (8, 5, 5))])
def test_the_sizes_of_graphs(model, places, runs):
    """A block that has ended needs a place only if its last step has changed it."""
    editing = {"threshold": 0.0, "editing_threshold": 2.0, "max_post_steps": 1}  # its last step changes nothing
    decoder, rows = decoder_of(model, [8] * 5, {"threshold": 0.0} if places else editing, overlap=0)
    seen = []
    decoder.runner.graph = lambda *size, graph=decoder.runner.graph: seen.append(size) or graph(*size)
    decode_all(decoder, rows)
    assert {active for active, _ in seen} == {8} and max(carried for _, carried in seen) == (8 if places else 0)


def sizes_of(model, lengths, params, overlap=1):
    """(finished rows, the sizes of the steps they took)"""
    decoder, rows = decoder_of(model, lengths, params, overlap)
    seen = []
    decoder.runner.graph = lambda *size, graph=decoder.runner.graph: seen.append(size) or graph(*size)
    decode_all(decoder, rows)
    return rows, seen


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_row_alone_waits_under_no_rule(model, params):
    rows, _ = sizes_of(model, [8], params)
    ahead = "edit_window" in params  # its one pass before the last block has edited two blocks
    assert rows[0].counters.settle_forwards == ahead and len(rows[0].counters.forwards_per_block) == 3


def test_no_places_where_blocks_end_unchanged(model):
    """With editing, but for a block that has used up its mask-free steps; nor in a row's last block."""
    for editing, places in ((2.0, {False}), (0.3, {False, True})):  # never, and for ever
        options = {"threshold": 0.5, "editing_threshold": editing, "max_post_steps": 3}
        _, seen = sizes_of(model, LENGTHS[2], options)
        assert len(seen) > 8 and {carried > 0 for _, carried in seen} == places
    (row,), seen = sizes_of(model, [8], {"threshold": 0.6, "steps": 8})
    last = row.counters.forwards_per_block[-1]
    assert [carried for _, carried in seen[-last:]] == [0] * last
    assert {carried for _, carried in seen[:-last]} == {1}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_step_reads_no_logits_but_those_it_lists(model, params, monkeypatch):
    plain, lm_logits, left_out = facts(decode(model, LENGTHS[2], params)), model.lm_logits, []

    def head(hidden, wanted=None):
        logits = lm_logits(hidden)
        if wanted is None:
            return logits
        rows = wanted.order[: int(wanted.count)].long()
        left_out.append(len(logits) - len(rows))
        return torch.full_like(logits, float("nan")).index_copy_(0, rows, logits[rows])

    monkeypatch.setattr(model, "lm_logits", head)
    assert facts(decode(model, LENGTHS[2], params, overlap=1)) == plain and max(left_out) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_captured_graphs_give_the_cpu_references_tokens(golden, model, lengths, params, overlap):
    on_gpu = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, device="cuda", progress=False)
    assert facts(decode(on_gpu, lengths, params, overlap, capture=True)) == facts(decode(model, lengths, params))


@pytest.mark.gpu
def test_the_second_call_captures_nothing(golden, model, monkeypatch):
    on_gpu = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, device="cuda", progress=False)
    captures = []
    capture = StepGraph._capture
    monkeypatch.setattr(StepGraph, "_capture", lambda self: captures.append(self) or capture(self))
    prompts = [list(range(1, 1 + n)) for n in (21, 9, 30)]
    wanted = model.generate(prompts, **OPTIONS)
    assert torch.equal(on_gpu.generate(prompts, graphs=True, **OPTIONS).cpu(), wanted)
    captured = len(captures)
    for _ in range(2):
        assert torch.equal(on_gpu.generate(prompts, graphs=True, **OPTIONS).cpu(), wanted)
    assert len(captures) == captured > 0


@pytest.mark.gpu
def test_a_graph_is_captured_anew_for_filters(golden, model):
    on_gpu = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, device="cuda", progress=False)
    prompt = [list(range(21))]
    for more in ({}, {"temperature": 1.0, "top_k": 7, "seed": 0}, {}):
        wanted = model.generate(prompt, **OPTIONS, **more)
        assert torch.equal(on_gpu.generate(prompt, graphs=True, **OPTIONS, **more).cpu(), wanted)


def test_a_failed_capture_leaves_the_stream_that_was_current(model, monkeypatch):
    current = ["default"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            pass

    @contextmanager
    def stream(chosen):
        before, current[0] = current[0], chosen.name
        try:
            yield
        finally:
            current[0] = before

    class Capture:
        """As torch.cuda.graph: where the capture's end raises, its own stream stays current."""

        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            current[0] = self.stream.name

        def __exit__(self, *error):
            raise RuntimeError("capture failed")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(current[0]))
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: Stream("capture"))
    with pytest.raises(RuntimeError, match="capture failed"):
        decode(model, [21], {"threshold": 0.6}, overlap=0, capture=True)
    assert current == ["default"]
