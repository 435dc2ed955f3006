"""A request from its arrival to its output, and the events in between."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import DecodeParams, RequestOptions
from ..decoding.sequence import Counters, Mark, Phase, Sequence
from ..decoding.trace import EDITS, Trace, logprob
from ..decoding.trace import Event as TraceEvent
from .detokenizer import IncrementalDetokenizer

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
DEFAULTS, DEFAULT_OPTIONS = DecodeParams(), RequestOptions()


def check_params(params):
    """ValueError for what is no DecodeParams."""
    if not isinstance(params, DecodeParams):
        raise ValueError(f"params={params!r:.80}: expected DecodeParams")


class QueueFull(RuntimeError):
    """As many requests are waiting as may wait; this one was not taken."""


@dataclass(frozen=True)
class RequestOutput:
    """What a request gave and what it cost.

    token_ids: the answer; they end with the first EOS or the token that completed a stop.
    text: None without a tokenizer; it ends before a stop string, or behind it with include_stop.
    finish_reason: "eos", "length", "stop", "deadline", "cancelled" or "error"; then `error` says what happened.
    stop_reason: the stop id or stop string that ended it, None if none did.
    confidences, steps: of the write, commit or edit, that put each token there; step = the request's denoise forward
        from 0 on.
    top_logprobs: of that write, for each token the likeliest ones, (id, log-probability) from the best down; None
        unless asked for.
    trace: every write, None unless asked for.
    counters: what it cost.
    prompt_length: in tokens.
    shared_tokens: positions whose K/V were found in the cache when it got its place, the last one if it had several.
    preemptions: how often it had to give up its place.
    queue_s, prefill_s, decode_s: seconds until admission, from there until the step by which the prompt was in the
        cache, and from there to the end.
    """

    request_id: str
    token_ids: list[int]
    text: str | None
    finish_reason: str
    stop_reason: int | str | None
    error: str | None
    confidences: list[float]
    steps: list[int]
    top_logprobs: list[list[tuple[int, float]]] | None
    trace: Trace | None
    counters: Counters
    prompt_length: int
    shared_tokens: int
    preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each token when it was written."""
        return _logs(self.confidences)

    @property
    def first_token_ids(self) -> list[int] | None:
        """What was committed first at each position, which edits may have replaced; None without a trace."""
        return self._of_first_commits("token")

    @property
    def first_confidences(self) -> list[float] | None:
        """Of first_token_ids when they were committed; None without a trace."""
        return self._of_first_commits("confidence")

    @property
    def first_logprobs(self) -> list[float] | None:
        """Logarithms of first_confidences; None without a trace."""
        return None if self.trace is None else _logs(self.first_confidences)

    @property
    def first_steps(self) -> list[int] | None:
        """The steps of first_token_ids; None without a trace."""
        return self._of_first_commits("step")

    def _of_first_commits(self, name):
        if self.trace is None:
            return None
        commits, begin = self.trace.first_commits(), self.prompt_length
        never = {"confidence": 0.0, "step": -1}  # of masks in an answer, which hf-2.0 leaves where steps are few
        return [
            getattr(commits[begin + i], name) if begin + i in commits else never.get(name, token)
            for i, token in enumerate(self.token_ids)
        ]

    @property
    def edits(self) -> list[TraceEvent]:
        """Every token of the answer that was replaced, deleted or pushed on by an insertion: trace events of these
        kinds."""
        return [event for event in self.trace.events if event.kind in EDITS] if self.trace else []

    @property
    def tokens_per_forward(self) -> float:
        """TPF: generated tokens per denoise forward; prefill does not count."""
        return len(self.token_ids) / max(1, self.counters.denoise_forwards)


def _logs(confidences):
    return [logprob(confidence) for confidence in confidences]


@dataclass(frozen=True)
class Event:
    """Something that happened to a request, at `time` on the engine's clock.

    kind: "draft", the open block as it stands, where masks have confidence 0 and step -1, with an edit_window behind
        the blocks that are still revisable; "commit", final tokens, never taken back; "finish", the last event, with
        the output.
    start: index of the first token among the generated ones.
    top_logprobs: as of RequestOutput, of commits; empty unless asked for.
    text: what a commit adds to the text; of a finish, what was held back until then.
    """

    request_id: str
    kind: str
    time: float
    start: int = 0
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    edits: list[TraceEvent] = field(default_factory=list)
    text: str = ""
    output: RequestOutput | None = None


