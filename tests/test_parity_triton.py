"""Whole decodings on the Triton kernels, under the interpreter: tokens as of the PyTorch reference and the goldens."""

import json

import pytest
import torch

from llada2_fast import demo
from llada2_fast.kernels._triton import force_ops
from llada2_fast.model import LLaDA2Model
from llada2_fast.tokens import load_tokenizer
from tests.kernels.interpreter import interpreted

SETS = ("tiny", "group", "variant", "flat", "moe256", "bf16")
PROMPTS = ("Add 847 and 96.", "Spell 4071.", "Reverse moon crow bread lamp.")


def on_triton(call):
    with force_ops("triton"), interpreted():
        return call()


def load(folder):
    return LLaDA2Model.from_pretrained(folder, dtype=torch.float32, progress=False)


def cases(golden, name, label):
    known = json.loads((golden / name / "generate.json").read_bytes())["cases"]
    return [case for case in known if case["label"] == label]


def decode(model, case):
    prompt = torch.tensor([case["prompt"]], dtype=torch.int64)
    return model.generate(prompt, profile=f"hf-{case['version']}", **case["params"])[0].tolist()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("label", ["aligned", "low_threshold", "quality"])
@pytest.mark.parametrize("name", ["tiny", "moe256"])
def test_recorded_decodings_come_out_of_the_kernels(golden, name, label):
    model = load(golden / name)
    for case in cases(golden, name, label):
        assert on_triton(lambda case=case: decode(model, case)) == case["output"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("text", PROMPTS)
def test_the_embedded_model_writes_the_same_on_the_kernels(text):
    model, tokenizer = load(demo.path()), load_tokenizer(demo.path())
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    call = lambda: model.generate(prompt["input_ids"], gen_length=16, threshold=0.9, trace=True, return_dict=True)  # noqa: E731
    ours, reference = on_triton(call), call()
    assert torch.equal(ours.sequences, reference.sequences)
    assert [e[:5] for e in ours.trace[0].events] == [e[:5] for e in reference.trace[0].events]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SETS)
def test_one_recorded_decoding_of_every_label_comes_out_of_the_kernels(golden, name):
    model = load(golden / name)
    known = json.loads((golden / name / "generate.json").read_bytes())["cases"]
    for label in sorted({case["label"] for case in known}):
        for case in cases(golden, name, label)[:1]:
            assert on_triton(lambda case=case: decode(model, case)) == case["output"], label
