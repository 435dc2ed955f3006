"""An automaton over the tokens of a vocabulary, and what a block of them can still become.

Tokens with equal transitions make a class. Behind the states where an answer may end, EOS leads to a last state, which
EOS alone continues. What stands open in a block is a set of states: a bit mask in a Python int, so that the next set is
looked up once it has been seen.

Shapes: S states, C classes, V ids of the vocabulary.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..kernels.refine import MAX_CLASSES, WORDS

_KEPT_BITS = 2**23  # of sets that are looked up, of each kind
_NEVER = 2**30  # as a number of tokens


class Choice(NamedTuple):
    """What may stand at a position.

    words: int32 [WORDS], a bit for each class, as of kernels.candidates.Allowed.
    only: the one token that may, -1 if there are several.
    """

    words: np.ndarray
    only: int


class TokenAutomaton:
    """A language over tokens.

    dfa: structured.compiler.TokenDFA, of its texts.
    eos_ids: those that end an answer, at least one, all in the vocabulary and no text; behind an end the first one is
        repeated.
    Raises ValueError if no text can be made of the tokens.

    classes: int16 [V], each id's class; 0 = nowhere allowed.
    start: the set with the first state; accept: the set of those where an answer may end or has ended.
    fewest: tokens that the shortest answer takes.
    """

    def __init__(self, dfa, eos_ids):
        assert eos_ids, "who asks for a language without an end is told by name where it is asked for"
        end, first = len(dfa.table), dfa.table.shape[1]  # the last state, and the class of the first EOS
        self.num_states, nowhere = end + 1, end + 1
        assert first + len(eos_ids) <= MAX_CLASSES, "the compiler has been told how many it may make"
        table = np.full((end + 1, first + len(eos_ids)), nowhere, np.int16)
        table[:end, :first] = np.where(dfa.table == end, nowhere, dfa.table)
        table[:end, first:] = np.where(dfa.accepts, end, nowhere)[:, None]
        table[end, first] = end
        self.classes = dfa.classes.copy()
        self.classes[list(eos_ids)] = range(first, first + len(eos_ids))
        self.table = table  # int16 [S, C]: where a token of a class leads from a state, S for nowhere
        self._accepts = np.append(dfa.accepts, True)
        self._sizes = np.bincount(self.classes, minlength=table.shape[1])
        self._distance = self._distances()
        self.fewest = int(self._distance[0])
        if self.fewest == _NEVER:
            raise ValueError("no text of it can be made of the tokenizer's tokens")
        self.start, self.accept = 1, _pack(self._accepts)
        # looked up rather than computed wherever a block has been like this before
        size = min(4096, max(256, _KEPT_BITS // self.num_states))
        self.after, self.before, self.choice = (
            lru_cache(size)(method) for method in (self._after, self._before, self._choice)
        )
        self.within = lru_cache(2**10)(self._within)

    def _distances(self):
        """How many tokens each state is from an end, [S]."""
        size = self.num_states + 1
        edges = np.unique(
            self.table.astype(np.int64) * size + np.arange(self.num_states)[:, None]
        )  # by where they lead
        first, source = np.searchsorted(edges, np.arange(size) * size), edges % size
        distance = np.where(self._accepts, 0, _NEVER)
        todo = [*np.flatnonzero(self._accepts)]
        for state in todo:  # which grows
            near = source[first[state] : first[state + 1]]
            fresh = near[distance[near] == _NEVER]
            distance[fresh] = distance[state] + 1
            todo += [*fresh]
        return distance

    def _within(self, room: int) -> int:
        """The states from which so many tokens are enough for an end."""
        return _pack(self._distance <= room)

    def _after(self, states: int, token_class: int | None) -> int:
        """Where a token of a class leads from some states; None: any token."""
        found = np.zeros(self.num_states + 1, bool)
        found[self.table[self._unpack(states)[:-1], _columns(token_class)]] = True
        return _pack(found[:-1])

    def _before(self, states: int, token_class: int | None) -> int:
        """From where a token of a class leads to one of some states; None: any token."""
        return _pack(self._unpack(states)[self.table[:, _columns(token_class)]].any(1))

    def _choice(self, states: int, goals: int) -> Choice:
        """What may stand between one of some states and one of the goals."""
        behind = self.table[self._unpack(states)[:-1]]
        allowed = self._unpack(goals).take(behind).any(0)  # [C]
        bits = np.zeros(32 * WORDS, np.uint8)
        bits[: len(allowed)] = allowed
        words = np.packbits(bits, bitorder="little").view(np.dtype("<i4")).astype(np.int32)
        only = -1
        if self._sizes[allowed].sum() == 1:
            only = int(np.flatnonzero(self.classes == np.flatnonzero(allowed)[0])[0])
        return Choice(words, only)

    def _unpack(self, states: int) -> np.ndarray:
        """A set as bool [S + 1], the last of which stands for nowhere."""
        data = states.to_bytes(self.num_states // 8 + 1, "little")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=self.num_states + 1, bitorder="little")
        return bits.view(bool)


def _columns(token_class):
    return slice(None) if token_class is None else slice(token_class, token_class + 1)


def _pack(members):
    return int.from_bytes(np.packbits(members, bitorder="little").tobytes(), "little")
