"""Rust's syntax of regular expressions, as far as it matters where a pattern is put between two others."""

import re
from collections.abc import Iterator

_FLAGS = re.compile(r"\(\?([A-Za-z-]*)([:)])")
_BEGIN, _END = ("^", r"\A"), ("$", r"\z")


def unanchored(pattern: str) -> str:
    """A pattern without the anchors on its sides, which mean nothing where the whole text has to match.

    Raises ValueError for anchors inside, for a group that is closed and was not opened, and for the flag x.
    """
    marks = list(_marks(pattern))
    removed, begins, trailing = set(), True, []  # trailing: anchors behind which the alternative may end
    for at, mark, depth in [*marks, (len(pattern), "|", 0)]:
        if depth < 0:
            raise ValueError("a group is closed that was not opened")
        if mark == "|" and depth == 0:
            removed.update(trailing)
            begins, trailing = True, []
            continue
        if mark in _BEGIN and begins and depth == 0:
            removed.add((at, len(mark)))
            continue
        if mark in _END and depth == 0:
            trailing.append((at, len(mark)))
        elif mark in _BEGIN + _END:
            raise ValueError(f"an anchor, {mark!r}, inside")
        elif trailing:
            raise ValueError("an anchor, '$', inside")
        begins = begins and mark == "flags"
    for at, size in sorted(removed, reverse=True):
        pattern = pattern[:at] + pattern[at + size :]
    return pattern


def _marks(pattern: str) -> Iterator[tuple[int, str, int]]:
    """(where, what, how many groups are open) of each part of a pattern; what is a class is one part of no name."""
    depth = at = 0
    while at < len(pattern):
        begin, char = at, pattern[at]
        flags = _FLAGS.match(pattern, at)
        if flags and "x" in flags[1].partition("-")[0]:
            raise ValueError("the flag x is not supported")
        if flags and flags[2] == ")":
            yield begin, "flags", depth
            at = flags.end()
            continue
        at += 1
        if char == "\\":
            at += 1
            char = pattern[begin:at]
        elif char == "[":
            at = _end_of_class(pattern, begin)
        elif char in "()":
            depth += 1 if char == "(" else -1
        yield begin, char, depth


def _end_of_class(pattern, begin):
    """Behind the class that begins there; classes may be in classes."""
    depth, at = 0, begin
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += pattern.startswith("^", at + 1)
            at += pattern.startswith("]", at + 1)  # first in a class it means itself
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return at
