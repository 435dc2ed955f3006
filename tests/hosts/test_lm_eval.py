"""The real lm-eval 0.4.13 with our model in it: its command line, the shipped task, likelihoods, arguments."""

import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import quality
from benchmarks.own_server import ServerProcess
from benchmarks.policies import compare, through_lm_eval
from benchmarks.policies import demo as policies_demo
from llada2_fast import LLaDA2Model, demo
from llada2_fast.adapters.likelihood import _masks, likelihood_bound
from llada2_fast.cli import commands as cli
from llada2_fast.demo import tasks
from llada2_fast.engine import Engine
from llada2_fast.weights.special_tokens import load_tokenizer

pytestmark = pytest.mark.hosts
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402  (after the skip, as it is of no use without lm-eval)
from lm_eval.api.model import CacheHook  # noqa: E402

from llada2_fast.adapters.lm_eval import TASKS, register  # noqa: E402
from tests.server.common import MODEL  # noqa: E402

SETTINGS = {"threshold": 0.9, "gen_length": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def lm():
    return register()(**SETTINGS)


@pytest.fixture(scope="module")
def tiny(golden):
    return LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)


def command(*arguments):
    """lm-eval's command line as a user gives it; what it printed."""
    whole = [sys.executable, "-m", "llada2_fast.adapters.lm_eval", *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


def run(*arguments, output):
    """`run` on the CPU: (what it printed, the contents of its results file)."""
    done = command("run", "--model", "llada2_fast", *arguments, "--device", "cpu", "--output_path", output)
    assert done.returncode == 0, done.stderr
    (file,) = output.rglob("results*.json")
    return done.stdout, json.loads(file.read_text("utf-8"))


def chat(lm, *texts):
    return [lm.apply_chat_template([{"role": "user", "content": text}]) for text in texts]


def requests(*arguments):
    """As lm-eval makes them of the documents 10, 11, ... of a task "own"."""
    return [Instance("generate_until", {}, each, 0, ("own", 10 + i, 1)) for i, each in enumerate(arguments)]


@pytest.fixture
def poisoned():
    """One whose logits are NaN behind the word "lamp"."""
    lm = register()(**SETTINGS, mc_num=4)
    (word,) = set(lm.tok_encode("Reverse lamp.")) - set(lm.tok_encode("Reverse moon."))
    lm.model.word_embeddings.weight[word] = float("nan")
    return lm


# the command line and the shipped task


def test_the_task_gives_the_accuracy_of_the_benchmark_to_the_digit(tmp_path):
    printed, results = run("--model_args", "threshold=0.9", "--tasks", "llada2_demo", output=tmp_path)
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    setting = quality.headline_of(model.block_length)
    assert setting.threshold == 0.9
    scores = quality.measure(model, load_tokenizer(demo.path()), tasks.PROMPTS, [setting], progress=False)
    accuracy, tpf = quality.mean(scores[setting])
    assert results["groups"]["llada2_demo"]["exact_match,none"] == pytest.approx(accuracy, abs=1e-12)
    line = next(line for line in printed.splitlines() if line.startswith("|llada2_demo"))
    assert f"|{accuracy:.4f}|" in line.replace(" ", "")
    for task, (right, _) in scores[setting].items():
        assert results["results"][f"llada2_demo::demo_{task}"]["exact_match,none"] == right
        assert results["n-samples"][f"llada2_demo::demo_{task}"]["effective"] == tasks.PROMPTS == 120
        assert (
            results["configs"][f"llada2_demo::demo_{task}"]["generation_kwargs"]["max_gen_toks"] == quality.GEN_LENGTH
        )
    recorded = results["config"]["llada2_fast"]
    assert recorded["decode_params"]["threshold"] == 0.9 and recorded["decode_params"]["eos_early_stop"]
    assert recorded["batch_size"] == 16 and recorded["pretrained"] == demo.path()
    assert results["config"]["model_dtype"] == "torch.float32" and results["config"]["batch_sizes"] == [16]
    assert recorded["tokens_per_forward"] == pytest.approx(tpf, rel=0.1)  # there the mean over tasks


def test_policies_are_compared_on_the_tasks(capsys):
    few = ["--tasks", "llada2_demo", "--limit", "3", "--quick", "--json", "--no-progress", "--device", "cpu"]
    assert cli.main(["bench", "policies", *few, "--policies", "threshold,self_speculative"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["metrics"].values()) == {"exact_match,none"} and len(result["metrics"]) == len(tasks.TASKS)
    model, name = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False), "self_speculative"
    work = policies_demo.work_of(load_tokenizer(demo.path()), 3)
    expected = compare.entries("llada2-fast-demo", compare.measure(model, work, ["threshold", name], True, None, False))
    assert result["policies"] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tasks", "nonsense"), "--tasks: Spec 'nonsense' is not a registered"),
        (("--tasks", "llada2_demo", "--metric", "acc,none"), "--metric acc,none: expected one of exact_match,none"),
    ],
)
def test_what_cannot_be_compared_is_named(capsys, arguments, message):
    few = ("--limit", "1", "--quick", "--policies", "entropy", "--no-progress", "--device", "cpu")
    assert cli.main(["bench", "policies", *arguments, *few]) == 2
    assert message in capsys.readouterr().err


