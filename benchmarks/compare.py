"""Holds result lines against earlier ones, metric by metric: better, worse or the same.

    python -m benchmarks.compare OLD NEW [--counted] [--all] [--noise 0.1]

OLD and NEW are files of result lines: FILE, FILE:N (its N-th line, from 1, or -1 for the last) or FILE@COMMIT (its
lines of a commit). Of a file as a whole, the lines count that have the newest one's commit. Points are matched by
benchmark and by all that says what was measured (batch, prompt, op ...), times also by device, threads and --quick.

Times, and what is made of them: several lines of one commit are repeated measurements. The ratio NEW / OLD is that of
their geometric means, with the 99 % interval of Welch's t on the logarithms. A single line has the spread that it
records itself (std_X beside X, X_iqr), else --noise, the assumed half-width of its interval. Better or worse
is said where the interval excludes 1 and the change is at least 2 %. Of a hundred metrics one errs by chance.

Counts (launches, bytes, registers ...), accuracy and TPF are exact: any change tells. --counted looks at counts alone;
there a count that is gone is a regression too, unless it belongs to a version of triton or torch that NEW has not.

Exit codes: 0 nothing is worse, 1 something is, 2 nothing to compare or bad arguments.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from math import exp, log, sqrt
from pathlib import Path
from typing import NamedTuple

KINDS = {  # of a figure by its name; the first that matches counts
    # of others than ourselves, of the machine, or no measure of speed: neither what is measured nor how well
    "ignored": r"^(diffusers|card|serial|ref|reference|peer|eager|copy|floor|std|p10|p90|tokens_agreeing)(_|$)"
    r"|^(experts|tasks|read)(_|$)|_reference$|_default$|_in_cache$|_iqr$"
    r"|^(time|commit|versions|cores|goals|seconds|sources|peak_memory_bytes|r2|gb|peak_gb|compiled_us|noise|share)$"
    r"|^(bf16_tflops|fp8_tflops|confidence_error|relative_error|draws_differing|rerouted|duration|steps_per_block|ok)$"
    r"|^total_.*_tokens$|^(refusals|polls)_s$|^(gain|check_cost)$",
    "count": r"(^|_)(launches|syncs|forwards|bytes|operations|passes|registers|spilled|shared)(_|$)"
    r"|(^|_)(instructions|calls|pages|states|classes)(_|$)",
    "exact": r"^(accuracy|tpf|aup)(_free|_constrained)?$|^(tokens_per_forward|equal_tokens|valid)$",
    "speed": r"(^|_)(tok_s|tok_s_tpf_.*|steps_s|gb_s|throughput|throughput_rounds|percent_of_(copy|read))$"
    r"|^(ratio|speedup)",
    "time": r"(^|_)(us|ms)(_per_\w+)?$|^p\d+$|^over_|^block_\d+_over_",
    "setting": r"^(threshold|editing_threshold|temperature|top_p|rate|knob)$",  # a float that says what is measured
}
MORE_IS_BETTER = {"count": False, "exact": True, "speed": True, "time": False}  # the kinds that are metrics
TIMED = ("speed", "time")
TIMED_BY = ("device", "threads", "quick")  # a time is comparable within one kind of run on one machine only
APART = ("part", "torch", "triton")  # a point of a part or a version that NEW does not have at all is not gone
NOISE, LEAST = 0.1, 0.02
T99 = {1: 63.66, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707, 8: 3.355, 10: 3.169, 15: 2.947, 30: 2.75, 1e9: 2.576}


def kind_of(name):
    """The key of KINDS for a figure, or None. Numbers at the end of its name do not count: it may be given for several
    sizes, or be a list."""
    last = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
    key = re.sub(r"^(median|mean|p99)_", "", last)
    return next((kind for kind, form in KINDS.items() if re.search(form, key)), None)


class Metric(NamedTuple):
    """What was measured: benchmark, what says which point, and the name of the figure."""

    benchmark: str
    point: tuple  # (key, value) pairs as text
    name: str

    @property
    def kind(self):
        return kind_of(self.name)

    def __str__(self):
        where = ", ".join(f"{key}={value}" for key, value in self.point if key not in TIMED_BY)
        return f"{self.benchmark} {self.name}" + f" ({where})" * bool(where)


class Finding(NamedTuple):
    """One metric in both: ratio NEW / OLD, its interval (None for what is exact), and "better", "worse" or "same"."""

    metric: Metric
    old: float
    new: float
    ratio: float | None
    interval: tuple | None
    verdict: str


# Lines to metrics.


def figures(data, path="", point=()):
    """Yields (point, name, value, relative spread or None) of a line or a part of it."""
    if data.get("who", "ours") != "ours":  # a peer's part
        return
    kinds = {key: kind_of(key) for key in data}
    point += tuple((path + key, json.dumps(data[key])) for key in data if _says_which(kinds[key], data[key]))
    for key, value in data.items():
        values = value if isinstance(value, list) else [value]
        if kinds[key] == "ignored":
            continue
        if _nested(value):
            for entry in values:
                yield from figures(entry, f"{path}{key}.", point)
        elif kind_of(path + key) in MORE_IS_BETTER and value is not None:
            for i, number in enumerate(values):
                name = f"{path}{key}" + f".{i}" * isinstance(value, list)
                yield point, name, number, _spread(data, key) / number if number else None


def _says_which(kind, value):
    """Whether an entry of this kind is part of what was measured, not of the outcome."""
    return kind == "setting" or (kind is None and not isinstance(value, float) and not _nested(value))


def _spread(data, key):
    """The standard deviation that stands beside a figure."""
    std = data.get("std_" + re.sub(r"^(median|mean)_", "", key))
    return data.get(f"{key}_iqr", 0) / 1.349 if std is None else std  # 1.349: of a normal distribution


def _nested(value):
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value))


def metrics(data):
    """Yields (Metric, value, relative spread or None) of one line's data."""
    run = tuple((key, json.dumps(data.get(key))) for key in TIMED_BY)
    body = {key: value for key, value in data.items() if key not in ("benchmark", *TIMED_BY)}
    seen = Counter()
    for point, name, value, spread in figures(body):
        metric = Metric(data["benchmark"], point + run if kind_of(name) in TIMED else point, name)
        seen[metric] += 1
        if seen[metric] > 1:  # points that nothing tells apart: by their place
            metric = metric._replace(point=(*metric.point, ("nth", str(seen[metric]))))
        yield metric, value, spread


