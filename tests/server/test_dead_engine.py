"""An engine that cannot go on: everybody hears of it, and the process ends."""

import sys

import openai
import pytest

from benchmarks.own_server import ServerProcess
from tests.server.common import chat, client_of

# An engine none of whose steps succeeds any more, once somebody has asked for more than the warm-up does.
DYING = """
import torch
from llada2_fast import AsyncEngine, Engine, EngineConfig, LLaDA2Model, demo, load_tokenizer
from llada2_fast.config import ServerConfig
from llada2_fast.server import Server, bind, serve

class Dying(Engine):
    def step(self):
        if any(request.params.gen_length > 100 and request.log[1:] for request in self.requests.values()):
            raise RuntimeError("nothing goes any more")
        return super().step()

model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
config = ServerConfig(port=0)
server = Server(AsyncEngine(Dying(model, EngineConfig(), load_tokenizer(demo.path()))), config, ("dying",), {})
try:
    serve(server, bind(config))
except RuntimeError:
    raise SystemExit(1)
"""


@pytest.mark.parametrize("streamed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_engine_that_cannot_go_on(streamed):
    with ServerProcess(command=[sys.executable, "-c", DYING]) as server:
        asked = {"model": "dying", "messages": chat("x"), "extra_body": {"ignore_eos": True}}
        completions = client_of(server).chat.completions
        assert completions.create(**asked, max_tokens=8).choices
        with pytest.raises(openai.APIError, match="failed"):
            answer = completions.create(**asked, max_tokens=1000, stream=streamed)
            list(answer)
        assert server.process.wait(30) == 1
        assert server.wait_for(event="the engine has ended")
        assert server.wait_for(event="the engine's thread ends")["traceback"].count("nothing goes any more")
