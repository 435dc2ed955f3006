"""Decoding policies on the same prompts: accuracy against tokens per forward (TPF) along each one's knob.

Those of the product (DecodeParams.policy) go through generate(), those that were tried and left out through a plain
decoder. All greedy. Of a policy:

    points    one for each value of its knob: accuracy; TPF = tokens up to and with the end token / forwards, of all
              prompts together, a check counting as what it costs (frontier.py); short: TPF of answers of at most 24
              tokens alone; leads: it is on the frontier, no point of another policy of the product is as good in both
              within ROOM, which is what chance makes of so many prompts
    accuracy, tpf, short   those of its default
    aup       accuracy under parallelism, where the best accuracy is that of all policies
    gain      its TPF over the threshold rule's at the same accuracy: best, and where, and median of all accuracies of
              their points that both have
    leads     how many of its points do
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from tqdm.auto import tqdm

from . import formulas, frontier
from .plain import Answer, decode

SHORT = 24  # tokens of a short answer
ROOM = 0.002, 0.01  # of accuracy, absolute, and of TPF, as a share
BASE = "threshold"


class Policy(NamedTuple):
    """knobs: its values; default: the one whose figures stand for it; quick: those of a quick run.
    rule: (knob, block_length) -> a rule of formulas.py; arguments: knob -> those of generate(), None if it has none."""

    knob: str
    knobs: tuple[float, ...]
    quick: tuple[float, ...]
    default: float
    rule: Callable
    arguments: Callable | None = None


BOUNDS, QUICK_BOUNDS = (0.1, 0.2, 0.3, 0.6, 1.0, 1.6, 2.5), (0.2, 0.3, 0.6, 1.6)
DECAY, CREDIT, FALL, DOUBT = 0.8, (0.7, 0.8, 0.2), 0.3, 0.3
POLICIES = {
    BASE: Policy(
        "threshold", (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4), (0.95, 0.8, 0.5), 0.95,
        lambda tau, _: formulas.threshold(tau), lambda tau: {"threshold": tau},
    ),
    "entropy": Policy(
        "bound, nats", BOUNDS, QUICK_BOUNDS, 0.3,
        lambda bound, _: formulas.entropy(bound), lambda bound: {"policy": "entropy", "entropy_bound": bound},
    ),
    "entropy_decayed": Policy(
        f"bound, nats; decay {DECAY}", (0.05, 0.1, 0.2, 0.35, 0.6, 1.0), (0.1, 0.2, 0.35, 0.6), 0.2,
        lambda bound, _: formulas.entropy(bound, DECAY),
        lambda bound: {"policy": "entropy", "entropy_bound": bound, "entropy_decay": DECAY},
    ),
    "self_speculative": Policy(
        "bound, nats", (0.0, *BOUNDS), QUICK_BOUNDS, 0.3,
        lambda bound, _: formulas.self_speculative(bound),
        lambda bound: {"policy": "self_speculative", "entropy_bound": bound},
    ),
    "product": Policy(
        "least product of confidences", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), (0.7, 0.5), 0.7,
        lambda bound, _: formulas.product(bound),
    ),
    "anneal": Policy(
        f"threshold, {FALL} lower after a quarter of a block's steps", (0.98, 0.95, 0.9, 0.8, 0.7), (0.95, 0.8), 0.95,
        lambda tau, length: formulas.anneal(tau, tau - FALL, max(2, length // 4)),
    ),
    "credit": Policy(
        "threshold", (0.98, 0.95, 0.9, 0.85, 0.7, 0.5), (0.95, 0.7), 0.95,
        lambda tau, _: formulas.credit(tau, *CREDIT),
    ),
    "remask": Policy(
        f"bound, nats; masks below {DOUBT}", (0.3, 0.6, 1.0, 1.6, 2.5), (0.6, 1.6), 0.6,
        lambda bound, _: formulas.remask(formulas.entropy(bound), DOUBT),
    ),
}  # fmt: skip


class Work(NamedTuple):
    """prompts: lists of ids; is_right: (place, answer's ids) -> bool; batch: of generate(), in prompts."""

    prompts: list[list[int]]
    gen_length: int
    is_right: Callable
    batch: int = 128


def answers_of(model, work, policy, knob, block_length=None) -> list[Answer]:
    """Of all prompts, by generate() if the policy is in it."""
    length = model.block_length if block_length is None else block_length
    if policy.arguments is None:
        return decode(model, work.prompts, policy.rule(knob, length), work.gen_length, length)
    arguments = {"gen_length": work.gen_length, "eos_early_stop": True, "return_dict": True} | schedule(length)
    answers = []
    for begin in range(0, len(work.prompts), work.batch):
        output = model.generate(work.prompts[begin : begin + work.batch], **arguments | policy.arguments(knob))
        rows = zip(output.sequences.tolist(), output.num_tokens, output.finish_reasons, output.counters, strict=True)
        for ids, tokens, reason, counters in rows:
            answers.append(Answer.of(ids[: tokens - (reason == "eos")], tokens, counters))
    return answers


def schedule(block_length):
    """Arguments of generate(): blocks of this length, whose schedule asks for a token a step and no more."""
    return {"block_length": block_length, "steps": block_length}


def knobs_of(names, quick):
    """[(policy, a value of its knob)] of all that are measured. names: of POLICIES."""
    return [(name, knob) for name in names for knob in (POLICIES[name].quick if quick else POLICIES[name].knobs)]


def measure(model, work, names, quick=False, block_length=None, progress=True):
    """{policy: its points}. names: of POLICIES; quick: fewer values of each knob."""
    points = {name: [] for name in names}
    for name, knob in tqdm(knobs_of(names, quick), desc="Policies", unit="point", disable=not progress):
        answers = answers_of(model, work, POLICIES[name], knob, block_length)
        right = [work.is_right(place, answer.ids) for place, answer in enumerate(answers)]
        points[name].append(point(knob, answers, sum(right) / len(right)))
    return points


def point(knob, answers, accuracy):
    short = [answer for answer in answers if answer.tokens <= SHORT]
    return {
        "knob": knob, "accuracy": round(accuracy, 4), "tpf": _tpf(answers),
        "drafts": sum(answer.drafts for answer in answers), "checks": sum(answer.checks for answer in answers),
        "short": {"answers": len(short), "tpf": _tpf(short)},
    }  # fmt: skip


def _tpf(answers):
    """Tokens per forward, checks at their cost; None of no answers."""
    cost = sum(answer.drafts + frontier.check_cost() * answer.checks for answer in answers)
    return round(sum(answer.tokens for answer in answers) / cost, 3) if cost else None


def entries(model, points):
    """What the JSON line says of each policy, a dict. model: its name; points: of `measure`."""
    flat = {name: [(p["tpf"], p["accuracy"]) for p in own] for name, own in points.items()}
    best = max(accuracy for own in flat.values() for _, accuracy in own)
    found = []
    for name, own in points.items():
        policy = POLICIES[name]
        head = next((p for p in own if p["knob"] == policy.default), own[0])
        others = [one for other in points if other != name and POLICIES[other].arguments for one in flat[other]]
        own = [p | {"leads": not any(_as_good(one, at) for one in others)}
               for p, at in zip(own, flat[name], strict=True)]  # fmt: skip
        gains = frontier.gains(flat[name], flat[BASE]) if BASE in flat else []
        most = max(gains, key=lambda gain: gain[1], default=(None, None))
        found.append({
            "model": model, "policy": name, "knob": policy.knob, "in_product": policy.arguments is not None,
            "accuracy": head["accuracy"], "tpf": head["tpf"],
            "aup": round(frontier.aup([(tpf, 100 * accuracy) for tpf, accuracy in flat[name]], 100 * best), 1),
            "gain": {
                "best": most[1] and round(most[1], 3), "at": most[0],
                "median": round(statistics.median(ratio for _, ratio in gains), 3) if gains else None,
                "points": len(gains),
            },
            "leads": sum(p["leads"] for p in own), "short": head["short"], "points": own,
        })  # fmt: skip
    return found


def _as_good(one, other):
    """Whether a (tpf, accuracy) is as good as another, or next to."""
    return one[1] >= other[1] - ROOM[0] and one[0] >= other[0] * (1 - ROOM[1])


GOALS = {"quality": 0.0, "balanced": 0.01, "speed": 0.05}  # -> how much accuracy less than the best of the product


def goals(found):
    """By model and goal the fastest point of the product that is accurate enough."""
    chosen = []
    for model in dict.fromkeys(entry["model"] for entry in found):
        own = [e for e in found if e["model"] == model and e["in_product"]]
        points = [(p["tpf"], p["accuracy"], e["policy"], p["knob"]) for e in own for p in e["points"]]
        best = max((accuracy for _, accuracy, *_ in points), default=0.0)
        for goal, slack in GOALS.items() if points else ():
            tpf, accuracy, policy, knob = max(point for point in points if point[1] >= best - slack - 1e-9)
            told = {"policy": policy, "knob": knob, "accuracy": accuracy, "tpf": tpf}
            chosen.append({"model": model, "goal": goal} | told)
    return chosen


def table(found):
    """Entries as text: a line per model and policy, then its points; below them the goals."""
    heads = "accuracy", "TPF", "short TPF", "AUP", "gain", "best", "leads"
    lines = [f"{'model':<18}{'policy':<18}{''.join(f'{head:>10}' for head in heads)}  points, knob: accuracy at TPF"]
    for entry in found:
        gain, leads = entry["gain"], f"{entry['leads']}/{len(entry['points'])}"
        cells = [
            f"{entry['accuracy']:.3f}", *(_told(value) for value in (entry["tpf"], entry["short"]["tpf"])),
            f"{entry['aup']:.1f}", _told(gain["median"]), _told(gain["best"]), leads,
        ]  # fmt: skip
        row = "".join(f"{cell:>10}" for cell in cells)
        lines.append(f"{entry['model']:<18}{entry['policy']:<18}{row}  {told_points(entry)}")
    lines += [
        f"{one['model']}, for {one['goal']}: {one['policy']} {one['knob']:g}: {one['accuracy']:.3f} at {one['tpf']:.2f}"
        for one in goals(found)
    ]
    return "\n".join(lines)


def told_points(entry):
    """The points of an entry as text."""
    return ", ".join(f"{p['knob']:g}: {p['accuracy']:.3f} at {p['tpf']:.2f}" for p in entry["points"])


def _told(value):
    return "-" if value is None else f"{value:.2f}"


def draw(found, axes):
    """Entries in place of `axes`: a panel per model, accuracy by TPF, a line per policy, dashed where it is
    not in the product, and the frontier in grey below them all."""
    figure, models = axes.figure, list(dict.fromkeys(entry["model"] for entry in found))
    axes.remove()
    figure.set_size_inches(5.5 * len(models), 5)
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [entry for entry in found if entry["model"] == model]
        front = frontier.envelope([(p["tpf"], p["accuracy"]) for entry in own for p in entry["points"]])
        panel.plot(*zip(*front, strict=True), color="0.8", linewidth=6, solid_capstyle="round", label="the frontier")
        for entry in own:
            points = [(p["tpf"], p["accuracy"]) for p in entry["points"]]
            style = "o-" if entry["in_product"] else "x--"
            color = f"C{list(POLICIES).index(entry['policy'])}"
            panel.plot(*zip(*points, strict=True), style, color=color, label=entry["policy"], markersize=4, linewidth=1)
        panel.set(title=model, xlabel="tokens per forward, a check at its cost", ylabel="exact match")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, title="dashed: tried, not in the product", title_fontsize=7)
