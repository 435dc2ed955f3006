"""Whole decodings on the Triton kernels, under the interpreter: tokens as of the PyTorch reference and the goldens."""

import json
import math
from unittest import mock

import pytest
import torch

from llada2_fast import DecodeParams, Engine, EngineConfig, demo
from llada2_fast.kernels import router
from llada2_fast.kernels._triton import force_ops
from llada2_fast.model import LLaDA2Model
from tests.engine.common import UNDERTRAINED, chat
from tests.kernels.interpreter import interpreted
from tests.rounding import decode, first_difference, undecided_from, writes

SETS = ("tiny", "group", "variant", "flat", "moe256", "bf16", "block22")
MIXED = UNDERTRAINED.parent / "mixed"
PROMPTS = ("Add 847 and 96.", "Spell 4071.", "Reverse moon crow bread lamp.")


def on_triton(call):
    """Few programs of the router: the interpreter runs one after the other."""
    with force_ops("triton"), interpreted(), mock.patch.dict(router.TOKENS, few=32):
        return call()


def load(folder, device="cpu"):
    return LLaDA2Model.from_pretrained(folder, dtype=torch.float32, device=device, progress=False)


def cases(golden, name, label):
    known = json.loads((golden / name / "generate.json").read_bytes())["cases"]
    return [case for case in known if case["label"] == label]


def first_of_each_label(golden, name):
    known = json.loads((golden / name / "generate.json").read_bytes())["cases"]
    return list({case["label"]: case for case in reversed(known)}.values())


@pytest.mark.parametrize(
    "name, label",
    [
        ("tiny", "aligned"), ("tiny", "low_threshold"), ("tiny", "quality"), ("moe256", "aligned"),
        ("moe256", "low_threshold"), ("block22", "post00"),
    ],
)  # fmt: skip
def test_recorded_decodings_come_out_of_the_kernels(golden, name, label):
    model = load(golden / name)
    for case in cases(golden, name, label):
        assert on_triton(lambda case=case: decode(model, case)) == case["output"]


@pytest.mark.parametrize(
    "variant, text, rules",
    [
        *(("2.1", text, {"threshold": 0.9}) for text in PROMPTS),
        ("2.1", "Spell 4071.", {"policy": "entropy", "entropy_bound": 0.5, "entropy_decay": 0.8}),
        ("2.1", "Spell 4071.", {"policy": "self_speculative", "entropy_bound": 0.01}),
        ("2.2", "Spell 7305, 12.", {"threshold": 0.2, "editing_threshold": 0.3}),
    ],
)  # fmt: skip
def test_the_embedded_model_writes_the_same_on_the_kernels(variant, text, rules):
    model, prompt = load(demo.path(variant)), [chat(text)]
    call = lambda: model.generate(prompt, gen_length=16, trace=True, return_dict=True, **rules)  # noqa: E731
    ours, reference = on_triton(call), call()
    assert torch.equal(ours.sequences, reference.sequences)
    assert [e[:5] for e in ours.trace[0].events] == [e[:5] for e in reference.trace[0].events]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SETS)
def test_one_recorded_decoding_of_every_label_comes_out_of_the_kernels(golden, name):
    model = load(golden / name)
    for case in first_of_each_label(golden, name):
        assert on_triton(lambda case=case: decode(model, case)) == case["output"], case["label"]


@pytest.mark.parametrize("label, step", [("block32", 4), ("one_step", math.inf)])
def test_a_decoding_that_hangs_on_a_rounding_is_found(golden, label, step):
    """A routing is nearly tied."""
    assert undecided_from(load(golden / "group"), cases(golden, "group", label)[0], draws=6) == step


@pytest.mark.gpu
@pytest.mark.timeout(240)  # 75 decodings, most of them captured anew
@pytest.mark.parametrize("name", SETS)
def test_recorded_decodings_come_out_of_the_graphs(golden, name):
    """Another rounding may change the few decodings that hang on one, and those from that step on."""
    model, reference = load(golden / name, "cuda"), load(golden / name)
    for case in first_of_each_label(golden, name):
        if decode(model, case, graphs=True) != case["output"]:
            step = first_difference(writes(model, case, graphs=True), writes(reference, case))
            assert undecided_from(reference, case) <= step < math.inf, case["label"]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["entropy", "self_speculative"])
def test_policies_write_the_same_on_a_gpu(policy):
    """A batch of ragged rows by graphs, whose drafts are checked outside them, against the CPU."""
    prompts, rules = [chat(text) for text in PROMPTS], {"policy": policy, "entropy_bound": 0.1}
    call = {"gen_length": 64, "eos_early_stop": True, "return_dict": True}
    wanted = load(MIXED).generate(prompts, **call, **rules)
    ours = load(MIXED, "cuda").generate(prompts, graphs=True, **call, **rules)
    assert torch.equal(ours.sequences.cpu(), wanted.sequences)
    assert [row.forwards_per_block for row in ours.counters] == [row.forwards_per_block for row in wanted.counters]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["2.1", "2.2"])
@pytest.mark.parametrize("kind", ["quality", "speed"])
def test_the_embedded_model_writes_the_same_on_a_gpu(kind, variant):
    """One batch of ragged rows by graphs, and the engine on them, against the CPU."""
    params = DecodeParams.preset(kind, gen_length=64, eos_early_stop=True)
    prompts = [chat(text) for text in PROMPTS]
    options = {"threshold": params.threshold, "editing_threshold": params.editing_threshold,
               "max_post_steps": params.max_post_steps, "gen_length": 64, "eos_early_stop": True}  # fmt: skip
    wanted = load(demo.path(variant)).generate(prompts, return_dict=True, **options)
    model = load(demo.path(variant), "cuda")
    ours = model.generate(prompts, return_dict=True, graphs=True, **options)
    assert torch.equal(ours.sequences.cpu(), wanted.sequences)
    assert [row.forwards_per_block for row in ours.counters] == [row.forwards_per_block for row in wanted.counters]
    engine = Engine(model, EngineConfig(graphs=True, max_num_seqs=2, cache_tokens=1024))
    for output, tokens, count in zip(
        engine.generate(prompts, params), wanted.sequences, wanted.num_tokens, strict=True
    ):
        assert output.token_ids == tokens[:count].tolist()
