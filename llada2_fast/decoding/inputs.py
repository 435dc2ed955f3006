"""What a face is given -> what a decoder takes: prompts, special ids, seeds; all checks that need the model."""

import math
import warnings
from array import array
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch

from ..config import as_float, as_float32, as_positive32
from ..config.habits import as_bool, as_tensor, check_vocabulary, holds_ids, token_ids
from ..kernels.refine import MAX_POST_STEPS, SpecialIds

EDIT_IDS = ("delete_token_id", "split_token_id")  # of a LLaDA2.2 checkpoint's config


def split_prompts(inputs, attention_mask=None, name="inputs"):
    """inputs in any accepted form -> list of int64 [n], padding stripped. ValueError, which speaks of `name`, for
    anything else.

    A tensor or NumPy array [P] or [B, P], of any integer type that int64 holds, with an attention_mask of its shape
    where there is padding; or a list of ids, or of such rows.
    """
    if isinstance(inputs, (torch.Tensor, np.ndarray)):
        inputs = token_ids(name, inputs)
        if inputs.ndim not in (1, 2):
            raise ValueError(f"{name}: [P] or [B, P] expected, got {list(inputs.shape)}")
        rows = inputs if inputs.ndim == 2 else inputs[None]
        if attention_mask is None:
            prompts = list(rows)
        else:
            masks = padding_mask(attention_mask, inputs.shape).reshape(rows.shape)
            prompts = [row[keep.to(row.device)] for row, keep in zip(rows, masks, strict=True)]
    else:
        if attention_mask is not None:
            raise ValueError(f"attention_mask: only with {name} [P] or [B, P]; a list of lists has no padding")
        if not _is_list(inputs):
            raise ValueError(f"{name}: a tensor or a list of lists of token ids expected, got {type(inputs).__name__}")
        one = len(inputs) > 0 and not isinstance(inputs[0], Sequence) and not getattr(inputs[0], "ndim", 0)
        prompts = [_row(f"{name}: prompt {i}", ids) for i, ids in enumerate([inputs] if one else inputs)]
    if not prompts:
        raise ValueError(f"{name}: at least one prompt expected, got none")
    return prompts