def test_policies_are_compared_on_generated_answers_without_draws(tmp_path, monkeypatch):
    """Whatever the task's own settings are."""
    (tmp_path / "data.jsonl").write_text('{"q": "Add 1 and 2.", "c": ["3", "4"], "a": 0}\n', "utf-8")
    both = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}",
    }  # fmt: skip
    chosen = {"task": "chosen", "output_type": "multiple_choice", "doc_to_choice": "{{c}}", "doc_to_target": "a"}
    how = {"do_sample": True, "temperature": 0.9, "max_gen_toks": 64, "until": []}
    drawn = {"task": "drawn", "output_type": "generate_until", "doc_to_target": "{{c[a]}}", "generation_kwargs": how}
    for task, metric in ((chosen, "acc"), (drawn, "exact_match")):
        file = tmp_path / f"{task['task']}.yaml"
        file.write_text(json.dumps(both | task | {"metric_list": [{"metric": metric}]}), "utf-8")
    monkeypatch.setattr(through_lm_eval, "TASKS", tmp_path)
    model, names = {"pretrained": demo.path(), "dtype": "float32", "batch_size": 1}, ["threshold", "self_speculative"]
    with pytest.raises(ValueError, match="whose answers are generated, chosen has multiple_choice"):
        through_lm_eval.measure(model, ["drawn", "chosen"], names, True, progress=False)
    points, metrics, _ = through_lm_eval.measure(model, ["drawn"], names, True, progress=False)
    assert metrics == {"drawn": "exact_match,none"} and all(len(points[name]) == 3 for name in names)
    again, *_ = through_lm_eval.measure(model, ["drawn"], names, True, progress=False)
    assert points == again


