"""Checks of single values. What cannot be used is a `ValueError` of the form ``name=value: what is allowed``."""

import json
import math
import numbers
import warnings
from dataclasses import field, fields
from functools import wraps

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = ("cpu", "cuda")

INT_MAX = 2**31 - 1  # counts, lengths and ids end up in int32 tensors
INT64 = 2**63
FLOAT32 = torch.finfo(torch.float32)  # what numbers of a request end up in


def bad(name, value, allowed):
    return ValueError(f"{name}={value!r:.80}: expected {allowed}")


def as_int(name, value, low, high=INT_MAX):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        too_large = isinstance(value, numbers.Integral) and value > high
        limits = f">= {low}" if high == INT_MAX and not too_large else f"in {low}..{high}"
        raise bad(name, value, f"an integer {limits}")
    return int(value)


def as_float(name, value, allowed, ok):
    """`value` as a float for which `ok` holds; `ok` is a comparison, so that NaN always fails it."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer above 1e308
            number = math.inf if value > 0 else -math.inf
    if not ok(number):
        raise bad(name, value, f"a number {allowed}")
    return number


def as_float32(value):
    """A number >= 0 as a float32 tensor can hold it: infinity where it is larger than all float32."""
    return math.inf if value > FLOAT32.max else value


def as_positive32(value):
    """A temperature or a factor as a float32 tensor can hold it: what is above 0 stays so, and is no denormal."""
    return max(value, FLOAT32.tiny) if value > 0 else value


def choice(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise bad(name, value, "one of " + ", ".join(allowed))
    return value


def as_flag(name, value):
    if not isinstance(value, bool):
        raise bad(name, value, "true or false")
    return value


def find_device(name=None, argument="device"):
    """The torch.device of this name, else the GPU if there is one. ValueError, which speaks of `argument`, if it is
    none that we run on, or none that this machine has."""
    cuda = torch.cuda.is_available()
    known = ("cuda" if cuda else "cpu") if name is None else name
    if isinstance(name, numbers.Integral) and not isinstance(name, bool):
        known = f"cuda:{name}"  # of itself PyTorch makes that only where it has a GPU
    try:
        device = torch.device(known)
    except (RuntimeError, TypeError):
        raise bad(argument, name, "a device such as cpu, cuda or cuda:1") from None
    if device.type not in DEVICES:
        raise bad(argument, str(name), f"{' or '.join(DEVICES)}: there are no kernels for {device.type}")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"{argument}={name!r:.80}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def put(owner, name, value):
    """Store a normalised value in a frozen dataclass; for use in its __post_init__ only."""
    object.__setattr__(owner, name, value)


def check(owner, name, check, *args):
    put(owner, name, check(name, getattr(owner, name), *args))


def doc(default, text, **options):
    """A dataclass's field and what it means: the text of help, docs and schemas."""
    return field(default=default, metadata={"help": text}, **options)


def described(cls):
    """Decorates a dataclass: its docstring ends with what its fields mean."""
    lines = [f"    {one.name}: {one.metadata['help']}." for one in fields(cls)]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", *lines, "    "])
    return cls


def parse_json(data: bytes, source) -> dict:
    """The JSON object in `data`. ValueError naming `source` for anything else: syntax errors, duplicate keys (where
    json.loads silently keeps the last), NaN and Infinity, nesting too deep to parse."""

    def unique(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"duplicate key {key!r:.80}")
            found[key] = value
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is not a number")

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def as_ids(name, value, most=INT_MAX):
    """A tuple of ints, at most so many, from one int or a sequence, set, array or tensor of them."""
    if hasattr(value, "tolist"):
        try:
            value = value.tolist()
        except RuntimeError:  # a tensor on the meta device, or a sparse one
            raise bad(name, value, "ids, or a dense tensor that has values") from None
    values = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    if len(values) > most:
        raise bad(name, value, f"at most {most} ids")
    return tuple(as_int(name, v, -INT64, INT64 - 1) for v in values)


def merge(name, value, other_name, other):
    """One setting spelled in two places: either may be absent, both must not differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name}={value!r:.80} contradicts {other_name}={other!r:.80}: expected equal values")
    return other if value is None else value


def renamed(**names):
    """Decorates a class: keyword arguments are taken under older names, too, with a DeprecationWarning.

    names: older name = name. ValueError if both are given.
    """

    def decorate(cls):
        init = cls.__init__

        @wraps(init)
        def __init__(self, *args, **kwargs):
            for old in names.keys() & kwargs.keys():
                new, value = names[old], kwargs.pop(old)
                if new in kwargs:
                    raise bad(old, value, f"{new} alone, which is its name now")
                warnings.warn(f"{cls.__name__}({old}=...) is called {new} now", DeprecationWarning, stacklevel=2)
                kwargs[new] = value
            init(self, *args, **kwargs)

        cls.__init__ = __init__
        return cls

    return decorate
