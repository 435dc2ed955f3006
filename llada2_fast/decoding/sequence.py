"""A sequence: one prompt being continued, as the host knows it. Plain Python, no tensors.

Positions are row-local, 0 .. total - 1, on a grid of blocks from position 0. What has become of its blocks is counted
three times, because the three need not move together:

    num_computed_blocks   leading blocks whose K/V are in their pages, final or not
    num_final_blocks      leading blocks whose K/V there are final: nobody has to forward them again
    num_delivered         generated tokens that somebody has been given, so that they cannot change any more
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import islice, takewhile
from typing import NamedTuple

from ..config import CHECK_PAGES, MAX_TOP_LOGPROBS, DecodeParams, scratch_pages
from ..kernels import refine
from ..kernels.roles import SpecialIds, block_kinds, block_tokens
from ..structured import TokenAutomaton
from .guide import BlockGuide, gaps_of
from .rules import row_rule
from .speculation import Check
from .trace import Event, sources
from .window import Window


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # in no lane, without pages
    PREFILL = "prefill"  # it has pages, and its prompt is forwarded into them
    DECODE = "decode"  # its active block is refined
    BLOCK_END = "block end"  # its active block has ended, the next one has not begun
    FINISHED = "finished"


@dataclass
class Counters:
    """What a sequence cost. TPF = generated tokens / denoise_forwards; prefill and settling forwards count apart.
    window_forwards: how many of the denoise forwards were window passes, each counted for the block that had ended.
    check_forwards: how many were checks of drafts, of twice a block's positions."""

    denoise_forwards: int = 0
    window_forwards: int = 0
    check_forwards: int = 0
    prefill_forwards: int = 0
    settle_forwards: int = 0
    commits: int = 0
    edits: int = 0
    forwards_per_block: list[int] = field(default_factory=list)
    prefill_s: float = 0.0


class Mark(NamedTuple):
    """Where a sequence stood between two blocks.

    block: the next one.
    num_delivered: generated tokens that somebody had been given.
    num_events: how many events there were.
    counters: what it had cost; of its blocks' forwards there are as many as blocks before.
    revisable: the ends of ids, token_steps, token_confidences and token_top that a later window pass may edit.
    """

    block: int
    num_delivered: int
    num_events: int
    counters: Counters
    revisable: tuple[list, ...]


