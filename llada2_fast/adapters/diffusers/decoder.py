"""A pipeline's decoder: lanes for its prompts, over the forwards that suit its model."""

import torch

from ...config import MODEL_TYPES, DecodeParams
from ...decoding.decoder import BlockDecoder
from ...decoding.inputs import check_fit, check_prompts, row_seeds
from ...decoding.lanes import Lanes
from ...decoding.runner import CachedForward, EagerRunner
from ...decoding.sequence import Sequence
from ...kernels.refine import SpecialIds
from ...model import LLaDA2Model
from .foreign import BlockCausalForward, WindowForward


def open_decoder(
    model, ids: torch.Tensor, prompt_mask: torch.Tensor, params: DecodeParams, generator, all_logits: bool
) -> tuple[BlockDecoder, list[Sequence]]:
    """A decoder with a free lane for each prompt, and their sequences, which have pages where they need them.

    model: any of the three kinds that LLaDA2Pipeline knows.
    ids, prompt_mask: int64 [B, P], 0 in the mask at padding.
    params: of all of them, with ids and block_length.
    generator: one torch.Generator, one per row, or None.
    all_logits: candidates everywhere, as callbacks may ask for.
    ValueError for prompts or ids that do not fit the model.
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
    check_prompts(prompts, params.gen_length, vocab_size, positions, "`input_ids`")
    if vocab_size is not None and params.mask_id >= vocab_size:
        raise ValueError(f"`mask_token_id` must be in 0..{vocab_size - 1}, got {params.mask_id}.")
    if own:
        check_fit(config, prompts, params)
    seeds, eos = row_seeds(None, generator, len(prompts), params.draws), params.eos_ids
    sequences = [
        Sequence(prompt.tolist(), params, seed, eos, length, params.mask_id)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    if own:
        cache = model.new_cache(sum(s.num_blocks for s in sequences), length)
        for sequence in sequences:
            sequence.pages = cache.allocate(sequence.num_blocks)
        forward = CachedForward(model, cache)
    else:
        forward = WindowForward(model, prompt_mask, sequences) if padded else BlockCausalForward(model)
    lanes = Lanes(len(sequences), length, SpecialIds(params.mask_id), ids.device, max(1, len(eos)))
    return BlockDecoder(EagerRunner(forward, lanes, all_logits)), sequences
