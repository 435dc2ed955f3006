"""The refinement loop: the only one in the project. generate, the pipeline and the engine drive `BlockDecoder.step`.

A decoder has a fixed number of slots. A slot holds one `Row`: a prompt, its parameters, its canvas and the block it is
working on. A step forwards the active blocks of some rows, refines them all at once, and reads one small status tensor;
a row whose block has ended starts its next block at its next step, so rows never wait for one another. With graphs the
device starts it, and the host may read what a step did when it has launched the next one.
"""

import time
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from tqdm.auto import tqdm

from ..config import DecodeParams
from ..kernels import refine
from ..kernels._ambient import lasting
from ..kernels.attention import Span
from ..kernels.refine import BlockState, RefineParams, SpecialIds, needed_positions, refine_step
from ..model import Read, read_nothing
from .graph_runner import Report, Slots, StepGraph

# Prompt tokens of one prefill forward, by device; longer prompts go in chunks of whole blocks. On a CPU chunks keep the
# peak of memory down whatever the prompt's length; 192 took another third off it and a prefill took 14 to 18 % longer.
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
_NEVER = 2**30
_ON_CPU = {"dtype": torch.int64, "device": "cpu"}


@dataclass
class Counters:
    """What a row cost. TPF = generated tokens / denoise_forwards; prefill and settling forwards count apart."""

    denoise_forwards: int = 0
    prefill_forwards: int = 0
    settle_forwards: int = 0
    commits: int = 0
    edits: int = 0
    forwards_per_block: list[int] = field(default_factory=list)
    prefill_s: float = 0.0


@dataclass(eq=False)
class Row:
    """One prompt being continued. Positions are row-local: 0 .. total-1, on a grid of blocks from position 0."""

    slot: int | None
    params: DecodeParams
    seed: int
    eos: torch.Tensor  # int64 [max_eos], -1 where unused
    length: int  # block_length L
    prompt_length: int
    canvas: torch.Tensor  # int64 [blocks * L]: prompt, committed blocks, masks
    kind: torch.Tensor  # int8 [blocks * L]
    block: int  # the active block
    prior_flags: int  # PRIOR_MASK | PRIOR_EOS
    pages: tuple[int, ...] = ()
    settled: int = 0  # leading blocks whose final K/V are in their pages
    started: bool = False  # its active block is laid out: it takes part in steps
    block_done: bool = False
    finish_reason: str | None = None
    error: str | None = None
    eos_position: int | None = None
    counters: Counters = field(default_factory=Counters)
    events: list[tuple] | None = None  # (step, position, kind, token, confidence, old token); see trace.py
    mark: tuple[Counters, int] | None = None  # counters and number of events when the active block began

    @property
    def total(self):
        """Prompt and generated positions, without the tail."""
        return self.prompt_length + self.params.gen_length

    @property
    def first_block(self):
        """The block generation starts in."""
        return self.prompt_length // self.length

    @property
    def num_blocks(self):
        return self.canvas.shape[0] // self.length

    @property
    def span(self):
        """The active block's slice of the canvas."""
        return slice(self.block * self.length, (self.block + 1) * self.length)

    @property
    def limit(self):
        """Positions that exist: the tail counts only where it is attended to."""
        return self.canvas.shape[0] if self.params.attend_tail else self.total

    def output(self, eos_ids):
        """The generated ids of a finished row, cut after the first EOS of its first gen_length tokens.

        Under hf-2.0 an early return is cut where that model card cuts it: at the first EOS of prompt and tail, too.
        """
        eos = torch.tensor(eos_ids, dtype=torch.int64, device=self.canvas.device)
        early = self.params.profile == "hf-2.0" and self.eos_position is not None
        begin, end = (0, len(self.canvas)) if early else (self.prompt_length, self.total)
        hits = torch.where(torch.isin(self.canvas[begin:end], eos))[0]
        if len(hits):
            end = begin + int(hits[0]) + 1
        return self.canvas[self.prompt_length : end]


