"""The command line: text on stdout, everything else on stderr, exit codes, one line for a mistake."""

import argparse
import codecs
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from llada2_fast import __version__, demo
from llada2_fast.cli import commands as cli
from llada2_fast.cli import doctor, options
from llada2_fast.config import DecodeParams

ROOT = Path(__file__).parent.parent
QUESTION, ANSWER = doctor.QUESTION, doctor.ANSWER
QUIET = "--no-progress"
SLOW = pytest.mark.slow


def run(*arguments, stdin="", **kwargs):
    command = [sys.executable, "-m", "llada2_fast", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, **kwargs)


@pytest.fixture
def call(capsys, monkeypatch):
    """main() in this process: (exit code, stdout, stderr)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return call


def assert_refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("llada2-fast: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


def test_generate_in_a_process_of_its_own():
    done = run("generate", QUESTION)
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n")
    assert "Blocks: 100%" in done.stderr  # the progress bar
    statistics = done.stderr.splitlines()[-1]
    assert statistics.startswith("36 tokens, ") and statistics.endswith(" tokens/s, finish reason: eos")
    assert " forwards, TPF " in statistics


def test_mistake_in_a_process_of_its_own():
    done = run("generate", "hello", "--steps", "0")
    assert_refused((done.returncode, done.stdout, done.stderr), "steps=0")


def test_help_and_mistakes_in_arguments_do_not_wait_for_torch():
    code = "import sys; from llada2_fast.cli import main; main(['--help']); main(['chat', '--x'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False" and "--x" in done.stderr


def test_several_prompts_are_one_batch(call):
    code, out, err = call("generate", QUESTION, "Reverse moon crow bread lamp.", QUIET)
    assert (code, out) == (0, ANSWER + "\nReversed: lamp bread crow moon\n")
    assert err.count("\n") == 1  # one line of statistics, no bar


def test_json(call):
    code, out, _ = call("generate", QUESTION, "Reverse moon crow bread lamp.", "--json", "--threshold", "0.9")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["prompt"] for answer in answers] == [QUESTION, "Reverse moon crow bread lamp."]
    first = answers[0]
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    assert first["text"] == ANSWER == tokenizer.decode(first["token_ids"], skip_special_tokens=True)
    assert first["num_tokens"] == len(first["token_ids"]) == 36 and first["finish_reason"] == "eos"
    assert first["tokens_per_forward"] == 36 / first["denoise_forwards"] == 36 / sum(first["forwards_per_block"])
    assert first["prompt_tokens"] > 5 and first["batch_seconds"] > 0


def test_prompt_from_stdin(call):
    assert call("generate", "-", QUIET, stdin=QUESTION + "\n")[:2] == (0, ANSWER + "\n")


def test_raw_prompts_get_no_chat_template(call):
    turn = f"<role>HUMAN</role>{QUESTION}<|role_end|><role>ASSISTANT</role>"
    assert call("generate", turn, "--raw", QUIET)[:2] == (0, ANSWER + "\n")
    assert call("generate", QUESTION, "--raw", QUIET)[:2] != (0, ANSWER + "\n")


@pytest.mark.parametrize("options, tokens, reason", [
    (["--max-tokens", "8"], 8, "length"),
    (["--gen-length", "8", "--block-length", "4"], 8, "length"),
    (["--no-eos-early-stop", "--gen-length", "64"], 36, "length"),
    (["--eos-id", "-1", "--gen-length", "64"], 64, "length"),  # no end token: all 64 are answer
    (["--profile", "hf-2.0", "--steps", "8"], 36, "eos"),
    (["--editing-threshold", "0.9", "--max-post-steps", "2"], 36, "eos"),
    (["--policy", "entropy", "--entropy-decay", "0.8", "--temperature", "0.5"], 36, "eos"),
    (["--policy", "self_speculative", "--entropy-bound", "0"], 36, "eos"),
    (["--policy", "self_speculative", "--entropy-bound", "0", "--max-tokens", "3"], 3, "length"),
    (["--dtype", "bfloat16", "--device", "cpu"], 36, "eos"),
    (["--dtype", "torch.bfloat16"], 36, "eos"),
    (["--quantization", "fp8"], 36, "eos"),
    (["--quantization", "int4"], 36, "eos"),
])  # fmt: skip
def test_options_reach_generate(call, options, tokens, reason):
    code, out, _ = call("generate", QUESTION, "--json", QUIET, *options)
    answer = json.loads(out)
    assert (code, answer["num_tokens"], answer["finish_reason"]) == (0, tokens, reason)
    assert (answer["check_forwards"] > 0) == ("self_speculative" in options)


def test_options_reach_the_model():
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    model, _ = options.load_model(parser.parse_args(["--quantization", "fp8", "--dtype", "bfloat16", QUIET]))
    assert (model.config.quantization, model.dtype, model.exact) == ("fp8", torch.bfloat16, True)
    model, _ = options.load_model(parser.parse_args(["--quantization", "int4", "--no-exact", QUIET]))
    assert (model.config.quantization, model.exact, model.lm_head.exact) == ("int4", False, False)


def test_sampling_is_repeatable_by_seed(call):
    story = ["generate", "Tell a story.", "--temperature", "2", "--top-k", "50", "--top-p", "0.95", QUIET, "--seed"]
    first = call(*story, "1")[1]
    assert first == call(*story, "1")[1]
    assert first != call(*story, "2")[1]


def test_every_decoding_option_is_offered_and_explained(call):
    code, out, _ = call("generate", "--help")
    named = {"eos_id" if name == "eos_ids" else name for name in DecodeParams.__dataclass_fields__}
    assert code == 0 and named == set(options.DECODING)
    for name in named:
        assert "--" + name.replace("_", "-") in out
    assert f"(default: {DecodeParams.threshold})" in out.replace("\n", " ").replace("  ", "")


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def test_a_json_schema_holds(call, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    code, out, _ = call("generate", QUESTION, QUIET, "--json-schema", str(tmp_path / "schema.json"))
    assert code == 0
    jsonschema.validate(json.loads(out), SCHEMA)


@pytest.mark.parametrize("given, allowed", [
    (["--choices", "yes,no"], {"yes", "no"}),
    (["--choices", "yes, sure", "--choices", "no, never"], {"yes, sure", "no, never"}),
])  # fmt: skip
def test_choices_are_separated_by_commas_or_repeated(call, given, allowed):
    code, out, _ = call("generate", QUESTION, "Spell 4071.", QUIET, *given)
    assert code == 0 and len(out.splitlines()) == 2 and {*out.splitlines()} <= allowed


def test_a_canvas_has_the_text_of_its_gaps_in_a_language(call):
    code, out, err = call("generate", QUESTION, QUIET, "--canvas", "The answer is {gap:4}, is it?", "--regex", "[0-9]+")
    assert code == 0 and re.fullmatch(r"The answer is \d+, is it\?\n", out), out
    assert "finish reason: length" in err


def test_a_canvas_is_not_cut_to_the_usual_length(call):
    text = "The answer is 7. " * 60
    code, out, _ = call("generate", QUESTION, QUIET, "--canvas", text + "{gap:4}", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["text"].startswith(text) and answer["num_tokens"] > options.GEN_LENGTH


@pytest.mark.parametrize("option", ["--regex", "--json-schema", "--choices", "--canvas"])
def test_a_server_has_no_form_for_all_its_answers(capsys, option):
    code = cli.main(["serve", option, "a", "--port", "-1"])  # the port would be the next mistake
    assert_refused((code, *capsys.readouterr()), f"unrecognized arguments: {option}")


def test_chat_answers_in_a_language(call):
    code, out, _ = call("chat", "--regex", "[a-f]{3}", QUIET, stdin="Spell 4071.\n")
    assert code == 0 and re.fullmatch("[a-f]{3}\n", out)


def test_a_missing_extra_is_one_line(call, monkeypatch, tmp_path):
    """The process that compiles a regex is started by a Python that finds no outlines-core."""
    python = tmp_path / "python"
    run = "import runpy, sys; sys.modules['outlines_core'] = None; del sys.argv[0]"
    run += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -I -c "{run}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert_refused(call("generate", "x", QUIET, "--regex", "[no]{77}"), 'pip install "llada2-fast[structured]"')


def test_version(call):
    assert call("--version")[:2] == (0, f"llada2-fast {__version__}\n")


@pytest.mark.parametrize("arguments, words", [
    ([], ["COMMAND"]),
    (["invent"], ["invent"]),
    (["generate"], ["PROMPT"]),
    (["generate", "x", "--nonsense"], ["--nonsense"]),
    (["generate", "x", "--step", "3"], ["--step"]),  # no abbreviations
    (["generate", "x", "--steps", "many"], ["--steps", "many"]),
    (["generate", "x", "--steps", "0"], ["steps=0"]),
    (["generate", "x", "--gen-length", "0"], ["gen_length=0"]),
    (["generate", "x", "--gen-length", "5000"], ["gen_length=5000", "4096"]),
    (["generate", "x", "--block-length", "0"], ["block_length=0"]),
    (["generate", "x", "--temperature", "-1"], ["temperature=-1"]),
    (["generate", "x", "--temperature", "nan"], ["temperature=nan"]),
    (["generate", "x", "--top-p", "0"], ["top_p=0"]),
    (["generate", "x", "--editing-threshold", "-0.5"], ["editing_threshold=-0.5"]),
    (["generate", "x", "--edit-window", "1"], ["edit_window=1", "editing_threshold"]),
    (["generate", "x", "--policy", "credit"], ["policy='credit'", "threshold, entropy, self_speculative"]),
    (["generate", "x", "--entropy-bound", "0.5"], ["entropy_bound=0.5", "policy='threshold'"]),
    (["generate", "x", "--policy", "entropy", "--entropy-decay", "0"], ["entropy_decay=0"]),
    (["generate", "x", "--policy", "entropy", "--profile", "hf-2.1"], ["policy='entropy'", "hf-2.1"]),
    (["generate", "x", "--policy", "entropy", "--regex", "a"], ["policy='entropy'", "regex"]),
    (["generate", "x", "--policy", "self_speculative", "--temperature", "1"], ["policy=", "temperature=1"]),
    (["generate", "x", "--policy", "self_speculative", "--editing-threshold", "0"], ["policy=", "editing_threshold"]),
    (["generate", "x", "--policy", "self_speculative", "--canvas", "{gap:8}"], ["policy=", "canvas"]),
    (["generate", "x", "--profile", "sglang"], ["profile='sglang'", "hf-2.1"]),
    (["generate", "x", "--num-to-transfer", "2"], ["num_to_transfer=2"]),
    (["generate", "x", "--mask-id", "99999"], ["mask_id=99999"]),
    (["generate", "x", "--seed", str(2**64)], ["seed="]),
    (["generate", "x", "--dtype", "int8"], ["dtype='int8'", "bfloat16"]),
    (["generate", "x", "--quantization", "int3"], ["quantization='int3'", "fp8, int4"]),
    (["generate", "x", "--device", "toaster"], ["device='toaster'"]),
    (["generate", "x", "--device", "cuda:99"], ["device='cuda:99'"]),
    (["generate", "-", "-"], ["stdin"]),
    (["generate", "x", "--revision", "v2"], ["revision='v2'", "--model"]),
    (["generate", "red " * 5000], ["4096 positions"]),
    (["generate", "x", "--model", "no/such/folder"], ["no/such/folder"]),
    (["generate", "x", "--model", ""], ["no such folder"]),
    (["generate", "x", "--regex", "("], ["regex='('"]),
    (["generate", "x", "--regex", "a", "--choices", "b"], ["choices", "regex"]),
    (["generate", "x", "--regex", "a{9}", "--gen-length", "3"], ["gen_length=3", "takes", "tokens"]),
    (["generate", "x", "--choices", "yes,,no"], ["choices"]),
    (["generate", "x", "--choices", "yes,no", "--profile", "hf-2.0"], ["choices", "hf-2.0"]),
    (["generate", "x", "--json-schema", "no/file.json", "--model", "no/model"], ["no/file.json", "No such file"]),
    (["generate", "x", "--json-schema", "README.md", "--model", "no/model"], ["README.md", "not valid JSON"]),
    (["generate", "x", "--canvas", "no gap"], ["canvas='no gap'", "{gap:8}"]),
    (["generate", "x", "--canvas", "\udfff{gap:8}"], ["canvas: no valid UTF-8"]),
    (["generate", "x", "--canvas", "{gap:8}", "--gen-length", "9"], ["gen_length=9", "--canvas"]),
    (["generate", "x", "--canvas", "{gap:5000}"], ["gen_length=5000", "4096"]),
    (["chat", "--steps", "0"], ["steps=0"]),
    (["chat", "--canvas", "{gap:8}"], ["--canvas"]),
    (["chat", "--choices", ""], ["choices"]),
    (["chat", "--model", "no/such/folder"], ["no/such/folder"]),
    (["doctor", "now"], ["now"]),
])  # fmt: skip
def test_mistakes(call, arguments, words):
    assert_refused(call(*arguments, *([QUIET] if arguments[:1] == ["generate"] else [])), *words)


def damaged(folder, name):
    """A copy of the embedded model with one thing wrong."""
    shutil.copytree(demo.path(), folder)
    weights = folder / "model.safetensors"
    if name == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif name == "no weights":
        weights.unlink()
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "bad config":
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif name == "no chat template":
        config = folder / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(config.read_bytes()).items() if key != "chat_template"}
        config.write_text(json.dumps(kept), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name, words", [
    ("pickle only", ["pytorch_model.bin", "pickle"]),
    ("truncated", ["model.safetensors"]),
    ("no weights", ["model.safetensors"]),
    ("no config", ["config.json"]),
    ("bad config", ["config.json", "model_type='llama'"]),
    ("no tokenizer", ["tokenizer.json"]),
    ("no chat template", ["--raw"]),
])  # fmt: skip
def test_bad_checkpoints(call, tmp_path, name, words):
    assert_refused(call("generate", "x", QUIET, "--model", damaged(tmp_path / "model", name)), *words)


def test_failure_while_running_exits_1(call, monkeypatch):
    def fail(args):
        raise RuntimeError("row 0: logits hold NaN\nat step 3")

    monkeypatch.setattr(cli, "doctor", fail)
    assert call("doctor") == (1, "", "llada2-fast: error: row 0: logits hold NaN at step 3\n")


def test_ctrl_c_exits_130(call, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "doctor", interrupt)
    assert call("doctor") == (130, "", "")


def test_reader_of_stdout_that_goes_away():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llada2_fast", "doctor"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments, closed, code, said", [
    (f"generate '{QUESTION}'", ">&-", 2, "stdout is closed"),
    ("doctor", ">/dev/full", 1, "No space left"),
    (f"generate '{QUESTION}'", "2>&-", 0, ""),
    (f"generate '{QUESTION}'", "2>/dev/full", 0, ""),
])  # fmt: skip
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_streams_that_are_closed_or_full(arguments, closed, code, said):
    command = f"'{sys.executable}' -m llada2_fast {arguments} {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "" if code else ANSWER + "\n")
    assert done.stderr.count("\n") == bool(said) and said in done.stderr


@pytest.mark.parametrize("arguments", [["generate", "-"], ["chat"]])
def test_a_closed_stdin_is_one_line(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it then
    assert_refused((cli.main(arguments), *capsys.readouterr()), "stdin is closed")


def test_a_byte_order_mark_on_stdin_is_no_text(call):
    code, out, _ = call("generate", "-", "--json", QUIET, stdin=f"\ufeff{QUESTION}\n")
    assert (code, json.loads(out)["prompt"]) == (0, QUESTION)
    code, out, _ = call("chat", "--json", QUIET, stdin=f"\ufeff{QUESTION}\n/reset\n\ufeff{QUESTION}\n")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [QUESTION, f"\ufeff{QUESTION}"]


def test_chat_remembers_until_reset(call):
    lines = f"{QUESTION}\n\nReverse moon crow bread lamp.\n/reset\n{QUESTION}\n/exit\n{QUESTION}\n"
    code, out, err = call("chat", "--json", QUIET, stdin=lines)
    first, second, third = map(json.loads, out.splitlines())
    assert code == 0 and err.count("\n") == 3
    assert first["text"] == third["text"] == ANSWER and second["text"] == "Reversed: lamp bread crow moon"
    assert first["prompt_tokens"] == third["prompt_tokens"]
    alone = json.loads(call("generate", "Reverse moon crow bread lamp.", "--json", QUIET)[1])
    assert second["prompt_tokens"] == first["prompt_tokens"] + first["num_tokens"] + alone["prompt_tokens"]


def test_chat_goes_on_after_a_turn_that_is_too_long(call):
    code, out, err = call("chat", QUIET, stdin="red " * 5000 + f"\n{QUESTION}\n")
    assert (code, out) == (0, ANSWER + "\n")
    assert "llada2-fast: error: prompt: " in err.splitlines()[0]


def run_bytes(*arguments, stdin=b"", **env):
    """As `run`, with bytes: what a terminal or a file of any encoding hands over."""
    command = [os.fsencode(sys.executable), b"-m", b"llada2_fast", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, env={**os.environ, **env})


POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python then takes ASCII for everything


@pytest.mark.parametrize("arguments, stdin, env", [
    pytest.param([b"caf\xe9"], b"", {}, marks=SLOW), ([b"x", b"caf\xe9"], b"", POSIX),
    pytest.param([b"-"], b"caf\xe9\n", {}, marks=SLOW), ([b"-"], b"caf\xe9\n", {"PYTHONIOENCODING": "cp1252"}),
])  # fmt: skip
def test_a_prompt_that_is_no_utf8(arguments, stdin, env):
    done = run_bytes(b"generate", b"--no-progress", *arguments, stdin=stdin, **env)
    error = b"llada2-fast: error: prompt: no valid UTF-8: byte 0xe9 at position 3"
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, b"", [error])


@pytest.mark.parametrize("mark, env", [(b"", POSIX), (codecs.BOM_UTF8, {"PYTHONIOENCODING": "cp1252"})])
def test_prompts_are_utf8_whatever_the_locale_says(mark, env):
    """With a byte order mark on stdin too; the progress bar has characters that anything can show."""
    prompt = "Reverse mo\u00f6n crow \u2603."
    done = run_bytes(b"generate", b"--json", prompt.encode(), b"-", stdin=mark + prompt.encode(), **env)
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == [prompt, prompt], done.stderr
    assert done.returncode == 0 and b"Blocks: 100%" in done.stderr and b"Traceback" not in done.stderr
    assert done.stderr.isascii()


@pytest.mark.parametrize("command, encoding", [pytest.param("generate", "cp1252", marks=SLOW), ("chat", "ascii")])
def test_an_answer_is_written_with_replacements(call, command, encoding):
    sampled = ["--no-progress", "--max-tokens", "32", "--temperature", "50", "--seed", "3"]
    whole = call("generate", *sampled, "Write")[1]
    lacking = whole.encode(encoding, "replace")
    assert lacking.decode(encoding) != whole
    arguments = [command, *sampled, *(["Write"] if command == "generate" else [])]
    done = run_bytes(*map(str.encode, arguments), stdin=b"Write\n", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout.splitlines()) == (0, lacking.splitlines())


@pytest.mark.parametrize("arguments, code", [
    ([b"doctor"], 0), ([b"--help"], 0), ([b"generate", b"x", b"--model", b"caf\xe9"], 2),
], ids=["doctor", "help", "mistake"])  # fmt: skip
def test_ascii_is_enough_for_everything_else(arguments, code):
    done = run_bytes(*arguments, **POSIX)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr
    assert (done.stdout + done.stderr).isascii()


def test_chat_in_a_process_of_its_own_goes_on_after_a_line_that_is_no_utf8():
    lines = b"caf\xe9\n" + QUESTION.encode() + b"\n\xff\n" + QUESTION.encode() + b"\r\n"
    done = run_bytes(b"chat", b"--no-progress", stdin=lines)
    assert (done.returncode, done.stdout) == (0, 2 * (ANSWER + "\n").encode().replace(b"\n", os.linesep.encode()))
    said = done.stderr.splitlines()
    assert len(said) == 4 and all(b"tokens/s" in line for line in said[1::2])
    assert b"no valid UTF-8: byte 0xe9" in said[0] and b"no valid UTF-8: byte 0xff" in said[2]


@pytest.mark.parametrize("prompt", ["", " ", "a\0b", "\0", "\u2603 \U0001f600", "\ufeff", "\r\n"])
def test_any_text_is_a_prompt(call, prompt):
    assert call("generate", prompt, QUIET, "--max-tokens", "8")[0] == 0
    assert call("generate", "-", QUIET, "--max-tokens", "8", stdin=prompt)[0] == 0


@pytest.mark.parametrize("prompt", ["\ud800", "caf\udce9", "\udfff x"])
def test_lone_surrogates_are_no_text(call, prompt):
    assert_refused(call("generate", prompt, QUIET), "prompt: no valid UTF-8")
    code, out, err = call("chat", QUIET, stdin=f"{prompt}\n{QUESTION}\n")
    assert (code, out) == (0, ANSWER + "\n") and "prompt: no valid UTF-8" in err.splitlines()[0]


def test_no_mistake_quotes_a_whole_prompt(call):
    prompt = "--" + "spell" * 2000
    code, out, err = call("generate", "x", prompt)
    assert (code, out, err.count("\n")) == (2, "", 1) and len(err) < 300


def test_doctor(call):
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    for word in ("torch", "triton", "transformers", "kernels (of HF)", "ops on", "refine_step", "rms_norm", "right"):
        assert word in out


def test_doctor_json(call):
    code, out, _ = call("doctor", "--json")
    report = json.loads(out)
    ops = next(lines for title, lines in report.items() if title.startswith("ops on "))
    assert code == 0 and report["versions"]["llada2-fast"] == __version__
    assert {"refine_step", "block_attention", "route", "experts", "rms_norm", "qk_norm_rope"} <= set(ops)
    assert all(choice == "Triton" or choice.startswith("PyTorch: ") for choice in ops.values())


def test_doctor_finds_a_model_that_answers_wrong(call, monkeypatch):
    monkeypatch.setattr(doctor, "ANSWER", "The answer is 944.")
    code, out, _ = call("doctor")
    assert code == 1 and "wrong: " in out and "The answer is 943." in out
