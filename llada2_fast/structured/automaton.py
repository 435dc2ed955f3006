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

_CHUNK = 4096  # words whose ways are looked at together
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

    dfa: structured.byte_dfa.ByteDFA, of its texts.
    texts: by id the bytes of a token, None for what is no text (special tokens, ids without a token).
    eos_ids: those that end an answer, at least one of them in the vocabulary; behind an end the first one is repeated.
    Raises ValueError if no text can be made of the tokens, or with more than MAX_CLASSES classes.

    classes: int16 [V], each id's class; 0 = nowhere allowed.
    start: the set with the first state; accept: the set of those where an answer may end or has ended.
    fewest: tokens that the shortest answer takes.
    """

    def __init__(self, dfa, texts, eos_ids):
        eos_ids = [token for token in eos_ids if 0 <= token < len(texts)]
        assert eos_ids, "who asks for a language without an end is told by name where it is asked for"
        table, self.classes = _compose(dfa, texts)
        kept = _reachable(table, dfa.start)
        accepts, end = dfa.accepts[kept], len(kept)
        self.num_states, nowhere = end + 1, end + 1
        number = np.full(len(table) + 1, nowhere, np.int16)
        number[kept] = np.arange(end)
        columns = [*number[table[kept]].T]
        for token in eos_ids:
            self.classes[token] = len(columns)
            columns.append(np.where(accepts, end, nowhere))
        table = np.full((end + 1, len(columns)), nowhere, np.int16)
        table[:end] = np.stack(columns, 1)
        table[end, self.classes[eos_ids[0]]] = end
        if len(columns) > MAX_CLASSES:
            raise ValueError(f"it tells {len(columns)} classes of tokens apart, expected at most {MAX_CLASSES}")
        self.table = table  # int16 [S, C]: where a token of a class leads from a state, S for nowhere
        self._accepts = np.append(accepts, True)
        self._sizes = np.bincount(self.classes, minlength=len(columns))
        self._distance = self._distances()
        self.fewest = int(self._distance[number[dfa.start]])
        if self.fewest == _NEVER:
            raise ValueError("no text of it can be made of the tokenizer's tokens")
        self.start, self.accept = 1 << int(number[dfa.start]), _pack(self._accepts)
        # looked up rather than computed wherever a block has been like this before
        self.after, self.before, self.choice = (
            lru_cache(2**12)(method) for method in (self._after, self._before, self._choice)
        )
        self.within = lru_cache(2**10)(self._within)

    def _distances(self):
        """How many tokens each state is from an end, [S]."""
        distance, reached = np.where(self._accepts, 0, _NEVER), np.append(self._accepts, False)
        for steps in range(1, self.num_states):
            left = np.flatnonzero(~reached[:-1])
            fresh = left[reached[self.table[left]].any(1)]
            if not len(fresh):
                break
            distance[fresh], reached[fresh] = steps, True
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


def _compose(dfa, texts):
    """Where the classes of tokens lead, int16 [S, C], S for nowhere, and each token's class, int16 [V]; of class 0 are
    those that lead nowhere.

    Bytes that all states take alike are one letter, so that many tokens are the same word, and words that begin alike
    go the same way as far as they do.
    """
    letters, letter = np.unique(dfa.after, axis=1, return_inverse=True)  # [S, K], [256]
    alphabet = letter.reshape(-1).astype(np.uint8).tobytes()
    nowhere = len(dfa.after)
    step = np.full((letters.shape[1], nowhere + 1), nowhere, np.int16)  # [K, S + 1]
    step[:, :-1] = np.where(letters < 0, nowhere, letters).T
    words = {}
    for token, text in enumerate(texts):
        if text:
            words.setdefault(text.translate(alphabet), []).append(token)
    classes, known = np.zeros(len(texts), np.int16), {}
    known[np.full(nowhere, nowhere, np.int16).tobytes()] = 0
    ordered = sorted(words)
    for first in range(0, len(ordered), _CHUNK):
        for word, row in _walk(step, ordered[first : first + _CHUNK]):
            classes[words[word]] = known.setdefault(row.tobytes(), len(known))
            if len(known) > MAX_CLASSES:
                raise ValueError(f"it tells more than {MAX_CLASSES} classes of tokens apart")
    return np.stack([np.frombuffer(row, np.int16) for row in known], 1), classes


def _walk(step, words):
    """Where each word leads: (word, int16 [S]) of those that lead somewhere.

    step: int16 [K, S + 1], by letter, nowhere last; words: sorted.
    """
    wanted, nowhere = set(words), step.shape[1] - 1
    rows, number = np.arange(nowhere, dtype=np.int16)[None], {b"": 0}  # of the prefixes that lead somewhere
    for length in range(1, max(map(len, words)) + 1):
        prefixes = dict.fromkeys(
            word[:length] for word in words if len(word) >= length and word[: length - 1] in number
        )
        by_letter = {}
        for prefix in prefixes:
            by_letter.setdefault(prefix[-1], []).append(prefix)
        found = [step[letter].take(rows[[number[p[:-1]] for p in group]]) for letter, group in by_letter.items()]
        if not found:
            return
        rows, prefixes = np.concatenate(found), [prefix for group in by_letter.values() for prefix in group]
        alive = (rows != nowhere).any(1)
        number = {prefix: at for at, prefix in enumerate(prefixes) if alive[at]}
        yield from ((prefix, rows[at]) for prefix, at in number.items() if prefix in wanted)


def _reachable(table, start):
    """The states that tokens lead to, sorted [n]."""
    reached = np.zeros(len(table) + 1, bool)
    reached[-1] = True  # nowhere
    fresh = np.array([start])
    while len(fresh):
        reached[fresh] = True
        behind = np.unique(table[fresh])
        fresh = behind[~reached[behind]]
    return np.flatnonzero(reached[:-1])
