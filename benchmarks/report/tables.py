"""The tables of benchmarks.report: result lines to Markdown."""

import json
from pathlib import Path
from typing import NamedTuple

from .. import sampling
from ..gpu.goals import GOALS, PREDICTIONS, judge
from ..roofline import GPUS, gpu_of

LEAST_SHARE = 0.005  # of a replay, for a kernel to have a row of its own
COMMANDS = {  # benchmark -> the module that makes its lines
    "decode": "bench_decode",
    "layer": "bench_layer",
    "engine": "bench_throughput --peers",
    "throughput": "bench_throughput",
    "latency": "bench_latency",
    "bench_refine": "kernels.bench_refine",
    "kernels": "kernels",
    "quality": "quality",
    "sampling": "sampling",
    "counts": "counts",
    "gpu": "gpu",
}


class Line(NamedTuple):
    """A result line and the name of the file it is in."""

    file: str
    data: dict

    @property
    def machine(self):
        return self.data["device"], self.data["threads"]

    def __str__(self):
        """What a table says of where its numbers come from."""
        d = self.data
        command = f"python -m benchmarks.{COMMANDS[d['benchmark']]}" + " --quick" * d.get("quick", False)
        torch = d.get("versions", {}).get("torch")
        return (
            f"`{self.file}`, {d['time']}, commit {d['commit']}, by `{command} --save` on {d['device']}, {threads(d)}, "
            f"torch {torch}"
        )


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
    """The benchmark's newest line of each machine, full runs before quick ones; the machine that ran last first.

    having: only lines with something under this key count.
    """
    own = [line for line in lines if line.data["benchmark"] == benchmark and (not having or line.data.get(having))]
    last = {line.machine: line.data["time"] for line in own}
    chosen = {}
    for line in own:
        before = chosen.get(line.machine)
        if before is None or before.data["quick"] or not line.data["quick"]:
            chosen[line.machine] = line
    return sorted(chosen.values(), key=lambda line: last[line.machine], reverse=True)


# Tables. A column is (heading, key or function of a point, format); one that no point has is left out.


