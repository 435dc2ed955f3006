"""Points of accuracy against tokens per forward: what a policy's points are worth.

A forward that checks a draft has twice a block's positions. It counts as check_cost() forwards, not as one: by the
floor of benchmarks.roofline, of mini in bfloat16, one row over 1024 tokens on an H100.
"""

import math

import numpy as np

from ..roofline import GPUS, MINI, floor_ms, step_costs

PREFIX, GPU = 1024, "h100"


def check_cost():
    """What a forward of two blocks costs, where one of a block costs 1; logits are read of one of the two."""
    one, two = (floor_ms(step_costs(MINI, 1, PREFIX, carried=carried), *GPUS[GPU]) for carried in (0, 1))
    return two / one


def aup(points, best, alpha=3.0, slack=5.0):
    """Accuracy under parallelism: the area under accuracy over tokens per forward, where losing accuracy weighs.

    points: (tpf, accuracy in percent) of a method, one at least.
    best: the best accuracy in percent of all methods on this task.
    With points in ascending order of tpf rho, those more than `slack` below the first's accuracy y left out, and
    W(y) = min(1, exp(-alpha (1 - y / best))):

        rho_1 y_1 + sum_i (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2

    Source: d3LLM (hao-ai-lab.github.io/blogs/text-diffusion).
    """
    points = sorted(points)
    kept = [(rho, y) for rho, y in points if y >= points[0][1] - slack]

    def weighed(y):
        return y * min(1.0, math.exp(-alpha * (1 - y / best))) if best else 0.0

    area = kept[0][0] * kept[0][1]
    for (before, y_before), (rho, y) in zip(kept, kept[1:], strict=False):
        area += (rho - before) * (weighed(y) + weighed(y_before)) / 2
    return area


def envelope(points):
    """The (tpf, accuracy) than which no other is better in one and at least as good in the other, by accuracy."""
    kept, fastest = [], -math.inf
    for accuracy, tpf in sorted(((accuracy, tpf) for tpf, accuracy in points), reverse=True):
        if tpf > fastest:
            kept.append((tpf, accuracy))
            fastest = tpf
    return kept[::-1]


def gains(points, base):
    """[(accuracy, how many times the tpf of `base` it has)] of (tpf, accuracy) points at the same accuracy: at that of
    each point of either that both can have, by straight lines between the points of either's envelope."""
    (own, own_accuracies), (other, accuracies) = (zip(*envelope(some), strict=True) for some in (points, base))
    shared = [a for a in {*own_accuracies, *accuracies} if _within(a, own_accuracies) and _within(a, accuracies)]
    speeds = ((a, float(np.interp(a, own_accuracies, own)), float(np.interp(a, accuracies, other))) for a in shared)
    return sorted((a, mine / theirs) for a, mine, theirs in speeds)


def _within(value, ascending):
    return ascending[0] <= value <= ascending[-1]
