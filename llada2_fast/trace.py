"""What was committed and edited, when, and how sure the model was."""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Event(NamedTuple):
    """One token written. position: row-local; step: the row's denoise forward, from 0; confidence: float32 softmax."""

    step: int
    block: int
    position: int
    kind: str  # "commit" or "edit"
    token: int
    confidence: float
    old: int  # the token replaced; the mask id for a commit


@dataclass(frozen=True)
class Trace:
    """All events of one row in order."""

    prompt_length: int
    block_length: int
    events: tuple[Event, ...]

    @classmethod
    def of(cls, row):
        """The trace of a decoder.Row that was opened with trace=True."""
        events = tuple(Event(step, at // row.length, at, *rest) for step, at, *rest in row.events)
        return cls(row.prompt_length, row.length, events)

    def commits(self):
        """{position: its commit event}."""
        return {event.position: event for event in self.events if event.kind == "commit"}

    def logprobs(self):
        """{position: log-probability at commit}."""
        return {at: math.log(max(event.confidence, 1e-45)) for at, event in self.commits().items()}
