"""The embedded model on prompts held out of its training, and the benchmark that measures it."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import harness, quality, sampling
from llada2_fast import DecodeParams, LLaDA2Model, demo
from llada2_fast.demo import tasks
from llada2_fast.weights.special_tokens import load_tokenizer


@pytest.fixture(scope="module")
def embedded():
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    return model, load_tokenizer(demo.path())


@pytest.fixture(scope="module")
def scores(embedded):
    own = embedded[0].block_length
    settings = [quality.Setting(threshold, "off", own) for threshold in (0.95, 0.9, 0.5, None)]
    settings[-1] = settings[-1]._replace(steps=own // 4)
    found = quality.measure(*embedded, n=10, settings=settings, progress=False)
    return {setting.threshold: by_task for setting, by_task in found.items()}


def test_held_out_prompts_are_answered_right_and_in_parallel(scores):
    by_task = scores[0.9]
    accuracy, tpf = quality.mean(by_task)
    assert set(by_task) == set(tasks.TASKS)
    assert accuracy >= 0.93 and min(score[0] for score in by_task.values()) >= 0.7
    assert tpf > 2 and min(score[1] for score in by_task.values()) > 2


def test_lower_thresholds_take_fewer_forwards(scores):
    tpf = {threshold: quality.mean(by_task)[1] for threshold, by_task in scores.items()}
    assert tpf[0.95] < tpf[0.9] < tpf[0.5]


def test_without_a_threshold_the_schedule_alone_decides(scores):
    """Four positions a step, so at most four tokens; what it spends behind the end token counts against it."""
    assert all(1 < tpf <= 4 for _, tpf in scores[None].values())


def test_settings_are_distinct_and_what_generate_takes():
    settings = quality.settings_of(16)
    assert len(set(settings)) == len(settings)
    assert quality.headline_of(16) in settings and set(quality.settings_of(16, quick=True)) < set(settings)
    for setting in settings:
        DecodeParams(**{name: value for name, value in setting.arguments().items() if name != "return_dict"})


def test_off_task_prompts_are_told_what_it_can_do(embedded):
    model, tokenizer = embedded
    prompts = ["Write a poem about love.", "Hello, who are you?", "Multiply 12 and 7."]
    rows = quality.encode(tokenizer, prompts)
    output = model.generate(rows, gen_length=64, threshold=0.9, eos_early_stop=True, return_dict=True)
    assert list(quality.decode(tokenizer, output)) == [tasks.FALLBACK] * 3


def test_benchmark_ends_with_its_json_line(capsys, tmp_path):
    quality.main(["--quick", "--n", "2", "--json", "--save", str(tmp_path / "results")])
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result = json.loads(line)
    assert 0 <= result["accuracy"] <= 1 and result["tpf"] > 1 and result["prompts_per_task"] == 2
    assert {"device", "versions", "commit", "time", "threads"} <= set(result)
    entries = {tuple(entry[name] for name in quality.Setting._fields): entry for entry in result["settings"]}
    assert list(entries) == quality.settings_of(result["block_length"], quick=True)
    headline = entries[quality.headline_of(result["block_length"])]
    assert headline.items() <= result.items() and set(result["tasks"]) == set(tasks.TASKS)
    assert all(entry["tok_s"] > 0 for entry in entries.values())
    assert len(table.splitlines()) == 2 + len(entries)
    assert (result["launches"], result["host_syncs"]) == (2, 0)
    assert (tmp_path / "results" / "quality.jsonl").read_text("utf-8") == line + "\n"


def test_quantised_weights_are_measured_and_named_and_so_is_a_variant(capsys, tmp_path):
    quality.main(
        ["--quick", "--n", "1", "--json", "--quantization", "int4", "--variant", "2.2", "--save", str(tmp_path)]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["benchmark"], result["quantization"]) == ("quality-2.2", "int4")
    assert (result["launches"], result["host_syncs"]) == (2, 0)  # where it deletes and inserts, too
    assert not any("window" in entry["editing"] for entry in result["settings"])
    assert [file.name for file in tmp_path.iterdir()] == ["quality-2.2.jsonl"]


def test_a_low_temperature_costs_the_less_trained_model_no_accuracy():
    settings = [sampling.Setting(t, None, None, rule) for t in (0.0, 0.1) for rule in ("own", "drawn")]
    settings.append(sampling.Setting(1.0, 1, None, "own"))
    greedy, cold, narrow = sampling.entries("undertrained", sampling.SIBLING, 24, settings)
    assert greedy["own"]["accuracy"] == greedy["drawn"]["accuracy"] > 0.6
    assert cold["own"]["accuracy"] > greedy["own"]["accuracy"] - 0.06  # 120 prompts
    assert cold["own"]["tpf"] < 1.1 * greedy["own"]["tpf"]
    assert cold["drawn"]["accuracy"] < greedy["own"]["accuracy"] - 0.1  # the trap
    assert cold["drawn"]["tpf"] > 1.4 * greedy["own"]["tpf"]
    assert narrow["own"] == greedy["own"]


def test_drawn_tokens_end_with_their_json_line(capsys, tmp_path):
    sampling.main(["--quick", "--n", "2", "--json", "--save", str(tmp_path), "--model", demo.path()])
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result = json.loads(line)
    assert [entry["model"] for entry in result["draws"]] == ["embedded"] * len(sampling.QUICK_DRAWS)
    drawn = [(entry["temperature"], entry["top_k"], entry["top_p"]) for entry in result["draws"]]
    assert drawn == list(sampling.QUICK_DRAWS)
    assert all(0 <= entry[rule]["accuracy"] <= 1 for entry in result["draws"] for rule in sampling.RULES)
    assert len(table.splitlines()) == 1 + len(result["draws"])
    assert (tmp_path / "sampling.jsonl").read_text("utf-8") == line + "\n"


def test_the_picture_has_a_line_per_mode_and_all_labels(scores):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    by_setting = {quality.Setting(threshold, "off", 16, 4): by_task for threshold, by_task in scores.items()}
    by_setting[quality.headline_of(16)] = scores[0.9]
    result = quality.summary(by_setting, dict.fromkeys(by_setting, 1000.0), 16)
    figure, axes = pyplot.subplots()
    quality.draw(result, axes, "tpf")
    assert [line.get_label() for line in axes.lines] == list(quality.modes(result)) and len(axes.lines) == 2
    drawn = [label for text in axes.texts for label in text.get_text().split(", ")]
    assert sorted(drawn) == sorted(map(quality.label_of, result["settings"]))
    pyplot.close(figure)


def test_results_are_appended_and_printed_only_when_asked(capsys, tmp_path):
    for number in (1, 2):
        harness.finish("trial", Namespace(quick=False, json=False, save=tmp_path), {"number": number})
    lines = (tmp_path / "trial.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2] and capsys.readouterr().out == ""
    harness.finish("trial", Namespace(quick=False, json=True, save=None), {})
    assert json.loads(capsys.readouterr().out)["versions"]["python"] == sys.version.split()[0]


def test_timed_rounds_take_turns():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert len(harness.timed_rounds(calls, 3)) == 2 and order == ["a", "b"] * 3


def test_wrong_answers_count_as_wrong(embedded):
    output = Namespace(sequences=torch.tensor([[0, 0]]), num_tokens=[1], finish_reasons=["eos"], tokens_per_forward=1.0)
    assert list(quality.decode(embedded[1], output)) == [""]
