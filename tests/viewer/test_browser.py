"""The page in a browser (make test-browser): a trace file, and the live page of a server."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.own_server import ServerProcess
from llada2_fast import DecodeParams, Engine, LLaDA2Model, load_tokenizer
from llada2_fast.viewer import page, trace_document
from tests.engine.common import UNDERTRAINED

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
MODULES = ROOT / "build" / "browser" / "node_modules"
pytestmark = pytest.mark.browser
everywhere = pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)])


def scenario(name, address, scheme="light", width=1280, **environment):
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium and shutil.which("node"), "needs chromium and node on PATH"
    assert (MODULES / "playwright-core").is_dir(), "make test-browser installs it"
    command = ["node", HERE / "browser.mjs", name, address, scheme, str(width)]
    environment = {**os.environ, "NODE_MODULES": str(MODULES), "CHROMIUM": chromium, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.fixture(scope="module")
def documents():
    """Of a model that edits much, one with markup for a prompt."""
    tokenizer = load_tokenizer(UNDERTRAINED)
    engine = Engine(LLaDA2Model.from_pretrained(UNDERTRAINED, progress=False), tokenizer=tokenizer)
    params = DecodeParams(gen_length=64, threshold=0.3, editing_threshold=0.0, edit_window=1, eos_early_stop=True)
    made = []
    for prompt in ("Spell 4071, 22, 608.", "</script><img src=x onerror=alert(1)><!--"):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        (output,) = engine.generate([ids], params, trace=True, top_logprobs=5)
        made.append(
            trace_document(
                output, tokenizer, model="undertrained", prompt=prompt, params=params, block_length=16, mask_id=1
            )
        )
    return made


def write(folder, document):
    (folder / "trace.html").write_text(page(document), encoding="utf-8")
    return (folder / "trace.html").as_uri()


@everywhere
def test_scrubbing(documents, tmp_path, scheme, width):
    scenario("scrubbing", write(tmp_path, documents[0]), scheme, width)


def test_choosing(documents, tmp_path):
    scenario("choosing", write(tmp_path, documents))


def test_long_answers(documents, tmp_path):
    """2000 tokens, three of a block at each step."""
    one, count = documents[0], 2000
    ids = [one["token_ids"][i % 20] for i in range(count)]
    long = one | {"prompt_tokens": 0, "token_ids": ids, "alternatives": None}
    long["events"] = [
        {"step": i // 16 * 6 + i % 16 // 3, "position": i, "kind": "commit", "token": ids[i], "confidence": i % 7 / 6,
         "old": one["mask_id"]}
        for i in range(count)
    ]  # fmt: skip
    forwards = {"denoise_forwards": count // 16 * 6, "forwards_per_block": [6] * (count // 16)}
    scenario("long", write(tmp_path, long | {"statistics": one["statistics"] | forwards}))


@pytest.fixture(scope="module")
def server(request):
    """Of the embedded model, with further options."""
    with ServerProcess(*request.param) as server:
        yield server


def playground(server):
    return server.told("serving")[0]["playground"]


@everywhere
@pytest.mark.parametrize("server", [[]], ids=[""], indirect=True)
def test_asking(server, scheme, width):
    scenario("asking", playground(server), scheme, width)


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 360)])
@pytest.mark.parametrize("server", [["--eos-id", "-1"]], ids=["endless"], indirect=True)
def test_stopping(server, scheme, width):
    scenario("stopping", playground(server), scheme, width)


@pytest.mark.parametrize("server", [[str(UNDERTRAINED), "--eos-id", "-1"]], ids=["lost"], indirect=True)
def test_losing_the_server(server):
    scenario("losing", playground(server), SERVER=str(server.process.pid))
