"""A plan of ints in, a StepResult out: what runs on the device is here and in graph_runner.py, and nowhere else.

A plan names lanes, blocks, pages and tokens; it has no tensors, so that it could be sent to other ranks. A runner has
`lanes` and `execute(plan)`, where rows may have window passes `revise(windows)`, and where they may speculate
`check(checks)`. The eager one does a step's work launch by launch, with any of the forwards that give logits:
CachedForward over our own network, or those of other people's models (adapters/diffusers/foreign.py).
"""

from collections.abc import Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from ..kernels import refine
from ..kernels.attention import Span
from ..model import Read, read_nothing
from .speculation import Check, check
from .window import Window, revise

_ON_CPU = {"dtype": torch.int64, "device": "cpu"}


class Prefill(NamedTuple):
    """Whole blocks of a row, from block `first` on, that are forwarded for their K/V alone."""

    pages: tuple[int, ...]
    limit: int
    first: int
    tokens: list[int]


class LaneStep(NamedTuple):
    """What a step does in one lane.

    block: the one that is refined; pages, limit: of its row, as of kernels.attention.Span.
    first, leading: tokens of the blocks first .. block - 1, whose K/V are not final, so that they are forwarded, too.
    begins: the lane's next block begins with this step.
    """

    lane: int
    block: int
    pages: tuple[int, ...]
    limit: int
    first: int
    leading: list[int]
    begins: bool

    @property
    def carries_one(self) -> bool:
        """The one block whose K/V are not final is the one that gives way to the next with this step."""
        return self.begins and self.first == self.block - 1

    def ahead(self) -> Prefill:
        """Its leading blocks, to be forwarded by themselves."""
        return Prefill(self.pages, self.limit, self.first, self.leading)


class Plan(NamedTuple):
    """One step.

    lanes: those that take part.
    steps: what it does in each of them, for a runner that has to be told; empty where the device knows (`carries`).
    prefill: what is forwarded ahead of it, or with it.
    filters: some row draws with top-k or top-p.
    carried: how many lanes have to carry the block that has ended with its next one, None = some may, nobody knows yet.
    top: by lane, how many of the likeliest ids a row wants for each token, at most MAX_TOP_LOGPROBS; empty = none does.
    guided: some lane is, of those that take part or not.
    """

    lanes: list[int]
    steps: list[LaneStep]
    prefill: list[Prefill]
    filters: bool = False
    carried: int | None = None
    top: Mapping[int, int] = MappingProxyType({})
    guided: bool = False


class Alternatives(NamedTuple):
    """The likeliest ids at the positions of some lanes' blocks, as of kernels.top_logprobs: [n, L, k] of n lanes, or of
    more, of which the first n count."""

    lanes: list[int]
    ids: torch.Tensor
    logprobs: torch.Tensor


class StepResult:
    """What a step did to the lanes; reading it waits for this step alone, not for steps launched since.

    lanes: those of its plan; alternatives: Alternatives of the rows that want them.
    output: RefineOutput, on the device. After wait(): status, NumPy's int32 [S, 8] (kernels.refine.FLAGS ..
    MASKS_BEFORE) of all lanes in use; rows, by lane of the plan a list of these 8 and the number of the block that was
    refined; sequences, whose step it was, which the decoder enters.
    """

    def __init__(self, output, lanes: list[int], alternatives: Alternatives | None = None):
        report = output.report
        self.output, self.lanes, self.sequences, self._arrived = output, lanes, [], None
        self._report = report.to("cpu", non_blocking=True).numpy()  # on its way while further steps are launched
        listed, *lists = alternatives or ((),)
        self._listed = {lane: entry for entry, lane in enumerate(listed)}
        self._elsewhere = {}  # by lane, of what came later: its result and the lane there
        self._lists = [part.to("cpu", non_blocking=True).numpy() for part in lists]
        if report.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(report.device))

    def wait(self):
        """Until it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()  # the one wait of a step
        self.status = self._report[:, : refine.NUM_STATUS]
        numbers = self._report[self.lanes, : refine.NUM_STATUS + 1].tolist()  # sync: on the host already
        self.rows = dict(zip(self.lanes, numbers, strict=True))

    def read(self, lanes: list[int], details: bool = True):
        """[(tokens, steps, confidences, chosen)] of the blocks in some lanes, lists of L numbers each; chosen: of
        kernels.state.report_ref, None where tokens cannot move. Without details the last three are None."""
        if not lanes:
            return []
        length = self.output.token.shape[1]
        begins = range(refine.NUM_STATUS + 1, self._report.shape[1], length)
        columns = [self._report[lanes, begin : begin + length] for begin in begins]  # [n, L] each
        columns[2] = columns[2].view(np.float32)
        lists = [column.tolist() for column in columns[: None if details else 1]]  # sync: on the host already
        return [(*row, *[None] * (4 - len(lists))) for row in zip(*lists, strict=True)]

    def replace(self, lanes: list[int], report: np.ndarray, by: "StepResult | None" = None):
        """In some lanes the step did something else, which the host has decided. report: their rows of the report; by:
        the result it has decided by, whose lanes are those of the rows, None for this one."""
        self._report[lanes, : report.shape[1]] = report
        numbers = report[:, : refine.NUM_STATUS + 1].tolist()  # sync: NumPy's
        self.rows.update(zip(lanes, numbers, strict=True))
        if by is not None:
            self._elsewhere |= {lane: (by, row) for row, lane in enumerate(lanes)}

    def read_top(self, lane: int, k: int):
        """(ids, log-probabilities) of the k likeliest ids at the positions of a lane's block, lists [L] of k each; -1
        and -inf where there are fewer. What the step has not written is undefined."""
        if lane in self._elsewhere:
            by, row = self._elsewhere[lane]
            return by.read_top(row, k)
        entry = self._listed[lane]
        return tuple(part[entry, :, :k].tolist() for part in self._lists)  # sync: on the host already


class EagerRunner:
    """Steps launch by launch, of the leading lanes that are in use.

    forward: called as forward(plan, state, needed) -> logits of the needed positions, [M, V] in the model's dtype, and
        index int64 into them or -1, of the shape of `needed`; forward.cached says whether it keeps K/V,
        forward.prefill(list of Prefill) makes them.
    lanes: Lanes.
    all_logits: candidates for every position of a row's block, not only where its rule needs them.
    """

    carries = False  # the host says what is forwarded with a block

    def __init__(self, forward, lanes, all_logits=False):
        self.forward, self.lanes, self.all_logits = forward, lanes, all_logits
        self.cached, self.prefill = forward.cached, forward.prefill

    def execute(self, plan: Plan) -> StepResult:
        lanes = self.lanes
        lanes.begin_next([step.lane for step in plan.steps if step.begins])
        needed = self._everything() if self.all_logits else lanes.needed()
        logits, index = self.forward(plan, lanes.state, needed)
        alternatives = self._alternatives(plan.top, logits, index) if plan.top else None
        output = lanes.step(logits, index, plan.filters, guided=plan.guided)
        return StepResult(output, plan.lanes, alternatives)

    def revise(self, windows: list[Window]) -> StepResult:
        """The window passes of some rows; the result's lanes are the window blocks, row by row."""
        return self.forward.revise(windows, self.lanes.ids)

    def check(self, checks: list[Check]) -> StepResult:
        """The checks of some rows' drafts; the result's lanes are their numbers."""
        return self.forward.check(checks, self.lanes.ids)

    def _alternatives(self, top, logits, index):
        at = torch.tensor(list(top), **_ON_CPU).to(index.device)
        return Alternatives(list(top), *self.lanes.top_logprobs(logits, index[at], at, max(top.values())))

    def forget(self):
        """Hold nothing that can be made again: there is nothing."""

    def _everything(self):
        state, _ = self.lanes.leading(self.lanes.in_use)
        return (state.kind != refine.PADDING) & (state.frozen == 0)[:, None]


