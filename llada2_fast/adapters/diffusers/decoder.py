"""A pipeline's decoder: lanes for its prompts, over the forwards that suit its model."""

import torch

from ...config import MODEL_TYPES, DecodeParams
from ...config.checks import INT64
from ...decoding.decoder import BlockDecoder
from ...decoding.forms import forms_of
from ...decoding.inputs import check_fit, check_prompts, row_seeds, special_ids, warn_of_editing
from ...decoding.lanes import Lanes
from ...decoding.runner import CachedForward, EagerRunner
from ...decoding.sequence import Sequence
from ...kernels.refine import SpecialIds
from ...model import LLaDA2Model
from .foreign import BlockCausalForward, WindowForward


def open_decoder(
    model, ids: torch.Tensor, prompt_mask: torch.Tensor, params: DecodeParams, generator, all_logits: bool, canvas=None,
    tokenizer=None,
) -> tuple[BlockDecoder, list[Sequence]]:  # fmt: skip
    """A decoder with a free lane for each prompt, and their sequences, which have pages where they need them.

    model: any of the three kinds that LLaDA2Pipeline knows.
    ids, prompt_mask: int64 [B, P], 0 in the mask at padding.
    params: of all of them, with ids and block_length.
    generator: one torch.Generator, one per row, or None.
    all_logits: candidates everywhere, as callbacks may ask for.
    canvas, tokenizer: as of LLaDA2Pipeline.__call__, and its own.
    ValueError for prompts, ids or canvases that do not fit the model.
    """
    if not len(ids):
        raise ValueError("`input_ids` must hold at least one row, got none.")
    length = params.block_length
    config = getattr(model, "config", None)
    own = isinstance(model, LLaDA2Model)
    padded = not own and getattr(config, "model_type", None) not in MODEL_TYPES
    prompts = list(ids) if padded else [row[keep] for row, keep in zip(ids, prompt_mask.bool(), strict=True)]
    vocab_size = getattr(config, "vocab_size", None)
    positions = getattr(config, "max_position_embeddings", None)
    if vocab_size is not None and params.mask_id >= vocab_size:
        raise ValueError(f"`mask_token_id` must be in 0..{vocab_size - 1}, got {params.mask_id}.")
    eos, known = params.eos_ids, INT64 if vocab_size is None else vocab_size
    forms = forms_of(params, canvas, len(prompts), tokenizer, params.mask_id, known)
    for number, (prompt, form) in enumerate(zip(prompts, forms, strict=True)):
        check_prompts([prompt], form.params.gen_length, vocab_size, positions, "`input_ids`", number)
        if own:
            check_fit(config, [prompt], form, number)
    if own:
        warn_of_editing(model, params)
    seeds = row_seeds(None, generator, len(prompts), params.draws)
    special = special_ids(config, params.mask_id, eos) if own else SpecialIds(params.mask_id)
    sequences = [
        Sequence(prompt.tolist(), form.params, seed, eos, length, special, canvas=form.canvas)
        for prompt, form, seed in zip(prompts, forms, seeds, strict=True)
    ]
    if own:
        cache = model.new_cache(sum(s.num_blocks for s in sequences), length)
        for sequence in sequences:
            sequence.pages = cache.allocate(sequence.num_blocks)
        forward = CachedForward(model, cache)
    else:
        forward = WindowForward(model, prompt_mask, sequences) if padded else BlockCausalForward(model)
    lanes = Lanes(len(sequences), length, special, ids.device, max(1, len(eos)))
    return BlockDecoder(EagerRunner(forward, lanes, all_logits)), sequences
