"""A request from its arrival to its output, and the events in between."""

import math
from collections import deque
from dataclasses import dataclass, field

from ..config import DecodeParams
from ..decoding.sequence import Counters, Phase, Sequence
from ..decoding.trace import Event as TraceEvent
from ..decoding.trace import Trace
from .detokenizer import IncrementalDetokenizer

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
DEFAULTS = DecodeParams()


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
    text: None without a tokenizer; it ends before a stop string.
    finish_reason: "eos", "length", "stop", "cancelled" or "error"; then `error` says what happened.
    confidences, steps: of the write, commit or edit, that put each token there; step = the request's denoise forward
        from 0 on.
    trace: every write (trace.commits() has the first ones), None unless asked for.
    counters: what it cost.
    prompt_length: in tokens.
    shared_tokens: positions whose K/V were found in the cache.
    preemptions: how often it had to give up its place.
    queue_s, prefill_s, decode_s: seconds until admission, from there until the step by which the prompt was in the
        cache, and from there to the end.
    """

    request_id: str
    token_ids: list[int]
    text: str | None
    finish_reason: str
    error: str | None
    confidences: list[float]
    steps: list[int]
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
        return [math.log(max(p, 1e-45)) for p in self.confidences]

    @property
    def edits(self) -> list[TraceEvent]:
        """Every token of the answer that was replaced: trace events of kind "edit"."""
        return [event for event in self.trace.events if event.kind == "edit"] if self.trace else []

    @property
    def tokens_per_forward(self) -> float:
        """TPF: generated tokens per denoise forward; prefill does not count."""
        return len(self.token_ids) / max(1, self.counters.denoise_forwards)


@dataclass(frozen=True)
class Event:
    """Something that happened to a request, at `time` on the engine's clock.

    kind: "draft", the open block as it stands, where masks have confidence 0 and step -1; "commit", final tokens, never
        taken back; "finish", the last event, with the output.
    start: index of the first token among the generated ones.
    text: what a commit adds to the text; of a finish, what was held back until then.
    """

    request_id: str
    kind: str
    time: float
    start: int = 0
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    edits: list[TraceEvent] = field(default_factory=list)
    text: str = ""
    output: RequestOutput | None = None


@dataclass(eq=False)
class Request:
    """The handle of a request: `request_id`, `prompt`, `params`, `status` and, when it is finished, `output` are for
    everybody."""

    request_id: str
    sequence: Sequence
    priority: float
    order: tuple[float, int]  # waiting requests are served in this order: aged priority, then arrival
    arrived: float
    stop_ids: frozenset[int] = frozenset()
    detokenizer: IncrementalDetokenizer | None = None  # None without a tokenizer
    output: RequestOutput | None = None
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading blocks
    num_inserted: int = 0  # leading blocks whose pages others can match, or that are somebody else's
    closed: bool = False  # an EOS was given out: what comes after it is not
    admitted: float | None = None
    prefilled: float | None = None
    shared_tokens: int = 0
    preemptions: int = 0
    draft: Event | None = None  # the latest one nobody has read
    events: deque = field(default_factory=deque)
    _drafts: bool = False

    def __post_init__(self):
        self.drafts = False

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
    def drafts(self) -> bool:
        """Somebody wants to see the open block."""
        return self._drafts

    @drafts.setter
    def drafts(self, wanted):
        self._drafts = wanted
        self.sequence.watched = wanted or self.has_stops or self.sequence.events is not None

    @property
    def has_stops(self) -> bool:
        return bool(self.stop_ids or (self.detokenizer and self.detokenizer.stop))

    def stops(self, tokens: list[int]) -> int | None:
        """How many of the next generated tokens complete a stop; None if all of them do not."""
        by_id = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_ids), None)
        by_text = None if self.detokenizer is None else self.detokenizer.tokens_to_stop(tokens)
        return min((count for count in (by_id, by_text) if count is not None), default=None)

    def next_event(self) -> Event | None:
        """The oldest event nobody has read, None if there is none. A draft not read in time gives way to the next."""
        draft = self.draft  # read the draft before the queue, or a commit could overtake it: another thread may write
        if self.events:
            return self.events.popleft()
        self.draft = None
        return draft