def test_config_file_limit_samples_and_the_users_own_tasks(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.yaml").write_text(
        "task: own\ncustom_dataset: !function own.prompts\ntest_split: test\ndoc_to_text: text\ndoc_to_target: text\n"
        "generation_kwargs: {until: [' '], max_gen_toks: 32}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "own" / "own.py").write_text(
        "from datasets import Dataset\n"
        "def prompts(**_):\n    return {'test': Dataset.from_list([{'text': 'Spell 7.'}, {'text': 'Spell 8.'}])}\n"
    )
    config = {
        "model": "llada2_fast", "model_args": {"threshold": 0.9, "pretrained": demo.path(), "dtype": "float32"},
        "tasks": ["llada2_demo", "own"], "include_path": str(tmp_path / "own"), "limit": 3, "batch_size": 2,
        "device": "cpu", "log_samples": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    done = command("run", "--config", tmp_path / "run.yaml", "--output_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(file.read_text("utf-8"))
    assert results["config"]["llada2_fast"]["batch_size"] == 2
    assert [results["n-samples"][name]["effective"] for name in ("own", "llada2_demo::demo_add")] == [2, 3]
    (file,) = (tmp_path / "out").rglob("samples_own*.jsonl")
    answers = [json.loads(line)["resps"] for line in file.read_text("utf-8").splitlines()]
    assert answers == [[["7"]], [["8"]]]  # "7 is seven", cut before the first space


def test_lm_evals_own_client_scores_the_server(tmp_path):
    """Chats over HTTP, eight at a time, as of any server of OpenAI's API."""
    with ServerProcess() as server:
        where = f"model={MODEL},base_url={server.url}/v1/chat/completions,num_concurrent=8,tokenized_requests=False"
        whole = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args", where,
            "--tasks", "llada2_demo", "--include_path", str(TASKS), "--apply_chat_template", "--limit", "10",
            "--output_path", str(tmp_path),
        ]  # fmt: skip
        done = subprocess.run(whole, capture_output=True, text=True, env=os.environ | {"OPENAI_API_KEY": "none"})
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results*.json")
    assert json.loads(file.read_text("utf-8"))["results"]["llada2_demo"]["exact_match,none"] > 0.9


def test_listing_knows_the_task():
    done = command("ls", "groups")
    assert done.returncode == 0 and "llada2_demo" in done.stdout


def test_help_without_a_command():
    done = command()
    assert done.returncode == 0 and "run" in done.stdout


# wrong arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"treshold": 0.9}, "model_args: unknown treshold; expected some of gen_length, block_length"),
        ({"threshold": "high"}, "threshold='high': expected a number >= 0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"preset": "fast"}, "preset='fast': expected one of quality, speed"),
        ({"dtype": "int8"}, "dtype='int8': expected auto or one of bfloat16"),
        ({"device": "abacus"}, "device='abacus': expected a device"),
        ({"device": "cuda:99"}, "device='cuda:99': this machine has"),
        ({"batch_size": "0"}, "batch_size=0: expected an integer >= 1"),
        ({"batch_size": "many"}, "batch_size='many': expected an integer >= 1"),
        ({"max_batch_size": 0}, "max_batch_size=0: expected an integer >= 1"),
        ({"cache_tokens": -5}, "cache_tokens=-5"),
        ({"mc_num": 0}, "mc_num=0: expected an integer >= 1"),
        ({"mc_seed": 1.5}, "mc_seed=1.5: expected an integer >= 0"),
        ({"profile": "hf-3"}, "profile='hf-3'"),
        ({"policy": "credit"}, "policy='credit': expected one of threshold, entropy, self_speculative"),
        ({"entropy_bound": 0.5}, "entropy_bound=0.5"),
        (
            {"preset": "quality", "policy": "self_speculative"},
            "policy='self_speculative': expected another one with an",
        ),
        ({"quantization": "int3"}, "quantization='int3'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_model_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        register().create_from_arg_obj(arguments, None if "device" in arguments else {"device": "cpu"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top": 5}, "gen_kwargs: unknown top; expected some of"),
        ({"num_beams": 4}, "num_beams=4: expected 1"),
        ({"until": [3]}, "until=.3.: expected strings"),
        ({"max_gen_toks": 0}, "gen_length=0"),
        (
            {"max_gen_toks": 10**6},
            r"1 of 2 .* request 1 \(task own, document 11\): gen_length=1000000: .* 4096 positions",
        ),
        ({"max_gen_toks": 4096}, r"request 1 \(task own, document 11\): gen_length=4096: .* 4096 positions"),
        ({"eos_ids": list(range(9))}, r"request 1 \(task own, document 11\): eos_ids=.*at most max_eos_ids=8"),
        ({"threshold": -1.0}, "threshold=-1.0"),
    ],
)
def test_wrong_options_of_a_task_are_told_before_any_forward(lm, options, message):
    before = lm.forwards
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests(("Spell 7.", {}), ("Spell 7.", options)), disable_tqdm=True)
    assert lm.forwards == before


def test_the_command_line_fails_with_the_reason():
    done = command("run", "--model", "llada2_fast", "--model_args", "treshold=0.9", "--tasks", "llada2_demo")
    assert done.returncode != 0 and "unknown treshold" in done.stderr


def test_registering_again_is_harmless():
    assert register() is register()


# text


