"""Hub ids: snapshots in the cache, branches and commits, with no network; what the hub refuses is one line."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from llada2_fast import BlockRefinementScheduler, demo
from llada2_fast.weights.checkpoint import resolve
from tests import hub

ROOT = Path(__file__).parent.parent
OTHER = "f" * 40  # a commit that is not in the cache


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    hub.put(folder, "org/demo", demo.path())
    for name in ("model", "tokenizer"):
        shutil.copytree(demo.path(), folder / "pipe" / name)
    BlockRefinementScheduler(block_length=24).save_pretrained(folder / "pipe" / "scheduler")
    hub.put(folder, "org/pipe", folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def refusing():
    """The address of a hub that answers as huggingface.co does to those who may not have what they ask for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "broken": (500, "")}
            name = self.path.split("/")[4]
            status, code = answers.get(name, (404, "RevisionNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            """Not onto the tests' stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(home, code, *arguments, **env):
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    command = [sys.executable, "-c", code, *arguments] if code else [sys.executable, "-m", "llada2_fast", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


EVERYTHING = """
import torch
from llada2_fast import BlockRefinementScheduler, LLaDA2Model, LLaDA2Pipeline, load_tokenizer
from transformers import AutoModelForCausalLM
sha, cache = "0123456789abcdef0123456789abcdef01234567", __import__("sys").argv[1]
for given in ({}, {"revision": "main"}, {"revision": sha}, {"revision": sha, "local_files_only": True},
              {"local_files_only": True, "token": "x"}, {"cache_dir": cache}):
    model = LLaDA2Model.from_pretrained("org/demo", progress=False, **given)
    tokenizer = load_tokenizer("org/demo", **given)
    pipe = LLaDA2Pipeline.from_pretrained("org/demo", progress=False, **given)
    auto = AutoModelForCausalLM.from_pretrained("org/demo", progress=False, **given)
    same = all(torch.equal(a, b) for m in (pipe.model, auto) for a, b in zip(m.parameters(), model.parameters()))
    print(model.special_ids["mask_token_id"] == tokenizer.mask_token_id == pipe.mask_token_id, same)
    parts = (LLaDA2Model, "model"), (AutoModelForCausalLM, "model"), (BlockRefinementScheduler, "scheduler")
    model, auto, scheduler = (part.from_pretrained("org/pipe", subfolder=name, **given) for part, name in parts)
    tokenizer = load_tokenizer("org/pipe", subfolder="tokenizer", **given)
    same = all(torch.equal(a, b) for a, b in zip(auto.parameters(), model.parameters()))
    print(same, scheduler.config.block_length == 24, tokenizer.mask_token_id == auto.special_ids["mask_token_id"])
print(load_tokenizer("org/demo", padding_side="left").padding_side)
"""


def test_everything_takes_an_id_offline(home):
    done = run(home, EVERYTHING, str(home / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True", "True True True"] * 6 + ["left"]


CACHED = """
from huggingface_hub import ResolvedRevision
from llada2_fast.weights.checkpoint import resolve
sha = "0123456789abcdef0123456789abcdef01234567"
resolved = ResolvedRevision(resolved=sha, initial=None, repo_id="org/demo", repo_type="model")
for revision in (sha, None, "main", resolved):
    print(resolve("org/demo", revision))
"""


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", None], ids=["unreachable", "offline"])
def test_cached_and_pinned_snapshots_need_no_hub(home, endpoint):
    env = {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint}
    snapshot = home / "hub" / "models--org--demo" / "snapshots" / hub.SHA
    assert run(home, CACHED, **env).stdout.split() == [str(snapshot)] * 4


TRY = """
import json, sys
from llada2_fast import LLaDA2Model, load_tokenizer
for name, given in json.loads(sys.argv[1]):
    for load in (LLaDA2Model.from_pretrained, load_tokenizer):
        try:
            load(name, **given)
        except ValueError as error:
            print(json.dumps([type(error).__name__, str(error)]))
"""


def failures(home, cases, **env):
    """What LLaDA2Model.from_pretrained and load_tokenizer say to each case, [(id, arguments)]."""
    done = run(home, TRY, json.dumps(cases), **env)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == 2 * len(cases)
    for model, tokenizer in zip(said[::2], said[1::2], strict=True):
        assert model == tokenizer and model[0] == "CheckpointError"
        assert "\n" not in model[1] and len(model[1]) < 350
    return [message for _, message in said[::2]]


def test_what_is_not_in_the_cache_is_one_line(home):
    cases = [
        ("org/none", {}), ("org/demo", {"revision": "v2"}), ("org/demo", {"revision": OTHER}),
        ("org/demo", {"cache_dir": str(home / "empty")}), ("org/none", {"local_files_only": True}),
    ]  # fmt: skip
    for (name, given), message in zip(cases, failures(home, cases, HF_HUB_OFFLINE="1"), strict=True):
        assert message.startswith(f"{name}: no such folder, and the hub did not provide it: ")
        assert given.get("revision", "") in message or OTHER in str(given)


def test_what_the_hub_refuses_is_one_line(home, refusing):
    cases = [
        ("org/gated", {}), ("org/private", {}), ("org/other", {"revision": "v2"}), ("org/broken", {}),
        ("org/demo", {"revision": "v2"}), ("org/other", {"revision": OTHER}),
    ]  # fmt: skip
    said = failures(home, cases, HF_ENDPOINT=refusing)
    for message, words in zip(said, ("is gated", "private one", "no revision 'v2'", "500", "'v2'", OTHER), strict=True):
        assert words in message


def test_a_hub_that_cannot_be_reached_is_one_line(home):
    cases = [("org/none", {}), ("org/none", {"revision": OTHER})]
    assert all("Connection refused" in text for text in failures(home, cases, HF_ENDPOINT="http://127.0.0.1:9"))


@pytest.mark.parametrize("subfolders", [False, True])
def test_the_hub_is_asked_for_what_was_said(monkeypatch, tmp_path, subfolders):
    asked, said = {}, {"cache_dir": "c", "token": "t", "local_files_only": True, "force_download": True}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.update(given) or tmp_path)
    assert resolve("org/demo", "v2", patterns=("*.json",), subfolders=subfolders, **said) == tmp_path
    ignored = None if subfolders else ["*/*"]
    assert asked == said | {"revision": "v2", "allow_patterns": ["*.json"], "ignore_patterns": ignored}


def test_the_command_line_takes_ids_and_revisions(home):
    question = ["generate", "Spell 4071.", "--no-progress", "--model", "org/demo"]
    done = run(home, None, *question, "--revision", hub.SHA, HF_HUB_OFFLINE="1")
    assert done.stdout == "4071 is four thousand seventy one\n", done.stderr
    done = run(home, None, *question, "--revision", "v2", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "'v2'" in done.stderr
