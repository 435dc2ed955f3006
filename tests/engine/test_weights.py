"""Weights that change under an engine, and its memory given away for a while: nothing old is ever found again."""

import asyncio
import contextlib

import pytest
import torch

from llada2_fast import demo
from llada2_fast.config import DecodeParams
from llada2_fast.engine import AsyncEngine, Engine
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights.checkpoint import CheckpointError
from tests.engine.common import (
    PARAMS,
    UNDERTRAINED,
    assert_as_alone,
    assert_empty,
    demo_model,
    prompt_of,
    random_model,
    small_engine,
    tokens_alone,
)
from tests.engine.test_cuts import CONFIGS, Tracer

LONG = DecodeParams(gen_length=40, threshold=2.0, steps=4, eos_ids=())
NEW = random_model(1)


def copy_of(model):
    copy = LLaDA2Model(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def old_model():
    return copy_of(random_model())


def interrupt():
    raise KeyboardInterrupt


def engine_at_work(**config):
    """(engine, a request that has given out two blocks, one that waits)."""
    engine = small_engine(model=old_model(), max_num_seqs=1, **config)
    running, waiting = engine.add_request(prompt_of(16, 5), LONG), engine.add_request(prompt_of(16, 6), LONG)
    while running.sequence.num_delivered < 8:
        engine.step()
    return engine, running, waiting


def assert_nothing_old_is_found(engine):
    """Who comes now gets what the new weights give, whoever has asked for the same before."""
    for seed in (5, 6):
        for _ in range(2):
            assert_as_alone(engine.generate([prompt_of(16, seed)], LONG)[0], NEW, prompt_of(16, seed), LONG)
    assert_empty(engine)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("how", ["finish", "recompute", "restart", "fail"])
def test_what_becomes_of_requests_that_have_begun(how, graphs):
    engine, running, waiting = engine_at_work(graphs=graphs, capture=False)
    old = tokens_alone(random_model(), running.prompt, LONG)
    engine.update_weights(NEW.state_dict(), how)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert_as_alone(waiting.output, NEW, waiting.prompt, LONG, traced=not graphs)
    given = running.output.token_ids
    if how in ("restart", "fail"):  # it has been given tokens
        assert given == old[: len(given)] and running.output.finish_reason == "error"
        assert "the weights have been changed" in running.output.error
    else:
        assert given[:8] == old[:8] and len(given) == 40 and running.output.error is None
        continued = tokens_alone(NEW, [*running.prompt, *given[:8]], DecodeParams(**{**vars(LONG), "gen_length": 32}))
        assert (given[8:] == continued) == (how == "recompute")
    if not graphs:
        assert_nothing_old_is_found(engine)


@pytest.mark.parametrize("change", ["clear", "weights_changed"])
def test_pages_computed_before_a_change_are_never_found_after_it(change):
    engine, running, waiting = engine_at_work()
    engine.model.load_state_dict(NEW.state_dict())
    engine.cache.clear() if change == "clear" else engine.weights_changed("finish")
    while engine.has_work:
        engine.step()
    assert_nothing_old_is_found(engine)


def test_who_has_been_told_tokens_is_not_restarted():
    engine = small_engine(model=old_model())
    streamed, neither = (engine.add_request(prompt_of(16, n), LONG) for n in (5, 6))
    events = engine.stream(streamed)
    while not streamed.sequence.num_delivered:
        next(events)
    engine.cancel(neither.request_id)
    neither = engine.add_request(prompt_of(16, 6), LONG)
    engine.step()
    engine.update_weights(NEW.state_dict(), "restart")
    assert [request.output is not None for request in (streamed, neither)] == [True, False]
    while engine.has_work:
        engine.step()
    assert_as_alone(neither.output, NEW, neither.prompt, LONG)
    assert [event.kind for event in events][-1] == "finish" and streamed.output.finish_reason == "error"


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"norm.weight": torch.ones(17)}, r"norm.weight: expected a tensor \[16\], got \[17\]"),
        ({"norm.weight": [1.0] * 16}, "norm.weight: expected a tensor"),
        ({"norm.weight": torch.ones(16, dtype=torch.int64)}, "norm.weight: expected torch.float32, got torch.int64"),
        ({"norm.weight": torch.full((16,), float("nan"))}, "norm.weight: expected numbers that are finite"),
        ({"norm": torch.ones(16)}, "'norm' is none of the model's parameters"),
        ({5: torch.ones(16)}, "5 is none of the model's parameters"),
        (demo.path(), "expected a checkpoint whose config is the model's"),
        ("/nowhere", "nowhere"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(weights, message):
    engine, running, waiting = engine_at_work()
    both = {**NEW.state_dict(), **weights} if isinstance(weights, dict) else weights
    with pytest.raises((ValueError, OSError), match=message):
        engine.update_weights(both)
    with pytest.raises(ValueError, match="^running='later'"):
        engine.update_weights(NEW.state_dict(), running="later")
    while engine.has_work:
        engine.step()
    for request in (running, waiting):
        assert_as_alone(request.output, random_model(), request.prompt, LONG)


def test_a_swap_of_the_model_s_own_tensors():
    engine = small_engine(model=old_model())
    params = dict(engine.model.named_parameters())
    names = [name for name in params if name.endswith("layernorm.weight") and params[name].shape == (16,)][:2]
    before = [params[name].clone() for name in names]
    engine.update_weights({names[0]: params[names[1]], names[1]: params[names[0]]})
    assert torch.equal(params[names[0]], before[1]) and torch.equal(params[names[1]], before[0])


def test_weights_of_another_dtype_or_some_of_them_will_do():
    engine = small_engine(model=old_model())
    engine.update_weights({name: weight.double() for name, weight in NEW.state_dict().items()})
    assert_as_alone(engine.generate([prompt_of(9)], LONG)[0], NEW, prompt_of(9), LONG)
    engine.update_weights({"norm.weight": random_model().norm.weight})
    mixed = LLaDA2Model(NEW.config)
    mixed.load_state_dict({**NEW.state_dict(), "norm.weight": random_model().norm.weight})
    assert_as_alone(engine.generate([prompt_of(9)], LONG)[0], mixed, prompt_of(9), LONG)


def test_weights_from_a_checkpoint(tmp_path):
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    engine, params = Engine(model), DecodeParams(gen_length=32, threshold=0.7)
    assert_as_alone(engine.generate([prompt_of(9)], params)[0], demo_model(), prompt_of(9), params)
    engine.update_weights(UNDERTRAINED)
    assert_as_alone(engine.generate([prompt_of(9)], params)[0], demo_model(UNDERTRAINED), prompt_of(9), params)
    for file in UNDERTRAINED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (weights,) = tmp_path.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-400:] = b"\xff" * 400  # NaN in the last tensor: found only when it is read
    weights.write_bytes(data)
    request = engine.add_request(prompt_of(9), params)
    engine.step()
    with pytest.raises(CheckpointError):
        engine.update_weights(tmp_path)
    assert engine.paused and request.output.finish_reason == "error"
    engine.update_weights(demo.path())
    engine.resume()
    assert_as_alone(engine.generate([prompt_of(9)], params)[0], demo_model(), prompt_of(9), params)


