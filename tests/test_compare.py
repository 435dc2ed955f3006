"""What the comparison of result lines calls better, worse and the same."""

import copy
import json
import random

import pytest

from benchmarks import compare
from benchmarks.harness import RESULTS

LINE = {
    "benchmark": "decode", "time": "2026-01-01T00:00:00+00:00", "quick": False, "device": "Test CPU", "threads": 1,
    "cores": 2, "versions": {"torch": "2.13.0"}, "commit": "aaa", "peak_memory_bytes": 10**9,
    "goals": {"ratio": {"value": 11.0, "at_least": 10, "met": True}},
    "points": [
        {"prompt": prompt, "threshold": 2.0, "tok_s": 400.0, "std_tok_s": 0.0, "forwards": 128, "peak_bytes": 5000,
         "diffusers_tok_s": 40.0, "ratio_vs_diffusers": 10.0, "tpf": 4.0}
        for prompt in (64, 512)
    ],
    "cost": [
        {"who": who, "prefix": [64, 512], "ms_per_block": [70.0, 80.0], "slope_ms_per_1k": 10.0, "r2": 1.0}
        for who in ("ours", "diffusers")
    ],
}  # fmt: skip


def changed(commit="bbb", **values):
    """LINE with other values at its first point."""
    line = copy.deepcopy(LINE) | {"commit": commit}
    line["points"][0] |= values
    return line


def verdicts(old, new, **options):
    """{metric: verdict} of what is not the same."""
    findings, gone = compare.compare(old, new, **options)
    found = {str(finding.metric): finding.verdict for finding in findings if finding.verdict != "same"}
    return found | {str(metric): "gone" for metric in gone}


def at(name, prompt=64):
    return f"decode points.{name} (points.prompt={prompt}, points.threshold=2.0)"


def repeated(factor, count=5, seed=0):
    """Lines of one commit whose times scatter by 2 % around `factor` times those of LINE."""
    rng = random.Random(seed)
    return [changed(tok_s=400.0 * factor * (1 + rng.gauss(0, 0.02))) for _ in range(count)]


def test_a_line_is_the_same_as_itself():
    findings, gone = compare.compare([LINE], [LINE])
    assert {finding.verdict for finding in findings} == {"same"} and gone == []
    names = {finding.metric.name for finding in findings}
    assert names == {f"points.{name}" for name in ("tok_s", "forwards", "peak_bytes", "ratio_vs_diffusers", "tpf")} | {
        "cost.ms_per_block.0", "cost.ms_per_block.1", "cost.slope_ms_per_1k",
    }  # fmt: skip
    assert all(finding.ratio == 1 for finding in findings) and not any('diffusers"' in str(f.metric) for f in findings)


@pytest.mark.parametrize("values, verdict", [
    ({"tok_s": 300.0}, "worse"), ({"tok_s": 500.0}, "better"), ({"tok_s": 380.0}, "same"), ({"tok_s": 430.0}, "same"),
    ({"ratio_vs_diffusers": 7.0}, "worse"), ({"diffusers_tok_s": 10.0}, "same"),
    ({"forwards": 129}, "worse"), ({"forwards": 127}, "better"), ({"peak_bytes": 5001}, "worse"),
    ({"tpf": 3.99}, "worse"), ({"tpf": 4.01}, "better"),
], ids=str)  # fmt: skip
def test_direction_and_noise_of_single_lines(values, verdict):
    (name,) = values
    assert verdicts([LINE], [changed(**values)]) == ({} if verdict == "same" else {at(name): verdict})


def test_repeated_lines_show_what_one_line_cannot():
    name = at("tok_s")
    assert verdicts([LINE], [changed(tok_s=372.0)]) == {}
    assert verdicts(repeated(1.0), repeated(0.93, seed=1)) == {name: "worse"}
    assert verdicts(repeated(1.0), repeated(1.08, seed=1)) == {name: "better"}
    assert verdicts(repeated(1.0), repeated(0.93, seed=1), counted=True) == {}


def test_repeated_lines_of_one_speed_are_the_same():
    wrong = sum(verdicts(repeated(1.0, seed=2 * i), repeated(1.0, seed=2 * i + 1)) != {} for i in range(200))
    assert wrong <= 6  # of 200 at 99 %