def table(columns, points):
    """Markdown, a row per point; "" if there is nothing to show."""
    read_of = [
        (heading, key if callable(key) else lambda p, key=key: p.get(key), form) for heading, key, form in columns
    ]
    shown = [column for column in read_of if any(column[1](point) is not None for point in points)]
    if not shown or not points:
        return ""
    rows = [[heading for heading, _, _ in shown], ["---"] * len(shown)]
    for point in points:
        values = [(value(point), form) for _, value, form in shown]
        rows.append(["" if value is None else form.format(value) for value, form in values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mega(key):
    return lambda point: None if point.get(key) is None else point[key] / 1e6


def peak_share(point):
    both = point.get("peak_bytes"), point.get("diffusers_peak_bytes")
    return None if None in both else both[0] / both[1]


def decode_points(line):
    return table([
        ("factor", "factor", "{}"), ("prompt", "prompt", "{}"), ("generated", "generated", "{}"),
        ("batch", "batch", "{}"), ("threshold", "threshold", "{}"), ("tok/s", "tok_s", "{:.0f}"),
        ("TPF", "tpf", "{:.2f}"), ("forwards", "forwards", "{}"), ("peak MB", mega("peak_bytes"), "{:.1f}"),
        ("diffusers tok/s", "diffusers_tok_s", "{:.1f}"), ("ours / diffusers", "ratio_vs_diffusers", "{:.1f}x"),
        ("peak MB, diffusers", mega("diffusers_peak_bytes"), "{:.1f}"),
        ("card's loop tok/s", "card_tok_s", "{:.1f}"), ("ours / card's loop", "ratio_vs_card", "{:.1f}x"),
        ("diffusers with PyTorch's products tok/s", "diffusers_plain_tok_s", "{:.1f}"),
        ("ours / those", "ratio_vs_diffusers_plain", "{:.1f}x"),
    ], line.data["points"])  # fmt: skip


def decode_ablations(line):
    return table([
        ("without", "without", "{}"), ("tok/s", "tok_s", "{:.0f}"), ("forwards", "forwards", "{}"),
        ("peak MB", mega("peak_bytes"), "{:.1f}"), ("whole / without", "ratio", "{:.2f}x"),
    ], line.data["ablations"])  # fmt: skip


def layer_share(line):
    return table([
        ("weights", "dtype", "{}"), ("experts read", "experts", "{}"), ("MB", mega("bytes"), "{:.0f}"),
        ("ms", "ms", "{:.1f}"), ("GB/s", "gb_s", "{:.1f}"), ("GB/s of a sum", "read_gb_s", "{:.1f}"),
        ("share", "percent_of_read", "{:.0f}%"),
    ], line.data["layers"])  # fmt: skip


def decode_cost(line):
    return table([
        ("who", "who", "{}"), ("prefix", lambda p: ", ".join(map(str, p["prefix"])), "{}"),
        ("ms per block", lambda p: ", ".join(f"{ms:.1f}" for ms in p["ms_per_block"]), "{}"),
        ("ms at an empty prefix (fit)", "intercept_ms", "{:.1f}"),
        ("ms per 1024 more tokens (fit)", "slope_ms_per_1k", "{:.2f}"), ("R²", "r2", "{:.3f}"),
    ], line.data["cost"])  # fmt: skip


def engine_load(line):
    columns = [
        (f"{label} {p}, ms", lambda point, key=key, p=p: point[key][p], "{:.0f}")
        for key, label in (("first_block_ms", "first block"), ("inter_block_ms", "between blocks"),
                           ("request_ms", "request"))
        for p in ("p50", "p99")
    ]  # fmt: skip
    columns = [
        ("requests in flight", "in_flight", "{}"), ("arrivals per second", "rate", "{:.2f}"),
        ("tok/s", "tok_s", "{:.0f}"), *columns,
    ]  # fmt: skip
    return table(columns, [*line.data["in_flight"], *line.data["rates"]])


def waits(line):
    """Of bench_throughput and bench_latency."""
    times = [("first block", "ttft_ms"), ("next block", "itl_ms"), ("request", "e2el_ms")]
    columns = [
        (f"{label} {name}, ms", f"{key}_{of}", "{:.0f}")
        for label, of in times
        for name, key in (("median", "median"), ("p99", "p99"))
    ]
    columns = [
        ("model", "model", "{}"), ("prompts", "prompts", "{}"), ("in flight", "max_concurrency", "{}"),
        ("per second", "request_rate", "{:g}"), ("batch", "batch_size", "{}"), ("tok/s", "output_throughput", "{:.0f}"),
        ("median tok/s", "median_output_throughput", "{:.0f}"), ("TPF", "tokens_per_forward", "{:.2f}"), *columns,
    ]  # fmt: skip
    return table(columns, [line.data])


def worst_task(point):
    return min((task["accuracy"] for task in point.get("tasks", {}).values()), default=None)


def quality_settings(line):
    return table([
        ("threshold", "threshold", "{:g}"), ("editing", "editing", "{}"), ("block length", "block_length", "{}"),
        ("steps", "steps", "{}"), ("exact match", "accuracy", "{:.3f}"),
        ("worst task", worst_task, "{:.3f}"),
        ("TPF", "tpf", "{:.2f}"), ("tok/s", "tok_s", "{:.0f}"),
    ], line.data["settings"])  # fmt: skip


def sampling_draws(line):
    columns = [
        (f"{title}: {what}", lambda entry, rule=rule, of=of: of(entry[rule]), form)
        for rule, title in sampling.TITLES.items()
        for what, of, form in (
            ("exact match", lambda found: found["accuracy"], "{:.3f}"),
            ("worst task", lambda found: min(found["tasks"].values()), "{:.3f}"),
            ("TPF", lambda found: found["tpf"], "{:.2f}"),
        )
    ]
    return table([("model", "model", "{}"), ("draw", sampling.draw_of, "{}"), *columns], line.data["draws"])


def refine_points(line):
    return table([
        ("rows", "rows", "{}"), ("vocabulary", "vocab", "{}"), ("mode", "mode", "{}"), ("µs", "ours_us", "{:.0f}"),
        ("compiled µs", "compiled_us", "{:.0f}"), ("diffusers µs", "diffusers_us", "{:.0f}"),
        ("ours / diffusers", "ratio_vs_diffusers_step", "{:.2f}x"), ("% of copy", "percent_of_copy", "{:.0f}"),
    ], line.data["points"])  # fmt: skip


def kernel_ops(line):
    return table([
        ("op", "op", "{}"), ("case", "case", "{}"), ("µs", "us", "{:.4g}"), ("IQR", "us_iqr", "{:.2g}"),
        ("GB/s", "gb_s", "{:.3g}"), ("beside", "peer", "{}"), ("its µs", "peer_us", "{:.4g}"),
        ("its / ours", "ratio", "{:.2f}x"),
    ], line.data["ops"])  # fmt: skip


def counted(line):
    """What the kernels ask of a GPU."""
    return table([
        ("what", "what", "{}"), ("launches", "launches", "{}"), ("of these PyTorch's", "launches_of_torch", "{}"),
        ("outside the graph", "launches_outside_graph", "{}"), ("host syncs", "syncs", "{}"),
        ("passes over the logits", "passes", "{:g}"), ("MB", mega("bytes"), "{:.1f}"),
    ], line.data["kernels"])  # fmt: skip


def counted_forwards(line):
    return table([
        ("decoding", "decoding", "{}"), ("denoise forwards", "denoise_forwards", "{}"),
        ("prefill", "prefill_forwards", "{}"), ("settling", "settle_forwards", "{}"),
    ], line.data["decodings"])  # fmt: skip


# README's short table: (what, result) pairs of a line.


def short_decode(line):
    points = [point for point in line.data["points"] if point.get("ratio_vs_diffusers")]
    chosen = [points[0], max(points, key=lambda point: point["prompt"])]
    for point in chosen if chosen[0] is not chosen[1] else chosen[:1]:
        of = f"{point['prompt']}-token prompt, {point['generated']} generated, batch {point.get('batch', 1)}"
        speeds = f"({point['tok_s']:.0f} against {point['diffusers_tok_s']:.1f} tok/s)"
        yield (
            f"{of}: against diffusers' pipeline driving the same network, tokens equal",
            f"{point['ratio_vs_diffusers']:.1f}x {speeds}",
        )
        if point.get("ratio_vs_diffusers_plain"):
            yield "the same, of the network with PyTorch's own products", f"{point['ratio_vs_diffusers_plain']:.1f}x"
        if point.get("ratio_vs_card"):
            yield "the same against the model card's loop", f"{point['ratio_vs_card']:.1f}x"
        if peak_share(point) is not None:
            yield "the same: peak bytes during the call, as a share of those of diffusers", f"{peak_share(point):.0%}"
    for cost in line.data.get("cost", []):
        yield (
            f"cost of a block by the tokens before it, {cost['who']}",
            f"{cost['intercept_ms']:.1f} ms + {cost['slope_ms_per_1k']:.1f} ms per 1024 tokens (R² {cost['r2']:.3f})",
        )
    if "block_2048_over_64" in line.data:
        yield "a forward at position 2048 against one at 64", f"{line.data['block_2048_over_64']:.2f}x"


def short_engine(line):
    d = line.data
    in_flight = f"({d['tok_s']:.0f} against {d['serial_tok_s']:.0f} tok/s)"
    yield "16 requests in flight: against `generate()` one by one", f"{d['speedup_vs_serial']:.1f}x {in_flight}"
    yield "16 equal prompts: against diffusers' pipeline in lock-step batches", f"{d['speedup_vs_diffusers']:.1f}x"
    yield "the scheduler's own time per row and step, 64 rows", f"{d['scheduler_us_per_row']:.1f} µs"


def short_refine(line):
    for point in line.data["points"]:
        if point["mode"] == "greedy" and point.get("ratio_vs_diffusers_step"):
            rows = f"{point['rows']} row{'s' * (point['rows'] != 1)}"
            yield (
                f"refinement step, {rows}, {point['vocab']} ids: against diffusers' `scheduler.step`",
                f"{point['ratio_vs_diffusers_step']:.1f}x",
            )
    d = line.data
    counts = ", ".join(str(d[name]) for name in ("launches", "launches_temperature", "launches_sampling"))
    yield (
        "launches of its kernels: greedy, temperature, with top-k or top-p",
        f"{counts}; host syncs: {d['host_syncs']}",
    )


def short_quality(line):
    d = line.data
    usual = [p for p in d["settings"] if p["threshold"] and p.get("block_length") == d.get("block_length")]
    chosen = [p for p in usual if (p["threshold"], p["editing"]) == (d["threshold"], d["editing"])]
    chosen += [p for p in usual if p["threshold"] == min(p["threshold"] for p in usual)]
    for i, point in enumerate(chosen):
        what = "the same" if i else f"embedded model, {d['prompts_per_task']} unseen prompts for each of five tasks"
        speed = f", {point['tok_s']:.0f} tok/s" if point.get("tok_s") else ""
        yield (
            f"{what}, threshold {point['threshold']:g}, editing {point['editing']}: exact match",
            f"{point['accuracy']:.3f} at TPF {point['tpf']:.2f}{speed}",
        )


def short_sampling(line):
    by_model = {}
    for entry in line.data["draws"]:
        by_model.setdefault(entry["model"], {})[sampling.draw_of(entry)] = entry
    for model, draws in by_model.items():
        greedy, cold = draws["temperature 0"], draws["temperature 0.1"]
        told = [
            f"{title}: {cold[rule]['accuracy']:.3f} at TPF {cold[rule]['tpf']:.2f}"
            for rule, title in sampling.TITLES.items()
        ]
        yield (
            f"{model} model, {line.data['prompts_per_task']} unseen prompts for each of five tasks, temperature 0.1: "
            "exact match by confidence",
            f"{'; '.join(told)} (greedy: {greedy['own']['accuracy']:.3f} at {greedy['own']['tpf']:.2f})",
        )


SHORT = {
    "decode": short_decode, "engine": short_engine, "bench_refine": short_refine, "quality": short_quality,
    "sampling": short_sampling,
}  # fmt: skip


def short_table(lines):
    """README's table: what, result, and the number of the result line, which are listed below."""
    rows, sources = [], []
    for benchmark, rows_of in SHORT.items():
        for line in newest(lines, benchmark)[:1]:
            sources.append(f"{len(sources) + 1}. {line}")
            rows += [{"what": what, "result": result, "line": len(sources)} for what, result in rows_of(line)]
    body = table([("what", "what", "{}"), ("result", "result", "{}"), ("line", "line", "[{}]")], rows)
    return f"{body}\n\nResult lines, all in `benchmarks/results/`:\n\n" + "\n".join(sources)


# GPU: a line per point.


def gpu_lines(lines):
    """{device: {point: Line}}, the newest of each that measured something; the device that ran last first."""
    devices = {}
    for line in lines:
        if line.data["benchmark"] == "gpu" and not line.data.keys() & {"error", "skipped"}:
            own = devices.pop(line.data["device"], {})
            devices[line.data["device"]] = own | {line.data["point"]: line}
    return dict(reversed(devices.items()))


def gpu_blocks(lines, body):
    """body({device: {point: data}}), headed by where each device's lines are."""
    heads, devices = [], {}
    for device, points in gpu_lines(lines).items():
        times, commits = ({line.data[key] for line in points.values()} for key in ("time", "commit"))
        heads.append(
            f"{device}: {len(points)} lines of `gpu.jsonl`, {min(times)} to {max(times)}, "
            f"commit {', '.join(sorted(map(str, commits)))}, by `python -m benchmarks.gpu`"
        )
        devices[device] = {name: line.data for name, line in points.items()}
    if not devices:
        return NOT_MEASURED.format("gpu") + " Every GPU speed is open."
    return "\n\n".join([*heads, body(devices)])


def card(device):
    """What a table calls a device, or a GPU of roofline."""
    gpu = device if device in GPUS else gpu_of(device)
    return gpu.upper() if gpu else device


def side_by_side(devices, columns):
    """The columns of each device, of what a row has under the device's name; headed by it where there are several."""
    return [
        (f"{card(device)}: {heading}" if len(devices) > 1 else heading,
         lambda row, device=device, key=key: row.get(device, {}).get(key), form)
        for device in devices
        for heading, key, form in columns
    ]  # fmt: skip


def gpu_goals(devices):
    judged = {device: judge(points) for device, points in devices.items()}
    rows = [
        {"goal": goal.text} | {device: verdicts[i]._asdict() for device, verdicts in judged.items()}
        for i, goal in enumerate(GOALS)
    ]
    columns = [("limit", "limit", "{}"), ("measured", "value", "{:.4g}"), ("verdict", "verdict", "{}")]
    return table([("goal", "goal", "{}"), *side_by_side(devices, columns)], rows)


def gpu_points(devices):
    """All times, a table per device and section; of a point that is none (ceilings, gates) what the suite itself
    prints is in its line."""
    columns = [
        ("point", "point", "{}"), ("tok/s", "tok_s", "{:.0f}"), ("ms per forward", "ms_per_forward", "{:.2f}"),
        ("of these at work", "busy_ms_per_forward", "{:.2f}"), ("µs", "us", "{:.1f}"), ("ms", "ms", "{:.3f}"),
        ("floor µs", "floor_us", "{:.1f}"), ("floor ms", "floor_ms", "{:.3f}"), ("over floor", "over_floor", "{:.2f}x"),
        ("floor ms of the experts touched", "floor_touched_ms", "{:.3f}"),
        ("launches", "launches", "{}"), ("GB/s", "gb_s", "{:.0f}"), ("reference µs", "reference_us", "{:.0f}"),
        ("peak GB", "peak_gb", "{:.1f}"), ("whole call tok/s", "call_tok_s", "{:.0f}"),
        ("diffusers tok/s", "diffusers_tok_s", "{:.0f}"), ("ours / diffusers", "ratio_vs_diffusers", "{:.1f}x"),
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
    found = [(device, data) for device, points in devices.items() for data in points.values() if "kernels" in data]
    parts = []
    for device, data in found:
        times = f"{data['ms']:.3f} ms, of which {data['gaps_ms']:.3f} ms between its {data['launches']} launches"
        rows = [row for row in data["kernels"] if row["total_us"] >= LEAST_SHARE * 1e3 * data["kernels_ms"]]
        others = {
            "name": "others", "count": data["launches"] - sum(row["count"] for row in rows),
            "total_us": 1e3 * data["kernels_ms"] - sum(row["total_us"] for row in rows),
        }  # fmt: skip
        columns = [
            ("kernel", lambda row: f"`{row['name']}`", "{}"), ("grid", "grid", "{}"), ("count", "count", "{}"),
            ("mean µs", "us", "{:.2f}"), ("from", "least_us", "{:.2f}"), ("to", "most_us", "{:.2f}"),
            ("total µs", "total_us", "{:.0f}"),
        ]  # fmt: skip
        parts += [f"{card(device)}, {data['point']}: {times}", table(columns, [*rows, others])]
    return "\n\n".join(parts) or NOT_MEASURED.format("gpu --only profile")


def gpu_predictions(lines):
    """What was expected of each GPU beside what its lines say; the estimates stand there without a line, too."""
    of_gpu = {
        gpu_of(device): {name: line.data for name, line in points.items()}
        for device, points in gpu_lines(lines).items()
    }
    rows = [
        {"point": f"{point.point}: {point.unit}"}
        | {gpu: {"expected": spoken(value), "measured": of_gpu.get(gpu, {}).get(point.point, {}).get(point.field)}
           for gpu, value in point.expected.items()}
        for point in PREDICTIONS
    ]  # fmt: skip
    columns = [("expected", "expected", "{}"), ("measured", "measured", "{:.4g}")]
    gpus = list(dict.fromkeys(gpu for point in PREDICTIONS for gpu in point.expected))
    return table([("point", "point", "{}"), *side_by_side(gpus, columns)], rows)


def spoken(value):
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, tuple) else f"{value:g}"


# The blocks: name -> function of all lines.

NOT_MEASURED = "Not measured yet: `python -m benchmarks.{}` measures it."


def each_machine(benchmark, having, body):
    """body(line) for each machine's line that has something under the key `having`, headed by it."""

    def block(lines):
        parts = [f"{line}\n\n{body(line)}" for line in newest(lines, benchmark, having)]
        return "\n\n".join(parts) or NOT_MEASURED.format(f"{COMMANDS[benchmark]} --save")

    return block


BLOCKS = {
    "numbers": short_table,
    "gpu-goals": lambda lines: gpu_blocks(lines, gpu_goals),
    "gpu-points": lambda lines: gpu_blocks(lines, gpu_points),
    "gpu-profile": lambda lines: gpu_blocks(lines, gpu_profile),
    "gpu-predictions": gpu_predictions,
    "decode-points": each_machine("decode", "points", decode_points),
    "decode-ablations": each_machine("decode", "ablations", decode_ablations),
    "decode-cost": each_machine("decode", "cost", decode_cost),
    "layer": each_machine("layer", "layers", layer_share),
    "engine-load": each_machine("engine", "in_flight", engine_load),
    "throughput": each_machine("throughput", "output_throughput", waits),
    "latency": each_machine("latency", "iterations", waits),
    "quality-settings": each_machine("quality", "settings", quality_settings),
    "sampling": each_machine("sampling", "draws", sampling_draws),
    "refine-points": each_machine("bench_refine", "points", refine_points),
    "kernel-ops": each_machine("kernels", "ops", kernel_ops),
    "counts": each_machine("counts", "kernels", counted),
    "counts-forwards": each_machine("counts", "decodings", counted_forwards),
}
