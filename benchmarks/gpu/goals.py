"""What the figures should be, what was expected before the first of them was measured, and what became of both.

Goals were set for an H200. On another GPU a goal that names its floor is held against that GPU's, and a speed is asked
for in proportion to the floors, those of benchmarks.roofline.
"""

from typing import NamedTuple

from ..roofline import GPUS, MINI, floor_ms, gpu_of, step_costs


class Goal(NamedTuple):
    """A field of a point's line, over the same of a second point if one is named, is to be "most" or "least" `limit`.

    floor: arguments of step_costs behind the config; the limit is a speed on an H200 and goes with this step's floor.
    by_card: the value is over the floor of the GPU.
    """

    text: str
    points: tuple[str, ...]
    field: str
    at: str
    limit: float
    floor: tuple | None = None
    by_card: bool = False


class Verdict(NamedTuple):
    text: str
    limit: str  # in words
    value: float | None
    verdict: str  # "met", "missed" or "not measured"


_STEP, _STEP8 = "step mini bf16 b1 p1024", "step mini fp8 b1 p1024"
_DECODE, _DECODE32, _DECODE8 = "decode mini bf16 b1", "decode mini bf16 b32", "decode mini fp8 b1"
_ATTENTION = "attention b8 p32768"

GOALS = (
    Goal("mini bf16 b1 p1024: step over its default floor", (_STEP,), "over_floor_default", "most", 1.25, by_card=True),
    Goal("mini fp8 b1 p1024: step over its default floor", (_STEP8,), "over_floor_default", "most", 1.35, by_card=True),
    Goal("mini bf16 b1: tokens/s at TPF 6.63", (_DECODE,), "tok_s", "least", 1100, floor=(1, 1024)),
    Goal("mini fp8 b1: tokens/s at TPF 6.63", (_DECODE8,), "tok_s", "least", 1900, floor=(1, 1024, "fp8")),
    Goal("mini bf16: tokens/s of batch 32 over batch 1", (_DECODE32, _DECODE), "tok_s", "least", 8),
    Goal("host syncs in a step", (_STEP,), "host_syncs", "most", 0),
    Goal("launches outside the graph in a step", (_STEP,), "launches_outside_graph", "most", 2),
    Goal("attention b8 p32768: percent of copy bandwidth", (_ATTENTION,), "percent_of_copy", "least", 80),
    Goal("torch.compile of the reference model over our step", ("peer compile", _STEP), "ms", "least", 3),
    Goal("torch.compile with grouped_mm over our step", ("peer grouped_mm", _STEP), "ms", "least", 1),
    Goal("mini bf16 b1 p1024: peak memory in GB", (_STEP,), "peak_gb", "most", 36),
)


class Prediction(NamedTuple):
    """What a field of a point's line was expected to be on GPUs of roofline: a number, or between two."""

    point: str
    field: str
    unit: str
    expected: dict[str, float | tuple[float, float]]


PREDICTIONS = (  # estimates before the first measurement: bytes, SASS and launches counted, nothing timed
    Prediction(_STEP, "ms", "ms", {"h100": 9.2, "h200": 6.9}),
    Prediction(f"{_STEP} carried", "ms", "ms", {"h100": 9.4}),
    Prediction(f"{_STEP} carried real", "ms", "ms", {"h100": 11.8}),
    Prediction("step mini bf16 b8 p1024", "ms", "ms", {"h100": 13.9, "h200": 10.2}),
    Prediction("step mini bf16 b32 p1024", "ms", "ms", {"h100": 14.9}),
    Prediction(_STEP8, "ms", "ms", {"h100": 5.9}),
    Prediction(_DECODE, "ms_per_forward", "ms per forward", {"h100": 9.9}),
    Prediction(_DECODE, "tok_s", "tokens/s", {"h100": 670, "h200": 885}),
    Prediction(_ATTENTION, "percent_of_copy", "percent of copy bandwidth", {"h100": (72, 78)}),
)


def judge(lines):
    """The Verdict of each goal on the lines of one device. lines: by point's name."""
    card, rates = _card(lines)
    verdicts = []
    for goal in GOALS:
        values = [lines.get(name, {}).get(goal.field) for name in goal.points]
        limit, words = _limit(goal, card, rates)
        value, verdict = None, "not measured"
        if None not in values:
            value = values[0] / values[1] if len(values) > 1 else values[0]
            verdict = "met" if (value <= limit if goal.at == "most" else value >= limit) else "missed"
        verdicts.append(Verdict(goal.text, words, value, verdict))
    return verdicts


def _card(lines):
    """(what the lines' device is called, its copy bandwidth in TB/s and TFLOP/s): of roofline, else as measured, else
    an H200's."""
    gpu = next((gpu_of(line["device"]) for line in lines.values() if "device" in line), None)
    if gpu is not None:
        return gpu.upper(), GPUS[gpu]
    measured = lines.get("ceilings", {})
    if "copy_tb_s" in measured:
        return "this device", (measured["copy_tb_s"], measured["bf16_tflops"])
    return "unknown device, H200's floor", GPUS["h200"]


def _limit(goal, card, rates):
    """A goal's limit on a GPU of these rates, and in words."""
    limit, of = goal.limit, f" ({card})" if goal.by_card or goal.floor else ""
    if goal.floor and rates != GPUS["h200"]:
        costs = step_costs(MINI, *goal.floor)
        limit *= floor_ms(costs, *GPUS["h200"]) / floor_ms(costs, *rates)
        of = f" ({card}; H200: {goal.limit:g})"
    return limit, f"at {goal.at} {limit:.4g}{of}"
