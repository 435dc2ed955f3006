"""What the programs that we start ask of this machine's libraries, by environment variables, before torch loads.

A library call changes nothing of its host's process; a program of ours, which is the whole process, does. What is set
in the environment already stays as it is.

    OMP_NUM_THREADS      as many as there are processors for this process: affinity and a container's quota count; one
                         for a small network (choose_threads)
    OMP_WAIT_POLICY      passive: threads that wait for one another sleep. Spinning ones hold a processor that the one
                         they wait for may need: with two busy cores the command line gave 32 tokens/s on two spinning
                         threads, 384 on two that sleep
    MKL_CBWR             AVX512,STRICT on an Intel processor that has it: a row's bits then do not depend on the rows
                         beside it (kernels/product.py), at the same speed
    ONEDNN_MAX_CPU_ISA   AVX512_CORE_BF16 on a processor with AMX, whose products of bfloat16 round a row by its batch
"""

import math
import os
import sys
from pathlib import Path

SMALL = 2**26  # parameters. Measured at batch 1: of 1 M 737 tokens/s on one thread, 296 to 472 on two; of 109 M as many
_set = {}  # by prepare, in this process


def prepare(environment=os.environ):
    """Set the variables that are not set; nothing once torch has been imported. Returns those that were set."""
    if "torch" in sys.modules:
        return {}
    _set.update({name: value for name, value in wanted(*processor()).items() if name not in environment})
    environment.update(_set)
    return _set


def environment():
    """For a program of ours that this process starts, and that shall choose for itself: without what `prepare` set."""
    return {name: value for name, value in os.environ.items() if name not in _set}


def choose_threads(model):
    """One thread for a network so small that two would mostly wait for each other, if `prepare` chose their number."""
    if "OMP_NUM_THREADS" in _set and sum(p.numel() for p in model.parameters()) < SMALL:
        import torch

        torch.set_num_threads(1)


def wanted(vendor, flags):
    """{variable: value} for a processor with this vendor_id and these flags, as Linux spells them."""
    asked = {"OMP_NUM_THREADS": str(processors()), "OMP_WAIT_POLICY": "passive"}
    if vendor == "GenuineIntel" and "avx512f" in flags:
        asked["MKL_CBWR"] = "AVX512,STRICT"
    if "amx_bf16" in flags:
        asked["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    return asked


def processor():
    """(vendor_id, flags) of the first processor; both empty where Linux does not say."""
    path = Path("/proc/cpuinfo")
    said = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    return said.get("vendor_id", ""), frozenset(said.get("flags", "").split())


def processors():
    """Processors for this process: those it may run on, but no more than its container's quota pays for."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _quota())))


def _quota():
    """Processors that the control group may use, infinity if it is not limited. Linux's cgroup v2, then v1."""
    v2, v1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
    if v2.is_file():
        quota, period = v2.read_text(encoding="ascii").split()
    elif (v1 / "cpu.cfs_quota_us").is_file():
        quota, period = ((v1 / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
    else:
        return math.inf
    return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
