"""Modules that .to(dtype), .half() and the like leave as wide as results need them. Devices take everything along."""

from functools import partialmethod

import torch
from torch import nn

from ..config import DTYPES, find_device
from ..kernels.fp8 import FP8
from ..kernels.gemm import WORDS


class NeverNarrower(nn.Module):
    """Its tensors become wider, never narrower, as at loading."""

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda x: _converted(x, fn, lambda dtype: torch.promote_types(x.dtype, dtype)), recurse)


class KeepsQuantized(nn.Module):
    """Its fp8 values or words of int4 and their scales, where it has them, keep their dtypes."""

    def _apply(self, fn, recurse=True):
        scales = [scale for name, scale in self.named_parameters(recurse=False) if name.endswith("scale")]

        def kept(x):
            own = x.dtype in (FP8, WORDS) or any(x is scale for scale in scales)
            return _converted(x, fn, lambda dtype: x.dtype if own else dtype)

        return super()._apply(kept, recurse)


def _converted(x, fn, fitting):
    """What nn.Module._apply's fn makes of x, but in the dtype that fitting(the one fn gives) is."""
    there = fn(x.new_empty(0))
    dtype = fitting(there.dtype)
    return fn(x) if dtype == there.dtype else x.to(there.device, dtype)


class OnOurDevices(nn.Module):
    """Goes to devices that we have kernels for and to dtypes that we compute in, and nowhere else."""

    def to(self, *args, **kwargs) -> "OnOurDevices":
        """torch.nn.Module.to: a device moves everything. A dtype leaves routers as wide as they are, and fp8 and
        int4 weights and their scales as they are. ValueError, and nothing is changed, for a device that is not
        supported or not there, and for a dtype other than float16, bfloat16, float32 and float64."""
        for value in (*args, *(kwargs.get(name) for name in ("device", "dtype", "tensor"))):
            device, dtype = (value.device, value.dtype) if isinstance(value, torch.Tensor) else (value, value)
            named = isinstance(device, (str, int, torch.device)) and not isinstance(device, bool)
            if named and str(device) != "meta":
                find_device(device)
            if isinstance(dtype, torch.dtype):
                _check_float(dtype)
        return super().to(*args, **kwargs)

    def type(self, dst_type):
        """torch.nn.Module.type: as to(dtype=dst_type)."""
        if isinstance(dst_type, torch.dtype):
            _check_float(dst_type)
        return super().type(dst_type)

    def cuda(self, device=None):
        """torch.nn.Module.cuda: as to(device), None = "cuda"."""
        return self.to("cuda" if device is None else device)

    ipu, mtia, xpu = partialmethod(to, "ipu"), partialmethod(to, "mtia"), partialmethod(to, "xpu")  # which refuses them


def _check_float(dtype):
    """ValueError for a dtype that a network cannot have."""
    if dtype not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"dtype={dtype}: expected float64 or one of {', '.join(DTYPES)}")
