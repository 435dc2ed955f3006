"""Forwards of models that are not ours, for decoding.runner.EagerRunner: no cache, the whole window at every step.

Both call `model(ids, attention_mask=, position_ids=).logits` and are called as forward(plan, state, needed) ->
(logits [M, V], index int64 [S, L] into them or -1), like runner.CachedForward. ids, position_ids: int64 [B, W]. A plan
of theirs names all tokens of its rows: those before the active block are its `leading` ones.
"""

import torch

from ...decoding.runner import Plan
from ...decoding.sequence import Sequence
from ...kernels.refine import BlockState
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
    """int64, shape of `needed`: the number of each needed position in the order of the lanes, -1 for the others."""
    return torch.where(needed, needed.flatten().cumsum(0).view(needed.shape) - 1, -1)


class BlockCausalForward:
    """Another implementation of LLaDA2: each row alone on its own grid, with a 4D block-causal mask.

    attention_mask: [1, 1, W, W] in the model's dtype, 0 where a position is seen and -inf elsewhere, as the model
    authors' generate builds it. The tail counts only where it is attended to.
    """

    cached = False
    prefill = None  # there is nothing to be filled

    def __init__(self, model):
        self.model = model

    def __call__(self, plan: Plan, state: BlockState, needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = []
        for step in sorted(plan.steps, key=lambda step: step.lane):  # the order of _index
            block = self._logits(step, state.tokens[step.lane])
            logits.append(block[needed[step.lane]])
        return torch.cat(logits), _index(needed)

    def _logits(self, step, tokens):
        """[L, V] of the active block, which holds `tokens`."""
        device, length = tokens.device, len(tokens)
        before = torch.tensor(step.leading, dtype=torch.int64, device="cpu").to(device)
        ids = torch.cat([before, tokens])
        size = len(ids)
        position = torch.arange(size, device=device)
        seen = block_causal_mask(size, length, device) & (position < step.limit)
        mask = torch.zeros(size, size, dtype=model_dtype(self.model), device=device)
        mask.masked_fill_(~seen, float("-inf"))
        output = self.model(ids[None], attention_mask=mask[None, None], position_ids=position[None])
        return output.logits[0, size - length :]


class WindowForward:
    """Any other model, as diffusers calls it: all rows together in one padded layout, with a 2D mask.

    prompt_mask: [B, P], 0 where a row's prompt is padding.
    sequences: all B of them, by lane, finished ones too. Their prompts are the padded ones, so that all generate from
        position P on and are at the same block at every step.

    attention_mask: int64 [B, W], zero at padding and behind a row's end. What a row gets may depend on the others.
    """

    cached = False
    prefill = None  # there is nothing to be filled

    def __init__(self, model, prompt_mask: torch.Tensor, sequences: list[Sequence]):
        self.model, self.prompt_mask, self.sequences = model, prompt_mask.long(), sequences

    def __call__(self, plan: Plan, state: BlockState, needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device, length = needed.device, needed.shape[1]
        step = plan.steps[0]
        begin, size = step.block * length, (step.block + 1) * length
        known = [(sequence.canvas + [sequence.mask_id] * size)[:size] for sequence in self.sequences]
        ids = torch.tensor(known, dtype=torch.int64, device="cpu").to(device)  # [B, W]
        lanes = torch.tensor(plan.lanes, dtype=torch.int64, device="cpu").to(device)
        ids[lanes, begin:] = state.tokens[lanes]
        position = torch.arange(size, device=device).expand(ids.shape)
        limits = torch.tensor([[sequence.limit] for sequence in self.sequences], dtype=torch.int64, device="cpu")
        mask = (position < limits.to(device)).long()
        prompt = self.prompt_mask[:, :size]
        mask[:, : prompt.shape[1]] = prompt
        logits = self.model(ids, attention_mask=mask, position_ids=position).logits[:, begin:]
        return logits[needed], _index(needed)
