"""What scheduler and pipeline refuse, in the words of diffusers, and what they warn of."""

import math
import warnings
from numbers import Integral

import torch

from ...config import SAMPLING_METHODS
from ...model import seen_block_length

NO_STEPS = 2**30  # the most that a step's number may be


def is_int(value) -> bool:
    """An integer of Python or NumPy, no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_positive(name: str, value, most: float = math.inf):
    """ValueError for what is no integer in 1 .. most."""
    if not is_int(value):
        raise ValueError(f"`{name}` must be an integer, got {value!r:.80}.")
    if value <= 0:
        raise ValueError(f"`{name}` must be > 0, got {value}.")
    if value > most:
        raise ValueError(f"`{name}` must be <= {most}, got {value!r:.80}.")


def check_method(sampling_method):
    """ValueError for what is no sampling method."""
    if not isinstance(sampling_method, str) or sampling_method not in SAMPLING_METHODS:
        allowed = "{'auto','greedy','multinomial'}"
        raise ValueError(f"`sampling_method` must be one of {allowed}, got {sampling_method!r:.80}.")


def check_timestep(timestep) -> int:
    """A step's number as an int. ValueError for what is none."""
    try:
        index = int(timestep)
    except (TypeError, ValueError, OverflowError):
        index = -1
    if index < 0:
        raise ValueError(f"`timestep` must be >= 0, got {timestep!r:.80}.")
    if index > NO_STEPS:
        raise ValueError(f"`timestep` must be <= {NO_STEPS}, got {timestep!r:.80}.")
    return index


def check_blocks(logits: torch.Tensor, sample: torch.Tensor, prompt_mask: torch.Tensor | None):
    """ValueError unless they are logits [R, L, V], int64 [R, L], and a mask [L] or [R, L] or None."""
    if sample.ndim != 2 or sample.dtype != torch.int64:
        raise ValueError(f"`sample` must be int64 [R, L], got {sample.dtype} {list(sample.shape)}.")
    if logits.ndim != 3 or logits.shape[:2] != sample.shape:
        raise ValueError(f"`model_output` must be {[*sample.shape, 'V']}, got {list(logits.shape)}.")
    if prompt_mask is not None and prompt_mask.shape not in (sample.shape[1:], sample.shape):
        expected = f"{list(sample.shape[1:])} or {list(sample.shape)}"
        raise ValueError(f"`prompt_mask` must be {expected}, got {list(prompt_mask.shape)}.")


def check_block_length(logits: torch.Tensor, sample: torch.Tensor):
    """Warn if our model saw other blocks than the sample: whoever calls both may have asked neither for its length."""
    length = seen_block_length(logits)
    if length not in (None, sample.shape[1]):
        warnings.warn(
            f"block_length: a block of {sample.shape[1]} to a model of {length}: expected "
            f"BlockRefinementScheduler(block_length={length}), and calls that name no other",
            stacklevel=3,
        )


def raise_on_error(error: torch.Tensor, step_index: int):
    """RuntimeError naming the first row where `error`, bool [R], is True."""
    if error.any():
        row = int(error.to(torch.uint8).argmax())
        raise RuntimeError(f"row {row}: logits hold NaN or infinity at step {step_index}")