def select(argument):
    """The data of the lines that FILE, FILE:N or FILE@COMMIT names. ValueError if there are none."""
    name, number, commit = re.fullmatch(r"(.*?)(?::(-?\d+)|@([\w-]+))?", argument).groups()
    if not Path(name).is_file():
        raise ValueError(f"{argument}: there is no file {name}")
    lines = [json.loads(text) for text in Path(name).read_text("utf-8").splitlines()]
    if number is not None:
        if not 1 <= abs(int(number)) <= len(lines):
            raise ValueError(f"{argument}: expected a line from 1 to {len(lines)}, or from -1 back")
        lines = [lines[int(number) - (int(number) > 0)]]
    if commit is not None:
        lines = [line for line in lines if line.get("commit") == commit]
    if not lines:
        raise ValueError(f"{argument}: no such lines")
    return lines


def gather(lines):
    """{Metric: [(value, spread), ...]} of the newest commit that has it, in the order of the lines."""
    found = {}
    for line in lines:
        for metric, value, spread in metrics(line):
            commit, samples = found.get(metric, (None, []))
            same = commit == line.get("commit")
            found[metric] = line.get("commit"), [*(samples if same else []), (value, spread)]
    return {metric: samples for metric, (_, samples) in found.items()}


# Metrics to verdicts.