class Entry(NamedTuple):
    """One line of a request's log: what it was given, and where it stood then.

    event: None for where it began, and for a block that adds no tokens.
    mark: of its sequence, which goes on from there if it loses its place.
    detokenizer: None without a tokenizer.
    """

    event: Event | None
    mark: Mark
    detokenizer: IncrementalDetokenizer | None


@dataclass(eq=False)
class Request:
    """The handle of a request: `request_id`, `prompt`, `params`, `status` and, when it is finished, `output` are for
    everybody.

    log: what it was given so far. An entry is the one thing that counts of a step: whatever else is known of a request
        is made again from its last entry if an exception cuts the step short.
    """

    request_id: str
    sequence: Sequence
    options: RequestOptions
    order: tuple[float, int]  # waiting requests are served in this order: aged priority, then arrival
    arrived: float
    stop_ids: frozenset[int]  # that end it, EOS ids among them if min_tokens says how early they may
    log: list[Entry]
    home: object  # of the engine it was made by
    num_read: int = 1  # entries of the log that were read; the first is where it began
    awaited: bool = False  # nobody is told anything before its end
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading blocks
    num_inserted: int = 0  # leading blocks whose pages others can match, or that are somebody else's
    num_passed: int = 0  # later requests that were let in before it while it waited for pages
    epoch: int = 0  # of the cache, when it was let in
    admitted: float | None = None
    prefilled: float | None = None
    shared_tokens: int = 0
    preemptions: int = 0
    draft: Event | None = None  # the latest one nobody has read
    _drafts: bool = False

    def __post_init__(self):
        self.drafts = False

    @property
    def output(self) -> RequestOutput | None:
        """None until it is finished."""
        event = self.log[-1].event
        return None if event is None else event.output

    @property
    def status(self) -> str:
        """WAITING, RUNNING or FINISHED."""
        if self.output is not None:
            return FINISHED
        return WAITING if self.sequence.phase is Phase.WAITING else RUNNING

    @property
    def prompt(self) -> list[int]:
        return self.sequence.prompt

    @property
    def params(self) -> DecodeParams:
        return self.sequence.params

    @property
    def priority(self) -> float:
        return self.options.priority

    @property
    def detokenizer(self) -> IncrementalDetokenizer | None:
        """Of the tokens that were given out; None without a tokenizer."""
        return self.log[-1].detokenizer

    @property
    def drafts(self) -> bool:
        """Somebody wants to see the open block."""
        return self._drafts

    @drafts.setter
    def drafts(self, wanted):
        self._drafts = wanted
        self.sequence.watched = wanted or self.has_stops or self.sequence.events is not None

    @property
    def has_stops(self) -> bool:
        return bool(self.stop_ids or self.options.stop)

    def stops(self, tokens: list[int]) -> tuple[int, int | str] | None:
        """How many of the next generated tokens complete a stop, and which; None if all of them do not."""
        begin = max(0, self.sequence.min_tokens - self.sequence.num_delivered)
        ids = ((at + 1, tokens[at]) for at in range(begin, len(tokens)) if tokens[at] in self.stop_ids)
        found = [next(ids, None), self._stop_string(tokens, begin)]
        return min((one for one in found if one is not None), key=lambda one: one[0], default=None)

    def _stop_string(self, tokens, begin):
        if not self.options.stop or begin >= len(tokens):
            return None
        detokenizer = self.detokenizer
        if begin:
            detokenizer = detokenizer.copy()
            detokenizer.push(tokens[:begin], stops=False)
        found = detokenizer.find_stop(tokens[begin:])
        return None if found is None else (found[0] + begin, found[1])

    def rewind(self):
        """Out of its place, back to the last entry of its log."""
        self.sequence.resume(self.log[-1].mark)
        del self.block_hashes[self.sequence.num_kept_blocks :]
        self.draft = None

    @property
    def has_news(self) -> bool:
        """There is an event that nobody has read."""
        return self.num_read < len(self.log) or self.draft is not None

    def next_event(self) -> Event | None:
        """The oldest event nobody has read, None if there is none. A draft not read in time gives way to the next."""
        draft = self.draft  # read the draft before the log, or a commit could overtake it: another thread may write
        while self.num_read < len(self.log):
            event = self.log[self.num_read].event
            self.num_read += 1
            if event is not None:
                return event
        if self.draft is draft:  # else there is a newer one by now
            self.draft = None
        return draft
