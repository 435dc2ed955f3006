"""The embedded model on prompts held out of its training, and the benchmark that measures it."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import harness, quality
from llada2_fast import LLaDA2Model, demo
from llada2_fast.demo import tasks
from llada2_fast.tokens import load_tokenizer


@pytest.fixture(scope="module")
def embedded():
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    return model, load_tokenizer(demo.path())


@pytest.fixture(scope="module")
def scores(embedded):
    return quality.measure(*embedded, n=10, thresholds=(0.95, 0.9, 0.5), editing=("off",), progress=False)


def test_held_out_prompts_are_answered_right_and_in_parallel(scores):
    by_task = scores[0.9, "off"]
    accuracy, tpf = quality.mean(by_task)
    assert set(by_task) == set(tasks.TASKS)
    assert accuracy >= 0.93 and min(score[0] for score in by_task.values()) >= 0.7
    assert tpf > 2 and min(score[1] for score in by_task.values()) > 2


def test_lower_thresholds_take_fewer_forwards(scores):
    tpf = {threshold: quality.mean(by_task)[1] for (threshold, _), by_task in scores.items()}
    assert tpf[0.95] < tpf[0.9] < tpf[0.5]


def test_off_task_prompts_are_told_what_it_can_do(embedded):
    model, tokenizer = embedded
    prompts = ["Write a poem about love.", "Hello, who are you?", "Multiply 12 and 7."]
    rows = quality.encode(tokenizer, prompts)
    output = model.generate(rows, gen_length=64, threshold=0.9, eos_early_stop=True, return_dict=True)
    assert list(quality.decode(tokenizer, output)) == [tasks.FALLBACK] * 3


def test_benchmark_ends_with_its_json_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(harness.finish, "__defaults__", ("cpu", tmp_path / "results"))
    quality.main(["--quick", "--n", "2", "--json", "--save"])
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result = json.loads(line)
    assert 0 <= result["accuracy"] <= 1 and result["tpf"] > 1 and result["prompts_per_task"] == 2
    assert {"device", "versions", "commit", "time", "threads"} <= set(result)
    settings = {(entry["threshold"], entry["editing"]): entry for entry in result["settings"]}
    assert set(settings) == {(threshold, edit) for threshold in quality.THRESHOLDS for edit in quality.EDITING}
    assert settings[0.9, "off"]["accuracy"] == result["accuracy"]
    assert settings[0.9, "off"]["tasks"] == result["tasks"] and set(result["tasks"]) == set(tasks.TASKS)
    assert len(table.splitlines()) == 1 + len(settings)
    assert (tmp_path / "results" / "quality.jsonl").read_text("utf-8") == line + "\n"


def test_results_are_appended_and_printed_only_when_asked(capsys, tmp_path):
    for number in (1, 2):
        harness.finish("trial", Namespace(quick=False, json=False, save=True), {"number": number}, folder=tmp_path)
    lines = (tmp_path / "trial.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2] and capsys.readouterr().out == ""
    harness.finish("trial", Namespace(quick=False, json=True, save=False), {}, folder=tmp_path)
    assert json.loads(capsys.readouterr().out)["versions"]["python"] == sys.version.split()[0]


def test_timed_rounds_take_turns():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert len(harness.timed_rounds(calls, 3)) == 2 and order == ["a", "b"] * 3


def test_wrong_answers_count_as_wrong(embedded):
    output = Namespace(sequences=torch.tensor([[0, 0]]), num_tokens=[1], finish_reasons=["eos"], tokens_per_forward=1.0)
    assert list(quality.decode(embedded[1], output)) == [""]
