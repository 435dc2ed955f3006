"""A regular expression -> its automaton over tokens, in a process of its own.

What a regular expression costs cannot be told from its looks: `[ab]*a[ab]{20}` has four million states, and
outlines-core ends the whole process where memory is short. So this file is also a program, which imports nothing of the
package: it reads a pattern and the tokens' texts from stdin and writes arrays to stdout, under limits of memory and
time.
"""

import json
import sys

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])  # what its caller can import

import io
import os
import subprocess
from typing import NamedTuple

import numpy as np

MAX_SECONDS, MAX_BYTES = 10, 2 << 30  # of a compilation
MAX_TABLE = 1 << 20  # states x classes, which a step's work grows with
_CHUNK = 4096  # words whose ways are looked at together
_REFUSED = 3  # exit code: the pattern is none, or too large
_MISSING = 4  # exit code: there is no outlines-core


class TooLong(ValueError):
    """It was not done in time, by the clock: on another day it might be."""


class Limits(NamedTuple):
    """Of an automaton's states and of its classes of tokens."""

    states: int
    classes: int


class ByteDFA(NamedTuple):
    """States 0 .. S-1. All are reachable, and from all of them a text can be ended."""

    after: np.ndarray  # int32 [S, 256]: the state behind a byte, -1 for none
    accepts: np.ndarray  # bool [S]: a text may end here
    start: int


class TokenDFA(NamedTuple):
    """States 0 .. S-1, the first of which is where texts begin, and C classes of tokens that lead alike."""

    table: np.ndarray  # int16 [S, C]: the state behind a token of a class, S for none
    classes: np.ndarray  # int16 [V]: each token's class; of class 0 are those that lead nowhere
    accepts: np.ndarray  # bool [S]: a text may end here


def compile_tokens(pattern: str, texts: list[bytes | None], limits: Limits) -> TokenDFA:
    """The automaton of a regular expression over tokens.

    pattern: in the syntax of Rust's regex crate; it has to match whole texts, in UTF-8. Texts with a NUL are left out.
    texts: by id the bytes of each token, None for what is no text.
    limits: what is larger is refused.
    Raises ValueError for a pattern that is none, that nothing matches or that is beyond the limits;
    ModuleNotFoundError without outlines-core.
    """
    sizes = np.array([len(text or b"") for text in texts], np.int32)
    given = io.BytesIO()
    np.savez(given, pattern=np.frombuffer(pattern.encode(), np.uint8), sizes=sizes,
             bytes=np.frombuffer(b"".join(text or b"" for text in texts), np.uint8))  # fmt: skip
    program = [sys.executable, "-I", __file__, json.dumps(sys.path), *map(str, limits)]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each takes of the memory
    try:
        done = subprocess.run(
            program, input=given.getvalue(), capture_output=True, timeout=2 * MAX_SECONDS, env=one_thread,
            start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TooLong(f"it takes more than {2 * MAX_SECONDS} s to compile") from None
    if done.returncode == _MISSING:
        raise ModuleNotFoundError('outlines-core is not installed: pip install "llada2-fast[structured]"')
    if done.returncode == _REFUSED:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    if done.returncode > 0 and b"Error" in done.stderr and b"MemoryError" not in done.stderr:
        raise RuntimeError(f"the compiler has failed: {done.stderr.decode(errors='replace')[-2000:]}")
    if done.returncode:  # ended by a limit, or by the library
        raise ValueError(f"it takes more than {MAX_SECONDS} s or {MAX_BYTES >> 20} MiB to compile")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as arrays:
        return TokenDFA(**arrays)


def token_dfa(pattern: str, texts: list[bytes | None], limits: Limits) -> TokenDFA:
    """compile_tokens in this process, without limits of memory and time."""
    dfa = byte_dfa(pattern, limits.states)
    table, classes = _compose(dfa, texts, limits)
    kept = _reachable(table, dfa.start)
    kept = np.r_[dfa.start, kept[kept != dfa.start]]
    number = np.full(len(table) + 1, len(kept), np.int16)
    number[kept] = np.arange(len(kept))
    return TokenDFA(number[table[kept]], classes, dfa.accepts[kept])


def byte_dfa(pattern: str, max_states: int) -> ByteDFA:
    """The automaton of a regular expression over bytes; arguments and errors as of compile_tokens.

    A byte is put on either side of every text, and taken away again: the library finds the first of several
    alternatives and leaves out what goes on behind a match, so that it has to be made to go on to the end; and it keeps
    account of matches that begin later in a text, which may be exponentially many, unless none can.
    """
    import outlines_core

    vocabulary = outlines_core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})  # 256: none of them
    try:
        index = outlines_core.Index(f"\\x00(?:{pattern})\\x00", vocabulary)
    except ValueError as error:
        raise ValueError("nothing matches it" if "no transitions" in str(error) else error) from None
    transitions, final = index.get_transitions(), set(index.get_final_states())
    start = transitions[index.get_initial_state()][0]
    if len(transitions) - len(final) > max_states:
        raise ValueError(f"it has {len(transitions) - len(final)} states, expected at most {max_states}")
    text = {state: [(byte, behind) for byte, behind in transitions[state].items() if byte] for state in transitions}
    successors = {state: {behind for _, behind in text[state]} - final for state in transitions if state not in final}
    ends = [state for state in successors if transitions[state].get(0) in final]
    predecessors = {state: [] for state in successors}
    for state, behind in successors.items():
        for one in behind:
            predecessors[one].append(state)
    kept = _closure(successors, [start]) & _closure(predecessors, ends)
    if start not in kept:
        raise ValueError("nothing matches it")
    number = {state: i for i, state in enumerate(sorted(kept))}
    after = np.full((len(number), 256), -1, np.int32)
    for state, i in number.items():
        for byte, behind in text[state]:
            after[i, byte] = number.get(behind, -1)
    return ByteDFA(after, np.isin(sorted(kept), ends), number[start])


def _closure(neighbours, begin):
    """The states that are reached from some."""
    reached, todo = set(begin), list(begin)
    while todo:
        fresh = set(neighbours[todo.pop()]) - reached
        reached |= fresh
        todo += fresh
    return reached


def _compose(dfa, texts, limits):
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
            if len(known) > limits.classes or len(known) * nowhere > MAX_TABLE:
                most = min(limits.classes, MAX_TABLE // nowhere)
                raise ValueError(f"its {nowhere} states tell more than {most} classes of tokens apart")
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


def _main():
    try:
        import outlines_core  # noqa: F401
    except ModuleNotFoundError:
        return _MISSING
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    except ImportError:  # Windows has no such limits; the caller's clock is one
        pass
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as given:
        data, ends = given["bytes"].tobytes(), given["sizes"].cumsum()
        texts = [data[begin:end] or None for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        pattern = given["pattern"].tobytes().decode()
    try:
        found = token_dfa(pattern, texts, Limits(*map(int, sys.argv[2:])))
    except ValueError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    np.savez(sys.stdout.buffer, **found._asdict())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