def row_rules(params, length):
    """DecodeParams -> the row's scalars of RefineParams (all but seed and eos_ids), as semantics.md 2 and 6 state."""
    flags = 0
    steps, least, max_steps = params.steps, params.minimal_topk, _NEVER
    if params.profile == "hf-2.0":
        steps = max_steps = min(params.steps, params.gen_length // params.minimal_topk)
        least = 0
        flags |= refine.FILL_PROMPT | refine.EOS_HOLDS | (refine.EOS_COMMIT if params.eos_early_stop else 0)
    elif params.profile == "hf-2.1":
        steps, least, max_steps = length, params.num_to_transfer, min(length + params.max_post_steps + 1, _NEVER)
        flags |= refine.FILL_PROMPT | refine.EDITING | (refine.EOS_CLEAN if params.eos_early_stop else 0)
    else:
        editing = params.editing_threshold is not None
        sglang = params.profile in ("sglang-lowconf", "sglang-joint")
        if sglang:
            steps, least = length, 1  # below the threshold the one most confident position
        flags |= refine.BAN_MASK | (refine.EDITING if editing else 0) | (0 if sglang else refine.OWN_SOFTMAX)
        if params.eos_early_stop:
            flags |= refine.EOS_END if editing or sglang else refine.EOS_STEP
    return {
        "temperature": params.temperature if params.draws else 0.0,
        "top_k": params.top_k or 0,
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "threshold": params.threshold,
        "edit_threshold": 0.0 if params.editing_threshold is None else params.editing_threshold,
        "steps": steps,
        "min_transfer": least,
        "max_steps": max_steps,
        "max_post_steps": params.max_post_steps,
        "flags": flags,
    }


class EagerReport:
    """What a step did, read from where it did it; see graphs.Report."""

    def __init__(self, rows, output, state):
        self.rows, self._state = rows, state
        self.status = output.status.tolist()  # sync: the one of a step

    def tokens(self, row):
        return self._state.tokens[row.slot]

    def details(self, rows):
        slots = torch.tensor([row.slot for row in rows], dtype=torch.int64, device=self._state.tokens.device)
        columns = (self._state.tokens, self._state.commit_step, self._state.commit_confidence)
        lists = [column[slots].tolist() for column in columns]  # sync: only where blocks are delivered
        return list(zip(*lists, strict=True))


class Forward:
    """What a decoder asks of a model: open(row), close(row), and forward(rows, state, needed) -> the logits of the
    needed positions, [M, V] in the model's dtype, and index int64 [slots, L] into them or -1.

    lag: how many steps late the host learns what a step did. starts_blocks: the device begins a row's next block.
    all_logits: candidates for every position of a running row's block, not only where the rule needs them.
    """

    lag = 0
    starts_blocks = False
    all_logits = False

    def refine(self, rows, state, params, mask_id, *prefill):
        """One step of the rows, forward and refinement. Returns RefineOutput [slots, ...] and the step's report."""
        if self.all_logits:
            needed = (state.kind != refine.PADDING) & (state.frozen == 0)[:, None]
        else:
            needed = needed_positions(state, params, SpecialIds(mask_id))
        logits, index = self(rows, state, needed, *prefill)
        output = refine_step(logits, state, params, SpecialIds(mask_id), index, _filters(rows))
        return output, EagerReport(rows, output, state)


class CachedForward(Forward):
    """Forwards of our own network over a paged cache.

    settle: how a finished block's final K/V get to its pages when its last step changed it: "carry" = with the next
    block's first forward, "separate" = by a forward of its own. reuse=False recomputes all blocks at every step.
    ahead: prompt blocks are prefilled ahead of a row's first step; without, they are carried along with it.
    """

    def __init__(self, model, cache, settle="carry", reuse=True, ahead=True):
        self.model, self.cache, self.settle, self.reuse, self.ahead = model, cache, settle, reuse, ahead

    def open(self, row):
        """A row that comes with pages keeps them: the engine lets rows share."""
        row.pages = row.pages or self.cache.allocate(row.num_blocks)

    def close(self, row):
        self.cache.free(row.pages)
        row.pages = ()

    @torch.inference_mode()  # where no_grad costs 7 % more of a step on a CPU, in views and versions
    def __call__(self, rows, state, needed, prefill=()):
        """Logits of the needed positions: ([M, V] in the model's dtype, index int64 [slots, L] into them or -1).

        prefill: (row, n) pairs; n further blocks of rows that have not started are settled by the same forward.
        """
        if self.reuse:
            if self.ahead:
                self._prefill([row for row in rows if row.settled < row.first_block])
            if self.settle == "separate":
                self._settle([row for row in rows if row.settled < row.block])
        runs = [(row, row.settled, row.block + 1) for row in rows]
        slots = torch.tensor([row.slot for row in rows], **_ON_CPU)
        chosen = needed[slots]
        ends = list(accumulate(end - begin for _, begin, end in runs))
        read = Read([end - 1 for end in ends], torch.where(chosen.flatten())[0])
        hidden = self._forward([*runs, *((row, row.settled, row.settled + n) for row, n in prefill)], state, read)
        for row in rows:
            row.settled = row.block if self.reuse else 0
        _went_ahead(prefill)
        index = torch.full(needed.shape, -1, dtype=torch.int64, device=needed.device)
        index[slots] = torch.where(chosen, chosen.flatten().cumsum(0).view(chosen.shape) - 1, -1)
        return self.model.lm_logits(hidden), index

    def settle_ahead(self, prefill):
        """(row, n) pairs: settle n further blocks of rows that have not started, by a forward of their own."""
        self._forward([(row, row.settled, row.settled + n) for row, n in prefill])
        _went_ahead(prefill)

    def _prefill(self, rows):
        started = time.perf_counter()
        pending = [(row, row.settled, row.first_block) for row in rows]
        while pending:
            budget, runs, rest = PREFILL_TOKENS[self.model.device.type], [], []
            for row, begin, end in pending:
                stop = min(end, begin + max(budget // row.length, 0 if runs else 1))
                budget -= (stop - begin) * row.length
                if stop > begin:
                    runs.append((row, begin, stop))
                if stop < end:
                    rest.append((row, stop, end))
            self._forward(runs)
            for row, _, stop in runs:
                row.settled = stop
                row.counters.prefill_forwards += 1
                row.counters.prefill_s += time.perf_counter() - started
            started, pending = time.perf_counter(), rest

    def _settle(self, rows):
        if rows:
            self._forward([(row, row.settled, row.block) for row in rows])
            for row in rows:
                row.settled = row.block
                row.counters.settle_forwards += 1

    @torch.inference_mode()
    def _forward(self, spans, state=None, read=None):
        """Forward blocks begin..end-1 of rows; active blocks are read from the state, the others from the canvas.

        Returns the hidden states that `read` names, None = none."""
        tokens, positions, runs = [], [], []
        read = read or read_nothing(self.model.device)
        for row, begin, end in spans:
            at = begin * row.length
            if end <= row.block:
                tokens.append(row.canvas[at : end * row.length])
            else:
                tokens += [row.canvas[at : row.span.start], state.tokens[row.slot]]
            positions.append(torch.arange(at, end * row.length, device=row.canvas.device))
            runs.append(Span(row.pages, begin, end - begin, row.limit))
        return self.model.forward_blocks(torch.cat(tokens), torch.cat(positions), runs, self.cache, read)


class GraphedForward(CachedForward):
    """The same on a GPU with the whole step replayed as one CUDA graph: the rows' next blocks, forward and refinement.

    Graphs are captured as they are first needed, one per size: active blocks, rounded up to a power of two, and places
    for carried ones. slots: of the decoder; max_blocks: of a row; lag: 1 lets the host launch a step before it knows
    what the last one did. Prefill runs outside the graphs.
    """

    starts_blocks = True

    def __init__(self, model, cache, slots, max_blocks, lag=0):
        super().__init__(model, cache)
        self.slots, self.lag = Slots(slots, max_blocks, model.device), lag
        self._graphs = {}

    def open(self, row):
        super().open(row)
        self.slots.open(row.slot, row.pages, row.total, row.limit)

    def refine(self, rows, state, params, mask_id, prefill=()):
        self._prefill([row for row in rows if row.settled < row.first_block])
        if prefill:
            self.settle_ahead(prefill)
        self._settle([row for row in rows if row.settled < row.block])  # it goes on after a suspension
        graph = self._graph(*self._size(rows), state, params, mask_id)
        graph.load([row.slot for row in rows], _filters(rows))
        output, report = graph.replay()
        return output, Report(rows, report)

    def _size(self, rows):
        """Active blocks and places to carry ended ones: as many as end, or, where that is not known yet, for a quarter
        of the rows: at the usual 4 to 8 steps a block so many end in a step. Without a place a row waits for a step."""
        active = power_of_two(len(rows))
        if self.lag:
            return active, -(-active // 4)
        return active, power_of_two(sum(row.block_done and row.settled <= row.block for row in rows))

    def _graph(self, active, carried, state, params, mask_id):
        size = active, carried
        if size not in self._graphs:
            self._graphs[size] = StepGraph(self.model, self.cache, state, params, mask_id, self.slots, *size)
        return self._graphs[size]


def _went_ahead(prefill):
    """Note what a forward settled of rows that have not started."""
    for row, n in prefill:
        row.settled += n
        row.counters.prefill_forwards += 1


def _filters(rows):
    """Some row draws with top-k or top-p: a launch more on a GPU."""
    return any(row.params.top_k or row.params.top_p for row in rows)


def power_of_two(n):
    """The least one that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


class BlockDecoder:
    """Rows in slots, refined block by block.

    forward: a Forward. slots: how many rows at most. mask_id: int. max_eos: EOS ids a row may have.
    report: of the last step the host knows of: its rows and its status, lists of ints [slots][8]; None before.
    """

    @lasting
    def __init__(self, forward, slots, block_length, mask_id, device="cpu", max_eos=1, trace=False):
        assert not (trace and forward.lag), "a trace needs each step's output before the next step"
        self.forward, self.length, self.mask_id, self.trace = forward, block_length, mask_id, trace
        self.report = self._launched = None  # what the host has read, and what it has still to read
        self.rows = [None] * slots
        blocks = torch.full((slots, block_length), mask_id, dtype=torch.int64, device=device)
        self.state = BlockState.fresh(
            blocks, torch.zeros_like(blocks, dtype=torch.int8), torch.zeros(slots, dtype=torch.int64, device=device)
        )
        self.state.frozen.fill_(refine.FINISHED)
        real = torch.zeros(slots, dtype=torch.float32, device=device)
        whole = torch.zeros(slots, dtype=torch.int32, device=device)
        self.params = RefineParams(
            temperature=real.clone(), top_k=whole.clone(), top_p=real.clone(),
            seed=torch.zeros(slots, dtype=torch.int64, device=device),
            threshold=real.clone(), edit_threshold=real.clone(), steps=whole.clone(), min_transfer=whole.clone(),
            max_steps=whole.clone(), max_post_steps=whole.clone(), flags=whole.clone(),
            eos_ids=torch.full((slots, max_eos), -1, dtype=torch.int64, device=device),
        )  # fmt: skip

    def open(self, slot, prompt, params, seed, eos_ids):
        """Put a prompt (int64 [n], n may be 0) with checked DecodeParams into a free slot; returns its Row."""
        row = self.new_row(prompt, params, seed, eos_ids)
        self.place(slot, row)
        self.start(row)
        return row

    @lasting
    def new_row(self, prompt, params, seed, eos_ids):
        """The Row of a prompt, in no slot yet."""
        length, n = self.length, prompt.shape[0]
        size = -(-(n + params.gen_length) // length) * length
        device = self.state.tokens.device
        canvas = torch.full((size,), self.mask_id, dtype=torch.int64, device=device)
        canvas[:n] = prompt
        tail = refine.TAIL if params.attend_tail else refine.PADDING
        kind = torch.full((size,), tail, dtype=torch.int8, device="cpu")
        kind[:n] = refine.PROMPT
        kind[n : n + params.gen_length] = refine.GENERATED
        eos = torch.full((self.params.eos_ids.shape[1],), -1, dtype=torch.int64, device=device)
        eos[: len(eos_ids)] = torch.tensor(eos_ids, dtype=torch.int64, device="cpu")
        in_prompt = bool(torch.isin(canvas[:n], eos).any())
        return Row(
            None, params, seed, eos, length, n, canvas, kind.to(device), block=n // length,
            prior_flags=refine.PRIOR_EOS if in_prompt else 0, events=[] if self.trace else None,
        )  # fmt: skip

    def place(self, slot, row):
        """Put a row that is in no slot into a free one; it takes part in steps once it is started."""
        assert self.rows[slot] is None, f"slot {slot} is taken"
        row.slot = slot
        self.forward.open(row)
        self.rows[slot] = row
        rules = row_rules(row.params, self.length) | {"seed": row.seed, "eos_ids": row.eos}
        for name, value in rules.items():
            getattr(self.params, name)[slot] = value

    def start(self, row):
        """Lay out a placed row's active block."""
        row.started = True
        self._start_block(row)
        self._lay_out(row)
        if row_rules(row.params, self.length)["max_steps"] == 0:  # hf-2.0, gen_length < minimal_topk: no step is taken
            row.finish_reason = "length"
            self.state.frozen[row.slot] = refine.FINISHED

    def suspend(self, row):
        """Take an unfinished row out of its slot and give its pages back. Placed and started again it gets the tokens
        it would have got: it resumes behind its last finished block; steps of the open one are not counted."""
        if row.block_done:
            row.block, row.block_done = row.block + 1, False
        elif row.started:
            row.counters, events = row.mark
            if row.events is not None:
                del row.events[events:]
        self.close(row.slot)
        row.slot, row.settled, row.started = None, 0, False

    def close(self, slot):
        """Give a slot and its pages back. A step launched already does not matter to it any more: it writes to those
        pages before anybody else does."""
        row, self.rows[slot] = self.rows[slot], None
        self.forward.close(row)
        if self._launched is not None and row in self._launched.rows:
            self._launched.rows.remove(row)
        self.state.frozen[slot] = refine.FINISHED

    def running(self):
        """Rows that have started and are not finished."""
        rows = [row for row in self.rows if row is not None and row.started]
        return [row for row in rows if row.finish_reason is None and row.error is None]

    def step(self, rows, prefill=()):
        """One refinement step of running rows; one left out must be between two blocks. RefineOutput [slots, ...].

        rows: at least one. prefill: (row, n) pairs of placed rows that have not started: n of their blocks go along
        (CachedForward only). Rows learn what the step did, with a forward that lags what the step before did.
        """
        left_out = set(self.running()).difference(rows)
        assert not (left_out and self.forward.lag), "what is left out may be in the middle of a block by now"
        assert all(row.block_done for row in left_out), "a row in the middle of a block is left out"
        if not self.forward.starts_blocks:
            for row in rows:
                if row.block_done:
                    self._next_block(row)
                    self._lay_out(row)
        before = self.state.tokens.clone() if self.trace else None
        output, report = self.forward.refine(
            rows, self.state, self.params, self.mask_id, *([prefill] if prefill else [])
        )
        if self.forward.lag:
            report, self._launched = self._launched, report
        self.report = report
        if report is not None:
            self._take_in(report)
        if self.trace:
            self._record(output, before)
        return output

    def _take_in(self, report):
        """Let the rows of a step know what it did; those it did nothing for leave the report."""
        if self.forward.starts_blocks:
            report.wait()
        refined = []
        for row in report.rows:
            if row.finish_reason or row.error:  # known only since the step was launched
                continue
            if self.forward.starts_blocks and report.blocks[row.slot] > row.block:
                self._next_block(row)
                row.settled = row.block
            if row.block_done:  # it waited for a place to be carried: the step settled its block
                row.settled = row.block + 1
                row.counters.settle_forwards += 1
            else:
                self._account(row, report)
                refined.append(row)
        report.rows = refined

    def _lay_out(self, row):
        """Put the active block into the row's slot."""
        self.state.reset_block(row.slot, row.canvas[row.span], row.kind[row.span], row.span.start, row.prior_flags)

    def _next_block(self, row):
        row.block += 1
        self._start_block(row)

    def _start_block(self, row):
        row.block_done = False
        kept = replace(row.counters, forwards_per_block=row.counters.forwards_per_block.copy())
        row.mark = kept, len(row.events or ())
        row.counters.forwards_per_block.append(0)

    def _account(self, row, report):
        status = report.status[row.slot]
        flags = status[refine.FLAGS]
        counters = row.counters
        counters.denoise_forwards += 1
        counters.forwards_per_block[-1] += 1
        counters.commits += status[refine.COMMITS]
        counters.edits += status[refine.EDITS]
        if flags & refine.ERROR:
            row.error = f"logits hold NaN or infinity at step {status[refine.STEP]} of block {row.block}"
            return
        if not flags & (refine.BLOCK_DONE | refine.FINISHED):
            return
        tokens = report.tokens(row)
        row.canvas[row.span] = tokens.to(row.canvas.device, non_blocking=True)
        if flags & refine.BLOCK_DONE:
            row.block_done = True
            if not flags & refine.CHANGED and isinstance(self.forward, CachedForward) and self.forward.reuse:
                row.settled = row.block + 1  # the step that changed nothing has written the final K/V
            generated = tokens[max(0, row.prompt_length - row.span.start) :]
            if row.params.profile != "default" and bool((generated == self.mask_id).any()):
                row.prior_flags |= refine.PRIOR_MASK
        if flags & refine.FINISHED:
            row.finish_reason = "eos"
            if status[refine.EOS_AT] >= 0:
                row.eos_position = row.span.start + status[refine.EOS_AT]
        elif row.block + 1 == row.num_blocks:
            row.finish_reason = "length"

    def _record(self, output, before):
        masks = torch.full_like(before, self.mask_id)  # the device may have begun a new block since `before`
        for kind, mask, old in (("commit", output.commit, masks), ("edit", output.edit, before)):
            slots, where = torch.where(mask)
            columns = (slots, where, *(x[slots, where] for x in (output.token, output.confidence, old)))
            columns = [column.tolist() for column in columns]  # sync: only with trace=True
            for slot, at, token, confidence, old in zip(*columns, strict=True):
                row = self.rows[slot]
                step = row.counters.denoise_forwards - 1
                row.events.append((step, row.span.start + at, kind, token, confidence, old))


def run(decoder, progress=False, on_step=None):
    """Step all rows of a decoder to their ends. RuntimeError naming row and step if one meets NaN logits."""
    rows = decoder.running()
    blocks = sum(row.num_blocks - row.block for row in rows)
    with tqdm(total=blocks, desc="Blocks", unit="block", disable=not progress) as bar:
        while rows:
            done = sum(row.block for row in rows)
            output = decoder.step(rows)
            for row in rows:
                if row.error:
                    raise RuntimeError(f"row {row.slot}: {row.error}")
            if on_step is not None:
                on_step(decoder, output)
            bar.update(sum(row.block for row in rows) - done)
            rows = [row for row in rows if row.finish_reason is None]
        bar.update(blocks - bar.n)
