"""What a host process may have switched on around us, and what it must not change: the numbers, the device."""

from contextlib import nullcontext
from functools import lru_cache, wraps

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
    on that. A kernel with a parameter EARLY is launched as overlap.py says."""
    x = next(x for x in args if isinstance(x, torch.Tensor))
    if not x.is_cpu:  # there Triton's interpreter runs, which has no cache
        settle_key(kernel)
    if "EARLY" in kernel.arg_names:
        meta |= {"EARLY": True, "launch_pdl": True} if starts_early(x.device) else {"EARLY": False}
    with torch.cuda.device_of(x):
        return kernel[grid](*args, **meta)


@lru_cache
def starts_early(device):
    """Whether kernels of this torch.device may start before the launch ahead is over; "meta" is a GPU that can."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type == "meta"


def settle_key(function):
    """Ask for a Triton function's cache_key, part of a kernel's name in Triton's cache on disk, behind those of all it
    calls; nothing on what is no Triton function.

    A key tells of the constants of a called function only if that function's own key was there first: asked for in the
    order of launches, keys would differ between processes, and each would compile what another one has.
    """
    if hasattr(type(function), "cache_key") and function.hash is None:  # on the type: it is a property that makes it
        for name in function.fn.__code__.co_names:
            settle_key(function.fn.__globals__.get(name))
        function.cache_key  # noqa: B018
