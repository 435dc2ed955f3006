"""`llada2-fast bench`: every benchmark runs from the command line; none prints a time before its tokens are right."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_host, bench_latency, bench_structured, bench_throughput, harness, workload
from benchmarks.schemas import SCHEMAS
from llada2_fast import demo
from llada2_fast.cache import PagedKVCache
from llada2_fast.cli import commands as cli
from llada2_fast.cli import options
from llada2_fast.decoding.runner import CachedForward
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights.special_tokens import load_tokenizer

METRICS = {
    f"{which}_{name}_ms" for which in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")
}
CARD = {"benchmark", "time", "quick", "device", "cores", "threads", "versions", "commit", "peak_memory_bytes"}
SMALL = ["--no-progress", "--gen-length", "32"]


@pytest.fixture
def bench(capsys):
    """`llada2-fast bench` in this process: (exit code, stdout, stderr)."""

    def bench(*arguments):
        code = cli.main(["bench", *arguments])
        return code, *capsys.readouterr()

    return bench


def work_of(*arguments, count, size):
    """The workload of these options."""
    parser = argparse.ArgumentParser()
    workload.add_options(parser)
    return workload.Workload.of(parser.parse_args([*SMALL, *arguments]), count, size)


def line_of(result):
    """The JSON line that a benchmark has ended with."""
    code, out, err = result
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert CARD <= set(line)
    return line


def test_latency(bench, tmp_path):
    plot = tmp_path / "latency.png"
    result = bench(
        "latency", "--quick", "--batch-size", "2", "--json", "--save", str(tmp_path), "--plot", str(plot), *SMALL
    )
    line = line_of(result)
    assert "100.0% of the tokens are equal" in result[1].splitlines()[0]
    assert line["equal_tokens"] == 1.0 and line["batch_size"] == 2 and line["iterations"] == 3
    assert line["p10_e2el_ms"] <= line["median_e2el_ms"] <= line["p90_e2el_ms"]
    assert 0 < line["median_ttft_ms"] < line["median_e2el_ms"]
    assert line["median_forward_ms"] > 0 and line["median_output_throughput"] > 0
    assert line["tokens_per_forward"] > 1 <= line["steps_per_block"]
    assert line["block_ms_by_position"][0]["blocks"] == 6
    assert json.loads((tmp_path / "latency.jsonl").read_text("utf-8")) == line
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_throughput(bench, tmp_path):
    plot = tmp_path / "throughput.svg"
    few = ["--num-prompts", "5", "--num-rounds", "3", "--max-concurrency", "2"]
    line = line_of(bench("throughput", *few, "--json", "--plot", str(plot), *SMALL))
    assert {"duration", "completed", "failed", "request_throughput", "output_throughput", *METRICS} <= set(line)
    assert (line["completed"], line["failed"], line["equal_tokens"], line["shared_tokens"]) == (5, 0, 1.0, 0)
    assert line["output_throughput"] == pytest.approx(line["total_output_tokens"] / line["duration"])
    assert line["output_throughput"] == sorted(line["output_throughput_rounds"])[1]
    assert 0 < line["median_ttft_ms"] <= line["median_e2el_ms"] <= 1e3 * line["duration"]
    assert line["tokens_per_forward"] > 1 <= line["steps_per_block"]
    assert "<svg" in plot.read_text("utf-8")


def test_arrivals_at_a_rate_wait_for_their_turn(bench):
    few = ["--num-prompts", "4", "--num-rounds", "1", "--max-concurrency", "1", "--request-rate", "1e6"]
    line = line_of(bench("throughput", *few, "--json", *SMALL))
    assert line["request_rate"] == 1e6 and line["completed"] == 4
    assert line["p99_ttft_ms"] > line["p10_e2el_ms"]  # the last has waited until the first was done


def test_at_an_infinite_rate_all_arrive_at_once(bench):
    few = ["--num-prompts", "4", "--num-rounds", "1", "--max-concurrency", "1", "--request-rate", "inf"]
    line = line_of(bench("throughput", *few, "--json", *SMALL))
    assert line["request_rate"] == "inf" and line["completed"] == 4
    assert line["p99_ttft_ms"] > line["p10_e2el_ms"]  # the last has waited until the first was done
    work = work_of("--input-len", "3", count=1, size=6)
    jobs = [(prompt, options.params(work.decoding)) for prompt in work.batches[0]]
    served = bench_throughput.serve(bench_throughput.new_engine(work, 2), jobs, rate=float("inf"))
    assert len({one.arrived for one in served}) == 1 and all(one.output.error is None for one in served)


def test_an_answer_of_one_block_has_no_time_per_token(bench):
    few = ["throughput", "--num-prompts", "3", "--num-rounds", "1", "--input-len", "16", "--json", *SMALL]
    result = bench(*few, "--gen-length", "16")
    line = line_of(result)
    assert line["total_output_tokens"] == 48 and line["tpot_left_out"] == 3
    assert {line[f"{which}_tpot_ms"] for which in ("mean", "median", "std", "p10", "p90", "p99")} == {None}
    assert line["median_itl_ms"] is None and "without 3 answers that came at once" in result[1]


def test_the_time_per_token_is_that_of_the_answers_of_several_blocks():
    work = work_of("--input-len", "16", count=1, size=4)
    params = options.params(work.decoding)
    lengths = (1, 16, 17, 48)
    jobs = [(prompt, replace(params, gen_length=n)) for prompt, n in zip(work.batches[0], lengths, strict=True)]
    served = bench_throughput.serve(bench_throughput.new_engine(work, 8), jobs, 4)
    assert [len(one.commits) for one in served] == [1, 1, 2, 3]
    wanted = [(one.seconds - one.commits[0]) / (n - 1) for one, n in zip(served[2:], lengths[2:], strict=True)]
    figures = bench_throughput.summary(served, 1.0)
    assert figures["mean_tpot_ms"] == pytest.approx(500 * sum(wanted)) and figures["tpot_left_out"] == 2


def test_random_prompts_are_answered_to_their_full_length(bench):
    arguments = ["--input-len", "7", "--num-iters", "1", "--json", "--dtype", "bfloat16"]
    line = line_of(bench("latency", *arguments, *SMALL))
    assert line["total_output_tokens"] == 32 and line["input_len"] == 7
    assert (line["prompts"], line["dtype"]) == ("random tokens", "bfloat16")


def test_prompts_are_never_seen_twice():
    for arguments in ([], ["--input-len", "9"]):
        work = work_of(*arguments, count=4, size=8)
        prompts = {tuple(prompt) for batch in work.batches for prompt in batch}
        assert [len(batch) for batch in work.batches] == [8] * 4 and len(prompts) == 32
        mask = work.model.special_ids["mask_token_id"]
        assert all(mask not in prompt for prompt in prompts)


# The gate


def forgetful(self, *args, forward=CachedForward._forward):
    """A forward whose cache loses what it held, if several rows of 96 tokens share it."""
    if self.cache.num_pages > 96 // self.cache.block_length:
        self.cache.v.fill_(100.0)
    return forward(self, *args)


@pytest.mark.parametrize("arguments", [("latency", "--batch-size", "2"), ("throughput",)])
def test_wrong_tokens_end_a_benchmark_before_it_has_timed_anything(bench, monkeypatch, arguments):
    monkeypatch.setattr(CachedForward, "_forward", forgetful)
    code, out, err = bench(*arguments, "--quick", "--json", "--input-len", "64", *SMALL)
    assert (code, out) == (1, "")
    assert "of the tokens are equal, expected all of them; nothing is timed" in err


def test_the_gate_counts_missing_tokens(capsys):
    assert workload.require_equal([[1, 2, 3], [4]], [[1, 2, 3], [4]], "x", torch.float32) == 1.0
    assert workload.require_equal([[1, 2, 9], [4]], [[1, 2, 3], [4]], "x", torch.bfloat16) == 0.75
    for tokens in ([[1, 2]], [[1, 2, 3, 4]], [[1, 2, 4]]):
        with pytest.raises(SystemExit, match="x: .* expected all"):
            workload.require_equal(tokens, [[1, 2, 3]], "x", torch.float32)


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_what_a_benchmark_returns_is_the_exit_code(bench, monkeypatch, returned, code):
    monkeypatch.setitem(cli.BENCHMARKS, "another", ("another", "one more benchmark"))
    another = SimpleNamespace(main=lambda options: returned)
    monkeypatch.setitem(sys.modules, "llada2_fast.benchmarks.another", another)
    assert bench("another") == (code, "", "")


# The others


def test_quality(bench):
    line = line_of(bench("quality", "--quick", "--n", "1", "--json"))
    assert line["benchmark"] == "quality" and 0 <= line["accuracy"] <= 1


def test_structured(bench, tmp_path):
    pytest.importorskip("outlines_core")
    pytest.importorskip("jsonschema")
    plot = tmp_path / "structured.svg"
    few = ["--quick", "--schemas", "2", "--n", "6"]
    line = line_of(bench("structured", *few, "--json", "--save", str(tmp_path), "--plot", str(plot)))
    assert json.loads((tmp_path / "structured.jsonl").read_text("utf-8")) == line
    assert (line["ok"], line["valid"], line["invalid"]) == (True, 1.0, [])
    assert (line["schemas"], line["answers"], line["builds"]["refused"]) == (2, 8, {})  # 2 models, 2 draws
    assert (
        line["accuracy_constrained"] >= line["accuracy_free"] > 0.8 and line["tpf_constrained"] > 5 < line["tpf_free"]
    )
    assert line["launches_guided"] == line["launches_free"] == 3
    assert 0 < line["host_us_per_step"] == line["hosts"][0]["us_per_step"]
    assert 2 < line["builds"]["median_states"] <= line["builds"]["worst_states"] and line["builds"]["worst_ms"] > 0
    first, *_, last = line["points"]
    assert (first["model"], last["model"]) == ("embedded", "undertrained")
    assert last["constrained"]["accuracy"] > last["free"]["accuracy"]  # what is impossible is not written
    assert "<svg" in plot.read_text("utf-8")


@pytest.mark.parametrize("text, fault", [
    ('{"n": 3}', None),
    ('{"n": 30}', "30 is greater than the maximum of 12"),
    ('{"n": 3', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    ('{"n": NaN}', "NaN is no JSON"),
])  # fmt: skip
def test_an_answer_is_valid_if_it_parses_and_its_schema_allows_it(text, fault):
    pytest.importorskip("jsonschema")
    assert bench_structured.fault_of(text, SCHEMAS["nullable"]) == fault


def test_a_schema_that_is_refused_is_named_and_an_invalid_answer_is_counted(monkeypatch):
    pytest.importorskip("outlines_core")
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    schemas = {"boolean": SCHEMAS["boolean"], "not": {"not": {"type": "null"}}}
    monkeypatch.setattr(bench_structured, "fault_of", lambda text, schema: "so" if text == "true" else None)
    figures = bench_structured.validity(model, load_tokenizer(demo.path()), schemas, ((0.3, 1.0),), each=5)
    assert set(figures["builds"]["refused"]) == {"not"} and figures["schemas"] == 1 and figures["answers"] == 10
    assert 0 < len(figures["invalid"]) < 10 and figures["valid"] == 1 - len(figures["invalid"]) / 10


@pytest.mark.parametrize("valid, own, launches, ok", [
    (1.0, 0.5, 3, True), (0.9, 0.5, 3, False), (1.0, 0.4, 3, False), (1.0, 0.5, 4, False),
])  # fmt: skip
def test_the_verdict_on_structured_answers(valid, own, launches, ok):
    point = {"free": {"accuracy": 0.5}, "constrained": {"accuracy": own}}
    results = {"points": [point], "valid": valid, "launches_free": 3, "launches_guided": launches}
    assert bench_structured.is_ok(results) is ok


def test_soak(bench, tmp_path):
    line = line_of(bench("soak", "--quick", "--clients", "8", "--json", "--save", str(tmp_path)))
    assert json.loads((tmp_path / "soak.jsonl").read_text("utf-8")) == line
    assert line["wrong"] == 0 and line["clients"] == 8 and line["steps"] > 10
    assert {"length", "cut off"} <= line["counts"].keys()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_soak_of_no_time_is_refused(bench, minutes):
    code, _, err = bench("soak", "--minutes", minutes)
    assert code == 2 and f"--minutes {float(minutes)}" in err.splitlines()[-1]


def test_host(bench, tmp_path):
    line = line_of(bench("host", "--quick", "--json", "--save", str(tmp_path)))
    assert json.loads((tmp_path / "host.jsonl").read_text("utf-8")) == line
    assert line["equal_tokens"] == 1.0
    kinds = [(point["kind"], point["prompt"]) for point in line["admission"]]
    assert kinds == [(kind, size) for kind in ("cold", "cached", "queued") for size in (64, 512, 4096)]
    assert all(point["median_ms"] > 0 for point in line["admission"] + line["head"])
    assert [point["max_num_seqs"] for point in line["steps"]] == [1, 16] and line["steps"][0]["over_fewest"] == 1
    alone, beside = line["serving"]
    assert alone["steps_s"] > alone["polls_s"] == alone["refusals_s"] == 0
    assert beside["polls_s"] > 0 < beside["refusals_s"]
    assert alone["median_ratio_vs_alone"] == 1 and line["crowd"]["median_arriving_gap_ms"] > 0


def test_host_work_is_what_is_spent_outside_of_the_network(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(bench_host, "time", SimpleNamespace(thread_time=lambda: clock.now))

    def spend(seconds):
        clock.now += seconds

    network = bench_host.Network(SimpleNamespace(lm_logits=spend, block_length=4))
    assert network.block_length == 4
    assert network.host_ms(lambda: (spend(0.25), network.lm_logits(1.0), spend(0.5))) == 750.0
    assert network.seconds == 1.0


def test_a_gap_reaches_from_the_window_to_its_first_step_and_from_the_last_to_its_end():
    network = bench_host.Network(None)
    network.forwards = [0.0]  # before the window: no step of it
    window = bench_host.Window(network)
    network.forwards += [window.begun, window.begun]
    window.close()
    assert window.steps == 2 and window.gap_ms == pytest.approx(1e3 * window.seconds)
    late = bench_host.Window(network)
    network.forwards.append(late.begun + 5)
    late.close()
    assert late.gap_ms == pytest.approx(5000)
    silent = bench_host.Window(network)
    silent.close()
    assert silent.steps == 0 and silent.gap_ms == pytest.approx(1e3 * silent.seconds)


def test_a_wrong_page_ends_the_host_benchmark_before_it_has_timed_anything(bench, monkeypatch):
    def mixed_up(self, hashes, match=PagedKVCache.match_prefix):
        return match(self, hashes)[::-1]

    monkeypatch.setattr(PagedKVCache, "match_prefix", mixed_up)
    code, out, err = bench("host", "--quick", "--json")
    assert (code, out) == (1, "") and "of the tokens are equal, expected all of them; nothing is timed" in err


def test_kernels(bench):
    line = line_of(bench("kernels", "--quick", "--only", "norm", "--json"))
    assert [entry["op"] for entry in line["ops"]] == ["norm"] and line["ops"][0]["us"] > 0


@pytest.mark.parametrize("name", sorted(cli.BENCHMARKS))
def test_help_is_that_of_the_benchmark(bench, name):
    code, out, _ = bench(name, "--help")
    assert code == 0 and out.startswith(f"usage: llada2-fast bench {name} [-h]")
    for option in ("--quick", "--json", "--save"):
        assert option in out


@pytest.mark.parametrize("arguments, word", [
    ([], "BENCHMARK"),
    (["speed"], "throughput"),
    (["latency", "--step", "3"], "--step"),
    (["latency", "--steps", "0"], "steps=0"),
    (["latency", "--batch-size", "0"], "expected an integer >= 1"),
    (["latency", "--input-len", "4096"], "4096 positions"),
    (["latency", "--model", "no/such/folder"], "no/such/folder"),
    (["latency", "--plot", "picture.txt"], "picture.txt"),
    (["latency", "--plot", "no/such/folder/x.png"], "no/such/folder"),
    (["latency", "--graphs"], "graphs=True"),
    (["throughput", "--graphs"], "graphs=True"),
    *((["throughput", "--request-rate", rate], f"--request-rate {rate}: expected") for rate in ("0.0", "-1.0", "nan")),
    (["throughput", "--quantization", "int3"], "quantization='int3'"),
])  # fmt: skip
def test_mistakes(bench, arguments, word):
    code, out, err = bench(*arguments, *(["--no-progress"] if len(arguments) > 1 else []))
    assert (code, out) == (2, "") and word in err.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(cli.BENCHMARKS))
def test_where_nothing_can_be_saved_nothing_is_measured(bench, tmp_path, name):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "results"):
        code, out, err = bench(name, "--save", str(folder))
        assert (code, out) == (2, "") and f"--save {folder}: expected a folder where " in err.splitlines()[-1]


@pytest.mark.parametrize("file, arguments", [("throughput", []), ("engine", ["--peers"])])
def test_a_file_that_cannot_be_appended_to_is_told_before_the_run(bench, tmp_path, file, arguments):
    (tmp_path / f"{file}.jsonl").mkdir()
    code, out, err = bench("throughput", *arguments, "--save", str(tmp_path))
    assert (code, out) == (2, "") and f"{file}.jsonl can be written" in err.splitlines()[-1]


def test_a_folder_to_save_in_is_made_and_its_files_are_left_alone(tmp_path):
    options = argparse.Namespace(quick=True, json=False, save=tmp_path / "new" / "results")
    harness.check_save(argparse.ArgumentParser(), options, "trial")
    assert not any(options.save.iterdir())
    for number in (1, 2):
        harness.finish("trial", options, {"number": number})
        kept = (options.save / "trial.jsonl").read_bytes()
        harness.check_save(argparse.ArgumentParser(), options, "trial")
        assert (options.save / "trial.jsonl").read_bytes() == kept


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("locked", ["results", "results/trial.jsonl"])
def test_what_is_read_only_is_told_before_the_run(tmp_path, capsys, locked):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "trial.jsonl").touch()
    (tmp_path / locked).chmod(0o555)
    options = argparse.Namespace(save=tmp_path / "results")
    with pytest.raises(SystemExit):
        harness.check_save(argparse.ArgumentParser(), options, "trial" if "trial" in locked else "other")
    assert "Permission denied" in capsys.readouterr().err


def test_a_model_without_chat_template_takes_random_prompts(bench, tmp_path):
    shutil.copytree(demo.path(), tmp_path / "model")
    config = tmp_path / "model/tokenizer_config.json"
    kept = {key: value for key, value in json.loads(config.read_bytes()).items() if key != "chat_template"}
    config.write_text(json.dumps(kept), encoding="utf-8")
    model = ["--model", str(tmp_path / "model"), "--dtype", "float32"]
    code, _, err = bench("latency", *model, *SMALL)
    assert code == 2 and "--input-len" in err
    line = line_of(bench("latency", *model, *SMALL, "--input-len", "5", "--num-iters", "1", "--json"))
    assert line["model"] == str(tmp_path / "model")


# What they share


def test_spread():
    figures = harness.spread("ms", [1.0, 2.0, 3.0, 4.0])
    assert figures["median_ms"] == figures["mean_ms"] == 2.5
    assert (figures["p10_ms"], figures["p90_ms"]) == pytest.approx((1.3, 3.7))
    assert set(harness.spread("ms", []).values()) == {None}


def test_the_card_has_the_process_and_its_memory():
    before = harness.peak_memory()
    block = torch.ones(2**27, dtype=torch.uint8)
    assert harness.peak_memory() >= before and harness.peak_memory() > block.numel()
    card = harness.card()
    assert card["cores"] >= 1 and torch.__version__.startswith(card["versions"]["torch"])  # PyPI's adds "+cu130"


def test_iterations_see_the_end_of_every_block():
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    decoding = {"gen_length": 70, "eos_id": (), "seed": 0}
    iteration = bench_latency.iterate(model, [[5] * 3, [6] * 40], decoding)
    assert [len(ends) for ends in iteration.blocks] == [len(c.forwards_per_block) for c in iteration.output.counters]
    for ends in iteration.blocks:
        assert ends == sorted(ends) and set(ends) <= set(iteration.steps)
    assert max(iteration.steps) <= iteration.seconds


def test_waiting_counts_from_the_arrival_that_was_due():
    work = work_of("--input-len", "3", count=1, size=6)
    jobs = [(prompt, options.params(work.decoding)) for prompt in work.batches[0]]
    served = bench_throughput.serve(bench_throughput.new_engine(work, 2), jobs, rate=1e5)
    assert all(b.arrived - a.arrived < 1e-3 for a, b in zip(served, served[1:], strict=False))
    assert [one.output.token_ids for one in served] == [
        work.model.generate([prompt], **work.decoding)[0].tolist() for prompt in work.batches[0]
    ]
    firsts = [one.commits[0] for one in served]
    assert firsts[0] < firsts[-1]
