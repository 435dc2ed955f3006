"""Tables and plots come from the result lines alone, and what was typed by hand is noticed."""

import json
import shutil

import pytest

from benchmarks.harness import ROOT
from benchmarks.report import __main__ as report
from benchmarks.report import plots
from benchmarks.report import tables as report_tables

CARD = {"device": "Test CPU", "threads": 1, "versions": {"torch": "2.13.0"}, "commit": "abc1234"}
DECODE = {
    "benchmark": "decode", "time": "2026-01-02T03:04:05+00:00", "quick": False, **CARD,
    "points": [
        {"factor": "base", "prompt": 512, "generated": 512, "batch": 1, "threshold": 2.0, "tok_s": 432.4, "tpf": 4.0,
         "forwards": 128, "peak_bytes": 5_000_000, "diffusers_tok_s": 38.26, "diffusers_peak_bytes": 50_000_000,
         "ratio_vs_diffusers": 11.302, "card_tok_s": None, "ratio_vs_card": None},
        {"factor": "prompt", "prompt": 64, "generated": 512, "batch": 1, "threshold": 2.0, "tok_s": 500.0, "tpf": 4.0,
         "forwards": 128, "peak_bytes": 4_000_000, "diffusers_tok_s": None, "ratio_vs_diffusers": None},
    ],
    "cost": [{"who": "ours", "prefix": [64, 1088], "ms_per_block": [70.0, 81.0], "intercept_ms": 69.3125,
              "slope_ms_per_1k": 11.0, "r2": 1.0}],
}  # fmt: skip
OLD_DECODE = {
    "benchmark": "decode", "time": "2025-01-01T00:00:00+00:00", "quick": False, **CARD, "device": "Old CPU",
    "points": [{"prompt": 512, "generated": 512, "tok_s": 400.0, "diffusers_tok_s": 40.0, "ratio_vs_diffusers": 10.0}],
}  # fmt: skip
SAMPLING = {
    "benchmark": "sampling", "time": "2026-01-02T03:04:05+00:00", "quick": False, **CARD, "prompts_per_task": 120,
    "draws": [
        {"model": "m", "temperature": 0.0, "top_k": None, "top_p": None,
         "own": {"accuracy": 0.7, "tpf": 4.5, "tasks": {"a": 0.8, "b": 0.6}},
         "drawn": {"accuracy": 0.7, "tpf": 4.4, "tasks": {"a": 0.7, "b": 0.7}},
         "single": {"accuracy": 0.75, "tpf": 0.9, "tasks": {"a": 1.0, "b": 0.5}}},
        {"model": "m", "temperature": 0.1, "top_k": None, "top_p": None,
         "own": {"accuracy": 0.69, "tpf": 4.6, "tasks": {"a": 0.88, "b": 0.5}},
         "drawn": {"accuracy": 0.5, "tpf": 8.0, "tasks": {"a": 0.25, "b": 0.75}},
         "single": {"accuracy": 0.75, "tpf": 0.9, "tasks": {"a": 1.0, "b": 0.5}}},
        {"model": "m", "temperature": 1.0, "top_k": 1, "top_p": None,
         "own": {"accuracy": 0.7, "tpf": 4.5, "tasks": {"a": 0.8, "b": 0.6}},
         "drawn": {"accuracy": 0.4, "tpf": 8.25, "tasks": {"a": 0.3, "b": 0.5}},
         "single": {"accuracy": 0.75, "tpf": 0.9, "tasks": {"a": 1.0, "b": 0.5}}},
    ],
}  # fmt: skip
README = """# A project

3.5x is history here.

## Numbers

<!-- report:numbers -->
11.9x, typed by hand
<!-- /report -->

<!-- report:plots -->
<!-- /report -->

More words.
"""
TABLES = """# Benchmarks

<!-- report:decode-points -->
<!-- /report -->
<!-- report:decode-cost -->
<!-- /report -->
<!-- report:gpu-goals -->
<!-- /report -->
"""
WANTED = """## Numbers

<!-- report:numbers -->
| what | result | line |
| --- | --- | --- |
| 512-token prompt, 512 generated, batch 1: against diffusers' pipeline driving the same network, tokens equal | 11.3x \
(432 against 38.3 tok/s) | [1] |
| the same: peak bytes during the call, as a share of those of diffusers | 10% | [1] |
| cost of a block by the tokens before it, ours | 69.3 ms + 11.0 ms per 1024 tokens (R² 1.000) | [1] |

Result lines, all in `benchmarks/results/`:

1. `decode.jsonl`, 2026-01-02T03:04:05+00:00, commit abc1234, by `python -m benchmarks.bench_decode --save` on \
Test CPU, 1 thread, torch 2.13.0
<!-- /report -->

<!-- report:plots -->
![tokens per second against peers](benchmarks/plots/peers.svg)

![cost of a block against its prefix](benchmarks/plots/cost.svg)
<!-- /report -->

More words.
"""