def test_a_paused_engine_keeps_places_and_takes_requests():
    engine, running, waiting = engine_at_work()
    engine.pause()
    steps, later = engine.num_steps, engine.add_request(prompt_of(5), PARAMS[0])
    assert engine.step() == [] and engine.num_steps == steps and running.status == "running"
    for call in (lambda: engine.generate([[1]], LONG), lambda: list(engine.stream(waiting))):
        with pytest.raises(RuntimeError, match=r"the engine is paused: resume\(\) it first"):
            call()
    assert waiting.output.finish_reason == "cancelled"  # its stream was closed by that
    engine.resume()
    while engine.has_work:
        engine.step()
    assert_as_alone(running.output, random_model(), running.prompt, LONG)
    assert_as_alone(later.output, random_model(), later.prompt, PARAMS[0])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_sleeping_engine_has_no_cache_and_goes_on_after_it(graphs):
    engine, running, waiting = engine_at_work(graphs=graphs, capture=False)
    engine.sleep()
    assert engine.cache.k is None and engine.cache.v is None and engine.step() == []
    with pytest.raises(RuntimeError, match=r"asleep: wake\(\) it first"):
        engine.generate([[1]], LONG)
    engine.check_integrity()
    engine.sleep()
    engine.wake()
    engine.wake()
    while engine.has_work:
        engine.step()
    for request in (running, waiting):
        assert_as_alone(request.output, random_model(), request.prompt, LONG, traced=not graphs)
    assert_empty(engine)


@pytest.mark.parametrize("change, config", [("update", "eager"), ("sleep", "graphs"), ("wake", "eager")])
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_old_is_found_if_ctrl_c_comes_in_the_middle_of_a_change(change, config, stride):
    """At every line of it, or every ninth: whatever weights are there then, who comes next gets what they give."""

    def act(engine):
        if change == "update":
            engine.update_weights(NEW.state_dict())
        else:
            engine.sleep()
            if change == "wake":
                engine.wake()

    tracer = Tracer()
    engine, *_ = engine_at_work(**CONFIGS[config])
    with tracer():
        act(engine)
    own = [where for where in tracer.hits if where[0].endswith(("engine.py", "cache.py"))]
    for where in own[::stride]:
        engine, running, waiting = engine_at_work(**CONFIGS[config])
        tracer = Tracer((*where, 1), interrupt)
        with contextlib.suppress(KeyboardInterrupt), tracer():
            act(engine)
        assert tracer.stack is not None
        engine.check_integrity()
        engine.wake()
        engine.resume()
        while engine.has_work:
            engine.step()
        model = copy_of(engine.model)
        output = engine.generate([running.prompt], LONG)[0]
        assert output.token_ids == tokens_alone(model, running.prompt, LONG), where
        assert_empty(engine)


def test_all_of_it_between_the_steps_of_a_served_engine():
    async def main():
        async with AsyncEngine(small_engine(model=old_model())) as serving:
            await serving.call(Engine.pause)
            tasks = [asyncio.create_task(serving.generate(prompt_of(n), LONG)) for n in (5, 6)]
            late = await serving.generate(prompt_of(7), LONG, deadline_s=0.05)
            assert (late.finish_reason, late.token_ids) == ("deadline", [])
            await serving.call(lambda engine: engine.update_weights(NEW.state_dict()))
            await serving.call(Engine.sleep)
            await serving.call(Engine.wake)
            await serving.call(Engine.resume)
            for n, task in zip((5, 6), tasks, strict=True):
                assert_as_alone(await task, NEW, prompt_of(n), LONG)
            tasks = [asyncio.create_task(serving.generate(prompt_of(n), LONG)) for n in (8, 9)]
            while not serving.engine.scheduler.running:
                await asyncio.sleep(0)
            while not all(request.sequence.num_delivered for request in serving.engine.scheduler.running):
                await asyncio.sleep(0)
            await serving.call(lambda engine: engine.update_weights(random_model().state_dict(), "restart"))
            for n, task in zip((8, 9), tasks, strict=True):
                assert_as_alone(await task, random_model(), prompt_of(n), LONG)

    asyncio.run(asyncio.wait_for(main(), 100))
