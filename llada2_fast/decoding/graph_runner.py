"""One denoise step as fixed-shape device work: ended blocks give way to the next ones, forward of the active blocks, LM
head and refinement, replayed as a CUDA graph. The device knows by itself where each row stands, so the host names the
lanes that take part, and no more; it may launch a step before it has read what the last one did.

Shapes: A active blocks, C places for carried (ended) blocks, L block_length, S lanes, P pages of a row. Entries of the
plan and places that no row needs are no row's blocks: they are written to no page and go to no expert, so a graph of a
larger size costs a smaller batch little and changes none of its bits.
"""

from functools import lru_cache

import torch

from ..config import MAX_TOP_LOGPROBS
from ..kernels._ambient import lasting
from ..kernels.attention import BlockBatch, pinned
from ..kernels.gemm import Wanted
from ..kernels.roles import needed_ref
from .runner import Alternatives, CachedForward, Plan, StepResult


def power_of_two(n):
    """The least one that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


class GraphRunner:
    """Steps as CUDA graphs, captured as they are first needed, one per size: active blocks, rounded up to a power of
    two, and places for carried ones. Prefill, window passes and checks run outside them.

    model: LLaDA2Model.
    cache: PagedKVCache.
    lanes: Lanes with a table of pages.
    capture: False does a step's work launch by launch.
    """

    carries = True  # the device forwards an ended block with the next one
    cached = True

    def __init__(self, model, cache, lanes, capture=True):
        self.model, self.cache, self.lanes, self.capture = model, cache, lanes, capture
        self._eager = CachedForward(model, cache)
        self.prefill = self._eager.prefill
        self.forget()

    def forget(self):
        """Hold no graph, nor its memory, and no address of the cache."""
        captures = self.capture and self.lanes.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if captures else None
        self._graphs = {}

    def execute(self, plan: Plan) -> StepResult:
        if plan.prefill:
            self.prefill(plan.prefill)
        graph = self.graph(*self._size(plan))
        graph.load(plan.lanes, plan.filters, bool(plan.top), plan.guided)
        output = graph.replay() if self.capture else graph.run()
        return StepResult(output, plan.lanes, Alternatives(plan.lanes, *graph.top) if plan.top else None)

    def revise(self, windows):
        """As of EagerRunner."""
        return self._eager.revise(windows, self.lanes.ids)

    def check(self, checks):
        """As of EagerRunner."""
        return self._eager.check(checks, self.lanes.ids)

    def graph(self, active: int, carried: int) -> "StepGraph":
        """The step of one size."""
        if (active, carried) not in self._graphs:
            self._graphs[active, carried] = StepGraph(self.model, self.cache, self.lanes, active, carried, self.pool)
        return self._graphs[active, carried]

    @staticmethod
    def _size(plan):
        """Active blocks and places to carry ended ones: as many as end, or, where that is not known yet, for a quarter
        of the rows: at the usual 4 to 8 steps a block so many end in a step. Without a place a row waits for a step."""
        active = power_of_two(len(plan.lanes))
        return active, -(-active // 4) if plan.carried is None else power_of_two(plan.carried)


class StepGraph:
    """The step of one size. run() does its work; replay() does it by a CUDA graph, captured at the first call.

    pool: memory that several graphs share, as no two run at a time and what one returns is read before the next runs.
    What the lanes hold is read at replay, at the addresses it had at capture.

    top: where the plan asks for them, the MAX_TOP_LOGPROBS likeliest ids [A, L, k] at the entries' positions and their
        log-probabilities, as of the last step.
    """

    @lasting
    def __init__(self, model, cache, lanes, active, carried, pool=None):
        self.model, self.cache, self.lanes = model, cache, lanes
        self.active, self.carried, self.pool = active, carried, pool
        self.planned = self.top = None
        self.filters = self.lists = self.guided = False  # which variant of the step it is
        self._captured = {}  # by variant: the graph, what run() returned and `top`
        # the plan: each entry's lane, whether it repeats entry 0; each lane's entry or -1
        self._sizes = [active, active, lanes.count]
        self._plan = torch.zeros(sum(self._sizes), dtype=torch.int32, device=lanes.device)
        self._offsets = torch.arange(cache.block_length, device=lanes.device)
        # each position's row of the logits; negative in lanes without an entry
        self._index = torch.empty((lanes.count, cache.block_length), dtype=torch.int64, device=lanes.device)

    def load(self, lanes, filters, lists=False, guided=False):
        """Plan a step. lanes: the ints of those that take part, at least one; filters: some row has top_k or top_p;
        lists: some row wants the likeliest ids; guided: some row is in a language."""
        if lanes != self.planned:
            self.planned = None  # until all of it is there
            entry = [-1] * self._sizes[-1]
            for i, lane in enumerate(lanes):
                entry[lane] = i
            spare = self.active - len(lanes)
            numbers = [*lanes, *lanes[:1] * spare, *[0] * len(lanes), *[1] * spare, *entry]
            self._plan.copy_(pinned(numbers, self._plan.device), non_blocking=True)
            entry = self._plan.split(self._sizes)[2]
            torch.add(self._offsets, entry[:, None], alpha=len(self._offsets), out=self._index)
            self.planned = list(lanes)
        self.filters, self.lists, self.guided = filters, lists, guided

    def run(self):
        """The step on whatever device; returns RefineOutput. No host sync, no allocation that depends on data."""
        lanes = self.lanes
        lane, repeat, _ = self._plan.split(self._sizes)
        row, block, *each, order, count = lanes.advance(lane, repeat, self.carried)
        tokens, positions, slots = (x.flatten() for x in each)  # [A + C, L] -> [(A + C) * L]
        blocks = BlockBatch(row, block, lanes.page_table, lanes.bounds.limit)
        hidden = self.model.forward_blocks(tokens, positions, blocks, self.cache, slots=slots)
        logits = self.model.lm_logits(hidden[: self.active * self.cache.block_length], Wanted(order, count))
        self.top = self._list(logits, lane.long(), repeat) if self.lists else None
        return lanes.step(logits, self._index, self.filters, only_needed=True, guided=self.guided)

    def _list(self, logits, lane, repeat):
        state, flags = self.lanes.state, self.lanes.params.flags
        needed = needed_ref(state.tokens[lane], state.kind[lane], state.frozen[lane], flags[lane], self.lanes.mask_id)
        needed &= (repeat == 0)[:, None]  # other logits may be anything
        index = torch.where(needed, self._index[lane], -1)
        return self.lanes.top_logprobs(logits, index, lane, MAX_TOP_LOGPROBS)

    def replay(self):
        """run(), captured once per variant and replayed; what it returns stays at its address and is overwritten by the
        next."""
        variant = self.filters, self.lists, self.guided
        with torch.cuda.device_of(self._plan):
            if variant not in self._captured:
                self._captured[variant] = self._capture()
            graph, results, self.top = self._captured[variant]
            graph.replay()
        return results

    def _capture(self):
        """Compile and warm up, with the state put back afterwards, then capture. Returns the graph and its results."""
        kept = [(x, x.clone()) for x in self.lanes.changing]
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(self._plan.device)
        capture = torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in kept:
            tensor.copy_(before)
        with torch.cuda.stream(torch.cuda.current_stream()), capture:  # a capture that fails leaves its stream current
            results = self.run()
        return graph, results, self.top


@lru_cache
def _capture_stream(device):
    """One for all graphs of a GPU: cuBLAS keeps a workspace for each stream it has seen. PyTorch's own default is on
    the GPU that was current when it was first asked for."""
    return torch.cuda.Stream(device)
