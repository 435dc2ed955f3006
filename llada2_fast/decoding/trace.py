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
    def of(cls, sequence, num_tokens):
        """The trace of a Sequence that was asked for one; num_tokens: the answer's."""
        events = until(sequence.events, sequence.prompt_length + num_tokens)
        return cls(sequence.prompt_length, sequence.block_length, tuple(events))

    def commits(self):
        """{position: the event that put its token there: its commit, or the last edit}."""
        return {event.position: event for event in self.events}

    def first_commits(self):
        """{position: its commit, whatever has replaced the token since}."""
        return {event.position: event for event in self.events if event.kind == "commit"}

    def logprobs(self, first=False):
        """{position: log-probability of its token when it was written}; first: of what was committed there first."""
        events = self.first_commits() if first else self.commits()
        return {at: logprob(event.confidence) for at, event in events.items()}


def logprob(confidence: float) -> float:
    """Its logarithm, of the least float32 where it is 0."""
    return math.log(max(confidence, 1e-45))


def until(events, end):
    """Events without the edits from position `end` on."""
    return [event for event in events if event.kind == "commit" or event.position < end]
