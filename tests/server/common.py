"""A server process of its own, as a user starts it, and what the embedded model answers without one."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import torch

from llada2_fast import DecodeParams, Engine, EngineConfig, LLaDA2Model, demo, load_tokenizer

MODEL = "llada2-fast-demo"
QUESTIONS = ("Add 847 and 96.", "Spell 4071, 22, 608.", "Reverse moon crow bread lamp seal.")


def chat(text):
    return [{"role": "user", "content": text}]


class Process:
    """`llada2-fast serve` with these options, from its first answer on until the end of a `with`.

    command: a program in its place.
    log: its lines on stderr so far, parsed.
    """

    def __init__(self, *options, command=None, **environment):
        command = command or [sys.executable, "-m", "llada2_fast", "serve", "--port", "0", "--no-progress", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self.log = []
        self.url = self._next("serving")["url"]
        self._reader = threading.Thread(target=lambda: self._next(None), daemon=True)
        self._reader.start()

    def _next(self, event):
        """Read its log until there is such an event; all of it if there is none."""
        for line in self.process.stderr:
            self.log.append(json.loads(line))
            if self.log[-1]["event"] == event:
                return self.log[-1]
        assert event is None, self.log

    def wait_for(self, **facts):
        """The first line of its log with these facts, which may take a while to come here."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            for line in list(self.log):
                if facts.items() <= line.items():
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line with {facts} in {self.log}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def stop(self):
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join()
        return code


@functools.cache
def model():
    return LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)


@functools.cache
def tokenizer():
    return load_tokenizer(demo.path())


def prompt(text):
    return tokenizer().apply_chat_template(chat(text), add_generation_prompt=True, return_dict=False)


def alone(ids, *, n=1, **decoding):
    """The outputs that an engine gives a prompt without any server."""
    params = DecodeParams(**{"gen_length": 64, "eos_early_stop": True} | decoding)
    return Engine(model(), EngineConfig(cache_tokens=8192), tokenizer()).generate([ids], params, n=n)
