"""Peak tensor bytes of a call on a CPU.

PyTorch's profiler notes every allocation and release of the CPU allocator, also those made inside an operator, in the
order they happen; operators themselves are not noted, which would take gigabytes. The running sum is what the call
holds at each moment beyond what was there before it, its maximum the peak. Weights, and whatever else was made before
the call, do not count, nor does their release. The count is exact: the same call gives the same number. What libraries
keep for themselves (MKL's packing buffers, Python objects) is no tensor and is not seen.

Meter a call on its own, not while it is timed.
"""

import os

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler writes two lines to stderr at every use otherwise


def peak_bytes(call):
    """(what call() returns, the most tensor bytes allocated at once while it ran)."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profile:
        torch.autograd._enable_record_function(False)
        try:
            result = call()
        finally:
            torch.autograd._enable_record_function(True)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, most