def test_answers_are_those_of_generate_whatever_the_batch(lm):
    prompts = [prompt for task in tasks.TASKS for prompt in tasks.sample(task, 3, tasks.SEED)]
    work = requests(*((context, {"until": []}) for context in chat(lm, *prompts)))
    texts = lm.generate_until(work, disable_tqdm=True)
    one_by_one = register()(**SETTINGS, batch_size=1)
    assert one_by_one.generate_until(work, disable_tqdm=True) == texts
    rows = quality.encode(lm.tokenizer, prompts)
    assert [lm.tok_encode(request.args[0]) for request in work] == rows
    output = lm.model.generate(rows, gen_length=64, threshold=0.9, eos_early_stop=True, return_dict=True)
    assert texts == list(quality.decode(lm.tokenizer, output))


def test_text_ends_before_the_first_stop(lm):
    (context,) = chat(lm, "Add 847 and 96.")
    whole = "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 943."
    cases = {
        (): whole, "\n": "7+6+0=13", ("answer", "="): "7+6+0", ("nowhere", ""): whole,
        ("13\n4",): "7+6+0=", ("<|endoftext|>",): whole, ("<|role_end|>", "943"): whole[:-4],
    }  # fmt: skip
    work = requests(*((context, {"until": list(u) if isinstance(u, tuple) else u}) for u in cases))
    assert lm.generate_until(work, disable_tqdm=True) == list(cases.values())


def test_special_tokens_among_the_stops_are_ids(lm):
    _, _, stops = lm._work("Spell 7.", {"until": ["<|role_end|>", "."]}, 0)
    assert stops["stop_token_ids"] == [lm.tokenizer.convert_tokens_to_ids("<|role_end|>")]


def test_lengths(lm):
    (context,) = chat(lm, "Spell 4071, 22, 608.")
    work = requests(*((context, {name: 5}) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")))
    (text,) = set(lm.generate_until(work, disable_tqdm=True))
    assert text and len(lm.tok_encode(text)) <= 5
    _, params, _ = lm._work(context, {}, 0)
    assert params.gen_length == lm.max_gen_toks == 64
    prompt, params, _ = lm._work(context * 200, {"max_gen_toks": 20}, 0)
    assert len(prompt) + params.gen_length == lm.max_length
    assert prompt == lm.tok_encode(context * 200)[-len(prompt) :]


@pytest.mark.parametrize(
    "settings, options, temperature",
    [
        ({}, {}, 0.0),
        ({"temperature": 0.7}, {}, 0.7),
        ({"temperature": 0.7}, {"do_sample": False}, 0.0),
        ({"temperature": 0.7}, {"do_sample": False, "temperature": 1.0}, 0.0),
        ({"temperature": 0.7}, {"temperature": 0.0}, 0.0),
        ({"temperature": 0.7}, {"do_sample": True}, 0.7),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "threshold": 0.5, "num_beams": 1}, 0.3),
    ],
)
def test_sampling_options(settings, options, temperature):
    _, params, _ = register()(device="cpu", **settings)._work("Spell 7.", options, 0)
    assert params.temperature == temperature
    assert (params.top_p, params.threshold) == (options.get("top_p"), options.get("threshold", 0.95))


@pytest.mark.parametrize("settings, options, policy", [
    ({"policy": "entropy"}, {}, ("entropy", None)),
    ({"policy": "entropy"}, {"policy": "threshold"}, ("threshold", None)),
    ({"policy": "entropy"}, {"do_sample": True, "entropy_bound": 1.0}, ("entropy", 1.0)),
    ({"preset": "speed"}, {"policy": "entropy"}, ("entropy", None)),
])  # fmt: skip
def test_policies(settings, options, policy):
    _, params, _ = register()(device="cpu", **settings)._work("Spell 7.", options, 0)
    assert (params.policy, params.entropy_bound) == policy


def test_drafts_are_checked(lm):
    """In a cache of just the size: a check has pages of its own."""
    checking = register()(**SETTINGS, batch_size=2, policy="self_speculative", entropy_bound=0.0)
    work = requests(*[(text, {}) for text in chat(lm, "Add 847 and 96.", "Spell 4071.", "Spell 7.")])
    assert checking.generate_until(work, disable_tqdm=True) == lm.generate_until(work, disable_tqdm=True)


