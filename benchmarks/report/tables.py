"""The tables of benchmarks.report: result lines to Markdown."""

import json
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from .. import estimate, sampling
from ..gpu.goals import GOALS, PREDICTIONS, judge
from ..policies.compare import told_points
from ..roofline import gpu_of

LEAST_SHARE = 0.005  # of a replay, for a kernel to have a row of its own
COMMANDS = {  # benchmark -> the module that makes its lines, unless that has the same name
    "decode": "bench_decode",
    "layer": "bench_layer",
    "engine": "bench_throughput --peers",
    "throughput": "bench_throughput",
    "latency": "bench_latency",
    "host": "bench_host",
    "bench_refine": "kernels.bench_refine",
    "structured": "bench_structured",
    "quality-2.2": "quality --variant 2.2",
    "policies": "quality --policies",
}
UNSEEN = "{} unseen prompts for each of five tasks"
NOT_MEASURED = "Not measured yet: `python -m benchmarks.{}` measures it."


class Line(NamedTuple):
    """A result line and the name of the file it is in."""

    file: str
    data: dict

    def __str__(self):
        """What a table says of where its numbers come from."""
        d = self.data
        command = f"python -m benchmarks.{command_of(d['benchmark'])}" + " --quick" * d.get("quick", False)
        if d.get("quantization"):
            command += f" --quantization {d['quantization']}"
        torch = d.get("versions", {}).get("torch")
        return (
            f"`{self.file}`, {d['time']}, commit {d['commit']}, by `{command} --save` on {d['device']}, {threads(d)}, "
            f"torch {torch}"
        )


def command_of(benchmark):
    return COMMANDS.get(benchmark, benchmark)


def threads(data):
    return f"{data['threads']} thread{'s' * (data['threads'] != 1)}"


def read(folder):
    """All Lines of a folder, in order of time; those of dry runs are left out."""
    lines = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        found = (json.loads(text) for text in path.read_text("utf-8").splitlines())
        lines += [Line(path.name, data) for data in found if not data.get("dry_run")]
    return sorted(lines, key=lambda line: line.data["time"])


def newest(lines, benchmark, having=None):
    """The benchmark's newest line of each machine and quantisation, full runs before quick ones; what ran last first.

    lines: in order of time. having: only lines with something under this key count.
    """
    kinds = {}  # -> their lines, the newest first
    for line in reversed(lines):
        d = line.data
        if d["benchmark"] == benchmark and (not having or d.get(having)):
            kinds.setdefault((d["device"], d["threads"], d.get("quantization")), []).append(line)
    return [min(own, key=lambda line: line.data["quick"]) for own in kinds.values()]


def newest_plain(lines, benchmark, having=None):
    """Of `newest` those that were not asked for a quantisation."""
    return [line for line in newest(lines, benchmark, having) if not line.data.get("quantization")]


# Cells and tables. A form is a text with fields of a point, as str.format has them, or a function of the point that
# returns the text. A column is "heading {form}", or the heading alone if its field has this name, or (heading, form).


def cell(form, point):
    """The form filled in from a point, a dict; "" where a field of it is missing or None."""
    if callable(form):
        return form(point)
    try:
        values = [Formatter().get_field(name, (), point)[0] for _, name, _, _ in Formatter().parse(form) if name]
    except KeyError:
        return ""
    return "" if None in values else form.format_map(point)


def split(column):
    """(heading, form) of a column."""
    if isinstance(column, tuple):
        return column
    heading, _, form = column.partition(" {")
    return heading, "{" + (form or heading + "}")


