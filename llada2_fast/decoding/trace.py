"""What was committed and edited, when, and how sure the model was.

A token belongs to the last write of its position: its commit, or the edit that put it there later.
"""

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
    """The events of one row in order: all commits, and the edits up to the answer's end."""

    prompt_length: int
    block_length: int
    events: tuple[Event, ...]

    @classmethod
    def of(cls, row, num_tokens):
        """The trace of a decoder.Row that was opened with trace=True; num_tokens: the answer's."""
        return cls(row.prompt_length, row.length, tuple(events_of(row, num_tokens)))

    def commits(self):
        """{position: its commit event}."""
        return {event.position: event for event in self.events if event.kind == "commit"}

    def writes(self):
        """{position: the last event there, which put its token there}."""
        return {event.position: event for event in self.events}

    def logprobs(self, commits=False):
        """{position: log-probability of its token when it was written}; commits: of what was committed there first."""
        events = self.commits() if commits else self.writes()
        return {at: math.log(max(event.confidence, 1e-45)) for at, event in events.items()}


def events_of(row, num_tokens, since=0):
    """Events of a decoder.Row from number `since` on, without edits behind the first num_tokens generated ones."""
    end = row.prompt_length + num_tokens
    for step, at, kind, *rest in row.events[since:]:
        if kind == "commit" or at < end:
            yield Event(step, at // row.length, at, kind, *rest)
