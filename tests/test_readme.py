"""The README's Python runs as printed, but for the device and the lengths: its hub id is that of the embedded model in
an offline cache."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import llada2_fast
from benchmarks.own_server import ServerProcess
from llada2_fast import demo
from llada2_fast.cli import main
from tests import hub

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
WORDS = {  # a call of each block -> a word of its output
    "canvas=": "The answer is 943.",
    "json_schema": "4071 is four thousand seventy one\ndict_keys(['sum'])\n",
    "model.generate": "spell",
    "pipe(": "spell",
    "theirs(": "The answer is 943.",
    "writer(": "The answer is 943.",
    "OpenAI(": "The answer is 943.",
    "AsyncEngine(": "The answer is 943.",
    "Engine(": "The answer is 943.",
    "Lanes": "The answer is 943.",
}
NAMES = [next((call for call in WORDS if call in block), "none") for block in BLOCKS]
# Runs the blocks that stdin lists one after the other; prints for each what it printed, or how it failed.
RUN = """
import contextlib, io, json, sys, traceback
for block in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            exec(compile(block, "README.md", "exec"), {})
        except BaseException:
            traceback.print_exc(file=said)
    print(json.dumps(said.getvalue()), flush=True)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each block prints in a process that finds the id in its cache, and no network."""
    home = tmp_path_factory.mktemp("home")
    hub.put(home, "inclusionAI/LLaDA2.1-mini", demo.path())
    blocks = []
    for block in BLOCKS:
        for there, here in (('device="cuda"', 'device="cpu"'), ("gen_length=512", "gen_length=64")):
            block = block.replace(there, here)
        blocks.append(block.replace("gen_length=256", "gen_length=64"))
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    with ServerProcess() as server:
        blocks = [block.replace("http://127.0.0.1:8000", server.url) for block in blocks]
        done = subprocess.run(
            [sys.executable, "-c", RUN], cwd=ROOT, env=env, input=json.dumps(blocks), capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return dict(zip(NAMES, map(json.loads, done.stdout.splitlines()), strict=True))


def test_there_is_a_block_for_each_face():
    assert sorted(NAMES) == sorted(WORDS)


@pytest.mark.parametrize("name", NAMES)
def test_python_block(outputs, name):
    assert "Traceback" not in outputs[name]
    assert WORDS[name] in outputs[name]


FORMS = {  # an option of a command that README shows -> what it prints
    "--canvas": "4071 is four thousand seventy one\n",
    "--choices": "(yes|no)\n",
    "--json-schema": r'\{\s*"sum"\s*:\s*-?[0-9]+\s*\}\n',
}


@pytest.mark.parametrize("option", FORMS)
def test_command_of_a_form(option, tmp_path, monkeypatch, capsys):
    (line,) = re.findall(f"^    llada2-fast (generate {option} .*)", (ROOT / "README.md").read_text("utf-8"), re.M)
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(line, comments=True), "--no-progress"]) == 0
    assert re.fullmatch(FORMS[option], capsys.readouterr().out)


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_python_imports_from_the_top_alone(block):
    """So that files may move."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("llada2_fast.")]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "llada2_fast":
            assert node.module == "llada2_fast"
            assert {alias.name for alias in node.names} <= {*llada2_fast.__all__}
