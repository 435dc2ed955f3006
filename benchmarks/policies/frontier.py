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


def speedups(points, base):
    """Of each (tpf, accuracy) its tpf over that of `base` at the same accuracy, by straight lines between the points of
    the envelope of `base`; None where that has no such accuracy."""
    speeds, accuracies = zip(*envelope(base), strict=True)

    def speedup(tpf, accuracy):
        if not accuracies[0] <= accuracy <= accuracies[-1]:
            return None
        return tpf / float(np.interp(accuracy, accuracies, speeds))

    return [speedup(*point) for point in points]
