"""What can be tuned in attention and in the refinement step: the parameters to try, and the inputs to try them on.

attention   rows, warps and stages of the attention kernel, rows and warps of the kernel that adds up splits; heads of
            mini and flash, one entry for all batches and prefixes
refine      warps, tiles per program and stages of the vocabulary pass; warps, values tried in a pass and stages of the
            filter pass; one entry for all batches
"""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from llada2_fast.kernels import attention, fp8, refine
from llada2_fast.kernels._tuned import tried

from ..gpu.gates import attention_case, refine_case
from ..roofline import BLOCK


class Case(NamedTuple):
    """Calls that take parameters, None for the defaults, and return tensors."""

    checks: list  # calls whose results are compared bit for bit
    timed: list  # per workload a list of calls that do the same on memory of their own


class Group(NamedTuple):
    """One kernel at one shape: `tries` are put into key `part` of the entry of `shape` in the table of `family`."""

    name: str
    family: str
    shape: dict
    part: str
    tries: list
    build: Callable  # machine -> Case


def concluded(line):
    """Whether a group's tries were tried: not so without a line, after an error or on a device too small."""
    return bool(line) and not line.keys() & {"error", "skipped"}


def gains(line):
    """Whether a group's line has parameters that beat the defaults by more than the noise."""
    return "share" in line and line["share"] < 1 - line["noise"]


def fp8_products(machine):
    """Whether the machine multiplies fp8; in a dry run it does."""
    return machine.device.type != "cuda" or torch.cuda.get_device_capability() >= fp8.CAPABILITY


def every(**values):
    """All combinations: a list of dicts."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


ATTENTION = every(TILE_M=(128, 64), num_warps=(8, 4), num_stages=(5, 4, 3, 2, 6, 7))
COMBINE = every(TILE_R=(8, 4, 16), num_warps=(4, 2, 8))
VOCAB = every(SPAN=(1,), STAGES=(1,), num_warps=(8, 4, 16)) + every(SPAN=(2, 4), STAGES=(1, 2, 3), num_warps=(8, 4, 16))
FILTER = every(PIVOTS=(4, 8, 2), STAGES=(1, 2), num_warps=(8, 4, 16))
STEPS = ((1, 1024), (32, 1024), (8, 8192), (8, 32768))  # rows, prefix of the timed attention
LONG = STEPS[2:]  # those with many splits to add up
MODES = ["greedy", "sampling", "filters", "greedy"]


def _attend(args, part, parameters):
    with tried("attention", {} if parameters is None else {part: parameters}):
        return [attention.block_attention(*args)]


def _attention(machine, config, part, points):
    """Checks: rows of mixed lengths, an empty prefix, an unused block, a row that ends within its last page."""

    def case(prefixes, **unused):
        q, k, v, blocks = attention_case(machine, prefixes, **unused)
        return machine.random(len(q), config.num_attention_heads, config.head_dim), k, v, blocks

    mixed = case([machine.size(prefix, 96) for prefix in (0, 1024, 5024, 33 * 1024)], unused=1)
    mixed[-1].limit[1] -= 5
    timed = []
    for rows, prefix in points[: machine.size(len(points), 2)]:
        q, k, v, blocks = case([machine.size(prefix, 64)] * machine.size(rows, 2))
        caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(machine.copies(k.nbytes + v.nbytes) - 1)]
        timed.append([partial(_attend, (q, *cache, blocks), part) for cache in caches])
    return Case([partial(_attend, mixed, part)], timed)


def _refine(case, part, filters, packed, parameters):
    """All that a step returns and changes. packed: as the decode loop calls it, else all positions and no index."""
    logits, state, params, ids = case
    state, index = copy.deepcopy(state), None
    if packed:
        logits, index = logits.flatten(0, 1), torch.arange(state.tokens.numel(), device=logits.device)
        index = index.view(state.tokens.shape)
    with tried("refine", {} if parameters is None else {part: parameters}):
        out = refine.launch(logits, state, params, ids, index, filters, packed)
    return [*out, *vars(state).values()]


def _step(case, part, filters, parameters):
    """A step that commits nothing and can be repeated; no copies beside it."""
    with tried("refine", {} if parameters is None else {part: parameters}):
        return [*refine.launch(*case, None, filters, False)]


def _refinement(machine, part, points):
    """Checks: rows of every mode in one batch that commits and edits, with and without rows that filter."""
    checks = []
    for modes in (MODES, MODES[:2])[: machine.size(2, 1)]:  # the interpreter is slow
        _, state, params, _ = case = refine_case(machine, modes * machine.size(4, 1))
        state.tokens[1::4, :16] = 7  # editable
        params.flags[1::4] |= refine.EDITING
        for threshold in (params.threshold, params.edit_threshold):
            threshold.fill_(0.5)
        params.min_transfer.fill_(3)
        checks += [
            partial(_refine, case, part, "filters" in modes, packed) for packed in (True, False)[: machine.size(2, 1)]
        ]
    timed = []
    for mode, rows in points[: machine.size(len(points), 1)]:
        logits, *rest = refine_case(machine, [mode] * machine.size(rows, 1))
        buffers = [logits] + [logits.clone() for _ in range(machine.copies(logits.nbytes) - 1)]
        timed.append([partial(_step, (x, *rest), part, mode == "filters") for x in buffers])
    return Case(checks, timed)


def attention_groups(machine, models=("mini",)):
    groups = []
    for model in models:
        config = machine.config(model)
        shape = {
            "dtype": str(machine.dtype), "length": BLOCK, "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads, "dim": config.head_dim,
        }  # fmt: skip
        for part, tries, points in (("attention", ATTENTION, STEPS), ("combine", COMBINE, LONG)):
            build = partial(_attention, config=config, part=part, points=points)
            groups.append(Group(f"attention {model} {part}", "attention", shape, part, tries, build))
    return groups


def refine_groups(machine, models=("mini",)):
    shape = {"dtype": str(machine.dtype), "vocab": machine.config("mini").vocab_size}  # of all models
    return [
        Group(f"refine {part}", "refine", shape, part, tries, partial(_refinement, part=part, points=points))
        for part, tries, points in (
            ("vocab_pass", VOCAB, (("greedy", 1), ("sampling", 8), ("greedy", 32))),
            ("filter_pass", FILTER, (("filters", 1), ("filters", 8))),
        )
    ]
