"""Decoding on a CPU, side by side with others on the same weights, prompts and parameters, in one run.

    python -m benchmarks.bench_decode [--quick | --full] [--json] [--save [FOLDER]] [--plot FILE]

On an idle core about 12 minutes; with --quick one, with --full most of an hour.

All of them (models.py) run one network on one thread in float32. At the base, around which one factor at a time is
varied, ours also runs with one part removed at a time. Each first decodes once, metered: its tokens must be ours, and
its peak of tensor bytes is taken. Only then rounds are timed, in which ours runs before and after every other one. A
peer that would take too long at a point is left out there (null in the result); --full leaves nobody out and adds the
largest points.

    tok_s, std_tok_s    generated tokens of all rows over the median time; standard deviation over the runs
    forwards            that a row went through, prefill and settling included; tpf: tokens per denoise forward
    ratio_vs_<peer>     its median time over ours
    int4                ours at the base with experts in four bits, beside ours: other tokens, in as many forwards;
                        weight_bytes of all weights of either
    cost                ms of a block (8 forwards) against the tokens before it, with the straight line that fits best;
                        the slope is per 1024 tokens
"""

import argparse
import statistics
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from .harness import add_options, add_plot_option, check_save, drawing, finish, peak_bytes
from .models import ABLATIONS, AT_THE_BASE, BLOCK, PEERS, SMALL, Task, in_int4, ours, random_model
from .report.plots import draw_cost

STEPS = 8


class Point(NamedTuple):
    factor: str  # what differs from the base
    prompt: int = 512
    generated: int = 512
    batch: int = 1
    threshold: float = 2.0  # above 1: by quota alone

    @property
    def work(self):
        """Tokens that a loop without a cache forwards, by quota."""
        return self.batch * self.generated * STEPS // BLOCK * (self.prompt + self.generated // 2)


class Plan(NamedTuple):
    base: Point
    values: dict[str, tuple]  # factor -> its values beside the base's
    work: dict[str, float]  # peer -> the most work it is given at a point
    rounds: int  # timed rounds at the base; one elsewhere
    prefixes: tuple[int, ...]  # of the blocks whose cost is fitted
    cost_rounds: int

    def points(self):
        others = [(name, value) for name, values in self.values.items() for value in values]
        return [self.base, *(self.base._replace(factor=name, **{name: value}) for name, value in others)]


# With random weights the best of 4096 tokens has a confidence of 0.03 to 0.12: these thresholds give 4.7 to 15 tokens
# a forward, where the quota gives 4.
THRESHOLDS = (0.08, 0.06, 0.04)
PLANS = {
    "quick": Plan(
        Point("base", generated=256), {"prompt": (64,), "batch": (2,), "threshold": (0.06,)},
        {"diffusers": 50_000, "card": 30_000}, 1, (64, 1024, 2048), 1,
    ),
    "default": Plan(
        Point("base"),
        {"prompt": (64, 256, 1024, 2048), "generated": (128, 256), "batch": (2, 4, 16), "threshold": THRESHOLDS},
        {"diffusers": 300_000, "card": 100_000}, 3, (64, 512, 1024, 1536, 2048), 3,
    ),
    "full": Plan(
        Point("base"),
        {"prompt": (64, 256, 1024, 2048, 4096), "generated": (128, 256, 1024), "batch": (2, 4, 8, 16),
         "threshold": THRESHOLDS},
        {"diffusers": float("inf"), "card": float("inf")}, 3, (64, 512, 1024, 1536, 2048, 3072, 4096), 5,
    ),
}  # fmt: skip


def task_of(point):
    """The point's Task: random prompts, the same at every run."""
    generator = torch.Generator().manual_seed(point.prompt)
    prompt = torch.randint(0, SMALL.vocab_size - 2, (point.batch, point.prompt), generator=generator)
    return Task(prompt, point.generated, STEPS, point.threshold)


def runners(plan, point):
    """{name: function of (model, task)} of those who run at a point, ours first."""
    if point == plan.base:
        return PEERS | AT_THE_BASE | ABLATIONS
    most = plan.work | ({} if point.batch == 1 else {"card": 0})  # the card's loop knows no batches
    return {name: make for name, make in PEERS.items() if point.work <= most.get(name, point.work)}


def order(names, rounds):
    """Who runs when: the first before and after every other one."""
    first, *others = names
    return [first] + [name for other in others or [first] for name in (other, first)] * rounds


def gated_peaks(calls):
    """{name: (Outcome, peak bytes)} of each call; SystemExit unless all give the first one's tokens."""
    seen = {}
    for name, call in tqdm(calls.items(), desc="Tokens and memory", leave=False):
        seen[name] = peak_bytes(call)
        wanted, got = seen[next(iter(calls))][0].sequences, seen[name][0].sequences
        if not torch.equal(wanted, got):
            raise SystemExit(f"tokens of {name!r} differ from ours: nothing is timed")
    return seen


