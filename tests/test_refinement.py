"""The library face: parameters of rows as tensors, and README's loop against generate()."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from llada2_fast import DecodeParams, RefineParams, demo, refine_params
from llada2_fast.refinement import Lanes, SpecialIds, row_rule
from tests.test_readme import BLOCKS


def test_parameters_are_those_of_lanes():
    each = [
        DecodeParams(16, threshold=0.7, editing_threshold=0.5, steps=8, temperature=0.5, top_k=3, top_p=0.9),
        DecodeParams(16, profile="hf-2.0", eos_early_stop=True),
        DecodeParams(16, profile="hf-2.1"),
        DecodeParams(16, policy="entropy", entropy_bound=0.7, entropy_decay=0.9),
    ]
    eos = [[252], [252, 7], [], [7]]
    lanes = Lanes(4, 8, SpecialIds(255), max_eos=2)
    for lane, one in enumerate(each):
        lanes.open(lane, 8, [3], 25, 32, row_rule(one, 8), lane, eos[lane])
    ours = refine_params(each, 8, range(4), eos)
    for field in fields(RefineParams):
        a, b = getattr(ours, field.name), getattr(lanes.params, field.name)
        assert a.dtype == b.dtype and torch.equal(a, b), field.name


@pytest.mark.parametrize("change, message", [
    ({"seeds": [1]}, "seeds, eos_ids: expected 2 each"),
    ({"eos_ids": [[1]] * 3}, "seeds, eos_ids: expected 2 each"),
    ({"params": [DecodeParams(), 0.5]}, "params: expected DecodeParams, got float"),
    ({"params": [DecodeParams(editing_threshold=0.5, edit_window=2)] * 2}, "edit_window=2: expected 0"),
    ({"params": [DecodeParams(policy="entropy"), DecodeParams(policy="self_speculative")]},
     "policy='self_speculative': expected another one, a draft is checked by a forward of its own"),
])  # fmt: skip
def test_bad_input(change, message):
    call = {"params": [DecodeParams()] * 2, "block_length": 8, "seeds": [1, 2], "eos_ids": [[]] * 2} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        refine_params(**call)


@pytest.mark.parametrize("params", [
    "threshold=0.9, eos_early_stop=True", "threshold=0.5, editing_threshold=0.5, eos_early_stop=True",
    "threshold=0.9, steps=8, temperature=0.7, top_p=0.9", "policy='entropy', eos_early_stop=True",
])  # fmt: skip
def test_the_loop_of_the_readme_gives_the_tokens_of_generate(params):
    loop = next(block for block in BLOCKS if "Lanes" in block)
    assert len([line for line in loop.splitlines() if line.strip()]) <= 55
    loop = loop.replace('"inclusionAI/LLaDA2.1-mini"', repr(str(Path(demo.path())))).replace('"cuda"', '"cpu"')
    assert "threshold=0.9, eos_early_stop=True" in loop
    names = {}
    exec(compile(loop.replace("threshold=0.9, eos_early_stop=True", params), "README.md", "exec"), names)
    options = eval(f"dict({params})")
    wanted = names["model"].generate(names["prompts"], gen_length=64, return_dict=True, seed=0, **options)
    for prompt, text, sequence, count in zip(
        names["prompts"], names["texts"], wanted.sequences, wanted.num_tokens, strict=True
    ):
        assert text[len(prompt) : len(prompt) + count] == sequence[:count].tolist()
