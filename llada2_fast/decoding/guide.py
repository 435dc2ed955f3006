"""What may stand in the blocks of a sequence whose answer is in a language.

A gap is a run of positions that nobody has given: the whole answer, or with a canvas each run between its given tokens.
What is in a gap is a text of the language, and behind it EOS until the gap ends. Two passes over a block, one from each
side, tell for every position what occurs there in some completion: it stands between a state that is reached from the
gap's begin and one from which the gap can still be ended in the positions that are left.
"""

from typing import NamedTuple

import numpy as np

from ..kernels.refine import WORDS
from ..structured import TokenAutomaton


class Gap(NamedTuple):
    """Positions begin .. end - 1 of a row."""

    begin: int
    end: int


def gaps_of(given: list[int | None], total: int) -> list[Gap]:
    """The gaps of a row. given: by position its ids, None where there is none; total: its positions."""
    gaps, begin = [], None
    for at in range(total + 1):
        is_open = at < total and (at >= len(given) or given[at] is None)
        if is_open and begin is None:
            begin = at
        elif not is_open and begin is not None:
            gaps.append(Gap(begin, at))
            begin = None
    return gaps


class BlockGuide:
    """One block under a language, and what has been written there.

    automaton: of the language.
    gaps: of the row.
    before: the row's tokens before the block.
    tokens: the block's, masks where nothing is written.
    mask_id: what a mask is.
    """

    def __init__(self, automaton: TokenAutomaton, gaps: list[Gap], before: list[int], tokens: list[int], mask_id: int):
        self.automaton, self.tokens, self.mask_id = automaton, list(tokens), mask_id
        self.start, length = len(before), len(tokens)
        self._gap: list[Gap | None] = [None] * length  # of each position
        for gap in gaps:
            for at in range(max(gap.begin - self.start, 0), min(gap.end - self.start, length)):
                self._gap[at] = gap
        first, last = self._gap[0], self._gap[-1]
        entry = automaton.start
        for token in before[first.begin :] if first else ():
            entry = automaton.after(entry, self._class_of(token))
        room = last.end - self.start - length if last else 0
        self._reached: list[int | None] = [entry, *[None] * length]  # in front of each position
        self._goals: list[int | None] = [*[None] * length, automaton.within(room)]  # behind `at`: number at + 1
        self._look_on(0)
        self._look_back(length - 1)

    def _class_of(self, token):
        return None if token == self.mask_id else int(self.automaton.classes[token])

    def _look_on(self, first):
        """What is reached from a position on, whose token is new."""
        for at in range(first, len(self.tokens)):
            gap, automaton = self._gap[at], self.automaton
            reached = automaton.after(self._reached[at], self._class_of(self.tokens[at])) if gap else automaton.start
            if reached == self._reached[at + 1]:
                return
            self._reached[at + 1] = reached

    def _look_back(self, last):
        """The goals up to a position, whose token is new."""
        for at in range(last, -1, -1):
            gap, automaton = self._gap[at], self.automaton
            goals = automaton.before(self._goals[at + 1], self._class_of(self.tokens[at])) if gap else automaton.accept
            if goals == self._goals[at]:
                return
            self._goals[at] = goals

    def _choice(self, at):
        return self.automaton.choice(self._reached[at], self._goals[at + 1])

    def words(self, editing: bool) -> np.ndarray:
        """int32 [L, WORDS]: the classes that may stand at each position which a step may write; where there is no
        language, as behind the answer, all of them.

        editing: a step may write over tokens, too.
        """
        words = np.full((len(self.tokens), WORDS), -1, np.int32)
        for at, gap in enumerate(self._gap):
            if gap and (editing or self.tokens[at] == self.mask_id):
                words[at] = self._choice(at).words
        return words

    def forced(self) -> list[int]:
        """The masked positions where one token alone is possible."""
        masked = (at for at, gap in enumerate(self._gap) if gap and self.tokens[at] == self.mask_id)
        return [at for at in masked if self._choice(at).only >= 0]

    def write(self, at: int, token: int) -> bool:
        """Write a token if a completion of the block is left then; returns whether it was written."""
        if self._gap[at]:
            behind = self.automaton.after(self._reached[at], self._class_of(token))
            if not behind & self._goals[at + 1]:
                return False
        self.tokens[at] = token
        self._look_on(at)
        self._look_back(at)
        return True