def judge(metric, old, new, noise=NOISE):
    """The Finding of one metric; old, new: lists of (value, relative spread or None), the newest last."""
    before, after, interval = old[-1][0], new[-1][0], None
    changed = before != after
    if metric.kind in TIMED and min(value for value, _ in (*old, *new)) > 0:
        before, after = (statistics.geometric_mean(value for value, _ in side) for side in (old, new))
        half = _half_width(old, new, noise)
        interval = after / before * exp(-half), after / before * exp(half)
        changed = not interval[0] <= 1 <= interval[1] and abs(after / before - 1) >= LEAST
    verdict = "same"
    if changed:
        verdict = "better" if (after > before) == MORE_IS_BETTER[metric.kind] else "worse"
    return Finding(metric, before, after, after / before if before else None, interval, verdict)


def _half_width(old, new, noise):
    """Of the 99 % interval of log(NEW / OLD)."""
    errors = []  # squared error of each mean, and its degrees of freedom
    for side in (old, new):
        if len(side) > 1:
            errors.append((statistics.variance(log(value) for value, _ in side) / len(side), len(side) - 1))
        else:
            errors.append(((side[0][1] or noise / T99[1e9]) ** 2, 1e9))
    total = sum(square for square, _ in errors)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(square**2 / df for square, df in errors)
    return T99[max((df for df in T99 if df <= freedom), default=1)] * sqrt(total)


def compare(old, new, counted=False, noise=NOISE):
    """(findings of the metrics in both, counts that are gone). old, new: lists of lines' data."""
    before, after = gather(old), gather(new)
    chosen = [metric for metric in before if metric.kind == "count"] if counted else list(before)
    findings = [judge(metric, before[metric], after[metric], noise) for metric in chosen if metric in after]
    there = {metric.benchmark for metric in after}
    pairs = {pair for metric in after for pair in metric.point}
    gone = [
        metric for metric in chosen
        if metric not in after and metric.benchmark in there
        and all(pair in pairs for pair in metric.point if pair[0].rpartition(".")[2] in APART)
    ]  # fmt: skip
    return findings, gone if counted else []


def show(finding):
    ratio = "" if finding.ratio is None else f"{finding.ratio:.3f}"
    interval = "" if finding.interval is None else "[{:.3f}, {:.3f}]".format(*finding.interval)
    return f"{finding.verdict:7}{finding.old:>12.5g}{finding.new:>12.5g}{ratio:>9} {interval:17} {finding.metric}"


def report(findings, gone, same=False):
    """Print what became better, worse or is gone, and with `same` the rest; returns how many are worse or gone."""
    print(f"{'':7}{'old':>12}{'new':>12}{'new/old':>9} 99 % interval")
    for finding in sorted(findings, key=lambda finding: finding.verdict != "worse"):
        if same or finding.verdict != "same":
            print(show(finding))
    for metric in gone:
        print(f"gone   {metric}")
    count = Counter(finding.verdict for finding in findings)
    print(", ".join(f"{count[verdict]} {verdict}" for verdict in ("worse", "better", "same")) + f", {len(gone)} gone")
    return count["worse"] + len(gone)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", metavar="OLD", help="FILE, FILE:N or FILE@COMMIT")
    parser.add_argument("new", metavar="NEW", help="the same")
    parser.add_argument("--counted", action="store_true", help="counts alone: any that grew, or is gone, is worse")
    parser.add_argument("--all", action="store_true", help="show also what is the same")
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="half-width assumed for a single line (default: %(default)g)"
    )
    options = parser.parse_args(argv)
    if options.noise < 0:
        parser.error(f"--noise {options.noise:g}: expected at least 0")
    try:
        old, new = select(options.old), select(options.new)
    except ValueError as error:
        parser.error(str(error))
    findings, gone = compare(old, new, options.counted, options.noise)
    if not findings and not gone:
        print("nothing to compare: no point is in both", file=sys.stderr)
        return 2
    return int(report(findings, gone, options.all) > 0)


if __name__ == "__main__":
    sys.exit(main())
