"""What the figures should be on an H200, and what became of it."""

from collections.abc import Callable
from typing import NamedTuple


class Goal(NamedTuple):
    """value(lines of `points`, in order) is to be at most, or at least, `limit`."""

    text: str
    points: tuple[str, ...]
    value: Callable
    limit: float
    at_most: bool


def _goal(text, points, value, at_most=None, at_least=None):
    """A goal whose value is a field of its one point, or a function of several points' lines."""
    points = (points,) if isinstance(points, str) else points
    read = (lambda line: line[value]) if isinstance(value, str) else value
    return Goal(text, points, read, at_least if at_most is None else at_most, at_most is not None)


_STEP, _STEP8 = "step mini bf16 b1 p1024", "step mini fp8 b1 p1024"
_DECODE, _DECODE32, _DECODE8 = "decode mini bf16 b1", "decode mini bf16 b32", "decode mini fp8 b1"

GOALS = (
    _goal("mini bf16 b1 p1024: step over its default floor, at most 1.25", _STEP, "over_floor_default", at_most=1.25),
    _goal("mini fp8 b1 p1024: step over its default floor, at most 1.35", _STEP8, "over_floor_default", at_most=1.35),
    _goal("mini bf16 b1: tokens/s at TPF 6.63, at least 1100", _DECODE, "tok_s", at_least=1100),
    _goal("mini fp8 b1: tokens/s at TPF 6.63, at least 1900", _DECODE8, "tok_s", at_least=1900),
    _goal("mini bf16: tokens/s of batch 32 over batch 1, at least 8", (_DECODE32, _DECODE),
          lambda many, one: many["tok_s"] / one["tok_s"], at_least=8),
    _goal("host syncs in a step, 0", _STEP, "host_syncs", at_most=0),
    _goal("launches outside the graph in a step, at most 2", _STEP, "launches_outside_graph", at_most=2),
    _goal("attention b8 p32768: percent of copy bandwidth, at least 80", "attention b8 p32768", "percent_of_copy",
          at_least=80),
    _goal("torch.compile of the reference model over our step, at least 3", ("peer compile", _STEP),
          lambda peer, ours: peer["ms"] / ours["ms"], at_least=3),
    _goal("torch.compile with grouped_mm over our step, at least 1", ("peer grouped_mm", _STEP),
          lambda peer, ours: peer["ms"] / ours["ms"], at_least=1),
    _goal("mini bf16 b1 p1024: peak memory in GB, at most 36", _STEP, "peak_gb", at_most=36),
)  # fmt: skip


def judge(lines):
    """(text, value, verdict) of each goal: "met", "missed" or "not measured" (value None). lines: by point's name."""
    verdicts = []
    for goal in GOALS:
        found = [lines.get(name, {}) for name in goal.points]
        value = None
        if all(line and not line.keys() & {"error", "skipped"} for line in found):
            value = goal.value(*found)
        if value is None:
            verdicts.append((goal.text, None, "not measured"))
        else:
            met = value <= goal.limit if goal.at_most else value >= goal.limit
            verdicts.append((goal.text, value, "met" if met else "missed"))
    return verdicts
