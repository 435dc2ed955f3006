"""One denoise step as fixed-shape device work: ended blocks give way to the next ones, forward of the active blocks, LM
head and refinement, replayed as a CUDA graph. The device knows by itself where each row stands, so the host names the
slots that take part, and no more; it may launch a step before it has read what the last one did.

Shapes: A active blocks, C places for carried (ended) blocks, L block_length, S slots, P pages of a row. Entries of the
plan that no row needs repeat the first one: they write the same keys and values to the same page and touch no further
expert, so a graph of a larger size costs a smaller batch next to nothing and changes none of its bits.
"""

from functools import lru_cache

import torch

from ..kernels._ambient import lasting
from ..kernels.advance import RowBounds, advance
from ..kernels.attention import BlockBatch, pinned
from ..kernels.refine import CHANGED, FLAGS, SpecialIds, refine_step


class Slots:
    """What the device knows of the rows in the slots beside BlockState, at fixed addresses.

    page_table int32 [S, P]: a row's pages; bounds: see RowBounds; pool: memory that all their graphs share, as no two
    run at a time and what one returns is read before the next runs.
    """

    @lasting
    def __init__(self, slots, pages, device):
        self.page_table = torch.zeros(slots, pages, dtype=torch.int32, device=device)
        self.bounds = RowBounds(*(torch.zeros(slots, dtype=torch.int32, device=device) for _ in range(3)))
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def open(self, slot, pages, total, limit):
        """Describe the row of a slot: its pages, a tuple of ints, and its bounds."""
        device = self.page_table.device
        self.page_table[slot, : len(pages)].copy_(pinned(pages, device), non_blocking=True)
        self.bounds.total[slot], self.bounds.limit[slot] = total, limit


class StepGraph:
    """The step of one size. run() does its work; replay() does it by a CUDA graph, captured at the first call.

    state, params: the decoder's BlockState and RefineParams over S slots, read at replay, as `slots` is, at the
    addresses they had at capture.
    """

    @lasting
    def __init__(self, model, cache, state, params, mask_id, slots, active, carried):
        self.model, self.cache, self.state, self.params, self.mask_id = model, cache, state, params, mask_id
        self.slots, self.active, self.carried = slots, active, carried
        self.graph = self.results = self.planned = None
        self.filters = False
        self.stale = True  # not captured yet, or without the launch that top-k and top-p need
        # the plan: each entry's slot, whether it repeats entry 0; each slot's entry or -1
        self._sizes = [active, active, state.tokens.shape[0]]
        self._plan = torch.zeros(sum(self._sizes), dtype=torch.int32, device=state.tokens.device)
        self._lanes = torch.arange(cache.block_length, device=state.tokens.device)

    def load(self, slots, filters):
        """Plan a step. slots: the ints of those that take part, at least one; filters: some row has top_k or top_p."""
        if slots != self.planned:
            entry = [-1] * self._sizes[-1]
            for i, slot in enumerate(slots):
                entry[slot] = i
            spare = self.active - len(slots)
            numbers = [*slots, *slots[:1] * spare, *[0] * len(slots), *[1] * spare, *entry]
            self._plan.copy_(pinned(numbers, self._plan.device), non_blocking=True)
            self.planned = list(slots)
        if filters and not self.filters:
            self.filters = self.stale = True

    def run(self):
        """The step on whatever device; returns (RefineOutput, report int32 [S, 9 + 3 L]), see Report. No host sync, no
        allocation that depends on data."""
        length, state, ids = self.cache.block_length, self.state, SpecialIds(self.mask_id)
        slot, repeat, entry = self._plan.split(self._sizes)
        row, index, tokens = advance(state, self.slots.bounds, slot, repeat, self.carried, ids)
        positions = torch.add(self._lanes, index[:, None], alpha=length)
        blocks = BlockBatch(row, index, self.slots.page_table, self.slots.bounds.limit)
        hidden = self.model.forward_blocks(tokens.flatten(), positions.flatten(), blocks, self.cache)
        logits = self.model.lm_logits(hidden[: self.active * length])
        at = torch.add(self._lanes, entry[:, None], alpha=length)  # negative in slots without an entry
        output = refine_step(logits, state, self.params, ids, index=at, filters=self.filters, only_needed=True)
        changed = self.slots.bounds.changed
        torch.where(entry < 0, changed, output.status[:, FLAGS] & CHANGED, out=changed)
        confidence = state.commit_confidence.view(torch.int32)
        block = (state.block_start // length).int()[:, None]
        return output, torch.cat((output.status, block, state.tokens.int(), state.commit_step, confidence), 1)

    def replay(self):
        """run(), captured once and replayed; what it returns stays at its address and is overwritten by the next."""
        with torch.cuda.device_of(self._plan):
            if self.stale:
                self._capture()
            self.graph.replay()
        return self.results

    def _capture(self):
        """Compile and warm up, with the state put back afterwards, then capture."""
        kept = [(x, x.clone()) for x in (*vars(self.state).values(), self.slots.bounds.changed)]
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(self._plan.device)
        capture = torch.cuda.graph(graph, pool=self.slots.pool, stream=stream, capture_error_mode="thread_local")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in kept:
            tensor.copy_(before)
        with torch.cuda.stream(torch.cuda.current_stream()), capture:  # a capture that fails leaves its stream current
            results = self.run()
        # the old graph goes only now: nothing can be captured into a pool that no graph holds any more
        self.graph, self.results, self.stale = graph, results, False


@lru_cache
def _capture_stream(device):
    """One for all graphs of a GPU: cuBLAS keeps a workspace for each stream it has seen. PyTorch's own default is on
    the GPU that was current when it was first asked for."""
    return torch.cuda.Stream(device)


class Report:
    """A step's results on their way to the host; reading one waits for it alone, not for steps launched since.

    rows: whose step it was. Columns of a report: status [8], number of the active block, its tokens, steps of commit
    and bits of the confidences at commit [L each].
    """

    def __init__(self, rows, report):
        self.rows = list(rows)
        self._host = report.to("cpu", non_blocking=True)
        self._arrived = None
        if report.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(report.device))

    def wait(self):
        """Until it is here; then status, blocks: lists of ints over the slots, and what follows, are to be had."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self.status, self.blocks = self._host[:, :8].tolist(), self._host[:, 8].tolist()  # sync: on the host already
        self._tokens, self._steps, bits = self._host[:, 9:].chunk(3, 1)
        self._confidence = bits.view(torch.float32)

    def tokens(self, row):
        """int32 [L] on the CPU."""
        return self._tokens[row.slot]

    def details(self, rows):
        """[(tokens, steps, confidences)] of the active blocks of some rows, lists of L numbers each."""
        slots = [row.slot for row in rows]
        columns = (self._tokens, self._steps, self._confidence)
        lists = [column[slots].tolist() for column in columns]  # sync: on the host already
        return list(zip(*lists, strict=True))
