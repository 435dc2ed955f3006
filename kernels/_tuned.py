"""Launch parameters measured on GPUs: a table per family of kernels, <family>_tuned.json, made by benchmarks/tune/.

What no table knows runs with the defaults that stand beside its kernels. A parameter may stand in a table if no bit of
any result depends on it: the tuner compares with the defaults before it times. And no entry is chosen by what else is
in the batch, unless its parameters are of that kind for every shape (the tiles of gemm.py are, and go by the tokens).
"""

import json
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

FAR = 8  # an entry measured for so many times the tokens is no guide any more

_tried = {}
_named = None


def table_path(family):
    return Path(__file__).with_name(f"{family}_tuned.json")


@lru_cache(maxsize=8)
def table(family):
    """All entries of a family: a list of dicts."""
    return json.loads(table_path(family).read_text("utf-8"))


def device_name(device):
    """A torch.device by the name it has in the tables; "any" for all that is no GPU."""
    if _named is not None:
        return _named
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "any"


def measured(family, device, **shape):
    """The entry measured on this torch.device for exactly this shape, {} if there is none."""
    return _tried[family] if family in _tried else _find(family, device, **shape)


@lru_cache(maxsize=1024)
def _find(family, device, **shape):
    return next(_entries(family, device, shape), {})


def _entries(family, device, shape):
    """Those measured on this torch.device that have what `shape` says."""
    wanted = {"device": device_name(device)} | shape
    return (entry for entry in table(family) if wanted.items() <= entry.items())


def measured_for(tokens, family, part, device, **shape):
    """`part` of the entry measured on this torch.device for this shape that is meant for as many tokens; or None.

    An entry is meant for its number of tokens and fewer, down to an eighth; of several the one of the fewest counts.
    """
    found = [
        entry
        for entry in _entries(family, device, shape)
        if part in entry and tokens <= entry["tokens"] <= FAR * tokens
    ]
    return min(found, key=lambda entry: entry["tokens"])[part] if found else None


@contextmanager
def tried(family, entry):
    """For tuners and tests: within it `measured` answers with this entry, {} for the defaults, whatever the shape."""
    before = dict(_tried)
    _tried[family] = entry
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


@contextmanager
def named(name):
    """For what compiles ahead of time: within it every device goes by this name. Once a process, for what was found is
    remembered by the device."""
    global _named
    before, _named = _named, name
    try:
        yield
    finally:
        _named = before
