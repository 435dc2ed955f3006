"""What a gate has found."""

from dataclasses import dataclass, field
from typing import Any

import numpy


@dataclass
class Verdict:
    """name: as of the scorecard. what: in a few words. measured, limit: as the table shows them. figures: for the JSON
    line. wrong: a line for everything that should not have been; the gate is held if there is none."""

    name: str
    what: str
    measured: str
    limit: str
    figures: dict[str, Any]
    wrong: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return not self.wrong

    def demand(self, holds: bool, otherwise: str):
        """A line of `wrong` unless it holds."""
        if not holds:
            self.wrong.append(otherwise)

    def demand_idle(self, server, drained: float | None):
        """The server lives, and nothing is left of any request; drained: what wire.idle_after has found."""
        self.demand(drained is not None and server.lives, "rows or pages are left, or the server has ended")


def tally(counts) -> str:
    """{status: how often} in words."""
    return ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))


def p99(values) -> float:
    return float(numpy.percentile(values, 99)) if len(values) else 0.0


def median(values) -> float:
    return float(numpy.median(values)) if len(values) else 0.0
