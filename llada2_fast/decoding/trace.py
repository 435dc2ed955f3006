"""What was committed and edited, when, and how sure the model was.

A token belongs to the last write of its position: its commit, or the edit or the move that put it there later. Whoever
writes the events' tokens to their positions in their order, but for deletions and insertions, has the block as it stood
after each step.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.roles import SpecialIds

EDITS = ("edit", "delete", "insert")  # kinds of events by which the model takes back what it has written


class Event(NamedTuple):
    """One token written, or a deletion or insertion of LLaDA2.2 and what has moved for it.

    kind: "commit"; "edit"; "delete" and "insert", at the position ahead of the step, whose token is the special id;
        "move", what stands at the position after the step comes from another one, or is a mask that was put there.
    position: row-local; step: the row's denoise forward, from 0; confidence: float32 softmax, of a move what its token
        was written with, 0 of a deletion or insertion.
    """

    step: int
    block: int
    position: int
    kind: str
    token: int
    confidence: float
    old: int  # the token replaced; the mask id for a commit; of an insertion the one that stays behind the new mask


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
        """{position: the event that put its token there: its commit, or the last edit or move}."""
        return {event.position: event for event in self.events if event.kind not in ("delete", "insert")}

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
    """Events without those from position `end` on that are no commits."""
    return [event for event in events if event.kind == "commit" or event.position < end]


def sources(chosen: list[int], special: SpecialIds, exist: int) -> list[int | None]:
    """Where what stands at a block's positions after a step comes from: positions ahead of it, None for a mask that was
    put there.

    chosen: by position ahead of the step the candidate that was written there, -1 for none.
    special: the model's ids; exist: how many of the positions do.
    """
    found: list[int | None] = []
    for at, token in enumerate(chosen[:exist]):
        if token == special.split:
            found.append(None)
        if token != special.delete:
            found.append(at)
    return (found + [None] * exist)[:exist] + list(range(exist, len(chosen)))