class CachedForward:
    """Forwards of our own network over a paged cache.

    model: LLaDA2Model.
    cache: PagedKVCache.
    cached: False recomputes all blocks of a row at every step.
    """

    def __init__(self, model, cache, cached=True):
        self.model, self.cache, self.cached = model, cache, cached

    @torch.inference_mode()  # where no_grad costs 7 % more of a step on a CPU, in views and versions
    def __call__(self, plan, state, needed):
        spans = [Span(step.pages, step.first, step.block + 1 - step.first, step.limit) for step in plan.steps]
        lanes = torch.tensor(plan.lanes, **_ON_CPU)
        chosen = needed[lanes]
        ends = list(accumulate(span.num_blocks for span in spans))
        read = Read([end - 1 for end in ends], torch.where(chosen.flatten())[0])
        tokens = state.tokens[lanes]  # [lanes, L]
        if any(step.leading for step in plan.steps):
            rows = zip(plan.steps, tokens.unbind(), strict=True)
            tokens = torch.cat([part for step, row in rows for part in (self._ids(step.leading), row)])
        hidden = self._forward(tokens.flatten(), spans, plan.prefill, read)
        index = torch.full(needed.shape, -1, dtype=torch.int64, device=needed.device)
        index[lanes] = torch.where(chosen, chosen.flatten().cumsum(0).view(chosen.shape) - 1, -1)
        return self.model.lm_logits(hidden), index

    @torch.inference_mode()
    def prefill(self, blocks: list[Prefill]):
        """Forward whole blocks for their K/V alone."""
        self._forward(None, [], blocks, read_nothing(self.model.device))

    @torch.inference_mode()
    def revise(self, windows: list[Window], ids) -> StepResult:
        """The window passes of some rows. ids: SpecialIds."""
        return _beside(*revise(self.model, self.cache, windows, ids))

    @torch.inference_mode()
    def check(self, checks: list[Check], ids) -> StepResult:
        """The checks of some rows' drafts. ids: SpecialIds."""
        return _beside(*check(self.model, self.cache, checks, ids))

    def _forward(self, tokens, spans, prefill, read):
        """Hidden states that `read` names. tokens [T]: of the spans; those of `prefill` go behind them."""
        length = self.cache.block_length
        if prefill:
            more = self._ids([token for part in prefill for token in part.tokens])
            tokens = more if tokens is None else torch.cat([tokens, more])
            spans = [*spans, *(Span(p.pages, p.first, len(p.tokens) // length, p.limit) for p in prefill)]
        at = [n for s in spans for n in range(s.first_block * length, (s.first_block + s.num_blocks) * length)]
        return self.model.forward_blocks(tokens, self._ids(at), spans, self.cache, read)

    def _ids(self, numbers):
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)


def _beside(output, listed):
    """The StepResult of blocks in no lane, known by their numbers. listed: their likeliest ids, None = nobody's."""
    blocks = list(range(len(output.token)))
    return StepResult(output, blocks, Alternatives(blocks, *listed) if listed else None)