@pytest.fixture
def root(tmp_path):
    """A repository with two decode lines, and the texts above."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    write(tmp_path, OLD_DECODE, DECODE)
    (tmp_path / "README.md").write_text(README, "utf-8")
    (tmp_path / "benchmarks" / "README.md").write_text(TABLES, "utf-8")
    return tmp_path


def write(root, *lines, name="decode"):
    path = root / "benchmarks" / "results" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def check(root, capsys):
    """(exit code of --check, what it said)."""
    capsys.readouterr()
    return report.main(["--check"], root), capsys.readouterr().out


def test_the_committed_texts_and_plots_are_what_the_lines_give():
    assert report.faults(ROOT, report_tables.read(ROOT / "benchmarks" / "results")) == []


def test_int4_stands_beside_the_weights_as_they_are():
    sizes = {"weight_bytes": 3_000_000, "wide_weight_bytes": 9_040_000}
    line = report_tables.Line("decode.jsonl", DECODE | {"int4": {"tok_s": 216.2, "ratio": 0.5} | sizes})
    assert report.BLOCKS["decode-int4"]([line]).splitlines()[4:] == ["| 216 | 0.50x | 3.0 | 9.0 |"]
    older = report_tables.Line("decode.jsonl", DECODE)
    assert report.BLOCKS["decode-int4"]([older]).startswith("Not measured yet: `python -m benchmarks.bench_decode")


def test_both_rules_of_drawn_tokens_stand_side_by_side():
    line = report_tables.Line("sampling.jsonl", SAMPLING)
    assert report.BLOCKS["sampling"]([line]).splitlines()[4:] == [
        "| m | temperature 0 | 0.700 | 0.600 | 4.50 | 0.700 | 0.700 | 4.40 | 0.750 | 0.500 | 0.90 |",
        "| m | temperature 0.1 | 0.690 | 0.500 | 4.60 | 0.500 | 0.250 | 8.00 | 0.750 | 0.500 | 0.90 |",
        "| m | temperature 1, top_k 1 | 0.700 | 0.600 | 4.50 | 0.400 | 0.300 | 8.25 | 0.750 | 0.500 | 0.90 |",
    ]
    assert report.BLOCKS["numbers"]([line]).splitlines()[2] == (
        "| m model, 120 unseen prompts for each of five tasks, temperature 0.1: exact match by confidence "
        "| the model's own softmax: 0.690 at TPF 4.60; probability of the draw: 0.500 at TPF 8.00; "
        "one token a step: 0.750 at TPF 0.90 (greedy: 0.700 at 4.50) | [1] |"
    )


def test_every_block_there_is_stands_in_a_file():
    shown = [name for file in report.FILES for name, _ in report.BLOCK.findall((ROOT / file).read_text("utf-8"))]
    assert sorted(shown) == sorted(report.BLOCKS)


def test_a_line_becomes_the_readme_to_the_letter(root, capsys):
    assert report.main([], root) == 0
    text = (root / "README.md").read_text("utf-8")
    assert text == README.partition("## Numbers")[0] + WANTED
    assert check(root, capsys) == (0, "all from the result lines\n")
    tables = (root / "benchmarks" / "README.md").read_text("utf-8")
    assert tables.index("Test CPU") < tables.index("Old CPU")  # each machine, the last one first
    assert "| base | 512 | 512 | 1 | 2.0 | 432 | 4.00 | 128 | 5.0 | 38.3 | 11.3x | 50.0 |\n" in tables
    assert "| 512 | 512 | 400 | 40.0 | 10.0x |\n" in tables  # without the columns that the old line lacks
    assert tables.count("ms per block") == 1 and "Not measured yet: `python -m benchmarks.gpu`" in tables


def test_check_writes_nothing_and_names_what_differs(root, capsys):
    code, said = check(root, capsys)
    assert code == 1 and "README.md: report:numbers is not" in said and "plots/peers.svg is not" in said
    assert (root / "README.md").read_text("utf-8") == README and not (root / "benchmarks" / "plots").exists()


@pytest.mark.parametrize("place, old, new, fault", [
    ("README.md", "11.3x", "11.4x", "report:numbers"),
    ("README.md", "More words", "12.5x faster", "'12.5x' is typed by hand"),
    ("README.md", "More words", "it takes 3 ms", "'3 ms' is typed by hand"),
    ("benchmarks/README.md", "# Benchmarks", "# 40 tok/s", "'40 tok/s' is typed by hand"),
])  # fmt: skip
def test_check_notices_a_number_typed_by_hand(root, capsys, place, old, new, fault):
    report.main([], root)
    text = (root / place).read_text("utf-8")
    (root / place).write_text(text.replace(old, new), "utf-8")
    code, said = check(root, capsys)
    assert code == 1 and fault in said and len(said.splitlines()) == 2


@pytest.mark.parametrize("words", ["128 x 128 weights", "sm_90", "mini 16B", "at 512/512", "prefix 1K", "V = 157184"])
def test_numbers_that_measure_nothing_may_be_typed(words):
    assert report.typed(f"# x\n## Numbers\n{words}\n## Next\n3 ms\n", "## Numbers") == []


def test_check_notices_a_newer_line(root, capsys):
    report.main([], root)
    write(root, OLD_DECODE, DECODE, DECODE | {"time": "2026-02-01T00:00:00+00:00", "commit": "def5678"})
    assert check(root, capsys)[0] == 1
    report.main([], root)
    assert "def5678" in (root / "README.md").read_text("utf-8") and check(root, capsys)[0] == 0


def test_full_runs_go_before_quick_ones_and_newer_before_older():
    line = DECODE | {"quick": True, "time": "2026-05-05T00:00:00+00:00"}
    full = report_tables.Line("decode.jsonl", DECODE)
    quick, old = (report_tables.Line("decode.jsonl", data) for data in (line, OLD_DECODE))
    assert report_tables.newest([old, full, quick], "decode") == [full, old]
    assert report_tables.newest([old, quick], "decode") == [quick, old]
    assert report_tables.newest([old, full], "decode", "cost") == [full]


def test_quantised_lines_stand_beside_the_plain_one():
    def line(day, accuracy, **kind):
        point = {"threshold": 0.9, "editing": "off", "block_length": 16, "steps": 32, "accuracy": accuracy, "tpf": 8.5,
                 "tok_s": 1500.0, "tasks": {"a": {"accuracy": accuracy - 0.125}, "b": {"accuracy": 1.0}}}  # fmt: skip
        head = {"benchmark": "quality", "quick": False, **CARD, "time": f"2026-01-0{day}T00:00:00+00:00"}
        return report_tables.Line("quality.jsonl", head | point | {"settings": [point], "prompts_per_task": 120} | kind)

    plain, fp8, int4 = line(1, 0.75), line(2, 0.25, quantization="fp8"), line(3, 0.5, quantization="int4")
    lines = [plain, fp8, int4]
    assert report_tables.newest(lines, "quality") == [int4, fp8, plain]
    for shown in (lines, [plain]):
        settings = report.BLOCKS["quality-settings"](shown)
        assert settings.splitlines()[4:] == ["| 0.9 | off | 16 | 32 | 0.750 | 0.625 | 8.50 | 1500 |"]
        assert "exact match | 0.750 at TPF 8.50, 1500 tok/s | [1] |" in report.BLOCKS["numbers"](shown)
        assert plots.quality_data(shown)["settings"] == plain.data["settings"]
    for shown in (lines, [line(0, 0.125, quantization="int4"), *lines]):
        head, rows = report.BLOCKS["quality-quantization"](shown).split("| weights |")
        assert "by `python -m benchmarks.quality --quantization int4 --save`" in head
        assert head.count("`quality.jsonl`") == 3 and "quality --save`" in head
        assert rows.splitlines()[2:] == [
            "| as they are | 0.750 | 0.625 | 8.50 |",
            "| fp8 | 0.250 | 0.125 | 8.50 |",
            "| int4 | 0.500 | 0.375 | 8.50 |",
        ]
    assert "Not measured yet" in report.BLOCKS["quality-quantization"]([plain])
    assert "Not measured yet" in report.BLOCKS["quality-settings"]([int4])


def test_policies_become_a_table_a_line_of_the_short_one_and_a_plot(tmp_path):
    def entry(policy, in_product, median, leads):
        short = {"answers": 3, "tpf": 2.5}
        point = {"knob": 0.3, "accuracy": 0.75, "tpf": 4.5, "short": short, "leads": bool(leads)}
        gain = {"best": median, "at": median and 0.75, "median": median, "points": int(median is not None)}
        own = {"model": "m", "policy": policy, "in_product": in_product, "aup": 345.25}
        return point | own | {"knob": "bound", "gain": gain, "leads": leads, "points": [point]}

    entries = [entry("threshold", True, 1.0, 0), entry("entropy", True, 1.25, 1), entry("credit", False, 9.0, 0)]
    entries.append(entry("self_speculative", True, None, 0))  # accurate beyond the threshold rule
    data = {"benchmark": "policies", "quick": False, **CARD, "time": "2026-01-05T00:00:00+00:00", "prompts_per_task": 5}
    lines = [report_tables.Line("policies.jsonl", data | {"policies": entries})]
    head, rows = report.BLOCKS["policies"](lines).split("| model |")
    assert "by `python -m benchmarks.quality --policies --save`" in head
    assert rows.splitlines()[2:] == [
        "| m | threshold | yes | 0.750 | 4.50 | 2.50 | 345.2 | 1.00x | 1.00x at 0.750 | 0 of 1 |",
        "| m | entropy | yes | 0.750 | 4.50 | 2.50 | 345.2 | 1.25x | 1.25x at 0.750 | 1 of 1 |",
        "| m | credit | no | 0.750 | 4.50 | 2.50 | 345.2 | 9.00x | 9.00x at 0.750 | 0 of 1 |",
        "| m | self_speculative | yes | 0.750 | 4.50 | 2.50 | 345.2 |  |  | 0 of 1 |",
    ]
    assert "| m | entropy | bound | 0.3: 0.750 at 4.50 |" in report.BLOCKS["policies-points"](lines)
    short = next(row for row in report.BLOCKS["numbers"](lines).splitlines() if row.startswith("| m model"))
    assert "policy entropy," in short and "1.25x in the median of 1 accuracies, 1.25x at 0.750 | [1] |" in short
    pytest.importorskip("matplotlib")
    plots.draw("policies", tmp_path, lines)
    drawn = (tmp_path / "policies.svg").read_text("utf-8")
    assert all(f">{word}<" in drawn for word in ("m", "threshold", "entropy", "credit", "the frontier"))


def test_readme_says_of_quantised_weights_what_the_lines_say():
    lines = report_tables.newest(report_tables.read(ROOT / "benchmarks" / "results"), "quality", "settings")
    right = {line.data.get("quantization"): f"{line.data['accuracy']:.1%}".replace("%", " %") for line in lines}
    count = {5 * line.data["prompts_per_task"] for line in lines}
    assert count == {600} and right[None] == right["int4"]
    said = (
        f"Of 600 prompts the embedded model answers {right[None]} right in float32 and in int4, {right['fp8']} in fp8"
    )
    assert said in " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_plots_are_drawn_anew_only_where_their_data_changed(root):
    report.main([], root)
    folder, lines = root / "benchmarks" / "plots", report_tables.read(root / "benchmarks" / "results")
    assert plots.stale(folder, lines) == []
    before = (folder / "peers.svg").read_bytes()
    plots.draw("peers", folder, lines)
    assert (folder / "peers.svg").read_bytes() == before  # the same bytes for the same line
    lines[-1].data["points"][0]["tok_s"] += 1
    assert plots.stale(folder, lines) == ["peers"]


def test_gpu_lines_become_goals_points_and_a_plot(root):
    step = {"benchmark": "gpu", "dry_run": False, "section": "steps", "seconds": 1.0, **CARD, "device": "Test GPU"}
    step |= {"point": "step mini bf16 b1 p1024", "time": "2026-01-03T00:00:00+00:00"}
    figures = {"ms": 6.5, "floor_ms": 5.0, "over_floor": 1.3, "over_floor_default": 1.2, "host_syncs": 0,
               "launches_outside_graph": 1, "peak_gb": 34.0}  # fmt: skip
    failed = step | {"time": "2026-01-04T00:00:00+00:00", "error": "did not fit"}
    write(root, step | figures, failed, step | figures | {"dry_run": True, "device": "none"}, name="gpu")
    lines = report_tables.read(root / "benchmarks" / "results")
    goals, points = (report.BLOCKS[name](lines) for name in ("gpu-goals", "gpu-points"))
    assert goals.startswith("Test GPU: 1 lines of `gpu.jsonl`, 2026-01-03") and "none" not in goals
    assert "at most 1.25 (unknown device, H200's floor) | 1.2 | met |" in goals and "| not measured |" in goals
    assert "| step mini bf16 b1 p1024 | 6.500 | 5.000 | 1.30x | 34.0 |" in points
    plots.draw("gpu", root / "plots", lines)
    assert "Test GPU" in (root / "plots" / "gpu.svg").read_text("utf-8")


def test_two_cards_are_kept_apart_each_by_its_own_floor(root):
    def line(device, point, section, **values):
        now = {"time": "2026-01-03T00:00:00+00:00", "seconds": 1.0}
        return {"benchmark": "gpu", **CARD, **now, "device": device, "point": point, "section": section} | values

    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    kernel = {
        "name": "_gemm_kernel",
        "grid": "744x1x1",
        "count": 40,
        "us": 190.0,
        "total_us": 7600.0,
        "least_us": 120.0,
        "most_us": 270.0,
    }
    profile = {"ms": 9.5, "kernels_ms": 9.0, "gaps_ms": 0.5, "launches": 304, "kernels": [kernel], "rest": None}
    decode = "decode mini bf16 b1", "decode"
    write(
        root, line(h200, *decode, tok_s=900.0, ms_per_forward=7.4, floor_ms=5.0, over_floor=1.48),
        line(h100, *decode, tok_s=700.0, ms_per_forward=9.5, floor_ms=7.0, over_floor=1.36),
        line(h100, "step mini bf16 b1 p1024", "steps", ms=9.25, floor_ms=7.0, over_floor=1.32, launches=285),
        line(h100, "profile mini bf16 b1 carried", "profile", **profile), name="gpu",
    )  # fmt: skip
    lines = report_tables.read(root / "benchmarks" / "results")
    goals, points, profiles, predictions = (
        report.BLOCKS[f"gpu-{name}"](lines) for name in ("goals", "points", "profile", "predictions")
    )
    assert goals.splitlines()[0].startswith(f"{h100}: 3 lines") and goals.splitlines()[2].startswith(f"{h200}: 1 lines")
    wanted = "| at least 767.4 (H100; H200: 1100) | 700 | missed | at least 1100 (H200) | 900 | missed |"
    assert f"| mini bf16 b1: tokens/s at TPF 6.63 {wanted}" in goals
    of_h100, of_h200 = points.partition("H100, decode:")[2], points.partition("H200, decode:")[2]
    assert "| decode mini bf16 b1 | 700 | 9.50 | 7.000 | 1.36x |" in of_h100.partition("H200, ")[0]
    assert "| decode mini bf16 b1 | 900 | 7.40 | 5.000 | 1.48x |" in of_h200.partition("H100, ")[0]
    assert "H100, steps:\n\n| point | ms | floor ms | over floor | launches |\n" in points
    assert "| step mini bf16 b1 p1024 | 9.250 | 7.000 | 1.32x | 285 |" in of_h100 and "_gemm_kernel" not in points
    assert "H100, profile mini bf16 b1 carried: 9.500 ms, of which 0.500 ms between its 304 launches" in profiles
    assert "| `_gemm_kernel` | 744x1x1 | 40 | 190.00 | 120.00 | 270.00 | 7600 |" in profiles
    assert "| step mini bf16 b1 p1024: ms | 9.2 | 9.25 | 6.9 |  |" in predictions
    assert "| decode mini bf16 b1: tokens/s | 670 | 700 | 885 | 900 |" in predictions
    assert "| attention b8 p32768: percent of copy bandwidth | 72 to 78 |  |  |  |" in predictions
    assert "H100: measured" not in report.BLOCKS["gpu-predictions"]([])
    bars = plots.gpu_data(lines)["steps"]
    assert bars["decode mini bf16 b1, H100"] == [7.0, 9.5] and bars["step mini bf16 b1 p1024, H100"] == [7.0, 9.25]


def test_an_unknown_block_and_a_folder_without_readme_are_refused(root, capsys):
    with pytest.raises(ValueError, match="report:nothing: expected one of numbers"):
        report.render("<!-- report:nothing -->\n<!-- /report -->", [])
    shutil.rmtree(root / "benchmarks")
    with pytest.raises(SystemExit, match="2"):
        report.main([], root)
    assert "needs a checkout" in capsys.readouterr().err
