"""Other weights for a network in use: in place, because captured graphs hold the addresses."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike

import torch

from ..config import ModelConfig
from ..weights import checkpoint


def prepare(model, weights):
    """Check weights; returns a function that puts them into the model.

    model: LLaDA2Model.
    weights: a checkpoint's folder or hub id, or {name: tensor} of some or all of model.state_dict().
    Raises ValueError or CheckpointError for what does not fit.
    """
    if isinstance(weights, Mapping):
        params = dict(model.named_parameters())
        own = {param.untyped_storage().data_ptr() for param in params.values()}
        pairs = [_fitting(params, name, value) for name, value in weights.items()]
        # a swap must not read what it has written
        return partial(_copy, [(p, x.clone() if x.untyped_storage().data_ptr() in own else x) for p, x in pairs])
    if not isinstance(weights, (str, PathLike)):
        raise ValueError(f"weights={weights!r:.80}: expected a checkpoint's folder or {{name: tensor}}")
    folder, config = checkpoint.resolve(weights), model.config
    theirs = replace(ModelConfig.from_hf(folder), dtype=config.dtype, quantization=config.quantization)
    if theirs != config:
        raise ValueError(f"weights={str(weights)!r:.80}: expected a checkpoint whose config is the model's")
    plan = checkpoint.inspect(folder, config)
    return partial(checkpoint.load, folder, config, dict(model.named_parameters()), False, plan=plan)


def _fitting(params, name, value):
    """The parameter of a name, and the tensor that it can take."""
    if name not in params:
        raise ValueError(f"weights: {name!r:.80} is none of the model's parameters")
    param = params[name]
    if not isinstance(value, torch.Tensor) or value.shape != param.shape or value.is_meta:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"weights: {name}: expected a tensor {list(param.shape)}, got {shape}")
    wide = param.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if value.dtype != param.dtype and not (wide and value.is_floating_point()):
        raise ValueError(f"weights: {name}: expected {param.dtype}, got {value.dtype}")
    if wide and not value.to(param.dtype).isfinite().all():
        raise ValueError(f"weights: {name}: expected numbers that are finite in {param.dtype}")
    return param, value


@torch.no_grad()
def _copy(pairs):
    for param, value in pairs:
        param.copy_(value)
