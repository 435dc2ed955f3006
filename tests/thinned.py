"""Which of many cases alike the usual run takes; the others are slow (make test-slow)."""

import itertools

import pytest


def thinned(every, *axes):
    """All combinations of the axes' values, of which all are slow but one in `every`.

    Those stay whose places in their axes add up to a multiple of `every`: with an axis of at least `every` values, each
    combination of values of the other axes is among them.
    """
    found = []
    for case in itertools.product(*map(enumerate, axes)):
        slow = sum(at for at, _ in case) % every
        found.append(pytest.param(*(value for _, value in case), marks=[pytest.mark.slow] if slow else []))
    return found
