"""End to end: generate() on random weights at a given number of tokens per forward (TPF).

    decode mini <bf16|fp8|int4> b<batch>

Prompts of 1024 random tokens, greedy, no EOS. With a threshold that nothing passes, the quota alone decides: `steps=s`
fills every block of 32 in exactly s forwards. The TPF asked for, 6.63, is 32 / 4.83, so texts of two lengths are
generated at s = 4 and at s = 5; the difference in time over the difference in blocks is a block's time, free of prefill
and graph capture; and a block's time at 4.83 forwards is taken on the line between the two. Each time is the smaller of
two runs. call_tok_s is the whole call at s = 5 and the longer text, with prefill and capture. floor_ms is that of
a step behind the prompt, as in benchmarks.gpu.steps, over_floor the time of a forward over it.

host_syncs_per_step, launches_per_step and busy_ms_per_forward, in which the device is at work, are the profiler's, over
such a difference as well; launches of the whole graph are not among them. The loop waits once a step, for the report of
the step before the one it has launched.
"""

from functools import partial
from importlib.util import find_spec

import torch

from ..models import Task, diffusers
from ..roofline import BLOCK, floor_ms, step_costs
from .machine import QUANTIZATIONS, Point

TPF = 6.63
PROMPT, SHORT, LONG = 1024, 256, 768
STEPS = (4, 5)


def prompts(machine, model, batch):
    """`batch` prompts of random ids on the device, int64 [n] each."""
    return torch.randint(model.config.mask_token_id, (batch, machine.size(PROMPT, 64)), device=machine.device)


def text(model, inputs, gen_length, steps):
    """generate() by quota alone, on a GPU by graphs; GenerateOutput."""
    return model.generate(
        inputs, gen_length=gen_length, block_length=BLOCK, steps=steps, threshold=2.0, eos_id=-1, return_dict=True,
        graphs=model.device.type == "cuda",
    )  # fmt: skip


def block_seconds(machine, model, inputs, steps, lengths):
    """Seconds of one block of all rows, and of the longer call. ArithmeticError if blocks took other than `steps`."""
    times = []
    for length in lengths:
        runs = [machine.seconds(partial(text, model, inputs, length, steps)) for _ in range(machine.size(2, 1))]
        times.append(min(seconds for seconds, _ in runs))
        forwards = [counter.forwards_per_block for counter in runs[0][1].counters]
        if any(count != steps for row in forwards for count in row):
            raise ArithmeticError(f"steps={steps}: blocks took {forwards[0]} forwards")
    return (times[1] - times[0]) * BLOCK / (lengths[1] - lengths[0]), times[1]


def time_decode(machine, quantization, batch):
    model = machine.network("mini", quantization)
    batch, lengths = machine.size(batch, 2), (machine.size(SHORT, 32), machine.size(LONG, 64))
    inputs = prompts(machine, model, batch)
    text(model, inputs, BLOCK, STEPS[1])  # compiles
    few, _ = block_seconds(machine, model, inputs, STEPS[0], lengths)
    many, whole = block_seconds(machine, model, inputs, STEPS[1], lengths)
    share = (BLOCK / TPF - STEPS[0]) / (STEPS[1] - STEPS[0])
    seconds = few + share * (many - few)
    result = {
        "tpf": TPF, "tok_s": batch * BLOCK / seconds, "ms_per_forward": seconds * TPF / BLOCK * 1e3,
        "tok_s_tpf_8": batch * BLOCK / few, "tok_s_tpf_6.4": batch * BLOCK / many,
        "call_tok_s": batch * lengths[1] / whole,
    }  # fmt: skip
    costs = step_costs(model.config, batch, inputs.shape[1], quantization)
    result["floor_ms"] = floor_ms(costs, machine.bandwidth, machine.tflops)
    result["over_floor"] = result["ms_per_forward"] / result["floor_ms"]
    return result | asked_per_step(machine, model, inputs) if batch == 1 and not quantization else result


def asked_per_step(machine, model, inputs):
    """What the host asks of the device in a step of the whole loop, block ends included, and how long that works."""
    blocks = (machine.size(2, 1), machine.size(6, 2))
    calls = [partial(text, model, inputs, n * BLOCK, STEPS[1]) for n in blocks]
    less, more = map(machine.counted, calls)
    less_ms, more_ms = (sum(us for *_, us in machine.device_events(call)) / 1e3 for call in calls)
    forwards = (blocks[1] - blocks[0]) * STEPS[1]
    return {
        "host_syncs_per_step": (more["syncs"] - less["syncs"]) / forwards,
        "launches_per_step": (more["launches"] - less["launches"]) / forwards,
        "busy_ms_per_forward": (more_ms - less_ms) / forwards,
    }


def time_diffusers(machine):
    """diffusers' own pipeline and scheduler driving the same network, batch 1: the whole window at every step."""
    model = machine.network("mini")
    inputs, length = prompts(machine, model, 1), machine.size(128, 32)
    text(model, inputs, length, STEPS[1])
    seconds, _ = machine.seconds(partial(text, model, inputs, length, STEPS[1]))
    result = {"generated": length, "call_tok_s": length / seconds, "diffusers_tok_s": None, "ratio_vs_diffusers": None}
    if find_spec("diffusers") is None:
        return result
    call = diffusers(model, Task(inputs, length, STEPS[1], threshold=2.0))
    call()
    peer, _ = machine.seconds(call)
    return result | {"diffusers_tok_s": length / peer, "ratio_vs_diffusers": peer / seconds}


def points():
    found = []
    for kind, quantization in QUANTIZATIONS.items():
        for batch in (1, 32):
            measure = partial(time_decode, quantization=quantization, batch=batch)
            later = kind == "int4" or (kind == "fp8" and batch > 1)
            found.append(Point(f"decode mini {kind} b{batch}", "decode", 16, measure, later))
    return [*found, Point("decode diffusers", "decode", 12, time_diffusers, later=True)]
