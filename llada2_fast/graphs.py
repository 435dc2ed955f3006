"""One denoise step as fixed-shape device work: forward of the active blocks, LM head and refinement, replayed as a
CUDA graph. The host writes one small plan before a step and reads one small status tensor behind it.

Shapes: A active blocks and C carried (finished) blocks at most, L block_length, P pages of a row. Blocks of the plan
that no row needs repeat the first active block: they write the same keys and values to the same page and touch no
further expert, so a graph of a larger size costs a smaller batch next to nothing and changes none of its bits.
"""

import torch

from .kernels.attention import BlockBatch
from .kernels.refine import refine_step


class StepGraph:
    """The step of one size. run() does its work; replay() does it by a CUDA graph, captured at the first call.

    state, params: the decoder's RefineState and RefineParams over S slots; page_table int32 [S, P] and limit int32 [S]
    of the slots' rows: all are read at replay, at the addresses they had at capture.
    """

    def __init__(self, model, cache, state, params, mask_id, page_table, limit, active, carried):
        self.model, self.cache, self.state, self.params, self.mask_id = model, cache, state, params, mask_id
        self.page_table, self.limit, self.active, self.carried = page_table, limit, active, carried
        device, length = state.tokens.device, cache.block_length
        blocks, slots = active + carried, state.tokens.shape[0]
        self.carried_tokens = torch.zeros(carried, length, dtype=torch.int64, device=device)
        self.graph = self.output = None
        # the plan: each block's slot, its number in its row, whether it repeats block 0; each slot's block or -1
        self._sizes = [blocks, blocks, blocks, slots]
        pinned = device.type == "cuda"
        self._plan_host = torch.zeros(sum(self._sizes), dtype=torch.int32, pin_memory=pinned)
        self._plan = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)

    def load(self, active, carried, filters):
        """Plan a step. active: [(slot, block)], carried: [(slot, block, tokens int64 [L])], at least one active block.

        filters: some row has top_k or top_p.
        """
        at_slot = [-1] * self._sizes[-1]
        for i, (slot, _) in enumerate(active):
            at_slot[slot] = i
        first = active[0]
        slots = [first] * (self.active + self.carried)
        repeats = [1] * len(slots)
        for i, (slot, block, *_) in [*enumerate(active), *enumerate(carried, self.active)]:
            slots[i], repeats[i] = (slot, block), 0
        numbers = [s for s, _ in slots] + [b for _, b in slots] + repeats + at_slot
        self._plan_host.copy_(torch.tensor(numbers, dtype=torch.int32))
        self._plan.copy_(self._plan_host, non_blocking=True)
        for i, (_, _, tokens) in enumerate(carried):
            self.carried_tokens[i] = tokens
        if self.graph is not None and filters and not self.filters:
            self.graph = None  # captured without the launch that top-k and top-p need
        self.filters = filters or (self.graph is not None and self.filters)

    def run(self):
        """The step on whatever device; returns RefineOutput. No host sync, no allocation that depends on data."""
        length = self.cache.block_length
        row, index, repeat, at_slot = self._plan.split(self._sizes)
        where = torch.arange(length, device=row.device)
        tokens = torch.cat((self.state.tokens[row[: self.active].long()], self.carried_tokens))
        tokens = torch.where(repeat[:, None] != 0, tokens[:1], tokens)
        positions = index.long()[:, None] * length + where
        blocks = BlockBatch(row, index, self.page_table, self.limit)
        hidden = self.model.forward_blocks(tokens.flatten(), positions.flatten(), blocks, self.cache)
        logits = self.model.lm_logits(hidden[: self.active * length])
        at = at_slot.long()[:, None]
        return refine_step(
            logits, self.state, self.params, self.mask_id, index=torch.where(at < 0, -1, at * length + where),
            filters=self.filters, only_needed=True,
        )  # fmt: skip

    def replay(self):
        """run(), captured once and replayed; its outputs stay at their addresses and are overwritten by the next."""
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.output

    def _capture(self):
        """Compile and warm up on a side stream, with the state put back afterwards, then capture."""
        kept = {name: tensor.clone() for name, tensor in vars(self.state).items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        for name, tensor in kept.items():
            getattr(self.state, name).copy_(tensor)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.run()
