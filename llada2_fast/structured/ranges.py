"""Two ends of a range -> a regular expression of the decimals between them."""

import re


def decimals(low: int | None, high: int | None, places: int) -> str:
    """The expression of the decimals from `low` to `high`, without exponents, needless zeros before them and -0.

    low, high: the ends, which belong to it, low <= high, in units of 10**-places; None for no end.
    places: behind the point, at most; 0 for integers.
    """
    sides = []
    if high is None or high >= 0:
        sides.append(_magnitudes(max(low or 0, 0), high, places))
    if low is None or low < 0:
        sides.append("-" + _magnitudes(1 if high is None else max(-high, 1), None if low is None else -low, places))
    return f"(?:{'|'.join(sides)})"


def _magnitudes(low, high, places):
    unit = 10**places

    def digits(units):
        return f"{units // unit}." + (f"{units % unit:0{places}}" if places else "")

    longest = len(str((low if high is None else high) // unit))
    parts = []
    for length in range(len(str(low // unit)), longest + 1):
        first, last = 10 ** (length - 1) * unit if length > 1 else 0, 10**length * unit - 1
        parts.append(_span(digits(max(low, first)), digits(last if high is None else min(high, last))))
    if high is None:
        parts.append(f"[1-9][0-9]{{{longest},}}" + (rf"(?:\.[0-9]{{1,{places}}})?" if places else ""))
    return f"(?:{'|'.join(parts)})"


def _span(low, high, ends=False):
    """The decimals between two of equal length, which have a point; zeros behind it may be absent.

    ends: the text may end here where only zeros follow.
    """
    if low in ("", "."):
        return ""
    ends_next = low[1:2] == "." or "." not in low
    zeros, nines = (re.sub("[0-9]", digit, low[1:]) for digit in "09")
    if low[0] == high[0]:
        parts = [re.escape(low[0]) + _span(low[1:], high[1:], ends_next)]
    else:
        parts, first, last = [], int(low[0]), int(high[0])
        if low[1:] != zeros:
            parts.append(low[0] + _span(low[1:], nines, ends_next))
            first += 1
        if high[1:] != nines:
            parts.append(high[0] + _span(zeros, high[1:], ends_next))
            last -= 1
        if first <= last:
            parts.append(f"[{first}-{last}]" + _span(zeros, nines, ends_next))
    return f"(?:{'|'.join(parts)})" + ("?" if ends and not low.strip("0.") else "")
