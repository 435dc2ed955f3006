"""What a face is given -> what a decoder takes: prompts, special ids, seeds; all checks that need the model."""

import torch


def split_prompts(inputs, attention_mask=None):
    """inputs in any accepted form -> list of int64 [n], padding stripped. ValueError for anything else."""
    if isinstance(inputs, torch.Tensor):
        if inputs.dtype != torch.int64:
            raise ValueError(f"inputs: int64 token ids expected, got {inputs.dtype}")
        if inputs.ndim not in (1, 2):
            raise ValueError(f"inputs: [P] or [B, P] expected, got {list(inputs.shape)}")
        if attention_mask is not None:
            is_tensor = isinstance(attention_mask, torch.Tensor)
            got = list(attention_mask.shape) if is_tensor else type(attention_mask).__name__
            if got != list(inputs.shape):
                raise ValueError(f"attention_mask: a tensor {list(inputs.shape)} expected, got {got}")
        rows = inputs if inputs.ndim == 2 else inputs[None]
        if attention_mask is None:
            prompts = list(rows)
        else:
            masks = attention_mask.reshape(rows.shape).bool()
            prompts = [row[keep.to(row.device)] for row, keep in zip(rows, masks, strict=True)]
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: only with inputs [P] or [B, P]; a list of lists has no padding")
        if not isinstance(inputs, (list, tuple)):
            raise ValueError(f"inputs: a tensor or a list of lists of token ids expected, got {type(inputs).__name__}")
        lists = [inputs] if inputs and isinstance(inputs[0], int) else inputs
        for ids in lists:
            fit = isinstance(ids, (list, tuple)) and all(type(i) is int and -(2**63) <= i < 2**63 for i in ids)
            if not fit:
                raise ValueError(f"inputs: a list of lists of integer token ids expected, got {ids!r} in it")
        prompts = [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in lists]
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
    fill = next((i for i in eos if 0 <= i < config.vocab_size), mask)  # without such an EOS no row ends early
    pad = _first(params.pad_id, known.get("pad_token_id"), config.pad_token_id, fill)
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
    check_prompts(prompts, params.gen_length, config.vocab_size, config.max_position_embeddings)


def check_prompts(prompts, gen_length, vocab_size, max_positions, name="inputs"):
    """ValueError if a prompt has ids outside the vocabulary or needs too many positions (None: nothing is known)."""
    for i, prompt in enumerate(prompts):
        if vocab_size is not None and len(prompt):
            low, high = int(prompt.min()), int(prompt.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(f"{name}: prompt {i} has ids {low}..{high}, some outside 0..{vocab_size - 1}")
        if max_positions is not None and len(prompt) + gen_length > max_positions:
            raise ValueError(
                f"gen_length={gen_length}: prompt {i} has {len(prompt)} tokens and the model {max_positions} positions"
            )


def row_seeds(seed, generator, count):
    """One int64 seed per row: given, or drawn once per call in row order."""
    if seed is not None:
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * count
        fit = all(type(s) is int and -(2**63) <= s < 2**63 for s in seeds)
        if generator is not None or len(seeds) != count or not fit:
            raise ValueError(f"seed={seed!r}: expected one int64, or one for each of {count} rows, and no generator")
        return seeds
    several = isinstance(generator, (list, tuple))
    given = generator if several else [] if generator is None else [generator]
    if (several and len(given) != count) or not all(isinstance(g, torch.Generator) for g in given):
        raise ValueError(f"generator={generator!r}: expected a torch.Generator, or one for each of {count} rows")
    return [_draw(g, 1)[0] for g in given] if several else _draw(generator, count)


def _draw(generator, count):
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=device).tolist()
