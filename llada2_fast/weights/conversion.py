"""Modules that .to(dtype), .half() and the like leave as wide as results need them. Devices take everything along."""

import torch
from torch import nn

from ..kernels.fp8 import FP8


class NeverNarrower(nn.Module):
    """Its tensors become wider, never narrower, as at loading."""

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda x: _converted(x, fn, lambda dtype: torch.promote_types(x.dtype, dtype)), recurse)


class KeepsFp8(nn.Module):
    """Its fp8 values and their scales, where it has them, keep their dtypes."""

    def _apply(self, fn, recurse=True):
        scales = [scale for name, scale in self.named_parameters(recurse=False) if name.endswith("scale")]

        def kept(x):
            own = x.dtype == FP8 or any(x is scale for scale in scales)
            return _converted(x, fn, lambda dtype: x.dtype if own else dtype)

        return super()._apply(kept, recurse)


def _converted(x, fn, fitting):
    """What nn.Module._apply's fn makes of x, but in the dtype that fitting(the one fn gives) is."""
    there = fn(x.new_empty(0))
    dtype = fitting(there.dtype)
    return fn(x) if dtype == there.dtype else x.to(there.device, dtype)
