"""Several programs of a launch that make parts of one result: whoever arrives last puts them together, in their order.

So no result depends on who that is, and no further launch is needed. Each result has a counter, zero ahead of the
launch. The launches of a method under `counters_at_zero` share one tensor of them, filled once; others fill their own.
"""

import threading
from functools import wraps

import torch

from ._triton import tl, triton, use_triton

COUNT = 2**15
_shared = threading.local()  # its `free`: counters of the current function that no launch has taken yet


@triton.jit
def arrives_last(counter, programs):
    """Whether this program is the last of so many to be here with what it has stored; it then sees what all have."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1


def counters_at_zero(method):
    """A method whose launches take their counters from one tensor, where its first argument is, `tokens`."""

    @wraps(method)
    def call(self, tokens, *args, **kwargs):
        before = getattr(_shared, "free", None)
        _shared.free = tokens.new_zeros(COUNT, dtype=torch.int32) if use_triton(tokens) else None
        try:
            return method(self, tokens, *args, **kwargs)
        finally:
            _shared.free = before

    return call


def counters(x, count):
    """int32 [count] on x's device, zero when a kernel that is launched now begins."""
    free = getattr(_shared, "free", None)
    if free is None or free.device != x.device or len(free) < count:
        return x.new_zeros(count, dtype=torch.int32)
    own, _shared.free = free.split((count, len(free) - count))
    return own