def timings(calls, names):
    """{name: seconds of its runs} for the calls named, in this order."""
    seconds = {name: [] for name in calls}
    for name in tqdm(names, desc="Timed", leave=False):
        started = time.perf_counter()
        calls[name]()
        seconds[name].append(time.perf_counter() - started)
    return seconds


def measure(model, plan, point):
    """(the point's record, [records of the ablations]); None where somebody did not run."""
    task = task_of(point)
    calls = {name: make(model, task) for name, make in runners(plan, point).items()}
    extra = {"hf-2.0": ours(model, task, profile="hf-2.0")} if "card" in calls else {}
    seen = gated_peaks(calls | extra)
    seconds = timings(calls, order(list(calls), plan.rounds if point == plan.base else 1))
    tokens = point.batch * point.generated
    figures = {}
    for name, taken in seconds.items():
        outcome, peak = seen[name]
        figures[name] = {
            "tok_s": tokens / statistics.median(taken), "std_tok_s": statistics.pstdev(tokens / s for s in taken),
            "forwards": sum(outcome.forwards.values()), "peak_bytes": peak,
            **{f"{kind}_forwards": count for kind, count in outcome.forwards.items()},
        }  # fmt: skip
    ratios = {name: figures["ours"]["tok_s"] / own["tok_s"] for name, own in figures.items()}
    record = point._asdict() | figures["ours"] | {"tpf": point.generated / figures["ours"]["denoise_forwards"]}
    for peer in ("diffusers", "card", *(AT_THE_BASE if point == plan.base else ())):
        kept = ("tok_s", "std_tok_s", "forwards", "peak_bytes")
        record |= {f"{peer}_{key}": figures.get(peer, {}).get(key) for key in kept}
        record[f"ratio_vs_{peer}"] = ratios.get(peer)
    return record, [{"without": name, "ratio": ratios[name]} | figures[name] for name in calls if name in ABLATIONS]


def in_four_bits(model, plan):
    """Ours at the base and the same with experts in int4, in turns."""
    task, models = task_of(plan.base), {"ours": model, "int4": in_int4(model)}
    calls = {name: ours(own, task) for name, own in models.items()}
    for call in calls.values():
        call()
    seconds, tokens = timings(calls, order(list(calls), plan.rounds)), plan.base.batch * plan.base.generated
    size = {name: sum(p.nbytes for p in own.parameters()) for name, own in models.items()}
    rate = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "tok_s": rate["int4"], "std_tok_s": statistics.pstdev(tokens / s for s in seconds["int4"]),
        "ratio": rate["int4"] / rate["ours"], "weight_bytes": size["int4"], "wide_weight_bytes": size["ours"],
    }  # fmt: skip


# what a block costs


def step_marks(who, model, prefix):
    """When each step ended, of the first generated block and of the second, which begins at `prefix`."""
    marks = []
    task = task_of(Point("cost", prompt=prefix - BLOCK, generated=2 * BLOCK))
    PEERS[who](model, task, on_step=lambda *_: marks.append(time.perf_counter()))()
    return marks


def block_costs(model, plan):
    """(records with the fitted line of ours and of diffusers, ratio of our denoise forwards at 2048 and at 64)."""
    whole = {(who, prefix): [] for who in ("ours", "diffusers") for prefix in plan.prefixes}
    rest = {prefix: [] for prefix in plan.prefixes}  # ours without the forward that carries the block before it along
    for who, prefix in tqdm(list(whole) * plan.cost_rounds, desc="Cost of a block"):
        marks = step_marks(who, model, prefix)
        whole[who, prefix].append((marks[-1] - marks[STEPS - 1]) * 1e3)
        if who == "ours":
            rest[prefix].append(marks[-1] - marks[STEPS])
    costs = [
        {"who": who} | fitted(plan.prefixes, [statistics.median(whole[who, at]) for at in plan.prefixes])
        for who in ("ours", "diffusers")
    ]
    return costs, statistics.median(rest[2048]) / statistics.median(rest[64])


def fitted(prefix, ms):
    """The line of least squares through ms per block against the prefix, as a part of the record."""
    slope, intercept = statistics.linear_regression(prefix, ms)
    return {"prefix": list(prefix), "ms_per_block": ms, "intercept_ms": intercept, "slope_ms_per_1k": slope * 1024,
            "r2": statistics.correlation(prefix, ms) ** 2}  # fmt: skip


# the result

GOALS = {  # goal -> the prompt's length of its point, the rest as by default; its value there; the side of its limit
    "ratio_vs_diffusers_512_512": (512, lambda p: p["ratio_vs_diffusers"], "at_least", 10),
    "ratio_vs_diffusers_plain_512_512": (512, lambda p: p["ratio_vs_diffusers_plain"], "at_least", 12),
    "ratio_vs_diffusers_2048_512": (2048, lambda p: p["ratio_vs_diffusers"], "at_least", 30),
    "peak_bytes_over_diffusers_512_512": (512, lambda p: p["peak_bytes"] / p["diffusers_peak_bytes"], "at_most", 1 / 3),
}


