"""The refinement loop: the only one in the project. generate(), the pipeline and the engine drive `BlockDecoder.step`.

A sequence is admitted to a lane; a step makes a plan of ints, has a runner execute it, and lets the sequences know what
the step did, or with `overlap` what the step before did. A lane whose block has ended begins its next one by itself, so
rows never wait for one another.
"""

import time
from collections import deque
from itertools import accumulate

import numpy as np
from tqdm.auto import tqdm

from ..kernels import refine
from .proposals import accept, decide
from .runner import LaneStep, Plan, Prefill, StepResult
from .sequence import Phase, Sequence

# Prompt tokens of one prefill forward, by device; longer prompts go in chunks of whole blocks. On a CPU chunks keep the
# peak of memory down whatever the prompt's length; 192 took another third off it and a prefill took 14 to 18 % longer.
# Window passes of several rows go in groups of as many tokens.
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}


class BlockDecoder:
    """Sequences in lanes, refined block by block.

    runner: an EagerRunner or a GraphRunner.
    overlap: how many steps are launched before the first of them is read; above 0, GraphRunner only.
    most_tokens: of one forward of window passes, of checks or of blocks ahead of a step, None = PREFILL_TOKENS.

    revised: the sequences whose window passes or checks are made, for who wants to know whose fault an exception is.
    """

    def __init__(self, runner, overlap: int = 0, most_tokens: int | None = None):
        assert runner.carries or not overlap, "the eager runner's plans say what the last step did"
        assert overlap <= 1, "lanes hold what is given in the next two blocks"
        self.runner, self.lanes, self.overlap = runner, runner.lanes, overlap
        self._most_tokens, self.revised = most_tokens, []
        self._by_lane: dict[int, Sequence] = {}  # a step must not grow with the lanes that are free
        self._launched: deque[tuple[list[Sequence], StepResult]] = deque()
        self.has_launched = False  # whether the last step had something to launch

    @property
    def most_tokens(self) -> int:
        """Of one forward beside the steps; one row's window or check alone may be more, if nobody has refused it."""
        return PREFILL_TOKENS[self.lanes.device.type] if self._most_tokens is None else self._most_tokens

    @property
    def sequences(self) -> list[Sequence | None]:
        """By lane, None where it is free."""
        return [self._by_lane.get(lane) for lane in range(self.lanes.count)]

    def admit(self, sequence: Sequence):
        """Lay its active block out in a free lane. It has its pages, where the runner keeps K/V."""
        rule = sequence.rule
        if rule.max_steps == 0:  # hf-2.0, gen_length < minimal_topk: no step is taken
            sequence.finish("length")
            return
        lane = sequence.lane = next(lane for lane in range(self.lanes.count) if lane not in self._by_lane)
        self._by_lane[lane] = sequence
        self.lanes.open(
            lane, sequence.block_start, sequence.given(sequence.block), sequence.total, sequence.limit, rule,
            sequence.seed, sequence.ending_ids, sequence.prior_flags, sequence.pages[: sequence.num_blocks],
        )  # fmt: skip
        if sequence.automaton is not None:
            self.lanes.guide(lane, sequence.automaton.classes)
        sequence.begin()
        for block in (sequence.block + 1, sequence.block + 2) if sequence.has_canvas else ():
            self.lanes.give(lane, block, sequence.given(block))

    def release(self, sequence: Sequence):
        """Free its lane. A step launched already does not matter to it any more: it writes to its pages before anybody
        else does."""
        if sequence.lane is not None:
            self.lanes.close(sequence.lane)
            del self._by_lane[sequence.lane]
            sequence.lane = None
        for sequences, _ in self._launched:
            if sequence in sequences:
                sequences.remove(sequence)

    def clear(self):
        """Take all sequences out, whatever an exception has left half done. Steps that were launched are nobody's."""
        self._launched.clear()
        self._by_lane.clear()
        self.revised = []
        self.lanes.close_all()

    def running(self) -> list[Sequence]:
        """Those with a block to be refined, by lane."""
        return [sequence for _, sequence in sorted(self._by_lane.items()) if sequence.running]

    def step(self, sequences: list[Sequence], prefill: list[tuple[Sequence, int]] = ()) -> StepResult | None:
        """One refinement step.

        sequences: running ones; one left out must be between two blocks, and none may be with overlap. One that steps
            alone and whose last step has not been read is left out by itself.
        prefill: (sequence, n): n further blocks of one that is not admitted yet are forwarded, too.
        Returns the result of the step that was read, None if it is too early for one.
        """
        self._check_left_out(sequences)
        self.has_launched = False
        pending = {s for launched, _ in self._launched for s in launched if s.steps_alone}
        sequences = [s for s in sequences if s not in pending]
        plan = self._plan(sequences, prefill)
        if sequences:
            with self.lanes.held([s.lane for s in pending if s.edit_window]):  # others only propose
                self._launched.append((list(sequences), self.runner.execute(plan)))
            self.has_launched = True
        elif prefill:
            self.runner.prefill(plan.prefill)
            self.has_launched = True
        self._note(sequences, prefill)
        ahead = self.overlap if sequences or not pending else 0
        return self._apply(*self._launched.popleft()) if len(self._launched) > ahead else None

    def _check_left_out(self, sequences):
        chosen = set(sequences)
        left_out = [s for s in self.running() if s not in chosen] if sequences else ()
        assert not (left_out and self.overlap), "what is left out may be in the middle of a block by now"
        assert all(s.phase is Phase.BLOCK_END for s in left_out), "a row in the middle of a block is left out"

    def _plan(self, sequences, prefill):
        lanes, steps, carried = [sequence.lane for sequence in sequences], [], None
        parts = [prefill_of(sequence, blocks) for sequence, blocks in prefill]
        if self.runner.carries:  # a block that has just ended is forwarded with the next one, several of them ahead
            leading = [_lane_step(s) for s in sequences if s.num_final_blocks < s.block + (s.phase is Phase.BLOCK_END)]
            parts = self._all_but_last([*parts, *(step.ahead() for step in leading if not step.carries_one)])
            if not self.overlap:
                carried = sum(step.carries_one for step in leading)
            elif not any(sequence.may_be_carried(self.overlap) for sequence in sequences):
                carried = 0
        else:
            steps = self._shortened([_lane_step(sequence) for sequence in sequences])
        top = {s.lane: s.top_logprobs for s in sequences if s.top_logprobs}
        guided = [s for s in sequences if s.automaton is not None]
        if guided:
            words = [s.guide().words(editing=s.params.editing_threshold is not None) for s in guided]
            self.lanes.allow([s.lane for s in guided], np.stack(words))
        some = any(s.automaton is not None for s in self._by_lane.values())  # those that are left out, too
        return Plan(lanes, steps, parts, any(s.params.filters for s in sequences), carried, top, some)

    def prefill(self, parts: list[Prefill]):
        """Forward whole blocks for their K/V alone, no more than most_tokens at once."""
        last = self._all_but_last(parts)
        if last:
            self.runner.prefill(last)

    def _all_but_last(self, parts):
        """The part of prefill() that is left when all its forwards but the last one are done."""
        chunks = _chunks(parts, self.most_tokens, self.lanes.block_length) if parts else [[]]
        for chunk in chunks[:-1]:
            self.runner.prefill(chunk)
        return chunks[-1]

    def _shortened(self, steps):
        """Steps that forward several blocks of some rows, where these are too many are forwarded ahead."""
        late = {step.lane: step for step in steps if step.leading and not step.carries_one}
        if not (self.runner.cached and late) or sum(len(step.leading) for step in late.values()) <= self.most_tokens:
            return steps
        self.prefill([step.ahead() for step in late.values()])
        return [step._replace(first=step.block, leading=[]) if step.lane in late else step for step in steps]

    def _note(self, sequences, prefill):
        """What the forwards of a step have settled, whatever its refinement does."""
        for sequence, blocks in prefill:
            sequence.settle(sequence.num_final_blocks + blocks)
            sequence.counters.prefill_forwards += 1
        for sequence in sequences if self.runner.cached else ():
            if sequence.num_final_blocks < sequence.block:
                if sequence.phase is Phase.BLOCK_END:  # its window pass has edited several blocks
                    sequence.counters.settle_forwards += self.runner.carries
                else:
                    sequence.counters.prefill_forwards += self.runner.carries
                sequence.settle(sequence.block)

    def _apply(self, sequences, result):
        """Let the sequences of a step know what it did; those it did nothing for leave `sequences`."""
        result.wait()
        cached, refined = self.runner.cached, []
        for sequence in sequences:
            if sequence.phase is Phase.FINISHED:  # which is known only since the step was launched
                continue
            if result.rows[sequence.lane][refine.NUM_STATUS] > sequence.block:
                sequence.begin_next()
                if sequence.has_canvas:
                    self.lanes.give(sequence.lane, sequence.block + 2, sequence.given(sequence.block + 2))
                if cached:
                    sequence.settle(sequence.block)
            if sequence.phase is Phase.BLOCK_END:  # it waited for a place to be carried: the step has settled its block
                sequence.settle(sequence.block + 1)
                sequence.counters.settle_forwards += 1
            else:
                refined.append(sequence)
        self._decide([s for s in refined if s.automaton is not None], result)
        self._check([s for s in refined if s.speculates], result)
        left = self._read(refined, result)
        for sequence in refined:
            status = result.rows[sequence.lane]
            k = sequence.top_logprobs
            sequence.take_step(status, left.get(sequence.lane), result.read_top(sequence.lane, k) if k else None)
            if cached and not sequence.error:
                sequence.num_computed_blocks = sequence.block + 1
                if status[refine.FLAGS] & (refine.BLOCK_DONE | refine.CHANGED) == refine.BLOCK_DONE:
                    sequence.settle(sequence.block + 1)  # a step that changed nothing has written the final K/V
        self._revise([s for s in refined if s.phase is Phase.BLOCK_END and s.window_blocks])
        result.sequences = refined
        return result

    def _revise(self, sequences):
        """The window passes of sequences whose block has ended, as many in one forward as most_tokens lets."""
        windows = [(sequence, sequence.window()) for sequence in sequences]
        while windows:
            ends = accumulate(len(window.tokens) for _, window in windows)
            count = max(1, sum(end <= self.most_tokens for end in ends))
            self.revised = [sequence for sequence, _ in windows[:count]]
            self._revise_together(self.revised, [window for _, window in windows[:count]])
            windows = windows[count:]
        self.revised = []

    def _revise_together(self, sequences, windows):
        result, end = self.runner.revise(windows), 0
        result.wait()
        for sequence in sequences:
            begin, end = end, end + sequence.window_blocks + 1
            blocks, k = list(range(begin, end)), sequence.top_logprobs
            error = any(result.rows[block][refine.FLAGS] & refine.ERROR for block in blocks)
            tokens, confidences = _joined((own, sure) for own, _, sure, _ in result.read(blocks))
            sequence.take_window(
                error, tokens, confidences, _joined(result.read_top(block, k) for block in blocks) if k else None
            )
        going = [sequence for sequence in sequences if sequence.phase is Phase.BLOCK_END]
        if going:
            carried = [sequence.num_final_blocks == sequence.block for sequence in going]
            self.lanes.end_blocks([s.lane for s in going], [s.tokens for s in going], carried)

    def _decide(self, sequences, result):
        """What the step does to sequences under a language."""
        sequences = [s for s in sequences if not result.rows[s.lane][refine.FLAGS] & refine.ERROR]
        if sequences:
            lanes = [s.lane for s in sequences]
            state, report = decide(sequences, result.read(lanes), self.lanes.ids)
            self.lanes.write(lanes, state)
            result.replace(lanes, report)

    def _check(self, sequences, result):
        """The checks of sequences whose step has drafted, as many in one forward as most_tokens lets."""
        sequences = [s for s in sequences if _has_drafted(result.rows[s.lane])]
        most = max(1, self.most_tokens // (2 * self.lanes.block_length))
        for begin in range(0, len(sequences), most):
            self.revised = sequences[begin : begin + most]
            self._check_together(self.revised, result)
        self.revised = []

    def _check_together(self, sequences, result):
        lanes = [sequence.lane for sequence in sequences]
        drafts = zip(sequences, result.read(lanes, details=False), strict=True)
        checks = [sequence.check(candidates) for sequence, (candidates, *_) in drafts]
        by = self.runner.check(checks)
        by.wait()
        for sequence in sequences:
            sequence.take_draft()
        bad = [bool(by.rows[row][refine.FLAGS] & refine.ERROR) for row in by.lanes]
        state, report = accept(sequences, checks, by.read(by.lanes), bad, self.lanes.ids)
        self.lanes.write(lanes, state)
        result.replace(lanes, report, by)

    @staticmethod
    def _read(sequences, result):
        """By lane, what the step has left of the blocks that have ended and of those whose details are kept."""
        ended = refine.BLOCK_DONE | refine.FINISHED
        wanted = [s for s in sequences if s.is_followed or result.rows[s.lane][refine.FLAGS] & ended]
        details = any(s.detailed for s in wanted)
        lanes = [s.lane for s in wanted]
        return dict(zip(lanes, result.read(lanes, details), strict=True))


def _has_drafted(status):
    """Whether the step of a sequence that speculates has written nothing, though there were masks."""
    return not status[refine.FLAGS] & refine.ERROR and status[refine.MASKS_BEFORE] > 0 == status[refine.COMMITS]


def _joined(lists):
    """Lists, one behind the other, of several of the same kinds."""
    return [sum(parts, []) for parts in zip(*lists, strict=True)]


def _lane_step(sequence):
    begins = sequence.phase is Phase.BLOCK_END
    block, first, length = sequence.block + begins, sequence.num_final_blocks, sequence.block_length
    leading = sequence.ids[first * length : block * length] if first < block else []
    return LaneStep(sequence.lane, block, sequence.pages, sequence.limit, first, leading, begins)


def _chunks(parts, most, length):
    """Lists of Prefill of at most `most` tokens, of a block at least, that are the given ones in their order."""
    chunks, room, most = [[]], max(1, most // length), max(1, most // length)
    for pages, limit, first, tokens in parts:
        while tokens:
            if not room:
                chunks.append([])
                room = most
            head, tokens = tokens[: room * length], tokens[room * length :]
            chunks[-1].append(Prefill(pages, limit, first, head))
            first, room = first + len(head) // length, room - len(head) // length
    return chunks


def prefill_of(sequence: Sequence, blocks: int) -> Prefill:
    """The next blocks of a sequence that is not admitted yet."""
    length, first = sequence.block_length, sequence.num_final_blocks
    tokens = sequence.ids[first * length : (first + blocks) * length]
    return Prefill(sequence.pages, sequence.limit, first, tokens)


def prefill_all(decoder: BlockDecoder, sequences: list[Sequence]):
    """Forward the full blocks of the sequences' prompts, in chunks of at most decoder.most_tokens."""
    length = decoder.lanes.block_length
    while pending := [s for s in sequences if s.num_final_blocks < s.block]:
        started, budget, parts = time.perf_counter(), decoder.most_tokens, []
        for sequence in pending:
            most = max(budget // length, 0 if parts else 1)
            blocks = min(sequence.block - sequence.num_final_blocks, most)
            if blocks:
                parts.append((sequence, blocks))
                budget -= blocks * length
        decoder.step([], parts)
        took = time.perf_counter() - started
        for sequence, _ in parts:
            sequence.counters.prefill_s += took


def settle_apart(decoder: BlockDecoder, sequences: list[Sequence]):
    """Forward the blocks that have ended by themselves, instead of with the next ones."""
    steps = zip(sequences, map(_lane_step, sequences), strict=True)
    late = [(sequence, step) for sequence, step in steps if step.leading]
    if late:
        decoder.prefill([step.ahead() for _, step in late])
        for sequence, step in late:
            sequence.settle(step.block)
            sequence.counters.settle_forwards += 1


def decode_all(decoder: BlockDecoder, sequences: list[Sequence], progress=False, settle="carry", on_step=None):
    """Refine admitted sequences to their ends.

    progress: a tqdm bar over blocks.
    settle: "separate" forwards blocks that have ended by themselves.
    on_step: called as on_step(decoder, result) after every step that has been read.
    RuntimeError naming row and step if one meets NaN logits.
    """
    rows = [s for s in sequences if s.running]
    blocks = sum(s.num_blocks - s.block for s in rows)
    with tqdm(total=blocks, desc="Blocks", unit="block", disable=not progress) as bar:
        while rows:
            done = sum(s.block for s in rows)
            if settle == "separate" and decoder.runner.cached:
                settle_apart(decoder, rows)
            result = decoder.step(rows)
            for sequence in rows:
                if sequence.error:
                    raise RuntimeError(f"row {sequences.index(sequence)}: {sequence.error}")
            if on_step is not None and result is not None:
                on_step(decoder, result)
            bar.update(sum(s.block for s in rows) - done)
            rows = [s for s in rows if s.running]
        bar.update(blocks - bar.n)