def test_draws_depend_on_the_seed_and_the_place(lm):
    work = requests(*[(chat(lm, "Tell a story.")[0], {"do_sample": True, "temperature": 1.5, "threshold": 0.3})] * 4)
    seeded = [register()(**SETTINGS, seed=5, batch_size=size) for size in (1, 3)]
    texts = [each.generate_until(work, disable_tqdm=True) for each in seeded]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    for _ in range(2):  # without one they come from torch's generator, which lm-eval seeds
        torch.manual_seed(3)
        texts.append(lm.generate_until(work, disable_tqdm=True))
    assert texts[2] == texts[3]


def test_progress_and_cached_answers(lm, tmp_path, capfd):
    from lm_eval.api.model import CachingLM

    work = requests(*((context, {"until": []}) for context in chat(lm, "Spell 7.", "Spell 8.")))
    lm.generate_until(work, disable_tqdm=True)
    assert capfd.readouterr().err == ""
    mine = register()(**SETTINGS)
    capfd.readouterr()
    cached = CachingLM(mine, str(tmp_path / "answers.db"))
    first = cached.generate_until(work)
    assert "Running generate_until requests: 100%" in capfd.readouterr().err
    spent = mine.forwards
    assert cached.generate_until(work) == first == ["7 is seven", "8 is eight"] and mine.forwards == spent > 0


def test_one_process_shows_progress(capfd):
    lm = register()(**SETTINGS, mc_num=1)
    shown = []
    for lm._rank in (1, 0):  # lm-eval's numbers of processes
        capfd.readouterr()
        lm.generate_until(requests(("Spell 7.", {})))
        lm._loglikelihood_tokens([(("7", "8"), [7], [8])])
        lm.loglikelihood_rolling(requests(("7",)))
        shown.append(capfd.readouterr().err)
    assert shown[0] == "" and shown[1].count(": 100%") == 4


def test_what_the_cache_cannot_hold_is_told_before_any_forward():
    lm = register()(**SETTINGS, cache_tokens=128)
    short, long = chat(lm, "Spell 7."), chat(lm, "Spell " + "4071, " * 20 + "22.")
    work = requests(*((context, {}) for context in (*short, *long, *short, *long)))
    with pytest.raises(ValueError) as raised:
        lm.generate_until(work, disable_tqdm=True)
    head, tail = str(raised.value).split("; ")
    assert head.startswith("2 of 4 requests can never be run: request 1 (task own, document 11): gen_length=64: ")
    assert tail.startswith("request 3 (task own, document 13): gen_length=64: ")
    assert all("pages of 16 tokens are needed, the whole cache has 8 (cache_tokens)" in text for text in (head, tail))
    assert lm.forwards == 0 and lm.generate_until(work[::2], disable_tqdm=True) == ["7 is seven"] * 2


def test_a_failed_request_is_reported_and_the_others_go_on(poisoned, caplog):
    contexts = chat(poisoned, "Spell 7.", "Reverse lamp.", "Spell 8.")
    kept = {}
    poisoned.set_cache_hook(CacheHook(SimpleNamespace(dbdict=kept)))  # any dict is a database to it
    work = requests(*((context, {}) for context in contexts))
    assert poisoned.generate_until(work, disable_tqdm=True) == ["7 is seven", "", "8 is eight"]
    (report,) = [record.message for record in caplog.records if record.name == "llada2_fast.lm_eval"]
    assert "request 1 (task own, document 11): logits hold NaN" in report
    assert poisoned.failed == 1 and sorted(kept.values()) == ["7 is seven", "8 is eight"]


def test_the_engine_and_its_cache_go_when_the_call_ends(lm):
    gc.collect()
    gc.disable()  # memory of a GPU should not have to wait for it
    try:
        lm.generate_until(requests(("Spell 7.", {})), disable_tqdm=True)
        assert not any(type(one) is Engine for one in gc.get_objects())
    finally:
        gc.enable()