def judged(points):
    """{goal: its value, the limit, whether it is met}; value and met None where the plan has no such point."""
    by_place = {tuple(point[name] for name in Point._fields[1:]): point for point in points}
    goals = {}
    for name, (prompt, value_of, side, limit) in GOALS.items():
        point = by_place.get(Point("", prompt=prompt)[1:])
        value = None if point is None else value_of(point)
        met = None if value is None else value >= limit if side == "at_least" else value <= limit
        goals[name] = {"value": value, side: limit, "met": met}
    return goals


def show(points, ablations, narrow, costs, goals):
    for p in points:
        text = (
            f"{p['factor']:>9}  prompt {p['prompt']:4d}, generated {p['generated']:4d}, batch {p['batch']:2d}, "
            f"threshold {p['threshold']:<4g} {p['tok_s']:7.1f} +- {p['std_tok_s']:4.1f} tok/s, TPF {p['tpf']:5.2f}, "
            f"{p['peak_bytes'] / 1e6:5.1f} MB"
        )
        for peer in ("diffusers", "card", *AT_THE_BASE):
            if p.get(f"{peer}_tok_s"):
                share = p["peak_bytes"] / p[f"{peer}_peak_bytes"]
                text += f"; {peer} {p[f'{peer}_tok_s']:.1f}: {p[f'ratio_vs_{peer}']:.1f}x, {share:.2f} of its memory"
        print(text)
    for a in ablations:
        print(f"  without {a['without']:<24} {a['tok_s']:7.1f} +- {a['std_tok_s']:4.1f} tok/s, {a['forwards']:3d} "
              f"forwards, {a['peak_bytes'] / 1e6:5.1f} MB; whole is {a['ratio']:.2f}x")  # fmt: skip
    size, whole = narrow["weight_bytes"] / 1e6, narrow["wide_weight_bytes"] / 1e6
    print(f"  with experts in int4 {narrow['tok_s']:16.1f} +- {narrow['std_tok_s']:4.1f} tok/s, {narrow['ratio']:.2f}x "
          f"of ours; {size:.1f} MB of weights, not {whole:.1f}")  # fmt: skip
    for c in costs:
        print(f"  a block costs {c['who']:>9} {c['intercept_ms']:6.1f} ms + {c['slope_ms_per_1k']:6.1f} ms per 1024 "
              f"tokens before it (R2 {c['r2']:.3f})")  # fmt: skip
    for name, goal in goals.items():
        side = "at_least" if "at_least" in goal else "at_most"
        value = "not measured" if goal["met"] is None else f"{goal['value']:.3g}, {'met' if goal['met'] else 'MISSED'}"
        print(f"  goal {name} {side.replace('_', ' ')} {goal[side]:.3g}: {value}")


def draw(file, points, costs, base):
    """Two panels: tokens/s against the length of the prompt, ms per block against the prefix."""
    with drawing(file, ncols=2, figsize=(11, 4)) as (speed, cost):
        along = [p for p in points if (p["generated"], p["batch"], p["threshold"]) == base[2:]]
        for key, who in (("tok_s", "ours"), ("diffusers_tok_s", "diffusers"), ("card_tok_s", "model card")):
            line = sorted((p["prompt"], p[key]) for p in along if p[key])
            speed.plot(*zip(*line, strict=True), "o-", label=who)
        speed.set(xlabel="prompt tokens", ylabel="tokens/s", yscale="log", title=f"{base.generated} tokens generated")
        speed.legend()
        draw_cost({"title": "one thread", "cost": costs}, cost)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument(
        "--full", action="store_true", help="every peer at every point, and larger ones: most of an hour"
    )
    add_plot_option(parser, "tokens/s against the prompt's length and the cost of a block")
    args = parser.parse_args(argv)
    check_save(parser, args, "decode")
    if args.quick and args.full:
        parser.error("--quick and --full: expected one of them")
    plan = PLANS["quick" if args.quick else "full" if args.full else "default"]
    torch.set_num_threads(1)
    model = random_model(SMALL)
    measured = [measure(model, plan, point) for point in tqdm(plan.points(), desc="Points")]
    narrow = in_four_bits(model, plan)
    costs, grown = block_costs(model, plan)
    points, ablations = [record for record, _ in measured], measured[0][1]
    goals = judged(points)
    show(points, ablations, narrow, costs, goals)
    print(f"  a forward at position 2048 costs {grown:.2f}x one at 64")
    if args.plot:
        draw(args.plot, points, costs, plan.base)
    base = {key: points[0][key] for key in ("prompt", "generated", "tok_s", "ratio_vs_diffusers")}
    rest = {"points": points, "ablations": ablations, "int4": narrow, "cost": costs, "block_2048_over_64": grown}
    finish("decode", args, {"steps": STEPS, **base, "goals": goals, **rest})


if __name__ == "__main__":
    main()
