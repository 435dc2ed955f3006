"""The plots of benchmarks.report: data of the result lines, and how they are drawn."""

import hashlib
import inspect
import json
from functools import partial

from ..harness import drawing
from ..policies.compare import draw as draw_policies
from ..quality import draw as draw_quality
from .tables import card, gpu_lines, newest_plain, threads

# What is drawn, taken from the lines (None where they have it not), and how.


def first(lines, benchmark, key):
    """The data of the plain line with `key` of the machine that ran last, or None."""
    return next((line.data for line in newest_plain(lines, benchmark, key)[:1]), None)


def peers_data(lines):
    """Groups of bars: {group: {who: tokens/s}}: prompts of several lengths, all else as at the first point."""
    groups, decode, engine = {}, first(lines, "decode", "points"), first(lines, "engine", "serial_tok_s")
    names = {"tok_s": "llada2_fast", "diffusers_tok_s": "diffusers", "card_tok_s": "model card's loop"}
    kept = ("generated", "batch", "threshold")
    points = decode["points"] if decode else []
    for point in sorted(points, key=lambda point: point["prompt"]):
        if all(point.get(key) == points[0].get(key) for key in kept) and point.get("diffusers_tok_s"):
            bars = {who: point[key] for key, who in names.items() if point.get(key)}
            groups[f"prompt {point['prompt']},\n{point['generated']} generated,\n{threads(decode)}"] = bars
    if engine:
        bars = {"llada2_fast": engine["tok_s"], "generate() one by one": engine["serial_tok_s"]}
        groups[f"16 requests\nin flight,\n{threads(engine)}"] = bars
    return groups and {"title": " / ".join(sorted({d["device"] for d in (decode, engine) if d})), "groups": groups}


def draw_peers(data, axes):
    names = list(dict.fromkeys(who for bars in data["groups"].values() for who in bars))
    for i, bars in enumerate(data["groups"].values()):
        for j, (who, value) in enumerate(bars.items()):
            at = i + (j - (len(bars) - 1) / 2) * 0.27
            axes.bar(at, value, 0.25, color=f"C{names.index(who)}")
            axes.annotate(f"{value:.0f}", (at, value), ha="center", va="bottom", fontsize=8)
    for i, who in enumerate(names):
        axes.bar(0, 0, color=f"C{i}", label=who)
    axes.set_xticks(range(len(data["groups"])), list(data["groups"]), fontsize=8)
    axes.set(ylabel="tokens/s", title=f"The same weights and prompts, equal tokens: {data['title']}")
    axes.legend()


def cost_data(lines):
    decode = first(lines, "decode", "cost")
    return decode and {"title": decode["device"], "cost": decode["cost"]}


def draw_cost(data, axes):
    for i, cost in enumerate(data["cost"]):
        slope, at_0, ends = cost["slope_ms_per_1k"], cost["intercept_ms"], (0, max(cost["prefix"]))
        axes.plot(cost["prefix"], cost["ms_per_block"], "o", color=f"C{i}")
        label = f"{cost['who']}: {at_0:.0f} ms + {slope:.1f} ms per 1024 tokens"
        axes.plot(ends, [at_0 + slope * x / 1024 for x in ends], color=f"C{i}", label=label)
    axes.set(xlabel="tokens before the block", ylabel="ms per block", ylim=0, title=f"Cost of a block: {data['title']}")
    axes.legend()


def quality_data(lines, benchmark="quality"):
    quality = first(lines, benchmark, "block_length")  # older lines have one length of blocks alone
    return quality and {key: quality[key] for key in ("settings", "block_length")}


def policies_data(lines):
    policies = first(lines, "policies", "policies")
    return policies and policies["policies"]


def gpu_data(lines):
    """Bars: {decoding, or step over 1024 tokens: [floor, measured]} in ms per forward, the devices side by side."""
    devices, steps = gpu_lines(lines), {}
    for name in dict.fromkeys(name for points in devices.values() for name in points):
        for device, points in devices.items():
            data = points.get(name, {})
            if "floor_ms" in data and (" p" not in name or " p1024" in name):
                bar = name + f", {card(device)}" * (len(devices) > 1)
                steps[bar] = [data["floor_ms"], data.get("ms") or data["ms_per_forward"]]
    return {"title": " / ".join(map(card, devices)), "steps": steps} if steps else None


def draw_gpu(data, axes):
    for i, (floor, ms) in enumerate(data["steps"].values()):
        axes.barh(i, ms, color="C0", label="" if i else "measured")
        axes.barh(i, floor, color="C1", label="" if i else "floor")
    axes.set_yticks(range(len(data["steps"])), list(data["steps"]), fontsize=7)
    axes.invert_yaxis()
    axes.figure.set_figheight(1.2 + 0.16 * len(data["steps"]))
    axes.set(xlabel="ms per step", xscale="log", title=f"Denoise steps and their floors: {data['title']}")
    axes.legend()


PLOTS = {  # file name -> (alternative text, data, drawing)
    "peers": ("tokens per second against peers", peers_data, draw_peers),
    "cost": ("cost of a block against its prefix", cost_data, draw_cost),
    "quality": ("accuracy against speed", quality_data, draw_quality),
    "quality-2.2": ("accuracy against speed of LLaDA2.2", partial(quality_data, benchmark="quality-2.2"), draw_quality),
    "policies": ("accuracy against tokens per forward by policy", policies_data, draw_policies),
    "gpu": ("time of a step against its floor", gpu_data, draw_gpu),
}


def images(lines):
    """Markdown of the plots that there are data for, as README shows them."""
    shown = [(name, text) for name, (text, data_of, _) in PLOTS.items() if data_of(lines)]
    return "\n\n".join(f"![{text}](benchmarks/plots/{name}.svg)" for name, text in shown)


def made_from(name, lines):
    """Fingerprint of what decides a plot, its data and the code that draws it; None without data. It is in the file."""
    _, data_of, how = PLOTS[name]
    data = data_of(lines)
    return data and hashlib.sha256((json.dumps(data) + inspect.getsource(how)).encode()).hexdigest()[:16]


def stale(folder, lines):
    """Names of the plots that are missing from the folder, or were made from something else."""

    def there(name, mark):
        path = folder / f"{name}.svg"
        return path.is_file() and mark in path.read_text("utf-8")

    return [name for name in PLOTS if (mark := made_from(name, lines)) and not there(name, mark)]


def draw(name, folder, lines):
    """Write <folder>/<name>.svg; the same bytes for the same lines and version of matplotlib."""
    from matplotlib import rc_context

    _, data_of, how = PLOTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    marks = {"Date": None, "Description": made_from(name, lines)}
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "llada2_fast", "font.size": 9}),
        drawing(folder / f"{name}.svg", marks, figsize=(8, 4)) as axes,
    ):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        how(data_of(lines), axes)
