"""What a host process may have switched on around us, and what it must not change: the numbers, the device."""

from contextlib import nullcontext
from functools import wraps

import torch

lasting = torch.inference_mode(False)  # decorates what makes tensors that later calls write to, in whatever mode


def isolated(function):
    """The function without its caller's autocast and gradients: it computes in the dtypes of its own tensors."""

    @wraps(function)
    def call(*args, **kwargs):
        with torch.no_grad(), _no_autocast("cpu"), _no_autocast("cuda"):
            return function(*args, **kwargs)

    return call


def _no_autocast(device_type):
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def run_kernel(kernel, grid, *args, **meta):
    """kernel[grid](*args, **meta) on the GPU that holds its tensors, which need not be the current one: Triton launches
    on that."""
    with torch.cuda.device_of(next(x for x in args if isinstance(x, torch.Tensor))):
        return kernel[grid](*args, **meta)
