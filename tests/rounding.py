"""Recorded decodings that hang on a rounding: another order of summation, of another processor or of a GPU, may write
otherwise from some step on, and is not wrong there."""

import copy
import math
from itertools import zip_longest

import torch


def rules_of(case):
    """What generate() is given of a recorded decoding, ids among it."""
    rules = {k: v for k, v in case["params"].items() if k not in ("delete_token_id", "split_token_id")}
    if case["version"] == "2.2":  # SGLang's, where a block that holds EOS is the last one
        return rules | {"profile": "sglang-indel", "eos_early_stop": True}
    return rules | {"profile": "hf-" + case["version"]}


def generate(model, case, **options):
    prompt = torch.tensor([case["prompt"]], dtype=torch.int64)
    return model.generate(prompt, **rules_of(case), **options)


def decode(model, case, **options):
    return generate(model, case, **options)[0].tolist()


def writes(model, case, **options):
    """What is written when: events without their confidences."""
    trace = generate(model, case, trace=True, return_dict=True, **options).trace[0]
    return [event[:5] for event in trace.events]


def first_difference(ours, theirs):
    """The first step at which two lists of writes differ, inf if they are equal."""
    pairs = zip_longest(ours, theirs)
    return next((min(write[0] for write in pair if write) for pair in pairs if pair[0] != pair[1]), math.inf)


def nudged(model, seed):
    """The model with weights off by about 1e-6 of each: what another order of summation may do."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in twin.parameters():
        weight.data.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator))
    return twin


def undecided_from(model, case, draws=12):
    """The first step of a decoding that hangs on a rounding: a nudged model writes otherwise there. inf: none does."""
    wanted = writes(model, case)
    return min(first_difference(writes(nudged(model, seed), case), wanted) for seed in range(draws))