def test_failed_requests_are_counted_in_the_results(poisoned):
    from datasets import Dataset

    rows = [{"text": text, "right": right} for text, right in (("Spell 7.", "7 is seven"), ("Reverse lamp.", "lamp"))]
    prompts = Dataset.from_list(rows)
    task = {
        "task": "own", "custom_dataset": lambda **_: {"test": prompts}, "test_split": "test", "doc_to_text": "text",
        "doc_to_target": "right", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(model=poisoned, tasks=[task], apply_chat_template=True, bootstrap_iters=0)
    assert results["results"]["own"]["exact_match,none"] == 0.5
    assert results["config"]["llada2_fast"]["failed_requests"] == 1


# likelihood


def by_orders(model, prompt, answer, mask_id, length, attend_tail):
    """The bound's other definition, without a cache: blocks in turn, the mean over all orders inside each of them of
    the sum of log p(token | tokens committed before it)."""
    ids, n, total = [*prompt, *answer], len(prompt), len(prompt) + len(answer)
    bound = 0.0
    for begin in range(n // length * length, total, length):
        scored = range(max(n, begin), min(total, begin + length))
        orders = list(itertools.permutations(scored))
        for order in orders:
            row = torch.full((1, begin + length), mask_id)
            row[0, : scored[0]] = torch.tensor(ids[: scored[0]])
            if not attend_tail:
                row = row[:, :total]
            for position in order:
                log_p = model(row, block_length=length).logits[0, position].log_softmax(-1)
                bound += float(log_p[ids[position]]) / len(orders)
                row[0, position] = ids[position]
    return bound


@pytest.mark.parametrize("attend_tail", [True, False])
@pytest.mark.parametrize("prompt, answer", [(6, 4), (0, 3), (5, 7), (8, 1), (3, 6)])
def test_the_exact_bound_is_the_mean_over_all_orders(tiny, prompt, answer, attend_tail):
    ids = torch.randint(250, (prompt + answer,), generator=torch.Generator().manual_seed(answer)).tolist()
    arguments = (tiny, ids[:prompt], ids[prompt:], 255, 4)
    bound = likelihood_bound(*arguments, mc_num=15, attend_tail=attend_tail)
    assert bound == pytest.approx(by_orders(*arguments, attend_tail), abs=1e-4)
    assert bound == likelihood_bound(*arguments, mc_num=10**9, seed=8, batch_size=1, attend_tail=attend_tail)


def test_estimates_are_repeatable_and_unbiased(tiny):
    ids = torch.randint(250, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = (tiny, ids[:9], ids[9:17], 255, 8)
    exact = likelihood_bound(*arguments, mc_num=255)
    estimates = [likelihood_bound(*arguments, mc_num=8, seed=seed) for seed in range(60)]
    error = statistics.stdev(estimates) / math.sqrt(len(estimates))
    assert 0 < error < abs(exact) / 50 and abs(statistics.mean(estimates) - exact) < 4 * error
    for size in (1, 3, 100):
        assert likelihood_bound(*arguments, mc_num=8, seed=0, batch_size=size) == estimates[0]


@pytest.mark.parametrize("count, mc_num", [(1, 1), (5, 31), (5, 30), (32, 128), (3, 1), (7, 5)])
def test_masks_weigh_the_terms_as_the_expectation_does(count, mc_num):
    draws = [_masks(count, mc_num, torch.Generator().manual_seed(seed)) for seed in range(200)]
    masks, weights = draws[0]
    assert masks.shape == (len(weights), count) and masks.any(1).all() and len(weights) <= mc_num
    # E k/l sum of terms: each position counts once in the mean
    mean = torch.stack([weights @ masks.double() for masks, weights in draws]).mean(0)
    torch.testing.assert_close(mean, torch.ones(count).double(), rtol=0, atol=0.3 if mc_num < 2**count - 1 else 1e-9)


def test_likelihood_of_texts(lm):
    right, wrong, unlike = "The answer is 12.", "The answer is 13.", "cow"
    (context,) = chat(lm, "Add 5 and 7.")
    work = requests(*((context + "5+7+0=12\n", answer) for answer in (right, wrong, unlike)))
    scores = lm.loglikelihood(work, disable_tqdm=True)
    bounds = [bound for bound, _ in scores]
    assert -1 < bounds[0] < 0 and bounds[0] > bounds[1] > bounds[2]
    assert [greedy for _, greedy in scores] == [True, False, False]
    assert scores == lm.loglikelihood(work, disable_tqdm=True)
    assert register()(**SETTINGS, batch_size=2).loglikelihood(work[::-1], disable_tqdm=True) == scores[::-1]


def test_likelihood_limits(lm):
    (context,) = chat(lm, "Spell 7.")
    few = register()(**SETTINGS, mc_num=2)
    (long,) = few.loglikelihood(requests((context * 600, "7 is seven")), disable_tqdm=True)
    assert math.isfinite(long[0])
    with pytest.raises(ValueError, match=r"continuation: expected 1..4095 tokens, request 1 has \d+, request 3 has 0$"):
        answers = ("cow", "cow " * 4100, "moon", "")
        few.loglikelihood(requests(*((context, answer) for answer in answers)), disable_tqdm=True)
    with pytest.raises(ValueError, match="continuation: expected at least one token"):
        likelihood_bound(few.model, [1, 2], [], 0)
    with pytest.raises(ValueError, match="some outside 0.."):
        likelihood_bound(few.model, [10**6], [1], 0)


def test_failed_likelihoods_are_reported_and_the_others_go_on(poisoned, caplog):
    (context,) = chat(poisoned, "Spell 7.")
    work = requests((context, "7 is seven"), (context, "lamp lamp"), (context, "cow"))
    scores = poisoned.loglikelihood(work, disable_tqdm=True)
    assert scores[1] == (-math.inf, False) and scores[0][1] and math.isfinite(scores[0][0] + scores[2][0])
    assert poisoned.loglikelihood_rolling(requests(("7",), ("7 lamp 7",)), disable_tqdm=True)[1] == -math.inf
    reports = [record.message for record in caplog.records if record.name == "llada2_fast.lm_eval"]
    assert poisoned.failed == len(reports) == 2
    assert "request 1 (" in reports[0] and "lamp lamp" in reports[0]
    assert "request 1 (task own, document 11)" in reports[1]


def test_rolling_likelihood(lm):
    few = register()(**SETTINGS, mc_num=4)
    text = "7 is seven"
    whole, nothing = few.loglikelihood_rolling(requests((text,), ("",)), disable_tqdm=True)
    eos = few.eot_token_id
    assert whole == few._bound([eos], few.tok_encode(text)) and nothing == 0.0
    (bound,) = few.loglikelihood(requests(("", text)), disable_tqdm=True)
    assert bound[0] == whole
    one = register()(**SETTINGS, mc_num=1)
    ids = one.tok_encode(text * 1500)
    (long,) = one.loglikelihood_rolling(requests((text * 1500,)), disable_tqdm=True)
    rest = len(ids) - (one.max_length - 1)  # what the first window, behind its end token, has no room for
    context = ids[-one.max_length : -rest]
    assert 0 < rest < one.max_length and len(context) > 0
    assert long == one._bound([eos], ids[:-rest]) + one._bound(context, ids[-rest:])


def test_multiple_choice_through_lm_eval():
    from datasets import Dataset

    sums = [(2, 3), (40, 7), (100, 25), (8, 8)]
    rows = [
        {"question": f"Add {a} and {b}.", "choices": [f"The answer is {a + b + d}." for d in (-1, 0, 1)], "right": 1}
        for a, b in sums
    ]
    questions = Dataset.from_list(rows)
    task = {
        "task": "sums", "output_type": "multiple_choice", "custom_dataset": lambda **_: {"test": questions},
        "test_split": "test", "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "right",
        "target_delimiter": "", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(
        model=register()(**SETTINGS, mc_num=16), tasks=[task], apply_chat_template=True, bootstrap_iters=0
    )
    assert (
        results["results"]["sums"]["acc,none"] >= 0.5 and results["config"]["llada2_fast"]["likelihood"]["mc_num"] == 16
    )
