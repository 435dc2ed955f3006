"""Mask mode of the scheduler: one step of kernels/refine.py by the profile "diffusers"."""

from functools import lru_cache

import torch

from ...config import DecodeParams
from ...decoding.inputs import row_seeds
from ...decoding.rules import batch_params, row_rule
from ...kernels import refine
from ...kernels.refine import BlockState, refine_step
from .checks import NO_STEPS, raise_on_error


@lru_cache(maxsize=64)
def _rule(threshold, editing_threshold, temperature, top_k, top_p):
    """The Rule of a block whose least commits come as min_transfer: its own quota is at most one."""
    params = DecodeParams(
        profile="diffusers", steps=NO_STEPS, max_post_steps=NO_STEPS, attend_tail=False, threshold=threshold,
        editing_threshold=editing_threshold, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    return row_rule(params, 1)


def mask_step(
    logits, step_index, sample, mask_id, quota, threshold, editing_threshold, sampling, prompt_mask, generator
):  # fmt: skip
    """One step on blocks of which nothing else is known.

    logits: [R, L, V]; sample: int64 [R, L].
    step_index: of the step in the block; mask_id: int.
    quota: int32 [], the least commits.
    threshold, editing_threshold: floats, None in the second for no edits.
    sampling: {temperature, top_k, top_p}, checked.
    prompt_mask: bool [L] or [R, L], True = never written, or None.
    generator: a torch.Generator, one per row, or None.
    Returns (tokens, commit, edit, candidates, confidence), all [R, L]. RuntimeError on NaN or infinity.
    """
    rows, device = len(sample), sample.device
    temperature, top_k, top_p = sampling.values()
    rule = _rule(threshold, editing_threshold, temperature, top_k and min(top_k, logits.shape[-1]), top_p)
    seeds = row_seeds(None, generator, rows) if temperature > 0 else [0] * rows
    params = batch_params([rule] * rows, seeds, [()] * rows, device)
    params.min_transfer = quota.expand(rows).contiguous()
    kind = torch.full_like(sample, refine.GENERATED, dtype=torch.int8)
    if prompt_mask is not None:
        kind.masked_fill_(prompt_mask.to(device).bool(), refine.PROMPT)
    state = BlockState.fresh(sample.clone(), kind, params.seed.new_zeros(rows))
    state.step.fill_(step_index)
    output = refine_step(logits, state, params, refine.SpecialIds(mask_id))
    raise_on_error((output.status[:, refine.FLAGS] & refine.ERROR) != 0, step_index)
    return state.tokens, output.commit, output.edit, output.token, output.confidence
