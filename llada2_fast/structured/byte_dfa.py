"""A regular expression -> its automaton over bytes, by outlines-core, in a process of its own.

What a regular expression costs cannot be told from its looks: `[ab]*a[ab]{20}` has four million states, and the library
ends the whole process where memory is short. So this file is also a program, which imports nothing of the package: it
reads a pattern from stdin and writes three arrays to stdout, under limits of memory and time.
"""

import io
import subprocess
import sys
from typing import NamedTuple

import numpy as np

MAX_SECONDS, MAX_BYTES = 10, 2 << 30  # of a compilation
_REFUSED = 3  # exit code: the library says why on stderr
_MISSING = 4  # exit code: there is no such library


class ByteDFA(NamedTuple):
    """States 0 .. S-1. All are reachable, and from all of them a text can be ended."""

    after: np.ndarray  # int32 [S, 256]: the state behind a byte, -1 for none
    accepts: np.ndarray  # bool [S]: a text may end here
    start: int


def compile_regex(pattern: str, max_states: int) -> ByteDFA:
    """The automaton of a regular expression.

    pattern: in the syntax of Rust's regex crate; it has to match whole texts, in UTF-8. Texts with a NUL are left out.
    max_states: more are refused.
    Raises ValueError for a pattern that is none, that nothing matches or that is beyond the limits;
    ModuleNotFoundError without outlines-core.
    """
    program = [sys.executable, "-I", __file__, str(max_states)]
    try:
        done = subprocess.run(program, input=pattern.encode(), capture_output=True, timeout=2 * MAX_SECONDS)
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == _MISSING:
        raise ModuleNotFoundError('outlines-core is not installed: pip install "llada2-fast[structured]"')
    if done is not None and done.returncode == _REFUSED:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    if done is None or done.returncode:
        raise ValueError(f"it takes more than {MAX_SECONDS} s or {MAX_BYTES >> 20} MiB to compile")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as arrays:
        found = ByteDFA(arrays["after"], arrays["accepts"], int(arrays["start"]))
    if not len(found.accepts):
        raise ValueError("nothing matches it")
    return found


def _compile(pattern, max_states):
    """compile_regex without limits of memory and time.

    A byte is put on either side of every text, and taken away again: the library finds the first of several
    alternatives and leaves out what goes on behind a match, so that it has to be made to go on to the end; and it keeps
    account of matches that begin later in a text, which may be exponentially many, unless none can.
    """
    import outlines_core

    if _closes_what_is_not_open(pattern):
        raise ValueError("a group is closed that was not opened")
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
    number = {state: i for i, state in enumerate(sorted(kept))}
    after = np.full((len(number), 256), -1, np.int32)
    for state, i in number.items():
        for byte, behind in text[state]:
            after[i, byte] = number.get(behind, -1)
    return ByteDFA(after, np.isin(sorted(kept), ends), number.get(start, -1))


def _closes_what_is_not_open(pattern):
    """Whether a parenthesis would close the group that is put around a pattern."""
    groups = classes = at = 0
    while at < len(pattern) and groups >= 0:
        char = pattern[at]
        if char == "\\":
            at += 1  # what is escaped means itself
        elif char == "[":
            classes += 1
            at += pattern.startswith("^", at + 1)
            at += pattern.startswith("]", at + 1)  # first in a class it means itself
        elif char == "]":
            classes = max(0, classes - 1)
        elif not classes:
            groups += (char == "(") - (char == ")")
        at += 1
    return groups < 0


def _closure(neighbours, begin):
    """The states that are reached from some."""
    reached, todo = set(begin), list(begin)
    while todo:
        fresh = set(neighbours[todo.pop()]) - reached
        reached |= fresh
        todo += fresh
    return reached


def _main():
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    except ImportError:  # Windows has no such limits; the caller's clock is one
        pass
    try:
        import outlines_core  # noqa: F401
    except ImportError:
        return _MISSING
    try:
        found = _compile(sys.stdin.buffer.read().decode(), int(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    np.savez(sys.stdout.buffer, **found._asdict())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
