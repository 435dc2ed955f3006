"""What a face is given -> what a decoder takes: prompts, special ids, seeds; all checks that need the model."""

import torch


def split_prompts(inputs, attention_mask=None):
    """inputs in any accepted form -> list of int64 [n], padding stripped. ValueError for anything else."""
    if isinstance(inputs, torch.Tensor):
        if inputs.dtype != torch.int64:
            raise ValueError(f"inputs: int64 token ids expected, got {inputs.dtype}")
        if inputs.ndim not in (1, 2):
            raise ValueError(f"inputs: [P] or [B, P] expected, got {list(inputs.shape)}")
        if attention_mask is not None and attention_mask.shape != inputs.shape:
            raise ValueError(f"attention_mask: {list(inputs.shape)} expected, got {list(attention_mask.shape)}")
        rows = inputs.reshape(-1, inputs.shape[-1]) if inputs.ndim == 2 else inputs[None]
        if attention_mask is None:
            prompts = list(rows)
        else:
            masks = attention_mask.reshape(rows.shape).bool()
            prompts = [row[keep.to(row.device)] for row, keep in zip(rows, masks, strict=True)]
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: only with inputs [P] or [B, P]; a list of lists has no padding")
        lists = [inputs] if inputs and isinstance(inputs[0], int) else list(inputs)
        for ids in lists:
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
                raise ValueError("inputs: a list of lists of integer token ids expected")
        prompts = [torch.tensor(ids, dtype=torch.int64) for ids in lists]
    if not prompts:
        raise ValueError("inputs: at least one prompt expected, got none")
    return prompts


def resolve_ids(model, params):
    """(mask id, EOS ids, pad id): the call's, else the checkpoint's. ValueError where neither says."""
    known = model.special_ids
    config = model.config
    mask = _first(params.mask_id, known.get("mask_token_id"), config.mask_token_id)
    eos = _first(params.eos_ids, known.get("eos_token_id"), config.eos_token_id)
    if mask is None:
        raise ValueError("mask_id=None: the checkpoint names no mask token; give mask_id")
    if eos is None:
        raise ValueError("eos_id=None: the checkpoint names no EOS token; give eos_id (-1 for none)")
    pad = _first(params.pad_id, known.get("pad_token_id"), config.pad_token_id, eos[0] if eos else mask)
    if not 0 <= mask < config.vocab_size:
        raise ValueError(f"mask_id={mask}: expected an id in 0..{config.vocab_size - 1}")
    return mask, eos, pad


def _first(*values):
    return next((value for value in values if value is not None), None)


def check_fit(config, prompts, params):
    """ValueError if a prompt does not fit the model: ids outside the vocabulary, too many positions, 2.2 decoding."""
    edits = [name for name in ("delete_token_id", "split_token_id") if getattr(config, name) is not None]
    if edits and params.profile != "hf-2.1":
        raise ValueError(
            f"profile={params.profile!r}: the checkpoint has {' and '.join(edits)} (LLaDA2.2), whose Levenshtein "
            "editing is not there yet; expected 'hf-2.1', which decodes it as a plain LLaDA2.1 checkpoint"
        )
    for i, prompt in enumerate(prompts):
        if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < config.vocab_size:
            raise ValueError(f"inputs: prompt {i} has ids outside 0..{config.vocab_size - 1}")
        if len(prompt) + params.gen_length > config.max_position_embeddings:
            raise ValueError(
                f"gen_length={params.gen_length}: prompt {i} has {len(prompt)} tokens and the model "
                f"{config.max_position_embeddings} positions"
            )


def row_seeds(seed, generator, count):
    """One int64 seed per row: given, or drawn once per call in row order."""
    if seed is not None:
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        fit = all(type(s) is int and -(2**63) <= s < 2**63 for s in seeds)
        if generator is not None or len(seeds) != count or not fit:
            raise ValueError(f"seed={seed!r}: expected one int64, or one for each of {count} rows, and no generator")
        return seeds
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise ValueError(f"generator: expected one or {count}, got {len(generator)}")
        return [_draw(g, 1)[0] for g in generator]
    return _draw(generator, count)


def _draw(generator, count):
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=device).tolist()
