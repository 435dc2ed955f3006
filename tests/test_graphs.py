"""The step as fixed-shape work: without a GPU run eagerly, it must give what the cached forward gives."""

from contextlib import contextmanager

import pytest
import torch

from llada2_fast.cache import PagedKVCache
from llada2_fast.config import DecodeParams
from llada2_fast.decoding import graph_runner as graphs
from llada2_fast.decoding.decoder import BlockDecoder, CachedForward, GraphedForward, run
from llada2_fast.decoding.graph_runner import Report, StepGraph
from llada2_fast.generate import _graphed_decoder
from llada2_fast.model import LLaDA2Model


@pytest.fixture(scope="module")
def model(golden):
    return LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(StepGraph, "replay", StepGraph.run)  # the same work, not captured


PARAMS = {
    "greedy": {"threshold": 0.6, "steps": 8},
    "editing": {"threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 3},
    "sampling": {"temperature": 0.8, "top_k": 7, "threshold": 0.4},
    "no tail": {"threshold": 0.9, "attend_tail": False},
    "one step a block": {"threshold": 0.0, "eos_early_stop": True},
    "hf-2.0": {"threshold": 0.3, "steps": 2, "profile": "hf-2.0"},
    "hf-2.1": {"threshold": 0.5, "editing_threshold": 0.2, "max_post_steps": 2, "profile": "hf-2.1"},
}
LENGTHS = [[0], [21], [3, 40, 8, 17, 9]]
OPTIONS = {"gen_length": 40, "block_length": 8, "threshold": 0.6, "mask_id": 255, "eos_id": 252}  # of generate()


def decode(model, lengths, params, lag=None, trace=False):
    """Finished rows of some prompts; lag: None = the cached forward, else graphs with this lag."""
    params = DecodeParams(gen_length=19, block_length=8, **params)
    blocks = [-(-(n + params.gen_length) // 8) for n in lengths]
    cache = PagedKVCache(model.config, sum(blocks), 8, model.dtype, model.device)
    if lag is None:
        forward = CachedForward(model, cache)
    else:
        forward = GraphedForward(model, cache, len(lengths), max(blocks), lag)
    decoder = BlockDecoder(forward, len(lengths), 8, mask_id=255, device=model.device, max_eos=1, trace=trace)
    for slot, n in enumerate(lengths):
        prompt = torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n))
        decoder.open(slot, prompt.to(model.device), params, seed=n, eos_ids=(252,))
    run(decoder)
    return decoder.rows


def facts(rows):
    return [
        (row.output((252,)).tolist(), row.finish_reason, row.counters.forwards_per_block, row.counters.commits,
         row.counters.edits, row.events)
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_graphs_work_gives_the_cached_forwards_tokens(model, eager, lengths, params, lag):
    assert facts(decode(model, lengths, params, lag)) == facts(decode(model, lengths, params))


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_traces_are_the_same(model, eager, params):
    with_graphs = facts(decode(model, LENGTHS[2], params, lag=0, trace=True))
    assert with_graphs == facts(decode(model, LENGTHS[2], params, trace=True))
    assert any(events for *_, events in with_graphs)


def test_a_row_without_a_place_waits_for_one_step(model, eager):
    """A step fills a block: five rows end theirs at once, two find places. Three wait; then they go on freely while the
    two end their second block and find places again; and of the three one waits once more."""
    params = {"threshold": 0.0}
    rows = decode(model, [8] * 5, params, lag=1)
    assert all(row.counters.forwards_per_block == [1, 1, 1] for row in rows)
    assert sum(row.counters.settle_forwards for row in rows) == 4
    assert sum(row.counters.settle_forwards for row in decode(model, [8] * 5, params, lag=0)) == 0


def test_steps_are_launched_before_the_last_one_is_read(model, eager, monkeypatch):
    order = []
    replay, wait = StepGraph.replay, Report.wait
    monkeypatch.setattr(StepGraph, "replay", lambda self: order.append("launch") or replay(self))
    monkeypatch.setattr(Report, "wait", lambda self: order.append("read") or wait(self))
    decode(model, [21], PARAMS["greedy"], lag=1)
    assert order[:6] == ["launch", "launch", "read", "launch", "read", "launch"]


@pytest.mark.gpu
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_captured_graphs_give_the_cpu_references_tokens(golden, model, lengths, params, lag):
    on_gpu = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, device="cuda", progress=False)
    assert facts(decode(on_gpu, lengths, params, lag)) == facts(decode(model, lengths, params))


def test_a_model_keeps_the_decoder_of_its_last_call(model):
    def decoder(blocks, length=8, num_eos=1):
        return _graphed_decoder(model, blocks, length, 255, num_eos)

    try:
        model._graphed_decoder = first = decoder([3, 5, 1])
        assert first.forward.slots.page_table.shape == (4, 8) and first.forward.cache.num_pages == 16
        for blocks in ([3, 5, 1], [8], [4, 4, 4, 4]):
            assert decoder(blocks) is first
            assert decoder(blocks) is not first  # somebody else has it
            model._graphed_decoder = first
        for larger in ([9], [1] * 5, [8, 8, 8], {"length": 4}, {"num_eos": 2}):
            model._graphed_decoder = first
            assert (decoder([1], **larger) if isinstance(larger, dict) else decoder(larger)) is not first
        model._graphed_decoder = first
        model.to("cpu")  # weights may be elsewhere now
        assert decoder([1]) is not first
    finally:
        vars(model).pop("_graphed_decoder", None)


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
        decode(model, [21], {"threshold": 0.6}, lag=0)
    assert current == ["default"]
