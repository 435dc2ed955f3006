"""DecodeParams -> the rule of a row -> RefineParams. Nowhere else does a profile become numbers and flags.

Whose rules: `generate` of the LLaDA2.0 and 2.1 model cards, SGLang's LowConfidence, JointThreshold and
JointThresholdInDel, diffusers' BlockRefinementScheduler, and our own default.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..config import ENTROPY_BOUND, DecodeParams
from ..kernels import refine
from ..kernels.attention import pinned
from ..kernels.refine import RefineParams

NEVER = 2**30  # as a number of steps


class Rule(NamedTuple):
    """The scalars of RefineParams that a row has for all its blocks; see there."""

    temperature: float
    top_k: int
    top_p: float
    threshold: float
    edit_threshold: float
    steps: int
    min_transfer: int
    max_steps: int
    max_post_steps: int
    entropy_bound: float
    entropy_decay: float
    flags: int


class Quota(NamedTuple):
    """How a block's commits are spread: over `steps`, at least min_transfer a step, no more than max_steps steps."""

    steps: int
    min_transfer: int
    max_steps: int = NEVER


class Profile(NamedTuple):
    """One row of the table.

    quota: (DecodeParams, block_length) -> Quota.
    flags: those of kernels/refine.py that always hold.
    early_stop: the flag by which EOS ends a row with eos_early_stop; editing_early_stop: the same where tokens may be
        edited.
    """

    quota: Callable[[DecodeParams, int], Quota]
    flags: int
    early_stop: int
    editing_early_stop: int


def _as_asked(params, block_length):
    return Quota(params.steps, params.minimal_topk)


def _most_confident(params, block_length):
    """Below the threshold the one most confident position."""
    return Quota(block_length, 1)


def _card_20(params, block_length):
    steps = min(params.steps, params.gen_length // params.minimal_topk)
    return Quota(steps, 0, steps)


def _card_21(params, block_length):
    return Quota(block_length, params.num_to_transfer, min(block_length + params.max_post_steps + 1, NEVER))


POLICIES = {  # -> flags
    "threshold": 0, "entropy": refine.ENTROPY, "self_speculative": refine.ENTROPY | refine.SPECULATES,
}  # fmt: skip
_BAN, _FILL = refine.BAN_MASK | refine.BAN_EDITS, refine.FILL_PROMPT
PROFILES = {
    "default": Profile(_as_asked, _BAN | refine.OWN_SOFTMAX, refine.EOS_STEP, refine.EOS_END),
    "diffusers": Profile(_as_asked, _BAN, refine.EOS_STEP, refine.EOS_END),
    "hf-2.0": Profile(_card_20, _FILL | refine.EOS_HOLDS, refine.EOS_COMMIT, refine.EOS_COMMIT),
    "hf-2.1": Profile(_card_21, _FILL, refine.EOS_CLEAN, refine.EOS_CLEAN),
    "sglang-lowconf": Profile(_most_confident, _BAN, refine.EOS_END, refine.EOS_END),
    "sglang-joint": Profile(_most_confident, _BAN, refine.EOS_END, refine.EOS_END),
    "sglang-indel": Profile(_most_confident, refine.BAN_EDITS, refine.EOS_END, refine.EOS_END),
}


def row_rule(params: DecodeParams, block_length: int, edits: bool = False) -> Rule:
    """The rule of each block of a row. Ids, lengths and the seed of `params` are not read, but for hf-2.0's gen_length,
    nor is edit_window, which is about several blocks.

    edits: the model deletes and inserts (SpecialIds.edits), which it then does where tokens are edited.
    """
    profile = PROFILES[params.profile]
    editing = params.editing_threshold is not None
    flags = profile.flags | POLICIES[params.policy] | (refine.EDITING if editing else 0)
    if params.eos_early_stop:
        flags |= profile.editing_early_stop if editing else profile.early_stop
    quota = profile.quota(params, block_length)
    if edits and editing and params.traits.levenshtein:
        flags |= refine.LEVENSHTEIN
        quota = quota._replace(max_steps=block_length + params.max_post_steps + 1)
    return Rule(
        temperature=params.temperature if params.draws else 0.0,
        top_k=params.top_k or 0,
        top_p=1.0 if params.top_p is None else params.top_p,
        threshold=params.threshold,
        edit_threshold=params.editing_threshold if editing else 0.0,
        **quota._asdict(),
        max_post_steps=params.max_post_steps,
        entropy_bound=ENTROPY_BOUND if params.entropy_bound is None else params.entropy_bound,
        entropy_decay=params.entropy_decay,
        flags=flags,
    )


# Fields of a Rule by the type of their tensors, float32 and int32.
REAL = ("temperature", "top_p", "threshold", "edit_threshold", "entropy_bound", "entropy_decay")
WHOLE = tuple(name for name in Rule._fields if name not in REAL)


def batch_params(
    rules: Sequence[Rule], seeds: Sequence[int], eos_ids: Sequence[Sequence[int]], device="cpu"
) -> RefineParams:
    """RefineParams of R rows, in one copy to the device for each type of number.

    rules: a Rule per row.
    seeds: an int64 per row.
    eos_ids: the ids of each row, which may be none.
    """
    assert len(rules) == len(seeds) == len(eos_ids), "one of each for every row"
    width = max([1, *map(len, eos_ids)])
    whole = [[getattr(rule, name) for rule in rules] for name in WHOLE]
    real = [[getattr(rule, name) for rule in rules] for name in REAL]
    wide = [*seeds, *(i for ids in eos_ids for i in (*ids, *[-1] * (width - len(ids))))]
    whole, real, wide = (
        pinned(numbers, device, dtype).to(device, non_blocking=True)
        for numbers, dtype in ((whole, torch.int32), (real, torch.float32), (wide, torch.int64))
    )
    columns = dict(zip(WHOLE, whole.unbind(), strict=True)) | dict(zip(REAL, real.unbind(), strict=True))
    return RefineParams(**columns, seed=wide[: len(rules)], eos_ids=wide[len(rules) :].view(len(rules), width))


def refuse_checks(params: DecodeParams):
    """ValueError for policy self_speculative, for whoever has no forward that checks a draft."""
    if params.checks:
        raise ValueError("policy='self_speculative': expected another one, a draft is checked by a forward of its own")


def refine_params(
    params: Sequence[DecodeParams],
    block_length: int,
    seeds: Sequence[int],
    eos_ids: Sequence[Sequence[int]],
    device="cpu",
) -> RefineParams:
    """RefineParams of R rows.

    params: a DecodeParams per row: sampling, thresholds, steps, profile, eos_early_stop; lengths and ids in it are not
        read.
    block_length: L.
    seeds: an int64 per row, read where tokens are drawn.
    eos_ids: a list of ids per row, which may be empty.
    device: where the tensors are to be.
    Raises ValueError where the three differ in length, for what is no DecodeParams, and for an edit_window and policy
    self_speculative, of whose forwards a step knows nothing.
    """
    if not len(params) == len(seeds) == len(eos_ids):
        raise ValueError(f"seeds, eos_ids: expected {len(params)} each, as of params, got {len(seeds)}, {len(eos_ids)}")
    for one in params:
        if not isinstance(one, DecodeParams):
            raise ValueError(f"params: expected DecodeParams, got {type(one).__name__}")
        if one.edit_window:
            raise ValueError(f"edit_window={one.edit_window}: expected 0, a step is of one block")
        refuse_checks(one)
    return batch_params([row_rule(one, block_length) for one in params], seeds, eos_ids, device)