class Sequence:
    """One prompt, and how far it has been continued.

    prompt: its ids, a list of ints that may be empty.
    params: checked DecodeParams.
    seed: int64, of its draws.
    eos_ids: resolved, a tuple of ints.
    block_length: L.
    special: SpecialIds of the model.
    trace: keep every commit and edit.
    detailed: keep the confidence and the step of every token.
    min_tokens: an EOS among so many of the first generated tokens does not end the answer; above 0 no EOS ends the
        decoding.
    top_logprobs: how many of the likeliest ids to keep for every token, at most MAX_TOP_LOGPROBS; above 0 confidences
        and steps are kept, too.
    canvas: by generated position the id that is given there, None in a gap; where some are, gen_length of them.
    automaton: of the language that the answer, or each gap of the canvas, is in.

    watched: the active block is looked at after every step, not only when it has ended; anybody may set it.

    To be read:
    prompt_length, first_block: where generation starts.
    total: prompt and generated positions, without the tail; limit: positions that exist, for the tail counts only where
        it is attended to; num_blocks: all of them.
    edit_window: how many blocks before one that has ended its window pass revises, at most (window.py).
    num_pages: pages that it needs; pages: those of its blocks, then scratch pages for window passes or checks.
    rule: how its blocks are refined.
    phase; block: the number of the active one.
    ids: the tokens of all blocks before it, its own as well once it has ended.
    tokens, steps, confidences: of the active block, as the last step that was read left it (where details are kept).
    block_steps, post_steps: of it, all and mask-free ones, as far as they were read.
    token_steps, token_confidences: of the generated tokens in ids (likewise); -1 and 1.0 of given ones.
    top: of the active block, and token_top: of the generated tokens in ids, where they are kept: for each position the
        likeliest (id, log-probability), best first and lowest id on ties, at the write that put its token there; fewer
        than asked for where the vocabulary or the logits above -inf are fewer. The distribution is the logits' softmax
        at temperature 1 over all ids, the mask id not listed where the profile never writes it. So a token's own
        log-probability is the logarithm of its confidence, but for tokens drawn under other profiles than the default
        one, and for those of a language: these need not be listed, and their confidence is of another distribution.
    finish_reason: "eos" or "length"; error; counters; events.
    """

    def __init__(
        self, prompt: list[int], params: DecodeParams, seed: int, eos_ids: tuple[int, ...], block_length: int,
        special: SpecialIds, trace: bool = False, detailed: bool = False, min_tokens: int = 0, top_logprobs: int = 0,
        canvas: list[int | None] | None = None, automaton: TokenAutomaton | None = None,
    ):  # fmt: skip
        assert 0 <= top_logprobs <= MAX_TOP_LOGPROBS, "refused by name where it comes from"
        assert canvas is None or len(canvas) == params.gen_length, "an answer is as long as its canvas"
        self.prompt, self.params, self.seed, self.eos_ids = prompt, params, seed, eos_ids
        self.block_length, self.special, self.automaton = block_length, special, automaton
        self._given = [*prompt, *(canvas or ())]  # by position, None in gaps
        while len(self._given) > len(prompt) and self._given[-1] is None:
            self._given.pop()
        self.min_tokens = max(min_tokens, len(self._given) - len(prompt))  # an EOS before a given token ends nothing
        self.ending_ids = () if self.min_tokens else eos_ids  # what the device is told of them
        self.rule = row_rule(params, block_length, special.edits)
        self.gen_length = params.gen_length
        self.prompt_length = len(prompt)
        self.total = self.prompt_length + params.gen_length
        self.first_block = self.prompt_length // block_length
        self.num_blocks = -(-self.total // block_length)
        self.limit = self.num_blocks * block_length if params.attend_tail else self.total
        self.edit_window = min(params.edit_window, self.num_blocks - 1 - self.first_block)
        self.num_pages = self.num_blocks + scratch_pages(self.edit_window, params.checks)
        self._gaps = gaps_of(self._given, self.total)
        self._guide: BlockGuide | None = None
        self.phase = Phase.WAITING
        self.lane: int | None = None
        self.pages: tuple[int, ...] = ()
        self.block = self.first_block
        self.ids = prompt[: self.block * block_length]
        self.num_computed_blocks = self.num_final_blocks = self.num_delivered = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.eos_position: int | None = None
        self.counters = Counters()
        self.top_logprobs = top_logprobs
        self.detailed = detailed or trace or top_logprobs > 0 or automaton is not None or self.speculates
        self.watched = trace
        self.token_steps: list[int] = []
        self.token_confidences: list[float] = []
        self.token_top: list[list[tuple[int, float]]] = []
        self.events: list[Event] | None = [] if trace else None

    # where things lie

    @property
    def mask_id(self) -> int:
        """What stands where nothing has been written."""
        return self.special.mask

    @property
    def moves(self) -> bool:
        """Tokens are deleted and inserted, so that others of their block move."""
        return bool(self.rule.flags & refine.LEVENSHTEIN)

    @property
    def speculates(self) -> bool:
        """Its steps draft, and drafts are checked (speculation.py)."""
        return bool(self.rule.flags & refine.SPECULATES)

    @property
    def block_start(self) -> int:
        """Position of the active block's first token."""
        return self.block * self.block_length

    def given(self, block: int) -> list[int | None]:
        """The ids that a block begins with, of the prompt or given in the answer, None in gaps; what is behind the last
        of them is not listed."""
        begin = block * self.block_length
        return self._given[begin : begin + self.block_length]

    def is_given(self, at: int) -> bool:
        """A position of the row holds a token of the prompt, or one that is given in the answer."""
        return at < len(self._given) and self._given[at] is not None

    def laid_out(self, block: int) -> list[int]:
        """A block's tokens when it begins."""
        return block_tokens(self.given(block), self.block_length, self.mask_id)

    @property
    def kinds(self) -> list[int]:
        """Of the active block's positions, as of kernels.roles."""
        return self._kinds(self.block)

    def _kinds(self, block):
        length = self.block_length
        return block_kinds(self.given(block), block * length, length, self.total, self.limit)

    @property
    def is_followed(self) -> bool:
        """Its active block is read after every step, not only when it has ended."""
        told = self.automaton is not None or self.has_canvas or self.speculates
        return self.watched or self.top_logprobs > 0 or told

    @property
    def has_canvas(self) -> bool:
        """Some positions of its answer are given."""
        return len(self._given) > self.prompt_length

    @property
    def generated(self) -> slice:
        """Where in the active block its generated tokens lie, without prompt and tail."""
        return slice(
            max(0, self.prompt_length - self.block_start), min(self.block_length, self.total - self.block_start)
        )

    @property
    def prior_flags(self) -> int:
        """PRIOR_MASK | PRIOR_EOS, of what comes before the active block."""
        masked = self.mask_id in self.ids[self.prompt_length : self.block_start]
        ends = any(eos in self.prompt for eos in self.ending_ids)
        return refine.PRIOR_MASK * masked | refine.PRIOR_EOS * ends

    @property
    def canvas(self) -> list[int]:
        """The ids of all its blocks: prompt, what has become final, masks."""
        known = list(self.ids)
        for block in range(len(known) // self.block_length, self.num_blocks):
            known += self.laid_out(block)
        return known

    def answer(self) -> list[int]:
        """The generated ids, cut after the first EOS of the first gen_length of them that is not among min_tokens.

        Under hf-2.0 an early return is cut where that model card cuts it: at the first EOS of prompt and tail, too.
        """
        whole = self.params.traits.cuts_canvas and self.eos_position is not None
        begin, canvas = 0 if whole else self.prompt_length + self.min_tokens, self.canvas
        end = len(canvas) if whole else self.prompt_length + self.gen_length
        end = next((at + 1 for at in range(begin, end) if canvas[at] in self.eos_ids), end)
        return canvas[self.prompt_length : end]

    # what happens to it

    @property
    def running(self) -> bool:
        """It has a block to be refined."""
        return self.phase in (Phase.DECODE, Phase.BLOCK_END)

    @property
    def block_ended(self) -> bool:
        """Nothing of its active block changes any more."""
        return self.phase in (Phase.BLOCK_END, Phase.FINISHED)

    @property
    def finished(self) -> bool:
        return self.phase is Phase.FINISHED

    @property
    def steps_alone(self) -> bool:
        """No step of it is launched before its last one has been read, so that all that is known of it is up to date:
        the host has a say in what its steps do."""
        return self.automaton is not None or self.edit_window > 0 or self.speculates

    @property
    def num_kept_blocks(self) -> int:
        """Leading blocks that have ended and that no window pass revises any more."""
        if self.finished:
            return self.block + 1
        return max(self.first_block, self.block + self.block_ended - self.edit_window)

    def may_be_carried(self, steps: int) -> bool:
        """Whether the next so many steps, none of which was read, may end the active block by changing it, so that its
        K/V are not final when the next one begins."""
        begins = self.phase is Phase.BLOCK_END  # the active one is the next
        if self.steps_alone:
            return begins and self.num_final_blocks == self.block
        if self.block + begins + 1 >= self.num_blocks:
            return False
        if not self.rule.flags & refine.EDITING or self.rule.max_post_steps == 0:
            return True
        # with editing a block ends by a step that changes nothing, or by too many of them
        done, post_steps = (0, 0) if begins else (self.block_steps, self.post_steps)
        return post_steps + steps >= self.rule.max_post_steps or done + steps >= self.rule.max_steps

    def settle(self, blocks: int):
        """The K/V of so many leading blocks are final now."""
        if blocks > self.num_final_blocks:
            self.num_final_blocks = blocks
            self.num_computed_blocks = max(self.num_computed_blocks, blocks)

    def begin(self):
        """Its active block has been laid out in a lane."""
        self.phase = Phase.DECODE
        self._begin_block()

    def begin_next(self):
        """The device has begun the next block."""
        self.block += 1
        self.begin()

    def _begin_block(self):
        self._forwards_before = self.counters.denoise_forwards
        self.block_steps = self.post_steps = 0
        self.counters.forwards_per_block.append(0)
        self.tokens = self.laid_out(self.block)
        self.steps, self.confidences = [-1] * self.block_length, [0.0] * self.block_length
        self.top: list[list[tuple[int, float]]] = [[] for _ in self.steps]

    def guide(self) -> BlockGuide:
        """What may stand in the block that the next step refines."""
        block = self.block + (self.phase is Phase.BLOCK_END)
        start = block * self.block_length
        if self._guide is None or self._guide.start != start:
            self._guide = BlockGuide(self.automaton, self._gaps, self.ids[:start], self.laid_out(block), self.mask_id)
        return self._guide

    def take_step(
        self, status: list[int], block: tuple[list[int], list[int], list[float], list[int]] | None,
        top: tuple[list[list[int]], list[list[float]]] | None = None,
    ):  # fmt: skip
        """A step has refined the active block.

        status: the row's columns of RefineOutput.status, and whatever is behind them.
        block: its tokens, steps and confidences, where the step has ended it or details are kept, and what was chosen,
            all as of StepResult.read.
        top: the likeliest ids at its positions and their log-probabilities, where they are kept.
        """
        flags, counters = status[refine.FLAGS], self.counters
        self.block_steps, self.post_steps = status[refine.STEP], status[refine.POST_STEPS]
        counters.denoise_forwards += 1
        counters.forwards_per_block[-1] += 1
        counters.commits += status[refine.COMMITS]
        counters.edits += status[refine.EDITS]
        if flags & refine.ERROR:
            where = f"step {status[refine.STEP]} of block {self.block}"
            self.fail(f"logits hold NaN or infinity at {where}")
            return
        if block is not None:
            before, (self.tokens, self.steps, self.confidences, chosen) = self.tokens, block
            source = range(self.block_length)
            if self.moves and chosen is not None:
                exist = min(self.block_length, self.limit - self.block_start)
                source = sources(chosen, self.special, exist)
                self._record_moves(before, chosen, source)
            self._record(before, source)
            if top is not None:
                self._keep_top(source, *top)
        self._end(flags)
        if flags & refine.FINISHED and status[refine.EOS_AT] >= 0:
            self.eos_position = self.block_start + status[refine.EOS_AT]

    @property
    def masked(self) -> list[bool]:
        """Which positions of the active block are still to be filled."""
        open_kinds = (refine.GENERATED, refine.TAIL)
        pairs = zip(self.tokens, self.kinds, strict=True)
        return [token == self.mask_id and kind in open_kinds for token, kind in pairs]

    def check(self, candidates: list[int]) -> Check:
        """The check of what a step has drafted. candidates: by position, anything where there is no mask."""
        scratch = self.pages[self.num_blocks :][:CHECK_PAGES]
        pairs = list(zip(self.masked, self.tokens, candidates, strict=True))
        return Check(
            self.pages[: self.block] + scratch, self.limit, self.block,
            [-1 if masked else token for masked, token, _ in pairs],
            [candidate if masked else token for masked, token, candidate in pairs],
            self.kinds, self.rule, self.top_logprobs,
        )  # fmt: skip

    def take_draft(self):
        """A step has drafted the active block and written nothing; the step that checks it comes next."""
        self.block_steps += 1
        self.counters.denoise_forwards += 1
        self.counters.check_forwards += 1  # the next one
        self.counters.forwards_per_block[-1] += 1

    @property
    def window_blocks(self) -> int:
        """How many blocks before the active one its window pass revises; 0: there is none."""
        return min(self.edit_window, self.block - self.first_block)

    def window(self) -> Window:
        """The window pass of the active block, which has ended."""
        length, begin = self.block_length, self.block - self.window_blocks
        first = min(self.num_final_blocks, begin)
        scratch = self.pages[self.num_blocks :][: self.window_blocks + 1]
        kinds = [kind for block in range(begin, self.block + 1) for kind in self._kinds(block)]
        return Window(
            self.pages[:begin] + scratch, self.limit, first, begin, self.block, self.ids[first * length :], kinds,
            self.rule, self.seed, self.top_logprobs,
        )  # fmt: skip

    def take_window(
        self, error: bool, tokens: list[int], confidences: list[float],
        top: tuple[list[list[int]], list[list[float]]] | None = None,
    ):  # fmt: skip
        """The window pass of the active block is over, and so may be the sequence.

        error: its logits hold NaN or infinity.
        tokens: of the window; confidences: of those that it has edited.
        top: the likeliest ids at its positions and their log-probabilities, where they are kept.
        """
        counters, begin = self.counters, (self.block - self.window_blocks) * self.block_length
        counters.denoise_forwards += 1
        counters.window_forwards += 1
        counters.forwards_per_block[-1] += 1
        if error:
            self.fail(f"logits hold NaN or infinity at the window pass of block {self.block}")
            return
        pairs = zip(tokens, self.ids[begin:], strict=True)
        edited = [at for at, (token, held) in enumerate(pairs, begin) if token != held]
        for at in edited:
            self._edit(at, tokens[at - begin], confidences[at - begin])
            if top is not None:
                self.token_top[at - self.prompt_length] = _likeliest(*top, at - begin)
        counters.edits += len(edited)
        if edited:
            self.rewind(edited[0] // self.block_length)
        self.tokens = self.ids[self.block_start :]
        first = self.prompt_length + self.min_tokens
        if self.params.eos_early_stop and not {*self.eos_ids}.isdisjoint(self.ids[first : self.total]):
            self.finish("eos")
        elif self.block + 1 == self.num_blocks:
            self.finish("length")

    def _edit(self, position, token, confidence):
        """A window pass, the last forward, has written a token."""
        now, old, at = self.counters.denoise_forwards - 1, self.ids[position], position - self.prompt_length
        self.ids[position] = token
        if self.detailed:
            self.token_steps[at], self.token_confidences[at] = now, confidence
        if self.events is not None:
            block = position // self.block_length
            self.events.append(Event(now, block, position, "edit", token, confidence, old))

    def _end(self, flags):
        """BLOCK_DONE, FINISHED among the flags: its block, it itself is over."""
        if flags & (refine.BLOCK_DONE | refine.FINISHED):
            self.keep_block()
        if flags & refine.BLOCK_DONE:
            self.phase = Phase.BLOCK_END
            if self.window_blocks:
                return  # its pass comes first
            if self.block + 1 == self.num_blocks:
                self.finish("length")
        if flags & refine.FINISHED:
            self.finish("eos")
        elif (self.has_canvas or self.edit_window) and self._has_ended():
            self.keep_block()
            self.finish("eos")

    def _has_ended(self) -> bool:
        """Whether an EOS behind the last given token, or behind min_tokens, ends it, which the device cannot tell from
        one before that does not count."""
        if not self.params.eos_early_stop or (self.params.editing_threshold is not None and not self.block_ended):
            return False
        begin = max(self.prompt_length + self.min_tokens - self.block_start, self.generated.start)
        resolved = takewhile(lambda token: token != self.mask_id, self.tokens[self.generated])
        return any(token in self.eos_ids for token in islice(resolved, begin - self.generated.start, None))

    def keep_block(self):
        """The active block's tokens are taken into ids as they stand."""
        self.ids[self.block_start :] = self.tokens
        if self.detailed:
            begin = self.generated.start
            at = self.block_start + begin - self.prompt_length
            self.token_steps[at:] = self.row_steps()[begin:]
            own = enumerate(self.confidences[begin:], self.block_start + begin)
            self.token_confidences[at:] = [1.0 if self.is_given(position) else p for position, p in own]
        if self.top_logprobs:
            self.token_top[at:] = self.top[begin:]

    def row_steps(self) -> list[int]:
        """`steps` counted from the sequence's first denoise forward on; -1 where nothing has been written."""
        before = self._forwards_before
        return [step + before if step >= 0 else -1 for step in self.steps]

    def events_since(self, block: int) -> list[Event]:
        """The events since a block began, those of it and of later ones among them."""
        late = takewhile(lambda event: event.kind == "edit" or event.block >= block, reversed(self.events or ()))
        return list(late)[::-1]

    def _record(self, before, source):
        """Keep what the last step has written over `before`, by rising position: commits first, then edits. source:
        where the positions' tokens were then."""
        if self.events is None:
            return
        written = self._written()
        for kind, masked in (("commit", True), ("edit", False)):
            for at in written:
                old = before[source[at]]
                if (old == self.mask_id) == masked:
                    self._add_event(at, kind, self.tokens[at], self.confidences[at], old)

    def _record_moves(self, before, chosen, source):
        """Keep what the last step has deleted and inserted, and what has moved for it; arguments as of `sources`."""
        if self.events is None:
            return
        for kind, special in (("delete", self.special.delete), ("insert", self.special.split)):
            for at, token in enumerate(chosen):
                if token == special:
                    self._add_event(at, kind, token, 0.0, before[at])
        written = set(self._written())
        for at, (token, origin) in enumerate(zip(self.tokens, source, strict=True)):
            masks = token == before[at] == self.mask_id
            if origin != at and at not in written and not masks:
                self._add_event(at, "move", token, self.confidences[at], before[at])

    def _add_event(self, at, kind, token, confidence, old):
        now = self.counters.denoise_forwards - 1
        self.events.append(Event(now, self.block, self.block_start + at, kind, token, confidence, old))

    def _keep_top(self, source, ids, logprobs):
        self.top = [[] if at is None else self.top[at] for at in source]
        for at in self._written():
            self.top[at] = _likeliest(ids, logprobs, source[at])

    def _written(self):
        """Where in the active block the last step has written."""
        own = self.counters.forwards_per_block[-1] - 1
        return [at for at, step in enumerate(self.steps) if step == own]

    def finish(self, reason: str):
        """It goes on no further. reason: "eos" or "length"."""
        self.phase, self.finish_reason = Phase.FINISHED, reason

    def fail(self, what: str):
        self.phase, self.error = Phase.FINISHED, what

    def stop(self, count: int):
        """End it as it stands, with so many generated tokens."""
        self.gen_length, self.eos_position = count, None
        self.finish("length")

    def rewind(self, block: int):
        """Somebody has rewritten tokens of this block: the K/V from there on are not final any more."""
        self.num_final_blocks = min(self.num_final_blocks, block)
        self.num_computed_blocks = min(self.num_computed_blocks, block)

    def rewrite(self, ids: list[int], changed: int, flags: int):
        """Somebody has rewritten it after a step, and may have ended its block or opened it again.

        ids: of all blocks up to the active one.
        changed: the first position that is new.
        flags: what is over now, of BLOCK_DONE and FINISHED.
        """
        self.rewind(changed // self.block_length)
        self.ids, self.tokens = ids[: self.block_start], ids[self.block_start :]
        self.phase, self.finish_reason, self.eos_position = Phase.DECODE, None, None
        self._end(flags)

    def mark(self) -> Mark:
        """Where it stands, between two blocks: before its first one, or when the active one has ended."""
        block, most = self.block + self.block_ended, self.edit_window * self.block_length
        counters = replace(self.counters, forwards_per_block=[])
        revisable = tuple(part[max(0, len(part) - most) :] for part in self._by_position())
        return Mark(block, self.num_delivered, len(self.events or ()), counters, revisable)

    def _by_position(self):
        return self.ids, self.token_steps, self.token_confidences, self.token_top

    def resume(self, mark: Mark):
        """Take it out of its lane and its pages, back to a mark of its own, whatever has become of it since; it gets
        the tokens it would have got."""
        self.block, self.num_delivered, num_events, counters, revisable = mark
        per_block = self.counters.forwards_per_block[: self.block - self.first_block]
        self.counters = replace(counters, forwards_per_block=per_block)
        del self.ids[self.block_start :]
        generated = max(0, self.block_start - self.prompt_length)
        del self.token_steps[generated:], self.token_confidences[generated:], self.token_top[generated:]
        for part, kept in zip(self._by_position(), revisable, strict=True):
            part[len(part) - len(kept) :] = kept
        if self.events is not None:
            del self.events[num_events:]
        self.finish_reason = self.error = self.eos_position = self._guide = None
        self.phase, self.lane, self.pages = Phase.WAITING, None, ()
        self.rewind(0)


def _likeliest(ids, logprobs, at):
    """(id, log-probability) of those that are listed at a position."""
    return [pair for pair in zip(ids[at], logprobs[at], strict=True) if pair[0] >= 0]