def padding_mask(mask, shape):
    """An attention mask as a bool tensor of this shape, True at tokens, False at padding.

    mask: a tensor, NumPy array or lists of bools or of numbers 0 and 1. ValueError for anything else: an additive mask,
    where 0 is a token, would leave only the padding.
    """
    mask = as_tensor("attention_mask", mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask: a tensor {list(shape)} expected, got {list(mask.shape)}")
    return as_bool(mask)


def _is_list(value):
    """Of any type, e.g. a range or array.array, but no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _row(what, ids):
    """One prompt of a list as int64 [n]. ValueError, which begins with `what`, for anything else."""
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        row = token_ids(what, ids)
        if row.ndim == 2 and len(row) == 1:
            row = row[0]
        if row.ndim != 1:
            raise ValueError(f"{what}: [n] expected, got {list(row.shape)}")
        return row
    if not _is_list(ids):
        raise ValueError(f"{what}: a list of token ids expected, got {type(ids).__name__}")
    if set(map(type, ids)) <= {int}:  # 32,000 of them in 1 ms, where the loop takes 6
        try:
            return torch.from_numpy(np.array(array("q", ids)))
        except OverflowError:
            pass  # one is no int64: the loop says which
    for at, value in enumerate(ids):
        if not (type(value) is int or _is_integer(value)) or not -(2**63) <= int(value) < 2**63:
            raise ValueError(f"{what}: an integer token id expected at {at}, got {value!r:.40}")
    return torch.tensor([int(value) for value in ids], dtype=torch.int64, device="cpu")


def _is_integer(value):
    """Of NumPy, or a tensor without dimensions."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and holds_ids(value)
    return isinstance(value, np.integer)


def plain_integers(value):
    """NumPy's integers and arrays of them as Python's, also within a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [plain_integers(part) for part in value]
    return value.tolist() if isinstance(value, (np.integer, np.ndarray)) else value


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
    for name, value in (("mask_id", mask), ("pad_id", pad)):
        if not 0 <= value < config.vocab_size:
            raise ValueError(f"{name}={value}: expected an id in 0..{config.vocab_size - 1}")
    return mask, eos, pad


def _first(*values):
    return next((value for value in values if value is not None), None)


def special_ids(config, mask_id: int, eos_ids: Sequence[int] = ()) -> SpecialIds:
    """The ids that mean something to a model's rules.

    config: ModelConfig, or another model's, which may lack them.
    mask_id, eos_ids: resolved.
    ValueError where one id means two things.
    """
    there = {name: value for name in EDIT_IDS if (value := getattr(config, name, None)) is not None}
    for name, token in there.items():
        for other, ids in (("mask_id", (mask_id,)), ("eos_ids", eos_ids)):
            if token in ids:
                raise ValueError(f"{other}: expected other ids than the checkpoint's {name}={token}")
    return SpecialIds(mask_id, *(there.get(name, -1) for name in EDIT_IDS))


def check_fit(config, prompts, form, first=0):
    """ValueError if an answer cannot be had of the model: ids outside the vocabulary, too many positions, editing that
    its checkpoint was not trained for, checks that it cannot make. form: of the answers; first: the number of the first
    prompt."""
    params = form.params
    _check_edits(config, form)
    if params.checks and getattr(config, "expert_capacity", None) is not None:
        raise ValueError(
            "policy='self_speculative': expected another one where experts are chosen for whole blocks (LLaDA2.2): a "
            "check goes token by token"
        )
    check_prompts(prompts, params.gen_length, config.vocab_size, config.max_position_embeddings, first=first)


def _check_edits(config, form):
    """ValueError where tokens cannot be edited as the profile does it, by the checkpoint's special ids or without."""
    params, traits = form.params, form.params.traits
    there = [name for name in EDIT_IDS if getattr(config, name, None) is not None]
    missing = [name for name in EDIT_IDS if name not in there]
    if traits.only_levenshtein and missing:
        raise ValueError(
            f"profile={params.profile!r}: it deletes and inserts (LLaDA2.2), but the checkpoint's config has no "
            f"{' and no '.join(missing)}; expected another profile"
        )
    if not there or traits.plain:
        return
    if missing:
        raise ValueError(
            f"{missing[0]}=None: the checkpoint's config has {there[0]}, expected both, or profile='hf-2.1'"
        )
    if params.editing_threshold is None and not traits.card:
        return
    if not traits.levenshtein:
        without = traits.edits and traits.editing_threshold is None  # which it does without where none is given
        raise ValueError(
            f"profile={params.profile!r}: the checkpoint has {' and '.join(there)} (LLaDA2.2), but the profile neither "
            "deletes nor inserts; expected "
            + ("no editing_threshold, " if without else "")
            + "'default' or 'sglang-indel', or 'hf-2.1', which decodes it as a LLaDA2.1 checkpoint"
        )
    if params.max_post_steps > MAX_POST_STEPS:
        raise ValueError(
            f"max_post_steps={params.max_post_steps}: expected at most {MAX_POST_STEPS} where tokens are deleted and "
            "inserted (LLaDA2.2 with an editing_threshold)"
        )
    if params.edit_window:
        raise ValueError(
            f"edit_window={params.edit_window}: expected 0 where tokens are deleted and inserted (LLaDA2.2 with an "
            "editing_threshold)"
        )
    if params.policy != "threshold":
        raise ValueError(
            f"policy={params.policy!r}: expected 'threshold' where tokens are deleted and inserted (LLaDA2.2 with an "
            "editing_threshold)"
        )
    if form.canvas is not None or params.language is not None:
        name = "canvas" if form.canvas is not None else params.language
        raise ValueError(
            f"{name}: expected none where tokens are deleted and inserted (LLaDA2.2 with an editing_threshold), since "
            "what is given would move"
        )


def warn_of_editing(model, params):
    """Warn, by name, where tokens are edited that a LLaDA2.0 model says: it was not trained for it."""
    if params.editing_threshold is not None and model.release == "2.0":
        warnings.warn(
            f"editing_threshold={params.editing_threshold}: the checkpoint calls itself LLaDA2.0, which was not "
            "trained to edit; its text gets worse. LLaDA2.1 and 2.2 edit.",
            stacklevel=3,
        )


def check_prompts(prompts, gen_length, vocab_size, max_positions, name="inputs", first=0):
    """ValueError if a prompt has ids outside the vocabulary or needs too many positions (None: nothing is known)."""
    for i, prompt in enumerate(prompts, first):
        if vocab_size is not None:
            check_vocabulary(f"{name}: prompt {i} has", prompt, vocab_size)
        if max_positions is not None and len(prompt) + gen_length > max_positions:
            raise ValueError(
                f"gen_length={gen_length}: prompt {i} has {len(prompt)} tokens and the model {max_positions} positions"
            )


def row_seeds(seed, generator, count, draws=True):
    """One int64 seed per row: those of row_seed, a list's as they are, or drawn once per call in row order.

    draws=False, no row draws a token: torch's own generator is left alone, and the seeds are 0.
    """
    if seed is not None:
        given = plain_integers(seed.tolist() if isinstance(seed, torch.Tensor) else seed)
        several = isinstance(given, (list, tuple))
        seeds = list(given) if several else [given]
        fit = all(type(s) is int and -(2**63) <= s < 2**63 for s in seeds)
        if generator is not None or (several and len(seeds) != count) or not fit:
            raise ValueError(
                f"seed={seed!r:.80}: expected one int64, or one for each of {count} rows, and no generator"
            )
        return seeds if several else [row_seed(given, i) for i in range(count)]
    if generator is None and not draws:
        return [0] * count
    several = isinstance(generator, (list, tuple))
    given = generator if several else [] if generator is None else [generator]
    if (several and len(given) != count) or not all(isinstance(g, torch.Generator) for g in given):
        raise ValueError(f"generator={generator!r:.80}: expected a torch.Generator, or one for each of {count} rows")
    return [_draw(g, 1)[0] for g in given] if several else _draw(generator, count)


def row_seed(seed, i):
    """The int64 seed of row i of a call with one seed: for row 0 the seed itself, so that a prompt alone gets the same
    with [seed]; for the others output i of SplitMix64, so that equal prompts differ."""
    if i == 0:
        return seed
    x = (seed + i * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


def _draw(generator, count):
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=device).tolist()


def sharpened(temperature, top_k, top_p):
    """What to warn of where confidence is the probability of a draw, and the draw is narrower than the model's own
    distribution; None where it is not."""
    narrow = temperature < 1 or (top_k or 0) > 0 or (top_p is not None and top_p < 1)
    if temperature == 0 or not narrow:
        return None
    return (
        f"temperature={temperature}, top_k={top_k}, top_p={top_p}: a token's confidence is its probability among those "
        "it is drawn from. It nears 1 as they get fewer or the temperature lower, and whole blocks are then committed "
        "at once, whatever the threshold; llada2_fast.generate judges by the model's own distribution."
    )


# Numbers of the diffusers-shaped face, in whose words they are refused.


def _number(name, value, allowed, ok):
    """`value` as a float for which `ok` holds. ValueError, in the words of diffusers, for others and what is none."""
    try:
        return as_float(name, value, allowed, ok)
    except ValueError:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r:.80}.") from None


def check_temperature(temperature):
    """A temperature as a float. ValueError for what it cannot be."""
    return _number("temperature", temperature, ">= 0", lambda x: x >= 0 and as_float32(x) < math.inf)


def checked_sampling(temperature, top_k, top_p):
    """{temperature, top_k, top_p} as a step takes them, None for what is off. ValueError for what they cannot be."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, Integral)):
        raise ValueError(f"`top_k` must be an integer or None, got {top_k!r:.80}.")
    if top_p is not None:
        top_p = _number("top_p", top_p, "in (0, 1]", lambda x: x > 0)
    return {
        "temperature": as_positive32(check_temperature(temperature)),
        "top_k": None if top_k is None or top_k <= 0 else int(top_k),
        "top_p": None if top_p is None or top_p >= 1 else top_p,
    }


def checked_thresholds(threshold, editing_threshold):
    """Both as floats, the second maybe None. ValueError for what they cannot be."""
    allowed = "in [0, 1] (or > 1 to force top-k commits)"
    threshold = _number("threshold", threshold, allowed, lambda x: x >= 0)
    if editing_threshold is not None:
        editing_threshold = _number("editing_threshold", editing_threshold, "a number or None", lambda x: x == x)
    return threshold, editing_threshold