def test_intervals_hold_the_true_ratio():
    """Of several sizes, also of a single line that has recorded its own spread."""
    rng = random.Random(0)
    for n, m in ((1, 1), (2, 3), (5, 1), (10, 10)):
        missed = 0
        for _ in range(300):
            sides = [[(rng.lognormvariate(mu, 0.05), 0.05) for _ in range(k)] for mu, k in ((0.0, n), (0.2, m))]
            metric = compare.Metric("decode", (("device", "x"),), "points.tok_s")
            low, high = compare.judge(metric, *sides).interval
            missed += not low <= 1.2214 <= high
        assert missed <= 12, (n, m)


def test_a_recorded_spread_takes_the_place_of_the_assumed_one():
    name = at("tok_s")
    tight = verdicts([changed(std_tok_s=2.0)], [changed(tok_s=380.0, std_tok_s=2.0)])
    wide = verdicts([changed(std_tok_s=100.0)], [changed(tok_s=300.0, std_tok_s=100.0)])
    assert (tight, wide) == ({name: "worse"}, {})
    assert verdicts([LINE], [changed(tok_s=300.0)], noise=0.5) == {}


def test_counts_alone():
    assert verdicts([LINE], [changed(tok_s=1.0, tpf=1.0)], counted=True) == {}
    assert verdicts([LINE], [changed(forwards=129)], counted=True) == {at("forwards"): "worse"}
    fewer = changed()
    del fewer["points"][0]
    assert verdicts([LINE], [fewer], counted=True) == {at("forwards"): "gone", at("peak_bytes"): "gone"}


def test_times_of_another_machine_are_not_compared_but_counts_are():
    other = changed(tok_s=1.0, forwards=129) | {"device": "Other CPU"}
    assert verdicts([LINE], [other]) == {at("forwards"): "worse"}


def test_compiled_code_is_compared_within_a_version_of_triton():
    old = {"benchmark": "counts", "part": "aot", "compiled": [{"triton": "3.7.1", "kernel": "a", "registers": 40}]}
    new = copy.deepcopy(old)
    new["compiled"][0]["registers"] = 41
    assert list(verdicts([old], [new], counted=True).values()) == ["worse"]
    new["compiled"][0]["triton"] = "3.8.0"
    assert verdicts([old], [new], counted=True) == {}
    new["compiled"][0] |= {"triton": "3.7.1", "kernel": "b"}
    assert list(verdicts([old], [new], counted=True).values()) == ["gone"]


def test_of_a_file_the_newest_commit_counts_or_what_is_asked_for(tmp_path):
    path = tmp_path / "decode.jsonl"
    lines = [changed("aaa", tok_s=200.0), changed("bbb", tok_s=300.0), changed("bbb", tok_s=310.0)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    def speeds(argument):
        found = compare.gather(compare.select(argument)).items()
        return next([value for value, _ in samples] for m, samples in found if str(m) == at("tok_s"))

    assert speeds(str(path)) == [300.0, 310.0]
    assert speeds(f"{path}:1") == [200.0] and speeds(f"{path}:-1") == [310.0] and speeds(f"{path}@aaa") == [200.0]
    for wrong, why in ((f"{path}:4", "from 1 to 3"), (f"{path}@ccc", "no such"), ("nowhere.jsonl", "no file")):
        with pytest.raises(ValueError, match=why):
            compare.select(wrong)


@pytest.mark.parametrize("name, values, code", [
    ("same", {}, 0), ("worse", {"tok_s": 300.0}, 1), ("better", {"tok_s": 500.0}, 0),
])  # fmt: skip
def test_exit_codes(tmp_path, capsys, name, values, code):
    for file, line in (("old", LINE), ("new", changed(**values))):
        (tmp_path / file).write_text(json.dumps(line) + "\n", "utf-8")
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == code
    said = capsys.readouterr().out
    assert f"1 {name}" in said if values else "0 worse, 0 better" in said


def test_nothing_to_compare_and_bad_arguments_exit_2(tmp_path, capsys):
    (tmp_path / "old").write_text(json.dumps(LINE), "utf-8")
    (tmp_path / "new").write_text(json.dumps({"benchmark": "other", "tok_s": 1.0}), "utf-8")
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "old"), "nowhere"])
    assert "there is no file nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_no_figure_of_the_committed_lines_is_overlooked(path):
    """A float is a metric, a setting, or named as of no interest."""

    def floats(data):
        for key, value in data.items() if isinstance(data, dict) else ():
            if compare.kind_of(key) != "ignored":
                values = value if isinstance(value, list) else [value]
                if not key.isdigit() and any(isinstance(v, float) for v in values):
                    yield key
                for entry in values:
                    yield from floats(entry)

    keys = {key for line in path.read_text("utf-8").splitlines() for key in floats(json.loads(line))}
    assert [key for key in sorted(keys) if compare.kind_of(key) is None] == []
