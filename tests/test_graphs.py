"""The step as fixed-shape work: without a GPU run eagerly, it must give what the cached forward gives."""

import pytest
import torch

from llada2_fast.cache import PagedKVCache
from llada2_fast.config import DecodeParams
from llada2_fast.decoder import BlockDecoder, CachedForward, GraphedForward, run
from llada2_fast.graphs import StepGraph
from llada2_fast.model import LLaDA2Model


@pytest.fixture(scope="module")
def model(golden):
    return LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(StepGraph, "replay", StepGraph.run)  # the same work, not captured


def decode(model, graphed, lengths, **params):
    """Ids and forwards of some prompts, in rows of one decoder."""
    params = DecodeParams(gen_length=19, block_length=8, **params)
    blocks = [-(-(n + params.gen_length) // 8) for n in lengths]
    cache = PagedKVCache(model.config, sum(blocks), 8, model.dtype, "cpu")
    forward = GraphedForward(model, cache, len(lengths), max(blocks)) if graphed else CachedForward(model, cache)
    decoder = BlockDecoder(forward, len(lengths), 8, mask_id=255, max_eos=1)
    for slot, n in enumerate(lengths):
        prompt = torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n))
        decoder.open(slot, prompt, params, seed=n, eos_ids=(252,))
    run(decoder)
    return [(row.output((252,)).tolist(), row.counters.forwards_per_block) for row in decoder.rows]


@pytest.mark.parametrize("params", [
    {"threshold": 0.6, "steps": 8},
    {"threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 3},
    {"temperature": 0.8, "top_k": 7, "threshold": 0.4},
    {"threshold": 0.9, "attend_tail": False},
], ids=["greedy", "editing", "sampling", "no tail"])  # fmt: skip
@pytest.mark.parametrize("lengths", [[0], [21], [3, 40, 8, 17, 9]], ids=str)
def test_the_graphs_work_gives_the_cached_forwards_tokens(model, eager, lengths, params):
    assert decode(model, True, lengths, **params) == decode(model, False, lengths, **params)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[21], [3, 40, 8, 17, 9]], ids=str)
def test_captured_graphs_give_the_cpu_references_tokens(golden, model, lengths):
    on_gpu = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, device="cuda", progress=False)
    params = {"threshold": 0.6, "steps": 8}
    tokens = [ids for ids, _ in decode(model, False, lengths, **params)]
    blocks = [-(-(n + 19) // 8) for n in lengths]
    cache = PagedKVCache(on_gpu.config, sum(blocks), 8, on_gpu.dtype, "cuda")
    forward = GraphedForward(on_gpu, cache, len(lengths), max(blocks))
    decoder = BlockDecoder(forward, len(lengths), 8, mask_id=255, device="cuda", max_eos=1)
    for slot, n in enumerate(lengths):
        prompt = torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n))
        decoder.open(slot, prompt.cuda(), DecodeParams(gen_length=19, block_length=8, **params), n, (252,))
    run(decoder)
    assert [row.output((252,)).tolist() for row in decoder.rows] == tokens
