"""Forwards of models that are not ours, for decoder.BlockDecoder: no cache, the whole window at every step.

Both call `model(ids, attention_mask=, position_ids=).logits` and are called as forward(rows, state, needed) ->
(logits [M, V], index int64 [slots, L] into them or -1), like decoder.CachedForward. ids, position_ids: int64 [B, S].
"""

import torch

from ...decoding.decoder import Forward
from ...model import block_causal_mask


def model_device(model):
    """The device a model computes on: its `device`, else its first parameter's or buffer's, else the CPU."""
    device = getattr(model, "device", None)
    if device is None:
        device = next((tensor.device for tensor in _tensors(model)), "cpu")
    return torch.device(device)


def model_dtype(model):
    """The float dtype a model computes in: its `dtype`, else its first parameter's, else float32."""
    dtype = getattr(model, "dtype", None)
    if dtype is None:
        dtype = next((tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point()), torch.float32)
    return dtype


def _tensors(model):
    return [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []


def _index(needed):
    """int64, shape of `needed`: the number of each needed position in slot-major order, -1 for the others."""
    return torch.where(needed, needed.flatten().cumsum(0).view(needed.shape) - 1, -1)


class BlockCausalForward(Forward):
    """Another implementation of LLaDA2: each row alone on its own grid, with a 4D block-causal mask.

    attention_mask: [1, 1, S, S] in the model's dtype, 0 where a position is seen and -inf elsewhere, as the model
    authors' generate builds it. The tail counts only where it is attended to.
    """

    def __init__(self, model):
        self.model = model

    def open(self, row):
        """Nothing is kept for a row."""

    def close(self, row):
        """Nothing was kept for a row."""

    def __call__(self, rows, state, needed):
        logits = []
        for row in sorted(rows, key=lambda row: row.slot):  # the order of _index
            block = self._logits(row, state.tokens[row.slot])
            logits.append(block[needed[row.slot]])
        return torch.cat(logits), _index(needed)

    def _logits(self, row, tokens):
        """[L, V] of the active block, which holds `tokens`."""
        size, device = row.span.stop, tokens.device
        ids = torch.cat([row.canvas[: row.span.start], tokens])
        position = torch.arange(size, device=device)
        seen = block_causal_mask(size, row.length, device) & (position < row.limit)
        mask = torch.zeros(size, size, dtype=model_dtype(self.model), device=device)
        mask.masked_fill_(~seen, float("-inf"))
        output = self.model(ids[None], attention_mask=mask[None, None], position_ids=position[None])
        return output.logits[0, row.span]


class WindowForward(Forward):
    """Any other model, as diffusers calls it: all rows together in one padded layout, with a 2D mask.

    prompt_mask: [B, P], 0 where a row's prompt is padding; rows are opened with their padded prompts, so that all
    generate from position P on and are at the same block at every step. attention_mask: int64 [B, S], zero at padding
    and in the tail. What a row gets may depend on the others.
    """

    def __init__(self, model, prompt_mask):
        self.model, self.prompt_mask = model, prompt_mask.long()
        self.rows = []

    def open(self, row):
        """Rows are opened in the order of their slots."""
        self.rows.append(row)

    def close(self, row):
        self.rows.remove(row)

    def __call__(self, rows, state, needed):
        span, limit = rows[0].span, rows[0].limit
        ids = torch.stack([row.canvas[: span.stop] for row in self.rows])
        for row in rows:
            ids[row.slot, span] = state.tokens[row.slot]
        batch, size = ids.shape
        position = torch.arange(size, device=ids.device).expand(batch, size)
        mask = torch.ones_like(ids)
        prompt = self.prompt_mask[:, :size]
        mask[:, : prompt.shape[1]] = prompt
        mask[:, limit:] = 0
        logits = self.model(ids, attention_mask=mask, position_ids=position).logits[:, span]
        return logits[needed], _index(needed)
