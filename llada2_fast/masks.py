"""Which positions of whole sequences may attend to which. Shapes: B batch, S sequence."""

import torch

from .config import habits


def block_causal_mask(length: int, block_length: int, device=None) -> torch.Tensor:
    """bool [length, length]: position i sees j iff j's block is not later than i's.

    length: positions of a sequence.
    block_length: positions of a block; blocks begin at position 0.
    device: where the mask is made.
    """
    block = torch.arange(length, device=device) // block_length
    return block[:, None] >= block


def whole_mask(
    given: torch.Tensor | None, shape: tuple[int, int], block_length: int, heads: int, dtype: torch.dtype, device
) -> torch.Tensor:
    """The mask for attention over sequences of `shape` [B, S]: bool, True = attend, or `dtype` to be added to scores.

    given: what `LLaDA2Model.forward` was given as attention_mask, on `device`.
    shape: (B, S).
    block_length: positions of a block.
    heads: attention heads, for which a mask may differ.
    dtype: of a mask that is added.
    device: where the mask is made.
    Raises ValueError for one of another shape or of values that mean nothing.
    """
    batch, size = shape
    if given is not None and given.ndim == 4:
        if given.shape[0] not in (1, batch) or given.shape[1] not in (1, heads) or given.shape[2:] != (size, size):
            raise ValueError(f"attention_mask: [{batch}, 1, {size}, {size}] expected, got {list(given.shape)}")
        if not given.is_floating_point():
            return habits.as_bool(given)
        additive = bool((given <= 0).all())  # sync: what it means
        return given.to(dtype) if additive else habits.as_bool(given, ", or none above 0")
    mask = block_causal_mask(size, block_length, device)[None, None]
    if given is None:
        return mask
    if given.shape != shape:
        raise ValueError(f"attention_mask: [{batch}, {size}] expected, got {list(given.shape)}")
    mask = mask & habits.as_bool(given)[:, None, None, :]
    # a padding position may be left with nothing to see: let it see itself, so that no NaN arises
    return mask | (~mask.any(-1, keepdim=True) & torch.eye(size, dtype=torch.bool, device=mask.device))