def table(columns, points):
    """Markdown, a row per point; columns that no point fills are left out. "" if there is nothing to show."""
    filled = [(heading, "---", *(cell(form, point) for point in points)) for heading, form in map(split, columns)]
    rows = zip(*[column for column in filled if any(column[2:])], strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def megabytes(key, digits=1):
    """The form of bytes under a key."""
    return lambda point: f"{point[key] / 1e6:.{digits}f}" if point.get(key) is not None else ""


def each_machine(benchmark, key, columns, also=(), chosen=newest):
    """A block: of each machine's line that has something under `key`, a table of the points there, and of those under
    the keys `also`, headed by the line. A line that has no list there is a point itself.

    chosen: newest or newest_plain, which choose the lines.
    """

    def block(lines):
        parts = []
        for line in chosen(lines, benchmark, key):
            found = [line.data[name] for name in (key, *also)]
            points = [point for part in found for point in part] if isinstance(found[0], list) else [line.data]
            parts.append(f"{line}\n\n{table(columns, points)}")
        return "\n\n".join(parts) or NOT_MEASURED.format(f"{command_of(benchmark)} --save")

    return block


def quality_by_quantization(lines):
    """A table for each machine: how the embedded model answers by the default rule, plain and quantised."""
    machines = {}
    for line in newest(lines, "quality", "settings"):
        machines.setdefault((line.data["device"], line.data["threads"]), []).append(line)
    columns = [
        ("weights", lambda data: data.get("quantization") or "as they are"), "exact match {accuracy:.3f}",
        ("worst task", worst_task), "TPF {tpf:.2f}",
    ]  # fmt: skip
    parts = []
    for own in machines.values():
        own = sorted(own, key=lambda line: line.data.get("quantization") or "")
        if len(own) > 1:
            parts += [*map(str, own), table(columns, [line.data for line in own])]
    return "\n\n".join(parts) or NOT_MEASURED.format("quality --quantization int4 --save")


def worst_task(point):
    return f"{min(task['accuracy'] for task in point['tasks'].values()):.3f}"


# README's short table: of a line's data, the points, and of each what it is and its result, as forms of cells.


def short_decode(data):
    points = [point for point in data["points"] if point.get("ratio_vs_diffusers")]
    longest = max(points, key=lambda point: point["prompt"])
    for point in points[:1] if longest is points[0] else [points[0], longest]:
        what = "{prompt}-token prompt, {generated} generated, batch {batch}: against diffusers' pipeline driving the "
        ratio = "{ratio_vs_diffusers:.1f}x ({tok_s:.0f} against {diffusers_tok_s:.1f} tok/s)"
        yield point, what + "same network, tokens equal", ratio
        yield point, "the same, of the network with PyTorch's own products", "{ratio_vs_diffusers_plain:.1f}x"
        yield point, "the same against the model card's loop", "{ratio_vs_card:.1f}x"
        share = f"{point['peak_bytes'] / point['diffusers_peak_bytes']:.0%}"
        yield point, "the same: peak bytes during the call, as a share of those of diffusers", share
    for cost in data.get("cost", []):
        fit = "{intercept_ms:.1f} ms + {slope_ms_per_1k:.1f} ms per 1024 tokens (R² {r2:.3f})"
        yield cost, "cost of a block by the tokens before it, {who}", fit
    yield data, "a forward at position 2048 against one at 64", "{block_2048_over_64:.2f}x"


def short_engine(data):
    speeds = "{speedup_vs_serial:.1f}x ({tok_s:.0f} against {serial_tok_s:.0f} tok/s)"
    yield data, "16 requests in flight: against `generate()` one by one", speeds
    yield data, "16 equal prompts: against diffusers' pipeline in lock-step batches", "{speedup_vs_diffusers:.1f}x"
    yield data, "the scheduler's own time per row and step, 64 rows", "{scheduler_us_per_row:.1f} µs"


def short_refine(data):
    for point in data["points"]:
        if point["mode"] == "greedy":
            what = "refinement step, {rows} row" + "s" * (point["rows"] != 1) + ", {vocab} ids: against diffusers' "
            yield point, what + "`scheduler.step`", "{ratio_vs_diffusers_step:.1f}x"
    counts = "{launches}, {launches_temperature}, {launches_sampling}; host syncs: {host_syncs}"
    yield data, "launches of its kernels: greedy, temperature, with top-k or top-p", counts


def short_quality(data):
    usual = [p for p in data["settings"] if p["threshold"] and p["block_length"] == data["block_length"]]
    chosen = [p for p in usual if (p["threshold"], p["editing"]) == (data["threshold"], data["editing"])]
    chosen += [p for p in usual if p["threshold"] == min(p["threshold"] for p in usual)]
    model = "embedded model" if data["benchmark"] == "quality" else "embedded model as a LLaDA2.2"
    what = f"{model}, {UNSEEN.format(data['prompts_per_task'])}"
    for point in chosen:
        setting = ", threshold {threshold:g}, editing {editing}: exact match"
        yield point, what + setting, "{accuracy:.3f} at TPF {tpf:.2f}, {tok_s:.0f} tok/s"
        what = "the same"


def short_sampling(data):
    draws = {(entry["model"], sampling.draw_of(entry)): entry for entry in data["draws"]}
    what = f"{UNSEEN.format(data['prompts_per_task'])}, temperature 0.1: exact match by confidence"
    for model in dict.fromkeys(model for model, _ in draws):
        greedy, cold = draws[model, "temperature 0"]["own"], draws[model, "temperature 0.1"]
        scores = "; ".join(
            f"{title}: {cold[rule]['accuracy']:.3f} at TPF {cold[rule]['tpf']:.2f}"
            for rule, title in sampling.TITLES.items()
        )
        yield cold, "{model} model, " + what, f"{scores} (greedy: {greedy['accuracy']:.3f} at {greedy['tpf']:.2f})"


def short_policies(data):
    found = {}  # by model, of each policy that compares with the threshold rule
    for entry in data["policies"]:
        if entry["in_product"] and entry["gain"]["median"]:
            found.setdefault(entry["model"], []).append(entry)
    for model, own in found.items():
        best = max(own, key=lambda entry: entry["gain"]["best"])
        what = f"{model} model, {UNSEEN.format(data['prompts_per_task'])}: tokens per forward by policy {{policy}}, "
        ratio = "{gain[median]:.2f}x in the median of {gain[points]} accuracies, {gain[best]:.2f}x at {gain[at]:.3f}"
        yield best, what + "against the threshold rule's at the same accuracy", ratio


SHORT = {
    "decode": short_decode, "engine": short_engine, "bench_refine": short_refine, "quality": short_quality,
    "quality-2.2": short_quality,
    "sampling": short_sampling, "policies": short_policies,
}  # fmt: skip


def short_table(lines):
    """README's table: what, result, and the number of the result line, which are listed below."""
    rows, sources = [], []
    for benchmark, results_of in SHORT.items():
        for line in newest_plain(lines, benchmark)[:1]:
            sources.append(f"{len(sources) + 1}. {line}")
            for point, what, result in results_of(line.data):
                rows.append({"what": cell(what, point), "result": cell(result, point), "line": len(sources)})
    body = table(["what", "result", ("line", "[{line}]")], [row for row in rows if row["result"]])
    return f"{body}\n\nResult lines, all in `benchmarks/results/`:\n\n" + "\n".join(sources)


# GPU: a line per point.


def gpu_lines(lines):
    """{device: {point: data}}, the newest of each that measured something; the device that ran last first."""
    devices = {}
    for line in lines:
        if line.data["benchmark"] == "gpu" and not line.data.keys() & {"error", "skipped"}:
            own = devices.pop(line.data["device"], {})
            devices[line.data["device"]] = own | {line.data["point"]: line.data}
    return dict(reversed(devices.items()))


def gpu_block(body):
    """A block: body({device: {point: data}}), headed by where each device's lines are."""

    def block(lines):
        devices, heads = gpu_lines(lines), []
        for device, points in devices.items():
            times, commits = ({data[key] for data in points.values()} for key in ("time", "commit"))
            heads.append(
                f"{device}: {len(points)} lines of `gpu.jsonl`, {min(times)} to {max(times)}, "
                f"commit {', '.join(sorted(map(str, commits)))}, by `python -m benchmarks.gpu`"
            )
        if not devices:
            return NOT_MEASURED.format("gpu") + " Every GPU speed is open."
        return "\n\n".join([*heads, body(devices)])

    return block


def card(device):
    """What a table calls a device."""
    gpu = gpu_of(device)
    return gpu.upper() if gpu else device


def side_by_side(devices, columns):
    """The columns of each device, of what a row has under the device's name; headed by it where there are several."""
    return [
        (f"{card(device)}: {heading}" if len(devices) > 1 else heading,
         lambda row, device=device, form=form: cell(form, row.get(device, {})))
        for device in devices
        for heading, form in map(split, columns)
    ]  # fmt: skip


def gpu_goals(devices):
    judged = {device: judge(points) for device, points in devices.items()}
    rows = [
        {"goal": goal.text} | {device: verdicts[i]._asdict() for device, verdicts in judged.items()}
        for i, goal in enumerate(GOALS)
    ]
    columns = ["limit {limit}", "measured {value:.4g}", "verdict {verdict}"]
    return table(["goal", *side_by_side(devices, columns)], rows)


def gpu_points(devices):
    """All times, a table per device and section; of a point that is none (ceilings, gates) what the suite itself
    prints is in its line."""
    columns = [
        "point", "tok/s {tok_s:.0f}", "ms per forward {ms_per_forward:.2f}",
        "of these at work {busy_ms_per_forward:.2f}", "µs {us:.1f}", "ms {ms:.3f}", "floor µs {floor_us:.1f}",
        "floor ms {floor_ms:.3f}", "over floor {over_floor:.2f}x",
        "floor ms of the experts touched {floor_touched_ms:.3f}", "launches", "GB/s {gb_s:.0f}",
        "reference µs {reference_us:.0f}", "peak GB {peak_gb:.1f}", "whole call tok/s {call_tok_s:.0f}",
        "diffusers tok/s {diffusers_tok_s:.0f}", "ours / diffusers {ratio_vs_diffusers:.1f}x",
    ]  # fmt: skip
    parts = []
    for device, points in devices.items():
        sections = {}
        for data in points.values():
            if "kernels" not in data and data.keys() & {"us", "ms", "tok_s", "call_tok_s"}:
                sections.setdefault(data["section"], []).append(data)
        for section, rows in sections.items():
            parts += [f"{card(device)}, {section}:", table(columns, rows)]
    return "\n\n".join(parts)


def gpu_profile(devices):
    """A table per profile: the kernels of a replay that take LEAST_SHARE of it."""
    columns = [
        ("kernel", "`{name}`"), "grid", "count", "mean µs {us:.2f}", "from {least_us:.2f}", "to {most_us:.2f}",
        "total µs {total_us:.0f}",
    ]  # fmt: skip
    found = [(device, data) for device, points in devices.items() for data in points.values() if "kernels" in data]
    parts = []
    for device, data in found:
        times = f"{data['ms']:.3f} ms, of which {data['gaps_ms']:.3f} ms between its {data['launches']} launches"
        rows = [row for row in data["kernels"] if row["total_us"] >= LEAST_SHARE * 1e3 * data["kernels_ms"]]
        others = {
            "name": "others", "count": data["launches"] - sum(row["count"] for row in rows),
            "total_us": 1e3 * data["kernels_ms"] - sum(row["total_us"] for row in rows),
        }  # fmt: skip
        parts += [f"{card(device)}, {data['point']}: {times}", table(columns, [*rows, others])]
    return "\n\n".join(parts) or NOT_MEASURED.format("gpu --only profile")


def gpu_predictions(lines):
    """What was expected of each GPU beside what its lines say; the estimates stand there without a line, too."""
    measured = {card(device): points for device, points in gpu_lines(lines).items()}
    rows = []
    for point in PREDICTIONS:
        rows.append({"point": f"{point.point}: {point.unit}"})
        for gpu, value in point.expected.items():
            expected = "{:g} to {:g}".format(*value) if isinstance(value, tuple) else f"{value:g}"
            found = measured.get(gpu.upper(), {}).get(point.point, {}).get(point.field)
            rows[-1][gpu.upper()] = {"expected": expected, "measured": found}
    cards = list(dict.fromkeys(name for row in rows for name in row if name != "point"))
    columns = ["expected {expected}", "measured {measured:.4g}"]
    return table(["point", *side_by_side(cards, columns)], rows)


# Estimates: a line of counts for each of two trees.


def estimates(body):
    """A block: body(the two lines by name, all gpu lines), headed by where the two are."""

    def block(lines):
        named = estimate.before_and_after([line.data for line in lines])
        heads = [f"{name}: {line}" for name, data in named.items() for line in lines if line.data is data]
        if not named:
            return NOT_MEASURED.format("counts --parts kernels --save")
        return "\n\n".join([*heads, body(named, [line.data for line in lines if line.data["benchmark"] == "gpu"])])

    return block


def estimated_steps(named, _):
    """A row for each step, its launches and ms before and after."""
    columns = ["dtype", "batch", *(f"launches {name} {{{name}[launches]}}" for name in named)]
    for card in estimate.CARDS:
        columns.append(f"{card.upper()} floor ms {{{[*named][-1]}[{card}][floor_ms]:.2f}}")
        for name in named:
            columns.append(f"{card.upper()} ms {name} {{{name}[{card}][ms]:.2f}}")
            columns.append(f"{card.upper()} over floor {name} {{{name}[{card}][over_floor]:.2f}}x")
    return table(columns, estimate.compared(named))


def estimated_and_measured(named, gpu):
    columns = [
        "line", "card", "point", "commit", "measured ms {measured_ms:.3f}", "estimate ms {estimate_ms:.3f}",
        "off by {off:+.1%}",
    ]  # fmt: skip
    return table(columns, estimate.residuals(named, gpu))


# The blocks: name -> function of all lines.

WAITS = [  # of bench_throughput and bench_latency
    "model", "prompts", "in flight {max_concurrency}", "per second {request_rate:g}", "batch {batch_size}",
    "tok/s {output_throughput:.0f}", "median tok/s {median_output_throughput:.0f}", "TPF {tokens_per_forward:.2f}",
    "first block median, ms {median_ttft_ms:.0f}", "first block p99, ms {p99_ttft_ms:.0f}",
    "next block median, ms {median_itl_ms:.0f}", "next block p99, ms {p99_itl_ms:.0f}",
    "request median, ms {median_e2el_ms:.0f}", "request p99, ms {p99_e2el_ms:.0f}",
]  # fmt: skip
QUALITY = [
    "threshold {threshold:g}", "editing", "block length {block_length}", "steps", "exact match {accuracy:.3f}",
    ("worst task", worst_task), "TPF {tpf:.2f}", "tok/s {tok_s:.0f}",
]  # fmt: skip

BLOCKS = {
    "numbers": short_table,
    "gpu-goals": gpu_block(gpu_goals),
    "gpu-points": gpu_block(gpu_points),
    "gpu-profile": gpu_block(gpu_profile),
    "gpu-predictions": gpu_predictions,
    "decode-points": each_machine("decode", "points", [
        "factor", "prompt", "generated", "batch", "threshold", "tok/s {tok_s:.0f}", "TPF {tpf:.2f}", "forwards",
        ("peak MB", megabytes("peak_bytes")), "diffusers tok/s {diffusers_tok_s:.1f}",
        "ours / diffusers {ratio_vs_diffusers:.1f}x", ("peak MB, diffusers", megabytes("diffusers_peak_bytes")),
        "card's loop tok/s {card_tok_s:.1f}", "ours / card's loop {ratio_vs_card:.1f}x",
        "diffusers with PyTorch's products tok/s {diffusers_plain_tok_s:.1f}",
        "ours / those {ratio_vs_diffusers_plain:.1f}x",
    ]),
    "decode-ablations": each_machine("decode", "ablations", [
        "without", "tok/s {tok_s:.0f}", "forwards", ("peak MB", megabytes("peak_bytes")),
        "whole / without {ratio:.2f}x",
    ]),
    "decode-int4": each_machine("decode", "int4", [
        "tok/s in int4 {int4[tok_s]:.0f}", "int4 / as they are {int4[ratio]:.2f}x",
        ("MB of weights in int4", lambda data: megabytes("weight_bytes")(data["int4"])),
        ("MB as they are", lambda data: megabytes("wide_weight_bytes")(data["int4"])),
    ]),
    "decode-cost": each_machine("decode", "cost", [
        "who", ("prefix", lambda cost: ", ".join(map(str, cost["prefix"]))),
        ("ms per block", lambda cost: ", ".join(f"{ms:.1f}" for ms in cost["ms_per_block"])),
        "ms at an empty prefix (fit) {intercept_ms:.1f}", "ms per 1024 more tokens (fit) {slope_ms_per_1k:.2f}",
        "R² {r2:.3f}",
    ]),
    "layer": each_machine("layer", "layers", [
        "weights {dtype}", "experts read {experts}", ("MB", megabytes("bytes", digits=0)), "ms {ms:.1f}",
        "GB/s {gb_s:.1f}", "GB/s of a sum {read_gb_s:.1f}", "share {percent_of_read:.0f}%",
    ]),
    "engine-load": each_machine("engine", "in_flight", [
        "requests in flight {in_flight}", "arrivals per second {rate:.2f}", "tok/s {tok_s:.0f}",
        "first block p50, ms {first_block_ms[p50]:.0f}", "first block p99, ms {first_block_ms[p99]:.0f}",
        "between blocks p50, ms {inter_block_ms[p50]:.0f}", "between blocks p99, ms {inter_block_ms[p99]:.0f}",
        "request p50, ms {request_ms[p50]:.0f}", "request p99, ms {request_ms[p99]:.0f}",
    ], also=["rates"]),
    "throughput": each_machine("throughput", "output_throughput", WAITS),
    "latency": each_machine("latency", "iterations", WAITS),
    "host-admission": each_machine("host", "admission", [
        "request {kind}", "waiting", "prompt", "ms {median_ms:.2f}", "µs per further token {us_per_token:.3f}",
    ]),
    "host-head": each_machine("host", "head", [
        "prompt that waits {prompt}", "ms {median_ms:.2f}", "ms with nobody waiting {without_ms:.2f}",
        "µs per token {us_per_token:.4f}",
    ]),
    "host-steps": each_machine("host", "steps", [
        "max_num_seqs", "µs of a step of one row {median_us:.0f}", "over the first {over_fewest:.2f}x",
    ]),
    "host-serving": each_machine("host", "serving", [
        "beside {load}", "steps/s {steps_s:.0f}", "of alone {median_ratio_vs_alone:.2f}x",
        "longest gap, ms {median_gap_ms:.0f}", "refusals/s {refusals_s:.0f}", "polls/s {polls_s:.0f}",
    ]),
    "host-crowd": each_machine("host", "crowd", [
        "calls that wait {crowd[size]}", "longest gap while they come, ms {crowd[median_arriving_gap_ms]:.0f}",
        "longest gap while they go, ms {crowd[median_leaving_gap_ms]:.0f}",
    ]),
    "quality-settings": each_machine("quality", "settings", QUALITY, chosen=newest_plain),
    "quality-2.2-settings": each_machine("quality-2.2", "settings", QUALITY, chosen=newest_plain),
    "quality-quantization": quality_by_quantization,
    "policies": each_machine("policies", "policies", [
        "model", "policy", ("in the product", lambda entry: "yes" if entry["in_product"] else "no"),
        "exact match {accuracy:.3f}", "TPF {tpf:.2f}", "TPF of short answers {short[tpf]:.2f}", "AUP {aup:.1f}",
        "gain, median {gain[median]:.2f}x", "gain, best {gain[best]:.2f}x at {gain[at]:.3f}",
        ("points on the frontier", lambda entry: f"{entry['leads']} of {len(entry['points'])}"),
    ]),
    "policies-points": each_machine("policies", "policies", [
        "model", "policy", "knob", ("exact match at TPF by its value", told_points),
    ]),
    "sampling": each_machine("sampling", "draws", [
        "model", ("draw", sampling.draw_of),
        *(column for rule, title in sampling.TITLES.items() for column in (
            f"{title}: exact match {{{rule}[accuracy]:.3f}}",
            (f"{title}: worst task", lambda draw, rule=rule: f"{min(draw[rule]['tasks'].values()):.3f}"),
            f"{title}: TPF {{{rule}[tpf]:.2f}}",
        )),
    ]),
    "structured-points": each_machine("structured", "points", [
        "model", "threshold {threshold:g}", "free: exact match {free[accuracy]:.3f}", "free: TPF {free[tpf]:.2f}",
        "free: forwards {free[forwards]}", "in its language: exact match {constrained[accuracy]:.3f}",
        "in its language: TPF {constrained[tpf]:.2f}", "in its language: forwards {constrained[forwards]}",
    ]),
    "structured-hosts": each_machine("structured", "hosts", [
        "language", "states", "classes", "µs more per step {us_per_step:.0f}",
        "µs more per step, first answer {first_us_per_step:.0f}",
    ]),
    "structured-schemas": each_machine("structured", "valid", [
        "schemas", "answers", "valid {valid:.1%}", ("refused", lambda data: str(len(data["builds"]["refused"]))),
        "median ms of a build {builds[median_ms]:.0f}", "worst ms {builds[worst_ms]:.0f}",
        "median states {builds[median_states]:g}", "most states {builds[worst_states]}",
        "median classes {builds[median_classes]:g}", "most classes {builds[worst_classes]}",
        "launches, free {launches_free}", "launches, guided {launches_guided}",
    ]),
    "refine-points": each_machine("bench_refine", "points", [
        "rows", "vocabulary {vocab}", "mode", "µs {ours_us:.0f}", "compiled µs {compiled_us:.0f}",
        "diffusers µs {diffusers_us:.0f}", "ours / diffusers {ratio_vs_diffusers_step:.2f}x",
        "% of copy {percent_of_copy:.0f}",
    ]),
    "kernel-ops": each_machine("kernels", "ops", [
        "op", "case", "µs {us:.4g}", "IQR {us_iqr:.2g}", "GB/s {gb_s:.3g}", "beside {peer}", "its µs {peer_us:.4g}",
        "its / ours {ratio:.2f}x",
    ]),
    "counts": each_machine("counts", "kernels", [  # what the kernels ask of a GPU
        "what", "launches", "of these PyTorch's {launches_of_torch}", "outside the graph {launches_outside_graph}",
        "host syncs {syncs}", "passes over the logits {passes:g}", ("MB", megabytes("bytes")),
    ]),
    "counts-forwards": each_machine("counts", "decodings", [
        "decoding", "denoise forwards {denoise_forwards}", "prefill {prefill_forwards}", "settling {settle_forwards}",
    ]),
    "estimates": estimates(estimated_steps),
    "estimates-measured": estimates(estimated_and_measured),
}  # fmt: skip
